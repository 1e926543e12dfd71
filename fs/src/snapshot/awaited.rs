//! Names whose inodes are still to come: the join that keeps a name's place out of its inode.
//!
//! An inode row holds the place (parent, cookie) of one of its names, and the cookie is a hash that no compressor shortens. Names come
//! before the inodes that they stand for whenever a file is younger than its directory, so writer and reader remember the place of each
//! name until its inode passes. Both make the same calls in the same order, so both know the same.
//!
//! Invariants:
//! - At most [`AWAITED_MAX`] places are remembered; what finds no room is stored in full with its inode.
//! - Of several names of one inode the first counts.

use std::collections::{HashMap, hash_map::Entry};

/// The place of a name: its directory and its cookie there.
pub(super) type Place = (u64, u64);

/// Places of names by the inode that they stand for.
#[derive(Debug)]
pub(super) struct Awaited {
    places: HashMap<u64, Place>,
    passed: Option<u64>,
    limit: usize,
    most: usize,
}

impl Awaited {
    pub(super) fn new() -> Awaited {
        Awaited::with_limit(AWAITED_MAX)
    }

    /// One that remembers fewer, so that tests meet the limit.
    pub(super) fn with_limit(limit: usize) -> Awaited {
        Awaited { places: HashMap::new(), passed: None, limit, most: 0 }
    }

    /// Remembers that a name of inode `number` is at `place`, unless that inode has passed.
    pub(super) fn name(&mut self, number: u64, place: Place) {
        if self.passed.is_some_and(|passed| number <= passed) {
            return;
        }
        let room = self.places.len() < self.limit;
        if let Entry::Vacant(entry) = self.places.entry(number)
            && room
        {
            entry.insert(place);
            self.most = self.most.max(self.places.len());
        }
    }

    /// The place of the first name of inode `number`, which thereby passes. Numbers come in ascending order.
    pub(super) fn take(&mut self, number: u64) -> Option<Place> {
        self.passed = self.passed.max(Some(number));
        self.places.remove(&number)
    }

    /// The most places that were remembered at once.
    #[cfg(test)]
    pub(super) fn most(&self) -> usize {
        self.most
    }
}

/// About 56 MiB of places: 7/8 of 2^21, so that the table does not grow beyond.
const AWAITED_MAX: usize = 7 << 18;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_counts_and_a_passed_inode_takes_no_room() {
        let mut awaited = Awaited::new();
        awaited.name(7, (1, 16));
        awaited.name(7, (1, 32));
        assert_eq!(awaited.take(7), Some((1, 16)));
        awaited.name(7, (1, 48));
        awaited.name(3, (1, 64));
        assert_eq!(awaited.take(7), None);
        assert_eq!(awaited.most(), 1);
    }

    #[test]
    fn a_flat_directory_of_any_size_takes_bounded_memory() {
        let mut awaited = Awaited::with_limit(1000);
        for number in 0..100_000 {
            awaited.name(number, (1, number * 16));
        }
        assert_eq!(awaited.most(), 1000);
        assert_eq!(awaited.take(999), Some((1, 999 * 16)));
        assert_eq!(awaited.take(1000), None);
    }
}
