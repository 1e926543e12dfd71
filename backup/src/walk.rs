//! Walking the slots of an archive by their names: how far it holds the history, and what ends it.
//!
//! ```text
//! log/1/2.seg  ->  log/1/40.seg  ->  log/1/90.seg = seal, next epoch 2  ->  log/2/90.seg  ->  log/2/120.seg (free)
//! ```
//!
//! Invariants:
//! - A walk begins at a boundary: the archive's base, its floor, or an end that an earlier walk or shipper found. Slots that
//!   are not reached from there (a put that landed after the seal, one that was cut anew) do not count.
//! - The next name follows from the last LSN; lists only say which headers to fetch ahead.
//! - Every step is checked against the chain. A name that is below the floor is not free, it is gone.
//! - A slot that a name leads to and that does not continue the chain is dead: a copy of the source has lost there. Objects never change, so
//!   everybody who walks passes over it to the next name of its place; nothing off the chain is ever a step. A free name with something
//!   under the next one is no end: what was dead there was lost, and with it the way to a seal.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use murphy_log::{Epoch, LogTime, Lsn, Position};

use crate::{
    descriptor::Archive,
    layout,
    registry::{Registry, RegistryError},
    seal::{OccupantError, SEAL_BYTES, SEAL_MAGIC, Seal},
    slot::{SLOT_HEADER_BYTES, SlotHeader},
    store::StoreError,
};

/// Where the contiguous part of an archive ends: the name of the next slot follows from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Boundary {
    /// The last entry before the next slot.
    pub position: Position,
    /// The epoch of the next slot; later than that of `position` just after a seal.
    pub epoch: Epoch,
    /// How many names for the next slot hold slots of a history that lost.
    pub turn: u32,
}

impl Boundary {
    /// The boundary after `position`, in its own epoch.
    pub fn after(position: Position) -> Boundary {
        Boundary::before(position, position.epoch)
    }

    /// The boundary after `position`, where `epoch` goes on.
    pub fn before(position: Position, epoch: Epoch) -> Boundary {
        Boundary { position, epoch, turn: 0 }
    }

    /// The first LSN of the next slot.
    pub fn next(&self) -> Lsn {
        self.position.lsn.next()
    }

    /// The name of the next slot.
    pub fn slot_name(&self) -> String {
        layout::slot_in_turn(self.epoch.number, self.next(), self.turn)
    }
}

/// What a walk found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Walk {
    /// Where it began.
    pub start: Boundary,
    /// Where it ended, before a free name.
    pub end: Boundary,
    /// The slots, in order.
    pub slots: Vec<SlotHeader>,
    /// Their names.
    pub(crate) names: Vec<String>,
    /// Slots under names that the walk came to, which continue another history.
    pub dead: Vec<String>,
    /// The seals, in order.
    pub seals: Vec<Seal>,
    /// Their names.
    pub(crate) seal_names: Vec<String>,
}

impl Walk {
    /// The log time of the last entry; `None` if there was no slot.
    pub fn as_of(&self) -> Option<LogTime> {
        self.slots.last().map(|slot| slot.last_time)
    }

    /// Whether the walk came to `boundary`, whatever was dead there: an entry's hash covers everything before it.
    fn passes(&self, boundary: &Boundary) -> bool {
        let slots = self.slots.iter().map(|slot| Boundary::after(slot.end()));
        let seals = self.seals.iter().map(|seal| Boundary::before(seal.base, seal.next));
        let mut places = slots.chain(seals).chain([self.start]);
        let mark = |place: &Boundary| (place.position.lsn, place.position.hash, place.epoch);
        places.any(|place| mark(&place) == mark(boundary))
    }

    /// What keeps a node from deciding in the epoch `own`, with a log that ends at `tail`; `None` if the archive has nothing against it.
    ///
    /// An end beyond `tail` in an epoch before `own` is no objection: that archive was given up by name when the node took over. Whoever ships
    /// to it says so.
    pub fn objection(&self, own: Epoch, tail: Lsn) -> Option<Objection> {
        let (epoch, held) = (self.end.epoch, self.end.position.lsn);
        if epoch.number > own.number || (epoch.number == own.number && epoch != own) {
            return Some(Objection::Replaced);
        }
        (epoch == own && held > tail).then_some(Objection::Lost { held })
    }
}

