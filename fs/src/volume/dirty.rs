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

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use bytes::Bytes;

use super::{
    memory::{Growing, Memory},
    placed::{Place, Places, StoredPack},
};
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
    /// Where segments, or parts of them, are in the store.
    places: Places,
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
    /// Where it is in the store already.
    pub(crate) place: Option<Place>,
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
        self.places.cut(range.clone());
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
            let end = start + bytes.len() as u64;
            let joined = self.flying.last_key_value().filter(|(_, end)| *end == start);
            let from = joined.map_or(*start, |(from, _)| *from);
            self.flying.insert(from, end);
            for (part, place) in self.places.parts(*start..end) {
                let mut offset = part.start;
                while offset < part.end {
                    let length = (SLOT_BYTES - offset % SLOT_BYTES).min(part.end - offset);
                    let place = place.as_ref().map(|place| place.later(offset - part.start));
                    pieces.push(FlightPiece { offset, bytes: bytes.split_to(length as usize), place });
                    offset += length;
                }
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

    /// Bytes of the flight are in `pack`, but their entry was refused: what is seen of them is not put again.
    pub(crate) fn refused(&mut self, pieces: &[Piece], pack: &Arc<StoredPack>) {
        for piece in pieces {
            let first = self.segments.range(..=piece.offset).next_back();
            let first = first.map_or(piece.offset, |(start, _)| *start);
            let touched = self.segments.range(first..piece.end()).filter(|(_, segment)| segment.in_flight);
            for (start, segment) in touched {
                let (from, to) = (piece.offset.max(*start), piece.end().min(start + segment.len()));
                if from < to {
                    let offset = piece.pack_offset + (from - piece.offset) as u32;
                    self.places.insert(from..to, Place { pack: Arc::clone(pack), offset });
                }
            }
        }
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
