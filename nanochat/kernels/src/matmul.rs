//! Products of activations with packed weights.
//!
//! Weights lie in panels of 64 outputs, in the order in which a product reads them. Every output
//! is one chain of multiply-adds over the inputs in their order, however many rows are multiplied
//! together: a row's results are the same bits alone and in a crowd.

use crate::isa::Isa;
use crate::math::{nearest, softcap, to_bf16, Number};
use crate::memory::{Buffer, Shared};

/// Outputs of a panel: four AVX-512 registers, one cache line of bytes.
pub const PANEL: usize = 64;
/// Rows multiplied together: 6 x 4 registers of sums leave room for weights and one input.
const MAX_TILE: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    F32,
    /// Weights and activations in bf16, sums in fp32.
    Bf16,
    /// Weights in 8 bits with a scale for each output, everything else in fp32.
    I8,
}

/// A weight matrix (outputs x inputs), packed.
pub struct Matrix {
    kind: Kind,
    pub outputs: usize,
    pub inputs: usize,
    data: Buffer<u8>,
    scales: Buffer<f32>,
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
            data: Buffer::zeroed(num_panels * Self::panel_bytes(kind, inputs)),
            scales: Buffer::zeroed(num_panels * PANEL),
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
            Kind::I8 => {
                let scales = &mut self.scales[panel * PANEL..(panel + 1) * PANEL];
                let mut inverse = [0.0f32; PANEL];
                for (lane, row) in rows.iter().enumerate() {
                    let largest = row.iter().fold(0.0f32, |largest, w| largest.max(w.abs()));
                    scales[lane] = largest / 127.0;
                    inverse[lane] = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                }
                for (k, line) in data.chunks_exact_mut(PANEL).enumerate() {
                    for ((place, row), inverse) in line.iter_mut().zip(rows).zip(inverse) {
                        *place = nearest(row[k] * inverse) as i8 as u8;
                    }
                }
            }
        }
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
    Softcap(Shared<f32>),
}

/// Activations (rows x inputs): bf16 where the machine multiplies it, else fp32.
#[derive(Clone, Copy)]
pub enum Inputs {
    F32(Shared<f32>),
    Bf16(Shared<u16>),
}

/// Whether a product of this kind wants its activations in bf16.
pub fn wants_bf16(isa: Isa, kind: Kind) -> bool {
    kind == Kind::Bf16 && isa == Isa::Avx512Bf16
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
    for panel in panels {
        let weights = matrix.data.ptr().add(panel * bytes);
        let scales = matrix.scales.ptr().add(panel * PANEL);
        let mut row = 0;
        while row < rows {
            let tile = (rows - row).min(MAX_TILE);
            let mut room = std::mem::MaybeUninit::<[[f32; PANEL]; MAX_TILE]>::uninit();
            let s = room.as_mut_ptr() as *mut [f32; PANEL];
            match tile {
                1 => one_tile::<1>(isa, matrix, x, row, weights, s),
                2 => one_tile::<2>(isa, matrix, x, row, weights, s),
                3 => one_tile::<3>(isa, matrix, x, row, weights, s),
                4 => one_tile::<4>(isa, matrix, x, row, weights, s),
                5 => one_tile::<5>(isa, matrix, x, row, weights, s),
                _ => one_tile::<6>(isa, matrix, x, row, weights, s),
            }
            let width = PANEL.min(matrix.outputs - panel * PANEL);
            let sums = std::slice::from_raw_parts_mut(s, tile);
            for (i, sums) in sums.iter_mut().enumerate() {
                if matrix.kind == Kind::I8 {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum *= *scales.add(j);
                    }
                }
                let at = (row + i) * matrix.outputs + panel * PANEL;
                finish(isa, sums.as_ptr(), width, then, at);
            }
            row += tile;
        }
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
        Then::Softcap(out) => {
            let out = std::slice::from_raw_parts_mut(out.at(at), width);
            for (o, &y) in out.iter_mut().zip(sums) {
                *o = softcap(y);
            }
        }
    }
}

