//! Keys and values of one row, and attention to them.
//!
//! Keys lie in blocks of 16 positions, feature by feature, so that 16 scores grow side by side;
//! values lie position by position. A query's result depends on its row alone, in one order.

use crate::math::{exp, inverse_rms, Number, LANES};
use crate::memory::{Buffer, Shared};

/// Largest head size: what a task keeps on its stack.
pub const MAX_HEAD: usize = 512;

/// Sizes that all layers share.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub num_layers: usize,
    pub queries: usize,
    pub keys: usize,
    pub size: usize,
}

/// Keys and values of one row in all layers, in `E`.
pub struct Row<E: Number> {
    pub capacity: usize,
    pub tokens: Vec<u32>,
    keys: Buffer<E>,
    values: Buffer<E>,
}

impl<E: Number> Row<E> {
    pub fn new(heads: Heads, capacity: usize) -> Self {
        let capacity = capacity.next_multiple_of(LANES);
        let len = heads.num_layers * heads.keys * capacity * heads.size;
        Self {
            capacity,
            tokens: vec![0; capacity],
            keys: Buffer::zeroed(len),
            values: Buffer::zeroed(len),
        }
    }

    /// Take over the first `length` tokens of another row.
    pub fn copy_from(&mut self, heads: Heads, other: &Self, length: usize) {
        let used = length.next_multiple_of(LANES) * heads.size;
        for part in 0..heads.num_layers * heads.keys {
            let from = part * other.capacity * heads.size;
            let to = part * self.capacity * heads.size;
            self.keys[to..to + used].copy_from_slice(&other.keys[from..from + used]);
            self.values[to..to + used].copy_from_slice(&other.values[from..from + used]);
        }
        self.tokens[..length].copy_from_slice(&other.tokens[..length]);
    }

    /// Where keys and values of one head begin.
    pub fn place(&mut self, heads: Heads, layer: usize, head: usize) -> Place<E> {
        let start = (layer * heads.keys + head) * self.capacity * heads.size;
        // SAFETY: within the buffers, whose length `new` has computed from the same numbers.
        unsafe {
            Place {
                keys: Shared::new(self.keys.mut_ptr().add(start)),
                values: Shared::new(self.values.mut_ptr().add(start)),
            }
        }
    }
}

/// Keys and values of one head of one row.
#[derive(Clone, Copy)]
pub struct Place<E> {
    keys: Shared<E>,
    values: Shared<E>,
}

/// The new tokens of a row, as one task for each key head sees them.
#[derive(Clone, Copy)]
pub struct Span<E> {
    pub place: Place<E>,
    /// Position of the first token.
    pub start: usize,
    pub len: usize,
    /// Query heads of this key head: the first, and how many.
    pub first_query: usize,
    pub num_queries: usize,
    pub head: usize,
    pub heads: Heads,
    /// (tokens, queries + 2 keys heads, size) fp32: projections of the new tokens.
    pub projected: Shared<f32>,
    /// (positions, size / 2) fp32.
    pub cos: *const f32,
    pub sin: *const f32,
}

// SAFETY: the tables are only read.
unsafe impl<E> Send for Span<E> {}
unsafe impl<E> Sync for Span<E> {}

/// Turn pairs (i, i + size / 2) by the position's angle, then scale to unit root mean square.
#[inline(always)]
unsafe fn rotate_and_norm(x: *const f32, cos: *const f32, sin: *const f32, out: &mut [f32]) {
    let half = out.len() / 2;
    for i in 0..half {
        let (first, second) = (*x.add(i), *x.add(half + i));
        let (c, s) = (*cos.add(i), *sin.add(i));
        out[i] = first * c + second * s;
        out[half + i] = second * c - first * s;
    }
    let scale = inverse_rms(out);
    for value in out.iter_mut() {
        *value *= scale;
    }
}

crate::isa::versions! {
    fn attend_f32_f32(span: &Span<f32>, out: Shared<f32>) = attend_body;
}
crate::isa::versions! {
    fn attend_bf16_f32(span: &Span<u16>, out: Shared<f32>) = attend_body;
}
crate::isa::versions! {
    fn attend_bf16_bf16(span: &Span<u16>, out: Shared<u16>) = attend_body;
}

