//! Which packs a mirror still needs, without I/O.
//!
//! Invariants:
//! - The data position never passes an entry that names a pack which is not in the own store.
//! - An entry that names a pack for the first time does so under its own LSN as the pack's number. A pack that a later entry forgets
//!   is needed no more.
//! - What is known of at a time is bounded; scanning waits until there is room.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use murphy_fs::{PackMeta, PackRow, RowError, RowKey, Table};
use murphy_log::{DecodeError, Frame, Lsn};

use crate::history::Point;

/// What is to be copied, and how far the bytes are here.
#[derive(Debug)]
pub struct CopyPlan {
    /// The last frame end that has been scanned.
    scanned: Point,
    /// Frame ends up to which the bytes are not known to be here yet, oldest first.
    ends: VecDeque<Point>,
    /// The last frame end up to which every byte is here.
    data: Point,
    /// Needed packs by number; the number is the LSN of the entry that named them.
    needs: BTreeMap<u64, Need>,
}

#[derive(Debug)]
struct Need {
    meta: PackMeta,
    state: NeedState,
    failures: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NeedState {
    Waiting { from: Duration },
    Copying,
}

/// A pack to copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackNeed {
    /// Its number in the tree.
    pub number: u64,
    /// What is known of it.
    pub meta: PackMeta,
}

impl CopyPlan {
    /// A plan that begins after `data`, up to which every byte is known to be here.
    pub fn new(data: Point) -> CopyPlan {
        CopyPlan { scanned: data, ends: VecDeque::new(), data, needs: BTreeMap::new() }
    }

    /// The last frame end up to which every byte is here.
    pub fn data(&self) -> Point {
        self.data
    }

    /// The LSN from which to scan on.
    pub fn next_lsn(&self) -> Lsn {
        self.scanned.lsn.next()
    }

    /// Whether another frame may be scanned now.
    pub fn has_room(&self) -> bool {
        self.needs.len() < MAX_NEEDS && self.ends.len() < MAX_ENDS
    }

    /// Takes the next frame of the log.
    pub fn scan(&mut self, frame: &Frame) -> Result<(), ScanError> {
        // All of the frame or nothing: a frame that cannot be read must not count as scanned.
        let mut found = Vec::new();
        for entry in frame {
            let entry = entry?;
            for change in entry.changes.iter().filter(|change| change.table == Table::Pack.number()) {
                let Some(number) = RowKey::from_parts(change.table, &change.key).number() else { continue };
                match &change.value {
                    None => found.push((number, None)),
                    Some(value) if number == entry.lsn.get() => {
                        let row = PackRow::decode(value)
                            .map_err(|error| ScanError::Row { lsn: entry.lsn, error })?;
                        found.push((number, Some(row.meta())));
                    }
                    Some(_) => {}
                }
            }
        }
        for (number, meta) in found {
            match meta {
                Some(meta) => {
                    let state = NeedState::Waiting { from: Duration::ZERO };
                    self.needs.insert(number, Need { meta, state, failures: 0 });
                }
                None => {
                    self.needs.remove(&number);
                }
            }
        }
        let position = frame.position();
        self.scanned = Point { lsn: position.lsn, hash: position.hash };
        self.ends.push_back(self.scanned);
        self.settle();
        Ok(())
    }

    /// The next pack to copy at `now`, oldest first.
    pub fn start(&mut self, now: Duration) -> Option<PackNeed> {
        let due = |need: &Need| matches!(need.state, NeedState::Waiting { from } if from <= now);
        let (number, need) = self.needs.iter_mut().find(|(_, need)| due(need))?;
        need.state = NeedState::Copying;
        Some(PackNeed { number: *number, meta: need.meta })
    }

    /// Says that the pack is in the own store, durably.
    pub fn done(&mut self, need: &PackNeed) {
        self.needs.remove(&need.number);
        self.settle();
    }

    /// Says that the pack could not be copied; it is tried again later.
    pub fn failed(&mut self, need: &PackNeed, now: Duration) {
        if let Some(known) = self.needs.get_mut(&need.number) {
            let wait = RETRY_FIRST.saturating_mul(1 << known.failures.min(16)).min(RETRY_MOST);
            known.failures += 1;
            known.state = NeedState::Waiting { from: now + wait };
        }
    }

