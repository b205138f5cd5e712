//! Learn merges: replace the most frequent neighbouring pair by a new symbol, again and again.

use std::collections::BinaryHeap;

use crate::count::Words;
use crate::memory::{prefetch, with_capacity};
use crate::{Error, Result};

/// A pair with an upper bound of its count, and where it was when it came into being.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Candidate {
    count: u64,
    pair: (u32, u32),
    start: u32,
    len: u32,
}

impl Ord for Candidate {
    /// Greater means merged earlier: the larger count, at equal counts the smaller pair.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.count.cmp(&other.count).then_with(|| other.pair.cmp(&self.pair))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// One byte of a word. A symbol sits in its first cell; its last cell, if another one, holds
/// `INSIDE` + its length, so that a neighbour on the right finds its beginning.
#[derive(Clone, Copy)]
struct Cell {
    symbol: u32,
    /// How often the word was seen.
    weight: u32,
}

/// How many positions before their turn cells are fetched.
const AHEAD: usize = 8;

const INSIDE: u32 = 1 << 31;
/// Between words.
const WALL: u32 = INSIDE - 1;

/// The merge loop over distinct words.
///
/// A pair of symbols comes into being when the younger of the two is made, and from then on can
/// only lose occurrences. So every pair keeps the list of positions it was born with, and its
/// stored count is an upper bound: the top of the heap is recounted before it is believed.
pub struct Merger {
    cells: Vec<Cell>,
    /// Positions of all candidates, one after the other.
    positions: Vec<u32>,
    /// Candidates worth ordering: those seen at least `threshold` times.
    heap: BinaryHeap<Candidate>,
    /// The many rare ones, whose turn may never come.
    parked: Vec<Candidate>,
    threshold: u64,
    /// Length in bytes of every symbol.
    lengths: Vec<u32>,
    pub merges: Vec<(u32, u32)>,
    limit: usize,
    tally: Tally,
}

/// Neighbours of the symbol being made, on one side: dense counters, reset after use.
#[derive(Default)]
struct Side {
    weight: Vec<u64>,
    seen: Vec<u32>,
    symbols: Vec<u32>,
}

#[derive(Default)]
struct Tally {
    left: Side,
    right: Side,
    merged: Vec<u32>,
    entries: Vec<Candidate>,
}

impl Side {
    fn add(&mut self, symbol: u32, weight: u64) {
        let at = symbol as usize;
        if at >= self.weight.len() {
            self.weight.resize(at + 1, 0);
            self.seen.resize(at + 1, 0);
        }
        if self.seen[at] == 0 {
            self.symbols.push(symbol);
        }
        self.seen[at] += 1;
        self.weight[at] += weight;
    }
}

impl Merger {
    /// `byte_ids`: the symbol of each byte, a permutation of 0..256.
    pub fn new(words: &Words, byte_ids: &[u32; 256], num_merges: usize) -> Result<Self> {
        let num_cells = words.num_bytes() + words.len() + 1;
        // a cell is in at most three lists of positions, which are indexed by 32 bits
        if num_cells > u32::MAX as usize / 3 {
            return Err(Error::new(format!(
                "{} bytes of distinct words are more than the trainer can index (1.4 GB)",
                num_cells
            )));
        }
        let wall = Cell { symbol: WALL, weight: 0 };
        let mut cells = with_capacity(num_cells);
        cells.push(wall);
        for (word, weight) in words.iter() {
            let cell = |byte: &u8| Cell { symbol: byte_ids[*byte as usize], weight };
            cells.extend(word.iter().map(cell));
            cells.push(wall);
        }
        let mut merger = Merger {
            cells,
            positions: Vec::new(),
            heap: BinaryHeap::new(),
            parked: Vec::new(),
            threshold: 1,
            lengths: vec![1; 256],
            merges: Vec::new(),
            limit: num_merges,
            tally: Tally::default(),
        };
        merger.index_byte_pairs();
        Ok(merger)
    }

