//! A history of changes with the moments at which each was made, that a plain directory can be led through step by step.
//!
//! Invariants:
//! - A change is one entry of a volume's log, so every prefix of a history is a state that the volume was in, and no other state lies between
//!   two prefixes. Bytes are therefore written to files that are there, in one piece, and synced at once.
//! - Every change leaves another tree than it found.

use std::{
    fs::{self, File},
    io,
    ops::{Range, RangeInclusive},
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::Random;

/// One change below a root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Makes a directory.
    MakeDir(PathBuf),
    /// Makes an empty file.
    Create(PathBuf),
    /// Writes bytes into a file that is there.
    Write(PathBuf, u64, Vec<u8>),
    /// Sets the length of a file.
    SetLength(PathBuf, u64),
    /// Sets the mode of a file.
    SetMode(PathBuf, u32),
    /// Moves a file to a name that is free or another file's.
    Rename(PathBuf, PathBuf),
    /// Gives a file one more name.
    Link(PathBuf, PathBuf),
    /// Makes a symbolic link.
    Symlink(PathBuf, PathBuf),
    /// Removes a file.
    Remove(PathBuf),
}

impl Change {
    /// Makes it below `root`; bytes are synced.
    ///
    /// # Errors
    /// What the file system says.
    pub fn apply(&self, root: &Path) -> io::Result<()> {
        match self {
            Change::MakeDir(path) => fs::create_dir(root.join(path)),
            Change::Create(path) => File::create_new(root.join(path)).map(drop),
            Change::Write(path, offset, bytes) => {
                let file = File::options().write(true).open(root.join(path))?;
                file.write_all_at(bytes, *offset)?;
                file.sync_all()
            }
            Change::SetLength(path, length) => {
                File::options().write(true).open(root.join(path))?.set_len(*length)
            }
            Change::SetMode(path, mode) => {
                fs::set_permissions(root.join(path), fs::Permissions::from_mode(*mode))
            }
            Change::Rename(from, to) => fs::rename(root.join(from), root.join(to)),
            Change::Link(from, to) => fs::hard_link(root.join(from), root.join(to)),
            Change::Symlink(to, path) => symlink(to, root.join(path)),
            Change::Remove(path) => fs::remove_file(root.join(path)),
        }
    }
}

/// A change that was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Made {
    /// What.
    pub change: Change,
    /// Just before, in nanoseconds since 1970.
    pub begun: u64,
    /// Just after it had returned, and its fsync if there was one.
    pub done: u64,
    /// Whether it and everything before it was durable then.
    pub is_durable: bool,
}

/// A file that changes can be made to.
#[derive(Clone, Debug)]
struct Drawn {
    path: PathBuf,
    length: u64,
    /// How often its mode was set.
    modes: u32,
}

/// What one writer did, in order.
#[derive(Debug)]
pub struct History {
    random: Random,
    files: Vec<Drawn>,
    directories: Vec<PathBuf>,
    names: u64,
    made: Vec<Made>,
}

impl History {
    /// An empty one; the changes that it will make follow from `seed`.
    pub fn new(seed: u64) -> History {
        let directories = vec![PathBuf::new()];
        History { random: Random::new(seed), files: Vec::new(), directories, names: 0, made: Vec::new() }
    }

    /// Everything that was made.
    pub fn made(&self) -> &[Made] {
        &self.made
    }

    /// Makes `count` changes below `root`, one after the other; about every third is made durable. Returns which they are.
    ///
    /// # Errors
    /// What the file system says.
    pub fn burst(&mut self, root: &Path, count: usize) -> io::Result<Range<usize>> {
        let first = self.made.len();
        for _ in 0..count {
            let change = self.draw();
            let mut is_durable = matches!(change, Change::Write(..));
            let begun = now();
            change.apply(root)?;
            if !is_durable && self.random.below(3) == 0 {
                File::open(root)?.sync_all()?;
                is_durable = true;
            }
            self.made.push(Made { change, begun, done: now(), is_durable });
        }
        Ok(first..self.made.len())
    }

