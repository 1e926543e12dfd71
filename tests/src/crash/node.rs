//! A node whose every byte is on a faulty disk, except its index: that is made anew from the log, or is in a directory of its own.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use murphy_fs::{
    BlockStore, Caller, CellCache, DurableFolders, Errno, FileSystem, FjallIndex, FjallOptions, Index,
    LayeredStore, MemoryIndex, Name, ObjectBlockStore, OpenFlags, PackFetcher, ReplayBudget, Volume,
    VolumeOptions, VolumeParts, check_digest, check_tree, replay,
};
use murphy_log::{
    BranchId, ChainHash, Clock, Digest, DiskLog, DiskOptions, Epoch, EpochId, Files, Log, LogTime, Lsn,
    OpenError, Position, State, Usage, VolumeId, VolumeKeys, faulty::FaultyDisk,
};

use crate::{DiskObjects, Driver};

/// How a node is run.
#[derive(Clone, Debug)]
pub struct NodeRules {
    /// Whether every step waits until it is durable.
    pub sync: bool,
    /// The longest that a request waits.
    pub io_timeout: Duration,
    /// Where on the real disk its index is kept; in memory without.
    pub index: Option<PathBuf>,
}

impl NodeRules {
    /// A node whose index is made anew in memory, and whose requests have time.
    pub fn new(sync: bool) -> NodeRules {
        NodeRules { sync, io_timeout: Duration::from_secs(20), index: None }
    }
}

/// An open node.
pub struct CrashNode {
    /// Its file system.
    pub volume: Volume,
    log: Arc<DiskLog>,
    /// The durable end of the log when it was opened.
    pub recovered: State,
    /// Why the log was cut there, if something was.
    pub cut: Option<String>,
}

impl CrashNode {
    /// Makes the directories of a node and its log, with the first entries.
    ///
    /// # Panics
    /// If that fails: nothing has been broken yet.
    pub fn format(
        driver: &Driver,
        disk: &FaultyDisk,
        clock: &Arc<dyn Clock>,
        rules: &NodeRules,
    ) -> CrashNode {
        for directory in [LOG, BLOCKS] {
            disk.create_dir(Path::new(directory)).expect("a new disk takes directories");
        }
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([7; 16]) };
        let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
        let origin = State { position, digest: Digest::default(), usage: Usage::default() };
        let log = DiskLog::create(log_options(disk), origin).expect("a new disk takes a log");
        CrashNode::lead(driver, disk, clock, rules, log, Some(&[])).expect("a new node leads")
    }

    /// Opens the node that is there and goes on as its source.
    ///
    /// # Errors
    /// What refused, and why.
    pub fn open(
        driver: &Driver,
        disk: &FaultyDisk,
        clock: &Arc<dyn Clock>,
        rules: &NodeRules,
    ) -> Result<CrashNode, String> {
        let log = DiskLog::open(log_options(disk)).map_err(|error: OpenError| error.to_string())?;
        CrashNode::lead(driver, disk, clock, rules, log, None)
    }

    fn lead(
        driver: &Driver,
        disk: &FaultyDisk,
        clock: &Arc<dyn Clock>,
        rules: &NodeRules,
        log: DiskLog,
        genesis: Option<&[(String, String)]>,
    ) -> Result<CrashNode, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let epoch = log.recovery().epoch;
        let recovered = log.durable().state();
        let cut = log.recovery().cut.clone();
        let (index, last_time) = match &rules.index {
            None => rebuilt(Arc::new(MemoryIndex::new()), &log)?,
            Some(directory) => on_disk(directory, &log)?,
        };
        log.claim(epoch).map_err(|error| text(&error))?;
        let blocks = blocks(disk);
        let log = Arc::new(log);
        let parts = VolumeParts {
            log: Arc::clone(&log) as Arc<dyn Log>,
            index,
            state: recovered,
            last_time: last_time.unwrap_or_else(|| clock.wall()),
            keys: keys(),
            clock: Arc::clone(clock),
            fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], CellCache::new(1 << 20), None),
            blocks,
            runtime: driver.handle().clone(),
            options: VolumeOptions {
                generation_bytes: 4096,
                cached_rows: 64,
                sync: rules.sync,
                io_timeout: rules.io_timeout,
                ..VolumeOptions::default()
            },
        };
        let _runtime = driver.enter();
        let volume = Volume::open(parts).map_err(|error| text(&error))?;
        volume.lead(epoch, genesis).map_err(|error| text(&error))?;
        Ok(CrashNode { volume, log, recovered, cut })
    }

    /// Why its log takes nothing more, if so: it was poisoned.
    pub fn ended(&self) -> Option<String> {
        self.log.durable().current().terminal.map(|terminal| terminal.to_string())
    }

    /// What fsck looks at: the tree is sound, and its digest is that of its rows and of the log.
    ///
    /// # Errors
    /// What is not right.
    pub fn fsck(&self) -> Result<(), String> {
        let view = self.volume.view_with_state();
        let findings = check_tree(&view).map_err(|error| error.to_string())?;
        let digest = check_digest(&view, &keys()).map_err(|error| error.to_string())?.digest;
        let kept = murphy_fs::IndexSnapshot::state(&view).map(|state| state.digest);
        if kept != Some(digest) {
            return Err(format!("the rows have digest {digest}, the log says {kept:?}"));
        }
        if findings.is_empty() { Ok(()) } else { Err(format!("the tree is not sound: {findings:?}")) }
    }

    /// Makes a file durable and reads it back.
    ///
    /// # Errors
    /// What failed.
    pub fn write_file(&self, driver: &Driver, name: &str, bytes: &[u8]) -> Result<(), Errno> {
        let (root, name) = (Caller::default(), name_of(name)?);
        let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
        let (attr, opened) =
            driver.wait(self.volume.create(&root, murphy_fs::Ino::ROOT, &name, 0o644, flags))?;
        let bytes = Bytes::copy_from_slice(bytes);
        driver.wait(self.volume.write(&root, attr.ino, opened.handle, 0, bytes.clone()))?;
        driver.wait(self.volume.fsync(attr.ino, Some(opened.handle)))?;
        let read = driver.wait(self.volume.read(attr.ino, opened.handle, 0, bytes.len() as u32 + 1))?;
        self.volume.release(attr.ino, opened.handle);
        if read == bytes { Ok(()) } else { Err(Errno::EIO) }
    }

    /// The bytes of a file in the root.
    ///
    /// # Errors
    /// It is not there, or cannot be read.
    pub fn read_file(&self, driver: &Driver, name: &str) -> Result<Bytes, Errno> {
        let (root, name) = (Caller::default(), name_of(name)?);
        let attr = driver.wait(self.volume.lookup(&root, murphy_fs::Ino::ROOT, &name))?;
        let flags = OpenFlags { read: true, ..OpenFlags::default() };
        let opened = driver.wait(self.volume.open(&root, attr.ino, flags))?;
        let read = driver.wait(self.volume.read(attr.ino, opened.handle, 0, attr.size as u32));
        self.volume.release(attr.ino, opened.handle);
        read
    }

    /// Removes a file of the root, durably.
    ///
    /// # Errors
    /// What failed.
    pub fn remove_file(&self, driver: &Driver, name: &str) -> Result<(), Errno> {
        let (root, name) = (Caller::default(), name_of(name)?);
        driver.wait(self.volume.unlink(&root, murphy_fs::Ino::ROOT, &name))?;
        driver.wait(self.volume.sync_all())
    }
}

