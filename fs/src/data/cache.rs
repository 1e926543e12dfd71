//! Caches of what was read from packs: verified cells in memory, stored bytes on disk.
//!
//! Invariants:
//! - The memory cache holds only verified bytes. The disk cache vouches for nothing: what comes from it is verified like the
//!   answer of a store.
//! - Both have a limit. Losing either costs time, never data.

mod disk;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use quick_cache::{
    DefaultHashBuilder, Options, OptionsBuilder, Weighter,
    sync::{Cache, DefaultLifecycle},
};

pub use disk::{DiskCache, DiskCacheError};

use super::{
    cell::{CELL_BYTES, SPAN_CELLS},
    name::PackName,
    pack::{PackFooter, Stretch},
};

/// Verified cells and footers in memory. Cloning shares it.
///
/// What is read in long runs is kept span by span, everything else cell by cell: an entry is one buffer, and weighs what that takes.
#[derive(Clone, Debug)]
pub struct CellCache {
    cells: Arc<Cache<Place, Bytes, ByMemory>>,
    footers: Arc<Cache<PackName, Arc<PackFooter>, ByMemory>>,
}

/// A pack and the number of a cell in it.
pub(super) type CellKey = (PackName, usize);

/// Which bytes of which pack an entry holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Place {
    Cell(PackName, usize),
    Span(PackName, usize),
}

impl CellCache {
    /// A cache of about `bytes` bytes of cells, and up to an eighth of that for footers.
    pub fn new(bytes: u64) -> CellCache {
        let footer_bytes = (bytes / 8).max(FOOTER_BYTES_MIN);
        CellCache {
            cells: Arc::new(Cache::with_options(
                cell_options(bytes),
                ByMemory,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            )),
            footers: Arc::new(Cache::with_weighter(
                items(footer_bytes, FOOTER_BYTES),
                footer_bytes,
                ByMemory,
            )),
        }
    }

    /// How many bytes the cached cells and footers take.
    pub fn weight(&self) -> u64 {
        self.cells.weight() + self.footers.weight()
    }

    /// The cell `cell` of a pack, and those that are in one buffer with it. A span is not held any longer for having been asked for:
    /// whoever reads that much at once seldom comes back, and the next ones must find room before they are asked for.
    pub(super) fn stretch(&self, footer: &PackFooter, cell: usize) -> Option<Stretch> {
        let (pack, span) = (footer.name(), span_of(footer, cell));
        if let Some(plain) = self.cells.peek(&Place::Span(pack, span.start)) {
            return Some(Stretch { cells: span, plain });
        }
        self.cells.get(&Place::Cell(pack, cell)).map(|plain| Stretch::of_cell(cell, plain))
    }

    pub(super) fn has_cell(&self, footer: &PackFooter, cell: usize) -> bool {
        let (pack, span) = (footer.name(), span_of(footer, cell));
        self.cells.contains_key(&Place::Span(pack, span.start))
            || self.cells.contains_key(&Place::Cell(pack, cell))
    }

    /// Keeps one cell, or a whole span.
    pub(super) fn insert(&self, footer: &PackFooter, stretch: &Stretch) {
        let Stretch { cells, plain } = stretch;
        let whole = *cells == span_of(footer, cells.start);
        debug_assert!(whole || cells.len() == 1, "an entry is a cell or a span");
        let place = if whole && cells.len() > 1 { Place::Span } else { Place::Cell };
        self.cells.insert(place(footer.name(), cells.start), plain.clone());
    }

    pub(super) fn footer(&self, pack: PackName) -> Option<Arc<PackFooter>> {
        self.footers.get(&pack)
    }

    pub(super) fn insert_footer(&self, footer: Arc<PackFooter>) {
        self.footers.insert(footer.name(), footer);
    }
}

impl Default for CellCache {
    fn default() -> CellCache {
        CellCache::new(DEFAULT_BYTES)
    }
}

/// The cells of the span in which `cell` is.
pub(super) fn span_of(footer: &PackFooter, cell: usize) -> Range<usize> {
    let first = cell - cell % SPAN_CELLS;
    first..footer.cell_count().min(first + SPAN_CELLS)
}

/// Weighs what an entry takes in memory.
#[derive(Clone, Debug)]
struct ByMemory;

impl Weighter<Place, Bytes> for ByMemory {
    fn weight(&self, _: &Place, plain: &Bytes) -> u64 {
        (plain.len() + ENTRY_BYTES) as u64
    }
}

impl Weighter<PackName, Arc<PackFooter>> for ByMemory {
    fn weight(&self, _: &PackName, footer: &Arc<PackFooter>) -> u64 {
        (footer.cell_count() * FOOTER_CELL_BYTES + ENTRY_BYTES) as u64
    }
}

