//! The index: the tree as sorted tables, derived from the log.
//!
//! Invariants:
//! - Only durable entries reach an index, in generations that end at a frame.
//! - Everything in an index can be made again from a base snapshot and the log; whoever opens one checks its recorded position against
//!   the log and rebuilds it otherwise.
//! - Rows are opaque here: an index never decodes a value.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use murphy_log::State;

use crate::RowKey;

/// A store of rows that is written in generations and read in snapshots.
pub trait Index: Send + Sync + 'static {
    /// The newest state that was ingested completely, as a view that later ingestions do not change. Cheap.
    fn snapshot(&self) -> Arc<dyn IndexSnapshot>;

    /// Writes one generation: `rows` sorted by key, each key once, `None` for a removed row; afterwards the index is at `state`. Called
    /// by one thread at a time. After an error the index must not be used further and is reopened from its last synced state.
    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
    ) -> Result<(), IndexError>;

    /// Returns when everything ingested so far survives a power cut.
    fn sync(&self) -> Result<(), IndexError>;
}

/// The rows of an index at one state.
pub trait IndexSnapshot: Send + Sync {
    /// Which state; `None` for an index that holds nothing yet.
    fn state(&self) -> Option<State>;

    /// One row.
    fn get(&self, key: &RowKey) -> Result<Option<Bytes>, IndexError>;

    /// The rows of a range of keys in order.
    fn scan(&self, range: Range<RowKey>) -> RowIterator;
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
