//! Byte pair encoding in three steps: split text into chunks, learn merges, encode with them.
//!
//! Python talks to the functions of `ffi`; everything else is ordinary safe-to-call Rust. The
//! readable specification of every step is `reference.py`, and the tests compare the two.

mod blocks;
mod boundary;
pub mod cache;
pub mod count;
pub mod encode;
pub mod ffi;
pub mod key;
pub mod memory;
pub mod merge;
pub mod output;
pub mod parallel;
pub mod split;
pub mod texts;
pub mod train;
pub mod unicode;

/// Why a call was refused; the text reaches the Python user as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(pub String);

impl Error {
    pub fn new(message: impl Into<String>) -> Self {
        Error(message.into())
    }
}

pub type Result<T> = std::result::Result<T, Error>;
