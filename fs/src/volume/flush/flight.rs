//! The bytes of a file on their way, from when they take off until the entries of all of them are decided.
//!
//! Invariants:
//! - The entries of a file follow in the order of its bytes, whichever pack is stored first, so that appends leave a prefix.
//! - A flight ends with its last byte, whatever else is under way, and however its batch ends; at once if all that it still brings is cut
//!   off. What arrives of it afterwards is nobody's: the next flight of the file may be of the same ranges, and of other bytes.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, atomic::AtomicBool},
};

use super::super::{
    Volume,
    dirty::FlightPiece,
    files::{FileInner, FileState, Rest, Urgency},
    io::may_truncate,
    placed::{Proof, StoredPack},
    tree::logged,
};
use crate::{
    Errno, Ino,
    decide::{PackUse, Piece, Store},
    sequencer::SubmitError,
};

/// The bytes of a file on their way.
pub(super) struct Flight {
    volume: Volume,
    /// There until it ends.
    file: Option<Arc<FileState>>,
    /// Which of the file's flights it is.
    pub(super) number: u64,
    /// Whether somebody waits for it.
    pub(super) awaited: Arc<AtomicBool>,
    /// How many bytes have not arrived, or not in their turn.
    pub(super) left: u64,
    /// The run whose turn it is.
    next: u64,
    /// Runs that wait for their turn.
    arrived: BTreeMap<u64, Arrival>,
    failed: Option<Errno>,
}

/// A run whose pack was put, or could not be.
pub(super) struct Arrival {
    pub(super) pack: Arc<StoredPack>,
    pub(super) pieces: Vec<Piece>,
    pub(super) stored: Result<(), Errno>,
}

impl Flight {
    /// Sends what is dirty in a file on its way, of which nothing is under way; it fails if no entry can be decided.
    pub(super) fn take_off(
        volume: &Volume,
        file: &Arc<FileState>,
        inner: &mut FileInner,
        failed: Option<Errno>,
    ) -> (Flight, Vec<FlightPiece>) {
        let pieces = inner.dirty.take_off();
        let left = pieces.iter().map(|piece| piece.bytes.len() as u64).sum();
        inner.flushes_begun += 1;
        let awaited = Arc::<AtomicBool>::default();
        inner.awaited = Arc::clone(&awaited);
        let (volume, file, number) = (volume.clone(), Some(Arc::clone(file)), inner.flushes_begun);
        (Flight { volume, file, number, awaited, left, next: 0, arrived: BTreeMap::new(), failed }, pieces)
    }

    /// A run has arrived: decides the entries of those whose turn it is. What they are refused for is found in its pack by the next flight.
    pub(super) async fn land(&mut self, number: u64, arrival: Arrival) {
        self.arrived.insert(number, arrival);
        let Some(file) = &self.file else { return };
        while let Some(Arrival { pack, pieces, stored }) = self.arrived.remove(&self.next) {
            self.next += 1;
            self.left -= pieces.iter().map(|piece| u64::from(piece.length)).sum::<u64>();
            if let Err(errno) = stored {
                self.failed.get_or_insert(errno);
                // The others may take long: it is said at once, unless it is true no more.
                let mut inner = file.lock();
                if inner.is_flying(self.number) && !inner.dirty.landing(&pieces).is_empty() {
                    inner.failure = Some(errno);
                }
                self.refused(&mut inner, &pieces, &pack);
                continue;
            }
            for pieces in pieces.chunks(PIECES) {
                if self.failed.is_none() {
                    self.failed = self.volume.store((file, self.number), pieces, &pack).await.err();
                }
                if self.failed.is_some() {
                    self.refused(&mut file.lock(), pieces, &pack);
                }
            }
        }
    }

    /// Pieces are in a pack, but not in the file: the next flight finds them there, if it may be in the store.
    fn refused(&self, inner: &mut FileInner, pieces: &[Piece], pack: &Arc<StoredPack>) {
        if inner.is_flying(self.number) && pack.proof() > Proof::Absent {
            inner.dirty.refused(pieces, pack);
        }
    }

    /// Ends it, unless it has ended. Says whether there is more to send.
    fn end(&self, inner: &mut FileInner) -> bool {
        for arrival in self.arrived.values() {
            self.refused(inner, &arrival.pieces, &arrival.pack);
        }
        if !inner.is_flying(self.number) {
            return false;
        }
        // What is still in flight did not land, for whatever reason.
        let failure = inner.dirty.is_flying().then(|| self.failed.unwrap_or(Errno::EIO));
        // While no entry can be decided nothing is compressed and put again and again.
        let rests = failure.is_some() && self.volume.refusal().is_none();
        let dropped = inner.end_flight(failure);
        inner.rest = if rests { Some(Rest::after(inner.rest)) } else { inner.rest };
        self.volume.shared.files.count_dirty(-dropped.cast_signed());
        inner.dirty.has_grounded() && inner.failure.is_none() && inner.queued.is_none()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else { return };
        let again = self.end(&mut file.lock());
        file.flushed.notify_waiters();
        if again {
            self.volume.request_flush(&file, Urgency::Soon);
        }
        self.volume.shared.files.forget(file);
    }
}

