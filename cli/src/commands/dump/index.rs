//! `murphy dump DIR` of a node whose log is damaged, when nobody has what is missing: the tree as its index has it.
//!
//! Invariants:
//! - Every row was compared with what the log had said of all of them before anything is written.
//! - Nothing of the node is changed.

use std::path::Path;

use murphy_fs::{Index, SnapshotOrigin, SnapshotProgress};
use murphy_log::{Clock, SystemClock, VolumeKeys};
use serde_json::json;

use super::DumpArgs;
use crate::{
    check::compare_index,
    dump_file::Dumped,
    error::{CliError, Code},
    node::LookedIndex,
    output::Output,
    progress::{Progress, ProgressLine},
};

/// Writes it, into `path` or to stdout; `refused` says why the node is not opened, and is returned if its index is of no use either.
pub(super) fn run(
    directory: &Path,
    args: &DumpArgs,
    path: Option<&Path>,
    refused: CliError,
    output: &Output,
) -> Result<Code, CliError> {
    let looked = match LookedIndex::open(directory) {
        Ok(Some(looked)) => looked,
        Ok(None) => return Err(refused),
        Err(error) => return Err(refused.because(&error)),
    };
    let (keys, tree) = (VolumeKeys::derive(looked.config.volume), looked.index.snapshot());
    let (line, inodes) = (ProgressLine::new(output), tree.state().map_or(0, |state| state.usage.inodes));
    line.show(&Progress::new("comparing", 0, 0));
    let compared =
        compare_index(&*tree, &keys, &mut || true).map_err(|error| refused.clone().because(&error))?;
    if let Some(differs) = compared.and_then(|compared| compared.differs) {
        return Err(refused.because(&CliError::new(differs)));
    }
    let origin = SnapshotOrigin { branch: looked.config.branch, created: SystemClock::new().wall() };
    let dumped = Dumped { tree: &*tree, keys: &keys, origin };
    let progress = |done: SnapshotProgress| line.show(&Progress::new("inodes dumped", done.inodes, inodes));
    let summary = match path {
        None => dumped.write_to(&mut super::stdout()?, &progress)?,
        Some(path) => dumped.write_file(path, &progress)?,
    };
    drop(line);
    let state = summary.header.state;
    output.note(&format!(
        "the log is damaged: {refused}. This is the tree of lsn {}, which the index has whole",
        state.position.lsn
    ));
    let done = json!({
        "lsn": state.position.lsn.get(),
        "digest": state.digest.to_string(),
        "inodes": state.usage.inodes,
        "problems": [refused.to_string()],
    });
    super::told(args, &done, output)?;
    Ok(Code::Found)
}
