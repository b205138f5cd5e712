//! Activations of a step, whose memory is kept from one to the next.

use crate::matmul::Inputs;
use crate::memory::{Buffer, Shared};

/// Activations of a step, kept from one to the next.
#[derive(Default)]
pub struct Scratch {
    pub residual: Option<Buffer<f32>>,
    pub projected: Option<Buffer<f32>>,
    pub normed: Activations,
    pub mixed: Activations,
    pub inner: Activations,
    /// Of a gated MLP, before the gate.
    pub gated: Option<Buffer<f32>>,
    /// The embeddings, for the blocks that mix them in.
    pub first: Option<Buffer<f32>>,
    pub middle: Option<Buffer<f32>>,
    #[cfg(target_arch = "x86_64")]
    pub split: SplitRoom,
}

/// A product's inputs as bytes.
#[cfg(target_arch = "x86_64")]
#[derive(Default)]
pub struct SplitRoom {
    pub bytes: Option<Buffer<u8>>,
    pub scales: Option<Buffer<f32>>,
}

/// A product's inputs, in whichever precision it reads.
#[derive(Default)]
pub struct Activations {
    single: Option<Buffer<f32>>,
    brain: Option<Buffer<u16>>,
}

impl Activations {
    pub fn reserve(&mut self, len: usize, is_bf16: bool) -> Inputs {
        if is_bf16 {
            Inputs::Bf16(Shared::new(room(&mut self.brain, len)))
        } else {
            Inputs::F32(Shared::new(room(&mut self.single, len)))
        }
    }
}

pub fn room<T: Copy>(buffer: &mut Option<Buffer<T>>, len: usize) -> *mut T {
    let buffer = buffer.get_or_insert_with(|| Buffer::zeroed(0));
    buffer.reserve(len);
    buffer.mut_ptr()
}
