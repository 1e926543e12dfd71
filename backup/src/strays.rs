//! What lies in an archive where nothing leads to: slots and seals behind the end of a walk, and slots that a walk found dead.
//!
//! ```text
//! log/1/2.seg -> log/1/51.seg (free)      log/1/81.seg: whose is it?
//! ```
//!
//! A source that finds such a slot in its own epoch cannot tell from the archive whether it has forgotten it (its directory was put back to an
//! earlier state, and the archive has lost what leads there), or whether a copy of its directory shipped it and lost the race: to both a
//! directory was copied and two have gone on from there. Only what the log has, and what people have said, distinguishes them.
//!
//! Invariants:
//! - What the log of the source has is its own, cut by an earlier process. What a record in the registry gives up has been judged by people.
//!   Everything else is a stray, and whoever finds one decides nothing.
//! - A seal is created at the end of a walk only: one that nothing leads to means that somebody has taken over, and a slot was lost since.
//! - What may be a seal and cannot be read is no object of the source's own, wherever it lies: nobody knows who was the successor.
//! - Nothing is changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt};
use murphy_log::{Epoch, Log, LogTime, Lsn, Position, ReadError};

use crate::{
    descriptor::Archive,
    layout,
    registry::Registry,
    seal::{SEAL_BYTES, SEAL_MAGIC, Seal},
    slot::SLOT_MAGIC,
    store::StoreError,
    surveyed::SlotKey,
    walk::{Boundary, HEADS_AT_ONCE, Head, Walk, WalkError, read_head, walk},
};

/// An object under the name of a slot that nothing leads to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stray {
    /// What messages call it.
    pub object: String,
    /// Number of the epoch, first LSN and turn of its name.
    pub key: SlotKey,
    /// What it is.
    pub kind: StrayKind,
}

/// What a stray is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StrayKind {
    /// A slot.
    Slot {
        /// Of which epoch.
        epoch: Epoch,
        /// Its last LSN.
        last: Lsn,
        /// When its last frame was closed.
        written: LogTime,
    },
    /// A seal.
    Seal(Seal),
    /// It may be a seal, and cannot be read; the text says why.
    BrokenSeal(String),
    /// It cannot be read; the text says why.
    Damaged(String),
}

impl Stray {
    /// The last LSN that it holds, as far as that is known.
    pub fn last(&self) -> Lsn {
        match &self.kind {
            StrayKind::Slot { last, .. } => *last,
            StrayKind::Seal(seal) => seal.base.lsn,
            StrayKind::BrokenSeal(_) | StrayKind::Damaged(_) => self.key.1,
        }
    }
}

impl fmt::Display for Stray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (object, first) = (&self.object, self.key.1);
        match &self.kind {
            StrayKind::Slot { epoch, last, .. } => {
                write!(f, "{object} holds lsn {first} to {last} of epoch {}", epoch.number)
            }
            StrayKind::Seal(seal) => write!(f, "{object} is a seal at lsn {}", seal.base.lsn),
            StrayKind::BrokenSeal(reason) => {
                write!(
                    f,
                    "{object} may be the seal of a node that has taken over, and cannot be read ({reason})"
                )
            }
            StrayKind::Damaged(reason) => {
                write!(f, "{object}, from lsn {first} on, cannot be read ({reason})")
            }
        }
    }
}

/// How far an archive was seen to lead, and what a source that leads `epoch` with `log` finds beyond.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reach {
    /// Where the walk ended.
    pub end: Boundary,
    /// Whether the end is no entry of the source's own epoch that its log has otherwise: then the log has gone on without what is archived.
    pub is_continued: bool,
    /// What nothing leads to and nobody has given up, by name.
    pub strays: Vec<Stray>,
}

impl Reach {
    /// The seal of somebody who has taken over, if one of the strays is that.
    pub fn seal(&self) -> Option<&Seal> {
        self.strays.iter().find_map(|stray| match &stray.kind {
            StrayKind::Seal(seal) => Some(seal),
            StrayKind::Slot { .. } | StrayKind::BrokenSeal(_) | StrayKind::Damaged(_) => None,
        })
    }

    /// The object that may be the seal of somebody who has taken over and cannot be read, if one of the strays is that; and why not.
    pub fn broken_seal(&self) -> Option<(String, String)> {
        self.strays.iter().find_map(|stray| match &stray.kind {
            StrayKind::BrokenSeal(reason) => Some((stray.object.clone(), reason.clone())),
            StrayKind::Slot { .. } | StrayKind::Seal(_) | StrayKind::Damaged(_) => None,
        })
    }

    /// Whether the walk would go on now: one of the strays has come under the very name at which it ended.
    pub(crate) fn is_behind(&self) -> bool {
        let place = (self.end.epoch.number, self.end.next(), self.end.turn);
        let is_whole = |stray: &Stray| matches!(stray.kind, StrayKind::Slot { .. } | StrayKind::Seal(_));
        self.strays.iter().any(|stray| stray.key == place && is_whole(stray))
    }

