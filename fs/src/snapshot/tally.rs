//! What was counted over rows: how many of each table, their digest, the bytes that files take.

use murphy_log::{Digest, State, VolumeKeys};

use crate::Table;

/// Counts over some rows of a tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Tally {
    rows: Box<[u64; 256]>,
    pub(super) digest: Digest,
    /// Bytes that inodes say to be allocated.
    allocated: u64,
    /// Whether some inode row is of an unknown layout, so that `allocated` is not all.
    partial: bool,
}

impl Tally {
    pub(super) fn new() -> Tally {
        Tally { rows: Box::new([0; 256]), digest: Digest::default(), allocated: 0, partial: false }
    }

    /// Counts one row.
    pub(super) fn row(&mut self, keys: &VolumeKeys, table: u8, key: &[u8], value: &[u8]) {
        self.rows[usize::from(table)] += 1;
        if Table::in_digest(table) {
            self.digest = self.digest.plus(keys.row_digest(table, key, value));
        }
    }

    /// Counts the bytes of one inode.
    pub(super) fn allocated(&mut self, bytes: u64) {
        self.allocated = self.allocated.wrapping_add(bytes);
    }

    /// Remembers that the bytes of an inode are unknown.
    pub(super) fn unknown_inode(&mut self) {
        self.partial = true;
    }

    pub(super) fn add(&mut self, other: &Tally) {
        self.rows.iter_mut().zip(other.rows.iter()).for_each(|(sum, rows)| *sum += rows);
        self.digest = self.digest.plus(other.digest);
        self.allocated = self.allocated.wrapping_add(other.allocated);
        self.partial |= other.partial;
    }

    /// Rows of one table.
    pub(super) fn rows_of(&self, table: Table) -> u64 {
        self.rows[usize::from(table.number())]
    }

    /// Rows of all tables.
    pub(super) fn total(&self) -> u64 {
        self.rows.iter().sum()
    }

    /// Rows per table, without the tables that have none.
    pub(super) fn per_table(&self) -> Vec<(u8, u64)> {
        (0..=u8::MAX).zip(self.rows.iter().copied()).filter(|(_, rows)| *rows > 0).collect()
    }

    /// Whether these are the rows of a tree at `state`.
    pub(super) fn check(&self, state: &State) -> Result<(), Disagreement> {
        let found = [self.rows_of(Table::Inode), self.allocated];
        let recorded = [state.usage.inodes, state.usage.bytes];
        if found[0] != recorded[0] {
            return Err(Disagreement::Inodes { recorded: recorded[0], found: found[0] });
        }
        if self.digest != state.digest {
            return Err(Disagreement::Digest { recorded: state.digest, found: self.digest });
        }
        if !self.partial && found[1] != recorded[1] {
            return Err(Disagreement::Bytes { recorded: recorded[1], found: found[1] });
        }
        Ok(())
    }
}

/// Rows that are not those of the state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Disagreement {
    /// Another tree.
    #[error("the rows have the digest {found}, the field digest of the state says {recorded}")]
    Digest {
        /// What the state says.
        recorded: Digest,
        /// What the rows sum up to.
        found: Digest,
    },
    /// Another number of inodes.
    #[error("{found} inodes, the field inodes of the state says {recorded}")]
    Inodes {
        /// What the state says.
        recorded: u64,
        /// How many there are.
        found: u64,
    },
    /// Other sizes.
    #[error("{found} bytes of file data, the field bytes of the state says {recorded}")]
    Bytes {
        /// What the state says.
        recorded: u64,
        /// What the inodes sum up to.
        found: u64,
    },
}