/// Why a node may not decide, as an archive says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Objection {
    /// Another source has taken over.
    Replaced,
    /// The node has lost entries of its own epoch.
    Lost {
        /// The last one that the archive holds.
        held: Lsn,
    },
}

/// What the beginning of an object under a slot's name says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Head {
    Slot(SlotHeader),
    Seal(Seal),
}

/// Walks from `from` (the archive's base if `None`) to the first free name.
///
/// If the archive's floor is above `from`, the walk begins at the floor, on the word of the slot there.
pub async fn walk(archive: &Archive, from: Option<Boundary>) -> Result<Walk, WalkError> {
    loop {
        let walk = walk_from(archive, from).await?;
        let (Some(_), Some(dead)) = (from, walk.dead.first()) else { return Ok(walk) };
        // Where the walk begins may be off the chain itself: only the whole walk tells what is dead. It may go further by now.
        let whole = walk_from(archive, None).await?;
        if whole.passes(&walk.end) {
            return Ok(walk);
        }
        // Unless a floor has risen in between.
        if whole.start.position.lsn <= walk.end.position.lsn {
            let object = archive.store().object(dead);
            return Err(WalkError::Fork { object, lsn: walk.end.next() });
        }
    }
}

/// Walks on from where `seen`, an earlier walk of `archive`, has ended, and adds what came since: of a long history that is a list instead of a request
/// for each slot. `None` if that is not enough, and everything has to be walked: what `seen` came to is not all listed, or a floor has risen.
pub(crate) async fn walk_on(archive: &Archive, mut seen: Walk) -> Result<Option<Walk>, WalkError> {
    let objects = || seen.names.iter().chain(&seen.seal_names).chain(&seen.dead);
    if seen.names.len() <= PROBES_BEFORE_LIST {
        return Ok(None);
    }
    let first = objects().min().cloned().unwrap_or_default();
    let listed: BTreeSet<String> =
        listed_slots(archive, &first).await?.into_iter().map(|(name, _)| name).collect();
    if !objects().all(|name| listed.contains(name)) {
        return Ok(None);
    }
    let since = walk(archive, Some(seen.end)).await?;
    if since.start != seen.end {
        return Ok(None);
    }
    seen.end = since.end;
    seen.slots.extend(since.slots);
    seen.names.extend(since.names);
    seen.dead.extend(since.dead);
    seen.seals.extend(since.seals);
    seen.seal_names.extend(since.seal_names);
    Ok(Some(seen))
}

async fn walk_from(archive: &Archive, from: Option<Boundary>) -> Result<Walk, WalkError> {
    let mut registry = Registry::new(archive.clone());
    let start = from.unwrap_or(Boundary::after(archive.descriptor().base));
    loop {
        registry.refresh().await?;
        let start = above_floor(archive, start, &registry).await?;
        let walk = Walker::new(archive, start).run().await?;
        // A free name below a floor that rose meanwhile is not free.
        let floor = registry.refresh().await?.floor;
        if floor.is_none_or(|(_, floor)| floor <= walk.end.next()) {
            return Ok(walk);
        }
    }
}

/// Where a walk begins that would begin at `start`: above what may be gone.
pub(crate) async fn above_floor(
    archive: &Archive,
    start: Boundary,
    registry: &Registry,
) -> Result<Boundary, WalkError> {
    let Some((epoch, floor)) = registry.view().floor.filter(|(_, floor)| *floor > start.next()) else {
        return Ok(start);
    };
    // What comes before the last one of the place is dead. A free name in between was not free: what was there is lost.
    let (mut last, mut free): (Option<(Head, u32)>, Option<String>) = (None, None);
    for turn in 0..=TURNS_MAX {
        let name = layout::slot_in_turn(epoch, floor, turn);
        match (read_head(archive, &name).await?, &free) {
            (Some(head), None) => last = Some((head, turn)),
            (Some(_), Some(free)) => return Err(WalkError::Missing { object: archive.store().object(free) }),
            (None, None) => free = Some(name),
            (None, Some(_)) => break,
        }
    }
    let Some((head, turn)) = last else {
        return Err(WalkError::Missing { object: archive.store().object(&layout::slot(epoch, floor)) });
    };
    let boundary = match head {
        Head::Slot(slot) => {
            Boundary::after(Position { epoch: slot.epoch, lsn: floor.previous(), hash: slot.hash_before })
        }
        Head::Seal(seal) => Boundary::before(seal.base, seal.epoch),
    };
    Ok(Boundary { turn, ..boundary })
}

