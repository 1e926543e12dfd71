//! What archives were found to have, and the steps along it. Data and pure functions, for those who look and those who plan.
//!
//! Invariants:
//! - Of an epoch that was sealed no step leads beyond its seal in an archive that is sealed, whenever it landed; nor in any other one, if
//!   anything is archived of the epoch that the seal began. Where nothing is, what another archive holds behind it may have been acknowledged.

use std::collections::{BTreeMap, BTreeSet};

use murphy_log::{Epoch, LogTime, Lsn, Position};

use crate::{base::BaseManifest, layout, seal::Seal, slot::SlotHeader, target::Target, walk::Boundary};

/// What one archive has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Survey {
    /// The archive.
    pub url: String,
    /// Where its log begins.
    pub base: Position,
    /// Its snapshots, oldest first.
    pub bases: Vec<BaseManifest>,
    /// Its slots, by number of the epoch, first LSN and turn, as far back as the newest snapshot that is usable for the target.
    pub slots: BTreeMap<SlotKey, SlotHeader>,
    /// Those of them that may be of a history that lost: they continue nothing of what the archive holds otherwise.
    pub strays: BTreeSet<SlotKey>,
    /// Slots that people have given up, whether there are any or not: they are used only where something leads to them.
    pub abandoned: BTreeSet<SlotKey>,
    /// Its seals.
    pub seals: Vec<Seal>,
    /// Slots that begin below this LSN may be gone; they are not in `slots`.
    pub floor: Lsn,
    /// Packs that no state from this LSN on refers to may be gone; `None` if it holds no packs.
    pub horizon: Option<Lsn>,
    /// Objects that are damaged or missing.
    pub problems: Vec<String>,
}

/// Number of the epoch, first LSN, and turn of a slot's name.
pub type SlotKey = (u32, Lsn, u32);

impl Survey {
    /// An archive of which nothing is known but where its log begins.
    pub(crate) fn empty(url: &str, base: Position) -> Survey {
        Survey {
            url: url.to_owned(),
            base,
            bases: Vec::new(),
            slots: BTreeMap::new(),
            strays: BTreeSet::new(),
            abandoned: BTreeSet::new(),
            seals: Vec::new(),
            floor: Lsn::default(),
            horizon: None,
            problems: Vec::new(),
        }
    }

    /// Finds out which slots are strays. One that begins within what the others hold, and continues none of them, may have been cut by an
    /// earlier process of the same source, or come from a copy of it; one behind a hole is believed until something is known of it.
    pub(crate) fn mark_strays(&mut self) {
        let mut ends = BTreeSet::from([(self.base.lsn, *self.base.hash.as_bytes())]);
        ends.extend(self.seals.iter().map(|seal| (seal.base.lsn, *seal.base.hash.as_bytes())));
        let mut stray_ends = BTreeSet::new();
        let (mut epoch, mut reached): (u32, Option<Lsn>) = (0, None);
        self.strays.clear();
        for (key, slot) in &self.slots {
            if epoch != slot.epoch.number {
                (epoch, reached) = (slot.epoch.number, None);
            }
            let start = (slot.first.previous(), *slot.hash_before.as_bytes());
            let end = (slot.last, *slot.hash_after.as_bytes());
            let is_behind_hole = reached.is_none_or(|reached| slot.first > reached.next());
            // A further name is only used for what the one before it does not continue.
            let has_lost = self.slots.contains_key(&(key.0, key.1, key.2 + 1));
            let is_believed = is_behind_hole && !stray_ends.contains(&start) && !self.abandoned.contains(key);
            let is_kept = ends.contains(&start) || is_believed;
            if is_kept && !has_lost {
                ends.insert(end);
                reached = reached.max(Some(slot.last));
            } else {
                stray_ends.insert(end);
                self.strays.insert(*key);
            }
        }
    }
}

/// The end of a frame: a place where a restore can stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameEnd {
    /// Where.
    pub position: Position,
    /// The log time of the last entry of the frame.
    pub time: LogTime,
}

/// One step of a route: a slot to read, or a seal to pass.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Which archive.
    pub archive: usize,
    /// The slot; `None` for a seal.
    pub slot: Option<SlotHeader>,
    /// How many names of its place hold slots of a history that lost.
    pub turn: u32,
    /// Where the history is after it.
    pub end: Boundary,
}

impl Step {
    /// The name of the object.
    pub fn name(&self) -> String {
        match &self.slot {
            Some(slot) => layout::slot_in_turn(slot.epoch.number, slot.first, self.turn),
            None => layout::slot(self.end.epoch.number, self.end.next()),
        }
    }
}

