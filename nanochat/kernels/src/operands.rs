//! Operands of the products that training may make in bf16 or in 8-bit integers.

use crate::blocks::{pack_pairs, pack_rows, Left, Unit, View, BLOCK, STEP_LEN};
use crate::int8;

/// What operands are multiplied in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Bf16,
    /// 8-bit integers, a scale for each row of the left operand and each column of the right one.
    Int8,
}

/// Which of a matrix in memory are the columns of a right operand (contraction, outputs).
#[derive(Clone, Copy)]
pub enum Side {
    /// Its rows, the way weights lie.
    Rows,
    Columns,
}

/// 32 rows of a left operand, as they are multiplied.
#[derive(Clone, Copy)]
pub enum Prepared {
    Bf16(Left),
    Int8(int8::Rounded),
}

impl Format {
    /// Bytes of 32 packed columns of a right operand.
    pub fn right_bytes(self, contraction: usize) -> usize {
        match self {
            Self::Bf16 => contraction / BLOCK * STEP_LEN * 2,
            Self::Int8 => int8::right_bytes(contraction),
        }
    }

    /// Bytes that 32 rows of a left operand may need, a multiple of a cache line.
    pub fn left_bytes(self, contraction: usize) -> usize {
        match self {
            Self::Bf16 => BLOCK * contraction * 2,
            Self::Int8 => int8::left_bytes(contraction),
        }
    }

    /// Pack outputs `first` to `first` + 31 of a right operand. `contraction`: that of the product,
    /// a multiple of 32; columns may have fewer numbers, the others are 0 then.
    ///
    /// # Safety
    /// A `Unit` is there; `out` has room for `right_bytes`.
    pub unsafe fn pack_right(
        self,
        right: &View,
        side: Side,
        contraction: usize,
        first: usize,
        out: *mut u8,
    ) {
        match (self, side) {
            (Self::Bf16, Side::Rows) => pack_rows(right, first, out as *mut u16),
            (Self::Bf16, Side::Columns) => {
                let packed = right.rows.div_ceil(BLOCK) * STEP_LEN * 2;
                std::ptr::write_bytes(out.add(packed), 0, self.right_bytes(contraction) - packed);
                pack_pairs(right, first, out as *mut u16)
            }
            (Self::Int8, Side::Rows) => int8::pack_rows(right, first, out),
            (Self::Int8, Side::Columns) => int8::pack_columns(right, contraction, first, out),
        }
    }

    /// Rows `row` to `row` + 31 of a left operand, 0 beyond it; `room` has `left_bytes`.
    ///
    /// # Safety
    /// A `Unit` is there; `row` is one of the rows; the number of columns is a multiple of 32.
    pub unsafe fn prepare(self, left: &View, row: usize, room: *mut u8) -> Prepared {
        match self {
            Self::Bf16 => Prepared::Bf16(left.left(row, room as *mut u16)),
            Self::Int8 => Prepared::Int8(int8::pack_left::<true>(left, row, room)),
        }
    }

    /// As `prepare`, of a left operand that is never negative.
    ///
    /// # Safety
    /// As `prepare`.
    pub unsafe fn prepare_positive(self, left: &View, row: usize, room: *mut u8) -> Prepared {
        match self {
            Self::Bf16 => self.prepare(left, row, room),
            Self::Int8 => Prepared::Int8(int8::pack_left::<false>(left, row, room)),
        }
    }

    /// All columns of a left operand's transpose (contraction, rows), 32 rows of the product each;
    /// `room` has `bytes` for each of them, `left_bytes` or more.
    ///
    /// # Safety
    /// A `Unit` is there.
    pub unsafe fn prepare_columns(
        self,
        unit: &Unit,
        x: &View,
        room: *mut u8,
        bytes: usize,
        out: &mut Vec<Prepared>,
    ) {
        let blocks = x.columns.div_ceil(BLOCK);
        if self == Self::Bf16 {
            // All columns of 32 rows before the next ones, as they lie in memory.
            for step in 0..x.rows.div_ceil(BLOCK) {
                let rows = x.rows_from(step * BLOCK, BLOCK);
                for block in 0..blocks {
                    let place = room.add(block * bytes) as *mut u16;
                    unit.pack_columns(&rows, block * BLOCK, place.add(step * STEP_LEN));
                }
            }
        }
        for block in 0..blocks {
            let place = room.add(block * bytes);
            out.push(match self {
                Self::Bf16 => Prepared::Bf16(unit.left(place as *const u16)),
                Self::Int8 => {
                    Prepared::Int8(int8::pack_left_columns(unit, x, block * BLOCK, place))
                }
            });
        }
    }

    /// Pack all columns of a right operand (contraction, outputs), `bytes` for every 32 of them.
    ///
    /// # Safety
    /// A `Unit` is there; there is that room, `right_bytes` or more for every 32.
    pub unsafe fn pack_right_columns(self, x: &View, out: *mut u8, bytes: usize) {
        let panels = x.columns.div_ceil(BLOCK);
        if self == Self::Int8 {
            for panel in 0..panels {
                int8::pack_columns(x, x.rows, panel * BLOCK, out.add(panel * bytes));
            }
            return;
        }
        for step in 0..x.rows.div_ceil(BLOCK) {
            let rows = x.rows_from(step * BLOCK, BLOCK);
            for panel in 0..panels {
                let place = out.add(panel * bytes) as *mut u16;
                pack_pairs(&rows, panel * BLOCK, place.add(step * STEP_LEN));
            }
        }
    }
}

impl Prepared {
    /// `out` (32 x 32, `stride` numbers from row to row) = these rows times 32 packed columns,
    /// added to what is in `out` if `add`.
    ///
    /// # Safety
    /// Both have this contraction; `out` has its 32 rows.
    pub unsafe fn multiply(
        self,
        unit: &Unit,
        right: *const u8,
        contraction: usize,
        (out, stride): (*mut f32, usize),
        add: bool,
    ) {
        match self {
            Self::Bf16(left) => {
                unit.multiply(left, right as *const u16, contraction / BLOCK, out, stride, add)
            }
            Self::Int8(left) => int8::multiply(unit, left, right, contraction, (out, stride), add),
        }
    }
}
