//! Text to token ids, for any vocabulary in which every single byte has an id.
//!
//! A chunk that is a token is that token. Any other starts as its bytes; the neighbours whose
//! concatenation has the lowest id are replaced by that id, until no neighbours form a token.
//! Text repeats itself, so every thread keeps what it has worked out in a cache.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use crate::cache::Cache;
use crate::key::Key;
use crate::memory::filled;
use crate::merge::{Merges, Scratch, MAX_TOKENS, NONE};
use crate::output::Output;
use crate::parallel::{run, useful_threads, Blocks};
use crate::split::Splitter;
use crate::texts::{pack, Texts};
use crate::{Error, Result};

pub struct Encoder {
    splitter: Splitter,
    /// Bytes of all tokens in id order, token i at offsets[i]..offsets[i + 1].
    data: Vec<u8>,
    offsets: Vec<u64>,
    whole: Whole,
    merges: Merges,
    /// State of threads that are not running; the caches in it live as long as the encoder.
    idle: Mutex<Vec<State>>,
}

/// Tokens by their bytes.
struct Whole {
    slots: Vec<(Key, u32)>,
    long: HashMap<Box<[u8]>, u32>,
}

/// Chunks wait here while the processor fetches their places in the cache.
const BATCH: usize = 64;

struct State {
    cache: Cache,
    scratch: Scratch,
    ids: Vec<u32>,
    ends: Vec<usize>,
    keys: [Key; BATCH],
    /// Hash of the key; for a long chunk, whose key is empty, its length.
    hashes: [u64; BATCH],
    waiting: usize,
}

impl Encoder {
    /// `tokens` in id order, each once, all 256 single bytes among them.
    pub fn new(splitter: Splitter, tokens: &Texts) -> Result<Self> {
        if tokens.len() > MAX_TOKENS {
            let message = format!("{} tokens; at most {} are possible", tokens.len(), MAX_TOKENS);
            return Err(Error::new(message));
        }
        let pieces: Vec<&[u8]> = (0..tokens.len()).map(|id| tokens.bytes(id)).collect();
        let whole = Whole::new(&pieces)?;
        let mut byte_ids = [NONE; 256];
        for byte in 0..=255u8 {
            let id = whole.find(&[byte]);
            let missing = || Error::new(format!("the byte 0x{:02X} has no token", byte));
            byte_ids[byte as usize] = id.ok_or_else(missing)?;
        }
        let merges = whole.merges(&pieces, byte_ids);
        let (data, offsets) = pack(&pieces);
        Ok(Encoder { splitter, data, offsets, whole, merges, idle: Mutex::default() })
    }

    /// Encode texts into `output`; `around` are ids put before and behind every text.
    pub fn encode(
        &self,
        texts: &Texts,
        around: (Option<u32>, Option<u32>),
        threads: usize,
        output: &Output,
    ) -> Result<()> {
        let blocks = Blocks::new((0..texts.len()).map(|index| texts.bytes(index).len()));
        let threads = useful_threads(threads, texts.num_bytes()).min(blocks.count().max(1));
        let mut states: Vec<State> = {
            let mut idle = lock(&self.idle);
            (0..threads).map(|_| idle.pop().unwrap_or_default()).collect()
        };
        run(&mut states, |state| {
            let _guard = output.abort_on_panic();
            while let Some((block, range)) = blocks.take() {
                state.ids.clear();
                state.ends.clear();
                for index in range {
                    match texts.text(index) {
                        Ok(text) => self.encode_text(text, around, state),
                        Err(error) => return output.fail(error),
                    }
                }
                if !output.append(block, &state.ids, &state.ends) {
                    return;
                }
            }
        });
        lock(&self.idle).extend(states);
        output.result()
    }

    fn encode_text(&self, text: &str, around: (Option<u32>, Option<u32>), state: &mut State) {
        state.ids.extend(around.0);
        self.splitter.for_each(text, |bytes, start, end| {
            let at = state.waiting;
            if end - start <= Key::LONGEST {
                let key = Key::of(bytes, start, end - start);
                let hash = key.hash();
                state.cache.expect(hash);
                state.keys[at] = key;
                state.hashes[at] = hash;
            } else {
                state.keys[at] = Key { low: start as u64, high: 0 };
                state.hashes[at] = (end - start) as u64;
            }
            state.waiting = at + 1;
            if state.waiting == BATCH {
                self.flush(bytes, state);
            }
        });
        self.flush(text.as_bytes(), state);
        state.ids.extend(around.1);
        state.ends.push(state.ids.len());
    }

