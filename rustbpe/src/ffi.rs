//! The C ABI: plain functions over buffers and numbers, made for ctypes.
//!
//! Every function returns a status: 0 is success, 1 "call again", negative an error whose text
//! `rbpe_last_error` gives. Objects are numbers in a table and never pointers, so a wrong one is
//! an error and not a crash. Texts come as one buffer of UTF-8 and `num_texts + 1` offsets into
//! it; offsets, lengths and encoding are checked before anything is read.
//!
//! What cannot be checked is left to the caller: a non-null pointer with its length must be a
//! buffer of that length.

use std::sync::{Arc, Mutex};

use crate::boundary::*;
use crate::count::Counter;
use crate::encode::Encoder;
use crate::output::Output;
use crate::split::Splitter;
use crate::texts::Texts;
use crate::train::Merger;
use crate::{Error, Result};

const ABI_VERSION: u32 = 3;
const MAX_THREADS: usize = 256;

/// A trainer is counting until `rbpe_trainer_start`, then merging.
enum Trainer {
    Counting(Counter, Box<[u32; 256]>),
    Merging(Box<Merger>),
    /// Left behind when starting failed half way.
    Broken,
}

/// # Safety
/// As `slice`.
unsafe fn splitter(name: *const u8, len: usize) -> Result<Splitter> {
    let name = slice(name, len, "pattern")?;
    Splitter::named(std::str::from_utf8(name).map_err(|_| Error::new("pattern is not UTF-8"))?)
}

/// Changes with every incompatible change of these functions.
#[no_mangle]
pub extern "C" fn rbpe_abi_version() -> u32 {
    ABI_VERSION
}

/// Copy the last error text of this thread; returns its full length.
///
/// # Safety
/// `out` is null or has room for `capacity` bytes.
#[no_mangle]
pub unsafe extern "C" fn rbpe_last_error(out: *mut u8, capacity: usize) -> usize {
    with_last_error(|message| {
        if let Ok(out) = slice_mut(out, capacity, "out") {
            let len = message.len().min(out.len());
            out[..len].copy_from_slice(&message.as_bytes()[..len]);
        }
        message.len()
    })
}

/// Panics inside the guard: lets a test see that a panic becomes an error.
#[no_mangle]
pub extern "C" fn rbpe_test_panic() -> i32 {
    guard(|| panic!("asked for by a test"))
}

/// Forget an object. Unknown handles are refused.
#[no_mangle]
pub extern "C" fn rbpe_free(handle: u64) -> i32 {
    guard(|| match remove(handle) {
        true => Ok(OK),
        false => Err(Error::new(format!("handle {} is unknown", handle))),
    })
}

/// Chunk ends of one text: `ends` gets at most `capacity` of them, `count` how many there are.
///
/// # Safety
/// Pointers are null or point to buffers of the lengths given.
#[no_mangle]
pub unsafe extern "C" fn rbpe_split(
    pattern: *const u8,
    pattern_len: usize,
    text: *const u8,
    text_len: usize,
    ends: *mut u64,
    capacity: usize,
    count: *mut usize,
) -> i32 {
    guard(|| {
        let splitter = splitter(pattern, pattern_len)?;
        let bounds = [0, text_len as u64];
        let text = Texts::new(slice(text, text_len, "text")?, &bounds)?.text(0)?;
        let ends = slice_mut(ends, capacity, "ends")?;
        let count = slice_mut(count, 1, "count")?;
        let mut found = 0;
        splitter.for_each(text, |_, _, end| {
            if let Some(slot) = ends.get_mut(found) {
                *slot = end as u64;
            }
            found += 1;
        });
        count[0] = found;
        Ok(OK)
    })
}

/// New trainer. `byte_ids`: null, or the id of each of the 256 bytes (a permutation).
///
/// # Safety
/// Pointers are null or point to buffers of the lengths given.
#[no_mangle]
pub unsafe extern "C" fn rbpe_trainer_new(
    pattern: *const u8,
    pattern_len: usize,
    byte_ids: *const u32,
    threads: u32,
    handle: *mut u64,
) -> i32 {
    guard(|| {
        let splitter = splitter(pattern, pattern_len)?;
        let handle = slice_mut(handle, 1, "handle")?;
        let mut ids = Box::new([0u32; 256]);
        for (byte, id) in ids.iter_mut().enumerate() {
            *id = byte as u32;
        }
        if !byte_ids.is_null() {
            let given = slice(byte_ids, 256, "byte_ids")?;
            let mut seen = [false; 256];
            for id in given {
                match seen.get_mut(*id as usize) {
                    Some(slot) if !*slot => *slot = true,
                    _ => return Err(Error::new("byte_ids is not a permutation of 0..256")),
                }
            }
            ids.copy_from_slice(given);
        }
        let counter = Counter::new(splitter, (threads as usize).min(MAX_THREADS));
        handle[0] = store(Arc::new(Mutex::new(Trainer::Counting(counter, ids))));
        Ok(OK)
    })
}

