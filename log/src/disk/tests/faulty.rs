//! A file system in memory that loses what was not synced, fails when told to, and stops at any operation.
//!
//! Invariants:
//! - After a power cut every 512-byte sector that was written and not synced is old or new, each for itself; names that
//!   were not synced are old or new; what was synced is there.
//! - A sync that fails leaves its pages clean: they can be read until the power cut, and are not on the disk.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;

use crate::{DirectoryLock, Files, SegmentFile};

#[derive(Clone, Debug)]
pub(super) struct FaultyFiles(Arc<Mutex<Disk>>);

#[derive(Debug, Default)]
struct Disk {
    names: BTreeMap<PathBuf, Node>,
    synced_names: BTreeMap<PathBuf, Node>,
    operations: usize,
    /// From this operation on nothing happens any more.
    stop_at: Option<usize>,
    /// From this operation on syncs fail.
    break_at: Option<usize>,
    /// What may be allocated in all, in bytes.
    capacity: Option<u64>,
    locked: bool,
}

type Node = Arc<Mutex<Content>>;

#[derive(Debug, Default, Clone)]
struct Content {
    cached: Vec<u8>,
    synced: Vec<u8>,
}

impl FaultyFiles {
    pub(super) fn new() -> FaultyFiles {
        FaultyFiles(Arc::default())
    }

    /// How many operations have changed, or tried to change, anything.
    pub(super) fn operations(&self) -> usize {
        self.0.lock().operations
    }

    pub(super) fn stop_at(&self, operation: usize) {
        self.0.lock().stop_at = Some(operation);
    }

    pub(super) fn break_from_now(&self) {
        let mut disk = self.0.lock();
        disk.break_at = Some(disk.operations);
    }

    pub(super) fn break_at(&self, operation: usize) {
        self.0.lock().break_at = Some(operation);
    }

    pub(super) fn set_capacity(&self, capacity: Option<u64>) {
        self.0.lock().capacity = capacity;
    }

    /// The disk after the process was killed: everything in the page cache is still there.
    pub(super) fn after_kill(&self) -> FaultyFiles {
        let disk = self.0.lock();
        let mut copies: BTreeMap<*const Mutex<Content>, Node> = BTreeMap::new();
        let mut copy = |names: &BTreeMap<PathBuf, Node>| {
            let copied = names.iter().map(|(path, node)| {
                let new = copies
                    .entry(Arc::as_ptr(node))
                    .or_insert_with(|| Arc::new(Mutex::new(node.lock().clone())));
                (path.clone(), Arc::clone(new))
            });
            copied.collect::<BTreeMap<PathBuf, Node>>()
        };
        let (names, synced_names) = (copy(&disk.names), copy(&disk.synced_names));
        FaultyFiles(Arc::new(Mutex::new(Disk { names, synced_names, ..Disk::default() })))
    }

    /// The disk after the power was cut; `seed` decides about everything that was not synced.
    pub(super) fn after_power_cut(&self, seed: u64) -> FaultyFiles {
        let disk = self.0.lock();
        let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut names = if chance.coin() { disk.names.clone() } else { disk.synced_names.clone() };
        for node in names.values_mut() {
            let content = node.lock().clone();
            let survived = chance.mix(&content);
            *node = Arc::new(Mutex::new(Content { cached: survived.clone(), synced: survived }));
        }
        let synced_names = names.clone();
        FaultyFiles(Arc::new(Mutex::new(Disk { names, synced_names, ..Disk::default() })))
    }

    /// The names of all files.
    pub(super) fn names(&self) -> Vec<PathBuf> {
        self.0.lock().names.keys().cloned().collect()
    }

    /// Everything on the disk, as readers see it.
    pub(super) fn contents(&self) -> Vec<(PathBuf, Vec<u8>)> {
        self.0.lock().names.iter().map(|(path, node)| (path.clone(), node.lock().cached.clone())).collect()
    }