    #[inline(never)]
    fn flush(&self, text: &[u8], state: &mut State) {
        let waiting = std::mem::take(&mut state.waiting);
        state.ids.reserve(4 * BATCH);
        for at in 0..waiting {
            let (key, hash) = (state.keys[at], state.hashes[at]);
            if key.is_empty() {
                let start = key.low as usize;
                self.encode_long(&text[start..start + hash as usize], state);
                state.ids.reserve(4 * BATCH);
                continue;
            }
            if let Some(known) = state.cache.find(key, hash) {
                let end = state.ids.len();
                debug_assert!(end + 4 <= state.ids.capacity());
                // SAFETY: room for the four of every chunk left was reserved above or after the
                // last chunk that needed more; as many as count are initialised.
                unsafe {
                    let count = known.write_to(state.ids.as_mut_ptr().add(end));
                    state.ids.set_len(end + count);
                }
            } else {
                self.encode_unknown(key, hash, state);
                state.ids.reserve(4 * BATCH);
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn encode_unknown(&self, key: Key, hash: u64, state: &mut State) {
        if let Some(known) = state.cache.find_displaced(key, hash) {
            return known.append_to(&mut state.ids);
        }
        let from = state.ids.len();
        if let Some(id) = self.whole.find_short(key) {
            state.ids.push(id);
            state.cache.insert(key, hash, &[id]);
            return;
        }
        let (bytes, len) = key.bytes();
        let chunk = &bytes[..len];
        // words of many ids: usual in other scripts, hardly ever met in ASCII
        let may_be_long = !chunk.is_ascii();
        if may_be_long {
            if let Some(known) = state.cache.find_long(chunk) {
                return state.ids.extend_from_slice(known);
            }
        }
        self.merges.apply(chunk, &mut state.scratch, &mut state.ids);
        let ids = &state.ids[from..];
        if !state.cache.insert(key, hash, ids) && may_be_long {
            state.cache.insert_long(chunk, ids);
        }
    }

    #[inline(never)]
    fn encode_long(&self, chunk: &[u8], state: &mut State) {
        if let Some(known) = state.cache.find_long(chunk) {
            return state.ids.extend_from_slice(known);
        }
        let from = state.ids.len();
        match self.whole.long.get(chunk) {
            Some(id) => state.ids.push(*id),
            None => self.merges.apply(chunk, &mut state.scratch, &mut state.ids),
        }
        state.cache.insert_long(chunk, &state.ids[from..]);
    }

    /// Write the bytes of some ids to `out` if they fit; returns how many they are.
    pub fn decode(&self, ids: &[i32], out: &mut [u8]) -> Result<usize> {
        let tokens = Texts::Packed { data: &self.data, offsets: &self.offsets };
        let mut len = 0;
        for &id in ids {
            if id < 0 || id as usize >= tokens.len() {
                let message = format!("id {} is not below the {} tokens", id, tokens.len());
                return Err(Error::new(message));
            }
            let token = tokens.bytes(id as usize);
            if let Some(room) = out.get_mut(len..len + token.len()) {
                room.copy_from_slice(token);
            }
            len += token.len();
        }
        Ok(len)
    }
}

impl Whole {
    fn new(tokens: &[&[u8]]) -> Result<Self> {
        let size = (tokens.len() * 2).next_power_of_two().max(16);
        let mut whole = Whole { slots: filled((Key::default(), NONE), size), long: HashMap::new() };
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() || whole.find(token).is_some() {
                return Err(Error::new(format!("token {} is empty or there twice", id)));
            }
            if token.len() > Key::LONGEST {
                whole.long.insert(Box::from(*token), id as u32);
                continue;
            }
            let key = Key::of(token, 0, token.len());
            let mut place = whole.place(key);
            while whole.slots[place].1 != NONE {
                place = (place + 1) & (size - 1);
            }
            whole.slots[place] = (key, id as u32);
        }
        Ok(whole)
    }

    /// All ways to make a token of two others.
    ///
    /// Where no token has a part with a higher id than its own (true of everything trained by
    /// merging), only one of the ways can ever happen: the two parts that remain when the token
    /// is encoded with the tokens before it. The small table of these stays in the cache.
    fn merges(&self, tokens: &[&[u8]], byte_ids: [u32; 256]) -> Merges {
        let mut pairs = Vec::new();
        for (id, token) in tokens.iter().enumerate() {
            for cut in 1..token.len() {
                if let Some(left) = self.find(&token[..cut]) {
                    if let Some(right) = self.find(&token[cut..]) {
                        pairs.push((left, right, id as u32));
                    }
                }
            }
        }
        if pairs.iter().any(|(left, right, merged)| left.max(right) > merged) {
            let mut merges = Merges::new(byte_ids, pairs.len());
            for (left, right, merged) in pairs {
                merges.insert(left, right, merged);
            }
            return merges;
        }
        let mut merges = Merges::new(byte_ids, tokens.len());
        let (mut scratch, mut parts) = (Scratch::default(), Vec::new());
        for (id, token) in tokens.iter().enumerate().filter(|(_, token)| token.len() > 1) {
            parts.clear();
            merges.apply(token, &mut scratch, &mut parts);
            if let [left, right] = parts[..] {
                merges.insert(left, right, id as u32);
            }
        }
        merges
    }

    fn place(&self, key: Key) -> usize {
        (key.hash() >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    fn find(&self, token: &[u8]) -> Option<u32> {
        match token.len() {
            0 => None,
            len if len <= Key::LONGEST => self.find_short(Key::of(token, 0, len)),
            _ => self.long.get(token).copied(),
        }
    }

    fn find_short(&self, key: Key) -> Option<u32> {
        let mut place = self.place(key);
        loop {
            match self.slots[place] {
                (_, NONE) => return None,
                (found, id) if found == key => return Some(id),
                _ => place = (place + 1) & (self.slots.len() - 1),
            }
        }
    }
}

impl Default for State {
    fn default() -> Self {
        State {
            cache: Cache::default(),
            scratch: Scratch::default(),
            ids: Vec::new(),
            ends: Vec::new(),
            keys: [Key::default(); BATCH],
            hashes: [0; BATCH],
            waiting: 0,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder(merged: &[&str]) -> Encoder {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        tokens.extend(merged.iter().map(|token| token.as_bytes().to_vec()));
        let (data, offsets) = pack(&tokens);
        let tokens = Texts::new(&data, &offsets).unwrap();
        Encoder::new(Splitter::named("nanochat").unwrap(), &tokens).unwrap()
    }

    fn ids(encoder: &Encoder, texts: &[&str], threads: usize) -> (Vec<i32>, Vec<i64>) {
        let (data, offsets) = pack(texts);
        let (mut ids, mut ends) = (vec![0; data.len() + texts.len()], vec![0; texts.len() + 1]);
        let texts = Texts::new(&data, &offsets).unwrap();
        let output = Output::new(&mut ids, &mut ends);
        encoder.encode(&texts, (Some(999), None), threads, &output).unwrap();
        drop(output);
        ids.truncate(*ends.last().unwrap() as usize);
        (ids, ends)
    }

    #[test]
    fn lowest_id_merges_first() {
        let encoder = encoder(&["bc", "ab", "abc"]);
        let (ids, ends) = ids(&encoder, &["abcd", "", "abx"], 1);
        assert_eq!(ids, [999, 258, 100, 999, 999, 257, 120]);
        assert_eq!(ends, [0, 3, 4, 7]);
    }

    #[test]
    fn same_ids_for_every_number_of_threads() {
        let encoder = encoder(&["on", "one", " t", " two", "  "]);
        let long = "one two  three\n four ".repeat(20_000);
        let texts = [&long, "one", &long[..100_000], "", &long, &long[..70_000], "x"];
        assert_eq!(ids(&encoder, &texts, 1), ids(&encoder, &texts, 2));
        assert_eq!(ids(&encoder, &texts, 1), ids(&encoder, &texts, 7));
    }

    #[test]
    fn a_missing_byte_is_an_error() {
        let (data, offsets) = pack(&["a", "b"]);
        let tokens = Texts::new(&data, &offsets).unwrap();
        assert!(Encoder::new(Splitter::named("gpt2").unwrap(), &tokens).is_err());
    }
}
