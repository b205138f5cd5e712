//! Functions of 16 numbers at a time.

use std::arch::x86_64::*;

/// 2^x to about 3e-7 of its value, for x in [-126, 127]; as at the nearer end outside. Not a number
/// stays none: of two operands, minimum and maximum return the second if one of them is not.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_set1_ps(-126.0), _mm512_min_ps(_mm512_set1_ps(127.0), x));
    let n = _mm512_roundscale_ps::<0x08>(x);
    let r = _mm512_sub_ps(x, n);
    // Least squares of the relative error on [-1/2, 1/2].
    let mut p = _mm512_set1_ps(1.326_697e-3);
    for c in [9.675_46e-3, 5.550_742_6e-2, 2.402_212_2e-1, 6.931_469_4e-1, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// e^x to about 1e-6 of its value for x below 10 in size, to 1e-5 for all in [-87, 88].
#[inline]
#[target_feature(enable = "avx512f")]
pub fn exp(x: __m512) -> __m512 {
    exp2(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)))
}

/// tanh x to about 4e-7.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn tanh(x: __m512) -> __m512 {
    // 1 - 2 / (e^2x + 1); the estimate of the quotient is made exact to rounding by one step.
    let one = _mm512_set1_ps(1.0);
    let power = exp2(_mm512_mul_ps(x, _mm512_set1_ps(2.0 * std::f32::consts::LOG2_E)));
    let below = _mm512_add_ps(power, one);
    let guess = _mm512_rcp14_ps(below);
    let inverse = _mm512_mul_ps(guess, _mm512_fnmadd_ps(below, guess, _mm512_set1_ps(2.0)));
    _mm512_fnmadd_ps(inverse, _mm512_set1_ps(2.0), one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_number_stays_none() {
        if !std::arch::is_x86_feature_detected!("avx512f") {
            return;
        }
        // SAFETY: the processor has AVX-512.
        unsafe {
            let nan = _mm512_set1_ps(f32::NAN);
            assert!(_mm512_cvtss_f32(exp(nan)).is_nan());
            assert!(_mm512_cvtss_f32(tanh(nan)).is_nan());
        }
    }

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
            let allowed = 4e-7 + 1.2e-7 * x.abs() as f64;
            assert!((out[0] as f64 - exact).abs() <= allowed * exact + 1e-37, "{x}");
            assert!((out[16] as f64 - (x as f64).tanh()).abs() < 4e-7, "{x}");
        }
    }
}
