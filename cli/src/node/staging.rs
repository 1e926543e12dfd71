//! The directory in which a node is made: beside the wanted one, published by a rename.
//!
//! Invariants:
//! - The wanted directory is not there, or empty, until the node in it is complete and durable.
//! - Nothing is begun where the finished directory could not get its name: over a mount point, or through a symbolic link.
//! - What was begun and failed is removed again, unless it holds what a take-over has remembered: that is kept, and the next attempt at the
//!   same directory goes on with it.

use std::{
    cell::Cell,
    ffi::OsString,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use murphy_log::{Files, OsFiles};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};

use super::{random, turn::Turn};
use crate::error::{CliError, at};

/// A directory that becomes `target` when it is complete, and is removed when it is not.
pub(crate) struct Staging {
    pub(crate) path: PathBuf,
    turn: Arc<Turn>,
    /// Whether it stays when this is dropped: it was published, or is kept for the next attempt.
    stays: Cell<bool>,
}

impl Staging {
    /// Begins a directory beside the one whose `turn` it is, which must not be there, or be empty.
    pub(crate) fn beside(turn: Arc<Turn>) -> Result<Staging, CliError> {
        check_unused(turn.target())?;
        let (parent, name) = split(turn.target())?;
        let suffix: [u8; 16] = random()?;
        let mut hidden = hidden(name);
        hidden.push(format!("{:02x}{:02x}{:02x}{:02x}{ENDS}", suffix[0], suffix[1], suffix[2], suffix[3]));
        let path = parent.join(hidden);
        fs::create_dir(&path).map_err(at(&path))?;
        // The control socket in it takes orders from whoever can reach it.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(at(&path))?;
        Ok(Staging { path, turn, stays: Cell::new(false) })
    }

    /// Goes on with a directory in which an earlier attempt at the one whose `turn` it is has kept the file `kept`, and that attempt's key;
    /// begins one if there is none.
    pub(crate) fn resume(turn: Arc<Turn>, kept: &str) -> Result<Staging, CliError> {
        check_unused(turn.target())?;
        let Some((path, _)) = Staging::left(turn.target(), kept)? else { return Staging::beside(turn) };
        clear(&path)?;
        Ok(Staging { path, turn, stays: Cell::new(true) })
    }

    /// Refuses a directory that cannot become a node: something is in it already, or nothing can be renamed onto it.
    pub(crate) fn check(target: &Path) -> Result<(), CliError> {
        check_unused(&wanted(target)?)
    }

