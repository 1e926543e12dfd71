//! Executing a plan: the tree into an index, its bytes into a block store.
//!
//! Invariants:
//! - The tree ends at exactly the planned position, and its digest, computed from the rows, is that of the log.
//! - What is damaged or missing in one archive is taken from the next one that has the same entries.
//! - Archives are only read.

mod rows;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::StreamExt;
use murphy_fs::{
    BlockStore, BlockStoreError, HeldPack, Index, IndexError, IndexSnapshot, PackMeta, PackNumber, PackRow,
    ReadSnapshotError, ReplayBudget, ReplayError, SnapshotReader, check_digest, look_for_pack, replay,
};
use murphy_log::{BranchId, Digest, Frame, Position, State, VolumeId};
use tokio::sync::mpsc;

use crate::{
    base::{BaseManifest, PackRowError, live_packs, read_base},
    descriptor::Archive,
    pack::{CopyPackError, copy_pack},
    plan::RestorePlan,
    survey::read_slot,
    surveyed::{Step, next_step},
    walk::Boundary,
};
pub use rows::{planned_rows, planned_usage};

/// How far a restore has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RestoreProgress {
    /// Rows loaded from the snapshot.
    pub rows: u64,
    /// Entries read from slots.
    pub entries: u64,
    /// Packs that are there, copied or not.
    pub packs: u64,
    /// Bytes of packs copied.
    pub pack_bytes: u64,
}

/// Called with the progress, from any thread.
pub type OnProgress = Arc<dyn Fn(RestoreProgress) + Send + Sync>;

/// Brings the tree that `plan` leads to into `index`, which holds nothing, and proves it.
///
/// `archives` are those that the plan was made of, in the same order. After an error the index is to be deleted. After
/// [`RestoreError::Snapshot`] a plan without that snapshot may still succeed, with a new index.
pub async fn restore_tree(
    archives: &[Archive],
    plan: &RestorePlan,
    index: Arc<dyn Index>,
    progress: OnProgress,
) -> Result<State, RestoreError> {
    let route = &plan.route;
    let first = archives.first().ok_or(RestoreError::NoArchive)?;
    let start = match &route.snapshot {
        Some((archive, base)) => {
            load_base(&archives[*archive], base, Arc::clone(&index), Arc::clone(&progress)).await?
        }
        None => {
            index.ingest(&mut std::iter::empty(), &route.start)?;
            route.start
        }
    };
    let (sender, receiver) = mpsc::channel(SLOTS_AHEAD);
    let producer =
        Frames { archives, plan, at: Boundary::after(start.position), sender, progress: &progress };
    let target = Arc::clone(&index);
    let replaying = murphy_log::aside(move || {
        let frames = Received { receiver, current: Vec::new().into_iter() };
        replay(&*target, start, frames, ReplayBudget::default())
    });
    let produced = producer.run().await;
    let replayed = replaying.await;
    // If the replay stopped first the producer only knows that nobody takes its frames.
    let state = match produced {
        Err(RestoreError::Stopped) | Ok(()) => replayed?,
        Err(error) => return Err(error),
    };
    if state.position != route.end {
        return Err(RestoreError::Elsewhere { found: state.position, planned: route.end });
    }
    let keys = first.keys().clone();
    let check = murphy_log::aside(move || check_digest(&*index.snapshot(), &keys)).await?;
    if check.digest != state.digest {
        return Err(RestoreError::Digest { found: check.digest, expected: state.digest });
    }
    Ok(state)
}

async fn load_base(
    archive: &Archive,
    base: &BaseManifest,
    index: Arc<dyn Index>,
    progress: OnProgress,
) -> Result<State, RestoreError> {
    let reader = read_base(archive, base);
    let loading = murphy_log::aside(move || {
        let reader = SnapshotReader::open(reader)?;
        let header = *reader.header();
        let state = reader.load_into(&*index, &|done| {
            progress(RestoreProgress { rows: done.rows, ..RestoreProgress::default() });
        })?;
        Ok::<_, ReadSnapshotError>((header, state))
    });
    let (header, state) = loading.await.map_err(|source| RestoreError::Snapshot {
        folder: base.folder.clone(),
        url: archive.url().to_owned(),
        source,
    })?;
    check_header(archive, base, (header.volume, header.branch), state)?;
    Ok(state)
}

