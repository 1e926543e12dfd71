//! From dirty bytes to packs to entries.
//!
//! One task gathers files whose bytes are to be stored, closed ones after a short while, so that small files share packs; another one those
//! that somebody waits for, which have batches of their own. A batch takes the bytes of one file after the other off, cuts them into packs,
//! puts several packs at a time, and decides the entries of each file in the order of its bytes.
//!
//! Invariants:
//! - The bytes of a file are in one batch at a time.
//! - An entry is decided after its pack is stored, under the file's lock, for what was not cut off of the flight meanwhile. What was
//!   overwritten meanwhile lands too: what hides it may come much later, or never.
//! - A flush that fails keeps its bytes and is tried again, after a pause that grows, or at once if somebody waits for it. What it has put
//!   is not put again, and nothing is put while no entry can be decided.
//! - That a flush failed is said for as long as bytes are not stored, and never after.
//! - Whoever waits for bytes goes by what became of them, whoever else has been told of an error.
//! - Whoever waits for a file waits for no other, but for those that share its packs: a put that gets no answer holds up only what is in it.
//!   Large packs have their turns: as many are put at once as are stored in time.
//! - A put that gets no answer fails, so that its bytes are tried again: the store is asked whether it has them, and they are put again if not.

mod batch;
mod cut;
mod flight;
mod pace;
mod put;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, mpsc},
    time::Instant,
};

pub(super) use self::batch::Batch;
use self::pace::Pace;
use super::{
    Volume,
    files::{FileInner, FileState, Rest, Urgency, WeakVolume},
};
use crate::{Errno, Ino};

/// The way to the flushing tasks.
pub(super) struct Flusher {
    queues: OnceLock<Queues>,
    /// Batches of small files that somebody waits for, ...
    places: Arc<Semaphore>,
    /// ... and of large ones.
    large_places: Arc<Semaphore>,
    pace: Pace,
    /// When a put succeeded last.
    stored: Mutex<Option<Instant>>,
}

impl Default for Flusher {
    fn default() -> Flusher {
        let [places, large_places] =
            [AWAITED_BATCHES, AWAITED_LARGE].map(|places| Arc::new(Semaphore::new(places)));
        Flusher {
            queues: OnceLock::new(),
            places,
            large_places,
            pace: Pace::default(),
            stored: Mutex::default(),
        }
    }
}

struct Queues {
    all: mpsc::UnboundedSender<Request>,
    awaited: mpsc::UnboundedSender<Arc<FileState>>,
}

struct Request {
    file: Arc<FileState>,
    urgency: Urgency,
}

