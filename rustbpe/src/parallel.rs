//! Sharing texts out to threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Small enough to balance two threads, large enough that taking one costs nothing.
const BLOCK_BYTES: usize = 1 << 16;
/// Less than this for each thread is not worth starting it.
const BYTES_PER_THREAD: usize = 1 << 18;

/// Texts in consecutive blocks of about equal size.
pub struct Blocks {
    ends: Vec<usize>,
    next: AtomicUsize,
}

impl Blocks {
    pub fn new(lengths: impl Iterator<Item = usize>) -> Self {
        let (mut ends, mut size, mut count) = (Vec::new(), 0, 0);
        for length in lengths {
            count += 1;
            size += length + 1;
            if size >= BLOCK_BYTES {
                ends.push(count);
                size = 0;
            }
        }
        if size > 0 {
            ends.push(count);
        }
        Blocks { ends, next: AtomicUsize::new(0) }
    }

    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// The next block's number and texts; blocks are given out in order.
    pub fn take(&self) -> Option<(usize, Range<usize>)> {
        let block = self.next.fetch_add(1, Ordering::Relaxed);
        let end = *self.ends.get(block)?;
        let begin = if block == 0 { 0 } else { self.ends[block - 1] };
        Some((block, begin..end))
    }
}

/// How many threads `num_bytes` are worth.
pub fn useful_threads(threads: usize, num_bytes: usize) -> usize {
    threads.min(num_bytes / BYTES_PER_THREAD + 1).max(1)
}

/// Run `work` once for every state, each in a thread of its own but the first, which runs here.
pub fn run<S: Send>(states: &mut [S], work: impl Fn(&mut S) + Sync) {
    let work = &work;
    std::thread::scope(|scope| {
        let (first, others) = match states.split_first_mut() {
            Some(split) => split,
            None => return,
        };
        for state in others {
            scope.spawn(move || work(state));
        }
        work(first);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_texts_once() {
        let lengths = [0, 70_000, 1, 2, 65_535, 0, 0];
        let blocks = Blocks::new(lengths.iter().copied());
        let mut covered = Vec::new();
        while let Some((block, range)) = blocks.take() {
            assert!(block < blocks.count());
            covered.extend(range);
        }
        assert_eq!(covered, (0..7).collect::<Vec<_>>());
    }
}
