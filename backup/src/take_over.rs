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
//! - Everybody seals places in one order, by whatever URLs and in whatever order they were given.
//! - A seal of anybody else stops everything, unless that node was given up by name and this log has nothing beyond its base, or nothing that
//!   the place does not hold behind the seal.

mod restored;
mod silence;

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use futures::future::try_join_all;
use murphy_fs::{Fence, FenceError, Held, RowKey, Sealed};
use murphy_log::{
    Appender, Change, Epoch, Frame, Log, LogTime, Lsn, NodeId, Position, State, VolumeKeys, append_copy,
};

use crate::target::show_time;

pub use restored::take_over_at;
pub use silence::{Newest, SILENCE, Silence, Watch};

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
    /// Whether an attempt of this successor has sealed it, or one of a node that was given up and has archived nothing behind its seal: where the
    /// old epoch ends is settled then.
    pub is_settled: bool,
    /// Whether the seal of such a node ends it: it is sealed once more, right there.
    pub is_passed: bool,
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

    /// What `held` means for a successor that holds everything up to `tail`, as far as it shows by itself.
    fn judge(
        &self,
        held: Held,
        tail: &Position,
        may_pass: impl Fn(&Sealed) -> bool,
    ) -> Result<PlaceStanding, FenceError> {
        if let Some(seal) = held.seals.last().filter(|seal| !self.is_own(seal)) {
            let may_pass = self.given_up.contains(&seal.by) && may_pass(seal);
            if !is_history(seal, tail) && !may_pass {
                return Err(FenceError::Sealed(seal.clone()));
            }
        }
        Ok(self.standing(held, tail))
    }

    fn standing(&self, held: Held, tail: &Position) -> PlaceStanding {
        let last = held.seals.last();
        let foreign = last.filter(|seal| !self.is_own(seal) && !is_history(seal, tail));
        let is_passed = foreign.is_some_and(|seal| held.end.lsn == seal.base.lsn);
        let own = last.filter(|seal| self.is_own(seal));
        let is_sealed = own.is_some_and(|seal| Some(&seal.next) == self.attempts.last());
        let is_settled = is_passed || self.has_sealed(&held);
        let is_ahead = held.end.lsn > tail.lsn;
        PlaceStanding { held, is_sealed, is_settled, is_passed, is_ahead }
    }

    /// Whether an attempt of this successor has sealed a place that holds `held`.
    pub fn has_sealed(&self, held: &Held) -> bool {
        held.seals.iter().any(|seal| self.is_own(seal))
    }

    /// What `held`, which `place` holds, means for a successor that holds everything up to `tail`. A place that somebody who was given up has
    /// sealed before `tail` is asked whether it goes on from there: whoever takes over carries over the entries that this log has, too.
    pub async fn judge_at(
        &self,
        place: &dyn Fence,
        held: Held,
        tail: &Position,
    ) -> Result<PlaceStanding, FenceError> {
        // What this log has beyond a seal that it does not know has lost.
        self.judge_behind(place, held, tail, |seal| tail.lsn <= seal.base.lsn).await
    }

    /// The same for one whose tree was restored up to `base`, from archives that lead there. What other archives hold behind the seal of a node that
    /// was given up and archived nothing may have been acknowledged: it goes on behind that seal.
    pub async fn judge_tree_at(
        &self,
        place: &dyn Fence,
        held: Held,
        base: &Position,
    ) -> Result<PlaceStanding, FenceError> {
        let end = held.end.lsn;
        self.judge_behind(place, held, base, |seal| base.lsn <= seal.base.lsn || end == seal.base.lsn).await
    }

    async fn judge_behind(
        &self,
        place: &dyn Fence,
        held: Held,
        tail: &Position,
        may_pass: impl Fn(&Sealed) -> bool,
    ) -> Result<PlaceStanding, FenceError> {
        match self.judge(held.clone(), tail, may_pass) {
            Err(FenceError::Sealed(seal)) if self.given_up.contains(&seal.by) => {
                let is_end = (held.end.lsn, held.end.hash) == (tail.lsn, tail.hash);
                let goes_on = async || match place.entries(*tail).await {
                    Ok(frames) => Ok(!frames.is_empty()),
                    Err(FenceError::Forked { .. }) => Ok(false),
                    Err(error) => Err(error),
                };
                match is_end || (held.end.lsn > tail.lsn && goes_on().await?) {
                    true => Ok(self.standing(held, tail)),
                    false => Err(FenceError::Sealed(seal)),
                }
            }
            judged => judged,
        }
    }

    async fn look(&self, place: &dyn Fence, tail: &Position) -> Result<PlaceStanding, TakeOverError> {
        let held = place.adopt().await.map_err(|error| at(place, error))?;
        self.judge_at(place, held, tail).await.map_err(|error| at(place, error))
    }
}

