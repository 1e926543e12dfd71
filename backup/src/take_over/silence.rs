//! Silence: seen, not computed. A source whose clock is an hour behind looks dead by its own times, one whose clock is a year ahead looks alive
//! for a year.
//!
//! ```text
//!   look at every place -> nothing new in any of them for a minute -> restore -> look once more -> first seal
//! ```
//!
//! Invariants:
//! - Neither log time nor any wall clock is believed: time passes by the watcher's own monotonic clock. What the source's clocks say is told to people.
//! - Between the end of the first look at a place and the beginning of the last one lies [`SILENCE`]. The last one must succeed; looks in between
//!   may fail, since what came meanwhile is still there then.
//! - Where every place ended goes to whoever seals: what came behind that, after the watch, is a sign of life too.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::join_all;
use murphy_fs::{Fence, FenceError, Held};
use murphy_log::{Clock, LogTime, Lsn};

use super::{TakeOverError, at};
use crate::{
    descriptor::Archive,
    fence::ArchiveFence,
    sealing::refused,
    slot::SlotHeader,
    walk::{Boundary, walk},
};

/// Places that are watched for signs of life of their source, from the look at them on with which it begins.
#[derive(Clone, Debug)]
pub struct Watch {
    clock: Arc<dyn Clock>,
    /// When all places had been looked at, by the monotonic clock.
    began: Duration,
    places: Vec<Watched>,
    newest: Option<Newest>,
}

/// A place, and where it ended.
#[derive(Clone, Debug)]
struct Watched {
    /// What tells it apart, whatever the URLs are.
    rank: String,
    archive: Archive,
    end: Boundary,
}

/// Where places ended while nothing came into any of them for [`SILENCE`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Silence {
    /// By the ranks of the places.
    ends: BTreeMap<String, Lsn>,
}

/// The newest entry that places hold, as its source dated it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Newest {
    /// The entry.
    pub lsn: Lsn,
    /// Its log time.
    pub log_time: LogTime,
    /// The wall clock of the source when its frame was closed.
    pub wall_time: LogTime,
}

impl Watch {
    /// Begins with what was found by the last look at each of `places`, which is over.
    pub fn of<'a>(
        places: impl IntoIterator<Item = (&'a ArchiveFence, &'a Held)>,
        clock: Arc<dyn Clock>,
    ) -> Watch {
        let (mut watched, mut newest) = (Vec::new(), None::<Newest>);
        for (place, held) in places {
            let end = Boundary::before(held.end, held.epoch);
            watched.push(Watched { rank: place.rank(), archive: place.archive().clone(), end });
            let last = place.last_slot().map(|slot| Newest::of(&slot));
            newest = newest.into_iter().chain(last).max_by_key(|newest| newest.lsn);
        }
        Watch { began: clock.monotonic(), clock, places: watched, newest }
    }

    /// The newest entry that any of the places holds; `None` if they hold none.
    pub fn newest(&self) -> Option<Newest> {
        self.newest
    }

    /// Returns once nothing has come into any of the places for [`SILENCE`], and refuses as soon as something has. `on_wait` is told before
    /// each pause how much is left. A place that does not answer is asked again, for half as long beyond that.
    ///
    /// Nothing is changed; it may be dropped at any time.
    pub async fn until_silent(&self, on_wait: &(dyn Fn(Duration) + Sync)) -> Result<Silence, TakeOverError> {
        loop {
            let watched = self.clock.monotonic().saturating_sub(self.began);
            let rest = SILENCE.saturating_sub(watched);
            match self.look().await {
                Ok(()) if rest.is_zero() => return Ok(self.silence()),
                Ok(()) => {}
                Err(error @ TakeOverError::Fence { error: FenceError::Unavailable { .. }, .. }) => {
                    if watched >= SILENCE + SILENCE / 2 {
                        return Err(error);
                    }
                    tracing::debug!(%error, "it is asked again");
                }
                Err(error) => return Err(error),
            }
            on_wait(rest);
            let pause = if rest.is_zero() { LOOK } else { rest.min(LOOK) };
            tokio::time::sleep(pause).await;
        }
    }

    fn silence(&self) -> Silence {
        let ends = self.places.iter().map(Watched::last);
        Silence { ends: ends.collect() }
    }

    /// Refuses if anything has come. One that does not answer hides no sign of life elsewhere.
    async fn look(&self) -> Result<(), TakeOverError> {
        let mut unanswered = Ok(());
        for looked in join_all(self.places.iter().map(Watched::look)).await {
            match looked {
                Err(error @ TakeOverError::Fence { error: FenceError::Unavailable { .. }, .. }) => {
                    unanswered = Err(error);
                }
                looked => looked?,
            }
        }
        unanswered
    }
}

impl Watched {
    fn last(&self) -> (String, Lsn) {
        (self.rank.clone(), self.end.position.lsn)
    }

    async fn look(&self) -> Result<(), TakeOverError> {
        let url = self.archive.url();
        let fence = |error| TakeOverError::Fence { url: url.to_owned(), error };
        let walk = walk(&self.archive, Some(self.end)).await;
        let walk = walk.map_err(|error| fence(refused(&self.archive, error)))?;
        if let Some(seal) = walk.seals.first() {
            return Err(fence(FenceError::Sealed(seal.sealed())));
        }
        match walk.slots.first().zip(walk.names.first()) {
            Some((slot, name)) => Err(alive(&self.archive, slot, name)),
            None => Ok(()),
        }
    }
}

impl Silence {
    /// Refuses if `place`, which was just looked at and holds `held`, has got anything since it was watched, or was not watched.
    pub fn check(&self, place: &ArchiveFence, held: &Held) -> Result<(), TakeOverError> {
        let Some(end) = self.ends.get(&place.rank()).copied() else {
            return Err(TakeOverError::NotWatched { url: place.place().to_owned() });
        };
        match place.slot_behind(end) {
            _ if held.end.lsn <= end => Ok(()),
            Some((slot, name)) => Err(alive(place.archive(), &slot, &name)),
            None => {
                let reason = format!("it ends at lsn {}, and nothing is seen to lead there", held.end.lsn);
                Err(at(place, FenceError::Unavailable { place: place.place().to_owned(), reason }))
            }
        }
    }
}

impl Newest {
    fn of(slot: &SlotHeader) -> Newest {
        Newest { lsn: slot.last, log_time: slot.last_time, wall_time: slot.wall_time }
    }
}

fn alive(archive: &Archive, slot: &SlotHeader, name: &str) -> TakeOverError {
    TakeOverError::Alive {
        url: archive.url().to_owned(),
        slot: name.to_owned(),
        first: slot.first,
        last: slot.last,
        node: slot.node,
        wall_time: slot.wall_time,
    }
}

/// A source is silent that has given no sign of life for so long. It ticks every 20 s, every 40 s while its log time waits for its wall clock,
/// and a tick is in an archive a second later.
pub const SILENCE: Duration = Duration::from_secs(60);
/// So often a place is looked at.
const LOOK: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
