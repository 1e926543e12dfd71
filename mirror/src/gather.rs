//! Gathering: after a promotion without all bytes, the packs that the own store may lack are looked for everywhere.
//!
//! ```text
//!   the tree's rows -> wanted: named in the gap, or missing -> own store? -> place after place -> verified -> own store -> "found"
//!                                                                               \-> nobody has it -> "missing"
//! ```
//!
//! Invariants:
//! - A pack is called found after the own store has it durably and intact: it was read there, or came verified; every entry that says so makes archives and mirrors fetch it.
//! - A pack is called missing after every place has said that it does not have it, or, if some do not answer, after a bounded time. Whoever
//!   was given up is asked and not waited for.
//! - What is settled stands in the log: whoever begins again goes on where the rows say. Memory does not grow with the number of packs.

mod members;

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use murphy_fs::{
    BlockStore, Errno, HeldPack, PACKS_PER_ENTRY, PackNews, PackNumber, PackRow, ViewError, Volume,
    look_for_pack,
};
use murphy_log::{Clock, Lsn};
use tokio::sync::watch;

use crate::{
    copier::{PackCopyError, PackSource, copy_verified},
    dial::PackFetchError,
};

pub use members::MemberPacks;

/// Entries that were copied before their bytes were: those behind `after`, up to `upto`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gap {
    /// The data position at the promotion.
    pub after: Lsn,
    /// The metadata position.
    pub upto: Lsn,
}

impl Gap {
    fn holds(&self, lsn: Lsn) -> bool {
        lsn > self.after && lsn <= self.upto
    }
}

/// Somebody who may have packs.
#[derive(Clone)]
pub struct PackPlace {
    /// For people.
    pub name: String,
    /// How it is asked.
    pub source: Arc<dyn PackSource>,
    /// Whether a pack is not called missing as long as it does not answer. Nobody waits for who was given up, who is asked all the same: packs
    /// are verified, whoever has them.
    pub is_awaited: bool,
}

/// Who may have packs, as it changes.
pub trait PackPlaces: Send + Sync {
    /// Everybody who is to be asked now, in order.
    fn places(&self) -> Vec<PackPlace>;

    /// Returns when somebody may have come, or come back, since [`places`](PackPlaces::places) was called last. It may be dropped.
    fn changed(&self) -> BoxFuture<'_, ()>;
}

/// How far the gathering is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GatherStatus {
    /// Packs that were found, since the start.
    pub found: u64,
    /// Packs that are still asked for, as of the last round.
    pub wanted: u64,
    /// Packs that nobody has, as of the last round.
    pub missing: u64,
}

/// Looks for packs on behalf of a source.
pub struct Gatherer {
    /// The source's volume, which leads.
    pub volume: Volume,
    /// The source's own store, and nobody else's.
    pub store: Arc<dyn BlockStore>,
    /// Who is asked.
    pub places: Arc<dyn PackPlaces>,
    /// What the promotion lacked; `None` if it lacked nothing, or all of it is settled.
    pub gap: Option<Gap>,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// How many packs are looked for at a time.
    pub helpers: usize,
    /// How long places that do not answer are waited for; see [`ASKING`].
    pub asking: Duration,
    /// Tells how far it is.
    pub status: watch::Sender<GatherStatus>,
}

