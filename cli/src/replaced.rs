//! A source that was replaced, and a history that a mirror has put aside: what only their logs hold, and what people do with it.
//!
//! Invariants:
//! - What is listed stays in the log; a later finding of where the histories part takes the place of an earlier one.

use std::path::Path;

use murphy_fs::Sealed;
use murphy_log::{DiskLog, Log, Lsn, Position};
use murphy_mirror::{Lookup, Point, look_up};

use crate::{
    config::{KeptBranch, NodeConfig},
    error::{CliError, failed},
};

/// What people do with a source that was replaced.
pub(crate) fn way_on(directory: &Path) -> String {
    let dir = directory.display();
    format!(
        "go on with that one: this node never is the source again. What only it holds stays in its log, and murphy status {dir} lists it; to \
         copy files out of it: murphy dump {dir} FILE, then murphy load FILE NEW-DIR --blocks URL with the block store that it names, and \
         mount that. To take part again: murphy invite at the new source, murphy join in a new directory"
    )
}

/// Refuses what is only to be looked at: the directory of a history that a mirror has put aside.
pub(crate) fn refuse_branch(directory: &Path, config: &NodeConfig) -> Result<(), CliError> {
    if !config.is_branch() {
        return Ok(());
    }
    let (dir, blocks) = (directory.display(), &config.blocks);
    Err(CliError::new(format!("{dir} holds a history that is not the volume's any more, and was put aside")).hint(
        format!(
            "murphy dump {dir} FILE, then murphy load FILE NEW-DIR --blocks '{blocks}' makes a volume of its own of it, to copy files out of"
        ),
    ))
}

/// Lists the entries that only this source's log holds, once its epoch was sealed.
pub(crate) fn list_behind(config: &mut NodeConfig, log: &DiskLog, sealed: &Sealed) -> Result<(), CliError> {
    let base = Point { lsn: sealed.base.lsn, hash: sealed.base.hash };
    let common = match look_up(log, base.lsn).map_err(failed)? {
        Lookup::End(end) if end == base => base.lsn,
        // It holds nothing that the others have not.
        Lookup::Beyond { .. } => return Ok(()),
        // They have parted before, and nobody here can tell where.
        Lookup::End(_) | Lookup::Inside { .. } | Lookup::Trimmed { .. } => Lsn::new(0),
    };
    list_tail(config, log.durable().state().position, common);
    Ok(())
}

/// Lists what a log that ends at `tail` holds behind the last common entry.
pub(crate) fn list_tail(config: &mut NodeConfig, tail: Position, common: Lsn) {
    if common >= tail.lsn {
        return;
    }
    config.branches.retain(|kept| kept.place != PLACE);
    config.branches.push(KeptBranch {
        epoch: tail.epoch.number,
        after_lsn: common.get(),
        last_lsn: tail.lsn.get(),
        hash: tail.hash.to_string(),
        place: PLACE.to_owned(),
    });
}

/// Where a source keeps what only it holds.
const PLACE: &str = "log";
