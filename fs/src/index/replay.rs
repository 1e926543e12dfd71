//! Replay: brings an index forward over a run of frames.
//!
//! One thread decodes and folds the next generation while another ingests the current one.
//!
//! Invariants:
//! - Every frame continues the one before it, the first one the index's own state.
//! - A generation ends at a frame. At most three are in memory at a time.
//! - Also after an error of the frames the generations that were complete are applied and synced: the next replay goes on there.

use std::{
    error::Error,
    sync::mpsc::{SyncSender, sync_channel},
    thread,
};

use murphy_log::{ChainHash, DecodeError, FEATURE_LEVEL, Frame, FrameError, Lsn, State};

use super::{Fold, FoldError, FoldedRows, Index, IndexError};

/// How large a generation of a replay becomes; whichever is reached first ends it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplayBudget {
    /// Rows.
    pub rows: usize,
    /// Bytes of keys and values; above 512 MiB it is taken as 512 MiB.
    pub bytes: usize,
}

impl Default for ReplayBudget {
    fn default() -> ReplayBudget {
        ReplayBudget { rows: 500_000, bytes: 64 << 20 }
    }
}

/// Applies `frames`, which continue `from`, to `index`, which must be at `from`; returns the state after the last one, synced.
///
/// After an unclean stop the frames must go at least as far as [`Index::reached`]; an index that is ahead of its log is refused.
pub fn replay<E: Error + Send + Sync + 'static>(
    index: &dyn Index,
    from: State,
    frames: impl Iterator<Item = Result<Frame, E>>,
    budget: ReplayBudget,
) -> Result<State, ReplayError> {
    let state = index.snapshot().state();
    if state != Some(from) {
        return Err(ReplayError::From {
            from: from.position.lsn,
            index: state.map(|state| state.position.lsn),
        });
    }
    let reached = index.reached().map_or(from, |reached| reached);
    let (sender, receiver) = sync_channel::<Generation>(1);
    let (stopped, applied) = thread::scope(|scope| {
        let applier = scope.spawn(move || {
            for mut generation in receiver {
                index.ingest(&mut generation.rows, &generation.state)?;
            }
            Ok(())
        });
        let stopped = Folder { budget, state: from, reached, fold: Fold::new(), sender }.run(frames);
        (stopped, applier.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    applied.map_err(ReplayError::Index)?;
    index.sync()?;
    let end = stopped?;
    if end.position.lsn < reached.position.lsn {
        return Err(ReplayError::Behind { end: end.position.lsn, reached: reached.position.lsn });
    }
    Ok(end)
}

/// The rows of a run of frames, and the state after them.
struct Generation {
    rows: FoldedRows,
    state: State,
}

/// Makes generations of frames.
struct Folder {
    budget: ReplayBudget,
    /// The state after the last frame folded.
    state: State,
    reached: State,
    fold: Fold,
    sender: SyncSender<Generation>,
}

impl Folder {
    /// Folds until the frames end, one cannot be applied, or the applier has stopped.
    fn run<E: Error + Send + Sync + 'static>(
        mut self,
        frames: impl Iterator<Item = Result<Frame, E>>,
    ) -> Result<State, ReplayError> {
        for frame in frames {
            let added = frame
                .map_err(|error| ReplayError::Frames(Box::new(error)))
                .and_then(|frame| self.add(&frame));
            if let Err(error) = added {
                // A part of an entry may already be folded if it is the entry that cannot be.
                if !matches!(error, ReplayError::Entry { .. }) {
                    self.end_generation();
                }
                return Err(error);
            }
            let is_full = self.fold.len() >= self.budget.rows
                || self.fold.bytes() >= self.budget.bytes.min(MAX_GENERATION_BYTES);
            if is_full && !self.end_generation() {
                return Ok(self.state);
            }
        }
        self.end_generation();
        Ok(self.state)
    }

    /// Folds one frame; after an error nothing of it, unless it is [`ReplayError::Entry`].
    fn add(&mut self, frame: &Frame) -> Result<(), ReplayError> {
        let header = frame.header();
        header.follows(&self.state.position)?;
        let (lsn, level) = (header.first, header.feature_level);
        if level > FEATURE_LEVEL {
            return Err(ReplayError::FeatureLevel { lsn, level, known: FEATURE_LEVEL });
        }
        let (position, reached) = (frame.position(), self.reached.position);
        if position.lsn == reached.lsn && position != reached {
            let lsn = position.lsn;
            return Err(ReplayError::OtherHistory { lsn, frame: position.hash, index: reached.hash });
        }
        // All are decoded before one is folded: half a frame must not get into a generation that the error ends.
        for entry in frame.entries()? {
            let lsn = entry.lsn;
            self.fold.push_entry(&entry).map_err(|source| ReplayError::Entry { lsn, source })?;
        }
        self.state = frame.state();
        Ok(())
    }

    /// Hands over what is folded; `false` if nobody takes it any more.
    fn end_generation(&mut self) -> bool {
        let rows = std::mem::take(&mut self.fold).into_rows();
        self.sender.send(Generation { rows, state: self.state }).is_ok()
    }
}

/// Why a replay stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The index is elsewhere.
    #[error("cannot replay from lsn {from} an index that is {}", .index.map_or("empty".to_owned(), |at| format!("at lsn {at}")))]
    From {
        /// Where the replay should begin.
        from: Lsn,
        /// Where the index is. The same number: its history is another one.
        index: Option<Lsn>,
    },
    /// The frames cannot be read.
    #[error("cannot read the next frame: {0}")]
    Frames(#[source] Box<dyn Error + Send + Sync>),
    /// A frame does not follow the one before it.
    #[error(transparent)]
    Order(#[from] FrameError),
    /// A later version wrote the frame, and only such a version can apply it.
    #[error("frame at lsn {lsn} has feature level {level}, this version applies up to {known}")]
    FeatureLevel {
        /// Its first entry.
        lsn: Lsn,
        /// Its level.
        level: u16,
        /// The highest level that this version knows.
        known: u16,
    },
    /// An entry is malformed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// An entry writes what no index can hold.
    #[error("entry {lsn}: {source}")]
    Entry {
        /// The entry.
        lsn: Lsn,
        /// What is wrong with it.
        source: FoldError,
    },
    /// The frames end before the newest rows of the index: what it holds beyond is not in the log. It must be made anew.
    #[error("the log ends at lsn {end}, the index has rows up to {reached}")]
    Behind {
        /// Where the frames end.
        end: Lsn,
        /// Where the newest rows come from.
        reached: Lsn,
    },
    /// The index has rows of another history. It must be made anew.
    #[error("at lsn {lsn} the log has the chain hash {frame}, the index {index}")]
    OtherHistory {
        /// How far both are.
        lsn: Lsn,
        /// What the log says.
        frame: ChainHash,
        /// What the index says.
        index: ChainHash,
    },
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// A generation is ended at this size, in bytes, whatever the budget says.
const MAX_GENERATION_BYTES: usize = 512 << 20;

#[cfg(test)]
mod tests;
