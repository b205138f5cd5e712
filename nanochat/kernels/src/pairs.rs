//! A block of sums with AVX-512's dot products of bf16 pairs or of four bytes, where AMX is not.

use std::arch::x86_64::*;

use crate::blocks::{Left, BLOCK, STEP_LEN, TILE, TILE_LEN};

/// Rows whose sums are in registers: two registers each, and two for the right operand. They are
/// enough to keep the multipliers busy, and divide a tile.
const ROWS: usize = 8;

/// Whether this processor has them.
pub fn are_there() -> bool {
    use std::arch::is_x86_feature_detected as has;
    let wide = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
    wide && has!("avx512bf16") && has!("avx512vnni")
}

/// `blocks::Unit::multiply`, or `multiply_bytes` with sums of 32 bits.
///
/// # Safety
/// `are_there`; as there.
pub unsafe fn multiply<const BYTES: bool>(
    left: Left,
    right: *const u16,
    steps: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
) {
    // Distances that the compiler knows.
    if left.pair_bytes == 4 {
        multiply_by::<BYTES, 4>(left, right, steps, c, stride, add);
    } else {
        debug_assert!(left.pair_bytes == 64 && left.row_bytes == 4);
        multiply_by::<BYTES, 64>(Left { row_bytes: 4, ..left }, right, steps, c, stride, add);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vnni")]
unsafe fn multiply_by<const BYTES: bool, const PAIR_BYTES: usize>(
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
        let mut sums = [[_mm512_setzero_si512(); 2]; ROWS];
        if add {
            for (r, sums) in sums.iter_mut().enumerate() {
                let line = c.add(r * stride);
                *sums = [line_of(line as *const u16), line_of(line.add(TILE) as *const u16)];
            }
        }
        for step in 0..steps {
            let rows = rows.wrapping_add(step * left.step);
            let right = right.add(step * STEP_LEN);
            for pair in 0..TILE {
                let right = right.add(32 * pair);
                let columns = [line_of(right), line_of(right.add(TILE_LEN))];
                for (r, sums) in sums.iter_mut().enumerate() {
                    let both = rows.add(r * left.row_bytes + pair * PAIR_BYTES) as *const i32;
                    let both = _mm512_set1_epi32(both.read_unaligned());
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = dot::<BYTES>(*sum, both, columns);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, sum) in sums.iter().enumerate() {
                _mm512_storeu_si512(c.add(r * stride + half * TILE) as *mut __m512i, *sum);
            }
        }
    }
}

#[inline(always)]
unsafe fn line_of(start: *const u16) -> __m512i {
    _mm512_loadu_si512(start as *const __m512i)
}

/// Sums (fp32; of bytes whole numbers) plus, for each of 16 columns, the product of the pairs in
/// `left` and `right`; of bytes, that of four unsigned ones in `left` and four signed in `right`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16,avx512vnni")]
unsafe fn dot<const BYTES: bool>(sums: __m512i, left: __m512i, right: __m512i) -> __m512i {
    if BYTES {
        return _mm512_dpbusd_epi32(sums, left, right);
    }
    let [left, right] = [left, right].map(|x| std::mem::transmute::<__m512i, __m512bh>(x));
    _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sums), left, right))
}
