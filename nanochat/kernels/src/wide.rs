//! Functions of 16 numbers at a time.

use std::arch::x86_64::*;

/// e^x to about 2e-7 of its value, for x in [-87, 88]; as at the nearer end outside.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn exp(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0)), _mm512_set1_ps(-87.0));
    let n =
        _mm512_roundscale_ps::<0x08>(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, so that the remainder is exact.
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693_359_4), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.121_944_4e-4), r);
    let mut p = _mm512_set1_ps(1.388_888_9e-3);
    for c in [8.333_334e-3, 4.166_666_8e-2, 0.166_666_67, 0.5, 1.0, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// tanh x to about 2e-7.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn tanh(x: __m512) -> __m512 {
    // 1 - 2 / (e^2x + 1); the estimate of the quotient is made exact to rounding by one step.
    let one = _mm512_set1_ps(1.0);
    let below = _mm512_add_ps(exp(_mm512_add_ps(x, x)), one);
    let guess = _mm512_rcp14_ps(below);
    let inverse = _mm512_mul_ps(guess, _mm512_fnmadd_ps(below, guess, _mm512_set1_ps(2.0)));
    _mm512_fnmadd_ps(inverse, _mm512_set1_ps(2.0), one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_tanh_are_close() {
        if !std::arch::is_x86_feature_detected!("avx512f") {
            return;
        }
        for i in -8700..880 {
            let x = i as f32 / 100.0;
            let mut out = [0.0f32; 32];
            // SAFETY: the processor has AVX-512.
            unsafe {
                let vector = _mm512_set1_ps(x);
                _mm512_storeu_ps(out.as_mut_ptr(), exp(vector));
                _mm512_storeu_ps(out.as_mut_ptr().add(16), tanh(vector));
            }
            let exact = (x as f64).exp();
            assert!((out[0] as f64 - exact).abs() <= 3e-7 * exact + 1e-37, "{x}");
            assert!((out[16] as f64 - (x as f64).tanh()).abs() < 3e-7, "{x}");
        }
    }
}
