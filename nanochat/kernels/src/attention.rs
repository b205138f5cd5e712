//! Keys and values of one row, and attention to them.
//!
//! Keys lie in blocks of 16 positions, feature by feature, so that 16 scores grow side by side;
//! values lie position by position. In bf16, two features of a key and two positions of a value
//! lie side by side, as the processor's dot product of pairs wants them. A query's result depends
//! on its row alone, in one order.

#[cfg(target_arch = "x86_64")]
use crate::dot::Dot;
use crate::isa::Isa;
use crate::math::{exp, inverse_rms, larger, Number, LANES};
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

impl<E: Copy> Place<E> {
    pub fn first_key(&self) -> *const E {
        // SAFETY: the place's own beginning.
        unsafe { self.keys.at(0) }
    }
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
    /// How many positions before its own each one attends to.
    pub window: usize,
    /// Factor of the products of normed queries and keys.
    pub scale: f32,
    /// (tokens, queries + 2 keys heads, size) fp32: projections of the new tokens.
    pub projected: Shared<f32>,
    /// (positions, size / 2) fp32.
    pub cos: *const f32,
    pub sin: *const f32,
    /// Keys that the thread will need after this span's values; null = none.
    pub next_keys: *const E,
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

/// A precision of keys and values.
pub trait Cached: Number {
    /// Features of a key, or positions of a value, that lie side by side.
    const PAIR: usize;

    /// Add to each of `W` sums the products of `PAIR` factors with the numbers at its place.
    ///
    /// # Safety
    /// `factors` has `PAIR` numbers, `line` `W` x `PAIR`.
    unsafe fn accumulate<const W: usize>(
        sums: &mut [f32; W],
        factors: *const f32,
        line: *const Self,
    );
}

impl Cached for f32 {
    const PAIR: usize = 1;

    #[inline(always)]
    unsafe fn accumulate<const W: usize>(
        sums: &mut [f32; W],
        factors: *const f32,
        line: *const f32,
    ) {
        for (j, sum) in sums.iter_mut().enumerate() {
            *sum = (*factors).mul_add(*line.add(j), *sum);
        }
    }
}

impl Cached for u16 {
    const PAIR: usize = 2;

    #[inline(always)]
    unsafe fn accumulate<const W: usize>(
        sums: &mut [f32; W],
        factors: *const f32,
        line: *const u16,
    ) {
        let (first, second) = (*factors, *factors.add(1));
        for (j, sum) in sums.iter_mut().enumerate() {
            let low = (*line.add(2 * j)).to_f32();
            let high = (*line.add(2 * j + 1)).to_f32();
            *sum = second.mul_add(high, first.mul_add(low, *sum));
        }
    }
}

/// How a query is compared with keys and values are averaged.
pub trait Method<E> {
    /// Products of `query` with blocks of 16 keys. `ahead`: numbers that will be needed next.
    ///
    /// # Safety
    /// There are keys for all scores; `ahead` is only asked for, and may lie anywhere.
    unsafe fn score(keys: *const E, query: &[f32], scores: &mut [f32], ahead: *const E);

    /// `out` = the values' sum by `weights`, whose number is a multiple of 2.
    ///
    /// # Safety
    /// There are values for all weights; `ahead` as above.
    unsafe fn mix(values: *const E, weights: &[f32], out: &mut [f32], ahead: *const E);
}

/// With what every machine has.
struct Plain;

impl<E: Cached> Method<E> for Plain {
    #[inline(always)]
    unsafe fn score(keys: *const E, query: &[f32], scores: &mut [f32], _ahead: *const E) {
        for (block, scores) in scores.chunks_exact_mut(LANES).enumerate() {
            let keys = keys.add(block * LANES * query.len());
            let mut sums = [0.0f32; LANES];
            for i in (0..query.len()).step_by(E::PAIR) {
                E::accumulate(&mut sums, query.as_ptr().add(i), keys.add(i * LANES));
            }
            scores.copy_from_slice(&sums);
        }
    }

