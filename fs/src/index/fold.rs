//! The fold: of the changes of many entries the last one of each key, in key order.
//!
//! Invariants:
//! - Changes are pushed in the order of the log (LSN, then place in the entry); of equal keys the last one pushed remains.
//! - A fold owns its bytes: the entries may be dropped at once.
//! - Memory is what was pushed, plus 48 bytes a row. Nothing is allocated for a single row.

use std::cmp::Ordering;

use bytes::Bytes;
use murphy_log::Entry;

use super::{MAX_KEY_BYTES, is_table};
use crate::RowKey;

/// Changes, gathered for one generation.
#[derive(Debug)]
pub struct Fold {
    /// Key and value of every row, one after the other.
    arena: Vec<u8>,
    rows: Vec<FoldedRow>,
    /// For some of the last keys the place in `rows` plus one: a directory's row is written by every create in it.
    recent: Vec<u32>,
}

impl Default for Fold {
    fn default() -> Fold {
        Fold::new()
    }
}

impl Fold {
    /// A fold without changes.
    pub fn new() -> Fold {
        Fold { arena: Vec::new(), rows: Vec::new(), recent: vec![0; RECENT_KEYS] }
    }

    /// The fold of these entries.
    pub fn of(entries: &[Entry]) -> Result<Fold, FoldError> {
        let mut fold = Fold::new();
        entries.iter().try_for_each(|entry| fold.push_entry(entry))?;
        Ok(fold)
    }

    /// Adds the changes of the next entry.
    pub fn push_entry(&mut self, entry: &Entry) -> Result<(), FoldError> {
        entry
            .changes
            .iter()
            .try_for_each(|change| self.push(change.table, &change.key, change.value.as_deref()))
    }

    /// Adds the next change.
    pub fn push(&mut self, table: u8, key: &[u8], value: Option<&[u8]>) -> Result<(), FoldError> {
        if !is_table(table) || key.len() >= MAX_KEY_BYTES {
            return Err(FoldError::Key { table, length: key.len() });
        }
        let row = FoldedRow::new(table, key, value, self.arena.len()).ok_or(FoldError::Full)?;
        if u32::try_from(self.rows.len()).is_err() {
            return Err(FoldError::Full);
        }
        let slot = row.slot();
        let seen = (self.recent[slot] as usize).checked_sub(1);
        if let Some(old) = seen.map(|at| self.rows[at]).filter(|old| old.has_key(&self.arena, table, key))
            && row.value_len == old.value_len
        {
            let start = old.start as usize + usize::from(old.key_len);
            let value = value.unwrap_or_default();
            self.arena[start..start + value.len()].copy_from_slice(value);
            return Ok(());
        }
        self.arena.push(table);
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value.unwrap_or_default());
        self.rows.push(row);
        self.recent[slot] = self.rows.len() as u32;
        Ok(())
    }

    /// How many rows it holds, some of them perhaps of equal keys.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// How many bytes of keys and values it holds.
    pub fn bytes(&self) -> usize {
        self.arena.len()
    }

    /// The last change of each key, in key order.
    pub fn into_rows(mut self) -> FoldedRows {
        let arena = &self.arena;
        self.rows.sort_unstable_by(|a, b| a.compare(b, arena).then(a.start.cmp(&b.start)));
        FoldedRows { arena: Bytes::from(self.arena), rows: self.rows.into_iter().peekable() }
    }
}

/// The rows of a generation: sorted, each key once, `None` for a removed row. They share one block of memory.
#[derive(Debug)]
pub struct FoldedRows {
    arena: Bytes,
    rows: std::iter::Peekable<std::vec::IntoIter<FoldedRow>>,
}

impl Iterator for FoldedRows {
    type Item = (RowKey, Option<Bytes>);

    fn next(&mut self) -> Option<(RowKey, Option<Bytes>)> {
        let mut row = self.rows.next()?;
        let arena = &self.arena;
        while let Some(later) = self.rows.next_if(|next| next.compare(&row, arena) == Ordering::Equal) {
            row = later;
        }
        let start = row.start as usize;
        let split = start + usize::from(row.key_len);
        let key =
            RowKey::from_bytes(arena.slice(start..split)).expect("a key has at least its table's number");
        let value = (row.value_len != REMOVED).then(|| arena.slice(split..split + row.value_len as usize));
        Some((key, value))
    }
}

/// Where a row is in the arena, and enough of its key to sort without looking there.
#[derive(Clone, Copy, Debug)]
struct FoldedRow {
    /// The first sixteen bytes of table number and key, filled up with zeros.
    prefix: u128,
    start: u32,
    value_len: u32,
    /// Table number included.
    key_len: u16,
}

