//! What new mirrors begin with: a snapshot of the tree of now, in a file without a name.
//!
//! Invariants:
//! - Nothing leaves the node before it is durable there.
//! - The file has no name while it is sent: it goes with the process.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufWriter, Seek, Write},
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use murphy_fs::{IndexSnapshot, SnapshotOrigin, Volume, write_snapshot};
use murphy_log::{BranchId, Clock, SystemClock, VolumeKeys};
use murphy_mirror::{ReplicaError, SeedSnapshot, SnapshotSource};

/// Snapshots of a volume.
pub(super) struct VolumeSnapshots {
    pub(super) volume: Volume,
    pub(super) keys: VolumeKeys,
    pub(super) branch: BranchId,
    /// Where the file is made.
    pub(super) folder: PathBuf,
    pub(super) count: AtomicU64,
}

impl SnapshotSource for VolumeSnapshots {
    fn open(&self) -> Result<SeedSnapshot, ReplicaError> {
        let storage = |error: &dyn std::fmt::Display| ReplicaError::Storage(error.to_string());
        let view = self.volume.view_with_state();
        let state = view.state().ok_or_else(|| ReplicaError::Storage("there is no state".to_owned()))?;
        // Nothing leaves a node before it is durable there.
        let durable = self.volume.log().durable();
        durable.wait_blocking(state.position.lsn, DURABLE_MAX).map_err(|error| storage(&error))?;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.join(format!("seed-{number}.tmp"));
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(|error| storage(&error))?;
        fs::remove_file(&path).map_err(|error| storage(&error))?;
        let origin = SnapshotOrigin { branch: self.branch, created: SystemClock::new().wall() };
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
        write_snapshot(&view, &self.keys, origin, &mut out, &|_| {}).map_err(|error| storage(&error))?;
        let written = (|| -> std::io::Result<File> {
            out.flush()?;
            let mut file = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
            file.rewind()?;
            Ok(file)
        })();
        let file = written.map_err(|error| storage(&error))?;
        // The log of a node is not trimmed.
        Ok(SeedSnapshot { state, reader: Box::new(file), hold: Box::new(()) })
    }
}

const DURABLE_MAX: Duration = Duration::from_secs(60);
const BUFFER_BYTES: usize = 1 << 20;