    /// Refuses, as [`Staging::check`], if [`Staging::publish`] would fail now. For whoever cannot go back afterwards: an empty directory is
    /// taken away, which fails wherever a rename onto it would.
    pub(crate) fn clear_the_way(&self) -> Result<(), CliError> {
        let target = self.turn.target();
        check_unused(target)?;
        match fs::remove_dir(target) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at(target)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Where an earlier attempt at `target` has left the file `kept`: its directory, and the file. Nothing is changed.
    pub(crate) fn left(target: &Path, kept: &str) -> Result<Option<(PathBuf, PathBuf)>, CliError> {
        let target = wanted(target)?;
        let (parent, name) = split(&target)?;
        let begins = hidden(name);
        let entries = match fs::read_dir(parent) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at(parent)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(at(parent))?;
            let (name, path) = (entry.file_name(), entry.path());
            let name = name.as_encoded_bytes();
            let random = name.strip_prefix(begins.as_encoded_bytes());
            let random = random.and_then(|rest| rest.strip_suffix(ENDS.as_bytes()));
            // What stands between is random: a longer name may begin like this one.
            let is_ours = random.is_some_and(|random| random.iter().all(u8::is_ascii_hexdigit));
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
        let (parent, _) = split(self.turn.target())?;
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
        let target = self.turn.target();
        // A rename replaces an empty directory, and nothing else.
        fs::rename(&self.path, target).map_err(at(target))?;
        self.stays.set(true);
        let (parent, _) = split(target)?;
        OsFiles.sync_dir(parent).map_err(at(parent))?;
        let kept = target.join(KEPT);
        if kept.exists()
            && let Err(error) = fs::remove_dir_all(kept)
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

/// The directory that is meant, whatever stands behind its name: a slash there would lead through a symbolic link.
pub(super) fn wanted(target: &Path) -> Result<PathBuf, CliError> {
    let absolute = std::path::absolute(target).map_err(at(target))?;
    let (parent, name) = split(&absolute)?;
    Ok(parent.join(name))
}

/// Refuses a directory in which something is, or that nothing can be renamed onto.
fn check_unused(target: &Path) -> Result<(), CliError> {
    let found = match fs::symlink_metadata(target) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(at(target))?,
    };
    if found.is_symlink() {
        return Err(CliError::new(format!("{} is a symbolic link", target.display()))
            .hint("give the directory itself, which may not exist yet"));
    }
    if is_mount_point(target).map_err(at(target))? {
        return Err(CliError::new(format!("{} is a mount point", target.display()))
            .hint("give a directory below it, which does not exist yet"));
    }
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

/// Whether something is mounted at `target`, a bind mount of the same file system too.
fn is_mount_point(target: &Path) -> std::io::Result<bool> {
    let parent = target.parent().unwrap_or(target);
    if fs::symlink_metadata(target)?.dev() != fs::metadata(parent)?.dev() {
        return Ok(true);
    }
    let found = rustix::fs::statx(CWD, target, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty());
    // A kernel that does not know the question has answered as far as it can.
    Ok(found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)))
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

pub(super) fn split(target: &Path) -> Result<(&Path, &std::ffi::OsStr), CliError> {
    let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(CliError::usage(format!("{} cannot become a node", target.display())));
    };
    Ok((parent, name))
}

/// How the names begin of what is made beside `name` while that is made.
pub(super) fn hidden(name: &std::ffi::OsStr) -> OsString {
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

    fn turn(target: &Path) -> Arc<Turn> {
        Turn::take(target, "test").unwrap()
    }

    /// The fear: hours later, with every archive sealed, the successor cannot get its name, whatever is tried.
    #[test]
    fn what_a_finished_node_cannot_be_renamed_onto_is_refused_before_anything_is_begun() {
        let folder = tempfile::tempdir().unwrap();
        let (empty, link) = (folder.path().join("empty"), folder.path().join("link"));
        fs::create_dir(&empty).unwrap();
        std::os::unix::fs::symlink(&empty, &link).unwrap();
        let refused = |target: &Path| Staging::check(target).unwrap_err().to_string();
        assert!(refused(&link).contains("is a symbolic link"), "{}", refused(&link));
        let slash = PathBuf::from(format!("{}/", link.display()));
        assert!(refused(&slash).contains("is a symbolic link"), "{}", refused(&slash));
        assert!(refused(Path::new("/proc")).contains("is a mount point"), "{}", refused(Path::new("/proc")));
        Staging::check(&empty).unwrap();
    }

    /// The fear: somebody puts a file into the directory while the node is made.
    #[test]
    fn what_comes_into_the_directory_meanwhile_is_seen_before_the_point_of_no_return() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("node");
        fs::create_dir(&target).unwrap();
        let staging = Staging::beside(turn(&target)).unwrap();
        fs::write(target.join("file"), "x").unwrap();
        let refused = staging.clear_the_way().unwrap_err().to_string();
        assert!(refused.contains("is not empty"), "{refused}");
        assert!(target.join("file").exists());
        fs::remove_file(target.join("file")).unwrap();
        staging.clear_the_way().unwrap();
        staging.clear_the_way().unwrap();
        staging.publish().unwrap();
    }

    /// The fear: a restore to `home` goes on with what one to `home.eu` has left behind.
    #[test]
    fn what_an_attempt_at_a_longer_name_has_left_is_not_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let other = Staging::resume(turn(&folder.path().join("home.eu")), "x.json").unwrap();
        fs::write(other.keep("x.json").unwrap(), "remembered").unwrap();
        assert_eq!(Staging::left(&folder.path().join("home"), "x.json").unwrap(), None);
        assert!(Staging::left(&folder.path().join("home.eu"), "x.json").unwrap().is_some());
    }

    #[test]
    fn what_failed_is_removed_and_what_was_kept_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("node");
        let count = || fs::read_dir(folder.path()).unwrap().count();
        drop(Staging::resume(turn(&target), "x.json").unwrap());
        assert_eq!(count(), 0);
        let first = Staging::resume(turn(&target), "x.json").unwrap();
        for inner in ["identity", "log"] {
            fs::create_dir(first.path.join(inner)).unwrap();
        }
        fs::write(first.path.join("murphy.toml"), "x").unwrap();
        fs::write(first.keep("x.json").unwrap(), "remembered").unwrap();
        let path = first.path.clone();
        drop(first);
        let other = Staging::resume(turn(&target), "y.json").unwrap();
        assert_ne!(other.path, path, "another volume's is not touched");
        drop(other);
        let again = Staging::resume(turn(&target), "x.json").unwrap();
        assert_eq!(again.path, path);
        assert_eq!(fs::read(again.keep("x.json").unwrap()).unwrap(), b"remembered");
        assert!(path.join("identity").exists() && !path.join("log").exists());
        assert!(!path.join("murphy.toml").exists());
        again.publish().unwrap();
        assert!(target.join("identity").exists() && !target.join(KEPT).exists());
    }
}