/// Half of the cache is for what was not asked for again: all that is read ahead must stay until it is asked for. Few shards, each of
/// which holds several spans of it.
fn cell_options(bytes: u64) -> Options {
    let shards = usize::try_from(bytes / SHARD_BYTES_MIN).unwrap_or(SHARDS_MAX).clamp(1, SHARDS_MAX);
    OptionsBuilder::new()
        .shards(shards)
        .hot_allocation(0.5)
        .estimated_items_capacity(items(bytes, CELL_BYTES))
        .weight_capacity(bytes)
        .build()
        .expect("capacities are given")
}

/// How many items of `each` bytes to expect; the cache splits itself into fewer shards when they are few.
fn items(bytes: u64, each: usize) -> usize {
    usize::try_from(bytes / each as u64).unwrap_or(usize::MAX).clamp(ITEMS_MIN, ITEMS_MAX)
}

/// The memory of a node's cell cache unless it is told otherwise.
const DEFAULT_BYTES: u64 = 256 << 20;

/// The least memory of a shard.
const SHARD_BYTES_MIN: u64 = 32 << 20;
const SHARDS_MAX: usize = 64;

/// What an entry takes besides its value.
const ENTRY_BYTES: usize = 96;

/// What one cell of a footer takes in memory.
const FOOTER_CELL_BYTES: usize = 56;

/// What the footer of a full pack takes.
const FOOTER_BYTES: usize = 64 * FOOTER_CELL_BYTES + ENTRY_BYTES;

/// Below this a read would fetch footers again and again.
const FOOTER_BYTES_MIN: u64 = 1 << 20;

const ITEMS_MIN: usize = 16;
const ITEMS_MAX: usize = 1 << 22;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::name::WriterId;

    /// The footer of a pack of `cells` full cells.
    fn footer(number: u64, cells: usize) -> Arc<PackFooter> {
        let mut builder = crate::data::PackBuilder::new(PackName::new(WriterId::from_u64(1), number));
        builder.add(&vec![1; cells * CELL_BYTES]).unwrap();
        let pack = builder.finish().unwrap();
        Arc::new(PackFooter::parse(&pack.meta(), &pack.bytes).unwrap())
    }

    fn stretch(cells: Range<usize>) -> Stretch {
        Stretch { plain: vec![0; cells.len() * CELL_BYTES].into(), cells }
    }

    #[test]
    fn the_cache_stays_below_its_limit_and_holds_a_good_part_of_it() {
        let cache = CellCache::new(8 << 20);
        for number in 0..1000 {
            cache.insert(&footer(number, 1), &stretch(0..1));
        }
        assert!(((4 << 20)..=(8 << 20)).contains(&cache.weight()), "{}", cache.weight());
        assert!(cache.has_cell(&footer(999, 1), 0));
    }

    /// The fear: a cache full of what was read pushes out what was read ahead, and everything is fetched twice.
    #[test]
    fn what_is_read_ahead_is_there_when_the_reader_comes() {
        for whole in [true, false] {
            let cache = CellCache::new(64 << 20);
            let step = if whole { SPAN_CELLS } else { 1 };
            let cells: Vec<_> = (0..64).map(|number| footer(number, 64)).collect();
            let cells: Vec<_> =
                cells.iter().flat_map(|pack| (0..64).step_by(step).map(move |cell| (pack, cell))).collect();
            let ahead = (8 << 20) / (step * CELL_BYTES);
            for (at, (pack, cell)) in cells.iter().enumerate() {
                cache.insert(pack, &stretch(*cell..cell + step));
                if let Some((pack, cell)) = at.checked_sub(ahead).map(|read| cells[read]) {
                    assert!(cache.stretch(pack, cell).is_some(), "{whole}: cell {cell} of {}", pack.name());
                }
            }
        }
    }

    #[test]
    fn a_span_answers_for_its_cells_and_for_no_others() {
        let (cache, pack) = (CellCache::new(64 << 20), footer(1, 40));
        cache.insert(&pack, &stretch(16..32));
        cache.insert(&pack, &stretch(32..40));
        cache.insert(&pack, &stretch(3..4));
        let found: Vec<_> =
            (0..40).map(|cell| cache.stretch(&pack, cell).map(|stretch| stretch.cells)).collect();
        for (cell, found) in found.into_iter().enumerate() {
            let expected = match cell {
                3 => Some(3..4),
                0..16 => None,
                16..32 => Some(16..32),
                _ => Some(32..40),
            };
            assert_eq!(cache.has_cell(&pack, cell), expected.is_some());
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn even_a_tiny_cache_holds_a_footer() {
        let mut builder = crate::data::PackBuilder::new(PackName::new(WriterId::from_u64(1), 1));
        builder.add(&[1; 4 << 20]).unwrap();
        let pack = builder.finish().unwrap();
        let footer = PackFooter::parse(&pack.meta(), &pack.bytes).unwrap();
        let cache = CellCache::new(0);
        cache.insert_footer(Arc::new(footer));
        assert!(cache.footer(pack.name).is_some());
    }
}
