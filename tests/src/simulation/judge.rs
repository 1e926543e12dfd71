//! The judge: every history that ever was durable at a source, what was acknowledged, and what must hold of both.
//!
//! Invariants that it keeps:
//! - A copy holds only what was durable at a source before.
//! - Equal positions have equal digests, wherever they are.
//! - What was acknowledged lies on one history, and on the one that goes on, within the promise of the volume's level.
//! - With `mirror=W` it is on the disks of W mirrors by then.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use murphy_log::{ChainHash, Digest, Epoch, Frame, Lsn, Position, State};

use super::Level;

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct Judge {
    /// The frames that were durable at a source, by the hash after them.
    frames: HashMap<ChainHash, Known>,
    acks: Vec<Ack>,
    files: BTreeMap<String, Certain>,
    /// The epochs that began, and after which frame.
    begun: Vec<(Epoch, Position)>,
    /// The epochs for which every mirror was sealed that an acknowledgement would need, with `mirror=W`, and what is gone on from.
    sealed: BTreeMap<Epoch, Position>,
    /// What became durable at each host that follows.
    copies: BTreeMap<usize, Vec<Position>>,
    /// The end of what became durable last at each host that decided.
    newest: BTreeMap<usize, Lsn>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    position: Position,
    before: ChainHash,
    digest: Digest,
}

/// An fsync that returned without an error.
#[derive(Clone, Copy, Debug)]
struct Ack {
    position: Position,
    host: usize,
    at: Duration,
}

/// A file that an acknowledged fsync made certain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Certain {
    /// The frame that was acknowledged.
    pub(super) position: Position,
    /// Who acknowledged it.
    pub(super) host: usize,
    /// Its bytes are those of this number, ...
    pub(super) content: u64,
    /// ... so many.
    pub(super) length: usize,
}

impl Judge {
    /// A frame is durable at `host`, which decides.
    pub(super) fn durable(&mut self, host: usize, frame: &Frame) -> Result<(), String> {
        self.same(&format!("source {host}"), frame)?;
        let state = frame.state();
        let before = frame.previous_hash();
        let known = Known { position: state.position, before, digest: state.digest };
        self.frames.insert(state.position.hash, known);
        self.newest.insert(host, state.position.lsn);
        Ok(())
    }

    /// The mirror on `host` has everything up to `position` on its disk.
    pub(super) fn mirrored(&mut self, host: usize, position: Position) {
        self.copies.entry(host).or_default().push(position);
    }

    /// Everything up to `position` was acknowledged at `host`, where an fsync waits for `wanted` mirrors: so many others have it.
    pub(super) fn is_mirrored(&self, wanted: usize, host: usize, position: &Position) -> Result<(), String> {
        let has = |held: &[Position]| held.iter().rev().any(|held| self.is_on(position, held));
        let found = self.copies.iter().filter(|(other, held)| **other != host && has(held)).count();
        match found < wanted {
            true => Err(format!(
                "too few: lsn {} was acknowledged at host {host}, of {wanted} mirrors {found} have it",
                position.lsn
            )),
            false => Ok(()),
        }
    }

    /// A frame is in a copy.
    pub(super) fn copied(&self, place: &str, frame: &Frame) -> Result<(), String> {
        if !self.frames.contains_key(&frame.position().hash) {
            let (first, last) = (frame.first(), frame.last());
            return Err(format!("ahead: {place} holds lsn {first} to {last}, which no source has durable"));
        }
        self.same(place, frame)
    }

    /// A tree of this state is on its way to a place: its position was durable at a source before, with the same digest.
    pub(super) fn has_state(&self, place: &str, state: &State) -> Result<(), String> {
        if state.position.lsn > Lsn::ROOT && !self.frames.contains_key(&state.position.hash) {
            return Err(format!(
                "ahead: {place} is of lsn {}, which no source has durable",
                state.position.lsn
            ));
        }
        self.has_digest(place, &state.position, state.digest)
    }