/// A walk under way.
struct Walker<'a> {
    archive: &'a Archive,
    walk: Walk,
    /// Heads that were fetched ahead, by name.
    ahead: BTreeMap<String, Head>,
    /// How many names were asked for one by one.
    probes: usize,
}

impl Walker<'_> {
    fn new(archive: &Archive, start: Boundary) -> Walker<'_> {
        let (slots, names, dead) = (Vec::new(), Vec::new(), Vec::new());
        let (seals, seal_names) = (Vec::new(), Vec::new());
        let walk = Walk { start, end: start, slots, names, dead, seals, seal_names };
        Walker { archive, walk, ahead: BTreeMap::new(), probes: 0 }
    }

    async fn run(mut self) -> Result<Walk, WalkError> {
        loop {
            let name = self.walk.end.slot_name();
            match self.head(&name).await? {
                None => {
                    if self.is_free(&name).await? {
                        return Ok(self.walk);
                    }
                }
                Some(Head::Slot(slot)) => match self.check_slot(&name, &slot)? {
                    Link::Next => {
                        self.walk.end = Boundary::after(slot.end());
                        self.walk.slots.push(slot);
                        self.walk.names.push(name);
                    }
                    Link::Dead => {
                        self.walk.end.turn += 1;
                        self.walk.dead.push(name);
                    }
                },
                Some(Head::Seal(seal)) => {
                    self.check_seal(&name, &seal)?;
                    self.walk.end = Boundary::before(self.walk.end.position, seal.next);
                    self.walk.seals.push(seal);
                    self.walk.seal_names.push(name);
                }
            }
        }
    }

    /// Whether nothing lies behind the name where the walk ends, as far as that is seen: a dead slot that was lost would otherwise hide the
    /// seal behind it. `false` if something has come under the name meanwhile.
    async fn is_free(&self, name: &str) -> Result<bool, WalkError> {
        let end = self.walk.end;
        let behind = layout::slot_in_turn(end.epoch.number, end.next(), end.turn + 1);
        if end.turn >= TURNS_MAX || self.archive.store().size(&behind).await?.is_none() {
            return Ok(true);
        }
        match self.archive.store().size(name).await? {
            Some(_) => Ok(false),
            None => Err(WalkError::Missing { object: self.archive.store().object(name) }),
        }
    }

    async fn head(&mut self, name: &str) -> Result<Option<Head>, WalkError> {
        if let Some(head) = self.ahead.remove(name) {
            return Ok(Some(head));
        }
        self.probes += 1;
        if self.probes == PROBES_BEFORE_LIST {
            self.fetch_ahead(name).await?;
            if let Some(head) = self.ahead.remove(name) {
                return Ok(Some(head));
            }
        }
        read_head(self.archive, name).await
    }

    /// Fetches the heads of everything that is listed from `name` on. What cannot be read is left to the walk itself.
    async fn fetch_ahead(&mut self, name: &str) -> Result<(), WalkError> {
        let archive = self.archive;
        let names = listed_slots(archive, name).await?;
        let heads = futures::stream::iter(names).map(|(name, _)| async move {
            let head = read_head(archive, &name).await;
            (name, head)
        });
        let mut heads = heads.buffer_unordered(HEADS_AT_ONCE);
        while let Some((name, head)) = heads.next().await {
            if let Ok(Some(head)) = head {
                self.ahead.insert(name, head);
            }
        }
        Ok(())
    }

    fn check_slot(&self, name: &str, slot: &SlotHeader) -> Result<Link, WalkError> {
        let (archive, end) = (self.archive, &self.walk.end);
        let object = || archive.store().object(name);
        if slot.lineage != archive.lineage() {
            return Err(WalkError::Foreign { object: object() });
        }
        let link = Link::of(slot, end).filter(|link| *link == Link::Next || end.turn < TURNS_MAX);
        link.ok_or_else(|| WalkError::Fork { object: object(), lsn: end.next() })
    }

    fn check_seal(&self, name: &str, seal: &Seal) -> Result<(), WalkError> {
        let (archive, end) = (self.archive, &self.walk.end);
        let object = || archive.store().object(name);
        if seal.lineage != archive.lineage() {
            return Err(WalkError::Foreign { object: object() });
        }
        let base = seal.base;
        let follows =
            (base.lsn, base.hash) == (end.position.lsn, end.position.hash) && seal.epoch == end.epoch;
        if follows { Ok(()) } else { Err(WalkError::Fork { object: object(), lsn: end.next() }) }
    }
}

