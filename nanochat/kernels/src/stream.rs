//! The residual stream, a token at a time: its first values, and its norms.

use crate::math::rms_norm;
use crate::matmul::Inputs;
use crate::memory::Shared;

crate::isa::versions! {
    fn embed(
        token: *const f32, before: *const f32, shift: f32, width: usize, out: *mut f32,
    ) = embed_body;
}

#[inline(always)]
unsafe fn embed_body(
    token: *const f32,
    before: *const f32,
    shift: f32,
    width: usize,
    out: *mut f32,
) {
    let out = std::slice::from_raw_parts_mut(out, width);
    rms_norm(std::slice::from_raw_parts(token, width), out);
    if !before.is_null() {
        let before = std::slice::from_raw_parts(before, width);
        let scale = crate::math::inverse_rms(before);
        let (first, second) = before.split_at(width / 2);
        for (o, &b) in out.iter_mut().zip(second.iter().chain(first)) {
            *o += shift * (b * scale);
        }
    }
}

crate::isa::versions! {
    /// Norm of token `from` of the residual stream, as row `to` of a product's inputs.
    fn norm_one(
        residual: Shared<f32>, out: Inputs, from: usize, to: usize, width: usize,
    ) = norm_one_body;
}

#[inline(always)]
unsafe fn norm_one_body(residual: Shared<f32>, out: Inputs, from: usize, to: usize, width: usize) {
    let x = std::slice::from_raw_parts(residual.at(from * width), width);
    match out {
        Inputs::F32(out) => {
            rms_norm(x, std::slice::from_raw_parts_mut(out.at(to * width), width));
        }
        Inputs::Bf16(out) => {
            rms_norm(x, std::slice::from_raw_parts_mut(out.at(to * width), width));
        }
        #[cfg(target_arch = "x86_64")]
        Inputs::Split(_) => unreachable!("split only for a product"),
    }
}

/// # Safety
/// Both have room for `len` numbers.
pub unsafe fn copy(from: Shared<f32>, to: Shared<f32>, len: usize) {
    std::ptr::copy_nonoverlapping(from.at(0), to.at(0), len);
}
