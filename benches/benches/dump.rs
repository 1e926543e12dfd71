//! Dump, reading a dump (into an index that only counts) and load (into a node's index, durable): files per second, bytes a file by section, and
//! peak memory beyond what the source itself takes.
//!
//! `cargo bench -p murphy-benches --bench dump [-- FILES [TREE]]`: a made-up source tree of 1,000,000 files as `cp -a` leaves it, or the
//! names, sizes and times of the files below the directory TREE, repeated until there are FILES.
//!
//! Invariants:
//! - The source's rows are one packed array per table, so that memory measured above it is the snapshot's own.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::{
    collections::BTreeMap,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use murphy_fs::{
    DentryRow, DirectoryRow, ExtentRow, ExtentTarget, FjallIndex, FjallOptions, Index, IndexError,
    IndexSnapshot, Ino, InodeRow, Kind, Name, NameHasher, PackNumber, PackRow, PackState, RowIterator,
    RowKey, SLOT_BYTES, SnapshotOrigin, SnapshotReader, SnapshotSummary, Table, Timespec, verify_snapshot,
    write_snapshot,
};
use murphy_log::{
    BranchId, ChainHash, Clock, Digest, Epoch, LogTime, Lsn, Position, State, SystemClock, Usage, VolumeId,
    VolumeKeys,
};

fn main() {
    // cargo passes `--bench` to a benchmark without a harness.
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let files = arguments.next().map_or(FILES, |text| text.parse().expect("FILES is a number"));
    let tree = arguments.next();
    let clock = SystemClock::new();
    let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
    let source = Maker::new(&keys).made(files, tree.as_deref().map(Path::new));
    release_free_memory();

    let origin = SnapshotOrigin { branch: BranchId::from_bytes([2; 16]), created: LogTime::from_nanos(0) };
    let path = std::env::temp_dir().join(format!("murphy-dump-bench-{}", std::process::id()));
    let mut file = std::fs::File::create(&path).expect("the temporary directory takes a file");
    let (summary, cost) = measured(&clock, || {
        write_snapshot(&source, &keys, origin, &mut file, &|_| ()).expect("the source is sound")
    });
    let made = source.state.usage.inodes;
    print_figures("dump", made, &cost);
    print_sections(&summary, made);
    drop(source);
    release_free_memory();

    let open = || std::fs::File::open(&path).expect("the snapshot was just written");
    let (_, cost) = measured(&clock, || verify_snapshot(open(), &|_| ()).expect("the snapshot is sound"));
    print_figures("verify", made, &cost);
    let index = CountingIndex::default();
    let (_, cost) = measured(&clock, || {
        let reader = SnapshotReader::open(open()).expect("the snapshot is sound");
        reader.load_into(&index, &|_| ()).expect("the snapshot is sound")
    });
    print_figures("read", made, &cost);
    let rows: u64 = summary.rows.iter().map(|(_, rows)| rows).sum();
    assert_eq!(index.rows.load(Ordering::Relaxed), rows);
    let node = path.with_extension("index");
    let fjall = FjallIndex::open(&node, FjallOptions::default()).expect("an empty index");
    let (state, cost) = measured(&clock, || {
        let reader = SnapshotReader::open(open()).expect("the snapshot is sound");
        reader.load_into(&fjall, &|_| ()).expect("the snapshot is sound");
        fjall.sync().expect("the index takes the snapshot");
        fjall.snapshot().state()
    });
    print_figures("load", made, &cost);
    assert_eq!(state.map(|state| state.usage.inodes), Some(made));
    drop(fjall);
    drop((std::fs::remove_file(&path), std::fs::remove_dir_all(&node)));
}

/// What some work took.
struct Cost {
    seconds: f64,
    cpu_seconds: f64,
    /// The most memory above what was there before.
    mib: u64,
}

fn print_figures(what: &str, inodes: u64, cost: &Cost) {
    let Cost { seconds, cpu_seconds, mib } = cost;
    let (rate, each) = (inodes as f64 / seconds, cpu_seconds * 1e6 / inodes as f64);
    println!("{what:8} {inodes} inodes in {seconds:.2} s: {rate:.0}/s, {each:.2} us of CPU each, {mib} MiB");
}

fn print_sections(summary: &SnapshotSummary, files: u64) {
    let sections = &summary.sections;
    println!("         bytes an inode: {:.2}", sections.total() as f64 / files as f64);
    for (what, bytes) in [
        ("names", sections.names),
        ("attributes", sections.attributes),
        ("extents", sections.extents),
        ("others", sections.others),
        ("framing", sections.framing),
    ] {
        println!("         {what:10} {:.2}", bytes as f64 / files as f64);
    }
}

