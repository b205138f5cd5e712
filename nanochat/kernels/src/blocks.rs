//! Blocks of 32 x 32 sums of products, which training is made of.
//!
//! Operands lie in tiles of 16 rows of 64 bytes, two for a step of 32 numbers of the contraction. A
//! tile of the left operand has 16 rows of 32 numbers; one of the right has pairs: row r holds, for
//! each of 16 columns, the numbers 2r and 2r + 1 of the contraction. Both AMX and AVX-512's dot
//! products of bf16 pairs take them as they are; the latter takes pairs on the left as well, which
//! saves it an exchange of rows and columns where the left operand is the transpose of a matrix.

use std::arch::x86_64::*;

use crate::{amx, pairs};

/// Rows and columns of a block of sums, and numbers of a contraction that one step takes.
pub const BLOCK: usize = 32;
/// Rows of a tile, and 32-bit columns of one.
pub const TILE: usize = 16;
/// Bytes of a row of a tile.
const TILE_ROW_BYTES: usize = 64;
/// bf16 numbers of a tile.
pub const TILE_LEN: usize = 512;
/// bf16 numbers of the two tiles that one step reads of a packed operand.
pub const STEP_LEN: usize = 2 * TILE_LEN;

/// What multiplies blocks on this thread: AMX where it is, AVX-512 BF16 otherwise.
pub struct Unit(Option<amx::Tiles>);

impl Unit {
    /// Whether this processor has one of them.
    pub fn is_there() -> bool {
        pairs::are_there()
    }

    /// # Safety
    /// `is_there`.
    pub unsafe fn start() -> Self {
        Self(amx::is_there().then(|| amx::Tiles::configure()))
    }

    /// `c` (32 x 32, `stride` numbers from row to row) = A B over `steps` steps, added to what is
    /// in `c` if `add`. `right`: packed.
    ///
    /// # Safety
    /// The operands have `steps` steps, `c` its 32 rows.
    #[inline]
    pub unsafe fn multiply(
        &self,
        left: Left,
        right: *const u16,
        steps: usize,
        c: *mut f32,
        stride: usize,
        add: bool,
    ) {
        if self.0.is_some() {
            amx::multiply::<false>(left, right, steps, c, stride, add);
        } else {
            pairs::multiply::<false>(left, right, steps, c, stride, add);
        }
    }

    /// `c` (32 x 32) = A B over `steps` steps of 64 bytes, unsigned ones of A and signed ones of B,
    /// in tiles with four bytes in the place of a pair.
    ///
    /// # Safety
    /// As `multiply`; the sums fit 32 bits.
    #[inline]
    pub unsafe fn multiply_bytes(&self, left: Left, right: *const u8, steps: usize, c: *mut i32) {
        let (right, c) = (right as *const u16, c as *mut f32);
        if self.0.is_some() {
            amx::multiply::<true>(left, right, steps, c, BLOCK, false);
        } else {
            pairs::multiply::<true>(left, right, steps, c, BLOCK, false);
        }
    }

    /// Pack 32 columns from `column` on as the rows of a left operand of a product over rows: the
    /// transpose of (contraction, rows of the product). `left` takes them.
    ///
    /// # Safety
    /// As `pack_pairs`.
    pub unsafe fn pack_columns(&self, x: &View, column: usize, out: *mut u16) {
        if self.0.is_some() {
            pack_columns(x, column, out);
        } else {
            pack_pairs(x, column, out);
        }
    }

    /// Whether tiles of the left operand are rows; else they may be as those of the right one.
    pub fn takes_rows(&self) -> bool {
        self.0.is_some()
    }

    /// What `pack_columns` has written.
    pub fn left(&self, packed: *const u16) -> Left {
        if self.0.is_some() {
            Left::packed(packed)
        } else {
            Left::pairs(packed)
        }
    }
}

/// 32 rows of the left operand: two tiles for each step.
#[derive(Clone, Copy)]
pub struct Left {
    pub start: *const u16,
    /// Bytes from a tile's row to the next.
    pub row_bytes: usize,
    /// Bytes from a pair of numbers of a row to its next one.
    pub pair_bytes: usize,
    /// Bytes from the upper tile to the lower, and from a step's tiles to the next one's.
    pub lower: usize,
    pub step: usize,
}

impl Left {
    /// Rows as they lie in memory, `stride` numbers from one to the next.
    pub fn rows(start: *const u16, stride: usize) -> Self {
        let (row_bytes, lower) = (2 * stride, 2 * TILE * stride);
        Self { start, row_bytes, pair_bytes: 4, lower, step: 2 * BLOCK }
    }

