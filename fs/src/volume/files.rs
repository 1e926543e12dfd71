//! Open files: one state per inode that is open or dirty, one record per handle.
//!
//! Invariants:
//! - While an inode is open or has dirty data it has exactly one [`FileState`], whose lock orders everything that touches its bytes.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard, RwLock};
use tokio::{sync::Notify, time::Instant};

use super::{dirty::DirtyData, memory::Memory};
use crate::{Errno, Handle, Ino, OpenFlags};

/// The state of one inode that is open or dirty.
pub(crate) struct FileState {
    pub(crate) ino: Ino,
    inner: Mutex<FileInner>,
    /// Woken when a flush of the file ends.
    pub(crate) flushed: Notify,
}

/// What the lock of a file protects.
#[derive(Default)]
pub(crate) struct FileInner {
    pub(crate) dirty: DirtyData,
    /// Open handles.
    pub(crate) opens: u32,
    /// It is being purged: nothing may be stored for it any more.
    pub(crate) purging: bool,
    /// Flushes that took off and that ended.
    pub(crate) flushes_begun: u64,
    pub(crate) flushes_ended: u64,
    /// Whether somebody waits for the flight under way: for each flight another one.
    pub(crate) awaited: Arc<AtomicBool>,
    /// The last flush that left nothing behind: whatever was dirty when it took off has its entries.
    pub(crate) flushes_stored: u64,
    /// Entries that have given the file extents, since this record was made.
    pub(crate) stores: u64,
    /// How urgently it waits in the flusher's queues, if it does.
    pub(crate) queued: Option<Urgency>,
    /// Why the last flush failed, if it did and left something; it is tried again.
    pub(crate) failure: Option<Errno>,
    /// After failures of the store: until when it is left alone by whoever does not wait for this file.
    pub(crate) rest: Option<Rest>,
}

/// A pause after failures in a row.
#[derive(Clone, Copy)]
pub(crate) struct Rest {
    pause: Duration,
    began: Instant,
}

impl Rest {
    /// The pause after another failure.
    pub(crate) fn after(before: Option<Rest>) -> Rest {
        let pause = before.map_or(REST_FIRST, |before| (2 * before.pause).min(REST_MAX));
        Rest { pause, began: Instant::now() }
    }

    /// Whether it is over if the store took something at `stored` last: who hears that it is back does not wait longer than after a first
    /// failure.
    pub(crate) fn is_over(self, stored: Option<Instant>) -> bool {
        let is_back = stored.is_some_and(|stored| stored > self.began);
        self.began.elapsed() >= if is_back { REST_FIRST } else { self.pause }
    }
}

impl FileInner {
    /// Whether a flight is under way.
    pub(crate) fn is_under_way(&self) -> bool {
        self.flushes_begun > self.flushes_ended
    }

    /// Whether the flight of that number is under way.
    pub(crate) fn is_flying(&self, number: u64) -> bool {
        self.flushes_begun == number && self.flushes_ended < number
    }

    /// The flight under way has ended: without a `failure` all of it has its entries, or was cut off. Returns how many bytes are not kept
    /// any more.
    pub(crate) fn end_flight(&mut self, failure: Option<Errno>) -> u64 {
        let dropped = self.dirty.ground();
        self.flushes_ended += 1;
        self.failure = failure;
        if failure.is_none() {
            (self.flushes_stored, self.rest) = (self.flushes_ended, None);
        }
        dropped
    }
}

/// How soon bytes are to be stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Urgency {
    /// Soon: others may come that share a pack.
    Soon,
    /// Somebody waits for all that is dirty.
    Now,
    /// Somebody waits for this file.
    First,
}

impl FileState {
    pub(crate) fn lock(&self) -> MutexGuard<'_, FileInner> {
        self.inner.lock()
    }

    #[cfg(test)]
    pub(crate) fn lock_within(&self, patience: Duration) -> Option<MutexGuard<'_, FileInner>> {
        self.inner.try_lock_for(patience)
    }
}

