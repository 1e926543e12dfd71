//! A node: a directory that holds a volume's local state, opened by one process at a time.
//!
//! ```text
//!   murphy.toml   what is local: ids, stores, defaults      cache/      packs of remote stores
//!   lock          held by the process that has it open      identity/   the node's key
//!   log/          the ground: segment files                 base/       the snapshot that the log begins after
//!   index/        derived: may be deleted                   control.sock, murphy.log
//!   look.tmp/     while it is looked at: a copy of the index      scrubbed.json   what the last scrub has found
//!   branches/     of a mirror: logs that parted from the volume's history
//! ```
//!
//! Invariants:
//! - Nothing is served before the index has reached the durable end of the log.
//! - A directory that cannot be opened is left as it is, except for its index, which is made anew when it cannot be used.

mod base;
mod create;
mod index;
mod look;
mod lost_tail;
mod missing;
mod open;
mod random;
mod settle;
mod staging;
mod store_place;
mod turn;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use murphy_fs::{BlockStores, FailureDomain, StoreUrl, Volume};
use murphy_log::{DirectoryLock, DiskLog, Files, Log, Lsn, OsFiles, VolumeKeys};
use murphy_mirror::{CursorFile, Identity, RemotePacks};

use crate::{
    archive_reads::ArchiveReads,
    config::{NodeConfig, Role},
    error::{CliError, at, failed},
    givers::Giver,
};
pub(crate) use base::{BaseWriter, base_file, write_base_file};
pub(crate) use create::{CopyOf, NewNode, begin_copy, create};
pub(crate) use look::{Looked, LookedIndex};
pub(crate) use lost_tail::open as open_whole_log;
pub(crate) use open::open_log;
pub(crate) use random::random;
pub(crate) use settle::{SEED_READY, order_beginning, order_snapshot, seed_file, settle};
pub(crate) use staging::Staging;
pub(crate) use store_place::{NewPlace, check_beside};
pub(crate) use turn::Turn;

/// An open node. Dropping it stops its threads and then gives its lock back.
pub(crate) struct Node {
    pub(crate) directory: PathBuf,
    pub(crate) config: NodeConfig,
    pub(crate) volume: Volume,
    pub(crate) log: Arc<DiskLog>,
    pub(crate) keys: VolumeKeys,
    pub(crate) blocks: Arc<BlockStores>,
    /// Where its reads look last.
    pub(crate) archive_reads: Arc<ArchiveReads>,
    pub(crate) identity: Identity,
    /// Held until everything else is gone.
    _lock: DirectoryLock,
}

/// A node whose lock is held, and whose volume is not open yet.
pub(crate) struct NodeOpening {
    pub(crate) directory: PathBuf,
    pub(crate) config: NodeConfig,
    lock: DirectoryLock,
}

impl NodeOpening {
    /// Takes the lock of the node in `directory`, and finishes what an earlier process has begun there if it is a mirror's.
    pub(crate) fn begin(directory: &Path) -> Result<NodeOpening, CliError> {
        // In what is no node nothing is locked.
        NodeConfig::read(directory)?;
        let lock = lock(directory)?;
        let mut config = NodeConfig::read(directory)?;
        if config.role == Role::Mirror {
            settle(directory, &config)?;
            // A branch that was put aside by that is in the file now; one that is not in memory would be gone with the next change of it.
            config = NodeConfig::read(directory)?;
        }
        Ok(NodeOpening { directory: directory.to_owned(), config, lock })
    }
}

/// What can be chosen when a node is opened.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct NodeOptions {
    pub(crate) flush_after: Option<Duration>,
    pub(crate) io_timeout: Option<Duration>,
    /// Bytes of the cache on disk.
    pub(crate) cache_size: Option<u64>,
    /// Where the cache on disk is.
    pub(crate) cache_dir: Option<PathBuf>,
    /// How often index and log are compared.
    pub(crate) scrub_every: Option<Duration>,
}

