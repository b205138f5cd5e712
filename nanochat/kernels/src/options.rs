//! What a model may have beyond the classic one (see `nanochat.gpt_config`), a token at a time.

use crate::math::{exp, inverse_rms, larger, Number};
use crate::memory::Shared;

/// Features of the block's input that a value gate reads.
const GATE_CHANNELS: usize = 12;
/// Features of the embedding that the smear gate reads.
const SMEAR_CHANNELS: usize = 24;

/// Values of the options. The pointers are to fp32 tables that the caller keeps alive.
pub struct Options {
    /// Factor of the products of normed queries and keys.
    pub query_scale: f32,
    /// Logits stay within plus and minus this; 0 = no limit.
    pub softcap: f32,
    /// The MLP has a gate.
    pub is_gated: bool,
    /// For each layer how many positions before its own one attends to.
    pub windows: Vec<usize>,
    /// For each layer the share of its predecessor's output, and of the embedding.
    pub scalars: Option<Vec<(f32, f32)>>,
    /// For each layer, where it has one, its value embedding.
    pub values: Vec<Option<ValueEmbedding>>,
    pub smear: Option<Smear>,
    /// Share of the middle block's output that is taken from the last one's.
    pub backout: Option<f32>,
}

/// A table (vocabulary, key heads x head size) and its gate (key heads, 12).
#[derive(Clone, Copy)]
pub struct ValueEmbedding {
    pub table: *const f32,
    pub gate: *const f32,
}

/// A gate (24) of the share of the token before.
#[derive(Clone, Copy)]
pub struct Smear {
    pub gate: *const f32,
    pub share: f32,
}

// SAFETY: the tables are only read.
unsafe impl Send for Options {}
unsafe impl Sync for Options {}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-larger(-87.0, x)))
}

/// `x * weights`, in order.
#[inline(always)]
unsafe fn product<E: Number>(x: *const E, weights: *const f32, len: usize) -> f32 {
    let mut sum = 0.0f32;
    for i in 0..len {
        sum = (*x.add(i)).to_f32().mul_add(*weights.add(i), sum);
    }
    sum
}

crate::isa::versions! {
    /// Add to a normed embedding a gated share of the normed embedding of the token before.
    fn smear(out: *mut f32, before: *const f32, smear: Smear, width: usize) = smear_body;
}

#[inline(always)]
unsafe fn smear_body(out: *mut f32, before: *const f32, smear: Smear, width: usize) {
    let share = smear.share * sigmoid(product(out, smear.gate, SMEAR_CHANNELS));
    let before = std::slice::from_raw_parts(before, width);
    let scale = inverse_rms(before);
    let out = std::slice::from_raw_parts_mut(out, width);
    for (o, &b) in out.iter_mut().zip(before) {
        *o += share * (b * scale);
    }
}

crate::isa::versions! {
    /// `x` = `keep` x + `back` `other`.
    fn blend(x: *mut f32, other: *const f32, keep: f32, back: f32, len: usize) = blend_body;
}

#[inline(always)]
unsafe fn blend_body(x: *mut f32, other: *const f32, keep: f32, back: f32, len: usize) {
    let x = std::slice::from_raw_parts_mut(x, len);
    let other = std::slice::from_raw_parts(other, len);
    for (x, &o) in x.iter_mut().zip(other) {
        *x = keep * *x + back * o;
    }
}

crate::isa::versions! {
    /// Add a token's gated value embedding to its values (key heads, size). `x`: the block's input.
    fn add_values_f32(
        x: *const f32, token: usize, embedding: ValueEmbedding, heads: (usize, usize),
        values: *mut f32,
    ) = add_values_body::<f32>;
}
crate::isa::versions! {
    /// As `add_values_f32`, from an input in bf16.
    fn add_values_bf16(
        x: *const u16, token: usize, embedding: ValueEmbedding, heads: (usize, usize),
        values: *mut f32,
    ) = add_values_body::<u16>;
}

#[inline(always)]
unsafe fn add_values_body<E: Number>(
    x: *const E,
    token: usize,
    embedding: ValueEmbedding,
    heads: (usize, usize),
    values: *mut f32,
) {
    let (num_heads, size) = heads;
    let line = embedding.table.add(token * num_heads * size);
    for head in 0..num_heads {
        let gate = embedding.gate.add(head * GATE_CHANNELS);
        let gate = 3.0 * sigmoid(product(x, gate, GATE_CHANNELS));
        for i in head * size..(head + 1) * size {
            *values.add(i) += gate * *line.add(i);
        }
    }
}

crate::isa::versions! {
    /// silu of the first half times the second half, in fp32.
    fn gate_f32(both: *const f32, len: usize, out: Shared<f32>) = gate_body::<f32>;
}
crate::isa::versions! {
    /// As `gate_f32`, in bf16.
    fn gate_bf16(both: *const f32, len: usize, out: Shared<u16>) = gate_body::<u16>;
}

#[inline(always)]
unsafe fn gate_body<E: Number>(both: *const f32, len: usize, out: Shared<E>) {
    let gates = std::slice::from_raw_parts(both, len);
    let values = std::slice::from_raw_parts(both.add(len), len);
    let out = std::slice::from_raw_parts_mut(out.at(0), len);
    for ((o, &g), &v) in out.iter_mut().zip(gates).zip(values) {
        *o = E::from_f32(g * sigmoid(g) * v);
    }
}
