//! The head, its softcap and the cross-entropy in one pass, with both gradients.
//!
//! Legend: M = rows, C = width, V = vocabulary. The logits of 32 rows and 256 tokens exist at a
//! time. With l = cap tanh(x / cap) at most cap, exp(l) needs no maximum taken off, so a row's sum
//! Z can grow while its products with the head's weights are added up: what is added is
//! u = exp(l) dl/dx, and 1 / Z is a factor of the row that waits until the end:
//!     dhidden = f (sum over v other than y of u_v w_v / Z - (1 - p_y) dl_y/dx w_y),
//!     dw_v    = sum over rows of [v other than y] u_v (f hidden / Z)
//!               - [v = y] f (1 - p_y) dl_y/dx hidden,
//! f being the weight of the row's loss, and p_y = exp(l_y) / Z. The target's own u, often the
//! largest of all, is not among what is rounded and added up: of a p_y near 1 the difference from 1
//! would be mostly rounding. With 8-bit operands hidden rows and weights are rounded and, for
//! dhidden alone, each group of u_v, which are never negative; there what is below a 510th of the
//! largest is lost.

use std::arch::x86_64::*;
use std::cell::RefCell;

use crate::blocks::{pack_pairs, round, widen, Unit, View, BLOCK, STEP_LEN};
use crate::linear::round_row;
use crate::memory::{with_local, Buffer, Shared};
use crate::operands::{Format, Side};
use crate::team;
use crate::wide::{exp, tanh};

/// Tokens whose weights a task multiplies with all its rows before the next ones.
const GROUP: usize = 256;
const GROUP_PANELS: usize = GROUP / BLOCK;
/// Rows of a task, at most.
const TASK_ROWS: usize = 256;
/// Bytes of `u` that are kept until the rows of a chunk are done.
const CHUNK_BYTES: usize = 32 << 20;
/// Steps of a weight gradient before the next block, and blocks of tokens of a task.
const CHUNK_STEPS: usize = 16;
const TASK_BLOCKS: usize = 4;

#[derive(Clone, Copy)]
pub struct Sizes {
    pub rows: usize,
    /// A multiple of 32.
    pub width: usize,
    /// Rows of the weights; those from `used` on are padding.
    pub vocabulary: usize,
    pub used: usize,
    pub cap: f32,
    /// Of the logits and the gradient of hidden states.
    pub format: Format,
}

#[derive(Clone, Copy)]
pub struct Data {
    /// (rows, width) bf16.
    pub hidden: Shared<u16>,
    /// (vocabulary, width) bf16.
    pub weight: Shared<u16>,
    /// (rows), each below `used`.
    pub targets: Shared<i64>,
    /// (rows), or null: all 1.
    pub factors: *const f32,
    pub hidden_gradient: Shared<u16>,
    pub weight_gradient: Shared<u16>,
}

// SAFETY: `factors` is only read.
unsafe impl Send for Data {}
unsafe impl Sync for Data {}

/// Memory that is kept from call to call.
struct Room {
    /// The weights as right operands of logits and of gradients: for each group of tokens.
    for_logits: Buffer<u8>,
    for_gradients: Buffer<u8>,
    /// `u` of a chunk as left operands; hidden rows times f / Z, plain and packed.
    u: Buffer<u16>,
    scaled: Buffer<u16>,
    scaled_pairs: Buffer<u16>,
    /// (vocabulary, width) sums.
    sums: Buffer<f32>,
    /// Of each row of a chunk: f dl/dx of its target, and its loss.
    pull: Buffer<f32>,
    losses: Buffer<f64>,
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::new(Room {
        for_logits: Buffer::zeroed(0),
        for_gradients: Buffer::zeroed(0),
        u: Buffer::zeroed(0),
        scaled: Buffer::zeroed(0),
        scaled_pairs: Buffer::zeroed(0),
        sums: Buffer::zeroed(0),
        pull: Buffer::zeroed(0),
        losses: Buffer::zeroed(0),
    });
}

/// Sum of the weighted losses; the gradients are written to `data`.
///
/// # Safety
/// A `Unit` is there; the arrays have these sizes.
pub unsafe fn loss(threads: usize, s: Sizes, data: Data) -> f64 {
    ROOM.with(|room| unsafe { loss_in(&mut room.borrow_mut(), threads, s, data) })
}

