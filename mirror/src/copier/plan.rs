//! Which packs a mirror still needs, without I/O.
//!
//! Invariants:
//! - At the data position every pack that the tree there needs is in the own store. A pack is needed from the entry on that names it,
//!   under its own LSN as the pack's number, or says that it was found again; a pack that a later entry calls missing, or forgets, is
//!   needed no more.
//! - What is known of at a time is bounded: scanning waits until there is room for needs, and of many frame ends some are forgotten.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use murphy_fs::{PackMeta, PackNumber, PackRow, RowError, RowKey, Table};
use murphy_log::{DecodeError, Frame, Lsn};

use crate::history::Point;

/// What is to be copied, and how far the bytes are here.
#[derive(Debug)]
pub struct CopyPlan {
    /// The last frame end that has been scanned.
    scanned: Point,
    /// Frame ends up to which the bytes are not known to be here yet, oldest first; the last one is always among them.
    ends: VecDeque<Point>,
    /// The last frame end up to which every byte is here.
    data: Point,
    /// Needed packs by number.
    needs: BTreeMap<PackNumber, Need>,
    /// The same in the order in which they were needed.
    order: BTreeSet<(Lsn, PackNumber)>,
}

#[derive(Debug)]
struct Need {
    meta: PackMeta,
    since: Lsn,
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
    pub number: PackNumber,
    /// The entry from which on it is needed.
    pub since: Lsn,
    /// What is known of it.
    pub meta: PackMeta,
}

impl CopyPlan {
    /// A plan that begins after `data`, up to which every byte is known to be here.
    pub fn new(data: Point) -> CopyPlan {
        CopyPlan {
            scanned: data,
            ends: VecDeque::new(),
            data,
            needs: BTreeMap::new(),
            order: BTreeSet::new(),
        }
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
        self.needs.len() < MAX_NEEDS
    }

    /// Whether there is no room because of packs that did not come however often they were asked for. An entry that has not been scanned
    /// may say that nobody has them.
    pub fn is_stuck(&self) -> bool {
        !self.has_room() && self.needs.values().all(|need| need.failures >= STUCK_FAILURES)
    }

    /// Takes the next frame of the log.
    pub fn scan(&mut self, frame: &Frame) -> Result<(), ScanError> {
        // All of the frame or nothing: a frame that cannot be read must not count as scanned.
        let mut found = Vec::new();
        for entry in frame {
            let entry = entry?;
            for change in entry.changes.iter().filter(|change| change.table == Table::Pack.number()) {
                let Some(number) = RowKey::from_parts(change.table, &change.key).number() else { continue };
                let number = PackNumber(number);
                let Some(value) = &change.value else {
                    found.push((number, None));
                    continue;
                };
                let row = PackRow::decode(value).map_err(|error| ScanError::Row { lsn: entry.lsn, error })?;
                match row.needed_since(number) {
                    None => found.push((number, None)),
                    Some(since) if since == entry.lsn => found.push((number, Some((row.meta(), since)))),
                    // Only its live bytes were counted.
                    Some(_) => {}
                }
            }
        }
        for (number, need) in found {
            match need {
                Some((meta, since)) => self.need(number, meta, since),
                None => self.forget(number),
            }
        }
        let position = frame.position();
        self.scanned = Point { lsn: position.lsn, hash: position.hash };
        if self.ends.len() >= MAX_ENDS {
            // The data position then advances in larger steps.
            let mut is_kept = false;
            self.ends.retain(|_| {
                is_kept = !is_kept;
                is_kept
            });
        }
        self.ends.push_back(self.scanned);
        self.settle();
        Ok(())
    }

    /// The next pack to copy at `now`, oldest first.
    pub fn start(&mut self, now: Duration) -> Option<PackNeed> {
        let due = |need: &Need| matches!(need.state, NeedState::Waiting { from } if from <= now);
        let (_, number) = self.order.iter().find(|(_, number)| self.needs.get(number).is_some_and(due))?;
        let need = self.needs.get_mut(number)?;
        need.state = NeedState::Copying;
        Some(PackNeed { number: *number, since: need.since, meta: need.meta })
    }

    /// Says that the pack is in the own store, durably.
    pub fn done(&mut self, need: &PackNeed) {
        self.forget(need.number);
        self.settle();
    }

    /// Says that the pack could not be copied; it is tried again later.
    pub fn failed(&mut self, need: &PackNeed, now: Duration) {
        if let Some(known) = self.needs.get_mut(&need.number).filter(|known| known.since == need.since) {
            let wait = RETRY_FIRST.saturating_mul(1 << known.failures.min(16)).min(RETRY_MOST);
            known.failures += 1;
            known.state = NeedState::Waiting { from: now + wait };
        }
    }

    /// Whether the data position covers everything that was scanned.
    pub fn has_all(&self) -> bool {
        self.data == self.scanned
    }

    /// How many packs are known to be missing.
    pub fn missing(&self) -> usize {
        self.needs.len()
    }

    /// A pack that is needed already stays needed from where it was.
    fn need(&mut self, number: PackNumber, meta: PackMeta, since: Lsn) {
        self.needs.entry(number).or_insert_with(|| {
            self.order.insert((since, number));
            Need { meta, since, state: NeedState::Waiting { from: Duration::ZERO }, failures: 0 }
        });
    }

