//! Products on AMX's tiles: 16 rows of activations by 16 outputs at once.
//!
//! A tile holds 16 lines of 64 bytes. One instruction multiplies a tile of activations (up to 16
//! rows x 32 bf16 or 64 bytes) with a tile of weights and adds to a tile of sums. An output's chain
//! of additions depends on neither the other rows nor their number, so every number of rows goes
//! through tiles, one row too. Written as assembly: stable Rust has no names for it.

use crate::amx;
use std::arch::asm;
use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};

/// Rows of a tile, and its outputs.
pub const ROWS: usize = 16;
/// Bytes of a line of a panel of weights: 64 outputs of 4 bytes, which are 2 or 4 inputs.
const LINE: usize = 256;
/// Weights are asked for this many bytes before they are multiplied: the processor itself looks
/// ahead to the end of a page only.
pub const AHEAD: usize = 8192;

/// Whether this process may use tiles of bf16 and of bytes.
pub fn are_there() -> bool {
    amx::is_there()
}

/// Shapes of the eight tiles (Intel SDM, volume 1, section 18.3).
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Sums 0..4; activations 4 (and 5), weights 6 and 7. Lines of whole tiles are 64 bytes.
    fn new() -> Self {
        let mut shapes =
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for tile in 0..8 {
            shapes = shapes.with(tile, ROWS, 64);
        }
        shapes
    }

    fn with(mut self, tile: usize, rows: usize, row_bytes: usize) -> Self {
        (self.rows[tile], self.row_bytes[tile]) = (rows as u8, row_bytes as u16);
        self
    }

    /// Give the tiles these shapes, and zeros.
    unsafe fn load(&self) {
        asm!("ldtilecfg [{}]", in(reg) self, options(nostack, preserves_flags, readonly));
    }
}

macro_rules! zero {
    ($tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nostack, preserves_flags, nomem))
    };
}

macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        asm!(
            concat!("tileloadd tmm", $tile, ", [{} + {}*1]"),
            in(reg) $from, in(reg) $stride,
            options(nostack, preserves_flags, readonly)
        )
    };
}

macro_rules! store {
    ($tile:literal, $to:expr, $stride:expr) => {
        asm!(
            concat!("tilestored [{} + {}*1], tmm", $tile),
            in(reg) $to, in(reg) $stride,
            options(nostack, preserves_flags)
        )
    };
}

/// `sums += activations x weights`: of unsigned with signed bytes, or of bf16.
macro_rules! multiply {
    ($is_bytes:expr, $sums:literal, $activations:literal, $weights:literal) => {
        if $is_bytes {
            multiply!(@ "tdpbusd", $sums, $activations, $weights)
        } else {
            multiply!(@ "tdpbf16ps", $sums, $activations, $weights)
        }
    };
    (@ $name:literal, $sums:literal, $activations:literal, $weights:literal) => {
        asm!(
            concat!($name, " tmm", $sums, ", tmm", $activations, ", tmm", $weights),
            options(nostack, preserves_flags, nomem)
        )
    };
}

/// Multiply up to 32 rows of activations with a panel of 64 outputs: `sums` (rows, 64) of 32 bits.
///
/// IS_BYTES: rows of unsigned bytes with signed weights, exact whole sums; else bf16, fp32 sums.
/// row_bytes: of activations, a multiple of 4; the panel has a line of 256 bytes for every four.
/// is_cold: the panel comes from memory, so its lines are asked for early; for one that is in the
/// cache that would be half as many loads again.
///
/// # Safety
/// Within `amx::Tiles`, whose shapes are changed; the arrays have these sizes.
pub unsafe fn multiply<const IS_BYTES: bool>(
    x: *const u8,
    rows: usize,
    row_bytes: usize,
    panel: *const u8,
    is_cold: bool,
    sums: *mut u8,
) {
    let (whole, rest) = (row_bytes / 64, row_bytes % 64);
    let mut row = 0;
    while row < rows {
        let left = rows - row;
        let (x, sums) = (x.add(row * row_bytes), sums.add(row * LINE));
        if left > ROWS && rest == 0 {
            let second = (left - ROWS).min(ROWS);
            Shapes::new().with(2, second, 64).with(3, second, 64).with(5, second, 64).load();
            two_tiles_of_rows::<IS_BYTES>(x, row_bytes, whole, panel, is_cold && row == 0, sums);
            row += ROWS + second;
        } else {
            let count = left.min(ROWS);
            let mut shapes = (0..5).fold(Shapes::new(), |shapes, t| shapes.with(t, count, 64));
            if rest > 0 {
                shapes = shapes.with(5, count, rest).with(7, rest / 4, 64);
            }
            shapes.load();
            let is_cold = is_cold && row == 0;
            one_tile_of_rows::<IS_BYTES>(x, row_bytes, (whole, rest > 0), panel, is_cold, sums);
            row += count;
        }
    }
}