fn measured<T>(clock: &dyn Clock, work: impl FnOnce() -> T) -> (T, Cost) {
    // 5 resets the high-water mark of this process.
    drop(std::fs::write("/proc/self/clear_refs", "5"));
    let (before, start, cpu_start) = (status_kib("VmRSS:"), clock.monotonic(), cpu_seconds());
    let result = work();
    let seconds = (clock.monotonic() - start).as_secs_f64();
    let mib = status_kib("VmHWM:").saturating_sub(before) / 1024;
    (result, Cost { seconds, cpu_seconds: cpu_seconds() - cpu_start, mib })
}

/// What all threads of this process have used so far.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn status_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Gives memory that the allocator keeps back to the system, so that it is not counted as there before.
fn release_free_memory() {
    // SAFETY: malloc_trim has no preconditions.
    unsafe { libc::malloc_trim(0) };
}

/// One table's rows, packed.
#[derive(Default)]
struct Packed {
    bytes: Bytes,
    /// Where each row's key and value begin, and the end of all.
    starts: Arc<Vec<(usize, usize)>>,
}

/// One table's rows while they are made.
#[derive(Default)]
struct Growing {
    bytes: Vec<u8>,
    starts: Vec<(usize, usize)>,
}

/// An index snapshot of packed rows.
struct Source {
    tables: BTreeMap<u8, Packed>,
    state: State,
}

impl IndexSnapshot for Source {
    fn state(&self) -> Option<State> {
        Some(self.state)
    }

    fn get(&self, _: &RowKey) -> Result<Option<Bytes>, IndexError> {
        unreachable!("a dump only scans")
    }

    fn scan(&self, range: Range<RowKey>) -> RowIterator {
        let Some(table) = self.tables.get(&range.start.table()) else {
            return Box::new(std::iter::empty());
        };
        let (bytes, starts) = (table.bytes.clone(), Arc::clone(&table.starts));
        Box::new((0..starts.len() - 1).map(move |row| {
            let ((key, value), (end, _)) = (starts[row], starts[row + 1]);
            let key = RowKey::from_bytes(bytes.slice(key..value)).expect("keys have a table");
            Ok((key, bytes.slice(value..end)))
        }))
    }
}

/// An index that only counts.
#[derive(Default)]
struct CountingIndex {
    rows: AtomicU64,
}

impl Index for CountingIndex {
    fn snapshot(&self) -> Arc<dyn IndexSnapshot> {
        unreachable!("a load only ingests")
    }

    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        _: &State,
    ) -> Result<(), IndexError> {
        self.rows.fetch_add(rows.count() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn sync(&self) -> Result<(), IndexError> {
        Ok(())
    }

    fn reached(&self) -> Option<State> {
        None
    }
}

/// What is to be copied: a file with its attributes, or a directory with its entries in the order in which it is read.
enum Planned {
    File { size: u64, mode: u16, atime: Timespec, mtime: Timespec },
    Directory(Vec<(String, Planned)>),
}

/// Makes rows as a `cp -a` into a volume does: some entries a file, in the order of the walk.
struct Maker<'a> {
    keys: &'a VolumeKeys,
    hasher: NameHasher,
    random: u64,
    words: Vec<String>,
    lsn: u64,
    now: u64,
    pack: (u64, u64),
    tables: BTreeMap<u8, Growing>,
    /// Rows of tables that the walk does not visit in order.
    unsorted: Vec<(RowKey, Bytes)>,
    digest: Digest,
    usage: Usage,
}

