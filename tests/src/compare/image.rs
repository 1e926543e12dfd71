//! An image of a whole tree in memory: what a test remembers of a file system.
//!
//! Invariants:
//! - The image is made through [`FileSystem`] alone, as root, and changes nothing but open handles, which it releases.
//! - What the walk itself can refute (a directory's size or link count, attributes that readdir and getattr show differently) is
//!   an error of the walk, with its path.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use murphy_fs::{Attr, Caller, DirEntryPlus, Errno, FileSystem, Handle, Ino, Kind, OpenFlags};

use super::{Difference, NodeImage, TreeRules, attr_difference, is_directory_size, join, missing, readable};
use crate::Driver;

/// Everything that a tree holds, as far as [`TreeRules`] can compare it. Contents are kept as their BLAKE3.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TreeImage {
    nodes: BTreeMap<Vec<u8>, NodeImage>,
}

impl TreeImage {
    /// Walks `fs` from its root. An error names the path at which the tree could not be read or contradicts itself.
    pub fn of(driver: &Driver, fs: &dyn FileSystem) -> Result<TreeImage, Difference> {
        let mut walk = Walk { driver, fs, nodes: BTreeMap::new(), first_paths: HashMap::new() };
        let root = walk.at(b"", "getattr", driver.wait(fs.getattr(Ino::ROOT)))?;
        let mut waiting = vec![(Vec::new(), root)];
        while let Some((path, attr)) = waiting.pop() {
            let children =
                if attr.kind == Kind::Directory { walk.children(&path, &attr)? } else { Vec::new() };
            let node = walk.node(&path, &attr)?;
            walk.nodes.insert(path.clone(), node);
            for child in children {
                waiting.push((join(&path, child.entry.name.as_bytes()), child.attr));
            }
        }
        Ok(TreeImage { nodes: walk.finish()? })
    }

    /// How many names the tree has, its root included.
    pub fn names(&self) -> usize {
        self.nodes.len()
    }

    /// How many inodes the tree has.
    pub fn inodes(&self) -> usize {
        let is_first = |(path, node): &(&Vec<u8>, &NodeImage)| {
            node.first_path.as_ref().is_none_or(|first| first == *path)
        };
        self.nodes.iter().filter(is_first).count()
    }

    /// Everything in which `other` is not this tree.
    pub fn differences(&self, other: &TreeImage, rules: TreeRules) -> Vec<Difference> {
        let mut found = Vec::new();
        let paths: BTreeSet<&Vec<u8>> = self.nodes.keys().chain(other.nodes.keys()).collect();
        for path in paths {
            match (self.nodes.get(path), other.nodes.get(path)) {
                (Some(first), Some(second)) => first.compare(second, path, rules, &mut found),
                (None, _) if self.holds_above(path) => found.push(missing(path, "first")),
                (_, None) if other.holds_above(path) => found.push(missing(path, "second")),
                _ => {}
            }
        }
        found
    }

    /// Whether the tree has the directory in which `path` would be.
    fn holds_above(&self, path: &[u8]) -> bool {
        let above = path.iter().rposition(|byte| *byte == b'/').unwrap_or_default();
        self.nodes.contains_key(&path[..above])
    }
}

/// A walk under way.
struct Walk<'a> {
    driver: &'a Driver,
    fs: &'a dyn FileSystem,
    nodes: BTreeMap<Vec<u8>, NodeImage>,
    /// Paths of each inode with several links.
    first_paths: HashMap<Ino, Vec<Vec<u8>>>,
}

