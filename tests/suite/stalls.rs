//! Stores that take their time, under programs and under readers.
//!
//! Invariants:
//! - How long a store takes changes what is where, and never what is seen.

use std::{ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{future::BoxFuture, poll};
use murphy_fs::{
    Answer, BlockStore, BlockStoreError, Caller, FileSystem, Index, Ino, MemoryIndex, Name, ObjectBlockStore,
    OpenFlags, PackName, ReplayBudget, Volume, VolumeOptions, VolumeParts, replay,
};
use murphy_log::{Clock, State, SystemClock};
use murphy_tests::{
    BlockLayer, Driver, Judge, Layered, Random, Subject, check_sound, epoch, judge_subjects, new_volume,
    pause_task, volume_parts,
};
use parking_lot::Mutex;

/// A store that holds puts for a while, each for another, and never answers a get if told so.
#[derive(Debug)]
struct Stalling {
    below: ObjectBlockStore,
    random: Mutex<Random>,
    gets_hang: bool,
}

impl BlockLayer for Stalling {
    fn below(&self) -> &dyn BlockStore {
        &self.below
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        let held = Duration::from_micros(self.random.lock().below(HELD_MICROS_MAX));
        Box::pin(async move {
            pause_task(held).await;
            self.below.put(name, bytes).await
        })
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        if self.gets_hang { Box::pin(std::future::pending()) } else { self.below.get_range(name, range) }
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        if self.gets_hang { Box::pin(std::future::pending()) } else { self.below.get(name) }
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
        check_sound(&self.0)
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
        Held(new_volume(Arc::new(Layered(blocks)), clock, options))
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
    let warm = new_volume(Arc::new(below.clone()), Arc::clone(&clock), VolumeOptions::default());
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
    let start = State::origin(epoch(1));
    index.ingest(&mut std::iter::empty(), &start).unwrap();
    let state = replay(&*index, start, log.read(log.first()).unwrap(), ReplayBudget::default()).unwrap();
    drop(warm);
    let stalling = Stalling { below, random: Mutex::new(Random::new(1)), gets_hang: true };
    let parts = volume_parts(log, index, Arc::new(Layered(stalling)), clock);
    let cold = Volume::open(VolumeParts { state, ..parts }).unwrap();
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