    /// Rows of bytes, `stride` from one to the next.
    pub fn bytes(start: *const u8, stride: usize) -> Self {
        let (row_bytes, lower) = (stride, TILE * stride);
        Self { start: start as *const u16, row_bytes, pair_bytes: 4, lower, step: TILE_ROW_BYTES }
    }

    /// Tiles one after the other, as `pack_columns` writes them.
    fn packed(start: *const u16) -> Self {
        Self { start, row_bytes: 64, pair_bytes: 4, lower: 2 * TILE_LEN, step: 2 * STEP_LEN }
    }

    /// The same as `pack_pairs` writes them: not for AMX.
    fn pairs(start: *const u16) -> Self {
        Self { start, row_bytes: 4, pair_bytes: 64, lower: 2 * TILE_LEN, step: 2 * STEP_LEN }
    }
}

/// A matrix in memory: rows of bf16 numbers, `stride` from one to the next.
#[derive(Clone, Copy)]
pub struct View {
    pub start: *const u16,
    pub stride: usize,
    pub rows: usize,
    pub columns: usize,
}

// SAFETY: only read.
unsafe impl Send for View {}
unsafe impl Sync for View {}

impl View {
    /// Rows that follow each other without a gap.
    pub fn new(start: *const u16, rows: usize, columns: usize) -> Self {
        Self { start, stride: columns, rows, columns }
    }

    #[inline(always)]
    pub unsafe fn at(&self, row: usize, column: usize) -> *const u16 {
        self.start.add(row * self.stride + column)
    }

    /// The 32 rows from `row` on as a left operand. Where there are fewer, they are copied to `spare`,
    /// room for 32 rows, with zeros behind.
    ///
    /// # Safety
    /// `row` is one of the rows; the number of columns is a multiple of 32.
    pub unsafe fn left(&self, row: usize, spare: *mut u16) -> Left {
        if row + BLOCK <= self.rows {
            return Left::rows(self.at(row, 0), self.stride);
        }
        std::ptr::write_bytes(spare, 0, BLOCK * self.columns);
        for r in row..self.rows {
            let to = spare.add((r - row) * self.columns);
            std::ptr::copy_nonoverlapping(self.at(r, 0), to, self.columns);
        }
        Left::rows(spare, self.columns)
    }

    /// `count` rows from `first` on.
    ///
    /// # Safety
    /// `first` is at most the number of rows.
    pub unsafe fn rows_from(&self, first: usize, count: usize) -> Self {
        Self { start: self.at(first, 0), rows: count.min(self.rows - first), ..*self }
    }
}

type Tile = [__m512i; TILE];

