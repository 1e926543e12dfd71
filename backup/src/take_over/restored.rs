//! Taking over with a tree that was restored, and no log: what one archive lacks only another one can give.
//!
//! ```text
//!   look at every place: as it was when its silence was seen? -> seal each, lagging ones brought up before -> carry over what came in between
//! ```
//!
//! Invariants:
//! - Nothing is sealed unless every archive was seen to be silent ([`super::silence`]), and still is.
//! - Nothing is sealed while an archive holds more than was restored, unless another one was sealed before: then that is where the old epoch
//!   ends, and what the old source still got into other archives goes on in the new epoch, in every archive.
//! - Nothing is sealed before every place that lacks something has it: what cannot be brought up is said while nothing has happened.
//! - What is carried over is final: every archive is sealed before anything is.

use std::sync::Arc;

use murphy_fs::{BlockStore, BlockStores, Fence, FenceError, Held};
use murphy_log::{Digest, Epoch, Frame, Log, Lsn, MemoryLog, Position, State, Usage};

use super::{PlaceStanding, SEAL_ATTEMPTS, Silence, Successor, TakeOverError, TakeOverLog, at, under};
use crate::{
    descriptor::ArchiveKind,
    fence::{ArchiveFence, Supplies},
    ship::Losses,
};

/// Ends the epoch of the source at `base` in every one of `places`, for a successor whose tree was restored up to there; refused if the source
/// has shown life since the `silence` of all places was seen. Once an attempt of the successor has sealed one, none is asked for. A place that lacks
/// entries gets them from another one.
///
/// Says up to where every place holds the history then. If that is beyond `base`, the source got more into one place after another one had been
/// sealed: it is in all of them, in the new epoch, and the tree is restored anew before it is used. It may be called again, with the same
/// attempts. Packs that a place lacks come from the others, and from the successor's `own` store.
pub async fn take_over_at(
    places: &[ArchiveFence],
    (successor, own): (&Successor, Option<Arc<dyn BlockStore>>),
    base: Position,
    silence: Option<&Silence>,
) -> Result<Lsn, TakeOverError> {
    let mut over = RestoredTakeOver { places: places.iter().collect(), successor, own, base };
    over.places.sort_by_key(|place| place.rank());
    let (mut is_begun, mut is_settled, mut ahead, mut alive) = (false, false, None, None);
    for place in &over.places {
        let standing = over.look(place).await?;
        alive = alive.or_else(|| still_silent(silence, place, &standing.held).err());
        is_begun |= successor.has_sealed(&standing.held);
        is_settled |= standing.is_settled;
        if standing.is_ahead && ahead.is_none() {
            ahead = Some(over.behind(place, &standing).await);
        }
    }
    // Who sealed and was given up may have shut the source out of a place that it does not reach, and of no other one.
    if let Some(alive) = alive.filter(|_| !is_begun) {
        return Err(alive);
    }
    if let Some(behind) = ahead.filter(|_| !is_settled) {
        return Err(behind);
    }
    over.bring_all_up().await?;
    for place in &over.places {
        over.seal_one(place, is_settled).await?;
        is_settled = true;
    }
    over.carry_over().await
}

fn still_silent(silence: Option<&Silence>, place: &ArchiveFence, held: &Held) -> Result<(), TakeOverError> {
    match silence {
        Some(silence) => silence.check(place, held),
        None => Err(TakeOverError::NotWatched { url: place.place().to_owned() }),
    }
}

/// A take-over by a successor that has a tree and no log.
struct RestoredTakeOver<'a> {
    /// In the order in which everybody seals them.
    places: Vec<&'a ArchiveFence>,
    successor: &'a Successor,
    own: Option<Arc<dyn BlockStore>>,
    base: Position,
}

