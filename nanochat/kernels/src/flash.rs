//! Causal attention for training in bf16, and its gradient (arXiv:2205.14135): scores of 32
//! queries at a time, never of all; the backward pass makes them again from their log-sum-exp.
//!
//! Legend: T = positions, H = heads, D = head size. Queries, keys, values and results are
//! (sequences, T, H, D). A task does one head of one sequence.

use std::arch::x86_64::*;

use crate::blocks::{pack_pairs, pack_rows, round, Left, Unit, View, BLOCK, STEP_LEN};
use crate::linear::round_row;
use crate::memory::{with_local, Shared};
use crate::rows::dot;
use crate::team;
use crate::wide::exp;

/// Blocks of queries whose weights wait for their products with queries and gradients.
const WAITING: usize = 8;

#[derive(Clone, Copy)]
pub struct Sizes {
    pub sequences: usize,
    pub positions: usize,
    pub heads: usize,
    /// A multiple of 32.
    pub size: usize,
    /// Positions before its own that each query sees.
    pub window: usize,
}

impl Sizes {
    fn blocks(&self) -> usize {
        self.positions.div_ceil(BLOCK)
    }

    /// T rounded up to whole blocks.
    fn length(&self) -> usize {
        self.blocks() * BLOCK
    }

    /// Numbers from a row of scores to the next: not a power of two, which would leave most of the
    /// cache unused.
    fn row(&self) -> usize {
        self.length() + BLOCK
    }

    /// bf16 numbers of a packed head.
    fn packed(&self) -> usize {
        self.length() * self.size
    }

    fn head(&self, start: *const u16, task: usize) -> View {
        View {
            start: start.wrapping_add(self.place(task)),
            stride: self.heads * self.size,
            rows: self.positions,
            columns: self.size,
        }
    }

    /// Where the task's head begins.
    fn place(&self, task: usize) -> usize {
        let (sequence, head) = (task / self.heads, task % self.heads);
        (sequence * self.positions * self.heads + head) * self.size
    }

    fn first_block(&self, block: usize) -> usize {
        (block * BLOCK).saturating_sub(self.window) / BLOCK
    }

    /// One behind the last block of queries that sees a block of keys.
    fn last_query_block(&self, key_block: usize) -> usize {
        let last = (key_block * BLOCK + BLOCK - 1).saturating_add(self.window);
        (last / BLOCK + 1).min(self.blocks())
    }
}

/// Parts of one stretch of scratch memory.
struct Carver(*mut u8);

impl Carver {
    unsafe fn take<T>(&mut self, len: usize) -> *mut T {
        let start = self.0 as *mut T;
        self.0 = self.0.add((len * std::mem::size_of::<T>()).next_multiple_of(64));
        start
    }
}

unsafe fn pack_all(x: &View, out: *mut u16, by_rows: bool) {
    let (count, len) = if by_rows {
        (x.rows.div_ceil(BLOCK), x.columns / BLOCK * STEP_LEN)
    } else {
        (x.columns / BLOCK, x.rows.div_ceil(BLOCK) * STEP_LEN)
    };
    for panel in 0..count {
        let out = out.add(panel * len);
        if by_rows {
            pack_rows(x, panel * BLOCK, out);
        } else {
            pack_pairs(x, panel * BLOCK, out);
        }
    }
}

