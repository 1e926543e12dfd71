//! Replay: how many create entries a second an index takes, and what a file costs in it on disk.
//!
//! Usage: `cargo bench -p murphy-benches --bench replay [-- ENTRIES]`. Prints one line for each figure.

use std::{convert::Infallible, fs, path::Path, time::Duration};

use bytes::Bytes;
use murphy_fs::{
    DentryRow, DirectoryRow, FjallIndex, FjallOptions, Fold, Index, Ino, InodeRow, Kind, MemoryIndex, Name,
    NameHasher, ReplayBudget, RowKey, Timespec, check_digest, replay,
};
use murphy_log::{
    Appender, ChainHash, Change, Clock, Digest, Entry, Epoch, EpochId, Frame, LogTime, Lsn, Position,
    Requester, State, SystemClock, Usage, VolumeId, VolumeKeys,
};

fn main() {
    let entries = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000);
    let clock = SystemClock::new();
    let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
    let (base, frames) = report("made", entries, &clock, || frames(entries, &keys));
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

/// The frames of `count` creates: directories of a thousand files, each with an inode, a name and its directory's row.
fn frames(count: usize, keys: &VolumeKeys) -> (State, Vec<Frame>) {
    let epoch = Epoch { number: 1, id: EpochId::from_bytes([2; 16]) };
    let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
    let base = State { position, digest: Digest::default(), usage: Usage::default() };
    let mut appender = Appender::new(keys.clone(), epoch, base);
    let hasher = NameHasher::new(keys.derived("names of the replay benchmark"));
    let (mut frames, mut digest) = (Vec::new(), Digest::default());
    let (mut directory, mut row) = (Ino::ROOT, DirectoryRow::default());
    let mut old_row: Option<Change> = None;
    for number in 0..count as u64 {
        let lsn = Lsn::FIRST.advanced(number);
        let time = LogTime::from_nanos(1_790_000_000_000_000_000 + number * 10_000);
        if number % 1000 == 0 {
            (directory, row, old_row) = (Ino::new(1 + number), DirectoryRow::default(), None);
        }
        let entry = create(lsn, time, directory, &mut row, &hasher);
        for change in &entry.changes {
            digest = digest.plus(row_digest(keys, change));
        }
        if let Some(old) = old_row.replace(entry.changes[2].clone()) {
            digest = digest.minus(row_digest(keys, &old));
        }
        let usage = Usage { inodes: number + 2, bytes: 0 };
        appender.push(&entry, digest, usage).expect("the entry is the next one");
        if appender.should_close(time) {
            frames.extend(std::iter::from_fn(|| appender.close(time, Lsn::ROOT)));
        }
    }
    frames.extend(std::iter::from_fn(|| appender.close(LogTime::default(), Lsn::ROOT)));
    (base, frames)
}

fn row_digest(keys: &VolumeKeys, change: &Change) -> Digest {
    keys.row_digest(change.table, &change.key, change.value.as_deref().unwrap_or_default())
}

fn create(lsn: Lsn, time: LogTime, parent: Ino, directory: &mut DirectoryRow, hasher: &NameHasher) -> Entry {
    let (ino, now) = (Ino::born_at(lsn), Timespec::from(time));
    let name = Name::new(format!("file-{:08}.txt", lsn.get())).expect("a short name");
    let cookie = hasher.place(&name).get();
    let inode = InodeRow {
        kind: Kind::File,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
        rdev: 0,
        nlink: 1,
        size: 0,
        allocated: 0,
        extents: 0,
        has_xattrs: false,
        generation: 1,
        project: 0,
        parent,
        cookie,
        atime: now,
        mtime: now,
        ctime: now,
    };
    *directory = DirectoryRow { children: directory.children + 1, mtime: now, ctime: now, ..*directory };
    let dentry = DentryRow { named: Some((name.clone(), ino, Kind::File)), more: false };
    let change = |key: RowKey, value| Change { table: key.table(), key: key.key_bytes(), value: Some(value) };
    Entry {
        lsn,
        time,
        kind: 1,
        caller: Some(Requester { uid: 1000, gid: 1000, pid: 4242 }),
        request: None,
        names: vec![name.to_bytes()],
        changes: vec![
            change(RowKey::inode(ino), inode.encode()),
            change(RowKey::dentry(parent, cookie), dentry.encode()),
            change(RowKey::directory(parent), directory.encode()),
        ],
    }
}

fn report<T>(what: &str, entries: usize, clock: &SystemClock, work: impl FnOnce() -> T) -> T {
    let (start, cpu) = (clock.monotonic(), cpu_time());
    let made = work();
    let (wall, cpu) = ((clock.monotonic() - start).as_secs_f64(), cpu_time() - cpu);
    let each = cpu.as_secs_f64() * 1e6 / entries as f64;
    print(&format!("{what}: {:.0} entries/s, {wall:.2} s, {each:.2} us of CPU each", entries as f64 / wall));
    made
}

/// What this process has used of all CPUs.
fn cpu_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields = after_name.split_whitespace().skip(11).take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}

fn print_bytes(when: &str, entries: usize, dir: &Path, index: &FjallIndex) {
    let each = |bytes: u64| bytes as f64 / entries as f64;
    let (tables, all) = (each(index.disk_bytes()), each(allocated(dir)));
    print(&format!("{when}: {tables:.1} bytes a file in tables, {all:.1} on disk"));
}

/// Bytes that the files below `dir` take on disk.
fn allocated(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => allocated(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
fn print(line: &str) {
    println!("{line}");
}
