//! An index in memory, for tests and simulations.
//!
//! Rows keep a short history: a snapshot reads of each row the newest version that is not younger than itself.
//!
//! Invariants:
//! - A version is dropped as soon as no snapshot can see it, at the latest by the next ingestion.
//! - After [`reopened`](MemoryIndex::reopened) it is as far ahead of its record as an index on disk can be after a power cut.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Bound, Range},
    sync::Arc,
};

use bytes::Bytes;
use murphy_log::State;
use parking_lot::{Mutex, RwLock};

use super::{Index, IndexError, IndexSnapshot, IngestOrder, RowIterator, goes_back};
use crate::RowKey;

/// An index in memory.
#[derive(Debug, Default)]
pub struct MemoryIndex {
    shared: Arc<Shared>,
}

impl MemoryIndex {
    /// An index that holds nothing.
    pub fn new() -> MemoryIndex {
        MemoryIndex::default()
    }

    /// The index that a crash and a restart would leave: at the synced state, with rows of everything ingested since.
    #[must_use]
    pub fn reopened(&self) -> MemoryIndex {
        let tables = self.shared.tables.read();
        let rows = tables.rows.iter().filter_map(|(key, versions)| {
            let newest = versions.last().and_then(|version| version.value.clone())?;
            Some((key.clone(), vec![Version { generation: 0, value: Some(newest) }]))
        });
        let reopened = match tables.synced {
            None => Tables::default(),
            Some(state) => Tables {
                rows: rows.collect(),
                state: Some(state),
                synced: Some(state),
                reached: tables.reached,
                ..Tables::default()
            },
        };
        let shared = Shared { tables: RwLock::new(reopened), pins: Mutex::default() };
        MemoryIndex { shared: Arc::new(shared) }
    }

    /// How many versions of rows it keeps; for tests of memory.
    pub fn version_count(&self) -> usize {
        self.shared.tables.read().rows.values().map(Vec::len).sum()
    }

    fn pin(&self) -> (Pin, Option<State>) {
        let tables = self.shared.tables.read();
        let generation = tables.generation;
        *self.shared.pins.lock().entry(generation).or_default() += 1;
        (Pin { shared: Arc::clone(&self.shared), generation }, tables.state)
    }
}

impl Index for MemoryIndex {
    fn snapshot(&self) -> Arc<dyn IndexSnapshot> {
        let (pin, state) = self.pin();
        Arc::new(MemorySnapshot { pin: Arc::new(pin), state })
    }

    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
    ) -> Result<(), IndexError> {
        let error = |reason| IndexError { path: "in memory".to_owned(), reason };
        let mut tables = self.shared.tables.write();
        if let Some(reason) = goes_back(tables.state, state) {
            return Err(error(reason));
        }
        let generation = tables.generation + 1;
        let mut order = IngestOrder::default();
        let mut changed = Vec::new();
        for (key, value) in rows {
            order.admit(&key).map_err(error)?;
            changed.push((key, value.map(|value| Bytes::copy_from_slice(&value))));
        }
        for (key, value) in changed {
            // The caller's bytes may be slices of something large.
            let key = RowKey::from_bytes(Bytes::copy_from_slice(key.as_bytes())).unwrap_or(key);
            tables.old.insert(key.clone());
            tables.rows.entry(key).or_default().push(Version { generation, value });
        }
        tables.generation = generation;
        tables.state = Some(*state);
        tables.reached =
            Some(tables.reached.filter(|far| far.position.lsn > state.position.lsn).unwrap_or(*state));
        let oldest = self.shared.pins.lock().keys().next().copied();
        tables.forget_before(oldest.unwrap_or(generation));
        Ok(())
    }

    fn sync(&self) -> Result<(), IndexError> {
        let mut tables = self.shared.tables.write();
        tables.synced = tables.state;
        Ok(())
    }

    fn reached(&self) -> Option<State> {
        self.shared.tables.read().reached
    }
}

#[derive(Debug, Default)]
struct Shared {
    tables: RwLock<Tables>,
    /// How many snapshots there are of each generation. Taken after `tables`, never before it.
    pins: Mutex<BTreeMap<u64, usize>>,
}

#[derive(Debug, Default)]
struct Tables {
    /// Each row's versions, oldest first.
    rows: BTreeMap<RowKey, Vec<Version>>,
    /// Rows that may have more than one version, or only a removed one.
    old: BTreeSet<RowKey>,
    generation: u64,
    state: Option<State>,
    synced: Option<State>,
    reached: Option<State>,
}

