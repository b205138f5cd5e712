//! The split patterns as hand-written scanners.
//!
//! Merges never cross a chunk, so the split decides what a token can be. Each pattern is a list of
//! regex alternatives tried in order; because the character classes do not overlap, the class of
//! the first one or two characters already tells which alternative wins, and no backtracking is
//! needed. `reference.py` keeps the patterns themselves.

use std::sync::atomic::{AtomicPtr, Ordering};

use crate::blocks;
use crate::unicode::{LETTERS, NUMBERS, SPACES};
use crate::{Error, Result};

/// Character classes; NEWLINE is the part of the spaces that the GPT-4 patterns single out.
pub const OTHER: u8 = 0;
pub const LETTER: u8 = 1;
pub const NUMBER: u8 = 2;
pub const SPACE: u8 = 3;
pub const NEWLINE: u8 = 4;
/// First byte of a character outside ASCII: look it up.
const MULTI: u8 = 5;

/// Which published pattern, reduced to the two points in which they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rules {
    /// Contractions, words, digit runs of up to `max_digits`, punctuation with newlines after it.
    /// `keep_end`: a whitespace run that ends the text is one chunk even with newlines in it.
    Gpt4 {
        max_digits: usize,
        keep_end: bool,
    },
    Gpt2,
}

#[derive(Clone, Copy)]
pub struct Splitter {
    rules: Rules,
    classes: &'static [u8],
}

impl Splitter {
    /// Known names: nanochat, gpt4 (cl100k as tiktoken ships it), gpt4-2023 (as first published),
    /// gpt2.
    pub fn named(name: &str) -> Result<Self> {
        let gpt4 = |max_digits, keep_end| Rules::Gpt4 { max_digits, keep_end };
        let rules = match name {
            "nanochat" => gpt4(2, false),
            "gpt4" => gpt4(3, true),
            "gpt4-2023" => gpt4(3, false),
            "gpt2" => Rules::Gpt2,
            _ => {
                return Err(Error::new(format!(
                    "no compiled scanner for the split pattern {:?}; the compiled ones are \
                     nanochat, gpt4, gpt4-2023 and gpt2",
                    name
                )))
            }
        };
        Ok(Splitter { rules, classes: class_table() })
    }

    /// Call `visit` with the bytes of `text` and the beginning and end of every chunk, in order.
    #[inline(always)]
    pub fn for_each<'t>(&self, text: &'t str, mut visit: impl FnMut(&'t [u8], usize, usize)) {
        let bytes = text.as_bytes();
        let mut start = 0;
        while start < bytes.len() {
            let mut starts = self.plain_starts(bytes, start);
            if starts == 0 {
                let end = self.next_end(bytes, start);
                visit(bytes, start, end);
                start = end;
                continue;
            }
            let block = start;
            while starts != 0 {
                let end = block + starts.trailing_zeros() as usize;
                visit(bytes, start, end);
                start = end;
                starts &= starts - 1;
            }
        }
    }

    /// Where chunks begin in the 64 bytes from `start` on, itself a beginning, as a bit mask
    /// without bit 0. Stops before anything that is not plain English; 0 where that comes first.
    #[inline(always)]
    fn plain_starts(&self, text: &[u8], start: usize) -> u64 {
        match text.get(start..start + 64) {
            Some(block) if block[0] < 0x80 && block[1] < 0x80 => match self.rules {
                Rules::Gpt4 { max_digits, .. } => blocks::gpt4_starts(block, max_digits),
                Rules::Gpt2 => blocks::gpt2_starts(block),
            },
            _ => 0,
        }
    }

    /// End of the chunk that starts at byte `start`. `text` is valid UTF-8, `start` the beginning
    /// of a character and less than the length.
    #[inline(never)]
    pub fn next_end(&self, text: &[u8], start: usize) -> usize {
        match self.rules {
            Rules::Gpt4 { max_digits, keep_end } => self.gpt4(text, start, max_digits, keep_end),
            Rules::Gpt2 => self.gpt2(text, start),
        }
    }