impl Volume {
    /// Why no entry can be decided now, if so.
    pub(super) fn refusal(&self) -> Option<Errno> {
        match self.shared.sequencer.time_of_write() {
            Err(SubmitError::Errno(errno)) => Some(errno),
            Ok(_) | Err(SubmitError::Full | SubmitError::Stale) => None,
        }
    }

    /// Decides the entries of stored pieces of a flight, for what is left of them.
    async fn store(
        &self,
        (file, flight): (&Arc<FileState>, u64),
        placed: &[Piece],
        pack: &StoredPack,
    ) -> Result<(), Errno> {
        loop {
            let stored = {
                let mut inner = file.lock();
                if !inner.is_flying(flight) {
                    return Ok(());
                }
                self.try_store(file, &mut inner, placed, pack)
            };
            match stored {
                Ok(Left::Nothing) => return Ok(()),
                // There may be more than one entry can hold.
                Ok(Left::Unknown) => {}
                Err(SubmitError::Errno(errno)) => return Err(errno),
                Err(SubmitError::Full) => self.shared.sequencer.room().await,
                Err(SubmitError::Stale) => {
                    tracing::error!(ino = %file.ino, "the extents of a file changed without its lock");
                    return Err(Errno::EIO);
                }
            }
        }
    }

    /// Decides one entry, for the first of the pieces at least.
    fn try_store(
        &self,
        file: &FileState,
        inner: &mut FileInner,
        placed: &[Piece],
        pack: &StoredPack,
    ) -> Result<Left, SubmitError> {
        let mut pieces = inner.dirty.landing(placed);
        if pieces.is_empty() {
            return Ok(Left::Nothing);
        }
        let row = self.inode_row(file.ino)?;
        if inner.purging || row.is_none_or(|row| may_truncate(&row).is_err()) {
            self.discard_dirty(file, inner);
            return Ok(Left::Nothing);
        }
        let overlapped = match row {
            Some(row) if row.extents > 0 => self.overlapped(file.ino, &mut pieces)?,
            _ => Vec::new(),
        };
        let ctime = inner.dirty.ctime.unwrap_or_default();
        let mut pack = pack.lock();
        let store = Store { ino: file.ino, pack: *pack, pieces, overlapped, mtime: inner.dirty.mtime, ctime };
        *pack = PackUse::Known(self.shared.sequencer.submit(None, &store)?);
        drop(pack);
        inner.stores += 1;
        let removed = inner.dirty.landed(&store.pieces);
        self.shared.files.count_dirty(-removed.cast_signed());
        Ok(Left::Unknown)
    }
}

/// What is left of stored pieces after an entry.
enum Left {
    Nothing,
    Unknown,
}

impl Volume {
    /// The file offsets of the extents that `pieces` touch. If there are too many for one entry, the pieces are cut off before the first
    /// that is too much.
    fn overlapped(&self, ino: Ino, pieces: &mut Vec<Piece>) -> Result<Vec<u64>, Errno> {
        let (view, mut overlapped) = (self.view(), Vec::new());
        for run in runs(pieces) {
            for extent in view.extents(ino, run.start, run.end) {
                let offset = logged(extent)?.offset;
                // One that reaches from one run into the next is met in both.
                if overlapped.last() == Some(&offset) {
                    continue;
                }
                if overlapped.len() == OVERLAPPED {
                    cut_off(pieces, offset);
                    return Ok(overlapped);
                }
                overlapped.push(offset);
            }
        }
        Ok(overlapped)
    }
}

/// The parts of a file that pieces in offset order cover.
fn runs(pieces: &[Piece]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for piece in pieces {
        match runs.last_mut() {
            Some(run) if run.end == piece.offset => run.end = piece.end(),
            _ => runs.push(piece.offset..piece.end()),
        }
    }
    runs
}

/// Leaves of `pieces` what lies before `end`.
fn cut_off(pieces: &mut Vec<Piece>, end: u64) {
    pieces.retain(|piece| piece.offset < end);
    for piece in pieces {
        piece.length = piece.length.min(u32::try_from(end - piece.offset).unwrap_or(u32::MAX));
    }
}

/// Pieces in one entry, ...
const PIECES: usize = 512;
/// ... and extents that they replace or cut: each of these is at most four changes, and together they stay below an entry's limits.
const OVERLAPPED: usize = 256;
