//! The index of a node: opened, checked against the log, brought to its end, or made anew.
//!
//! Invariants:
//! - What the index holds is believed only as far as the log has the same position with the same hash.
//! - An index that is ahead of its log in the same epoch is proof that the log has lost something: the node is not opened.
//! - An index that cannot be used costs time, never data: it is made anew from the base and the log.

use std::{path::Path, sync::Arc};

use murphy_fs::{FjallIndex, FjallOptions, Index, OpenIndexError, ReplayBudget, ReplayError, replay};
use murphy_log::{ChainHash, Digest, DiskLog, Log, Lsn, OsFiles, Position, State, Usage};

use super::{base::load_base_file, index_directory};
use crate::error::{CliError, failed};

/// Opens the index of the node in `node` and brings it to the durable end of `log`.
pub(super) fn open_index(node: &Path, log: &DiskLog) -> Result<(Arc<FjallIndex>, State), CliError> {
    let directory = &index_directory(node);
    let index =
        FjallIndex::open_or_reset(directory, FjallOptions::default()).map_err(|error| of_open(&error))?;
    let reason = match catch_up(node, &index, log) {
        Ok(state) => return Ok((Arc::new(index), state)),
        Err(CatchUpError::Index(reason)) => reason,
        Err(CatchUpError::Fatal(error)) => return Err(error),
    };
    tracing::warn!(path = %directory.display(), reason, "the index does not fit the log, it is made anew");
    drop(index);
    FjallIndex::reset(directory).map_err(|error| of_open(&error))?;
    let index = FjallIndex::open(directory, FjallOptions::default()).map_err(|error| of_open(&error))?;
    match catch_up(node, &index, log) {
        Ok(state) => Ok((Arc::new(index), state)),
        Err(CatchUpError::Index(reason)) => {
            Err(CliError::new(format!("the index cannot be made anew: {reason}")))
        }
        Err(CatchUpError::Fatal(error)) => Err(error),
    }
}

enum CatchUpError {
    /// The index is at fault.
    Index(String),
    /// The log is, or the system.
    Fatal(CliError),
}

fn catch_up(node: &Path, index: &FjallIndex, log: &DiskLog) -> Result<State, CatchUpError> {
    let tail = log.durable().state();
    let from = match index.snapshot().state() {
        Some(state) => state,
        None => begin(node, index, log)?,
    };
    let (at, end) = (from.position, tail.position);
    if at.lsn > end.lsn && at.epoch == end.epoch {
        // Only durable entries reach an index.
        let text = format!(
            "the log ends at lsn {}, its index knows of lsn {} in the same epoch: what was durable is missing from the log",
            end.lsn, at.lsn
        );
        let hint = "put the missing segments back, or repair the node from an archive or a mirror; to go on without them, delete DIR/index";
        return Err(CatchUpError::Fatal(CliError::new(text).hint(hint).damage()));
    }
    if at.lsn > end.lsn {
        return Err(CatchUpError::Index(format!("it is at lsn {}, the log ends at {}", at.lsn, end.lsn)));
    }
    if at.lsn == end.lsn && at != end {
        return Err(CatchUpError::Index(format!("it holds {at}, the log {end}")));
    }
    if at.lsn < end.lsn && at.lsn.next() < log.first() {
        return Err(CatchUpError::Index(format!(
            "it is at lsn {}, the log begins at {}",
            at.lsn,
            log.first()
        )));
    }
    let frames = log.read(at.lsn.next()).map_err(|error| CatchUpError::Fatal(failed(error)))?;
    let reached = replay(index, from, frames, ReplayBudget::default()).map_err(|error| match error {
        ReplayError::From { .. }
        | ReplayError::Order(_)
        | ReplayError::Behind { .. }
        | ReplayError::OtherHistory { .. }
        | ReplayError::Index(_) => CatchUpError::Index(error.to_string()),
        ReplayError::FeatureLevel { .. } => CatchUpError::Fatal(
            failed(&error).hint("a later version of murphy wrote the log; use that version, or a later one"),
        ),
        ReplayError::Frames(_) | ReplayError::Decode(_) | ReplayError::Entry { .. } => CatchUpError::Fatal(
            failed(error).hint("the log is damaged: repair it from an archive or a mirror"),
        ),
    })?;
    if reached != tail {
        let text = format!("replay ended at {}, the log at {}", reached.position, tail.position);
        return Err(CatchUpError::Index(text));
    }
    Ok(reached)
}

/// Gives an empty index the state before the first entry of the log.
fn begin(node: &Path, index: &FjallIndex, log: &DiskLog) -> Result<State, CatchUpError> {
    let fatal = |error: &dyn std::fmt::Display| CatchUpError::Fatal(failed(error));
    if let Some(state) = load_base_file(&OsFiles, node, index, log.first()).map_err(CatchUpError::Fatal)? {
        return Ok(state);
    }
    if log.first() != Lsn::FIRST {
        let text = format!("the log begins at lsn {} and there is no snapshot to begin with", log.first());
        return Err(CatchUpError::Fatal(
            CliError::new(text).hint("restore the node from an archive, or seed it from a mirror"),
        ));
    }
    let mut frames = log.read(Lsn::FIRST).map_err(|error| fatal(&error))?;
    let first = frames.next().transpose().map_err(|error| fatal(&error))?;
    let epoch = first.map_or(log.recovery().epoch, |frame| frame.epoch());
    let base = origin(epoch);
    index.ingest(&mut std::iter::empty(), &base).map_err(|error| CatchUpError::Index(error.to_string()))?;
    Ok(base)
}

/// The state before the first entry of a new volume.
pub(super) fn origin(epoch: murphy_log::Epoch) -> State {
    let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
    State { position, digest: Digest::default(), usage: Usage::default() }
}

fn of_open(error: &OpenIndexError) -> CliError {
    let hint = match error {
        OpenIndexError::Locked { .. } => "another process has it open",
        OpenIndexError::Unusable { .. } | OpenIndexError::Io { .. } => {
            "the index holds nothing of its own: once the disk works again it is made anew from the log"
        }
    };
    failed(error).hint(hint)
}
