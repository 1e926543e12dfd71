//! The plan of a restore: what would be read, from where, and how long it would take. Pure, once the archives have been surveyed.
//!
//! Invariants:
//! - A plan leads to one exact position. A target outside what the archives have is an error that names the window.
//! - Of an epoch that was sealed nothing beyond its seal is used, whatever archive it lies in and whenever it landed, if anything is archived of the
//!   epoch that the seal began. What is left out because of that is told.
//! - Each object comes from the first archive that has it.

use std::collections::BTreeSet;

use jiff::tz::TimeZone;
use murphy_log::{Digest, LogTime, Lsn, Position, State, Usage};
use serde::Serialize;

use crate::{
    base::BaseManifest,
    descriptor::Archive,
    document::PositionText,
    layout,
    seal::Seal,
    slot::SlotHeader,
    survey::{SurveyError, frame_ends, survey},
    surveyed::{FrameEnd, Step, Survey, beyond_seals, disagreement, is_of_lost_tail, is_usable, next_step},
    target::{Target, show_time},
    walk::{Boundary, HOLE_LOOKS, HOLE_PAUSE},
};
use murphy_fs::Table;

/// What a restore would do. It serializes as people want to read it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct RestorePlan {
    /// The archives, in the order in which they are asked.
    pub archives: Vec<String>,
    /// Where it leads.
    pub position: PositionText,
    /// The log time there.
    pub as_of: String,
    /// What the replay begins with; `None` for the empty tree before the first entry.
    pub snapshot: Option<PlannedSnapshot>,
    /// The slots that are replayed, in order.
    pub slots: Vec<PlannedSlot>,
    /// How many entries are replayed.
    pub entries: u64,
    /// How many bytes of log and snapshot are read.
    pub bytes: u64,
    /// How many packs the snapshot knew of, and how many bytes of data it had: what a copy of the data costs at most, as far as
    /// it can be known before the tree is there.
    pub packs: u64,
    /// Bytes of file data in the snapshot.
    pub data_bytes: u64,
    /// How long the tree would take; its data, if it is copied, comes on top.
    pub expected_minutes: f64,
    /// The same for the data.
    pub expected_data_minutes: f64,
    /// Objects that are damaged or missing, whether they are needed or not.
    pub problems: Vec<String>,
    /// Archives from which packs of that moment may have expired, as they were told to; another one has them. Seals of successors that have led
    /// nowhere, behind which another archive goes on.
    pub notes: Vec<String>,
    /// The way, for the machine.
    #[serde(skip)]
    pub route: Route,
}

/// A snapshot in a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PlannedSnapshot {
    /// The archive.
    pub archive: String,
    /// Its folder there.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Inodes in it.
    pub inodes: u64,
}

/// A slot in a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PlannedSlot {
    /// The archive.
    pub archive: String,
    /// Its name there.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// How many of its entries are replayed.
    pub entries: u64,
}

/// The way of a plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// Which archive's snapshot, and which.
    pub snapshot: Option<(usize, BaseManifest)>,
    /// The state that the replay begins with.
    pub start: State,
    /// The slots.
    pub steps: Vec<Step>,
    /// Where it ends.
    pub end: Position,
    /// The log time there; `None` before the first entry.
    pub end_time: Option<LogTime>,
    /// Whether the history goes on behind the end, and something in between is missing.
    pub is_cut: bool,
    /// The surveys that it was made of, for those who have to go around what turns out to be damaged.
    pub surveys: Vec<Survey>,
}

/// The way from a snapshot as far as the surveyed archives go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Chain {
    snapshot: Option<(usize, BaseManifest)>,
    start: State,
    /// The log time at the start; `None` before the first entry.
    start_time: Option<LogTime>,
    steps: Vec<Step>,
}