/// Count the chunks of some texts.
///
/// # Safety
/// Pointers are null or point to buffers of the lengths given.
#[no_mangle]
pub unsafe extern "C" fn rbpe_trainer_feed(
    handle: u64,
    data: *const u8,
    len: usize,
    offsets: *const u64,
    num_texts: usize,
) -> i32 {
    guard(|| feed(handle, &texts(data, len, offsets, num_texts)?))
}

/// As `rbpe_trainer_feed`, for texts that lie at different addresses.
///
/// # Safety
/// Pointers are null or point to `num_texts` values, each address to as many bytes as its length.
#[no_mangle]
pub unsafe extern "C" fn rbpe_trainer_feed_scattered(
    handle: u64,
    addresses: *const *const u8,
    lengths: *const usize,
    num_texts: usize,
) -> i32 {
    guard(|| feed(handle, &Texts::Scattered { pieces: &gather(addresses, lengths, num_texts)? }))
}

fn feed(handle: u64, texts: &Texts) -> Result<i32> {
    let trainer = find::<Mutex<Trainer>>(handle)?;
    let mut trainer = lock(&trainer);
    let result = match &mut *trainer {
        Trainer::Counting(counter, _) => counter.feed(texts),
        _ => return Err(Error::new("this trainer has started merging")),
    };
    if result.is_err() {
        *trainer = Trainer::Broken;
    }
    result.map(|()| OK)
}

/// End of the input: prepare `num_merges` merges. `stats` gets bytes, chunks, distinct chunks.
///
/// # Safety
/// `stats` is null or has room for 3 values.
#[no_mangle]
pub unsafe extern "C" fn rbpe_trainer_start(handle: u64, num_merges: u32, stats: *mut u64) -> i32 {
    guard(|| {
        let trainer = find::<Mutex<Trainer>>(handle)?;
        let stats = slice_mut(stats, 3, "stats")?;
        let mut trainer = lock(&trainer);
        match std::mem::replace(&mut *trainer, Trainer::Broken) {
            Trainer::Counting(counter, byte_ids) => {
                let (num_bytes, num_chunks) = (counter.num_bytes, counter.num_chunks);
                let (num_distinct, words) = counter.into_words();
                stats.copy_from_slice(&[num_bytes, num_chunks, num_distinct as u64]);
                let merger = Merger::new(&words, &byte_ids, num_merges as usize)?;
                *trainer = Trainer::Merging(Box::new(merger));
                Ok(OK)
            }
            other => {
                *trainer = other;
                Err(Error::new("this trainer has started merging already"))
            }
        }
    })
}

/// Learn up to `most` more merges; returns 1 while there are more to learn.
#[no_mangle]
pub extern "C" fn rbpe_trainer_step(handle: u64, most: u32) -> i32 {
    guard(|| {
        let trainer = find::<Mutex<Trainer>>(handle)?;
        let mut trainer = lock(&trainer);
        match &mut *trainer {
            Trainer::Merging(merger) => Ok(if merger.step(most as usize) { MORE } else { OK }),
            _ => Err(Error::new("this trainer has not started merging")),
        }
    })
}

