//! Short chunks as two machine words, so that comparing and hashing one costs a few instructions.

/// Up to 15 bytes, padded with zeros, and the length in the topmost byte.
#[derive(Clone, Copy, Eq, Default)]
pub struct Key {
    pub low: u64,
    pub high: u64,
}

impl PartialEq for Key {
    /// Both words at once: two comparisons would be two branches to predict.
    #[inline(always)]
    fn eq(&self, other: &Key) -> bool {
        (self.low ^ other.low) | (self.high ^ other.high) == 0
    }
}

impl Key {
    pub const LONGEST: usize = 15;

    /// Key of `text[start..start + len]`; `len` is 1 to 15 and inside the text.
    #[inline(always)]
    pub fn of(text: &[u8], start: usize, len: usize) -> Key {
        debug_assert!(len > 0 && len <= Self::LONGEST && start + len <= text.len());
        let (low, high) = match text.get(start..start + 16) {
            Some(bytes) => (word(bytes, 0), word(bytes, 8)),
            None => {
                let mut bytes = [0; 16];
                bytes[..len].copy_from_slice(&text[start..start + len]);
                (word(&bytes, 0), word(&bytes, 8))
            }
        };
        let [low_mask, high_mask] = MASKS[len & 15];
        Key { low: low & low_mask, high: high & high_mask | (len as u64) << 56 }
    }

    pub fn len(self) -> usize {
        (self.high >> 56) as usize
    }

    pub fn is_empty(self) -> bool {
        self.high == 0
    }

    /// The bytes, and how many of the array they are.
    pub fn bytes(self) -> ([u8; 16], usize) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.low.to_le_bytes());
        bytes[8..].copy_from_slice(&self.high.to_le_bytes());
        (bytes, self.len())
    }

    /// Well mixed in the upper bits; take those.
    #[inline(always)]
    pub fn hash(self) -> u64 {
        // one wide multiplication, both halves folded together (the idea of wyhash)
        let product = u128::from(self.low ^ 0xA076_1D64_78BD_642F)
            * u128::from(self.high ^ 0xE703_7ED1_A0B4_28DB);
        (product >> 64) as u64 ^ product as u64
    }
}

#[inline(always)]
fn word(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

/// For every length the bits of its bytes in the two words.
static MASKS: [[u64; 2]; 16] = masks();

const fn masks() -> [[u64; 2]; 16] {
    let mut masks = [[0; 2]; 16];
    let mut len = 0;
    while len < 16 {
        let mut byte = 0;
        while byte < len {
            masks[len][byte / 8] |= 0xFF << (byte % 8 * 8);
            byte += 1;
        }
        len += 1;
    }
    masks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_wherever_the_chunk_lies() {
        let text: Vec<u8> = (0..40).collect();
        for start in 0..40 {
            for len in 1..=15.min(40 - start) {
                let key = Key::of(&text, start, len);
                let (bytes, found) = key.bytes();
                assert_eq!(&bytes[..found], &text[start..start + len]);
                assert!(key == Key::of(&bytes[..found], 0, len));
            }
        }
    }

    #[test]
    fn zeros_at_the_end_count() {
        assert!(Key::of(b"a\0", 0, 2) != Key::of(b"a\0", 0, 1));
    }
}
