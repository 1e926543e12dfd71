//! Whole snapshots: written, read, damaged, compared.

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    ops::Range,
    sync::{Arc, Mutex, OnceLock},
};

use bytes::Bytes;
use murphy_log::{
    BranchId, ChainHash, Digest, Epoch, EpochId, LogTime, Lsn, Position, State, Usage, VolumeId, VolumeKeys,
};
use proptest::prelude::*;

use super::{awaited::Awaited, write::write_with, *};
use crate::{
    Cookie, DentryRow, DirectoryRow, ExtentRow, ExtentTarget, Index, IndexError, IndexSnapshot, Ino,
    InodeRow, Kind, MemoryIndex, Name, OrphanRow, PackNumber, PackRow, PackState, RowIterator, RowKey,
    SLOT_BYTES, SessionRow, SymlinkRow, Table, Timespec, XattrName, XattrRow,
};

type Rows = BTreeMap<RowKey, Bytes>;

/// An index of these rows, with the state that belongs to them.
struct Source {
    rows: Rows,
    state: Option<State>,
}

impl Source {
    fn new(rows: Rows) -> Source {
        let keys = keys();
        let digest = rows
            .iter()
            .filter(|(key, _)| Table::in_digest(key.table()))
            .fold(Digest::default(), |sum, (key, value)| {
                sum.plus(keys.row_digest(key.table(), key.key(), value))
            });
        let inodes = rows.iter().filter(|(key, _)| key.table() == Table::Inode.number());
        let sizes = inodes.clone().filter_map(|(_, value)| InodeRow::decode(value).ok());
        let usage = Usage {
            inodes: inodes.count() as u64,
            bytes: sizes.fold(0, |sum, row| row.allocated.wrapping_add(sum)),
        };
        let epoch = Epoch { number: 3, id: EpochId::from_bytes([4; 16]) };
        let position = Position { epoch, lsn: Lsn::new(5000), hash: ChainHash::from_bytes([5; 32]) };
        Source { rows, state: Some(State { position, digest, usage }) }
    }
}

impl IndexSnapshot for Source {
    fn state(&self) -> Option<State> {
        self.state
    }

    fn get(&self, _: &RowKey) -> Result<Option<Bytes>, IndexError> {
        panic!("a snapshot needs no single rows");
    }

    fn scan(&self, range: Range<RowKey>) -> RowIterator {
        let rows: Vec<_> =
            self.rows.range(range).map(|(key, value)| Ok((key.clone(), value.clone()))).collect();
        Box::new(rows.into_iter())
    }
}

/// An index that keeps what it is given and counts how often it was told to sync.
#[derive(Default)]
struct Target {
    rows: Mutex<Rows>,
    state: Mutex<Option<State>>,
    syncs: Mutex<u32>,
}

impl Index for Target {
    fn snapshot(&self) -> Arc<dyn IndexSnapshot> {
        panic!("nobody reads an index that is being loaded");
    }

    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
    ) -> Result<(), IndexError> {
        let mut last = None;
        for (key, value) in rows {
            assert!(last < Some(key.clone()), "{key:?} after {last:?}");
            last = Some(key.clone());
            let before = self.rows.lock().unwrap().insert(key, value.unwrap());
            assert_eq!(before, None);
        }
        *self.state.lock().unwrap() = Some(*state);
        Ok(())
    }

    fn sync(&self) -> Result<(), IndexError> {
        *self.syncs.lock().unwrap() += 1;
        Ok(())
    }

    fn reached(&self) -> Option<State> {
        *self.state.lock().unwrap()
    }
}

fn keys() -> VolumeKeys {
    static KEYS: OnceLock<VolumeKeys> = OnceLock::new();
    KEYS.get_or_init(|| VolumeKeys::derive(VolumeId::from_bytes([7; 16]))).clone()
}

fn origin() -> SnapshotOrigin {
    SnapshotOrigin { branch: BranchId::from_bytes([8; 16]), created: LogTime::from_nanos(1_700_000_000) }
}

fn written(source: &Source, threads: usize, awaited: usize) -> Vec<u8> {
    let mut file = Vec::new();
    let limits = (threads, Awaited::with_limit(awaited));
    let summary = write_with(source, &keys(), origin(), &mut file, &|_| (), limits).unwrap();
    assert_eq!(summary.sections.total(), file.len() as u64);
    file
}

