//! Compares trees: two file systems, a file system and an earlier image of it, or two real directories.
//!
//! Invariants:
//! - Every difference is told with the path at which it was seen; equal trees give an empty list.
//! - Inode numbers, allocated blocks, access times and cookies are never compared.
//! - A name that one side has and the other lacks is told once, not again for everything below it.

mod directories;
mod image;

use std::{collections::BTreeMap, fmt};

use murphy_fs::{Attr, DIRECTORY_BYTES, FileSystem, Kind, Timespec};

pub(crate) use self::image::hash_contents;
pub use self::{directories::compare_directories, image::TreeImage};
use crate::Driver;

/// What of a tree is compared, beyond names, kinds, modes, owners, sizes, targets, links, attributes and contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TreeRules {
    /// Modification times.
    pub mtime: bool,
    /// Change times: equal only if both trees were made under one clock.
    pub ctime: bool,
}

impl TreeRules {
    /// Modification times, and no change times: for a copy.
    pub const COPY: TreeRules = TreeRules { mtime: true, ctime: false };
    /// All times: for the same history.
    pub const SAME_HISTORY: TreeRules = TreeRules { mtime: true, ctime: true };
    /// No times: for histories under different clocks.
    pub const UNTIMED: TreeRules = TreeRules { mtime: false, ctime: false };
}

/// One thing that is not the same in two trees.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Where, from the root of the trees; bytes that are not UTF-8 are replaced.
    pub path: String,
    /// What, first side first.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.what)
    }
}

/// Compares everything in two file systems.
pub fn compare_trees(
    driver: &Driver,
    a: &dyn FileSystem,
    b: &dyn FileSystem,
    rules: TreeRules,
) -> Vec<Difference> {
    match (TreeImage::of(driver, a), TreeImage::of(driver, b)) {
        (Ok(first), Ok(second)) => first.differences(&second, rules),
        (first, second) => [("first", first.err()), ("second", second.err())]
            .into_iter()
            .filter_map(|(side, failure)| {
                failure.map(|difference| Difference {
                    path: difference.path,
                    what: format!("cannot be read on the {side} side: {}", difference.what),
                })
            })
            .collect(),
    }
}

/// What is not the same in two attributes of what should be one inode, or `None`.
pub fn attr_difference(a: &Attr, b: &Attr, times: bool) -> Option<String> {
    let mut told = Vec::new();
    tell(&mut told, "kind", &a.kind, &b.kind);
    tell_octal(&mut told, a.mode, b.mode);
    tell(&mut told, "uid", &a.uid, &b.uid);
    tell(&mut told, "gid", &a.gid, &b.gid);
    tell(&mut told, "rdev", &a.rdev, &b.rdev);
    tell(&mut told, "nlink", &a.nlink, &b.nlink);
    tell(&mut told, "size", &a.size, &b.size);
    if times {
        tell_time(&mut told, "atime", a.atime, b.atime);
        tell_time(&mut told, "mtime", a.mtime, b.mtime);
        tell_time(&mut told, "ctime", a.ctime, b.ctime);
    }
    (!told.is_empty()).then(|| told.join(", "))
}

/// One inode as a comparison sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NodeImage {
    kind: Kind,
    mode: u16,
    uid: u32,
    gid: u32,
    rdev: u32,
    nlink: u32,
    size: u64,
    mtime: Timespec,
    ctime: Timespec,
    /// The path that stands for this inode if it has several: the same one in equal trees.
    first_path: Option<Vec<u8>>,
    /// Of a symbolic link.
    target: Option<Vec<u8>>,
    /// Of a regular file.
    contents: Option<blake3::Hash>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl NodeImage {
    fn from_attr(attr: &Attr) -> NodeImage {
        NodeImage {
            kind: attr.kind,
            mode: attr.mode,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            nlink: attr.nlink,
            size: attr.size,
            mtime: attr.mtime,
            ctime: attr.ctime,
            first_path: None,
            target: None,
            contents: None,
            xattrs: BTreeMap::new(),
        }
    }

    /// Appends what differs at `path` to `found`.
    fn compare(&self, other: &NodeImage, path: &[u8], rules: TreeRules, found: &mut Vec<Difference>) {
        let mut told = Vec::new();
        tell(&mut told, "kind", &self.kind, &other.kind);
        tell_octal(&mut told, self.mode, other.mode);
        tell(&mut told, "uid", &self.uid, &other.uid);
        tell(&mut told, "gid", &self.gid, &other.gid);
        tell(&mut told, "rdev", &self.rdev, &other.rdev);
        tell(&mut told, "nlink", &self.nlink, &other.nlink);
        tell(&mut told, "size", &self.size, &other.size);
        if rules.mtime {
            tell_time(&mut told, "mtime", self.mtime, other.mtime);
        }
        if rules.ctime {
            tell_time(&mut told, "ctime", self.ctime, other.ctime);
        }
        if self.first_path != other.first_path {
            let [first, second] = [self, other]
                .map(|node| node.first_path.as_ref().map_or("nothing".to_owned(), |path| readable(path)));
            told.push(format!("is the same file as {first}, not as {second}"));
        }
        if self.target != other.target {
            let [first, second] =
                [self, other].map(|node| String::from_utf8_lossy(node.target.as_deref().unwrap_or(b"")));
            told.push(format!("target {first:?}, not {second:?}"));
        }
        if self.contents != other.contents {
            told.push("contents differ".to_owned());
        }
        self.compare_xattrs(other, &mut told);
        found.extend(told.into_iter().map(|what| Difference { path: readable(path), what }));
    }

    fn compare_xattrs(&self, other: &NodeImage, told: &mut Vec<String>) {
        for (name, value) in &self.xattrs {
            let shown = String::from_utf8_lossy(name);
            match other.xattrs.get(name) {
                None => told.push(format!("xattr {shown} is missing on the second side")),
                Some(second) if second != value => told.push(format!("xattr {shown} has another value")),
                Some(_) => {}
            }
        }
        for name in other.xattrs.keys().filter(|name| !self.xattrs.contains_key(*name)) {
            told.push(format!("xattr {} is missing on the first side", String::from_utf8_lossy(name)));
        }
    }
}

/// Whether `size` is what a directory with `entries` entries must show.
fn is_directory_size(size: u64, entries: usize) -> bool {
    size == entries as u64 * DIRECTORY_BYTES
}

fn missing(path: &[u8], side: &str) -> Difference {
    Difference { path: readable(path), what: format!("is missing on the {side} side") }
}

fn tell<T: PartialEq + fmt::Debug>(told: &mut Vec<String>, what: &str, a: &T, b: &T) {
    if a != b {
        told.push(format!("{what} {a:?}, not {b:?}"));
    }
}

fn tell_octal(told: &mut Vec<String>, a: u16, b: u16) {
    if a != b {
        told.push(format!("mode {a:04o}, not {b:04o}"));
    }
}

fn tell_time(told: &mut Vec<String>, what: &str, a: Timespec, b: Timespec) {
    if a != b {
        told.push(format!("{what} {}.{:09}, not {}.{:09}", a.seconds, a.nanos, b.seconds, b.nanos));
    }
}

fn readable(path: &[u8]) -> String {
    if path.is_empty() { "/".to_owned() } else { String::from_utf8_lossy(path).into_owned() }
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    [path, b"/", name].concat()
}
