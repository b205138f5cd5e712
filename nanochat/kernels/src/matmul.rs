//! Products of activations with packed weights.
//!
//! Weights lie in panels of 64 outputs, in the order in which a product reads them. Every output
//! is one chain of multiply-adds over the inputs in their order, however many rows are multiplied
//! together: a row's results are the same bits alone and in a crowd.

#[cfg(target_arch = "x86_64")]
use crate::bytes;
use crate::isa::Isa;
use crate::math::{larger, nearest, softcap, to_bf16, Number};
use crate::memory::{Buffer, Shared};
#[cfg(target_arch = "x86_64")]
use crate::{amx, avx512, tiles};

/// Outputs of a panel: four AVX-512 registers, one cache line of bytes.
pub const PANEL: usize = 64;
/// Rows multiplied together: 6 x 4 registers of sums leave room for weights and one input.
const MAX_TILE: usize = 6;
/// In tiles: two of them.
const MAX_BLOCK: usize = 32;
/// Inputs that are multiplied as bytes are padded with zeros to a multiple of this: a tile's line.
pub const BYTES_STEP: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    F32,
    /// Weights and activations in bf16, sums in fp32.
    Bf16,
    /// Weights in 8 bits with a scale for each output, everything else in fp32.
    I8,
    /// The same weights; activations in 16 bits, which are multiplied as two bytes.
    I8Split,
}

impl Kind {
    /// 8-bit weights of up to so many inputs, as this machine multiplies them best.
    pub fn of_bytes(isa: Isa, most_inputs: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if isa.multiplies_bytes() && most_inputs <= bytes::MAX_INPUTS {
            return Self::I8Split;
        }
        let _ = (isa, most_inputs);
        Self::I8
    }
}

/// A weight matrix (outputs x inputs), packed.
pub struct Matrix {
    kind: Kind,
    pub outputs: usize,
    pub inputs: usize,
    data: Buffer<u8>,
    scales: Buffer<f32>,
    /// Each output's sum of 8-bit weights.
    totals: Buffer<i32>,
}

impl Matrix {
    /// `weights`: several matrices (rows x inputs) that share their inputs, one under the other.
    pub fn pack(kind: Kind, weights: &[&[f32]], inputs: usize) -> Self {
        let rows: Vec<&[f32]> = weights.iter().flat_map(|w| w.chunks_exact(inputs)).collect();
        let outputs = rows.len();
        let num_panels = outputs.div_ceil(PANEL);
        let mut matrix = Self {
            kind,
            outputs,
            inputs,
            data: Buffer::dense(num_panels * Self::panel_bytes(kind, inputs)),
            scales: Buffer::zeroed(num_panels * PANEL),
            totals: Buffer::zeroed(num_panels * PANEL),
        };
        for (panel, rows) in rows.chunks(PANEL).enumerate() {
            matrix.set_panel(panel, rows);
        }
        matrix
    }

    /// Stands in while the real one is lent.
    pub fn empty() -> Self {
        Self::pack(Kind::F32, &[], 1)
    }

    fn panel_bytes(kind: Kind, inputs: usize) -> usize {
        match kind {
            Kind::F32 => inputs * PANEL * 4,
            Kind::Bf16 => inputs * PANEL * 2,
            Kind::I8 => inputs * PANEL,
            Kind::I8Split => inputs.next_multiple_of(BYTES_STEP) * PANEL,
        }
    }

