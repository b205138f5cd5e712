//! Linear layers for training: the product, and both of its gradients.
//!
//! Legend: M = rows of activations, N = outputs, K = inputs. Weights are (N, K), as PyTorch keeps
//! them. In memory operands are bf16; for the products they can be rounded to 8 bits (`operands`).
//! They are packed anew at every call, which costs a small part of the product.

use std::arch::x86_64::*;

use crate::blocks::{first_lanes, round, widen, Unit, View, BLOCK};
use crate::memory::{with_local, with_shared, Shared};
use crate::operands::{Format, Side};
use crate::team;

/// Rows that a task multiplies with all weights: 128 x 256 numbers and their sums fit the cache.
const TASK_ROWS: usize = 128;
/// Rows of a weight gradient that are packed and multiplied at once: with 1,024 outputs and 256
/// inputs, they and the sums fill the cache.
pub const CHUNK_ROWS: usize = 256;
/// Parts of the rows for each thread: more even out threads that are interrupted.
const PARTS_PER_THREAD: usize = 2;

/// What becomes of 32 x 32 sums on their way to memory.
#[derive(Clone, Copy)]
pub enum Then {
    Round,
    /// max(y, 0)^2.
    Relu2,
    /// Times 2 sqrt(h), the derivative of h = max(x, 0)^2 at its own place; h is (M, K).
    Relu2Gradient(Shared<u16>),
}

/// Write a block of sums as bf16. `at`: place of its first number in the output.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn finish(
    sums: *const f32,
    (rows, columns): (usize, usize),
    then: Then,
    out: Shared<u16>,
    at: usize,
    stride: usize,
) {
    let mask = first_lanes(columns);
    let zero = _mm512_setzero_ps();
    for r in 0..rows.min(BLOCK) {
        let line = sums.add(r * BLOCK);
        let (mut low, mut high) = (_mm512_loadu_ps(line), _mm512_loadu_ps(line.add(16)));
        match then {
            Then::Round => {}
            Then::Relu2 => {
                // Of what is not a number the second operand is returned.
                (low, high) = (_mm512_max_ps(zero, low), _mm512_max_ps(zero, high));
                (low, high) = (_mm512_mul_ps(low, low), _mm512_mul_ps(high, high));
            }
            Then::Relu2Gradient(h) => {
                let h = _mm512_maskz_loadu_epi16(mask, h.at(at + r * stride) as *const i16);
                let first = widen(_mm512_castsi512_si256(h));
                let second = widen(_mm512_extracti64x4_epi64::<1>(h));
                low = _mm512_mul_ps(low, twice_root(first));
                high = _mm512_mul_ps(high, twice_root(second));
            }
        }
        let line = out.at(at + r * stride) as *mut i16;
        _mm512_mask_storeu_epi16(line, mask, round(low, high));
    }
}

/// 2 sqrt(h) to 14 bits, more than bf16 has; the processor's own root takes many times as long.
#[inline]
#[target_feature(enable = "avx512f")]
fn twice_root(h: __m512) -> __m512 {
    // Zero and infinity are their own roots; what is not a number stays none.
    let infinity = _mm512_set1_ps(f32::INFINITY);
    let has_inverse = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(h, _mm512_setzero_ps())
        & _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(h, infinity);
    let root = _mm512_mask_mul_ps(h, has_inverse, h, _mm512_rsqrt14_ps(h));
    _mm512_add_ps(root, root)
}

/// `y` (M, N) = x (M, K) w^T, then `then`. K is a multiple of 32.
///
/// # Safety
/// A `Unit` is there; the matrices have these shapes.
pub unsafe fn forward(
    threads: usize,
    format: Format,
    (x, w): (View, View),
    y: Shared<u16>,
    then: Then,
) {
    product(threads, format, &[(x, w)], Side::Rows, w.rows, y, then);
}

/// `dx` (M, K) = the sum over pairs of dy (M, N) w, then `then`. Every N is a multiple of 32.
///
/// # Safety
/// As `forward`.
pub unsafe fn backward_input(
    threads: usize,
    format: Format,
    pairs: &[(View, View)],
    dx: Shared<u16>,
    then: Then,
) {
    product(threads, format, pairs, Side::Columns, pairs[0].1.columns, dx, then);
}

