//! Reading from packs: caches, coalesced GETs, verification, and falling back from one store to the next.
//!
//! ```text
//! read -> memory cache -> flight of that cell, if one is in the air
//!                      -> new flight: disk cache -> source 0, again if damaged -> source 1, ...
//! ```
//!
//! Invariants:
//! - Every byte returned was verified against the footer, and the footer against the log.
//! - Each cell is taken from the first origin that has it intact; a damaged cell does not hide its neighbours.
//! - Concurrent reads of one cell cost one GET, while the store that is asked is not slow.

mod landing;
mod origin;
mod round;
mod silence;

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use tokio::{runtime::Handle, sync::Semaphore};

use landing::{Landed, Landing};
use origin::Origins;
pub use silence::SilentStore;

use super::{
    cache::{CellCache, CellKey, DiskCache, span_of},
    flight::Flights,
    name::PackName,
    pack::{MAX_PACK_PLAIN, PackDamage, PackError, PackFooter, PackMeta, Stretch},
    store::{BlockStore, BlockStoreError},
};

/// Reads verified bytes from packs. Cloning shares everything.
#[derive(Clone)]
pub struct PackFetcher {
    shared: Arc<Shared>,
}

struct Shared {
    landing: Landing,
    cache: CellCache,
    footers: Arc<Flights<PackName, FooterLanded>>,
    cells: Arc<Flights<CellKey, CellsLanded>>,
    prefetches: Arc<Semaphore>,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// A footer, and the cells that came with it if the pack was fetched whole (`None` for a damaged one).
type FooterLanded = Result<(Arc<PackFooter>, Arc<[Option<Bytes>]>), ReadError>;

/// What became of consecutive cells.
type CellsLanded = Arc<[Landed]>;

impl PackFetcher {
    /// Reads from `sources`, in this order of preference, through `cache` and, for stores far away, `disk`.
    pub fn new(
        sources: Vec<Arc<dyn BlockStore>>,
        cache: CellCache,
        disk: Option<Arc<DiskCache>>,
    ) -> PackFetcher {
        let shared = Shared {
            landing: Landing::new(Origins::new(sources, disk)),
            cache,
            footers: Flights::new(),
            cells: Flights::new(),
            prefetches: Arc::new(Semaphore::new(PREFETCHES_MAX)),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        };
        PackFetcher { shared: Arc::new(shared) }
    }

    /// The plain bytes `plain` of a pack, which lie within it. May be dropped at any time; must run on a tokio runtime.
    pub async fn read(&self, meta: &PackMeta, plain: Range<u64>) -> Result<Bytes, ReadError> {
        check_range(meta, &plain)?;
        if plain.is_empty() {
            return Ok(Bytes::new());
        }
        let (footer, with_footer) = self.shared.footer(meta).await?;
        let wanted = footer.cells_covering(&plain);
        let parts = self.shared.cells(meta, &footer, wanted, &with_footer).await?;
        Ok(footer.assemble(plain, &parts))
    }

    /// The same if all of it is in memory; never waits.
    pub fn try_cached(&self, meta: &PackMeta, plain: Range<u64>) -> Option<Bytes> {
        check_range(meta, &plain).ok()?;
        let footer = self.shared.cached_footer(meta)?;
        let wanted = footer.cells_covering(&plain);
        let mut parts = Vec::new();
        let mut next = wanted.start;
        while next < wanted.end {
            let part = self.shared.cache.stretch(&footer, next)?;
            next = part.cells.end;
            parts.push(part);
        }
        self.shared.hits.fetch_add(wanted.len() as u64, Ordering::Relaxed);
        Some(footer.assemble(plain, &parts))
    }