    /// Merge up to `most` more pairs; false when there is nothing left to do.
    pub fn step(&mut self, most: usize) -> bool {
        let target = self.limit.min(self.merges.len() + most);
        while self.merges.len() < target {
            match self.pop() {
                Some(best) => self.merge(best),
                None => return false,
            }
        }
        self.merges.len() < self.limit
    }

    /// Positions of all pairs of bytes, grouped by pair (a counting sort).
    fn index_byte_pairs(&mut self) {
        let key = |cells: &[Cell]| (cells[0].symbol as usize) << 8 | cells[1].symbol as usize;
        let inside = |cells: &[Cell]| cells[0].symbol != WALL && cells[1].symbol != WALL;
        let mut weight = vec![0u64; 1 << 16];
        let mut starts = vec![0usize; (1 << 16) + 1];
        for pair in self.cells.windows(2).filter(|pair| inside(pair)) {
            weight[key(pair)] += u64::from(pair[0].weight);
            starts[key(pair) + 1] += 1;
        }
        for at in 0..1 << 16 {
            starts[at + 1] += starts[at];
        }
        self.positions = with_capacity(starts[1 << 16] * 3);
        self.positions.resize(starts[1 << 16], 0);
        let mut next = starts.clone();
        for (position, pair) in self.cells.windows(2).enumerate().filter(|(_, pair)| inside(pair)) {
            self.positions[next[key(pair)]] = position as u32;
            next[key(pair)] += 1;
        }
        self.threshold = weight.iter().max().map_or(1, |highest| highest / 2).max(1);
        for at in (0..1 << 16).filter(|at| weight[*at] > 0) {
            let pair = ((at >> 8) as u32, (at & 0xFF) as u32);
            let (start, len) = (starts[at], starts[at + 1] - starts[at]);
            self.enter(Candidate { count: weight[at], pair, start: start as u32, len: len as u32 });
        }
    }

    /// The most frequent pair. Stale candidates are recounted, forget the positions they lost
    /// and go back into the heap.
    fn pop(&mut self) -> Option<Candidate> {
        loop {
            let mut top = self.next_candidate()?;
            let (first, second) = top.pair;
            let step = self.lengths[first as usize] as usize;
            let start = top.start as usize;
            let (mut kept, mut count) = (start, 0);
            let end = start + top.len as usize;
            for index in start..end {
                if index + AHEAD < end {
                    prefetch(&self.cells, self.positions[index + AHEAD] as usize);
                }
                let position = self.positions[index] as usize;
                let cell = self.cells[position];
                if cell.symbol == first && self.cells[position + step].symbol == second {
                    self.positions[kept] = position as u32;
                    kept += 1;
                    count += u64::from(cell.weight);
                }
            }
            top.len = (kept - start) as u32;
            if count == top.count {
                return Some(top);
            }
            if count > 0 {
                top.count = count;
                self.enter(top);
            }
        }
    }

    fn enter(&mut self, candidate: Candidate) {
        if candidate.count >= self.threshold {
            self.heap.push(candidate);
        } else {
            self.parked.push(candidate);
        }
    }

    /// The greatest candidate. When the heap runs dry, those parked that are at least half as
    /// frequent move in.
    fn next_candidate(&mut self) -> Option<Candidate> {
        while self.heap.is_empty() && !self.parked.is_empty() {
            let highest = self.parked.iter().map(|candidate| candidate.count).max();
            self.threshold = (highest.unwrap_or(0) / 2).max(1);
            let (heap, threshold) = (&mut self.heap, self.threshold);
            self.parked.retain(|candidate| {
                let enters = candidate.count >= threshold;
                if enters {
                    heap.push(*candidate);
                }
                !enters
            });
        }
        self.heap.pop()
    }

