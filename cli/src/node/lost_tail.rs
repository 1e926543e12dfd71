//! A source whose log is damaged, or has lost its end: what archives and mirrors hold is fetched before the node decides anything.
//!
//! Invariants:
//! - Only entries of the node's own epoch that continue its log, verified on the chain, are appended. A successor stops it.
//! - A log that still ends below what is known to have been durable is not used.
//! - What is damaged at its end is cut only once somebody was found who gives back what is known to have been there.

use std::{path::Path, sync::Arc};

use murphy_log::{Access, DiskLog, DiskOptions, Frame, Log, Lsn, OpenError, Position, VolumeKeys};
use murphy_mirror::{Lookup, Point, look_up};
use tokio::runtime::Handle;

use super::{index::known_to_index, index_directory, log_directory};
use crate::{
    archive_notes::known_durable,
    config::NodeConfig,
    error::{CliError, failed},
    givers::{Giver, givers_of},
    mirror_notes,
};

/// Opens a log that was refused as damaged or torn: frames that are damaged or missing in it, and an end that a note or the index vouches
/// for, come from archives and mirrors. `refused` is returned if nobody has them.
pub(super) fn reopen(
    directory: &Path,
    config: &NodeConfig,
    refused: CliError,
    runtime: &Handle,
) -> Result<DiskLog, CliError> {
    let noted = known_durable(directory)?;
    let plain = DiskOptions::new(log_directory(directory), config.volume, config.branch);
    let vouched = DiskOptions { known_durable: noted, access: Access::Read, ..plain.clone() };
    if matches!(DiskLog::open(vouched), Err(OpenError::Diverged { .. })) {
        return Err(who_differs(directory, refused, noted));
    }
    let (log, known) = match mended(directory, config, (&plain, noted), runtime) {
        Ok((log, known)) => (Arc::new(log), known),
        Err(error) => return Err(why_refused(directory, refused, &error, None)),
    };
    if let Some(known) = known {
        let point = Point { lsn: known.lsn, hash: known.hash };
        fetch(directory, config, &log, known.lsn, runtime).map_err(|error| {
            why_refused(directory, refused.clone(), &error, Some(log.tail().position.lsn))
        })?;
        if look_up(&*log, known.lsn).map_err(failed)? != Lookup::End(point) {
            return Err(who_differs(directory, refused, noted));
        }
    }
    Arc::into_inner(log).ok_or_else(|| CliError::new("the log is in use"))
}

/// What a note about the mirrors says is told, unless the log reached it at `end`.
fn why_refused(directory: &Path, refused: CliError, error: &CliError, end: Option<Lsn>) -> CliError {
    let refused = refused.because(error);
    match mirror_notes::load(directory) {
        Some(note) if end.is_none_or(|end| note.position.lsn > end) => refused.because(&note.told()),
        _ => refused,
    }
}

/// A log that differs from what is `noted` to have been durable: which mirror that is noted of, if it is one.
fn who_differs(directory: &Path, refused: CliError, noted: Option<Position>) -> CliError {
    match mirror_notes::load(directory) {
        Some(note) if Some(note.position) == noted => refused.because(&note.told()),
        _ => refused,
    }
}

/// Opens the log, one damaged segment after the other mended, and says up to where it is known to have been durable. An end that is torn is
/// cut only when somebody was found who has everything that is known to come then.
fn mended(
    directory: &Path,
    config: &NodeConfig,
    (options, noted): (&DiskOptions, Option<Position>),
    runtime: &Handle,
) -> Result<(DiskLog, Option<Position>), CliError> {
    let mut givers: Option<Vec<Box<dyn Giver>>> = None;
    for _ in 0..MENDED_MAX {
        let looked = DiskLog::open(DiskOptions { access: Access::Read, ..options.clone() });
        let segment = match &looked {
            Ok(_) => None,
            Err(OpenError::DamagedMiddle { segment, .. } | OpenError::Header { path: segment, .. }) => {
                Some(segment.clone())
            }
            Err(error) => return Err(failed(error)),
        };
        let mut lost = None;
        if let Ok(look) = &looked {
            let keys = VolumeKeys::derive(config.volume);
            let indexed = known_to_index(directory, look, &keys);
            lost = noted.into_iter().chain(indexed).max_by_key(|position| position.lsn);
            if lost.is_none_or(|known| known.lsn <= look.tail().position.lsn) {
                drop(looked);
                return Ok((DiskLog::open(options.clone()).map_err(failed)?, lost));
            }
        }
        let givers = match &mut givers {
            Some(givers) => givers,
            None => {
                let log = looked.as_ref().ok();
                givers.insert(givers_of(directory, config, &index_directory(directory), log)?)
            }
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
        if let (Ok(look), Some(known)) = (&looked, lost) {
            check_given(look, &known, &mut fetch)?;
            drop(looked);
            return Ok((DiskLog::open(options.clone()).map_err(failed)?, lost));
        }
        drop(looked);
        if let Some(segment) = segment {
            DiskLog::repair(options, &segment, &mut fetch).map_err(failed)?;
            tracing::warn!("{} was damaged, and was mended from elsewhere", segment.display());
        }
    }
    Err(CliError::new(format!("more than {MENDED_MAX} segments are damaged")))
}

/// Checks that somebody has what comes behind the end of `log`, up to `known`. What is read for that is not kept.
fn check_given(
    log: &DiskLog,
    known: &Position,
    fetch: &mut dyn FnMut(Position) -> Result<Vec<Frame>, String>,
) -> Result<(), CliError> {
    let (mut at, own) = (log.tail().position, log.recovery().epoch);
    while at.lsn < known.lsn {
        let behind = |why: String| CliError::new(format!("what comes behind lsn {}: {why}", at.lsn));
        let frames = fetch(at).map_err(behind)?;
        if let Some(other) = frames.iter().find(|frame| frame.epoch() != own) {
            return Err(behind(format!(
                "lsn {} is of epoch {}, not of this node's",
                other.first(),
                other.epoch()
            )));
        }
        at = frames.last().map_or(at, Frame::position);
    }
    Ok(())
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