impl RestoredTakeOver<'_> {
    async fn look(&self, place: &ArchiveFence) -> Result<PlaceStanding, TakeOverError> {
        let held = place.adopt().await.map_err(|error| at(place, error))?;
        let standing = self.successor.judge_tree_at(place, held, &self.base).await;
        standing.map_err(|error| at(place, error))
    }

    /// Brings every place up to the base. What one lacks another one may have behind a gap of its own, where nobody finds it before that is closed:
    /// as long as any of them gets on, the others are tried again.
    async fn bring_all_up(&self) -> Result<(), TakeOverError> {
        loop {
            let (mut refused, mut gets_on) = (None, false);
            for place in &self.places {
                let standing = self.look(place).await?;
                let end = standing.held.end.lsn;
                if end >= self.base.lsn || standing.is_sealed || standing.is_passed {
                    continue;
                }
                if let Err(error) = self.relay(place, &standing, self.base.lsn).await {
                    refused = refused.or(Some(error));
                }
                gets_on |= self.look(place).await?.held.end.lsn > end;
            }
            match refused {
                None => return Ok(()),
                Some(error) if !gets_on => return Err(error),
                Some(_) => {}
            }
        }
    }

    /// Seals a place, at the base or behind it: it is looked at until it is seen to lead to the seal. A place that loses a slot on
    /// the way gets it from another one, before its seal and behind it: the successor's log begins at the base, so nobody could later.
    async fn seal_one(&self, place: &ArchiveFence, is_settled: bool) -> Result<(), TakeOverError> {
        let (next, base) = (self.successor.next()?, self.base);
        let mut refused = None;
        for _ in 0..SEAL_ATTEMPTS {
            let standing = self.look(place).await?;
            let end = standing.held.end;
            if standing.is_ahead && !is_settled {
                return Err(self.behind(place, &standing).await);
            }
            // What it lacks then is carried over, once every place is sealed.
            if standing.is_sealed {
                return Ok(());
            }
            // Behind the seal of one who was given up nothing is shipped in that one's name.
            if end.lsn < base.lsn && !standing.is_passed {
                self.relay(place, &standing, base.lsn).await?;
                continue;
            }
            if standing.is_ahead {
                self.check_continued(place, end.lsn).await?;
            }
            let last = if standing.is_ahead || standing.is_passed {
                end
            } else {
                Position { epoch: end.epoch, ..base }
            };
            match place.seal(last, next).await {
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

    /// Brings every place, all of which are sealed, up to where the furthest one ends. Says where that is.
    async fn carry_over(&self) -> Result<Lsn, TakeOverError> {
        let mut standings = Vec::new();
        for place in &self.places {
            standings.push((*place, self.look(place).await?));
        }
        // The one that ends first shows the way of the new epoch to whoever restores meanwhile: it is brought up first.
        standings.sort_by_key(|(_, standing)| standing.held.end.lsn);
        let Some((furthest, last)) = standings.last().map(|(place, standing)| (*place, standing.held.end))
        else {
            return Ok(self.base.lsn);
        };
        for (place, standing) in &standings {
            let end = standing.held.end;
            let is_other = match end.lsn == last.lsn {
                true => end.hash != last.hash,
                false => furthest.entries(end).await.map_err(|error| at(furthest, error))?.is_empty(),
            };
            if is_other {
                let place = place.place().to_owned();
                return Err(at(furthest, FenceError::Forked { place, lsn: end.lsn }));
            }
        }
        let to = self.base.lsn.max(last.lsn);
        for (place, standing) in &standings {
            self.relay(place, standing, to).await?;
        }
        Ok(to)
    }

    /// Refuses what is held behind the base and does not continue it.
    async fn check_continued(&self, place: &ArchiveFence, last: Lsn) -> Result<(), TakeOverError> {
        let frames = place.entries(self.base).await.map_err(|error| at(place, error))?;
        match frames.is_empty() {
            false => Ok(()),
            true => Err(TakeOverError::Gap { url: place.place().to_owned(), last, after: self.base.lsn }),
        }
    }

    /// Ships to `lagging` what the other places hold behind it, up to `to`: as it is, or in the epoch that it was sealed for.
    async fn relay(
        &self,
        lagging: &ArchiveFence,
        standing: &PlaceStanding,
        to: Lsn,
    ) -> Result<(), TakeOverError> {
        let epoch = standing.is_settled.then_some(standing.held.epoch);
        let mut from = standing.held.end;
        while from.lsn < to {
            let frames = self.behind_of(lagging, from, to).await?;
            let log = self.log_of(lagging, from, epoch, frames).await?;
            let last = log.tail().position.lsn;
            let lost = Some(Arc::new(DeniedByAll) as Arc<dyn Losses>);
            let supplies = Supplies { log, packs: self.packs(lagging), lost };
            let supplied = lagging.clone().with_supplies(supplies).known_up_to(from);
            supplied.ship(last).await.map_err(|error| at(lagging, error))?;
            // Behind a slot that was lost may be others.
            from = supplied.adopt().await.map_err(|error| at(lagging, error))?.end;
        }
        Ok(())
    }

    /// The next frames that another place holds behind `from`, up to `to`: what a place has got beyond that meanwhile was not restored.
    async fn behind_of(
        &self,
        lagging: &ArchiveFence,
        from: Position,
        to: Lsn,
    ) -> Result<Vec<Frame>, TakeOverError> {
        let mut why = None;
        for place in self.places.iter().filter(|place| !std::ptr::eq(**place, lagging)) {
            match place.entries(from).await {
                Ok(mut frames) => {
                    frames.retain(|frame| frame.last() <= to);
                    if !frames.is_empty() {
                        return Ok(frames);
                    }
                }
                Err(error) => why = Some(at(*place, error)),
            }
        }
        let url = lagging.place().to_owned();
        Err(why.unwrap_or(TakeOverError::Lags { url, last: from.lsn, base: to }))
    }

    /// A log of these frames, which begin behind `from`, in `epoch` if they are not to stay in theirs.
    async fn log_of(
        &self,
        lagging: &ArchiveFence,
        from: Position,
        epoch: Option<Epoch>,
        frames: Vec<Frame>,
    ) -> Result<Arc<dyn Log>, TakeOverError> {
        let begins = State { position: from, digest: Digest::default(), usage: Usage::default() };
        let keys = lagging.archive().keys();
        let frames = match epoch {
            Some(epoch) => under(keys, epoch, begins, &frames)?,
            None => frames,
        };
        let log: Arc<dyn Log> = Arc::new(MemoryLog::new(begins));
        let memory = TakeOverLog { log: Arc::clone(&log), keys: keys.clone(), places: Vec::new() };
        memory.append(frames).await?;
        Ok(log)
    }

    /// The packs of the own store and of all other places.
    fn packs(&self, lagging: &ArchiveFence) -> Arc<dyn BlockStore> {
        let others = self.places.iter().filter(|place| !std::ptr::eq(**place, lagging));
        let full = others.filter(|place| place.archive().descriptor().kind == ArchiveKind::Full);
        let full = full.map(|place| Arc::new(place.archive().packs()) as Arc<dyn BlockStore>);
        let mut stores = self.own.iter().cloned().chain(full);
        match stores.next() {
            Some(first) => Arc::new(BlockStores::new(first, stores.collect())),
            None => Arc::new(lagging.archive().packs()),
        }
    }

    /// What to say of a place that goes on behind the base: whoever restores again reads that too, if anything leads there.
    async fn behind(&self, place: &ArchiveFence, standing: &PlaceStanding) -> TakeOverError {
        let (url, last) = (place.place().to_owned(), standing.held.end.lsn);
        match self.check_continued(place, last).await {
            Ok(()) => TakeOverError::Behind { url, last, base: self.base.lsn },
            Err(error) => error,
        }
    }
}

/// The source is gone: what the own store and every other place say that they do not have, nobody has any more. One that does not answer
/// is waited for.
#[derive(Debug)]
struct DeniedByAll;

impl Losses for DeniedByAll {
    fn may_have(&self, _: Lsn) -> bool {
        true
    }
}
