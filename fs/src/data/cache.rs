//! Caches of what was read from packs: verified cells in memory, stored bytes on disk.
//!
//! Invariants:
//! - The memory cache holds only verified bytes. The disk cache vouches for nothing: what comes from it is verified like the
//!   answer of a store.
//! - Both have a limit. Losing either costs time, never data.

mod disk;

use std::sync::Arc;

use bytes::Bytes;
use quick_cache::{Weighter, sync::Cache};

pub use disk::{DiskCache, DiskCacheError};

use super::{cell::CELL_BYTES, name::PackName, pack::PackFooter};

/// Verified cells and footers in memory. Cloning shares it.
#[derive(Clone, Debug)]
pub struct CellCache {
    cells: Arc<Cache<CellKey, Bytes, ByMemory>>,
    footers: Arc<Cache<PackName, Arc<PackFooter>, ByMemory>>,
}

/// A pack and the number of a cell in it.
pub(super) type CellKey = (PackName, usize);

impl CellCache {
    /// A cache of about `bytes` bytes of cells, and up to an eighth of that for footers.
    pub fn new(bytes: u64) -> CellCache {
        let footer_bytes = (bytes / 8).max(FOOTER_BYTES_MIN);
        CellCache {
            cells: Arc::new(Cache::with_weighter(items(bytes, CELL_BYTES), bytes, ByMemory)),
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

    pub(super) fn cell(&self, pack: PackName, cell: usize) -> Option<Bytes> {
        self.cells.get(&(pack, cell))
    }

    pub(super) fn has_cell(&self, pack: PackName, cell: usize) -> bool {
        self.cells.contains_key(&(pack, cell))
    }

    pub(super) fn insert_cell(&self, pack: PackName, cell: usize, plain: Bytes) {
        self.cells.insert((pack, cell), plain);
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

/// Weighs what an entry takes in memory.
#[derive(Clone, Debug)]
struct ByMemory;

impl Weighter<CellKey, Bytes> for ByMemory {
    fn weight(&self, _: &CellKey, plain: &Bytes) -> u64 {
        (plain.len() + ENTRY_BYTES) as u64
    }
}

impl Weighter<PackName, Arc<PackFooter>> for ByMemory {
    fn weight(&self, _: &PackName, footer: &Arc<PackFooter>) -> u64 {
        (footer.cell_count() * FOOTER_CELL_BYTES + ENTRY_BYTES) as u64
    }
}

/// How many items of `each` bytes to expect; the cache splits itself into fewer shards when they are few.
fn items(bytes: u64, each: usize) -> usize {
    usize::try_from(bytes / each as u64).unwrap_or(usize::MAX).clamp(ITEMS_MIN, ITEMS_MAX)
}

/// The memory of a node's cell cache unless it is told otherwise.
const DEFAULT_BYTES: u64 = 256 << 20;

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

    #[test]
    fn the_cache_stays_below_its_limit_and_holds_a_good_part_of_it() {
        let cache = CellCache::new(8 << 20);
        for number in 0..1000 {
            cache.insert_cell(PackName::new(WriterId::from_u64(1), number), 0, vec![0; CELL_BYTES].into());
        }
        assert!(((4 << 20)..=(8 << 20)).contains(&cache.weight()), "{}", cache.weight());
        assert!(cache.has_cell(PackName::new(WriterId::from_u64(1), 999), 0));
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
