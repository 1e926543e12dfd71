//! Interleavings and failures that lose bytes, hang or lie, each once: stores that fail or hang, logs that sync late or end, names that
//! change under a reader.
//!
//! Invariants:
//! - Nothing is waited for longer than [`PATIENCE`]: a call that hangs is a failure.
//! - Where the order of two steps matters, futures are polled by hand on a runtime with one thread.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{future::BoxFuture, poll, stream::BoxStream};
use murphy_fs::{
    Answer, Attr, BlockStore, BlockStoreError, Caller, CellCache, Errno, FileSystem, Handle, Index, Ino,
    Kind, MemoryIndex, Name, NewNode, ObjectBlockStore, OpenFlags, PackFetcher, PackName, Refusal,
    RenameMode, RowKey, SetAttr, SetTime, StoredPack, Table, Timespec, Volume, VolumeOptions, VolumeParts,
    WriterId, XattrMode, XattrName, check_tree,
};
use murphy_log::{Clock, Epoch, EpochId, Log, MemoryLog, State, SystemClock, Terminal, VolumeId, VolumeKeys};
use parking_lot::Mutex;
use tokio::{runtime::Builder, sync::watch};

use crate::volume::origin;

/// A block store whose puts fail or hang when told to.
#[derive(Debug)]
struct FaultyStore {
    below: ObjectBlockStore,
    puts: watch::Sender<Puts>,
    begun: AtomicU64,
}

/// What becomes of puts; one that hangs goes by what is said next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Puts {
    Succeed,
    Fail,
    Hang,
}

impl FaultyStore {
    fn new() -> Arc<FaultyStore> {
        let below = ObjectBlockStore::in_memory();
        Arc::new(FaultyStore { below, puts: watch::Sender::new(Puts::Succeed), begun: AtomicU64::new(0) })
    }

    fn let_puts(&self, puts: Puts) {
        self.puts.send_replace(puts);
    }

    /// Returns when so many puts have begun.
    async fn begun(&self, count: u64) {
        soon(async {
            while self.begun.load(Ordering::SeqCst) < count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
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
            let told = *puts.wait_for(|puts| *puts != Puts::Hang).await.unwrap();
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
struct World {
    volume: Volume,
    log: Arc<MemoryLog>,
    store: Arc<FaultyStore>,
    index: Arc<MemoryIndex>,
}

impl World {
    fn new(options: VolumeOptions) -> World {
        World::over(MemoryLog::new(origin(epoch(1))), options)
    }

    fn over(log: MemoryLog, options: VolumeOptions) -> World {
        let log = Arc::new(log);
        let state = log.claim(epoch(1)).unwrap();
        let world = World::beside(log, state, FaultyStore::new(), options);
        world.volume.lead(epoch(1), Some(&[])).unwrap();
        world
    }

    /// A volume at `state` of a log that somebody else may fill.
    fn beside(log: Arc<MemoryLog>, state: State, store: Arc<FaultyStore>, options: VolumeOptions) -> World {
        let index = Arc::new(MemoryIndex::new());
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let blocks: Arc<dyn BlockStore> = Arc::<FaultyStore>::clone(&store);
        let parts = VolumeParts {
            log: Arc::<MemoryLog>::clone(&log),
            index: Arc::<MemoryIndex>::clone(&index),
            state,
            last_time: clock.wall(),
            keys: VolumeKeys::derive(VolumeId::from_bytes([1; 16])),
            clock,
            fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], CellCache::new(1 << 20), None),
            blocks,
            runtime: tokio::runtime::Handle::current(),
            options,
        };
        World { volume: Volume::open(parts).unwrap(), log, store, index }
    }

    fn create(&self, name: &str) -> (Ino, Handle) {
        let created = self.volume.create(&ROOT, Ino::ROOT, &named(name), 0o644, READ_WRITE);
        let (attr, opened) = now(created).unwrap();
        (attr.ino, opened.handle)
    }

    fn write(&self, (ino, handle): (Ino, Handle), offset: u64, data: &[u8]) -> Result<u32, Errno> {
        now(self.volume.write(&ROOT, ino, handle, offset, Bytes::copy_from_slice(data)))
    }

    /// Single bytes with a hole before each, so that each becomes an extent.
    fn scatter(&self, file: (Ino, Handle), count: u64) {
        for number in 0..count {
            self.write(file, 2 * number + 1, b"x").unwrap();
        }
    }

    async fn fsync(&self, (ino, handle): (Ino, Handle)) -> Result<(), Errno> {
        soon(self.volume.fsync(ino, Some(handle)).wait()).await
    }

    fn orphans(&self) -> usize {
        let range = RowKey::range_start(Table::Orphan, 0)..RowKey::range_start(Table::Orphan, u64::MAX);
        self.volume.view().rows(range).count()
    }

    /// Returns when no orphan is left.
    async fn without_orphans(&self) {
        soon(async {
            while self.orphans() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        assert_eq!(check_tree(&self.volume.view()).unwrap(), Vec::new());
    }
}

fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
}

fn named(name: &str) -> Name {
    Name::new(name.to_owned()).unwrap()
}

/// An answer that must be there at once.
fn now<T>(answer: Answer<T>) -> Result<T, Errno> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(_) => panic!("it waits"),
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it came in time")
}

/// Runs a test on one thread, so that nothing happens between two polls.
fn alone(test: impl Future<Output = ()>) {
    Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

fn impatient() -> VolumeOptions {
    VolumeOptions { io_timeout: Duration::from_millis(300), ..VolumeOptions::default() }
}

/// Two processes sync one file, the flush fails: both are told, or one of them believes in bytes that are nowhere.
#[test]
fn every_fsync_that_waits_for_a_failed_flush_fails() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        world.store.let_puts(Puts::Fail);
        let both = futures::future::join(world.fsync(file), world.fsync(file)).await;
        assert_eq!(both, (Err(Errno::EIO), Err(Errno::EIO)));
        world.store.let_puts(Puts::Succeed);
        world.fsync(file).await.unwrap();
    });
}

