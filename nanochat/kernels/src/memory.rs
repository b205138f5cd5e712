//! Zeroed memory on cache-line boundaries, and pointers that threads may share.

use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout};
use std::cell::RefCell;

const ALIGNMENT: usize = 64;
/// A large page: one entry of the processor's table of addresses instead of 512.
const LARGE_PAGE: usize = 2 << 20;

/// Plain numbers on a cache-line boundary, zero at first. Large ones cost nothing until touched.
pub struct Buffer<T: Copy> {
    start: *mut T,
    len: usize,
    /// What was allocated: `start` lies behind it, on the boundary.
    base: *mut u8,
    layout: Layout,
}

unsafe impl<T: Copy + Send> Send for Buffer<T> {}
unsafe impl<T: Copy + Sync> Sync for Buffer<T> {}

impl<T: Copy> Buffer<T> {
    pub fn zeroed(len: usize) -> Self {
        Self::on_boundary(len, ALIGNMENT)
    }

    /// For what is read from its beginning to its end again and again: on large pages, if it
    /// fills some and the system has them. They are handed out whole, so not for what stays empty.
    pub fn dense(len: usize) -> Self {
        let num_bytes = len * std::mem::size_of::<T>();
        if num_bytes < 2 * LARGE_PAGE {
            return Self::zeroed(len);
        }
        let buffer = Self::on_boundary(len, LARGE_PAGE);
        advise_large_pages(buffer.start as *mut u8, num_bytes);
        buffer
    }

    fn on_boundary(len: usize, boundary: usize) -> Self {
        let num_bytes = len.checked_mul(std::mem::size_of::<T>()).expect("size overflows");
        // Asked for with the alignment of bytes: for a greater one every byte would be written,
        // instead of taken from the system as it is touched.
        let layout = Layout::array::<u8>(num_bytes + boundary).expect("size overflows");
        // SAFETY: the layout is not empty; T is a number, for which zero bytes are a value.
        let base = unsafe { alloc_zeroed(layout) };
        if base.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: at most `boundary` bytes further, which were asked for in addition.
        let start = unsafe { base.add(base.align_offset(boundary)) } as *mut T;
        Self { start, len, base, layout }
    }

    pub fn ptr(&self) -> *const T {
        self.start
    }

    pub fn mut_ptr(&mut self) -> *mut T {
        self.start
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Have room for at least `len` numbers; what was there is lost when it has to grow.
    pub fn reserve(&mut self, len: usize) {
        if len > self.len {
            *self = Self::zeroed(len.next_power_of_two());
        }
    }
}

impl<T: Copy> std::ops::Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: start and len describe an allocation of initialised numbers.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T: Copy> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and &mut self is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl<T: Copy> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base, self.layout) }
    }
}

#[cfg(target_os = "linux")]
fn advise_large_pages(start: *mut u8, num_bytes: usize) {
    extern "C" {
        fn madvise(start: *mut u8, num_bytes: usize, advice: i32) -> i32;
    }
    const HUGEPAGE: i32 = 14;
    // SAFETY: memory of ours; a system without large pages refuses, and all is as it was.
    let _ = unsafe { madvise(start, num_bytes / LARGE_PAGE * LARGE_PAGE, HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise_large_pages(_start: *mut u8, _num_bytes: usize) {}

/// A pointer that the tasks of one job share; each writes to places of its own.
#[derive(Clone, Copy)]
pub struct Shared<T>(*mut T);

unsafe impl<T> Send for Shared<T> {}
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn new(start: *mut T) -> Self {
        Self(start)
    }

    /// # Safety
    /// `offset` lies within the memory the pointer was made of.
    #[inline(always)]
    pub unsafe fn at(self, offset: usize) -> *mut T {
        self.0.add(offset)
    }
}

thread_local! {
    static LOCAL: RefCell<Buffer<u8>> = RefCell::new(Buffer::zeroed(0));
    static SHARED: RefCell<Buffer<u8>> = RefCell::new(Buffer::zeroed(0));
}

/// Scratch memory of this thread, kept from call to call; what is in it is left over from before.
pub fn with_local<R>(num_bytes: usize, use_it: impl FnOnce(*mut u8) -> R) -> R {
    LOCAL.with(|buffer| {
        let mut buffer = buffer.borrow_mut();
        buffer.reserve(num_bytes);
        use_it(buffer.mut_ptr())
    })
}

/// As `with_local`, for what the caller of a team shares with its tasks.
pub fn with_shared<T: Copy, R>(len: usize, use_it: impl FnOnce(*mut T) -> R) -> R {
    SHARED.with(|buffer| {
        let mut buffer = buffer.borrow_mut();
        buffer.reserve(len * std::mem::size_of::<T>());
        use_it(buffer.mut_ptr() as *mut T)
    })
}
