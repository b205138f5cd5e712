//! What a thread remembers of the chunks it has seen: two tables of fixed size.

use crate::key::Key;
use crate::memory::{filled, prefetch};

const IDS: usize = 4;
/// The number of ids sits above the first id.
const COUNT_SHIFT: u32 = 28;
const ID_MASK: u32 = (1 << COUNT_SHIFT) - 1;

/// A short chunk and its ids; two of them share a cache line.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
pub struct Short {
    key: Key,
    ids: [u32; IDS],
}

impl Short {
    /// Write four ids, the last of them garbage if there are fewer; returns how many there are.
    ///
    /// # Safety
    /// `to` has room for four ids.
    #[inline(always)]
    pub unsafe fn write_to(&self, to: *mut u32) -> usize {
        to.cast::<[u32; IDS]>().write_unaligned(self.ids);
        to.write(self.ids[0] & ID_MASK);
        (self.ids[0] >> COUNT_SHIFT) as usize
    }

    pub fn append_to(&self, out: &mut Vec<u32>) {
        let count = (self.ids[0] >> COUNT_SHIFT) as usize;
        out.push(self.ids[0] & ID_MASK);
        out.extend_from_slice(&self.ids[1..count]);
    }
}

const LONG_BYTES: usize = 31;
const LONG_IDS: usize = 23;

/// A longer chunk, or one of more ids.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Long {
    len: u8,
    bytes: [u8; LONG_BYTES],
    count: u32,
    ids: [u32; LONG_IDS],
}

/// Both tables start small and grow fourfold while they fill, up to a fixed size: 2^19 short
/// chunks (16 MB) hold nearly all words of 100 MB of English, 2^14 long ones (2 MB) the rest.
pub struct Cache {
    short: Vec<Short>,
    short_bits: u32,
    inserted: usize,
    long: Vec<Long>,
    long_bits: u32,
    inserted_long: usize,
}

const FIRST_BITS: u32 = 13;
const SHORT_BITS: u32 = 19;
const LONG_BITS: u32 = 14;
const NO_LONG: Long = Long { len: 0, bytes: [0; LONG_BYTES], count: 0, ids: [0; LONG_IDS] };

impl Default for Cache {
    fn default() -> Self {
        Cache {
            short: vec![Short::default(); 1 << FIRST_BITS],
            short_bits: FIRST_BITS,
            inserted: 0,
            long: vec![NO_LONG; 1 << (FIRST_BITS - 3)],
            long_bits: FIRST_BITS - 3,
            inserted_long: 0,
        }
    }
}

impl Cache {
    /// Ask for the cache line of a chunk that is looked up soon.
    #[inline(always)]
    pub fn expect(&self, hash: u64) {
        prefetch(&self.short, self.place(hash));
    }

    /// First of the two places of a key with this hash.
    #[inline(always)]
    fn place(&self, hash: u64) -> usize {
        (hash >> (64 - self.short_bits)) as usize & !1
    }

    /// The entry of a chunk, if it is there.
    #[inline(always)]
    pub fn find(&self, key: Key, hash: u64) -> Option<&Short> {
        let place = self.place(hash);
        // which of the two cannot be predicted: computed, not branched on
        let second = usize::from(self.short[place].key != key);
        let slot = &self.short[place + second];
        (slot.key == key).then_some(slot)
    }

    /// As `find`, in the neighbouring pair of places, where a chunk goes when its own is full.
    pub fn find_displaced(&self, key: Key, hash: u64) -> Option<&Short> {
        let place = self.place(hash) ^ 2;
        self.short[place..place + 2].iter().find(|entry| entry.key == key)
    }

    /// Remember a chunk; where all four places are taken, the older at its own is forgotten.
    /// False if it has too many ids.
    pub fn insert(&mut self, key: Key, hash: u64, ids: &[u32]) -> bool {
        if ids.len() > IDS {
            return false;
        }
        self.inserted += 1;
        if self.inserted * 2 > self.short.len() && self.short_bits < SHORT_BITS {
            self.grow();
        }
        let mut entry = Short { key, ids: [0; IDS] };
        entry.ids[..ids.len()].copy_from_slice(ids);
        entry.ids[0] |= (ids.len() as u32) << COUNT_SHIFT;
        self.put(self.place(hash), entry);
        true
    }

    fn put(&mut self, place: usize, entry: Short) {
        let places = [place, place + 1, place ^ 2, (place ^ 2) + 1];
        match places.iter().find(|place| self.short[**place].key.is_empty()) {
            Some(&free) => self.short[free] = entry,
            None => {
                self.short[place + 1] = self.short[place];
                self.short[place] = entry;
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        self.short_bits += 2;
        let larger = filled(Short::default(), 1 << self.short_bits);
        let old = std::mem::replace(&mut self.short, larger);
        for entry in old.iter().filter(|entry| !entry.key.is_empty()) {
            self.put(self.place(entry.key.hash()), *entry);
        }
    }

    fn long_place(&self, chunk: &[u8]) -> usize {
        let mut hash = chunk.len() as u64;
        for part in chunk.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            hash ^= hash >> 32;
        }
        (hash.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - self.long_bits)) as usize
    }

    pub fn find_long(&self, chunk: &[u8]) -> Option<&[u32]> {
        if chunk.len() > LONG_BYTES {
            return None;
        }
        let entry = &self.long[self.long_place(chunk)];
        let found = entry.len as usize == chunk.len() && &entry.bytes[..chunk.len()] == chunk;
        found.then(|| &entry.ids[..entry.count as usize])
    }

    pub fn insert_long(&mut self, chunk: &[u8], ids: &[u32]) {
        if chunk.len() > LONG_BYTES || ids.len() > LONG_IDS {
            return;
        }
        self.inserted_long += 1;
        if self.inserted_long > self.long.len() && self.long_bits < LONG_BITS {
            // not worth keeping the few entries of the smaller table
            self.long_bits += 2;
            self.long = filled(NO_LONG, 1 << self.long_bits);
        }
        let place = self.long_place(chunk);
        let entry = &mut self.long[place];
        entry.len = chunk.len() as u8;
        entry.bytes[..chunk.len()].copy_from_slice(chunk);
        entry.count = ids.len() as u32;
        entry.ids[..ids.len()].copy_from_slice(ids);
    }
}