/// `out` = attention; `lse` (sequences, heads, positions) fp32 gets the log of the sum of the
/// exponentials of each query's scores.
///
/// # Safety
/// A `Unit` is there; the arrays have these sizes.
pub unsafe fn forward(
    threads: usize,
    s: Sizes,
    [q, k, v]: [Shared<u16>; 3],
    out: Shared<u16>,
    lse: Shared<f32>,
) {
    team::run(threads, s.sequences * s.heads, &|task| unsafe {
        let unit = Unit::start();
        let (length, steps) = (s.row(), s.size / BLOCK);
        let bytes = 4 * s.packed() + BLOCK * (length * 6 + s.size * 6) + 512;
        with_local(bytes, |scratch| {
            let mut carver = Carver(scratch);
            let keys: *mut u16 = carver.take(s.packed());
            let values: *mut u16 = carver.take(s.packed());
            let scores: *mut f32 = carver.take(BLOCK * length);
            let weights: *mut u16 = carver.take(BLOCK * length);
            let sums: *mut f32 = carver.take(BLOCK * s.size);
            let spare: *mut u16 = carver.take(BLOCK * s.size);
            let queries = s.head(q.at(0), task);
            pack_all(&s.head(k.at(0), task), keys, true);
            pack_all(&s.head(v.at(0), task), values, false);
            for block in 0..s.blocks() {
                let first = s.first_block(block);
                let count = block + 1 - first;
                let rows = queries.left(block * BLOCK, spare);
                for panel in 0..count {
                    let right = keys.add((first + panel) * steps * STEP_LEN);
                    unit.multiply(rows, right, steps, scores.add(panel * BLOCK), length, false);
                }
                let mut totals = [0.0f32; BLOCK];
                let there = BLOCK.min(s.positions - block * BLOCK);
                for (r, row_total) in totals[..there].iter_mut().enumerate() {
                    let position = block * BLOCK + r;
                    let seen = position.saturating_sub(s.window)..position + 1;
                    let seen = seen.start - first * BLOCK..seen.end - first * BLOCK;
                    let row = scores.add(r * length);
                    let (largest, total) =
                        softmax(row, weights.add(r * length), seen, count * BLOCK, s.size);
                    *row_total = total;
                    *lse.at(task * s.positions + position) = largest + total.ln();
                }
                let weighted = Left::rows(weights, length);
                for panel in 0..steps {
                    let right = values.add((panel * s.blocks() + first) * STEP_LEN);
                    let sums = sums.add(panel * BLOCK);
                    unit.multiply(weighted, right, count, sums, s.size, false);
                }
                for (r, total) in totals[..there].iter().enumerate() {
                    let row = sums.add(r * s.size);
                    scale(row, s.size, 1.0 / total);
                    let at = s.place(task) + (block * BLOCK + r) * s.heads * s.size;
                    round_row(row, s.size, out.at(at));
                }
            }
        });
    });
}

/// Lanes of 16, from `start` on, that lie in a range.
#[inline(always)]
fn lanes(start: usize, range: &std::ops::Range<usize>) -> u16 {
    let below = |end: usize| ((1u32 << end.saturating_sub(start).min(16)) - 1) as u16;
    below(range.end) & !below(range.start)
}

/// Softmax of products over `seen`, before division by its sum, as bf16; 0 elsewhere. Returns the
/// largest score and the sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn softmax(
    row: *mut f32,
    out: *mut u16,
    seen: std::ops::Range<usize>,
    len: usize,
    size: usize,
) -> (f32, f32) {
    let factor = _mm512_set1_ps(1.0 / (size as f32).sqrt());
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut largest = lowest;
    for i in (0..len).step_by(16) {
        let x = _mm512_mul_ps(_mm512_loadu_ps(row.add(i)), factor);
        let x = _mm512_mask_mov_ps(lowest, lanes(i, &seen), x);
        largest = _mm512_max_ps(largest, x);
        _mm512_storeu_ps(row.add(i), x);
    }
    let largest = _mm512_reduce_max_ps(largest);
    let shift = _mm512_set1_ps(largest);
    let mut total = _mm512_setzero_ps();
    for i in (0..len).step_by(32) {
        let weight = |i: usize| unsafe {
            let weight = exp(_mm512_sub_ps(_mm512_loadu_ps(row.add(i)), shift));
            _mm512_maskz_mov_ps(lanes(i, &seen), weight)
        };
        let (low, high) = (weight(i), weight(i + 16));
        total = _mm512_add_ps(total, _mm512_add_ps(low, high));
        _mm512_storeu_si512(out.add(i) as *mut __m512i, round(low, high));
    }
    (largest, _mm512_reduce_add_ps(total))
}