    #[inline(always)]
    unsafe fn mix(values: *const E, weights: &[f32], out: &mut [f32], _ahead: *const E) {
        let size = out.len();
        let mut start = 0;
        while start + 8 * LANES <= size {
            mix_part::<E, { 8 * LANES }>(values, weights, start, out);
            start += 8 * LANES;
        }
        while start + LANES <= size {
            mix_part::<E, LANES>(values, weights, start, out);
            start += LANES;
        }
        while start < size {
            mix_part::<E, 1>(values, weights, start, out);
            start += 1;
        }
    }
}

#[inline(always)]
unsafe fn mix_part<E: Cached, const W: usize>(
    values: *const E,
    weights: &[f32],
    start: usize,
    out: &mut [f32],
) {
    let mut sums = [0.0f32; W];
    for position in (0..weights.len()).step_by(E::PAIR) {
        let line = values.add(position * out.len() + start * E::PAIR);
        E::accumulate(&mut sums, weights.as_ptr().add(position), line);
    }
    out[start..start + W].copy_from_slice(&sums);
}

crate::isa::versions! {
    fn plain_f32(span: &Span<f32>, out: Shared<f32>) = attend_body::<f32, f32, Plain>;
}
crate::isa::versions! {
    fn plain_bf16(span: &Span<u16>, out: Shared<f32>) = attend_body::<u16, f32, Plain>;
}

/// Store the new tokens' keys and values, then attend from each of them to all up to itself.
///
/// # Safety
/// The span's row has room for the tokens; no other task has its row and head. `out`: (tokens,
/// queries, size).
pub unsafe fn attend_f32(isa: Isa, span: &Span<f32>, out: Shared<f32>) {
    plain_f32(isa, span, out)
}

/// As `attend_f32`, with keys and values in bf16.
///
/// # Safety
/// As `attend_f32`.
pub unsafe fn attend_bf16(isa: Isa, span: &Span<u16>, out: Shared<f32>) {
    #[cfg(target_arch = "x86_64")]
    if isa.multiplies_bf16() {
        return dotted(span, out);
    }
    plain_bf16(isa, span, out)
}

/// As `attend_bf16`, where the machine multiplies bf16 and the next product wants it.
///
/// # Safety
/// As `attend_f32`.
#[cfg(target_arch = "x86_64")]
pub unsafe fn attend_bf16_to_bf16(span: &Span<u16>, out: Shared<u16>) {
    dotted(span, out)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,avx2")]
unsafe fn dotted<O: Number>(span: &Span<u16>, out: Shared<O>) {
    attend_body::<u16, O, Dot>(span, out)
}

#[inline(always)]
unsafe fn attend_body<E: Cached, O: Number, M: Method<E>>(span: &Span<E>, out: Shared<O>) {
    let Heads { queries, keys, size, .. } = span.heads;
    let width = (queries + 2 * keys) * size;
    let mut scores = vec![0.0f32; (span.start + span.len).next_multiple_of(LANES)];
    let mut turned = [0.0f32; MAX_HEAD];
    let turned = &mut turned[..size];
    let mut mixed = [0.0f32; MAX_HEAD];
    let mixed = &mut mixed[..size];
    let (keys_at, values_at) = (span.place.first_key(), span.place.values.at(0) as *const E);
    for t in 0..span.len {
        let position = span.start + t;
        let projected = span.projected.at(t * width) as *const f32;
        let cos = span.cos.add(position * size / 2);
        let sin = span.sin.add(position * size / 2);
        rotate_and_norm(projected.add((queries + span.head) * size), cos, sin, turned);
        store(span, position, turned, projected.add((queries + keys + span.head) * size));
        // Whole blocks, from the one on in which the window begins.
        let first = position.saturating_sub(span.window);
        let base = first / LANES * LANES;
        let (keys_at, values_at) = (keys_at.add(base * size), values_at.add(base * size));
        let len = position + 1 - base;
        let scores = &mut scores[..len.next_multiple_of(LANES)];
        for query in span.first_query..span.first_query + span.num_queries {
            rotate_and_norm(projected.add(query * size), cos, sin, turned);
            M::score(keys_at, turned, scores, values_at);
            let total = weigh(scores, first - base, len, span.scale);
            let weights = &scores[..len.next_multiple_of(E::PAIR)];
            M::mix(values_at, weights, mixed, span.next_keys);
            let (out, scale) = (out.at((t * queries + query) * size), 1.0 / total);
            for (i, &y) in mixed.iter().enumerate() {
                *out.add(i) = O::from_f32(y * scale);
            }
        }
    }
}

/// Remember the key and the value of a position.
#[inline(always)]
unsafe fn store<E: Cached>(span: &Span<E>, position: usize, key: &[f32], value: *const f32) {
    let (size, pair) = (key.len(), E::PAIR);
    let block = span.place.keys.at(position / LANES * LANES * size);
    for (i, features) in key.chunks_exact(E::PAIR).enumerate() {
        let place = block.add((i * LANES + position % LANES) * E::PAIR);
        for (k, &x) in features.iter().enumerate() {
            *place.add(k) = E::from_f32(x);
        }
    }
    let line = span.place.values.at(position / pair * pair * size + position % pair);
    for i in 0..size {
        *line.add(i * pair) = E::from_f32(*value.add(i));
    }
}

/// Products of a query with keys become unnormalised softmax weights of the positions from `first`
/// to `len`, 0 around them; returns their sum.
#[inline(always)]
fn weigh(scores: &mut [f32], first: usize, len: usize, scale: f32) -> f32 {
    let mut largest = [f32::NEG_INFINITY; LANES];
    for (block, scores) in scores.chunks_exact_mut(LANES).enumerate() {
        for j in 0..LANES {
            // Behind the end lie other tokens' remains.
            let place = block * LANES + j;
            let is_there = first <= place && place < len;
            scores[j] = if is_there { scores[j] * scale } else { f32::NEG_INFINITY };
            largest[j] = larger(scores[j], largest[j]);
        }
    }
    let largest = crate::math::largest(largest);
    let mut totals = [0.0f32; LANES];
    for scores in scores.chunks_exact_mut(LANES) {
        for j in 0..LANES {
            let weight = exp(scores[j] - largest);
            scores[j] = if scores[j] == f32::NEG_INFINITY { 0.0 } else { weight };
            totals[j] += scores[j];
        }
    }
    crate::math::sum(totals)
}
