//! The index of a node: opened, checked against the log, brought to its end, or made anew.
//!
//! Invariants:
//! - What the index holds is believed only as far as the log has the same position with the same hash.
//! - An index with rows from beyond the end of its log is proof that the log has lost what was durable, unless the log has a later epoch
//!   than those rows: the node is not opened. Making the index anew would hide the loss, and the next entries would take the place of the
//!   lost ones.
//! - An index that proves nothing and cannot be used costs time, never data: it is made anew from the base and the log, once all of that log was
//!   found to be readable.

use std::{path::Path, sync::Arc};

use murphy_fs::{
    Cookie, DentryRow, FjallIndex, FjallOptions, Index, Ino, NameHasher, OpenIndexError, ReplayBudget,
    ReplayError, RowKey, replay,
};
use murphy_log::{
    Clock, DiskLog, Log, Lsn, OsFiles, Position, ReadError, Scrub, State, SystemClock, VolumeKeys,
};

use super::{base::load_base_file, index_directory};
use crate::{
    error::{CliError, failed},
    scrub_notes::{self, ScrubNote},
};

/// Opens the index of the node in `node` and brings it to the durable end of `log`. One that a scrub has found to differ is made anew.
pub(super) fn open_index(
    node: &Path,
    log: &DiskLog,
    keys: &VolumeKeys,
) -> Result<(Arc<FjallIndex>, State), CliError> {
    let opened = open_index_in(&index_directory(node), node, log, keys)
        .map_err(|error| if_unreadable(node, log, error))?;
    if found_to_differ(node).is_some() {
        scrub_notes::forget(node)?;
    }
    Ok(opened)
}

/// What of the log is read when the node in `node` is opened, and has to be whole for that: what its index lacks.
pub(super) fn still_to_read(node: &Path) -> Scrub {
    let synced = FjallIndex::synced_in(&index_directory(node));
    synced.map_or(Scrub::Everything, |state| Scrub::From(state.position.lsn.next()))
}

/// Where the log cannot be read that is noted, so that the next start reads all of it, and mends it first.
fn if_unreadable(node: &Path, log: &DiskLog, error: CliError) -> CliError {
    let Err(damage) = check_readable(log) else { return error };
    let lsn = log.durable().state().position.lsn.get();
    let ended = SystemClock::new().wall().as_nanos();
    let note =
        ScrubNote { lsn, ended, took_ms: 0, index: found_to_differ(node), log: Some(damage.to_string()) };
    match scrub_notes::save(node, &note) {
        Ok(()) => error.hint(
            "start it again: what is damaged in the log then comes from an archive or a mirror that has it",
        ),
        Err(unsaved) => error.because(&unsaved),
    }
}

fn unreadable(error: ReadError) -> CliError {
    failed(error)
        .hint("the index does not fit the log, and cannot be made anew from it before it is repaired")
}

fn check_readable(log: &DiskLog) -> Result<(), ReadError> {
    log.read_files(log.first())?.try_for_each(|frame| frame.map(drop))
}

/// What the last scrub of a node has found its index to differ in.
fn found_to_differ(node: &Path) -> Option<String> {
    scrub_notes::load(node)?.index
}

