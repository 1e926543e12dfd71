//! What the tests of races play with: a volume over a log and an index in memory, and a store that fails or hangs when told to.
//!
//! Invariants:
//! - Nothing is waited for longer than [`PATIENCE`]: a call that hangs is a failure.

#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use murphy_fs::{
    Answer, BlockStore, BlockStoreError, Caller, Errno, FileSystem, Handle, Index, IndexError, IndexSnapshot,
    Ino, MemoryIndex, Name, ObjectBlockStore, OpenFlags, PackName, Refusal, RowKey, Table, Volume,
    VolumeOptions, VolumeParts, check_tree,
};
use murphy_log::{AppendError, Frame, Log, MemoryLog, Position, State, SystemClock};
use murphy_tests::{BlockLayer, Layered, LogLayer, PATIENCE, epoch, lead_new, new_log, until, volume_parts};
use parking_lot::Mutex;
use tokio::{runtime::Builder, sync::watch};

/// A block store whose puts fail or hang when told to.
pub(super) type FaultyStore = Layered<PutFaults>;

/// What makes puts fail or hang.
#[derive(Debug)]
pub(super) struct PutFaults {
    below: ObjectBlockStore,
    puts: watch::Sender<Puts>,
    pub(super) begun: AtomicU64,
    /// Puts that nobody waits for any more.
    pub(super) given_up: AtomicU64,
}

/// A put under way; dropped before it is done it counts as given up.
struct UnderWay<'a> {
    given_up: &'a AtomicU64,
    is_done: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if !self.is_done {
            self.given_up.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// What becomes of puts; one that hangs goes by what is said next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Puts {
    Succeed,
    Fail,
    Hang,
    Panic,
}

impl PutFaults {
    pub(super) fn store() -> Arc<FaultyStore> {
        let below = ObjectBlockStore::in_memory();
        let puts = watch::Sender::new(Puts::Succeed);
        Arc::new(Layered(PutFaults { below, puts, begun: AtomicU64::new(0), given_up: AtomicU64::new(0) }))
    }

    pub(super) fn let_puts(&self, puts: Puts) {
        self.puts.send_replace(puts);
    }

    /// Returns when so many puts have begun.
    pub(super) async fn begun(&self, count: u64) {
        until("puts to begin", PATIENCE, || self.begun.load(Ordering::SeqCst) >= count).await;
    }
}

impl BlockLayer for PutFaults {
    fn below(&self) -> &dyn BlockStore {
        &self.below
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        Box::pin(async move {
            self.begun.fetch_add(1, Ordering::SeqCst);
            let mut puts = self.puts.subscribe();
            let mut under_way = UnderWay { given_up: &self.given_up, is_done: false };
            let told = *puts.wait_for(|puts| *puts != Puts::Hang).await.unwrap();
            under_way.is_done = true;
            assert!(told != Puts::Panic, "as told");
            if told == Puts::Fail {
                let object = name.to_string();
                return Err(BlockStoreError::Refused { object, refusal: Refusal::Exists });
            }
            self.below.put(name, bytes).await
        })
    }
}

/// A volume and what it stands on.
pub(super) struct World {
    pub(super) volume: Volume,
    pub(super) log: Arc<MemoryLog>,
    pub(super) store: Arc<FaultyStore>,
    pub(super) index: Arc<MemoryIndex>,
}

impl World {
    pub(super) fn new(options: VolumeOptions) -> World {
        World::over(new_log(), options)
    }

    pub(super) fn over(log: Arc<MemoryLog>, options: VolumeOptions) -> World {
        World::made(log, PutFaults::store(), |parts| lead_new(VolumeParts { options, ..parts }))
    }

    /// A volume at the beginning of a log that somebody else fills.
    pub(super) fn beside(log: Arc<MemoryLog>, store: Arc<FaultyStore>, options: VolumeOptions) -> World {
        let state = State::origin(epoch(1));
        World::made(log, store, |parts| Volume::open(VolumeParts { state, options, ..parts }).unwrap())
    }

    fn made(log: Arc<MemoryLog>, store: Arc<FaultyStore>, open: impl FnOnce(VolumeParts) -> Volume) -> World {
        let index = Arc::new(MemoryIndex::new());
        let volume = open(parts(log.clone(), index.clone(), &store));
        World { volume, log, store, index }
    }

