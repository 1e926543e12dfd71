//! The dirty data of one file: bytes that were written and that no entry refers to yet.
//!
//! Bytes stay here while they are put into a pack ("in flight") until the entry that refers to them is sequenced, so that a read finds
//! them at every moment. A later write or truncation replaces or clips them here, in flight or not: what is left of a flight when it
//! lands is exactly what its entry may refer to.
//!
//! Invariants:
//! - Segments do not overlap and are not empty.
//! - No clock, store or tree in here.

use std::{collections::BTreeMap, ops::Range};

use bytes::{Bytes, BytesMut};

use crate::{SLOT_BYTES, Timespec, decide::Piece};

/// Written bytes of one file.
#[derive(Debug, Default)]
pub(crate) struct DirtyData {
    segments: BTreeMap<u64, Segment>,
    /// The bytes of all segments.
    bytes: u64,
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
    Open(BytesMut),
    Shared(Bytes),
}

impl Segment {
    fn len(&self) -> u64 {
        match &self.data {
            Data::Open(bytes) => bytes.len() as u64,
            Data::Shared(bytes) => bytes.len() as u64,
        }
    }

    fn share(&mut self) -> Bytes {
        let data = std::mem::replace(&mut self.data, Data::Shared(Bytes::new()));
        let bytes = match data {
            Data::Open(bytes) => bytes.freeze(),
            Data::Shared(bytes) => bytes,
        };
        self.data = Data::Shared(bytes.clone());
        bytes
    }

    fn copy(&self, range: Range<usize>) -> Bytes {
        match &self.data {
            Data::Open(bytes) => Bytes::copy_from_slice(&bytes[range]),
            Data::Shared(bytes) => bytes.slice(range),
        }
    }
}

/// A run of a file's bytes in flight to a pack.
#[derive(Clone, Debug)]
pub(crate) struct FlightPiece {
    pub(crate) offset: u64,
    pub(crate) bytes: Bytes,
}

impl DirtyData {
    /// Whether there is nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Whether there are bytes that are not in flight.
    pub(crate) fn has_grounded(&self) -> bool {
        self.segments.values().any(|segment| !segment.in_flight)
    }

    /// Whether there are bytes in flight.
    pub(crate) fn is_flying(&self) -> bool {
        self.segments.values().any(|segment| segment.in_flight)
    }