    fn gpt4(&self, text: &[u8], start: usize, max_digits: usize, keep_end: bool) -> usize {
        let (class, size) = self.class_at(text, start);
        let next = start + size;
        match class {
            LETTER => self.run_end(text, next, LETTER),
            NUMBER => {
                let mut end = next;
                for _ in 1..max_digits {
                    match self.class_after(text, end) {
                        (NUMBER, size) => end += size,
                        _ => break,
                    }
                }
                end
            }
            OTHER => {
                if let Some(end) = contraction_end(text, start, true) {
                    return end;
                }
                match self.class_after(text, next) {
                    (LETTER, _) => self.run_end(text, next, LETTER),
                    _ => self.punctuation_end(text, next),
                }
            }
            _ => {
                match self.class_after(text, next) {
                    (LETTER, _) if class != NEWLINE => return self.run_end(text, next, LETTER),
                    (OTHER, more) if next < text.len() && text[start] == b' ' => {
                        return self.punctuation_end(text, next + more)
                    }
                    _ => {}
                }
                self.whitespace_end(text, start, true, keep_end)
            }
        }
    }

    fn gpt2(&self, text: &[u8], start: usize) -> usize {
        let (class, size) = self.class_at(text, start);
        let next = start + size;
        if let Some(end) = contraction_end(text, start, false) {
            return end;
        }
        if class != SPACE && class != NEWLINE {
            return self.run_end(text, next, class);
        }
        if text[start] == b' ' && next < text.len() {
            let (after, _) = self.class_after(text, next);
            if after != SPACE && after != NEWLINE {
                return self.run_end(text, next, after);
            }
        }
        self.whitespace_end(text, start, false, false)
    }

    /// End of the run of `class` that `from` is in (or just after).
    fn run_end(&self, text: &[u8], mut from: usize, class: u8) -> usize {
        while from < text.len() {
            let (found, size) = self.class_at(text, from);
            if found != class {
                break;
            }
            from += size;
        }
        from
    }

    fn punctuation_end(&self, text: &[u8], from: usize) -> usize {
        let mut end = self.run_end(text, from, OTHER);
        while end < text.len() && (text[end] == b'\n' || text[end] == b'\r') {
            end += 1;
        }
        end
    }

    /// A whitespace run: up to its last newline if there is one (`newlines`), else all of it at
    /// the end of the text, else all but the last character, which belongs to the next chunk.
    fn whitespace_end(&self, text: &[u8], start: usize, newlines: bool, keep_end: bool) -> usize {
        let mut end = start;
        let mut last = start;
        let mut after_newline = None;
        while end < text.len() {
            let (class, size) = self.class_at(text, end);
            if class != SPACE && class != NEWLINE {
                break;
            }
            last = end;
            end += size;
            if class == NEWLINE {
                after_newline = Some(end);
            }
        }
        if keep_end && end == text.len() {
            return end;
        }
        match after_newline {
            Some(newline) if newlines => newline,
            _ if end == text.len() || last == start => end,
            _ => last,
        }
    }

    /// Class and length in bytes of the character at `at`.
    #[inline]
    fn class_at(&self, text: &[u8], at: usize) -> (u8, usize) {
        match ASCII[text[at] as usize] {
            MULTI => {
                let (point, size) = decode(text, at);
                (self.classes.get(point).copied().unwrap_or(OTHER), size)
            }
            class => (class, 1),
        }
    }

    /// As `class_at`; behind the end there is a space, which continues nothing.
    #[inline]
    fn class_after(&self, text: &[u8], at: usize) -> (u8, usize) {
        if at < text.len() {
            self.class_at(text, at)
        } else {
            (NEWLINE, 0)
        }
    }
}