    pub(super) fn create(&self, name: &str) -> (Ino, Handle) {
        let created = self.volume.create(&ROOT, Ino::ROOT, &named(name), 0o644, READ_WRITE);
        let (attr, opened) = now(created).unwrap();
        (attr.ino, opened.handle)
    }

    pub(super) fn write(&self, (ino, handle): (Ino, Handle), offset: u64, data: &[u8]) -> Result<u32, Errno> {
        now(self.volume.write(&ROOT, ino, handle, offset, Bytes::copy_from_slice(data)))
    }

    /// Single bytes with a hole before each, so that each becomes an extent.
    pub(super) fn scatter(&self, file: (Ino, Handle), count: u64) {
        for number in 0..count {
            self.write(file, 2 * number + 1, b"x").unwrap();
        }
    }

    pub(super) async fn fsync(&self, (ino, handle): (Ino, Handle)) -> Result<(), Errno> {
        soon(self.volume.fsync(ino, Some(handle)).wait()).await
    }

    pub(super) fn orphans(&self) -> usize {
        let range = RowKey::range_start(Table::Orphan, 0)..RowKey::range_start(Table::Orphan, u64::MAX);
        self.volume.view().rows(range).count()
    }

    /// Returns when no orphan is left.
    pub(super) async fn without_orphans(&self) {
        until("the orphans to be purged", PATIENCE, || self.orphans() == 0).await;
        assert_eq!(check_tree(&self.volume.view()).unwrap(), Vec::new());
    }
}

/// What a volume over these is made of.
pub(super) fn parts(log: Arc<dyn Log>, index: Arc<dyn Index>, store: &Arc<FaultyStore>) -> VolumeParts {
    volume_parts(log, index, Arc::<FaultyStore>::clone(store), Arc::new(SystemClock::new()))
}

/// A log that can be without room.
#[derive(Debug)]
pub(super) struct CrampedLog {
    pub(super) below: Arc<MemoryLog>,
    pub(super) is_full: AtomicBool,
}

impl LogLayer for CrampedLog {
    fn below(&self) -> &dyn Log {
        &*self.below
    }

    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError> {
        if self.is_full.load(Ordering::SeqCst) {
            return Err(AppendError::NoSpace { message: "full".to_owned() });
        }
        self.below.append(previous, frame)
    }
}

/// An index that can stop taking rows.
#[derive(Default)]
pub(super) struct StuckIndex {
    below: MemoryIndex,
    /// Held while it is stuck.
    pub(super) stuck: Mutex<()>,
}

impl Index for StuckIndex {
    fn snapshot(&self) -> Arc<dyn IndexSnapshot> {
        self.below.snapshot()
    }

    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
    ) -> Result<(), IndexError> {
        let _released = self.stuck.lock();
        self.below.ingest(rows, state)
    }

    fn sync(&self) -> Result<(), IndexError> {
        self.below.sync()
    }

    fn reached(&self) -> Option<State> {
        self.below.reached()
    }
}

pub(super) fn named(name: &str) -> Name {
    Name::new(name.to_owned()).unwrap()
}

/// An answer that must be there at once.
pub(super) fn now<T>(answer: Answer<T>) -> Result<T, Errno> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(_) => panic!("it waits"),
    }
}

pub(super) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it came in time")
}

/// Asks until it is done. Volumes that are [`impatient`] refuse on a busy machine what they do the next time.
pub(super) async fn in_the_end<F: Future<Output = Result<(), Errno>>>(ask: impl Fn() -> F) {
    let done = async {
        while let Err(errno) = ask().await {
            assert_eq!(errno, Errno::EIO);
        }
    };
    soon(done).await;
}

/// Runs a test on one thread, so that nothing happens between two polls.
pub(super) fn alone(test: impl Future<Output = ()>) {
    Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

pub(super) fn impatient() -> VolumeOptions {
    let timeout = Duration::from_millis(300);
    VolumeOptions { io_timeout: timeout, put_timeout: timeout, ..VolumeOptions::default() }
}

pub(super) const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 0 };
pub(super) const READ_WRITE: OpenFlags =
    OpenFlags { read: true, write: true, append: false, truncate: false, sync: false };
