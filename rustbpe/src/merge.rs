//! The merge loop: bytes of one chunk to the ids of its tokens.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::memory::filled;

pub const NONE: u32 = u32::MAX;
/// Three ids are packed into one word of the pair table.
const ID_BITS: u32 = 21;
pub const MAX_TOKENS: usize = (1 << ID_BITS) - 1;
const EMPTY: u64 = u64::MAX;
/// Up to here a scan for the lowest rank beats a heap.
const SHORT: usize = 96;

/// Which neighbours become which token.
pub struct Merges {
    byte_ids: [u32; 256],
    bytes_of: HashMap<u32, usize>,
    /// Token of each pair of bytes, or NONE: the first step of every chunk.
    byte_pairs: Vec<u32>,
    /// Open addressing: left, right and merged id in one word.
    pairs: Vec<u64>,
    shift: u32,
}

/// Buffers of the merge loop, kept between chunks.
#[derive(Default)]
pub struct Scratch {
    symbols: Vec<u32>,
    ranks: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    heap: BinaryHeap<Reverse<(u32, u32)>>,
}

impl Merges {
    /// `byte_ids`: id of every byte; room for `capacity` pairs.
    pub fn new(byte_ids: [u32; 256], capacity: usize) -> Self {
        let size = (capacity * 2).next_power_of_two().max(16);
        let mut bytes_of = HashMap::new();
        for (byte, id) in byte_ids.iter().enumerate() {
            bytes_of.insert(*id, byte);
        }
        Merges {
            byte_ids,
            bytes_of,
            byte_pairs: filled(NONE, 1 << 16),
            pairs: filled(EMPTY, size),
            shift: 64 - size.trailing_zeros(),
        }
    }

    /// Let two neighbours become a token; ids are below `MAX_TOKENS`.
    pub fn insert(&mut self, left: u32, right: u32, merged: u32) {
        let (key, mut place) = self.place(left, right);
        while self.pairs[place] != EMPTY {
            place = (place + 1) & (self.pairs.len() - 1);
        }
        self.pairs[place] = key << ID_BITS | u64::from(merged);
        if let (Some(left), Some(right)) = (self.bytes_of.get(&left), self.bytes_of.get(&right)) {
            self.byte_pairs[left << 8 | right] = merged;
        }
    }

