//! The file that a dump is written into.
//!
//! Invariants:
//! - A dump has its name only when it is complete and durable; nothing that is there is replaced.

use std::{
    fs::{self, File},
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
    match path.exists() {
        false => Ok(()),
        true => Err(CliError::new(format!("{} exists already", path.display()))),
    }
}

impl Dumped<'_> {
    /// Writes it into a new file.
    pub(crate) fn write_file(
        &self,
        path: &Path,
        progress: &dyn Fn(SnapshotProgress),
    ) -> Result<SnapshotSummary, CliError> {
        check_new(path)?;
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let written = File::create(&partial).map_err(at(path)).and_then(|mut file| {
            let summary = self.write_to(&mut file, progress)?;
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

    /// Writes it where somebody reads it.
    pub(crate) fn write_to(
        &self,
        out: &mut dyn Write,
        progress: &dyn Fn(SnapshotProgress),
    ) -> Result<SnapshotSummary, CliError> {
        let mut out = BufWriter::with_capacity(OUT_BYTES, out);
        let summary =
            write_snapshot(self.tree, self.keys, self.origin, &mut out, progress).map_err(failed)?;
        out.flush().map_err(failed)?;
        Ok(summary)
    }
}

const OUT_BYTES: usize = 1 << 20;
