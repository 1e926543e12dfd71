//! A source whose log is damaged, or has lost its end: what archives and mirrors hold is fetched before the node decides anything.
//!
//! Invariants:
//! - Only entries of the node's own epoch that continue its log, verified on the chain, are appended. A successor stops it.
//! - A log that still ends below what is known to have been durable is not used.

use std::{path::Path, sync::Arc};

use murphy_log::{DiskLog, DiskOptions, Frame, Log, Lsn, OpenError, Position};
use murphy_mirror::{Lookup, Point, look_up};
use tokio::runtime::Handle;

use super::{index_directory, log_directory};
use crate::{
    archive_notes::known_durable,
    config::NodeConfig,
    error::{CliError, failed},
    givers::{Giver, givers_of},
    mirror_notes,
};

/// Opens a log that was refused as damaged: frames that are damaged or missing in it, and an end that a note vouches for, come from archives
/// and mirrors. `refused` is returned if nobody has them.
pub(super) fn reopen(
    directory: &Path,
    config: &NodeConfig,
    refused: CliError,
    runtime: &Handle,
) -> Result<DiskLog, CliError> {
    let known = known_durable(directory)?;
    let plain = DiskOptions::new(log_directory(directory), config.volume, config.branch);
    let vouched = DiskOptions { known_durable: known, ..plain.clone() };
    if matches!(DiskLog::open(vouched), Err(OpenError::Diverged { .. })) {
        return Err(refused);
    }
    let log = match mended(directory, config, &plain, runtime) {
        Ok(log) => Arc::new(log),
        Err(error) => return Err(refused.because(&error)),
    };
    if let Some(known) = known {
        let point = Point { lsn: known.lsn, hash: known.hash };
        fetch(directory, config, &log, known.lsn, runtime).map_err(|error| {
            let refused = refused.clone().because(&error);
            match mirror_notes::load(directory) {
                Some(note) if note.position.lsn > log.tail().position.lsn => refused.because(&note.told()),
                _ => refused,
            }
        })?;
        if look_up(&*log, known.lsn).map_err(failed)? != Lookup::End(point) {
            return Err(refused);
        }
    }
    Arc::into_inner(log).ok_or_else(|| CliError::new("the log is in use"))
}

/// Opens the log, one damaged segment after the other mended.
fn mended(
    directory: &Path,
    config: &NodeConfig,
    options: &DiskOptions,
    runtime: &Handle,
) -> Result<DiskLog, CliError> {
    let mut givers: Option<Vec<Box<dyn Giver>>> = None;
    for _ in 0..MENDED_MAX {
        let segment = match DiskLog::open(options.clone()) {
            Ok(log) => return Ok(log),
            Err(OpenError::DamagedMiddle { segment, .. } | OpenError::Header { path: segment, .. }) => {
                segment
            }
            Err(error) => return Err(failed(error)),
        };
        let givers = match &mut givers {
            Some(givers) => givers,
            None => givers.insert(givers_of(directory, config, &index_directory(directory), None)?),
        };
        let mut fetch = |after: Position| -> Result<Vec<Frame>, String> {
            let mut why = vec!["nobody who answers has them".to_owned()];
            for giver in &*givers {
                match runtime.block_on(giver.frames(after)) {
                    Ok(frames) if !frames.is_empty() => return Ok(frames),
                    Ok(_) => {}
                    Err(error) => why.push(error.to_string()),
                }
            }
            Err(why.join("; "))
        };
        DiskLog::repair(options, &segment, &mut fetch).map_err(failed)?;
        tracing::warn!("{} was damaged, and was mended from elsewhere", segment.display());
    }
    Err(CliError::new(format!("more than {MENDED_MAX} segments are damaged")))
}

/// Appends to `log`, which nobody leads yet, what archives and mirrors hold beyond it; fails if it does not reach `wanted` then.
pub(super) fn fetch(
    directory: &Path,
    config: &NodeConfig,
    log: &Arc<DiskLog>,
    wanted: Lsn,
    runtime: &Handle,
) -> Result<(), CliError> {
    let givers = givers_of(directory, config, &index_directory(directory), Some(log))?;
    fetch_from(log, &givers, wanted, runtime)
}

/// The same from these, each as far as it answers.
pub(super) fn fetch_from(
    log: &Arc<DiskLog>,
    givers: &[Box<dyn Giver>],
    wanted: Lsn,
    runtime: &Handle,
) -> Result<(), CliError> {
    let own = log.recovery().epoch;
    let mut why = Vec::new();
    for giver in givers {
        let began = log.tail().position.lsn;
        if let Err(error) = runtime.block_on(giver.give_back(Arc::clone(log), own)) {
            why.push(error.to_string());
        }
        let end = log.tail().position.lsn;
        if end > began {
            tracing::warn!(
                "lsn {} to {end} were lost here, and came back from {}",
                began.next(),
                giver.name()
            );
        }
    }
    let end = log.tail().position.lsn;
    if end >= wanted {
        return Ok(());
    }
    let nobody = format!("nobody who answers has what comes behind lsn {end}");
    why.insert(0, nobody);
    Err(CliError::new(why.join("; ")))
}

/// So many segments are mended at one opening.
const MENDED_MAX: usize = 64;