    /// Written from its beginning to its end, which memory likes better than row by row.
    fn set_panel(&mut self, panel: usize, rows: &[&[f32]]) {
        let bytes = Self::panel_bytes(self.kind, self.inputs);
        let data = &mut self.data[panel * bytes..(panel + 1) * bytes];
        match self.kind {
            Kind::F32 => {
                for (k, line) in data.chunks_exact_mut(PANEL * 4).enumerate() {
                    for (place, row) in line.chunks_exact_mut(4).zip(rows) {
                        place.copy_from_slice(&row[k].to_ne_bytes());
                    }
                }
            }
            Kind::Bf16 => {
                for (pair, line) in data.chunks_exact_mut(PANEL * 4).enumerate() {
                    for (place, row) in line.chunks_exact_mut(4).zip(rows) {
                        place[..2].copy_from_slice(&to_bf16(row[2 * pair]).to_ne_bytes());
                        place[2..].copy_from_slice(&to_bf16(row[2 * pair + 1]).to_ne_bytes());
                    }
                }
            }
            Kind::I8 | Kind::I8Split => {
                let scales = &mut self.scales[panel * PANEL..(panel + 1) * PANEL];
                let mut inverse = [0.0f32; PANEL];
                for (lane, row) in rows.iter().enumerate() {
                    let largest = row.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
                    scales[lane] = largest / 127.0;
                    inverse[lane] = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                }
                let in_line = if self.kind == Kind::I8 { 1 } else { 4 };
                let totals = &mut self.totals[panel * PANEL..(panel + 1) * PANEL];
                for (k, line) in data.chunks_exact_mut(PANEL * in_line).enumerate() {
                    for (lane, (places, row)) in
                        line.chunks_exact_mut(in_line).zip(rows).enumerate()
                    {
                        let row = row.iter().skip(in_line * k);
                        for (place, weight) in places.iter_mut().zip(row) {
                            let whole = nearest(weight * inverse[lane]) as i8;
                            *place = whole as u8;
                            totals[lane] += whole as i32;
                        }
                    }
                }
            }
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn num_panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    pub fn num_bytes(&self) -> usize {
        self.data.len()
    }
}

/// What becomes of the products.
#[derive(Clone, Copy)]
pub enum Then {
    Store(Shared<f32>),
    Add(Shared<f32>),
    /// max(y, 0)^2 in bf16 or fp32, as the next product reads it.
    Relu2Bf16(Shared<u16>),
    Relu2F32(Shared<f32>),
    /// cap tanh(y / cap)
    Softcap(Shared<f32>, f32),
}

/// Activations (rows x inputs): bf16 where the machine multiplies it, else fp32.
#[derive(Clone, Copy)]
pub enum Inputs {
    F32(Shared<f32>),
    Bf16(Shared<u16>),
    #[cfg(target_arch = "x86_64")]
    Split(bytes::Split),
}

/// Whether a product of this kind wants its activations in bf16.
pub fn wants_bf16(isa: Isa, kind: Kind) -> bool {
    kind == Kind::Bf16 && isa.multiplies_bf16()
}

/// Multiply `rows` rows with panels `first..last`.
///
/// # Safety
/// `x` holds rows x inputs numbers in rows of an even length, `then` rows x outputs; no other task
/// has these panels.
pub unsafe fn multiply(
    isa: Isa,
    matrix: &Matrix,
    x: Inputs,
    rows: usize,
    panels: std::ops::Range<usize>,
    then: Then,
) {
    let bytes = Matrix::panel_bytes(matrix.kind, matrix.inputs);
    let most = most_rows(isa, x);
    // Puts back at the end what another library may rely on.
    #[cfg(target_arch = "x86_64")]
    let _tiles = (isa == Isa::Amx && !matches!(x, Inputs::F32(_))).then(|| amx::Tiles::configure());
    for panel in panels {
        let weights = matrix.data.ptr().add(panel * bytes);
        let scales = matrix.scales.ptr().add(panel * PANEL);
        let width = PANEL.min(matrix.outputs - panel * PANEL);
        let mut row = 0;
        while row < rows {
            let count = (rows - row).min(most);
            let mut room = std::mem::MaybeUninit::<[[f32; PANEL]; MAX_BLOCK]>::uninit();
            let s = room.as_mut_ptr() as *mut [f32; PANEL];
            match x {
                #[cfg(target_arch = "x86_64")]
                Inputs::Bf16(x) if isa == Isa::Amx => {
                    let x = x.at(row * matrix.inputs) as *const u8;
                    let (bytes, is_cold) = (2 * matrix.inputs, row == 0);
                    tiles::multiply::<false>(x, count, bytes, weights, is_cold, s as *mut u8);
                }
                #[cfg(target_arch = "x86_64")]
                Inputs::Split(x) => split_block(isa, matrix, x, row, count, panel, s),
                _ => match count {
                    1 => one_tile::<1>(isa, matrix, x, row, weights, s),
                    2 => one_tile::<2>(isa, matrix, x, row, weights, s),
                    3 => one_tile::<3>(isa, matrix, x, row, weights, s),
                    4 => one_tile::<4>(isa, matrix, x, row, weights, s),
                    5 => one_tile::<5>(isa, matrix, x, row, weights, s),
                    _ => one_tile::<6>(isa, matrix, x, row, weights, s),
                },
            }
            for (i, sums) in std::slice::from_raw_parts_mut(s, count).iter_mut().enumerate() {
                if matrix.kind == Kind::I8 {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum *= *scales.add(j);
                    }
                }
                let at = (row + i) * matrix.outputs + panel * PANEL;
                finish(isa, sums.as_ptr(), width, then, at);
            }
            row += count;
        }
    }
}

/// Rows that share one reading of a panel.
fn most_rows(isa: Isa, x: Inputs) -> usize {
    match x {
        Inputs::Bf16(_) if isa == Isa::Amx => MAX_BLOCK,
        #[cfg(target_arch = "x86_64")]
        Inputs::Split(_) if isa == Isa::Amx => tiles::ROWS,
        #[cfg(target_arch = "x86_64")]
        Inputs::Split(_) => bytes::MAX_ROWS,
        _ => MAX_TILE,
    }
}

/// Products of `count` rows of split activations with a panel.
#[cfg(target_arch = "x86_64")]
unsafe fn split_block(
    isa: Isa,
    matrix: &Matrix,
    x: bytes::Split,
    row: usize,
    count: usize,
    panel: usize,
    out: *mut [f32; PANEL],
) {
    let mut room = std::mem::MaybeUninit::<[[[i32; PANEL]; 2]; tiles::ROWS]>::uninit();
    let sums = room.as_mut_ptr() as *mut [[i32; PANEL]; 2];
    let weights = matrix.data.ptr().add(panel * x.stride * PANEL);
    let bytes = x.row(row);
    match count {
        1 => bytes::multiply::<1>(bytes, x.stride, weights, sums),
        _ if isa == Isa::Amx => {
            let sums = sums as *mut u8;
            tiles::multiply::<true>(bytes, 2 * count, x.stride, weights, row == 0, sums);
        }
        2 => bytes::multiply::<2>(bytes, x.stride, weights, sums),
        _ => bytes::multiply::<3>(bytes, x.stride, weights, sums),
    }
    let totals = matrix.totals.ptr().add(panel * PANEL);
    let scales = matrix.scales.ptr().add(panel * PANEL);
    for i in 0..count {
        let row_scale = *x.scales.at(row + i);
        bytes::join(&*sums.add(i), totals, scales, row_scale, &mut *out.add(i));
    }
}

crate::isa::versions! {
    fn finish(sums: *const f32, width: usize, then: Then, at: usize) = finish_body;
}

#[inline(always)]
unsafe fn finish_body(sums: *const f32, width: usize, then: Then, at: usize) {
    let sums = std::slice::from_raw_parts(sums, width);
    match then {
        Then::Store(out) => std::ptr::copy_nonoverlapping(sums.as_ptr(), out.at(at), width),
        Then::Add(out) => {
            let out = std::slice::from_raw_parts_mut(out.at(at), width);
            for (o, y) in out.iter_mut().zip(sums) {
                *o += y;
            }
        }
        Then::Relu2Bf16(out) => relu2(sums, out.at(at)),
        Then::Relu2F32(out) => relu2(sums, out.at(at)),
        Then::Softcap(out, cap) => {
            let out = std::slice::from_raw_parts_mut(out.at(at), width);
            for (o, &y) in out.iter_mut().zip(sums) {
                *o = softcap(y, cap);
            }
        }
    }
}

#[inline(always)]
unsafe fn relu2<E: Number>(sums: &[f32], out: *mut E) {
    let out = std::slice::from_raw_parts_mut(out, sums.len());
    for (o, &y) in out.iter_mut().zip(sums) {
        let positive = larger(0.0, y);
        *o = E::from_f32(positive * positive);
    }
}

#[inline(always)]
unsafe fn one_tile<const M: usize>(
    isa: Isa,
    matrix: &Matrix,
    x: Inputs,
    row: usize,
    weights: *const u8,
    sums: *mut [f32; PANEL],
) {
    let inputs = matrix.inputs;
    match x {
        #[cfg(target_arch = "x86_64")]
        Inputs::Bf16(x) => avx512::dot_pairs::<M>(x.at(row * inputs), inputs, weights, sums),
        #[cfg(not(target_arch = "x86_64"))]
        Inputs::Bf16(_) => unreachable!("only AVX-512 multiplies bf16"),
        #[cfg(target_arch = "x86_64")]
        Inputs::Split(_) => unreachable!("split activations have products of their own"),
        Inputs::F32(x) => {
            let x = x.at(row * inputs) as *const f32;
            #[cfg(target_arch = "x86_64")]
            if isa.is_wide() {
                return match matrix.kind {
                    Kind::F32 => avx512::f32s::<M>(x, inputs, weights, sums),
                    Kind::Bf16 => avx512::widened_pairs::<M>(x, inputs, weights, sums),
                    Kind::I8 | Kind::I8Split => avx512::bytes::<M>(x, inputs, weights, sums),
                };
            }
            match matrix.kind {
                Kind::F32 => plain::<M, f32>(isa, x, inputs, weights, sums),
                Kind::Bf16 => plain_pairs::<M>(isa, x, inputs, weights, sums),
                Kind::I8 | Kind::I8Split => plain::<M, i8>(isa, x, inputs, weights, sums),
            }
        }
    }
}

trait Weight: Copy {
    fn to_f32(self) -> f32;
}

impl Weight for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Weight for i8 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
}

