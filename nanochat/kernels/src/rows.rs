//! Norms and rotations of rows for training in bf16, with their gradients; sums are fp32.

use std::arch::x86_64::*;

use crate::blocks::{round, widen};
use crate::memory::Shared;
use crate::team;

/// Rows of a task.
const TASK_ROWS: usize = 256;

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(x: *const u16) -> (__m512, __m512) {
    let both = _mm512_loadu_si512(x as *const __m512i);
    (widen(_mm512_castsi512_si256(both)), widen(_mm512_extracti64x4_epi64::<1>(both)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn save(out: *mut u16, low: __m512, high: __m512) {
    _mm512_storeu_si512(out as *mut __m512i, round(low, high));
}

/// The sum of products of two rows of `len` numbers, a multiple of 32.
///
/// # Safety
/// AVX-512; the rows have these lengths.
#[inline]
#[target_feature(enable = "avx512f")]
pub unsafe fn dot(a: *const u16, b: *const u16, len: usize) -> f32 {
    let (mut first, mut second) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    for i in (0..len).step_by(32) {
        let ((a0, a1), (b0, b1)) = (load(a.add(i)), load(b.add(i)));
        first = _mm512_fmadd_ps(a0, b0, first);
        second = _mm512_fmadd_ps(a1, b1, second);
    }
    _mm512_reduce_add_ps(_mm512_add_ps(first, second))
}

fn each_row(threads: usize, rows: usize, body: impl Fn(usize) + Sync) {
    team::run(threads, rows.div_ceil(TASK_ROWS), &|task| {
        (task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS)).for_each(&body)
    });
}

/// Rows of `width` numbers, a multiple of 32, scaled to unit root mean square; `inverse` (rows)
/// gets what they were multiplied with.
///
/// # Safety
/// AVX-512 with bf16; the arrays have these sizes.
pub unsafe fn rms_norm(
    threads: usize,
    x: *const u16,
    out: *mut u16,
    inverse: *mut f32,
    (rows, width): (usize, usize),
    eps: f32,
) {
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn row(x: *const u16, out: *mut u16, width: usize, eps: f32) -> f32 {
        let inverse = 1.0 / (dot(x, x, width) / width as f32 + eps).sqrt();
        let scale = _mm512_set1_ps(inverse);
        for i in (0..width).step_by(32) {
            let (low, high) = load(x.add(i));
            save(out.add(i), _mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
        }
        inverse
    }
    let (x, out, inverse) = (Shared::new(x as *mut u16), Shared::new(out), Shared::new(inverse));
    each_row(threads, rows, |r| unsafe {
        *inverse.at(r) = row(x.at(r * width), out.at(r * width), width, eps);
    });
}

/// (g - y mean(g y)) / rms: the gradient behind y = x / rms.
///
/// # Safety
/// As `rms_norm`.
pub unsafe fn rms_norm_gradient(
    threads: usize,
    gradient: *const u16,
    normed: *const u16,
    inverse: *const f32,
    out: *mut u16,
    (rows, width): (usize, usize),
) {
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn row(g: *const u16, y: *const u16, inverse: f32, out: *mut u16, width: usize) {
        let along = _mm512_set1_ps(-dot(g, y, width) / width as f32);
        let scale = _mm512_set1_ps(inverse);
        for i in (0..width).step_by(32) {
            let ((g0, g1), (y0, y1)) = (load(g.add(i)), load(y.add(i)));
            let low = _mm512_mul_ps(_mm512_fmadd_ps(along, y0, g0), scale);
            let high = _mm512_mul_ps(_mm512_fmadd_ps(along, y1, g1), scale);
            save(out.add(i), low, high);
        }
    }
    let (g, y) = (Shared::new(gradient as *mut u16), Shared::new(normed as *mut u16));
    let (inverse, out) = (Shared::new(inverse as *mut f32), Shared::new(out));
    each_row(threads, rows, |r| unsafe {
        let at = r * width;
        row(g.at(at), y.at(at), *inverse.at(r), out.at(at), width);
    });
}

/// Sizes of queries or keys: (sequences x positions, heads, size), and their rotary tables
/// (positions, size / 2) in fp32. `size` is a multiple of 64.
#[derive(Clone, Copy)]
pub struct Turned {
    pub rows: usize,
    pub positions: usize,
    pub heads: usize,
    pub size: usize,
    pub cos: Shared<f32>,
    pub sin: Shared<f32>,
}

/// Turn each pair (i, i + size / 2) by its position's angle, then scale each head to unit root
/// mean square; `inverse` (rows, heads) gets the factors.
///
/// # Safety
/// As `rms_norm`.
pub unsafe fn rotate_and_norm(
    threads: usize,
    x: *const u16,
    out: *mut u16,
    inverse: *mut f32,
    t: Turned,
    eps: f32,
) {
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn head(
        x: *const u16,
        out: *mut u16,
        (cos, sin): (*const f32, *const f32),
        size: usize,
        eps: f32,
    ) -> f32 {
        // A rotation keeps the norm, so x's own serves.
        let inverse = 1.0 / (dot(x, x, size) / size as f32 + eps).sqrt();
        let scale = _mm512_set1_ps(inverse);
        let half = size / 2;
        for i in (0..half).step_by(32) {
            let ((a0, a1), (b0, b1)) = (load(x.add(i)), load(x.add(half + i)));
            let (first0, second0) = turn(a0, b0, cos.add(i), sin.add(i));
            let (first1, second1) = turn(a1, b1, cos.add(i + 16), sin.add(i + 16));
            save(out.add(i), _mm512_mul_ps(first0, scale), _mm512_mul_ps(first1, scale));
            save(out.add(half + i), _mm512_mul_ps(second0, scale), _mm512_mul_ps(second1, scale));
        }
        inverse
    }
    let (x, out, inverse) = (Shared::new(x as *mut u16), Shared::new(out), Shared::new(inverse));
    each_row(threads, t.rows, |r| unsafe {
        let table = r % t.positions * t.size / 2;
        let tables = (t.cos.at(table) as *const f32, t.sin.at(table) as *const f32);
        for h in r * t.heads..(r + 1) * t.heads {
            *inverse.at(h) = head(x.at(h * t.size), out.at(h * t.size), tables, t.size, eps);
        }
    });
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn turn(a: __m512, b: __m512, cos: *const f32, sin: *const f32) -> (__m512, __m512) {
    let (c, s) = (_mm512_loadu_ps(cos), _mm512_loadu_ps(sin));
    let first = _mm512_fmadd_ps(a, c, _mm512_mul_ps(b, s));
    (first, _mm512_fnmadd_ps(a, s, _mm512_mul_ps(b, c)))
}

/// The gradient behind `rotate_and_norm`.
///
/// # Safety
/// As `rms_norm`.
pub unsafe fn rotate_and_norm_gradient(
    threads: usize,
    gradient: *const u16,
    normed: *const u16,
    inverse: *const f32,
    out: *mut u16,
    t: Turned,
) {
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn head(
        (g, y): (*const u16, *const u16),
        inverse: f32,
        out: *mut u16,
        (cos, sin): (*const f32, *const f32),
        size: usize,
    ) {
        let along = _mm512_set1_ps(-dot(g, y, size) / size as f32);
        let scale = _mm512_set1_ps(inverse);
        let half = size / 2;
        let behind = |g: __m512, y: __m512| _mm512_mul_ps(_mm512_fmadd_ps(along, y, g), scale);
        for i in (0..half).step_by(32) {
            let ((ga0, ga1), (ya0, ya1)) = (load(g.add(i)), load(y.add(i)));
            let ((gb0, gb1), (yb0, yb1)) = (load(g.add(half + i)), load(y.add(half + i)));
            let (a0, b0) = (behind(ga0, ya0), behind(gb0, yb0));
            let (a1, b1) = (behind(ga1, ya1), behind(gb1, yb1));
            let (first0, second0) = turn_back(a0, b0, cos.add(i), sin.add(i));
            let (first1, second1) = turn_back(a1, b1, cos.add(i + 16), sin.add(i + 16));
            save(out.add(i), first0, first1);
            save(out.add(half + i), second0, second1);
        }
    }
    let (g, y) = (Shared::new(gradient as *mut u16), Shared::new(normed as *mut u16));
    let (inverse, out) = (Shared::new(inverse as *mut f32), Shared::new(out));
    each_row(threads, t.rows, |r| unsafe {
        let table = r % t.positions * t.size / 2;
        let tables = (t.cos.at(table) as *const f32, t.sin.at(table) as *const f32);
        for h in r * t.heads..(r + 1) * t.heads {
            let at = h * t.size;
            head((g.at(at), y.at(at)), *inverse.at(h), out.at(at), tables, t.size);
        }
    });
}

#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn turn_back(a: __m512, b: __m512, cos: *const f32, sin: *const f32) -> (__m512, __m512) {
    let (c, s) = (_mm512_loadu_ps(cos), _mm512_loadu_ps(sin));
    let first = _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c));
    (first, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)))
}
