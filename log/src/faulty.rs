//! A disk in memory that loses what was not synced, fails when told to, and remembers every moment of its life.
//!
//! It is what crash tests stand on: a workload runs once on a disk that records, and every moment of it (before and after each operation,
//! in the middle of each write) can then be turned into what a kill or a power cut would have left there.
//!
//! Invariants:
//! - After a power cut every 512-byte sector that was written and not synced is old, new or torn, each for itself; every change of a name
//!   that was not synced with its directory happened or did not, each for itself; what was synced is there.
//! - A sync that fails leaves its pages clean: they can be read until the power cut, some are not on the disk, and no later sync writes
//!   them.
//! - Syncing a file does not sync its name: no file system promises that.

mod content;
mod names;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;

use crate::{DirectoryLock, Files, SegmentFile, files::create_directories};
use content::Content;
use names::{NameChange, Names, Node, NodeId};

/// A disk; clones are the same disk.
#[derive(Clone)]
pub struct FaultyDisk(Arc<Mutex<Disk>>);

/// What a disk that fails says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// EIO: what was to be written or synced may be there or not.
    Broken,
    /// ENOSPC.
    Full,
}

impl Fault {
    fn error(self) -> io::Error {
        match self {
            Fault::Broken => io::Error::other("the disk is broken"),
            Fault::Full => io::ErrorKind::StorageFull.into(),
        }
    }
}

/// When a disk fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Failing {
    Never,
    /// Only this operation.
    Once(usize, Fault),
    /// The syncs from this operation on.
    Syncs(usize),
}

/// What is on a disk at one moment. Cheap to clone.
#[derive(Clone, Default)]
pub struct DiskMoment {
    names: Names,
    contents: BTreeMap<NodeId, Arc<Content>>,
}

struct Disk {
    now: DiskMoment,
    next_node: NodeId,
    operations: usize,
    /// From this operation on nothing happens any more.
    stop_at: Option<usize>,
    failing: Failing,
    /// What may be allocated in all, in bytes.
    capacity: Option<u64>,
    locked: BTreeSet<PathBuf>,
    recorded: Option<Vec<DiskMoment>>,
}

impl FaultyDisk {
    /// An empty disk.
    pub fn new() -> FaultyDisk {
        FaultyDisk::of(DiskMoment::default())
    }

    fn of(now: DiskMoment) -> FaultyDisk {
        let next_node = now.contents.keys().next_back().map_or(0, |last| last + 1);
        FaultyDisk(Arc::new(Mutex::new(Disk {
            now,
            next_node,
            operations: 0,
            stop_at: None,
            failing: Failing::Never,
            capacity: None,
            locked: BTreeSet::new(),
            recorded: None,
        })))
    }

    /// How many operations have changed, or tried to change, anything.
    pub fn operations(&self) -> usize {
        self.0.lock().operations
    }

    /// From the operation with this number on (the first is 0) nothing happens any more: the process was killed.
    pub fn stop_at(&self, operation: usize) {
        self.0.lock().stop_at = Some(operation);
    }

    /// Only the operation with this number fails.
    pub fn fail_at(&self, operation: usize, fault: Fault) {
        self.0.lock().failing = Failing::Once(operation, fault);
    }

    /// Every sync from the operation with this number on fails.
    pub fn break_at(&self, operation: usize) {
        self.0.lock().failing = Failing::Syncs(operation);
    }

    /// Every sync from now on fails.
    pub fn break_from_now(&self) {
        let mut disk = self.0.lock();
        disk.failing = Failing::Syncs(disk.operations);
    }

    /// How many bytes all files together have allocated.
    pub fn allocated(&self) -> u64 {
        self.0.lock().now.allocated()
    }

    /// How many bytes all files together may have allocated. Whatever would make a file longer than that fails with ENOSPC.
    pub fn set_capacity(&self, capacity: Option<u64>) {
        self.0.lock().capacity = capacity;
    }

    /// Remembers every moment from now on; the first is this one.
    pub fn record(&self) {
        let mut disk = self.0.lock();
        disk.recorded = Some(vec![disk.now.clone()]);
    }

    /// How many moments have been recorded. What has been acknowledged before is in every later one.
    pub fn recorded(&self) -> usize {
        self.0.lock().recorded.as_ref().map_or(0, Vec::len)
    }

    /// The recorded moments, which are not kept any longer.
    pub fn take_recorded(&self) -> Vec<DiskMoment> {
        self.0.lock().recorded.take().unwrap_or_default()
    }

    /// What is there now.
    pub fn moment(&self) -> DiskMoment {
        self.0.lock().now.clone()
    }

    /// See [`DiskMoment::after_kill`].
    pub fn after_kill(&self) -> FaultyDisk {
        self.moment().after_kill()
    }

    /// See [`DiskMoment::after_power_cut`].
    pub fn after_power_cut(&self, seed: u64) -> FaultyDisk {
        self.moment().after_power_cut(seed)
    }

    /// The names of all files.
    pub fn names(&self) -> Vec<PathBuf> {
        self.contents().into_iter().map(|(path, _)| path).collect()
    }