/// `'s 'd 'm 't 'll 've 're`; with `any_case` also upper case and the long s (U+017F), which
/// Unicode folds to s.
#[inline]
pub fn contraction_end(text: &[u8], start: usize, any_case: bool) -> Option<usize> {
    if text[start] != b'\'' {
        return None;
    }
    let lower = |at: usize| match text.get(at) {
        Some(byte) if any_case => byte.to_ascii_lowercase(),
        Some(byte) => *byte,
        None => 0,
    };
    match (lower(start + 1), lower(start + 2)) {
        (b's', _) | (b'd', _) | (b'm', _) | (b't', _) => Some(start + 2),
        (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => Some(start + 3),
        (0xC5, 0xBF) if any_case => Some(start + 3),
        _ => None,
    }
}

/// Code point and length of the character outside ASCII at `at` of valid UTF-8.
#[inline]
fn decode(text: &[u8], at: usize) -> (usize, usize) {
    let tail = |offset: usize| (text[at + offset] & 0x3F) as usize;
    let first = text[at] as usize;
    if first < 0xE0 {
        ((first & 0x1F) << 6 | tail(1), 2)
    } else if first < 0xF0 {
        ((first & 0x0F) << 12 | tail(1) << 6 | tail(2), 3)
    } else {
        ((first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4)
    }
}

const ASCII: [u8; 256] = ascii_classes();

const fn ascii_classes() -> [u8; 256] {
    let mut table = [OTHER; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = match byte as u8 {
            b'\r' | b'\n' => NEWLINE,
            b' ' | 0x09 | 0x0B | 0x0C => SPACE,
            b'0'..=b'9' => NUMBER,
            b'a'..=b'z' | b'A'..=b'Z' => LETTER,
            0x80..=0xFF => MULTI,
            _ => OTHER,
        };
        byte += 1;
    }
    table
}

/// One byte per code point up to the last letter, built once per process (210 KB).
fn class_table() -> &'static [u8] {
    static TABLE: AtomicPtr<Vec<u8>> = AtomicPtr::new(std::ptr::null_mut());
    let built = TABLE.load(Ordering::Acquire);
    if !built.is_null() {
        // SAFETY: only ever set to a leaked box, below.
        return unsafe { &*built };
    }
    let last = LETTERS.iter().chain(&NUMBERS).chain(&SPACES).map(|range| range.1).max();
    let mut table = vec![OTHER; last.unwrap_or(0) as usize + 1];
    for (ranges, class) in [(&LETTERS[..], LETTER), (&NUMBERS[..], NUMBER), (&SPACES[..], SPACE)] {
        for &(first, last) in ranges {
            table[first as usize..=last as usize].fill(class);
        }
    }
    table[b'\r' as usize] = NEWLINE;
    table[b'\n' as usize] = NEWLINE;
    let leaked: &'static mut Vec<u8> = Box::leak(Box::new(table));
    // Two threads may both build it; the contents are equal and the loser leaks 210 KB once.
    TABLE.store(leaked, Ordering::Release);
    leaked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(name: &str, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        let splitter = Splitter::named(name).unwrap();
        splitter.for_each(text, |_, start, end| out.push(text[start..end].to_string()));
        out
    }

    #[test]
    fn words_numbers_and_contractions() {
        let expected = ["It", "'LL", " cost", " ", "12", "34", "5", "  ", " now", "!?\n\n", "ok"];
        assert_eq!(chunks("nanochat", "It'LL cost 12345   now!?\n\nok"), expected);
    }

    #[test]
    fn whitespace_at_the_end_differs_between_the_patterns() {
        assert_eq!(chunks("nanochat", "a \n  "), ["a", " \n", "  "]);
        assert_eq!(chunks("gpt4", "a \n  "), ["a", " \n  "]);
        assert_eq!(chunks("gpt2", "a \n  "), ["a", " \n  "]);
    }

    #[test]
    fn unknown_name_is_an_error() {
        assert!(Splitter::named("gpt5").is_err());
    }
}
