//! What memory knows of rows inside the critical section: the row cache, the overlay, and what a request had loaded.
//!
//! Invariants:
//! - A cached row is the newest of its key, always: appends write through, and a row from the index gets in only while nothing later than
//!   that index can exist for it.

use bytes::Bytes;
use murphy_log::Lsn;

use super::Sequencer;
use crate::{
    Ino, RowKey,
    decide::{RowState, Rows},
    view::{View, ViewError},
};

/// A row in the cache.
#[derive(Clone)]
pub(super) struct Cached {
    /// The entry that wrote it, or the LSN of the index that it was loaded from.
    pub(super) lsn: Lsn,
    pub(super) value: Option<Bytes>,
}

/// What a request had loaded for it, so that it gets on however small the cache is.
#[derive(Default)]
pub(super) struct Loaded {
    /// In key order; of equal keys the one that was loaded last comes last.
    rows: Vec<LoadedRow>,
    pub(super) link: Option<RowKey>,
}

struct LoadedRow {
    key: RowKey,
    value: Option<Bytes>,
    /// The LSN of the index that it was read above.
    indexed: Lsn,
}

impl Loaded {
    /// Loads rows from `view`.
    pub(super) fn load(
        &mut self,
        view: &View,
        keys: impl IntoIterator<Item = RowKey>,
    ) -> Result<(), ViewError> {
        for key in keys {
            let value = view.row(&key)?;
            self.rows.push(LoadedRow { key, value, indexed: view.indexed() });
        }
        self.rows.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(())
    }

    fn find(&self, key: &RowKey) -> Option<&LoadedRow> {
        let after = self.rows.partition_point(|row| row.key <= *key);
        self.rows[..after].last().filter(|row| row.key == *key)
    }
}

/// What memory knows, inside the critical section.
pub(super) struct Newest<'a> {
    pub(super) sequencer: &'a Sequencer,
    pub(super) loaded: &'a Loaded,
}

impl Rows for Newest<'_> {
    fn newest(&self, key: &RowKey) -> RowState {
        if let Some(cached) = self.sequencer.cache.get(key) {
            return RowState::Known(cached.value);
        }
        let basis = self.sequencer.basis.load();
        if let Some(row) = basis.overlaid(key, Lsn::MAX) {
            return RowState::Known(row);
        }
        // A row that is in no generation is what the index says; what was loaded counts while that is the same index.
        match self.loaded.find(key).filter(|row| row.indexed == basis.indexed) {
            Some(LoadedRow { value, indexed, .. }) => {
                // What is not there is asked for because it is about to be written, and written through.
                if value.is_some() {
                    self.sequencer.cache.insert(key.clone(), Cached { lsn: *indexed, value: value.clone() });
                }
                RowState::Known(value.clone())
            }
            None => RowState::Unknown,
        }
    }

    fn link_hint(&self, _ino: Ino) -> Option<RowKey> {
        self.loaded.link.clone()
    }
}