impl Gatherer {
    /// Looks for every pack of the gap until each is in the own store or called missing, durably.
    pub async fn settle(&self) -> Result<(), GatherError> {
        let (began, mut pause) = (self.clock.monotonic(), PAUSE_FIRST);
        loop {
            let waited = self.clock.monotonic().saturating_sub(began);
            let round = self.round(self.gap, waited >= self.asking).await?;
            if round.wanted == 0 {
                self.volume.durable_here().await.map_err(GatherError::Record)?;
                return Ok(());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Goes on looking for missing packs until none is missing: slowly, and soon after somebody has come.
    pub async fn look_again(&self) -> Result<(), GatherError> {
        while self.round(None, false).await?.missing > 0 {
            tokio::time::sleep(LOOK_PAUSE).await;
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                () = self.places.changed() => {}
            }
        }
        Ok(())
    }

    /// Asks once for everything that is wanted. With `give_up`, places that do not answer are waited for no more.
    async fn round(&self, gap: Option<Gap>, give_up: bool) -> Result<GatherStatus, GatherError> {
        let places = self.places.places();
        let asked = Asked { down: places.iter().map(|_| parking_lot::Mutex::new(None)).collect(), places };
        let mut round =
            Round { gatherer: self, give_up, counted: GatherStatus::default(), news: News::default() };
        let mut rows = Some(self.volume.known_packs());
        let mut looking = FuturesUnordered::new();
        loop {
            while looking.len() < self.helpers.max(1)
                && let Some(packs) = rows.take()
            {
                let (packs, next) = next_wanted(packs, gap).await?;
                rows = packs;
                if let Some((number, row)) = next {
                    let asked = &asked;
                    looking.push(async move { (number, row, self.look(asked, &row).await) });
                }
            }
            let Some((number, row, sight)) = looking.next().await else { break };
            round.note(number, &row, sight).await?;
        }
        round.record(PackNews::Found).await?;
        round.record(PackNews::Missing).await?;
        let counted = round.counted;
        self.status.send_modify(|status| {
            (status.wanted, status.missing) = (counted.wanted, counted.missing);
        });
        Ok(counted)
    }

    /// Looks for one pack, at home first.
    async fn look(&self, asked: &Asked, row: &PackRow) -> Sight {
        let meta = row.meta();
        match look_for_pack(&*self.store, &meta).await {
            Ok(HeldPack::Intact) => return Sight::Here,
            Ok(HeldPack::Damaged(_) | HeldPack::Nothing) => {}
            Err(error) => return Sight::Unknown(error.to_string()),
        }
        let mut unknown = None;
        for (place, down) in asked.places.iter().zip(&asked.down) {
            // Who cannot be reached is asked once a round.
            let known_down = down.lock().clone();
            if let Some(why) = known_down {
                unknown = unknown.or(place.is_awaited.then_some(why));
                continue;
            }
            match copy_verified(&meta, &*place.source, &*self.store).await {
                Ok(()) => return Sight::Here,
                Err(PackCopyError::Fetch(PackFetchError::Missing(_))) => {}
                Err(error) => {
                    let why = format!("{}: {error}", place.name);
                    if matches!(error, PackCopyError::Fetch(PackFetchError::NotConnected)) {
                        *down.lock() = Some(why.clone());
                    }
                    unknown = unknown.or(place.is_awaited.then_some(why));
                }
            }
        }
        unknown.map_or(Sight::Nowhere, Sight::Unknown)
    }
}

/// The next row that is wanted, and those behind it. Reading rows may wait for the disk.
async fn next_wanted<I>(
    mut packs: I,
    gap: Option<Gap>,
) -> Result<(Option<I>, Option<(PackNumber, PackRow)>), GatherError>
where
    I: Iterator<Item = Result<(PackNumber, PackRow), ViewError>> + Send + 'static,
{
    let wanted = move |(number, row): &(PackNumber, PackRow)| match row.needed_since(*number) {
        None => row.live_bytes > 0,
        Some(since) => gap.is_some_and(|gap| gap.holds(since)),
    };
    let found = murphy_log::aside(move || {
        let found = packs.find(|row| row.as_ref().map_or(true, wanted)).transpose();
        found.map(|found| (found.is_some().then_some(packs), found))
    });
    found.await.map_err(GatherError::Rows)
}

/// Who is asked in one round, and who of them could not be reached, and why.
struct Asked {
    places: Vec<PackPlace>,
    down: Vec<parking_lot::Mutex<Option<String>>>,
}

/// What came of looking for a pack.
enum Sight {
    /// The own store has it.
    Here,
    /// Everybody has said that they do not have it.
    Nowhere,
    /// Somebody did not say, and why.
    Unknown(String),
}

/// What is to be written down.
#[derive(Default)]
struct News {
    found: Vec<PackNumber>,
    missing: Vec<PackNumber>,
}

/// One round over all rows.
struct Round<'a> {
    gatherer: &'a Gatherer,
    give_up: bool,
    counted: GatherStatus,
    news: News,
}

impl Round<'_> {
    async fn note(&mut self, number: PackNumber, row: &PackRow, sight: Sight) -> Result<(), GatherError> {
        let name = row.meta().name;
        let is_lost = match sight {
            Sight::Here => {
                self.news.found.push(number);
                if self.news.found.len() >= PACKS_PER_ENTRY {
                    self.record(PackNews::Found).await?;
                }
                return Ok(());
            }
            Sight::Nowhere => true,
            Sight::Unknown(why) => {
                tracing::debug!(%name, why, "a pack was not found yet");
                self.give_up
            }
        };
        if row.is_missing() {
            self.counted.missing += 1;
        } else if is_lost {
            tracing::error!(%name, number = number.0, "nobody has a pack: what is in it cannot be read");
            self.counted.missing += 1;
            self.news.missing.push(number);
            if self.news.missing.len() >= PACKS_PER_ENTRY {
                self.record(PackNews::Missing).await?;
            }
        } else {
            self.counted.wanted += 1;
        }
        Ok(())
    }

    /// Writes down what is known by now.
    async fn record(&mut self, news: PackNews) -> Result<(), GatherError> {
        let packs = match news {
            PackNews::Found => std::mem::take(&mut self.news.found),
            PackNews::Missing => std::mem::take(&mut self.news.missing),
        };
        if packs.is_empty() {
            return Ok(());
        }
        let count = packs.len() as u64;
        self.gatherer.volume.record_packs(packs, news).wait().await.map_err(GatherError::Record)?;
        match news {
            PackNews::Found => self.gatherer.status.send_modify(|status| status.found += count),
            PackNews::Missing => tracing::warn!(count, "packs were lost with the source before"),
        }
        Ok(())
    }
}

/// Why packs are not looked for any more.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// The tree cannot be read.
    #[error("the packs of the tree cannot be read: {0}")]
    Rows(ViewError),
    /// What is known of packs cannot be written down.
    #[error("what is known of packs cannot be written down: {0:?}")]
    Record(Errno),
}

/// How long a promoted source waits for places that do not answer before it calls a pack missing.
pub const ASKING: Duration = Duration::from_secs(600);
const PAUSE_FIRST: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 1000 });
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// How often a source asks for packs that are missing, if nobody comes.
const LOOK_AGAIN: Duration = Duration::from_secs(600);
/// How soon at most: each look reads the rows of all packs.
const LOOK_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 5000 });

#[cfg(test)]
mod tests;
