//! Products with AVX-512, written out: compilers do not find these instructions.

use crate::matmul::PANEL;
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