/// The next step after `at`: a seal that ends the epoch, or else the slot of the first archive that has one with the next entry.
/// Objects in `excluded`, by archive and name, are passed over.
///
/// Of several seals the one whose epoch leads furthest counts. One whose epoch has led nowhere is of a successor that sealed and died, as far as
/// anybody knows: if an archive that is not sealed goes on, that is followed. So is one that was sealed further on than that epoch leads yet: it is carried
/// over into that.
pub fn next_step(surveys: &[Survey], excluded: &BTreeSet<(usize, String)>, at: &Boundary) -> Option<Step> {
    let mark = |position: &Position| (position.lsn, position.hash);
    let seals = surveys.iter().enumerate().flat_map(|(archive, survey)| {
        let seals = survey.seals.iter().filter(|seal| seal.epoch == at.epoch);
        seals.filter(|seal| mark(&seal.base) == mark(&at.position)).map(move |seal| (archive, seal))
    });
    let seals = seals.map(|(archive, seal)| (leads_to(surveys, seal.next), std::cmp::Reverse(archive), seal));
    let sealed = seals.max_by_key(|(led, archive, _)| (*led, *archive)).map(|(led, archive, seal)| {
        let end = Boundary::before(at.position, seal.next);
        (led, Step { archive: archive.0, slot: None, turn: 0, end })
    });
    let open = surveys.iter().filter(|survey| !survey.is_sealed_below(at.epoch, at.position.lsn));
    let ends = open.flat_map(|survey| survey.seals.iter().filter(|seal| seal.epoch == at.epoch));
    let further = ends.map(|seal| seal.base.lsn).max();
    match sealed {
        Some((led, step)) if led.is_some() && led >= further => Some(step),
        sealed => next_slot(surveys, excluded, at).or(sealed.map(|(_, step)| step)),
    }
}

/// The last entry that is archived of `epoch`, or of one that was begun behind it; `None` if there is nothing.
fn leads_to(surveys: &[Survey], epoch: Epoch) -> Option<Lsn> {
    let (mut epochs, mut looked, mut last) = (vec![epoch], 0, None);
    while let Some(epoch) = epochs.get(looked).copied() {
        looked += 1;
        for survey in surveys {
            let slots =
                survey.slots.range((epoch.number, Lsn::default(), 0)..=(epoch.number, Lsn::MAX, u32::MAX));
            let slots = slots.filter(|(key, slot)| slot.epoch == epoch && !survey.strays.contains(key));
            last = last.max(slots.map(|(_, slot)| slot.last).max());
            for seal in survey.seals.iter().filter(|seal| seal.epoch == epoch) {
                if !epochs.contains(&seal.next) {
                    epochs.push(seal.next);
                }
            }
        }
    }
    last
}

impl Survey {
    /// Whether this archive ends `epoch` at or below `lsn`: what it holds of that behind it has landed later, and counts for nothing.
    fn is_sealed_below(&self, epoch: Epoch, lsn: Lsn) -> bool {
        self.seals.iter().any(|seal| seal.epoch == epoch && seal.base.lsn <= lsn)
    }
}

/// The slot of the first archive that has one with the entry after `at`, up to the next seal: there it is judged how it goes on.
fn next_slot(surveys: &[Survey], excluded: &BTreeSet<(usize, String)>, at: &Boundary) -> Option<Step> {
    let ends = surveys.iter().flat_map(|survey| &survey.seals).filter(|seal| seal.epoch == at.epoch);
    let ends = ends.map(|seal| seal.base).filter(|base| base.lsn > at.position.lsn);
    let limit = ends.min_by_key(|base| base.lsn);
    let (next, number) = (at.next(), at.epoch.number);
    let open = |survey: &Survey| !survey.is_sealed_below(at.epoch, at.position.lsn);
    for (archive, survey) in surveys.iter().enumerate().filter(|(_, survey)| open(survey)) {
        let before = (number, Lsn::default(), 0)..=(number, next, u32::MAX);
        let holding =
            survey.slots.range(before).rev().take(SLOTS_BEFORE).filter(|((_, first, turn), slot)| {
                let name = layout::slot_in_turn(number, *first, *turn);
                slot.last >= next && slot.epoch == at.epoch && !excluded.contains(&(archive, name))
            });
        let holding: Vec<_> = holding.collect();
        // One that begins here is on the chain, or is not; of one that begins before, its archive has to know.
        let linked =
            holding.iter().find(|(_, slot)| slot.first == next && slot.hash_before == at.position.hash);
        let known = holding.iter().filter(|(key, slot)| slot.first < next && !survey.strays.contains(key));
        if let Some(((_, _, turn), slot)) = linked.or(known.max_by_key(|(_, slot)| slot.last)) {
            let position = limit.filter(|limit: &Position| limit.lsn < slot.last).unwrap_or(slot.end());
            let end = Boundary::before(position, at.epoch);
            return Some(Step { archive, slot: Some(**slot), turn: *turn, end });
        }
    }
    None
}