/// A close that hears of the error first does not turn the fsync that caused the flush into a success.
#[test]
fn a_close_does_not_take_the_error_from_an_fsync() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        world.store.let_puts(Puts::Fail);
        let mut fsync = Box::pin(world.fsync(file));
        assert!(poll!(&mut fsync).is_pending());
        world.store.begun(1).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(now(world.volume.flush(file.0, file.1)), Err(Errno::EIO), "the flush has failed");
        assert_eq!(fsync.await, Err(Errno::EIO));
    });
}

/// Nothing is left to be stored, and nobody says so.
#[test]
fn an_fsync_does_not_wait_for_bytes_that_were_truncated_away() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        let mut fsync = Box::pin(world.fsync(file));
        assert!(poll!(&mut fsync).is_pending());
        let empty = SetAttr { size: Some(0), ..SetAttr::default() };
        now(world.volume.setattr(&ROOT, file.0, None, empty)).unwrap();
        fsync.await.unwrap();
    });
}

/// One entry cannot replace that many extents: the bytes must not be refused for ever.
#[test]
fn a_write_over_thousands_of_small_extents_is_stored() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.scatter(file, 6000);
        world.fsync(file).await.unwrap();
        assert_eq!(world.volume.view().inode(file.0).unwrap().unwrap().extents, 6000);
        world.write(file, 0, &vec![7; 12_003]).unwrap();
        world.fsync(file).await.unwrap();
        assert_eq!(check_tree(&world.volume.view()).unwrap(), Vec::new());
        let read = soon(world.volume.read(file.0, file.1, 0, 20_000).wait()).await.unwrap();
        assert!(read == vec![7; 12_003]);
    });
}

/// A file that is replaced is there at every moment: the old one or the new one.
#[test]
fn a_lookup_never_misses_a_name_that_is_replaced() {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _entered = runtime.enter();
    let world = World::new(VolumeOptions::default());
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    now(world.volume.mknod(&ROOT, Ino::ROOT, &named("f"), node)).unwrap();
    std::thread::scope(|scope| {
        let replacing = scope.spawn(|| {
            for _ in 0..REPLACEMENTS {
                now(world.volume.mknod(&ROOT, Ino::ROOT, &named("t"), node)).unwrap();
                let (from, to) = (named("t"), named("f"));
                let (from, to) = ((Ino::ROOT, &from), (Ino::ROOT, &to));
                now(world.volume.rename(&ROOT, from, to, RenameMode::Replace)).unwrap();
            }
        });
        while !replacing.is_finished() {
            let found: Result<Attr, Errno> = now(world.volume.lookup(&ROOT, Ino::ROOT, &named("f")));
            assert!(found.is_ok(), "{found:?}");
        }
    });
}

