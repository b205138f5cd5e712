//! The C ABI of the training kernels. Arrays are bf16 unless said otherwise; see `ffi` for statuses.

use std::ffi::c_void;

use crate::blocks::{self, Unit};
use crate::ffi::guarded;
use crate::flash;
use crate::head;
use crate::int8;
use crate::linear::{self, Then};
use crate::memory::Shared;
use crate::newton_schulz;
use crate::operands::Format;
use crate::rows::{self, Turned};
use crate::team;

type View = blocks::View;

/// Whether the functions below can be called here: 1 or 0.
#[no_mangle]
pub extern "C" fn nck_can_train() -> i32 {
    Unit::is_there() as i32
}

/// Borrow the threads of the OpenMP library whose `GOMP_parallel` this is; null = none.
///
/// # Safety
/// It is that function.
#[no_mangle]
pub unsafe extern "C" fn nck_borrow_threads(parallel: *mut c_void) -> i32 {
    team::borrow_from(parallel);
    0
}

fn shared<T>(start: *const T) -> Shared<T> {
    Shared::new(start as *mut T)
}

/// bf16, or with 1 8-bit integers, of which sums over `contraction` numbers must fit 32 bits.
fn format_of(int8: u64, contraction: usize) -> Result<Format, String> {
    if int8 != 1 {
        return Ok(Format::Bf16);
    }
    if contraction > int8::MAX_CONTRACTION {
        return Err(format!("{contraction} numbers do not sum up in 32 bits"));
    }
    Ok(Format::Int8)
}

/// `y` (rows, outputs) = x (rows, inputs) w^T, w (outputs, inputs); relu2: then max(y, 0)^2.
/// int8: of operands rounded to 8 bits.
///
/// # Safety
/// The arrays have these sizes, and inputs is a multiple of 32.
#[no_mangle]
pub unsafe extern "C" fn nck_linear(
    threads: u64,
    x: *const u16,
    w: *const u16,
    y: *mut u16,
    rows: u64,
    outputs: u64,
    inputs: u64,
    relu2: u64,
    int8: u64,
) -> i32 {
    guarded(|| {
        let then = if relu2 == 1 { Then::Relu2 } else { Then::Round };
        let x = View::new(x, rows as usize, inputs as usize);
        let w = View::new(w, outputs as usize, inputs as usize);
        let format = format_of(int8, inputs as usize)?;
        linear::forward(threads as usize, format, (x, w), shared(y), then);
        Ok(())
    })
}

/// `dx` (rows, inputs) = the sum of dy (rows, outputs) w over `count` pairs of both; with `h`
/// (rows, inputs), not null, times the derivative of h = max(x, 0)^2. int8: as in `nck_linear`.
///
/// # Safety
/// The arrays have these sizes, and all `outputs` are multiples of 32.
#[no_mangle]
pub unsafe extern "C" fn nck_linear_input_gradient(
    threads: u64,
    count: u64,
    dy: *const *const u16,
    w: *const *const u16,
    outputs: *const u64,
    dx: *mut u16,
    h: *const u16,
    rows: u64,
    inputs: u64,
    int8: u64,
) -> i32 {
    guarded(|| {
        let pairs: Vec<(View, View)> = (0..count as usize)
            .map(|i| {
                let outputs = *outputs.add(i) as usize;
                let dy = View::new(*dy.add(i), rows as usize, outputs);
                (dy, View::new(*w.add(i), outputs, inputs as usize))
            })
            .collect();
        let then = if h.is_null() { Then::Round } else { Then::Relu2Gradient(shared(h)) };
        let widest = pairs.iter().map(|(dy, _)| dy.columns).max().unwrap_or(0);
        let format = format_of(int8, widest)?;
        linear::backward_input(threads as usize, format, &pairs, shared(dx), then);
        Ok(())
    })
}

