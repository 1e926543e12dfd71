//! The decoders of trees and of file data: rows, whole trees of hostile rows, snapshots, packs.

use std::collections::BTreeMap;

use bytes::Bytes;
use murphy_fs::{
    Cookie, DentryRow, DirectoryRow, Extent, ExtentRow, ExtentTarget, FooterDigest, Index, Ino, InodeRow,
    Kind, MEMBER_NAME_BYTES, MemberRole, MemberRow, MemberState, MemoryIndex, Name, NameHasher, OrphanRow,
    PackBuilder, PackMeta, PackName, PackNumber, PackReader, PackRow, PackState, RowKey, SessionRow,
    SettingRow, SnapshotOrigin, SnapshotReader, SymlinkRow, Table, Timespec, WriterId, XattrRow, check_tree,
    verify_snapshot, write_snapshot,
};
use murphy_log::{
    BranchId, Digest, LogTime, Lsn, State, Usage, VolumeKeys,
    conformance::{BRANCH, History, VOLUME},
};

use crate::{PLACES, Random, SMALL, Target, golden, seal};

pub(crate) fn targets() -> Vec<Target> {
    vec![
        Target {
            name: "row",
            run: row,
            seeds: row_seeds,
            hostile: Vec::new,
            places: PLACES,
            reseal: |_| (),
            allowance: SMALL,
        },
        Target {
            name: "tree",
            run: tree,
            seeds: tree_seeds,
            hostile: Vec::new,
            // Whoever reads rows names them by table and key.
            places: &["byte #", "table #"],
            reseal: |_| (),
            allowance: 1 << 20,
        },
        Target {
            name: "snapshot",
            run: snapshot,
            seeds: snapshot_seeds,
            hostile: hostile_snapshots,
            places: PLACES,
            reseal: |bytes| reseal_snapshot(bytes),
            // At most six blocks at a time, each expanded and taken apart.
            allowance: 6 * (2 * (24 << 20) + (16 << 20)),
        },
        Target {
            name: "pack",
            run: pack,
            seeds: pack_seeds,
            hostile: Vec::new,
            places: PLACES,
            reseal: |bytes| reseal_pack(bytes),
            allowance: 2 * murphy_fs::MAX_PACK_PLAIN,
        },
    ]
}

/// The value of a row behind the number of its table. A row has one form only: the digest depends on it.
fn row(bytes: &[u8]) -> Result<(), String> {
    let Some((table, value)) = bytes.split_first() else {
        return Err("row is cut short at byte 0".to_owned());
    };
    let value = Bytes::copy_from_slice(value);
    let again = decode_row(*table, &value)?;
    assert_eq!(again, value, "a row with two forms");
    Ok(())
}

/// The row, written again.
fn decode_row(table: u8, value: &Bytes) -> Result<Bytes, String> {
    let text = |error: murphy_fs::RowError| error.to_string();
    Ok(match table % 12 {
        0 => InodeRow::decode(value).map_err(text)?.encode(),
        1 => DirectoryRow::decode(value).map_err(text)?.encode(),
        2 => DentryRow::decode(value).map_err(text)?.encode(),
        3 => {
            let row = ExtentRow::decode(value).map_err(text)?;
            clip(row);
            row.encode()
        }
        4 => SymlinkRow::decode(value).map_err(text)?.encode(),
        5 => XattrRow::decode(value).map_err(text)?.encode(),
        6 => OrphanRow::decode(value).map_err(text)?.encode(),
        7 => PackRow::decode(value).map_err(text)?.encode(),
        8 => SessionRow::decode(value).map_err(text)?.encode(),
        9 => MemberRow::decode(value).map_err(text)?.encode(),
        10 => SettingRow::decode(value).map_err(text)?.encode(),
        _ => Err("no table at byte 0 has rows")?,
    })
}

/// What a read does with every extent that it meets.
fn clip(row: ExtentRow) {
    for offset in [0, 1, murphy_fs::SLOT_BYTES - 1, u64::MAX / 2] {
        let extent = Extent { offset, row };
        let half = extent.clipped(offset + u64::from(row.length / 2), extent.end());
        assert!(half.is_some_and(|half| half.end() == extent.end()));
    }
}