fn snapshot_of(source: &Source) -> Vec<u8> {
    written(source, 2, 1 << 20)
}

fn rows_in(file: &[u8], awaited: usize) -> Result<Rows, ReadSnapshotError> {
    let mut rows = Rows::new();
    let mut sink = |batch: RowBatch| {
        rows.extend(batch);
        Ok(())
    };
    let limits = (2, Awaited::with_limit(awaited));
    SnapshotReader::open(file)?.read_with(&mut sink, &|_| (), limits)?;
    Ok(rows)
}

fn time(nanos: u64) -> Timespec {
    LogTime::from_nanos(1_700_000_000_000_000_000 + nanos).into()
}

/// Builds trees as the engine would.
struct Builder {
    rows: Rows,
    next: u64,
}

impl Builder {
    fn new() -> Builder {
        let mut builder = Builder { rows: Rows::new(), next: 2 };
        let root = builder.inode(Kind::Directory, 0, Ino::ROOT, 0);
        builder.put(RowKey::inode(Ino::ROOT), root.encode());
        builder.put(RowKey::directory(Ino::ROOT), DirectoryRow::default().encode());
        builder
    }

    fn put(&mut self, key: RowKey, value: Bytes) {
        assert_eq!(self.rows.insert(key, value), None);
    }

    fn inode(&self, kind: Kind, size: u64, parent: Ino, cookie: u64) -> InodeRow {
        let empty = InodeRow::empty(kind, time(self.next * 300_000));
        InodeRow {
            mode: if kind == Kind::Directory { 0o755 } else { 0o644 },
            uid: 1000,
            gid: 100,
            size,
            allocated: size,
            extents: size.div_ceil(SLOT_BYTES),
            parent,
            cookie,
            mtime: if kind == Kind::Directory { empty.mtime } else { time(self.next * 1000) },
            ..empty
        }
    }

    fn link(&mut self, parent: Ino, name: &str, ino: Ino, kind: Kind, slot: u8, more: bool) -> Cookie {
        let name = Name::new(name.to_owned()).unwrap();
        let cookie = name_hasher(&keys()).place(&name).in_slot(slot);
        let row = DentryRow { named: Some((name, ino, kind)), more };
        self.put(RowKey::dentry(parent, cookie.get()), row.encode());
        cookie
    }

    fn node(&mut self, parent: Ino, name: &str, kind: Kind, size: u64) -> Ino {
        let ino = Ino::new(self.next);
        self.next += 3;
        let cookie = self.link(parent, name, ino, kind, 0, false);
        let mut row = self.inode(kind, if kind == Kind::Directory { 0 } else { size }, parent, cookie.get());
        if kind != Kind::File {
            (row.allocated, row.extents) = (0, 0);
        }
        self.put(RowKey::inode(ino), row.encode());
        if kind == Kind::Directory {
            let row = DirectoryRow { children: 4, subdirectories: 1, mtime: time(9), ctime: time(9) };
            self.put(RowKey::directory(ino), row.encode());
        }
        ino
    }

    fn file(&mut self, parent: Ino, name: &str, size: u64) -> Ino {
        let ino = self.node(parent, name, Kind::File, size);
        for slot in 0..size.div_ceil(SLOT_BYTES) {
            let length = (size - slot * SLOT_BYTES).min(SLOT_BYTES) as u32;
            self.extent(ino, slot * SLOT_BYTES, length, 100 + ino.get() / 50);
        }
        ino
    }

    fn extent(&mut self, ino: Ino, offset: u64, length: u32, pack: u64) {
        let target = ExtentTarget::Pack { pack: PackNumber(pack), offset: (ino.get() % 50) as u32 * 512 };
        self.put(RowKey::extent(ino, offset), ExtentRow { length, target }.encode());
    }
}