#[target_feature(enable = "avx512f")]
unsafe fn scale(row: *mut f32, len: usize, factor: f32) {
    let factor = _mm512_set1_ps(factor);
    for i in (0..len).step_by(16) {
        _mm512_storeu_ps(row.add(i), _mm512_mul_ps(_mm512_loadu_ps(row.add(i)), factor));
    }
}

/// The gradients `d` of queries, keys and values, from those of `out`.
///
/// # Safety
/// As `forward`, whose results `out` and `lse` are.
pub unsafe fn backward(
    threads: usize,
    s: Sizes,
    [q, k, v]: [Shared<u16>; 3],
    (out, gradient): (Shared<u16>, Shared<u16>),
    lse: Shared<f32>,
    d: [Shared<u16>; 3],
) {
    team::run(threads, s.sequences * s.heads, &|task| unsafe {
        let unit = Unit::start();
        let (length, steps, blocks) = (s.row(), s.size / BLOCK, s.blocks());
        let waiting = WAITING.min(blocks);
        let bytes = 6 * s.packed()
            + BLOCK * length * 12
            + 4 * waiting * BLOCK * (length + s.size)
            + 8 * length * s.size
            + 8 * BLOCK * s.size
            + 1024;
        with_local(bytes, |scratch| {
            let mut carver = Carver(scratch);
            let keys: *mut u16 = carver.take(s.packed());
            let key_pairs: *mut u16 = carver.take(s.packed());
            let values: *mut u16 = carver.take(s.packed());
            let scores: *mut f32 = carver.take(BLOCK * length);
            let dweights: *mut f32 = carver.take(BLOCK * length);
            let rounded: [*mut u16; 2] = [carver.take(BLOCK * length), carver.take(BLOCK * length)];
            // Of weights and of the gradients of scores: for each block of keys its `waiting`
            // blocks of queries; and gradients and queries of those.
            let turned: [*mut u16; 2] =
                std::array::from_fn(|_| carver.take(waiting * BLOCK * length));
            let pairs: [*mut u16; 2] =
                std::array::from_fn(|_| carver.take(waiting * BLOCK * s.size));
            // Of values and of keys.
            let sums: [*mut f32; 2] = std::array::from_fn(|_| carver.take(length * s.size));
            let block_sums: *mut f32 = carver.take(BLOCK * s.size);
            let spares: [*mut u16; 2] = std::array::from_fn(|_| carver.take(BLOCK * s.size));

            let [queries, key_rows, value_rows] = [q, k, v].map(|x| s.head(x.at(0), task));
            let [results, gradients] = [out, gradient].map(|x| s.head(x.at(0), task));
            pack_all(&key_rows, keys, true);
            pack_all(&key_rows, key_pairs, false);
            pack_all(&value_rows, values, true);
            let stride = s.heads * s.size;
            for first_waiting in (0..blocks).step_by(waiting) {
                let last_waiting = (first_waiting + waiting).min(blocks);
                for block in first_waiting..last_waiting {
                    let first = s.first_block(block);
                    let count = block + 1 - first;
                    let query_rows = queries.left(block * BLOCK, spares[0]);
                    let gradient_rows = gradients.left(block * BLOCK, spares[1]);
                    for panel in 0..count {
                        let at = (first + panel) * steps * STEP_LEN;
                        let column = panel * BLOCK;
                        unit.multiply(
                            query_rows,
                            keys.add(at),
                            steps,
                            scores.add(column),
                            length,
                            false,
                        );
                        let out = dweights.add(column);
                        unit.multiply(gradient_rows, values.add(at), steps, out, length, false);
                    }
                    for r in 0..BLOCK {
                        let position = block * BLOCK + r;
                        let (weights, dscores) =
                            (rounded[0].add(r * length), rounded[1].add(r * length));
                        if position >= s.positions {
                            std::ptr::write_bytes(weights, 0, count * BLOCK);
                            std::ptr::write_bytes(dscores, 0, count * BLOCK);
                            continue;
                        }
                        let at = position * stride;
                        let along = dot(results.start.add(at), gradients.start.add(at), s.size);
                        let seen = position.saturating_sub(s.window) - first * BLOCK
                            ..position + 1 - first * BLOCK;
                        weigh_again(
                            (scores.add(r * length), dweights.add(r * length)),
                            (weights, dscores),
                            (*lse.at(task * s.positions + position), along),
                            seen,
                            count * BLOCK,
                            s.size,
                        );
                    }
                    let dscores = Left::rows(rounded[1], length);
                    for panel in 0..steps {
                        let right = key_pairs.add((panel * blocks + first) * STEP_LEN);
                        let sums = block_sums.add(panel * BLOCK);
                        unit.multiply(dscores, right, count, sums, s.size, false);
                    }
                    for r in 0..BLOCK.min(s.positions - block * BLOCK) {
                        let at = s.place(task) + (block * BLOCK + r) * stride;
                        round_row(block_sums.add(r * s.size), s.size, d[0].at(at));
                    }
                    for (rounded, turned) in rounded.iter().zip(turned) {
                        let rows = View::new(*rounded, BLOCK, length);
                        for panel in 0..count {
                            let place = (first + panel) * waiting + block - first_waiting;
                            unit.pack_columns(&rows, panel * BLOCK, turned.add(place * STEP_LEN));
                        }
                    }
                }
                let count = last_waiting - first_waiting;
                for (x, pairs) in [gradients, queries].iter().zip(pairs) {
                    let rows = x.rows_from(first_waiting * BLOCK, count * BLOCK);
                    for panel in 0..steps {
                        pack_pairs(&rows, panel * BLOCK, pairs.add(panel * count * STEP_LEN));
                    }
                }
                for block in 0..last_waiting {
                    let from = block.max(first_waiting);
                    let to = s.last_query_block(block).min(last_waiting);
                    let is_first = block >= first_waiting;
                    if from >= to {
                        continue;
                    }
                    for ((turned, pairs), sums) in turned.iter().zip(pairs).zip(sums) {
                        let place = block * waiting + from - first_waiting;
                        let rows = unit.left(turned.add(place * STEP_LEN));
                        for panel in 0..steps {
                            let at = panel * count + from - first_waiting;
                            let sums = sums.add(block * BLOCK * s.size + panel * BLOCK);
                            let right = pairs.add(at * STEP_LEN);
                            unit.multiply(rows, right, to - from, sums, s.size, !is_first);
                        }
                    }
                }
            }
            for row in 0..s.positions {
                let at = s.place(task) + row * stride;
                round_row(sums[0].add(row * s.size), s.size, d[2].at(at));
                round_row(sums[1].add(row * s.size), s.size, d[1].at(at));
            }
        });
    });
}

