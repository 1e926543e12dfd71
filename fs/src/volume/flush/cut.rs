//! Cutting the bytes of files into packs.
//!
//! Invariants:
//! - The bytes of a file are taken off when its turn comes: until then another batch may take them.
//! - A pack that may be in the store is met once in a cut, wherever its pieces are.
//! - A file whose turn does not come is in no queue any more, and whoever waits for it hears of that.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    vec,
};

use bytes::Bytes;

use super::{
    super::{
        Volume,
        dirty::FlightPiece,
        files::{FileInner, FileState, Urgency},
        placed::{Place, Proof, StoredPack},
    },
    LARGE,
    flight::Flight,
};
use crate::{
    PackRow,
    data::{PackBuilder, PackName, SealedPack},
    decide::Piece,
};

/// What is cut at a time: at most one pack that is not in the store.
#[derive(Default)]
pub(super) struct Cut {
    /// Flights that have begun.
    pub(super) flights: Vec<Flight>,
    pub(super) loads: Vec<(Load, Matter)>,
    /// Where among them the packs are that were put before, or may be.
    found: HashMap<PackName, usize>,
}

/// A pack and what it holds of which flights.
pub(super) struct Load {
    pub(super) pack: Arc<StoredPack>,
    pub(super) runs: Vec<Run>,
    /// Whether that is a large pack that is not known to be in the store.
    pub(super) is_large: bool,
    /// Whether somebody waits for its flights, each of them, once it is put.
    pub(super) awaited: Vec<Arc<AtomicBool>>,
}

impl Load {
    /// All of it is in a pack of its own now, piece by piece.
    pub(super) fn moves_to(&mut self, (pack, places): (SealedPack, Vec<u32>)) -> SealedPack {
        self.pack = StoredPack::new(PackRow::of(&pack));
        let pieces = self.runs.iter_mut().flat_map(|run| &mut run.pieces);
        for (piece, place) in pieces.zip(places) {
            piece.pack_offset = place;
        }
        pack
    }
}

/// Where the bytes of a pack are.
pub(super) enum Matter {
    /// In the store.
    Stored,
    /// Here.
    Unstored(SealedPack),
    /// In the store, perhaps: these are the pieces of the runs, one after the other.
    Unproven(Vec<Bytes>),
}

/// Pieces of a flight that follow each other in the file and are in one pack.
pub(super) struct Run {
    /// The place of the flight among those of the batch.
    pub(super) flight: usize,
    /// The runs of a flight are counted in the order of the file.
    pub(super) number: u64,
    pub(super) pieces: Vec<Piece>,
}

/// What cuts the files of a batch, pack by pack.
pub(super) struct Cutter {
    volume: Volume,
    files: vec::IntoIter<Arc<FileState>>,
    /// Somebody waits for each of them: one shares no pack with those before it that would become large by it.
    is_awaited: bool,
    /// Flights that have begun.
    flights: usize,
    /// Whose the last of them is, and which of his, ...
    last: Option<(Weak<FileState>, u64)>,
    /// ... what is left of it, ...
    left: VecDeque<FlightPiece>,
    /// ... and how many runs were cut from it.
    runs: u64,
}

impl Cutter {
    pub(super) fn new(volume: Volume, files: Vec<Arc<FileState>>, urgency: Urgency) -> Cutter {
        let (files, is_awaited) = (files.into_iter(), urgency == Urgency::First);
        Cutter { volume, files, is_awaited, flights: 0, last: None, left: VecDeque::new(), runs: 0 }
    }

    /// The next pack, and what is found in packs that are stored already; `None` when nothing is left.
    pub(super) fn next(&mut self) -> Option<Cut> {
        let (mut cut, mut pack) = (Cut::default(), None);
        self.leave_what_is_over();
        loop {
            while let Some(piece) = self.left.pop_front() {
                let Some(place) = piece.place.clone() else {
                    let Some(rest) = self.add(pack.get_or_insert_with(|| Packing::new(&self.volume)), piece)
                    else {
                        continue;
                    };
                    self.left.push_front(rest);
                    return Some(self.seal(cut, pack));
                };
                self.find(&mut cut, piece, &place);
            }
            let Some(flight) = self.take_off() else {
                let is_over = cut.flights.is_empty() && cut.loads.is_empty() && pack.is_none();
                return (!is_over).then(|| self.seal(cut, pack));
            };
            let shared = pack.as_ref().map_or(0, |pack| pack.builder.plain_len() as u64);
            let makes_large = self.is_awaited && shared + flight.left > SHARED;
            cut.flights.push(flight);
            if makes_large && pack.is_some() {
                return Some(self.seal(cut, pack));
            }
        }
    }

    /// Cuts no more off a flight that has ended: nothing refers to what would be put.
    fn leave_what_is_over(&mut self) {
        let Some((file, number)) = &self.last else { return };
        let is_flying = file.upgrade().is_some_and(|file| {
            let is_flying = file.lock().is_flying(*number);
            self.volume.shared.files.forget(file);
            is_flying
        });
        if !is_flying {
            self.left.clear();
        }
    }

