//! Whether two directories hold the same names and bytes.
//!
//! Invariants:
//! - Names, kinds and contents are compared, never what either side says of itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{ledger::state_of, tree::Sources};

/// Every difference between the trees below `a` and `b`, as lines for people; at most [`DIFFERENCES_MAX`].
pub(super) fn differences(a: &Path, b: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    compare(a, b, Path::new(""), &mut found)?;
    Ok(found)
}

fn compare(a: &Path, b: &Path, below: &Path, found: &mut Vec<String>) -> io::Result<()> {
    let (names_a, names_b) = (names(&a.join(below))?, names(&b.join(below))?);
    for name in names_a.iter().filter(|name| !names_b.contains(name)) {
        found.push(format!("{}: only in {}", below.join(name).display(), a.display()));
    }
    for name in names_b.iter().filter(|name| !names_a.contains(name)) {
        found.push(format!("{}: only in {}", below.join(name).display(), b.display()));
    }
    for name in names_a.iter().filter(|name| names_b.contains(name)) {
        if found.len() >= DIFFERENCES_MAX {
            return Ok(());
        }
        let path = below.join(name);
        let (in_a, in_b) = (a.join(&path), b.join(&path));
        let (kind_a, kind_b) =
            (fs::symlink_metadata(&in_a)?.file_type(), fs::symlink_metadata(&in_b)?.file_type());
        if kind_a != kind_b {
            found.push(format!("{}: not of the same kind", path.display()));
        } else if kind_a.is_dir() {
            compare(a, b, &path, found)?;
        } else if kind_a.is_file() && state_of(&in_a)? != state_of(&in_b)? {
            found.push(format!("{}: other contents", path.display()));
        }
    }
    Ok(())
}

fn names(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut names: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().into())).collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

/// Every file of `sources` whose copy below `root` is not equal, in bytes or modification time.
pub(super) fn copy_differences(sources: &Sources, root: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for (from, to) in &sources.files {
        let copy = root.join(to);
        if state_of(from)? != state_of(&copy)? {
            found.push(format!("{}: other contents", to.display()));
        } else if fs::metadata(from)?.modified()? != fs::metadata(&copy)?.modified()? {
            found.push(format!("{}: another modification time", to.display()));
        }
    }
    Ok(found)
}

const DIFFERENCES_MAX: usize = 50;
