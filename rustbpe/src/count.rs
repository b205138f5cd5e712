//! Exact counts of the chunks of a stream of texts.
//!
//! Only how often each distinct chunk was seen is kept, so memory grows with the vocabulary of the
//! language and not with the corpus. Short chunks are in an open-addressing table, the rare long
//! ones in a map.

use std::collections::HashMap;

use crate::key::Key;
use crate::memory::{filled, prefetch};
use crate::parallel::{run, useful_threads, Blocks};
use crate::split::Splitter;
use crate::texts::Texts;
use crate::Result;

/// Counts chunks of everything it is fed.
pub struct Counter {
    splitter: Splitter,
    /// One table per thread; the sums do not depend on who counted what.
    tables: Vec<Counts>,
    pub num_bytes: u64,
    pub num_chunks: u64,
}

struct Worker<'c> {
    counts: &'c mut Counts,
    num_chunks: u64,
    result: Result<()>,
}

impl Counter {
    pub fn new(splitter: Splitter, threads: usize) -> Self {
        let tables = (0..threads.max(1)).map(|_| Counts::default()).collect();
        Counter { splitter, tables, num_bytes: 0, num_chunks: 0 }
    }

    /// Count the chunks of some texts. After an error the counts are incomplete.
    pub fn feed(&mut self, texts: &Texts) -> Result<()> {
        let blocks = Blocks::new((0..texts.len()).map(|index| texts.bytes(index).len()));
        let splitter = self.splitter;
        let threads = useful_threads(self.tables.len(), texts.num_bytes());
        let new = |counts| Worker { counts, num_chunks: 0, result: Ok(()) };
        let mut workers: Vec<Worker> = self.tables.iter_mut().take(threads).map(new).collect();
        run(&mut workers, |worker| {
            let mut tally = worker.counts.tally();
            while let Some((_, range)) = blocks.take() {
                for index in range {
                    match texts.text(index) {
                        Ok(text) => splitter.for_each(text, |bytes, start, end| {
                            worker.num_chunks += 1;
                            tally.add(bytes, start, end);
                        }),
                        Err(error) => worker.result = Err(error),
                    }
                }
            }
        });
        for worker in workers {
            self.num_chunks += worker.num_chunks;
            worker.result?;
        }
        self.num_bytes += texts.num_bytes() as u64;
        Ok(())
    }

    /// Number of distinct chunks, and those that have something to merge.
    pub fn into_words(self) -> (usize, Words) {
        let mut tables = self.tables;
        tables.sort_by_key(Counts::num_distinct);
        let mut total = tables.pop().unwrap_or_default();
        for table in tables {
            total.absorb(table);
        }
        (total.num_distinct(), total.into_words())
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_counts_for_every_number_of_threads() {
        let splitter = Splitter::named("nanochat").unwrap();
        let texts = ["one two three two one", "three two", "", "one, 12345"];
        let count = |threads| {
            let mut counter = Counter::new(splitter, threads);
            let long = "four five six ".repeat(100_000);
            let (data, offsets) = crate::texts::pack(&[texts[0], texts[1], &long, texts[3], &long]);
            counter.feed(&Texts::new(&data, &offsets).unwrap()).unwrap();
            let words = counter.into_words().1;
            let mut sorted: Vec<_> = words.iter().map(|word| (word.0.to_vec(), word.1)).collect();
            sorted.sort();
            sorted
        };
        assert_eq!(count(1), count(2));
        assert_eq!(count(1), count(7));
    }
}