/// A log that syncs no more fills the overlay: a request that waits for room is answered, or its process can never be killed.
#[test]
fn a_change_does_not_wait_for_ever_for_room() {
    alone(async {
        let options = VolumeOptions { generation_bytes: 1000, ..impatient() };
        let world = World::over(MemoryLog::held(origin(epoch(1))), options);
        for number in 0..1000 {
            match world.volume.mkdir(&ROOT, Ino::ROOT, &named(&number.to_string()), 0o755) {
                Answer::Now(result) => drop(result.unwrap()),
                Answer::Later(waits) => {
                    assert_eq!(soon(waits).await.unwrap_err(), Errno::EIO);
                    return;
                }
            }
        }
        panic!("the overlay has no limit");
    });
}

#[test]
fn a_volume_whose_log_has_ended_takes_no_bytes() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.fsync(file).await.unwrap();
        world.log.end(Terminal::Poisoned { message: "broken".into() });
        drop(world.volume.mkdir(&ROOT, Ino::ROOT, &named("d"), 0o755));
        assert_eq!(world.fsync(file).await, Err(Errno::EIO));
        soon(async {
            while world.volume.ended().is_none() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        assert_eq!(world.write(file, 0, b"bytes"), Err(Errno::EIO));
    });
}

/// A store that never answers one put: later ones must not wait behind it for ever.
#[test]
fn a_put_that_hangs_is_given_up_and_its_bytes_are_sent_again() {
    alone(async {
        let world = World::new(impatient());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        world.store.let_puts(Puts::Hang);
        assert_eq!(world.fsync(file).await, Err(Errno::EIO));
        tokio::time::sleep(Duration::from_millis(400)).await;
        let begun = world.store.begun.load(Ordering::SeqCst);
        world.store.let_puts(Puts::Succeed);
        world.fsync(file).await.unwrap();
        assert!(world.store.begun.load(Ordering::SeqCst) > begun, "the same put went on");
    });
}

/// An inode whose last name is gone and that nobody has open is gone; an open between its unlink and its purge must not keep it.
#[test]
fn an_orphan_that_somebody_opens_late_is_purged() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let (ino, handle) = world.create("f");
        let attribute = XattrName::new("user.a").unwrap();
        now(world.volume.setxattr(&ROOT, ino, &attribute, Bytes::new(), XattrMode::Set)).unwrap();
        world.volume.release(ino, handle);
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        assert_eq!(world.orphans(), 1, "its purge has not begun");
        assert_eq!(now(world.volume.open(&ROOT, ino, READ_WRITE)), Err(Errno::ESTALE));
        world.without_orphans().await;
    });
}