#[inline(always)]
unsafe fn one_tile_of_rows<const IS_BYTES: bool>(
    x: *const u8,
    stride: usize,
    (whole, is_rest): (usize, bool),
    panel: *const u8,
    is_cold: bool,
    sums: *mut u8,
) {
    for k in 0..whole {
        let weights = panel.add(k * ROWS * LINE);
        if is_cold {
            ask_for(weights.wrapping_add(AHEAD));
        }
        load!("4", x.add(k * 64), stride);
        load!("6", weights, LINE);
        multiply!(IS_BYTES, "0", "4", "6");
        load!("6", weights.add(64), LINE);
        multiply!(IS_BYTES, "1", "4", "6");
        load!("6", weights.add(128), LINE);
        multiply!(IS_BYTES, "2", "4", "6");
        load!("6", weights.add(192), LINE);
        multiply!(IS_BYTES, "3", "4", "6");
    }
    if is_rest {
        let weights = panel.add(whole * ROWS * LINE);
        load!("5", x.add(whole * 64), stride);
        load!("7", weights, LINE);
        multiply!(IS_BYTES, "0", "5", "7");
        load!("7", weights.add(64), LINE);
        multiply!(IS_BYTES, "1", "5", "7");
        load!("7", weights.add(128), LINE);
        multiply!(IS_BYTES, "2", "5", "7");
        load!("7", weights.add(192), LINE);
        multiply!(IS_BYTES, "3", "5", "7");
    }
    store!("0", sums, LINE);
    store!("1", sums.add(64), LINE);
    store!("2", sums.add(128), LINE);
    store!("3", sums.add(192), LINE);
}

/// Half a panel at a time, so that each tile that is loaded is used twice.
#[inline(always)]
unsafe fn two_tiles_of_rows<const IS_BYTES: bool>(
    x: *const u8,
    stride: usize,
    whole: usize,
    panel: *const u8,
    is_cold: bool,
    sums: *mut u8,
) {
    for half in [0, 128] {
        zero!("0");
        zero!("1");
        zero!("2");
        zero!("3");
        for k in 0..whole {
            let weights = panel.add(k * ROWS * LINE + half);
            if is_cold && half == 0 {
                ask_for(weights.wrapping_add(AHEAD));
            }
            load!("4", x.add(k * 64), stride);
            load!("6", weights, LINE);
            multiply!(IS_BYTES, "0", "4", "6");
            load!("7", weights.add(64), LINE);
            multiply!(IS_BYTES, "1", "4", "7");
            load!("5", x.add(ROWS * stride + k * 64), stride);
            multiply!(IS_BYTES, "2", "5", "6");
            multiply!(IS_BYTES, "3", "5", "7");
        }
        let (first, second) = (sums.add(half), sums.add(ROWS * LINE + half));
        store!("0", first, LINE);
        store!("1", first.add(64), LINE);
        store!("2", second, LINE);
        store!("3", second.add(64), LINE);
    }
}

/// Ask for the 64 lines of four tiles, which may lie anywhere.
#[inline(always)]
unsafe fn ask_for(weights: *const u8) {
    for line in 0..4 * ROWS {
        _mm_prefetch::<_MM_HINT_T0>(weights.wrapping_add(64 * line) as *const i8);
    }
}