fn inode(kind: Kind) -> InodeRow {
    let file = kind == Kind::File;
    InodeRow {
        mode: 0o644,
        uid: 1000,
        gid: 100,
        rdev: if kind == Kind::CharDevice { 0x0103 } else { 0 },
        size: if file { 5000 } else { 0 },
        allocated: if file { 5000 } else { 0 },
        extents: u64::from(file),
        has_xattrs: file,
        cookie: if kind == Kind::Directory { 0 } else { 0x1230 },
        atime: Timespec { seconds: 1_700_000_000, nanos: 5 },
        mtime: if kind == Kind::Directory {
            Timespec::default()
        } else {
            Timespec { seconds: -1, nanos: 999_999_999 }
        },
        ..InodeRow::empty(kind, Timespec::MAX)
    }
}

fn row_seeds() -> Vec<Vec<u8>> {
    let named = Some((Name::new("etc").expect("a name"), Ino::new(0x0102), Kind::Directory));
    let extent = |target| ExtentRow { length: 4096, target }.encode();
    let member = |state| {
        let (name, addresses) = ("berlin".to_owned(), vec!["h:1".to_owned(), "x".repeat(MEMBER_NAME_BYTES)]);
        MemberRow { role: MemberRole::Writer, state, name, addresses }.encode()
    };
    let rows: Vec<(u8, Bytes)> = vec![
        (0, inode(Kind::File).encode()),
        (0, InodeRow { nlink: 0, purging: true, ..inode(Kind::File) }.encode()),
        (0, inode(Kind::Directory).encode()),
        (0, inode(Kind::Symlink).encode()),
        (0, inode(Kind::CharDevice).encode()),
        (0, inode(Kind::Socket).encode()),
        (1, DirectoryRow { children: 300, subdirectories: 2, ..DirectoryRow::default() }.encode()),
        (2, DentryRow { named, more: true }.encode()),
        (2, DentryRow { named: None, more: true }.encode()),
        (3, extent(ExtentTarget::Pack { pack: PackNumber(0x0304), offset: 65536 })),
        (3, extent(ExtentTarget::Log { lsn: Lsn::new(0x0102), offset: 0 })),
        (4, SymlinkRow { target: Bytes::from_static(b"../etc") }.encode()),
        (5, XattrRow { value: Bytes::from_static(b"\0v") }.encode()),
        (6, OrphanRow.encode()),
        (7, pack_row().encode()),
        (8, SessionRow { writer: 0x0a0b, pack_floor: 200, ended: true }.encode()),
        (9, member(MemberState::Joined { public_key: [4; 32] })),
        (9, member(MemberState::Invited { secret_hash: [3; 32], expires: LogTime::from_nanos(1 << 60) })),
        (10, SettingRow { text: Bytes::from_static(b"local") }.encode()),
    ];
    rows.into_iter().map(|(table, value)| [&[table][..], &value].concat()).collect()
}

fn pack_row() -> PackRow {
    PackRow {
        writer: 7,
        sequence: 200,
        footer_digest: [0xcc; 32],
        plain_bytes: 5000,
        stored_bytes: 900,
        live_bytes: 5000,
        state: PackState::Here,
    }
}

/// Rows as they come from a log or an archive that somebody made with care: looking for damage in them must not be what breaks.
fn tree(bytes: &[u8]) -> Result<(), String> {
    let rows = read_rows(bytes)?;
    let index = MemoryIndex::new();
    let state = state_of(&rows);
    index
        .ingest(&mut rows.into_iter().map(|(key, value)| (key, Some(value))), &state)
        .map_err(|error| error.to_string())?;
    let findings = check_tree(&*index.snapshot()).map_err(|error| error.to_string())?;
    findings.iter().for_each(|finding| drop(finding.to_string()));
    let mut file = Vec::new();
    let origin = SnapshotOrigin { branch: BRANCH, created: LogTime::default() };
    let written = write_snapshot(&*index.snapshot(), &VolumeKeys::derive(VOLUME), origin, &mut file, &|_| ());
    written.map(drop).map_err(|error| error.to_string())
}