impl Maker<'_> {
    fn new(keys: &VolumeKeys) -> Maker<'_> {
        let mut maker = Maker {
            keys,
            hasher: NameHasher::of(keys),
            random: 0x9e37_79b9_7f4a_7c15,
            words: Vec::new(),
            lsn: 1,
            now: 1_760_000_000_000_000_000,
            pack: (0, SLOT_BYTES),
            tables: BTreeMap::new(),
            unsorted: Vec::new(),
            digest: Digest::default(),
            usage: Usage::default(),
        };
        maker.words = (0..2000).map(|_| maker.word()).collect();
        maker
    }

    fn made(mut self, files: u64, tree: Option<&Path>) -> Source {
        let mut entries = Vec::new();
        let mut planned = 0;
        while planned < files {
            let copy = tree.map_or_else(|| self.project(), read_tree);
            let count = copy.files();
            assert!(count > 0, "the tree has files");
            planned += count;
            entries.push((format!("copy-{}", entries.len()), copy));
        }
        self.directory(Ino::ROOT, (Ino::ROOT, 0), entries);
        let mut unsorted = std::mem::take(&mut self.unsorted);
        unsorted.sort();
        unsorted.iter().for_each(|(key, value)| self.row(key, value));
        let position =
            Position { epoch: Epoch::default(), lsn: Lsn::new(self.lsn), hash: ChainHash::default() };
        let state = State { position, digest: self.digest, usage: self.usage };
        let tables = self.tables.into_iter().map(|(table, Growing { bytes, mut starts })| {
            starts.push((bytes.len(), 0));
            (table, Packed { bytes: Bytes::from(bytes), starts: Arc::new(starts) })
        });
        Source { tables: tables.collect(), state }
    }

    fn row(&mut self, key: &RowKey, value: &[u8]) {
        if Table::in_digest(key.table()) {
            self.digest = self.digest.plus(self.keys.row_digest(key.table(), key.key(), value));
        }
        let Growing { bytes, starts } = self.tables.entry(key.table()).or_default();
        starts.push((bytes.len(), bytes.len() + key.as_bytes().len()));
        bytes.extend_from_slice(key.as_bytes());
        bytes.extend_from_slice(value);
    }

    fn directory(&mut self, ino: Ino, place: (Ino, u64), entries: Vec<(String, Planned)>) {
        let now = self.later();
        self.inode(ino, place, Kind::Directory, (0o755, 0), [now, Timespec::default(), now]);
        let children = entries.len() as u64;
        let mut subdirectories = 0;
        for (name, planned) in entries {
            self.lsn += 3 + self.below(3);
            let child = Ino::new(self.lsn);
            let name = Name::new(name).expect("made and read names are names");
            let cookie = self.hasher.place(&name).get();
            let is_file = matches!(planned, Planned::File { .. });
            let kind = if is_file { Kind::File } else { Kind::Directory };
            let row = DentryRow { named: Some((name, child, kind)), more: false };
            self.unsorted.push((RowKey::dentry(ino, cookie), row.encode()));
            match planned {
                Planned::Directory(entries) => {
                    subdirectories += 1;
                    self.directory(child, (ino, cookie), entries);
                }
                Planned::File { size, mode, atime, mtime } => {
                    let ctime = self.later();
                    self.inode(child, (ino, cookie), Kind::File, (mode, size), [atime, mtime, ctime]);
                    self.extents(child, size);
                }
            }
        }
        let mtime = self.later();
        let row = DirectoryRow { children, subdirectories, mtime, ctime: mtime };
        self.unsorted.push((RowKey::directory(ino), row.encode()));
    }

    fn inode(
        &mut self,
        ino: Ino,
        (parent, cookie): (Ino, u64),
        kind: Kind,
        (mode, size): (u16, u64),
        [atime, mtime, ctime]: [Timespec; 3],
    ) {
        let row = InodeRow {
            mode,
            uid: 1000,
            gid: 1000,
            size,
            allocated: size,
            extents: size.div_ceil(SLOT_BYTES),
            parent,
            cookie,
            atime,
            mtime,
            ..InodeRow::empty(kind, ctime)
        };
        self.usage.inodes += 1;
        self.usage.bytes += size;
        self.row(&RowKey::inode(ino), &row.encode());
    }

    fn extents(&mut self, ino: Ino, size: u64) {
        for slot in 0..size.div_ceil(SLOT_BYTES) {
            let length = (size - slot * SLOT_BYTES).min(SLOT_BYTES);
            if self.pack.1 + length > SLOT_BYTES {
                self.lsn += 1;
                self.pack = (self.lsn, 0);
                let row = PackRow {
                    writer: 7,
                    sequence: self.lsn,
                    footer_digest: std::array::from_fn(|_| self.below(256) as u8),
                    plain_bytes: 4 << 20,
                    stored_bytes: self.below(4 << 20) as u32,
                    live_bytes: 4 << 20,
                    state: PackState::Here,
                };
                self.row(&RowKey::pack(self.pack.0), &row.encode());
            }
            let target = ExtentTarget::Pack { pack: PackNumber(self.pack.0), offset: self.pack.1 as u32 };
            let row = ExtentRow { length: length as u32, target };
            self.row(&RowKey::extent(ino, slot * SLOT_BYTES), &row.encode());
            self.pack.1 += length;
        }
    }

    /// A directory tree of some thousand files, checked out in one go a while ago and read since.
    fn project(&mut self) -> Planned {
        let mut checked_out = self.now - 40_000_000_000_000_000 + self.below(1 << 54);
        let mut top = Vec::new();
        for _ in 0..20 + self.below(50) {
            let middle = (0..8).map(|_| (self.name(), self.leaf(&mut checked_out))).collect();
            top.push((self.name(), Planned::Directory(unique(middle))));
        }
        Planned::Directory(unique(top))
    }

    fn leaf(&mut self, checked_out: &mut u64) -> Planned {
        let usual = self.below(EXTENSIONS.len() as u64) as usize;
        let mut files = Vec::new();
        for _ in 0..4 + self.below(24) {
            let other = self.below(EXTENSIONS.len() as u64) as usize;
            let extension = EXTENSIONS[if self.below(4) == 0 { other } else { usual }];
            *checked_out += 20_000 + self.below(200_000);
            let bits = 3 + self.below(6) + self.below(6);
            let size = (1 << bits) + self.below(1 << bits);
            let mode = if self.below(30) == 0 { 0o755 } else { 0o644 };
            let mtime = LogTime::from_nanos(*checked_out).into();
            // Read once, by a build or a search, some time after.
            let atime = LogTime::from_nanos(*checked_out + 900_000_000_000 + self.below(100_000_000)).into();
            files.push((format!("{}{extension}", self.name()), Planned::File { size, mode, atime, mtime }));
        }
        let mut files = unique(files);
        // A directory is read in the order of hashes, not of names.
        for at in (1..files.len()).rev() {
            files.swap(at, self.below(at as u64 + 1) as usize);
        }
        Planned::Directory(files)
    }

    fn name(&mut self) -> String {
        let words = 1 + self.below(3);
        let mut parts = Vec::new();
        for _ in 0..words {
            // The smallest of three draws: some words are in use much more than others.
            let word = self.below(2000).min(self.below(2000)).min(self.below(2000));
            parts.push(self.words[word as usize].clone());
        }
        parts.join("_")
    }

    fn word(&mut self) -> String {
        let syllables = 2 + self.below(3);
        (0..syllables).map(|_| SYLLABLES[self.below(SYLLABLES.len() as u64) as usize]).collect()
    }

    fn later(&mut self) -> Timespec {
        self.now += 60_000 + self.below(200_000);
        LogTime::from_nanos(self.now).into()
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }
}