/// The source unlinks what a mirror has open; the mirror becomes the source; the last close purges.
#[test]
fn an_orphan_held_open_across_a_promotion_is_purged() {
    alone(async {
        let source = World::new(VolumeOptions::default());
        let (ino, handle) = source.create("f");
        source.fsync((ino, handle)).await.unwrap();
        let state = origin(epoch(1));
        let store = Arc::clone(&source.store);
        let mirror = World::beside(Arc::clone(&source.log), state, store, VolumeOptions::default());
        mirror.volume.follow().unwrap();
        let reached = async |lsn| {
            while mirror.volume.view().lsn() < lsn {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        soon(reached(source.volume.view().lsn())).await;
        let read = OpenFlags { read: true, ..OpenFlags::default() };
        let held = now(mirror.volume.open(&ROOT, ino, read)).unwrap().handle;
        now(source.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        soon(source.volume.sync_all().wait()).await.unwrap();
        assert_eq!(source.orphans(), 1);
        let World { log, .. } = source;
        log.claim(epoch(2)).unwrap();
        mirror.volume.lead(epoch(2), None).unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(mirror.orphans(), 1, "somebody has it open");
        mirror.volume.release(ino, held);
        mirror.without_orphans().await;
    });
}

#[test]
fn a_mirror_takes_no_bytes() {
    alone(async {
        let source = World::new(VolumeOptions::default());
        let file = source.create("f");
        source.fsync(file).await.unwrap();
        let store = Arc::clone(&source.store);
        let state = origin(epoch(1));
        let mirror = World::beside(Arc::clone(&source.log), state, store, VolumeOptions::default());
        mirror.volume.follow().unwrap();
        soon(async {
            while mirror.volume.view().lsn() < source.volume.view().lsn() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        let written = match mirror.volume.open(&ROOT, file.0, READ_WRITE).wait().await {
            Ok(opened) => mirror.write((file.0, opened.handle), 0, b"bytes").map(drop),
            Err(errno) => Err(errno),
        };
        assert_eq!(written, Err(Errno::EROFS));
    });
}

/// The removal of an inode with more attributes than an entry can hold changes.
#[test]
fn an_orphan_with_thousands_of_attributes_is_purged() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let (ino, handle) = world.create("f");
        for number in 0..5000 {
            let attribute = XattrName::new(format!("user.{number}")).unwrap();
            now(world.volume.setxattr(&ROOT, ino, &attribute, Bytes::new(), XattrMode::Set)).unwrap();
        }
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("f"))).unwrap();
        world.volume.release(ino, handle);
        world.without_orphans().await;
    });
}

/// A truncation in several entries is refused by its first one.
#[test]
fn a_truncation_that_is_refused_has_cut_off_nothing() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.scatter(file, 1000);
        world.fsync(file).await.unwrap();
        let stranger = Caller { uid: 7, gid: 7, pid: 0 };
        let time = SetTime::At(Timespec { seconds: 1, nanos: 0 });
        let change = SetAttr { size: Some(0), mtime: Some(time), ..SetAttr::default() };
        assert_eq!(now(world.volume.setattr(&stranger, file.0, None, change)), Err(Errno::EPERM));
        assert_eq!(now(world.volume.getattr(file.0)).unwrap().size, 2000);
    });
}

/// Write, rename over: after a crash the name has all of the old bytes or all of the new, whatever took the name of the source while its
/// bytes were on their way.
#[test]
fn a_rename_over_a_file_waits_for_the_bytes_of_what_moves_in_the_end() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let old = world.create("f");
        world.fsync(old).await.unwrap();
        let first = world.create("t");
        world.write(first, 0, b"first").unwrap();
        world.volume.release(first.0, first.1);
        world.store.let_puts(Puts::Hang);
        let (from, to) = (named("t"), named("f"));
        let (from, to) = ((Ino::ROOT, &from), (Ino::ROOT, &to));
        let mut rename = Box::pin(world.volume.rename(&ROOT, from, to, RenameMode::Replace).wait());
        assert!(poll!(&mut rename).is_pending());
        world.store.begun(1).await;
        now(world.volume.unlink(&ROOT, Ino::ROOT, &named("t"))).unwrap();
        let second = world.create("t");
        world.write(second, 0, b"second").unwrap();
        world.store.let_puts(Puts::Succeed);
        soon(rename).await.unwrap();
        assert_eq!(now(world.volume.lookup(&ROOT, Ino::ROOT, &named("f"))).unwrap().ino, second.0);
        assert_eq!(world.volume.view().inode(second.0).unwrap().unwrap().extents, 1);
    });
}

#[test]
fn settling_the_index_does_not_wait_for_ever_for_the_log() {
    alone(async {
        let world = World::over(MemoryLog::held(origin(epoch(1))), impatient());
        now(world.volume.mkdir(&ROOT, Ino::ROOT, &named("d"), 0o755)).unwrap();
        let volume = world.volume.clone();
        let settled = soon(tokio::task::spawn_blocking(move || volume.settle_index())).await;
        assert_eq!(settled.unwrap(), Err(Errno::EIO));
    });
}

