//! A block of sums with AVX-512's dot products of bf16 pairs, for processors without AMX.

use std::arch::x86_64::*;

use crate::blocks::{Left, BLOCK, STEP_LEN, TILE, TILE_LEN};

/// Rows whose sums are in registers: two registers each, and two for the right operand. They are
/// enough to keep the multipliers busy, and divide a tile.
const ROWS: usize = 8;

/// Whether this processor has them.
pub fn are_there() -> bool {
    use std::arch::is_x86_feature_detected as has;
    let wide = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
    wide && has!("avx512bf16")
}

/// `blocks::Unit::multiply`.
///
/// # Safety
/// `are_there`; as there.
pub unsafe fn multiply(
    left: Left,
    right: *const u16,
    steps: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
) {
    // Distances that the compiler knows.
    if left.pair_bytes == 4 {
        multiply_by::<4>(left, right, steps, c, stride, add);
    } else {
        debug_assert!(left.pair_bytes == 64 && left.row_bytes == 4);
        multiply_by::<64>(Left { row_bytes: 4, ..left }, right, steps, c, stride, add);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply_by<const PAIR_BYTES: usize>(
    left: Left,
    right: *const u16,
    steps: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
) {
    for top in (0..BLOCK).step_by(ROWS) {
        let rows = (left.start as *const u8)
            .wrapping_add(top / TILE * left.lower + top % TILE * left.row_bytes);
        let c = c.add(top * stride);
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        if add {
            for (r, sums) in sums.iter_mut().enumerate() {
                let line = c.add(r * stride);
                *sums = [_mm512_loadu_ps(line), _mm512_loadu_ps(line.add(TILE))];
            }
        }
        for step in 0..steps {
            let rows = rows.wrapping_add(step * left.step);
            let right = right.add(step * STEP_LEN);
            for pair in 0..TILE {
                let columns = [line(right.add(32 * pair)), line(right.add(TILE_LEN + 32 * pair))];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let both = rows.add(r * left.row_bytes + pair * PAIR_BYTES) as *const i32;
                    let both = bf16(_mm512_set1_epi32(both.read_unaligned()));
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, both, columns);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(c.add(r * stride + half * TILE), *sum);
            }
        }
    }
}

#[inline(always)]
unsafe fn line(start: *const u16) -> __m512bh {
    bf16(_mm512_loadu_si512(start as *const __m512i))
}

#[inline(always)]
fn bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits.
    unsafe { std::mem::transmute(bits) }
}
