//! The tree that the demo copies in: real sources, found on this machine.
//!
//! Invariants:
//! - Within its limits of files and bytes it takes the same files every time.

use std::{
    collections::BTreeSet,
    fs::{self, File, FileTimes},
    io,
    path::{Path, PathBuf},
};

use crate::error::{CliError, at};

/// Files of a real tree.
pub(super) struct Sources {
    /// Each file, and its path in the copy.
    pub(super) files: Vec<(PathBuf, PathBuf)>,
    pub(super) bytes: u64,
}

impl Sources {
    /// The files below `tree`, or of the project and the local cargo registry: at most [`FILES_MAX`] and [`BYTES_MAX`].
    pub(super) fn choose(tree: Option<&Path>) -> Result<Sources, CliError> {
        let mut sources = Sources { files: Vec::new(), bytes: 0 };
        if let Some(tree) = tree {
            sources
                .gather(tree, Path::new("tree"), Limits { files: usize::MAX, bytes: u64::MAX })
                .map_err(at(tree))?;
        } else {
            let limits = Limits { files: FILES_MAX, bytes: BYTES_MAX };
            for (number, root) in likely_roots().iter().enumerate() {
                // What cannot be read is no source of ours; another one may do.
                if let Err(error) = sources.gather(root, Path::new(&format!("sources-{number}")), limits) {
                    tracing::debug!(root = %root.display(), %error, "left out");
                }
            }
        }
        if sources.files.is_empty() {
            let hint = "name a directory with files: murphy demo --tree PATH";
            return Err(CliError::new("there are no files to copy in").hint(hint));
        }
        Ok(sources)
    }

    fn gather(&mut self, from: &Path, to: &Path, limits: Limits) -> io::Result<()> {
        let mut entries: Vec<_> = fs::read_dir(from)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (kind, name) = (entry.file_type()?, entry.file_name());
            if kind.is_dir() && name != "target" && name != ".git" {
                self.gather(&entry.path(), &to.join(&name), limits)?;
            } else if kind.is_file() {
                let length = entry.metadata()?.len();
                if self.files.len() >= limits.files || self.bytes + length > limits.bytes {
                    return Ok(());
                }
                self.bytes += length;
                self.files.push((entry.path(), to.join(&name)));
            }
        }
        Ok(())
    }

    /// The directories of the copy.
    pub(super) fn directories(&self) -> Vec<PathBuf> {
        let directories: BTreeSet<&Path> = self.files.iter().filter_map(|(_, to)| to.parent()).collect();
        directories.into_iter().map(Path::to_owned).collect()
    }

    /// Copies the files below `root`, with their modification times.
    pub(super) fn copy_to(&self, root: &Path) -> Result<(), CliError> {
        for (from, to) in &self.files {
            let to = root.join(to);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).map_err(at(parent))?;
            }
            fs::copy(from, &to).map_err(at(&to))?;
            let modified = fs::metadata(from).and_then(|metadata| metadata.modified()).map_err(at(from))?;
            let copy = File::options().write(true).open(&to).map_err(at(&to))?;
            copy.set_times(FileTimes::new().set_modified(modified)).map_err(at(&to))?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Limits {
    files: usize,
    bytes: u64,
}

/// Where sources are likely to be: the project that this program was built from, and what cargo has unpacked.
fn likely_roots() -> Vec<PathBuf> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned);
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    project.into_iter().chain(home.map(|home| home.join("registry").join("src"))).collect()
}

const FILES_MAX: usize = 5000;
const BYTES_MAX: u64 = 200_000_000;
