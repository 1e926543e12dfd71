//! The bytes of every row and key, as `docs/formats/rows.md` gives them: a change here is a change of the format.

use bytes::Bytes;
use murphy_log::Lsn;

use super::*;
use crate::{Ino, Kind, Name, RowKey, Timespec, XattrName};

const DOCUMENT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/formats/rows.md"));

/// Whether a value is read and written back as it was.
type Decodes = fn(&Bytes) -> bool;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Each line of the document's example block: its label and the bytes of it.
fn examples() -> Vec<(&'static str, String)> {
    let block = DOCUMENT.split("```golden\n").nth(1).expect("the document has its examples");
    let block = block.split("```").next().expect("the block ends");
    block
        .lines()
        .map(|line| {
            let (label, bytes) = line.split_once(':').expect("label: bytes");
            (label.trim(), bytes.split_whitespace().collect())
        })
        .collect()
}

fn time(seconds: i64) -> Timespec {
    Timespec { seconds, nanos: 7 }
}

fn inode(kind: Kind) -> InodeRow {
    InodeRow {
        mode: 0o644,
        uid: 1000,
        gid: 100,
        rdev: if matches!(kind, Kind::CharDevice | Kind::BlockDevice) { 0x0103 } else { 0 },
        size: match kind {
            Kind::File => 5000,
            Kind::Symlink => 6,
            _ => 0,
        },
        allocated: if kind == Kind::File { 4096 } else { 0 },
        extents: u64::from(kind == Kind::File),
        has_xattrs: kind == Kind::File,
        cookie: 0x1230,
        atime: time(1),
        mtime: if kind == Kind::Directory { Timespec::default() } else { time(2) },
        ..InodeRow::empty(kind, time(3))
    }
}

fn keys() -> Vec<(&'static str, Bytes)> {
    let ino = Ino::new(0x0102);
    vec![
        ("key inode", RowKey::inode(ino)),
        ("key directory", RowKey::directory(ino)),
        ("key dentry", RowKey::dentry(ino, 0x1230)),
        ("key extent", RowKey::extent(ino, 1 << 22)),
        ("key symlink", RowKey::symlink(ino)),
        ("key xattr", RowKey::xattr(ino, &XattrName::new("user.a").unwrap())),
        ("key link", RowKey::link(ino, Ino::ROOT, 0x1230)),
        ("key orphan", RowKey::orphan(ino)),
        ("key pack", RowKey::pack(0x0304)),
        ("key session", RowKey::session(0x0506)),
        ("key setting", RowKey::setting("ack")),
    ]
    .into_iter()
    .map(|(label, key)| (label, key.into_bytes()))
    .collect()
}

fn rows() -> Vec<(&'static str, Bytes)> {
    let named = |more| DentryRow {
        named: Some((Name::new("etc").unwrap(), Ino::new(0x0102), Kind::Directory)),
        more,
    };
    let extent = |target| ExtentRow { length: 4096, target }.encode();
    let directory = DirectoryRow { children: 300, subdirectories: 2, mtime: time(-1), ctime: Timespec::MAX };
    let pack = PackRow {
        writer: 0x0a0b,
        sequence: 200,
        footer_digest: [0xcc; 32],
        plain_bytes: 4 << 20,
        stored_bytes: 1 << 20,
        live_bytes: 4096,
        state: PackState::Here,
    };
    vec![
        ("row inode file", inode(Kind::File).encode()),
        ("row inode purged", InodeRow { purging: true, nlink: 0, cookie: 0, ..inode(Kind::File) }.encode()),
        ("row inode directory", inode(Kind::Directory).encode()),
        ("row inode symlink", inode(Kind::Symlink).encode()),
        ("row inode fifo", inode(Kind::Fifo).encode()),
        ("row inode char device", inode(Kind::CharDevice).encode()),
        ("row directory", directory.encode()),
        ("row dentry", named(false).encode()),
        ("row dentry below another", named(true).encode()),
        ("row dentry vacant", DentryRow { named: None, more: true }.encode()),
        ("row extent pack", extent(ExtentTarget::Pack { pack: PackNumber(0x0304), offset: 65536 })),
        ("row extent log", extent(ExtentTarget::Log { lsn: Lsn::new(0x0102), offset: 0 })),
        ("row symlink", SymlinkRow { target: Bytes::from_static(b"../etc") }.encode()),
        ("row xattr", XattrRow { value: Bytes::from_static(b"\0v") }.encode()),
        ("row orphan", OrphanRow.encode()),
        ("row pack", pack.encode()),
        ("row pack missing", PackRow { state: PackState::Missing, ..pack }.encode()),
        ("row pack found", PackRow { state: PackState::Found { at: Lsn::new(0x0506) }, ..pack }.encode()),
        ("row session", SessionRow { writer: 0x0a0b, pack_floor: 200, ended: true }.encode()),
        ("row setting", SettingRow { text: Bytes::from_static(b"local") }.encode()),
    ]
}

#[test]
fn every_key_and_row_has_the_bytes_of_the_document() {
    let made = keys().into_iter().chain(rows());
    let made: Vec<_> = made.map(|(label, bytes)| (label, hex(&bytes))).collect();
    let listing: String = made.iter().map(|(label, bytes)| format!("{label}: {bytes}\n")).collect();
    assert_eq!(made, examples(), "the code makes\n{listing}");
}

#[test]
fn the_bytes_of_the_document_are_read_back_and_every_cut_of_them_is_refused() {
    let decodes: [(&str, Decodes); 8] = [
        ("row inode", |value| InodeRow::decode(value).is_ok_and(|row| row.encode() == value)),
        ("row directory", |value| DirectoryRow::decode(value).is_ok_and(|row| row.encode() == value)),
        ("row dentry", |value| DentryRow::decode(value).is_ok_and(|row| row.encode() == value)),
        ("row extent", |value| ExtentRow::decode(value).is_ok_and(|row| row.encode() == value)),
        ("row orphan", |value| OrphanRow::decode(value).is_ok_and(|row| row.encode() == value)),
        ("row pack", |value| PackRow::decode(value).is_ok_and(|row| row.encode() == value)),
        ("row session", |value| SessionRow::decode(value).is_ok_and(|row| row.encode() == value)),
        ("row symlink", |value| SymlinkRow::decode(value).is_ok_and(|row| row.encode() == value)),
    ];
    for (label, value) in rows() {
        let Some((kind, decode)) = decodes.iter().find(|(kind, _)| label.starts_with(kind)) else {
            continue;
        };
        assert!(decode(&value), "{label}");
        // A symlink's target and a dentry's name have no length of their own.
        let lengthless = ["row symlink", "row dentry"].contains(kind);
        if !lengthless {
            assert!((0..value.len()).all(|end| !decode(&value.slice(..end))), "{label} cut");
            let longer = Bytes::from([&value[..], &[0]].concat());
            assert!(!decode(&longer), "{label} and a byte");
        }
    }
}
