//! Who may still change something at a process that is about to end.
//!
//! Invariants:
//! - Once it is closed nobody comes in any more; whoever came in before is waited for by who has closed it.
//! - It stays closed.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Counts orders that are being followed, until it is closed.
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    inside: usize,
    is_closed: bool,
}

/// An order that is being followed. It is over when this is dropped, a panic included.
pub(super) struct Inside<'a>(&'a Gate);

impl Gate {
    /// Lets an order in, unless it is closed.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.state();
        if state.is_closed {
            return None;
        }
        state.inside += 1;
        Some(Inside(self))
    }

    /// Closes it if nobody is inside; whether it is closed.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut state = self.state();
        state.is_closed |= state.inside == 0;
        state.is_closed
    }

    /// Closes it and waits for those inside, so long at most; how many are left. Blocks.
    pub(super) fn close(&self, longest: Duration) -> usize {
        let mut state = self.state();
        state.is_closed = true;
        let waited = self.left.wait_timeout_while(state, longest, |state| state.inside > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.inside
    }

    /// Whether nobody is let in any more.
    pub(super) fn is_closed(&self) -> bool {
        self.state().is_closed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A count and a flag are whole after every operation on them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.state().inside -= 1;
        self.0.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: an order that was accepted just before the end meets a volume that is closed, or one that came after is followed by nobody.
    #[test]
    fn whoever_is_inside_is_waited_for_and_nobody_comes_in_after() {
        let gate = Gate::default();
        let inside = gate.enter().expect("it is open");
        assert!(!gate.close_if_empty() && !gate.is_closed());
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close(Duration::from_secs(60)));
            while !gate.is_closed() {
                std::thread::yield_now();
            }
            assert!(gate.enter().is_none());
            assert!(!closing.is_finished(), "one is inside");
            drop(inside);
            assert_eq!(closing.join().unwrap(), 0);
        });
        assert!(gate.close_if_empty() && gate.enter().is_none());
    }

    /// The fear: an order that never comes to its end keeps the process from ending.
    #[test]
    fn whoever_stays_inside_is_not_waited_for_for_ever() {
        let gate = Gate::default();
        let _inside = gate.enter();
        assert_eq!(gate.close(Duration::from_millis(1)), 1);
        assert!(gate.is_closed());
    }
}
