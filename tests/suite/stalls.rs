//! Stores that take their time, under programs and under readers.
//!
//! Invariants:
//! - How long a store takes changes what is where, and never what is seen.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{future::BoxFuture, poll, stream::BoxStream};
use murphy_fs::{
    Answer, BlockStore, BlockStoreError, Caller, CellCache, FileSystem, Index, Ino, MemoryIndex, Name,
    ObjectBlockStore, OpenFlags, PackFetcher, PackName, ReplayBudget, StoredPack, Volume, VolumeOptions,
    VolumeParts, WriterId, check_tree, replay,
};
use murphy_log::{Clock, Epoch, EpochId, Log, MemoryLog, SystemClock, VolumeId, VolumeKeys};
use murphy_tests::{Driver, Judge, Random, Subject, judge_subjects, pause_task};
use parking_lot::Mutex;

use crate::volume::origin;

/// A store that holds puts for a while, each for another, and never answers a get if told so.
#[derive(Debug)]
struct Stalling {
    below: ObjectBlockStore,
    random: Mutex<Random>,
    gets_hang: bool,
}

impl BlockStore for Stalling {
    fn label(&self) -> &str {
        "stalling"
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        let held = Duration::from_micros(self.random.lock().below(HELD_MICROS_MAX));
        Box::pin(async move {
            pause_task(held).await;
            self.below.put(name, bytes).await
        })
    }

    fn get_range(
        &self,
        name: PackName,
        range: std::ops::Range<u64>,
    ) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        if self.gets_hang { Box::pin(std::future::pending()) } else { self.below.get_range(name, range) }
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        if self.gets_hang { Box::pin(std::future::pending()) } else { self.below.get(name) }
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

/// A volume whose reads and writes go through `blocks`; it leads unless it finds a tree.
fn volume(clock: Arc<dyn Clock>, blocks: Arc<dyn BlockStore>, options: VolumeOptions) -> Volume {
    let epoch = Epoch { number: 1, id: EpochId::from_bytes([7; 16]) };
    let log = Arc::new(MemoryLog::new(origin(epoch)));
    let state = log.claim(epoch).unwrap();
    let parts = parts(log, Arc::new(MemoryIndex::new()), state, clock, blocks, options);
    let volume = Volume::open(parts).unwrap();
    volume.lead(epoch, Some(&[])).unwrap();
    volume
}

fn parts(
    log: Arc<dyn Log>,
    index: Arc<MemoryIndex>,
    state: murphy_log::State,
    clock: Arc<dyn Clock>,
    blocks: Arc<dyn BlockStore>,
    options: VolumeOptions,
) -> VolumeParts {
    VolumeParts {
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
    }
}

struct Held(Volume);

impl Subject for Held {
    fn file_system(&self) -> Arc<dyn FileSystem> {
        Arc::new(self.0.clone())
    }

    fn after_step(&mut self, _: usize, _: &Judge<'_>) -> Result<(), String> {
        Ok(())
    }

    fn after_program(&mut self, _: &Judge<'_>) -> Result<(), String> {
        let findings = check_tree(&self.0.view_with_state()).map_err(|error| error.to_string())?;
        if findings.is_empty() { Ok(()) } else { Err(format!("the tree is not sound: {findings:?}")) }
    }
}

/// Packs arrive in any order and long after what they hold was overwritten, cut off or unlinked.
#[test]
fn the_volume_is_the_reference_while_puts_are_held_at_random() {
    let options = VolumeOptions {
        flush_after: Duration::from_millis(20),
        dirty_bytes: 1 << 20,
        ..VolumeOptions::default()
    };
    let make = |clock: Arc<dyn Clock>, _: &Driver| {
        let random = Mutex::new(Random::new(3));
        let blocks = Stalling { below: ObjectBlockStore::in_memory(), random, gets_hang: false };
        Held(volume(clock, Arc::new(blocks), options))
    };
    judge_subjects(make, 40);
}

/// A region is slow, and `ls` hangs with it.
#[test]
fn names_and_attributes_are_answered_while_cold_reads_hang() {
    let driver = Driver::new();
    let _runtime = driver.enter();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let below = ObjectBlockStore::in_memory();
    let warm = volume(Arc::clone(&clock), Arc::new(below.clone()), VolumeOptions::default());
    let (root, flags) = (Caller::default(), OpenFlags { read: true, write: true, ..OpenFlags::default() });
    let name = |number: u64| Name::new(format!("file {number}")).unwrap();
    for number in 0..READERS {
        let (attr, opened) = driver.wait(warm.create(&root, Ino::ROOT, &name(number), 0o644, flags)).unwrap();
        driver
            .wait(warm.write(&root, attr.ino, opened.handle, 0, Bytes::from(vec![number as u8; 5000])))
            .unwrap();
        warm.release(attr.ino, opened.handle);
    }
    driver.wait(warm.sync_all()).unwrap();
    let (log, index) = (Arc::clone(warm.log()), Arc::new(MemoryIndex::new()));
    let start = origin(log.durable().state().position.epoch);
    index.ingest(&mut std::iter::empty(), &start).unwrap();
    let state = replay(&*index, start, log.read(log.first()).unwrap(), ReplayBudget::default());
    drop(warm);
    let stalling = Stalling { below, random: Mutex::new(Random::new(1)), gets_hang: true };
    let cold =
        Volume::open(parts(log, index, state.unwrap(), clock, Arc::new(stalling), VolumeOptions::default()))
            .unwrap();
    let mut reads = Vec::new();
    for number in 0..READERS {
        let Answer::Now(Ok(attr)) = cold.lookup(&root, Ino::ROOT, &name(number)) else {
            panic!("a lookup waits")
        };
        let Answer::Now(Ok(opened)) = cold.open(&root, attr.ino, OpenFlags { write: false, ..flags }) else {
            panic!("an open waits");
        };
        let Answer::Later(mut read) = cold.read(attr.ino, opened.handle, 0, 5000) else {
            panic!("a cold read is there")
        };
        assert!(driver.handle().block_on(async { poll!(&mut read) }).is_pending());
        reads.push((attr, read));
    }
    for (attr, _) in &reads {
        assert!(matches!(cold.getattr(attr.ino), Answer::Now(Ok(found)) if found == *attr));
    }
    let Answer::Now(Ok(page)) = cold.readdir_plus(Ino::ROOT, 0, 1000) else { panic!("a listing waits") };
    assert_eq!(page.len() as u64, READERS);
}

/// The longest that a put is held.
const HELD_MICROS_MAX: u64 = 20_000;
/// So many reads hang at once.
const READERS: u64 = 64;