/// Exchange rows and 32-bit columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn transpose(rows: Tile) -> Tile {
    let mut t = rows;
    for i in (0..TILE).step_by(2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    let mut u = t;
    for i in (0..TILE).step_by(4) {
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Each 128-bit lane L of u[4g + j] now has column 4L + j of rows 4g to 4g + 3.
    let mut out = u;
    for j in 0..4 {
        let a = _mm512_shuffle_i32x4::<0x88>(u[j], u[4 + j]);
        let b = _mm512_shuffle_i32x4::<0xdd>(u[j], u[4 + j]);
        let c = _mm512_shuffle_i32x4::<0x88>(u[8 + j], u[12 + j]);
        let d = _mm512_shuffle_i32x4::<0xdd>(u[8 + j], u[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0x88>(a, c);
        out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(a, c);
        out[4 + j] = _mm512_shuffle_i32x4::<0x88>(b, d);
        out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(b, d);
    }
    out
}

/// Exchange rows and columns of a block of sums.
///
/// # Safety
/// AVX-512.
#[target_feature(enable = "avx512f")]
pub unsafe fn transposed(block: &[f32; BLOCK * BLOCK]) -> [f32; BLOCK * BLOCK] {
    let mut out = [0.0; BLOCK * BLOCK];
    for (row, column) in [(0, 0), (0, TILE), (TILE, 0), (TILE, TILE)] {
        let from = block.as_ptr().add(row * BLOCK + column);
        let tile =
            std::array::from_fn(|r| _mm512_loadu_si512(from.add(r * BLOCK) as *const __m512i));
        let to = out.as_mut_ptr().add(column * BLOCK + row);
        for (r, line) in transpose(tile).iter().enumerate() {
            _mm512_storeu_si512(to.add(r * BLOCK) as *mut __m512i, *line);
        }
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f")]
pub unsafe fn store(tile: &Tile, out: *mut u16) {
    for (r, row) in tile.iter().enumerate() {
        _mm512_storeu_si512(out.add(32 * r) as *mut __m512i, *row);
    }
}

/// Lanes below `count`, of 32.
#[inline(always)]
pub fn first_lanes(count: usize) -> u32 {
    if count >= 32 {
        u32::MAX
    } else {
        (1u32 << count) - 1
    }
}

/// 16 rows of 32 numbers, 0 beyond the matrix.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load_rows(x: &View, row: usize, column: usize) -> Tile {
    let mask = first_lanes(x.columns.saturating_sub(column));
    let mut tile = [_mm512_setzero_si512(); TILE];
    for (r, line) in tile.iter_mut().enumerate() {
        if row + r < x.rows && mask != 0 {
            *line = _mm512_maskz_loadu_epi16(mask, x.at(row + r, column) as *const i16);
        }
    }
    tile
}

/// 32 rows of 16 numbers as 16 rows of pairs from two rows, 0 beyond the matrix.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load_pairs(x: &View, row: usize, column: usize) -> Tile {
    let mask = first_lanes(x.columns.saturating_sub(column)) as u16;
    let mut tile = [_mm512_setzero_si512(); TILE];
    for (r, pair) in tile.iter_mut().enumerate() {
        let mut halves = [_mm512_setzero_si512(); 2];
        for (i, half) in halves.iter_mut().enumerate() {
            let at = row + 2 * r + i;
            if at < x.rows && mask != 0 {
                let line = _mm256_maskz_loadu_epi16(mask, x.at(at, column) as *const i16);
                *half = _mm512_cvtepu16_epi32(line);
            }
        }
        *pair = _mm512_or_si512(halves[0], _mm512_slli_epi32::<16>(halves[1]));
    }
    tile
}

/// Pack 32 rows from `row` on, each an output of a product over columns, as a right operand:
/// (outputs, contraction), the way weights lie.
///
/// # Safety
/// AVX-512; `out` has room for a step for every 32 columns, rounded up.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn pack_rows(x: &View, row: usize, out: *mut u16) {
    for step in 0..x.columns.div_ceil(BLOCK) {
        for half in 0..2 {
            let tile = transpose(load_rows(x, row + TILE * half, BLOCK * step));
            store(&tile, out.add(STEP_LEN * step + TILE_LEN * half));
        }
    }
}

/// Pack 32 columns from `column` on as a right operand of a product over rows:
/// (contraction, outputs).
///
/// # Safety
/// AVX-512; `out` has room for a step for every 32 rows, rounded up.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn pack_pairs(x: &View, column: usize, out: *mut u16) {
    for step in 0..x.rows.div_ceil(BLOCK) {
        let (row, out) = (BLOCK * step, out.add(STEP_LEN * step));
        if row + BLOCK <= x.rows && column + BLOCK <= x.columns {
            pack_whole_pairs(x, row, column, out);
            continue;
        }
        for half in 0..2 {
            store(&load_pairs(x, row, column + TILE * half), out.add(TILE_LEN * half));
        }
    }
}

/// A step of `pack_pairs` that has all its rows and columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pack_whole_pairs(x: &View, row: usize, column: usize, out: *mut u16) {
    const fn places(first: u16) -> [u16; BLOCK] {
        let mut places = [0; BLOCK];
        let mut i = 0;
        while i < TILE as u16 {
            // A place of the second operand has bit 5 set.
            (places[2 * i as usize], places[2 * i as usize + 1]) = (first + i, 32 + first + i);
            i += 1;
        }
        places
    }
    const HALVES: [[u16; BLOCK]; 2] = [places(0), places(TILE as u16)];
    let halves = HALVES.map(|half| _mm512_loadu_si512(half.as_ptr() as *const __m512i));
    for pair in 0..TILE {
        let line = x.at(row + 2 * pair, column);
        let upper = _mm512_loadu_si512(line as *const __m512i);
        let lower = _mm512_loadu_si512(line.add(x.stride) as *const __m512i);
        for (i, half) in halves.iter().enumerate() {
            let both = _mm512_permutex2var_epi16(upper, *half, lower);
            _mm512_storeu_si512(out.add(TILE_LEN * i + 32 * pair) as *mut __m512i, both);
        }
    }
}

/// `Unit::pack_columns`, as AMX takes it.
///
/// # Safety
/// As `pack_pairs`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_columns(x: &View, column: usize, out: *mut u16) {
    for step in 0..x.rows.div_ceil(BLOCK) {
        for half in 0..2 {
            let tile = transpose(load_pairs(x, BLOCK * step, column + TILE * half));
            store(&tile, out.add(STEP_LEN * step + TILE_LEN * half));
        }
    }
}

/// 32 sums as bf16 numbers, to nearest even.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn round(low: __m512, high: __m512) -> __m512i {
    std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
}

/// 16 bf16 numbers as fp32.
#[inline]
#[target_feature(enable = "avx512f")]
pub unsafe fn widen(x: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
}