/// Places in `Room` that tasks share.
#[derive(Clone, Copy)]
struct Places {
    for_logits: Shared<u8>,
    for_gradients: Shared<u8>,
    u: Shared<u16>,
    scaled: Shared<u16>,
    scaled_pairs: Shared<u16>,
    sums: Shared<f32>,
    pull: Shared<f32>,
    losses: Shared<f64>,
}

impl Sizes {
    fn groups(&self) -> usize {
        self.vocabulary.div_ceil(GROUP)
    }

    fn steps(&self) -> usize {
        self.width / BLOCK
    }

    /// Bytes of 32 tokens' packed weights, for logits.
    fn logit_bytes(&self) -> usize {
        self.format.right_bytes(self.width)
    }

    /// Bytes of 32 features of a group's packed weights, for gradients.
    fn gradient_bytes(&self) -> usize {
        self.format.right_bytes(GROUP)
    }

    /// Rows whose `u` is kept at once.
    fn chunk_rows(&self) -> usize {
        let rows = CHUNK_BYTES / (2 * self.groups() * GROUP);
        (rows / BLOCK * BLOCK).clamp(TASK_ROWS, self.rows.next_multiple_of(BLOCK).max(TASK_ROWS))
    }
}

unsafe fn loss_in(room: &mut Room, threads: usize, s: Sizes, data: Data) -> f64 {
    let chunk_rows = s.chunk_rows();
    room.for_logits.reserve(s.groups() * GROUP_PANELS * s.logit_bytes());
    room.for_gradients.reserve(s.groups() * s.steps() * s.gradient_bytes());
    room.u.reserve(s.groups() * GROUP * chunk_rows);
    room.scaled.reserve(chunk_rows * s.width);
    room.scaled_pairs.reserve(chunk_rows * s.width);
    room.sums.reserve(s.groups() * GROUP * s.width);
    room.pull.reserve(chunk_rows);
    room.losses.reserve(chunk_rows);
    let places = Places {
        for_logits: Shared::new(room.for_logits.mut_ptr()),
        for_gradients: Shared::new(room.for_gradients.mut_ptr()),
        u: Shared::new(room.u.mut_ptr()),
        scaled: Shared::new(room.scaled.mut_ptr()),
        scaled_pairs: Shared::new(room.scaled_pairs.mut_ptr()),
        sums: Shared::new(room.sums.mut_ptr()),
        pull: Shared::new(room.pull.mut_ptr()),
        losses: Shared::new(room.losses.mut_ptr()),
    };
    let weight = View::new(data.weight.at(0), s.vocabulary, s.width);
    team::run(threads, s.groups(), &|group| unsafe {
        let view = weight.rows_from(group * GROUP, GROUP);
        for panel in 0..GROUP_PANELS {
            let out = places.for_logits.at((group * GROUP_PANELS + panel) * s.logit_bytes());
            s.format.pack_right(&view, Side::Rows, s.width, panel * BLOCK, out);
        }
        for panel in 0..s.steps() {
            let out = places.for_gradients.at((group * s.steps() + panel) * s.gradient_bytes());
            s.format.pack_right(&view, Side::Columns, GROUP, panel * BLOCK, out);
        }
    });
    let mut total = 0.0;
    for first in (0..s.rows).step_by(chunk_rows) {
        let count = chunk_rows.min(s.rows - first);
        let per_task = count.div_ceil(threads).next_multiple_of(BLOCK).min(TASK_ROWS);
        team::run(threads, count.div_ceil(per_task), &|task| unsafe {
            let unit = Unit::start();
            let start = task * per_task;
            let rows = start..(start + per_task).min(count);
            rows_of_chunk(&unit, s, data, places, first, rows, chunk_rows);
        });
        total += (0..count).map(|row| unsafe { *places.losses.at(row) }).sum::<f64>();
        let scaled = View::new(places.scaled.at(0), count, s.width);
        let steps = count.div_ceil(BLOCK);
        team::run(threads, s.steps(), &|panel| unsafe {
            let out = places.scaled_pairs.at(panel * steps * STEP_LEN);
            pack_pairs(&scaled, panel * BLOCK, out);
        });
        let blocks = s.vocabulary.div_ceil(BLOCK);
        team::run(threads, blocks.div_ceil(TASK_BLOCKS), &|task| unsafe {
            let unit = Unit::start();
            let start = task * TASK_BLOCKS;
            let blocks = start..(start + TASK_BLOCKS).min(blocks);
            weights_of_chunk(&unit, s, data, places, first..first + count, blocks, chunk_rows);
        });
    }
    total
}