impl Walk<'_> {
    fn children(&self, path: &[u8], attr: &Attr) -> Result<Vec<DirEntryPlus>, Difference> {
        let mut children: Vec<DirEntryPlus> = Vec::new();
        let mut cookie = 0;
        loop {
            let page = self.at(
                path,
                "readdir",
                self.driver.wait(self.fs.readdir_plus(attr.ino, cookie, PAGE_ENTRIES)),
            )?;
            let Some(last) = page.last() else { break };
            if last.entry.cookie <= cookie {
                return Err(wrong(path, "readdir goes backwards".to_owned()));
            }
            cookie = last.entry.cookie;
            children.extend(page);
        }
        let names: BTreeSet<_> = children.iter().map(|child| &child.entry.name).collect();
        if names.len() != children.len() {
            return Err(wrong(path, "readdir shows a name twice".to_owned()));
        }
        let subdirectories = children.iter().filter(|child| child.entry.kind == Kind::Directory).count();
        if attr.nlink as usize != 2 + subdirectories || !is_directory_size(attr.size, children.len()) {
            let told = format!(
                "nlink {} and size {} with {} entries, {subdirectories} of them directories",
                attr.nlink,
                attr.size,
                children.len()
            );
            return Err(wrong(path, told));
        }
        for child in &children {
            self.check(path, attr.ino, child)?;
        }
        Ok(children)
    }

    /// Lookup, getattr and readdir must tell the same.
    fn check(&self, path: &[u8], parent: Ino, child: &DirEntryPlus) -> Result<(), Difference> {
        let path = join(path, child.entry.name.as_bytes());
        let caller = Caller::default();
        let found =
            self.at(&path, "lookup", self.driver.wait(self.fs.lookup(&caller, parent, &child.entry.name)))?;
        let told = self.at(&path, "getattr", self.driver.wait(self.fs.getattr(child.entry.ino)))?;
        if found.ino != child.entry.ino || child.attr.ino != child.entry.ino || told.ino != child.entry.ino {
            return Err(wrong(&path, "lookup, getattr and readdir show different inodes".to_owned()));
        }
        if told.kind != child.entry.kind {
            return Err(wrong(&path, format!("readdir shows {:?} for a {:?}", child.entry.kind, told.kind)));
        }
        for (source, attr) in [("lookup", &found), ("readdir", &child.attr)] {
            if let Some(difference) = attr_difference(attr, &told, true) {
                return Err(wrong(&path, format!("{source} and getattr disagree: {difference}")));
            }
        }
        if told.kind == Kind::Directory {
            let above = self.at(&path, "parent", self.driver.wait(self.fs.parent(told.ino)))?;
            if above != parent {
                return Err(wrong(&path, "its parent is not the directory that holds it".to_owned()));
            }
        }
        Ok(())
    }

    fn node(&mut self, path: &[u8], attr: &Attr) -> Result<NodeImage, Difference> {
        let mut node = NodeImage::from_attr(attr);
        match attr.kind {
            Kind::File => node.contents = Some(self.contents(path, attr)?),
            Kind::Symlink => {
                let target = self.at(path, "readlink", self.driver.wait(self.fs.readlink(attr.ino)))?;
                node.target = Some(target.to_vec());
            }
            Kind::Directory | Kind::Fifo | Kind::Socket | Kind::CharDevice | Kind::BlockDevice => {}
        }
        let caller = Caller::default();
        for name in self.at(path, "listxattr", self.driver.wait(self.fs.listxattr(&caller, attr.ino)))? {
            let value =
                self.at(path, "getxattr", self.driver.wait(self.fs.getxattr(&caller, attr.ino, &name)))?;
            node.xattrs.insert(name.as_bytes().to_vec(), value.to_vec());
        }
        if attr.kind != Kind::Directory {
            self.first_paths.entry(attr.ino).or_default().push(path.to_vec());
        }
        Ok(node)
    }

    fn contents(&self, path: &[u8], attr: &Attr) -> Result<blake3::Hash, Difference> {
        let flags = OpenFlags { read: true, ..OpenFlags::default() };
        let opened =
            self.at(path, "open", self.driver.wait(self.fs.open(&Caller::default(), attr.ino, flags)))?;
        let hash = hash_contents(self.driver, self.fs, (attr.ino, opened.handle), attr.size);
        self.fs.release(attr.ino, opened.handle);
        self.at(path, "read", hash)
    }

    fn at<T>(&self, path: &[u8], call: &str, result: Result<T, Errno>) -> Result<T, Difference> {
        result.map_err(|errno| wrong(path, format!("{call} fails with {errno}")))
    }

    /// Marks inodes with several paths, once their link count is seen to be the number of these.
    fn finish(mut self) -> Result<BTreeMap<Vec<u8>, NodeImage>, Difference> {
        for (_, mut paths) in self.first_paths.drain() {
            paths.sort();
            for path in &paths {
                let node = self.nodes.get_mut(path).expect("every path of the walk has its node");
                if node.nlink as usize != paths.len() {
                    return Err(wrong(path, format!("nlink {} with {} names", node.nlink, paths.len())));
                }
                if paths.len() > 1 {
                    node.first_path = Some(paths[0].clone());
                }
            }
        }
        Ok(self.nodes)
    }
}

/// The BLAKE3 of an open file's bytes. Of a file above [`WHOLE_BYTES_MAX`] the hash is over its size and evenly spread samples.
pub(crate) fn hash_contents(
    driver: &Driver,
    fs: &dyn FileSystem,
    (ino, handle): (Ino, Handle),
    size: u64,
) -> Result<blake3::Hash, Errno> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let (step, length) = if size <= WHOLE_BYTES_MAX {
        (u64::from(READ_BYTES), READ_BYTES)
    } else {
        hasher.update(&driver.wait(fs.read(ino, handle, size - u64::from(SAMPLE_BYTES), SAMPLE_BYTES))?);
        hasher.update(&driver.wait(fs.read(ino, handle, 0, WHOLE_BYTES_MAX as u32 / 4))?);
        (size / SAMPLES, SAMPLE_BYTES)
    };
    let mut offset = 0;
    while offset < size {
        let bytes = driver.wait(fs.read(ino, handle, offset, length))?;
        if bytes.len() as u64 != u64::from(length).min(size - offset) {
            return Err(Errno::EIO);
        }
        hasher.update(&bytes);
        offset += step;
    }
    Ok(hasher.finalize())
}

