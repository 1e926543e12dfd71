//! The directory in which a node is made: beside the wanted one, published by a rename.
//!
//! Invariants:
//! - The wanted directory is not there, or empty, until the node in it is complete and durable.
//! - What was begun and failed is removed again, unless it holds what a take-over has remembered: that is kept, and the next attempt at the
//!   same directory goes on with it.

use std::{
    cell::{Cell, RefCell},
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
};

use murphy_log::{DirectoryLock, Files, OsFiles};

use super::random;
use crate::error::{CliError, at};

/// A directory that becomes `target` when it is complete, and is removed when it is not.
pub(crate) struct Staging {
    pub(crate) path: PathBuf,
    target: PathBuf,
    /// Whether it stays when this is dropped: it was published, or is kept for the next attempt.
    stays: Cell<bool>,
    /// Held while it is kept, so that two attempts do not go on with it at once.
    lock: RefCell<Option<DirectoryLock>>,
}

impl Staging {
    /// Begins a directory beside `target`, which must not be there, or be empty.
    pub(crate) fn beside(target: &Path) -> Result<Staging, CliError> {
        let target = std::path::absolute(target).map_err(at(target))?;
        check_unused(&target)?;
        let (parent, name) = split(&target)?;
        fs::create_dir_all(parent).map_err(at(parent))?;
        let suffix: [u8; 16] = random()?;
        let mut hidden = begins(name);
        hidden.push(format!("{:02x}{:02x}{:02x}{:02x}{ENDS}", suffix[0], suffix[1], suffix[2], suffix[3]));
        let path = parent.join(hidden);
        fs::create_dir(&path).map_err(at(&path))?;
        // The control socket in it takes orders from whoever can reach it.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(at(&path))?;
        Ok(Staging { path, target, stays: Cell::new(false), lock: RefCell::new(None) })
    }

    /// Goes on with a directory in which an earlier attempt at `target` has kept the file `kept`, and that attempt's key; begins one if there
    /// is none.
    pub(crate) fn resume(target: &Path, kept: &str) -> Result<Staging, CliError> {
        let absolute = std::path::absolute(target).map_err(at(target))?;
        check_unused(&absolute)?;
        let Some((path, _)) = Staging::left(target, kept)? else { return Staging::beside(target) };
        let folder = path.join(KEPT);
        let Some(lock) = OsFiles.lock(&folder).map_err(at(&folder))? else {
            return Err(CliError::new(format!("{} is in use by another process", path.display()))
                .hint("somebody makes this node at the moment"));
        };
        clear(&path)?;
        Ok(Staging { path, target: absolute, stays: Cell::new(true), lock: RefCell::new(Some(lock)) })
    }

    /// Refuses a directory in which something is already.
    pub(crate) fn check(target: &Path) -> Result<(), CliError> {
        check_unused(&std::path::absolute(target).map_err(at(target))?)
    }