    /// Brings `plain` into the cache in the background, on `handle`, and a little more of what goes on up to `until`, so that what is
    /// read ahead piece by piece comes in whole spans. Tells whether it is there or on its way: when too many are under way it is not
    /// begun, because reading ahead must not stand in the way of reading. A failure is left to the reader to meet.
    pub fn prefetch(&self, handle: &Handle, meta: &PackMeta, plain: Range<u64>, until: u64) -> bool {
        if check_range(meta, &(plain.start..plain.end.max(until))).is_err() {
            return false;
        }
        // A sequential reader asks for nearly the same range with every read.
        if self.shared.has_all(meta, &plain) {
            return true;
        }
        let Ok(permit) = Arc::clone(&self.shared.prefetches).try_acquire_owned() else { return false };
        let (shared, meta) = (Arc::clone(&self.shared), *meta);
        handle.spawn(async move {
            let _permit = permit;
            match tokio::time::timeout(PREFETCH_TIMEOUT, shared.warm(&meta, &plain, until)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "read-ahead failed"),
                Err(_) => tracing::debug!(pack = %meta.name, "read-ahead is given up"),
            }
        });
        true
    }

    /// The stores that have not answered lately, and are asked last until they do.
    pub fn silent_stores(&self) -> Vec<SilentStore> {
        self.shared.landing.origins.silences.stores()
    }

    /// What was done so far.
    pub fn stats(&self) -> FetchStats {
        FetchStats {
            cell_hits: self.shared.hits.load(Ordering::Relaxed),
            cell_misses: self.shared.misses.load(Ordering::Relaxed),
            ..self.shared.landing.origins.stats()
        }
    }
}

impl std::fmt::Debug for PackFetcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackFetcher").field("origins", &self.shared.landing.origins).finish_non_exhaustive()
    }
}

impl Shared {
    fn cached_footer(&self, meta: &PackMeta) -> Option<Arc<PackFooter>> {
        // A wrong digest here means that the log says two things of one pack; the store then decides which is true.
        self.cache.footer(meta.name).filter(|footer| footer.digest() == meta.footer_digest)
    }

    fn has_all(&self, meta: &PackMeta, plain: &Range<u64>) -> bool {
        let Some(footer) = self.cached_footer(meta) else { return false };
        footer.cells_covering(plain).all(|cell| self.cache.has_cell(&footer, cell))
    }

