//! Whom bytes of packs are asked of: the disk cache, then the stores in order; and how often that was.
//!
//! Invariants:
//! - What they give is believed by nobody before it was verified.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;

use super::{FetchStats, silence::Silences};
use crate::data::{cache::DiskCache, pack::PackMeta, store::BlockStore};

/// Where bytes may come from.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    Disk(Arc<DiskCache>),
    Store { store: Arc<dyn BlockStore>, is_second: bool },
}

/// The disk cache and the stores.
#[derive(Debug)]
pub(super) struct Origins {
    pub(super) sources: Vec<Arc<dyn BlockStore>>,
    pub(super) disk: Option<Arc<DiskCache>>,
    pub(super) silences: Arc<Silences>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    disk_hits: AtomicU64,
    gets: AtomicU64,
    bytes: AtomicU64,
    damaged: AtomicU64,
}

impl Origins {
    pub(super) fn new(sources: Vec<Arc<dyn BlockStore>>, disk: Option<Arc<DiskCache>>) -> Origins {
        Origins { sources, disk, silences: Arc::default(), counts: Counts::default() }
    }

    pub(super) fn count_get(&self) {
        self.counts.gets.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_bytes(&self, bytes: u64) {
        self.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn count_damage(&self) {
        self.counts.damaged.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn stats(&self) -> FetchStats {
        FetchStats {
            disk_hits: self.counts.disk_hits.load(Ordering::Relaxed),
            gets: self.counts.gets.load(Ordering::Relaxed),
            bytes: self.counts.bytes.load(Ordering::Relaxed),
            damaged: self.counts.damaged.load(Ordering::Relaxed),
            ..FetchStats::default()
        }
    }

    pub(super) async fn get_from_disk(
        &self,
        disk: &Arc<DiskCache>,
        meta: &PackMeta,
        range: &Range<u64>,
    ) -> Option<Bytes> {
        if !disk.covers(meta.name, range) {
            return None;
        }
        let (disk, name, range) = (Arc::clone(disk), meta.name, range.clone());
        let bytes = murphy_log::aside(move || disk.get(name, &range)).await?;
        self.counts.disk_hits.fetch_add(1, Ordering::Relaxed);
        Some(bytes.into())
    }
}
