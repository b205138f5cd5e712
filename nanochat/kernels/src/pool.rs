//! Threads that share the tasks of one job after another.
//!
//! Tasks are claimed one by one, so a thread that the system has put aside holds nothing up but
//! the task it had claimed: the caller works through the rest alone.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

type Task<'a> = &'a (dyn Fn(usize) + Sync);

/// Spinning ends after this long: about the pause between two steps, in which Python samples.
const SPIN: Duration = Duration::from_micros(200);
const FIELD_BITS: u32 = 20;
const FIELD: u64 = (1 << FIELD_BITS) - 1;

/// The job in one word: number of the job, of its tasks, and of the next task to claim.
fn word(job: u64, total: usize, next: usize) -> u64 {
    (job << (2 * FIELD_BITS)) | ((total as u64) << FIELD_BITS) | next as u64
}

fn total_of(state: u64) -> usize {
    ((state >> FIELD_BITS) & FIELD) as usize
}

fn next_of(state: u64) -> usize {
    (state & FIELD) as usize
}

struct Inner {
    state: AtomicU64,
    num_done: AtomicUsize,
    num_asleep: AtomicUsize,
    panicked: AtomicBool,
    is_closed: AtomicBool,
    task: UnsafeCell<Option<Task<'static>>>,
}

// SAFETY: `task` is written only while no task of a job is claimed or claimable.
unsafe impl Sync for Inner {}

impl Inner {
    /// Claim a task of the current job; None when all are claimed.
    fn claim(&self) -> Option<usize> {
        let mut state = self.state.load(Ordering::Acquire);
        while next_of(state) < total_of(state) {
            // The whole word is compared, so a claim never falls into another job.
            match self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(next_of(state)),
                Err(seen) => state = seen,
            }
        }
        None
    }

    fn work(&self) {
        while let Some(index) = self.claim() {
            // SAFETY: the job can not end before the claimed task is done.
            let task = unsafe { (*self.task.get()).expect("a job has a task") };
            let run = std::panic::AssertUnwindSafe(|| task(index));
            if std::panic::catch_unwind(run).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.num_done.fetch_add(1, Ordering::Release);
        }
    }

    /// A worker's life: work, look for more for a while, sleep.
    fn serve(&self) {
        let mut idle_since = Instant::now();
        let mut looks = 0u32;
        while !self.is_closed.load(Ordering::Acquire) {
            let state = self.state.load(Ordering::Acquire);
            if next_of(state) < total_of(state) {
                self.work();
                idle_since = Instant::now();
                continue;
            }
            looks = looks.wrapping_add(1);
            if !looks.is_multiple_of(64) || idle_since.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            self.num_asleep.fetch_add(1, Ordering::SeqCst);
            // A job that began before the line above has not seen this sleeper: look once more.
            if self.state.load(Ordering::SeqCst) == state && !self.is_closed.load(Ordering::SeqCst)
            {
                thread::park();
            }
            self.num_asleep.fetch_sub(1, Ordering::SeqCst);
            idle_since = Instant::now();
        }
    }
}

pub struct Pool {
    inner: Arc<Inner>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
    job: u64,
}

impl Pool {
    /// `num_threads` counts the calling thread.
    pub fn new(num_threads: usize) -> Self {
        let inner = Arc::new(Inner {
            state: AtomicU64::new(0),
            num_done: AtomicUsize::new(0),
            num_asleep: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            task: UnsafeCell::new(None),
        });
        let workers = (1..num_threads)
            .filter_map(|_| {
                let inner = inner.clone();
                thread::Builder::new().spawn(move || inner.serve()).ok()
            })
            .map(|handle| (handle.thread().clone(), Some(handle)))
            .collect();
        Self { inner, workers, job: 0 }
    }

    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Run `task(0)` ... `task(total - 1)`, in any order; returns when all are done.
    pub fn run(&mut self, total: usize, task: Task) {
        if self.workers.is_empty() || total < 2 {
            (0..total).for_each(task);
            return;
        }
        assert!(total as u64 <= FIELD, "too many tasks");
        let inner = &self.inner;
        // SAFETY: all tasks of the last job are done; the borrow outlives this call, in which
        // every task of this job ends.
        unsafe {
            *inner.task.get() = Some(std::mem::transmute::<Task<'_>, Task<'static>>(task));
        }
        self.job += 1;
        inner.num_done.store(0, Ordering::Relaxed);
        inner.state.store(word(self.job, total, 0), Ordering::SeqCst);
        if inner.num_asleep.load(Ordering::SeqCst) > 0 {
            self.workers.iter().for_each(|(thread, _)| thread.unpark());
        }
        inner.work();
        let mut looks = 0u32;
        while inner.num_done.load(Ordering::Acquire) < total {
            looks += 1;
            // The one we wait for may need this very core.
            if looks.is_multiple_of(1024) {
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
        assert!(!inner.panicked.swap(false, Ordering::Relaxed), "a task panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.inner.is_closed.store(true, Ordering::SeqCst);
        for (thread, handle) in &mut self.workers {
            thread.unpark();
            if let Some(handle) = handle.take() {
                // A worker's panics are caught in `work`; there is nothing left to report.
                let _ = handle.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_many_jobs() {
        let mut pool = Pool::new(4);
        for total in (0..300).chain([5000]) {
            let counts: Vec<AtomicUsize> = (0..total).map(|_| AtomicUsize::new(0)).collect();
            pool.run(total, &|index| {
                counts[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let mut pool = Pool::new(2);
        thread::sleep(3 * SPIN);
        let done = AtomicUsize::new(0);
        pool.run(100, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 100);
    }

    #[test]
    #[should_panic(expected = "a task panicked")]
    fn a_panic_reaches_the_caller() {
        Pool::new(2).run(10, &|index| assert!(index != 3));
    }
}