/// What a source would say of these rows.
fn state_of(rows: &BTreeMap<RowKey, Bytes>) -> State {
    let keys = VolumeKeys::derive(VOLUME);
    let mut state = State { digest: Digest::default(), usage: Usage::default(), ..History::origin() };
    for (key, value) in rows {
        if Table::in_digest(key.table()) {
            state.digest = state.digest.plus(keys.row_digest(key.table(), key.key(), value));
        }
        if key.table() == Table::Inode.number() {
            state.usage.inodes += 1;
            let allocated = InodeRow::decode(value).map_or(0, |row| row.allocated);
            state.usage.bytes = state.usage.bytes.wrapping_add(allocated);
        }
    }
    state
}

/// Table, length and bytes of the key, length and bytes of the value, again and again.
fn read_rows(bytes: &[u8]) -> Result<BTreeMap<RowKey, Bytes>, String> {
    let (mut rows, mut at) = (BTreeMap::new(), 0);
    while at < bytes.len() {
        let row = read_row(&bytes[at..]).ok_or_else(|| format!("the row at byte {at} is cut short"))?;
        let (key, value, length) = row;
        rows.insert(key, value);
        at += length;
    }
    Ok(rows)
}

/// One row, and how many bytes it takes.
fn read_row(bytes: &[u8]) -> Option<(RowKey, Bytes, usize)> {
    let [table, length, after @ ..] = bytes else { return None };
    let (key, after) = after.split_at_checked(usize::from(*length))?;
    let (length, after) = after.split_first_chunk::<2>()?;
    let (value, rest) = after.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
    let key = RowKey::from_parts(*table, key);
    Some((key, Bytes::copy_from_slice(value), bytes.len() - rest.len()))
}

fn tree_seeds() -> Vec<Vec<u8>> {
    let mut golden_rows = BTreeMap::new();
    let read = SnapshotReader::open(&golden("snapshot.hex")[..]).expect("a snapshot").read(
        &mut |batch| {
            golden_rows.extend(batch);
            Ok(())
        },
        &|_| (),
    );
    read.expect("the golden snapshot reads");
    let packed = |rows: &BTreeMap<RowKey, Bytes>| {
        let one = |(key, value): (&RowKey, &Bytes)| {
            let (key_length, length) = (key.key().len() as u8, (value.len() as u16).to_le_bytes());
            [&[key.table(), key_length][..], key.key(), &length, value].concat()
        };
        rows.iter().flat_map(one).collect::<Vec<u8>>()
    };
    vec![packed(&golden_rows), packed(&small_tree(4)), packed(&small_tree(40))]
}

/// A root with `files` files, every third of them with an attribute, one symlink, one pack.
fn small_tree(files: u64) -> BTreeMap<RowKey, Bytes> {
    let hasher = NameHasher::of(&VolumeKeys::derive(VOLUME));
    let mut rows = BTreeMap::new();
    let root = InodeRow { cookie: 0, ..inode(Kind::Directory) };
    rows.insert(RowKey::inode(Ino::ROOT), root.encode());
    let directory = DirectoryRow { children: files + 1, ..DirectoryRow::default() };
    rows.insert(RowKey::directory(Ino::ROOT), directory.encode());
    for number in 0..=files {
        let ino = Ino::new(number + 2);
        let kind = if number == files { Kind::Symlink } else { Kind::File };
        let name = Name::new(format!("file number {number}")).expect("a name");
        let place: Cookie = hasher.place(&name);
        let row = InodeRow {
            cookie: place.get(),
            has_xattrs: kind == Kind::File && number % 3 == 0,
            size: if kind == Kind::File { 5000 } else { 6 },
            ..inode(kind)
        };
        rows.insert(RowKey::inode(ino), row.encode());
        rows.insert(
            RowKey::dentry(Ino::ROOT, place.get()),
            DentryRow { named: Some((name, ino, kind)), more: false }.encode(),
        );
        if kind == Kind::Symlink {
            rows.insert(RowKey::symlink(ino), SymlinkRow { target: Bytes::from_static(b"../etc") }.encode());
            continue;
        }
        let target = ExtentTarget::Pack { pack: PackNumber(9), offset: (number * 5000) as u32 };
        rows.insert(RowKey::extent(ino, 0), ExtentRow { length: 5000, target }.encode());
        if row.has_xattrs {
            let key = murphy_fs::XattrName::new("user.a").expect("a name");
            rows.insert(RowKey::xattr(ino, &key), XattrRow { value: Bytes::from_static(b"v") }.encode());
        }
    }
    rows.insert(RowKey::pack(9), PackRow { live_bytes: files * 5000, ..pack_row() }.encode());
    rows
}

