//! The overlay: changes that the index does not have yet, in memory, by generation.
//!
//! Every row keeps its versions, so that a view sees the tree as it was at its LSN while entries go on being added.
//!
//! Invariants:
//! - Entries are added to the newest generation only, by the sequencer, in LSN order. A sealed generation does not change.
//! - A generation ends at a frame, so that an index that has ingested it is at a position of the log.
//! - Values are opaque here.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use murphy_log::{Lsn, State};

use crate::{RowKey, sync::RwLock};

/// The changes of one run of entries.
#[derive(Default)]
pub(crate) struct Generation {
    rows: RwLock<BTreeMap<RowKey, Versions>>,
    weight: AtomicUsize,
    /// The state after its last entry, once it is sealed.
    end: std::sync::OnceLock<State>,
}

/// What a row was, newest last.
struct Versions {
    newest: Version,
    older: Vec<Version>,
}

struct Version {
    lsn: Lsn,
    value: Option<Bytes>,
}

impl Versions {
    fn at(&self, lsn: Lsn) -> Option<&Option<Bytes>> {
        if self.newest.lsn <= lsn {
            return Some(&self.newest.value);
        }
        self.older.iter().rev().find(|version| version.lsn <= lsn).map(|version| &version.value)
    }

    fn push(&mut self, lsn: Lsn, value: Option<Bytes>) {
        let earlier = std::mem::replace(&mut self.newest, Version { lsn, value });
        if earlier.lsn < lsn {
            self.older.push(earlier);
        }
    }
}

impl Generation {
    /// Adds the rows that the entry at `lsn` writes.
    pub(crate) fn add(&self, lsn: Lsn, rows: impl Iterator<Item = (RowKey, Option<Bytes>)>) {
        let mut map = self.rows.write();
        let mut weight = 0;
        for (key, value) in rows {
            weight += key.as_bytes().len() + value.as_ref().map_or(0, Bytes::len) + ROW_OVERHEAD;
            match map.entry(key) {
                std::collections::btree_map::Entry::Occupied(mut versions) => {
                    versions.get_mut().push(lsn, value);
                }
                std::collections::btree_map::Entry::Vacant(place) => {
                    place.insert(Versions { newest: Version { lsn, value }, older: Vec::new() });
                }
            }
        }
        self.weight.fetch_add(weight, Ordering::Relaxed);
    }

    /// About how many bytes of memory it takes.
    pub(crate) fn weight(&self) -> usize {
        self.weight.load(Ordering::Relaxed)
    }

    /// Ends the generation at `state`.
    pub(crate) fn seal(&self, state: State) {
        self.end.get_or_init(|| state);
    }

    /// The state at its end; `None` while it grows.
    pub(crate) fn end(&self) -> Option<State> {
        self.end.get().copied()
    }

    /// The row at `key` as of `lsn`: `None` if this generation has no version that old, `Some(None)` if it was removed.
    #[expect(clippy::option_option, reason = "not here and removed are different answers")]
    pub(crate) fn at(&self, key: &RowKey, lsn: Lsn) -> Option<Option<Bytes>> {
        self.rows.read().get(key).and_then(|versions| versions.at(lsn).cloned())
    }

    /// Up to `limit` rows from `start` on, below `end`, as of `lsn`.
    pub(crate) fn range(&self, start: &RowKey, end: &RowKey, lsn: Lsn, limit: usize) -> RangePart {
        let rows = self.rows.read();
        if start >= end {
            return RangePart::default();
        }
        let mut part = RangePart::default();
        let mut range = rows.range((Bound::Included(start), Bound::Excluded(end)));
        for (key, versions) in range.by_ref().take(limit) {
            part.last = Some(key.clone());
            if let Some(value) = versions.at(lsn) {
                part.rows.push((key.clone(), value.clone()));
            }
        }
        if range.next().is_none() {
            part.last = None;
        }
        part
    }

    /// The last row from `start` on, below `end`, as of `lsn`; `None` within it if it was removed.
    pub(crate) fn last(&self, start: &RowKey, end: &RowKey, lsn: Lsn) -> Option<(RowKey, Option<Bytes>)> {
        if start >= end {
            return None;
        }
        let rows = self.rows.read();
        let mut range = rows.range((Bound::Included(start), Bound::Excluded(end))).rev();
        let (key, value) = range.find_map(|(key, versions)| Some((key, versions.at(lsn)?)))?;
        Some((key.clone(), value.clone()))
    }

    /// Every row as the generation leaves it, in key order. To be called on a sealed generation.
    pub(crate) fn folded(&self, mut each: impl FnMut(&mut dyn Iterator<Item = (RowKey, Option<Bytes>)>)) {
        let rows = self.rows.read();
        each(&mut rows.iter().map(|(key, versions)| (key.clone(), versions.newest.value.clone())));
    }
}

/// A part of a range of one generation.
#[derive(Default)]
pub(crate) struct RangePart {
    /// Rows in key order, tombstones included.
    pub(crate) rows: Vec<(RowKey, Option<Bytes>)>,
    /// The last key looked at, if there is more after it.
    pub(crate) last: Option<RowKey>,
}

/// What a row costs beside its bytes, estimated.
const ROW_OVERHEAD: usize = 96;
