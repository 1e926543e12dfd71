//! Snapshots: the whole tree at one position, in one compact file.
//!
//! The same file is node base, archive base, mirror seed and portable dump. [`write_snapshot`] makes one from an index or a view,
//! [`SnapshotReader`] gives its rows back, [`verify_snapshot`] proves one without keeping anything. `docs/formats/snapshot.md` is the
//! normative description of the bytes.
//!
//! ```text
//!  header | names, inodes, rows ... blocks in the order of inode numbers | footer | trailer
//! ```
//!
//! Invariants:
//! - Every row comes back with its exact bytes, whatever its table and version: a row that has no compact form is stored as it is.
//! - Equal rows and an equal header make equal bytes, whatever the number of threads.
//! - Writing and reading need bounded memory at any number of rows: only sequential scans, blocks of at most 32 Ki rows, and one
//!   bounded table of names whose inodes are still to come.
//! - A writer takes its own blocks apart again; digest, counts and usage of what came out must be those of the state, or it fails.
//! - A reader reports success only when every checksum, every count, the digest and the usage agree.

mod awaited;
mod block;
mod footer;
mod header;
mod inodes;
mod names;
mod plain_rows;
mod read;
mod streams;
mod tally;
#[cfg(test)]
mod tests;
mod times;
mod workers;
mod write;

pub use block::BlockFault;
pub use header::SnapshotHeader;
pub use read::{ReadSnapshotError, RowBatch, SnapshotReader, verify_snapshot};
pub use tally::Disagreement;
pub use write::{SnapshotOrigin, WriteSnapshotError, write_snapshot};

use murphy_log::{Digest, VolumeKeys};

use crate::NameHasher;

/// How far a snapshot's writing or reading has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SnapshotProgress {
    /// Inodes so far; the header's usage says how many there will be.
    pub inodes: u64,
    /// Rows so far, all tables together.
    pub rows: u64,
    /// Bytes of the file so far.
    pub bytes: u64,
}

/// What a complete and verified snapshot holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotSummary {
    /// What it is a snapshot of.
    pub header: SnapshotHeader,
    /// Rows per table number, without the tables that have none.
    pub rows: Vec<(u8, u64)>,
    /// The sum over the rows of the tree tables: equal to the header's.
    pub digest: Digest,
    /// Where the bytes of the file went.
    pub sections: SectionBytes,
}

impl SnapshotSummary {
    /// How many rows table `number` has.
    pub fn rows_of(&self, number: u8) -> u64 {
        self.rows.iter().find(|(table, _)| *table == number).map_or(0, |(_, rows)| *rows)
    }
}

/// Bytes of a snapshot file, by what they hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SectionBytes {
    /// Names, and which inode each stands for.
    pub names: u64,
    /// Attributes of inodes and directories.
    pub attributes: u64,
    /// Extents.
    pub extents: u64,
    /// Rows of all other tables.
    pub others: u64,
    /// Header, footer and trailer.
    pub framing: u64,
}

impl SectionBytes {
    /// The length of the file.
    pub fn total(&self) -> u64 {
        self.names + self.attributes + self.extents + self.others + self.framing
    }

    fn add(&mut self, other: &SectionBytes) {
        self.names += other.names;
        self.attributes += other.attributes;
        self.extents += other.extents;
        self.others += other.others;
        self.framing += other.framing;
    }
}

/// The hasher that placed the names of the volume of `keys`. A snapshot of other names is still exact, only larger.
fn name_hasher(keys: &VolumeKeys) -> NameHasher {
    NameHasher::of(keys)
}

/// How many threads compress or expand blocks; the result does not depend on it.
fn worker_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX)
}

/// Each worker holds one block in several forms, about 20 MiB.
const WORKERS_MAX: usize = 4;
