//! Whose turn it is to make a node at a directory: one process at a time.
//!
//! Invariants:
//! - Two that make the same node at once do not exist: one of them would take up, or take back, what the other one has left for itself.
//! - Whoever has the turn is named to whoever wants it. A process that was killed has it no more.
//! - Nothing is left behind by one that makes nothing.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use murphy_log::{Files, OsFiles};
use rustix::fs::FlockOperation;

use super::staging::{hidden, split, wanted};
use crate::error::{CliError, at};

/// The right to make a node at `target`, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    target: PathBuf,
    /// The file that is locked. It has this name for as long as it is.
    path: PathBuf,
    _locked: File,
    /// Directories that were made for it, the lowest first.
    made: Vec<PathBuf>,
}

impl Turn {
    /// Takes the turn at `target` for the command `what`; refuses while another process has it.
    pub(crate) fn take(target: &Path, what: &str) -> Result<Arc<Turn>, CliError> {
        let target = wanted(target)?;
        let (parent, name) = split(&target)?;
        let missing = parent.ancestors().take_while(|above| !above.exists());
        let made: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        OsFiles.create_dir(parent).map_err(at(parent))?;
        let mut file = hidden(name);
        file.push(MAKING);
        let path = parent.join(file);
        let locked = loop {
            let mut file = open(&path).map_err(at(&path))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(taken(&target, &mut file)),
                Err(error) => return Err(at(&path)(error.into())),
            }
            // Whoever had it before may have taken the file away in between, and somebody else made another one.
            if is_at(&file, &path).map_err(at(&path))? {
                break file;
            }
        };
        let turn = Turn { target, path, _locked: locked, made };
        turn.sign(what).map_err(at(&turn.path))?;
        Ok(Arc::new(turn))
    }

    /// The directory that is made, whatever stands behind its name.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    fn sign(&self, what: &str) -> io::Result<()> {
        let mut file = &self._locked;
        file.set_len(0)?;
        file.rewind()?;
        write!(file, "{what}, process {}", std::process::id())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // While it is locked: whoever opens it then sees that it has no name any more.
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a file is left behind, which does no harm");
        }
        for directory in &self.made {
            if let Err(error) = fs::remove_dir(directory) {
                tracing::debug!(path = %directory.display(), %error, "a directory stays: something is in it");
                return;
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)
}

/// Whether the file at `path` is this one.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let here = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((here.dev(), here.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn taken(target: &Path, file: &mut File) -> CliError {
    let mut who = String::new();
    // One that has only just taken it has not signed yet.
    let signed = file.take(WHO_BYTES_MAX).read_to_string(&mut who).is_ok() && !who.is_empty();
    let by = if signed { format!(" ({who})") } else { String::new() };
    CliError::new(format!("{} is being made by another process{by}", target.display()))
        .hint("wait until it has ended, or give another directory")
}

/// How the name of the file ends.
const MAKING: &str = "making";
const WHO_BYTES_MAX: u64 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: two restores into one directory take over from the same source, one of them goes on with what the other one has left, or takes
    /// back its pins.
    #[test]
    fn a_node_is_made_by_one_process_at_a_time_which_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("above/below/node");
        let first = Turn::take(&target, "murphy restore").unwrap();
        let refused = Turn::take(&folder.path().join("above/below/node/"), "murphy load").unwrap_err();
        let named = format!("(murphy restore, process {})", std::process::id());
        assert!(refused.message.contains(&named), "{refused}");
        Turn::take(&folder.path().join("above/below/node2"), "murphy restore").unwrap();
        drop(first);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");
        drop(Turn::take(&target, "murphy load").unwrap());
    }

    #[test]
    fn what_a_killed_process_has_left_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("node");
        fs::write(folder.path().join(".node.making"), "murphy restore, process 1, which was killed").unwrap();
        let turn = Turn::take(&target, "x").unwrap();
        let signed = fs::read_to_string(folder.path().join(".node.making")).unwrap();
        assert_eq!(signed, format!("x, process {}", std::process::id()));
        drop(turn);
    }

    /// The fear: one takes the file away while another one waits for it, and a third one makes a new one: two have the turn.
    #[test]
    fn at_most_one_of_many_has_the_turn() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("node");
        let (holders, taken) = Default::default();
        let (holders, taken): (std::sync::atomic::AtomicU32, std::sync::atomic::AtomicU32) = (holders, taken);
        let order = std::sync::atomic::Ordering::SeqCst;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while taken.load(order) < 500 {
                        if let Ok(_turn) = Turn::take(&target, "x") {
                            assert_eq!(holders.fetch_add(1, order), 0);
                            taken.fetch_add(1, order);
                            holders.fetch_sub(1, order);
                        }
                    }
                });
            }
        });
    }
}