    /// Where an earlier attempt at `target` has left the file `kept`: its directory, and the file. Nothing is changed.
    pub(crate) fn left(target: &Path, kept: &str) -> Result<Option<(PathBuf, PathBuf)>, CliError> {
        let target = std::path::absolute(target).map_err(at(target))?;
        let (parent, name) = split(&target)?;
        let begins = begins(name);
        let entries = match fs::read_dir(parent) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at(parent)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(at(parent))?;
            let (name, path) = (entry.file_name(), entry.path());
            let name = name.as_encoded_bytes();
            let is_ours = name.starts_with(begins.as_encoded_bytes()) && name.ends_with(ENDS.as_bytes());
            let file = path.join(KEPT).join(kept);
            if is_ours && file.exists() {
                return Ok(Some((path, file)));
            }
        }
        Ok(None)
    }

    /// The place of a file that [`Staging::resume`] looks for. From now on the directory is not removed, and it is durable.
    pub(crate) fn keep(&self, kept: &str) -> Result<PathBuf, CliError> {
        let folder = self.path.join(KEPT);
        OsFiles.create_dir(&folder).map_err(at(&folder))?;
        let mut lock = self.lock.borrow_mut();
        if lock.is_none() {
            *lock = OsFiles.lock(&folder).map_err(at(&folder))?;
        }
        let (parent, _) = split(&self.target)?;
        for directory in [&self.path, parent] {
            OsFiles.sync_dir(directory).map_err(at(directory))?;
        }
        self.stays.set(true);
        Ok(folder.join(kept))
    }

    /// Where an attempt is kept that may have sealed archives; `None` if nothing outside this directory was changed.
    pub(crate) fn kept(&self) -> Option<&Path> {
        self.stays.get().then_some(self.path.as_path())
    }

    /// Gives the directory its name, durably.
    pub(crate) fn publish(&self) -> Result<(), CliError> {
        File::open(&self.path).and_then(|made| made.sync_all()).map_err(at(&self.path))?;
        // A rename replaces an empty directory, and nothing else.
        fs::rename(&self.path, &self.target).map_err(at(&self.target))?;
        self.stays.set(true);
        let (parent, _) = split(&self.target)?;
        OsFiles.sync_dir(parent).map_err(at(parent))?;
        if self.lock.borrow_mut().take().is_some()
            && let Err(error) = fs::remove_dir_all(self.target.join(KEPT))
        {
            tracing::debug!(%error, "what the attempt has remembered stays, and means nothing any more");
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.stays.get() {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished node is left behind");
        }
    }
}

/// Refuses a directory in which something is.
fn check_unused(target: &Path) -> Result<(), CliError> {
    match fs::read_dir(target) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(at(target)(error)),
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(CliError::new(format!("{} is not empty", target.display()))
                .hint("give a directory that does not exist yet")),
        },
    }
}

/// Removes everything but what was kept, and the key of the node.
fn clear(path: &Path) -> Result<(), CliError> {
    for entry in fs::read_dir(path).map_err(at(path))? {
        let entry = entry.map_err(at(path))?;
        if entry.file_name() == KEPT || entry.file_name() == IDENTITY {
            continue;
        }
        let inner = entry.path();
        let is_directory = entry.file_type().map_err(at(&inner))?.is_dir();
        let removed = if is_directory { fs::remove_dir_all(&inner) } else { fs::remove_file(&inner) };
        removed.map_err(at(&inner))?;
    }
    Ok(())
}

fn split(target: &Path) -> Result<(&Path, &std::ffi::OsStr), CliError> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(CliError::usage(format!("{} cannot become a node", target.display())));
    };
    Ok((parent, name))
}

/// How the names of directories begin in which `name` is made.
fn begins(name: &std::ffi::OsStr) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".");
    hidden
}

const ENDS: &str = ".new";
const KEPT: &str = "taking-over";
/// Where a node has its key.
const IDENTITY: &str = "identity";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_removed_and_what_was_kept_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("node");
        let count = || fs::read_dir(folder.path()).unwrap().count();
        drop(Staging::resume(&target, "x.json").unwrap());
        assert_eq!(count(), 0);
        let first = Staging::resume(&target, "x.json").unwrap();
        for inner in ["identity", "log"] {
            fs::create_dir(first.path.join(inner)).unwrap();
        }
        fs::write(first.path.join("murphy.toml"), "x").unwrap();
        fs::write(first.keep("x.json").unwrap(), "remembered").unwrap();
        let refused = Staging::resume(&target, "x.json").err().unwrap().to_string();
        assert!(refused.contains("in use"), "{refused}");
        let path = first.path.clone();
        drop(first);
        let other = Staging::resume(&target, "y.json").unwrap();
        assert_ne!(other.path, path, "another volume's is not touched");
        let again = Staging::resume(&target, "x.json").unwrap();
        assert_eq!(again.path, path);
        assert_eq!(fs::read(again.keep("x.json").unwrap()).unwrap(), b"remembered");
        assert!(path.join("identity").exists() && !path.join("log").exists());
        assert!(!path.join("murphy.toml").exists());
        again.publish().unwrap();
        assert!(target.join("identity").exists() && !target.join(KEPT).exists());
    }
}
