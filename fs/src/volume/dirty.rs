//! The dirty data of one file: bytes that were written and that no entry refers to yet.
//!
//! Bytes stay here while they are put into a pack ("in flight") until the entry that refers to them is sequenced, so that a read finds
//! them at every moment. A later write hides them, in flight or not, and a truncation cuts them off. What was hidden lands all the same,
//! below what hides it: somebody may wait for it, and a crash must not find a gap where it was. What was cut off does not land.
//!
//! Invariants:
//! - Segments do not overlap and are not empty.
//! - One flight at a time. What is seen of it is part of what it still brings, and whatever else it brings is hidden by later writes.
//! - What is not in flight has more than half of its buffer for itself: the rest of a buffer that was overwritten or cut off is moved.
//! - No clock, store or tree in here.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use bytes::Bytes;

use super::memory::{Growing, Memory};
use crate::{SLOT_BYTES, Timespec, decide::Piece};

/// Written bytes of one file.
#[derive(Debug, Default)]
pub(crate) struct DirtyData {
    segments: BTreeMap<u64, Segment>,
    /// Where the buffers of the segments count.
    memory: Arc<Memory>,
    /// The bytes of all segments.
    bytes: u64,
    /// What the flight under way still brings into the file: from where, to where.
    flying: BTreeMap<u64, u64>,
    /// How many of these bytes later writes hide.
    hidden: u64,
    /// The fault that a judge must find: what is hidden does not land.
    #[cfg(test)]
    pub(crate) forgets_hidden: bool,
    /// When the last write was; `None` if the time was set by hand since.
    pub(crate) mtime: Option<Timespec>,
    /// When the last write was.
    pub(crate) ctime: Option<Timespec>,
}

#[derive(Debug)]
struct Segment {
    data: Data,
    in_flight: bool,
}

#[derive(Debug)]
enum Data {
    /// Still growing at its end.
    Open(Growing),
    Shared(Part),
}

/// A part of a buffer of `capacity` bytes.
#[derive(Clone, Debug)]
struct Part {
    bytes: Bytes,
    capacity: usize,
}

impl Part {
    /// All of a buffer.
    fn whole(bytes: Bytes) -> Part {
        Part { capacity: bytes.len(), bytes }
    }

    fn slice(&self, range: Range<usize>) -> Part {
        Part { bytes: self.bytes.slice(range), capacity: self.capacity }
    }

    /// The same bytes in a buffer of their own, unless most of this one is theirs.
    fn moved(self, memory: &Arc<Memory>) -> Part {
        if self.bytes.len() > self.capacity / 2 {
            return self;
        }
        Part::whole(Growing::holding(&self.bytes, memory).freeze())
    }
}

impl Segment {
    fn len(&self) -> u64 {
        match &self.data {
            Data::Open(growing) => growing.as_ref().len() as u64,
            Data::Shared(part) => part.bytes.len() as u64,
        }
    }

    fn share(&mut self) -> Part {
        let data = std::mem::replace(&mut self.data, Data::Shared(Part::whole(Bytes::new())));
        let part = match data {
            Data::Open(growing) => Part { capacity: growing.capacity(), bytes: growing.freeze() },
            Data::Shared(part) => part,
        };
        self.data = Data::Shared(part.clone());
        part
    }

    fn copy(&self, range: Range<usize>) -> Bytes {
        match &self.data {
            Data::Open(growing) => Bytes::copy_from_slice(&growing.as_ref()[range]),
            Data::Shared(part) => part.bytes.slice(range),
        }
    }
}

/// Which segments are meant.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    InFlight,
}

/// How many bytes were taken out.
#[derive(Clone, Copy, Default)]
struct Taken {
    grounded: u64,
    in_flight: u64,
}

/// A run of a file's bytes in flight to a pack.
#[derive(Clone, Debug)]
pub(crate) struct FlightPiece {
    pub(crate) offset: u64,
    pub(crate) bytes: Bytes,
}

impl DirtyData {
    /// Nothing yet; its buffers will count in `memory`.
    pub(crate) fn new(memory: &Arc<Memory>) -> DirtyData {
        DirtyData { memory: Arc::clone(memory), ..DirtyData::default() }
    }

