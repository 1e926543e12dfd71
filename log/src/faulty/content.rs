//! The bytes of one file on a faulty disk: what readers see, and what is on the medium.
//!
//! Invariants:
//! - A sector that is not dirty is not written by the next sync, whether the medium has it or lost it.

use std::collections::BTreeSet;

use super::{Chance, SECTOR_BYTES};

#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    cached: Vec<u8>,
    medium: Vec<u8>,
    /// Sectors that were written since the last sync.
    dirty: BTreeSet<usize>,
    /// Whether the length has changed since.
    resized: bool,
    changes: u64,
}

impl Content {
    /// A file that holds these bytes for certain.
    pub(super) fn synced(bytes: Vec<u8>) -> Content {
        Content { cached: bytes.clone(), medium: bytes, ..Content::default() }
    }

    pub(super) fn cached(&self) -> &[u8] {
        &self.cached
    }

    /// How often it was written: the clock of a disk that has none.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        self.grow(end as u64 as usize);
        self.cached[offset..end].copy_from_slice(bytes);
        self.touch(offset, end);
    }

    /// Makes it at least `length` bytes long; the new ones are zero.
    pub(super) fn grow(&mut self, length: usize) {
        if length > self.cached.len() {
            self.cached.resize(length, 0);
            self.resized = true;
        }
    }

    pub(super) fn truncate(&mut self, length: usize) {
        let before = self.cached.len();
        if length < before {
            self.cached.truncate(length);
            self.resized = true;
            self.touch(length, before);
        }
    }

    fn touch(&mut self, from: usize, to: usize) {
        self.changes += 1;
        self.dirty.extend(from / SECTOR_BYTES..to.div_ceil(SECTOR_BYTES));
    }

    pub(super) fn sync(&mut self) {
        self.medium.resize(self.cached.len(), 0);
        for sector in std::mem::take(&mut self.dirty) {
            copy_sector(&self.cached, &mut self.medium, sector, SECTOR_BYTES);
        }
        self.resized = false;
    }

    /// Some of what was dirty reaches the medium, and nothing is dirty any more.
    pub(super) fn fail_sync(&mut self, chance: &mut Chance) {
        let survivor = self.survivor(chance);
        self.medium = survivor.medium;
        self.dirty.clear();
        self.resized = false;
    }

    /// What a power cut leaves.
    pub(super) fn survivor(&self, chance: &mut Chance) -> Content {
        let mut medium = self.medium.clone();
        if self.resized && chance.keeps() {
            medium.resize(self.cached.len(), 0);
        }
        for sector in &self.dirty {
            if chance.tears() {
                let torn = chance.below(SECTOR_BYTES as u64) as usize;
                copy_sector(&self.cached, &mut medium, *sector, torn);
            } else if chance.keeps() {
                copy_sector(&self.cached, &mut medium, *sector, SECTOR_BYTES);
            }
        }
        Content { changes: self.changes, ..Content::synced(medium) }
    }
}

/// Copies the first `bytes` of a sector, as far as both have it.
fn copy_sector(from: &[u8], to: &mut [u8], sector: usize, bytes: usize) {
    let start = sector * SECTOR_BYTES;
    let end = (start + bytes).min(from.len()).min(to.len());
    if start < end {
        to[start..end].copy_from_slice(&from[start..end]);
    }
}
