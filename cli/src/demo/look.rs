//! A tree that is looked at: what is there, what is not, and what is there and cannot be read.
//!
//! Invariants:
//! - A file whose bytes are gone is told from one that is not there, and from one that holds something else.

use std::{
    collections::BTreeSet,
    fs, io,
    io::ErrorKind,
    path::{Path, PathBuf},
};

/// A tree at a moment.
pub(super) struct Look {
    root: PathBuf,
    /// Files of which a copy has nothing because they could not be read.
    unreadable: BTreeSet<PathBuf>,
}

/// What there is at a path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Found {
    Nothing,
    /// A file that gives an error instead of its bytes.
    Unreadable,
    Bytes(Vec<u8>),
}

impl Look {
    /// What is mounted at `root`.
    pub(super) fn at_mount(root: PathBuf) -> Look {
        Look { root, unreadable: BTreeSet::new() }
    }

    /// A copy in `root` of everything but `unreadable`.
    pub(super) fn at_copy(root: PathBuf, unreadable: BTreeSet<PathBuf>) -> Look {
        Look { root, unreadable }
    }

    /// The directory with everything that can be read.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Every file below `directory`, as paths below it.
    pub(super) fn files_below(&self, directory: &Path) -> io::Result<BTreeSet<PathBuf>> {
        let unreadable = self.unreadable.iter().filter_map(|path| path.strip_prefix(directory).ok());
        let mut found: BTreeSet<_> = unreadable.map(Path::to_owned).collect();
        let mut left = vec![PathBuf::new()];
        while let Some(below) = left.pop() {
            for entry in fs::read_dir(self.root.join(directory).join(&below))? {
                let entry = entry?;
                let path = below.join(entry.file_name());
                if entry.file_type()?.is_dir() {
                    left.push(path);
                } else {
                    found.insert(path);
                }
            }
        }
        Ok(found)
    }

    /// What is at `path`.
    pub(super) fn read(&self, path: &Path) -> io::Result<Found> {
        if self.unreadable.contains(path) {
            return Ok(Found::Unreadable);
        }
        match fs::read(self.root.join(path)) {
            Ok(bytes) => Ok(Found::Bytes(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Found::Nothing),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                Ok(Found::Unreadable)
            }
            Err(error) => Err(error),
        }
    }
}