    /// Every file, as readers see it.
    pub fn contents(&self) -> Vec<(PathBuf, Vec<u8>)> {
        self.moment().files()
    }

    /// Changes a file behind everybody's back, as a failing medium does.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.0.lock();
        let Some(Node::File(node)) = disk.now.names.find(path) else { panic!("no file {}", path.display()) };
        let content = disk.now.content(node);
        let mut bytes = content.cached().to_vec();
        change(&mut bytes);
        *content = Content::synced(bytes);
    }

    /// Gives a file a second name; fails if that is taken.
    pub fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|disk| {
            let node = disk.now.names.find(from).ok_or(io::ErrorKind::NotFound)?;
            if disk.now.names.find(to).is_some() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            disk.now.names.change(NameChange::Add(to.to_owned(), node))
        })
    }

    /// Creates one directory and syncs nothing.
    pub fn make_dir(&self, directory: &Path) -> io::Result<()> {
        self.change(|disk| disk.now.names.change(NameChange::Add(directory.to_owned(), Node::Directory)))
    }

    /// Whether a file or directory has the name.
    pub fn exists(&self, path: &Path) -> bool {
        self.0.lock().now.names.find(path).is_some()
    }

    /// Does an operation that changes something, unless the process was killed or the disk fails.
    fn change<T>(&self, act: impl FnOnce(&mut Disk) -> io::Result<T>) -> io::Result<T> {
        let mut disk = self.0.lock();
        let result = match disk.begin() {
            Ok(()) => act(&mut disk),
            Err(error) => Err(error),
        };
        disk.remember();
        result
    }
}

impl Default for FaultyDisk {
    fn default() -> FaultyDisk {
        FaultyDisk::new()
    }
}

impl fmt::Debug for FaultyDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyDisk").field("operations", &self.operations()).finish_non_exhaustive()
    }
}

impl fmt::Debug for DiskMoment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DiskMoment").field("files", &self.contents.len()).finish_non_exhaustive()
    }
}

impl DiskMoment {
    /// The disk after the process was killed: everything in the page cache is still there, and still not synced.
    pub fn after_kill(&self) -> FaultyDisk {
        FaultyDisk::of(self.clone())
    }

    /// The disk after the power was cut; `seed` decides about everything that was not synced. With 0 nothing of it is there, with 1
    /// everything that a failed sync did not drop.
    pub fn after_power_cut(&self, seed: u64) -> FaultyDisk {
        let mut chance = Chance::new(seed);
        let names = self.names.survivors(&mut chance);
        let mut contents = BTreeMap::new();
        for node in names.files() {
            let content = self.contents.get(&node).map(|content| content.survivor(&mut chance));
            contents.insert(node, Arc::new(content.unwrap_or_default()));
        }
        FaultyDisk::of(DiskMoment { names, contents })
    }

    /// Every file, as readers see it.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let file = |(path, node): (&PathBuf, &Node)| match node {
            Node::File(node) => Some((path.clone(), self.contents.get(node)?.cached().to_vec())),
            Node::Directory => None,
        };
        self.names.visible().filter_map(file).collect()
    }

    fn content(&mut self, node: NodeId) -> &mut Content {
        Arc::make_mut(self.contents.entry(node).or_default())
    }

    fn allocated(&self) -> u64 {
        self.names
            .files()
            .filter_map(|node| self.contents.get(&node))
            .map(|one| one.cached().len() as u64)
            .sum()
    }
}

impl Disk {
    /// Counts an operation; fails if it must.
    fn begin(&mut self) -> io::Result<()> {
        let number = self.operations;
        self.operations += 1;
        if self.stop_at.is_some_and(|stop_at| number >= stop_at) {
            return Err(io::Error::other("the process was killed"));
        }
        match self.failing {
            Failing::Once(at, fault) if at == number => Err(fault.error()),
            Failing::Once(..) | Failing::Never | Failing::Syncs(_) => Ok(()),
        }
    }

    fn check_sync(&self) -> io::Result<()> {
        match self.failing {
            Failing::Syncs(from) if self.operations > from => Err(Fault::Broken.error()),
            Failing::Syncs(_) | Failing::Once(..) | Failing::Never => Ok(()),
        }
    }

    fn remember(&mut self) {
        if let Some(recorded) = &mut self.recorded {
            recorded.push(self.now.clone());
        }
    }

    fn check_capacity(&self, more: u64) -> io::Result<()> {
        match self.capacity {
            Some(capacity) if self.now.allocated() + more > capacity => Err(Fault::Full.error()),
            _ => Ok(()),
        }
    }
}

impl Files for FaultyDisk {
    fn create_dir(&self, directory: &Path) -> io::Result<()> {
        let exists = |path: &Path| self.exists(path);
        create_directories(directory, exists, |made| self.make_dir(made), |above| self.sync_dir(above))
    }

