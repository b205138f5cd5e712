//! Attention with AVX-512's dot products of bf16 pairs: query and weights are rounded to bf16 too.
//!
//! For a small model most of the time goes into waiting for keys and values to come from memory,
//! so each line that is used asks for one that will be needed next: keys for values, values for
//! the keys of the next span.

use crate::attention::{Method, MAX_HEAD};
use crate::math::{to_bf16, LANES};
use std::arch::x86_64::*;

pub struct Dot;

impl Method<u16> for Dot {
    #[inline(always)]
    unsafe fn score(keys: *const u16, query: &[f32], scores: &mut [f32], ahead: *const u16) {
        score(keys, query, scores, ahead)
    }

    #[inline(always)]
    unsafe fn mix(values: *const u16, weights: &[f32], out: &mut [f32], ahead: *const u16) {
        mix(values, weights, out, ahead)
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pair(numbers: *const u16, index: usize) -> __m512bh {
    let both = (numbers as *const i32).add(index).read_unaligned();
    std::mem::transmute(_mm512_set1_epi32(both))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")]
unsafe fn score(keys: *const u16, query: &[f32], scores: &mut [f32], ahead: *const u16) {
    let num_blocks = scores.len() / LANES;
    let mut rounded = [0u16; MAX_HEAD];
    for (short, &long) in rounded.iter_mut().zip(query) {
        *short = to_bf16(long);
    }
    let (query, size) = (rounded.as_ptr(), query.len());
    let mut block = 0;
    // Several blocks at once: each sum waits for the one before it.
    while block + 4 <= num_blocks {
        blocks::<4>(keys, query, size, block, scores, ahead);
        block += 4;
    }
    while block < num_blocks {
        blocks::<1>(keys, query, size, block, scores, ahead);
        block += 1;
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn blocks<const N: usize>(
    keys: *const u16,
    query: *const u16,
    size: usize,
    first: usize,
    scores: &mut [f32],
    ahead: *const u16,
) {
    let keys = keys.add(first * LANES * size) as *const __m512i;
    let ahead = ahead.wrapping_add(first * LANES * size);
    let mut sums: [__m512; N] = [_mm512_setzero_ps(); N];
    for i in 0..size / 2 {
        let both = pair(query, i);
        for (n, sum) in sums.iter_mut().enumerate() {
            let line = _mm512_loadu_si512(keys.add(n * size / 2 + i));
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add((i * N + n) * 32) as *const i8);
            *sum = _mm512_dpbf16_ps(*sum, both, std::mem::transmute::<__m512i, __m512bh>(line));
        }
    }
    let scores = &mut scores[first * LANES..][..N * LANES];
    for (n, sum) in sums.iter().enumerate() {
        _mm512_storeu_ps(scores.as_mut_ptr().add(n * LANES), *sum);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")]
unsafe fn mix(values: *const u16, weights: &[f32], out: &mut [f32], ahead: *const u16) {
    // Rounded a part at a time, so that they need no memory of their own.
    const PART: usize = 512;
    let size = out.len();
    let mut rounded = [0u16; PART];
    out.fill(0.0);
    for (part, weights) in weights.chunks(PART).enumerate() {
        for (short, &long) in rounded.iter_mut().zip(weights) {
            *short = to_bf16(long);
        }
        let (values, pairs) = (values.add(part * PART * size), weights.len() / 2);
        let ahead = ahead.wrapping_add(part * PART * size);
        let mut start = 0;
        while start + 8 * LANES <= size {
            columns::<8>(values, rounded.as_ptr(), pairs, start, out, ahead);
            start += 8 * LANES;
        }
        while start < size {
            columns::<1>(values, rounded.as_ptr(), pairs, start, out, ahead);
            start += LANES;
        }
    }
}

/// Add to `N` times 16 features from `start` on, fewer where the head ends.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn columns<const N: usize>(
    values: *const u16,
    weights: *const u16,
    num_pairs: usize,
    start: usize,
    out: &mut [f32],
    ahead: *const u16,
) {
    let size = out.len();
    let ahead = ahead.wrapping_add(2 * start);
    let there = (size - start).min(N * LANES);
    let mask = |n: usize| (((1u32 << (there - n * LANES).min(LANES)) - 1) & 0xffff) as __mmask16;
    let out = out.as_mut_ptr().add(start);
    let mut sums: [__m512; N] =
        std::array::from_fn(|n| _mm512_maskz_loadu_ps(mask(n), out.add(n * LANES)));
    for i in 0..num_pairs {
        let both = pair(weights, i);
        let line = (values as *const i32).add(i * size + start);
        for (n, sum) in sums.iter_mut().enumerate() {
            let value = _mm512_maskz_loadu_epi32(mask(n), line.add(n * LANES));
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(2 * (i * size + n * LANES)) as *const i8);
            *sum = _mm512_dpbf16_ps(*sum, both, std::mem::transmute::<__m512i, __m512bh>(value));
        }
    }
    for (n, sum) in sums.iter().enumerate() {
        _mm512_mask_storeu_ps(out.add(n * LANES), mask(n), *sum);
    }
}
