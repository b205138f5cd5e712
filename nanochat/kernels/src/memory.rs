//! Zeroed memory on cache-line boundaries, and pointers that threads may share.

use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout};
use std::cell::RefCell;

const ALIGNMENT: usize = 64;

/// Plain numbers on a cache-line boundary, zero at first. Large ones cost nothing until touched.
pub struct Buffer<T: Copy> {
    start: *mut T,
    len: usize,
}

unsafe impl<T: Copy + Send> Send for Buffer<T> {}
unsafe impl<T: Copy + Sync> Sync for Buffer<T> {}

impl<T: Copy> Buffer<T> {
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { start: std::ptr::NonNull::dangling().as_ptr(), len };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty; T is a number, for which zero bytes are a value.
        let start = unsafe { alloc_zeroed(layout) } as *mut T;
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Self { start, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::array::<T>(len).and_then(|l| l.align_to(ALIGNMENT)).expect("size overflows")
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
        if self.len > 0 {
            // SAFETY: allocated with this layout.
            unsafe { dealloc(self.start as *mut u8, Self::layout(self.len)) }
        }
    }
}

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
