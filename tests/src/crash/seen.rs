//! What a tree looks like from outside, with the inode behind every path: two of them are compared as two moments of one history.

use std::collections::{BTreeMap, BTreeSet};

use murphy_fs::{Attr, Caller, Errno, FileSystem, Ino, Kind, OpenFlags, Timespec};

use crate::{Driver, compare::hash_contents};

/// A tree by path.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Seen {
    pub(super) nodes: BTreeMap<Vec<u8>, Node>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Node {
    pub(super) ino: Ino,
    pub(super) names: Names,
    pub(super) data: Data,
}

/// What entries say that are decided at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Names {
    kind: Kind,
    mode: u16,
    uid: u32,
    gid: u32,
    rdev: u32,
    nlink: u32,
    target: Option<Vec<u8>>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What follows the bytes of a file, when they are flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Data {
    size: u64,
    mtime: Timespec,
    ctime: Timespec,
    contents: Option<blake3::Hash>,
}

impl Data {
    /// The bytes alone.
    pub(super) fn bytes(&self) -> (u64, Option<blake3::Hash>) {
        (self.size, self.contents)
    }
}

impl Node {
    pub(super) fn is_file(&self) -> bool {
        self.names.kind == Kind::File
    }
}

impl Seen {
    /// Looks at everything below the root.
    pub(super) fn of(driver: &Driver, fs: &dyn FileSystem) -> Result<Seen, String> {
        let mut seen = Seen::default();
        let root = driver.wait(fs.getattr(Ino::ROOT)).map_err(|errno| format!("the root: {errno}"))?;
        let mut waiting = vec![(Vec::new(), root)];
        while let Some((path, attr)) = waiting.pop() {
            let told = |errno: Errno| format!("{}: {errno}", String::from_utf8_lossy(&path));
            if attr.kind == Kind::Directory {
                let children = driver.wait(fs.readdir_plus(attr.ino, 0, ENTRIES)).map_err(told)?;
                for child in children {
                    let path = [&path[..], b"/", child.entry.name.as_bytes()].concat();
                    waiting.push((path, driver.wait(fs.getattr(child.entry.ino)).map_err(told)?));
                }
            }
            let node = node(driver, fs, &attr).map_err(told)?;
            seen.nodes.insert(path, node);
        }
        Ok(seen)
    }

    /// The first thing in which `other` has other names or attributes; with `data` also other bytes or times.
    pub(super) fn difference(&self, other: &Seen, data: bool) -> Option<String> {
        let paths: BTreeSet<&Vec<u8>> = self.nodes.keys().chain(other.nodes.keys()).collect();
        paths.into_iter().find_map(|path| {
            let (first, second) = (self.nodes.get(path), other.nodes.get(path));
            let same = match (first, second) {
                (Some(first), Some(second)) => {
                    let counts = data || first.names.kind != Kind::File;
                    first.names == second.names && (!counts || first.data == second.data)
                }
                _ => false,
            };
            (!same).then(|| format!("{}: {first:?}, not {second:?}", String::from_utf8_lossy(path)))
        })
    }

    /// Whether every path has the names and the bytes of one of two steps that follow each other.
    pub(super) fn is_between(&self, before: &Seen, after: &Seen) -> bool {
        let paths = |seen: &Seen| seen.nodes.keys().cloned().collect::<Vec<_>>();
        let known = paths(self) == paths(before) || paths(self) == paths(after);
        known
            && self.nodes.iter().all(|(path, node)| {
                let candidates = [before.nodes.get(path), after.nodes.get(path)];
                let has = |is: &dyn Fn(&Node) -> bool| candidates.iter().flatten().any(|one| is(one));
                has(&|one| one.names == node.names) && has(&|one| one.data.bytes() == node.data.bytes())
            })
    }

    /// Files by path, with their inode and data.
    pub(super) fn files(&self) -> impl Iterator<Item = (&Vec<u8>, &Node)> {
        self.nodes.iter().filter(|(_, node)| node.is_file())
    }
}

fn node(driver: &Driver, fs: &dyn FileSystem, attr: &Attr) -> Result<Node, Errno> {
    let mut contents = None;
    if attr.kind == Kind::File {
        let flags = OpenFlags { read: true, ..OpenFlags::default() };
        let opened = driver.wait(fs.open(&Caller::default(), attr.ino, flags))?;
        let hash = hash_contents(driver, fs, (attr.ino, opened.handle), attr.size);
        fs.release(attr.ino, opened.handle);
        contents = Some(hash?);
    }
    let target = match attr.kind {
        Kind::Symlink => Some(driver.wait(fs.readlink(attr.ino))?.to_vec()),
        _ => None,
    };
    let mut xattrs = BTreeMap::new();
    for name in driver.wait(fs.listxattr(&Caller::default(), attr.ino))? {
        let value = driver.wait(fs.getxattr(&Caller::default(), attr.ino, &name))?;
        xattrs.insert(name.as_bytes().to_vec(), value.to_vec());
    }
    let Attr { ino, kind, mode, uid, gid, rdev, nlink, size, mtime, ctime, .. } = *attr;
    let names = Names { kind, mode, uid, gid, rdev, nlink, target, xattrs };
    Ok(Node { ino, names, data: Data { size, mtime, ctime, contents } })
}

/// More than a program makes in one directory.
const ENTRIES: usize = 10_000;
