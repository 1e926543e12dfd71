//! Where bytes of a file are that are in the store already although no entry refers to them: their pack was put, and the entry was refused;
//! or the put got no answer, and they may be there.
//!
//! Invariants:
//! - What has a place is in its pack as it was written last.
//! - A pack gets one number, whichever entry of whichever file is the first to refer to it.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use parking_lot::{Mutex, MutexGuard};

use crate::{PackRow, data::PackMeta, decide::PackUse};

/// A pack that is in the store, or may be, and how entries refer to it.
#[derive(Debug)]
pub(crate) struct StoredPack {
    pack: Mutex<PackUse>,
    meta: PackMeta,
    proof: Mutex<Proof>,
}

/// What is known of whether a pack is in the store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Proof {
    /// It was not put.
    Absent,
    /// A put got no answer.
    Unknown,
    /// It is durable.
    Stored,
}

impl StoredPack {
    /// A pack that was not put.
    pub(crate) fn new(row: PackRow) -> Arc<StoredPack> {
        let (meta, pack) = (row.meta(), Mutex::new(PackUse::New(row)));
        Arc::new(StoredPack { pack, meta, proof: Mutex::new(Proof::Absent) })
    }

    /// How the next entry refers to it. Locked after a file's lock and before the sequencer's.
    pub(crate) fn lock(&self) -> MutexGuard<'_, PackUse> {
        self.pack.lock()
    }

    pub(crate) fn meta(&self) -> &PackMeta {
        &self.meta
    }

    pub(crate) fn proof(&self) -> Proof {
        *self.proof.lock()
    }

    /// Writes down what has become known; what was known to be stored stays that.
    pub(crate) fn learn(&self, proof: Proof) {
        let mut known = self.proof.lock();
        *known = proof.max(*known);
    }
}

/// A place in the plain bytes of a pack.
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
