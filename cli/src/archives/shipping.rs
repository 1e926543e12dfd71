//! The life of one shipper: until the archive answers, while it is shipped to, and the snapshots in between.
//!
//! Invariants:
//! - An archive that does not answer is tried again for ever, and its status says why.
//! - No snapshot is ahead of what this node holds durably, nor of what its archive holds of the log.

use std::{sync::PoisonError, time::Duration};

use murphy_backup::{
    Boundary, KnownLosses, LostPacks, Proof, ShipLimits, Shipper, ShipperParts, bases, snapshot_due, walk,
};
use murphy_fs::View;

use super::{
    Arc, Archive, CliError, Context, IndexSnapshot, Log, LogTime, Lsn, Mutex, NewBase, NodeConfig, Position,
    SharedArchive, ShipHandle, ShipState, StoreUrl, cursor, failed, open_archive, write_base,
};

/// Where to.
pub(super) struct Destination {
    pub(super) shared: SharedArchive,
    /// How this node reaches it.
    pub(super) url: StoreUrl,
    /// Whether it was given up when this node took over: whoever has sealed it for an epoch of the same number has not replaced this node.
    pub(super) is_given_up: bool,
    /// What comes behind it this process has written.
    pub(super) began: Lsn,
}

/// Ships until the node ends or it cannot go on for good.
pub(super) async fn ship(context: Arc<Context>, to: Destination, state: Arc<Mutex<ShipState>>) {
    let Destination { shared, url, is_given_up, began } = to;
    let note = |error: Option<String>| {
        state.lock().unwrap_or_else(PoisonError::into_inner).error = error;
    };
    let mut pause = PAUSE_FIRST;
    let archive = loop {
        match open_archive(&context.config, &url).await {
            Ok(archive) => break archive,
            Err(error) => {
                tracing::warn!(url = shared.url, %error, "an archive cannot be opened; it is tried again");
                note(Some(error.to_string()));
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    };
    note(None);
    let cursor = cursor(&context.directory, &shared);
    let known = cursor.load().unwrap_or_else(|error| {
        tracing::warn!(url = shared.url, %error, "the archive is walked from its beginning");
        None
    });
    let epoch = context.volume.state().position.epoch;
    let parts = ShipperParts {
        archive: archive.clone(),
        log: Arc::clone(&context.log),
        packs: Arc::clone(&context.packs),
        node: context.node,
        epoch,
        known,
        cursor: Arc::new(cursor),
        clock: Arc::clone(&context.clock),
        limits: ShipLimits::default(),
        lost: Some(Arc::new(KnownLosses::new(context.volume.clone(), lost_packs(&context)))),
    };
    let (shipper, handle) = Shipper::new(parts);
    let handle = handle.for_entries_behind(began);
    let shipper = if is_given_up { shipper.to_given_up() } else { shipper };
    let snapshots = handle.clone();
    state.lock().unwrap_or_else(PoisonError::into_inner).handle = Some(handle);
    context.changed();
    tokio::select! {
        // Its end stands in its status.
        _end = shipper.run() => {}
        () = take_snapshots(&context, &archive, &snapshots) => {}
        () = look_for_proofs(&archive, &state) => {}
    }
}

/// What a promotion left open: what may be gone, as long as the tree does not say it.
fn lost_packs(context: &Context) -> Option<LostPacks> {
    // The file as it is now: the node may have been promoted after it was opened.
    let config = NodeConfig::read(&context.directory);
    let config =
        config.inspect_err(|error| tracing::warn!(%error, "a lost pack would be waited for")).ok()?;
    let promoted = config.promoted.filter(crate::config::Promoted::lacks_bytes)?;
    Some(LostPacks { after: Lsn::new(promoted.data_lsn), upto: Lsn::new(promoted.metadata_lsn) })
}

/// Takes snapshots for as long as the archive is shipped to: a first one if it has none to begin with, later ones when a replay would take
/// too long.
async fn take_snapshots(context: &Context, archive: &Archive, shipped: &ShipHandle) {
    let mut last = loop {
        match newest_base(archive).await {
            Ok(last) => break last,
            Err(error) => {
                tracing::warn!(url = archive.url(), %error, "the snapshots of an archive cannot be listed");
            }
        }
        tokio::time::sleep(SNAPSHOT_LOOK).await;
    };
    loop {
        let durable = context.volume.durable().lsn;
        let needs_first = last.is_none() && archive.descriptor().base.lsn > Lsn::ROOT;
        let entries = durable.since(last.unwrap_or(archive.descriptor().base.lsn));
        if needs_first || snapshot_due(entries, entries.saturating_mul(ENTRY_BYTES)) {
            match write_base_now(context, archive, shipped).await {
                Ok(position) => last = Some(position.lsn),
                Err(error) => {
                    tracing::error!(url = archive.url(), %error, "no snapshot was taken; it is tried again");
                }
            }
        }
        tokio::time::sleep(SNAPSHOT_LOOK).await;
    }
}

/// Looks now and then whether somebody has verified or restored the archive: `status` says when that was.
async fn look_for_proofs(archive: &Archive, state: &Mutex<ShipState>) {
    loop {
        match Proof::newest(archive).await {
            Ok(found) => state.lock().unwrap_or_else(PoisonError::into_inner).proof = Some(found),
            Err(error) => {
                tracing::warn!(url = archive.url(), %error, "the proofs of an archive are not known");
            }
        }
        tokio::time::sleep(PROOF_LOOK).await;
    }
}

/// Whether an archive was begun in the middle of the history, and neither its first snapshot nor anything else came about.
pub(super) async fn is_unfinished(archive: &Archive) -> Result<bool, CliError> {
    if archive.descriptor().base.lsn <= Lsn::ROOT || newest_base(archive).await?.is_some() {
        return Ok(false);
    }
    let walked = walk(archive, None).await.map_err(failed)?;
    Ok(walked.slots.is_empty() && walked.seals.is_empty() && walked.dead.is_empty())
}

/// Refuses to go on with an archive that begins in the middle of the history and has no snapshot of where: what is shipped to it would be acknowledged,
/// and nothing can be restored from it alone.
pub(super) async fn check_begun(archive: &Archive) -> Result<(), CliError> {
    let base = archive.descriptor().base.lsn;
    if base > Lsn::ROOT && newest_base(archive).await?.is_none() {
        let url = archive.url();
        return Err(CliError::new(format!("{url} begins behind lsn {base} and has no snapshot of that: nothing can be restored from it"))
            .hint("give the archive another prefix; what lies there was never finished, or has lost what it began with"));
    }
    Ok(())
}

async fn newest_base(archive: &Archive) -> Result<Option<Lsn>, CliError> {
    let found = bases(archive).await.map_err(failed)?;
    Ok(found.into_iter().flatten().map(|base| base.state.position.lsn).max())
}

/// Writes a snapshot of now, once the archive holds the log up to there.
pub(super) async fn write_base_now(
    context: &Context,
    archive: &Archive,
    shipped: &ShipHandle,
) -> Result<Position, CliError> {
    let view = context.volume.view_with_state();
    let position = view.state().ok_or_else(|| CliError::new("the volume has no state yet"))?.position;
    let archived = shipped.archived(position.lsn).await.map_err(|end| match end {
        Some(end) => failed(end),
        None => CliError::new("the archive is not shipped to any more"),
    })?;
    write_base_of(context, archive, view, archived).await
}

/// Writes a snapshot of the tree that `view` sees, with every pack that the archive lacks. `archived` is how far the archive holds the log.
pub(super) async fn write_base_of(
    context: &Context,
    archive: &Archive,
    view: View,
    archived: Boundary,
) -> Result<Position, CliError> {
    let position = view.state().ok_or_else(|| CliError::new("the volume has no state yet"))?.position;
    // A snapshot must never be ahead of what this node holds for certain.
    context.log.durable().wait_for(position.lsn).await.map_err(failed)?;
    let log = Arc::clone(&context.log);
    let as_of = murphy_log::aside(move || entry_time(&*log, position.lsn)).await?;
    let base = NewBase {
        source: Arc::new(view),
        archived,
        as_of: as_of.unwrap_or_else(|| context.clock.wall()),
        now: context.clock.wall(),
        node: context.node,
        packs: Some(Arc::clone(&context.packs)),
    };
    let manifest = write_base(archive, base).await.map_err(failed)?;
    Ok(manifest.state.position)
}

/// When the durable entry `lsn` was decided; `None` if the log does not hold it any more.
pub(crate) fn entry_time(log: &dyn Log, lsn: Lsn) -> Result<Option<LogTime>, CliError> {
    if lsn < log.first() {
        return Ok(None);
    }
    let Some(frame) = log.read(lsn).map_err(failed)?.next().transpose().map_err(failed)? else {
        return Ok(None);
    };
    for entry in frame.iter() {
        let entry = entry.map_err(failed)?;
        if entry.lsn == lsn {
            return Ok(Some(entry.time));
        }
    }
    Ok(None)
}

const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
const SNAPSHOT_LOOK: Duration = Duration::from_secs(30);
const PROOF_LOOK: Duration = Duration::from_secs(5 * 60);
/// What an entry takes in the log, about.
const ENTRY_BYTES: u64 = 150;