/// Logits, losses, `u` and the gradient of some rows of a chunk that begins at row `first`.
unsafe fn rows_of_chunk(
    unit: &Unit,
    s: Sizes,
    data: Data,
    places: Places,
    first: usize,
    rows: std::ops::Range<usize>,
    chunk_rows: usize,
) {
    let (count, steps) = (rows.len(), s.steps());
    let blocks = count.div_ceil(BLOCK);
    let (hidden_bytes, u_bytes) = (s.format.left_bytes(s.width), s.format.left_bytes(GROUP));
    let bytes = blocks * (BLOCK * s.width * 4 + hidden_bytes) + BLOCK * GROUP * 6 + u_bytes;
    with_local(bytes, |scratch| {
        let gradient = scratch as *mut f32;
        let logits = gradient.add(blocks * BLOCK * s.width);
        let u = logits.add(BLOCK * GROUP) as *mut u16;
        let u_room = u.add(BLOCK * GROUP) as *mut u8;
        let hidden_room = u_room.add(u_bytes);
        let mut totals = [0.0f32; TASK_ROWS];
        // exp(l) and dl/dx of the target.
        let mut at_target = [(0.0f32, 0.0f32); TASK_ROWS];
        let hidden = View::new(data.hidden.at((first + rows.start) * s.width), count, s.width);
        let blocks_of_rows: Vec<_> = (0..blocks)
            .map(|i| s.format.prepare(&hidden, i * BLOCK, hidden_room.add(i * hidden_bytes)))
            .collect();
        for group in 0..s.groups() {
            let for_logits = places.for_logits.at(group * GROUP_PANELS * s.logit_bytes());
            let for_gradients = places.for_gradients.at(group * s.steps() * s.gradient_bytes());
            let used = s.used.saturating_sub(group * GROUP).min(GROUP);
            for (block, left) in blocks_of_rows.iter().enumerate() {
                for panel in 0..GROUP_PANELS {
                    let right = for_logits.add(panel * s.logit_bytes());
                    let out = (logits.add(panel * BLOCK), GROUP);
                    left.multiply(unit, right, s.width, out, false);
                }
                for r in 0..BLOCK {
                    let (row, out) = (block * BLOCK + r, u.add(r * GROUP));
                    if row >= count {
                        std::ptr::write_bytes(out, 0, GROUP);
                        continue;
                    }
                    let line = logits.add(r * GROUP);
                    let target = *data.targets.at(first + rows.start + row) as usize;
                    if target / GROUP == group {
                        let t = tanh_of(*line.add(target % GROUP) / s.cap);
                        at_target[row] = (s.cap * t, 1.0 - t * t);
                    }
                    totals[row] += exponentials(line, out, used, s.cap);
                    if target / GROUP == group {
                        *out.add(target % GROUP) = 0;
                    }
                }
                let view = View::new(u, BLOCK, GROUP);
                for panel in 0..GROUP_PANELS {
                    let step = rows.start / BLOCK + block;
                    let place = (group * GROUP_PANELS + panel) * (chunk_rows / BLOCK) + step;
                    unit.pack_columns(&view, panel * BLOCK, places.u.at(place * STEP_LEN));
                }
                let left = s.format.prepare_positive(&view, 0, u_room);
                for panel in 0..steps {
                    let right = for_gradients.add(panel * s.gradient_bytes());
                    let out = gradient.add(block * BLOCK * s.width + panel * BLOCK);
                    left.multiply(unit, right, GROUP, (out, s.width), group > 0);
                }
            }
        }
        for row in 0..count {
            let place = first + rows.start + row;
            let factor = if data.factors.is_null() { 1.0 } else { *data.factors.add(place) };
            let (logit, slope) = at_target[row];
            let total = totals[row];
            let loss = total.ln() - logit;
            let pull = factor * slope * -(-loss).exp_m1(); // 1 - p of the target, exactly
            let target = *data.targets.at(place) as usize;
            let at = place * s.width;
            let (h, w) = (data.hidden.at(at), data.weight.at(target * s.width));
            let line = gradient.add(row * s.width);
            scale_and_pull((line, w), (factor / total, pull), data.hidden_gradient.at(at), s.width);
            let in_chunk = rows.start + row;
            scaled_row(h, factor / total, places.scaled.at(in_chunk * s.width), s.width);
            *places.pull.at(in_chunk) = pull;
            *places.losses.at(in_chunk) = (factor * loss) as f64;
        }
    });
}

/// What `exponentials` has computed for one number.
#[target_feature(enable = "avx512f")]
unsafe fn tanh_of(x: f32) -> f32 {
    _mm512_cvtss_f32(tanh(_mm512_set1_ps(x)))
}