fn wrong(path: &[u8], what: String) -> Difference {
    Difference { path: readable(path), what }
}

/// Bytes read in one call.
const READ_BYTES: u32 = 1 << 20;
/// Up to this size every byte of a file is compared; above it the first quarter of this, the end, and samples between.
const WHOLE_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a sample.
const SAMPLE_BYTES: u32 = 64 << 10;
/// Samples of a large file.
const SAMPLES: u64 = 64;
/// Directory entries read in one call.
const PAGE_ENTRIES: usize = 1000;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use murphy_fs::{Name, SetAttr, XattrMode, XattrName};
    use murphy_log::ManualClock;

    use super::*;
    use crate::{Reference, compare_trees};

    const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 0 };

    fn name(text: &str) -> Name {
        Name::new(text.as_bytes().to_vec()).unwrap()
    }

    fn build(driver: &Driver, linked: &str) -> Reference {
        let fs = Reference::new(Arc::new(ManualClock::default()));
        let directory = driver.wait(fs.mkdir(&CALLER, Ino::ROOT, &name("d"), 0o755)).unwrap().ino;
        let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
        for file in ["f", "g"] {
            let (attr, opened) =
                driver.wait(fs.create(&CALLER, directory, &name(file), 0o644, flags)).unwrap();
            let data = Bytes::from_static(b"the same in both");
            driver.wait(fs.write(&CALLER, attr.ino, opened.handle, 1 << 40, data)).unwrap();
            fs.release(attr.ino, opened.handle);
            if file == linked {
                driver.wait(fs.link(&CALLER, attr.ino, Ino::ROOT, &name("link"))).unwrap();
            }
        }
        fs
    }

    fn told(driver: &Driver, a: &Reference, b: &Reference) -> String {
        let found = compare_trees(driver, a, b, TreeRules::SAME_HISTORY);
        found.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    /// Two files with equal contents: only the identity of the link tells which one has two names.
    #[test]
    fn a_link_to_the_wrong_file_is_a_difference() {
        let driver = Driver::new();
        let (a, same, b) = (build(&driver, "f"), build(&driver, "f"), build(&driver, "g"));
        assert_eq!(told(&driver, &a, &same), "");
        let told = told(&driver, &a, &b);
        assert!(told.contains("/link: is the same file as /d/f, not as /d/g"), "{told}");
        assert_eq!(TreeImage::of(&driver, &a).unwrap().inodes(), 4);
        assert_eq!(TreeImage::of(&driver, &a).unwrap().names(), 5);
    }

    /// A lost directory is one line, not one for each of a million files in it.
    #[test]
    fn a_missing_directory_is_told_once() {
        let driver = Driver::new();
        let (a, b) = (build(&driver, "f"), Reference::new(Arc::new(ManualClock::default())));
        let told = told(&driver, &a, &b);
        assert!(told.contains("/d: is missing on the second side"), "{told}");
        assert!(!told.contains("/d/f: is missing"), "{told}");
    }

    /// The last byte of a file too large to be read whole, and an attribute's value.
    #[test]
    fn small_changes_in_large_places_are_seen() {
        let driver = Driver::new();
        let (a, b) = (build(&driver, "f"), build(&driver, "f"));
        let ino = driver.wait(b.lookup(&CALLER, Ino::ROOT, &name("link"))).unwrap().ino;
        let flags = OpenFlags { write: true, ..OpenFlags::default() };
        let opened = driver.wait(b.open(&CALLER, ino, flags)).unwrap();
        let at = (1 << 40) + 15;
        driver.wait(b.write(&CALLER, ino, opened.handle, at, Bytes::from_static(b"H"))).unwrap();
        let xattr = XattrName::new(&b"user.a"[..]).unwrap();
        driver.wait(b.setxattr(&CALLER, ino, &xattr, Bytes::new(), XattrMode::Set)).unwrap();
        let found = told(&driver, &a, &b);
        assert!(found.contains("/link: contents differ"), "{found}");
        assert!(found.contains("/link: xattr user.a is missing on the first side"), "{found}");
        let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
        driver.wait(b.setattr(&CALLER, ino, None, mode)).unwrap();
        assert!(told(&driver, &a, &b).contains("/d/f: mode 0644, not 0600"));
    }
}
