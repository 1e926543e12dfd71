//! The writer's operations: a list that is the same every time, to be applied to a mount and to a plain directory alike.
//!
//! Invariants:
//! - One seed is one list, on every machine: what was written need not be kept to be known.

use std::{
    collections::BTreeSet,
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

/// Makes operations that fit each other.
pub(super) struct Script {
    random: Random,
    live: BTreeSet<PathBuf>,
    made: u64,
}

impl Script {
    pub(super) fn new(seed: u64) -> Script {
        Script { random: Random(seed | 1), live: BTreeSet::new(), made: 0 }
    }

    /// The next `count` operations of everyday work: new files, edits, renames, a few deletions.
    pub(super) fn work(&mut self, count: usize) -> Vec<Operation> {
        (0..count).map(|_| self.next()).collect()
    }

    /// The removal of most of what is there.
    pub(super) fn mass_deletion(&mut self) -> Vec<Operation> {
        let doomed: Vec<PathBuf> = self.live.iter().filter(|_| self.random.below(4) > 0).cloned().collect();
        doomed.iter().for_each(|path| drop(self.live.take(path)));
        doomed.into_iter().map(|path| Operation::Remove { path }).collect()
    }

    fn next(&mut self) -> Operation {
        self.made += 1;
        let seed = self.random.next();
        let length = 1 + self.random.below(if self.made.is_multiple_of(37) { 3 << 20 } else { 24 << 10 });
        let victim = self.random.below(self.live.len().max(1));
        let path = self.live.iter().nth(victim).cloned();
        match (self.random.below(10), path) {
            (4 | 5, Some(path)) => Operation::Write { path, seed, length },
            (6 | 7, Some(path)) => Operation::Append { path, seed, length },
            (8, Some(from)) => {
                let to = self.fresh();
                self.live.remove(&from);
                self.live.insert(to.clone());
                Operation::Rename { from, to }
            }
            (9, Some(path)) => {
                self.live.remove(&path);
                Operation::Remove { path }
            }
            _ => {
                let path = self.fresh();
                self.live.insert(path.clone());
                Operation::Write { path, seed, length }
            }
        }
    }

    fn fresh(&self) -> PathBuf {
        Path::new(&format!("d{}", self.made % DIRECTORIES)).join(format!("file-{:05}", self.made))
    }
}

/// The directories that operations use.
pub(super) fn directories() -> impl Iterator<Item = PathBuf> {
    (0..DIRECTORIES).map(|number| PathBuf::from(format!("d{number}")))
}

/// Makes the directories that operations use.
pub(super) fn prepare(root: &Path) -> io::Result<()> {
    directories().try_for_each(|directory| fs::create_dir_all(root.join(directory)))
}

impl Operation {
    /// Applies it below `root`; with `Sync::Each` it is durable when this returns: fsync of the file, then of the directories.
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
            Operation::Rename { from, to } => fs::rename(root.join(from), root.join(to))?,
            Operation::Remove { path } => fs::remove_file(root.join(path))?,
        }
        self.paths()
            .iter()
            .filter_map(|path| path.parent())
            .try_for_each(|parent| sync.directory(&root.join(parent)))
    }

    /// The paths that it changes.
    pub(super) fn paths(&self) -> Vec<&Path> {
        match self {
            Operation::Write { path, .. } | Operation::Append { path, .. } | Operation::Remove { path } => {
                vec![path]
            }
            Operation::Rename { from, to } => vec![from, to],
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

    fn directory(self, path: &Path) -> io::Result<()> {
        if self == Sync::Each { File::open(path)?.sync_all() } else { Ok(()) }
    }
}

/// Bytes that are half text, half noise, so that compression has something to do and not everything.
pub(super) fn contents(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
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
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

const DIRECTORIES: u64 = 8;
