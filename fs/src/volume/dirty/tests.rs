//! What dirty data holds, beside a model of its bytes.
//!
//! Invariants:
//! - What is held is compared with a measure of its own: the model's bytes, the buffers of the writer.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::{super::memory::AROUND_BYTES, *};
use crate::{PackNumber, PackRow, PackState, decide::PackUse};

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
    Refuse,
    Ground,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..900u64, any::<u8>(), 1..90u16).prop_map(|(at, byte, len)| Step::Write(at, byte, len)),
        2 => (0..900u64, 1..300u64).prop_map(|(at, len)| Step::Remove(at, at + len)),
        1 => Just(Step::TakeOff),
        1 => Just(Step::Land),
        1 => Just(Step::Refuse),
        1 => Just(Step::Ground),
    ]
}

/// A file, byte by byte: what is seen, what of it is in flight or in the store, and what the flight brings.
struct Model {
    seen: Vec<Option<u8>>,
    in_flight: Vec<bool>,
    placed: Vec<bool>,
    flight: Vec<Option<u8>>,
}

impl Model {
    fn new() -> Model {
        let none = vec![None; LENGTH];
        Model {
            seen: none.clone(),
            in_flight: vec![false; LENGTH],
            placed: vec![false; LENGTH],
            flight: none,
        }
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

/// A pack of what is not in one already: how it is known, what is where in it.
fn packed(flight: &[FlightPiece], packs: &mut Vec<Vec<u8>>) -> (Arc<StoredPack>, Vec<Piece>) {
    let (mut pack, mut placed) = (Vec::new(), Vec::new());
    for piece in flight.iter().filter(|piece| piece.place.is_none()) {
        let (length, pack_offset) = (piece.bytes.len() as u32, pack.len() as u32);
        placed.push(Piece { offset: piece.offset, length, pack_offset });
        pack.extend_from_slice(&piece.bytes);
    }
    packs.push(pack);
    let stored = StoredPack::new(PackRow {
        writer: 1,
        sequence: packs.len() as u64,
        footer_digest: [0; 32],
        plain_bytes: 1,
        stored_bytes: 1,
        live_bytes: 0,
        state: PackState::Here,
    });
    *stored.lock() = PackUse::Known(PackNumber(packs.len() as u64 - 1));
    (stored, placed)
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
        let (mut packs, mut kept) = (Vec::<Vec<u8>>::new(), 0);
        for step in steps {
            match step {
                Step::Write(at, byte, len) => {
                    kept += dirty.write(at, &Bytes::from(vec![byte; usize::from(len)]), time());
                    let range = at as usize..at as usize + usize::from(len);
                    model.seen[range.clone()].fill(Some(byte));
                    model.placed[range.clone()].fill(false);
                    model.in_flight[range].fill(false);
                }
                Step::Remove(from, to) => {
                    kept -= dirty.remove(from..to).cast_signed();
                    let range = from as usize..(to as usize).min(LENGTH);
                    model.in_flight[range.clone()].fill(false);
                    model.placed[range.clone()].fill(false);
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
                    for piece in &flight {
                        let range = piece.offset as usize..piece.offset as usize + piece.bytes.len();
                        prop_assert!(model.placed[range].iter().all(|placed| *placed == piece.place.is_some()));
                        if let Some(Place { pack, offset }) = &piece.place {
                            let PackUse::Known(number) = *pack.lock() else { panic!("it has a number") };
                            let there = &packs[number.0 as usize][*offset as usize..];
                            prop_assert_eq!(&there[..piece.bytes.len()], &piece.bytes[..]);
                        }
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
                    for (place, landed) in model.in_flight.iter().enumerate().filter(|(_, landed)| **landed) {
                        model.seen[place] = model.seen[place].filter(|_| !landed);
                        model.placed[place] = false;
                    }
                    model.ground();
                }
                Step::Refuse => {
                    let (pack, placed) = packed(&flight, &mut packs);
                    dirty.refused(&placed, &pack);
                    for (placed, in_flight) in model.placed.iter_mut().zip(&model.in_flight) {
                        *placed |= in_flight;
                    }
                    flight.clear();
                    kept -= dirty.ground().cast_signed();
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
