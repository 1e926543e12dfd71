//! Inode numbers.

use std::fmt;

use murphy_log::Lsn;

/// An inode number: the LSN of the entry that created the inode. It is never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(u64);

impl Ino {
    /// The root directory, which no entry creates.
    pub const ROOT: Ino = Ino(1);

    /// The inode with this number.
    pub const fn new(number: u64) -> Ino {
        Ino(number)
    }

    /// The inode that the entry at `lsn` creates.
    pub const fn born_at(lsn: Lsn) -> Ino {
        Ino(lsn.get())
    }

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ino({})", self.0)
    }
}

impl fmt::Display for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