    /// How many changes a copy has that was taken at `moment` and says that it is as of `as_of`, both in nanoseconds since 1970.
    ///
    /// An entry is decided between a change's two times, and a copy ends with the last group commit that is not after the moment.
    pub fn possible(&self, moment: u64, as_of: u64) -> RangeInclusive<usize> {
        let durable = self.made.iter().rposition(|made| made.is_durable && made.done <= moment);
        let decided = self.made.iter().take_while(|made| made.done < as_of).count();
        let begun = self.made.iter().take_while(|made| made.begun <= as_of).count();
        durable.map_or(0, |last| last + 1).max(decided)..=begun
    }

    /// A change that the tree of now allows.
    fn draw(&mut self) -> Change {
        let kind = self.random.below(16);
        if self.files.is_empty() || kind < 4 {
            let path = self.fresh("file");
            self.files.push(Drawn { path: path.clone(), length: 0, modes: 0 });
            return Change::Create(path);
        }
        let at = self.random.index(self.files.len());
        let Drawn { path, length, modes } = self.files[at].clone();
        match kind {
            4 => {
                let path = self.fresh("directory");
                self.directories.push(path.clone());
                Change::MakeDir(path)
            }
            5 => {
                // The same length would be no change.
                let longer = length + 1 + self.random.below(100_000);
                let length = if length % 2 == 1 { length / 2 } else { longer };
                self.files[at].length = length;
                Change::SetLength(path, length)
            }
            6 => {
                self.files[at].modes += 1;
                Change::SetMode(path, 0o700 + modes % 0o100)
            }
            7 | 8 => {
                let to = self.fresh("moved");
                self.files[at].path = to.clone();
                Change::Rename(path, to)
            }
            9 => {
                let to = self.fresh("link");
                // What is written to one name of a file is seen at the other: neither is drawn again.
                self.files.swap_remove(at);
                Change::Link(path, to)
            }
            10 => Change::Symlink(path, self.fresh("symlink")),
            11 => {
                self.files.swap_remove(at);
                Change::Remove(path)
            }
            12 if self.files.len() > 1 => {
                self.files.swap_remove(at);
                let over = self.random.index(self.files.len());
                let to = self.files[over].path.clone();
                self.files[over] = Drawn { path: to.clone(), length, modes };
                Change::Rename(path, to)
            }
            _ => {
                let offset = self.random.below(length + 1);
                let count = 1 + self.random.index(40_000);
                let bytes = self.random.bytes(count);
                let end = offset + bytes.len() as u64;
                self.files[at].length = length.max(end);
                Change::Write(path, offset, bytes)
            }
        }
    }

    fn fresh(&mut self, kind: &str) -> PathBuf {
        self.names += 1;
        let directory = self.random.index(self.directories.len());
        self.directories[directory].join(format!("{kind}-{}", self.names))
    }
}

/// The wall clock, in nanoseconds since 1970.
#[expect(clippy::disallowed_methods, reason = "moments of the world outside are held against the log's")]
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TreeRules, compare_directories};

    /// Replayed on another directory it is the same tree after every step, and never the one before.
    #[test]
    fn every_step_of_a_history_is_a_state_of_its_own() {
        let root = |name: &str| tempfile::Builder::new().prefix(name).tempdir().unwrap();
        let (first, second) = (root("first"), root("second"));
        let mut history = History::new(5);
        for step in 0..400 {
            assert_eq!(history.burst(first.path(), 1).unwrap(), step..step + 1);
            let compare = || compare_directories(first.path(), second.path(), TreeRules::UNTIMED).unwrap();
            assert!(!compare().is_empty(), "step {step} changes nothing: {:?}", history.made()[step].change);
            history.made()[step].change.apply(second.path()).unwrap();
            assert_eq!(compare(), Vec::new(), "step {step}");
        }
    }

    /// A copy that lost a durable change, or has one of the future, is not consistent with its moment.
    #[test]
    fn a_moment_allows_what_was_durable_then_and_nothing_later() {
        let mut history = History::new(1);
        for (begun, done, is_durable) in [(10, 12, false), (20, 22, true), (30, 32, false), (40, 42, true)] {
            let change = Change::MakeDir(PathBuf::from("d"));
            history.made.push(Made { change, begun, done, is_durable });
        }
        for (moment, as_of, possible) in [
            (5, 5, 0..=0),
            (21, 11, 0..=1),
            (25, 25, 2..=2),
            (35, 21, 2..=2),
            (35, 33, 3..=3),
            (99, 99, 4..=4),
        ] {
            assert_eq!(history.possible(moment, as_of), possible, "{moment} as of {as_of}");
        }
    }
}
