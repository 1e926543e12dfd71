//! Taking over: what a successor does with the archives before it decides anything.
//!
//! ```text
//!   adopt every place -> fetch what one holds beyond the own log -> ship what one lacks -> seal each -> claim -> carry over
//! ```
//!
//! Invariants:
//! - The epoch that is begun was remembered durably before the first seal: a successor that died anywhere finds its own seals again.
//! - The first seal of an attempt settles where the old epoch ends for this node. What the old source still got into another place
//!   meanwhile may have been acknowledged: that place is sealed behind it, and the entries go on in the new epoch.
//! - What is carried over may name further places: they are sealed before the epoch begins ([`TakeOverLog::row_beyond`]).
//! - A seal of anybody else stops everything, unless that node was given up by name and this log has nothing beyond its base.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::try_join_all;
use murphy_fs::{Fence, FenceError, Held, RowKey, Sealed};
use murphy_log::{
    Appender, Change, Epoch, Frame, Log, LogTime, Lsn, MemoryLog, NodeId, Position, State, VolumeKeys,
    append_copy,
};

use crate::fence::{ArchiveFence, Supplies};

/// Who takes over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Successor {
    /// The node.
    pub node: NodeId,
    /// Every epoch that it has remembered to begin, oldest first. The last one is begun; seals for the others are its own too.
    pub attempts: Vec<Epoch>,
    /// Nodes whose seals do not stand in the way any more.
    pub given_up: BTreeSet<NodeId>,
}

/// Where a place stands for a successor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlaceStanding {
    /// What it holds.
    pub held: Held,
    /// Whether it is sealed for the epoch that is to begin.
    pub is_sealed: bool,
    /// Whether an attempt of this successor has sealed it: where the old epoch ends is settled then.
    pub is_settled: bool,
    /// Whether it holds entries that the successor's log lacks.
    pub is_ahead: bool,
}

impl Successor {
    /// The epoch to begin: the last one that was remembered, if nothing later is known; otherwise one with the id `fresh` behind
    /// everything that is `known`, which must be remembered before it is used.
    pub fn next_epoch(attempts: &[Epoch], known: &[Epoch], fresh: murphy_log::EpochId) -> Epoch {
        let fits = |last: &&Epoch| known.iter().all(|known| known.number < last.number || known == *last);
        if let Some(last) = attempts.last().filter(fits) {
            return *last;
        }
        let number = known.iter().chain(attempts).map(|epoch| epoch.number).max().unwrap_or(0);
        Epoch { number: number.saturating_add(1), id: fresh }
    }

    fn next(&self) -> Result<Epoch, TakeOverError> {
        self.attempts.last().copied().ok_or(TakeOverError::NotRemembered)
    }

    fn is_own(&self, seal: &Sealed) -> bool {
        seal.by == self.node && self.attempts.contains(&seal.next)
    }

    /// What `held` means for a successor that holds everything up to `tail`.
    pub fn judge(&self, held: Held, tail: &Position) -> Result<PlaceStanding, FenceError> {
        let last = held.seals.last().cloned();
        let is_settled = held.seals.iter().any(|seal| self.is_own(seal));
        if let Some(seal) = last.as_ref().filter(|seal| !self.is_own(seal)) {
            let is_history = seal.next.number < tail.epoch.number || seal.next == tail.epoch;
            // What this log has beyond a seal that it does not know has lost.
            let may_pass = self.given_up.contains(&seal.by) && tail.lsn <= seal.base.lsn;
            if !is_history && !may_pass {
                return Err(FenceError::Sealed(seal.clone()));
            }
        }
        let next = self.attempts.last();
        let is_sealed = last.is_some_and(|seal| self.is_own(&seal) && Some(&seal.next) == next);
        let is_ahead = held.end.lsn > tail.lsn;
        Ok(PlaceStanding { held, is_sealed, is_settled, is_ahead })
    }

    async fn look(&self, place: &dyn Fence, tail: &Position) -> Result<PlaceStanding, TakeOverError> {
        let standing = place.adopt().await.and_then(|held| self.judge(held, tail));
        standing.map_err(|error| at(place, error))
    }
}

