//! Bytes that are overwritten and cut off while they are on their way to the store, and what a crash leaves of them.
//!
//! Invariants:
//! - A crash is a copy of the durable log, opened with nothing else but the packs.

mod awaited;
mod gate;
mod judge;
mod length;
mod memory;
mod refused;
mod told;
mod unproven;

use self::gate::{Gate, Puts};
use super::*;
use crate::{ReplayBudget, check_digest, check_tree, replay};

/// A volume with one file, open.
#[derive(Clone)]
struct Scene {
    volume: Volume,
    log: Arc<MemoryLog>,
    store: Arc<Gate>,
    ino: Ino,
    handle: Handle,
}

impl Scene {
    async fn new(options: VolumeOptions, seed: u64) -> Scene {
        let log = Arc::new(MemoryLog::new(State::origin(epoch(1))));
        let store = Arc::new(Gate::new(seed));
        let state = log.claim(epoch(1)).unwrap();
        let index = Arc::new(MemoryIndex::new());
        let volume = Volume::open(parts(log.clone(), index, state, store.clone(), options)).unwrap();
        volume.lead(epoch(1), Some(&[])).unwrap();
        let name = Name::new("f").unwrap();
        let created = volume.create(&Caller::default(), Ino::ROOT, &name, 0o644, READ_WRITE);
        let (attr, opened) = created.wait().await.unwrap();
        volume.sync_all().wait().await.unwrap();
        Scene { volume, log, store, ino: attr.ino, handle: opened.handle }
    }

    /// The same volume with another file.
    async fn another(&self, name: &str) -> Scene {
        let name = Name::new(name.to_owned()).unwrap();
        let created = self.volume.create(&Caller::default(), Ino::ROOT, &name, 0o644, READ_WRITE);
        let (attr, opened) = created.wait().await.unwrap();
        Scene { ino: attr.ino, handle: opened.handle, ..self.clone() }
    }

    /// Lets the file be flushed in the background.
    async fn close(&self) {
        self.volume.flush(self.ino, self.handle).wait().await.unwrap();
    }

    async fn write(&self, offset: u64, data: &[u8]) {
        self.try_write(offset, data).await.unwrap();
    }

    async fn try_write(&self, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let data = Bytes::copy_from_slice(data);
        self.volume.write(&Caller::default(), self.ino, self.handle, offset, data).wait().await
    }

    /// An fsync that has begun.
    fn fsync(&self) -> tokio::task::JoinHandle<Result<(), Errno>> {
        let fsync = self.volume.fsync(self.ino, Some(self.handle));
        tokio::spawn(fsync.wait())
    }

    /// Returns when so many puts have begun.
    async fn begun(&self, count: u64) {
        let begun = || self.store.begun.load(Ordering::SeqCst) >= count;
        until("a put", begun).await;
    }

    /// What the file holds after a crash.
    async fn crashed(&self) -> Vec<u8> {
        contents(self.log.reopened(), &self.store, self.ino).await
    }
}

fn parts(
    log: Arc<MemoryLog>,
    index: Arc<MemoryIndex>,
    state: State,
    blocks: Arc<dyn BlockStore>,
    options: VolumeOptions,
) -> VolumeParts {
    let clock = Arc::new(SystemClock::new());
    VolumeParts {
        log,
        index,
        state,
        last_time: clock.wall(),
        keys: VolumeKeys::derive(VolumeId::from_bytes([1; 16])),
        clock,
        fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], CellCache::new(1 << 20), None),
        blocks,
        runtime: Runtime::current(),
        options,
    }
}

/// The tree that a log leads to, which must be sound.
pub(super) fn after_crash(log: MemoryLog, blocks: Arc<dyn BlockStore>) -> Volume {
    let (index, start) = (Arc::new(MemoryIndex::new()), State::origin(epoch(1)));
    index.ingest(&mut std::iter::empty(), &start).unwrap();
    let frames = log.read(log.first()).unwrap();
    let state = replay(&*index, start, frames, ReplayBudget::default()).unwrap();
    let volume = Volume::open(parts(Arc::new(log), index, state, blocks, VolumeOptions::default())).unwrap();
    let view = volume.view_with_state();
    assert_eq!(check_tree(&view).unwrap(), Vec::new());
    let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
    assert_eq!(check_digest(&view, &keys).unwrap().digest, state.digest);
    volume
}

/// What a file holds after a crash.
async fn contents(log: MemoryLog, store: &Arc<Gate>, ino: Ino) -> Vec<u8> {
    let volume = after_crash(log, Arc::<Gate>::clone(store));
    let opened = volume.open(&Caller::default(), ino, OpenFlags { write: false, ..READ_WRITE });
    let handle = opened.wait().await.unwrap().handle;
    volume.read(ino, handle, 0, u32::MAX).wait().await.unwrap().to_vec()
}

