//! The least that a FUSE file system can do: a tree of empty files in memory. What it reaches is what the kernel and fuser allow,
//! and Murphy's mount is measured against it.
//!
//! Invariants:
//! - Flags, lifetimes, threads and the mount itself are those of Murphy's adapter, by calling the same functions.
//! - Bytes that are written are dropped, and reads return a fixed pattern: only lengths are kept.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{OsStr, OsString},
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use murphy_fs::{Lifetimes, MountError, MountOptions, RequestCounters, RequestCounts, RequestKind, Session};

use crate::mount_load::Target;

/// A mounted null file system.
pub struct NullMount {
    session: Session,
    counters: Arc<RequestCounters>,
}

impl NullMount {
    /// Mounts an empty tree.
    pub fn new(mount_point: &Path, options: &MountOptions) -> Result<NullMount, MountError> {
        let counters = Arc::new(RequestCounters::default());
        let fs = NullFs {
            tree: Mutex::new(Tree::new()),
            counters: Arc::clone(&counters),
            lifetimes: options.lifetimes,
            pattern: (0..PATTERN_BYTES).map(|at| (at % 251) as u8).collect(),
        };
        Ok(NullMount { session: Session::start(fs, mount_point, options)?, counters })
    }
}

impl Target for NullMount {
    fn requests(&self) -> RequestCounts {
        self.counters.snapshot()
    }

    fn forget(&self, name: &str) -> io::Result<()> {
        self.session.notifier().inval_entry(INodeNo::ROOT, OsStr::new(name))
    }

    fn unmount(self: Box<Self>) -> io::Result<()> {
        self.session.unmount().map_err(io::Error::other)
    }
}

struct NullFs {
    tree: Mutex<Tree>,
    counters: Arc<RequestCounters>,
    lifetimes: Lifetimes,
    pattern: Vec<u8>,
}

struct Tree {
    attrs: HashMap<u64, FileAttr>,
    directories: HashMap<u64, Directory>,
    next: u64,
}

#[derive(Default)]
struct Directory {
    names: HashMap<OsString, u64>,
    /// By inode number, which serves as the cookie: there are no hard links.
    entries: BTreeMap<u64, OsString>,
}

impl Tree {
    fn new() -> Tree {
        let root = new_attr(1, FileType::Directory);
        let (attrs, directories) = (HashMap::from([(1, root)]), HashMap::from([(1, Directory::default())]));
        Tree { attrs, directories, next: FIRST_INODE }
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Option<FileAttr> {
        let number = self.directories.get(&parent.0)?.names.get(name)?;
        self.attrs.get(number).copied()
    }

    fn make(&mut self, parent: INodeNo, name: &OsStr, kind: FileType) -> Result<FileAttr, Errno> {
        let directory = self.directories.get_mut(&parent.0).ok_or(Errno::ENOENT)?;
        let number = self.next;
        self.next += 1;
        directory.names.insert(name.to_owned(), number);
        directory.entries.insert(number, name.to_owned());
        if kind == FileType::Directory {
            self.directories.insert(number, Directory::default());
        }
        let attr = new_attr(number, kind);
        self.attrs.insert(number, attr);
        Ok(attr)
    }

    fn remove(&mut self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let directory = self.directories.get_mut(&parent.0).ok_or(Errno::ENOENT)?;
        let number = directory.names.remove(name).ok_or(Errno::ENOENT)?;
        directory.entries.remove(&number);
        self.directories.remove(&number);
        self.attrs.remove(&number);
        Ok(())
    }
}

fn new_attr(number: u64, kind: FileType) -> FileAttr {
    let (ino, time) = (INodeNo(number), UNIX_EPOCH + Duration::from_secs(1_000_000_000));
    let (perm, nlink) = if kind == FileType::Directory { (0o755, 2) } else { (0o644, 1) };
    let (atime, mtime, ctime, crtime) = (time, time, time, time);
    let (size, blocks, uid, gid, rdev, blksize, flags) = (0, 0, 0, 0, 0, 4096, 0);
    FileAttr {
        ino,
        size,
        blocks,
        atime,
        mtime,
        ctime,
        crtime,
        kind,
        perm,
        nlink,
        uid,
        gid,
        rdev,
        blksize,
        flags,
    }
}

impl NullFs {
    fn count(&self, kind: RequestKind) {
        self.counters.add(kind);
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_entry(&self, reply: ReplyEntry, attr: &FileAttr) {
        reply.entry_with_ttls(&self.lifetimes.attr, &self.lifetimes.entry, attr, Generation(0));
    }
}

impl Filesystem for NullFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        murphy_fs::kernel_config(config)
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.count(RequestKind::Lookup);
        let found = self.tree().find(parent, name);
        match found {
            Some(attr) => self.send_entry(reply, &attr),
            None => {
                let missing = new_attr(0, FileType::RegularFile);
                reply.entry_with_ttls(&Duration::ZERO, &self.lifetimes.missing, &missing, Generation(0));
            }
        }
    }

