//! From dirty bytes to packs to entries.
//!
//! One task gathers files whose bytes are to be stored: files that somebody waits for at once, closed ones after a short while, so that
//! small files share packs. A batch takes the bytes of its files off, cuts them into packs, puts several packs at a time, and then decides
//! the entries, pack by pack in the order of the cut: so each file's entries follow in offset order, and appends leave a prefix.
//!
//! Invariants:
//! - A file is in one batch at a time.
//! - An entry is decided after its pack is stored, under the file's lock, for what was not cut off of the flight meanwhile. What was
//!   overwritten meanwhile lands too: what hides it may come much later, or never.
//! - A flush that fails keeps its bytes, tells the next fsync and close, and is tried again. What it has put is not put again, and nothing is
//!   put while no entry can be decided.
//! - Whoever waits for bytes goes by what became of them, whoever else has been told of an error.
//! - A put that gets no answer fails, so that what comes behind it has its turn.

mod cut;

use std::{ops::Range, sync::Arc, time::Duration};

use futures::StreamExt;
use tokio::sync::{Semaphore, mpsc};

use self::cut::cut;
use super::{
    Volume,
    dirty::FlightPiece,
    files::{FileInner, FileState, WeakVolume},
    io::may_truncate,
    memory::Counted,
    placed::StoredPack,
};
use crate::{
    Errno, Ino,
    data::SealedPack,
    decide::{PackUse, Piece, Store},
    sequencer::SubmitError,
};

/// The way to the flushing task.
#[derive(Default)]
pub(super) struct Flusher {
    queue: std::sync::OnceLock<mpsc::UnboundedSender<Request>>,
}

struct Request {
    file: Arc<FileState>,
    urgency: Urgency,
}

/// How soon bytes are to be stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Urgency {
    /// Soon: others may come that share a pack.
    Soon,
    /// Somebody waits.
    Now,
}

impl Volume {
    pub(super) fn start_flusher(&self) {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.shared.flusher.queue.get_or_init(|| sender);
        self.shared.runtime.spawn(gather(
            Arc::downgrade(&self.shared),
            receiver,
            self.shared.options.flush_after,
        ));
    }

    /// Asks for the dirty bytes of `file` to be stored.
    pub(super) fn request_flush(&self, file: &Arc<FileState>, urgency: Urgency) {
        if let Some(queue) = self.shared.flusher.queue.get() {
            file.lock().queued = true;
            // The task ends only with the volume.
            let _gone = queue.send(Request { file: Arc::clone(file), urgency });
        }
    }

    /// Returns when every byte that is dirty now has been stored and has its entry, or could not be.
    pub(super) async fn flush_file(&self, ino: Ino) -> Result<(), Errno> {
        self.flush_within(ino, self.shared.options.io_timeout).await.map_err(FlushError::errno)
    }

    async fn flush_within(&self, ino: Ino, patience: Duration) -> Result<(), FlushError> {
        let Some(file) = self.shared.files.find(ino) else { return Ok(()) };
        let goal = {
            let mut inner = file.lock();
            if let Some(errno) = inner.error.take()
                && inner.dirty.is_empty()
            {
                return Err(FlushError::Failed(errno));
            }
            inner.flushes_begun + u64::from(inner.dirty.has_grounded())
        };
        tokio::time::timeout(patience, self.wait_flushed(&file, goal)).await.unwrap_or_else(|_| {
            tracing::error!(%ino, "file data was not stored in time; it is kept and tried again");
            Err(FlushError::TimedOut)
        })
    }

    async fn wait_flushed(&self, file: &Arc<FileState>, goal: u64) -> Result<(), FlushError> {
        loop {
            let flushed = file.flushed.notified();
            tokio::pin!(flushed);
            flushed.as_mut().enable();
            let asks = {
                let mut inner = file.lock();
                if inner.flushes_stored >= goal || inner.dirty.is_empty() {
                    return Ok(());
                }
                if inner.flushes_ended >= goal {
                    inner.error = None;
                    return Err(FlushError::Failed(inner.failure.unwrap_or(Errno::EIO)));
                }
                // While a batch is under way another request would only be sent back; its end wakes everybody.
                inner.flushes_begun < goal && inner.flushes_begun == inner.flushes_ended
            };
            if asks {
                self.request_flush(file, Urgency::Now);
            }
            flushed.await;
        }
    }

    /// The same for every file. Once one was not stored in time, the others get no time of their own.
    pub(super) async fn flush_all(&self) -> Result<(), Errno> {
        self.request_all(Urgency::Now);
        let mut patience = self.shared.options.io_timeout;
        let mut result = Ok(());
        for file in self.shared.files.all() {
            let flushed = self.flush_within(file.ino, patience).await;
            if let Err(FlushError::TimedOut) = flushed {
                patience = Duration::ZERO;
            }
            result = flushed.map_err(FlushError::errno).and(result);
            self.shared.files.forget(file);
        }
        result
    }