impl FoldedRow {
    /// `None` if the arena would become too large.
    fn new(table: u8, key: &[u8], value: Option<&[u8]>, start: usize) -> Option<FoldedRow> {
        let value_len = value.map_or(0, <[u8]>::len);
        let key_len = 1 + key.len();
        if start.checked_add(key_len)?.checked_add(value_len)? > MAX_ARENA_BYTES {
            return None;
        }
        let mut prefix = [0; PREFIX_BYTES];
        prefix[0] = table;
        let copied = key.len().min(PREFIX_BYTES - 1);
        prefix[1..=copied].copy_from_slice(&key[..copied]);
        Some(FoldedRow {
            prefix: u128::from_be_bytes(prefix),
            start: start as u32,
            value_len: if value.is_some() { value_len as u32 } else { REMOVED },
            key_len: key_len as u16,
        })
    }

    fn key<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        &arena[self.start as usize..][..usize::from(self.key_len)]
    }

    fn has_key(&self, arena: &[u8], table: u8, key: &[u8]) -> bool {
        self.key(arena).split_first() == Some((&table, key))
    }

    /// Compares the keys.
    fn compare(&self, other: &FoldedRow, arena: &[u8]) -> Ordering {
        self.prefix.cmp(&other.prefix).then_with(|| {
            // With equal prefixes a key that fits its prefix is the beginning of the other.
            if usize::from(self.key_len.min(other.key_len)) <= PREFIX_BYTES {
                self.key_len.cmp(&other.key_len)
            } else {
                self.key(arena).cmp(other.key(arena))
            }
        })
    }

    /// Where [`Fold::recent`] remembers this key.
    fn slot(&self) -> usize {
        let mixed = (self.prefix as u64 ^ (self.prefix >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> (u64::BITS - RECENT_KEYS.trailing_zeros())) as usize
    }
}

/// Why a change cannot be folded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FoldError {
    /// Its table or key cannot be stored.
    #[error("a key of {length} bytes in table {table} cannot be stored")]
    Key {
        /// The table.
        table: u8,
        /// The length of the key, in bytes.
        length: usize,
    },
    /// The generation is full; it should have been ended long before.
    #[error("a generation cannot hold more than {MAX_ARENA_BYTES} bytes")]
    Full,
}

const PREFIX_BYTES: usize = 16;
/// How many keys are remembered; a power of two.
const RECENT_KEYS: usize = 4096;
const _: () = assert!(RECENT_KEYS.is_power_of_two());
/// The value length of a removed row.
const REMOVED: u32 = u32::MAX;
/// A fold holds at most so many bytes of keys and values.
const MAX_ARENA_BYTES: usize = 1 << 30;
const _: () = assert!(MAX_KEY_BYTES <= u16::MAX as usize);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Pushed = (u8, Vec<u8>, Option<Vec<u8>>);

    /// The same by way of a map.
    fn naive(pushed: &[Pushed]) -> Vec<(RowKey, Option<Bytes>)> {
        let mut map = BTreeMap::new();
        for (table, key, value) in pushed {
            map.insert(RowKey::from_parts(*table, key), value.clone().map(Bytes::from));
        }
        map.into_iter().collect()
    }

    fn folded(pushed: &[Pushed]) -> Vec<(RowKey, Option<Bytes>)> {
        let mut fold = Fold::new();
        for (table, key, value) in pushed {
            fold.push(*table, key, value.as_deref()).unwrap();
        }
        fold.into_rows().collect()
    }

    /// Few keys, many of them prefixes of one another, with zeros at their ends: where a comparison by prefix could go wrong.
    fn key() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![Just(0u8), Just(1), Just(255)];
        (0usize..4, proptest::collection::vec(byte, 0..4)).prop_map(|(zeros, tail)| {
            let mut key = vec![0; 6 * zeros];
            key.extend(tail);
            key
        })
    }

    proptest! {
        #[test]
        fn a_fold_keeps_the_last_change_of_each_key(
            pushed in proptest::collection::vec(
                (1u8..4, key(), proptest::option::of(proptest::collection::vec(any::<u8>(), 0..3))), 0..200)
        ) {
            prop_assert_eq!(folded(&pushed), naive(&pushed));
        }
    }

    #[test]
    fn a_hot_row_is_kept_once() {
        let mut fold = Fold::new();
        for number in 0..10_000u32 {
            fold.push(2, &7u64.to_be_bytes(), Some(&number.to_be_bytes())).unwrap();
        }
        assert_eq!(fold.len(), 1);
        let rows: Vec<_> = fold.into_rows().collect();
        assert_eq!(rows[0].1.as_deref(), Some(&9_999u32.to_be_bytes()[..]));
    }

    #[test]
    fn a_key_that_no_index_can_hold_is_refused() {
        let mut fold = Fold::new();
        assert!(fold.push(0, &[0; 8], None).is_err());
        assert!(fold.push(u8::MAX, &[0; 8], None).is_err());
        assert!(fold.push(1, &[0; MAX_KEY_BYTES], None).is_err());
        assert!(fold.push(1, &[0; MAX_KEY_BYTES - 1], None).is_ok());
    }
}
