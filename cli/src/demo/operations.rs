//! The writer's operations, which can be applied to a mount and to a plain directory alike.
//!
//! Invariants:
//! - What an operation writes follows from a seed: it need not be kept to be known.
//! - With [`Sync::Each`] an operation is durable when it returns: fsync of the file, then of its directories.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// One change below the ledger's directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    /// Writes a file, new or over what is there.
    Write { path: PathBuf, seed: u64, length: usize },
    /// Adds to the end of a file.
    Append { path: PathBuf, seed: u64, length: usize },
    /// Moves a file to a free name.
    Rename { from: PathBuf, to: PathBuf },
    /// Removes a file.
    Remove { path: PathBuf },
}

impl Operation {
    /// Applies it below `root`.
    pub(super) fn apply(&self, root: &Path, sync: Sync) -> io::Result<()> {
        match self {
            Operation::Write { path, seed, length } => {
                let mut file = File::create(root.join(path))?;
                file.write_all(&contents(*seed, *length))?;
                sync.file(&file)?;
            }
            Operation::Append { path, seed, length } => {
                let mut file = File::options().append(true).open(root.join(path))?;
                file.write_all(&contents(*seed, *length))?;
                sync.file(&file)?;
            }
            Operation::Rename { from, to } => {
                fs::rename(root.join(from), root.join(to))?;
                sync.directory_of(&root.join(from))?;
            }
            Operation::Remove { path } => fs::remove_file(root.join(path))?,
        }
        sync.directory_of(&root.join(self.path()))
    }

    /// What it was done to, in one word.
    pub(super) fn done(&self) -> &'static str {
        match self {
            Operation::Write { .. } => "written",
            Operation::Append { .. } => "appended",
            Operation::Rename { .. } => "renamed",
            Operation::Remove { .. } => "removed",
        }
    }

    /// The path that it is about; of a rename the new one.
    pub(super) fn path(&self) -> &Path {
        match self {
            Operation::Write { path, .. } | Operation::Append { path, .. } | Operation::Remove { path } => {
                path
            }
            Operation::Rename { to, .. } => to,
        }
    }

    /// The path that a rename frees.
    pub(super) fn freed(&self) -> Option<&Path> {
        match self {
            Operation::Rename { from, .. } => Some(from),
            _ => None,
        }
    }
}

/// Whether an operation waits until it is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sync {
    Each,
    Never,
}

impl Sync {
    fn file(self, file: &File) -> io::Result<()> {
        if self == Sync::Each { file.sync_all() } else { Ok(()) }
    }

    fn directory_of(self, path: &Path) -> io::Result<()> {
        match path.parent() {
            Some(directory) if self == Sync::Each => File::open(directory)?.sync_all(),
            _ => Ok(()),
        }
    }
}

/// The directories that operations use.
pub(super) fn directories() -> impl Iterator<Item = PathBuf> {
    (0..DIRECTORIES).map(directory)
}

/// One of them for every number.
pub(super) fn directory(number: u64) -> PathBuf {
    PathBuf::from(format!("d{}", number % DIRECTORIES))
}

/// Makes the directories that operations use.
pub(super) fn prepare(root: &Path) -> io::Result<()> {
    directories().try_for_each(|directory| fs::create_dir_all(root.join(directory)))
}

/// Bytes that are half text, half noise, so that compression has something to do and not everything.
pub(super) fn contents(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(length + 64);
    while bytes.len() < length {
        let word = random.next();
        if word.is_multiple_of(2) {
            bytes.extend_from_slice(b"anything that can go wrong will go wrong; ");
        } else {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes.truncate(length);
    bytes
}

/// xorshift64* (Vigna, 2016): the same numbers every time.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `limit`, which is not 0.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

const DIRECTORIES: u64 = 8;
