//! Products of bf16 matrices in the tile registers of AMX: tiles, packing, and the inner loop.
//!
//! A tile has 16 rows of 64 bytes. `C += A B` takes 16 rows of 32 numbers as A and 32 x 16 numbers
//! as B, whose tile holds pairs: row r has, for each of 16 columns, the numbers 2r and 2r + 1 of
//! the contraction. Everything here works on blocks of 32 x 32 sums: two tiles of A, two of B.
//! Instructions are written as assembly, since their intrinsics are not in stable Rust.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Rows and columns of a block of sums, and numbers of a contraction that one step takes.
pub const BLOCK: usize = 32;
/// Rows of a tile, and 32-bit columns of one.
pub const TILE: usize = 16;
/// bf16 numbers of a tile.
pub const TILE_LEN: usize = 512;
/// bf16 numbers of the two tiles that one step reads of a packed operand.
pub const STEP_LEN: usize = 2 * TILE_LEN;

/// Whether this processor multiplies bf16 tiles and the system lets this process use them.
pub fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| {
        use std::arch::is_x86_feature_detected as has;
        let wide = has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
        if !(cfg!(target_os = "linux") && wide && has!("avx512bf16")) {
            return false;
        }
        let leaf = __cpuid_count(7, 0);
        let (bf16, tile) = (leaf.edx >> 22 & 1 == 1, leaf.edx >> 24 & 1 == 1);
        bf16 && tile && ask_permission()
    })
}

/// Linux hands out the tile registers, 8 KB a thread, on request (Documentation/arch/x86/xstate).
fn ask_permission() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: a system call that changes nothing but this process's permission.
    unsafe {
        asm!("syscall", inlateout("rax") result, in("rdi") ARCH_REQ_XCOMP_PERM,
             in("rsi") XFEATURE_XTILEDATA, out("rcx") _, out("r11") _);
    }
    result == 0
}

#[repr(C, align(64))]
struct TileConfig([u8; 64]);

/// The tiles of this thread, all of full size, until it is dropped; then as they were.
pub struct Tiles {
    before: TileConfig,
}

impl Tiles {
    /// # Safety
    /// `is_there`.
    pub unsafe fn configure() -> Self {
        let mut before = TileConfig([0; 64]);
        asm!("sttilecfg [{}]", in(reg) before.0.as_mut_ptr());
        let mut full = TileConfig([0; 64]);
        full.0[0] = 1; // the only palette there is
        for tile in 0..8 {
            full.0[16 + 2 * tile] = 64;
            full.0[48 + tile] = 16;
        }
        asm!("ldtilecfg [{}]", in(reg) full.0.as_ptr());
        Self { before }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: what `configure` has read. Another library may rely on its own.
        unsafe {
            if self.before.0[0] == 0 {
                asm!("tilerelease");
            } else {
                asm!("ldtilecfg [{}]", in(reg) self.before.0.as_ptr());
            }
        }
    }
}

/// 32 rows of the left operand: two tiles for each step.
#[derive(Clone, Copy)]
pub struct Left {
    start: *const u16,
    /// Bytes from a tile's row to the next.
    row_bytes: usize,
    /// Bytes from the upper tile to the lower, and from a step's tiles to the next one's.
    lower: usize,
    step: usize,
}

impl Left {
    /// Rows as they lie in memory, `stride` numbers from one to the next.
    pub fn rows(start: *const u16, stride: usize) -> Self {
        Self { start, row_bytes: 2 * stride, lower: 2 * TILE * stride, step: 2 * BLOCK }
    }

    /// Tiles one after the other, as `pack_columns` writes them.
    pub fn packed(start: *const u16) -> Self {
        Self { start, row_bytes: 64, lower: 2 * TILE_LEN, step: 2 * STEP_LEN }
    }
}

/// `c` (32 x 32, `stride` numbers from row to row) = A B over `steps` steps, added to what is in
/// `c` if `add`. `right`: packed.
///
/// # Safety
/// Within `Tiles`; the operands have `steps` steps, `c` its 32 rows.
#[inline]
pub unsafe fn multiply(
    left: Left,
    right: *const u16,
    steps: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
) {
    let (row, lower) = (4 * stride, 4 * TILE * stride);
    if add {
        asm!(
            "tileloadd tmm0, [{c} + {row}]",
            "tileloadd tmm1, [{c} + {row} + 64]",
            "tileloadd tmm2, [{l} + {row}]",
            "tileloadd tmm3, [{l} + {row} + 64]",
            c = in(reg) c, l = in(reg) (c as *mut u8).add(lower), row = in(reg) row,
            options(nostack),
        );
    } else {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack));
    }
    if steps > 0 {
        asm!(
            "2:",
            "tileloadd tmm4, [{a} + {ar}]",
            "tileloadd tmm6, [{b} + {br}]",
            "tileloadd tmm7, [{b} + {br} + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{l} + {ar}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a}, {step}",
            "add {l}, {step}",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "add {b}, 2048",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {n}",
            "jnz 2b",
            a = inout(reg) left.start => _,
            l = inout(reg) (left.start as *const u8).wrapping_add(left.lower) => _,
            ar = in(reg) left.row_bytes,
            step = in(reg) left.step,
            b = inout(reg) right => _,
            br = in(reg) 64usize,
            n = inout(reg) steps => _,
            options(nostack),
        );
    }
    asm!(
        "tilestored [{c} + {row}], tmm0",
        "tilestored [{c} + {row} + 64], tmm1",
        "tilestored [{l} + {row}], tmm2",
        "tilestored [{l} + {row} + 64], tmm3",
        c = in(reg) c, l = in(reg) (c as *mut u8).add(lower), row = in(reg) row,
        options(nostack),
    );
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
    unsafe fn at(&self, row: usize, column: usize) -> *const u16 {
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
fn transpose(rows: Tile) -> Tile {
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

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(tile: &Tile, out: *mut u16) {
    for (r, row) in tile.iter().enumerate() {
        _mm512_storeu_si512(out.add(32 * r) as *mut __m512i, *row);
    }
}

/// Lanes below `count`, of 32.
#[inline(always)]
fn first_lanes(count: usize) -> u32 {
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
        for half in 0..2 {
            let tile = load_pairs(x, BLOCK * step, column + TILE * half);
            store(&tile, out.add(STEP_LEN * step + TILE_LEN * half));
        }
    }
}

/// Pack 32 columns from `column` on as the rows of a left operand of a product over rows:
/// the transpose of (contraction, rows of the product).
///
/// # Safety
/// As `pack_pairs`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn pack_columns(x: &View, column: usize, out: *mut u16) {
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
