//! Threads for kernels that work between the operations of another library.
//!
//! PyTorch keeps its threads spinning for a while after each of its operations. Threads of our own
//! would fight with them for the cores, so we borrow them: OpenMP's `GOMP_parallel` runs a function
//! on all threads of its team.

use std::ffi::{c_uint, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

type Entry = extern "C" fn(*mut c_void);
type Parallel = unsafe extern "C" fn(Entry, *mut c_void, c_uint, c_uint);

static PARALLEL: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Borrow threads with this `GOMP_parallel` from now on; null = start threads of our own.
pub fn borrow_from(parallel: *mut c_void) {
    PARALLEL.store(parallel, Ordering::Release);
}

struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    total: usize,
    next: AtomicUsize,
    panicked: AtomicBool,
}

impl Job<'_> {
    fn work(&self) {
        let run = || loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.total {
                break;
            }
            (self.task)(index);
        };
        if catch_unwind(AssertUnwindSafe(run)).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
    }
}

extern "C" fn enter(data: *mut c_void) {
    // SAFETY: `run` passes a job that outlives the team's work on it.
    unsafe { &*(data as *const Job) }.work();
}

/// Run `task(0)` ... `task(total - 1)`, in any order, on `num_threads` threads; returns when all
/// are done.
pub fn run(num_threads: usize, total: usize, task: &(dyn Fn(usize) + Sync)) {
    let num_threads = num_threads.min(total);
    let job = Job { task, total, next: AtomicUsize::new(0), panicked: AtomicBool::new(false) };
    let parallel = PARALLEL.load(Ordering::Acquire);
    if num_threads < 2 {
        job.work();
    } else if parallel.is_null() {
        std::thread::scope(|scope| {
            (1..num_threads).for_each(|_| drop(scope.spawn(|| job.work())));
            job.work();
        });
    } else {
        let data = &job as *const Job as *mut c_void;
        // SAFETY: the caller of `borrow_from` vouches for the function; it returns when every
        // thread has left `enter`.
        unsafe {
            let parallel = std::mem::transmute::<*mut c_void, Parallel>(parallel);
            parallel(enter, data, num_threads as c_uint, 0);
        }
    }
    assert!(!job.panicked.load(Ordering::Relaxed), "a task panicked");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for (threads, total) in [(1, 5), (3, 0), (3, 1), (4, 100)] {
            let counts: Vec<AtomicUsize> = (0..total).map(|_| AtomicUsize::new(0)).collect();
            run(threads, total, &|index| {
                counts[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    #[should_panic(expected = "a task panicked")]
    fn a_panic_reaches_the_caller() {
        run(2, 10, &|index| assert!(index != 3));
    }
}