impl Chain {
    /// The chain for `target`, from the newest usable snapshot of all archives.
    pub(crate) fn of(
        surveys: &[Survey],
        target: &Target,
        excluded: &BTreeSet<(usize, String)>,
    ) -> Result<Chain, PlanError> {
        let usable = surveys.iter().enumerate().flat_map(|(archive, survey)| {
            survey.bases.iter().filter(|base| is_usable(base, target)).map(move |base| (archive, base))
        });
        let usable = usable.filter(|(at, base)| !is_of_lost_tail(base, &surveys[*at], surveys));
        // Of several at one position the first archive's is taken.
        let newest =
            usable.max_by_key(|(archive, base)| (base.state.position.lsn, std::cmp::Reverse(*archive)));
        let (snapshot, start, start_time) = match newest {
            Some((archive, base)) => (Some((archive, base.clone())), base.state, Some(base.as_of)),
            None => {
                let is_whole =
                    |survey: &&Survey| survey.base.lsn == Lsn::ROOT && survey.floor <= survey.base.lsn.next();
                let empty = surveys.iter().find(is_whole);
                let empty = empty.ok_or_else(|| PlanError::NoSnapshot { window: Window::of(surveys) })?;
                let state =
                    State { position: empty.base, digest: Digest::default(), usage: Usage::default() };
                (None, state, None)
            }
        };
        let (mut at, mut steps) = (Boundary::after(start.position), Vec::new());
        while let Some(step) = next_step(surveys, excluded, &at) {
            at = step.end;
            steps.push(step);
        }
        Ok(Chain { snapshot, start, start_time, steps })
    }

    fn end(&self) -> Position {
        self.steps.last().map_or(self.start.position, |step| step.end.position)
    }

    /// The last log time that is known; `None` if nothing happened yet.
    fn as_of(&self) -> Option<LogTime> {
        let mut slots = self.steps.iter().filter_map(|step| step.slot);
        slots.next_back().map(|slot| slot.last_time).or(self.start_time)
    }

    /// The step in which the target lies; `None` if it is the start, or the end.
    fn step_of(&self, target: &Target) -> Option<&Step> {
        let is_inside = |step: &&Step| match (target, &step.slot) {
            (_, None) | (Target::Latest, _) => false,
            (Target::Lsn(lsn), Some(slot)) => slot.first <= *lsn,
            (Target::At(time), Some(slot)) => slot.first_time <= *time,
        };
        self.steps.iter().rev().find(is_inside)
    }
}

/// Surveys `archives` and plans a restore to `target`. Snapshots whose folder is in `excluded` (because loading them failed) are
/// not used.
pub async fn plan_restore(
    archives: &[Archive],
    target: Target,
    excluded: &BTreeSet<String>,
    zone: &TimeZone,
) -> Result<RestorePlan, PlanError> {
    let first = archives.first().ok_or(PlanError::NoArchive)?;
    if let Some(other) = archives.iter().find(|archive| archive.lineage() != first.lineage()) {
        return Err(PlanError::Different { one: first.url().to_owned(), other: other.url().to_owned() });
    }
    let mut looks = 0;
    loop {
        let planned = plan_once(archives, target, excluded, zone).await?;
        // A source puts several slots at once: a later one may be there before an earlier one.
        if !planned.route.is_cut || looks == HOLE_LOOKS {
            return Ok(planned);
        }
        looks += 1;
        tokio::time::sleep(HOLE_PAUSE).await;
    }
}

async fn plan_once(
    archives: &[Archive],
    target: Target,
    excluded: &BTreeSet<String>,
    zone: &TimeZone,
) -> Result<RestorePlan, PlanError> {
    let surveys =
        futures::future::join_all(archives.iter().map(|archive| survey(archive, &target, excluded))).await;
    let (mut known, mut problems, mut alive) = (Vec::new(), Vec::new(), archives.len());
    for (archive, survey) in archives.iter().zip(surveys) {
        match survey {
            Ok(survey) => known.push(survey),
            // A dead archive is one problem more; the others may have everything. It keeps its place, empty.
            Err(error) => {
                alive -= 1;
                if alive == 0 {
                    return Err(error.into());
                }
                problems.push(format!("{}: {error}", archive.url()));
                let nowhere = Position { lsn: Lsn::MAX, ..archive.descriptor().base };
                known.push(Survey::empty(archive.url(), nowhere));
            }
        }
    }
    let mut around = BTreeSet::new();
    loop {
        let chain = Chain::of(&known, &target, &around)?;
        let Some(step) = chain.step_of(&target).cloned() else {
            return plan_of(&chain, &known, &target, &[], problems, zone);
        };
        match frame_ends(&archives[step.archive], &step.name()).await {
            Ok(ends) => return plan_of(&chain, &known, &target, &ends, problems, zone),
            Err(error) => {
                problems.push(error.to_string());
                around.insert((step.archive, step.name()));
            }
        }
    }
}

