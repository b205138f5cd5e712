//! The C ABI. Every function returns 0 or a status: -1 what the caller asked for is not possible,
//! -2 a panic. `nck_last_error` has the message, for the calling thread.

use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::slice::from_raw_parts;

use crate::attention::Heads;
use crate::isa::Isa;
use crate::matmul::{Kind, Matrix};
use crate::model::{Chunk, Layer, Model, Sizes, Tables};
use crate::options::{Options, Smear, ValueEmbedding};
use crate::sampling::{choose, Room, Settings};

pub const ABI_VERSION: i32 = 7;

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

pub(crate) fn guarded(body: impl FnOnce() -> Result<(), String>) -> i32 {
    let (status, message) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return 0,
        Ok(Err(message)) => (-1, message),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            (-2, text.unwrap_or_else(|| "a panic".into()))
        }
    };
    LAST_ERROR.with(|last| *last.borrow_mut() = message);
    status
}

#[no_mangle]
pub extern "C" fn nck_abi_version() -> i32 {
    ABI_VERSION
}

/// Copies at most `size` bytes of the last error to `buffer`; returns its whole length.
///
/// # Safety
/// `buffer` has room for `size` bytes, or is null and `size` 0.
#[no_mangle]
pub unsafe extern "C" fn nck_last_error(buffer: *mut u8, size: usize) -> usize {
    LAST_ERROR.with(|last| {
        let last = last.borrow();
        if size > 0 {
            std::ptr::copy_nonoverlapping(last.as_ptr(), buffer, size.min(last.len()));
        }
        last.len()
    })
}

/// Name of the instruction set that would be used, "" when there is none: its length, its bytes in
/// `buffer`.
///
/// # Safety
/// `buffer` has room for `size` bytes.
#[no_mangle]
pub unsafe extern "C" fn nck_isa(buffer: *mut u8, size: usize) -> usize {
    let name = Isa::detect().map_or("", Isa::name);
    std::ptr::copy_nonoverlapping(name.as_ptr(), buffer, size.min(name.len()));
    name.len()
}

/// Sizes of a model, as the caller fills them in.
#[repr(C)]
pub struct CSizes {
    vocabulary: u64,
    width: u64,
    num_layers: u64,
    query_heads: u64,
    key_heads: u64,
    head_size: u64,
    inner_width: u64,
    positions: u64,
    token_shift: f64,
    /// Factor of normed queries and keys each.
    qk_scale: f64,
    softcap: f64,
    /// 0 = relu2, 1 = gated.
    is_gated: u64,
    smear_share: f64,
    backout_share: f64,
    /// For each layer how many positions before its own one attends to.
    windows: *const u64,
    /// 0 fp32, 1 bf16, 2 int8.
    kind: u64,
    num_threads: u64,
    /// 0 the best instruction set, 1 without tiles, 2 without bf16 products, 3 AVX2; for tests.
    without: u64,
}

/// Pack a model. `weights`: for each layer fp32 matrices (outputs x inputs): query, key, value,
/// attention output, with a gated MLP its gate, MLP in, MLP out; then the head. `tables`, which the
/// caller keeps: embedding, cosines, sines; then what there is, else null: smear gate, the residual
/// scalars (2, layers), and for each layer its value embedding and that one's gate. `handle` gets
/// the model.
///
/// # Safety
/// All pointers are to arrays of the sizes' shapes.
#[no_mangle]
pub unsafe extern "C" fn nck_model_new(
    sizes: *const CSizes,
    tables: *const *const f32,
    weights: *const *const f32,
    handle: *mut *mut Model,
) -> i32 {
    guarded(|| {
        let s = &*sizes;
        let best = Isa::detect().ok_or("this processor has no fused multiply-add")?;
        let isa = match (s.without, best) {
            (1, Isa::Amx) => Isa::Avx512Bf16,
            (2, Isa::Amx | Isa::Avx512Bf16) => Isa::Avx512,
            (3, best) if best.is_wide() => Isa::Avx2,
            _ => best,
        };
        let kind = match s.kind {
            0 => Kind::F32,
            1 => Kind::Bf16,
            2 => Kind::of_bytes(isa, s.width.max(s.inner_width) as usize),
            other => return Err(format!("no precision {other}")),
        };
        let heads = Heads {
            num_layers: s.num_layers as usize,
            queries: s.query_heads as usize,
            keys: s.key_heads as usize,
            size: s.head_size as usize,
        };
        let (width, inner) = (s.width as usize, s.inner_width as usize);
        if heads.num_layers == 0 || heads.queries * heads.size != width || width % 2 == 1 {
            return Err(format!("impossible sizes: width {width}, {heads:?}"));
        }
        let sizes = Sizes {
            vocabulary: s.vocabulary as usize,
            width,
            heads,
            positions: s.positions as usize,
            token_shift: s.token_shift as f32,
        };
        let matrix = |index: usize, outputs: usize, inputs: usize| {
            from_raw_parts(*weights.add(index), outputs * inputs)
        };
        let key_width = heads.keys * heads.size;
        let is_gated = s.is_gated != 0;
        let per_layer = if is_gated { 7 } else { 6 };
        let layers = (0..heads.num_layers)
            .map(|layer| {
                let at = per_layer * layer;
                let projections = [
                    matrix(at, width, width),
                    matrix(at + 1, key_width, width),
                    matrix(at + 2, key_width, width),
                ];
                let mut mlp_in = vec![matrix(at + 4, inner, width)];
                if is_gated {
                    mlp_in.push(matrix(at + 5, inner, width));
                }
                Layer {
                    projections: Matrix::pack(kind, &projections, width),
                    attention_out: Matrix::pack(kind, &[matrix(at + 3, width, width)], width),
                    mlp_in: Matrix::pack(kind, &mlp_in, width),
                    mlp_out: Matrix::pack(kind, &[matrix(at + per_layer - 1, width, inner)], inner),
                }
            })
            .collect();
        let head = matrix(per_layer * heads.num_layers, sizes.vocabulary, width);
        let head = Matrix::pack(kind, &[head], width);
        let shared = Tables { embedding: *tables, cos: *tables.add(1), sin: *tables.add(2) };
        let options = options_of(s, tables, is_gated);
        let threads = (s.num_threads as usize).max(1);
        let model = Model::new(isa, kind, sizes, options, shared, layers, head, threads)?;
        *handle = Box::into_raw(Box::new(model));
        Ok(())
    })
}

