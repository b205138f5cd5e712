//! Large tables in large pages: a table of 16 MB that is read at random would otherwise cost a
//! walk through the page table at almost every access.

/// Below this, large pages are not worth asking for.
const LARGE: usize = 1 << 21;

/// An empty vector with room for `capacity` values, in large pages if there is enough of it.
pub fn with_capacity<T>(capacity: usize) -> Vec<T> {
    let vector = Vec::with_capacity(capacity);
    advise(vector.as_ptr() as usize, capacity * std::mem::size_of::<T>());
    vector
}

/// `len` times the same value.
pub fn filled<T: Copy>(value: T, len: usize) -> Vec<T> {
    let mut vector = with_capacity(len);
    vector.resize(len, value);
    vector
}

#[cfg(target_os = "linux")]
fn advise(address: usize, num_bytes: usize) {
    extern "C" {
        fn madvise(address: usize, length: usize, advice: i32) -> i32;
    }
    const HUGE_PAGE: i32 = 14;
    const PAGE: usize = 4096;
    if num_bytes >= LARGE {
        let begin = (address + PAGE - 1) & !(PAGE - 1);
        let length = (address + num_bytes - begin) & !(PAGE - 1);
        // SAFETY: whole pages inside an allocation of ours; the contents stay as they are, and a
        // refusal (no such pages configured) changes nothing.
        unsafe {
            madvise(begin, length, HUGE_PAGE);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_address: usize, num_bytes: usize) {
    let _ = num_bytes >= LARGE;
}

/// Ask for the cache line of an element that is needed soon.
#[inline(always)]
pub fn prefetch<T>(table: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing, and any address is allowed.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(table.as_ptr().wrapping_add(index).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (table, index);
}
