//! From dirty bytes to packs to entries.
//!
//! One task gathers files whose bytes are to be stored: files that somebody waits for at once, closed ones after a short while, so that
//! small files share packs. A batch takes the bytes of its files off, cuts them into packs, puts several packs at a time, and then decides
//! the entries, pack by pack in the order of the cut: so each file's entries follow in offset order, and appends leave a prefix.
//!
//! Invariants:
//! - A file is in one batch at a time.
//! - An entry is decided after its pack is stored, under the file's lock, for what is left of the flight.
//! - A flush that fails keeps its bytes, tells the next fsync and close, and is tried again.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::StreamExt;
use tokio::sync::{Semaphore, mpsc};

use super::{
    Shared, Volume,
    dirty::FlightPiece,
    files::{FileInner, FileState, WeakVolume},
    io::may_truncate,
};
use crate::{
    Errno, Ino, PackRow,
    data::{PackBuilder, PackName, SealedPack},
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
        let Some(file) = self.shared.files.find(ino) else { return Ok(()) };
        let goal = {
            let mut inner = file.lock();
            if let Some(errno) = inner.error.take()
                && inner.dirty.is_empty()
            {
                return Err(errno);
            }
            inner.flushes_begun + u64::from(inner.dirty.has_grounded())
        };
        let waited =
            tokio::time::timeout(self.shared.options.io_timeout, self.wait_flushed(&file, goal)).await;
        waited.unwrap_or_else(|_| {
            tracing::error!(%ino, "file data was not stored in time; it is kept and tried again");
            Err(Errno::EIO)
        })
    }

    async fn wait_flushed(&self, file: &Arc<FileState>, goal: u64) -> Result<(), Errno> {
        loop {
            let flushed = file.flushed.notified();
            tokio::pin!(flushed);
            flushed.as_mut().enable();
            let asks = {
                let mut inner = file.lock();
                if inner.flushes_ended >= goal {
                    return inner.error.take().map_or(Ok(()), Err);
                }
                inner.flushes_begun < goal
            };
            if asks {
                self.request_flush(file, Urgency::Now);
            }
            flushed.await;
        }
    }

    /// The same for every file.
    pub(super) async fn flush_all(&self) -> Result<(), Errno> {
        let files = self.shared.files.all();
        for file in &files {
            if file.lock().dirty.has_grounded() {
                self.request_flush(file, Urgency::Now);
            }
        }
        let mut result = Ok(());
        for file in files {
            result = self.flush_file(file.ino).await.and(result);
            self.shared.files.forget(file);
        }
        result
    }

    /// Whether writers have to wait.
    pub(super) fn is_dirty_full(&self) -> bool {
        self.shared.files.dirty_bytes.load(Ordering::Relaxed) >= self.shared.options.dirty_bytes
    }

    /// Waits until writers may go on; asks for flushes. EIO if nothing could be stored for the longest that a request may take.
    pub(super) async fn wait_cleaner(&self) -> Result<(), Errno> {
        let cleaning = async {
            while self.is_dirty_full() {
                for file in self.shared.files.all() {
                    if file.lock().dirty.has_grounded() {
                        self.request_flush(&file, Urgency::Now);
                    }
                }
                let cleaned = self.shared.files.cleaned.notified();
                let _waited = tokio::time::timeout(LINGER, cleaned).await;
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
                request_old(&Volume { shared });
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

/// Requests a flush of every file that has dirty bytes and is in no queue.
fn request_old(volume: &Volume) {
    for file in volume.shared.files.all() {
        let inner = file.lock();
        let wanted = inner.dirty.has_grounded() && !inner.queued;
        drop(inner);
        if wanted {
            volume.request_flush(&file, Urgency::Soon);
        }
    }
}

/// Files whose bytes are on their way.
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
    pack: SealedPack,
    placed: Vec<(usize, Piece)>,
}

impl Batch {
    fn take_off(volume: Volume, files: Vec<Arc<FileState>>) -> Batch {
        let mut flights: Vec<Flight> = Vec::new();
        for file in files {
            let mut inner = file.lock();
            inner.queued = false;
            if inner.flushes_begun > inner.flushes_ended || !inner.dirty.has_grounded() {
                // In another batch, which asks for the rest itself; or there is nothing.
                drop(inner);
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
        let (sender, receiver) = mpsc::channel(PACKS_AHEAD);
        let pieces: Vec<_> =
            self.flights.iter_mut().map(|flight| std::mem::take(&mut flight.pieces)).collect();
        let packer = self.volume.clone();
        let packing = tokio::task::spawn_blocking(move || cut(&packer.shared, &pieces, &sender));
        let store = Arc::clone(&self.volume.shared.blocks);
        let puts = futures::stream::unfold(receiver, |mut receiver| async {
            Some((receiver.recv().await?, receiver))
        })
        .map(|load: Load| {
            let store = Arc::clone(&store);
            async move {
                let stored = store.put(load.pack.name, load.pack.bytes.clone()).await;
                (load, stored)
            }
        })
        .buffered(PUTS);
        tokio::pin!(puts);
        while let Some((load, stored)) = puts.next().await {
            match stored {
                Ok(()) => self.land(&load).await,
                Err(error) => {
                    tracing::error!(%error, "a pack was not stored; its bytes are kept and tried again");
                    load.placed
                        .iter()
                        .for_each(|(flight, _)| self.flights[*flight].failed = Some(Errno::EIO));
                }
            }
        }
        if let Err(error) = packing.await {
            tracing::error!(%error, "cutting packs failed");
            self.flights.iter_mut().for_each(|flight| flight.failed = Some(Errno::EIO));
        }
        self.flights.into_iter().for_each(|flight| flight.end(&self.volume));
    }

    /// Decides the entries of a stored pack.
    async fn land(&mut self, load: &Load) {
        let mut pack = PackUse::New(pack_row(&load.pack));
        let mut placed = &load.placed[..];
        while let Some((index, _)) = placed.first() {
            let run = placed.iter().take_while(|(flight, _)| flight == index).count();
            let pieces: Vec<Piece> = placed[..run].iter().map(|(_, piece)| *piece).collect();
            let flight = &mut self.flights[*index];
            placed = &placed[run..];
            if flight.failed.is_some() {
                continue;
            }
            for pieces in pieces.chunks(PIECES) {
                match self.volume.store(&flight.file, pieces, pack).await {
                    Ok(Some(used)) => pack = used,
                    Ok(None) => {}
                    Err(errno) => flight.failed = Some(errno),
                }
            }
        }
    }
}

impl Flight {
    fn end(self, volume: &Volume) {
        let mut inner = self.file.lock();
        inner.dirty.ground();
        inner.flushes_ended += 1;
        inner.failing = self.failed.is_some();
        if self.failed.is_some() && !inner.dirty.is_empty() {
            inner.error = self.failed;
        }
        let again = inner.dirty.has_grounded() && !inner.failing && !inner.queued;
        drop(inner);
        self.file.flushed.notify_waiters();
        if again {
            volume.request_flush(&self.file, Urgency::Soon);
        }
        volume.shared.files.forget(self.file);
    }
}

impl Volume {
    /// Decides the entry of stored pieces, for what is left of them. Returns by which number the tree knows the pack, if it came to that.
    async fn store(
        &self,
        file: &Arc<FileState>,
        placed: &[Piece],
        pack: PackUse,
    ) -> Result<Option<PackUse>, Errno> {
        loop {
            let stored = self.try_store(file, &mut file.lock(), placed, pack);
            match stored {
                Ok(used) => return Ok(used),
                Err(SubmitError::Errno(errno)) => return Err(errno),
                Err(SubmitError::Full) => self.shared.sequencer.room().await,
                Err(SubmitError::Stale) => {
                    tracing::error!(ino = %file.ino, "the extents of a file changed without its lock");
                    return Err(Errno::EIO);
                }
            }
        }
    }

    fn try_store(
        &self,
        file: &FileState,
        inner: &mut FileInner,
        placed: &[Piece],
        pack: PackUse,
    ) -> Result<Option<PackUse>, SubmitError> {
        let pieces = inner.dirty.landing(placed);
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return Ok(None) };
        let row = self.inode_row(file.ino)?;
        if inner.purging || row.is_none_or(|row| may_truncate(&row).is_err()) {
            self.discard_dirty(inner);
            return Ok(None);
        }
        let (from, to) = (first.offset, last.offset + u64::from(last.length));
        let mut overlapped = Vec::new();
        if row.is_some_and(|row| row.extents > 0) {
            for extent in self.view().extents(file.ino, from, to) {
                let extent = super::tree::logged(extent)?;
                let touches = |piece: &&Piece| {
                    piece.offset < extent.end() && extent.offset < piece.offset + u64::from(piece.length)
                };
                if pieces.iter().any(|piece| touches(&piece)) {
                    overlapped.push(extent.offset);
                }
            }
        }
        let ctime = inner.dirty.ctime.unwrap_or_default();
        let store = Store { ino: file.ino, pack, pieces, overlapped, mtime: inner.dirty.mtime, ctime };
        let number = self.shared.sequencer.submit(None, &store)?;
        let removed = inner.dirty.landed(&store.pieces);
        self.shared.files.count_dirty(-removed.cast_signed());
        Ok(Some(PackUse::Known(number)))
    }
}

/// Cuts the pieces of all flights into packs and sends each when it is full.
fn cut(shared: &Shared, flights: &[Vec<FlightPiece>], packs: &mpsc::Sender<Load>) {
    let mut cutter = Cutter { shared, packs, builder: None, placed: Vec::new() };
    let pieces = flights
        .iter()
        .enumerate()
        .flat_map(|(flight, pieces)| pieces.iter().map(move |piece| (flight, piece)));
    for (flight, piece) in pieces {
        if !cutter.add(flight, piece) {
            return;
        }
    }
    cutter.send();
}

struct Cutter<'a> {
    shared: &'a Shared,
    packs: &'a mpsc::Sender<Load>,
    builder: Option<PackBuilder>,
    placed: Vec<(usize, Piece)>,
}

impl Cutter<'_> {
    /// Adds a piece, in as many packs as it takes. False when nobody wants packs any more.
    fn add(&mut self, flight: usize, piece: &FlightPiece) -> bool {
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

    /// Sends what is there, if anything.
    fn send(&mut self) -> bool {
        let placed = std::mem::take(&mut self.placed);
        match self.builder.take().and_then(PackBuilder::finish) {
            Some(pack) => self.packs.blocking_send(Load { pack, placed }).is_ok(),
            None => true,
        }
    }
}

fn pack_row(pack: &SealedPack) -> PackRow {
    PackRow {
        writer: pack.name.writer.as_u64(),
        sequence: pack.name.number,
        footer_digest: *pack.footer_digest.as_bytes(),
        plain_bytes: pack.plain_len as u32,
        stored_bytes: pack.stored_len as u32,
        live_bytes: pack.plain_len,
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
/// Pieces in one entry; their extents, and those that they cut, stay below an entry's limits.
const PIECES: usize = 512;