/// A tree with something of everything.
fn varied(files: u64) -> Rows {
    let mut builder = Builder::new();
    for directory in 0..files / 8 {
        let parent = builder.node(Ino::ROOT, &format!("directory-{directory}"), Kind::Directory, 0);
        for file in 0..8 {
            builder.file(parent, &format!("file-{file:03}.rs"), directory * 700 + file);
        }
    }
    let deep = builder.node(Ino::ROOT, "deep", Kind::Directory, 0);
    builder.file(deep, "large", 3 * SLOT_BYTES + 5);
    builder.file(deep, "too large to be ordinary", 40 * SLOT_BYTES);
    let sparse = builder.node(deep, "sparse", Kind::File, 100 * SLOT_BYTES);
    builder.extent(sparse, 17, 100, 900);
    builder.extent(sparse, SLOT_BYTES, 1, 901);
    // Two names with one hash, of which the first was removed, and a name in a high slot.
    builder.node(deep, "below", Kind::File, 0);
    let cookie = name_hasher(&keys()).place(&Name::new("gone").unwrap());
    builder.put(RowKey::dentry(deep, cookie.get()), DentryRow { named: None, more: true }.encode());
    let linked = builder.file(deep, "first name", 10);
    let second = builder.link(deep, "second name", linked, Kind::File, 3, false);
    builder.put(RowKey::link(linked, deep, second.get()), Bytes::from_static(&[0]));
    // Moved into a directory that is younger.
    let young = builder.node(Ino::ROOT, "young", Kind::Directory, 0);
    let moved = Ino::new(builder.next);
    let younger = Ino::new(builder.next + 10);
    let cookie = builder.link(younger, "moved", moved, Kind::Symlink, 0, true);
    let row = builder.inode(Kind::Symlink, 9, younger, cookie.get());
    builder.put(RowKey::inode(moved), InodeRow { allocated: 0, extents: 0, ..row }.encode());
    builder.put(RowKey::symlink(moved), SymlinkRow { target: "../target".into() }.encode());
    builder.next += 20;
    let device = builder.node(young, "device", Kind::CharDevice, 0);
    let row = InodeRow::decode(&builder.rows[&RowKey::inode(device)]).unwrap();
    let row =
        InodeRow { rdev: 77, size: 0, has_xattrs: true, atime: Timespec::MIN, mtime: Timespec::MAX, ..row };
    builder.rows.insert(RowKey::inode(device), row.encode());
    let name = XattrName::new("user.comment").unwrap();
    builder.put(RowKey::xattr(device, &name), XattrRow { value: vec![7; 3000].into() }.encode());
    let orphan = Ino::new(builder.next);
    let row = builder.inode(Kind::File, 0, Ino::new(999_999), 0);
    builder.put(RowKey::inode(orphan), InodeRow { nlink: 0, ..row }.encode());
    builder.put(RowKey::orphan(orphan), OrphanRow.encode());
    let pack = PackRow {
        writer: 3,
        sequence: 9,
        footer_digest: [6; 32],
        plain_bytes: 1000,
        stored_bytes: 800,
        live_bytes: 500,
        state: PackState::Here,
    };
    builder.put(RowKey::pack(100), pack.encode());
    let session = SessionRow { writer: 1, pack_floor: 2, ended: false };
    builder.put(RowKey::session(5), session.encode());
    builder.put(RowKey::setting("window"), Bytes::from_static(b"\x0030d"));
    strange(&mut builder);
    builder.rows
}

/// Rows that no present writer makes.
fn strange(builder: &mut Builder) {
    builder.put(RowKey::from_parts(200, b"key of a later table"), Bytes::from_static(b"value"));
    builder.put(RowKey::from_parts(1, &70_000u64.to_be_bytes()), Bytes::from_static(b"\x09later layout"));
    builder.put(RowKey::from_parts(2, b"short"), Bytes::new());
    builder.put(RowKey::from_parts(3, &[0xff; 20]), Bytes::from_static(&[1; 30]));
    builder.put(RowKey::from_parts(4, &[0xff; 16]), Bytes::from_static(&[3]));
    builder.put(RowKey::directory(Ino::new(80_000)), DirectoryRow::default().encode());
}

#[test]
fn every_row_comes_back_and_the_second_snapshot_is_the_first() {
    let source = Source::new(varied(200));
    let file = snapshot_of(&source);
    let rows = rows_in(&file, 1 << 20).unwrap();
    assert_eq!(rows, source.rows);
    let again = Source { rows, state: source.state };
    assert_eq!(snapshot_of(&again), file);
    let summary = verify_snapshot(&file[..], &|_| ()).unwrap();
    assert_eq!(summary.sections.total(), file.len() as u64);
    assert_eq!(summary.digest, source.state.unwrap().digest);
    for (table, count) in &summary.rows {
        assert_eq!(*count, source.rows.keys().filter(|key| key.table() == *table).count() as u64);
    }
    assert_eq!(summary.rows_of(99), 0);
}