    /// Whether there is nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Whether there are bytes that are not in flight.
    pub(crate) fn has_grounded(&self) -> bool {
        self.segments.values().any(|segment| !segment.in_flight)
    }

    /// Whether a flight has bytes that did not land, hidden or not.
    pub(crate) fn is_flying(&self) -> bool {
        !self.flying.is_empty()
    }

    /// The offset after the last byte that a flight still brings.
    pub(crate) fn flying_end(&self) -> u64 {
        self.flying.last_key_value().map_or(0, |(_, end)| *end)
    }

    /// Whether a byte of `range` has been written and is not stored.
    pub(crate) fn touches(&self, range: Range<u64>) -> bool {
        let last = self.segments.range(..range.end).next_back();
        !range.is_empty() && last.is_some_and(|(start, segment)| start + segment.len() > range.start)
    }

    /// The offset after the last dirty byte.
    pub(crate) fn end(&self) -> u64 {
        self.segments.last_key_value().map_or(0, |(offset, segment)| offset + segment.len())
    }

    /// How many bytes of the file there are.
    pub(crate) fn len(&self) -> u64 {
        self.bytes
    }

    /// How many bytes are kept: also those of a flight that are hidden.
    #[cfg(test)]
    fn kept(&self) -> u64 {
        self.bytes + self.hidden
    }

    /// Writes `bytes` at `offset`; returns by how many the bytes that are kept grew (negative if a larger run was replaced).
    pub(crate) fn write(&mut self, offset: u64, bytes: &Bytes, now: Timespec) -> i64 {
        self.mtime = Some(now);
        self.ctime = Some(now);
        let end = offset + bytes.len() as u64;
        let Taken { grounded: replaced, in_flight } = self.take(offset..end, Which::All);
        self.hidden += in_flight;
        #[cfg(test)]
        let replaced = replaced + if self.forgets_hidden { self.remove(offset..end) } else { 0 };
        let before = self.segments.range_mut(..offset).next_back();
        let grows = before.filter(|(start, segment)| {
            let room = segment.len() + (bytes.len() as u64) <= OPEN_BYTES;
            !segment.in_flight && **start + segment.len() == offset && room
        });
        match grows.map(|(_, segment)| &mut segment.data) {
            Some(Data::Open(growing)) => growing.push(bytes),
            _ if bytes.len() < SMALL_WRITE => {
                let data = Data::Open(Growing::holding(bytes, &self.memory));
                self.segments.insert(offset, Segment { data, in_flight: false });
            }
            _ => {
                let data = Data::Shared(Part::whole(self.memory.count(bytes.clone())));
                self.segments.insert(offset, Segment { data, in_flight: false });
            }
        }
        self.bytes += bytes.len() as u64;
        bytes.len() as i64 - replaced.cast_signed()
    }

    /// Forgets the bytes in `range`, hidden ones too; returns how many there were.
    pub(crate) fn remove(&mut self, range: Range<u64>) -> u64 {
        let seen = self.take(range.clone(), Which::All);
        let flown = self.cut(range);
        self.hidden -= flown - seen.in_flight;
        seen.grounded + flown
    }

    /// Takes what is seen in `range` out.
    fn take(&mut self, range: Range<u64>, which: Which) -> Taken {
        let first = self.segments.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let touched = self.segments.range(first..range.end);
        let touched = touched.filter(|(_, segment)| which == Which::All || segment.in_flight);
        let touched: Vec<u64> = touched.map(|(start, _)| *start).collect();
        let mut taken = Taken::default();
        for start in touched {
            let end = start + self.segments[&start].len();
            if end <= range.start {
                continue;
            }
            let Some(mut segment) = self.segments.remove(&start) else { continue };
            let (in_flight, part) = (segment.in_flight, segment.share());
            drop(segment);
            let count = if in_flight { &mut taken.in_flight } else { &mut taken.grounded };
            *count += end.min(range.end) - start.max(range.start);
            let mut keep = |from: u64, to: u64| {
                let kept = part.slice((from - start) as usize..(to - start) as usize);
                // The flight has the whole buffer, whatever is left of it.
                let kept = if in_flight { kept } else { kept.moved(&self.memory) };
                self.segments.insert(from, Segment { data: Data::Shared(kept), in_flight });
            };
            if start < range.start {
                keep(start, range.start);
            }
            if end > range.end {
                keep(range.end, end);
            }
        }
        self.bytes -= taken.grounded + taken.in_flight;
        taken
    }

