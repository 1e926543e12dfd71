//! The durability watch: how everybody learns how far the log is durable, and that it has ended.
//!
//! Invariants:
//! - The durable position never goes back. A terminal value is the last one; the state in it stays what is known durable.
//! - Waiters are woken by the writer's publication, whether they wait in async code or on a thread.

use std::{sync::Arc, time::Duration};

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use crate::{Epoch, Lsn, State};

/// How far a log is durable, and whether it has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Durable {
    /// The last state that is durable.
    pub state: State,
    /// Why nothing later will become durable; `None` while the log works.
    pub terminal: Option<Terminal>,
}

/// Why a log has ended for this process: drop everything above durable and open it anew.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Terminal {
    /// Another source has taken over.
    #[error("the log was taken over by epoch {by}")]
    Fenced {
        /// The epoch of that source.
        by: Epoch,
    },
    /// A write or sync failed; what the medium holds above durable is not known to anybody.
    #[error("the log is poisoned: {message}")]
    Poisoned {
        /// What failed.
        message: Arc<str>,
    },
    /// The outcome of an append cannot be found out from here.
    #[error("the end of the log is unknown: {message}")]
    Unknown {
        /// What failed.
        message: Arc<str>,
    },
}

/// Follows how far a log is durable. Cheap to clone.
#[derive(Clone, Debug)]
pub struct DurableWatch {
    receiver: watch::Receiver<Durable>,
    shared: Arc<Shared>,
}

impl DurableWatch {
    /// What is known now.
    pub fn current(&self) -> Durable {
        self.receiver.borrow().clone()
    }

    /// The last durable state.
    pub fn state(&self) -> State {
        self.receiver.borrow().state
    }

    /// Waits until `lsn` is durable. Cancel safe.
    pub async fn wait_for(&self, lsn: Lsn) -> Result<State, WaitError> {
        let mut receiver = self.receiver.clone();
        let reached = receiver.wait_for(|now| reached(now, lsn) || now.terminal.is_some()).await;
        outcome(&*reached.map_err(|_| WaitError::Closed)?, lsn)
    }

    /// Waits until something changes after the last call on this watch; for followers that take whatever is there.
    /// Cancel safe.
    pub async fn changed(&mut self) -> Result<Durable, WaitError> {
        self.receiver.changed().await.map_err(|_| WaitError::Closed)?;
        Ok(self.receiver.borrow_and_update().clone())
    }

    /// Waits on this thread until `lsn` is durable, at most `timeout`.
    pub fn wait_blocking(&self, lsn: Lsn, timeout: Duration) -> Result<State, WaitError> {
        let mut closed = self.shared.closed.lock();
        let pending = |closed: &mut bool| {
            let now = self.receiver.borrow();
            !*closed && !reached(&now, lsn) && now.terminal.is_none()
        };
        self.shared.changed.wait_while_for(&mut closed, pending, timeout);
        let now = self.current();
        match outcome(&now, lsn) {
            Err(WaitError::TimedOut { .. }) if *closed => Err(WaitError::Closed),
            outcome => outcome,
        }
    }
}

/// The writing end of a watch.
#[derive(Debug)]
pub(crate) struct Publisher {
    sender: watch::Sender<Durable>,
    shared: Arc<Shared>,
}

impl Publisher {
    pub(crate) fn new(state: State) -> Publisher {
        let (sender, _) = watch::channel(Durable { state, terminal: None });
        Publisher { sender, shared: Arc::default() }
    }

    pub(crate) fn watch(&self) -> DurableWatch {
        DurableWatch { receiver: self.sender.subscribe(), shared: Arc::clone(&self.shared) }
    }

    pub(crate) fn current(&self) -> Durable {
        self.sender.borrow().clone()
    }

    pub(crate) fn state(&self) -> State {
        self.sender.borrow().state
    }

    /// Publishes a later durable state, unless the log has ended.
    pub(crate) fn advance(&self, state: State) {
        self.publish(|now| {
            if now.terminal.is_none() {
                now.state = state;
            }
        });
    }

    /// Publishes the end; the first one stands.
    pub(crate) fn end(&self, terminal: Terminal) {
        self.publish(|now| {
            now.terminal.get_or_insert(terminal);
        });
    }

    fn publish(&self, change: impl FnOnce(&mut Durable)) {
        // The lock keeps a waiter from going to sleep between its look at the value and its wait.
        let closed = self.shared.closed.lock();
        self.sender.send_modify(change);
        drop(closed);
        self.shared.changed.notify_all();
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        *self.shared.closed.lock() = true;
        self.shared.changed.notify_all();
    }
}

/// What waiting threads sleep on.
#[derive(Debug, Default)]
struct Shared {
    closed: Mutex<bool>,
    changed: Condvar,
}

fn reached(now: &Durable, lsn: Lsn) -> bool {
    now.state.position.lsn >= lsn
}

fn outcome(now: &Durable, lsn: Lsn) -> Result<State, WaitError> {
    if reached(now, lsn) {
        return Ok(now.state);
    }
    Err(match &now.terminal {
        Some(terminal) => WaitError::Ended(terminal.clone()),
        None => WaitError::TimedOut { lsn },
    })
}

/// Why an LSN is not durable.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WaitError {
    /// It will not become durable.
    #[error(transparent)]
    Ended(#[from] Terminal),
    /// It did not become durable in time; it still may.
    #[error("lsn {lsn} did not become durable in time")]
    TimedOut {
        /// The LSN that was waited for.
        lsn: Lsn,
    },
    /// The log was closed in order.
    #[error("the log is closed")]
    Closed,
}