#[test]
fn the_bytes_do_not_depend_on_threads() {
    let source = Source::new(varied(100_000));
    let one = written(&source, 1, 1 << 20);
    assert_eq!(one, written(&source, 4, 1 << 20));
    assert_eq!(rows_in(&one, 1 << 20).unwrap(), source.rows);
}

#[test]
fn a_name_that_finds_no_room_in_memory_is_stored_with_its_inode() {
    let source = Source::new(varied(2000));
    let file = written(&source, 2, 100);
    assert_eq!(rows_in(&file, 100).unwrap(), source.rows);
    assert!(file.len() > snapshot_of(&source).len());
}

#[test]
fn a_directory_of_many_names_needs_one_block_at_a_time() {
    let mut builder = Builder::new();
    for file in 0..100_000 {
        builder.node(Ino::ROOT, &format!("{file}"), Kind::File, 0);
    }
    let source = Source::new(builder.rows);
    let file = snapshot_of(&source);
    let mut largest = 0;
    let mut rows = Rows::new();
    let mut sink = |batch: RowBatch| {
        largest = largest.max(batch.len());
        rows.extend(batch);
        Ok(())
    };
    SnapshotReader::open(&file[..]).unwrap().read(&mut sink, &|_| ()).unwrap();
    assert_eq!(rows, source.rows);
    assert!(largest <= (512 << 10) + 4 * block::BLOCK_ROWS, "{largest} rows in one batch");
}

#[test]
fn loading_syncs_once_and_only_what_was_proven() {
    let source = Source::new(varied(500));
    let mut file = snapshot_of(&source);
    let target = Target::default();
    let state = SnapshotReader::open(&file[..]).unwrap().load_into(&target, &|_| ()).unwrap();
    assert_eq!(Some(state), source.state);
    assert_eq!(*target.rows.lock().unwrap(), source.rows);
    assert_eq!(*target.syncs.lock().unwrap(), 1);

    let last = file.len() - 1;
    file[last] ^= 1;
    let target = Target::default();
    SnapshotReader::open(&file[..]).unwrap().load_into(&target, &|_| ()).unwrap_err();
    assert_eq!(*target.syncs.lock().unwrap(), 0);
    assert_eq!(*target.state.lock().unwrap(), None);
}

#[test]
fn an_index_that_was_loaded_gives_the_same_snapshot() {
    let file = snapshot_of(&Source::new(varied(500)));
    let index = MemoryIndex::new();
    SnapshotReader::open(&file[..]).unwrap().load_into(&index, &|_| ()).unwrap();
    let mut again = Vec::new();
    write_snapshot(&*index.snapshot(), &keys(), origin(), &mut again, &|_| ()).unwrap();
    assert_eq!(again, file);
}

#[test]
fn a_source_that_disagrees_with_its_state_gives_no_snapshot() {
    let write = |change: fn(&mut Source)| {
        let mut source = Source::new(varied(20));
        change(&mut source);
        let mut file = Vec::new();
        let result = write_snapshot(&source, &keys(), origin(), &mut file, &|_| ());
        assert!(verify_snapshot(&file[..], &|_| ()).is_err());
        result.unwrap_err().to_string()
    };
    // A dump that said "done" with a fraction of the entries is what this is for.
    let lost = write(|source| drop(source.rows.remove(&RowKey::pack(100))));
    assert!(lost.contains("digest"), "{lost}");
    let fewer = write(|source| source.state.as_mut().unwrap().usage.inodes += 1);
    assert!(fewer.contains("inodes"), "{fewer}");
    let empty = write(|source| source.state = None);
    assert!(empty.contains("no state"), "{empty}");
    let mut source = Source::new(varied(20));
    source.rows.retain(|key, _| key != &RowKey::from_parts(1, &70_000u64.to_be_bytes()));
    let mut source = Source::new(source.rows);
    source.state.as_mut().unwrap().usage.bytes += 1;
    let wrong = write_snapshot(&source, &keys(), origin(), &mut Vec::new(), &|_| ()).unwrap_err();
    assert!(wrong.to_string().contains("bytes of file data"), "{wrong}");
}

#[test]
fn every_flipped_bit_is_noticed() {
    let file = snapshot_of(&Source::new(varied(8)));
    for at in 0..file.len() {
        let mut damaged = file.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(verify_snapshot(&damaged[..], &|_| ()).is_err(), "byte {at} of {}", file.len());
    }
}