    /// Cuts `range` out of what the flight brings; returns how many bytes that were.
    fn cut(&mut self, range: Range<u64>) -> u64 {
        let first = self.flying.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let touched: Vec<(u64, u64)> =
            self.flying.range(first..range.end).map(|(start, end)| (*start, *end)).collect();
        let mut cut = 0;
        for (start, end) in touched.into_iter().filter(|(_, end)| *end > range.start) {
            self.flying.remove(&start);
            cut += end.min(range.end) - start.max(range.start);
            if start < range.start {
                self.flying.insert(start, range.start);
            }
            if end > range.end {
                self.flying.insert(range.end, end);
            }
        }
        cut
    }

    /// The dirty bytes in `range`, as (file offset, bytes) in order.
    pub(crate) fn read(&self, range: Range<u64>) -> Vec<(u64, Bytes)> {
        let first = self.segments.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let touched = self.segments.range(first..range.end.max(first));
        let parts = touched.filter_map(|(start, segment)| {
            let (from, to) = (range.start.max(*start), range.end.min(start + segment.len()));
            (from < to).then(|| (from, segment.copy((from - start) as usize..(to - start) as usize)))
        });
        parts.collect()
    }

    /// Sends everything that is not in flight on its way; pieces are in offset order and do not cross a slot.
    pub(crate) fn take_off(&mut self) -> Vec<FlightPiece> {
        let mut pieces = Vec::new();
        for (start, segment) in self.segments.iter_mut().filter(|(_, segment)| !segment.in_flight) {
            segment.in_flight = true;
            let mut bytes = segment.share().bytes;
            let mut offset = *start;
            let end = start + bytes.len() as u64;
            let joined = self.flying.last_key_value().filter(|(_, end)| *end == start);
            let from = joined.map_or(*start, |(from, _)| *from);
            self.flying.insert(from, end);
            while !bytes.is_empty() {
                let room = SLOT_BYTES - offset % SLOT_BYTES;
                let piece = bytes.split_to(bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
                let length = piece.len() as u64;
                pieces.push(FlightPiece { offset, bytes: piece });
                offset += length;
            }
        }
        pieces
    }

    /// What of bytes that are now in a pack belongs into the file: all that was not cut off meanwhile.
    pub(crate) fn landing(&self, placed: &[Piece]) -> Vec<Piece> {
        let mut left = Vec::new();
        for piece in placed {
            let before = self.flying.range(..=piece.offset).next_back();
            let first = before.map_or(piece.offset, |(start, _)| *start);
            for (start, end) in self.flying.range(first..piece.end()) {
                let (from, to) = (piece.offset.max(*start), piece.end().min(*end));
                if from < to {
                    let pack_offset = piece.pack_offset + (from - piece.offset) as u32;
                    left.push(Piece { offset: from, length: (to - from) as u32, pack_offset });
                }
            }
        }
        left
    }

    /// Forgets bytes that an entry refers to now, and none that hide them; returns how many.
    pub(crate) fn landed(&mut self, pieces: &[Piece]) -> u64 {
        let mut landed = 0;
        for piece in pieces {
            let seen = self.take(piece.offset..piece.end(), Which::InFlight);
            let flown = self.cut(piece.offset..piece.end());
            self.hidden -= flown - seen.in_flight;
            landed += flown;
        }
        if self.segments.is_empty() {
            (self.mtime, self.ctime) = (None, None);
        }
        landed
    }

    /// A flight has ended: what is seen of it and did not land is to be sent again. Returns how many bytes are not kept any more: what is
    /// hidden was never there, if it did not land, for whoever is told that the flight failed.
    pub(crate) fn ground(&mut self) -> u64 {
        for segment in self.segments.values_mut().filter(|segment| segment.in_flight) {
            segment.in_flight = false;
            segment.data = Data::Shared(segment.share().moved(&self.memory));
        }
        self.flying.clear();
        std::mem::take(&mut self.hidden)
    }
}

/// Writes below this size are gathered with what follows them.
const SMALL_WRITE: usize = 64 << 10;
/// A segment stops growing here.
const OPEN_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::{super::memory::AROUND_BYTES, *};