/// Weights from products and their log-sum-exp, and the gradients of the products:
/// weight x (gradient of the weight - the sum of weight x gradient) / sqrt(size).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn weigh_again(
    (row, dweights): (*const f32, *const f32),
    (weights, dscores): (*mut u16, *mut u16),
    (lse, along): (f32, f32),
    seen: std::ops::Range<usize>,
    len: usize,
    size: usize,
) {
    let factor = _mm512_set1_ps(1.0 / (size as f32).sqrt());
    let (lse, along) = (_mm512_set1_ps(lse), _mm512_set1_ps(along));
    let half = |i: usize| unsafe {
        let score = _mm512_fmsub_ps(_mm512_loadu_ps(row.add(i)), factor, lse);
        let weight = _mm512_maskz_mov_ps(lanes(i, &seen), exp(score));
        let behind = _mm512_sub_ps(_mm512_loadu_ps(dweights.add(i)), along);
        (weight, _mm512_mul_ps(_mm512_mul_ps(weight, behind), factor))
    };
    for i in (0..len).step_by(32) {
        let ((low, dlow), (high, dhigh)) = (half(i), half(i + 16));
        _mm512_storeu_si512(weights.add(i) as *mut __m512i, round(low, high));
        _mm512_storeu_si512(dscores.add(i) as *mut __m512i, round(dlow, dhigh));
    }
}
