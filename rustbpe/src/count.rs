//! Exact counts of chunks: an open-addressing table for short ones, a map for the rare long ones.

use std::collections::HashMap;

use crate::key::Key;
use crate::memory::filled;

#[derive(Clone, Copy, Default)]
struct Slot {
    key: Key,
    count: u64,
}

/// Distinct chunks with their counts, one after the other.
#[derive(Default)]
pub struct Words {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    counts: Vec<u32>,
}

impl Words {
    /// Counts of more than 32 bits are kept in parts, as if there were two equal words.
    pub fn push(&mut self, word: &[u8], mut count: u64) {
        while count > 0 {
            let part = count.min(u64::from(u32::MAX));
            self.bytes.extend_from_slice(word);
            self.ends.push(self.bytes.len());
            self.counts.push(part as u32);
            count -= part;
        }
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u32)> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        let spans = begins.zip(&self.ends).zip(&self.counts);
        spans.map(move |((begin, end), count)| (&self.bytes[begin..*end], *count))
    }
}

pub struct Counts {
    slots: Vec<Slot>,
    used: usize,
    long: HashMap<Box<[u8]>, u64>,
}

/// Keys wait here while the processor fetches their slots.
const BATCH: usize = 64;

/// Collects the chunks of one text after the other for a table.
pub struct Tally<'c> {
    counts: &'c mut Counts,
    keys: [Key; BATCH],
    places: [usize; BATCH],
    waiting: usize,
}

impl Default for Counts {
    fn default() -> Self {
        Counts { slots: vec![Slot::default(); 1 << 14], used: 0, long: HashMap::new() }
    }
}

impl Counts {
    pub fn num_distinct(&self) -> usize {
        self.used + self.long.len()
    }

    pub fn tally(&mut self) -> Tally<'_> {
        Tally { counts: self, keys: [Key::default(); BATCH], places: [0; BATCH], waiting: 0 }
    }

    /// Add everything of another table.
    pub fn absorb(&mut self, other: Counts) {
        for slot in other.slots.into_iter().filter(|slot| slot.count > 0) {
            self.make_room(1);
            self.add(slot.key, self.place(slot.key), slot.count);
        }
        for (chunk, count) in other.long {
            *self.long.entry(chunk).or_insert(0) += count;
        }
    }

    /// All chunks of two and more bytes, most frequent first: neighbours in memory are then
    /// needed together. Shorter chunks have nothing to merge.
    pub fn into_words(self) -> Words {
        let mut slots = self.slots;
        slots.retain(|slot| slot.key.len() > 1);
        slots.sort_unstable_by_key(|slot| std::cmp::Reverse(slot.count));
        let mut words = Words::default();
        for slot in slots {
            let (bytes, len) = slot.key.bytes();
            words.push(&bytes[..len], slot.count);
        }
        for (chunk, count) in self.long {
            words.push(&chunk, count);
        }
        words
    }

    #[inline(always)]
    fn place(&self, key: Key) -> usize {
        (key.hash() >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    #[inline(always)]
    fn add(&mut self, key: Key, mut place: usize, count: u64) {
        let last = self.slots.len() - 1;
        loop {
            let slot = &mut self.slots[place & last];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.count == 0 {
                *slot = Slot { key, count };
                self.used += 1;
                return;
            }
            place += 1;
        }
    }

    /// Keep at least 3 of 8 slots free after `more` insertions.
    #[inline(always)]
    fn make_room(&mut self, more: usize) {
        if (self.used + more) * 8 > self.slots.len() * 5 {
            self.grow();
        }
    }

    #[cold]
    fn grow(&mut self) {
        let larger = filled(Slot::default(), self.slots.len() * 2);
        let old = std::mem::replace(&mut self.slots, larger);
        self.used = 0;
        for slot in old.into_iter().filter(|slot| slot.count > 0) {
            self.add(slot.key, self.place(slot.key), slot.count);
        }
    }
}

impl Tally<'_> {
    #[inline(always)]
    pub fn add(&mut self, text: &[u8], start: usize, end: usize) {
        if end - start > Key::LONGEST {
            return self.add_long(&text[start..end]);
        }
        let key = Key::of(text, start, end - start);
        let place = self.counts.place(key);
        prefetch(&self.counts.slots, place);
        self.keys[self.waiting] = key;
        self.places[self.waiting] = place;
        self.waiting += 1;
        if self.waiting == BATCH {
            self.flush();
        }
    }

    #[inline(never)]
    fn flush(&mut self) {
        for (&key, &place) in self.keys.iter().zip(&self.places).take(self.waiting) {
            self.counts.add(key, place, 1);
        }
        self.waiting = 0;
        self.counts.make_room(BATCH);
    }

    #[cold]
    fn add_long(&mut self, chunk: &[u8]) {
        match self.counts.long.get_mut(chunk) {
            Some(count) => *count += 1,
            None => {
                self.counts.long.insert(chunk.into(), 1);
            }
        }
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Ask for the cache line of an element that is needed soon.
#[inline(always)]
pub fn prefetch<T>(table: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing, and any address is allowed.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(table.as_ptr().wrapping_add(index).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (table, index);
}