/// Refuses a snapshot that is not the one that its manifest describes.
fn check_header(
    archive: &Archive,
    base: &BaseManifest,
    (volume, branch): (VolumeId, BranchId),
    state: State,
) -> Result<(), RestoreError> {
    let lineage = archive.lineage();
    if (volume, branch) != (lineage.volume, lineage.branch) || state != base.state {
        let folder = base.folder.clone();
        return Err(RestoreError::OtherSnapshot { folder, url: archive.url().to_owned() });
    }
    Ok(())
}

/// Reads the frames of a route, several slots ahead.
struct Frames<'a> {
    archives: &'a [Archive],
    plan: &'a RestorePlan,
    /// What has been sent.
    at: Boundary,
    sender: mpsc::Sender<Vec<Frame>>,
    progress: &'a OnProgress,
}

impl Frames<'_> {
    async fn run(mut self) -> Result<(), RestoreError> {
        let archives = self.archives;
        let steps =
            self.plan.route.steps.iter().map(|step| async move { (step, fetch(archives, step).await) });
        let fetched = futures::stream::iter(steps.collect::<Vec<_>>());
        let mut fetched = fetched.buffered(SLOTS_AHEAD);
        while let Some((step, frames)) = fetched.next().await {
            let sent = match frames {
                Ok(frames) => self.send(frames, &step.end).await,
                Err(error) => Err(error),
            };
            match sent {
                Ok(()) => {}
                Err(error @ RestoreError::Slot { .. }) => self.go_around(step, error).await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends what lies between where we are and `end`.
    async fn send(&mut self, frames: Vec<Frame>, end: &Boundary) -> Result<(), RestoreError> {
        let mut wanted = Vec::new();
        let mut at = self.at.position;
        for frame in frames {
            if frame.last() <= at.lsn {
                continue;
            }
            if frame.last() > end.position.lsn {
                break;
            }
            let follows = frame.header().follows(&at);
            follows.map_err(|error| RestoreError::Slot { reason: error.to_string() })?;
            at = frame.position();
            wanted.push(frame);
        }
        if (at.lsn, at.hash) != (end.position.lsn, end.position.hash) {
            let reason = format!("the slot ends at {at}, {} was expected", end.position);
            return Err(RestoreError::Slot { reason });
        }
        self.at = Boundary::before(at, end.epoch);
        let entries = at.lsn.since(self.plan.route.start.position.lsn);
        (self.progress)(RestoreProgress { entries, ..RestoreProgress::default() });
        if wanted.is_empty() {
            return Ok(());
        }
        self.sender.send(wanted).await.map_err(|_| RestoreError::Stopped)
    }

    /// Reads what `step` should have brought from whichever objects are intact.
    async fn go_around(&mut self, step: &Step, mut why: RestoreError) -> Result<(), RestoreError> {
        let route = &self.plan.route;
        let mut excluded = BTreeSet::from([(step.archive, step.name())]);
        tracing::warn!(object = step.name(), error = %why, "an object is taken from elsewhere");
        while self.at.position.lsn < step.end.position.lsn {
            let Some(mut next) = next_step(&route.surveys, &excluded, &self.at) else {
                return Err(why);
            };
            let wanted = step.end.position;
            if next.end.position.lsn > wanted.lsn {
                next.end.position = wanted;
            }
            let sent = match fetch(self.archives, &next).await {
                Ok(frames) => self.send(frames, &next.end).await,
                Err(error) => Err(error),
            };
            match sent {
                Ok(()) => {}
                Err(error @ RestoreError::Slot { .. }) => {
                    excluded.insert((next.archive, next.name()));
                    why = error;
                }
                Err(error) => return Err(error),
            }
        }
        self.at = step.end;
        Ok(())
    }
}

async fn fetch(archives: &[Archive], step: &Step) -> Result<Vec<Frame>, RestoreError> {
    if step.slot.is_none() {
        return Ok(Vec::new());
    }
    let (archive, name) = (&archives[step.archive], step.name());
    let slot = read_slot(archive, &name).await;
    let slot = slot.map_err(|error| RestoreError::Slot { reason: error.to_string() })?;
    let keys = archive.keys().clone();
    let verified = murphy_log::aside(move || slot.verify_alone(&keys)).await;
    let object = || archive.store().object(&name);
    verified.map_err(|error| RestoreError::Slot { reason: format!("{} is damaged: {error}", object()) })
}

/// The replay's end of the channel.
struct Received {
    receiver: mpsc::Receiver<Vec<Frame>>,
    current: std::vec::IntoIter<Frame>,
}

impl Iterator for Received {
    type Item = Result<Frame, std::convert::Infallible>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(frame) = self.current.next() {
                return Some(Ok(frame));
            }
            self.current = self.receiver.blocking_recv()?.into_iter();
        }
    }
}

