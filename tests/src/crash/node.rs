//! A node whose every byte is on a faulty disk, except its index, which is made anew from the log.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_fs::{
    BlockStore, Caller, CellCache, DurableFolders, Errno, FileSystem, Index, LayeredStore, MemoryIndex, Name,
    ObjectBlockStore, OpenFlags, PackFetcher, ReplayBudget, Volume, VolumeOptions, VolumeParts, check_digest,
    check_tree, replay,
};
use murphy_log::{
    BranchId, ChainHash, Clock, Digest, DiskLog, DiskOptions, Epoch, EpochId, Files, Log, LogTime, Lsn,
    OpenError, Position, State, Usage, VolumeId, VolumeKeys, faulty::FaultyDisk,
};

use crate::{DiskObjects, Driver};

/// An open node.
pub struct CrashNode {
    /// Its file system.
    pub volume: Volume,
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
    pub fn format(driver: &Driver, disk: &FaultyDisk, clock: &Arc<dyn Clock>, sync: bool) -> CrashNode {
        for directory in [LOG, BLOCKS] {
            disk.create_dir(Path::new(directory)).expect("a new disk takes directories");
        }
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([7; 16]) };
        let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
        let origin = State { position, digest: Digest::default(), usage: Usage::default() };
        let log = DiskLog::create(log_options(disk), origin).expect("a new disk takes a log");
        CrashNode::lead(driver, disk, clock, sync, log, Some(&[])).expect("a new node leads")
    }

    /// Opens the node that is there and goes on as its source.
    ///
    /// # Errors
    /// What refused, and why.
    pub fn open(
        driver: &Driver,
        disk: &FaultyDisk,
        clock: &Arc<dyn Clock>,
        sync: bool,
    ) -> Result<CrashNode, String> {
        let log = DiskLog::open(log_options(disk)).map_err(|error: OpenError| error.to_string())?;
        CrashNode::lead(driver, disk, clock, sync, log, None)
    }

    fn lead(
        driver: &Driver,
        disk: &FaultyDisk,
        clock: &Arc<dyn Clock>,
        sync: bool,
        log: DiskLog,
        genesis: Option<&[(String, String)]>,
    ) -> Result<CrashNode, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let epoch = log.recovery().epoch;
        let recovered = log.durable().state();
        let cut = log.recovery().cut.clone();
        let (index, last_time) = rebuilt(&log, epoch)?;
        log.claim(epoch).map_err(|error| text(&error))?;
        let blocks = blocks(disk);
        let parts = VolumeParts {
            log: Arc::new(log),
            index: Arc::new(index),
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
                sync,
                io_timeout: Duration::from_secs(20),
                ..VolumeOptions::default()
            },
        };
        let _runtime = driver.enter();
        let volume = Volume::open(parts).map_err(|error| text(&error))?;
        volume.lead(epoch, genesis).map_err(|error| text(&error))?;
        Ok(CrashNode { volume, recovered, cut })
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

/// The index that the whole log makes, and when its last entry was.
fn rebuilt(log: &DiskLog, epoch: Epoch) -> Result<(MemoryIndex, Option<LogTime>), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let first = log.read(Lsn::FIRST).map_err(|error| text(&error))?.next();
    let epoch = first.transpose().map_err(|error| text(&error))?.map_or(epoch, |frame| frame.epoch());
    let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
    let origin = State { position, digest: Digest::default(), usage: Usage::default() };
    let index = MemoryIndex::new();
    index.ingest(&mut std::iter::empty(), &origin).map_err(|error| text(&error))?;
    let frames = log.read(Lsn::FIRST).map_err(|error| text(&error))?;
    let reached = replay(&index, origin, frames, ReplayBudget::default()).map_err(|error| text(&error))?;
    if reached != log.durable().state() {
        return Err(format!("replay ended at {}", reached.position));
    }
    let last = log.read(reached.position.lsn).ok().and_then(|mut frames| frames.next()).transpose();
    let last = last.map_err(|error| text(&error))?.map(|frame| frame.entries()).transpose();
    let last = last.map_err(|error| text(&error))?;
    Ok((index, last.and_then(|entries| entries.last().map(|entry| entry.time))))
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