impl Tables {
    /// Drops the versions that no snapshot of generation `oldest` or a later one can see.
    fn forget_before(&mut self, oldest: u64) {
        let rows = &mut self.rows;
        self.old.retain(|key| {
            let Some(versions) = rows.get_mut(key) else {
                return false;
            };
            let visible = versions.partition_point(|version| version.generation <= oldest);
            versions.drain(..visible.saturating_sub(1));
            if versions[0].value.is_none() && versions[0].generation <= oldest {
                versions.remove(0);
            }
            if versions.is_empty() {
                rows.remove(key);
                return false;
            }
            versions.len() > 1 || versions[0].value.is_none()
        });
    }
}

#[derive(Clone, Debug)]
struct Version {
    generation: u64,
    value: Option<Bytes>,
}

fn visible(versions: &[Version], generation: u64) -> Option<&Bytes> {
    versions.iter().rev().find(|version| version.generation <= generation)?.value.as_ref()
}

/// Keeps the versions of a generation.
#[derive(Debug)]
struct Pin {
    shared: Arc<Shared>,
    generation: u64,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.shared.pins.lock();
        if let Some(count) = pins.get_mut(&self.generation) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.generation);
            }
        }
    }
}

struct MemorySnapshot {
    pin: Arc<Pin>,
    state: Option<State>,
}

impl IndexSnapshot for MemorySnapshot {
    fn state(&self) -> Option<State> {
        self.state
    }

    fn get(&self, key: &RowKey) -> Result<Option<Bytes>, IndexError> {
        let tables = self.pin.shared.tables.read();
        Ok(tables.rows.get(key).and_then(|versions| visible(versions, self.pin.generation)).cloned())
    }

    fn scan(&self, range: Range<RowKey>) -> RowIterator {
        let next = Some(Bound::Included(range.start));
        Box::new(MemoryScan {
            pin: Arc::clone(&self.pin),
            next,
            end: range.end,
            batch: Vec::new().into_iter(),
        })
    }

    fn last(&self, range: Range<RowKey>) -> Result<Option<(RowKey, Bytes)>, IndexError> {
        if range.start >= range.end {
            return Ok(None);
        }
        let tables = self.pin.shared.tables.read();
        let mut rows = tables.rows.range(range).rev();
        let found = rows.find_map(|(key, versions)| Some((key, visible(versions, self.pin.generation)?)));
        Ok(found.map(|(key, value)| (key.clone(), value.clone())))
    }
}

/// Reads a batch of rows at a time, so that a slow reader holds no lock.
struct MemoryScan {
    pin: Arc<Pin>,
    /// Where the next batch begins; `None` when there is none.
    next: Option<Bound<RowKey>>,
    end: RowKey,
    batch: std::vec::IntoIter<(RowKey, Bytes)>,
}

impl MemoryScan {
    fn fill(&mut self) {
        let Some(start) = self.next.take() else {
            return;
        };
        if matches!(&start, Bound::Included(key) | Bound::Excluded(key) if *key >= self.end) {
            return;
        }
        let tables = self.pin.shared.tables.read();
        let mut batch = Vec::with_capacity(SCAN_BATCH);
        for (seen, (key, versions)) in
            tables.rows.range((start, Bound::Excluded(self.end.clone()))).enumerate()
        {
            if let Some(value) = visible(versions, self.pin.generation) {
                batch.push((key.clone(), value.clone()));
            }
            if seen + 1 == SCAN_BATCH {
                self.next = Some(Bound::Excluded(key.clone()));
                break;
            }
        }
        self.batch = batch.into_iter();
    }
}

impl Iterator for MemoryScan {
    type Item = Result<(RowKey, Bytes), IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.batch.next() {
                return Some(Ok(row));
            }
            self.next.as_ref()?;
            self.fill();
        }
    }
}

/// How many rows a scan reads under one lock.
const SCAN_BATCH: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::conformance::{key, state_at};

    #[test]
    fn versions_that_nobody_reads_are_dropped() {
        let index = MemoryIndex::new();
        let held = {
            index
                .ingest(&mut [(key(1, 1), Some(Bytes::from_static(b"a")))].into_iter(), &state_at(2))
                .unwrap();
            index.snapshot()
        };
        for lsn in 3..100 {
            let value = (lsn % 7 != 0).then(|| Bytes::from(lsn.to_string()));
            index.ingest(&mut [(key(1, 1), value)].into_iter(), &state_at(lsn)).unwrap();
        }
        assert_eq!(held.get(&key(1, 1)).unwrap().as_deref(), Some(&b"a"[..]));
        drop(held);
        index.ingest(&mut [(key(1, 1), None)].into_iter(), &state_at(100)).unwrap();
        assert_eq!(index.version_count(), 0);
    }
}
