//! Operands of products in 8-bit integers: 32 rows or columns of a bf16 matrix, rounded.
//!
//! Each row of the left operand and each column of the right one has a scale of its own, by which
//! its largest number becomes 127. The processor multiplies unsigned bytes with signed ones and
//! adds the products without rounding: numbers of the left operand are stored with 128 added, and
//! 128 times the right column's sum is taken off in the end. A left operand that is never negative
//! is stored as it is, its largest number as 255.
//!
//! Such scales are those of SwitchBack (arXiv:2304.13013), which leaves gradients of weights in 16
//! bits; with scales for each column of a few hundred rows, they keep their quality in 8.
//!
//! Tiles are those of `blocks`, with four bytes in the place of a pair: a step takes 64 numbers of
//! the contraction. A row or column with a number that is not finite has a scale that is not, so
//! none of its products is taken for a number. One whose largest is below 4e-37 becomes 0.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use crate::blocks::{first_lanes, store, transpose, widen, Left, Unit, View, BLOCK, TILE};

/// Numbers of a contraction that one step takes, and the bytes of its two tiles.
const STEP: usize = 64;
const STEP_BYTES: usize = 2 * TILE * STEP;
/// Bytes of a number for each of 32 rows or columns.
const LINE_BYTES: usize = 4 * BLOCK;
/// What is added to numbers of a signed left operand.
const OFFSET: i32 = 128;
/// The largest number of signed operands and of unsigned ones.
const SIGNED_LIMIT: f32 = 127.0;
const UNSIGNED_LIMIT: f32 = 255.0;
/// Sums of so many products of an unsigned byte with a signed one fit 32 bits.
pub const MAX_CONTRACTION: usize = 1 << 16;

fn steps(contraction: usize) -> usize {
    contraction.div_ceil(STEP)
}

/// Bytes of 32 rows of the left operand with their scales.
pub fn left_bytes(contraction: usize) -> usize {
    LINE_BYTES + BLOCK * steps(contraction) * STEP
}

/// Bytes of 32 packed columns of the right operand: tiles, scales, and what the offset adds.
pub fn right_bytes(contraction: usize) -> usize {
    steps(contraction) * STEP_BYTES + 2 * LINE_BYTES
}

/// 32 rows of a left operand.
#[derive(Clone, Copy)]
pub struct Rounded {
    rows: Left,
    scales: *const f32,
    is_signed: bool,
}

/// 32 columns as `pack_rows` or `pack_columns` has packed them.
#[derive(Clone, Copy)]
struct Right {
    steps: usize,
    tiles: *mut u8,
    scales: *mut f32,
    offsets: *mut i32,
}

impl Right {
    unsafe fn at(start: *mut u8, contraction: usize) -> Self {
        let steps = steps(contraction);
        let scales = start.add(steps * STEP_BYTES);
        let offsets = scales.add(LINE_BYTES) as *mut i32;
        Self { steps, tiles: start, scales: scales as *mut f32, offsets }
    }

    unsafe fn tile(&self, step: usize, half: usize) -> *mut u16 {
        self.tiles.add(step * STEP_BYTES + half * STEP_BYTES / 2) as *mut u16
    }

    /// Note what the offset of the left operand adds to each column's sum.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn note_offsets(&self) {
        let ones = _mm512_set1_epi8(1);
        for half in 0..2 {
            let mut sum = _mm512_setzero_si512();
            for step in 0..self.steps {
                let tile = self.tile(step, half) as *const __m512i;
                for line in 0..TILE {
                    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(tile.add(line)));
                }
            }
            let offset = _mm512_mullo_epi32(sum, _mm512_set1_epi32(OFFSET));
            _mm512_storeu_si512(self.offsets.add(TILE * half) as *mut __m512i, offset);
        }
    }
}

/// The larger of each of 32 bf16 numbers without their signs; one that is none is the largest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn larger(most: __m512i, x: __m512i) -> __m512i {
    _mm512_max_epu16(most, _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)))
}

/// 32 bf16 numbers as fp32.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn wide(x: __m512i) -> [__m512; 2] {
    [widen(_mm512_castsi512_si256(x)), widen(_mm512_extracti64x4_epi64::<1>(x))]
}

/// What numbers up to `most` are multiplied with to reach `limit`, and what brings them back.
#[inline]
#[target_feature(enable = "avx512f")]
fn factors(most: __m512, limit: f32) -> (__m512, __m512) {
    let limit = _mm512_set1_ps(limit);
    let is_zero = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(most, _mm512_setzero_ps());
    let factor = _mm512_mask_div_ps(_mm512_setzero_ps(), !is_zero, limit, most);
    (factor, _mm512_div_ps(most, limit))
}

