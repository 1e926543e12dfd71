//! Where bytes of a file are that are in the store already although no entry refers to them: their pack was put, and the entry was refused.
//!
//! Invariants:
//! - What has a place is in its pack as it was written last.
//! - A pack gets one number, whichever entry of whichever file is the first to refer to it.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use parking_lot::{Mutex, MutexGuard};

use crate::decide::PackUse;

/// A pack that is in the store, and how entries refer to it.
#[derive(Debug)]
pub(crate) struct StoredPack(Mutex<PackUse>);

impl StoredPack {
    pub(crate) fn new(pack: PackUse) -> Arc<StoredPack> {
        Arc::new(StoredPack(Mutex::new(pack)))
    }

    /// How the next entry refers to it. Locked after a file's lock and before the sequencer's.
    pub(crate) fn lock(&self) -> MutexGuard<'_, PackUse> {
        self.0.lock()
    }
}

/// A place in the plain bytes of a stored pack.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) pack: Arc<StoredPack>,
    pub(crate) offset: u32,
}

impl Place {
    /// So many bytes later.
    pub(crate) fn later(&self, bytes: u64) -> Place {
        Place { pack: Arc::clone(&self.pack), offset: self.offset + bytes as u32 }
    }
}

/// The places of a file's bytes.
#[derive(Debug, Default)]
pub(crate) struct Places(BTreeMap<u64, (u64, Place)>);

impl Places {
    /// The bytes in `range` are at `place` and what follows it.
    pub(crate) fn insert(&mut self, range: Range<u64>, place: Place) {
        self.cut(range.clone());
        self.0.insert(range.start, (range.end, place));
    }

    /// What is in `range` has no place any more.
    pub(crate) fn cut(&mut self, range: Range<u64>) {
        for (start, end) in self.touched(range.clone()) {
            let Some((_, place)) = self.0.remove(&start) else { continue };
            if end > range.end {
                self.0.insert(range.end, (end, place.later(range.end - start)));
            }
            if start < range.start {
                self.0.insert(start, (range.start, place));
            }
        }
    }

    /// The parts of `range`, each with its place if it has one.
    pub(crate) fn parts(&self, range: Range<u64>) -> Vec<(Range<u64>, Option<Place>)> {
        let (mut parts, mut at) = (Vec::new(), range.start);
        for (start, end) in self.touched(range.clone()) {
            let (from, to) = (start.max(range.start), end.min(range.end));
            if at < from {
                parts.push((at..from, None));
            }
            parts.push((from..to, self.0.get(&start).map(|(_, place)| place.later(from - start))));
            at = to;
        }
        if at < range.end {
            parts.push((at..range.end, None));
        }
        parts
    }

    /// From where to where those reach that are in `range`, wholly or not.
    fn touched(&self, range: Range<u64>) -> Vec<(u64, u64)> {
        if range.is_empty() {
            return Vec::new();
        }
        let before = self.0.range(..=range.start).next_back();
        let first = before.map_or(range.start, |(start, _)| *start);
        let touched = self.0.range(first..range.end).map(|(start, (end, _))| (*start, *end));
        touched.filter(|(_, end)| *end > range.start).collect()
    }
}
