//! Looking at an archive before a restore: which snapshots, slots and seals there are. What it finds out is data for the plan.
//!
//! Invariants:
//! - Lists are hints: what they miss at the end is found by asking for the next name.
//! - An object that cannot be used is a problem that is told, not the end of the survey: another archive may have it.

use std::collections::BTreeSet;

use futures::StreamExt;
use murphy_log::{Lsn, Position};

use crate::{
    base::{ReadBaseError, bases},
    descriptor::{Archive, ArchiveKind},
    layout,
    registry::{Registry, RegistryError},
    seal::{Occupant, SEAL_BYTES},
    slot::{SLOT_BYTES_MAX, Slot, end_time},
    store::StoreError,
    surveyed::{FrameEnd, Survey, is_of_lost_tail, is_usable, next_step},
    target::Target,
    walk::{Boundary, HEADS_AT_ONCE, Head, TURNS_MAX, WalkError, listed_slots, read_head},
};

/// Surveys `archive` for a restore to `target`. Snapshots whose folder is in `excluded` are left out.
pub(crate) async fn survey(
    archive: &Archive,
    target: &Target,
    excluded: &BTreeSet<String>,
) -> Result<Survey, SurveyError> {
    Survey::of(archive, target, excluded).await
}

impl Survey {
    async fn of(
        archive: &Archive,
        target: &Target,
        excluded: &BTreeSet<String>,
    ) -> Result<Survey, SurveyError> {
        let mut survey = Survey::empty(archive.url(), archive.descriptor().base);
        survey.read_registry(archive).await?;
        for base in bases(archive).await? {
            match base {
                Ok(base) if excluded.contains(&base.folder) => {}
                Ok(base) => survey.bases.push(base),
                Err(error) => survey.problems.push(error.to_string()),
            }
        }
        survey.bases.sort_by_key(|base| base.state.position.lsn);
        let from = survey.start_for(target);
        survey.add_listed(archive, from.lsn).await?;
        // The seals are known only now: a snapshot of a tail that lost a take-over is no start.
        let sure = survey.start_for(target);
        if sure != from {
            survey.add_listed(archive, sure.lsn).await?;
        }
        let from = sure;
        survey.add_unlisted(archive, from).await?;
        survey.problems.sort();
        survey.problems.dedup();
        Ok(survey)
    }

    /// What may be gone is not looked at: it may go while it is read.
    async fn read_registry(&mut self, archive: &Archive) -> Result<(), SurveyError> {
        let mut registry = Registry::new(archive.clone());
        match registry.refresh().await {
            Ok(_) => {}
            Err(RegistryError::Store(error)) => return Err(error.into()),
            // What was read before it still holds.
            Err(error) => self.problems.push(format!("what may be gone is not known: {error}")),
        }
        let view = registry.view();
        self.abandoned.clone_from(&view.abandoned);
        self.floor = view.floor.map_or(Lsn::default(), |(_, first)| first);
        if archive.descriptor().kind == ArchiveKind::Full {
            let branch = archive.lineage().branch.to_string();
            self.horizon = Some(view.horizons.get(&branch).copied().unwrap_or_default());
        }
        Ok(())
    }

    /// Where a replay to `target` begins.
    fn start_for(&self, target: &Target) -> Position {
        let mut usable = self.bases.iter().rev().filter(|base| is_usable(base, target));
        let kept = usable.find(|base| !is_of_lost_tail(base, self, std::slice::from_ref(self)));
        kept.map_or(self.base, |base| base.state.position)
    }

    fn add(&mut self, name: &str, head: Head, archive: &Archive) {
        let lineage = match &head {
            Head::Slot(slot) => slot.lineage,
            Head::Seal(seal) => seal.lineage,
        };
        let place = match &head {
            Head::Slot(slot) => (slot.epoch.number, slot.first),
            Head::Seal(seal) => (seal.epoch.number, seal.base.lsn.next()),
        };
        let key = layout::parse_slot(name).filter(|(epoch, first, _)| (*epoch, *first) == place);
        let (Some(key), true) = (key, lineage == archive.lineage()) else {
            self.problems.push(format!("{} belongs elsewhere", archive.store().object(name)));
            return;
        };
        match head {
            Head::Slot(slot) if slot.first < self.floor => {}
            Head::Slot(slot) => {
                self.slots.insert(key, slot);
            }
            Head::Seal(seal) if !self.seals.contains(&seal) => self.seals.push(seal),
            Head::Seal(_) => {}
        }
    }