/// What a slot is to the end of a chain that its name continues.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Link {
    /// It goes on there.
    Next,
    /// It continues another history.
    Dead,
}

impl Link {
    /// `None` for a slot that belongs under another name.
    pub(crate) fn of(slot: &SlotHeader, end: &Boundary) -> Option<Link> {
        if (slot.first, slot.epoch.number) != (end.next(), end.epoch.number) {
            return None;
        }
        let follows = slot.hash_before == end.position.hash && slot.epoch == end.epoch;
        Some(if follows { Link::Next } else { Link::Dead })
    }
}

/// The slots and seals listed under names from `from` on, with their lengths, in order. A hint.
pub(crate) async fn listed_slots(archive: &Archive, from: &str) -> Result<Vec<(String, u64)>, StoreError> {
    let listed = archive.store().list(layout::LOG_FOLDER);
    let mut names: Vec<(String, u64)> = listed
        .try_filter(|listed| {
            let wanted = layout::parse_slot(&listed.name).is_some() && listed.name.as_str() >= from;
            futures::future::ready(wanted)
        })
        .map_ok(|listed| (listed.name, listed.bytes))
        .try_collect()
        .await?;
    names.sort();
    Ok(names)
}

/// Reads the beginning of the object `name`; `None` if there is none.
pub(crate) async fn read_head(archive: &Archive, name: &str) -> Result<Option<Head>, WalkError> {
    let bytes = match archive.store().get_range(name, 0..SLOT_HEADER_BYTES as u64).await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let damaged = |reason| WalkError::Damaged { object: archive.store().object(name), reason };
    if bytes.starts_with(&SEAL_MAGIC) {
        let seal = &bytes[..bytes.len().min(SEAL_BYTES)];
        return Seal::decode(seal).map(|seal| Some(Head::Seal(seal))).map_err(|error| damaged(error.into()));
    }
    SlotHeader::parse(&bytes).map(|slot| Some(Head::Slot(slot))).map_err(|error| damaged(error.into()))
}

impl WalkError {
    /// Whether what the archive holds is why, and not that it does not answer.
    pub fn is_of_content(&self) -> bool {
        match self {
            WalkError::Damaged { .. }
            | WalkError::Fork { .. }
            | WalkError::Foreign { .. }
            | WalkError::Missing { .. } => true,
            WalkError::Registry(_) | WalkError::Store(_) => false,
        }
    }
}

/// Why an archive cannot be walked to its end.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// An object is not what its name says.
    #[error("{object} is damaged: {reason}")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong.
        reason: OccupantError,
    },
    /// An object does not continue what comes before it.
    #[error("{object} continues another history than the one that ends before lsn {lsn}")]
    Fork {
        /// The object.
        object: String,
        /// The first LSN that differs.
        lsn: Lsn,
    },
    /// An object is of another volume or branch.
    #[error("{object} belongs to another volume or branch")]
    Foreign {
        /// The object.
        object: String,
    },
    /// An object that must be there is not.
    #[error("{object} is missing")]
    Missing {
        /// The object.
        object: String,
    },
    /// The registry cannot be read.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The store does not answer, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// So many names are asked for one by one before a list is made.
pub(crate) const PROBES_BEFORE_LIST: usize = 16;
/// So many dead slots may lie under the names of one place.
pub(crate) const TURNS_MAX: u32 = 16;
/// So many heads are fetched at once.
pub(crate) const HEADS_AT_ONCE: usize = 64;
/// A name that is free while later ones are taken is looked at so often again before it counts as missing, with this pause.
pub(crate) const HOLE_LOOKS: u32 = 3;
pub(crate) const HOLE_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 2000 });