/// 16 numbers times `factor`, to nearest even.
#[inline]
#[target_feature(enable = "avx512f")]
fn whole(x: __m512, factor: __m512) -> __m512i {
    _mm512_cvtps_epi32(_mm512_mul_ps(x, factor))
}

/// 32 numbers of a row as bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn bytes(x: __m512i, factor: __m512) -> __m256i {
    let [low, high] = wide(x).map(|half| _mm512_cvtepi32_epi8(whole(half, factor)));
    _mm256_set_m128i(high, low)
}

/// The factors of a row of `len` numbers, a multiple of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn row_factors(x: *const u16, len: usize, limit: f32) -> (__m512, f32) {
    let mut most = _mm512_setzero_si512();
    for i in (0..len).step_by(BLOCK) {
        most = larger(most, _mm512_loadu_si512(x.add(i) as *const __m512i));
    }
    let [low, high] = wide(most).map(|half| _mm512_castps_si512(half));
    let most = _mm512_reduce_max_epi32(_mm512_max_epi32(low, high));
    let (factor, scale) = factors(_mm512_castsi512_ps(_mm512_set1_epi32(most)), limit);
    (factor, _mm512_cvtss_f32(scale))
}

/// Round 32 rows from `row` on to `out`, which has room for `left_bytes`, as a left operand: of any
/// numbers if `SIGNED`, else of such that are not negative. Beyond the matrix rows are 0.
///
/// # Safety
/// AVX-512; the number of columns is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn pack_left<const SIGNED: bool>(x: &View, row: usize, out: *mut u8) -> Rounded {
    let (scales, width) = (out as *mut f32, steps(x.columns) * STEP);
    let offset = _mm256_set1_epi8(if SIGNED { OFFSET as u8 as i8 } else { 0 });
    let limit = if SIGNED { SIGNED_LIMIT } else { UNSIGNED_LIMIT };
    for r in 0..BLOCK {
        let to = out.add(LINE_BYTES + r * width);
        if row + r >= x.rows {
            std::ptr::write_bytes(to, 0, width);
            *scales.add(r) = 0.0;
            continue;
        }
        let from = x.at(row + r, 0);
        let (factor, scale) = row_factors(from, x.columns, limit);
        *scales.add(r) = scale;
        for i in (0..x.columns).step_by(BLOCK) {
            let line = bytes(_mm512_loadu_si512(from.add(i) as *const __m512i), factor);
            _mm256_storeu_si256(to.add(i) as *mut __m256i, _mm256_xor_si256(line, offset));
        }
        // The numbers of the right operand that these meet are 0.
        std::ptr::write_bytes(to.add(x.columns), 0, width - x.columns);
    }
    Rounded { rows: Left::bytes(out.add(LINE_BYTES), width), scales, is_signed: SIGNED }
}

/// Pack 32 columns from `column` on as the rows of a left operand of a product over rows:
/// the transpose of (contraction, rows of the product).
///
/// # Safety
/// AVX-512; `out` has room for `left_bytes` of the contraction.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn pack_left_columns(unit: &Unit, x: &View, column: usize, out: *mut u8) -> Rounded {
    let (scales, tiles) = (out as *mut f32, out.add(LINE_BYTES));
    round_columns(x, steps(x.rows), column, tiles, scales);
    let sign = _mm512_set1_epi8(OFFSET as u8 as i8);
    for i in 0..2 * steps(x.rows) {
        let place = (tiles as *mut __m512i).add(TILE * i);
        let mut tile: [__m512i; TILE] = std::array::from_fn(|r| unsafe {
            _mm512_xor_si512(_mm512_loadu_si512(place.add(r)), sign)
        });
        if unit.takes_rows() {
            tile = transpose(tile);
        }
        store(&tile, place as *mut u16);
    }
    Rounded { rows: unit.left(tiles as *const u16), scales, is_signed: true }
}

/// Pack 32 rows from `row` on as a right operand of a product over columns: (outputs, contraction).
///
/// # Safety
/// AVX-512 with VNNI; `out` has room for `right_bytes`; the number of columns is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn pack_rows(x: &View, row: usize, out: *mut u8) {
    let right = Right::at(out, x.columns);
    for half in 0..2 {
        let mut row_factor = [_mm512_setzero_ps(); TILE];
        for (r, factor) in row_factor.iter_mut().enumerate() {
            let (at, mut scale) = (row + TILE * half + r, 0.0);
            if at < x.rows {
                (*factor, scale) = row_factors(x.at(at, 0), x.columns, SIGNED_LIMIT);
            }
            *right.scales.add(TILE * half + r) = scale;
        }
        for step in 0..right.steps {
            let mut tile = [_mm512_setzero_si512(); TILE];
            for (r, line) in tile.iter_mut().enumerate() {
                let at = row + TILE * half + r;
                if at >= x.rows {
                    continue;
                }
                for i in 0..2 {
                    let column = STEP * step + BLOCK * i;
                    if column < x.columns {
                        let from = _mm512_loadu_si512(x.at(at, column) as *const __m512i);
                        let part = bytes(from, row_factor[r]);
                        *line = if i == 0 {
                            _mm512_inserti64x4::<0>(*line, part)
                        } else {
                            _mm512_inserti64x4::<1>(*line, part)
                        };
                    }
                }
            }
            store(&transpose(tile), right.tile(step, half));
        }
    }
    right.note_offsets();
}

