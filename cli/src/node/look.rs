//! A node that is only looked at: its log is read where it is, its index from a copy.
//!
//! Invariants:
//! - No file of the node is changed. What is written goes to a directory that is removed in the end; one that a killed process left behind
//!   is removed by the next look.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use murphy_fs::{FjallIndex, FjallOptions, Index};
use murphy_log::DirectoryLock;
use tokio::runtime::Handle;

use super::{Node, index_directory, lock, log_directory, open, settle::has_begun};
use crate::{
    config::{NodeConfig, Role},
    error::{CliError, at, failed},
};

/// A node that nobody serves, opened to be looked at.
pub(crate) struct Looked {
    /// The node; it decides nothing, and cannot.
    pub(crate) node: Node,
    /// Removed after the node is closed.
    pub(crate) scratch: Scratch,
}

impl Looked {
    /// Opens the node in `directory`.
    pub(crate) fn open(directory: &Path, runtime: &Handle) -> Result<Looked, CliError> {
        // In what is no node nothing is made, not even a lock.
        NodeConfig::read(directory)?;
        let lock = lock(directory)?;
        let scratch = Scratch::of_index(directory)?;
        let node = open::open_to_look(directory, &scratch.path, lock, runtime)?;
        Ok(Looked { node, scratch })
    }

    /// Whether it can be looked at as it is: a mirror in which an earlier process has begun something is finished first.
    pub(crate) fn is_possible(directory: &Path) -> Result<bool, CliError> {
        let is_mirror = NodeConfig::read(directory)?.role == Role::Mirror;
        Ok(!is_mirror || (!has_begun(directory) && log_directory(directory).exists()))
    }
}

/// The index of a node that nobody serves, alone: for one whose log is not opened any more.
pub(crate) struct LookedIndex {
    /// What node it is.
    pub(crate) config: NodeConfig,
    /// A copy of it, with a state.
    pub(crate) index: FjallIndex,
    // Removed after the index is closed, and given back after that.
    _scratch: Scratch,
    _lock: DirectoryLock,
}

impl LookedIndex {
    /// Opens that of the node in `directory`; `None` if nothing is in it.
    pub(crate) fn open(directory: &Path) -> Result<Option<LookedIndex>, CliError> {
        let config = NodeConfig::read(directory)?;
        let lock = lock(directory)?;
        let scratch = Scratch::of_index(directory)?;
        let index = FjallIndex::open(&scratch.path, FjallOptions::default()).map_err(failed)?;
        let has_state = index.snapshot().state().is_some();
        Ok(has_state.then_some(LookedIndex { config, index, _scratch: scratch, _lock: lock }))
    }
}

/// A copy of the index. Dropping it removes it.
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn of_index(node: &Path) -> Result<Scratch, CliError> {
        let path = node.join(SCRATCH);
        remove(&path).map_err(at(&path))?;
        let scratch = Scratch { path };
        fs::create_dir(&scratch.path).map_err(at(&scratch.path))?;
        let index = index_directory(node);
        if index.is_dir() {
            copy_below(&index, &scratch.path).map_err(at(&index))?;
        }
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "it is left behind; it may be removed");
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Copies what lies below `from`. Tables are never written again once they have their name: a second name is enough. A journal is emptied
/// when it is opened.
fn copy_below(from: &Path, to: &Path) -> io::Result<()> {
    let keyspaces = from.parent().and_then(Path::parent).and_then(Path::file_name);
    let are_tables = from.file_name().is_some_and(|name| name == TABLES)
        && keyspaces.is_some_and(|name| name == KEYSPACES);
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            fs::create_dir(&target)?;
            copy_below(&source, &target)?;
        } else if !are_tables || fs::hard_link(&source, &target).is_err() {
            fs::copy(&source, &target)?;
        }
    }
    Ok(())
}

/// Where the copy is, in the node's directory: on the same disk.
const SCRATCH: &str = "look.tmp";
/// What fjall calls its folders of tables, and where it has one for each keyspace.
const TABLES: &str = "tables";
const KEYSPACES: &str = "keyspaces";