/// `dw` (outputs, inputs) = dy^T (outputs, rows) x (rows, inputs). int8: as in `nck_linear`.
///
/// # Safety
/// The arrays have these sizes.
#[no_mangle]
pub unsafe extern "C" fn nck_linear_weight_gradient(
    threads: u64,
    dy: *const u16,
    x: *const u16,
    dw: *mut u16,
    rows: u64,
    outputs: u64,
    inputs: u64,
    int8: u64,
) -> i32 {
    guarded(|| {
        let format = format_of(int8, linear::CHUNK_ROWS)?;
        let dy = View::new(dy, rows as usize, outputs as usize);
        let x = View::new(x, rows as usize, inputs as usize);
        linear::backward_weight(threads as usize, format, dy, x, shared(dw));
        Ok(())
    })
}

/// `out` = x (rows, width) at unit root mean square, `inverse` (rows) fp32 the factors.
///
/// # Safety
/// The arrays have these sizes, and width is a multiple of 32.
#[no_mangle]
pub unsafe extern "C" fn nck_rms_norm(
    threads: u64,
    x: *const u16,
    out: *mut u16,
    inverse: *mut f32,
    rows: u64,
    width: u64,
    eps: f32,
) -> i32 {
    guarded(|| {
        rows::rms_norm(threads as usize, x, out, inverse, (rows as usize, width as usize), eps);
        Ok(())
    })
}

/// # Safety
/// As `nck_rms_norm`, whose results `normed` and `inverse` are.
#[no_mangle]
pub unsafe extern "C" fn nck_rms_norm_gradient(
    threads: u64,
    gradient: *const u16,
    normed: *const u16,
    inverse: *const f32,
    out: *mut u16,
    rows: u64,
    width: u64,
) -> i32 {
    guarded(|| {
        let size = (rows as usize, width as usize);
        rows::rms_norm_gradient(threads as usize, gradient, normed, inverse, out, size);
        Ok(())
    })
}

/// Sizes of attention: sequences, positions, heads, head size, window.
type CSizes = [u64; 5];

fn turned(sizes: &CSizes, cos: *const f32, sin: *const f32) -> Turned {
    let [sequences, positions, heads, size, _] = sizes.map(|x| x as usize);
    let rows = sequences * positions;
    Turned { rows, positions, heads, size, cos: shared(cos), sin: shared(sin) }
}

/// `out` = x (sequences, positions, heads, size) turned by its positions, each head at unit root
/// mean square; `inverse` (sequences, positions, heads) fp32 the factors; cos, sin (positions,
/// size / 2) fp32.
///
/// # Safety
/// The arrays have these sizes, and size is a multiple of 64.
#[no_mangle]
pub unsafe extern "C" fn nck_rotate_and_norm(
    threads: u64,
    sizes: *const CSizes,
    x: *const u16,
    cos: *const f32,
    sin: *const f32,
    out: *mut u16,
    inverse: *mut f32,
    eps: f32,
) -> i32 {
    guarded(|| {
        rows::rotate_and_norm(threads as usize, x, out, inverse, turned(&*sizes, cos, sin), eps);
        Ok(())
    })
}

/// # Safety
/// As `nck_rotate_and_norm`, whose results `normed` and `inverse` are.
#[no_mangle]
pub unsafe extern "C" fn nck_rotate_and_norm_gradient(
    threads: u64,
    sizes: *const CSizes,
    gradient: *const u16,
    normed: *const u16,
    inverse: *const f32,
    cos: *const f32,
    sin: *const f32,
    out: *mut u16,
) -> i32 {
    guarded(|| {
        let t = turned(&*sizes, cos, sin);
        rows::rotate_and_norm_gradient(threads as usize, gradient, normed, inverse, out, t);
        Ok(())
    })
}

fn attention_sizes(sizes: &CSizes) -> flash::Sizes {
    let [sequences, positions, heads, size, window] = sizes.map(|x| x as usize);
    flash::Sizes { sequences, positions, heads, size, window }
}

