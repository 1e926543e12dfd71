//! A small file system in memory, with names that misbehave on purpose, for tests of the adapter alone.

use std::{
    collections::BTreeMap,
    future,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::{
    Answer, Attr, Caller, DirEntry, DirEntryPlus, Errno, FileSystem, Handle, Ino, Kind, Name, NewNode,
    OpenFlags, Opened, RenameMode, SetAttr, SetTime, StatFs, Timespec, XattrMode, XattrName,
};

struct Node {
    attr: Attr,
    parent: Ino,
    bytes: Vec<u8>,
    /// By cookie.
    children: BTreeMap<u64, (Name, Ino)>,
    xattrs: BTreeMap<XattrName, Bytes>,
}

struct State {
    nodes: BTreeMap<u64, Node>,
    next: u64,
}

/// The file system. Looking up `panic` panics, `never` is never answered, `late` (and listing a directory of that name) is
/// answered from the runtime.
pub(super) struct Memory {
    state: Mutex<State>,
    /// The next `create` finds that the name is there, as if somebody had just made it.
    pub(super) taken: AtomicBool,
    /// What `open` says about the data.
    pub(super) unchanged: AtomicBool,
    /// The only handle through which can be read; any if it is 0.
    pub(super) open: AtomicU64,
}

impl State {
    fn node(&mut self, ino: Ino) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&ino.get()).ok_or(Errno::ESTALE)
    }

    fn find(&mut self, parent: Ino, name: &Name) -> Result<(u64, Ino), Errno> {
        let children = &self.node(parent)?.children;
        let found = children.iter().find(|(_, (known, _))| known == name);
        found.map(|(cookie, (_, ino))| (*cookie, *ino)).ok_or(Errno::ENOENT)
    }

    fn put(&mut self, parent: Ino, name: &Name, ino: Ino) -> Result<(), Errno> {
        let cookie = self.next + (1 << 40);
        self.next += 1;
        self.node(parent)?.children.insert(cookie, (name.clone(), ino));
        Ok(())
    }

    fn make(
        &mut self,
        caller: &Caller,
        parent: Ino,
        name: &Name,
        kind: Kind,
        mode: u16,
    ) -> Result<Attr, Errno> {
        if self.find(parent, name).is_ok() {
            return Err(Errno::EEXIST);
        }
        let ino = Ino::new(self.next);
        self.next += 1;
        let attr = Attr { uid: caller.uid, gid: caller.gid, ..new_attr(ino, kind, mode) };
        let node =
            Node { attr, parent, bytes: Vec::new(), children: BTreeMap::new(), xattrs: BTreeMap::new() };
        self.nodes.insert(ino.get(), node);
        self.put(parent, name, ino)?;
        Ok(attr)
    }

    fn remove(&mut self, parent: Ino, name: &Name) -> Result<(), Errno> {
        let (cookie, ino) = self.find(parent, name)?;
        let node = self.node(ino)?;
        if !node.children.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        node.attr.nlink -= 1;
        self.node(parent)?.children.remove(&cookie);
        Ok(())
    }
}

fn new_attr(ino: Ino, kind: Kind, mode: u16) -> Attr {
    let time = Timespec { seconds: 1_000_000_000, nanos: 123_456_789 };
    let nlink = if kind == Kind::Directory { 2 } else { 1 };
    let (generation, uid, gid, rdev, size, blocks) = (3, 0, 0, 0, 0, 0);
    let (atime, mtime, ctime) = (time, time, time);
    Attr { ino, generation, kind, mode, uid, gid, rdev, nlink, size, blocks, atime, mtime, ctime }
}

impl Memory {
    pub(super) fn new() -> Memory {
        let attr = new_attr(Ino::ROOT, Kind::Directory, 0o755);
        let (children, xattrs) = (BTreeMap::new(), BTreeMap::new());
        let root = Node { attr, parent: Ino::ROOT, bytes: Vec::new(), children, xattrs };
        let state = State { nodes: BTreeMap::from([(1, root)]), next: 100 };
        Memory {
            state: Mutex::new(state),
            taken: AtomicBool::new(false),
            unchanged: AtomicBool::new(false),
            open: AtomicU64::new(0),
        }
    }

    /// Changes the bytes of a file as another node would.
    pub(super) fn change_behind(&self, parent: Ino, name: &Name, bytes: &[u8]) -> Ino {
        let mut state = self.state.lock();
        let (_, ino) = state.find(parent, name).unwrap();
        let node = state.node(ino).unwrap();
        node.bytes = bytes.to_vec();
        node.attr.size = bytes.len() as u64;
        ino
    }