/// The sum over pairs of left (M, contraction) and right: (M, outputs).
unsafe fn product(
    threads: usize,
    format: Format,
    pairs: &[(View, View)],
    side: Side,
    outputs: usize,
    out: Shared<u16>,
    then: Then,
) {
    let panels = outputs.div_ceil(BLOCK);
    let rows = pairs[0].0.rows;
    let panel_bytes = pairs.iter().map(|(left, _)| format.right_bytes(left.columns)).sum::<usize>();
    let left_bytes = pairs.iter().map(|(left, _)| format.left_bytes(left.columns)).sum::<usize>();
    with_shared(panels * panel_bytes, |packed: *mut u8| {
        let packed = Shared::new(packed);
        team::run(threads, panels, &|panel| unsafe {
            let mut place = packed.at(panel * panel_bytes);
            for (left, right) in pairs {
                format.pack_right(right, side, left.columns, panel * BLOCK, place);
                place = place.add(format.right_bytes(left.columns));
            }
        });
        team::run(threads, rows.div_ceil(TASK_ROWS), &|task| unsafe {
            let unit = Unit::start();
            let mut lefts = Vec::with_capacity(pairs.len());
            with_local(BLOCK * BLOCK * 4 + left_bytes, |scratch: *mut u8| {
                let sums = scratch as *mut f32;
                let (first, last) = (task * TASK_ROWS, rows.min((task + 1) * TASK_ROWS));
                // A block of rows at a time: its outputs are written line after line.
                for row in (first..last).step_by(BLOCK) {
                    let mut room = scratch.add(BLOCK * BLOCK * 4);
                    lefts.clear();
                    for (left, _) in pairs {
                        lefts.push(format.prepare(left, row, room));
                        room = room.add(format.left_bytes(left.columns));
                    }
                    for panel in 0..panels {
                        let (column, at) = (panel * BLOCK, row * outputs + panel * BLOCK);
                        if let Then::Relu2Gradient(h) = then {
                            for r in 0..BLOCK.min(last - row) {
                                _mm_prefetch::<_MM_HINT_T0>(h.at(at + r * outputs) as *const i8);
                            }
                        }
                        let mut right = packed.at(panel * panel_bytes) as *const u8;
                        for (i, ((left, _), rows)) in pairs.iter().zip(&lefts).enumerate() {
                            rows.multiply(&unit, right, left.columns, (sums, BLOCK), i > 0);
                            right = right.add(format.right_bytes(left.columns));
                        }
                        finish(sums, (last - row, outputs - column), then, out, at, outputs);
                    }
                }
            });
        });
    });
}

/// `dw` (N, K) in bf16 = dy^T (N, M) x (M, K).
///
/// Rows are dealt out in a few parts with sums of their own, which are added in the end; a part
/// packs a few rows and multiplies them while they are in the cache.
///
/// # Safety
/// As `forward`.
pub unsafe fn backward_weight(threads: usize, format: Format, dy: View, x: View, dw: Shared<u16>) {
    let (rows, outputs, inputs) = (dy.rows, dy.columns, x.columns);
    let (blocks, panels) = (outputs.div_ceil(BLOCK), inputs.div_ceil(BLOCK));
    let (height, width) = (blocks * BLOCK, panels * BLOCK);
    let parts = (PARTS_PER_THREAD * threads).min(rows.div_ceil(CHUNK_ROWS));
    let per_part = rows.div_ceil(parts).next_multiple_of(CHUNK_ROWS);
    let parts = rows.div_ceil(per_part);
    let (left_bytes, right_bytes) = (format.left_bytes(CHUNK_ROWS), format.right_bytes(CHUNK_ROWS));
    with_shared(parts * height * width, |sums: *mut f32| {
        let sums = Shared::new(sums);
        team::run(threads, parts, &|part| unsafe {
            let unit = Unit::start();
            let sums = sums.at(part * height * width);
            let (start, end) = (part * per_part, rows.min((part + 1) * per_part));
            let mut lefts = Vec::with_capacity(blocks);
            with_local(blocks * left_bytes + panels * right_bytes, |left: *mut u8| {
                let right = left.add(blocks * left_bytes);
                for first in (start..end).step_by(CHUNK_ROWS) {
                    let count = CHUNK_ROWS.min(end - first);
                    let (dy, x) = (dy.rows_from(first, count), x.rows_from(first, count));
                    lefts.clear();
                    format.prepare_columns(&unit, &dy, left, left_bytes, &mut lefts);
                    format.pack_right_columns(&x, right, right_bytes);
                    let contraction = count.next_multiple_of(BLOCK);
                    for (block, rows) in lefts.iter().enumerate() {
                        for panel in 0..panels {
                            let right = right.add(panel * right_bytes);
                            let c = sums.add((block * panels + panel) * BLOCK * BLOCK);
                            rows.multiply(&unit, right, contraction, (c, BLOCK), first > start);
                        }
                    }
                }
            });
        });
        team::run(threads, blocks, &|block| unsafe {
            let own = sums.at(block * BLOCK * width);
            for part in 1..parts {
                add_row(own, sums.at((part * height + block * BLOCK) * width), BLOCK * width);
            }
            for panel in 0..panels {
                let (row, column) = (block * BLOCK, panel * BLOCK);
                let size = (outputs - row, inputs - column);
                let own = own.add(panel * BLOCK * BLOCK);
                finish(own, size, Then::Round, dw, row * inputs + column, inputs);
            }
        });
    });
}

/// Add `len` numbers, a multiple of 16.
#[target_feature(enable = "avx512f")]
unsafe fn add_row(sums: *mut f32, more: *const f32, len: usize) {
    for i in (0..len).step_by(16) {
        let sum = _mm512_add_ps(_mm512_loadu_ps(sums.add(i)), _mm512_loadu_ps(more.add(i)));
        _mm512_storeu_ps(sums.add(i), sum);
    }
}

/// Write `len` sums as bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub unsafe fn round_row(sums: *const f32, len: usize, out: *mut u16) {
    for i in (0..len).step_by(32) {
        let mask = first_lanes(len - i);
        let low = _mm512_maskz_loadu_ps(mask as u16, sums.add(i));
        let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, sums.wrapping_add(i + 16));
        _mm512_mask_storeu_epi16(out.add(i) as *mut i16, mask, round(low, high));
    }
}
