//! The reference model: a file system of plain maps that says what Murphy must answer.
//!
//! It shares nothing with the engine but the words of [`murphy_fs`]; `docs/semantics.md` is its specification in prose.
//!
//! Invariants:
//! - Every call checks everything before it changes anything.
//! - An inode is in the map as long as it has a name or an open handle, and not a moment longer.
//! - Whether a caller may reach an inode (search and access bits), and of which groups it is a member, is not judged here.

mod attributes;
mod files;
mod names;
mod rename;
mod sparse;

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use murphy_fs::{
    Answer, Attr, Caller, DIRECTORY_BYTES, DirEntry, DirEntryPlus, Errno, FileSystem, Handle, Ino, Kind,
    Name, NewNode, OpenFlags, Opened, RenameMode, SetAttr, StatFs, Timespec, XattrMode, XattrName,
};
use murphy_log::Clock;
use parking_lot::Mutex;

use self::sparse::Sparse;

/// A file system in memory that answers every call at once.
pub struct Reference {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

impl Reference {
    /// An empty file system: a root directory of mode 0755 that belongs to root.
    pub fn new(clock: Arc<dyn Clock>) -> Reference {
        let now = Timespec::from(clock.wall());
        let root = Node::new(Body::Directory(Directory::below(Ino::ROOT)), 0o755, (0, 0), now);
        let state = State {
            nodes: BTreeMap::from([(Ino::ROOT, root)]),
            handles: BTreeMap::new(),
            last_ino: Ino::ROOT.get(),
            last_handle: 0,
        };
        Reference { clock, state: Mutex::new(state) }
    }

    fn see<T>(&self, look: impl FnOnce(&State) -> Result<T, Errno>) -> Answer<T> {
        Answer::Now(look(&self.state.lock()))
    }

    fn change<T>(&self, act: impl FnOnce(&mut State, Timespec) -> Result<T, Errno>) -> Answer<T> {
        let now = Timespec::from(self.clock.wall());
        Answer::Now(act(&mut self.state.lock(), now))
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reference").field("inodes", &self.state.lock().nodes.len()).finish_non_exhaustive()
    }
}

impl FileSystem for Reference {
    fn lookup(&self, _: &Caller, parent: Ino, name: &Name) -> Answer<Attr> {
        self.see(|state| state.attr(state.entry(parent, name)?))
    }

    fn parent(&self, directory: Ino) -> Answer<Ino> {
        self.see(|state| Ok(state.directory(directory)?.parent))
    }

    fn getattr(&self, ino: Ino) -> Answer<Attr> {
        self.see(|state| state.attr(ino))
    }

    fn setattr(&self, caller: &Caller, ino: Ino, handle: Option<Handle>, change: SetAttr) -> Answer<Attr> {
        self.change(|state, now| state.set_attributes(now, caller, ino, handle, change))
    }

    fn readlink(&self, ino: Ino) -> Answer<Bytes> {
        self.see(|state| match &state.node(ino)?.body {
            Body::Symlink(target) => Ok(target.clone()),
            _ => Err(Errno::EINVAL),
        })
    }

    fn mkdir(&self, caller: &Caller, parent: Ino, name: &Name, mode: u16) -> Answer<Attr> {
        self.change(|state, now| {
            state.add(now, caller, (parent, name), Body::Directory(Directory::below(parent)), mode)
        })
    }

    fn mknod(&self, caller: &Caller, parent: Ino, name: &Name, node: NewNode) -> Answer<Attr> {
        self.change(|state, now| {
            let body = match node.kind {
                Kind::File => Body::File(Sparse::default()),
                Kind::Fifo | Kind::Socket => Body::Special(node.kind, 0),
                Kind::CharDevice | Kind::BlockDevice => Body::Special(node.kind, node.rdev),
                Kind::Directory | Kind::Symlink => return Err(Errno::EINVAL),
            };
            state.add(now, caller, (parent, name), body, node.mode)
        })
    }

    fn create(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &Name,
        mode: u16,
        flags: OpenFlags,
    ) -> Answer<(Attr, Opened)> {
        self.change(|state, now| {
            let attr = state.add(now, caller, (parent, name), Body::File(Sparse::default()), mode)?;
            let opened = state.open_file(now, caller, attr.ino, OpenFlags { truncate: false, ..flags })?;
            Ok((attr, opened))
        })
    }

