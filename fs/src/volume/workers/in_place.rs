//! The same work as the threads of a volume do, as tasks of one runtime: for simulations.
//!
//! Invariants:
//! - Nothing here blocks, and nothing is done but in these tasks and by those who ask: what happens when is the runtime's schedule.

use std::{sync::Arc, time::Duration};

use tokio::{runtime::Handle, task::JoinHandle};

use super::show_frames;
use crate::{Index, applier::Applier, changes::Observers, sequencer::Sequencer};

/// Running tasks; dropping this stops them.
pub(super) struct Tasks {
    runtime: Handle,
    applier: Arc<Applier>,
    driver: JoinHandle<()>,
}

impl Tasks {
    pub(super) fn start(runtime: &Handle, sequencer: &Arc<Sequencer>, index: &Arc<dyn Index>) -> Tasks {
        let applier = Arc::new(Applier::new(Arc::clone(sequencer), Arc::clone(index)));
        let driver = runtime.spawn(drive(Arc::clone(sequencer), Arc::clone(&applier)));
        Tasks { runtime: runtime.clone(), applier, driver }
    }

    /// Shows every entry that becomes durable in the log, until the task is aborted.
    pub(super) fn follow(&self, sequencer: &Arc<Sequencer>, observers: &Arc<Observers>) -> JoinHandle<()> {
        let (sequencer, observers) = (Arc::clone(sequencer), Arc::clone(observers));
        self.runtime.spawn(async move {
            let mut durable = sequencer.log().durable();
            loop {
                if let Err(error) = show_frames(&sequencer, &observers) {
                    return sequencer.fail(format!("the log cannot be followed: {error}"));
                }
                if durable.changed().await.is_err() {
                    return;
                }
            }
        })
    }

    /// Applies a generation if one is sealed and durable.
    pub(super) fn apply(&self) -> Result<bool, String> {
        self.applier.step(Duration::ZERO).map_err(|error| error.to_string())
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Closes frames, appends ticks and applies generations.
async fn drive(sequencer: Arc<Sequencer>, applier: Arc<Applier>) {
    loop {
        let idle = sequencer.step();
        if let Err(error) = applier.step(Duration::ZERO) {
            return sequencer.fail(format!("the index cannot follow: {error}"));
        }
        let pause = if sequencer.oldest_sealed().is_some() { idle.min(APPLY_AGAIN) } else { idle };
        // Whether there is work or it is time, the next step finds out.
        let _due = tokio::time::timeout(pause, sequencer.work().notified()).await;
    }
}

/// What is sealed and not durable is looked at again after so long.
const APPLY_AGAIN: Duration = Duration::from_millis(3);
