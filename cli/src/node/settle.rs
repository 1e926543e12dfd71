//! What a process has begun with a mirror's directory, and the next start finishes: a log that is put aside, and what takes its place.
//!
//! ```text
//!   set-aside.json        which log is put aside, and for what:
//!     log.fork/             its beginning, up to where the histories part; or
//!     base/seed.ready       a snapshot, complete and verified, and log.new/, which begins behind it
//!   branches/N/           a log that was put aside, with its base: a node's directory, to be looked at
//! ```
//!
//! Invariants:
//! - What takes the place of a log is complete and durable before the order to put that log aside counts: a process that is killed between any
//!   two steps leaves the log, or a directory in which [`settle`] puts the other one in its place.
//! - What takes room comes before anything is moved.
//! - Nothing that vouches for a log stays behind when the log is put aside.

use std::{
    fs::{self, File},
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use murphy_fs::SnapshotReader;
use murphy_log::{
    ChainHash, DiskLog, DiskOptions, Files, Lsn, OsFiles, ParseIdError, Position, State, rename_durably,
};
use murphy_mirror::Point;
use serde::{Deserialize, Serialize};

use super::{base_file, data_cursor, index_directory, log_directory};
use crate::{
    archive_notes::forget_durable,
    config::{KeptBranch, NodeConfig, Role},
    error::{CliError, at, failed},
    summed,
};

/// Finishes what an earlier process has begun: puts a log aside, puts another one, or a snapshot, in its place. The caller holds the node's
/// lock, and its log is not open.
pub(crate) fn settle(directory: &Path, config: &NodeConfig) -> Result<(), CliError> {
    if let Some(order) = order(directory)? {
        let steps = if counts(directory, &order) { &STEPS[..] } else { &[forget_order as Step] };
        steps.iter().try_for_each(|step| step(directory, &order))?;
    }
    let (ready, base, log) =
        (seed_file(directory, SEED_READY), base_file(directory), log_directory(directory));
    if ready.exists() && !log.exists() {
        // Nothing was held.
        remove_tree(&index_directory(directory))?;
        rename_durably(&OsFiles, &ready, &base).map_err(at(&base))?;
    }
    if base.exists() && !log.exists() {
        let state = state_in(&base)?;
        let new = new_log(directory, config, state)?;
        rename_durably(&OsFiles, &new, &log).map_err(at(&log))?;
    }
    Ok(())
}

/// Whether an earlier process has begun something that [`settle`] would finish.
pub(super) fn has_begun(directory: &Path) -> bool {
    let ordered = order(directory).map(|order| order.is_some_and(|order| counts(directory, &order)));
    ordered.unwrap_or(true) || seed_file(directory, SEED_READY).exists()
}

/// What is put aside at the next start, and for what.
#[derive(Serialize, Deserialize)]
struct SetAside {
    kept: KeptBranch,
    instead: Instead,
    /// The place of the copier's cursor, with its hash, where that has to be taken back.
    copied: Option<(u64, String)>,
}

/// What takes the place of a log.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Instead {
    /// Its own beginning.
    Beginning,
    /// A snapshot. Without one that is ready the order counts for nothing.
    Snapshot,
}

fn order(directory: &Path) -> Result<Option<SetAside>, CliError> {
    summed::read(&directory.join(SET_ASIDE), ORDER_LOST)
}

/// Whether there is anything to be done for an order: the snapshot that it was for may never have become ready, or may be in place.
fn counts(directory: &Path, order: &SetAside) -> bool {
    order.instead == Instead::Beginning || seed_file(directory, SEED_READY).exists()
}

/// Orders that the log goes back to `ancestor` at the next start, and that all of it up to `tail`, its end, is kept; durable when it returns.
/// Up to `data` the node has every byte.
pub(crate) fn order_beginning(
    directory: &Path,
    log: &DiskLog,
    (ancestor, tail): (Point, Position),
    data: Lsn,
) -> Result<KeptBranch, CliError> {
    let fork = directory.join(FORK);
    remove_tree(&fork)?;
    log.fork(&fork, ancestor.lsn, ancestor.hash).map_err(failed)?;
    let copied = (data > ancestor.lsn).then(|| (ancestor.lsn.get(), ancestor.hash.to_string()));
    write_order(directory, kept_branch(directory, Some(ancestor), tail), Instead::Beginning, copied)
}

/// Orders that the log up to `tail` is put aside, with its base, once a snapshot of `state` is ready: everything else is durable when it returns.
pub(crate) fn order_snapshot(
    directory: &Path,
    config: &NodeConfig,
    state: State,
    tail: Position,
) -> Result<KeptBranch, CliError> {
    new_log(directory, config, state)?;
    write_order(directory, kept_branch(directory, None, tail), Instead::Snapshot, None)
}

fn write_order(
    directory: &Path,
    kept: KeptBranch,
    instead: Instead,
    copied: Option<(u64, String)>,
) -> Result<KeptBranch, CliError> {
    let order = SetAside { kept, instead, copied };
    summed::write(&directory.join(SET_ASIDE), &order)?;
    Ok(order.kept)
}

fn kept_branch(directory: &Path, ancestor: Option<Point>, tail: Position) -> KeptBranch {
    let name = format!("branches/{}-{}", tail.epoch.number, tail.lsn);
    // Another history may have ended at the same entry.
    let names = std::iter::once(name.clone()).chain((2..).map(|count| format!("{name}-{count}")));
    let mut free = names.skip_while(|name| directory.join(name).exists());
    KeptBranch {
        epoch: tail.epoch.number,
        after_lsn: ancestor.map_or(0, |point| point.lsn.get()),
        last_lsn: tail.lsn.get(),
        hash: tail.hash.to_string(),
        place: free.next().unwrap_or(name),
    }
}