fn snapshot(bytes: &[u8]) -> Result<(), String> {
    let index = MemoryIndex::new();
    let reader = SnapshotReader::open(bytes).map_err(|error| error.to_string())?;
    let header = *reader.header();
    let state = reader.load_into(&index, &|_| ()).map_err(|error| error.to_string())?;
    assert_eq!(state, header.state);
    // LSNs are added to as soon as a log begins behind the snapshot.
    assert!(state.position.lsn.next() > state.position.lsn);
    let origin = SnapshotOrigin { branch: header.branch, created: header.created };
    let mut again = Vec::new();
    let keys = VolumeKeys::derive(header.volume);
    let written = write_snapshot(&*index.snapshot(), &keys, origin, &mut again, &|_| ())
        .expect("what was read is written");
    let read = verify_snapshot(&again[..], &|_| ()).expect("what was written reads");
    assert_eq!((read.digest, &read.rows), (state.digest, &written.rows));
    Ok(())
}

fn snapshot_seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![golden("snapshot.hex")];
    for files in [0, 5, 300] {
        let rows = small_tree(files);
        let state = state_of(&rows);
        let index = MemoryIndex::new();
        index
            .ingest(&mut rows.into_iter().map(|(key, value)| (key, Some(value))), &state)
            .expect("rows in order");
        let mut file = Vec::new();
        let origin = SnapshotOrigin { branch: BranchId::default(), created: LogTime::default() };
        let keys = VolumeKeys::derive(VOLUME);
        write_snapshot(&*index.snapshot(), &keys, origin, &mut file, &|_| ()).expect("a tree is written");
        seeds.push(file);
    }
    seeds
}

/// A position after which no entry can come; streams of zeros that expand to as much as a block may hold.
fn hostile_snapshots() -> Vec<Vec<u8>> {
    let mut beyond = golden("snapshot.hex");
    beyond[LSN_AT..LSN_AT + 8].fill(0xff);
    let mut bombs = golden("snapshot.hex")[..160].to_vec();
    let zeros = zstd::bulk::compress(&vec![0; 24 << 20], 3).expect("zeros compress");
    for ordinal in 0..20u32 {
        let stream =
            [&[3, 1][..], &(24u32 << 20).to_le_bytes(), &(zeros.len() as u32).to_le_bytes(), &zeros].concat();
        let head = [
            &[3, 1, 0, 0][..],
            &(stream.len() as u32).to_le_bytes(),
            &1u32.to_le_bytes(),
            &ordinal.to_le_bytes(),
        ];
        bombs.extend_from_slice(&head.concat());
        bombs.extend_from_slice(&[0; 16]);
        bombs.extend_from_slice(&stream);
    }
    let mut all = vec![beyond, bombs];
    all.iter_mut().for_each(|bytes| reseal_snapshot(bytes));
    all
}

/// Header and blocks get their checksums.
fn reseal_snapshot(bytes: &mut [u8]) {
    seal::sum(bytes, 0..144, 144);
    let mut at = 160;
    while let Some(head) = bytes.get(at..at + 32) {
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let Some(payload) = at.checked_add(32 + length).and_then(|end| bytes.get(at + 32..end)) else {
            return;
        };
        let sum: [u8; 16] = seal::short(&[&bytes[at..at + 16], payload]);
        bytes[at + 16..at + 32].copy_from_slice(&sum);
        at += 32 + length;
    }
}

