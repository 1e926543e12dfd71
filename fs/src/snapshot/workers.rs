//! Threads that work on blocks while one thread gathers their input and output in order.
//!
//! Invariants:
//! - Results come back in the order in which jobs were submitted.
//! - At most `threads + 2` jobs are anywhere between submission and result.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::Scope,
};

use parking_lot::Mutex;

/// Worker threads of one scope. They end when this is dropped.
pub(super) struct Workers<I, O> {
    jobs: SyncSender<(I, SyncSender<O>)>,
    waiting: VecDeque<Receiver<O>>,
    limit: usize,
}

impl<I: Send, O: Send> Workers<I, O> {
    /// Starts a thread for each of `works`.
    pub(super) fn start<'scope, W>(
        scope: &'scope Scope<'scope, '_>,
        works: impl ExactSizeIterator<Item = W>,
    ) -> Workers<I, O>
    where
        I: 'scope,
        O: 'scope,
        W: FnMut(I) -> O + Send + 'scope,
    {
        let limit = works.len() + 2;
        let (jobs, queue) = sync_channel::<(I, SyncSender<O>)>(limit);
        let queue = Arc::new(Mutex::new(queue));
        for mut work in works {
            let queue = Arc::clone(&queue);
            scope.spawn(move || {
                loop {
                    let job = queue.lock().recv();
                    let Ok((input, result)) = job else { break };
                    // Nobody takes the result when the other side has stopped at an error.
                    drop(result.send(work(input)));
                }
            });
        }
        Workers { jobs, waiting: VecDeque::with_capacity(limit), limit }
    }

    /// Hands a job over. `None` if there was room, otherwise the oldest result, for which this waited.
    pub(super) fn submit(&mut self, input: I) -> Option<O> {
        let oldest = if self.waiting.len() >= self.limit { self.next() } else { None };
        let (result, receiver) = sync_channel(1);
        self.jobs.send((input, result)).expect("workers live as long as their queue");
        self.waiting.push_back(receiver);
        oldest
    }

    /// Waits for the oldest result. `None` if no job is left.
    pub(super) fn next(&mut self) -> Option<O> {
        let oldest = self.waiting.pop_front()?;
        Some(oldest.recv().expect("a worker answers every job"))
    }
}