    /// Requests a flush of every file that has dirty bytes and is in no queue. Forgets what nothing keeps.
    fn request_all(&self, urgency: Urgency) {
        for file in self.shared.files.all() {
            let inner = file.lock();
            let wanted = inner.dirty.has_grounded() && !inner.queued;
            drop(inner);
            if wanted {
                self.request_flush(&file, urgency);
            }
            self.shared.files.forget(file);
        }
    }

    /// Whether writers have to wait.
    pub(super) fn is_dirty_full(&self) -> bool {
        self.shared.files.memory.bytes() >= self.shared.options.dirty_bytes
    }

    /// Waits until writers may go on; asks for flushes. EIO if nothing could be stored for the longest that a request may take.
    pub(super) async fn wait_cleaner(&self) -> Result<(), Errno> {
        let cleaning = async {
            while self.is_dirty_full() {
                self.request_all(Urgency::Now);
                let released = self.shared.files.memory.released.notified();
                let _waited = tokio::time::timeout(LINGER, released).await;
            }
        };
        tokio::time::timeout(self.shared.options.io_timeout, cleaning).await.map_err(|_| {
            tracing::error!("a write waited too long for room: dirty data cannot be stored");
            Errno::EIO
        })
    }
}

/// The flushing task: gathers requests into batches.
async fn gather(volume: WeakVolume, mut queue: mpsc::UnboundedReceiver<Request>, flush_after: Duration) {
    let batches = Arc::new(Semaphore::new(BATCHES));
    let mut sweep = tokio::time::interval(flush_after.max(Duration::from_millis(10)) / 2);
    let mut waiting: Vec<Arc<FileState>> = Vec::new();
    loop {
        let first = tokio::select! {
            request = queue.recv() => request,
            _ = sweep.tick() => {
                let Some(shared) = volume.upgrade() else { return };
                Volume { shared }.request_all(Urgency::Soon);
                continue;
            }
        };
        let Some(first) = first else { return };
        let mut urgency = first.urgency;
        waiting.push(first.file);
        let linger = tokio::time::sleep(LINGER);
        tokio::pin!(linger);
        while urgency == Urgency::Soon && waiting.len() < BATCH_FILES {
            tokio::select! {
                request = queue.recv() => match request {
                    Some(request) => {
                        urgency = urgency.max(request.urgency);
                        waiting.push(request.file);
                    }
                    None => break,
                },
                () = &mut linger => break,
            }
        }
        while let Ok(request) = queue.try_recv() {
            waiting.push(request.file);
        }
        let Ok(permit) = Arc::clone(&batches).acquire_owned().await else { return };
        while let Ok(request) = queue.try_recv() {
            waiting.push(request.file);
        }
        let Some(shared) = volume.upgrade() else { return };
        let (volume, files) = (Volume { shared }, std::mem::take(&mut waiting));
        tokio::spawn(async move {
            let _permit = permit;
            Batch::take_off(volume, files).run().await;
        });
    }
}

/// Why bytes that somebody waits for were not stored.
enum FlushError {
    Failed(Errno),
    TimedOut,
}

impl FlushError {
    fn errno(self) -> Errno {
        match self {
            FlushError::Failed(errno) => errno,
            FlushError::TimedOut => Errno::EIO,
        }
    }
}

/// Files whose bytes are on their way. However it ends, its flights end with it.
struct Batch {
    volume: Volume,
    flights: Vec<Flight>,
}

struct Flight {
    file: Arc<FileState>,
    pieces: Vec<FlightPiece>,
    failed: Option<Errno>,
}

/// A pack and what it holds of which flight.
struct Load {
    pack: Arc<StoredPack>,
    placed: Vec<(usize, Piece)>,
    /// Unless it is in the store already.
    unstored: Option<Unstored>,
}

/// The bytes of a pack.
struct Unstored {
    pack: SealedPack,
    /// What was cut off or overwritten meanwhile is in memory until its pack is stored.
    _held: Counted,
}

impl Batch {
    fn take_off(volume: Volume, files: Vec<Arc<FileState>>) -> Batch {
        let mut flights: Vec<Flight> = Vec::new();
        for file in files {
            let mut inner = file.lock();
            inner.queued = false;
            if inner.flushes_begun > inner.flushes_ended || !inner.dirty.has_grounded() {
                // In another batch, which asks for the rest itself; or there is nothing any more, for which somebody may wait.
                drop(inner);
                file.flushed.notify_waiters();
                volume.shared.files.forget(file);
                continue;
            }
            inner.flushes_begun += 1;
            let pieces = inner.dirty.take_off();
            drop(inner);
            flights.push(Flight { file, pieces, failed: None });
        }
        Batch { volume, flights }
    }