    fn symlink(&self, caller: &Caller, parent: Ino, name: &Name, target: &[u8]) -> Answer<Attr> {
        self.change(|state, now| {
            if target.is_empty() {
                return Err(Errno::ENOENT);
            }
            if target.len() > TARGET_BYTES_MAX {
                return Err(Errno::ENAMETOOLONG);
            }
            let body = Body::Symlink(Bytes::copy_from_slice(target));
            state.add(now, caller, (parent, name), body, 0o777)
        })
    }

    fn link(&self, _: &Caller, ino: Ino, parent: Ino, name: &Name) -> Answer<Attr> {
        self.change(|state, now| state.link(now, ino, parent, name))
    }

    fn unlink(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<()> {
        self.change(|state, now| state.unlink(now, caller, parent, name))
    }

    fn rmdir(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<()> {
        self.change(|state, now| state.rmdir(now, caller, parent, name))
    }

    fn rename(&self, caller: &Caller, from: (Ino, &Name), to: (Ino, &Name), mode: RenameMode) -> Answer<()> {
        self.change(|state, now| state.rename(now, caller, from, to, mode))
    }

    fn readdir(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntry>> {
        self.see(|state| state.list(directory, cookie, limit))
    }

    fn readdir_plus(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntryPlus>> {
        self.see(|state| {
            let entries = state.list(directory, cookie, limit)?;
            entries
                .into_iter()
                .map(|entry| Ok(DirEntryPlus { attr: state.attr(entry.ino)?, entry }))
                .collect()
        })
    }

    fn open(&self, caller: &Caller, ino: Ino, flags: OpenFlags) -> Answer<Opened> {
        self.change(|state, now| state.open_file(now, caller, ino, flags))
    }

    fn read(&self, ino: Ino, handle: Handle, offset: u64, length: u32) -> Answer<Bytes> {
        self.see(|state| state.read(ino, handle, offset, length))
    }

    fn write(&self, caller: &Caller, ino: Ino, handle: Handle, offset: u64, data: Bytes) -> Answer<u32> {
        self.change(|state, now| state.write(now, caller, ino, handle, offset, &data))
    }

    fn flush(&self, ino: Ino, handle: Handle) -> Answer<()> {
        self.see(|state| state.handle(ino, handle).map(|_| ()))
    }

    fn fsync(&self, ino: Ino, handle: Option<Handle>) -> Answer<()> {
        self.see(|state| handle.map_or(Ok(()), |handle| state.handle(ino, handle).map(|_| ())))
    }

    fn release(&self, ino: Ino, handle: Handle) {
        self.state.lock().release(ino, handle);
    }

    fn setxattr(
        &self,
        caller: &Caller,
        ino: Ino,
        name: &XattrName,
        value: Bytes,
        mode: XattrMode,
    ) -> Answer<()> {
        self.change(|state, now| state.set_xattr(now, caller, ino, (name, value), mode))
    }

    fn getxattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Answer<Bytes> {
        self.see(|state| state.xattr(caller, ino, name))
    }

    fn listxattr(&self, caller: &Caller, ino: Ino) -> Answer<Vec<XattrName>> {
        self.see(|state| state.xattr_names(caller, ino))
    }

    fn removexattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Answer<()> {
        self.change(|state, now| state.remove_xattr(now, caller, ino, name))
    }

    fn statfs(&self) -> Answer<StatFs> {
        self.see(|state| {
            let bytes = state.nodes.values().map(|node| node.blocks() * 512).sum();
            Ok(StatFs { inodes: state.nodes.len() as u64, bytes })
        })
    }

    fn sync_all(&self) -> Answer<()> {
        Answer::Now(Ok(()))
    }
}

/// Everything there is, behind one lock.
struct State {
    nodes: BTreeMap<Ino, Node>,
    handles: BTreeMap<Handle, OpenFile>,
    last_ino: u64,
    last_handle: u64,
}

impl State {
    fn node(&self, ino: Ino) -> Result<&Node, Errno> {
        self.nodes.get(&ino).ok_or(Errno::ESTALE)
    }

    fn node_mut(&mut self, ino: Ino) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&ino).ok_or(Errno::ESTALE)
    }

    fn directory(&self, ino: Ino) -> Result<&Directory, Errno> {
        match &self.node(ino)?.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn directory_mut(&mut self, ino: Ino) -> Result<&mut Directory, Errno> {
        match &mut self.node_mut(ino)?.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn attr(&self, ino: Ino) -> Result<Attr, Errno> {
        let node = self.node(ino)?;
        Ok(Attr {
            ino,
            generation: 0,
            kind: node.kind(),
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            rdev: if let Body::Special(_, rdev) = node.body { rdev } else { 0 },
            nlink: self.link_count(node),
            size: node.size(),
            blocks: node.blocks(),
            atime: node.atime,
            mtime: node.mtime,
            ctime: node.ctime,
        })
    }

    fn link_count(&self, node: &Node) -> u32 {
        let Body::Directory(directory) = &node.body else { return node.links };
        let is_directory = |dentry: &&Dentry| self.directory(dentry.ino).is_ok();
        2 + directory.entries.values().filter(is_directory).count() as u32
    }
}

/// An inode.
struct Node {
    mode: u16,
    uid: u32,
    gid: u32,
    /// Number of names.
    links: u32,
    atime: Timespec,
    mtime: Timespec,
    ctime: Timespec,
    xattrs: BTreeMap<XattrName, Bytes>,
    body: Body,
    /// Grows with each change of the data.
    version: u64,
    /// The version that the last open saw.
    version_opened: Option<u64>,
}

impl Node {
    fn new(body: Body, mode: u16, owner: (u32, u32), now: Timespec) -> Node {
        Node {
            mode,
            uid: owner.0,
            gid: owner.1,
            links: 1,
            atime: now,
            mtime: now,
            ctime: now,
            xattrs: BTreeMap::new(),
            body,
            version: 0,
            version_opened: None,
        }
    }

    fn kind(&self) -> Kind {
        self.body.kind()
    }

    fn size(&self) -> u64 {
        match &self.body {
            Body::File(contents) => contents.size(),
            Body::Directory(directory) => directory.entries.len() as u64 * DIRECTORY_BYTES,
            Body::Symlink(target) => target.len() as u64,
            Body::Special(..) => 0,
        }
    }

    fn blocks(&self) -> u64 {
        if let Body::File(contents) = &self.body { contents.blocks() } else { 0 }
    }

    fn is_owned_by(&self, caller: &Caller) -> bool {
        caller.uid == ROOT || caller.uid == self.uid
    }
}

/// What an inode is, with what only that kind has.
enum Body {
    File(Sparse),
    Directory(Directory),
    Symlink(Bytes),
    /// A pipe, socket or device, and its device number.
    Special(Kind, u32),
}

impl Body {
    fn kind(&self) -> Kind {
        match self {
            Body::File(_) => Kind::File,
            Body::Directory(_) => Kind::Directory,
            Body::Symlink(_) => Kind::Symlink,
            Body::Special(kind, _) => *kind,
        }
    }
}

/// The entries of a directory.
struct Directory {
    parent: Ino,
    entries: BTreeMap<Name, Dentry>,
    last_cookie: u64,
}

impl Directory {
    fn below(parent: Ino) -> Directory {
        Directory { parent, entries: BTreeMap::new(), last_cookie: COOKIES_RESERVED - 1 }
    }
}

/// Where a name leads.
#[derive(Clone, Copy)]
struct Dentry {
    ino: Ino,
    cookie: u64,
}

/// An open file.
struct OpenFile {
    ino: Ino,
    flags: OpenFlags,
}

/// The user that may do everything.
const ROOT: u32 = 0;
/// Set user on execution.
const SETUID: u16 = 0o4000;
/// Set group on execution; on a directory: what is created in it belongs to its group.
const SETGID: u16 = 0o2000;
/// In a directory: only owners remove.
const STICKY: u16 = 0o1000;
/// The group may execute.
const GROUP_EXECUTE: u16 = 0o010;
/// All bits of a mode.
const MODE_BITS: u16 = 0o7777;
/// Cookies 0 to 2 mean the start, `.` and `..`.
const COOKIES_RESERVED: u64 = 3;
/// The longest target of a symbolic link, in bytes.
const TARGET_BYTES_MAX: usize = 4095;
/// The largest file, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 62;
/// The largest value of an extended attribute, in bytes.
const XATTR_BYTES_MAX: usize = 65_536;