    /// The stray that goes furthest.
    pub fn furthest(&self) -> Option<&Stray> {
        self.strays.iter().max_by_key(|stray| (stray.key.0, stray.last()))
    }
}

/// Looks for strays in the epoch `own` and later ones, for a source that leads `own` with `log`: dead slots of `walked`, what is listed
/// behind its end, and what is listed under further names of the places that it passed.
pub async fn strays(
    archive: &Archive,
    walked: &Walk,
    own: Epoch,
    log: &Arc<dyn Log>,
) -> Result<Reach, StraysError> {
    let key_of = |name: &String| layout::parse_slot(name).filter(|(epoch, ..)| *epoch >= own.number);
    let passed: BTreeSet<SlotKey> =
        walked.names.iter().chain(&walked.seal_names).filter_map(key_of).collect();
    let places: BTreeSet<(u32, Lsn)> = passed.iter().map(|(epoch, first, _)| (*epoch, *first)).collect();
    let end = (walked.end.epoch.number, walked.end.next());
    let mut names = listed_behind(archive, &walked.start, own).await?;
    names.retain(|key, _| {
        let place = (key.0, key.1);
        !passed.contains(key) && (place >= end || places.contains(&place))
    });
    names.extend(walked.dead.iter().filter_map(|name| Some((key_of(name)?, name.clone()))));
    let position = walked.end.position;
    let is_looked_up = position.epoch == own && position.lsn >= log.first();
    let is_continued = !is_looked_up || log_has(log, position).await?;
    Ok(Reach { end: walked.end, is_continued, strays: judge_all(archive, names, own, log).await? })
}

/// The same where a walk has come no further than `end`, because what follows there is damaged or missing.
pub async fn strays_behind(
    archive: &Archive,
    end: Boundary,
    own: Epoch,
    log: &Arc<dyn Log>,
) -> Result<Reach, StraysError> {
    let names = listed_behind(archive, &end, own).await?;
    Ok(Reach { end, is_continued: true, strays: judge_all(archive, names, own, log).await? })
}

/// What is listed from the place behind `from` on, of the epoch `own` and later ones.
async fn listed_behind(
    archive: &Archive,
    from: &Boundary,
    own: Epoch,
) -> Result<BTreeMap<SlotKey, String>, StoreError> {
    let place = layout::slot_place(from.epoch.number, from.next());
    let mut listed = archive.store().list_behind(layout::LOG_FOLDER, &place);
    let mut names = BTreeMap::new();
    while let Some(object) = listed.try_next().await? {
        let key = layout::parse_slot(&object.name).filter(|(epoch, ..)| *epoch >= own.number);
        names.extend(key.map(|key| (key, object.name)));
    }
    Ok(names)
}

async fn judge_all(
    archive: &Archive,
    names: BTreeMap<SlotKey, String>,
    own: Epoch,
    log: &Arc<dyn Log>,
) -> Result<Vec<Stray>, StraysError> {
    let mut strays = Vec::new();
    if !names.is_empty() {
        let mut registry = Registry::new(archive.clone());
        let abandoned = &registry.refresh().await.map_err(WalkError::Registry)?.abandoned;
        let open = names.into_iter().filter(|(key, _)| !abandoned.contains(key));
        let heads = futures::stream::iter(open).map(|(key, name)| async move {
            let head = read_head(archive, &name).await;
            (key, name, head)
        });
        let mut heads = heads.buffered(HEADS_AT_ONCE);
        while let Some((key, name, head)) = heads.next().await {
            if let Some(kind) = judge(archive, (key, &name), head, own, log).await? {
                strays.push(Stray { object: archive.store().object(&name), key, kind });
            }
        }
    }
    Ok(strays)
}

/// What shows, behind the end of `walked`, that somebody has ended its epoch for another one than `next`: the seal, or what led to it, was
/// lost since.
pub(crate) async fn successor_behind(
    archive: &Archive,
    walked: &Walk,
    next: Epoch,
) -> Result<Option<Stray>, WalkError> {
    let end = walked.end;
    let place = layout::slot_place(end.epoch.number, end.next());
    let mut listed = archive.store().list_behind(layout::LOG_FOLDER, &place);
    while let Some(object) = listed.try_next().await? {
        let Some(key) = layout::parse_slot(&object.name) else { continue };
        if key.0 < end.epoch.number || (key.0 == end.epoch.number && object.bytes != SEAL_BYTES as u64) {
            continue;
        }
        let kind = match read_head(archive, &object.name).await? {
            Some(Head::Seal(seal)) if seal.next != next => StrayKind::Seal(seal),
            Some(Head::Slot(slot)) if slot.epoch.number > end.epoch.number && slot.epoch != next => {
                StrayKind::Slot { epoch: slot.epoch, last: slot.last, written: slot.wall_time }
            }
            Some(Head::Slot(_) | Head::Seal(_)) | None => continue,
        };
        return Ok(Some(Stray { object: archive.store().object(&object.name), key, kind }));
    }
    Ok(None)
}