/// The log of a successor, and the places that decide whether it may be one.
#[derive(Clone)]
pub struct TakeOverLog {
    /// The log. Nobody else appends to it.
    pub log: Arc<dyn Log>,
    /// The keys of the volume.
    pub keys: VolumeKeys,
    /// The places.
    pub places: Vec<Arc<dyn Fence>>,
}

impl TakeOverLog {
    /// How every place stands. Nothing is changed.
    pub async fn look(&self, successor: &Successor) -> Result<Vec<PlaceStanding>, TakeOverError> {
        let tail = self.log.tail().position;
        let looks = self.places.iter().map(|place| successor.look(&**place, &tail));
        let standings = try_join_all(looks).await?;
        for (place, standing) in self.places.iter().zip(&standings) {
            self.check_chain(&**place, standing).await?;
        }
        Ok(standings)
    }

    /// Fetches what any place holds beyond the log, unless an earlier attempt has settled where the old epoch ends. Durable when it
    /// returns.
    pub async fn fetch(&self, successor: &Successor) -> Result<State, TakeOverError> {
        let standings = self.look(successor).await?;
        if !standings.iter().any(|standing| standing.is_settled) {
            for (place, standing) in self.places.iter().zip(&standings) {
                if standing.is_ahead {
                    self.fetch_from(&**place).await?;
                }
            }
        }
        self.durable().await
    }

    /// Fetches what the places hold beyond the log, which is that of the source itself: what it has lost. A place that another source has
    /// taken over stops it. Durable when it returns.
    pub async fn recover(&self, own: Epoch) -> Result<State, TakeOverError> {
        for place in &self.places {
            let held = place.adopt().await.map_err(|error| at(&**place, error))?;
            if let Some(seal) = held.seals.last().filter(|seal| seal.next.number > own.number) {
                return Err(at(&**place, FenceError::Sealed(seal.clone())));
            }
            if held.epoch == own && held.end.lsn > self.log.tail().position.lsn {
                self.fetch_from(&**place).await?;
            }
        }
        self.durable().await
    }

    async fn fetch_from(&self, place: &dyn Fence) -> Result<(), TakeOverError> {
        loop {
            let tail = self.log.tail();
            let frames = place.entries(tail.position).await.map_err(|error| at(place, error))?;
            if frames.is_empty() {
                return Ok(());
            }
            self.append(frames).await?;
        }
    }

    /// Brings every place up to the log and seals it. What was sealed stays sealed if a later step fails; it may be called again.
    pub async fn seal(&self, successor: &Successor) -> Result<(), TakeOverError> {
        let base = self.durable().await?.position;
        // Where that cannot be done nothing is sealed: a mirror whose log reaches further back may still take over.
        for place in &self.places {
            let standing = successor.look(&**place, &base).await?;
            if !standing.is_sealed && standing.held.end.lsn < base.lsn {
                self.bridge(&**place, standing.held.end).await?;
            }
        }
        for place in &self.places {
            self.seal_one(&**place, successor, &base).await?;
        }
        Ok(())
    }

    async fn seal_one(
        &self,
        place: &dyn Fence,
        successor: &Successor,
        base: &Position,
    ) -> Result<(), TakeOverError> {
        let next = successor.next()?;
        let mut attempt = 1;
        loop {
            let mut standing = successor.look(place, base).await?;
            self.check_chain(place, &standing).await?;
            if !standing.is_sealed && standing.held.end.lsn < base.lsn {
                self.bridge(place, standing.held.end).await?;
                place.ship(base.lsn).await.map_err(|error| at(place, error))?;
                standing = successor.look(place, base).await?;
            }
            if standing.is_sealed {
                return Ok(());
            }
            // A seal below the base would end the old epoch before what was archived: a place that loses a slot meanwhile is looked at anew.
            let sealed = match standing.held.end.lsn < base.lsn {
                true => Err(FenceError::Unavailable {
                    place: place.place().to_owned(),
                    reason: format!("it held lsn {} and ends at {} now", base.lsn, standing.held.end.lsn),
                }),
                false => place.seal(standing.held.end, next).await,
            };
            match sealed {
                Ok(()) => return Ok(()),
                // The old source may have been faster: its slot is read, and the next name tried.
                Err(FenceError::Unavailable { .. }) if attempt < SEAL_ATTEMPTS => attempt += 1,
                Err(error) => return Err(at(place, error)),
            }
        }
    }