    async fn run(mut self) {
        if let Some(errno) = self.volume.refusal() {
            // Nothing would refer to what is put now.
            self.flights.iter_mut().for_each(|flight| flight.failed = Some(errno));
            return;
        }
        let (sender, receiver) = mpsc::channel(PACKS_AHEAD);
        let pieces: Vec<_> =
            self.flights.iter_mut().map(|flight| std::mem::take(&mut flight.pieces)).collect();
        let packer = self.volume.clone();
        let packing = murphy_log::spawn_blocking(move || cut(&packer.shared, pieces, &sender));
        let volume = self.volume.clone();
        let puts = futures::stream::unfold(receiver, |mut receiver| async {
            Some((receiver.recv().await?, receiver))
        })
        .map(|mut load: Load| {
            let volume = volume.clone();
            async move {
                let stored = match load.unstored.take() {
                    Some(unstored) => volume.put(unstored).await,
                    None => Ok(()),
                };
                (load, stored)
            }
        })
        .buffered(PUTS);
        tokio::pin!(puts);
        while let Some((load, stored)) = puts.next().await {
            match stored {
                Ok(()) => self.land(&load).await,
                Err(errno) => {
                    for (flight, _) in &load.placed {
                        self.flights[*flight].failed.get_or_insert(errno);
                    }
                }
            }
        }
        if let Err(error) = packing.await {
            tracing::error!(%error, "cutting packs failed");
            self.flights.iter_mut().for_each(|flight| flight.failed = Some(Errno::EIO));
        }
    }

    /// Decides the entries of a stored pack. What they are refused for is found there by the next flush.
    async fn land(&mut self, load: &Load) {
        for run in load.placed.chunk_by(|(before, _), (after, _)| before == after) {
            let flight = &mut self.flights[run[0].0];
            let pieces: Vec<Piece> = run.iter().map(|(_, piece)| *piece).collect();
            for pieces in pieces.chunks(PIECES) {
                if flight.failed.is_none() {
                    let stored = self.volume.store(&flight.file, pieces, &load.pack).await;
                    flight.failed = stored.err();
                }
                if flight.failed.is_some() {
                    flight.file.lock().dirty.refused(pieces, &load.pack);
                }
            }
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.flights.drain(..).for_each(|flight| flight.end(&self.volume));
    }
}

impl Flight {
    fn end(self, volume: &Volume) {
        let mut inner = self.file.lock();
        // What is still in flight did not land, for whatever reason.
        inner.failure = inner.dirty.is_flying().then(|| self.failed.unwrap_or(Errno::EIO));
        let dropped = inner.dirty.ground();
        volume.shared.files.count_dirty(-dropped.cast_signed());
        inner.flushes_ended += 1;
        match inner.failure {
            Some(_) => inner.error = inner.failure,
            None => inner.flushes_stored = inner.flushes_ended,
        }
        let again = inner.dirty.has_grounded() && inner.failure.is_none() && !inner.queued;
        drop(inner);
        self.file.flushed.notify_waiters();
        if again {
            volume.request_flush(&self.file, Urgency::Soon);
        }
        volume.shared.files.forget(self.file);
    }
}

impl Volume {
    /// Why no entry can be decided now, if so.
    fn refusal(&self) -> Option<Errno> {
        match self.shared.sequencer.time_of_write() {
            Err(SubmitError::Errno(errno)) => Some(errno),
            Ok(_) | Err(SubmitError::Full | SubmitError::Stale) => None,
        }
    }

    /// Puts a pack, unless nothing could refer to it.
    async fn put(&self, Unstored { pack, _held }: Unstored) -> Result<(), Errno> {
        if let Some(errno) = self.refusal() {
            return Err(errno);
        }
        let put = self.shared.blocks.put(pack.name, pack.bytes);
        let error = match tokio::time::timeout(self.shared.options.io_timeout, put).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the store does not answer".to_owned(),
        };
        tracing::error!(error, "a pack was not stored; its bytes are kept and tried again");
        Err(Errno::EIO)
    }

    /// Decides the entries of stored pieces, for what is left of them.
    async fn store(&self, file: &Arc<FileState>, placed: &[Piece], pack: &StoredPack) -> Result<(), Errno> {
        loop {
            let stored = self.try_store(file, &mut file.lock(), placed, pack);
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
            self.discard_dirty(inner);
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
                let offset = super::tree::logged(extent)?.offset;
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

/// How long closed files wait for others that share their pack.
const LINGER: Duration = Duration::from_millis(100);
/// No more files than this are gathered.
const BATCH_FILES: usize = 8192;
/// Batches under way at once.
const BATCHES: usize = 4;
/// Puts under way at once in a batch.
const PUTS: usize = 8;
/// Packs cut ahead of the puts.
const PACKS_AHEAD: usize = 2;
/// Pieces in one entry, ...
const PIECES: usize = 512;
/// ... and extents that they replace or cut: each of these is at most four changes, and together they stay below an entry's limits.
const OVERLAPPED: usize = 256;
