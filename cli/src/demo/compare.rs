//! Whether two directories hold the same names and bytes.
//!
//! Invariants:
//! - Names, kinds and contents are compared, never what either side says of itself. What cannot be looked at is a difference.

use std::{
    fs::{self, FileType},
    io,
    path::{Path, PathBuf},
};

use super::tree::Sources;

/// Differences between the trees below `a` and `b`, as lines for people; at most about [`DIFFERENCES_MAX`].
pub(super) fn differences(a: &Path, b: &Path) -> Vec<String> {
    let mut found = Vec::new();
    compare(a, b, Path::new(""), &mut found);
    found
}

fn compare(a: &Path, b: &Path, below: &Path, found: &mut Vec<String>) {
    let (names_a, names_b) = match (names(&a.join(below)), names(&b.join(below))) {
        (Ok(names_a), Ok(names_b)) => (names_a, names_b),
        (Err(error), _) | (_, Err(error)) => return found.push(format!("{}: {error}", below.display())),
    };
    let only = |names: &[PathBuf], others: &[PathBuf], root: &Path| -> Vec<String> {
        let only = names.iter().filter(|name| !others.contains(name));
        only.map(|name| format!("{}: only in {}", below.join(name).display(), root.display())).collect()
    };
    found.extend(only(&names_a, &names_b, a));
    found.extend(only(&names_b, &names_a, b));
    for name in names_a.iter().filter(|name| names_b.contains(name)) {
        if found.len() >= DIFFERENCES_MAX {
            return;
        }
        let path = below.join(name);
        match compare_one(&a.join(&path), &b.join(&path)) {
            Ok(Some(kind)) if kind.is_dir() => compare(a, b, &path, found),
            Ok(Some(_)) => {}
            Ok(None) => found.push(format!("{}: not the same", path.display())),
            Err(error) => found.push(format!("{}: {error}", path.display())),
        }
    }
}

/// The kind of both, if that is the same and they hold the same bytes.
fn compare_one(a: &Path, b: &Path) -> io::Result<Option<FileType>> {
    let (kind, other) = (fs::symlink_metadata(a)?.file_type(), fs::symlink_metadata(b)?.file_type());
    let is_same = kind == other && (!kind.is_file() || same_bytes(a, b)?);
    Ok(is_same.then_some(kind))
}

fn same_bytes(a: &Path, b: &Path) -> io::Result<bool> {
    Ok(fs::read(a)? == fs::read(b)?)
}

fn names(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut names: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().into())).collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

/// Files of `sources` whose copy below `root` is not equal, in bytes or modification time; at most [`DIFFERENCES_MAX`].
pub(super) fn copy_differences(sources: &Sources, root: &Path) -> Vec<String> {
    let differences = sources.files.iter().filter_map(|(from, to)| {
        let how = match compare_copy(from, &root.join(to)) {
            Ok(None) => return None,
            Ok(Some(how)) => how.to_owned(),
            Err(error) => error.to_string(),
        };
        Some(format!("{}: {how}", to.display()))
    });
    differences.take(DIFFERENCES_MAX).collect()
}

fn compare_copy(from: &Path, to: &Path) -> io::Result<Option<&'static str>> {
    if !same_bytes(from, to)? {
        return Ok(Some("other contents"));
    }
    let modified = |path: &Path| fs::metadata(path)?.modified();
    Ok((modified(from)? != modified(to)?).then_some("another modification time"))
}

const DIFFERENCES_MAX: usize = 50;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: a comparison that looks away proves nothing.
    #[test]
    fn every_kind_of_difference_is_seen() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        for side in [&a, &b] {
            fs::create_dir_all(side.join("d")).unwrap();
            fs::write(side.join("d/same"), b"same").unwrap();
            fs::write(side.join("d/other"), side.as_os_str().as_encoded_bytes()).unwrap();
        }
        fs::write(a.join("d/left"), b"").unwrap();
        fs::create_dir(b.join("right")).unwrap();
        fs::write(a.join("kind"), b"").unwrap();
        fs::create_dir(b.join("kind")).unwrap();
        let found = differences(&a, &b).join("\n");
        for part in ["d/left: only in", "right: only in", "d/other: not the same", "kind: not the same"] {
            assert!(found.contains(part), "{part}: {found}");
        }
        assert_eq!(found.lines().count(), 4, "{found}");
        assert_eq!(differences(&a, &a), Vec::<String>::new());
        assert_eq!(differences(&a, &root.path().join("none")).len(), 1);
    }
}
