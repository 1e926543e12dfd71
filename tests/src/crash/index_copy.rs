//! Copies of an index that is being written: what a kill would have left in its directory.
//!
//! Invariants:
//! - A copy is of one moment: two readings, one after the other, agreed on it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use murphy_log::faulty::FaultyDisk;

use crate::{PATIENCE, wait_for};

/// What an index was at a moment of the disk beside it.
#[derive(Clone, Debug)]
pub struct IndexCopy {
    /// The moment of the disk, as [`FaultyDisk::recorded`] counts: nothing in the copy is younger.
    pub moment: usize,
    files: Files,
}

/// Files by their place in the directory: their bytes without the zeros at the end, and their length. fjall reserves a journal of 64 MiB.
type Files = BTreeMap<PathBuf, (Vec<u8>, u64)>;

impl IndexCopy {
    /// Copies the index in `directory`.
    ///
    /// # Panics
    /// If its files never rest.
    pub fn of(directory: &Path, disk: &FaultyDisk) -> IndexCopy {
        // Compaction deletes files while they are read.
        let files = wait_for("an index whose files rest", PATIENCE, || {
            let first = read(directory).ok()?;
            (read(directory).ok()? == first).then_some(first)
        });
        IndexCopy { moment: disk.recorded() - 1, files }
    }

    /// Writes the copy to `directory`.
    ///
    /// # Errors
    /// As the operating system says.
    pub fn put(&self, directory: &Path) -> io::Result<()> {
        for (path, (bytes, length)) in &self.files {
            let path = directory.join(path);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&path, bytes)?;
            File::options().write(true).open(&path)?.set_len(*length)?;
        }
        Ok(())
    }
}

fn read(directory: &Path) -> io::Result<Files> {
    let (mut files, mut waiting) = (Files::new(), vec![directory.to_owned()]);
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                waiting.push(path);
                continue;
            }
            let mut bytes = fs::read(&path)?;
            let length = bytes.len() as u64;
            bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
            let place = path.strip_prefix(directory).map_err(io::Error::other)?;
            files.insert(place.to_owned(), (bytes, length));
        }
    }
    Ok(files)
}