    /// Brings the cells of `plain` into the cache and puts nothing together.
    async fn warm(
        self: &Arc<Self>,
        meta: &PackMeta,
        plain: &Range<u64>,
        until: u64,
    ) -> Result<(), ReadError> {
        let (footer, _) = self.footer(meta).await?;
        let mut covering = footer.cells_covering(plain);
        if let Some(last) = covering.clone().last() {
            let end = footer.cells_covering(&(plain.start..until)).end.min(span_of(&footer, last).end);
            covering.end = covering.end.max(end);
        }
        let missing: Vec<usize> = covering.filter(|cell| !self.cache.has_cell(&footer, *cell)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let landed = self.fetch_missing(meta, &footer, &missing).await;
        let mut failed = landed.iter().flat_map(|landed| landed.iter()).filter_map(Landed::error);
        failed.next().map_or(Ok(()), |error| Err(error.clone()))
    }

    async fn footer(self: &Arc<Self>, meta: &PackMeta) -> FooterLanded {
        if let Some(footer) = self.cached_footer(meta) {
            return Ok((footer, Arc::default()));
        }
        let launch = |keys| {
            let (shared, meta) = (Arc::clone(self), *meta);
            vec![(keys, async move { shared.fetch_footer(&meta).await }.boxed())]
        };
        let mut landed = None;
        for flight in self.footers.board([meta.name], launch) {
            landed = Some(flight.await);
        }
        match landed.expect("a flight was launched for the only key") {
            // Somebody else fetched the pack by another description of it.
            Ok((footer, _)) if footer.digest() != meta.footer_digest => {
                Err(PackError { pack: meta.name, damage: PackDamage::FooterDigest }.into())
            }
            landed => landed,
        }
    }

    /// Fetches the end of a pack, or the whole of a small one.
    async fn fetch_footer(&self, meta: &PackMeta) -> FooterLanded {
        let whole = meta.stored_len <= WHOLE_BYTES;
        let range = if whole { 0..meta.stored_len } else { PackFooter::tail_range(meta) };
        let described = *meta;
        let parse = move |bytes: &Bytes| PackFooter::parse(&described, bytes);
        let (footer, bytes) = self.landing.first_intact(meta, range, parse).await?;
        let footer = Arc::new(footer);
        self.cache.insert_footer(Arc::clone(&footer));
        if !whole {
            return Ok((footer, Arc::default()));
        }
        let all = 0..footer.cell_count();
        let cells = self.landing.open_cells(&footer, all, bytes).await;
        // A damaged cell is asked for again, and elsewhere, by whoever needs it.
        let cells: Vec<_> = cells.into_iter().map(Result::ok).collect();
        for (number, cell) in cells.iter().enumerate() {
            if let Some(plain) = cell {
                self.cache.insert(&footer, &Stretch::of_cell(number, plain.clone()));
            }
        }
        self.misses.fetch_add(cells.len() as u64, Ordering::Relaxed);
        Ok((footer, cells.into()))
    }

    /// The cells `wanted`, which exist, in order.
    async fn cells(
        self: &Arc<Self>,
        meta: &PackMeta,
        footer: &Arc<PackFooter>,
        wanted: Range<usize>,
        with_footer: &[Option<Bytes>],
    ) -> Result<Vec<Stretch>, ReadError> {
        let mut found: Vec<Stretch> = Vec::new();
        loop {
            let mut missing = Vec::new();
            let mut parts = Vec::new();
            let mut next = wanted.start;
            while next < wanted.end {
                let fresh = found.iter().find(|part| part.cells.contains(&next)).cloned();
                let came = || with_footer.get(next).cloned().flatten();
                let came = || came().map(|plain| Stretch::of_cell(next, plain));
                match fresh.or_else(came).or_else(|| self.hit(footer, next)) {
                    Some(part) => {
                        next = part.cells.end;
                        parts.push(part);
                    }
                    None => {
                        missing.push(next);
                        next += 1;
                    }
                }
            }
            if missing.is_empty() {
                return Ok(parts);
            }
            // What was in the cache is held on to: it may be pushed out while the rest is fetched.
            found = parts;
            for landed in self.fetch_missing(meta, footer, &missing).await {
                for landed in landed.iter().filter(|landed| landed.is_within(&wanted)) {
                    match landed {
                        Landed::Intact(stretch) => found.push(stretch.clone()),
                        Landed::Lost(_, error) => return Err(error.clone()),
                    }
                }
            }
        }
    }

    fn hit(&self, footer: &PackFooter, cell: usize) -> Option<Stretch> {
        let stretch = self.cache.stretch(footer, cell)?;
        self.hits.fetch_add(stretch.cells.len() as u64, Ordering::Relaxed);
        Some(stretch)
    }

    /// Waits for the flights that bring `missing`, launching those that are not in the air. A cell that arrived in the cache
    /// in the meantime is left out.
    async fn fetch_missing(
        self: &Arc<Self>,
        meta: &PackMeta,
        footer: &Arc<PackFooter>,
        missing: &[usize],
    ) -> Vec<CellsLanded> {
        // Of a pack of many small files all are likely to be wanted soon, and one GET brings them.
        let small = footer.piece_count() as usize >= SMALL_PIECES * footer.cell_count();
        let extra = if small { 0..footer.cell_count() } else { 0..0 };
        let extra = extra.filter(|cell| !missing.contains(cell) && !self.cache.has_cell(footer, *cell));
        let keys: Vec<CellKey> = missing.iter().copied().chain(extra).map(|cell| (meta.name, cell)).collect();
        let launch = |without: Vec<CellKey>| {
            let mut cells: Vec<usize> = without.into_iter().map(|(_, cell)| cell).collect();
            cells.retain(|cell| !self.cache.has_cell(footer, *cell));
            cells.sort_unstable();
            let runs = runs(&cells).into_iter();
            // Small files are kept and forgotten one by one.
            let cut = runs.flat_map(|run| if small { vec![run] } else { cut_out_spans(footer, run) });
            cut.map(|run| self.launch(meta, footer, run, small)).collect()
        };
        let flights = self.cells.board(keys, launch);
        futures::future::join_all(flights).await
    }

    fn launch(
        self: &Arc<Self>,
        meta: &PackMeta,
        footer: &Arc<PackFooter>,
        run: Range<usize>,
        small: bool,
    ) -> (Vec<CellKey>, BoxFuture<'static, CellsLanded>) {
        let keys = run.clone().map(|cell| (meta.name, cell)).collect();
        let (shared, meta, footer) = (Arc::clone(self), *meta, Arc::clone(footer));
        let together = !small && run == span_of(&footer, run.start);
        let fetch = async move {
            let landed = shared.landing.cells(&meta, &footer, run.clone(), together).await;
            for landed in &landed {
                if let Landed::Intact(stretch) = landed {
                    shared.cache.insert(&footer, stretch);
                }
            }
            shared.misses.fetch_add(run.len() as u64, Ordering::Relaxed);
            Arc::from(landed)
        };
        (keys, fetch.boxed())
    }
}

/// What a fetcher has done since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FetchStats {
    /// Cells that came from memory.
    pub cell_hits: u64,
    /// Cells that had to be fetched.
    pub cell_misses: u64,
    /// Reads answered by the disk cache.
    pub disk_hits: u64,
    /// Requests to stores.
    pub gets: u64,
    /// Bytes that stores answered with.
    pub bytes: u64,
    /// Answers, of stores or of the disk cache, that had something damaged in them.
    pub damaged: u64,
}

