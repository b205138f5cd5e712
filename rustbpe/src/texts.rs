//! A batch of texts, without copying them.

use crate::{Error, Result};

#[derive(Clone, Copy)]
pub enum Texts<'a> {
    /// One buffer; text i is `data[offsets[i]..offsets[i + 1]]`.
    Packed { data: &'a [u8], offsets: &'a [u64] },
    /// Wherever the texts happen to lie.
    Scattered { pieces: &'a [&'a [u8]] },
}

impl<'a> Texts<'a> {
    /// Texts in one buffer; the offsets must ascend and fit.
    pub fn new(data: &'a [u8], offsets: &'a [u64]) -> Result<Self> {
        let size = data.len() as u64;
        for (index, pair) in offsets.windows(2).enumerate() {
            if pair[0] > pair[1] || pair[1] > size {
                return Err(Error::new(format!(
                    "offsets {} and {} of piece {} do not fit a buffer of {} bytes",
                    pair[0], pair[1], index, size
                )));
            }
        }
        Ok(Texts::Packed { data, offsets })
    }

    pub fn len(&self) -> usize {
        match self {
            Texts::Packed { offsets, .. } => offsets.len().saturating_sub(1),
            Texts::Scattered { pieces } => pieces.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn num_bytes(&self) -> usize {
        (0..self.len()).map(|index| self.bytes(index).len()).sum()
    }

    pub fn bytes(&self, index: usize) -> &'a [u8] {
        match self {
            Texts::Packed { data, offsets } => {
                &data[offsets[index] as usize..offsets[index + 1] as usize]
            }
            Texts::Scattered { pieces } => pieces[index],
        }
    }

    pub fn text(&self, index: usize) -> Result<&'a str> {
        std::str::from_utf8(self.bytes(index))
            .map_err(|error| Error::new(format!("text {} is not UTF-8: {}", index, error)))
    }
}

/// Join pieces as `Texts::new` wants them.
pub fn pack<T: AsRef<[u8]>>(pieces: &[T]) -> (Vec<u8>, Vec<u64>) {
    let (mut data, mut offsets) = (Vec::new(), vec![0]);
    for piece in pieces {
        data.extend_from_slice(piece.as_ref());
        offsets.push(data.len() as u64);
    }
    (data, offsets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_outside_the_buffer_are_refused() {
        for offsets in [&[0, 4][..], &[2, 1], &[0, u64::MAX], &[u64::MAX, 0], &[0, 2, 1]] {
            assert!(Texts::new(b"abc", offsets).is_err());
        }
    }

    #[test]
    fn half_a_character_is_refused() {
        let texts = Texts::new("\u{e9}".as_bytes(), &[0, 1]).unwrap();
        assert!(texts.text(0).is_err());
    }
}
