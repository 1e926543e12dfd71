//! The index: the tree as sorted tables, derived from the log.
//!
//! [`FjallIndex`] keeps it on disk, [`MemoryIndex`] in memory. A [`Fold`] makes a generation of many entries, [`replay()`] brings an
//! index to the end of a run of frames, and [`check_digest`] compares what it holds with what the log says.
//!
//! Invariants:
//! - Only durable entries reach an index, in generations that end at a frame.
//! - Everything in an index can be made again from a base snapshot and the log; whoever opens one checks its recorded position against
//!   the log and rebuilds it otherwise.
//! - Rows are opaque here: an index never decodes a value.

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod crash_tests;
mod digest_check;
mod fjall_files;
mod fjall_index;
mod fjall_snapshot;
mod fold;
mod memory;
mod replay;
mod synced;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use murphy_log::State;

use crate::RowKey;

pub use digest_check::{DigestCheck, check_digest, check_digest_while};
pub use fjall_index::{FjallIndex, FjallOptions, OpenIndexError};
pub use fold::{Fold, FoldError, FoldedRows};
pub use memory::MemoryIndex;
pub use replay::{ReplayBudget, ReplayError, replay};

/// A store of rows that is written in generations and read in snapshots.
///
/// ```text
///      synced             snapshot().state()           reached()
///   ------+----------------------+--------------------------+-------> LSN
///         |                      |                          |
///   survives a power cut   complete, readable     no row comes from beyond
/// ```
///
/// * While an index is open the three differ only in what is not synced yet.
/// * **After an unclean stop** the snapshot is at the synced state, but single rows may already be those of any state up to
///   `reached()`. The frames in between are applied again ([`replay()`] does it) before anybody reads. After-images make that
///   harmless; a log that ends before `reached()` makes the index useless.
/// * A base (the rows of a snapshot file) may be ingested in several parts with the same state. Nobody may read, and nobody may call
///   `sync`, before the last part.
pub trait Index: Send + Sync + 'static {
    /// The newest state that was ingested completely, as a view that later ingestions do not change. Cheap.
    ///
    /// A snapshot holds disk space that compaction would free: whoever keeps one for long (a dump) makes the index grow meanwhile.
    fn snapshot(&self) -> Arc<dyn IndexSnapshot>;

    /// Writes one generation: `rows` sorted by key, each key once, `None` for a removed row; afterwards the index is at `state`, which
    /// never goes back. Called by one thread at a time. May wait for compaction.
    ///
    /// After an error the index must not be used further and is reopened from its last synced state.
    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
    ) -> Result<(), IndexError>;

    /// Returns when everything ingested so far survives a power cut.
    fn sync(&self) -> Result<(), IndexError>;

    /// Whether there is disk space for a generation of `bytes` and for the compactions that it causes. A store that is not on a disk
    /// has room always.
    fn has_room(&self, bytes: usize) -> bool {
        let _in_memory = bytes;
        true
    }

    /// The furthest state that any row may come from; `None` for an index that holds nothing yet.
    fn reached(&self) -> Option<State>;
}

/// The rows of an index at one state.
pub trait IndexSnapshot: Send + Sync {
    /// Which state; `None` for an index that holds nothing yet.
    fn state(&self) -> Option<State>;

    /// One row, in memory of its own.
    fn get(&self, key: &RowKey) -> Result<Option<Bytes>, IndexError>;

    /// The rows of a range of keys in order; after an error nothing follows. Rows share memory with the block that they were read in:
    /// whoever keeps a few of them for long copies them.
    fn scan(&self, range: Range<RowKey>) -> RowIterator;

    /// The last row of a range of keys. As costly as a scan, unless an implementation reads backwards.
    fn last(&self, range: Range<RowKey>) -> Result<Option<(RowKey, Bytes)>, IndexError> {
        self.scan(range).last().transpose()
    }
}

/// Rows in key order.
pub type RowIterator = Box<dyn Iterator<Item = Result<(RowKey, Bytes), IndexError>> + Send>;

/// An index that could not be read or written.
#[derive(Clone, Debug, thiserror::Error)]
#[error("index {path}: {reason}")]
pub struct IndexError {
    /// Where the index is.
    pub path: String,
    /// What its storage said.
    pub reason: String,
}

/// Checks what an ingestion is given; both implementations refuse the same.
#[derive(Default)]
struct IngestOrder {
    last: Option<RowKey>,
}

impl IngestOrder {
    fn admit(&mut self, key: &RowKey) -> Result<(), String> {
        if !is_table(key.table()) || key.as_bytes().len() > MAX_KEY_BYTES {
            return Err(format!("{key:?} is not a key of a row"));
        }
        if let Some(last) = self.last.as_ref().filter(|last| *last >= key) {
            return Err(format!("rows out of order: {key:?} after {last:?}"));
        }
        self.last = Some(key.clone());
        Ok(())
    }
}

/// Why `state` cannot come after `current`, if so.
fn goes_back(current: Option<State>, state: &State) -> Option<String> {
    let current = current.filter(|current| current.position.lsn > state.position.lsn)?;
    Some(format!("at {}, cannot go back to {}", current.position, state.position))
}

/// Whether rows may be in table `number`: the first and the last number are kept free, so that every range of keys has an end.
const fn is_table(number: u8) -> bool {
    number != 0 && number != u8::MAX
}

/// The longest key of a row in bytes, its table number included. fjall has room for 65,535.
const MAX_KEY_BYTES: usize = 4096;