/// Whether `seal` began the epoch of `tail`, or one before it.
fn is_history(seal: &Sealed, tail: &Position) -> bool {
    seal.next.number < tail.epoch.number || seal.next == tail.epoch
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
            let ahead = self.places.iter().zip(&standings).filter(|(_, standing)| standing.is_ahead);
            let ahead: Vec<_> = ahead.map(|(place, standing)| (place, standing.held.end)).collect();
            self.check_one_history(&ahead).await?;
            let ahead: Vec<_> = ahead.into_iter().map(|(place, end)| (place, end.lsn)).collect();
            self.fetch_from(&ahead.iter().map(|(place, _)| *place).collect::<Vec<_>>()).await?;
            let reached = self.log.tail().position.lsn;
            if let Some((place, last)) = ahead.into_iter().find(|(_, last)| *last > reached) {
                let (url, after) = (place.place().to_owned(), reached);
                return Err(TakeOverError::Gap { url, last, after });
            }
        }
        self.durable().await
    }

    /// Fetches what the places hold beyond the log, which is that of the source itself: what it has lost. A place that another source has
    /// taken over stops it. Durable when it returns.
    pub async fn recover(&self, own: Epoch) -> Result<State, TakeOverError> {
        let mut ahead = Vec::new();
        for place in &self.places {
            let held = place.adopt().await.map_err(|error| at(&**place, error))?;
            if let Some(seal) = held.seals.last().filter(|seal| seal.next.number > own.number) {
                return Err(at(&**place, FenceError::Sealed(seal.clone())));
            }
            if held.epoch == own && held.end.lsn > self.log.tail().position.lsn {
                ahead.push(place);
            }
        }
        self.fetch_from(&ahead).await?;
        self.durable().await
    }

    /// Appends what these places hold behind the log. One may begin where another one ends, so they are asked once for each of them; not for as
    /// long as there is more, since a source that lives goes on for ever.
    async fn fetch_from(&self, places: &[&Arc<dyn Fence>]) -> Result<(), TakeOverError> {
        for _ in places {
            let before = self.log.tail();
            for place in places {
                loop {
                    let after = self.log.tail().position;
                    let frames = place.entries(after).await.map_err(|error| at(&***place, error))?;
                    if frames.is_empty() {
                        break;
                    }
                    self.append(frames).await?;
                }
            }
            if self.log.tail() == before {
                break;
            }
        }
        Ok(())
    }

    /// The places in the order in which everybody seals them: of two successors one then meets the seal of the other at the first of them.
    fn in_order(&self) -> Vec<&Arc<dyn Fence>> {
        let mut places: Vec<_> = self.places.iter().collect();
        places.sort_by_key(|place| place.rank());
        places
    }

    /// Brings every place up to the log and seals it. What was sealed stays sealed if a later step fails; it may be called again.
    pub async fn seal(&self, successor: &Successor) -> Result<(), TakeOverError> {
        let base = self.durable().await?.position;
        // Where that cannot be done nothing is sealed: a mirror whose log reaches further back may still take over.
        let places = self.in_order();
        for place in &places {
            let standing = successor.look(&***place, &base).await?;
            if !standing.is_sealed && standing.held.end.lsn < base.lsn {
                self.bridge(&***place, standing.held.end).await?;
            }
        }
        for place in places {
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
        let (mut after, mut newest) = (self.log.tail().position, None);
        for _ in &self.places {
            let before = after;
            for place in &self.places {
                loop {
                    let frames = place.entries(after).await.map_err(|error| at(&**place, error))?;
                    let Some(last) = frames.last() else { break };
                    after = last.position();
                    for entry in frames.iter().flatten() {
                        let entry = entry.map_err(|error| TakeOverError::Log(error.to_string()))?;
                        let writes =
                            |change: &&Change| (change.table, &change.key[..]) == (key.table(), key.key());
                        if let Some(change) = entry.changes.iter().rev().find(writes) {
                            newest = change.value.clone();
                        }
                    }
                }
            }
            if after == before {
                break;
            }
        }
        Ok(newest)
    }

    /// Claims the epoch in the log, and appends to it what sealed places hold beyond: the same entries, in the new epoch. Durable when it
    /// returns.
    pub async fn begin(&self, successor: &Successor) -> Result<State, TakeOverError> {
        let (next, tail) = (successor.next()?, self.log.tail().position.lsn);
        let mut ahead = Vec::new();
        for place in &self.places {
            let end = place.adopt().await.map_err(|error| at(&**place, error))?.end;
            ahead.extend((end.lsn > tail).then_some((place, end)));
        }
        self.check_one_history(&ahead).await?;
        let log = Arc::clone(&self.log);
        murphy_log::aside(move || log.claim(next).map_err(|error| TakeOverError::Log(error.to_string())))
            .await?;
        loop {
            let before = self.log.tail();
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
            // One may begin where another one ends.
            if self.log.tail() == before {
                break;
            }
        }
        let after = self.log.tail().position.lsn;
        for place in &self.places {
            let last = place.adopt().await.map_err(|error| at(&**place, error))?.end.lsn;
            if last > after {
                return Err(TakeOverError::Gap { url: place.place().to_owned(), last, after });
            }
        }
        self.durable().await
    }

    /// Refuses places of which two hold different entries behind this log, or one does not continue it: nothing is appended of any before people
    /// have decided between them. One that begins behind another one's end is judged when it is come to.
    async fn check_one_history(&self, ahead: &[(&Arc<dyn Fence>, Position)]) -> Result<(), TakeOverError> {
        let tail = self.log.tail().position;
        for (place, _) in ahead {
            place.entries(tail).await.map_err(|error| at(&***place, error))?;
        }
        let Some((furthest, last)) = ahead.iter().max_by_key(|(_, end)| end.lsn) else { return Ok(()) };
        for (place, end) in ahead.iter().filter(|(place, _)| !Arc::ptr_eq(place, furthest)) {
            let is_other = match end.lsn == last.lsn {
                true => end.hash != last.hash,
                false => match furthest.entries(*end).await {
                    Ok(_) => false,
                    Err(FenceError::Forked { .. }) => true,
                    Err(error) => return Err(at(&***furthest, error)),
                },
            };
            if is_other {
                let (place, lsn) = (place.place().to_owned(), end.lsn);
                return Err(at(&***furthest, FenceError::Forked { place, lsn }));
            }
        }
        Ok(())
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
    /// Something has come into an archive that was watched.
    #[error(
        "the source gave a sign of life: {url} got {slot} (lsn {first} to {last}, closed at {} by the clock of node {node}) while it was watched",
        show_time(*wall_time, &jiff::tz::TimeZone::UTC)
    )]
    Alive {
        /// The archive.
        url: String,
        /// The slot.
        slot: String,
        /// Its first entry.
        first: Lsn,
        /// Its last entry.
        last: Lsn,
        /// Who wrote it.
        node: NodeId,
        /// The wall clock of whoever made it when its last frame was closed.
        wall_time: LogTime,
    },
    /// An archive was not seen to be silent.
    #[error("{url} was not watched: whether the source is silent is not known")]
    NotWatched {
        /// The archive.
        url: String,
    },
    /// An archive has entries that were not restored, and none was sealed: they came meanwhile.
    #[error("{url} goes on to lsn {last}, the restore ended at {base}")]
    Behind {
        /// The archive.
        url: String,
        /// Its last entry.
        last: Lsn,
        /// The last entry restored.
        base: Lsn,
    },
    /// An archive goes on behind entries that neither the log nor any other archive has.
    #[error("{url} goes on to lsn {last}, and nobody has what comes right behind lsn {after}")]
    Gap {
        /// The archive.
        url: String,
        /// Its last entry.
        last: Lsn,
        /// The last entry that leads there.
        after: Lsn,
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

/// So often a seal is tried while somebody else ships.
const SEAL_ATTEMPTS: u32 = 32;

#[cfg(test)]
mod tests;