/// Pack 32 columns from `column` on as a right operand of a product over rows:
/// (contraction, outputs). Rows that are missing are 0.
///
/// # Safety
/// AVX-512 with VNNI; `out` has room for `right_bytes` of the contraction.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn pack_columns(x: &View, contraction: usize, column: usize, out: *mut u8) {
    let right = Right::at(out, contraction);
    round_columns(x, right.steps, column, right.tiles, right.scales);
    right.note_offsets();
}

/// Round 32 columns from `column` on, with four bytes of a column in each number of a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn round_columns(x: &View, steps: usize, column: usize, tiles: *mut u8, scales: *mut f32) {
    let mask = first_lanes(x.columns.saturating_sub(column));
    let row_of = |row: usize| unsafe {
        if row < x.rows && mask != 0 {
            _mm512_maskz_loadu_epi16(mask, x.at(row, column) as *const i16)
        } else {
            _mm512_setzero_si512()
        }
    };
    let mut most = _mm512_setzero_si512();
    for row in 0..x.rows {
        most = larger(most, row_of(row));
    }
    let mut column_factor = [_mm512_setzero_ps(); 2];
    for (half, most) in wide(most).into_iter().enumerate() {
        let scale;
        (column_factor[half], scale) = factors(most, SIGNED_LIMIT);
        _mm512_storeu_ps(scales.add(TILE * half), scale);
    }
    for step in 0..steps {
        for quad in 0..TILE {
            let row = STEP * step + 4 * quad;
            let four: [[__m512; 2]; 4] = std::array::from_fn(|i| unsafe { wide(row_of(row + i)) });
            for (half, &factor) in column_factor.iter().enumerate() {
                let [a, b, c, d] = four.map(|numbers| low_byte(whole(numbers[half], factor)));
                let low = _mm512_or_si512(a, _mm512_slli_epi32::<8>(b));
                let high = _mm512_or_si512(c, _mm512_slli_epi32::<8>(d));
                let all = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                let tile = (tiles as *mut __m512i).add(TILE * (2 * step + half));
                _mm512_storeu_si512(tile.add(quad), all);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn low_byte(x: __m512i) -> __m512i {
    _mm512_and_si512(x, _mm512_set1_epi32(0xff))
}

/// `out` (32 x 32, `stride` numbers from row to row) = A B, added to what is in `out` if `add`.
///
/// right: packed by `pack_rows` or `pack_columns`.
///
/// # Safety
/// The operands have this contraction, of at most `MAX_CONTRACTION`; `out` has its 32 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub unsafe fn multiply(
    unit: &Unit,
    left: Rounded,
    right: *const u8,
    contraction: usize,
    (out, stride): (*mut f32, usize),
    add: bool,
) {
    let right = Right::at(right as *mut u8, contraction);
    let mut sums = MaybeUninit::<[i32; BLOCK * BLOCK]>::uninit();
    let sums = sums.as_mut_ptr() as *mut i32;
    unit.multiply_bytes(left.rows, right.tiles, right.steps, sums);
    for half in 0..2 {
        let scales = _mm512_loadu_ps(right.scales.add(TILE * half));
        let offsets = if left.is_signed {
            _mm512_loadu_si512(right.offsets.add(TILE * half) as *const __m512i)
        } else {
            _mm512_setzero_si512()
        };
        for r in 0..BLOCK {
            let sum = sums.add(r * BLOCK + TILE * half) as *const __m512i;
            let sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sum), offsets));
            let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*left.scales.add(r)));
            let place = out.add(r * stride + TILE * half);
            let before = if add { _mm512_loadu_ps(place) } else { _mm512_setzero_ps() };
            _mm512_storeu_ps(place, _mm512_fmadd_ps(sum, scale, before));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::{float, for_each_unit, random};

    const CONTRACTION: usize = 160; // two steps and a half

    /// Rows of whole numbers up to `limit`, and their scales.
    fn rounded(x: &[u16], limit: f32) -> Vec<(Vec<i64>, f32)> {
        let row = |row: &[u16]| {
            let most = row.iter().map(|&x| float(x).abs()).fold(0.0, f32::max);
            let factor = if most > 0.0 { limit / most } else { 0.0 };
            let whole = row.iter().map(|&x| (float(x) * factor).round_ties_even() as i64);
            (whole.collect(), most / limit)
        };
        x.chunks(CONTRACTION).map(row).collect()
    }

    fn turned(x: &[u16]) -> Vec<u16> {
        (0..x.len()).map(|i| x[i % BLOCK * CONTRACTION + i / BLOCK]).collect()
    }

    /// Rows and columns of both operands, signed and not, against exact sums.
    unsafe fn check(unit: &Unit) {
        let mut a = random(BLOCK * CONTRACTION, 1);
        let mut w = random(BLOCK * CONTRACTION, 2);
        a[3 * CONTRACTION..4 * CONTRACTION].fill(0);
        w[5 * CONTRACTION..6 * CONTRACTION].fill(0);
        let positive: Vec<u16> = a.iter().map(|x| x & 0x7fff).collect();
        let (a_turned, w_turned) = (turned(&a), turned(&w));
        let view = |x: &[u16]| View::new(x.as_ptr(), BLOCK, CONTRACTION);
        let turned_view = |x: &[u16]| View::new(x.as_ptr(), CONTRACTION, BLOCK);

        let mut rights = vec![vec![0xffu8; right_bytes(CONTRACTION)]; 2];
        pack_rows(&view(&w), 0, rights[0].as_mut_ptr());
        pack_columns(&turned_view(&w_turned), CONTRACTION, 0, rights[1].as_mut_ptr());
        assert_eq!(rights[0], rights[1]);

        let mut rooms = vec![vec![0xffu8; left_bytes(CONTRACTION)]; 3];
        let lefts = [
            (pack_left::<true>(&view(&a), 0, rooms[0].as_mut_ptr()), &a, SIGNED_LIMIT),
            (
                pack_left_columns(unit, &turned_view(&a_turned), 0, rooms[1].as_mut_ptr()),
                &a,
                SIGNED_LIMIT,
            ),
            (
                pack_left::<false>(&view(&positive), 0, rooms[2].as_mut_ptr()),
                &positive,
                UNSIGNED_LIMIT,
            ),
        ];
        let columns = rounded(&w, SIGNED_LIMIT);
        for (left, x, limit) in lefts {
            const STRIDE: usize = 40;
            let mut out = vec![f32::NAN; BLOCK * STRIDE];
            for add in [false, true] {
                let place = (out.as_mut_ptr(), STRIDE);
                multiply(unit, left, rights[0].as_ptr(), CONTRACTION, place, add);
            }
            for (i, (row, row_scale)) in rounded(x, limit).iter().enumerate() {
                for (j, (column, column_scale)) in columns.iter().enumerate() {
                    let sum = row.iter().zip(column).map(|(a, b)| a * b).sum::<i64>();
                    let expected = 2.0 * sum as f32 * row_scale * column_scale;
                    let found = out[i * STRIDE + j];
                    assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{i} {j} {found}");
                }
                assert!(out[i * STRIDE + BLOCK..(i + 1) * STRIDE].iter().all(|x| x.is_nan()));
            }
        }
    }

    #[test]
    fn both_ways_to_multiply_give_the_sums_of_rounded_numbers() {
        // SAFETY: each is called where it is there.
        for_each_unit(|unit| unsafe { check(unit) });
    }

    #[test]
    fn what_is_missing_is_zero() {
        if !Unit::is_there() {
            return;
        }
        let x = random(40 * 64, 3);
        let view = View::new(x.as_ptr(), 40, 64);
        let mut room = vec![0xffu8; left_bytes(64)];
        let mut right = vec![0xffu8; right_bytes(96)];
        // SAFETY: the processor multiplies bytes; there is room.
        unsafe {
            pack_left::<true>(&view, 32, room.as_mut_ptr());
            let scales = std::slice::from_raw_parts(room.as_ptr() as *const f32, BLOCK);
            assert!(scales[..8].iter().all(|&s| s > 0.0) && scales[8..].iter().all(|&s| s == 0.0));
            pack_columns(&view, 96, 48, right.as_mut_ptr());
            let right = Right::at(right.as_mut_ptr(), 96);
            let scales = std::slice::from_raw_parts(right.scales, BLOCK);
            assert!(scales[..16].iter().all(|&s| s > 0.0));
            assert!(scales[16..].iter().all(|&s| s == 0.0));
            for (place, line) in (0..2 * STEP_BYTES / 64).enumerate() {
                let bytes = std::slice::from_raw_parts(right.tiles.add(64 * line), 64);
                let row = line / (2 * TILE) * STEP + 4 * (place % TILE);
                let is_there = row < 40 && (line / TILE).is_multiple_of(2); // the first 16 of 32 columns
                assert_eq!(bytes.iter().any(|&byte| byte != 0), is_there, "{line}");
            }
        }
    }
}