/// Why bytes of a pack could not be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// The pack does not have such bytes: the tree that refers to them is wrong.
    #[error("bytes {start} to {end} were asked for of pack {pack}, which has {plain_len}")]
    OutOfRange {
        /// The pack.
        pack: PackName,
        /// The first byte asked for.
        start: u64,
        /// The byte after the last.
        end: u64,
        /// How many the log says it has.
        plain_len: u64,
    },
    /// No source has the bytes intact, and all were asked.
    #[error(transparent)]
    Damaged(#[from] PackError),
    /// No source has the pack.
    #[error("pack {pack} is in none of: {sources}")]
    NotFound {
        /// The pack.
        pack: PackName,
        /// The labels of the stores.
        sources: String,
    },
    /// A source that may have the bytes did not give them.
    #[error("cannot read pack {pack}: {source}")]
    Store {
        /// The pack.
        pack: PackName,
        /// The last such failure.
        source: BlockStoreError,
    },
}

fn check_range(meta: &PackMeta, plain: &Range<u64>) -> Result<(), ReadError> {
    if plain.start <= plain.end && plain.end <= meta.plain_len && plain.end <= MAX_PACK_PLAIN as u64 {
        return Ok(());
    }
    let (start, end) = (plain.start, plain.end);
    Err(ReadError::OutOfRange { pack: meta.name, start, end, plain_len: meta.plain_len })
}

/// Consecutive numbers of the sorted `cells`, together.
fn runs(cells: &[usize]) -> Vec<Range<usize>> {
    let together = cells.chunk_by(|a, b| a + 1 == *b);
    together.filter_map(|run| Some(*run.first()?..run.last()? + 1)).collect()
}

/// The whole spans in a run, each by itself, and what is left of it before and after them.
fn cut_out_spans(footer: &PackFooter, run: Range<usize>) -> Vec<Range<usize>> {
    let mut cut: Vec<Range<usize>> = Vec::new();
    let mut rest = run.clone();
    for cell in run {
        let span = span_of(footer, cell);
        if cell == span.start && span.end <= rest.end {
            cut.extend([rest.start..span.start, span.clone()]);
            rest.start = span.end;
        }
    }
    cut.push(rest);
    cut.retain(|part| !part.is_empty());
    cut
}

/// A pack up to this size is fetched whole: a second round trip would cost more than its bytes.
const WHOLE_BYTES: u64 = 256 << 10;

/// With this many pieces per cell on average a pack is one of many small files.
const SMALL_PIECES: usize = 2;

/// How many reads ahead may be under way.
const PREFETCHES_MAX: usize = 16;

/// No read ahead goes on for longer: whoever reads has been refused by then, and begins anew.
const PREFETCH_TIMEOUT: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
