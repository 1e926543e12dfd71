//! The file that a dump is written into.
//!
//! Invariants:
//! - A dump has its name only when it is complete and durable; nothing that is there is replaced.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use murphy_fs::{IndexSnapshot, SnapshotOrigin, SnapshotProgress, SnapshotSummary, write_snapshot};
use murphy_log::{OsFiles, VolumeKeys, rename_durably};

use crate::error::{CliError, at, failed};

/// A tree, and what is written of it beside its rows.
pub(crate) struct Dumped<'a> {
    pub(crate) tree: &'a dyn IndexSnapshot,
    pub(crate) keys: &'a VolumeKeys,
    pub(crate) origin: SnapshotOrigin,
}

/// Refuses a name that is taken.
pub(crate) fn check_new(path: &Path) -> Result<(), CliError> {
    if is_open(path) || !path.exists() {
        return Ok(());
    }
    Err(CliError::new(format!("{} exists already", path.display())))
}

impl Dumped<'_> {
    /// Writes it into a new file, or into one below `/proc` that somebody has open.
    pub(crate) fn write(
        &self,
        path: &Path,
        progress: &dyn Fn(SnapshotProgress),
    ) -> Result<SnapshotSummary, CliError> {
        if is_open(path) {
            let file = OpenOptions::new().append(true).open(path).map_err(at(path))?;
            let (mut file, summary) = self.write_to(file, path, progress)?;
            file.flush().map_err(at(path))?;
            return Ok(summary);
        }
        check_new(path)?;
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let written = File::create(&partial).map_err(at(path));
        let written =
            written.and_then(|file| self.write_to(file, path, progress)).and_then(|(file, summary)| {
                let synced = file.sync_all().and_then(|()| rename_durably(&OsFiles, &partial, path));
                synced.map_err(at(path))?;
                Ok(summary)
            });
        if written.is_err()
            && let Err(error) = fs::remove_file(&partial)
        {
            tracing::debug!(%error, "no unfinished dump was removed");
        }
        written
    }

    fn write_to(
        &self,
        file: File,
        path: &Path,
        progress: &dyn Fn(SnapshotProgress),
    ) -> Result<(File, SnapshotSummary), CliError> {
        let mut out = BufWriter::with_capacity(OUT_BYTES, file);
        let summary =
            write_snapshot(self.tree, self.keys, self.origin, &mut out, progress).map_err(failed)?;
        Ok((out.into_inner().map_err(|error| at(path)(error.into_error()))?, summary))
    }
}

/// Whether the path is that of a file that a process has open.
fn is_open(path: &Path) -> bool {
    path.starts_with("/proc")
}

const OUT_BYTES: usize = 1 << 20;