    fn merge(&mut self, best: Candidate) {
        let (first, second) = best.pair;
        let symbol = self.lengths.len() as u32;
        let step = self.lengths[first as usize];
        let length = step + self.lengths[second as usize];
        self.lengths.push(length);
        self.merges.push(best.pair);
        let mut tally = std::mem::take(&mut self.tally);
        // left to right: in aaaa the first two and the last two merge
        let start = best.start as usize;
        for index in start..start + best.len as usize {
            let position = self.positions[index];
            let at = position as usize;
            let next = at + step as usize;
            if self.cells[at].symbol == first && self.cells[next].symbol == second {
                self.cells[next].symbol = INSIDE;
                self.cells[at].symbol = symbol;
                self.cells[at + length as usize - 1].symbol = INSIDE | length;
                tally.merged.push(position);
            }
        }
        self.add_neighbours(symbol, length, &mut tally);
        self.tally = tally;
    }

    /// Make candidates of the pairs that the new symbol forms with its neighbours.
    fn add_neighbours(&mut self, symbol: u32, length: u32, tally: &mut Tally) {
        for &position in &tally.merged {
            let at = position as usize;
            let weight = u64::from(self.cells[at].weight);
            let (left, _) = self.before(at);
            if left != WALL {
                tally.left.add(left, weight);
            }
            let right = self.cells[at + length as usize].symbol;
            if right != WALL && right != symbol {
                tally.right.add(right, weight);
            }
        }
        let mut end = self.positions.len();
        let mut entries = std::mem::take(&mut tally.entries);
        for (side, is_left) in [(&mut tally.left, true), (&mut tally.right, false)] {
            for &other in &side.symbols {
                let pair = if is_left { (other, symbol) } else { (symbol, other) };
                let len = side.seen[other as usize];
                let count = side.weight[other as usize];
                entries.push(Candidate { count, pair, start: end as u32, len });
                // from now on: where the next position of this pair goes
                side.weight[other as usize] = end as u64;
                end += len as usize;
            }
        }
        for entry in entries.drain(..) {
            self.enter(entry);
        }
        tally.entries = entries;
        self.positions.resize(end, 0);
        for &position in &tally.merged {
            let at = position as usize;
            let (left, from) = self.before(at);
            if left != WALL {
                self.place(&mut tally.left, left, from);
            }
            let right = self.cells[at + length as usize].symbol;
            if right != WALL && right != symbol {
                self.place(&mut tally.right, right, at);
            }
        }
        tally.merged.clear();
        for side in [&mut tally.left, &mut tally.right] {
            for symbol in side.symbols.drain(..) {
                side.weight[symbol as usize] = 0;
                side.seen[symbol as usize] = 0;
            }
        }
    }

    fn place(&mut self, side: &mut Side, symbol: u32, position: usize) {
        let slot = &mut side.weight[symbol as usize];
        self.positions[*slot as usize] = position as u32;
        *slot += 1;
    }

    /// Symbol that ends just before cell `at`, and where it begins.
    fn before(&self, at: usize) -> (u32, usize) {
        let symbol = self.cells[at - 1].symbol;
        if symbol & INSIDE == 0 {
            return (symbol, at - 1);
        }
        let begin = at - (symbol & !INSIDE) as usize;
        (self.cells[begin].symbol, begin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> [u32; 256] {
        let mut ids = [0; 256];
        for (byte, id) in ids.iter_mut().enumerate() {
            *id = byte as u32;
        }
        ids
    }

    fn train(words: &[(&str, u64)], num_merges: usize) -> Vec<(u32, u32)> {
        let mut list = Words::default();
        for (word, count) in words {
            list.push(word.as_bytes(), *count);
        }
        let mut merger = Merger::new(&list, &identity(), num_merges).unwrap();
        while merger.step(1) {}
        merger.merges
    }

    #[test]
    fn runs_of_one_letter_merge_from_the_left() {
        assert_eq!(train(&[("aaaaa", 1)], 9), [(97, 97), (256, 97), (256, 257)]);
    }

    #[test]
    fn ties_go_to_the_smallest_pair() {
        assert_eq!(train(&[("cd", 2), ("ab", 2), ("xy", 3)], 3), [(120, 121), (97, 98), (99, 100)]);
    }
}