/// A step of what an order says. Each may be done again, and what a killed process has done of it is gone on with.
type Step = fn(&Path, &SetAside) -> Result<(), CliError>;

const STEPS: [Step; 8] =
    [keep_base, describe, list, keep_log, forget_derived, take_back_cursor, put_in_place, forget_order];

/// The base is never changed: it has a second name where the log will be.
fn keep_base(directory: &Path, order: &SetAside) -> Result<(), CliError> {
    let (base, kept) = (base_file(directory), base_file(&directory.join(&order.kept.place)));
    let folder = kept.parent().unwrap_or(&kept);
    OsFiles.create_dir(folder).map_err(at(folder))?;
    // Once the log is moved, a snapshot may be in the place of the base already.
    if base.exists() && !kept.exists() && !log_directory(&directory.join(&order.kept.place)).exists() {
        OsFiles.link(&base, &kept).and_then(|()| OsFiles.sync_dir(folder)).map_err(at(&kept))?;
    }
    Ok(())
}

/// What is kept can be looked at like a node, and is nobody's: it follows no source, and takes over from none.
fn describe(directory: &Path, order: &SetAside) -> Result<(), CliError> {
    let config = NodeConfig::read(directory)?;
    let kept = NodeConfig {
        role: Role::Mirror,
        packs_from: config.packs_from,
        archives: config.archives,
        removed: true,
        ..NodeConfig::new(config.volume, config.branch, config.name, config.blocks)
    };
    kept.write(&directory.join(&order.kept.place))
}

fn list(directory: &Path, order: &SetAside) -> Result<(), CliError> {
    // The file as it is now: other steps may have written it since this process read it.
    let mut config = NodeConfig::read(directory)?;
    if !config.branches.contains(&order.kept) {
        config.branches.push(order.kept.clone());
        config.write(directory)?;
    }
    Ok(())
}

fn keep_log(directory: &Path, order: &SetAside) -> Result<(), CliError> {
    let (log, kept) = (log_directory(directory), log_directory(&directory.join(&order.kept.place)));
    if log.exists() && !kept.exists() {
        rename_durably(&OsFiles, &log, &kept).map_err(at(&log))?;
    }
    Ok(())
}

fn forget_derived(directory: &Path, _: &SetAside) -> Result<(), CliError> {
    remove_tree(&index_directory(directory))?;
    forget_durable(directory)
}

fn take_back_cursor(directory: &Path, order: &SetAside) -> Result<(), CliError> {
    let Some((lsn, hash)) = &order.copied else { return Ok(()) };
    let lost = |error: ParseIdError| CliError::new(format!("{SET_ASIDE}: {error}")).hint(ORDER_LOST);
    let hash: ChainHash = hash.parse().map_err(lost)?;
    data_cursor(directory).save(Point { lsn: Lsn::new(*lsn), hash }).map_err(failed)
}

fn put_in_place(directory: &Path, order: &SetAside) -> Result<(), CliError> {
    let log = log_directory(directory);
    let next = match order.instead {
        Instead::Beginning => directory.join(FORK),
        Instead::Snapshot => directory.join(NEW_LOG),
    };
    if !log.exists() {
        rename_durably(&OsFiles, &next, &log).map_err(at(&log))?;
    }
    if order.instead == Instead::Snapshot {
        let (ready, base) = (seed_file(directory, SEED_READY), base_file(directory));
        rename_durably(&OsFiles, &ready, &base).map_err(at(&base))?;
    }
    Ok(())
}

fn forget_order(directory: &Path, _: &SetAside) -> Result<(), CliError> {
    let path = directory.join(SET_ASIDE);
    // An order that came back after a power cut would put aside what has taken its place since.
    fs::remove_file(&path).and_then(|()| OsFiles.sync_dir(directory)).map_err(at(&path))
}

/// Makes the log that begins behind `state`, under a name that it does not keep.
fn new_log(directory: &Path, config: &NodeConfig, state: State) -> Result<PathBuf, CliError> {
    let new = directory.join(NEW_LOG);
    remove_tree(&new)?;
    drop(DiskLog::create(DiskOptions::new(&new, config.volume, config.branch), state).map_err(failed)?);
    Ok(new)
}

fn state_in(base: &Path) -> Result<State, CliError> {
    let file = File::open(base).map_err(at(base))?;
    Ok(SnapshotReader::open(BufReader::new(file)).map_err(failed)?.header().state)
}

fn remove_tree(path: &Path) -> Result<(), CliError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        _ => Ok(()),
    }
}

/// Where a snapshot is while it arrives, or waits to be put in place.
pub(crate) fn seed_file(directory: &Path, name: &str) -> PathBuf {
    base_file(directory).with_file_name(name)
}

/// A snapshot that is complete and verified.
pub(crate) const SEED_READY: &str = "seed.ready";
const NEW_LOG: &str = "log.new";
const FORK: &str = "log.fork";
const ORDER_LOST: &str =
    "it says which log is to be put aside, and nothing is touched until that is known: put the file back";
const SET_ASIDE: &str = "set-aside.json";

#[cfg(test)]
mod tests;