    /// Takes off what is dirty in the next file that has something.
    fn take_off(&mut self) -> Option<Flight> {
        for file in self.files.by_ref() {
            let refusal = self.volume.refusal();
            let mut inner = file.lock();
            if !takes(self.is_awaited, &inner) {
                continue;
            }
            inner.queued = None;
            if inner.flushes_begun > inner.flushes_ended || !inner.dirty.has_grounded() {
                // In another batch, which asks for the rest itself; or there is nothing any more, for which somebody may wait.
                drop(inner);
                file.flushed.notify_waiters();
                self.volume.shared.files.forget(file);
                continue;
            }
            let (flight, pieces) = Flight::take_off(&self.volume, &file, &mut inner, refusal);
            drop(inner);
            if refusal.is_none() {
                (self.left, self.runs) = (pieces.into(), 0);
                (self.flights, self.last) = (self.flights + 1, Some((Arc::downgrade(&file), flight.number)));
                return Some(flight);
            }
        }
        None
    }

    /// Adds as much of a piece as there is room for; returns the rest, if there is one.
    fn add(&mut self, pack: &mut Packing, mut piece: FlightPiece) -> Option<FlightPiece> {
        let room = pack.builder.room();
        // A piece that would fit into a pack of its own is not torn in two.
        if room == 0 || (piece.bytes.len() > room && pack.builder.plain_len() > 0) {
            return Some(piece);
        }
        let bytes = piece.bytes.split_to(piece.bytes.len().min(room));
        let at = pack.builder.add(&bytes).expect("there is room for it");
        let length = bytes.len() as u32;
        let placed = Piece { offset: piece.offset, length, pack_offset: at.as_u64() as u32 };
        self.place(&mut pack.runs, placed);
        piece.offset += u64::from(length);
        (!piece.bytes.is_empty()).then_some(piece)
    }

    /// Adds a piece that is in the store already, or may be.
    fn find(&mut self, cut: &mut Cut, piece: FlightPiece, place: &Place) {
        let load = *cut.found.entry(place.pack.meta().name).or_insert_with(|| {
            let pack = Arc::clone(&place.pack);
            let matter = match pack.proof() {
                Proof::Stored => Matter::Stored,
                Proof::Unknown | Proof::Absent => Matter::Unproven(Vec::new()),
            };
            let is_large = matches!(matter, Matter::Unproven(_)) && pack.meta().stored_len > LARGE as u64;
            cut.loads.push((Load { pack, runs: Vec::new(), is_large, awaited: Vec::new() }, matter));
            cut.loads.len() - 1
        });
        let length = piece.bytes.len() as u32;
        let placed = Piece { offset: piece.offset, length, pack_offset: place.offset };
        if let Some((load, matter)) = cut.loads.get_mut(load) {
            self.place(&mut load.runs, placed);
            if let Matter::Unproven(pieces) = matter {
                pieces.push(piece.bytes);
            }
        }
    }

    /// Adds a piece of the last flight to the runs of a pack.
    fn place(&mut self, runs: &mut Vec<Run>, piece: Piece) {
        let flight = self.flights - 1;
        match runs.last_mut().filter(|run| run.flight == flight && run.number + 1 == self.runs) {
            Some(run) => run.pieces.push(piece),
            None => {
                runs.push(Run { flight, number: self.runs, pieces: vec![piece] });
                self.runs += 1;
            }
        }
    }

    fn seal(&self, mut cut: Cut, pack: Option<Packing>) -> Cut {
        let sealed = pack.and_then(|Packing { builder, runs }| Some((sealed(&self.volume, builder)?, runs)));
        cut.loads.extend(sealed.map(|(pack, runs)| {
            let (stored, is_large) = (StoredPack::new(PackRow::of(&pack)), pack.bytes.len() > LARGE);
            (Load { pack: stored, runs, is_large, awaited: Vec::new() }, Matter::Unstored(pack))
        }));
        cut
    }
}

/// Whether a batch takes a file: what somebody waits for is left to a batch of such files.
fn takes(is_awaited: bool, file: &FileInner) -> bool {
    is_awaited || file.queued != Some(Urgency::First)
}

/// A finished pack, which counts until nobody keeps its bytes: what does a put may go on when it is given up.
fn sealed(volume: &Volume, builder: PackBuilder) -> Option<SealedPack> {
    let mut pack = builder.finish()?;
    pack.bytes = volume.shared.files.memory.count(pack.bytes);
    Some(pack)
}

/// A pack of pieces that have been in one pack together, at least one, and where they are in it. Takes long.
pub(super) fn pack_anew(volume: &Volume, pieces: &[Bytes]) -> (SealedPack, Vec<u32>) {
    let mut builder = Packing::new(volume).builder;
    let mut add = |piece: &Bytes| builder.add(piece).expect("one pack has had room for them").as_u64() as u32;
    let places = pieces.iter().map(&mut add).collect();
    (sealed(volume, builder).expect("there is a piece"), places)
}

impl Drop for Cutter {
    fn drop(&mut self) {
        for file in std::mem::take(&mut self.files) {
            let mut inner = file.lock();
            if takes(self.is_awaited, &inner) {
                inner.queued = None;
            }
            drop(inner);
            file.flushed.notify_waiters();
            self.volume.shared.files.forget(file);
        }
    }
}

/// A pack in the making.
struct Packing {
    builder: PackBuilder,
    runs: Vec<Run>,
}

impl Packing {
    fn new(volume: &Volume) -> Packing {
        let number = volume.shared.packs_begun.fetch_add(1, Ordering::Relaxed);
        Packing { builder: PackBuilder::new(PackName::new(volume.shared.writer, number)), runs: Vec::new() }
    }
}

/// Files that somebody waits for share a pack up to so many bytes: it is not large, whatever stands around them.
const SHARED: u64 = (LARGE - LARGE / 16) as u64;