/// Says which archive holds other entries than the steps under the same numbers, as far as that is seen without reading them: two sources
/// that did not know of each other have shipped.
pub(crate) fn disagreement(steps: &[Step], surveys: &[Survey]) -> Option<String> {
    let (mut ends, mut starts) = (BTreeMap::new(), BTreeMap::new());
    for step in steps {
        let Some(slot) = &step.slot else { continue };
        ends.insert((slot.epoch, step.end.position.lsn), (step.end.position.hash, step));
        starts.insert((slot.epoch, slot.first), ((slot.hash_before, slot.first_time), step));
    }
    for survey in surveys {
        let slots = survey.slots.iter().filter(|(key, _)| !survey.strays.contains(key));
        for ((number, first, turn), slot) in slots {
            let end = ends.get(&(slot.epoch, slot.last)).filter(|(hash, _)| *hash != slot.hash_after);
            let start = starts.get(&(slot.epoch, slot.first));
            let start = start.filter(|(start, _)| *start != (slot.hash_before, slot.first_time));
            let Some(step) = end.map(|(_, step)| step).or(start.map(|(_, step)| step)) else { continue };
            let (name, other) = (layout::slot_in_turn(*number, *first, *turn), &surveys[step.archive].url);
            return Some(format!(
                "{} holds another history than {other}: {name} there contradicts {} here",
                survey.url,
                step.name()
            ));
        }
    }
    None
}

/// What archives hold beyond a seal that `steps`, which begin at `start`, pass, and what lies behind one that they do not pass: what is left out,
/// and what is there although somebody has sealed.
pub(crate) fn beyond_seals(
    start: Position,
    steps: &[Step],
    surveys: &[Survey],
) -> (Vec<String>, Vec<String>) {
    let (mut left_out, mut gone_on) = (Vec::new(), Vec::new());
    let mut at = Boundary::after(start);
    let passed: BTreeSet<_> =
        steps.iter().map(|step| (step.end.position.lsn, *step.end.position.hash.as_bytes())).collect();
    for step in steps {
        let base = at.position;
        let seals = surveys.iter().flat_map(|survey| survey.seals.iter().map(move |seal| (survey, seal)));
        let here = seals.filter(|(_, seal)| {
            seal.epoch == at.epoch && (seal.base.lsn, seal.base.hash) == (base.lsn, base.hash)
        });
        if step.slot.is_some() {
            gone_on.extend(here.map(|(survey, seal)| format!(
                "{} was sealed at lsn {} by node {} for epoch {}, of which nothing more is archived: what another archive holds of epoch {} behind that is followed",
                survey.url, base.lsn, seal.node, seal.next, at.epoch
            )));
        } else {
            let by = &surveys[step.archive].url;
            left_out.extend(surveys.iter().filter_map(|survey| {
                let last = survey.unsealed_beyond(at.epoch, base.lsn, &passed)?;
                let epoch = at.epoch;
                Some(format!(
                    "{} holds entries of epoch {epoch} up to lsn {last}, and is not sealed: they are left out, because {by} was sealed at lsn {} and goes on from there in epoch {}",
                    survey.url, base.lsn, step.end.epoch
                ))
            }));
        }
        at = step.end;
    }
    (left_out, gone_on)
}

impl Survey {
    /// The last entry of `epoch` behind `lsn` in an archive that was not sealed for it, unless the entries are `passed` in a later epoch.
    fn unsealed_beyond(&self, epoch: Epoch, lsn: Lsn, passed: &BTreeSet<(Lsn, [u8; 32])>) -> Option<Lsn> {
        if self.seals.iter().any(|seal| seal.epoch == epoch) {
            return None;
        }
        let slots = self.slots.range((epoch.number, Lsn::default(), 0)..=(epoch.number, Lsn::MAX, u32::MAX));
        let beyond = slots.filter(|(key, slot)| {
            let is_passed = passed.contains(&(slot.last, *slot.hash_after.as_bytes()));
            slot.epoch == epoch && slot.last > lsn && !is_passed && !self.strays.contains(key)
        });
        beyond.map(|(_, slot)| slot.last).max()
    }
}

/// Whether a replay to `target` can begin at `base`.
pub(crate) fn is_usable(base: &BaseManifest, target: &Target) -> bool {
    match target {
        Target::Latest => true,
        Target::Lsn(lsn) => base.state.position.lsn <= *lsn,
        Target::At(time) => base.as_of <= *time,
    }
}

/// Whether `base`, in the archive `own`, lies beyond a seal that ended its epoch: its writer had been replaced and did not know. A seal elsewhere of
/// somebody who has led nowhere does not say that.
pub(crate) fn is_of_lost_tail(base: &BaseManifest, own: &Survey, surveys: &[Survey]) -> bool {
    let position = base.state.position;
    let below = |seal: &&Seal| seal.epoch == position.epoch && seal.base.lsn < position.lsn;
    let mut seals = surveys.iter().flat_map(|survey| &survey.seals).filter(below);
    own.seals.iter().any(|seal| below(&seal)) || seals.any(|seal| leads_to(surveys, seal.next).is_some())
}

/// A slot that holds an entry is among so many that begin before it.
const SLOTS_BEFORE: usize = 64;