    /// The offset after the last dirty byte.
    pub(crate) fn end(&self) -> u64 {
        self.segments.last_key_value().map_or(0, |(offset, segment)| offset + segment.len())
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> u64 {
        self.bytes
    }

    /// Writes `bytes` at `offset`; returns by how many the dirty bytes grew (negative if a larger run was replaced).
    pub(crate) fn write(&mut self, offset: u64, bytes: &Bytes, now: Timespec) -> i64 {
        self.mtime = Some(now);
        self.ctime = Some(now);
        let end = offset + bytes.len() as u64;
        let replaced = self.remove(offset..end);
        let before = self.segments.range_mut(..offset).next_back();
        let grows = before.filter(|(start, segment)| {
            let room = segment.len() + (bytes.len() as u64) <= OPEN_BYTES;
            !segment.in_flight && **start + segment.len() == offset && room
        });
        match grows.map(|(_, segment)| &mut segment.data) {
            Some(Data::Open(open)) => open.extend_from_slice(bytes),
            _ if bytes.len() < SMALL_WRITE => {
                let mut open = BytesMut::with_capacity(4 * SMALL_WRITE);
                open.extend_from_slice(bytes);
                self.segments.insert(offset, Segment { data: Data::Open(open), in_flight: false });
            }
            _ => {
                self.segments.insert(offset, Segment { data: Data::Shared(bytes.clone()), in_flight: false });
            }
        }
        self.bytes += bytes.len() as u64;
        bytes.len() as i64 - replaced.cast_signed()
    }

    /// Forgets the bytes in `range`; returns how many there were.
    pub(crate) fn remove(&mut self, range: Range<u64>) -> u64 {
        let first = self.segments.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let touched: Vec<u64> = self.segments.range(first..range.end).map(|(start, _)| *start).collect();
        let mut removed = 0;
        for start in touched {
            let end = start + self.segments[&start].len();
            if end <= range.start {
                continue;
            }
            let Some(mut segment) = self.segments.remove(&start) else { continue };
            removed += end.min(range.end) - start.max(range.start);
            let (in_flight, bytes) = (segment.in_flight, segment.share());
            let mut keep = |from: u64, to: u64| {
                let data = Data::Shared(bytes.slice((from - start) as usize..(to - start) as usize));
                self.segments.insert(from, Segment { data, in_flight });
            };
            if start < range.start {
                keep(start, range.start);
            }
            if end > range.end {
                keep(range.end, end);
            }
        }
        self.bytes -= removed;
        removed
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
            let mut bytes = segment.share();
            let mut offset = *start;
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

    /// What is left in flight of bytes that are now in a pack.
    pub(crate) fn landing(&self, placed: &[Piece]) -> Vec<Piece> {
        let mut left = Vec::new();
        for piece in placed {
            let end = piece.offset + u64::from(piece.length);
            let first =
                self.segments.range(..=piece.offset).next_back().map_or(piece.offset, |(start, _)| *start);
            for (start, segment) in self.segments.range(first..end).filter(|(_, segment)| segment.in_flight) {
                let (from, to) = (piece.offset.max(*start), end.min(start + segment.len()));
                if from < to {
                    let pack_offset = piece.pack_offset + (from - piece.offset) as u32;
                    left.push(Piece { offset: from, length: (to - from) as u32, pack_offset });
                }
            }
        }
        left
    }

    /// Forgets bytes that an entry refers to now; returns how many.
    pub(crate) fn landed(&mut self, pieces: &[Piece]) -> u64 {
        let removed = pieces
            .iter()
            .map(|piece| self.remove(piece.offset..piece.offset + u64::from(piece.length)))
            .sum();
        if self.segments.is_empty() {
            (self.mtime, self.ctime) = (None, None);
        }
        removed
    }

    /// A flight has ended: what did not land is to be sent again.
    pub(crate) fn ground(&mut self) {
        self.segments.values_mut().for_each(|segment| segment.in_flight = false);
    }
}

/// Writes below this size are gathered with what follows them.
const SMALL_WRITE: usize = 64 << 10;
/// A segment stops growing here.
const OPEN_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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

    proptest! {
        /// The fear: a flush that lands late brings back bytes that were overwritten or cut off while it was in flight.
        #[test]
        fn a_landing_refers_to_no_byte_that_was_replaced(steps in proptest::collection::vec(step(), 1..60)) {
            let mut dirty = DirtyData::default();
            let mut written = vec![None; 1200];
            let mut landed: Vec<Option<u8>> = vec![None; 1200];
            let mut flight: Vec<FlightPiece> = Vec::new();
            for step in steps {
                match step {
                    Step::Write(at, byte, len) => {
                        let bytes = Bytes::from(vec![byte; usize::from(len)]);
                        let before = dirty.len();
                        let grown = dirty.write(at, &bytes, time());
                        prop_assert_eq!(before.cast_signed() + grown, dirty.len().cast_signed());
                        for place in at..at + u64::from(len) { written[place as usize] = Some(byte); }
                    }
                    Step::Remove(from, to) => {
                        dirty.remove(from..to);
                        for place in from..to.min(1200) { written[place as usize] = None; landed[place as usize] = None; }
                    }
                    Step::TakeOff => if flight.is_empty() { flight = dirty.take_off(); },
                    Step::Land => {
                        let placed: Vec<Piece> = flight.iter().scan(0u32, |at, piece| {
                            let pack_offset = *at;
                            *at += piece.bytes.len() as u32;
                            Some(Piece { offset: piece.offset, length: piece.bytes.len() as u32, pack_offset })
                        }).collect();
                        let pack: Vec<u8> = flight.drain(..).flat_map(|piece| piece.bytes).collect();
                        let left = dirty.landing(&placed);
                        for piece in &left {
                            for i in 0..piece.length as usize {
                                let byte = Some(pack[piece.pack_offset as usize + i]);
                                prop_assert_eq!(written[piece.offset as usize + i], byte);
                                landed[piece.offset as usize + i] = byte;
                                written[piece.offset as usize + i] = None;
                            }
                        }
                        dirty.landed(&left);
                        dirty.ground();
                    }
                    Step::Ground => { flight.clear(); dirty.ground(); }
                }
                let dirty_bytes = written.iter().flatten().count() as u64;
                prop_assert_eq!(dirty.len(), dirty_bytes);
                prop_assert_eq!(&contents(&dirty, 1200), &written);
            }
        }
    }
}