    /// Makes a file as another node would.
    pub(super) fn create_behind(&self, parent: Ino, name: &Name) {
        self.state.lock().make(&Caller::default(), parent, name, Kind::File, 0o644).unwrap();
    }

    fn now<T>(&self, work: impl FnOnce(&mut State) -> Result<T, Errno>) -> Answer<T> {
        Answer::Now(work(&mut self.state.lock()))
    }

    fn opened(&self) -> Opened {
        Opened { handle: Handle(7), unchanged: self.unchanged.load(Ordering::Relaxed), decides: false }
    }
}

impl FileSystem for Memory {
    fn lookup(&self, _: &Caller, parent: Ino, name: &Name) -> Answer<Attr> {
        let found = || {
            let mut state = self.state.lock();
            let (_, ino) = state.find(parent, name)?;
            Ok(state.node(ino)?.attr)
        };
        match name.as_bytes() {
            b"panic" => panic!("a panic on purpose"),
            b"never" => Answer::later(future::pending()),
            b"late" => {
                let found = found();
                Answer::later(async move {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    found
                })
            }
            _ => Answer::Now(found()),
        }
    }

    fn parent(&self, directory: Ino) -> Answer<Ino> {
        self.now(|state| Ok(state.node(directory)?.parent))
    }

    fn getattr(&self, ino: Ino) -> Answer<Attr> {
        self.now(|state| Ok(state.node(ino)?.attr))
    }

    fn setattr(&self, _: &Caller, ino: Ino, _: Option<Handle>, change: SetAttr) -> Answer<Attr> {
        self.now(|state| {
            let node = state.node(ino)?;
            if let Some(size) = change.size {
                node.bytes.resize(size as usize, 0);
                node.attr.size = size;
            }
            if let Some(SetTime::At(time)) = change.mtime {
                node.attr.mtime = time;
            }
            node.attr.mode = change.mode.unwrap_or(node.attr.mode);
            Ok(node.attr)
        })
    }

    fn readlink(&self, ino: Ino) -> Answer<Bytes> {
        self.now(|state| Ok(Bytes::from(state.node(ino)?.bytes.clone())))
    }

    fn mkdir(&self, caller: &Caller, parent: Ino, name: &Name, mode: u16) -> Answer<Attr> {
        self.now(|state| state.make(caller, parent, name, Kind::Directory, mode))
    }

    fn mknod(&self, caller: &Caller, parent: Ino, name: &Name, node: NewNode) -> Answer<Attr> {
        self.now(|state| state.make(caller, parent, name, node.kind, node.mode))
    }

    fn create(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &Name,
        mode: u16,
        _: OpenFlags,
    ) -> Answer<(Attr, Opened)> {
        let taken = self.taken.swap(false, Ordering::Relaxed);
        self.now(|state| {
            let attr = state.make(caller, parent, name, Kind::File, mode)?;
            if taken { Err(Errno::EEXIST) } else { Ok((attr, self.opened())) }
        })
    }

    fn symlink(&self, caller: &Caller, parent: Ino, name: &Name, target: &[u8]) -> Answer<Attr> {
        self.now(|state| {
            let ino = state.make(caller, parent, name, Kind::Symlink, 0o777)?.ino;
            let node = state.node(ino)?;
            node.bytes = target.to_vec();
            node.attr.size = target.len() as u64;
            Ok(node.attr)
        })
    }

    fn link(&self, _: &Caller, ino: Ino, parent: Ino, name: &Name) -> Answer<Attr> {
        self.now(|state| {
            state.put(parent, name, ino)?;
            let node = state.node(ino)?;
            node.attr.nlink += 1;
            Ok(node.attr)
        })
    }

    fn unlink(&self, _: &Caller, parent: Ino, name: &Name) -> Answer<()> {
        self.now(|state| state.remove(parent, name))
    }

    fn rmdir(&self, _: &Caller, parent: Ino, name: &Name) -> Answer<()> {
        self.now(|state| state.remove(parent, name))
    }

    fn rename(&self, _: &Caller, from: (Ino, &Name), to: (Ino, &Name), mode: RenameMode) -> Answer<()> {
        self.now(|state| {
            let (cookie, ino) = state.find(from.0, from.1)?;
            if state.find(to.0, to.1).is_ok() {
                if mode == RenameMode::NoReplace {
                    return Err(Errno::EEXIST);
                }
                state.remove(to.0, to.1)?;
            }
            state.node(from.0)?.children.remove(&cookie);
            state.node(ino)?.parent = to.0;
            state.put(to.0, to.1, ino)
        })
    }