/// The merges learned so far as pairs of ids; `count` gets how many there are.
///
/// # Safety
/// `pairs` is null or has room for `2 * capacity` values, `count` for one.
#[no_mangle]
pub unsafe extern "C" fn rbpe_trainer_merges(
    handle: u64,
    pairs: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> i32 {
    guard(|| {
        let trainer = find::<Mutex<Trainer>>(handle)?;
        let count = slice_mut(count, 1, "count")?;
        let room = capacity.checked_mul(2).ok_or_else(|| Error::new("capacity is too large"))?;
        let pairs = slice_mut(pairs, room, "pairs")?;
        let trainer = lock(&trainer);
        match &*trainer {
            Trainer::Merging(merger) => {
                count[0] = merger.merges.len();
                for (slot, pair) in pairs.chunks_exact_mut(2).zip(&merger.merges) {
                    slot.copy_from_slice(&[pair.0, pair.1]);
                }
                Ok(OK)
            }
            _ => Err(Error::new("this trainer has not started merging")),
        }
    })
}

/// New encoder from the bytes of all tokens in id order.
///
/// # Safety
/// Pointers are null or point to buffers of the lengths given.
#[no_mangle]
pub unsafe extern "C" fn rbpe_encoder_new(
    pattern: *const u8,
    pattern_len: usize,
    data: *const u8,
    len: usize,
    offsets: *const u64,
    num_tokens: usize,
    handle: *mut u64,
) -> i32 {
    guard(|| {
        let splitter = splitter(pattern, pattern_len)?;
        let handle = slice_mut(handle, 1, "handle")?;
        let tokens = texts(data, len, offsets, num_tokens)?;
        handle[0] = store(Arc::new(Encoder::new(splitter, &tokens)?));
        Ok(OK)
    })
}

/// Encode texts. `ids` needs room for one id per byte plus one per text and per id put around
/// it; `id_offsets` for `num_texts + 1`. `prepend`, `append`: an id, or negative for none.
///
/// # Safety
/// Pointers are null or point to buffers of the lengths given.
#[no_mangle]
pub unsafe extern "C" fn rbpe_encoder_encode(
    handle: u64,
    data: *const u8,
    len: usize,
    offsets: *const u64,
    num_texts: usize,
    prepend: i64,
    append: i64,
    threads: u32,
    ids: *mut i32,
    capacity: usize,
    id_offsets: *mut i64,
) -> i32 {
    guard(|| {
        let ids = slice_mut(ids, capacity, "ids")?;
        let id_offsets = slice_mut(id_offsets, num_offsets(num_texts)?, "id_offsets")?;
        let texts = texts(data, len, offsets, num_texts)?;
        encode(handle, &texts, (prepend, append), threads, &Output::new(ids, id_offsets))
    })
}

/// As `rbpe_encoder_encode`, for texts that lie at different addresses.
///
/// # Safety
/// Pointers are null or point to buffers of the lengths given, each address to as many bytes as
/// its length.
#[no_mangle]
pub unsafe extern "C" fn rbpe_encoder_encode_scattered(
    handle: u64,
    addresses: *const *const u8,
    lengths: *const usize,
    num_texts: usize,
    prepend: i64,
    append: i64,
    threads: u32,
    ids: *mut i32,
    capacity: usize,
    id_offsets: *mut i64,
) -> i32 {
    guard(|| {
        let ids = slice_mut(ids, capacity, "ids")?;
        let id_offsets = slice_mut(id_offsets, num_offsets(num_texts)?, "id_offsets")?;
        let texts = Texts::Scattered { pieces: &gather(addresses, lengths, num_texts)? };
        encode(handle, &texts, (prepend, append), threads, &Output::new(ids, id_offsets))
    })
}

fn encode(
    handle: u64,
    texts: &Texts,
    (prepend, append): (i64, i64),
    threads: u32,
    output: &Output,
) -> Result<i32> {
    let encoder = find::<Encoder>(handle)?;
    let around = (around_id(prepend)?, around_id(append)?);
    encoder.encode(texts, around, (threads as usize).min(MAX_THREADS), output)?;
    Ok(OK)
}

/// Bytes of some ids: `out` gets them if there is room, `len` how many there are either way.
///
/// # Safety
/// Pointers are null or point to buffers of the lengths given.
#[no_mangle]
pub unsafe extern "C" fn rbpe_encoder_decode(
    handle: u64,
    ids: *const i32,
    num_ids: usize,
    out: *mut u8,
    capacity: usize,
    len: *mut usize,
) -> i32 {
    guard(|| {
        let encoder = find::<Encoder>(handle)?;
        let ids = slice(ids, num_ids, "ids")?;
        let len = slice_mut(len, 1, "len")?;
        let out = slice_mut(out, capacity, "out")?;
        len[0] = encoder.decode(ids, out)?;
        Ok(OK)
    })
}

fn around_id(id: i64) -> Result<Option<u32>> {
    match id {
        _ if id < 0 => Ok(None),
        _ if id <= i64::from(i32::MAX) => Ok(Some(id as u32)),
        _ => Err(Error::new(format!("id {} does not fit 31 bits", id))),
    }
}
