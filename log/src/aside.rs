//! Work that may block, and where it is done: on a thread of its own, or in place in a simulation.
//!
//! Invariants:
//! - In the product such work never runs on an async worker.
//! - In place means: as one more task of the runtime that asks, on its thread. So one seed is one exact schedule.

use std::{cell::Cell, marker::PhantomData};

use tokio::task::JoinHandle;

/// Runs `work`, which may block, aside; must be called on a tokio runtime. Once begun it is not cancelled.
pub fn spawn_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    if works_in_place() {
        return tokio::spawn(async move { work() });
    }
    tokio::task::spawn_blocking(work)
}

/// The same for work that is waited for: what it returns. It begins now, and goes on if nobody waits for it any more; if it panics, so does
/// whoever waits.
pub fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T> + Send {
    let begun = spawn_blocking(work);
    async move {
        match begun.await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down; it will drop this future too.
                Err(_) => std::future::pending().await,
            },
        }
    }
}

/// Whether this thread does in place what others do on threads of their own.
pub fn works_in_place() -> bool {
    IN_PLACE.get()
}

/// While it lives, this thread does everything in place. For simulations, which have one thread and time of their own: what blocks there
/// stops everything.
#[derive(Debug)]
pub struct InPlace {
    /// It belongs to its thread.
    _thread: PhantomData<*const ()>,
}

impl InPlace {
    /// From now on, until it is dropped.
    pub fn begin() -> InPlace {
        IN_PLACE.set(true);
        InPlace { _thread: PhantomData }
    }
}

impl Drop for InPlace {
    fn drop(&mut self) {
        IN_PLACE.set(false);
    }
}

thread_local! {
    static IN_PLACE: Cell<bool> = const { Cell::new(false) };
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    async fn ran_here() -> bool {
        let here = thread::current().id();
        aside(move || thread::current().id() == here).await
    }

    /// The fear: work dies, and whoever waits for it takes that for an answer, or waits for ever.
    #[tokio::test]
    #[should_panic(expected = "of the work")]
    async fn a_panic_of_the_work_is_one_of_whoever_waits() {
        let work: fn() = || panic!("of the work");
        aside(work).await;
    }

    /// The fear: a simulation whose outcome depends on threads.
    #[tokio::test]
    async fn in_place_nothing_leaves_the_thread_and_otherwise_everything_does() {
        assert!(!ran_here().await);
        let in_place = InPlace::begin();
        assert!(ran_here().await);
        drop(in_place);
        assert!(!ran_here().await);
    }
}