    /// Brings `place`, which ends at `end`, up to where this log begins, with what other places hold: a log that began with a snapshot does
    /// not reach back to what an archive may lack.
    async fn bridge(&self, place: &dyn Fence, mut end: Position) -> Result<(), TakeOverError> {
        let begins = self.log.first();
        while end.lsn.next() < begins {
            let (from, mut why) = (end, None);
            for other in self.places.iter().filter(|other| !std::ptr::addr_eq(place, &raw const ***other)) {
                match place.relay(from, begins.previous(), &**other).await {
                    Ok(reached) => end = reached,
                    Err(error) => why = Some(at(place, error)),
                }
                if end != from {
                    break;
                }
            }
            if end == from {
                let (url, last, base) = (place.place().to_owned(), end.lsn, begins.previous());
                return Err(why.unwrap_or(TakeOverError::Lags { url, last, base }));
            }
        }
        Ok(())
    }

    /// The newest row at `key` that an entry beyond the log writes, in any place. What the old source decided before it was sealed goes on in
    /// the new epoch: it may have named further places, through which it acknowledges until they are sealed too.
    pub async fn row_beyond(&self, key: &RowKey) -> Result<Option<Bytes>, TakeOverError> {
        let tail = self.log.tail().position;
        let mut newest: Option<(Lsn, Option<Bytes>)> = None;
        for place in &self.places {
            let mut after = tail;
            loop {
                let frames = place.entries(after).await.map_err(|error| at(&**place, error))?;
                let Some(last) = frames.last() else { break };
                after = last.position();
                for entry in frames.iter().flatten() {
                    let entry = entry.map_err(|error| TakeOverError::Log(error.to_string()))?;
                    let is_newer = newest.as_ref().is_none_or(|(lsn, _)| *lsn < entry.lsn);
                    let writes =
                        |change: &&Change| (change.table, &change.key[..]) == (key.table(), key.key());
                    if let Some(change) = entry.changes.iter().rev().find(writes).filter(|_| is_newer) {
                        newest = Some((entry.lsn, change.value.clone()));
                    }
                }
            }
        }
        Ok(newest.and_then(|(_, row)| row))
    }

    /// Claims the epoch in the log, and appends to it what sealed places hold beyond: the same entries, in the new epoch. Durable when it
    /// returns.
    pub async fn begin(&self, successor: &Successor) -> Result<State, TakeOverError> {
        let next = successor.next()?;
        let log = Arc::clone(&self.log);
        murphy_log::aside(move || log.claim(next).map_err(|error| TakeOverError::Log(error.to_string())))
            .await?;
        for place in &self.places {
            loop {
                let tail = self.log.tail();
                let frames = place.entries(tail.position).await.map_err(|error| at(&**place, error))?;
                if frames.is_empty() {
                    break;
                }
                self.append(under(&self.keys, next, tail, &frames)?).await?;
            }
        }
        self.durable().await
    }

    /// Appends frames, each in its own epoch.
    async fn append(&self, frames: Vec<Frame>) -> Result<(), TakeOverError> {
        let log = Arc::clone(&self.log);
        murphy_log::aside(move || {
            for frame in frames {
                append_copy(&*log, frame).map_err(|error| TakeOverError::Log(error.to_string()))?;
            }
            Ok(())
        })
        .await
    }

    async fn durable(&self) -> Result<State, TakeOverError> {
        let tail = self.log.tail();
        let durable = self.log.durable();
        durable.wait_for(tail.position.lsn).await.map_err(|error| TakeOverError::Log(error.to_string()))?;
        Ok(tail)
    }

