//! What an archive holds, for people who have nothing but its URL.
//!
//! Invariants:
//! - Nothing is written, and no node is needed.
//! - How far it goes is what a restore to the latest moment would give, not what a list shows. Packs are neither read nor counted.

use std::{collections::BTreeSet, time::Duration};

use futures::TryStreamExt;
use jiff::tz::TimeZone;
use murphy_log::{LogTime, Lsn, NodeId};
use serde::Serialize;

use crate::{
    base::BaseManifest,
    descriptor::{Archive, ArchiveKind},
    document::PositionText,
    layout,
    plan::{PlanError, RestorePlan, plan_restore},
    proof::Proof,
    registry::{Pin, Registry},
    seal::Seal,
    store::StoreError,
    target::{Target, show_time},
    walk::{Boundary, Head, listed_slots, read_head},
};

/// What an archive holds. It serializes as people want to read it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Holdings {
    /// The archive.
    pub url: String,
    /// The volume, hexadecimal.
    pub volume: String,
    /// The branch, hexadecimal.
    pub branch: String,
    /// What the volume was called when the archive was made.
    pub name: String,
    /// Whether it holds packs.
    pub kind: ArchiveKind,
    /// What dies together with it, as it was declared.
    pub failure_domain: String,
    /// When it was made.
    pub created: String,
    /// The first moment that can be restored, if one is known.
    pub first: Option<Moment>,
    /// The last one; `None` if nothing can be restored.
    pub last: Option<Moment>,
    /// How long before now that is, in milliseconds, from the clock of the source that dated it to that of whoever looks; negative if it is
    /// ahead. Since either may be wrong, it says nothing of whether the source lives.
    pub age_ms: Option<i64>,
    /// The last position.
    pub position: Option<PositionText>,
    /// Who has ended it, if nothing was archived since.
    pub sealed: Option<SealedBy>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<HeldSnapshot>,
    /// How many objects of the log are listed.
    pub log_objects: u64,
    /// Their bytes.
    pub log_bytes: u64,
    /// Of moments before this LSN bytes of files may be gone; 0 if of none.
    pub horizon: u64,
    /// Who reads at the moment, or died while reading.
    pub pins: Vec<Pin>,
    /// The last verification that is kept there.
    pub verified: Option<Verified>,
    /// What is seen to be damaged or missing on the way to the last moment: objects of the log are not read whole, as a verification does.
    pub problems: Vec<String>,
    /// What else whoever restores should know.
    pub notes: Vec<String>,
}

/// A moment in the history.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Moment {
    /// The last entry.
    pub lsn: u64,
    /// Its log time.
    pub time: String,
}

impl Moment {
    fn new(lsn: Lsn, time: LogTime, zone: &TimeZone) -> Moment {
        Moment { lsn: lsn.get(), time: show_time(time, zone) }
    }
}

/// A snapshot in an archive.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct HeldSnapshot {
    /// The moment.
    #[serde(flatten)]
    pub moment: Moment,
    /// Inodes in it.
    pub inodes: u64,
    /// Bytes of files in it.
    pub data_bytes: u64,
    /// Its length.
    pub bytes: u64,
}

/// The seal that ends an archive.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SealedBy {
    /// The node that sealed, hexadecimal.
    pub node: String,
    /// The epoch that it was to begin.
    pub next_epoch: u32,
    /// When, by its clock.
    pub time: String,
}

/// A verification.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Verified {
    /// When it ended.
    pub time: String,
    /// Up to where.
    pub lsn: u64,
    /// Of how many percent of the packs the contents were read.
    pub data_percent: u8,
    /// How much was found to be wrong.
    pub findings: usize,
}

/// Looks what `archive` holds at `now`. What is damaged is told in what is returned; an error is a store that does not answer.
pub async fn holdings(archive: &Archive, now: LogTime, zone: &TimeZone) -> Result<Holdings, HoldingsError> {
    let descriptor = archive.descriptor();
    let mut holdings = Holdings {
        url: archive.url().to_owned(),
        volume: descriptor.lineage.volume.to_string(),
        branch: descriptor.lineage.branch.to_string(),
        name: descriptor.name.clone(),
        kind: descriptor.kind,
        failure_domain: descriptor.failure_domain.clone(),
        created: show_time(descriptor.created, zone),
        first: None,
        last: None,
        age_ms: None,
        position: None,
        sealed: None,
        snapshots: Vec::new(),
        log_objects: 0,
        log_bytes: 0,
        horizon: 0,
        pins: Vec::new(),
        verified: None,
        problems: Vec::new(),
        notes: Vec::new(),
    };
    for (_, bytes) in listed_slots(archive, "").await? {
        holdings.log_objects += 1;
        holdings.log_bytes += bytes;
    }
    let mut registry = Registry::new(archive.clone());
    match registry.refresh().await {
        Ok(_) => holdings.pins = registry.view().pins.values().cloned().collect(),
        Err(error) => holdings.problems.push(error.to_string()),
    }
    match newest_proof(archive).await {
        Ok(proof) => holdings.verified = proof.map(|proof| Verified::of(&proof, zone)),
        Err(error) => holdings.problems.push(error),
    }
    match plan_restore(std::slice::from_ref(archive), Target::Latest, &BTreeSet::new(), zone).await {
        Ok(plan) => holdings.reaches(&plan, archive, (now, zone)).await?,
        Err(error @ PlanError::Survey(_)) => return Err(error.into()),
        Err(error) => holdings.problems.push(error.to_string()),
    }
    Ok(holdings)
}

