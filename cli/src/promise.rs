//! What a mirror has promised: the epoch that it goes over to, and after which it takes nothing older.
//!
//! Invariants:
//! - A promise is on the disk before anybody hears of it. A file that is damaged is refused: without it the node could break its word.

use std::path::Path;

use murphy_log::Epoch;

use crate::{attempts::StoredEpoch, error::CliError, summed};

/// The epoch that the mirror in `directory` has promised, if it has promised one.
pub(crate) fn load(directory: &Path) -> Result<Option<Epoch>, CliError> {
    let path = directory.join(FILE);
    let Some(promise) = summed::read::<StoredEpoch>(&path, LOST)? else { return Ok(None) };
    let damaged = |error| CliError::new(format!("{} is damaged: {error}", path.display())).hint(LOST);
    promise.epoch().map(Some).map_err(damaged)
}

/// Notes what it promises; durable when it returns.
pub(crate) fn save(directory: &Path, epoch: Epoch) -> Result<(), CliError> {
    summed::write(&directory.join(FILE), &StoredEpoch::from(&epoch))
}

const FILE: &str = "promised.json";
const LOST: &str = "it keeps this mirror from acknowledging to a source that was replaced: put the file back, or join in a new directory (--blocks may be the same)";