/// `out` = u of a row of products in bf16, 0 from `used` on; returns the sum of exponentials.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn exponentials(line: *const f32, out: *mut u16, used: usize, cap: f32) -> f32 {
    let (cap, inverse) = (_mm512_set1_ps(cap), _mm512_set1_ps(1.0 / cap));
    let one = _mm512_set1_ps(1.0);
    let mut total = _mm512_setzero_ps();
    for i in (0..GROUP).step_by(32) {
        let mut half = |i: usize| unsafe {
            let mask = ((1u32 << used.saturating_sub(i).min(16)) - 1) as u16;
            let t = tanh(_mm512_mul_ps(_mm512_loadu_ps(line.add(i)), inverse));
            let e = _mm512_maskz_mov_ps(mask, exp(_mm512_mul_ps(t, cap)));
            total = _mm512_add_ps(total, e);
            _mm512_mul_ps(e, _mm512_fnmadd_ps(t, t, one))
        };
        let (low, high) = (half(i), half(i + 16));
        _mm512_storeu_si512(out.add(i) as *mut __m512i, round(low, high));
    }
    _mm512_reduce_add_ps(total)
}

/// `out` = line x scale - w x pull, in bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn scale_and_pull(
    (line, w): (*mut f32, *const u16),
    (scale, pull): (f32, f32),
    out: *mut u16,
    width: usize,
) {
    let (scale, pull) = (_mm512_set1_ps(scale), _mm512_set1_ps(pull));
    for i in (0..width).step_by(16) {
        let w = widen(_mm256_loadu_si256(w.add(i) as *const __m256i));
        let x = _mm512_mul_ps(_mm512_loadu_ps(line.add(i)), scale);
        _mm512_storeu_ps(line.add(i), _mm512_fnmadd_ps(w, pull, x));
    }
    round_row(line, width, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn scaled_row(x: *const u16, factor: f32, out: *mut u16, width: usize) {
    let factor = _mm512_set1_ps(factor);
    for i in (0..width).step_by(32) {
        let low = widen(_mm256_loadu_si256(x.add(i) as *const __m256i));
        let high = widen(_mm256_loadu_si256(x.add(i + 16) as *const __m256i));
        let rounded = round(_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor));
        _mm512_storeu_si512(out.add(i) as *mut __m512i, rounded);
    }
}

/// Add a chunk's part to the gradients of some blocks of tokens; after the last one, round them.
unsafe fn weights_of_chunk(
    unit: &Unit,
    s: Sizes,
    data: Data,
    places: Places,
    chunk: std::ops::Range<usize>,
    blocks: std::ops::Range<usize>,
    chunk_rows: usize,
) {
    let steps = chunk.len().div_ceil(BLOCK);
    for step in (0..steps).step_by(CHUNK_STEPS) {
        let num_steps = CHUNK_STEPS.min(steps - step);
        for panel in 0..s.steps() {
            let right = places.scaled_pairs.at((panel * steps + step) * STEP_LEN);
            for block in blocks.clone() {
                let left = places.u.at((block * (chunk_rows / BLOCK) + step) * STEP_LEN);
                let sums = places.sums.at(block * BLOCK * s.width + panel * BLOCK);
                let add = chunk.start > 0 || step > 0;
                unit.multiply(unit.left(left), right, num_steps, sums, s.width, add);
            }
        }
    }
    let tokens = blocks.start * BLOCK..(blocks.end * BLOCK).min(s.vocabulary);
    for (place, row) in chunk.clone().enumerate() {
        let target = *data.targets.at(row) as usize;
        if tokens.contains(&target) {
            let h = data.hidden.at(row * s.width);
            let sums = places.sums.at(target * s.width);
            take_off(sums, h, *places.pull.at(place), s.width);
        }
    }
    if chunk.end == s.rows {
        for token in tokens {
            let at = token * s.width;
            round_row(places.sums.at(at), s.width, data.weight_gradient.at(at));
        }
    }
}

#[target_feature(enable = "avx512f")]
unsafe fn take_off(sums: *mut f32, x: *const u16, factor: f32, width: usize) {
    let factor = _mm512_set1_ps(factor);
    for i in (0..width).step_by(16) {
        let x = widen(_mm256_loadu_si256(x.add(i) as *const __m256i));
        let sum = _mm512_loadu_ps(sums.add(i));
        _mm512_storeu_ps(sums.add(i), _mm512_fnmadd_ps(x, factor, sum));
    }
}
