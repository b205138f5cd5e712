//! Rows of keys and values, in the precision that goes with a model's weights.

use crate::attention::{self, Cached, Heads, Row, Span};
use crate::isa::Isa;
use crate::math::Number;
use crate::matmul::{Inputs, Kind};
use crate::memory::Shared;

/// Rows in the precision that goes with the weights.
pub enum Rows {
    F32(Vec<Option<Row<f32>>>),
    Bf16(Vec<Option<Row<u16>>>),
}

impl Rows {
    pub fn new(kind: Kind) -> Self {
        match kind {
            Kind::F32 => Rows::F32(Vec::new()),
            Kind::Bf16 | Kind::I8 | Kind::I8Split => Rows::Bf16(Vec::new()),
        }
    }

    pub fn open(&mut self, heads: Heads, capacity: usize) -> usize {
        match self {
            Rows::F32(rows) => place(rows, Row::new(heads, capacity)),
            Rows::Bf16(rows) => place(rows, Row::new(heads, capacity)),
        }
    }

    pub fn close(&mut self, row: usize) -> Result<(), String> {
        match self {
            Rows::F32(rows) => close_row(rows, row),
            Rows::Bf16(rows) => close_row(rows, row),
        }
    }

    pub fn copy(
        &mut self,
        heads: Heads,
        source: usize,
        target: usize,
        length: usize,
    ) -> Result<(), String> {
        match self {
            Rows::F32(rows) => copy_row(rows, heads, source, target, length),
            Rows::Bf16(rows) => copy_row(rows, heads, source, target, length),
        }
    }
}

/// Attention in a precision of keys and values.
pub trait Attend: Cached {
    /// # Safety
    /// As `attention::attend_f32`; `out` from `offset` on.
    unsafe fn attend(isa: Isa, span: &Span<Self>, out: Inputs, offset: usize);
}

impl Attend for f32 {
    unsafe fn attend(isa: Isa, span: &Span<f32>, out: Inputs, offset: usize) {
        match out {
            Inputs::F32(out) => attention::attend_f32(isa, span, Shared::new(out.at(offset))),
            _ => unreachable!("fp32 keys go with fp32 products"),
        }
    }
}

impl Attend for u16 {
    unsafe fn attend(isa: Isa, span: &Span<u16>, out: Inputs, offset: usize) {
        match out {
            Inputs::F32(out) => attention::attend_bf16(isa, span, Shared::new(out.at(offset))),
            #[cfg(target_arch = "x86_64")]
            Inputs::Bf16(out) => attention::attend_bf16_to_bf16(span, Shared::new(out.at(offset))),
            _ => unreachable!("attention writes what this machine multiplies"),
        }
    }
}

fn place<E: Number>(rows: &mut Vec<Option<Row<E>>>, row: Row<E>) -> usize {
    let free = rows.iter().position(Option::is_none).unwrap_or_else(|| {
        rows.push(None);
        rows.len() - 1
    });
    rows[free] = Some(row);
    free
}

pub fn existing<E: Number>(rows: &[Option<Row<E>>], row: usize) -> Result<&Row<E>, String> {
    rows.get(row).and_then(Option::as_ref).ok_or_else(|| format!("no row {row}"))
}

fn close_row<E: Number>(rows: &mut [Option<Row<E>>], row: usize) -> Result<(), String> {
    existing(rows, row)?;
    rows[row] = None;
    Ok(())
}

fn copy_row<E: Number>(
    rows: &mut [Option<Row<E>>],
    heads: Heads,
    source: usize,
    target: usize,
    length: usize,
) -> Result<(), String> {
    if existing(rows, source)?.capacity < length || existing(rows, target)?.capacity < length {
        return Err(format!("{length} tokens do not fit"));
    }
    if source == target {
        return Ok(());
    }
    let mut taken = rows[target].take().expect("exists");
    taken.copy_from(heads, rows[source].as_ref().expect("exists"), length);
    rows[target] = Some(taken);
    Ok(())
}