    async fn add_listed(&mut self, archive: &Archive, from: Lsn) -> Result<(), SurveyError> {
        let mut names: Vec<(Lsn, String, u64)> = listed_slots(archive, "")
            .await?
            .into_iter()
            .filter_map(|(name, bytes)| layout::parse_slot(&name).map(|(_, first, _)| (first, name, bytes)))
            .collect();
        names.sort();
        // The slot that holds the entry after `from` begins before it.
        let start = names.partition_point(|(first, ..)| *first <= from.next()).saturating_sub(NAMES_BEFORE);
        let needed = names.split_off(start);
        // Seals are wanted from all times, and known by their length: they judge snapshots too.
        let seals = names.into_iter().filter(|(_, _, bytes)| *bytes == SEAL_BYTES as u64);
        let heads = futures::stream::iter(seals.chain(needed)).map(|(_, name, _)| async move {
            let head = read_head(archive, &name).await;
            (name, head)
        });
        let mut heads = heads.buffer_unordered(HEADS_AT_ONCE);
        while let Some((name, head)) = heads.next().await {
            match head {
                Ok(Some(head)) => self.add(&name, head, archive),
                Ok(None) => {
                    self.problems.push(format!("{} is listed and missing", archive.store().object(&name)));
                }
                Err(error) => self.problems.push(error.to_string()),
            }
        }
        self.mark_strays();
        Ok(())
    }

    /// Follows the chain to its end and asks for the names that would come next.
    async fn add_unlisted(&mut self, archive: &Archive, from: Position) -> Result<(), SurveyError> {
        let mut at = Boundary::after(from);
        loop {
            if let Some(step) = next_step(std::slice::from_ref(self), &BTreeSet::new(), &at) {
                at = step.end;
                continue;
            }
            let mut dead = None;
            let key = |at: &Boundary| (at.epoch.number, at.next(), at.turn);
            while at.turn < TURNS_MAX && self.slots.contains_key(&key(&at)) {
                let is_open = !self.abandoned.contains(&key(&at));
                dead = dead.or_else(|| is_open.then(|| at.slot_name()));
                at.turn += 1;
            }
            let name = at.slot_name();
            match read_head(archive, &name).await {
                Ok(None) => {
                    let told = dead.map(|dead| archive.store().object(&dead));
                    self.problems.extend(told.map(|object| format!("{object} {DEAD_END}")));
                    return Ok(());
                }
                Ok(Some(head)) => {
                    let known = (self.slots.len(), self.seals.len());
                    self.add(&name, head, archive);
                    if known == (self.slots.len(), self.seals.len()) {
                        return Ok(());
                    }
                    self.mark_strays();
                    let is_seal = matches!(head, Head::Seal(_));
                    if is_seal && next_step(std::slice::from_ref(self), &BTreeSet::new(), &at).is_none() {
                        let object = archive.store().object(&name);
                        self.problems.push(format!("{object} {DEAD_END}"));
                        return Ok(());
                    }
                }
                Err(error) => {
                    let text = error.to_string();
                    if !self.problems.contains(&text) {
                        self.problems.push(text);
                    }
                    return Ok(());
                }
            }
        }
    }
}

/// Reads a whole slot and verifies what can be verified without what comes before it.
pub(crate) async fn read_slot(archive: &Archive, name: &str) -> Result<Slot, ReadSlotError> {
    let bytes = archive.store().get(name, SLOT_BYTES_MAX).await?;
    let object = || archive.store().object(name);
    let damaged = |reason: String| ReadSlotError::Damaged { object: object(), reason };
    match Occupant::decode(&bytes).map_err(|error| damaged(error.to_string()))? {
        Occupant::Slot(slot) if slot.header.lineage != archive.lineage() => {
            Err(damaged("it belongs to another volume or branch".to_owned()))
        }
        Occupant::Slot(slot) => {
            let place = Some((slot.header.epoch.number, slot.header.first));
            match layout::parse_slot(name).map(|(epoch, first, _)| (epoch, first)) == place {
                true => Ok(slot),
                false => Err(damaged("it belongs under another name".to_owned())),
            }
        }
        Occupant::Seal(_) => Err(damaged("it is a seal".to_owned())),
    }
}

/// Where a restore can stop inside the slot `name`.
pub(crate) async fn frame_ends(archive: &Archive, name: &str) -> Result<Vec<FrameEnd>, ReadSlotError> {
    let slot = read_slot(archive, name).await?;
    let object = || archive.store().object(name);
    let frames = slot.verify_alone(archive.keys());
    let frames =
        frames.map_err(|error| ReadSlotError::Damaged { object: object(), reason: error.to_string() })?;
    Ok(frames.iter().map(|frame| FrameEnd { position: frame.position(), time: end_time(frame) }).collect())
}

/// Why a slot cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadSlotError {
    /// It is not what was written.
    #[error("{object} is damaged: {reason}")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// The store does not have it, or does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why an archive cannot be surveyed.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// Its snapshots are not known.
    #[error(transparent)]
    Bases(#[from] ReadBaseError),
    /// Its slots are not known.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

const DEAD_END: &str = "does not continue what comes before it";
/// So many names before the first one needed are looked at too: one of them holds it.
const NAMES_BEFORE: usize = 16;
