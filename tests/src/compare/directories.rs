//! Compares two real directories, entry by entry, side by side.
//!
//! Invariants:
//! - Memory holds the names of the directories on the way down and the inodes with several links, never a file or a whole tree.
//! - A directory's own size and link count are not compared: they are each file system's own affair.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsString,
    fs, io,
    io::Read,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use murphy_fs::{Kind, Timespec};

use super::{Difference, NodeImage, TreeRules, join, missing};

/// Compares everything below two directories, and the directories themselves: names, kinds, modes, owners, sizes, times to the
/// nanosecond as `rules` say, hard links, symbolic links, `user.*` attributes, contents by their BLAKE3.
///
/// # Errors
/// The first path that cannot be read; its text names the path.
pub fn compare_directories(a: &Path, b: &Path, rules: TreeRules) -> io::Result<Vec<Difference>> {
    let mut sides = [Side::new(a), Side::new(b)];
    let mut found = Vec::new();
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let [first, second] = &mut sides;
        let (one, other) = (first.node(&path)?, second.node(&path)?);
        one.compare(&other, &path, rules, &mut found);
        if one.kind != Kind::Directory || other.kind != Kind::Directory {
            continue;
        }
        let (names, others) = (first.names(&path)?, second.names(&path)?);
        found.extend(names.difference(&others).map(|name| missing(&join(&path, name), "second")));
        found.extend(others.difference(&names).map(|name| missing(&join(&path, name), "first")));
        waiting.extend(names.intersection(&others).map(|name| join(&path, name)));
    }
    Ok(found)
}

/// One of the two directories.
struct Side {
    root: PathBuf,
    /// First path seen of each inode with several links.
    first_paths: HashMap<(u64, u64), Vec<u8>>,
}

impl Side {
    fn new(root: &Path) -> Side {
        Side { root: root.to_owned(), first_paths: HashMap::new() }
    }

    fn real(&self, path: &[u8]) -> PathBuf {
        let below = path.strip_prefix(b"/").unwrap_or(path);
        self.root.join(OsString::from_vec(below.to_vec()))
    }

    fn names(&self, path: &[u8]) -> io::Result<BTreeSet<Vec<u8>>> {
        let real = self.real(path);
        let entries = fs::read_dir(&real).map_err(|error| at(&real, &error))?;
        entries
            .map(|entry| entry.map(|entry| entry.file_name().into_vec()).map_err(|error| at(&real, &error)))
            .collect()
    }

    fn node(&mut self, path: &[u8]) -> io::Result<NodeImage> {
        let real = self.real(path);
        self.image(path, &real).map_err(|error| at(&real, &error))
    }

    fn image(&mut self, path: &[u8], real: &Path) -> io::Result<NodeImage> {
        // The root may be named by a symbolic link; nothing below it is followed.
        let metadata = if path.is_empty() { fs::metadata(real)? } else { fs::symlink_metadata(real)? };
        let kind =
            Kind::from_mode(metadata.mode()).ok_or_else(|| io::Error::other("is of an unknown kind"))?;
        let is_directory = kind == Kind::Directory;
        let first_path = if is_directory || metadata.nlink() < 2 {
            None
        } else {
            let key = (metadata.dev(), metadata.ino());
            Some(self.first_paths.entry(key).or_insert_with(|| path.to_vec()).clone())
        };
        let target = match kind {
            Kind::Symlink => Some(fs::read_link(real)?.as_os_str().as_bytes().to_vec()),
            _ => None,
        };
        let has_xattrs = matches!(kind, Kind::File | Kind::Directory);
        Ok(NodeImage {
            kind,
            mode: (metadata.mode() & 0o7777) as u16,
            uid: metadata.uid(),
            gid: metadata.gid(),
            rdev: metadata.rdev() as u32,
            nlink: if is_directory { 0 } else { u32::try_from(metadata.nlink()).unwrap_or(u32::MAX) },
            size: if is_directory { 0 } else { metadata.size() },
            mtime: time(metadata.mtime(), metadata.mtime_nsec()),
            ctime: time(metadata.ctime(), metadata.ctime_nsec()),
            first_path,
            target,
            contents: if kind == Kind::File { Some(hash(real)?) } else { None },
            xattrs: if has_xattrs { xattrs(real)? } else { BTreeMap::new() },
        })
    }
}

fn hash(real: &Path) -> io::Result<blake3::Hash> {
    let mut file = fs::File::open(real)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hasher.finalize());
        }
        hasher.update(&buffer[..count]);
    }
}

fn xattrs(real: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut buffer = vec![0; XATTR_BYTES_MAX];
    let count = match rustix::fs::llistxattr(real, &mut buffer[..]) {
        Ok(count) => count,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        Err(error) => return Err(error.into()),
    };
    let names: Vec<Vec<u8>> = buffer[..count]
        .split(|byte| *byte == 0)
        .filter(|name| name.starts_with(b"user."))
        .map(<[u8]>::to_vec)
        .collect();
    names
        .into_iter()
        .map(|name| {
            let count = rustix::fs::lgetxattr(real, &name[..], &mut buffer[..])?;
            Ok((name, buffer[..count].to_vec()))
        })
        .collect()
}

fn time(seconds: i64, nanos: i64) -> Timespec {
    Timespec { seconds, nanos: u32::try_from(nanos).unwrap_or_default() }
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Bytes of a file in memory at once.
const BUFFER_BYTES: usize = 1 << 20;
/// The kernel's own limit of a value and of a list of names.
const XATTR_BYTES_MAX: usize = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    fn build(root: &Path) {
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/file"), b"contents").unwrap();
        fs::hard_link(root.join("d/file"), root.join("other")).unwrap();
        std::os::unix::fs::symlink("d/file", root.join("link")).unwrap();
        for path in ["d/file", "d", ""] {
            let at = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 42);
            fs::File::open(root.join(path)).unwrap().set_modified(at).unwrap();
        }
        let at = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 2 };
        let times = rustix::fs::Timestamps { last_access: at, last_modification: at };
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(rustix::fs::CWD, root.join("link"), &times, flags).unwrap();
    }

    /// A copy that lost a nanosecond, a hard link or a byte must not pass as the same.
    #[test]
    fn every_kind_of_damage_to_a_copy_is_seen() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        build(a.path());
        build(b.path());
        assert_eq!(compare_directories(a.path(), b.path(), TreeRules::COPY).unwrap(), []);

        let modified = fs::metadata(b.path().join("other")).unwrap().modified().unwrap();
        fs::remove_file(b.path().join("other")).unwrap();
        fs::write(b.path().join("other"), b"contentz").unwrap();
        let later = modified + std::time::Duration::from_nanos(1);
        fs::File::open(b.path().join("other")).unwrap().set_modified(later).unwrap();
        fs::write(b.path().join("d/extra"), b"").unwrap();
        let told: Vec<String> = compare_directories(a.path(), b.path(), TreeRules::COPY)
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        let told = told.join("\n");
        for expected in
            ["/d/extra: is missing on the first side", "/other: contents", "/other: mtime", "nlink 2, not 1"]
        {
            assert!(told.contains(expected), "{expected:?} is not in {told}");
        }
    }
}