/// The plan for `target` along `chain`; `ends` are the frame ends of the step that the target lies in.
pub(crate) fn plan_of(
    chain: &Chain,
    surveys: &[Survey],
    target: &Target,
    ends: &[FrameEnd],
    mut problems: Vec<String>,
    zone: &TimeZone,
) -> Result<RestorePlan, PlanError> {
    let (end, time) = resolve(chain, surveys, target, ends)?;
    let mut notes = below_horizon(surveys, end.lsn)?;
    let mut steps = chain.steps.clone();
    let needed = steps.iter().position(|step| step.end.position.lsn >= end.lsn).map_or(0, |last| last + 1);
    let is_start = end == chain.start.position;
    steps.truncate(if is_start { 0 } else { needed });
    if let Some(last) = steps.last_mut() {
        last.end.position = end;
    }
    let url = |archive: usize| surveys[archive].url.clone();
    let slots = planned_slots(&steps, chain.start.position.lsn, surveys);
    let snapshot = chain.snapshot.as_ref().map(|(archive, base)| PlannedSnapshot {
        archive: url(*archive),
        name: base.folder.clone(),
        bytes: base.bytes(),
        inodes: base.state.usage.inodes,
    });
    let entries = end.lsn.since(chain.start.position.lsn);
    let (inodes, data_bytes) = (chain.start.usage.inodes, chain.start.usage.bytes);
    let seconds = (inodes + entries) as f64 / ROWS_PER_SECOND;
    problems.extend(surveys.iter().flat_map(|survey| survey.problems.clone()));
    let unreached = if *target == Target::Latest { unreached(chain, surveys) } else { None };
    let is_cut = unreached.is_some();
    problems.extend(unreached);
    problems.extend(disagreement(&steps, surveys));
    let (left_out, gone_on) = beyond_seals(chain.start.position, &steps, surveys);
    problems.extend(left_out);
    notes.extend(gone_on);
    Ok(RestorePlan {
        archives: surveys.iter().map(|survey| survey.url.clone()).collect(),
        position: end.into(),
        as_of: time.map_or_else(|| "before the first entry".to_owned(), |time| show_time(time, zone)),
        bytes: snapshot.as_ref().map_or(0, |snapshot| snapshot.bytes)
            + slots.iter().map(|slot| slot.bytes).sum::<u64>(),
        packs: chain.snapshot.as_ref().map_or(0, |(_, base)| base.rows_of(Table::Pack)),
        snapshot,
        slots,
        entries,
        data_bytes,
        expected_minutes: seconds / 60.0,
        expected_data_minutes: data_bytes as f64 / DATA_BYTES_PER_SECOND / 60.0,
        problems,
        notes,
        route: Route {
            snapshot: chain.snapshot.clone(),
            start: chain.start,
            steps,
            end,
            end_time: time,
            is_cut,
            surveys: surveys.to_vec(),
        },
    })
}

/// The objects that `steps` read, whose first entry comes behind `at`.
fn planned_slots(steps: &[Step], mut at: Lsn, surveys: &[Survey]) -> Vec<PlannedSlot> {
    let read = steps.iter().filter_map(|step| Some((step, step.slot.as_ref()?)));
    let planned = read.map(|(step, slot)| {
        let entries = step.end.position.lsn.since(at);
        at = step.end.position.lsn;
        let archive = surveys[step.archive].url.clone();
        PlannedSlot { archive, name: step.name(), bytes: slot.object_bytes, entries }
    });
    planned.collect()
}

