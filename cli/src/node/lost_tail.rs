//! A source whose log is damaged, or has lost its end: what its archives hold is fetched before the node is opened.
//!
//! Invariants:
//! - Only entries of the node's own epoch that continue its log, verified on the chain, are appended. A seal of a successor stops it.
//! - A log that still ends below what is known to have been durable is not used.

use std::{path::Path, sync::Arc, time::Duration};

use murphy_backup::{ArchiveFence, TakeOverLog};
use murphy_fs::{Fence, FjallIndex, FjallOptions, Index, RowKey, SettingRow};
use murphy_log::{
    Clock, DiskLog, DiskOptions, Frame, Log, Lsn, NodeId, OpenError, Position, SystemClock, VolumeKeys,
};
use murphy_mirror::{Identity, Lookup, Point, look_up};
use tokio::runtime::Handle;

use super::{index_directory, log_directory};
use crate::{
    archive_notes::known_durable,
    config::NodeConfig,
    error::{CliError, failed},
    places::{local_url, open_archive},
    settings::{ARCHIVES, SharedArchive},
};

/// Opens a log that was refused as damaged: frames that are damaged or missing in it, and an end that a cursor vouches for, come from the
/// archives. `refused` is returned if nobody has them.
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
        fetch(directory, config, &log, known.lsn, runtime)
            .map_err(|error| refused.clone().because(&error))?;
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
    for _ in 0..MENDED_MAX {
        let segment = match DiskLog::open(options.clone()) {
            Ok(log) => return Ok(log),
            Err(OpenError::DamagedMiddle { segment, .. } | OpenError::Header { path: segment, .. }) => {
                segment
            }
            Err(error) => return Err(failed(error)),
        };
        let mut places = Vec::new();
        for shared in archives_of(directory, None)? {
            let opened = async { open_archive(config, &local_url(config, &shared)?).await.map_err(failed) };
            match runtime.block_on(opened) {
                Ok(archive) => {
                    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
                    places.push(ArchiveFence::new(archive, NodeId::default(), clock, None));
                }
                Err(error) => {
                    tracing::warn!(url = shared.url, %error, "nothing can be mended from this archive");
                }
            }
        }
        let mut fetch = |after: Position| -> Result<Vec<Frame>, String> {
            let mut why = "no archive that answers has them".to_owned();
            for place in &places {
                match runtime.block_on(place.entries(after)) {
                    Ok(frames) if !frames.is_empty() => return Ok(frames),
                    Ok(_) => {}
                    Err(error) => why = error.to_string(),
                }
            }
            Err(why)
        };
        DiskLog::repair(options, &segment, &mut fetch).map_err(failed)?;
        tracing::warn!("{} was damaged, and was mended from an archive", segment.display());
    }
    Err(CliError::new(format!("more than {MENDED_MAX} segments are damaged")))
}

/// Appends to `log`, which nobody leads yet, what archives hold beyond it; fails if it does not reach `wanted` then.
pub(super) fn fetch(
    directory: &Path,
    config: &NodeConfig,
    log: &Arc<DiskLog>,
    wanted: Lsn,
    runtime: &Handle,
) -> Result<(), CliError> {
    let archives = archives_of(directory, Some(log))?;
    fetch_from(directory, config, log, &archives, runtime)?;
    let end = log.tail().position.lsn;
    if end < wanted {
        return Err(CliError::new(format!("no archive that answers has what comes behind lsn {end}")));
    }
    Ok(())
}

/// The same from these archives, as far as they answer. What another source has written is not fetched.
pub(crate) fn fetch_from(
    directory: &Path,
    config: &NodeConfig,
    log: &Arc<DiskLog>,
    archives: &[SharedArchive],
    runtime: &Handle,
) -> Result<(), CliError> {
    let identity = Identity::load_or_create(directory).map_err(failed)?;
    let node = identity.public_key().node();
    let (own, began) = (log.recovery().epoch, log.tail().position.lsn);
    let mut why = Vec::new();
    for shared in archives {
        let asked = async {
            let archive = open_archive(config, &local_url(config, shared)?).await.map_err(failed)?;
            let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
            let place: Arc<dyn Fence> = Arc::new(ArchiveFence::new(archive, node, clock, None));
            let (log, keys) = (Arc::clone(log) as Arc<dyn Log>, VolumeKeys::derive(config.volume));
            let lost = TakeOverLog { log, keys, places: vec![place] };
            lost.recover(own).await.map_err(failed)
        };
        let asked = runtime.block_on(async { tokio::time::timeout(ANSWER_MAX, asked).await });
        match asked.unwrap_or_else(|_| Err(CliError::new("it does not answer in time"))) {
            Ok(_) => {}
            Err(error) => why.push(error.to_string()),
        }
    }
    let end = log.tail().position.lsn;
    if end > began {
        tracing::warn!("lsn {} to {end} were lost here, and came back from the archives", began.next());
    }
    match why.first() {
        Some(why) if end == began => Err(CliError::new(why)),
        _ => Ok(()),
    }
}

/// The archives of the volume as the index knows them, or the log if there is no index.
fn archives_of(directory: &Path, log: Option<&DiskLog>) -> Result<Vec<SharedArchive>, CliError> {
    let indexed = || {
        let path = index_directory(directory);
        if !path.is_dir() {
            return None;
        }
        let index = FjallIndex::open(&path, FjallOptions::default()).ok()?;
        let row = index.snapshot().get(&RowKey::setting(ARCHIVES)).ok()??;
        Some(SettingRow::decode(&row).ok()?.text)
    };
    let text = match indexed() {
        Some(text) => Some(text),
        None => log.map(logged).transpose()?.flatten(),
    };
    let Some(text) = text else { return Ok(Vec::new()) };
    serde_json::from_slice(&text)
        .map_err(|error| CliError::new(format!("the shared setting archives: {error}")))
}

/// The newest row of the setting in the log.
fn logged(log: &DiskLog) -> Result<Option<bytes::Bytes>, CliError> {
    let (key, mut found) = (RowKey::setting(ARCHIVES), None);
    for frame in log.read(log.first()).map_err(failed)? {
        for entry in &frame.map_err(failed)? {
            for change in entry.map_err(failed)?.changes {
                if (change.table, &change.key[..]) == (key.table(), key.key()) {
                    found = change.value;
                }
            }
        }
    }
    Ok(found.map(|row| SettingRow::decode(&row)).transpose().map_err(failed)?.map(|row| row.text))
}

/// So many segments are mended at one opening.
const MENDED_MAX: usize = 64;
/// An archive gets so long to give back what was lost.
const ANSWER_MAX: Duration = Duration::from_secs(120);
