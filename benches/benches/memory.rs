//! What a volume of very many files takes in memory: `cargo bench -p murphy-benches --bench memory [-- FILES]`.
//!
//! One process makes an index of FILES (5,000,000) files; another one opens it as a mount would, asks for the attributes of a million of them
//! at random, and prints what it holds then. Budget: below 1 GiB with 100,000,000 files.
//!
//! Invariants:
//! - What is measured is a process of its own: nothing that made the index is in it.

use std::{convert::Infallible, path::Path, process::Command, sync::Arc};

use murphy_benches::{
    engine::VOLUME,
    history::{bytes_on_disk, for_each_create, origin},
};
use murphy_fs::{
    Answer, BlockStore, CellCache, FileSystem, FjallIndex, FjallOptions, Index, Ino, ObjectBlockStore,
    PackFetcher, ReplayBudget, Volume, VolumeOptions, VolumeParts, replay,
};
use murphy_log::{Clock, Epoch, EpochId, Log, Lsn, MemoryLog, SystemClock, VolumeKeys};

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let [step, directory, files] = &arguments[..] {
        let (directory, files) = (Path::new(directory), files.parse().expect("a number"));
        match step.as_str() {
            MAKE => make(directory, files),
            _ => measure(directory, files),
        }
        return;
    }
    let files: usize = arguments.first().and_then(|argument| argument.parse().ok()).unwrap_or(FILES);
    let directory = tempfile::tempdir_in(".").expect("the current directory takes a directory");
    for step in [MAKE, MEASURE] {
        let program = std::env::current_exe().expect("this program");
        let status = Command::new(program).arg(step).arg(directory.path()).arg(files.to_string()).status();
        assert!(status.expect("it can be started").success(), "{step} failed");
    }
    println!("index on disk: {:.1} bytes a file", bytes_on_disk(directory.path()) as f64 / files as f64);
}

/// Fills the index in `directory`.
fn make(directory: &Path, files: usize) {
    let keys = VolumeKeys::derive(VOLUME);
    let index = FjallIndex::open(directory, FjallOptions::default()).expect("an empty index");
    let base = origin();
    index.ingest(&mut std::iter::empty(), &base).expect("a new index takes a state");
    let (out, frames) = std::sync::mpsc::sync_channel(64);
    let making = std::thread::spawn(move || {
        for_each_create(files, &keys, &mut |frame| out.send(frame).expect("somebody replays"))
    });
    let frames = frames.into_iter().map(Ok::<_, Infallible>);
    replay(&index, base, frames, ReplayBudget::default()).expect("the frames can be replayed");
    making.join().expect("making does not panic");
    index.sync().expect("it can be synced");
}

/// Opens a volume above it and asks.
#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
fn measure(directory: &Path, files: usize) {
    murphy_cli::allocator::keep_freed_memory();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("threads can be started");
    let _entered = runtime.enter();
    let before = resident_mib();
    let index: Arc<dyn Index> =
        Arc::new(FjallIndex::open(directory, FjallOptions::default()).expect("it was made"));
    let state = index.snapshot().state().expect("it has a state");
    let log = Arc::new(MemoryLog::new(state));
    log.claim(Epoch { number: 2, id: EpochId::from_bytes([3; 16]) }).expect("nobody else claims it");
    let (clock, blocks) = (Arc::new(SystemClock::new()), Arc::new(ObjectBlockStore::in_memory()));
    let volume = Volume::open(VolumeParts {
        log,
        index,
        state,
        last_time: clock.wall(),
        keys: VolumeKeys::derive(VOLUME),
        clock,
        fetcher: PackFetcher::new(
            vec![Arc::clone(&blocks) as Arc<dyn BlockStore>],
            CellCache::default(),
            None,
        ),
        blocks,
        runtime: runtime.handle().clone(),
        options: VolumeOptions::default(),
    });
    let volume = volume.expect("threads can be started");
    let opened = resident_mib();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut found = 0;
    for _ in 0..ASKED {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let ino = Ino::born_at(Lsn::FIRST.advanced(random % files as u64));
        let attr = match volume.getattr(ino) {
            Answer::Now(attr) => attr,
            Answer::Later(later) => runtime.block_on(later),
        };
        found += u64::from(attr.is_ok_and(|attr| attr.ino == ino));
    }
    assert_eq!(found, ASKED, "every inode is there");
    println!(
        "memory with {files} files: {before} MiB before, {opened} MiB opened, {} MiB after {ASKED} random getattr",
        resident_mib()
    );
}

/// What this process holds in memory.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a process has a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it says what is resident");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib >> 10
}

const MAKE: &str = "make";
const MEASURE: &str = "measure";
const FILES: usize = 5_000_000;
const ASKED: u64 = 1_000_000;