/// Store the new tokens' keys and values, then attend from each of them to all up to itself.
/// `out`: (tokens, queries, size).
#[inline(always)]
unsafe fn attend_body<E: Number, O: Number>(span: &Span<E>, out: Shared<O>) {
    let Heads { queries, keys, size, .. } = span.heads;
    let width = (queries + 2 * keys) * size;
    let mut scores = vec![0.0f32; (span.start + span.len).next_multiple_of(LANES)];
    let mut turned = [0.0f32; MAX_HEAD];
    let turned = &mut turned[..size];
    let mut mixed = [0.0f32; MAX_HEAD];
    for t in 0..span.len {
        let position = span.start + t;
        let projected = span.projected.at(t * width) as *const f32;
        let cos = span.cos.add(position * size / 2);
        let sin = span.sin.add(position * size / 2);
        rotate_and_norm(projected.add((queries + span.head) * size), cos, sin, turned);
        let block = span.place.keys.at(position / LANES * LANES * size);
        for (i, &key) in turned.iter().enumerate() {
            *block.add(i * LANES + position % LANES) = E::from_f32(key);
        }
        let value = projected.add((queries + keys + span.head) * size);
        let stored = span.place.values.at(position * size);
        for i in 0..size {
            *stored.add(i) = E::from_f32(*value.add(i));
        }
        for query in span.first_query..span.first_query + span.num_queries {
            rotate_and_norm(projected.add(query * size), cos, sin, turned);
            let total = weigh(span, turned, position + 1, &mut scores);
            mix(span, &scores[..=position], 1.0 / total, &mut mixed[..size]);
            let out = out.at((t * queries + query) * size);
            for (i, &y) in mixed[..size].iter().enumerate() {
                *out.add(i) = O::from_f32(y);
            }
        }
    }
}

/// Unnormalised softmax weights of the first `len` positions; returns their sum.
#[inline(always)]
unsafe fn weigh<E: Number>(span: &Span<E>, query: &[f32], len: usize, scores: &mut [f32]) -> f32 {
    let size = query.len();
    let scale = 1.0 / (size as f32).sqrt();
    let num_blocks = len.div_ceil(LANES);
    let mut largest = [f32::NEG_INFINITY; LANES];
    for block in 0..num_blocks {
        let keys = span.place.keys.at(block * LANES * size) as *const E;
        let mut sums = [0.0f32; LANES];
        for (i, &q) in query.iter().enumerate() {
            let line = keys.add(i * LANES);
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum = q.mul_add((*line.add(j)).to_f32(), *sum);
            }
        }
        for j in 0..LANES {
            // Behind the end lie other tokens' remains.
            let is_there = block * LANES + j < len;
            sums[j] = if is_there { sums[j] * scale } else { f32::NEG_INFINITY };
            largest[j] = largest[j].max(sums[j]);
        }
        scores[block * LANES..(block + 1) * LANES].copy_from_slice(&sums);
    }
    let largest = largest.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let mut totals = [0.0f32; LANES];
    for block in scores[..num_blocks * LANES].chunks_exact_mut(LANES) {
        for j in 0..LANES {
            let weight = exp(block[j] - largest);
            block[j] = if block[j] == f32::NEG_INFINITY { 0.0 } else { weight };
            totals[j] += block[j];
        }
    }
    crate::math::sum(totals)
}

/// `out` = the values' mean by `weights` x `scale`.
#[inline(always)]
unsafe fn mix<E: Number>(span: &Span<E>, weights: &[f32], scale: f32, out: &mut [f32]) {
    const WIDTH: usize = 8 * LANES; // 8 registers of sums
    let size = out.len();
    let mut start = 0;
    while start + WIDTH <= size {
        let mut sums = [0.0f32; WIDTH];
        for (position, &weight) in weights.iter().enumerate() {
            let value = span.place.values.at(position * size + start) as *const E;
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum = weight.mul_add((*value.add(j)).to_f32(), *sum);
            }
        }
        for (j, sum) in sums.iter().enumerate() {
            out[start + j] = sum * scale;
        }
        start += WIDTH;
    }
    let rest = &mut out[start..];
    rest.fill(0.0);
    for (position, &weight) in weights.iter().enumerate() {
        let value = span.place.values.at(position * size + start) as *const E;
        for (j, sum) in rest.iter_mut().enumerate() {
            *sum = weight.mul_add((*value.add(j)).to_f32(), *sum);
        }
    }
    rest.iter_mut().for_each(|y| *y *= scale);
}
