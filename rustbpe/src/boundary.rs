//! What every function of the C ABI does on its way in and out: check pointers, look objects up,
//! turn errors and panics into a status.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::texts::Texts;
use crate::{Error, Result};

pub const OK: i32 = 0;
pub const MORE: i32 = 1;
pub const REFUSED: i32 = -1;
pub const PANICKED: i32 = -2;
thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

type Object = Arc<dyn Any + Send + Sync>;
static NEXT_HANDLE: AtomicU64 = AtomicU64::new(1);
static OBJECTS: Mutex<Option<HashMap<u64, Object>>> = Mutex::new(None);

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

pub fn store(object: Object) -> u64 {
    let handle = NEXT_HANDLE.fetch_add(1, Ordering::Relaxed);
    lock(&OBJECTS).get_or_insert_with(HashMap::new).insert(handle, object);
    handle
}

pub fn find<T: Any + Send + Sync>(handle: u64) -> Result<Arc<T>> {
    let object = lock(&OBJECTS).as_ref().and_then(|objects| objects.get(&handle).cloned());
    let typed = object.and_then(|object| object.downcast::<T>().ok());
    typed.ok_or_else(|| Error::new(format!("handle {} is unknown or of another kind", handle)))
}

/// Run `work`; keep the text of an error or a panic for `rbpe_last_error`.
pub fn guard(work: impl FnOnce() -> Result<i32>) -> i32 {
    let (status, message) = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(status)) => return status,
        Ok(Err(error)) => (REFUSED, error.0),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            (PANICKED, format!("panic in the Rust core: {}", text.unwrap_or("no message")))
        }
    };
    LAST_ERROR.with(|last| *last.borrow_mut() = message);
    status
}

/// # Safety
/// `data` is null or points to `len` readable values.
pub unsafe fn slice<'a, T>(data: *const T, len: usize, what: &str) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    check(data, len, what)?;
    Ok(std::slice::from_raw_parts(data, len))
}

/// # Safety
/// `data` is null or points to `len` writable values that nobody else uses.
pub unsafe fn slice_mut<'a, T>(data: *mut T, len: usize, what: &str) -> Result<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    check(data, len, what)?;
    Ok(std::slice::from_raw_parts_mut(data, len))
}

fn check<T>(data: *const T, len: usize, what: &str) -> Result<()> {
    if data.is_null() {
        return Err(Error::new(format!("{} is null but has length {}", what, len)));
    }
    let fits =
        len.checked_mul(std::mem::size_of::<T>()).map_or(false, |n| n <= isize::MAX as usize);
    if !fits || data as usize % std::mem::align_of::<T>() != 0 {
        return Err(Error::new(format!("{} is misaligned or too long ({})", what, len)));
    }
    Ok(())
}

/// The texts at some addresses.
///
/// # Safety
/// As `slice`, for both pointers and for each of the addresses with its length.
pub unsafe fn gather<'a>(
    addresses: *const *const u8,
    lengths: *const usize,
    num_texts: usize,
) -> Result<Vec<&'a [u8]>> {
    let addresses = slice(addresses, num_texts, "addresses")?;
    let lengths = slice(lengths, num_texts, "lengths")?;
    addresses.iter().zip(lengths).map(|(address, len)| slice(*address, *len, "a text")).collect()
}

/// # Safety
/// As `slice`, for both pointers.
pub unsafe fn texts<'a>(
    data: *const u8,
    len: usize,
    offsets: *const u64,
    num_texts: usize,
) -> Result<Texts<'a>> {
    Texts::new(slice(data, len, "data")?, slice(offsets, num_offsets(num_texts)?, "offsets")?)
}

pub fn num_offsets(num_pieces: usize) -> Result<usize> {
    num_pieces.checked_add(1).ok_or_else(|| Error::new("too many pieces"))
}

/// The last error text of this thread.
pub fn with_last_error<T>(read: impl FnOnce(&str) -> T) -> T {
    LAST_ERROR.with(|last| read(&last.borrow()))
}

/// Forget an object; false if there was none.
pub fn remove(handle: u64) -> bool {
    let removed = lock(&OBJECTS).as_mut().and_then(|objects| objects.remove(&handle));
    removed.is_some()
}