/// Walks `archive` as far as that is possible, from `known` if that is given, and looks for strays from there on.
pub async fn reach(
    archive: &Archive,
    known: Option<Boundary>,
    own: Epoch,
    log: &Arc<dyn Log>,
) -> Result<Reach, StraysError> {
    match walk(archive, known).await {
        Ok(walked) => strays(archive, &walked, own, log).await,
        Err(error) if error.is_of_content() => {
            let from = known.unwrap_or(Boundary::after(archive.descriptor().base));
            strays_behind(archive, from, own, log).await
        }
        Err(error) => Err(error.into()),
    }
}

/// What the object is if it is a stray; `None` if it explains itself.
async fn judge(
    archive: &Archive,
    (key, name): (SlotKey, &str),
    head: Result<Option<Head>, WalkError>,
    own: Epoch,
    log: &Arc<dyn Log>,
) -> Result<Option<StrayKind>, StraysError> {
    let slot = match head {
        // Listed, and gone.
        Ok(None) => return Ok(None),
        Ok(Some(Head::Seal(seal))) => return Ok(Some(StrayKind::Seal(seal))),
        Ok(Some(Head::Slot(slot))) => slot,
        // Of a later epoch everything shows a successor, whatever it was.
        Err(WalkError::Damaged { reason, .. })
            if key.0 == own.number && may_be_seal(archive, name).await? =>
        {
            return Ok(Some(StrayKind::BrokenSeal(reason.to_string())));
        }
        // What begins within the log may be an object of this source that has rotted: whoever verifies is told.
        Err(WalkError::Damaged { .. }) if key.0 == own.number && key.1 <= log.tail().position.lsn => {
            return Ok(None);
        }
        Err(WalkError::Damaged { reason, .. }) => return Ok(Some(StrayKind::Damaged(reason.to_string()))),
        Err(error) => return Err(error.into()),
    };
    let is_own = slot.lineage == archive.lineage() && slot.epoch == own;
    // A log that begins behind it has gone on from there, whatever it was.
    if is_own && (slot.last < log.first() || log_has(log, slot.end()).await?) {
        return Ok(None);
    }
    Ok(Some(StrayKind::Slot { epoch: slot.epoch, last: slot.last, written: slot.wall_time }))
}

/// Whether an object that cannot be read begins as a seal does, or is no longer than one and does not begin as a slot does.
async fn may_be_seal(archive: &Archive, name: &str) -> Result<bool, StoreError> {
    let Some(bytes) = archive.store().size(name).await? else { return Ok(false) };
    if bytes == 0 {
        return Ok(true);
    }
    let begin = archive.store().get_range(name, 0..SEAL_MAGIC.len() as u64).await?;
    Ok(begin == SEAL_MAGIC[..] || (bytes <= SEAL_BYTES as u64 && begin != SLOT_MAGIC[..]))
}

/// Whether a frame of `log` ends with `position`, whatever epoch it is of: the chain covers everything before it.
pub(crate) async fn log_has(log: &Arc<dyn Log>, position: Position) -> Result<bool, ReadError> {
    let log = Arc::clone(log);
    let held = murphy_log::aside(move || {
        let tail = log.tail().position;
        if position.lsn == tail.lsn {
            return Ok(Some((tail.lsn, tail.hash)));
        }
        if position.lsn > tail.lsn || position.lsn < log.first() {
            return Ok(None);
        }
        let frame = log.read(position.lsn)?.next().transpose()?;
        Ok::<_, ReadError>(frame.map(|frame| (frame.last(), frame.position().hash)))
    });
    Ok(held.await? == Some((position.lsn, position.hash)))
}

/// Why it is not known whether there are strays.
#[derive(Debug, thiserror::Error)]
pub enum StraysError {
    /// The archive cannot be read.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] ReadError),
}

impl StraysError {
    /// Whether what the archive or the log holds is why, and not that it does not answer.
    pub(crate) fn is_of_content(&self) -> bool {
        match self {
            StraysError::Walk(error) => error.is_of_content(),
            StraysError::Log(ReadError::Trimmed { .. } | ReadError::Damaged { .. }) => true,
            StraysError::Log(ReadError::Io { .. } | ReadError::Beyond { .. }) => false,
        }
    }
}

impl From<StoreError> for StraysError {
    fn from(error: StoreError) -> StraysError {
        StraysError::Walk(error.into())
    }
}

#[cfg(test)]
mod tests;
