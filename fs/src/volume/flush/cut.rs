//! Cutting the bytes of a batch into packs.
//!
//! Invariants:
//! - What comes before something else of the same file is sent before it.

use std::sync::{Arc, atomic::Ordering};

use tokio::sync::{mpsc, mpsc::error::TrySendError};

use super::{
    super::{
        Shared,
        dirty::FlightPiece,
        placed::{Place, StoredPack},
    },
    Load, Unstored,
};
use crate::{
    PackRow,
    data::{PackBuilder, PackName},
    decide::{PackUse, Piece},
};

/// Cuts the pieces of all flights into packs and sends each when it is full.
pub(super) fn cut(shared: &Shared, flights: Vec<Vec<FlightPiece>>, packs: &mpsc::Sender<Load>) {
    let mut cutter = Cutter { shared, packs, builder: None, placed: Vec::new(), stored: None };
    let pieces = flights
        .into_iter()
        .enumerate()
        .flat_map(|(flight, pieces)| pieces.into_iter().map(move |piece| (flight, piece)));
    for (flight, piece) in pieces {
        if !cutter.add(flight, &piece) {
            return;
        }
    }
    cutter.send();
    cutter.send_stored();
}

struct Cutter<'a> {
    shared: &'a Shared,
    packs: &'a mpsc::Sender<Load>,
    builder: Option<PackBuilder>,
    placed: Vec<(usize, Piece)>,
    /// What is in a stored pack, and comes before what was placed in the builder since.
    stored: Option<Load>,
}

impl Cutter<'_> {
    /// Adds a piece, in as many packs as it takes. False when nobody wants packs any more.
    fn add(&mut self, flight: usize, piece: &FlightPiece) -> bool {
        if let Some(place) = &piece.place {
            return self.add_stored(flight, piece, place);
        }
        if !self.send_stored() {
            return false;
        }
        let mut done = 0;
        while done < piece.bytes.len() {
            let shared = self.shared;
            let builder = self.builder.get_or_insert_with(|| {
                let number = shared.packs_begun.fetch_add(1, Ordering::Relaxed);
                PackBuilder::new(PackName::new(shared.writer, number))
            });
            let rest = &piece.bytes[done..];
            // A piece that would fit into a pack of its own is not torn in two.
            let take = if rest.len() > builder.room() && builder.plain_len() > 0 {
                0
            } else {
                rest.len().min(builder.room())
            };
            if take == 0 {
                if !self.send() {
                    return false;
                }
                continue;
            }
            let Ok(at) = builder.add(&rest[..take]) else { return false };
            let place = Piece {
                offset: piece.offset + done as u64,
                length: take as u32,
                pack_offset: at.as_u64() as u32,
            };
            self.placed.push((flight, place));
            done += take;
        }
        true
    }

    /// Adds a piece that is in the store already.
    fn add_stored(&mut self, flight: usize, piece: &FlightPiece, place: &Place) -> bool {
        // What comes before it in the same file is sent before it.
        let follows = self.placed.last().is_some_and(|(last, _)| *last == flight);
        if follows && !self.send() {
            return false;
        }
        let elsewhere = self.stored.as_ref().is_some_and(|load| !Arc::ptr_eq(&load.pack, &place.pack));
        if elsewhere && !self.send_stored() {
            return false;
        }
        let load = self.stored.get_or_insert_with(|| Load {
            pack: Arc::clone(&place.pack),
            placed: Vec::new(),
            unstored: None,
        });
        let length = piece.bytes.len() as u32;
        load.placed.push((flight, Piece { offset: piece.offset, length, pack_offset: place.offset }));
        true
    }

    /// Sends what is in a stored pack, if anything.
    fn send_stored(&mut self) -> bool {
        self.stored.take().is_none_or(|load| self.pass_on(load))
    }

    /// Sends what is in the builder, if anything.
    fn send(&mut self) -> bool {
        let placed = std::mem::take(&mut self.placed);
        self.builder.take().and_then(PackBuilder::finish).is_none_or(|pack| {
            let held = self.shared.files.memory.hold(pack.bytes.len());
            let stored = StoredPack::new(PackUse::New(PackRow::of(&pack)));
            self.pass_on(Load { pack: stored, placed, unstored: Some(Unstored { pack, _held: held }) })
        })
    }

    fn pass_on(&self, load: Load) -> bool {
        match self.packs.try_send(load) {
            Ok(()) => true,
            Err(TrySendError::Full(load)) => self.packs.blocking_send(load).is_ok(),
            Err(TrySendError::Closed(_)) => false,
        }
    }
}