#[test]
fn every_missing_end_and_every_further_byte_is_noticed() {
    let mut file = snapshot_of(&Source::new(varied(8)));
    for length in 0..file.len() {
        let error = verify_snapshot(&file[..length], &|_| ()).unwrap_err();
        assert!(matches!(error, ReadSnapshotError::CutShort { .. }), "{length}: {error}");
    }
    file.push(0);
    assert!(verify_snapshot(&file[..], &|_| ()).is_err());
}

#[test]
fn what_is_no_snapshot_is_told_apart_from_a_damaged_one() {
    let garbage = [b'x'; 4096];
    assert!(matches!(SnapshotReader::open(&garbage[..]), Err(ReadSnapshotError::NotASnapshot)));
    // A later version may have its checksum elsewhere.
    let mut later = header_bytes();
    later[8] = 9;
    assert!(matches!(SnapshotReader::open(&later[..]), Err(ReadSnapshotError::Version(9))));
    summed(&mut later);
    assert!(matches!(SnapshotReader::open(&later[..]), Err(ReadSnapshotError::Version(9))));
    let mut reserved = header_bytes();
    reserved[10] = 1;
    summed(&mut reserved);
    assert!(matches!(SnapshotReader::open(&reserved[..]), Err(ReadSnapshotError::Damaged { block: 0, .. })));
    let mut damaged = header_bytes();
    damaged[12] ^= 1;
    assert!(matches!(SnapshotReader::open(&damaged[..]), Err(ReadSnapshotError::Damaged { block: 0, .. })));
}

/// Puts the checksum of a header right.
fn summed(header: &mut [u8]) {
    let checksum = blake3::hash(&header[..144]);
    header[144..].copy_from_slice(&checksum.as_bytes()[..16]);
}

fn header_bytes() -> Vec<u8> {
    snapshot_of(&Source::new(Builder::new().rows))[..header::HEADER_BYTES].to_vec()
}

#[test]
fn a_pipe_will_do() {
    let source = Source::new(varied(3000));
    let (reader, mut writer) = std::io::pipe().unwrap();
    let file = std::thread::scope(|scope| {
        scope.spawn(move || {
            let source = Source::new(varied(3000));
            write_snapshot(&source, &keys(), origin(), &mut writer, &|_| ()).unwrap();
            writer.flush().unwrap();
        });
        let mut rows = Rows::new();
        let mut sink = |batch: RowBatch| {
            rows.extend(batch);
            Ok(())
        };
        SnapshotReader::open(reader).unwrap().read(&mut sink, &|_| ()).unwrap();
        rows
    });
    assert_eq!(file, source.rows);
}

#[test]
fn a_length_that_lies_allocates_nothing_and_fails() {
    let mut file = header_bytes();
    file.extend_from_slice(&[1, 8, 0, 0]);
    file.extend_from_slice(&u32::MAX.to_le_bytes());
    file.extend_from_slice(&[0; 24]);
    let error = verify_snapshot(file.chain(std::io::repeat(0)), &|_| ()).unwrap_err();
    assert!(matches!(error, ReadSnapshotError::Damaged { .. }), "{error}");
}

/// A forger can make any checksum agree; then the decoders are all that is left.
#[test]
fn no_bytes_behind_a_good_checksum_make_a_reader_panic() {
    let file = snapshot_of(&Source::new(varied(24)));
    let mut input = &file[header::HEADER_BYTES..];
    let mut expander = streams::Expander::new().unwrap();
    loop {
        let block = block::StoredBlock::read(&mut input).unwrap_or_else(|_| panic!("the file is whole"));
        if block.head.kind == block::BlockKind::Footer {
            break;
        }
        for at in block::BLOCK_HEAD_BYTES..block.bytes().len() {
            for change in [0x01, 0x80, 0xff] {
                let mut bytes = block.bytes().to_vec();
                bytes[at] ^= change;
                block.head.seal(&mut bytes);
                let forged = block::StoredBlock::new(block.head, bytes);
                let ordinal = block.head.ordinal;
                drop(read::open_block(&forged, ordinal, &keys(), &name_hasher(&keys()), &mut expander));
            }
        }
    }
}

