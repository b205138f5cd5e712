//! From logits to the next token. `nanochat.sampling` says what is computed and is the oracle.

use crate::isa::Isa;
use crate::math::{exp, LANES};

/// How one row is sampled.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// 0 = the likeliest token.
    pub temperature: f32,
    /// 0 = all tokens.
    pub top_k: usize,
    /// 1 = off.
    pub top_p: f64,
    /// 0 = off.
    pub min_p: f64,
    /// In [0, 1): where on the cumulative probability the token lies.
    pub uniform: f64,
}

/// Memory of a choice, kept from one to the next.
#[derive(Default)]
pub struct Room {
    candidates: Vec<u64>,
    weights: Vec<f32>,
}

/// A logit and its token in one number: greater means likelier, then of a lower number.
fn packed(logit: f32, token: usize) -> u64 {
    let bits = logit.to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    (ordered as u64) << 32 | (!(token as u32)) as u64
}

fn logit_of(candidate: u64) -> f32 {
    let ordered = (candidate >> 32) as u32;
    f32::from_bits(if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered })
}

fn token_of(candidate: u64) -> u32 {
    !(candidate as u32)
}

/// The next token after `logits`.
pub fn choose(isa: Isa, logits: &[f32], settings: Settings, room: &mut Room) -> u32 {
    let is_cut = settings.top_k > 0 && settings.top_k < logits.len();
    let Room { candidates, weights } = room;
    candidates.clear();
    if settings.temperature == 0.0 || is_cut {
        let k = if settings.temperature == 0.0 { 1 } else { settings.top_k };
        // SAFETY: `isa` is what the processor has.
        unsafe { likeliest(isa, logits, k, candidates) }
        candidates.sort_unstable_by(|a, b| b.cmp(a));
        if settings.temperature == 0.0 {
            return candidates.first().map_or(0, |&best| token_of(best));
        }
    } else if settings.top_p < 1.0 {
        candidates.extend(logits.iter().enumerate().map(|(token, &logit)| packed(logit, token)));
        candidates.sort_unstable_by(|a, b| b.cmp(a));
    }
    weights.clear();
    if candidates.is_empty() {
        weights.extend_from_slice(logits);
    } else {
        weights.extend(candidates.iter().map(|&candidate| logit_of(candidate)));
    }
    // SAFETY: as above.
    unsafe { soften(isa, weights, settings.temperature) }
    let kept = nucleus(weights, settings.top_p, settings.min_p);
    let place = invert(&weights[..kept], settings.uniform);
    candidates.get(place).map_or(place as u32, |&candidate| token_of(candidate))
}

crate::isa::versions! {
    /// The `k` likeliest of all logits, in any order.
    fn likeliest(logits: &[f32], k: usize, candidates: &mut Vec<u64>) = likeliest_body;
}

#[inline(always)]
fn likeliest_body(logits: &[f32], k: usize, candidates: &mut Vec<u64>) {
    // Twice as many are collected before the lesser half is dropped, which raises the bar.
    let room = (2 * k).max(64);
    let mut bar = f32::NEG_INFINITY;
    let mut is_full = false;
    for (chunk, logits) in logits.chunks(LANES).enumerate() {
        let is_any_above = logits.iter().fold(false, |any, &logit| any | (logit > bar));
        if is_full && !is_any_above {
            continue;
        }
        for (lane, &logit) in logits.iter().enumerate() {
            // An equal one comes later, so it is the lesser.
            if !is_full || logit > bar {
                candidates.push(packed(logit, chunk * LANES + lane));
            }
        }
        if candidates.len() >= room {
            candidates.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
            candidates.truncate(k);
            (bar, is_full) = (logit_of(candidates[k - 1]), true);
        }
    }
    if candidates.len() > k {
        candidates.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        candidates.truncate(k);
    }
}

crate::isa::versions! {
    /// Logits become unnormalised probabilities, the likeliest 1.
    fn soften(logits: &mut [f32], temperature: f32) = soften_body;
}

#[inline(always)]
fn soften_body(logits: &mut [f32], temperature: f32) {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    for logit in logits {
        // Shifted first: a very low temperature must not overflow. Below e^-87 nothing is drawn.
        let exponent = (*logit - largest) / temperature;
        *logit = if exponent > -87.0 { exp(exponent) } else { 0.0 };
    }
}

/// Cut descending weights to the fewest that reach `top_p`, and any to those that are at least
/// `min_p` times the largest; returns how many are to be looked at.
fn nucleus(weights: &mut [f32], top_p: f64, min_p: f64) -> usize {
    let mut kept = weights.len();
    if top_p < 1.0 {
        let total: f64 = weights.iter().map(|&weight| weight as f64).sum();
        let mut before = 0.0;
        kept = weights
            .iter()
            .position(|&weight| {
                let is_reached = before >= top_p * total;
                before += weight as f64;
                is_reached
            })
            .map_or(kept, |reached| reached.max(1));
    }
    if min_p > 0.0 {
        for weight in &mut weights[..kept] {
            // The largest is e^0.
            if (*weight as f64) < min_p {
                *weight = 0.0;
            }
        }
    }
    kept
}

/// First place whose cumulative weight exceeds `uniform` x total.
fn invert(weights: &[f32], uniform: f64) -> usize {
    let total: f64 = weights.iter().map(|&weight| weight as f64).sum();
    let (wanted, mut reached, mut last) = (uniform * total, 0.0, 0);
    for (place, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            reached += weight as f64;
            if reached > wanted {
                return place;
            }
            last = place;
        }
    }
    // Rounding may lift the product to the total itself; the last one with mass is meant then.
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_are_those_of_a_full_sort() {
        let isa = Isa::detect().expect("a processor with fused multiply-add");
        let mut seed = 1u32;
        for len in [1usize, 5, 16, 63, 64, 500, 4096] {
            for k in [1usize, 2, 50, 200] {
                let logits: Vec<f32> = (0..len)
                    .map(|_| {
                        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        ((seed >> 8) % 97) as f32 - 48.0 // many are equal
                    })
                    .collect();
                let mut all: Vec<u64> =
                    logits.iter().enumerate().map(|(token, &logit)| packed(logit, token)).collect();
                all.sort_unstable_by(|a, b| b.cmp(a));
                all.truncate(k);
                let mut found = Vec::new();
                // SAFETY: detected above.
                unsafe { likeliest(isa, &logits, k, &mut found) }
                found.sort_unstable_by(|a, b| b.cmp(a));
                assert_eq!(found, all, "{k} of {len}");
            }
        }
    }

    #[test]
    fn packing_keeps_order_and_value() {
        let values = [f32::NEG_INFINITY, -3.5, -0.0, 0.0, 1e-30, 2.0, f32::INFINITY];
        for pair in values.windows(2) {
            assert!(packed(pair[0], 0) < packed(pair[1], 9));
            assert_eq!(logit_of(packed(pair[1], 7)).to_bits(), pair[1].to_bits());
        }
        assert!(packed(1.0, 3) > packed(1.0, 4));
        assert_eq!(token_of(packed(1.0, 31_999)), 31_999);
    }
}