/// # Safety
/// As `nck_model_new`.
unsafe fn options_of(s: &CSizes, tables: *const *const f32, is_gated: bool) -> Options {
    let num_layers = s.num_layers as usize;
    let table = |index: usize| {
        let table = *tables.add(index);
        (!table.is_null()).then_some(table)
    };
    let values = |layer: usize| {
        Some(ValueEmbedding { table: table(5 + 2 * layer)?, gate: table(6 + 2 * layer)? })
    };
    Options {
        query_scale: (s.qk_scale * s.qk_scale) as f32,
        softcap: s.softcap as f32,
        is_gated,
        windows: from_raw_parts(s.windows, num_layers).iter().map(|&w| w as usize).collect(),
        scalars: table(4).map(|scalars| {
            let scalars = from_raw_parts(scalars, 2 * num_layers);
            let (keep, back) = scalars.split_at(num_layers);
            keep.iter().copied().zip(back.iter().copied()).collect()
        }),
        values: (0..num_layers).map(values).collect(),
        smear: table(3).map(|gate| Smear { gate, share: s.smear_share as f32 }),
        backout: (s.backout_share != 0.0).then_some(s.backout_share as f32),
    }
}

/// # Safety
/// `model` is from `nck_model_new` and is not used again.
#[no_mangle]
pub unsafe extern "C" fn nck_model_free(model: *mut Model) -> i32 {
    guarded(|| {
        drop(Box::from_raw(model));
        Ok(())
    })
}

/// Bytes of packed weights.
///
/// # Safety
/// `model` is from `nck_model_new`.
#[no_mangle]
pub unsafe extern "C" fn nck_model_bytes(model: *const Model) -> u64 {
    (*model).num_bytes() as u64
}

/// # Safety
/// `model` is from `nck_model_new`; no other thread uses it.
#[no_mangle]
pub unsafe extern "C" fn nck_open(model: *mut Model, capacity: u64, row: *mut u64) -> i32 {
    guarded(|| {
        *row = (*model).open(capacity as usize) as u64;
        Ok(())
    })
}

/// # Safety
/// As `nck_open`.
#[no_mangle]
pub unsafe extern "C" fn nck_close(model: *mut Model, row: u64) -> i32 {
    guarded(|| (*model).close(row as usize))
}

/// # Safety
/// As `nck_open`.
#[no_mangle]
pub unsafe extern "C" fn nck_copy(model: *mut Model, source: u64, target: u64, len: u64) -> i32 {
    guarded(|| (*model).copy(source as usize, target as usize, len as usize))
}

/// `table`: for each chunk row, start, number of tokens, and 1 if its logits are wanted; `tokens`:
/// those of all chunks in a row; `logits`: (chunks that want them, vocabulary) fp32.
///
/// # Safety
/// As `nck_open`, and the arrays have these lengths.
#[no_mangle]
pub unsafe extern "C" fn nck_feed(
    model: *mut Model,
    num_chunks: u64,
    table: *const u32,
    tokens: *const u32,
    logits: *mut f32,
    num_logits: u64,
) -> i32 {
    guarded(|| {
        let mut offset = 0;
        let chunks: Vec<Chunk> = (0..num_chunks as usize)
            .map(|i| {
                let entry = from_raw_parts(table.add(4 * i), 4);
                let len = entry[2] as usize;
                let tokens = from_raw_parts(tokens.add(offset), len);
                offset += len;
                Chunk {
                    row: entry[0] as usize,
                    start: entry[1] as usize,
                    tokens,
                    wants_logits: entry[3] != 0,
                }
            })
            .collect();
        let logits = std::slice::from_raw_parts_mut(logits, num_logits as usize);
        (*model).feed(&chunks, logits)
    })
}

/// The next token of each row of `logits` (rows, vocabulary) fp32. `settings`: for each row
/// temperature, top-k (0 = all), top-p (1 = off), min-p (0 = off) and a number in [0, 1).
///
/// # Safety
/// The arrays have these lengths.
#[no_mangle]
pub unsafe extern "C" fn nck_choose(
    num_rows: u64,
    vocabulary: u64,
    logits: *const f32,
    settings: *const f64,
    tokens: *mut u32,
) -> i32 {
    guarded(|| {
        let isa = Isa::detect().ok_or("this processor has no fused multiply-add")?;
        let vocabulary = vocabulary as usize;
        let mut room = Room::default();
        for row in 0..num_rows as usize {
            let logits = from_raw_parts(logits.add(row * vocabulary), vocabulary);
            let [temperature, top_k, top_p, min_p, uniform] =
                *(settings.add(5 * row) as *const [f64; 5]);
            let temperature = temperature as f32;
            let settings = Settings { temperature, top_k: top_k as usize, top_p, min_p, uniform };
            *tokens.add(row) = choose(isa, logits, settings, &mut room);
        }
        Ok(())
    })
}
