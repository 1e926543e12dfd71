//! What the last scrub of a node has found: for `status`, for a promotion, and for the next start.
//!
//! Invariants:
//! - Only a round that came to its end is noted. A note that cannot be read says that nothing is known, never that all is well.
//! - That the index differs stays noted until the index is made anew or another round finds it equal.

use std::{fs, io, path::Path, time::Duration};

use murphy_log::{Clock, LogTime, SystemClock};
use serde::{Deserialize, Serialize};

use crate::{
    error::{CliError, at},
    summed,
};

/// What was compared, and what came of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ScrubNote {
    /// The last entry that the index held, and up to which the log was read.
    pub(crate) lsn: u64,
    /// When it ended, in nanoseconds since 1970.
    pub(crate) ended: u64,
    /// How long it took.
    pub(crate) took_ms: u64,
    /// In what the index differs from what the log says.
    pub(crate) index: Option<String>,
    /// What of the log cannot be read.
    pub(crate) log: Option<String>,
}

impl ScrubNote {
    /// What is wrong, in a sentence; `None` if nothing is.
    pub(crate) fn trouble(&self) -> Option<String> {
        let found = [&self.index, &self.log];
        let found: Vec<&str> = found.into_iter().flatten().map(String::as_str).collect();
        (!found.is_empty()).then(|| found.join("; "))
    }

    /// For how long it has been known, by the wall clock.
    pub(crate) fn age(&self) -> Duration {
        SystemClock::new().wall().since(LogTime::from_nanos(self.ended))
    }
}

/// The note in a node's directory, if there is one that can be read.
pub(crate) fn load(directory: &Path) -> Option<ScrubNote> {
    summed::read(&directory.join(NOTE), "").unwrap_or_else(|error| {
        tracing::warn!("{error}; it counts as if nothing had been compared");
        None
    })
}

/// Replaces the note; durable when it returns.
pub(crate) fn save(directory: &Path, note: &ScrubNote) -> Result<(), CliError> {
    summed::write(&directory.join(NOTE), note)
}

/// Forgets what was damaged in the log, all of which has been read, or mended, since.
pub(crate) fn forget_log(directory: &Path) -> Result<(), CliError> {
    match load(directory) {
        Some(note @ ScrubNote { log: Some(_), index: Some(_), .. }) => {
            save(directory, &ScrubNote { log: None, ..note })
        }
        Some(ScrubNote { log: Some(_), index: None, .. }) => forget(directory),
        _ => Ok(()),
    }
}

/// Removes the note: what it speaks of has been made anew.
pub(crate) fn forget(directory: &Path) -> Result<(), CliError> {
    let path = directory.join(NOTE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path)(error)),
        _ => Ok(()),
    }
}

/// In the node's directory.
const NOTE: &str = "scrubbed.json";