impl Holdings {
    /// Takes over what a plan has found.
    async fn reaches(
        &mut self,
        plan: &RestorePlan,
        archive: &Archive,
        (now, zone): (LogTime, &TimeZone),
    ) -> Result<(), HoldingsError> {
        let (route, end) = (&plan.route, plan.route.end);
        let Some(survey) = route.surveys.first() else { return Ok(()) };
        self.position = Some(plan.position.clone());
        self.horizon = survey.horizon.unwrap_or_default().get();
        self.snapshots = survey.bases.iter().map(|base| HeldSnapshot::of(base, zone)).collect();
        let replayed = route.steps.iter().rev().find_map(|step| step.slot).map(|slot| slot.last_time);
        if let Some(time) = replayed.or(route.snapshot.as_ref().map(|(_, base)| base.as_of)) {
            self.last = Some(Moment::new(end.lsn, time, zone));
            self.age_ms = Some(apart_ms(now, time));
        }
        let ends = |seal: &&Seal| (seal.base.lsn, seal.base.hash) == (end.lsn, end.hash);
        let seal = survey.seals.iter().filter(ends).max_by_key(|seal| seal.next.number);
        self.sealed = seal.map(|seal| SealedBy {
            node: NodeId::to_string(&seal.node),
            next_epoch: seal.next.number,
            time: show_time(seal.time, zone),
        });
        self.first = match first_slot(archive, survey.floor).await? {
            Some(first) => Some(Moment::new(first.0, first.1, zone)),
            None => self.snapshots.first().map(|snapshot| snapshot.moment.clone()),
        };
        self.problems.extend(plan.problems.iter().cloned());
        self.notes.extend(plan.notes.iter().cloned());
        Ok(())
    }
}

impl HeldSnapshot {
    fn of(base: &BaseManifest, zone: &TimeZone) -> HeldSnapshot {
        let usage = base.state.usage;
        let moment = Moment::new(base.state.position.lsn, base.as_of, zone);
        HeldSnapshot { moment, inodes: usage.inodes, data_bytes: usage.bytes, bytes: base.bytes() }
    }
}

impl Verified {
    fn of(proof: &Proof, zone: &TimeZone) -> Verified {
        Verified {
            time: show_time(LogTime::from_nanos(proof.ended), zone),
            lsn: proof.position.lsn,
            data_percent: proof.data_percent,
            findings: proof.findings.len(),
        }
    }
}

/// From `time` to `now`; negative if it is ahead.
fn apart_ms(now: LogTime, time: LogTime) -> i64 {
    // Milliseconds of 64 bits of nanoseconds fit.
    let whole = |apart: Duration| i64::try_from(apart.as_millis()).unwrap_or(i64::MAX);
    whole(now.since(time)) - whole(time.since(now))
}

/// The first entry of the volume and its time, if the archive reaches back to it.
async fn first_slot(archive: &Archive, floor: Lsn) -> Result<Option<(Lsn, LogTime)>, StoreError> {
    let base = archive.descriptor().base;
    let begins = Boundary::after(base);
    if base.lsn != Lsn::ROOT || floor > begins.next() {
        return Ok(None);
    }
    match read_head(archive, &begins.slot_name()).await {
        Ok(Some(Head::Slot(slot))) => Ok(Some((slot.first, slot.first_time))),
        // What is damaged is told by the plan, if it is on the way.
        Ok(_) => Ok(None),
        Err(crate::walk::WalkError::Store(error)) => Err(error),
        Err(_) => Ok(None),
    }
}

/// The verification that ended last; the text says why it cannot be read.
async fn newest_proof(archive: &Archive) -> Result<Option<Proof>, String> {
    let listed: Result<Vec<_>, StoreError> = archive.store().list(layout::PROOF_FOLDER).try_collect().await;
    let newest = listed.map_err(|error| error.to_string())?.into_iter().map(|listed| listed.name).max();
    let Some(newest) = newest else { return Ok(None) };
    Proof::read(archive, &newest).await.map(Some).map_err(|error| error.to_string())
}

