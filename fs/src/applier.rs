//! The applier: moves sealed generations of the overlay into the index. The only writer of the index.
//!
//! Invariants:
//! - Only durable entries reach the index.
//! - A disk that is nearly full is left alone: the generation stays in memory, changes are refused until there is room.
//! - Readers get the new index and lose the generation in one step.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use murphy_log::WaitError;

use crate::{Index, IndexError, sequencer::Sequencer};

/// Moves generations from a sequencer's overlay into an index.
pub(crate) struct Applier {
    sequencer: Arc<Sequencer>,
    index: Arc<dyn Index>,
}

/// Why a generation was not applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("the log does not become durable: {0}")]
    Log(#[from] WaitError),
}

impl Applier {
    pub(crate) fn new(sequencer: Arc<Sequencer>, index: Arc<dyn Index>) -> Applier {
        Applier { sequencer, index }
    }

    /// Applies the oldest sealed generation if it is durable, waiting at most `patience` for that. Says whether it did.
    pub(crate) fn step(&self, patience: Duration) -> Result<bool, ApplyError> {
        let Some((generation, end)) = self.sequencer.oldest_sealed() else { return Ok(false) };
        match self.sequencer.log().durable().wait_blocking(end.position.lsn, patience) {
            Ok(_) => {}
            Err(WaitError::TimedOut { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let has_room = self.index.has_room(generation.weight());
        self.sequencer.set_index_room(has_room);
        if !has_room {
            return Ok(false);
        }
        let mut ingested = Ok(());
        generation.folded(|rows| ingested = self.index.ingest(rows, &end));
        ingested?;
        self.sequencer.indexed(self.index.snapshot(), end.position.lsn);
        self.index.sync()?;
        Ok(true)
    }

    /// Applies until `stop`; an error ends the volume.
    pub(crate) fn run(&self, stop: &AtomicBool) {
        let mut seen = 0;
        while !stop.load(Ordering::Relaxed) {
            match self.step(PATIENCE) {
                Ok(true) => {}
                Ok(false) => seen = self.sequencer.wait_for_sealed(seen, PATIENCE),
                Err(error) => return self.sequencer.fail(format!("the index cannot follow: {error}")),
            }
        }
    }
}

const PATIENCE: Duration = Duration::from_millis(100);