    fn readdir(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntry>> {
        self.now(|state| {
            let after = state.node(directory)?.children.range(cookie + 1..).take(limit);
            let after: Vec<_> = after.map(|(cookie, (name, ino))| (*cookie, name.clone(), *ino)).collect();
            let entry = |(cookie, name, ino): (u64, Name, Ino)| {
                Ok(DirEntry { cookie, name, ino, kind: state.node(ino)?.attr.kind })
            };
            after.into_iter().map(entry).collect()
        })
    }

    fn readdir_plus(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntryPlus>> {
        let Answer::Now(entries) = self.readdir(directory, cookie, limit) else { unreachable!() };
        let mut state = self.state.lock();
        let result = entries.and_then(|entries| {
            let plus = |entry: DirEntry| Ok(DirEntryPlus { attr: state.node(entry.ino)?.attr, entry });
            entries.into_iter().map(plus).collect()
        });
        let is_late =
            state.find(Ino::ROOT, &Name::new("late").unwrap()).is_ok_and(|(_, ino)| ino == directory);
        if is_late { Answer::later(async move { result }) } else { Answer::Now(result) }
    }

    fn open(&self, _: &Caller, ino: Ino, flags: OpenFlags) -> Answer<Opened> {
        self.now(|state| {
            let node = state.node(ino)?;
            if flags.truncate {
                node.bytes.clear();
                node.attr.size = 0;
            }
            Ok(self.opened())
        })
    }

    fn read(&self, ino: Ino, handle: Handle, offset: u64, length: u32) -> Answer<Bytes> {
        let open = self.open.load(Ordering::Relaxed);
        if open != 0 && open != handle.0 {
            return Answer::Now(Err(Errno::EBADF));
        }
        self.now(|state| {
            let bytes = &state.node(ino)?.bytes;
            let start = bytes.len().min(offset as usize);
            let end = bytes.len().min(start + length as usize);
            Ok(Bytes::copy_from_slice(&bytes[start..end]))
        })
    }

    fn write(&self, _: &Caller, ino: Ino, _: Handle, offset: u64, data: Bytes) -> Answer<u32> {
        self.now(|state| {
            let node = state.node(ino)?;
            let end = offset as usize + data.len();
            if node.bytes.len() < end {
                node.bytes.resize(end, 0);
            }
            node.bytes[offset as usize..end].copy_from_slice(&data);
            node.attr.size = node.bytes.len() as u64;
            Ok(data.len() as u32)
        })
    }

    fn flush(&self, _: Ino, _: Handle) -> Answer<()> {
        Answer::Now(Ok(()))
    }

    fn fsync(&self, _: Ino, _: Option<Handle>) -> Answer<()> {
        Answer::later(future::ready(Ok(())))
    }

    fn release(&self, _: Ino, _: Handle) {}

    fn setxattr(&self, _: &Caller, ino: Ino, name: &XattrName, value: Bytes, mode: XattrMode) -> Answer<()> {
        self.now(|state| {
            let xattrs = &mut state.node(ino)?.xattrs;
            if mode == XattrMode::Create && xattrs.contains_key(name) {
                return Err(Errno::EEXIST);
            }
            xattrs.insert(name.clone(), value);
            Ok(())
        })
    }

    fn getxattr(&self, _: &Caller, ino: Ino, name: &XattrName) -> Answer<Bytes> {
        self.now(|state| state.node(ino)?.xattrs.get(name).cloned().ok_or(Errno::ENODATA))
    }

    fn listxattr(&self, _: &Caller, ino: Ino) -> Answer<Vec<XattrName>> {
        self.now(|state| Ok(state.node(ino)?.xattrs.keys().cloned().collect()))
    }

    fn removexattr(&self, _: &Caller, ino: Ino, name: &XattrName) -> Answer<()> {
        self.now(|state| state.node(ino)?.xattrs.remove(name).map(drop).ok_or(Errno::ENODATA))
    }

    fn statfs(&self) -> Answer<StatFs> {
        self.now(|state| Ok(StatFs { inodes: state.nodes.len() as u64, bytes: 10_000 }))
    }

    fn sync_all(&self) -> Answer<()> {
        Answer::Now(Ok(()))
    }
}
