//! Chunk boundaries of plain English text, 64 bytes at a time.
//!
//! Every class of characters becomes a 64 bit mask, bit i for byte i, and the rules of the split
//! patterns become shifts and ands of masks. Whatever the masks do not understand (characters
//! outside ASCII, tabs, several spaces) ends the block early, and the scanner
//! of `split.rs` takes over for a chunk.

use crate::split::contraction_end;

/// Bytes by class. All bits from the first one that is not understood on are zero.
struct Classes {
    letters: u64,
    numbers: u64,
    /// Single spaces.
    spaces: u64,
    newlines: u64,
    /// Apostrophes among them.
    others: u64,
    apostrophes: u64,
    /// Below the first byte that is not understood.
    plain: u64,
}

/// Beginnings of chunks under the GPT-4 patterns, without bit 0, which is one.
#[inline(always)]
pub fn gpt4_starts(block: &[u8], max_digits: usize) -> u64 {
    let classes = classes(block);
    let Classes { letters, numbers, spaces, newlines, others, .. } = classes;
    let after_space = spaces << 1;
    // punctuation begins a chunk, unless the space before it does
    let punctuation = others & !(others << 1) & !after_space;
    // letters do too, unless a space or one such character comes before them
    let words = letters & !(letters << 1) & !after_space & !(punctuation << 1);
    // line breaks belong to punctuation before them
    let breaks = newlines & !(newlines << 1) & !(others << 1);
    let mut digits = numbers & !(numbers << 1);
    let mut starts = spaces | punctuation | words | breaks | digits;
    while digits != 0 {
        for _ in 0..max_digits {
            digits = digits << 1 & numbers;
        }
        starts |= digits;
    }
    let mut marks = classes.apostrophes & punctuation;
    while marks != 0 {
        if let Some(end) = contraction_end(block, marks.trailing_zeros() as usize, true) {
            starts |= 1 << end;
        }
        marks &= marks - 1;
    }
    starts & classes.plain & !1
}

/// Beginnings of chunks under the GPT-2 pattern, without bit 0, which is one.
#[inline(always)]
pub fn gpt2_starts(block: &[u8]) -> u64 {
    let classes = classes(block);
    let Classes { letters, numbers, spaces, newlines, others, plain, .. } = classes;
    let first = |class: u64| class & !(class << 1) & !(spaces << 1);
    // of several line breaks the last one stands alone, if it is known to be followed by text
    let last = newlines & !(newlines >> 1) & !(spaces >> 1) & (plain >> 1);
    let breaks = newlines & !(newlines << 1) | last;
    let mut starts = spaces | first(letters) | first(numbers) | first(others) | breaks;
    let mut marks = classes.apostrophes & first(others);
    while marks != 0 {
        let mark = marks.trailing_zeros() as usize;
        if let Some(end) = contraction_end(block, mark, false) {
            starts = starts & !(1 << (mark + 1)) | 1 << end;
        }
        marks &= marks - 1;
    }
    starts & plain & !1
}

#[inline(always)]
fn classes(block: &[u8]) -> Classes {
    let Masks { letters, numbers, spaces, newlines, apostrophes, strange } = masks(block);
    // of two white space characters the first is strange, and so is one at the end, which may
    // have a second; after a line break anything strange may be one. An apostrophe needs to see
    // the three bytes after it.
    let second = spaces | newlines | (strange & newlines << 2);
    let several = spaces & (second >> 1 | 1 << 63);
    let strange = strange | several | apostrophes & (7 << 61) | 1 << 63;
    let plain = (strange & strange.wrapping_neg()) - 1;
    Classes {
        letters: letters & plain,
        numbers: numbers & plain,
        spaces: spaces & plain,
        newlines: newlines & plain,
        others: !(letters | numbers | spaces | newlines) & plain,
        apostrophes: apostrophes & plain,
        plain,
    }
}

/// Classes of 64 bytes; `strange` are white space but space and newline, and all bytes outside
/// ASCII.
#[derive(Default)]
struct Masks {
    letters: u64,
    numbers: u64,
    spaces: u64,
    newlines: u64,
    apostrophes: u64,
    strange: u64,
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn masks(block: &[u8]) -> Masks {
    use std::arch::x86_64::*;
    let mut masks = Masks::default();
    for part in 0..4 {
        let bytes = &block[part * 16..part * 16 + 16];
        // SAFETY: SSE2 belongs to every x86_64, and the slice has 16 bytes.
        unsafe {
            let text = _mm_loadu_si128(bytes.as_ptr().cast());
            let within = |from: __m128i, last: i8| {
                _mm_cmpeq_epi8(_mm_min_epu8(from, _mm_set1_epi8(last)), from)
            };
            let lower = _mm_or_si128(text, _mm_set1_epi8(0x20));
            let letters = within(_mm_sub_epi8(lower, _mm_set1_epi8(b'a' as i8)), 25);
            let numbers = within(_mm_sub_epi8(text, _mm_set1_epi8(b'0' as i8)), 9);
            let spaces = _mm_cmpeq_epi8(text, _mm_set1_epi8(b' ' as i8));
            let breaks = within(_mm_sub_epi8(text, _mm_set1_epi8(9)), 4);
            let apostrophes = _mm_cmpeq_epi8(text, _mm_set1_epi8(b'\'' as i8));
            let newlines = _mm_cmpeq_epi8(text, _mm_set1_epi8(b'\n' as i8));
            // the sign bit of the text itself: not ASCII
            let strange = _mm_or_si128(_mm_andnot_si128(newlines, breaks), text);
            let bits = |mask| u64::from(_mm_movemask_epi8(mask) as u32) << (part * 16);
            masks.letters |= bits(letters);
            masks.numbers |= bits(numbers);
            masks.spaces |= bits(spaces);
            masks.newlines |= bits(newlines);
            masks.apostrophes |= bits(apostrophes);
            masks.strange |= bits(strange);
        }
    }
    masks
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn masks(block: &[u8]) -> Masks {
    let mut masks = Masks::default();
    for (at, &byte) in block[..64].iter().enumerate() {
        masks.letters |= u64::from(byte.is_ascii_alphabetic()) << at;
        masks.numbers |= u64::from(byte.is_ascii_digit()) << at;
        masks.spaces |= u64::from(byte == b' ') << at;
        masks.newlines |= u64::from(byte == b'\n') << at;
        masks.apostrophes |= u64::from(byte == b'\'') << at;
        let strange = matches!(byte, 9 | 11..=13 | 0x80..=0xFF);
        masks.strange |= u64::from(strange) << at;
    }
    masks
}