/// The object of a pack, and what a log would say of it: the digest of whatever footer it has.
fn pack(bytes: &[u8]) -> Result<(), String> {
    let meta = meta_of(bytes);
    let opened = PackReader::open(&meta, Bytes::copy_from_slice(bytes));
    // The log's word is all that a pack says of itself here: whoever only has the name judges alike.
    let by_name = PackReader::open_by_name(meta.name, Bytes::copy_from_slice(bytes));
    assert_eq!(opened.is_ok(), by_name.is_ok(), "{opened:?} and {by_name:?}");
    let pack = opened.map_err(|error| error.to_string())?;
    let plain = pack.footer().plain_len();
    assert_eq!(plain, meta.plain_len);
    for range in
        [0..u64::MAX, plain..plain + 1, 1..2, plain / 2..plain, 70_000..70_001, u64::MAX - 1..u64::MAX]
    {
        let expected = range.end.min(plain).saturating_sub(range.start.min(plain));
        match pack.read(range) {
            Ok(read) => assert_eq!(read.len() as u64, expected),
            Err(error) => assert!(error.to_string().contains("cell "), "{error}"),
        }
    }
    pack.verify().map_err(|error| error.to_string())
}

/// Where the footer of a pack begins, as far as its trailer can be believed.
fn footer_of(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let before = bytes.len().checked_sub(TRAILER_BYTES)?;
    let length = bytes[before + 12..].first_chunk::<4>().map(|bytes| u32::from_le_bytes(*bytes) as usize)?;
    let start = before.checked_sub(length)?;
    Some((start, &bytes[start..before]))
}

fn meta_of(bytes: &[u8]) -> PackMeta {
    let footer = footer_of(bytes).map_or(&[][..], |(_, footer)| footer);
    let number = |at: usize| {
        footer.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    };
    PackMeta {
        name: PackName::new(WriterId::from_u64(number(0)), number(8)),
        footer_digest: FooterDigest::from_bytes(*blake3::hash(footer).as_bytes()),
        plain_len: number(24) & 0xffff_ffff,
        stored_len: bytes.len() as u64,
    }
}

/// Cells get their hashes, the trailer that of the footer.
fn reseal_pack(bytes: &mut [u8]) {
    let Some((start, footer)) = footer_of(bytes) else { return };
    let (length, mut stored_at) = (footer.len(), 0);
    for at in (start + 48..start + length).step_by(48) {
        let Some(record) = bytes.get(at..at + 16) else { break };
        let field = |at: usize| {
            u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]) as usize
        };
        let (stored, plain, encoding) = (field(4), field(8), record[12]);
        let Some(cell) = bytes.get(stored_at..stored_at + stored) else { break };
        let stored_hash: [u8; 16] = seal::short(&[cell]);
        let opened =
            (encoding == 1).then(|| zstd::bulk::decompress(cell, plain.min(64 << 10)).ok()).flatten();
        let plain_hash: [u8; 16] = opened.map_or(stored_hash, |plain| seal::short(&[&plain]));
        bytes[at + 16..at + 32].copy_from_slice(&stored_hash);
        if at + 48 <= bytes.len() {
            bytes[at + 32..at + 48].copy_from_slice(&plain_hash);
        }
        stored_at += stored;
    }
    let digest: [u8; 16] = seal::short(&[&bytes[start..start + length]]);
    let end = bytes.len();
    bytes[end - 16..].copy_from_slice(&digest);
}

fn pack_seeds() -> Vec<Vec<u8>> {
    let mut random = Random::new(1);
    let packs: [Vec<Vec<u8>>; 4] = [
        vec![b"hello".to_vec()],
        vec![vec![7; 3000], random.bytes(900), b"x".to_vec()],
        vec![vec![0; 200_000]],
        vec![vec![1; 60_000], vec![2; 60_000], random.bytes(10)],
    ];
    let pack = |pieces: Vec<Vec<u8>>| {
        let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(7), 1));
        pieces.iter().for_each(|piece| {
            builder.add(piece).expect("it fits");
        });
        builder.finish().expect("it has pieces").bytes.to_vec()
    };
    packs.into_iter().map(pack).collect()
}

const TRAILER_BYTES: usize = 32;
/// Where the header of a snapshot has its position's LSN.
const LSN_AT: usize = 64;
