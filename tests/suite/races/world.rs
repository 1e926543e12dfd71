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
use futures::{future::BoxFuture, stream::BoxStream};
use murphy_fs::{
    Answer, BlockStore, BlockStoreError, Caller, CellCache, Errno, FileSystem, Handle, Index, IndexError,
    IndexSnapshot, Ino, MemoryIndex, Name, ObjectBlockStore, OpenFlags, PackFetcher, PackName, Refusal,
    RowKey, StoredPack, Table, Volume, VolumeOptions, VolumeParts, WriterId, check_tree,
};
use murphy_log::{
    AppendError, ClaimError, Clock, DurableWatch, Epoch, EpochId, Frame, FrameReader, Log, Lsn, MemoryLog,
    Position, ReadError, State, SystemClock, TrimError, VolumeId, VolumeKeys,
};
use murphy_tests::until;
use parking_lot::Mutex;
use tokio::{runtime::Builder, sync::watch};

use crate::volume::origin;

/// A block store whose puts fail or hang when told to.
#[derive(Debug)]
pub(super) struct FaultyStore {
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

impl FaultyStore {
    pub(super) fn new() -> Arc<FaultyStore> {
        let below = ObjectBlockStore::in_memory();
        let puts = watch::Sender::new(Puts::Succeed);
        Arc::new(FaultyStore { below, puts, begun: AtomicU64::new(0), given_up: AtomicU64::new(0) })
    }

    pub(super) fn let_puts(&self, puts: Puts) {
        self.puts.send_replace(puts);
    }

    /// Returns when so many puts have begun.
    pub(super) async fn begun(&self, count: u64) {
        until("puts to begin", PATIENCE, || self.begun.load(Ordering::SeqCst) >= count).await;
    }
}

impl BlockStore for FaultyStore {
    fn label(&self) -> &str {
        "faulty"
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

    fn get_range(
        &self,
        name: PackName,
        range: std::ops::Range<u64>,
    ) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.below.get_range(name, range)
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.below.get(name)
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        self.below.size(name)
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.below.list(writer)
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
        World::over(MemoryLog::new(origin(epoch(1))), options)
    }

    pub(super) fn over(log: MemoryLog, options: VolumeOptions) -> World {
        let log = Arc::new(log);
        let state = log.claim(epoch(1)).unwrap();
        let world = World::beside(log, state, FaultyStore::new(), options);
        world.volume.lead(epoch(1), Some(&[])).unwrap();
        world
    }

    /// A volume at `state` of a log that somebody else may fill.
    pub(super) fn beside(
        log: Arc<MemoryLog>,
        state: State,
        store: Arc<FaultyStore>,
        options: VolumeOptions,
    ) -> World {
        let index = Arc::new(MemoryIndex::new());
        let volume =
            volume(Arc::<MemoryLog>::clone(&log), Arc::<MemoryIndex>::clone(&index), state, &store, options);
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

/// A volume over these.
pub(super) fn volume(
    log: Arc<dyn Log>,
    index: Arc<dyn Index>,
    state: State,
    store: &Arc<FaultyStore>,
    options: VolumeOptions,
) -> Volume {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let blocks: Arc<dyn BlockStore> = Arc::<FaultyStore>::clone(store);
    let parts = VolumeParts {
        log,
        index,
        state,
        last_time: clock.wall(),
        keys: VolumeKeys::derive(VolumeId::from_bytes([1; 16])),
        clock,
        fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], CellCache::new(1 << 20), None),
        blocks,
        runtime: tokio::runtime::Handle::current(),
        options,
    };
    Volume::open(parts).unwrap()
}

/// A log that can be without room.
#[derive(Debug)]
pub(super) struct CrampedLog {
    pub(super) below: MemoryLog,
    pub(super) is_full: AtomicBool,
}

impl Log for CrampedLog {
    fn claim(&self, epoch: Epoch) -> Result<State, ClaimError> {
        self.below.claim(epoch)
    }

    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError> {
        if self.is_full.load(Ordering::SeqCst) {
            return Err(AppendError::NoSpace { message: "full".to_owned() });
        }
        self.below.append(previous, frame)
    }

    fn durable(&self) -> DurableWatch {
        self.below.durable()
    }

    fn read(&self, from: Lsn) -> Result<FrameReader, ReadError> {
        self.below.read(from)
    }

    fn tail(&self) -> State {
        self.below.tail()
    }

    fn first(&self) -> Lsn {
        self.below.first()
    }

    fn trim(&self, below: Lsn) -> Result<Lsn, TrimError> {
        self.below.trim(below)
    }

    fn max_frame(&self) -> usize {
        self.below.max_frame()
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

pub(super) fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
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

/// Runs a test on one thread, so that nothing happens between two polls.
pub(super) fn alone(test: impl Future<Output = ()>) {
    Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

pub(super) fn impatient() -> VolumeOptions {
    VolumeOptions { io_timeout: Duration::from_millis(300), ..VolumeOptions::default() }
}

pub(super) const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 0 };
pub(super) const READ_WRITE: OpenFlags =
    OpenFlags { read: true, write: true, append: false, truncate: false, sync: false };
/// How long anything may take here.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