/// What became of the packs of a tree.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[must_use]
pub struct PackReport {
    /// Packs that were copied.
    pub copied: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packs that were there already, intact.
    pub present: u64,
    /// Of those that were copied, how many replaced something damaged that was there under their name.
    pub replaced: u64,
    /// Packs that no archive has intact.
    pub missing: u64,
    /// Packs that no archive has shown, and one that may have them did not answer.
    pub unanswered: u64,
    /// Whether the time was up before all were looked for.
    pub is_cut_short: bool,
    /// Some of those that are missing or were not answered for, and why.
    pub examples: Vec<String>,
    /// Those that are missing and that the tree does not call so: 8 bytes each.
    pub uncalled: Vec<PackNumber>,
}

impl PackReport {
    /// Whether every byte of the tree is known to be there.
    pub fn is_complete(&self) -> bool {
        self.missing == 0 && self.unanswered == 0 && !self.is_cut_short
    }

    fn miss(&mut self, (number, row): (PackNumber, &PackRow), reason: &str) {
        self.missing += 1;
        self.uncalled.extend((!row.is_missing()).then_some(number));
        self.example(row, reason);
    }

    fn example(&mut self, row: &PackRow, reason: &str) {
        if self.examples.len() < EXAMPLES_MAX {
            let known =
                if row.is_missing() { " (the volume knows that it was lost with a source)" } else { "" };
            self.examples.push(format!("pack {}: {reason}{known}", row.meta().name));
        }
    }
}

/// Copies every pack that the tree refers to from the first of `sources` that has it intact to `target`. What is there already is read,
/// and passed over if it is intact, so that a copy that was broken off goes on; otherwise it is replaced.
pub async fn restore_packs(
    sources: &[Arc<dyn BlockStore>],
    tree: &Arc<dyn IndexSnapshot>,
    target: Arc<dyn BlockStore>,
    progress: OnProgress,
) -> Result<PackReport, RestoreError> {
    let copies = live_packs(tree).map(|row| {
        let target = &target;
        async move {
            let (number, row) = row?;
            Ok::<_, PackRowError>((number, row, restore_pack(&row.meta(), sources, target).await))
        }
    });
    let mut copies = Box::pin(copies.buffer_unordered(PACKS_AT_ONCE));
    let mut report = PackReport::default();
    while let Some(copied) = copies.next().await {
        match copied? {
            (_, _, Ok(PackOutcome::Present)) => report.present += 1,
            (_, _, Ok(PackOutcome::Copied { bytes, is_replaced })) => {
                report.copied += 1;
                report.replaced += u64::from(is_replaced);
                report.bytes += bytes;
            }
            (number, row, Err(PackFailure::Missing(reason))) => report.miss((number, &row), &reason),
            (_, _, Err(PackFailure::Target(error))) => return Err(error.into()),
        }
        let (packs, pack_bytes) = (report.present + report.copied, report.bytes);
        progress(RestoreProgress { packs, pack_bytes, ..RestoreProgress::default() });
    }
    Ok(report)
}

/// Asks which packs of a tree none of `sources` shows, until it knows or `patience` is over; nothing is copied, and no byte of a pack is read.
pub async fn count_packs(
    sources: &[Arc<dyn BlockStore>],
    tree: &Arc<dyn IndexSnapshot>,
    patience: Duration,
    progress: OnProgress,
) -> Result<PackReport, RestoreError> {
    let looks = live_packs(tree).map(|row| async move {
        let (number, row) = row?;
        Ok::<_, PackRowError>((number, row, look_in_all(&row.meta(), sources).await))
    });
    let mut looks = Box::pin(looks.buffer_unordered(LOOKS_AT_ONCE));
    let mut report = PackReport::default();
    let looking = async {
        while let Some(look) = looks.next().await {
            match look? {
                (_, _, Look::Seen) => report.present += 1,
                (number, row, Look::Missing(reason)) => report.miss((number, &row), &reason),
                (_, row, Look::Unanswered(reason)) => {
                    report.unanswered += 1;
                    report.example(&row, &reason);
                }
            }
            let packs = report.present + report.missing + report.unanswered;
            progress(RestoreProgress { packs, ..RestoreProgress::default() });
        }
        Ok::<_, RestoreError>(())
    };
    match tokio::time::timeout(patience, looking).await {
        Ok(looked) => looked?,
        Err(_) => report.is_cut_short = true,
    }
    Ok(report)
}

