//! The decoding step of nanochat's model on a CPU: embedding, attention to remembered keys and
//! values, products with packed weights, logits.
//!
//! `nanochat.gpt.GPT` says what is computed and is the oracle in the tests. Here a result never
//! depends on what else is in the same step: each is one chain of operations in a fixed order.

mod attention;
#[cfg(target_arch = "x86_64")]
mod dot;
pub mod ffi;
mod isa;
mod math;
mod matmul;
mod memory;
mod model;
mod pool;
mod sampling;