impl Volume {
    pub(super) fn start_flusher(&self) {
        let ((all, requests), (awaited, files)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
        self.shared.flusher.queues.get_or_init(|| Queues { all, awaited });
        let weak = Arc::downgrade(&self.shared);
        let places = Arc::clone(&self.shared.flusher.places);
        self.shared.runtime.spawn(gather_awaited(weak.clone(), files, places));
        self.shared.runtime.spawn(gather(weak, requests, self.shared.options.flush_after));
    }

    /// Asks for the dirty bytes of `file` to be stored.
    pub(super) fn request_flush(&self, file: &Arc<FileState>, urgency: Urgency) {
        let Some(queues) = self.shared.flusher.queues.get() else { return };
        let mut inner = file.lock();
        inner.queued = inner.queued.max(Some(urgency));
        let is_large = inner.dirty.len() > LARGE as u64;
        drop(inner);
        let file = Arc::clone(file);
        // The tasks end only with the volume.
        let _gone = match urgency {
            Urgency::First if is_large => {
                let places = Arc::clone(&self.shared.flusher.large_places);
                self.shared.runtime.spawn(run_alone(Arc::downgrade(&self.shared), places, file));
                false
            }
            Urgency::First => queues.awaited.send(file).is_err(),
            Urgency::Soon | Urgency::Now => queues.all.send(Request { file, urgency }).is_err(),
        };
    }

    /// Returns when every byte that is dirty now has been stored and has its entry, or could not be.
    pub(super) async fn flush_file(&self, ino: Ino) -> Result<(), Errno> {
        let patience = self.shared.options.io_timeout;
        self.flush_within(ino, patience, Urgency::First).await.map_err(FlushError::errno)
    }

    async fn flush_within(&self, ino: Ino, patience: Duration, urgency: Urgency) -> Result<(), FlushError> {
        let Some(file) = self.shared.files.find(ino) else { return Ok(()) };
        let flushing = async {
            let joins = file.lock().is_under_way();
            let flushed = self.wait_flushed(&file, urgency).await;
            // What was under way may have been doomed before anybody waited for it.
            match flushed {
                Err(FlushError::Failed(_)) if joins => self.wait_flushed(&file, urgency).await,
                flushed => flushed,
            }
        };
        tokio::time::timeout(patience, flushing).await.unwrap_or_else(|_| {
            tracing::error!(%ino, "file data was not stored in time; it is kept and tried again");
            Err(FlushError::TimedOut)
        })
    }

    /// Returns when every byte of a file that is dirty now has been stored, or could not be.
    async fn wait_flushed(&self, file: &Arc<FileState>, urgency: Urgency) -> Result<(), FlushError> {
        let goal = {
            let inner = file.lock();
            inner.flushes_begun + u64::from(inner.dirty.has_grounded())
        };
        loop {
            let flushed = file.flushed.notified();
            tokio::pin!(flushed);
            flushed.as_mut().enable();
            let asks = {
                let inner = file.lock();
                if inner.flushes_stored >= goal || inner.dirty.is_empty() {
                    return Ok(());
                }
                if inner.flushes_ended >= goal {
                    return Err(FlushError::Failed(inner.failure.unwrap_or(Errno::EIO)));
                }
                // While a flight is under way another request would only be sent back; its end wakes everybody.
                if urgency == Urgency::First && inner.is_under_way() {
                    self.shared.flusher.pace.hurry(&inner.awaited);
                }
                inner.flushes_begun < goal && !inner.is_under_way() && inner.queued < Some(urgency)
            };
            if asks {
                self.request_flush(file, urgency);
            }
            flushed.await;
        }
    }

    /// The same for every file. Once one was not stored in time, the others get no time of their own.
    pub(super) async fn flush_all(&self) -> Result<(), Errno> {
        self.request_all(Urgency::Now, |_| true);
        let mut patience = self.shared.options.io_timeout;
        let mut result = Ok(());
        for file in self.shared.files.all() {
            let flushed = self.flush_within(file.ino, patience, Urgency::Now).await;
            if let Err(FlushError::TimedOut) = flushed {
                patience = Duration::ZERO;
            }
            result = flushed.map_err(FlushError::errno).and(result);
            self.shared.files.forget(file);
        }
        result
    }

    /// Requests a flush of every file that has dirty bytes and has not failed just now.
    fn request_rested(&self, urgency: Urgency) {
        self.request_all(urgency, |inner| inner.rest.is_none_or(|rest| self.is_over(rest)));
    }

    /// Whether a pause after failures is over.
    pub(super) fn is_over(&self, rest: Rest) -> bool {
        rest.is_over(*self.shared.flusher.stored.lock())
    }

    /// Requests a flush of every file that has dirty bytes, is in no queue and is `meant`. Forgets what nothing keeps.
    fn request_all(&self, urgency: Urgency, meant: impl Fn(&FileInner) -> bool) {
        for file in self.shared.files.all() {
            let inner = file.lock();
            let wanted = inner.dirty.has_grounded() && inner.queued.is_none() && meant(&inner);
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

    /// Waits until writers may go on; asks for flushes. At once the errno that says so if no entry can be decided; EIO if nothing could be
    /// stored for the longest that a request may take.
    pub(super) async fn wait_cleaner(&self) -> Result<(), Errno> {
        let cleaning = async {
            while self.is_dirty_full() {
                self.refusal().map_or(Ok(()), Err)?;
                self.request_rested(Urgency::Now);
                let released = self.shared.files.memory.released.notified();
                let _waited = tokio::time::timeout(LINGER, released).await;
            }
            Ok(())
        };
        tokio::time::timeout(self.shared.options.io_timeout, cleaning).await.unwrap_or_else(|_| {
            tracing::error!("a write waited too long for room: dirty data cannot be stored");
            Err(Errno::EIO)
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
                Volume { shared }.request_rested(Urgency::Soon);
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
            Batch::run(volume, files, urgency).await;
        });
    }
}

/// The task that gathers small files that somebody waits for: those that come while others have their turn share packs. Large ones have
/// batches of their own.
async fn gather_awaited(
    volume: WeakVolume,
    mut queue: mpsc::UnboundedReceiver<Arc<FileState>>,
    places: Arc<Semaphore>,
) {
    let turns = Arc::new(Semaphore::new(TURNS));
    while let Some(first) = queue.recv().await {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else { return };
        let mut files = vec![first];
        while let Ok(file) = queue.try_recv() {
            files.push(file);
        }
        // Nobody waits for what takes longer than his own.
        files.sort_by_cached_key(|file| file.lock().dirty.len());
        let Some(shared) = volume.upgrade() else { return };
        let volume = Volume { shared };
        tokio::spawn(async move {
            let _place = place;
            let batch = Batch::run(volume, files, Urgency::First);
            tokio::pin!(batch);
            if tokio::time::timeout(TURN, &mut batch).await.is_err() {
                drop(turn);
                batch.await;
            }
        });
    }
}

/// Stores a file in a batch of its own once there is a place for it.
async fn run_alone(volume: WeakVolume, places: Arc<Semaphore>, file: Arc<FileState>) {
    let Ok(_place) = places.acquire_owned().await else { return };
    let Some(shared) = volume.upgrade() else { return };
    Batch::run(Volume { shared }, vec![file], Urgency::First).await;
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

/// How long closed files wait for others that share their pack.
const LINGER: Duration = Duration::from_millis(100);
/// No more files than this are gathered.
const BATCH_FILES: usize = 8192;
/// Batches under way at once, ...
const BATCHES: usize = 4;
/// ... and of files that somebody waits for: so many that others share packs meanwhile, ...
const TURNS: usize = 4;
/// ... for no longer than this, ...
const TURN: Duration = Duration::from_secs(1);
/// ... and so many in all: more than begin their turns before a put that gets no answer is given up.
const AWAITED_BATCHES: usize = 512;
/// Large files that somebody waits for and that are under way at once: more than have turns, each compresses on a thread.
const AWAITED_LARGE: usize = 128;
/// A pack of more bytes than this is large.
const LARGE: usize = 256 << 10;