    /// Checks that this log has the end of a place that is not ahead of it, and goes on there in an epoch that may follow.
    async fn check_chain(&self, place: &dyn Fence, standing: &PlaceStanding) -> Result<(), TakeOverError> {
        let (held, log) = (standing.held.clone(), Arc::clone(&self.log));
        if standing.is_ahead || held.end.lsn < log.first() {
            return Ok(());
        }
        let read = murphy_log::aside(move || {
            let mut frames = log.read(held.end.lsn).map_err(|error| TakeOverError::Log(error.to_string()))?;
            let mut next = || frames.next().transpose();
            let both = next().and_then(|first| Ok((first, next()?)));
            both.map_err(|error| TakeOverError::Log(error.to_string()))
        });
        let (last, next) = read.await?;
        let end = standing.held.end;
        let has_end = last.is_some_and(|last| (last.last(), last.position().hash) == (end.lsn, end.hash));
        if !has_end {
            let forked = FenceError::Forked { place: place.place().to_owned(), lsn: end.lsn };
            return Err(at(place, forked));
        }
        let pending = standing.held.seals.last().filter(|seal| seal.next == standing.held.epoch);
        match (next, pending) {
            (Some(next), Some(seal))
                if seal.base.lsn == end.lsn && !standing.is_settled && next.epoch() != seal.next =>
            {
                Err(at(place, FenceError::Sealed(seal.clone())))
            }
            _ => Ok(()),
        }
    }
}

/// Ends the epoch of the source at `base` in every one of `places`, for a successor whose tree was restored up to there; refused while
/// the source shows life. A place that lacks entries gets them from another one.
///
/// `as_of` is the log time of the newest entry known, `now` the wall clock. It may be called again, with the same attempts.
pub async fn take_over_at(
    places: &[ArchiveFence],
    successor: &Successor,
    base: Position,
    (as_of, now): (LogTime, LogTime),
) -> Result<(), TakeOverError> {
    check_silence(as_of, now)?;
    let over = RestoredTakeOver { places, successor, base };
    for place in places {
        over.look(place).await?;
    }
    for place in places {
        over.seal_one(place).await?;
    }
    Ok(())
}

/// A take-over by a successor that has a tree and no log: what a place lacks only another place can give.
struct RestoredTakeOver<'a> {
    places: &'a [ArchiveFence],
    successor: &'a Successor,
    base: Position,
}

impl RestoredTakeOver<'_> {
    /// How a place stands, which must not hold more than was restored.
    async fn look(&self, place: &ArchiveFence) -> Result<PlaceStanding, TakeOverError> {
        let standing = self.successor.look(place, &self.base).await?;
        if standing.is_ahead {
            let (url, last) = (place.place().to_owned(), standing.held.end.lsn);
            return Err(TakeOverError::Behind { url, last, base: self.base.lsn });
        }
        Ok(standing)
    }

    /// Seals a place at the base, and nowhere below: it is looked at until it is seen to lead to the seal. A place that loses a slot on
    /// the way gets it from another one, before its seal and behind it: the successor's log begins at the base, so nobody could later.
    async fn seal_one(&self, place: &ArchiveFence) -> Result<(), TakeOverError> {
        let (next, base) = (self.successor.next()?, self.base);
        let mut refused = None;
        for _ in 0..SEAL_ATTEMPTS {
            let standing = self.look(place).await?;
            let end = standing.held.end;
            if end.lsn < base.lsn {
                relay(self.places, place, end, base.lsn).await?;
                continue;
            }
            if standing.is_sealed {
                return Ok(());
            }
            match place.seal(Position { epoch: end.epoch, ..base }, next).await {
                Ok(()) => {}
                // It has changed since it was looked at.
                Err(error @ FenceError::Unavailable { .. }) => refused = Some(error),
                Err(error) => return Err(at(place, error)),
            }
        }
        let changes = || FenceError::Unavailable {
            place: place.place().to_owned(),
            reason: format!("it does not stay as it was at lsn {}", base.lsn),
        };
        Err(at(place, refused.unwrap_or_else(changes)))
    }
}

/// Refuses while the source shows life: its newest entry, of log time `as_of`, is younger than a minute at `now`.
pub fn check_silence(as_of: LogTime, now: LogTime) -> Result<(), TakeOverError> {
    let silence = now.since(as_of);
    if silence < SILENCE {
        return Err(TakeOverError::Alive { seconds: silence.as_secs(), wanted: SILENCE.as_secs() });
    }
    Ok(())
}

