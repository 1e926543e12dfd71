//! The gate of a process: through it goes everything that the process does with the world.
//!
//! Invariants:
//! - A process that is dead does nothing any more, whatever of it still runs; one that is paused does nothing until it goes on.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Whether a process runs.
#[derive(Debug)]
pub(super) struct Gate {
    life: watch::Sender<Life>,
    was_paused: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Life {
    Runs,
    Paused,
    Dead,
}

impl Gate {
    pub(super) fn new() -> Gate {
        Gate { life: watch::Sender::new(Life::Runs), was_paused: AtomicBool::new(false) }
    }

    pub(super) fn life(&self) -> Life {
        *self.life.borrow()
    }

    /// Lets the process live on, stop, or die; nobody comes back from death.
    pub(super) fn set(&self, life: Life) {
        if life == Life::Paused {
            self.was_paused.store(true, Ordering::Relaxed);
        }
        self.life.send_if_modified(|now| {
            let changes = *now != Life::Dead && *now != life;
            if changes {
                *now = life;
            }
            changes
        });
    }

    /// Returns when the process runs; never if it is dead.
    pub(super) async fn pass(&self) {
        let mut life = self.life.subscribe();
        if life.wait_for(|life| *life == Life::Runs).await.is_err() || self.life() == Life::Dead {
            futures::future::pending::<()>().await;
        }
    }

    /// Returns when the process runs, or is dead.
    pub(super) async fn pass_or_death(&self) {
        let mut life = self.life.subscribe();
        // The sender lives as long as the gate.
        let _goes_on = life.wait_for(|life| *life != Life::Paused).await;
    }

    /// Whether the process was ever paused: then nothing can be said of how long it took for anything.
    pub(super) fn was_paused(&self) -> bool {
        self.was_paused.load(Ordering::Relaxed)
    }

    /// Returns when the process is dead.
    pub(super) async fn death(&self) {
        let mut life = self.life.subscribe();
        // The sender lives as long as the gate.
        let _dead = life.wait_for(|life| *life == Life::Dead).await;
    }
}