    fn forget(&mut self, number: PackNumber) {
        if let Some(need) = self.needs.remove(&number) {
            self.order.remove(&(need.since, number));
        }
    }

    fn settle(&mut self) {
        let first_missing = self.order.first().map_or(Lsn::MAX, |(since, _)| *since);
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

const MAX_NEEDS: usize = if cfg!(test) { 8 } else { 1 << 16 };
const MAX_ENDS: usize = if cfg!(test) { 16 } else { 1 << 18 };
/// With the pauses in between about a minute.
const STUCK_FAILURES: u32 = 8;
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MOST: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use murphy_fs::PackState;
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
            state: PackState::Here,
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
        assert_eq!((a.number, b.number, plan.start(ms(0))), (PackNumber(2), PackNumber(3), None));
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

    fn named(sequence: u64) -> impl Fn(u64) -> Vec<Change> {
        move |lsn| vec![pack_change(lsn, Some(row(sequence)))]
    }

    /// The row of a pack that was named before, as a later entry writes it.
    fn said(number: u64, state: impl Fn(u64) -> PackState) -> impl Fn(u64) -> Vec<Change> {
        move |lsn| vec![pack_change(number, Some(PackRow { state: state(lsn), ..row(1) }))]
    }

    fn found(lsn: u64) -> PackState {
        PackState::Found { at: Lsn::new(lsn) }
    }

    /// The fear: bytes that are gone with a source hold the data position of every mirror for ever, and with it every fsync.
    #[test]
    fn a_pack_that_is_called_missing_holds_nothing_up_and_is_needed_again_once_it_is_found() {
        let mut plan = start();
        let first = frame(base_state(), named(1));
        let second = frame(first.state(), named(2));
        let missing = frame(second.state(), said(2, |_| PackState::Missing));
        let again = frame(missing.state(), said(2, found));
        let counted = frame(again.state(), said(2, |_| found(5)));
        for frame in [&first, &second] {
            plan.scan(frame).unwrap();
        }
        let (lost, kept) = (plan.start(ms(0)).unwrap(), plan.start(ms(0)).unwrap());
        plan.done(&kept);
        assert_eq!(plan.data().lsn, Lsn::ROOT, "the pack of lsn 2 is not here");
        plan.scan(&missing).unwrap();
        assert_eq!((plan.data().lsn, plan.missing()), (Lsn::new(4), 0));
        plan.scan(&again).unwrap();
        assert_eq!((plan.data().lsn, plan.missing()), (Lsn::new(4), 1), "it is needed at lsn 5");
        plan.failed(&lost, ms(0));
        let need = plan.start(ms(0)).expect("what failed was asked for another time");
        assert_eq!((need.number, need.since), (PackNumber(2), Lsn::new(5)));
        plan.scan(&counted).unwrap();
        plan.done(&need);
        assert_eq!((plan.data().lsn, plan.missing()), (Lsn::new(6), 0), "counting it needs nothing");
    }

    /// A pack that a promoted source found at another mirror was never called missing: mirrors that lack it still wait where they were.
    #[test]
    fn a_pack_that_is_found_while_it_is_needed_is_needed_from_where_it_was() {
        let mut plan = start();
        let first = frame(base_state(), named(1));
        let again = frame(first.state(), said(2, found));
        plan.scan(&first).unwrap();
        plan.scan(&again).unwrap();
        assert_eq!((plan.data().lsn, plan.missing()), (Lsn::ROOT, 1));
        let need = plan.start(ms(0)).unwrap();
        plan.done(&need);
        assert_eq!(plan.data().lsn, Lsn::new(3));
    }

    /// The entry that calls a pack missing may come long after the pack was named: until then there is room, and not for ever more memory.
    #[test]
    fn however_many_frames_follow_a_missing_pack_they_are_scanned_and_then_passed() {
        let mut plan = start();
        let mut last = frame(base_state(), named(1));
        plan.scan(&last).unwrap();
        for _ in 0..5 * MAX_ENDS {
            assert!(plan.has_room());
            last = frame(last.state(), |_| Vec::new());
            plan.scan(&last).unwrap();
            assert!(plan.ends.len() <= MAX_ENDS);
        }
        assert_eq!(plan.data().lsn, Lsn::ROOT);
        let missing = frame(last.state(), said(2, |_| PackState::Missing));
        plan.scan(&missing).unwrap();
        assert_eq!(plan.data().lsn, missing.position().lsn);
    }

    #[test]
    fn packs_that_never_come_and_leave_no_room_are_told_from_those_that_are_late() {
        let mut plan = start();
        let mut state = base_state();
        for sequence in 0..MAX_NEEDS as u64 {
            let named = frame(state, named(sequence));
            plan.scan(&named).unwrap();
            state = named.state();
        }
        assert!(!plan.has_room() && !plan.is_stuck());
        let mut now = ms(0);
        for _ in 0..STUCK_FAILURES {
            assert!(!plan.is_stuck());
            while let Some(need) = plan.start(now) {
                plan.failed(&need, now);
            }
            now += RETRY_MOST;
        }
        assert!(plan.is_stuck());
        let need = plan.start(now).unwrap();
        plan.done(&need);
        assert!(plan.has_room() && !plan.is_stuck());
    }
}