    fn forget(&self, _: &Request, _: INodeNo, _: u64) {
        self.count(RequestKind::Forget);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.count(RequestKind::Getattr);
        let found = self.tree().attrs.get(&ino.0).copied();
        match found {
            Some(attr) => reply.attr(&self.lifetimes.attr, &attr),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.count(RequestKind::Setattr);
        let changed = self.tree().attrs.get_mut(&ino.0).map(|attr| {
            attr.size = size.unwrap_or(attr.size);
            attr.perm = mode.map_or(attr.perm, |mode| (mode & 0o7777) as u16);
            *attr
        });
        match changed {
            Some(attr) => reply.attr(&self.lifetimes.attr, &attr),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        self.count(RequestKind::Mkdir);
        let made = self.tree().make(parent, name, FileType::Directory);
        match made {
            Ok(attr) => self.send_entry(reply, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        self.count(RequestKind::Create);
        let made = self.tree().make(parent, name, FileType::RegularFile);
        match made {
            Ok(attr) => {
                let lifetime = self.lifetimes.entry_and_attr();
                reply.created(&lifetime, &attr, Generation(0), FileHandle(0), FopenFlags::empty());
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.count(RequestKind::Unlink);
        let removed = self.tree().remove(parent, name);
        match removed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.count(RequestKind::Rmdir);
        let removed = self.tree().remove(parent, name);
        match removed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.count(RequestKind::Open);
        let mut answer = FopenFlags::empty();
        answer.set(FopenFlags::FOPEN_NOFLUSH, flags.acc_mode() == fuser::OpenAccMode::O_RDONLY);
        reply.opened(FileHandle(0), answer);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.count(RequestKind::Read);
        let length = self.tree().attrs.get(&ino.0).map_or(0, |attr| attr.size);
        let there = length.saturating_sub(offset).min(u64::from(size)) as usize;
        reply.data(&self.pattern[..there.min(PATTERN_BYTES)]);
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.count(RequestKind::Write);
        if let Some(attr) = self.tree().attrs.get_mut(&ino.0) {
            attr.size = attr.size.max(offset.saturating_add(data.len() as u64));
        }
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.count(RequestKind::Flush);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.count(RequestKind::Fsync);
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.count(RequestKind::Release);
        reply.ok();
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.count(RequestKind::Opendir);
        reply.error(Errno::ENOSYS);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.count(RequestKind::Readdir);
        let tree = self.tree();
        if let Some(directory) = tree.directories.get(&ino.0) {
            for (number, name) in directory.entries.range(offset + 1..) {
                let kind = tree.attrs.get(number).map_or(FileType::RegularFile, |attr| attr.kind);
                if reply.add(INodeNo(*number), *number, kind, name) {
                    break;
                }
            }
        }
        drop(tree);
        reply.ok();
    }

    fn readdirplus(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.count(RequestKind::Readdirplus);
        let (tree, lifetime) = (self.tree(), self.lifetimes.entry_and_attr());
        if let Some(directory) = tree.directories.get(&ino.0) {
            for (number, name) in directory.entries.range(offset + 1..) {
                let Some(attr) = tree.attrs.get(number) else { continue };
                if reply.add(attr.ino, *number, name, &lifetime, attr, Generation(0)) {
                    break;
                }
            }
        }
        drop(tree);
        reply.ok();
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        self.count(RequestKind::Getxattr);
        reply.error(Errno::ENODATA);
    }
}

/// The first number given to a file; the root is 1, and cookies 0 to 2 stand for the start and the dots.
const FIRST_INODE: u64 = 16;

/// What reads return: as long as the longest request.
const PATTERN_BYTES: usize = 1 << 20;