fn name_of(name: &str) -> Result<Name, Errno> {
    Name::new(name.as_bytes().to_vec()).map_err(|_| Errno::EINVAL)
}

/// An index, and when the last entry in it was.
type Opened = (Arc<dyn Index>, Option<LogTime>);

/// The index that a crash has left in `directory`, brought to the end of the log; anew if it cannot be used.
///
/// # Errors
/// It knows of what the log does not have.
fn on_disk(directory: &Path, log: &DiskLog) -> Result<Opened, String> {
    let open = || FjallIndex::open_or_reset(directory, FjallOptions::default());
    let index = open().map_err(|error| error.to_string())?;
    let end = log.durable().state().position;
    let known =
        index.reached().into_iter().chain(index.snapshot().state()).map(|state| state.position.lsn).max();
    if let Some(known) = known.filter(|known| *known > end.lsn) {
        return Err(format!("the index knows of lsn {known}, the log ends at {}", end.lsn));
    }
    rebuilt(Arc::new(index), log).or_else(|_| {
        FjallIndex::reset(directory).map_err(|error| error.to_string())?;
        rebuilt(Arc::new(open().map_err(|error| error.to_string())?), log)
    })
}

/// Brings `index` from where it is to the end of the log.
fn rebuilt(index: Arc<dyn Index>, log: &DiskLog) -> Result<Opened, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let from = match index.snapshot().state() {
        Some(state) => state,
        None => begin(&*index, log)?,
    };
    let frames = log.read(from.position.lsn.next()).map_err(|error| text(&error))?;
    let reached = replay(&*index, from, frames, ReplayBudget::default()).map_err(|error| text(&error))?;
    if reached != log.durable().state() {
        return Err(format!("replay ended at {}", reached.position));
    }
    let last = log.read(reached.position.lsn).ok().and_then(|mut frames| frames.next()).transpose();
    let last = last.map_err(|error| text(&error))?.map(|frame| frame.entries()).transpose();
    let last = last.map_err(|error| text(&error))?;
    Ok((index, last.and_then(|entries| entries.last().map(|entry| entry.time))))
}

/// Gives an index that holds nothing the state before the first entry.
fn begin(index: &dyn Index, log: &DiskLog) -> Result<State, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let first = log.read(Lsn::FIRST).map_err(|error| text(&error))?.next();
    let first = first.transpose().map_err(|error| text(&error))?;
    let epoch = first.map_or(log.recovery().epoch, |frame| frame.epoch());
    let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
    let origin = State { position, digest: Digest::default(), usage: Usage::default() };
    index.ingest(&mut std::iter::empty(), &origin).map_err(|error| text(&error))?;
    Ok(origin)
}

fn log_options(disk: &FaultyDisk) -> DiskOptions {
    DiskOptions {
        segment_bytes: SEGMENT_BYTES,
        recent_bytes: 0,
        files: Arc::new(disk.clone()),
        ..DiskOptions::new(LOG, VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]))
    }
}

fn blocks(disk: &FaultyDisk) -> Arc<dyn BlockStore> {
    let objects = Arc::new(DiskObjects::new(disk.clone(), BLOCKS));
    let store = DurableFolders::new(objects, Arc::new(disk.clone()), BLOCKS.into());
    let prefix = object_store::path::Path::default();
    Arc::new(ObjectBlockStore::in_directory(Arc::new(LayeredStore(store)), prefix, "faulty disk".to_owned()))
}

fn keys() -> VolumeKeys {
    VolumeKeys::derive(VolumeId::from_bytes([1; 16]))
}

const LOG: &str = "/node/log";
const BLOCKS: &str = "/blocks";
/// So small that a program fills several.
const SEGMENT_BYTES: u64 = 32 << 10;