    #[inline(always)]
    fn place(&self, left: u32, right: u32) -> (u64, usize) {
        let key = u64::from(left) << ID_BITS | u64::from(right);
        (key, (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize)
    }

    /// Id of the token that two neighbours form, or NONE.
    #[inline(always)]
    fn rank(&self, left: u32, right: u32) -> u32 {
        let (key, mut place) = self.place(left, right);
        loop {
            let found = self.pairs[place];
            if found >> ID_BITS == key {
                return (found & ((1 << ID_BITS) - 1)) as u32;
            }
            if found == EMPTY {
                return NONE;
            }
            place = (place + 1) & (self.pairs.len() - 1);
        }
    }

    /// Append the ids of `chunk`.
    pub fn apply(&self, chunk: &[u8], scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if chunk.len() <= 16 {
            self.apply_sixteen(chunk, ids);
        } else if chunk.len() <= SHORT {
            self.apply_short(chunk, ids);
        } else {
            self.apply_long(chunk, scratch, ids);
        }
    }

    /// For nearly every word: nothing moves, nothing branches but the end. A key is a rank with
    /// its place in the lowest four bits, so the smallest key says what to merge and where.
    fn apply_sixteen(&self, chunk: &[u8], ids: &mut Vec<u32>) {
        const NO_KEY: i32 = i32::MAX;
        const OUTSIDE: usize = 16;
        let mut symbols = [0u32; 17];
        let mut keys = [NO_KEY; 16];
        let mut next = [1u8, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 16];
        let mut previous = [16u8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        let key_of = |rank: u32, at: usize| match rank {
            NONE => NO_KEY,
            _ => (rank << 4) as i32 | at as i32,
        };
        next[chunk.len() - 1] = OUTSIDE as u8;
        for (symbol, byte) in symbols.iter_mut().zip(chunk) {
            *symbol = self.byte_ids[*byte as usize];
        }
        for (at, pair) in chunk.windows(2).enumerate() {
            keys[at] = key_of(self.byte_pairs[(pair[0] as usize) << 8 | pair[1] as usize], at);
        }
        loop {
            let best = keys.iter().fold(NO_KEY, |best, key| best.min(*key));
            if best == NO_KEY {
                break;
            }
            let (at, merged) = ((best & 15) as usize, (best >> 4) as u32);
            let gone = next[at] as usize;
            let after = next[gone] as usize;
            symbols[at] = merged;
            keys[gone & 15] = NO_KEY;
            next[at] = after as u8;
            previous[after] = at as u8;
            keys[at] = NO_KEY;
            if after != OUTSIDE {
                keys[at] = key_of(self.rank(merged, symbols[after]), at);
            }
            let before = previous[at] as usize;
            if before != OUTSIDE {
                keys[before] = key_of(self.rank(symbols[before], merged), before);
            }
        }
        let mut at = 0;
        while at != OUTSIDE {
            ids.push(symbols[at]);
            at = next[at] as usize;
        }
    }

    /// Find the lowest rank, merge there, close the gap; repeat.
    fn apply_short(&self, chunk: &[u8], ids: &mut Vec<u32>) {
        let mut symbols = [0u32; SHORT];
        let mut ranks = [NONE; SHORT];
        let mut len = chunk.len();
        for (symbol, byte) in symbols.iter_mut().zip(chunk) {
            *symbol = self.byte_ids[*byte as usize];
        }
        for (rank, pair) in ranks.iter_mut().zip(chunk.windows(2)) {
            *rank = self.byte_pairs[(pair[0] as usize) << 8 | pair[1] as usize];
        }
        while len > 1 {
            let (mut best, mut at) = (NONE, 0);
            for (index, &rank) in ranks[..len - 1].iter().enumerate() {
                if rank < best {
                    best = rank;
                    at = index;
                }
            }
            if best == NONE {
                break;
            }
            symbols[at] = best;
            symbols.copy_within(at + 2..len, at + 1);
            ranks.copy_within(at + 1..len - 1, at);
            len -= 1;
            if at > 0 {
                ranks[at - 1] = self.rank(symbols[at - 1], best);
            }
            if at + 1 < len {
                ranks[at] = self.rank(best, symbols[at + 1]);
            }
        }
        ids.extend_from_slice(&symbols[..len]);
    }

    /// The same with a heap over a linked list: n log n where the scan would be n squared.
    fn apply_long(&self, chunk: &[u8], scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let end = chunk.len();
        assert!(end < NONE as usize, "a chunk of 4 GB");
        let Scratch { symbols, ranks, next, previous, heap } = scratch;
        let mut waiting = std::mem::take(heap).into_vec();
        symbols.clear();
        ranks.clear();
        next.clear();
        previous.clear();
        waiting.clear();
        symbols.extend(chunk.iter().map(|byte| self.byte_ids[*byte as usize]));
        next.extend(1..=end as u32);
        previous.extend((0..end as u32).map(|at| at.wrapping_sub(1)));
        for (at, pair) in chunk.windows(2).enumerate() {
            let rank = self.byte_pairs[(pair[0] as usize) << 8 | pair[1] as usize];
            ranks.push(rank);
            if rank != NONE {
                waiting.push(Reverse((rank, at as u32)));
            }
        }
        ranks.push(NONE);
        *heap = BinaryHeap::from(waiting);
        while let Some(Reverse((rank, place))) = heap.pop() {
            let at = place as usize;
            // out of date: that pair was changed by a merge beside it
            if ranks[at] != rank {
                continue;
            }
            let gone = next[at] as usize;
            let after = next[gone] as usize;
            symbols[at] = rank;
            symbols[gone] = NONE;
            ranks[gone] = NONE;
            next[at] = after as u32;
            let mut renew = |at: usize, rank: u32| {
                ranks[at] = rank;
                if rank != NONE {
                    heap.push(Reverse((rank, at as u32)));
                }
            };
            if after < end {
                previous[after] = place;
                renew(at, self.rank(rank, symbols[after]));
            } else {
                renew(at, NONE);
            }
            let before = previous[at];
            if before != NONE {
                renew(before as usize, self.rank(symbols[before as usize], rank));
            }
        }
        ids.extend(symbols.iter().copied().filter(|symbol| *symbol != NONE));
        if end > 1 << 16 {
            *scratch = Scratch::default(); // give the memory of a monster back
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_chunks_equal_short_ones() {
        let mut byte_ids = [0; 256];
        for (byte, id) in byte_ids.iter_mut().enumerate() {
            *id = byte as u32;
        }
        let pairs = [(97, 97, 256), (256, 97, 257), (97, 256, 257), (256, 256, 258), (97, 98, 259)];
        let mut merges = Merges::new(byte_ids, pairs.len());
        for (left, right, merged) in pairs {
            merges.insert(left, right, merged);
        }
        let mut scratch = Scratch::default();
        let mut state = 1u32;
        for len in 1..SHORT {
            for _ in 0..20 {
                let mut letter = || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    if state >> 30 == 0 {
                        b'b'
                    } else {
                        b'a'
                    }
                };
                let chunk: Vec<u8> = (0..len).map(|_| letter()).collect();
                let (mut short, mut long) = (Vec::new(), Vec::new());
                merges.apply_short(&chunk, &mut short);
                merges.apply_long(&chunk, &mut scratch, &mut long);
                assert_eq!(short, long);
                if len <= 16 {
                    let mut sixteen = Vec::new();
                    merges.apply_sixteen(&chunk, &mut sixteen);
                    assert_eq!(short, sixteen);
                }
            }
        }
    }
}
