//! The decoding step of nanochat's model on a CPU: embedding, attention to remembered keys and
//! values, products with packed weights, logits. And kernels for training where there is
//! AMX or AVX-512 BF16:
//! `train_ffi` is their face.
//!
//! `nanochat.gpt.GPT` says what is computed and is the oracle in the tests. In decoding a result never
//! depends on what else is in the same step: each is one chain of operations in a fixed order.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod blocks;
#[cfg(target_arch = "x86_64")]
mod bytes;
#[cfg(target_arch = "x86_64")]
mod dot;
pub mod ffi;
#[cfg(target_arch = "x86_64")]
mod flash;
#[cfg(target_arch = "x86_64")]
mod head;
#[cfg(target_arch = "x86_64")]
mod int8;
mod isa;
#[cfg(target_arch = "x86_64")]
mod linear;
mod math;
mod matmul;
mod memory;
mod model;
#[cfg(target_arch = "x86_64")]
mod newton_schulz;
#[cfg(target_arch = "x86_64")]
mod operands;
mod options;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod past;
mod pool;
#[cfg(target_arch = "x86_64")]
mod rows;
mod sampling;
mod scratch;
mod stream;
#[cfg(target_arch = "x86_64")]
mod team;
#[cfg(target_arch = "x86_64")]
mod tiles;
#[cfg(target_arch = "x86_64")]
pub mod train_ffi;
#[cfg(target_arch = "x86_64")]
mod wide;