/// Refuses a moment whose packs may be gone from every archive that holds packs, and names those from which they may be.
fn below_horizon(surveys: &[Survey], lsn: Lsn) -> Result<Vec<String>, PlanError> {
    let horizons = surveys.iter().filter_map(|survey| Some((survey, survey.horizon?)));
    let (gone, held): (Vec<_>, Vec<_>) = horizons.partition(|(_, horizon)| lsn < *horizon);
    match gone.iter().min_by_key(|(_, horizon)| *horizon) {
        Some((survey, horizon)) if held.is_empty() => {
            Err(PlanError::BelowHorizon { lsn, horizon: *horizon, url: survey.url.clone() })
        }
        _ => Ok(gone
            .iter()
            .map(|(survey, horizon)| {
                format!("{}: packs of states before lsn {horizon} may be gone", survey.url)
            })
            .collect()),
    }
}

/// What says that the history goes on behind the end of a chain: an object in between is missing, or not there yet.
fn unreached(chain: &Chain, surveys: &[Survey]) -> Option<String> {
    let at = chain.steps.last().map_or(Boundary::after(chain.start.position), |step| step.end);
    let number = at.epoch.number;
    let is_behind = |slot: &&SlotHeader| match slot.epoch.number {
        same if same == number => slot.epoch == at.epoch && slot.first > at.next(),
        other => other > number,
    };
    // A seal ends what comes before it: its base was there. One of a later epoch below the end is of successors who have led nowhere.
    let is_seal_behind = |seal: &&Seal| match seal.epoch.number {
        same if same == number => seal.epoch == at.epoch && seal.base.lsn > at.position.lsn,
        other => other > number && seal.base.lsn >= at.position.lsn,
    };
    let behind = surveys.iter().flat_map(|survey| {
        let slots = survey.slots.iter().filter(|(key, _)| !survey.strays.contains(key));
        let slots = slots.map(|(_, slot)| slot).filter(is_behind).map(|slot| (slot.epoch.number, slot.first));
        let seals = survey.seals.iter().filter(is_seal_behind);
        let seals = seals.map(|seal| (seal.epoch.number, seal.base.lsn.next()));
        slots.chain(seals).map(|(epoch, first)| (epoch, first, &survey.url))
    });
    let (epoch, first, url) = behind.min()?;
    let (missing, found) = (layout::slot(number, at.next()), layout::slot(epoch, first));
    Some(format!("{missing} is missing: the next one that is there is {found} in {url}"))
}

/// The frame end that `target` means.
fn resolve(
    chain: &Chain,
    surveys: &[Survey],
    target: &Target,
    ends: &[FrameEnd],
) -> Result<(Position, Option<LogTime>), PlanError> {
    let window = || Window::of(surveys).up_to(chain);
    let start = FrameEnd { position: chain.start.position, time: chain.start_time.unwrap_or_default() };
    // Beyond a seal a slot may go on with entries that lost.
    let limit = chain.step_of(target).map_or(Lsn::MAX, |step| step.end.position.lsn);
    let before = |is_not_after: &dyn Fn(&FrameEnd) -> bool| {
        let inside = ends.iter().filter(|end| {
            let lsn = end.position.lsn;
            lsn >= start.position.lsn && lsn <= limit && is_not_after(end)
        });
        let last = inside.last().copied().unwrap_or(previous_end(chain, target).unwrap_or(start));
        let is_start = last.position == start.position;
        (last.position, if is_start { chain.start_time } else { Some(last.time) })
    };
    match target {
        Target::Latest => Ok((chain.end(), chain.as_of())),
        Target::Lsn(lsn) if *lsn > chain.end().lsn => {
            Err(PlanError::LsnBeyond { lsn: *lsn, window: window() })
        }
        Target::Lsn(lsn) => Ok(before(&|end| end.position.lsn <= *lsn)),
        Target::At(time) if chain.as_of().is_none_or(|as_of| *time > as_of) => {
            Err(PlanError::TimeBeyond { time: *time, window: window() })
        }
        Target::At(time) => {
            let (position, resolved) = before(&|end| end.time <= *time);
            if resolved.is_none() {
                return Err(PlanError::TimeBefore { time: *time, window: window() });
            }
            Ok((position, resolved))
        }
    }
}

