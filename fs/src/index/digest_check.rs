//! The digest of an index, recomputed from its rows: what finds damage that nothing else does.
//!
//! Invariants:
//! - Every row is read once, and one at a time is held.
//! - A check that was stopped says nothing, whatever it has seen.
//! - The sum does not depend on the order of rows, so that parts are summed in parallel.

use std::{collections::BTreeMap, ops::Range, thread};

use murphy_log::{Digest, VolumeKeys};

use super::{IndexError, IndexSnapshot};
use crate::{RowKey, Table};

/// What an index holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DigestCheck {
    /// The digest of the rows of the tree tables.
    pub digest: Digest,
    /// How many rows each table has, of the others too, by table number.
    pub rows: BTreeMap<u8, u64>,
}

/// Reads every row of `snapshot` and computes the digest, which should be that of the snapshot's state. Two threads read.
pub fn check_digest(snapshot: &dyn IndexSnapshot, keys: &VolumeKeys) -> Result<DigestCheck, IndexError> {
    let first_key = |table| RowKey::from_parts(table, &[]);
    let (names, after) = (Table::Dentry.number(), Table::Dentry.number() + 1);
    let names = first_key(names)..first_key(after);
    // Dentries are about as many as everything else together.
    let (before, behind) = (first_key(1)..names.start.clone(), names.end.clone()..first_key(u8::MAX));
    let (first, second) = thread::scope(|scope| {
        let names = scope.spawn(|| sum(snapshot, keys, [names], &mut || true));
        let others = sum(snapshot, keys, [before, behind], &mut || true);
        (names.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), others)
    });
    let (first, mut check) = (first?.unwrap_or_default(), second?.unwrap_or_default());
    check.digest = check.digest.plus(first.digest);
    check.rows.extend(first.rows);
    Ok(check)
}

/// The same by the calling thread alone, which asks `go_on` every few hundred rows; `None` once that says no. It may wait there for as long
/// as it likes.
pub fn check_digest_while(
    snapshot: &dyn IndexSnapshot,
    keys: &VolumeKeys,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<DigestCheck>, IndexError> {
    sum(snapshot, keys, [RowKey::from_parts(1, &[])..RowKey::from_parts(u8::MAX, &[])], go_on)
}

fn sum<const N: usize>(
    snapshot: &dyn IndexSnapshot,
    keys: &VolumeKeys,
    ranges: [Range<RowKey>; N],
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<DigestCheck>, IndexError> {
    let mut check = DigestCheck::default();
    for range in ranges {
        for (read, row) in snapshot.scan(range).enumerate() {
            if read % ROWS_A_TURN == 0 && !go_on() {
                return Ok(None);
            }
            let (key, value) = row?;
            *check.rows.entry(key.table()).or_default() += 1;
            if Table::in_digest(key.table()) {
                check.digest = check.digest.plus(keys.row_digest(key.table(), key.key(), &value));
            }
        }
    }
    Ok(Some(check))
}

/// Rows that are read between two questions whether to go on.
const ROWS_A_TURN: usize = 512;
