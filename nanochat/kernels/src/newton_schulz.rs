//! Newton-Schulz iterations for a stack of matrices: each one on one thread, small ones in that core's
//! cache.
//!
//! A thread keeps 2 (2 M^2 + M N) bytes of scratch memory for the largest.
//!
//! Legend: M, N = rows and columns of a matrix, M at most N.

use std::arch::x86_64::*;

use crate::blocks::{
    pack_pairs, pack_rows, round, transposed, widen, Left, Unit, View, BLOCK, STEP_LEN,
};
use crate::memory::{with_local, Shared};
use crate::team;

type Sums = [f32; BLOCK * BLOCK];

/// Replace each X of `stack` (`count`, M, N) by a X + (b G + c G G) X with G = X X^T, once for each
/// (a, b, c). G and the polynomial of it are rounded to bf16, and both are symmetric: one half is
/// computed.
///
/// # Safety
/// A `Unit` is there; M and N are multiples of 32, and the stack is of this size.
pub unsafe fn iterate(
    threads: usize,
    stack: Shared<u16>,
    count: usize,
    (rows, columns): (usize, usize),
    coefficients: &[[f32; 3]],
) {
    team::run(threads, count, &|index| unsafe {
        let unit = Unit::start();
        let x = stack.at(index * rows * columns);
        let (square, whole) = (rows * rows, rows * columns);
        with_local(2 * (2 * square + whole), |scratch| {
            let gram = scratch as *mut u16;
            let polynomial = gram.add(square);
            let packed = polynomial.add(square);
            for &[a, b, c] in coefficients {
                let of_x = View::new(x, rows, columns);
                symmetric(&unit, of_x, packed, |_| (), gram);
                let of_gram = View::new(gram, rows, rows);
                let bent = |block: Place<'_>| block.combine(b, gram, rows, c);
                symmetric(&unit, of_gram, packed, bent, polynomial);

                let (steps, panels) = (rows / BLOCK, columns / BLOCK);
                for panel in 0..panels {
                    pack_pairs(&of_x, panel * BLOCK, packed.add(panel * steps * STEP_LEN));
                }
                let mut sums: Sums = [0.0; BLOCK * BLOCK];
                for row in (0..rows).step_by(BLOCK) {
                    let left = Left::rows(polynomial.add(row * rows), rows);
                    for panel in 0..panels {
                        let right = packed.add(panel * steps * STEP_LEN);
                        unit.multiply(left, right, steps, sums.as_mut_ptr(), BLOCK, false);
                        let column = panel * BLOCK;
                        Place { sums: &mut sums, row, column }.combine(a, x, columns, 1.0);
                        write(&sums, x.add(row * columns + column), columns);
                    }
                }
            }
        });
    });
}

/// A block of sums and where it belongs.
struct Place<'a> {
    sums: &'a mut Sums,
    row: usize,
    column: usize,
}

impl Place<'_> {
    /// `share` of the same block of a matrix, plus `factor` times the sums.
    #[target_feature(enable = "avx512f")]
    unsafe fn combine(self, share: f32, matrix: *const u16, stride: usize, factor: f32) {
        let (share, factor) = (_mm512_set1_ps(share), _mm512_set1_ps(factor));
        for r in 0..BLOCK {
            let line = matrix.add((self.row + r) * stride + self.column);
            for half in 0..2 {
                let sum = self.sums.as_mut_ptr().add(r * BLOCK + 16 * half);
                let own = widen(_mm256_loadu_si256(line.add(16 * half) as *const __m256i));
                let scaled = _mm512_mul_ps(_mm512_loadu_ps(sum), factor);
                _mm512_storeu_ps(sum, _mm512_fmadd_ps(own, share, scaled));
            }
        }
    }
}

/// `out` (M, M) = what `then` makes of x x^T, symmetric as well.
unsafe fn symmetric(
    unit: &Unit,
    x: View,
    packed: *mut u16,
    then: impl Fn(Place<'_>),
    out: *mut u16,
) {
    let (size, steps) = (x.rows, x.columns / BLOCK);
    for panel in 0..size / BLOCK {
        pack_rows(&x, panel * BLOCK, packed.add(panel * steps * STEP_LEN));
    }
    let mut sums: Sums = [0.0; BLOCK * BLOCK];
    for row in (0..size).step_by(BLOCK) {
        let left = Left::rows(x.start.add(row * x.stride), x.stride);
        for column in (0..=row).step_by(BLOCK) {
            let right = packed.add(column * steps * BLOCK);
            unit.multiply(left, right, steps, sums.as_mut_ptr(), BLOCK, false);
            then(Place { sums: &mut sums, row, column });
            write(&sums, out.add(row * size + column), size);
            if column < row {
                write(&transposed(&sums), out.add(column * size + row), size);
            }
        }
    }
}

/// Round a block to bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn write(sums: &Sums, out: *mut u16, stride: usize) {
    for r in 0..BLOCK {
        let line = sums.as_ptr().add(r * BLOCK);
        let rounded = round(_mm512_loadu_ps(line), _mm512_loadu_ps(line.add(16)));
        _mm512_storeu_si512(out.add(r * stride) as *mut __m512i, rounded);
    }
}
