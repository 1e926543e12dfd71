//! What an earlier process has begun with a mirror's directory, and the next start finishes: a log that is put aside, a snapshot that is put
//! in place.
//!
//! Invariants:
//! - A process that is killed between any two steps leaves a directory that [`settle`] finishes.
//! - Nothing that vouches for a log stays behind when the log is put aside.

use std::{
    fs::{self, File},
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use murphy_fs::SnapshotReader;
use murphy_log::{DiskLog, DiskOptions, Files, OsFiles, Position, rename_durably};
use murphy_mirror::Point;
use serde::{Deserialize, Serialize};

use super::{base_file, index_directory, log_directory};
use crate::{
    archive_notes::forget_durable,
    config::{KeptBranch, NodeConfig},
    error::{CliError, at, failed},
    summed,
};

/// Finishes what an earlier process has begun: puts a log aside, puts a snapshot in place. The caller holds the node's lock, and its log is
/// not open.
pub(crate) fn settle(directory: &Path, config: &NodeConfig) -> Result<(), CliError> {
    settle_aside(directory)?;
    let (ready, base, log) =
        (seed_file(directory, SEED_READY), base_file(directory), log_directory(directory));
    if ready.exists() {
        // What was held has been put aside.
        remove_tree(&log)?;
        remove_tree(&index_directory(directory))?;
        rename_durably(&OsFiles, &ready, &base).map_err(at(&base))?;
    }
    if base.exists() && !log.exists() {
        let file = File::open(&base).map_err(at(&base))?;
        let state = SnapshotReader::open(BufReader::new(file)).map_err(failed)?.header().state;
        let new = directory.join(NEW_LOG);
        remove_tree(&new)?;
        drop(DiskLog::create(DiskOptions::new(&new, config.volume, config.branch), state).map_err(failed)?);
        rename_durably(&OsFiles, &new, &log).map_err(at(&log))?;
    }
    Ok(())
}

/// Whether an earlier process has begun something that [`settle`] would finish.
pub(super) fn has_begun(directory: &Path) -> bool {
    directory.join(SET_ASIDE).exists() || seed_file(directory, SEED_READY).exists()
}

fn settle_aside(directory: &Path) -> Result<(), CliError> {
    let order = directory.join(SET_ASIDE);
    let Some(SetAside { kept }) = summed::read(&order, ORDER_LOST)? else { return Ok(()) };
    let place = directory.join(&kept.place);
    OsFiles.create_dir(&place).map_err(at(&place))?;
    for held in [log_directory(directory), base_file(directory)] {
        if let (true, Some(name)) = (held.exists(), held.file_name()) {
            rename_durably(&OsFiles, &held, &place.join(name)).map_err(at(&held))?;
        }
    }
    remove_tree(&index_directory(directory))?;
    forget_durable(directory)?;
    // The file as it is now: other steps may have written it since this process read it.
    let mut config = NodeConfig::read(directory)?;
    if !config.branches.contains(&kept) {
        config.branches.push(kept);
        config.write(directory)?;
    }
    // An order that came back after a power cut would put aside what has taken its place since.
    fs::remove_file(&order).and_then(|()| OsFiles.sync_dir(directory)).map_err(at(&order))
}

/// What is to be put aside at the next start.
#[derive(Serialize, Deserialize)]
struct SetAside {
    kept: KeptBranch,
}

/// Orders that the log up to `tail`, with its base, is put aside at the next start; durable when it returns. `ancestor` is the last entry
/// that it has in common with the volume, if that is known.
pub(crate) fn keep_aside(
    directory: &Path,
    ancestor: Option<Point>,
    tail: Position,
) -> Result<KeptBranch, CliError> {
    let kept = kept_branch(ancestor, tail);
    summed::write(&directory.join(SET_ASIDE), &SetAside { kept: kept.clone() })?;
    Ok(kept)
}

fn kept_branch(ancestor: Option<Point>, tail: Position) -> KeptBranch {
    KeptBranch {
        epoch: tail.epoch.number,
        after_lsn: ancestor.map_or(0, |point| point.lsn.get()),
        last_lsn: tail.lsn.get(),
        hash: tail.hash.to_string(),
        place: format!("branches/{}-{}", tail.epoch.number, tail.lsn),
    }
}

fn remove_tree(path: &Path) -> Result<(), CliError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        _ => Ok(()),
    }
}

/// Where a snapshot is while it arrives, or waits to be put in place.
pub(crate) fn seed_file(directory: &Path, name: &str) -> PathBuf {
    base_file(directory).with_file_name(name)
}

/// A snapshot that is complete and verified.
pub(crate) const SEED_READY: &str = "seed.ready";
const NEW_LOG: &str = "log.new";
const ORDER_LOST: &str =
    "it says which log is to be put aside, and nothing is touched until that is known: put the file back";
const SET_ASIDE: &str = "set-aside.json";

#[cfg(test)]
mod tests {
    use murphy_log::{BranchId, ChainHash, Epoch, EpochId, Lsn, NodeId, VolumeId};

    use super::*;
    use crate::{
        archive_notes::known_durable,
        mirror_notes::{self, MirrorNote},
    };

    /// The fear: a source that was replaced comes back as a mirror, and can never be opened again because a mirror once held what it has put
    /// aside.
    #[test]
    fn what_vouched_for_a_log_goes_with_it_when_it_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path();
        let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
        let config = NodeConfig::new(volume, branch, "v".to_owned(), "file:///x".parse().unwrap());
        config.write(directory).unwrap();
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([3; 16]) };
        let tail = Position { epoch, lsn: Lsn::new(130), hash: ChainHash::from_bytes([4; 32]) };
        let note = MirrorNote { node: NodeId::from_bytes([5; 16]), position: tail };
        mirror_notes::save(directory, &note).unwrap();
        assert_eq!(known_durable(directory), Ok(Some(tail)));
        keep_aside(directory, None, tail).unwrap();
        settle(directory, &config).unwrap();
        assert_eq!(known_durable(directory), Ok(None));
        assert!(!has_begun(directory));
    }
}