/// Every file that is open or dirty.
#[derive(Default)]
pub(crate) struct FileTable {
    files: RwLock<HashMap<Ino, Arc<FileState>>>,
    /// Dirty bytes of all files.
    pub(crate) dirty_bytes: AtomicU64,
    /// What they take, and what is on its way although it was cut off.
    pub(crate) memory: Arc<Memory>,
}

impl FileTable {
    /// The state of `ino`, if it has one.
    pub(crate) fn find(&self, ino: Ino) -> Option<Arc<FileState>> {
        self.files.read().get(&ino).cloned()
    }

    /// The state of `ino`, made if it has none.
    pub(crate) fn state(&self, ino: Ino) -> Arc<FileState> {
        if let Some(file) = self.find(ino) {
            return file;
        }
        let new = || {
            let inner = FileInner { dirty: DirtyData::new(&self.memory), ..FileInner::default() };
            Arc::new(FileState { ino, inner: Mutex::new(inner), flushed: Notify::new() })
        };
        Arc::clone(self.files.write().entry(ino).or_insert_with(new))
    }

    /// Forgets the state of `file` if nothing keeps it.
    pub(crate) fn forget(&self, file: Arc<FileState>) {
        let mut files = self.files.write();
        let ino = file.ino;
        drop(file);
        // The table's reference is the only one: nobody can be about to lock it.
        let idle = files.get(&ino).filter(|file| Arc::strong_count(file) == 1).is_some_and(|file| {
            let inner = file.lock();
            inner.opens == 0 && inner.dirty.is_empty() && inner.queued.is_none()
        });
        if idle {
            files.remove(&ino);
        }
    }

    /// Every file that is open or dirty.
    pub(crate) fn all(&self) -> Vec<Arc<FileState>> {
        self.files.read().values().cloned().collect()
    }

    /// Counts a change of the dirty bytes.
    pub(crate) fn count_dirty(&self, by: i64) {
        if by >= 0 {
            self.dirty_bytes.fetch_add(by.cast_unsigned(), Ordering::Relaxed);
        } else {
            self.dirty_bytes.fetch_sub(by.unsigned_abs(), Ordering::Relaxed);
        }
    }
}

/// An open handle.
#[derive(Clone)]
pub(crate) struct OpenFile {
    pub(crate) file: Arc<FileState>,
    pub(crate) flags: OpenFlags,
    /// Where the last read ended, to see that reads are sequential.
    pub(crate) read_end: Arc<AtomicU64>,
}

/// Every open handle.
#[derive(Default)]
pub(crate) struct Handles {
    open: RwLock<HashMap<Handle, OpenFile>>,
    last: AtomicU64,
}

impl Handles {
    pub(crate) fn add(&self, file: Arc<FileState>, flags: OpenFlags) -> Handle {
        let handle = Handle(1 + self.last.fetch_add(1, Ordering::Relaxed));
        self.open.write().insert(handle, OpenFile { file, flags, read_end: Arc::default() });
        handle
    }

    /// The open file behind `handle`. EBADF if there is none.
    pub(crate) fn find(&self, handle: Handle) -> Result<OpenFile, Errno> {
        self.open.read().get(&handle).cloned().ok_or(Errno::EBADF)
    }

    pub(crate) fn remove(&self, handle: Handle) -> Option<OpenFile> {
        self.open.write().remove(&handle)
    }
}

/// A way back to a volume that does not keep it alive.
pub(super) type WeakVolume = Weak<super::Shared>;

/// How long a file is left alone after its first failure, and after very many.
const REST_FIRST: Duration = Duration::from_secs(1);
const REST_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    /// Two that let go of a file at the same time each saw the other hold it, and it stayed for ever.
    #[test]
    fn a_file_that_all_let_go_of_is_forgotten_whoever_is_last() {
        let (table, barrier) = (FileTable::default(), std::sync::Barrier::new(2));
        let let_go = || {
            for number in 0..20_000 {
                let file = table.state(Ino::new(number));
                barrier.wait();
                table.forget(file);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(let_go);
            let_go();
        });
        assert_eq!(table.all().len(), 0);
    }
}
