//! Numbers: bf16, exponentials, norms. Each result depends on its own inputs alone, in one order.

pub const LANES: usize = 16;
const NORM_EPS: f32 = f32::EPSILON;

#[inline(always)]
pub fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    // To nearest, ties to even; what we round is finite.
    ((bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16) as u16
}

#[inline(always)]
pub fn from_bf16(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}

/// A number as activations, keys and values are kept.
pub trait Number: Copy + Default + Send + Sync + 'static {
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

/// Brain float, as its bits.
impl Number for u16 {
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        to_bf16(x)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        from_bf16(self)
    }
}

const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer

/// The integer nearest to a number below 2^22, ties to even.
#[inline(always)]
pub fn nearest(x: f32) -> f32 {
    (x + ROUND) - ROUND
}

/// e^x to about 1e-7 of its value, for x in [-87, 88]; of what is no number, no number.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = larger(-87.0, x);
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    // ln 2 in two parts, so that the remainder is exact.
    let r = n.mul_add(-0.693_359_4, x);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.388_888_9e-3;
    for c in [8.333_334e-3, 4.166_666_8e-2, 0.166_666_67, 0.5, 1.0, 1.0] {
        p = f32::mul_add(p, r, c);
    }
    // The low bits of `rounded` are the integer itself; a cast would be done number by number.
    p * f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23))
}

/// cap tanh(x / cap).
#[inline(always)]
pub fn softcap(x: f32, cap: f32) -> f32 {
    // tanh is 1 in fp32 beyond 9.02.
    let a = (x / cap).clamp(-9.1, 9.1);
    // tanh of a small number is close to it, and 1 - 2 / (e^2a + 1) would lose its digits.
    let square = a * a;
    let small = (square * 0.133_333_33 - 0.333_333_33).mul_add(square * a, a);
    let large = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    cap * if a.abs() >= 0.02 { large } else { small }
}

#[inline(always)]
pub fn sum(lanes: [f32; LANES]) -> f32 {
    let mut part = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            part[i] += part[i + width];
        }
        width /= 2;
    }
    part[0]
}

/// The larger one; `b` if one of them is not a number, so that `larger(0.0, x)` hides no NaN, which
/// `f32::max` does. One instruction.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if a > b {
        a
    } else {
        b
    }
}

#[inline(always)]
pub fn largest(lanes: [f32; LANES]) -> f32 {
    let mut part = lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            part[i] = larger(part[i], part[i + width]);
        }
        width /= 2;
    }
    part[0]
}

/// 1 / root mean square of `x`.
#[inline(always)]
pub fn inverse_rms(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    for (i, &v) in chunks.remainder().iter().enumerate() {
        lanes[i] = v * v;
    }
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = chunk[i].mul_add(chunk[i], lanes[i]);
        }
    }
    1.0 / (sum(lanes) / x.len() as f32 + NORM_EPS).sqrt()
}

/// `out` = `x` scaled to unit root mean square.
#[inline(always)]
pub fn rms_norm<E: Number>(x: &[f32], out: &mut [E]) {
    let scale = inverse_rms(x);
    for (o, &v) in out.iter_mut().zip(x) {
        *o = E::from_f32(v * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_softcap_are_close() {
        for i in -8700..880 {
            let x = i as f32 / 100.0;
            let exact = (x as f64).exp();
            assert!(((exp(x) as f64 - exact) / exact).abs() < 3e-7, "{x}");
        }
        for i in -40000..40000 {
            let x = i as f32 / 200.0;
            let exact = 15.0 * (x as f64 / 15.0).tanh();
            assert!((softcap(x, 15.0) as f64 - exact).abs() < 5e-6, "{x}");
        }
    }

    #[test]
    fn what_is_no_number_stays_so() {
        for x in [f32::NAN, -f32::NAN] {
            assert!(exp(x).is_nan() && softcap(x, 15.0).is_nan());
            assert!(larger(0.0, x).is_nan() && from_bf16(to_bf16(x)).is_nan());
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for (x, bits) in [(1.0, 0x3f80), (1.003_906_3, 0x3f80), (1.011_718_8, 0x3f82)] {
            assert_eq!(to_bf16(x), bits);
        }
        assert_eq!(from_bf16(0x3f80), 1.0);
    }
}
