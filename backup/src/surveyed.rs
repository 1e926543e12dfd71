//! What archives were found to have, and the steps along it. Data and pure functions, for those who look and those who plan.
//!
//! Invariants:
//! - Of an epoch that was sealed no step leads beyond its seal, whatever archive it lies in and whenever it landed.

use std::collections::{BTreeMap, BTreeSet};

use murphy_log::{LogTime, Lsn, Position};

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
    /// Its slots, by number of the epoch and first LSN, as far back as the newest snapshot that is usable for the target.
    pub slots: BTreeMap<(u32, Lsn), SlotHeader>,
    /// Its seals.
    pub seals: Vec<Seal>,
    /// Slots that begin below this LSN may be gone; they are not in `slots`.
    pub floor: Lsn,
    /// Packs that no state from this LSN on refers to may be gone; `None` if it holds no packs.
    pub horizon: Option<Lsn>,
    /// Objects that are damaged or missing.
    pub problems: Vec<String>,
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
    /// Where the history is after it.
    pub end: Boundary,
}

impl Step {
    /// The name of the object.
    pub fn name(&self) -> String {
        match &self.slot {
            Some(slot) => layout::slot(slot.epoch.number, slot.first),
            None => layout::slot(self.end.epoch.number, self.end.next()),
        }
    }
}

/// The next step after `at`: a seal that ends the epoch, or else the slot of the first archive that has one with the next entry.
/// Objects in `excluded`, by archive and name, are passed over.
pub fn next_step(surveys: &[Survey], excluded: &BTreeSet<(usize, String)>, at: &Boundary) -> Option<Step> {
    let mut limit = None;
    for (archive, survey) in surveys.iter().enumerate() {
        for seal in survey.seals.iter().filter(|seal| seal.epoch == at.epoch) {
            if (seal.base.lsn, seal.base.hash) == (at.position.lsn, at.position.hash) {
                let end = Boundary { position: at.position, epoch: seal.next };
                return Some(Step { archive, slot: None, end });
            }
            if seal.base.lsn > at.position.lsn {
                limit = Some(seal.base);
            }
        }
    }
    let next = at.next();
    for (archive, survey) in surveys.iter().enumerate() {
        let number = at.epoch.number;
        let holding = survey.slots.range((number, Lsn::default())..=(number, next)).rev().take(SLOTS_BEFORE);
        let holding = holding.map(|(_, slot)| slot).filter(|slot| {
            let continues = slot.first < next || slot.hash_before == at.position.hash;
            let name = layout::slot(slot.epoch.number, slot.first);
            slot.last >= next && slot.epoch == at.epoch && continues && !excluded.contains(&(archive, name))
        });
        if let Some(slot) = holding.max_by_key(|slot| slot.last) {
            let position = limit.filter(|limit: &Position| limit.lsn < slot.last).unwrap_or(slot.end());
            let end = Boundary { position, epoch: at.epoch };
            return Some(Step { archive, slot: Some(*slot), end });
        }
    }
    None
}

/// Whether a replay to `target` can begin at `base`.
pub(crate) fn is_usable(base: &BaseManifest, target: &Target) -> bool {
    match target {
        Target::Latest => true,
        Target::Lsn(lsn) => base.state.position.lsn <= *lsn,
        Target::At(time) => base.as_of <= *time,
    }
}

/// Whether `base` lies beyond a seal that ended its epoch: its writer had been replaced and did not know.
pub(crate) fn is_of_lost_tail(base: &BaseManifest, surveys: &[Survey]) -> bool {
    let position = base.state.position;
    let mut seals = surveys.iter().flat_map(|survey| &survey.seals);
    seals.any(|seal| seal.epoch == position.epoch && seal.base.lsn < position.lsn)
}

/// A slot that holds an entry is among so many that begin before it.
const SLOTS_BEFORE: usize = 64;