async fn until(what: &str, ready: impl Fn() -> bool) {
    let waiting = async {
        while !ready() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited for {what}"));
}

/// The fear: bytes are overwritten while they are on their way, so they are dropped; what overwrote them is not on its way yet; and whoever
/// waited for them is told that they are safe.
#[tokio::test]
async fn an_fsync_promises_what_is_overwritten_while_it_is_on_its_way() {
    for extends in [false, true] {
        let scene = Scene::new(VolumeOptions::default(), 0).await;
        if !extends {
            scene.write(0, &[b'X'; 8192]).await;
            scene.fsync().await.unwrap().unwrap();
        }
        let put = scene.store.begun.load(Ordering::SeqCst) + 1;
        scene.store.puts.send_replace(Puts::Hold);
        scene.write(0, &[b'Y'; 8192]).await;
        let fsync = scene.fsync();
        scene.begun(put).await;
        scene.write(4096, &[b'Z'; 4096]).await;
        scene.write(4200, &[b'W'; 10]).await;
        scene.store.puts.send_replace(Puts::Succeed);
        fsync.await.unwrap().unwrap();
        let found = scene.crashed().await;
        assert_eq!(found.len(), 8192);
        assert!(found[..4096].iter().all(|byte| *byte == b'Y'));
        assert!(found[4096..].iter().all(|byte| b"YZW".contains(byte)), "neither what it promised nor later");
        // What is seen is the last word, before and after it is stored.
        for _ in 0..2 {
            let read = scene.volume.read(scene.ino, scene.handle, 0, 10_000).wait().await.unwrap();
            let last = [vec![b'Y'; 4096], vec![b'Z'; 104], vec![b'W'; 10], vec![b'Z'; 3982]].concat();
            assert!(read == last);
            scene.fsync().await.unwrap().unwrap();
        }
        assert_eq!(scene.volume.dirty_bytes(), 0);
    }
}

/// The same without anybody who waits: in overwritten ranges each byte is the old or the new one, and never a zero.
#[tokio::test]
async fn bytes_that_are_overwritten_on_their_way_leave_no_gap_after_a_crash() {
    let scene = Scene::new(VolumeOptions::default(), 0).await;
    scene.store.puts.send_replace(Puts::Hold);
    scene.write(0, &vec![b'Y'; 6 << 20]).await;
    scene.volume.flush(scene.ino, scene.handle).wait().await.unwrap();
    scene.begun(1).await;
    for at in (0..6 << 20).step_by(1 << 20) {
        scene.write(at, &[b'Z'; 4096]).await;
    }
    scene.store.puts.send_replace(Puts::Succeed);
    let stored = || scene.volume.inode_row(scene.ino).unwrap().unwrap().size == 6 << 20;
    until("the first flight to land", stored).await;
    scene.store.puts.send_replace(Puts::Hold);
    let found = scene.crashed().await;
    assert!(found.iter().all(|byte| b"YZ".contains(byte)), "zeros that nobody wrote");
    scene.store.puts.send_replace(Puts::Succeed);
}

/// A put that fails takes nothing with it that was written over it, and the fsync says so.
#[tokio::test]
async fn bytes_over_a_flight_that_fails_are_stored_by_the_next_one() {
    let scene = Scene::new(VolumeOptions::default(), 0).await;
    scene.store.puts.send_replace(Puts::Hold);
    scene.write(0, &[b'Y'; 4096]).await;
    let fsync = scene.fsync();
    scene.begun(1).await;
    scene.write(0, &[b'Z'; 4096]).await;
    assert_eq!(scene.volume.dirty_bytes(), 8192);
    scene.store.puts.send_replace(Puts::Vary(1));
    assert_eq!(fsync.await.unwrap(), Err(Errno::EIO));
    assert_eq!(scene.volume.dirty_bytes(), 4096);
    scene.store.puts.send_replace(Puts::Succeed);
    scene.fsync().await.unwrap().unwrap();
    assert!(scene.crashed().await == [b'Z'; 4096]);
    assert_eq!(scene.volume.dirty_bytes(), 0);
}

/// Nothing is flushed but what is closed, or what somebody waits for.
fn unhurried() -> VolumeOptions {
    VolumeOptions { flush_after: Duration::from_secs(3600), ..VolumeOptions::default() }
}

/// The same, and a put may take longer than a test waits.
fn patient() -> VolumeOptions {
    VolumeOptions { io_timeout: Duration::from_secs(3600), ..unhurried() }
}

/// The same, and a put is given up soon.
fn impatient() -> VolumeOptions {
    let timeout = Duration::from_millis(300);
    VolumeOptions { io_timeout: timeout, put_timeout: timeout, ..unhurried() }
}

/// Numbers that look random.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    /// Bytes that no pack makes shorter.
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let words = (0..count.div_ceil(8)).flat_map(|_| self.below(u64::MAX).to_le_bytes());
        words.take(count).collect()
    }
}

/// Longer packs are large for the store.
const LARGE: usize = 64 << 10;
const READ_WRITE: OpenFlags =
    OpenFlags { read: true, write: true, append: false, truncate: false, sync: false };
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
