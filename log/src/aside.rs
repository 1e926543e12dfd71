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
        spawn_blocking(move || thread::current().id() == here).await.unwrap()
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