/// Why nothing is known of an archive.
#[derive(Debug, thiserror::Error)]
pub enum HoldingsError {
    /// It cannot be surveyed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use murphy_fs::Fence;
    use murphy_log::{Epoch, EpochId, ManualClock};

    use super::*;
    use crate::{
        fence::ArchiveFence,
        testing::{Fault, put, scene, snapshot},
    };

    async fn look(archive: &Archive, now: LogTime) -> Holdings {
        holdings(archive, now, &TimeZone::UTC).await.unwrap()
    }

    /// The fear: on the morning after, somebody has the URL of an archive and nothing else, and is told more, or less, than a restore would give.
    #[tokio::test]
    async fn an_archive_says_by_itself_what_a_restore_would_give() {
        let (store, archive, mut source) = scene().await;
        let empty = look(&archive, source.now()).await;
        assert_eq!((empty.last, empty.first, empty.log_objects), (None, None, 0));
        let frames = source.frames(6, 2);
        put(&store, &frames[..3]).await;
        put(&store, &frames[3..]).await;
        let manifest = snapshot(&archive, &source).await;
        let end = source.state().position;
        let now = LogTime::from_nanos(source.now().as_nanos() + 5_000_000_000);
        let held = look(&archive, now).await;
        assert_eq!(held.first.as_ref().unwrap().lsn, frames[0].first().get());
        assert_eq!(held.last.as_ref().unwrap().lsn, end.lsn.get());
        assert_eq!(held.position.as_ref().unwrap().hash, end.hash.to_string());
        assert_eq!((held.log_objects, held.snapshots.len(), &held.sealed), (2, 1, &None));
        assert_eq!(held.snapshots[0].inodes, manifest.state.usage.inodes);
        assert!(held.age_ms.unwrap() >= 5_000 && held.problems.is_empty(), "{held:?}");
        assert_eq!((held.name.as_str(), held.failure_domain.as_str()), ("test", "elsewhere"));
        // What lies behind a hole is not restored, and not said to be.
        let later = source.frames(4, 1);
        put(&store, &later[2..]).await;
        let cut = look(&archive, now).await;
        assert_eq!(cut.last.unwrap().lsn, end.lsn.get());
        assert!(cut.problems.iter().any(|problem| problem.contains("is missing")), "{:?}", cut.problems);
    }

    /// The fear: a source that is gone is taken for one that lives, for a year, because its clock was ahead.
    #[tokio::test]
    async fn an_entry_dated_ahead_of_the_looker_is_not_called_new() {
        let (store, archive, mut source) = scene().await;
        put(&store, &source.frames(2, 2)).await;
        let last = source.now().as_nanos();
        let mut seen = Vec::new();
        for behind in [7_200, 3_600] {
            let now = LogTime::from_nanos(last - behind * 1_000_000_000);
            seen.push(look(&archive, now).await.age_ms.unwrap());
        }
        assert!(seen.iter().all(|age| *age < 0), "{seen:?}");
        assert_eq!(seen[1] - seen[0], 3_600_000);
    }

    /// The fear: an archive that a successor has ended is taken for one of a living source.
    #[tokio::test]
    async fn an_archive_that_was_sealed_says_by_whom() {
        let (store, archive, mut source) = scene().await;
        put(&store, &source.frames(2, 2)).await;
        let (node, next) =
            (NodeId::from_bytes([7; 16]), Epoch { number: 2, id: EpochId::from_bytes([2; 16]) });
        let fence = ArchiveFence::new(archive.clone(), node, Arc::new(ManualClock::default()), None);
        fence.seal(source.state().position, next).await.unwrap();
        let sealed = look(&archive, source.now()).await.sealed.unwrap();
        assert_eq!((sealed.node, sealed.next_epoch), (node.to_string(), 2));
    }

    /// The fear: an archive that is damaged says nothing at all, or that it is whole; one that does not answer is called empty.
    #[tokio::test]
    async fn what_is_damaged_is_told_and_what_does_not_answer_is_an_error() {
        let (store, archive, mut source) = scene().await;
        let frames = source.frames(4, 2);
        let end = put(&store, &frames[..2]).await;
        put(&store, &frames[2..]).await;
        let second = layout::slot(frames[2].epoch().number, frames[2].first());
        store.fail(&second, Fault::NoBytes, usize::MAX);
        let held = look(&archive, source.now()).await;
        assert_eq!(held.last.unwrap().lsn, end.lsn.get());
        assert!(!held.problems.is_empty());
        store.fail("", Fault::GetFails, usize::MAX);
        holdings(&archive, source.now(), &TimeZone::UTC).await.unwrap_err();
    }
}
