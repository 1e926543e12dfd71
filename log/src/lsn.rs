//! Log sequence numbers: the dense numbering of entries in one branch.
//!
//! Invariants:
//! - LSN 1 belongs to the root inode, which no entry creates; the first entry of a branch has LSN 2.
//! - Within a branch the numbers are dense: the entry after `n` is `n + 1`, across frames, segments and epochs.

use std::fmt;

/// A log sequence number: the place of one entry in the history of a branch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(u64);

impl Lsn {
    /// The LSN of the root inode; "nothing has been appended yet" as a position.
    pub const ROOT: Lsn = Lsn(1);
    /// The LSN of a branch's first entry.
    pub const FIRST: Lsn = Lsn(2);
    /// No LSN reaches this; usable as an open upper bound.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// The LSN with this number.
    pub const fn new(number: u64) -> Lsn {
        Lsn(number)
    }

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The LSN of the entry after this one.
    #[must_use]
    pub const fn next(self) -> Lsn {
        Lsn(self.0 + 1)
    }

    /// The LSN of the entry before this one; `ROOT` and below stay where they are.
    #[must_use]
    pub const fn previous(self) -> Lsn {
        Lsn(if self.0 > 1 { self.0 - 1 } else { self.0 })
    }

    /// The LSN `count` entries further on.
    #[must_use]
    pub const fn advanced(self, count: u64) -> Lsn {
        Lsn(self.0 + count)
    }

    /// How many entries lie after `earlier` up to and including this one; 0 if `earlier` is later.
    pub const fn since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lsn({})", self.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