    fn time() -> Timespec {
        Timespec { seconds: 1, nanos: 0 }
    }

    fn contents(dirty: &DirtyData, length: u64) -> Vec<Option<u8>> {
        let mut all = vec![None; length as usize];
        for (offset, bytes) in dirty.read(0..length) {
            for (place, byte) in all[offset as usize..].iter_mut().zip(&bytes) {
                *place = Some(*byte);
            }
        }
        all
    }

    /// Bytes of a writer, and how many of such are held.
    struct Lent(Vec<u8>, Arc<AtomicU64>);

    impl AsRef<[u8]> for Lent {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    impl Drop for Lent {
        fn drop(&mut self) {
            self.1.fetch_sub(self.0.len() as u64, Ordering::Relaxed);
        }
    }

    /// The fear: of each large write that is overwritten a little is left, and keeps all of it in memory.
    #[test]
    fn what_is_left_of_overwritten_buffers_does_not_keep_them() {
        const MIB: u64 = 1 << 20;
        let (mut dirty, lent) = (DirtyData::default(), Arc::new(AtomicU64::new(0)));
        for at in (0..MIB - 65_536).step_by(4096) {
            let bytes = vec![1; (MIB - at) as usize];
            lent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            dirty.write(at, &Bytes::from_owner(Lent(bytes, Arc::clone(&lent))), time());
            assert!(lent.load(Ordering::Relaxed) <= 2 * dirty.len(), "{lent:?} of {} bytes", dirty.len());
            let around = AROUND_BYTES * dirty.segments.len() as u64;
            assert!(dirty.memory.bytes() <= 2 * dirty.len() + around);
        }
    }

    /// The same of writes that a flight has, when it fails.
    #[test]
    fn what_is_left_of_a_flight_that_failed_does_not_keep_it() {
        let mut dirty = DirtyData::default();
        dirty.write(0, &Bytes::from(vec![1; 1 << 20]), time());
        let flight = dirty.take_off();
        dirty.write(1, &Bytes::from(vec![2; (1 << 20) - 1]), time());
        drop(flight);
        dirty.ground();
        assert!(dirty.memory.bytes() <= (1 << 20) + 2 * AROUND_BYTES, "{}", dirty.memory.bytes());
    }