fn any_row() -> impl Strategy<Value = (RowKey, Vec<u8>)> {
    let number = prop_oneof![0u64..50, any::<u64>()];
    let key = (1u8..=20, number.clone(), prop::option::of(number), prop::collection::vec(any::<u8>(), 0..3));
    let key = key.prop_map(|(table, first, second, rest)| {
        let mut key = first.to_be_bytes().to_vec();
        key.extend(second.iter().flat_map(|second| second.to_be_bytes()));
        key.extend(rest);
        RowKey::from_parts(table, &key)
    });
    (key, prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..40))
}

fn any_time() -> impl Strategy<Value = Timespec> {
    let seconds = prop_oneof![Just(0i64), Just(1_700_000_000), -(1i64 << 39)..(1 << 39)];
    (seconds, prop_oneof![Just(0u32), 0u32..1_000_000_000])
        .prop_map(|(seconds, nanos)| Timespec { seconds, nanos })
}

fn any_inode() -> impl Strategy<Value = (u64, InodeRow)> {
    let numbers = (1u64..60, 1u8..=7, 0u16..=0o7777, 0u32..3, any::<u32>(), 0u32..3);
    let sizes = (prop_oneof![0u64..3, any::<u64>(), Just(SLOT_BYTES)], 0u64..1 << 40, any::<u64>());
    let places = (0u64..60, any::<u64>(), any::<bool>(), any::<bool>());
    let times = (any_time(), any_time(), any_time());
    (numbers, sizes, places, times).prop_map(|(numbers, (size, allocated, extents), places, times)| {
        let (ino, kind, mode, uid, rdev, nlink) = numbers;
        let kind = Kind::from_number(kind).unwrap();
        let row = InodeRow {
            kind,
            mode,
            uid,
            gid: uid,
            rdev,
            nlink,
            size,
            allocated,
            extents,
            has_xattrs: places.2,
            purging: nlink == 0 && places.3,
            generation: nlink,
            project: uid,
            parent: Ino::new(places.0),
            cookie: places.1,
            atime: times.0,
            mtime: times.1,
            ctime: times.2,
        };
        // What a kind has no field for is not encoded.
        (ino, InodeRow::decode(&row.encode()).unwrap())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_rows_come_back(
        rows in prop::collection::vec(any_row(), 0..60),
        inodes in prop::collection::vec(any_inode(), 0..30),
        dentries in prop::collection::vec((0u64..60, "[a-c]{1,4}", 0u8..16, 0u64..60, any::<bool>()), 0..30),
        extents in prop::collection::vec((0u64..60, 0u64..3, 1u32..5, any::<u32>()), 0..30),
    ) {
        let mut all: Rows = rows.into_iter().map(|(key, value)| (key, value.into())).collect();
        for (parent, name, slot, ino, more) in dentries {
            let name = Name::new(name).unwrap();
            let cookie = name_hasher(&keys()).place(&name).in_slot(slot).get();
            let mut row = InodeRow::decode(&Builder::new().rows[&RowKey::inode(Ino::ROOT)]).unwrap();
            (row.parent, row.cookie) = (Ino::new(parent), cookie);
            all.insert(RowKey::inode(Ino::new(ino)), row.encode());
            let row = DentryRow { named: Some((name, Ino::new(ino), Kind::Directory)), more };
            all.insert(RowKey::dentry(Ino::new(parent), cookie), row.encode());
        }
        for (ino, row) in inodes {
            all.insert(RowKey::inode(Ino::new(ino)), row.encode());
        }
        for (ino, slot, length, offset) in extents {
            let target = ExtentTarget::Pack { pack: PackNumber(u64::from(offset) % 7), offset };
            all.insert(RowKey::extent(Ino::new(ino), slot * SLOT_BYTES), ExtentRow { length, target }.encode());
        }
        let source = Source::new(all);
        let file = snapshot_of(&source);
        prop_assert_eq!(rows_in(&file, 1 << 20).unwrap(), source.rows);
    }
}

#[test]
fn the_bytes_of_version_0_do_not_change() {
    let mut builder = Builder::new();
    let directory = builder.node(Ino::ROOT, "src", Kind::Directory, 0);
    builder.file(directory, "lib.rs", 1234);
    builder.node(directory, "link", Kind::Symlink, 6);
    builder.put(RowKey::symlink(Ino::new(8)), SymlinkRow { target: "lib.rs".into() }.encode());
    let file = snapshot_of(&Source::new(builder.rows));
    murphy_log::conformance::golden("snapshot.hex", &file);
}
