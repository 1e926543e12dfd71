//! One state of the index in fjall, as it is read.
//!
//! Invariants:
//! - Everything is read from one snapshot of both keyspaces, in the order of keys across them.
//! - A panic of fjall is an error here.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use fjall::{Keyspace, Readable, Snapshot};
use murphy_log::State;

use super::{IndexError, IndexSnapshot, RowIterator};
use crate::{RowKey, Table};

/// Both keyspaces after one generation.
pub(super) struct FjallSnapshot {
    pub(super) place: Arc<str>,
    pub(super) names: Keyspace,
    pub(super) rows: Keyspace,
    pub(super) snapshot: Snapshot,
    pub(super) state: Option<State>,
}

impl IndexSnapshot for FjallSnapshot {
    fn state(&self) -> Option<State> {
        self.state
    }

    fn get(&self, key: &RowKey) -> Result<Option<Bytes>, IndexError> {
        let keyspace = if is_name(key) { &self.names } else { &self.rows };
        let value = guarded(&self.place, || self.snapshot.get(keyspace, key.as_bytes()))?;
        // A copy: the slice would keep its whole block, and single rows are what caches keep.
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan(&self, range: Range<RowKey>) -> RowIterator {
        let (place, snapshot) = (Arc::clone(&self.place), self.snapshot.clone());
        let pieces = self.pieces(range);
        Box::new(FjallScan { place, snapshot, pieces, current: None })
    }

    fn last(&self, range: Range<RowKey>) -> Result<Option<(RowKey, Bytes)>, IndexError> {
        for (keyspace, range) in self.pieces(range) {
            let range = range.start.into_bytes()..range.end.into_bytes();
            let mut rows = guarded(&self.place, || Ok(self.snapshot.range(&keyspace, range)))?;
            let last = guarded(&self.place, || rows.next_back().map(fjall::Guard::into_inner).transpose())?;
            if let Some((key, value)) = last {
                return Ok(Some((row_key(&self.place, key.into())?, value.into())));
            }
        }
        Ok(None)
    }
}

impl FjallSnapshot {
    /// The parts of a range of keys in the keyspaces, the last one first.
    fn pieces(&self, range: Range<RowKey>) -> Vec<(Keyspace, Range<RowKey>)> {
        let start = range.start.max(first_key(1));
        let (names, after) = (first_key(Table::Dentry.number()), first_key(Table::Dentry.number() + 1));
        let pieces = [
            (&self.rows, start.clone(), range.end.clone().min(names.clone())),
            (&self.names, start.clone().max(names), range.end.clone().min(after.clone())),
            (&self.rows, start.max(after), range.end),
        ];
        let pieces = pieces.into_iter().filter(|(_, start, end)| start < end);
        pieces.rev().map(|(keyspace, start, end)| (keyspace.clone(), start..end)).collect()
    }
}

/// Goes through the keyspaces in the order of keys.
struct FjallScan {
    place: Arc<str>,
    snapshot: Snapshot,
    /// What is left, the next one last.
    pieces: Vec<(Keyspace, Range<RowKey>)>,
    current: Option<fjall::Iter>,
}

impl FjallScan {
    fn step(&mut self) -> Result<Option<(RowKey, Bytes)>, IndexError> {
        loop {
            if let Some(current) = &mut self.current {
                let row = guarded(&self.place, || current.next().map(fjall::Guard::into_inner).transpose())?;
                if let Some((key, value)) = row {
                    return Ok(Some((row_key(&self.place, key.into())?, value.into())));
                }
            }
            let Some((keyspace, range)) = self.pieces.pop() else {
                return Ok(None);
            };
            let range = range.start.into_bytes()..range.end.into_bytes();
            self.current = Some(guarded(&self.place, || Ok(self.snapshot.range(&keyspace, range)))?);
        }
    }
}

impl Iterator for FjallScan {
    type Item = Result<(RowKey, Bytes), IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = self.step();
        if row.is_err() {
            self.current = None;
            self.pieces.clear();
        }
        row.transpose()
    }
}

pub(super) fn is_name(key: &RowKey) -> bool {
    key.table() == Table::Dentry.number()
}

fn row_key(place: &str, key: Bytes) -> Result<RowKey, IndexError> {
    let empty = || IndexError { path: place.to_owned(), reason: "an empty key".to_owned() };
    RowKey::from_bytes(key).ok_or_else(empty)
}

fn first_key(table: u8) -> RowKey {
    RowKey::from_parts(table, &[])
}

/// Calls fjall. It asserts where it could return an error, so that damage can make it panic.
pub(super) fn guarded<T>(place: &str, call: impl FnOnce() -> fjall::Result<T>) -> Result<T, IndexError> {
    let reason = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic_text(panic.as_ref()),
    };
    Err(IndexError { path: place.to_owned(), reason })
}

pub(super) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("fjall panicked: {}", text.unwrap_or("without a text"))
}