    fn same(&self, place: &str, frame: &Frame) -> Result<(), String> {
        let state = frame.state();
        self.has_digest(place, &state.position, state.digest)
    }

    /// The tree at `position` has this digest at `place`. A position that is no known end of a frame says nothing.
    pub(super) fn has_digest(&self, place: &str, position: &Position, digest: Digest) -> Result<(), String> {
        match self.frames.get(&position.hash) {
            Some(known) if known.digest != digest || known.position.lsn != position.lsn => Err(format!(
                "digest: {place} at lsn {} has {digest}, others have {}",
                position.lsn, known.digest
            )),
            _ => Ok(()),
        }
    }

    /// The end of the frame that holds `lsn`, on the history that ends at `tip`.
    pub(super) fn frame_of(&self, lsn: Lsn, tip: ChainHash) -> Option<Position> {
        let mut found = None;
        let mut at = self.frames.get(&tip);
        while let Some(known) = at.filter(|known| known.position.lsn >= lsn) {
            found = Some(known.position);
            at = self.frames.get(&known.before);
        }
        found
    }

    /// Whether the history that ends at `tip` goes through `position`.
    pub(super) fn is_on(&self, position: &Position, tip: &Position) -> bool {
        // A successor may have taken entries over under its own epoch: they are the same entries.
        let same = |found: &Position| (found.lsn, found.hash) == (position.lsn, position.hash);
        same(tip) || self.frame_of(position.lsn, tip.hash).is_some_and(|found| same(&found))
    }

    /// An fsync at `host` returned: everything up to `position` is acknowledged.
    pub(super) fn acknowledged(
        &mut self,
        level: Level,
        host: usize,
        position: Position,
        now: Duration,
    ) -> Result<(), String> {
        if level != Level::Local {
            for (epoch, base) in self.begun.iter().filter(|(epoch, _)| *epoch > position.epoch) {
                if !self.is_on(&position, base) {
                    return Err(format!(
                        "two epochs: lsn {} of epoch {} is acknowledged, epoch {} began after lsn {}",
                        position.lsn, position.epoch.number, epoch.number, base.lsn
                    ));
                }
            }
            for (epoch, base) in self.sealed.iter().filter(|(epoch, _)| **epoch > position.epoch) {
                if !self.is_on(&position, base) {
                    return Err(format!(
                        "two epochs: lsn {} of epoch {} is acknowledged at host {host}, the mirrors are sealed for epoch {} after lsn {}",
                        position.lsn, position.epoch.number, epoch.number, base.lsn
                    ));
                }
            }
            for ack in &self.acks {
                let (earlier, later) = if ack.position.lsn <= position.lsn {
                    (&ack.position, &position)
                } else {
                    (&position, &ack.position)
                };
                if !self.is_on(earlier, later) {
                    return Err(format!(
                        "two histories: lsn {} is acknowledged at host {host}, lsn {} was at host {}",
                        position.lsn, ack.position.lsn, ack.host
                    ));
                }
            }
        }
        let is_stale =
            |(epoch, base): &(Epoch, Position)| *epoch > position.epoch && !self.is_on(&position, base);
        if level == Level::Local && self.begun.iter().any(is_stale) {
            // It acknowledges for itself only; nobody promised more.
            return Ok(());
        }
        // What a later one of the same host includes needs no remembering.
        let is_included = |ack: &Ack| ack.host == host && self.is_on(&ack.position, &position);
        self.acks = self.acks.iter().filter(|ack| !is_included(ack)).copied().collect();
        self.acks.push(Ack { position, host, at: now });
        Ok(())
    }

    /// A file is certain from now on; or not certain any more, because something is being done to it.
    pub(super) fn file(&mut self, name: &str, certain: Option<Certain>) {
        match certain {
            Some(certain) => drop(self.files.insert(name.to_owned(), certain)),
            None => drop(self.files.remove(name)),
        }
    }

