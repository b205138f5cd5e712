//! Text to token ids and back, for any vocabulary in which every single byte has an id.
//!
//! A chunk starts as its bytes; the neighbouring pair whose concatenation has the lowest id is
//! replaced by that id, until no neighbours form a token.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::split::Splitter;
use crate::{Error, Result};

const NONE: u32 = u32::MAX;

pub struct Encoder {
    splitter: Splitter,
    /// Bytes of all tokens in id order, token i at offsets[i]..offsets[i + 1].
    bytes: Vec<u8>,
    offsets: Vec<usize>,
    whole: HashMap<Box<[u8]>, u32>,
    pairs: HashMap<(u32, u32), u32>,
    byte_ids: [u32; 256],
    caches: Mutex<Vec<Cache>>,
}

type Cache = HashMap<Box<[u8]>, Box<[u32]>>;
const CACHE_WORDS: usize = 1 << 16;
const CACHED_LENGTH: usize = 64;

impl Encoder {
    pub fn new(splitter: Splitter, tokens: &[&[u8]]) -> Result<Self> {
        let mut whole = HashMap::with_capacity(tokens.len());
        let mut byte_ids = [NONE; 256];
        let (mut bytes, mut offsets) = (Vec::new(), vec![0]);
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() || whole.insert(Box::from(*token), id as u32).is_some() {
                return Err(Error::new(format!("token {} is empty or there twice", id)));
            }
            if token.len() == 1 {
                byte_ids[token[0] as usize] = id as u32;
            }
            bytes.extend_from_slice(token);
            offsets.push(bytes.len());
        }
        if let Some(byte) = byte_ids.iter().position(|id| *id == NONE) {
            return Err(Error::new(format!("the byte 0x{:02X} has no token", byte)));
        }
        let mut pairs = HashMap::new();
        for (id, token) in tokens.iter().enumerate() {
            for cut in 1..token.len() {
                if let (Some(left), Some(right)) =
                    (whole.get(&token[..cut]), whole.get(&token[cut..]))
                {
                    pairs.insert((*left, *right), id as u32);
                }
            }
        }
        Ok(Encoder { splitter, bytes, offsets, whole, pairs, byte_ids, caches: Mutex::default() })
    }

    pub fn num_tokens(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Bytes of one token.
    pub fn token(&self, id: usize) -> Option<&[u8]> {
        let end = *self.offsets.get(id + 1)?;
        Some(&self.bytes[self.offsets[id]..end])
    }

    /// Encode texts into `ids`, all in a row; `ends[i]` becomes the number of ids up to and
    /// including text i. `prepend` and `append` go around every text.
    pub fn encode(
        &self,
        texts: &[&str],
        around: (Option<u32>, Option<u32>),
        threads: usize,
        ids: &mut Vec<u32>,
        ends: &mut Vec<usize>,
    ) {
        let total: usize = texts.iter().map(|text| text.len()).sum();
        let share = total / threads.max(1) + 1;
        let mut parts: Vec<&[&str]> = Vec::new();
        let (mut from, mut size) = (0, 0);
        for (index, text) in texts.iter().enumerate() {
            size += text.len();
            if size >= share || index + 1 == texts.len() {
                parts.push(&texts[from..=index]);
                from = index + 1;
                size = 0;
            }
        }
        let encoded: Vec<(Vec<u32>, Vec<usize>)> = std::thread::scope(|scope| {
            let spawn = |part| scope.spawn(move || self.encode_part(part, around));
            let workers: Vec<_> = parts.into_iter().map(spawn).collect();
            workers.into_iter().map(|worker| worker.join().expect("an encoding thread")).collect()
        });
        for (part, part_ends) in encoded {
            ends.extend(part_ends.iter().map(|end| ids.len() + end));
            ids.extend_from_slice(&part);
        }
    }

    fn encode_part(
        &self,
        texts: &[&str],
        (prepend, append): (Option<u32>, Option<u32>),
    ) -> (Vec<u32>, Vec<usize>) {
        let free = self.caches.lock().ok().and_then(|mut caches| caches.pop());
        let mut cache = free.unwrap_or_default();
        let (mut ids, mut ends) = (Vec::new(), Vec::new());
        for text in texts {
            ids.extend(prepend);
            self.splitter.for_each(text, |chunk| self.chunk(chunk, &mut cache, &mut ids));
            ids.extend(append);
            ends.push(ids.len());
        }
        if let Ok(mut caches) = self.caches.lock() {
            caches.push(cache);
        }
        (ids, ends)
    }

    fn chunk(&self, chunk: &[u8], cache: &mut Cache, ids: &mut Vec<u32>) {
        if let Some(id) = self.whole.get(chunk) {
            ids.push(*id);
        } else if let Some(known) = cache.get(chunk) {
            ids.extend_from_slice(known);
        } else {
            let from = ids.len();
            self.merge(chunk, ids);
            if chunk.len() <= CACHED_LENGTH {
                if cache.len() >= CACHE_WORDS {
                    cache.clear();
                }
                cache.insert(chunk.into(), ids[from..].into());
            }
        }
    }

    fn merge(&self, chunk: &[u8], ids: &mut Vec<u32>) {
        if chunk.len() > 128 {
            return self.merge_long(chunk, ids);
        }
        let mut symbols: Vec<u32> =
            chunk.iter().map(|byte| self.byte_ids[*byte as usize]).collect();
        let rank = |pair: &[u32]| self.pairs.get(&(pair[0], pair[1])).copied().unwrap_or(NONE);
        let mut ranks: Vec<u32> = symbols.windows(2).map(rank).collect();
        while let Some((at, &best)) = ranks.iter().enumerate().min_by_key(|(_, rank)| **rank) {
            if best == NONE {
                break;
            }
            symbols[at] = best;
            symbols.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = rank(&symbols[at - 1..at + 1]);
            }
            if at < ranks.len() {
                ranks[at] = rank(&symbols[at..at + 2]);
            }
        }
        ids.extend_from_slice(&symbols);
    }

    /// The same with a heap and a linked list: n log n instead of n squared.
    fn merge_long(&self, chunk: &[u8], ids: &mut Vec<u32>) {
        use std::cmp::Reverse;
        let end = chunk.len() as u32;
        let mut symbols: Vec<u32> =
            chunk.iter().map(|byte| self.byte_ids[*byte as usize]).collect();
        let mut next: Vec<u32> = (1..=end).collect();
        let mut previous: Vec<u32> = (0..end).map(|at| at.wrapping_sub(1)).collect();
        let mut heap = std::collections::BinaryHeap::new();
        let rank = |left: u32, right: u32| self.pairs.get(&(left, right)).copied();
        for at in 1..symbols.len() {
            if let Some(id) = rank(symbols[at - 1], symbols[at]) {
                heap.push(Reverse((id, at as u32 - 1, symbols[at - 1], symbols[at])));
            }
        }
        while let Some(Reverse((id, at, left, right))) = heap.pop() {
            let follower = next[at as usize];
            if symbols[at as usize] != left
                || follower >= end
                || symbols[follower as usize] != right
            {
                continue;
            }
            symbols[at as usize] = id;
            symbols[follower as usize] = NONE;
            let after = next[follower as usize];
            next[at as usize] = after;
            if after < end {
                previous[after as usize] = at;
                let right = symbols[after as usize];
                if let Some(best) = rank(id, right) {
                    heap.push(Reverse((best, at, id, right)));
                }
            }
            let before = previous[at as usize];
            if before != NONE {
                let left = symbols[before as usize];
                if let Some(best) = rank(left, id) {
                    heap.push(Reverse((best, before, left, id)));
                }
            }
        }
        ids.extend(symbols.into_iter().filter(|symbol| *symbol != NONE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder(merged: &[&str]) -> Encoder {
        let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
        let mut tokens: Vec<&[u8]> = bytes.iter().map(|byte| &byte[..]).collect();
        tokens.extend(merged.iter().map(|token| token.as_bytes()));
        Encoder::new(Splitter::named("nanochat").unwrap(), &tokens).unwrap()
    }

    fn ids(encoder: &Encoder, text: &str, threads: usize) -> (Vec<u32>, Vec<usize>) {
        let (mut ids, mut ends) = (Vec::new(), Vec::new());
        encoder.encode(&[text, "", text], (Some(999), None), threads, &mut ids, &mut ends);
        (ids, ends)
    }

    #[test]
    fn lowest_id_merges_first() {
        let encoder = encoder(&["bc", "ab", "abc"]);
        assert_eq!(
            ids(&encoder, "abcd", 1),
            (vec![999, 258, 100, 999, 999, 258, 100], vec![3, 4, 7])
        );
        assert_eq!(ids(&encoder, "abcd", 1), ids(&encoder, "abcd", 3));
    }

    #[test]
    fn long_chunks_equal_short_ones() {
        let encoder = encoder(&["aa", "aaa", "aaaa", "ab"]);
        for len in 1..40 {
            let chunk = vec![b'a'; len];
            let (mut short, mut long) = (Vec::new(), Vec::new());
            encoder.merge(&chunk, &mut short);
            encoder.merge_long(&chunk, &mut long);
            assert_eq!(short, long);
        }
    }

    #[test]
    fn a_missing_byte_is_an_error() {
        assert!(Encoder::new(Splitter::named("gpt2").unwrap(), &[b"a", b"b"]).is_err());
    }
}