impl Planned {
    fn files(&self) -> u64 {
        match self {
            Planned::File { .. } => 1,
            Planned::Directory(entries) => entries.iter().map(|(_, planned)| planned.files()).sum(),
        }
    }
}

fn unique(mut entries: Vec<(String, Planned)>) -> Vec<(String, Planned)> {
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    entries.dedup_by(|a, b| a.0 == b.0);
    entries
}

/// The files and directories below `path`, in the order in which it is read. Other kinds are left out.
fn read_tree(path: &Path) -> Planned {
    use std::os::unix::fs::MetadataExt;
    let mut planned = Vec::new();
    for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Ok(data) = entry.metadata() else { continue };
        let time = |seconds, nanos: i64| Timespec { seconds, nanos: nanos as u32 };
        if data.is_dir() {
            planned.push((name, read_tree(&entry.path())));
        } else if data.is_file() {
            let mode = (data.mode() & 0o7777) as u16;
            let atime = time(data.atime(), data.atime_nsec());
            let mtime = time(data.mtime(), data.mtime_nsec());
            planned.push((name, Planned::File { size: data.len(), mode, atime, mtime }));
        }
    }
    Planned::Directory(planned)
}

const FILES: u64 = 1_000_000;
const EXTENSIONS: [&str; 9] = [".rs", ".c", ".h", ".py", ".json", ".md", ".toml", ".go", "_test.go"];
const SYLLABLES: [&str; 40] = [
    "al", "an", "ar", "at", "ba", "be", "bo", "ca", "co", "cu", "da", "de", "di", "en", "er", "ex", "fi",
    "fo", "ga", "he", "in", "is", "ke", "la", "le", "li", "lo", "ma", "mo", "ne", "on", "or", "pa", "re",
    "se", "st", "ta", "te", "to", "un",
];