/// What is seen of a pack in archives.
enum Look {
    Seen,
    /// All have said that they do not have it as it should be; the text says how.
    Missing(String),
    /// None that answered has it.
    Unanswered(String),
}

async fn look_in_all(meta: &PackMeta, sources: &[Arc<dyn BlockStore>]) -> Look {
    let (mut reasons, mut all_answered) = (Vec::new(), true);
    for source in sources {
        match source.size(meta.name).await {
            Ok(size) if size == meta.stored_len => return Look::Seen,
            Ok(size) => reasons.push(format!("{size} bytes in {}", source.label())),
            Err(error) => {
                all_answered &= matches!(error, BlockStoreError::NotFound { .. });
                reasons.push(error.to_string());
            }
        }
    }
    let reasons = reasons.join("; ");
    if all_answered { Look::Missing(reasons) } else { Look::Unanswered(reasons) }
}

enum PackOutcome {
    /// It was there already.
    Present,
    Copied {
        bytes: u64,
        /// Whether something damaged was there before.
        is_replaced: bool,
    },
}

enum PackFailure {
    /// No source has it; the text says why not.
    Missing(String),
    /// The target does not take it.
    Target(CopyPackError),
}

async fn restore_pack(
    meta: &PackMeta,
    sources: &[Arc<dyn BlockStore>],
    target: &Arc<dyn BlockStore>,
) -> Result<PackOutcome, PackFailure> {
    let found = look_for_pack(&**target, meta).await;
    let damage = match found.map_err(|error| PackFailure::Target(error.into()))? {
        HeldPack::Intact => return Ok(PackOutcome::Present),
        HeldPack::Damaged(damage) => Some(damage),
        HeldPack::Nothing => None,
    };
    let mut reasons = Vec::new();
    for source in sources {
        match copy_pack(meta, &**source, &**target).await {
            Ok(bytes) => return Ok(PackOutcome::Copied { bytes, is_replaced: damage.is_some() }),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    reasons.extend(damage.map(|damage| format!("{damage}, in {}", target.label())));
    // Whether the target or every source is at fault is seen by asking the target once more.
    match look_for_pack(&**target, meta).await {
        Err(error) => Err(PackFailure::Target(error.into())),
        Ok(_) => Err(PackFailure::Missing(reasons.join("; "))),
    }
}

/// Why a tree was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No archive was given.
    #[error("no archive to restore from")]
    NoArchive,
    /// The snapshot is damaged, or cannot be read.
    #[error("{folder} in {url}: {source}")]
    Snapshot {
        /// Its folder; leave it out of the next plan.
        folder: String,
        /// Its archive.
        url: String,
        /// What is wrong.
        source: ReadSnapshotError,
    },
    /// The snapshot is of another tree than its manifest says.
    #[error("{folder} in {url} is not the snapshot that its manifest describes")]
    OtherSnapshot {
        /// Its folder; leave it out of the next plan.
        folder: String,
        /// Its archive.
        url: String,
    },
    /// A slot cannot be used, and no archive has its entries otherwise.
    #[error("{reason}")]
    Slot {
        /// Which, and why.
        reason: String,
    },
    /// The replay stopped.
    #[error("the replay stopped")]
    Stopped,
    /// The frames could not be applied.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The replay led elsewhere.
    #[error("the replay ended at {found}, planned was {planned}")]
    Elsewhere {
        /// Where it ended.
        found: Position,
        /// Where it should have.
        planned: Position,
    },
    /// The rows are not those of the log.
    #[error("the restored tree has the digest {found}, the log says {expected}")]
    Digest {
        /// Of the rows.
        found: Digest,
        /// Of the log.
        expected: Digest,
    },
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The tree's packs are not known.
    #[error(transparent)]
    PackRow(#[from] PackRowError),
    /// The target of the packs does not take them.
    #[error(transparent)]
    Target(#[from] CopyPackError),
}

/// So many slots are fetched ahead.
const SLOTS_AHEAD: usize = 8;
const PACKS_AT_ONCE: usize = 16;
/// So many packs are asked for at once where none is read.
const LOOKS_AT_ONCE: usize = 64;
/// So many missing packs are named.
const EXAMPLES_MAX: usize = 100;

#[cfg(test)]
mod tests;