/// The end of the step before the one that the target lies in.
fn previous_end(chain: &Chain, target: &Target) -> Option<FrameEnd> {
    let inside = chain.step_of(target)?;
    let before = chain.steps.iter().take_while(|step| *step != inside).filter_map(|step| {
        step.slot.map(|slot| FrameEnd { position: step.end.position, time: slot.last_time })
    });
    before.last()
}

/// The span that the archives cover.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// The first LSN and its time, if they are known.
    pub first: Option<(Lsn, LogTime)>,
    /// The last LSN and its time, if they are known.
    pub last: Option<(Lsn, LogTime)>,
}

impl Window {
    fn of(surveys: &[Survey]) -> Window {
        let bases = surveys.iter().flat_map(|survey| &survey.bases);
        let bases = bases.map(|base| (base.state.position.lsn, base.as_of));
        let slots = || surveys.iter().flat_map(|survey| survey.slots.values());
        let from_start = surveys.iter().any(|survey| survey.base.lsn == Lsn::ROOT);
        let slot_starts = slots().filter(|_| from_start).map(|slot| (slot.first, slot.first_time));
        Window {
            first: bases.clone().chain(slot_starts).min(),
            last: bases.chain(slots().map(|slot| (slot.last, slot.last_time))).max(),
        }
    }

    fn up_to(self, chain: &Chain) -> Window {
        let last = chain.as_of().map(|time| (chain.end().lsn, time));
        Window { last: last.or(self.last), ..self }
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |(lsn, time): (Lsn, LogTime)| format!("{} (lsn {lsn})", show_time(time, &TimeZone::UTC));
        match (self.first, self.last) {
            (Some(first), Some(last)) if first.0 == last.0 => write!(f, "{} alone", show(first)),
            (Some(first), Some(last)) => write!(f, "{} to {}", show(first), show(last)),
            (None, Some(last)) => write!(f, "up to {}", show(last)),
            (_, None) => f.write_str("nothing"),
        }
    }
}

/// Why there is no plan; nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// No archive was given.
    #[error("no archive to restore from")]
    NoArchive,
    /// The archives are of different histories.
    #[error("{one} and {other} hold different histories")]
    Different {
        /// The first archive.
        one: String,
        /// One that differs.
        other: String,
    },
    /// There is no snapshot to begin with.
    #[error("no snapshot at or before the target; the archives cover {window}")]
    NoSnapshot {
        /// What they cover.
        window: Window,
    },
    /// The target is after the end.
    #[error("lsn {lsn} is beyond the archives, which cover {window}")]
    LsnBeyond {
        /// The target.
        lsn: Lsn,
        /// What they cover.
        window: Window,
    },
    /// The target is after the last moment that is known.
    #[error("{} is beyond the last moment that the archives know of; they cover {window}", show_time(*.time, &TimeZone::UTC))]
    TimeBeyond {
        /// The target.
        time: LogTime,
        /// What they cover.
        window: Window,
    },
    /// The target is before the first entry.
    #[error("{} is before the first entry; the archives cover {window}", show_time(*.time, &TimeZone::UTC))]
    TimeBefore {
        /// The target.
        time: LogTime,
        /// What they cover.
        window: Window,
    },
    /// Bytes of that moment may have been deleted.
    #[error("lsn {lsn} is below the horizon of {url}: bytes of states before lsn {horizon} may be gone")]
    BelowHorizon {
        /// Where the target leads.
        lsn: Lsn,
        /// The oldest state whose bytes are kept.
        horizon: Lsn,
        /// The archive that keeps the most.
        url: String,
    },
    /// An archive cannot be read.
    #[error(transparent)]
    Survey(#[from] SurveyError),
}

/// The budgets of loading and replay.
const ROWS_PER_SECOND: f64 = 500_000.0;
/// A gigabit.
const DATA_BYTES_PER_SECOND: f64 = 100_000_000.0;

#[cfg(test)]
mod tests;