#[inline(always)]
unsafe fn relu2<E: Number>(sums: &[f32], out: *mut E) {
    let out = std::slice::from_raw_parts_mut(out, sums.len());
    for (o, &y) in out.iter_mut().zip(sums) {
        let positive = y.max(0.0);
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
        Inputs::Bf16(x) => wide::dot_pairs::<M>(x.at(row * inputs), inputs, weights, sums),
        #[cfg(not(target_arch = "x86_64"))]
        Inputs::Bf16(_) => unreachable!("only AVX-512 multiplies bf16"),
        Inputs::F32(x) => {
            let x = x.at(row * inputs) as *const f32;
            #[cfg(target_arch = "x86_64")]
            if isa == Isa::Avx512 || isa == Isa::Avx512Bf16 {
                return match matrix.kind {
                    Kind::F32 => wide::f32s::<M>(x, inputs, weights, sums),
                    Kind::Bf16 => wide::widened_pairs::<M>(x, inputs, weights, sums),
                    Kind::I8 => wide::bytes::<M>(x, inputs, weights, sums),
                };
            }
            match matrix.kind {
                Kind::F32 => plain::<M, f32>(isa, x, inputs, weights, sums),
                Kind::Bf16 => plain_pairs::<M>(isa, x, inputs, weights, sums),
                Kind::I8 => plain::<M, i8>(isa, x, inputs, weights, sums),
            }
        }
    }
}

/// AVX-512, written out: compilers do not find these instructions.
#[cfg(target_arch = "x86_64")]
mod wide {
    use super::PANEL;
    use std::arch::x86_64::*;

    type Sums<const M: usize> = [[__m512; 4]; M];

    #[inline(always)]
    unsafe fn zero<const M: usize>() -> Sums<M> {
        [[std::mem::zeroed(); 4]; M]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn write<const M: usize>(values: Sums<M>, sums: *mut [f32; PANEL]) {
        for (m, row) in values.iter().enumerate() {
            for (j, value) in row.iter().enumerate() {
                _mm512_storeu_ps((*sums.add(m)).as_mut_ptr().add(16 * j), *value);
            }
        }
    }

    /// bf16 x bf16, two inputs at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn dot_pairs<const M: usize>(
        x: *const u16,
        inputs: usize,
        weights: *const u8,
        sums: *mut [f32; PANEL],
    ) {
        let mut acc = zero::<M>();
        let weights = weights as *const __m512i;
        for pair in 0..inputs / 2 {
            let w: [__m512bh; 4] = std::array::from_fn(|j| {
                std::mem::transmute(_mm512_loadu_si512(weights.add(4 * pair + j)))
            });
            for (m, row) in acc.iter_mut().enumerate() {
                let both = *(x.add(m * inputs + 2 * pair) as *const i32);
                let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(both));
                for j in 0..4 {
                    row[j] = _mm512_dpbf16_ps(row[j], a, w[j]);
                }
            }
        }
        write(acc, sums);
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn f32s<const M: usize>(
        x: *const f32,
        inputs: usize,
        weights: *const u8,
        sums: *mut [f32; PANEL],
    ) {
        let mut acc = zero::<M>();
        let weights = weights as *const f32;
        for k in 0..inputs {
            let w: [__m512; 4] =
                std::array::from_fn(|j| _mm512_loadu_ps(weights.add(k * PANEL + 16 * j)));
            for (m, row) in acc.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*x.add(m * inputs + k));
                for j in 0..4 {
                    row[j] = _mm512_fmadd_ps(a, w[j], row[j]);
                }
            }
        }
        write(acc, sums);
    }

    /// bf16 weights, fp32 activations: the two halves of a lane, one input after the other.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn widened_pairs<const M: usize>(
        x: *const f32,
        inputs: usize,
        weights: *const u8,
        sums: *mut [f32; PANEL],
    ) {
        let mut acc = zero::<M>();
        let weights = weights as *const __m512i;
        let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
        for pair in 0..inputs / 2 {
            let both: [__m512i; 4] =
                std::array::from_fn(|j| _mm512_loadu_si512(weights.add(4 * pair + j)));
            for half in 0..2 {
                let w: [__m512; 4] = std::array::from_fn(|j| {
                    _mm512_castsi512_ps(if half == 0 {
                        _mm512_slli_epi32::<16>(both[j])
                    } else {
                        _mm512_and_si512(both[j], high)
                    })
                });
                for (m, row) in acc.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*x.add(m * inputs + 2 * pair + half));
                    for j in 0..4 {
                        row[j] = _mm512_fmadd_ps(a, w[j], row[j]);
                    }
                }
            }
        }
        write(acc, sums);
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn bytes<const M: usize>(
        x: *const f32,
        inputs: usize,
        weights: *const u8,
        sums: *mut [f32; PANEL],
    ) {
        let mut acc = zero::<M>();
        for k in 0..inputs {
            let line = weights.add(k * PANEL) as *const __m128i;
            let w: [__m512; 4] = std::array::from_fn(|j| {
                _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(line.add(j))))
            });
            for (m, row) in acc.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*x.add(m * inputs + k));
                for j in 0..4 {
                    row[j] = _mm512_fmadd_ps(a, w[j], row[j]);
                }
            }
        }
        write(acc, sums);
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
