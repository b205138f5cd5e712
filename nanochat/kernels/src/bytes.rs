//! Products of 8-bit weights with activations of 16 bits, which are split into two bytes.
//!
//! The processor multiplies unsigned bytes with signed ones and adds the products without rounding,
//! so a sum is exact in whatever order it grows, in tiles or in registers.

use crate::math::{larger, nearest, LANES};
use crate::memory::Shared;
use crate::tiles::AHEAD;
use std::arch::x86_64::*;

/// Sums of so many products of two bytes still fit 32 bits.
pub const MAX_INPUTS: usize = 1 << 16;
/// Rows multiplied together in registers: 2 x 4 sums each.
pub const MAX_ROWS: usize = 3;

/// Activations: each is `scale` of its row x (256 high + low - 2^15).
#[derive(Clone, Copy)]
pub struct Split {
    /// For each row its high bytes, then its low bytes: `stride` of each.
    pub bytes: Shared<u8>,
    pub scales: Shared<f32>,
    /// Inputs with their padding.
    pub stride: usize,
}

impl Split {
    /// Where a row's bytes begin.
    ///
    /// # Safety
    /// There is such a row.
    pub unsafe fn row(&self, row: usize) -> *mut u8 {
        self.bytes.at(2 * row * self.stride)
    }
}

/// Split one row. Its largest number becomes 32,767.
///
/// # Safety
/// AVX-512; `x` holds `inputs` numbers, `out` has room for the row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")]
pub unsafe fn split(x: *const f32, inputs: usize, row: usize, out: Split) {
    let x = std::slice::from_raw_parts(x, inputs);
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    for (lane, &v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = v.abs();
    }
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = larger(v.abs(), *lane);
        }
    }
    let most = crate::math::largest(lanes);
    let factor = if most > 0.0 { 32_767.0 / most } else { 0.0 };
    *out.scales.at(row) = most / 32_767.0;
    let both = std::slice::from_raw_parts_mut(out.row(row), 2 * out.stride);
    let (high, low) = both.split_at_mut(out.stride);
    for ((high, low), &v) in high.iter_mut().zip(low.iter_mut()).zip(x) {
        let whole = nearest(v * factor) as i32 + (1 << 15);
        (*high, *low) = ((whole >> 8) as u8, whole as u8);
    }
    // Met by weights of 0 only, but what is never written may not be read.
    high[inputs..].fill(0);
    low[inputs..].fill(0);
}

/// Multiply `M` rows with a panel of 64 outputs: for each the exact sums of its high and of its low
/// bytes.
///
/// # Safety
/// AVX-512 with VNNI; `x` has 2 x M rows of `stride` bytes, the panel a line of 64 quads for every
/// four.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub unsafe fn multiply<const M: usize>(
    x: *const u8,
    stride: usize,
    panel: *const u8,
    sums: *mut [[i32; 64]; 2],
) {
    let mut acc = [[[_mm512_setzero_si512(); 4]; 2]; M];
    let panel = panel as *const __m512i;
    for quad in 0..stride / 4 {
        let w: [__m512i; 4] = std::array::from_fn(|j| _mm512_loadu_si512(panel.add(4 * quad + j)));
        for j in 0..4 {
            _mm_prefetch::<_MM_HINT_T0>(panel.wrapping_add(4 * quad + j + AHEAD / 64) as *const i8);
        }
        for (m, acc) in acc.iter_mut().enumerate() {
            for (half, acc) in acc.iter_mut().enumerate() {
                let four = x.add((2 * m + half) * stride + 4 * quad) as *const i32;
                let four = _mm512_set1_epi32(four.read_unaligned());
                for (sum, &w) in acc.iter_mut().zip(&w) {
                    *sum = _mm512_dpbusd_epi32(*sum, four, w);
                }
            }
        }
    }
    for (m, acc) in acc.iter().enumerate() {
        for (half, acc) in acc.iter().enumerate() {
            for (j, &sum) in acc.iter().enumerate() {
                let sums = (*sums.add(m))[half].as_mut_ptr();
                _mm512_storeu_si512(sums.add(16 * j).cast(), sum);
            }
        }
    }
}

/// The products that sums of bytes stand for: `out` (64) for one row.
///
/// `totals`: each output's sum of weights; `scales`: what its weights are multiples of.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")]
pub unsafe fn join(
    [high, low]: &[[i32; 64]; 2],
    totals: *const i32,
    scales: *const f32,
    row_scale: f32,
    out: &mut [f32; 64],
) {
    for j in 0..64 {
        // 256 x 128 was added to every activation.
        let high = (high[j] - 128 * *totals.add(j)) as f32;
        out[j] = (high * 256.0 + low[j] as f32) * (*scales.add(j) * row_scale);
    }
}