/// The same for an index in `directory`.
pub(super) fn open_index_in(
    directory: &Path,
    node: &Path,
    log: &DiskLog,
    keys: &VolumeKeys,
) -> Result<(Arc<FjallIndex>, State), CliError> {
    let index = match FjallIndex::open(directory, FjallOptions::default()) {
        Err(OpenIndexError::Unusable { .. }) => {
            check_readable(log).map_err(unreadable)?;
            FjallIndex::open_or_reset(directory, FjallOptions::default())
        }
        opened => opened,
    };
    let index = index.map_err(|error| of_open(&error))?;
    check_not_ahead(&index, log, keys)?;
    let caught_up = match found_to_differ(node) {
        Some(reason) => Err(CatchUpError::Index(reason)),
        None => catch_up(node, &index, log),
    };
    let reason = match caught_up {
        Ok(state) => return Ok((Arc::new(index), state)),
        Err(CatchUpError::Index(reason)) => reason,
        Err(CatchUpError::Fatal(error)) => return Err(error),
    };
    drop(index);
    check_readable(log).map_err(unreadable)?;
    tracing::warn!(path = %directory.display(), reason, "the index does not fit the log, it is made anew");
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

/// Refuses an index that proves that the log has lost something.
///
/// Only what was durable in this node's log reaches its index, so rows from beyond the log's end were durable here, whether their generation
/// is complete or was cut short by a crash. They prove nothing if the log goes on in a later epoch: then whoever took over has decided where
/// the earlier one ends. Nor do the rows of another volume, which nobody but a person can have put here.
fn check_not_ahead(index: &FjallIndex, log: &DiskLog, keys: &VolumeKeys) -> Result<(), CliError> {
    let Some(known) = known_beyond(index, log, keys) else { return Ok(()) };
    Err(ahead_of(log, &known))
}

/// What is said of a log that ends before what its index knows of.
pub(super) fn ahead_of(log: &DiskLog, known: &Position) -> CliError {
    let end = log.durable().state().position;
    let text = format!(
        "the log ends at lsn {} in epoch {}, its index knows of lsn {} in epoch {}: what was durable is missing from the log",
        end.lsn, end.epoch.number, known.lsn, known.epoch.number
    );
    let hint = "put the missing segments back, or repair the node from an archive or a mirror; to go on without them, delete DIR/index";
    CliError::new(text).hint(hint).damage()
}

/// The furthest position beyond the end of `log` that the index of the node in `node` proves to have been durable there. An index that cannot
/// be opened proves nothing: it is made anew when the node is.
pub(super) fn known_to_index(node: &Path, log: &DiskLog, keys: &VolumeKeys) -> Option<Position> {
    let directory = index_directory(node);
    let index = directory.is_dir().then(|| FjallIndex::open(&directory, FjallOptions::default()));
    known_beyond(&index?.ok()?, log, keys)
}

fn known_beyond(index: &FjallIndex, log: &DiskLog, keys: &VolumeKeys) -> Option<Position> {
    let end = log.durable().state().position;
    let furthest = index.reached().into_iter().chain(index.snapshot().state());
    let known = furthest.map(|state| state.position).max_by_key(|position| position.lsn)?;
    let is_later = known.epoch == end.epoch || known.epoch.number > end.epoch.number;
    let proves = known.lsn > end.lsn && is_later && (known.epoch == end.epoch || !is_foreign(index, keys));
    proves.then_some(known)
}

/// Whether the names in an index do not stand where this volume's key places them. An index without a readable name says nothing.
fn is_foreign(index: &FjallIndex, keys: &VolumeKeys) -> bool {
    let names = RowKey::dentry(Ino::new(0), 0)..RowKey::dentry(Ino::new(u64::MAX), 0);
    let (snapshot, hasher) = (index.snapshot(), NameHasher::of(keys));
    let first = snapshot.scan(names).map_while(Result::ok).find_map(|(key, value)| {
        let (name, ..) = DentryRow::decode(&value).ok()?.named?;
        Some((Cookie::new(key.second()?), name))
    });
    first.is_some_and(|(cookie, name)| cookie.in_slot(0) != hasher.place(&name))
}

fn catch_up(node: &Path, index: &FjallIndex, log: &DiskLog) -> Result<State, CatchUpError> {
    catch_up_to(node, index, log, log.durable().state())
}

/// Brings the index to `tail`, a durable frame end of the log. That of a mirror goes on growing meanwhile.
fn catch_up_to(node: &Path, index: &FjallIndex, log: &DiskLog, tail: State) -> Result<State, CatchUpError> {
    let from = match index.snapshot().state() {
        Some(state) => state,
        None => begin(node, index, log)?,
    };
    let (at, end) = (from.position, tail.position);
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
    let frames = frames.take_while(|frame| frame.as_ref().map_or(true, |frame| frame.last() <= end.lsn));
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
    let base = State::origin(epoch);
    index.ingest(&mut std::iter::empty(), &base).map_err(|error| CatchUpError::Index(error.to_string()))?;
    Ok(base)
}

fn of_open(error: &OpenIndexError) -> CliError {
    let hint = match error {
        OpenIndexError::Locked { .. } => "another process has it open",
        OpenIndexError::NotADirectory { .. } => {
            "move it out of the way: the index holds nothing of its own and is made anew from the log"
        }
        OpenIndexError::Unusable { .. } | OpenIndexError::Io { .. } => {
            "the index holds nothing of its own: once the disk works again it is made anew from the log"
        }
    };
    failed(error).hint(hint)
}

#[cfg(test)]
mod tests;