    /// The fear: each small write here and there gets a buffer for many.
    #[test]
    fn small_scattered_writes_take_the_memory_that_they_need() {
        let mut dirty = DirtyData::default();
        for number in 0..1000 {
            dirty.write(number * 4096, &Bytes::from(vec![1; 100]), time());
        }
        let capacity = |segment: &Segment| match &segment.data {
            Data::Open(growing) => growing.capacity() as u64,
            Data::Shared(part) => part.capacity as u64,
        };
        let held: u64 = dirty.segments.values().map(capacity).sum();
        assert!(held <= 2 * dirty.len(), "{held} bytes for {}", dirty.len());
        assert_eq!(dirty.memory.bytes(), held + 1000 * AROUND_BYTES);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, u8, u16),
        Remove(u64, u64),
        TakeOff,
        Land,
        Ground,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..900u64, any::<u8>(), 1..90u16).prop_map(|(at, byte, len)| Step::Write(at, byte, len)),
            2 => (0..900u64, 1..300u64).prop_map(|(at, len)| Step::Remove(at, at + len)),
            1 => Just(Step::TakeOff),
            1 => Just(Step::Land),
            1 => Just(Step::Ground),
        ]
    }

    /// A file, byte by byte: what is seen, what of it is in flight, and what the flight brings.
    struct Model {
        seen: Vec<Option<u8>>,
        in_flight: Vec<bool>,
        flight: Vec<Option<u8>>,
    }

    impl Model {
        fn new() -> Model {
            let none = vec![None; LENGTH];
            Model { seen: none.clone(), in_flight: vec![false; LENGTH], flight: none }
        }

        fn ground(&mut self) {
            self.in_flight.fill(false);
            self.flight.fill(None);
        }

        fn kept(&self) -> usize {
            let grounded = |place: &usize| self.seen[*place].is_some() && !self.in_flight[*place];
            (0..LENGTH).filter(grounded).count() + self.flight.iter().flatten().count()
        }
    }

    /// More than any step reaches.
    const LENGTH: usize = 1200;

    proptest! {
        /// The fears: a flush that lands late brings back bytes that were cut off while it was in flight; or it does not bring what was
        /// overwritten meanwhile, for which somebody waits.
        #[test]
        fn a_landing_brings_everything_that_was_not_cut_off(steps in proptest::collection::vec(step(), 1..60)) {
            let (mut dirty, mut model) = (DirtyData::default(), Model::new());
            let mut flight: Vec<FlightPiece> = Vec::new();
            let mut kept = 0;
            for step in steps {
                match step {
                    Step::Write(at, byte, len) => {
                        kept += dirty.write(at, &Bytes::from(vec![byte; usize::from(len)]), time());
                        let range = at as usize..at as usize + usize::from(len);
                        model.seen[range.clone()].fill(Some(byte));
                        model.in_flight[range].fill(false);
                    }
                    Step::Remove(from, to) => {
                        kept -= dirty.remove(from..to).cast_signed();
                        let range = from as usize..(to as usize).min(LENGTH);
                        model.in_flight[range.clone()].fill(false);
                        for bytes in [&mut model.seen, &mut model.flight] {
                            bytes[range.clone()].fill(None);
                        }
                    }
                    Step::TakeOff if flight.is_empty() => {
                        flight = dirty.take_off();
                        model.flight.clone_from(&model.seen);
                        for (in_flight, seen) in model.in_flight.iter_mut().zip(&model.seen) {
                            *in_flight = seen.is_some();
                        }
                    }
                    Step::TakeOff => {}
                    Step::Land => {
                        let placed: Vec<Piece> = flight.iter().scan(0u32, |at, piece| {
                            let pack_offset = *at;
                            *at += piece.bytes.len() as u32;
                            Some(Piece { offset: piece.offset, length: piece.bytes.len() as u32, pack_offset })
                        }).collect();
                        let pack: Vec<u8> = flight.drain(..).flat_map(|piece| piece.bytes).collect();
                        let left = dirty.landing(&placed);
                        prop_assert!(left.is_sorted_by(|a, b| a.end() <= b.offset));
                        let mut brought = vec![None; LENGTH];
                        for piece in &left {
                            for i in 0..piece.length as usize {
                                brought[piece.offset as usize + i] = Some(pack[piece.pack_offset as usize + i]);
                            }
                        }
                        prop_assert_eq!(&brought, &model.flight);
                        kept -= dirty.landed(&left).cast_signed();
                        prop_assert!(!dirty.is_flying());
                        prop_assert_eq!(dirty.ground(), 0);
                        for (seen, landed) in model.seen.iter_mut().zip(&model.in_flight) {
                            *seen = seen.filter(|_| !landed);
                        }
                        model.ground();
                    }
                    Step::Ground => {
                        flight.clear();
                        kept -= dirty.ground().cast_signed();
                        model.ground();
                    }
                }
                let flown: usize = flight.iter().map(|piece| piece.bytes.len()).sum();
                let around = AROUND_BYTES * (dirty.segments.len() + flight.len()) as u64;
                let held = dirty.memory.bytes();
                prop_assert!(held >= dirty.len() && held <= 2 * (dirty.len() + flown as u64) + around);
                prop_assert_eq!(dirty.kept(), kept.cast_unsigned());
                prop_assert_eq!(model.kept(), kept as usize);
                prop_assert_eq!(dirty.len(), model.seen.iter().flatten().count() as u64);
                let flying_end = model.flight.iter().rposition(Option::is_some).map_or(0, |last| last as u64 + 1);
                prop_assert_eq!(dirty.flying_end(), flying_end);
                prop_assert_eq!(dirty.is_flying(), model.flight.iter().any(Option::is_some));
                prop_assert_eq!(&contents(&dirty, LENGTH as u64), &model.seen);
                let from = LENGTH as u64 / 2;
                prop_assert_eq!(dirty.touches(from..700), model.seen[600..700].iter().any(Option::is_some));
                prop_assert!(!dirty.touches(700..from));
            }
        }
    }
}