    /// How many packs are known to be missing.
    pub fn missing(&self) -> usize {
        self.needs.len()
    }

    fn settle(&mut self) {
        let first_missing = self.needs.keys().next().map_or(Lsn::MAX, |number| Lsn::new(*number));
        while let Some(end) = self.ends.pop_front_if(|end| end.lsn < first_missing) {
            self.data = end;
        }
    }
}

/// Why a frame cannot be scanned.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ScanError {
    /// Its entries cannot be read.
    #[error(transparent)]
    Entry(#[from] DecodeError),
    /// A pack row cannot be read.
    #[error("the pack row at lsn {lsn} cannot be read: {error}")]
    Row {
        /// The entry.
        lsn: Lsn,
        /// Why not.
        error: RowError,
    },
}

const MAX_NEEDS: usize = 1 << 16;
const MAX_ENDS: usize = 1 << 18;
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MOST: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use murphy_log::{Appender, Change, Digest, Entry, LogTime, State, Usage};

    use super::*;
    use crate::tests::{base_state, keys, ms};

    fn pack_change(number: u64, row: Option<PackRow>) -> Change {
        let key = RowKey::pack(number).key_bytes();
        Change { table: Table::Pack.number(), key, value: row.map(|row| row.encode()) }
    }

    fn row(sequence: u64) -> PackRow {
        PackRow {
            writer: 5,
            sequence,
            footer_digest: [1; 32],
            plain_bytes: 10,
            stored_bytes: 20,
            live_bytes: 10,
        }
    }

    fn frame(from: State, changes: impl Fn(u64) -> Vec<Change>) -> Frame {
        let mut appender = Appender::new(keys(), from.position.epoch, from);
        let lsn = from.position.lsn.next();
        let mut entry = Entry::tick(lsn, LogTime::from_nanos(lsn.get()));
        entry.changes = changes(lsn.get());
        appender.push(&entry, Digest(0), Usage::default()).unwrap();
        appender.close(LogTime::from_nanos(1), Lsn::ROOT).unwrap()
    }

    fn start() -> CopyPlan {
        let base = base_state().position;
        CopyPlan::new(Point { lsn: base.lsn, hash: base.hash })
    }

    #[test]
    fn the_data_position_waits_for_the_oldest_missing_pack() {
        let mut plan = start();
        let first = frame(base_state(), |lsn| vec![pack_change(lsn, Some(row(1)))]);
        let second = frame(first.state(), |lsn| vec![pack_change(lsn, Some(row(2)))]);
        let third = frame(second.state(), |_| Vec::new());
        for frame in [&first, &second, &third] {
            plan.scan(frame).unwrap();
        }
        assert_eq!(plan.data().lsn, Lsn::ROOT);
        let (a, b) = (plan.start(ms(0)).unwrap(), plan.start(ms(0)).unwrap());
        assert_eq!((a.number, b.number, plan.start(ms(0))), (2, 3, None));
        plan.done(&b);
        assert_eq!(plan.data().lsn, Lsn::ROOT);
        plan.failed(&a, ms(0));
        assert_eq!(plan.start(ms(100)), None);
        assert_eq!(plan.start(ms(200)), Some(a));
        plan.done(&a);
        assert_eq!(plan.data(), Point { lsn: Lsn::new(4), hash: third.position().hash });
    }

    /// Counting live bytes of an old pack must not fetch it once more.
    #[test]
    fn a_row_that_is_only_updated_needs_nothing() {
        let mut plan = start();
        plan.scan(&frame(base_state(), |_| vec![pack_change(1, Some(row(1)))])).unwrap();
        assert_eq!((plan.missing(), plan.data().lsn), (0, Lsn::FIRST));
    }

    /// A pack that the source has collected meanwhile will never come.
    #[test]
    fn a_pack_that_was_forgotten_holds_nothing_up() {
        let mut plan = start();
        let named = frame(base_state(), |lsn| vec![pack_change(lsn, Some(row(1)))]);
        plan.scan(&named).unwrap();
        let need = plan.start(ms(0)).unwrap();
        let forgotten = frame(named.state(), |_| vec![pack_change(2, None)]);
        plan.scan(&forgotten).unwrap();
        assert_eq!(plan.data().lsn, Lsn::new(3));
        plan.failed(&need, ms(5));
        assert_eq!(plan.missing(), 0);
    }
}