    /// Changes a file behind everybody's back, as a failing medium does.
    pub(super) fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let disk = self.0.lock();
        let mut content = disk.names[path].lock();
        change(&mut content.cached);
        content.synced = content.cached.clone();
    }

    /// Counts an operation that changes something.
    fn operation(&self) -> io::Result<()> {
        let mut disk = self.0.lock();
        disk.operations += 1;
        match disk.stop_at {
            Some(stop_at) if disk.operations > stop_at => Err(io::Error::other("the process was killed")),
            _ => Ok(()),
        }
    }

    fn broken(&self) -> bool {
        let disk = self.0.lock();
        disk.break_at.is_some_and(|break_at| disk.operations > break_at)
    }

    fn allocated(&self) -> u64 {
        self.0.lock().names.values().map(|node| node.lock().cached.len() as u64).sum()
    }
}

/// A small generator of random decisions.
struct Chance(u64);

impl Chance {
    fn coin(&mut self) -> bool {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 33 & 1 == 1
    }

    fn mix(&mut self, content: &Content) -> Vec<u8> {
        let mut survived = content.synced.clone();
        if self.coin() {
            survived.resize(content.cached.len(), 0);
        }
        for (index, sector) in survived.chunks_mut(512).enumerate() {
            let cached = content.cached.get(index * 512..).unwrap_or_default();
            let length = cached.len().min(sector.len());
            if sector[..length] != cached[..length] && self.coin() {
                sector[..length].copy_from_slice(&cached[..length]);
            }
        }
        survived
    }
}

impl Files for FaultyFiles {
    fn create_dir(&self, _directory: &Path) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self, _directory: &Path) -> io::Result<Option<DirectoryLock>> {
        let mut disk = self.0.lock();
        if disk.locked {
            return Ok(None);
        }
        disk.locked = true;
        drop(disk);
        Ok(Some(DirectoryLock::new(Unlock(self.clone()))))
    }

    fn list(&self, _directory: &Path) -> io::Result<Vec<String>> {
        let names = self.names();
        Ok(names.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        self.operation()?;
        let node = Node::default();
        self.0.lock().names.insert(path.to_owned(), Arc::clone(&node));
        Ok(Box::new(FaultyFile { files: self.clone(), node }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        let node = self.0.lock().names.get(path).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(FaultyFile { files: self.clone(), node }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operation()?;
        let mut disk = self.0.lock();
        let node = disk.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        disk.names.insert(to.to_owned(), node);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.operation()?;
        self.0.lock().names.remove(path).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, _directory: &Path) -> io::Result<()> {
        self.operation()?;
        if self.broken() {
            return Err(io::Error::other("the disk is broken"));
        }
        let mut disk = self.0.lock();
        disk.synced_names = disk.names.clone();
        Ok(())
    }
}

struct Unlock(FaultyFiles);

impl Drop for Unlock {
    fn drop(&mut self) {
        self.0.0.lock().locked = false;
    }
}

#[derive(Debug)]
struct FaultyFile {
    files: FaultyFiles,
    node: Node,
}

impl SegmentFile for FaultyFile {
    fn preallocate(&self, length: u64) -> io::Result<()> {
        self.files.operation()?;
        let allocated = self.files.allocated();
        if self.files.0.lock().capacity.is_some_and(|capacity| allocated + length > capacity) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut content = self.node.lock();
        let length = content.cached.len().max(length as usize);
        content.cached.resize(length, 0);
        Ok(())
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.files.operation()?;
        self.node.lock().cached.truncate(length as usize);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // A process that is killed inside a write leaves a part of it.
        let killed = self.files.operation();
        let bytes = if killed.is_ok() { bytes } else { &bytes[..bytes.len() / 2] };
        let mut content = self.node.lock();
        let end = offset as usize + bytes.len();
        let length = content.cached.len().max(end);
        content.cached.resize(length, 0);
        content.cached[offset as usize..end].copy_from_slice(bytes);
        killed
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let content = self.node.lock();
        let rest = content.cached.get(offset as usize..).unwrap_or_default();
        let length = rest.len().min(bytes.len());
        bytes[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.files.operation()?;
        if self.files.broken() {
            return Err(io::Error::other("the disk is broken"));
        }
        let mut content = self.node.lock();
        content.synced = content.cached.clone();
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.node.lock().cached.len() as u64)
    }
}
