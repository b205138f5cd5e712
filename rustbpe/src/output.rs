//! One flat array written by several threads in the order of the texts.

use std::sync::{Condvar, Mutex, MutexGuard};

use crate::{Error, Result};

pub struct Output<'a> {
    rest: Mutex<Rest<'a>>,
    turn: Condvar,
}

/// What is not written yet, and whose turn it is.
struct Rest<'a> {
    ids: &'a mut [i32],
    ends: &'a mut [i64],
    written: usize,
    block: usize,
    error: Option<Error>,
}

impl<'a> Output<'a> {
    /// `offsets` has one more element than there are texts; the first becomes 0.
    pub fn new(ids: &'a mut [i32], offsets: &'a mut [i64]) -> Self {
        let ends = match offsets.split_first_mut() {
            Some((first, ends)) => {
                *first = 0;
                ends
            }
            None => &mut [],
        };
        let rest = Rest { ids, ends, written: 0, block: 0, error: None };
        Output { rest: Mutex::new(rest), turn: Condvar::new() }
    }

    /// Write the ids of a block of texts and their ends, counted within the block, once all
    /// blocks before it are written. False when some thread has failed.
    pub fn append(&self, block: usize, ids: &[u32], ends: &[usize]) -> bool {
        let mut rest = self.lock();
        while rest.block != block && rest.error.is_none() {
            rest = self.turn.wait(rest).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        if rest.error.is_some() {
            return false;
        }
        if ids.len() > rest.ids.len() || ends.len() > rest.ends.len() {
            let message = format!("no room for {} ids of {} texts", ids.len(), ends.len());
            rest.error = Some(Error::new(message));
            self.turn.notify_all();
            return false;
        }
        let (our_ids, ids_left) = std::mem::take(&mut rest.ids).split_at_mut(ids.len());
        let (our_ends, ends_left) = std::mem::take(&mut rest.ends).split_at_mut(ends.len());
        let written = rest.written;
        rest.ids = ids_left;
        rest.ends = ends_left;
        rest.written += ids.len();
        rest.block += 1;
        drop(rest);
        self.turn.notify_all();
        for (to, from) in our_ids.iter_mut().zip(ids) {
            *to = *from as i32;
        }
        for (to, from) in our_ends.iter_mut().zip(ends) {
            *to = (written + from) as i64;
        }
        true
    }

    /// Stop all threads.
    pub fn fail(&self, error: Error) {
        self.lock().error = Some(error);
        self.turn.notify_all();
    }

    /// The first error of any thread.
    pub fn result(&self) -> Result<()> {
        self.lock().error.clone().map_or(Ok(()), Err)
    }

    /// A value to hold while working: lets the others go when this thread panics.
    pub fn abort_on_panic(&self) -> AbortOnPanic<'_, 'a> {
        AbortOnPanic(self)
    }

    fn lock(&self) -> MutexGuard<'_, Rest<'a>> {
        self.rest.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

pub struct AbortOnPanic<'o, 'a>(&'o Output<'a>);

impl Drop for AbortOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(Error::new("another thread panicked"));
        }
    }
}
