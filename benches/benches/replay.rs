//! Replay: how many create entries a second an index takes, and what a file costs in it on disk.
//!
//! Usage: `cargo bench -p murphy-benches --bench replay [-- ENTRIES]`. Prints one line for each figure.

use std::{convert::Infallible, path::Path, time::Duration};

use bytes::Bytes;
use murphy_benches::{
    cpu::process_cpu_nanos,
    history::{bytes_on_disk, creates},
};
use murphy_fs::{
    FjallIndex, FjallOptions, Fold, Index, Ino, MemoryIndex, ReplayBudget, RowKey, check_digest, replay,
};
use murphy_log::{Clock, Frame, State, SystemClock, VolumeId, VolumeKeys};

fn main() {
    let entries = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    let clock = SystemClock::new();
    let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
    let (base, frames) = report("made", entries, &clock, || creates(entries, &keys));
    let bytes: usize = frames.iter().map(|frame| frame.bytes().len()).sum();
    print(&format!("log: {:.1} bytes an entry", bytes as f64 / entries as f64));

    report("decoded", entries, &clock, || {
        frames.iter().map(|frame| frame.iter().filter(Result::is_ok).count()).sum::<usize>()
    });
    report("decoded and folded", entries, &clock, || {
        let mut fold = Fold::new();
        for entry in frames.iter().flatten() {
            fold.push_entry(&entry.expect("the frames are sound")).expect("the rows are small");
            if fold.len() >= ReplayBudget::default().rows {
                std::mem::take(&mut fold).into_rows().for_each(drop);
            }
        }
    });
    let memory = MemoryIndex::new();
    memory.ingest(&mut std::iter::empty(), &base).expect("memory takes everything");
    report("replayed in memory", entries, &clock, || run(&memory, base, &frames));
    drop(memory);

    let dir = tempfile::tempdir().expect("a temporary directory");
    let index = FjallIndex::open(dir.path(), FjallOptions::default()).expect("an empty index");
    index.ingest(&mut std::iter::empty(), &base).expect("a new index takes a state");
    let state = report("replayed", entries, &clock, || run(&index, base, &frames));
    print_bytes("after replay", entries, dir.path(), &index);
    std::thread::sleep(Duration::from_secs(3));
    print_bytes("3 s later", entries, dir.path(), &index);
    report("compacted", entries, &clock, || index.compact().expect("compaction"));
    print_bytes("after compaction", entries, dir.path(), &index);
    let check = report("digest checked", entries, &clock, || check_digest(&*index.snapshot(), &keys));
    assert_eq!(check.expect("a sound index").digest, state.digest, "the index is not what the log says");
    small_generations(&index, &state, &clock);
    print_bytes("after those", entries, dir.path(), &index);
}

/// What a generation costs that has one row only: the syncs.
fn small_generations(index: &FjallIndex, state: &State, clock: &SystemClock) {
    const COUNT: u32 = 100;
    let row = (RowKey::inode(Ino::ROOT), Some(Bytes::from_static(b"row")));
    let start = clock.monotonic();
    for _ in 0..COUNT {
        index.ingest(&mut std::iter::once(row.clone()), state).expect("a small generation");
    }
    let each = (clock.monotonic() - start) / COUNT;
    print(&format!("a generation of one row: {:.2} ms", each.as_secs_f64() * 1e3));
}

fn run(index: &dyn Index, base: State, frames: &[Frame]) -> State {
    let frames = frames.iter().cloned().map(Ok::<_, Infallible>);
    replay(index, base, frames, ReplayBudget::default()).expect("the frames can be replayed")
}

fn report<T>(what: &str, entries: usize, clock: &SystemClock, work: impl FnOnce() -> T) -> T {
    let (start, cpu) = (clock.monotonic(), process_cpu_nanos());
    let made = work();
    let (wall, cpu) = ((clock.monotonic() - start).as_secs_f64(), process_cpu_nanos() - cpu);
    let each = cpu as f64 / 1e3 / entries as f64;
    print(&format!("{what}: {:.0} entries/s, {wall:.2} s, {each:.2} us of CPU each", entries as f64 / wall));
    made
}

fn print_bytes(when: &str, entries: usize, dir: &Path, index: &FjallIndex) {
    let each = |bytes: u64| bytes as f64 / entries as f64;
    let (tables, all) = (each(index.disk_bytes()), each(bytes_on_disk(dir)));
    print(&format!("{when}: {tables:.1} bytes a file in tables, {all:.1} on disk"));
}

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
fn print(line: &str) {
    println!("{line}");
}