/// Many dirty files and a dead store: flushing them all takes as long as one request may, not that long for each.
#[test]
fn a_dead_store_does_not_hold_up_a_flush_of_everything_file_by_file() {
    alone(async {
        let world = World::new(impatient());
        for number in 0..30 {
            let file = world.create(&number.to_string());
            world.write(file, 0, b"bytes").unwrap();
        }
        world.store.let_puts(Puts::Hang);
        let flushed = tokio::time::timeout(Duration::from_secs(3), world.volume.sync_all().wait()).await;
        assert_eq!(flushed.expect("it came in time"), Err(Errno::EIO));
    });
}

#[test]
fn a_volume_that_was_closed_decides_nothing_more() {
    alone(async {
        let world = World::new(VolumeOptions::default());
        let file = world.create("f");
        world.write(file, 0, b"bytes").unwrap();
        soon(world.volume.close()).await.unwrap();
        assert_eq!(now(world.volume.mkdir(&ROOT, Ino::ROOT, &named("d"), 0o755)).unwrap_err(), Errno::EROFS);
        assert_eq!(world.index.reached().unwrap().position, world.volume.durable());
    });
}

/// Nothing keeps a volume alive but its users: neither its threads nor its tasks.
#[test]
fn the_last_clone_of_a_volume_stops_everything() {
    alone(async {
        let World { volume, index, store, .. } = World::new(VolumeOptions::default());
        let (attr, opened) = now(volume.create(&ROOT, Ino::ROOT, &named("f"), 0o644, READ_WRITE)).unwrap();
        now(volume.write(&ROOT, attr.ino, opened.handle, 0, Bytes::from_static(b"bytes"))).unwrap();
        let clone = volume.clone();
        soon(volume.sync_all().wait()).await.unwrap();
        drop((volume, clone));
        soon(async {
            while Arc::strong_count(&index) > 1 || Arc::strong_count(&store) > 1 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    });
}

/// A run of fsyncs while the store comes and goes: whatever an fsync has promised is in the log, in stored packs, after a crash.
#[test]
fn what_an_fsync_promised_outlives_a_crash_however_the_store_behaves() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let options = VolumeOptions { flush_after: Duration::from_millis(20), ..impatient() };
        let world = Arc::new(World::new(options));
        let file = world.create("f");
        let promised = Arc::new(Mutex::new([0_u8; 4]));
        let writers = (0..4_u64).map(|place| {
            let (world, promised) = (Arc::clone(&world), Arc::clone(&promised));
            tokio::spawn(async move {
                for number in 1..=40 {
                    let data = Bytes::from(vec![number; 100]);
                    let written = world.volume.write(&ROOT, file.0, file.1, place * 100, data);
                    written.wait().await.unwrap();
                    if world.fsync(file).await.is_ok() {
                        promised.lock()[place as usize] = number;
                    }
                }
            })
        });
        let writers: Vec<_> = writers.collect();
        for turn in 0_u64.. {
            if writers.iter().all(tokio::task::JoinHandle::is_finished) {
                break;
            }
            world.store.let_puts(if turn % 2 == 0 { Puts::Fail } else { Puts::Succeed });
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        for writer in writers {
            writer.await.unwrap();
        }
        let promised = *promised.lock();
        let log = Arc::new(world.log.reopened());
        let store = Arc::clone(&world.store);
        store.let_puts(Puts::Succeed);
        log.claim(epoch(2)).unwrap();
        let after = World::beside(log, origin(epoch(1)), store, VolumeOptions::default());
        after.volume.follow().unwrap();
        after.volume.lead(epoch(2), None).unwrap();
        let opened = now(after.volume.open(&ROOT, file.0, READ_WRITE)).unwrap();
        let bytes = soon(after.volume.read(file.0, opened.handle, 0, 400).wait()).await.unwrap();
        for (place, promised) in promised.into_iter().enumerate() {
            let found = bytes.get(place * 100).copied().unwrap_or(0);
            assert!(found >= promised, "{promised} was promised at {place}, {found} is there");
        }
        assert_eq!(check_tree(&after.volume.view()).unwrap(), Vec::new());
    });
}

const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 0 };
const READ_WRITE: OpenFlags =
    OpenFlags { read: true, write: true, append: false, truncate: false, sync: false };
/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often a name is replaced under its readers.
const REPLACEMENTS: u32 = 20_000;