/// Any machine: a few rows and a quarter of a panel at a time, which fits 16 registers of AVX2.
#[inline(always)]
unsafe fn plain<const M: usize, W: Weight>(
    isa: Isa,
    x: *const f32,
    inputs: usize,
    weights: *const u8,
    sums: *mut [f32; PANEL],
) {
    for m in 0..M {
        let out = (*sums.add(m)).as_mut_ptr();
        quarter_rows::<W>(isa, x.add(m * inputs), inputs, weights as *const W, out);
    }
}

#[inline(always)]
unsafe fn quarter_rows<W: Weight>(
    isa: Isa,
    x: *const f32,
    inputs: usize,
    weights: *const W,
    out: *mut f32,
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        unsafe fn narrow<W: Weight>(
            x: *const f32,
            inputs: usize,
            weights: *const W,
            out: *mut f32,
        ) {
            one_row(x, inputs, weights, out)
        }
        let _ = isa;
        narrow(x, inputs, weights, out)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = isa;
        one_row(x, inputs, weights, out)
    }
}

#[inline(always)]
unsafe fn one_row<W: Weight>(x: *const f32, inputs: usize, weights: *const W, out: *mut f32) {
    let mut acc = [0.0f32; PANEL];
    for k in 0..inputs {
        let a = *x.add(k);
        let line = weights.add(k * PANEL);
        for (j, sum) in acc.iter_mut().enumerate() {
            *sum = a.mul_add((*line.add(j)).to_f32(), *sum);
        }
    }
    std::ptr::copy_nonoverlapping(acc.as_ptr(), out, PANEL);
}

#[inline(always)]
unsafe fn plain_pairs<const M: usize>(
    isa: Isa,
    x: *const f32,
    inputs: usize,
    weights: *const u8,
    sums: *mut [f32; PANEL],
) {
    for m in 0..M {
        let out = (*sums.add(m)).as_mut_ptr();
        pair_row(isa, x.add(m * inputs), inputs, weights as *const u32, out);
    }
}

crate::isa::versions! {
    fn pair_row(x: *const f32, inputs: usize, weights: *const u32, out: *mut f32) = pair_row_body;
}

#[inline(always)]
unsafe fn pair_row_body(x: *const f32, inputs: usize, weights: *const u32, out: *mut f32) {
    let mut acc = [0.0f32; PANEL];
    for pair in 0..inputs / 2 {
        let (first, second) = (*x.add(2 * pair), *x.add(2 * pair + 1));
        let line = weights.add(pair * PANEL);
        for (j, sum) in acc.iter_mut().enumerate() {
            let both = *line.add(j);
            *sum = first.mul_add(f32::from_bits(both << 16), *sum);
            *sum = second.mul_add(f32::from_bits(both & 0xffff_0000), *sum);
        }
    }
    std::ptr::copy_nonoverlapping(acc.as_ptr(), out, PANEL);
}