impl Node {
    /// Opens the node of a mirror above a log that somebody else fills; packs that are not in its own store are read from `packs`.
    pub(crate) fn open_mirror(
        opening: NodeOpening,
        log: Arc<DiskLog>,
        packs: RemotePacks,
        options: &NodeOptions,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Node, CliError> {
        let NodeOpening { directory, config, lock } = opening;
        open::assemble_above(&directory, config, lock, (log, Some(packs)), options, runtime)
    }

    /// Opens the node in `directory`, and brings its index to the durable end of its log. It decides nothing before [`Node::lead`].
    pub(crate) fn open(
        directory: &Path,
        options: &NodeOptions,
        runtime: &tokio::runtime::Handle,
    ) -> Result<Node, CliError> {
        open::open(NodeOpening::begin(directory)?, options, runtime)
    }

    /// Gets back what its log has lost and these hold; fails if it does not reach `wanted` then. The node does not lead yet.
    pub(crate) fn fetch_lost(
        &self,
        givers: &[Box<dyn Giver>],
        wanted: Lsn,
        runtime: &tokio::runtime::Handle,
    ) -> Result<(), CliError> {
        self.volume.follow().map_err(failed)?;
        lost_tail::fetch_from(&self.log, givers, wanted, runtime)?;
        let end = self.log.tail().position.lsn;
        for _ in 0..SHOWN_STEPS {
            if self.volume.state().position.lsn >= end {
                return Ok(());
            }
            std::thread::sleep(LOCK_PAUSE);
        }
        Err(CliError::new(format!("the tree does not catch up with the log, which ends at lsn {end}")))
    }

    /// Goes on as the source, in the epoch of the last claim.
    pub(crate) fn lead(&self) -> Result<(), CliError> {
        let epoch = self.log.recovery().epoch;
        self.log.claim(epoch).map_err(failed)?;
        self.volume.lead(epoch, None).map_err(failed)
    }

    /// What dies together with this node's directory.
    pub(crate) fn failure_domain(&self) -> Result<FailureDomain, CliError> {
        failure_domain(&self.directory)
    }
}

/// What dies together with a directory.
pub(crate) fn failure_domain(directory: &Path) -> Result<FailureDomain, CliError> {
    let absolute = std::path::absolute(directory).map_err(at(directory))?;
    Ok(StoreUrl::from_directory(&absolute).map_err(failed)?.failure_domain())
}

/// Takes the lock of a node. A process that is just ending gets a moment to do so.
fn lock(directory: &Path) -> Result<DirectoryLock, CliError> {
    let lock = lock_patiently(directory)?;
    // A process that was killed gives its locks back one after the other.
    for inner in [log_directory(directory), index_directory(directory)] {
        if inner.is_dir() {
            drop(lock_patiently(&inner)?);
        }
    }
    Ok(lock)
}

fn lock_patiently(directory: &Path) -> Result<DirectoryLock, CliError> {
    for attempt in 0..LOCK_ATTEMPTS {
        match OsFiles.lock(directory).map_err(at(directory))? {
            Some(lock) => return Ok(lock),
            None if attempt + 1 < LOCK_ATTEMPTS => std::thread::sleep(LOCK_PAUSE),
            None => {}
        }
    }
    Err(CliError::new(format!("{} is in use by another process", directory.display()))
        .hint("one process has a node open; murphy status shows it if it serves the node"))
}

/// Whether no process has the node open.
pub(crate) fn is_unlocked(directory: &Path) -> Result<bool, CliError> {
    Ok(OsFiles.lock(directory).map_err(at(directory))?.is_some())
}

/// Where the log of a node is.
pub(crate) fn log_directory(directory: &Path) -> PathBuf {
    directory.join("log")
}

/// Where a mirror remembers up to where it has every byte.
pub(crate) fn data_cursor(directory: &Path) -> CursorFile {
    CursorFile::new(directory.join("copied"))
}

/// Where the index of a node is.
pub(crate) fn index_directory(directory: &Path) -> PathBuf {
    directory.join("index")
}

/// Together five seconds.
const LOCK_ATTEMPTS: u32 = 100;
/// A minute.
const SHOWN_STEPS: u32 = 1200;
const LOCK_PAUSE: Duration = Duration::from_millis(50);
