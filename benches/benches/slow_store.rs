//! A store that takes its time: small files on one that needs 30 ms for an answer, and `stat` while reads hang on it.
//!
//! `cargo bench -p murphy-benches --bench slow_store [-- FILES]`: writes FILES (10,000) files of 4 KiB one after the other, as `cp` does, until
//! all of them are durable (budget: 1,000 files/s). Then 64 reads wait for a store that needs 5 s, and lookup + getattr of every file are timed
//! meanwhile (budget: p99 1 ms).
//!
//! Invariants:
//! - The reads are cold: that each of them took as long as the store is asserted, else the figure beside them says nothing.

use std::{
    borrow::Cow,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream::BoxStream};
use murphy_benches::engine::new_volume_over;
use murphy_fs::{
    Answer, BlockStore, BlockStoreError, Caller, CellCache, FileSystem, Ino, Name, ObjectBlockStore,
    OpenFlags, PackName, StoredPack, Volume, VolumeOptions, WriterId,
};

/// A store in memory that answers after a while.
#[derive(Debug)]
struct SlowStore {
    inner: ObjectBlockStore,
    wait_ms: AtomicU64,
    puts: AtomicU64,
}

impl SlowStore {
    fn late<'a, T: Send + 'a>(&'a self, answer: BoxFuture<'a, T>) -> BoxFuture<'a, T> {
        let wait = Duration::from_millis(self.wait_ms.load(Ordering::Relaxed));
        Box::pin(async move {
            tokio::time::sleep(wait).await;
            answer.await
        })
    }
}

impl BlockStore for SlowStore {
    fn label(&self) -> Cow<'_, str> {
        Cow::Borrowed("slow")
    }
    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.puts.fetch_add(1, Ordering::Relaxed);
        self.late(self.inner.put(name, bytes))
    }
    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.late(self.inner.mend(name, bytes))
    }
    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.late(self.inner.get_range(name, range))
    }
    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.late(self.inner.get(name))
    }
    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        self.late(self.inner.size(name))
    }
    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.late(self.inner.delete(name))
    }
    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.inner.list(writer).boxed()
    }
}

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let files: u64 = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(FILES);
    let directory = tempfile::tempdir_in(".").expect("the current directory takes a directory");
    let path = directory.path().canonicalize().expect("it exists");
    let store = Arc::new(SlowStore {
        inner: ObjectBlockStore::in_memory(),
        wait_ms: AtomicU64::new(LATENCY_MS),
        puts: AtomicU64::new(0),
    });
    let blocks = Arc::clone(&store) as Arc<dyn BlockStore>;
    let (volume, _log) = new_volume_over(&path, VolumeOptions::default(), blocks, CellCache::new(1 << 20));
    let start = Instant::now();
    let mut inodes = Vec::new();
    for number in 0..files {
        inodes.push(write_one(&volume, number).await);
    }
    volume.sync_all().wait().await.expect("the store takes everything");
    let took = start.elapsed().as_secs_f64();
    let puts = store.puts.load(Ordering::Relaxed);
    println!(
        "small files: {:.0} files/s of 4 KiB until durable, {puts} packs, store latency {LATENCY_MS} ms",
        files as f64 / took
    );

    store.wait_ms.store(HANG_MS, Ordering::Relaxed);
    let hanging: Vec<_> = (0..HANGING)
        .map(|number| {
            let ino = inodes[number * inodes.len() / HANGING];
            tokio::spawn(read_cold(volume.clone(), ino))
        })
        .collect();
    let asked = volume.clone();
    let mut times = tokio::task::spawn_blocking(move || stat_all(&asked, files)).await.expect("no panic");
    assert!(
        hanging.iter().all(|read| !read.is_finished()),
        "the reads ended before the names were asked for"
    );
    for read in hanging {
        let took = read.await.expect("no panic");
        assert!(took >= Duration::from_millis(HANG_MS), "a read was not cold: {took:?}");
    }
    times.sort();
    let at =
        |permille: usize| times[(times.len() * permille / 1000).min(times.len() - 1)].as_secs_f64() * 1e3;
    println!(
        "lookup + getattr while {HANGING} reads hang: p50 {:.4} ms, p99 {:.4} ms, longest {:.4} ms, of {}",
        at(500),
        at(990),
        at(1000),
        times.len()
    );
}

fn name(number: u64) -> Name {
    Name::new(format!("file{number:08}").into_bytes()).expect("a name")
}

async fn write_one(volume: &Volume, number: u64) -> Ino {
    let (caller, flags) = (Caller::default(), OpenFlags { write: true, ..OpenFlags::default() });
    let created = volume.create(&caller, Ino::ROOT, &name(number), 0o644, flags).wait().await;
    let (attr, opened) = created.expect("a new name");
    let data = Bytes::from(vec![number as u8; FILE_BYTES]);
    volume.write(&caller, attr.ino, opened.handle, 0, data).wait().await.expect("there is room");
    volume.flush(attr.ino, opened.handle).wait().await.expect("a close does not wait for the store");
    volume.release(attr.ino, opened.handle);
    attr.ino
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
async fn read_cold(volume: Volume, ino: Ino) -> Duration {
    let flags = OpenFlags { read: true, ..OpenFlags::default() };
    let opened = volume.open(&Caller::default(), ino, flags).wait().await.expect("it is there");
    let start = Instant::now();
    let bytes =
        volume.read(ino, opened.handle, 0, FILE_BYTES as u32).wait().await.expect("the store answers");
    assert_eq!(bytes.len(), FILE_BYTES);
    start.elapsed()
}

/// How long each lookup with its getattr takes.
#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
fn stat_all(volume: &Volume, files: u64) -> Vec<Duration> {
    let ask = |number| {
        let start = Instant::now();
        let attr = answer(volume.lookup(&Caller::default(), Ino::ROOT, &name(number)));
        answer(volume.getattr(attr.ino));
        start.elapsed()
    };
    (0..files).map(ask).collect()
}

fn answer<T>(answer: Answer<T>) -> T {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(later) => tokio::runtime::Handle::current().block_on(later),
    }
    .expect("it is there")
}

const FILES: u64 = 10_000;
const FILE_BYTES: usize = 4096;
const LATENCY_MS: u64 = 30;
const HANGING: usize = 64;
const HANG_MS: u64 = 5000;