/// `out` (sequences, positions, heads, size) = causal attention; `lse` (sequences, heads,
/// positions) fp32.
///
/// # Safety
/// The arrays have these sizes, and size is a multiple of 32.
#[no_mangle]
pub unsafe extern "C" fn nck_attention(
    threads: u64,
    sizes: *const CSizes,
    q: *const u16,
    k: *const u16,
    v: *const u16,
    out: *mut u16,
    lse: *mut f32,
) -> i32 {
    guarded(|| {
        let inputs = [shared(q), shared(k), shared(v)];
        let sizes = attention_sizes(&*sizes);
        flash::forward(threads as usize, sizes, inputs, shared(out), shared(lse));
        Ok(())
    })
}

/// Gradients `dq`, `dk`, `dv` from that of `out`.
///
/// # Safety
/// As `nck_attention`, whose results `out` and `lse` are.
#[no_mangle]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn nck_attention_gradient(
    threads: u64,
    sizes: *const CSizes,
    q: *const u16,
    k: *const u16,
    v: *const u16,
    out: *const u16,
    lse: *const f32,
    gradient: *const u16,
    dq: *mut u16,
    dk: *mut u16,
    dv: *mut u16,
) -> i32 {
    guarded(|| {
        let inputs = [shared(q), shared(k), shared(v)];
        let results = (shared(out), shared(gradient));
        let gradients = [shared(dq), shared(dk), shared(dv)];
        let sizes = attention_sizes(&*sizes);
        flash::backward(threads as usize, sizes, inputs, results, shared(lse), gradients);
        Ok(())
    })
}

/// The weighted sum of the cross-entropies of softcapped logits, and both gradients. hidden (rows,
/// width), weight (vocabulary, width), of which `used` rows are tokens; targets (rows) int64;
/// factors (rows) fp32 or null. int8: as in `nck_linear`, for the logits and hidden gradients.
///
/// # Safety
/// The arrays have these sizes, width is a multiple of 32, targets are below `used`.
#[no_mangle]
#[allow(clippy::too_many_arguments)]
pub unsafe extern "C" fn nck_head_loss(
    threads: u64,
    hidden: *const u16,
    weight: *const u16,
    targets: *const i64,
    factors: *const f32,
    rows: u64,
    width: u64,
    vocabulary: u64,
    used: u64,
    cap: f32,
    int8: u64,
    loss: *mut f64,
    hidden_gradient: *mut u16,
    weight_gradient: *mut u16,
) -> i32 {
    guarded(|| {
        let sizes = head::Sizes {
            rows: rows as usize,
            width: width as usize,
            vocabulary: vocabulary as usize,
            used: used as usize,
            cap,
            format: format_of(int8, width as usize)?,
        };
        let targets_are = std::slice::from_raw_parts(targets, sizes.rows);
        if let Some(bad) = targets_are.iter().find(|&&t| t < 0 || t as usize >= sizes.used) {
            return Err(format!("target {bad} of a vocabulary of {}", sizes.used));
        }
        let data = head::Data {
            hidden: shared(hidden),
            weight: shared(weight),
            targets: shared(targets),
            factors,
            hidden_gradient: shared(hidden_gradient),
            weight_gradient: shared(weight_gradient),
        };
        *loss = head::loss(threads as usize, sizes, data);
        Ok(())
    })
}

/// Newton-Schulz iterations in place on a stack (count, rows, columns) of matrices, not taller than
/// wide; coefficients (iterations, 3) fp32.
///
/// # Safety
/// The arrays have these sizes; rows and columns are multiples of 32.
#[no_mangle]
pub unsafe extern "C" fn nck_newton_schulz(
    threads: u64,
    stack: *mut u16,
    count: u64,
    rows: u64,
    columns: u64,
    coefficients: *const [f32; 3],
    iterations: u64,
) -> i32 {
    guarded(|| {
        let coefficients = std::slice::from_raw_parts(coefficients, iterations as usize);
        let shape = (rows as usize, columns as usize);
        newton_schulz::iterate(
            threads as usize,
            shared(stack),
            count as usize,
            shape,
            coefficients,
        );
        Ok(())
    })
}