/// Ships to `lagging` what the other places hold behind `from`, up to `to`.
async fn relay(
    places: &[ArchiveFence],
    lagging: &ArchiveFence,
    mut from: Position,
    to: Lsn,
) -> Result<(), TakeOverError> {
    while from.lsn < to {
        let mut why = None;
        let mut found = None;
        for place in places.iter().filter(|place| !std::ptr::eq(*place, lagging)) {
            match place.entries(from).await {
                Ok(mut frames) => {
                    // What a place has got beyond that meanwhile was not restored.
                    frames.retain(|frame| frame.last() <= to);
                    if !frames.is_empty() {
                        found = Some((place, frames));
                        break;
                    }
                }
                Err(error) => why = Some(at(place, error)),
            }
        }
        let Some((place, frames)) = found else {
            let url = lagging.place().to_owned();
            return Err(why.unwrap_or(TakeOverError::Lags { url, last: from.lsn, base: to }));
        };
        let log = MemoryLog::new(State {
            position: from,
            digest: murphy_log::Digest::default(),
            usage: murphy_log::Usage::default(),
        });
        let last = frames.last().map_or(from, Frame::position);
        let memory =
            TakeOverLog { log: Arc::new(log), keys: lagging.archive().keys().clone(), places: Vec::new() };
        memory.append(frames).await?;
        let packs = Arc::new(place.archive().packs());
        let supplies = Supplies { log: memory.log, packs, lost: None };
        let supplied = lagging.clone().with_supplies(supplies).known_up_to(from);
        supplied.ship(last.lsn).await.map_err(|error| at(lagging, error))?;
        // Behind a slot that was lost may be others.
        from = supplied.adopt().await.map_err(|error| at(lagging, error))?.end;
    }
    Ok(())
}

/// The entries of `frames`, which continue `tail`, as frames of `epoch`.
fn under(
    keys: &VolumeKeys,
    epoch: Epoch,
    tail: State,
    frames: &[Frame],
) -> Result<Vec<Frame>, TakeOverError> {
    let bad = |error: &dyn std::fmt::Display| TakeOverError::Log(error.to_string());
    let mut appender = Appender::new(keys.clone(), epoch, tail);
    let mut out = Vec::new();
    for frame in frames {
        let state = frame.state();
        for entry in frame {
            let entry = entry.map_err(|error| bad(&error))?;
            appender.push(&entry, state.digest, state.usage).map_err(|error| bad(&error))?;
        }
        while let Some(frame) = appender.close(frame.header().wall_time, tail.position.lsn) {
            out.push(frame);
        }
        // The chain covers the entries and not their epoch.
        if appender.state().position.hash != state.position.hash {
            return Err(bad(&format!("lsn {} reads differently", frame.last())));
        }
    }
    Ok(out)
}

fn at(place: &dyn Fence, error: FenceError) -> TakeOverError {
    TakeOverError::Fence { url: place.place().to_owned(), error }
}

/// Why a source was not replaced.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TakeOverError {
    /// The source was alive a moment ago.
    #[error("the source gave a sign of life {seconds} s ago; {wanted} s of silence are needed")]
    Alive {
        /// How long ago.
        seconds: u64,
        /// How long it must be.
        wanted: u64,
    },
    /// An archive has entries that were not restored. They came meanwhile, or after another archive was sealed.
    #[error("{url} goes on to lsn {last}, the restore ended at {base}")]
    Behind {
        /// The archive.
        url: String,
        /// Its last entry.
        last: Lsn,
        /// The last entry restored.
        base: Lsn,
    },
    /// An archive lacks entries, and none of the others that were given has them.
    #[error("{url} ends at lsn {last}, and no other archive has what comes then up to lsn {base}")]
    Lags {
        /// The archive.
        url: String,
        /// Its last entry.
        last: Lsn,
        /// The last entry restored.
        base: Lsn,
    },
    /// An archive does not let itself be sealed.
    #[error("{url}: {error}")]
    Fence {
        /// The archive.
        url: String,
        /// Why.
        error: FenceError,
    },
    /// The successor's own log failed.
    #[error("the log: {0}")]
    Log(String),
    /// No epoch was remembered.
    #[error("no epoch was remembered to begin")]
    NotRemembered,
}

/// A source that has been silent for so long may be replaced; it ticks every 20 s.
const SILENCE: Duration = Duration::from_secs(60);
/// So often a seal is tried while somebody else ships.
const SEAL_ATTEMPTS: u32 = 32;

#[cfg(test)]
mod tests;