    fn lock(&self, directory: &Path) -> io::Result<Option<DirectoryLock>> {
        let mut disk = self.0.lock();
        if disk.now.names.find(directory) != Some(Node::Directory) {
            return Err(io::ErrorKind::NotFound.into());
        }
        if !disk.locked.insert(directory.to_owned()) {
            return Ok(None);
        }
        drop(disk);
        Ok(Some(DirectoryLock::new(Unlock { disk: self.clone(), directory: directory.to_owned() })))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let disk = self.0.lock();
        match disk.now.names.find(directory) {
            Some(Node::Directory) => {}
            Some(Node::File(_)) => return Err(io::ErrorKind::NotADirectory.into()),
            None => return Err(io::ErrorKind::NotFound.into()),
        }
        let inside = disk.now.names.visible().filter(|(path, _)| path.parent() == Some(directory));
        Ok(inside.filter_map(|(path, _)| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        let node = self.change(|disk| {
            if let Some(Node::File(node)) = disk.now.names.find(path) {
                disk.now.content(node).truncate(0);
                return Ok(node);
            }
            let node = disk.next_node;
            disk.next_node += 1;
            disk.now.names.change(NameChange::Add(path.to_owned(), Node::File(node)))?;
            disk.now.content(node);
            Ok(node)
        })?;
        Ok(Box::new(FaultyFile { disk: self.clone(), node }))
    }

    fn create_private(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        self.create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        match self.0.lock().now.names.find(path) {
            Some(Node::File(node)) => Ok(Box::new(FaultyFile { disk: self.clone(), node })),
            Some(Node::Directory) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|disk| {
            let node = disk.now.names.find(from).ok_or(io::ErrorKind::NotFound)?;
            disk.now.names.change(NameChange::Rename(from.to_owned(), to.to_owned(), node))
        })
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|disk| {
            let node = disk.now.names.find(from).ok_or(io::ErrorKind::NotFound)?;
            if disk.now.names.find(to).is_some() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            disk.now.names.change(NameChange::Add(to.to_owned(), node))
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change(|disk| disk.now.names.change(NameChange::Remove(path.to_owned())))
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        self.change(|disk| {
            disk.check_sync()?;
            disk.now.names.sync(directory);
            Ok(())
        })
    }
}

struct Unlock {
    disk: FaultyDisk,
    directory: PathBuf,
}

impl Drop for Unlock {
    fn drop(&mut self) {
        self.disk.0.lock().locked.remove(&self.directory);
    }
}

#[derive(Debug)]
struct FaultyFile {
    disk: FaultyDisk,
    node: NodeId,
}

impl SegmentFile for FaultyFile {
    fn preallocate(&self, length: u64) -> io::Result<()> {
        self.disk.change(|disk| {
            disk.check_capacity(length)?;
            disk.now.content(self.node).grow(length as usize);
            Ok(())
        })
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.disk.change(|disk| {
            disk.now.content(self.node).truncate(length as usize);
            Ok(())
        })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut disk = self.disk.0.lock();
        // A process that is killed inside a write, or whose write fails, leaves a part of it.
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let end = offset + bytes.len() as u64;
        let longer = end.saturating_sub(disk.now.content(self.node).cached().len() as u64);
        let begun = disk.begin().and_then(|()| disk.check_capacity(longer));
        let middle = offset as usize + first.len();
        disk.now.content(self.node).write(offset as usize, first);
        disk.remember();
        begun?;
        disk.now.content(self.node).write(middle, second);
        disk.remember();
        Ok(())
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let disk = self.disk.0.lock();
        let cached = disk.now.contents.get(&self.node).map_or(&[][..], |content| content.cached());
        let rest = cached.get(offset as usize..).unwrap_or_default();
        let length = rest.len().min(bytes.len());
        bytes[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.disk.0.lock();
        let seed = disk.operations as u64;
        let result = disk.begin().and_then(|()| disk.check_sync());
        let killed = disk.stop_at.is_some_and(|stop_at| seed as usize >= stop_at);
        match &result {
            Ok(()) => disk.now.content(self.node).sync(),
            Err(_) if killed => {}
            Err(_) => disk.now.content(self.node).fail_sync(&mut Chance::new(seed + 2)),
        }
        disk.remember();
        result
    }

    fn length(&self) -> io::Result<u64> {
        let disk = self.disk.0.lock();
        Ok(disk.now.contents.get(&self.node).map_or(0, |content| content.cached().len() as u64))
    }

    fn modified(&self) -> io::Result<SystemTime> {
        let disk = self.disk.0.lock();
        let changes = disk.now.contents.get(&self.node).map_or(0, |content| content.changes());
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(changes))
    }
}

/// A small generator of random decisions.
pub(crate) struct Chance {
    state: u64,
    seed: u64,
}

impl Chance {
    fn new(seed: u64) -> Chance {
        Chance { state: seed.wrapping_add(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, seed }
    }

    /// Whether something that was not synced is there.
    fn keeps(&mut self) -> bool {
        match self.seed {
            0 => false,
            1 => true,
            _ => self.below(2) == 1,
        }
    }

    /// Whether it is there in part; never without a seed for it.
    fn tears(&mut self) -> bool {
        self.seed > 1 && self.below(8) == 0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 33) % limit
    }
}

/// What a device writes at once, unless it tears, in bytes.
const SECTOR_BYTES: usize = 512;

#[cfg(test)]
mod tests;