/// Call `check` with each way to multiply that this processor has.
#[cfg(test)]
pub fn for_each_unit(check: impl Fn(&Unit)) {
    if pairs::are_there() {
        check(&Unit(None));
    }
    if amx::is_there() {
        // SAFETY: it is there.
        check(&unsafe { Unit::start() });
    }
}

/// bf16 numbers between -1/2 and 1/2.
#[cfg(test)]
pub fn random(count: usize, seed: u32) -> Vec<u16> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let number = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
        (number.to_bits() >> 16) as u16
    };
    (0..count).map(|_| next()).collect()
}

/// A bf16 number as fp32.
#[cfg(test)]
pub fn float(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows as they lie in memory, and packed from columns, times packed rows of weights.
    unsafe fn check(unit: &Unit) {
        const ROWS_STRIDE: usize = 136;
        const STRIDE: usize = 40;
        const STEPS: usize = 3;
        let depth = STEPS * BLOCK;
        let a = random(BLOCK * ROWS_STRIDE, 1);
        let weights = random(BLOCK * depth, 2);
        let turned: Vec<u16> =
            (0..depth * BLOCK).map(|i| a[i % BLOCK * ROWS_STRIDE + i / BLOCK]).collect();
        let (mut left, mut right) = (vec![0; STEPS * STEP_LEN], vec![0; STEPS * STEP_LEN]);
        unit.pack_columns(&View::new(turned.as_ptr(), depth, BLOCK), 0, left.as_mut_ptr());
        pack_rows(&View::new(weights.as_ptr(), BLOCK, depth), 0, right.as_mut_ptr());
        for left in [Left::rows(a.as_ptr(), ROWS_STRIDE), unit.left(left.as_ptr())] {
            let mut c = vec![f32::NAN; BLOCK * STRIDE];
            unit.multiply(left, right.as_ptr(), STEPS, c.as_mut_ptr(), STRIDE, false);
            unit.multiply(left, right.as_ptr(), STEPS - 1, c.as_mut_ptr(), STRIDE, true);
            for row in 0..BLOCK {
                for column in 0..BLOCK {
                    let product = |k: usize| {
                        float(a[row * ROWS_STRIDE + k]) * float(weights[column * depth + k])
                    };
                    let twice = 2.0 * (0..depth - BLOCK).map(product).sum::<f32>();
                    let once = (depth - BLOCK..depth).map(product).sum::<f32>();
                    let sum = c[row * STRIDE + column];
                    assert!((sum - twice - once).abs() < 1e-4, "{row} {column} {sum}");
                }
                assert!(c[row * STRIDE + BLOCK..(row + 1) * STRIDE].iter().all(|x| x.is_nan()));
            }
        }
    }

    #[test]
    fn a_block_of_sums_is_transposed() {
        if !pairs::are_there() {
            return;
        }
        let block: [f32; BLOCK * BLOCK] = std::array::from_fn(|i| i as f32);
        // SAFETY: the processor has AVX-512.
        let found = unsafe { transposed(&block) };
        for (i, &number) in found.iter().enumerate() {
            assert_eq!(number, (i % BLOCK * BLOCK + i / BLOCK) as f32);
        }
    }

    /// Whole blocks take a way of their own.
    #[test]
    fn pairs_are_those_of_their_rows_also_beyond_the_matrix() {
        if !pairs::are_there() {
            return;
        }
        const STRIDE: usize = 100;
        let x = random(70 * STRIDE, 3);
        for (rows, columns, column) in [(64, 96, 32), (70, 96, 0), (33, 50, 32), (64, 40, 32)] {
            let view = View { start: x.as_ptr(), stride: STRIDE, rows, columns };
            let mut packed = vec![u16::MAX; rows.div_ceil(BLOCK) * STEP_LEN];
            // SAFETY: the processor has AVX-512; there is room for every step.
            unsafe { pack_pairs(&view, column, packed.as_mut_ptr()) };
            for (i, &found) in packed.iter().enumerate() {
                let (step, tile, rest) = (i / STEP_LEN, i % STEP_LEN / TILE_LEN, i % TILE_LEN);
                let row = step * BLOCK + rest / 32 * 2 + rest % 2;
                let at = column + tile * TILE + rest % 32 / 2;
                let inside = row < rows && at < columns;
                assert_eq!(found, if inside { x[row * STRIDE + at] } else { 0 }, "{row} {at}");
            }
        }
    }

    #[test]
    fn both_ways_to_multiply_give_the_sums() {
        // SAFETY: each is called where it is there.
        for_each_unit(|unit| unsafe { check(unit) });
    }
}