    /// Nothing is certain of any file any more.
    pub(super) fn forget_files(&mut self) {
        self.files.clear();
    }

    /// The files that must be there.
    pub(super) fn files(&self) -> Vec<(String, Certain)> {
        self.files.iter().map(|(name, certain)| (name.clone(), *certain)).collect()
    }

    /// `host` decides again after a restart, with a log that ends at `tip`: what it acknowledged must be there.
    pub(super) fn restarted(&self, host: usize, tip: &Position) -> Result<(), String> {
        self.holds(&format!("host {host} after a restart"), tip, |ack| ack.host == host)
    }

    /// Everything that was acknowledged and may not be lost is on the history that ends at `tip`.
    pub(super) fn all_held(&self, place: &str, tip: &Position) -> Result<(), String> {
        self.holds(place, tip, |_| true)
    }

    fn holds(&self, place: &str, tip: &Position, concerns: impl Fn(&Ack) -> bool) -> Result<(), String> {
        match self.acks.iter().find(|ack| concerns(ack) && !self.is_on(&ack.position, tip)) {
            Some(ack) => Err(format!(
                "lost: {place} ends at lsn {}; lsn {} of epoch {} was acknowledged at {:.3} by host {}",
                tip.lsn,
                ack.position.lsn,
                ack.position.epoch.number,
                ack.at.as_secs_f64(),
                ack.host
            )),
            None => Ok(()),
        }
    }

    /// The last entry that is durable at `host`, which decides; the first one if it never did.
    pub(super) fn newest(&self, host: usize) -> Lsn {
        self.newest.get(&host).copied().unwrap_or_default()
    }

    /// Whether a log that ends at `tip` has everything up to the beginning of the latest epoch that anybody took over in, and nothing behind
    /// that of an older one.
    pub(super) fn has_caught_up(&self, tip: &Position) -> bool {
        let latest = self.begun.iter().max_by_key(|(epoch, _)| *epoch);
        latest.is_none_or(|(epoch, base)| {
            self.is_on(base, tip) && (tip.lsn == base.lsn || tip.epoch.number >= epoch.number)
        })
    }

    /// The latest position that was acknowledged.
    pub(super) fn acknowledged_lsn(&self) -> Lsn {
        self.acks.iter().map(|ack| ack.position.lsn).max().unwrap_or_default()
    }

    /// Every mirror that an acknowledgement would need has promised `epoch`, which is to go on from `base`.
    pub(super) fn sealed(&mut self, epoch: Epoch, base: Position) {
        self.sealed.insert(epoch, base);
    }

    /// `epoch` begins after `base`.
    pub(super) fn begins(&mut self, epoch: Epoch, base: Position) {
        self.begun.push((epoch, base));
    }

    /// What was acknowledged and is not on the history that ends at `tip` is beyond the promise: it is not asked for any more.
    /// Returns how many acknowledgements that were.
    pub(super) fn forgive(&mut self, tip: &Position) -> usize {
        let before = self.acks.len();
        let kept: Vec<Ack> = self.acks.iter().filter(|ack| self.is_on(&ack.position, tip)).copied().collect();
        let lost: Vec<String> = self
            .files
            .iter()
            .filter(|(_, certain)| !self.is_on(&certain.position, tip))
            .map(|(name, _)| name.clone())
            .collect();
        for name in &lost {
            self.files.remove(name);
        }
        self.acks = kept;
        before - self.acks.len()
    }

    /// The ends of all frames on the history that ends at `tip`, newest first, with their digests.
    pub(super) fn ends(&self, tip: &Position) -> Vec<(Position, Digest)> {
        let mut ends = Vec::new();
        let mut at = self.frames.get(&tip.hash);
        while let Some(known) = at {
            ends.push((known.position, known.digest));
            at = self.frames.get(&known.before);
        }
        ends
    }
}
