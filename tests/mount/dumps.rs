//! A dump is portable and complete: loaded and dumped again it is the same file, but for what the format document names.

use std::{
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, symlink},
    },
    path::Path,
};

use murphy_tests::{DumpBlock, DumpFile, Scratch, TreeRules, can_mount, compare_directories, free_address};
use rustix::fs::{FileType, Mode, XattrFlags};

/// Everything that a tree can hold.
fn sow(root: &Path) {
    fs::create_dir_all(root.join("deep/er")).unwrap();
    for number in 0..300 {
        let text = format!("line {number}\n").repeat(number);
        fs::write(root.join(format!("deep/er/{number:03}")), text).unwrap();
    }
    let large: Vec<u8> = (0..5_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(root.join("large"), large).unwrap();
    fs::hard_link(root.join("large"), root.join("deep/linked")).unwrap();
    symlink("deep/er/007", root.join("soft")).unwrap();
    fs::File::create(root.join("sparse")).unwrap().set_len(1 << 26).unwrap();
    rustix::fs::setxattr(root.join("soft"), "user.a", b"value", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(root.join("deep"), "user.b", &[0, 255, 7], XattrFlags::empty()).unwrap();
    let mode = Mode::from_raw_mode(0o640);
    rustix::fs::mknodat(rustix::fs::CWD, root.join("pipe"), FileType::Fifo, mode, 0).unwrap();
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"\xff not text \n")), "x").unwrap();
    fs::create_dir(root.join("empty")).unwrap();
}

/// What `docs/formats/snapshot.md` says that a load changes in the header.
const HEADER_CHANGES: [&str; 7] = ["epoch", "epoch id", "branch", "LSN", "chain hash", "created", "checksum"];
/// The tables whose rows a load replaces: sessions, members, replies, settings.
const OWN_TABLES: std::ops::RangeInclusive<u8> = 10..=13;

fn is_own(block: &DumpBlock) -> bool {
    block.rows.first().is_some_and(|(key, _)| OWN_TABLES.contains(&key[0]))
}

/// Holds two dumps against each other, byte by byte but for what a load changes.
fn assert_same_tree(first: &DumpFile, second: &DumpFile) {
    for (field, bytes) in &first.header {
        let is_equal = second.header[field] == *bytes;
        // What always changes is compared too: a mask that hides nothing hides too much.
        assert_eq!(is_equal, !HEADER_CHANGES.contains(field), "{field} of the header");
    }
    let tree = |dump: &DumpFile| -> Vec<DumpBlock> {
        dump.blocks.iter().filter(|block| !is_own(block)).cloned().collect()
    };
    let (one, other) = (tree(first), tree(second));
    assert_eq!(one.len(), other.len(), "blocks of the tree");
    for (at, (one, other)) in one.iter().zip(&other).enumerate() {
        assert!(one.head == other.head && one.payload == other.payload, "block {at}, kind {}", one.kind);
    }
    assert_eq!(first.footer.digest, second.footer.digest);
    let counts = |dump: &DumpFile| -> Vec<(u8, u64)> {
        let tables = dump.footer.tables.iter();
        tables.filter(|(table, _)| !OWN_TABLES.contains(table)).map(|(table, rows)| (*table, *rows)).collect()
    };
    assert_eq!(counts(first), counts(second));
    let listed = |dump: &DumpFile| -> Vec<(u8, u32, u32)> {
        let blocks = dump.footer.blocks.iter().zip(&dump.blocks);
        blocks.filter(|(_, block)| !is_own(block)).map(|(listed, _)| *listed).collect()
    };
    assert_eq!(listed(first), listed(second));
    assert_eq!(first.trailer[8..], second.trailer[8..]);
}

/// The rows of one table.
fn rows_of(dump: &DumpFile, table: u8) -> Vec<(Vec<u8>, Vec<u8>)> {
    let rows = dump.blocks.iter().flat_map(|block| &block.rows);
    rows.filter(|(key, _)| key[0] == table).cloned().collect()
}

/// What was dumped is everything, or a copy of a copy is less than the first; and the copy is a volume to work with.
#[test]
fn a_loaded_dump_dumps_to_the_same_bytes_and_takes_changes() {
    if !can_mount("a_loaded_dump_dumps_to_the_same_bytes_and_takes_changes") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let (blocks, archive) = (scratch.url("blocks"), format!("{}?domain=elsewhere", scratch.url("archive")));
    let format = ["format", "node", "--blocks", &blocks, "--archive", &archive, "--ack", "archive"];
    scratch.run(format.iter().chain(&["--window", "7d", "--name", "home"])).expect_code(0);
    scratch.make_dir("mnt");
    scratch.run(["mount", "node", "mnt", "-d", "--listen", &free_address()]).expect_code(0);
    sow(&scratch.path("mnt"));
    let token = scratch.run(["invite", "mnt"]).expect_code(0).stdout();
    fs::write(scratch.path("token"), token).unwrap();
    let dump = |source: &str, file: &str| {
        scratch.run(["dump", source, file]).expect_code(0);
        DumpFile::parse(&fs::read(scratch.path(file)).unwrap())
    };
    let first = dump("mnt", "first.murphy");
    let load = |file: &str, node: &str| {
        scratch.run(["load", file, node, "--blocks", &blocks]).expect_code(0);
    };
    load("first.murphy", "second");
    let second = dump("second", "second.murphy");
    load("second.murphy", "third");
    let third = dump("third", "third.murphy");
    for (one, other) in [(&first, &second), (&second, &third), (&first, &third)] {
        assert_same_tree(one, other);
    }
    for (one, other) in [(&first, &second), (&second, &third)] {
        assert_own_rows(one, other);
    }
    scratch.mount("second", "copy");
    let (source, copy) = (scratch.path("mnt"), scratch.path("copy"));
    assert_eq!(compare_directories(&source, &copy, TreeRules::COPY).unwrap(), []);
    let highest_number = |root: &Path| -> u64 {
        let files = fs::read_dir(root.join("deep/er")).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().ino()).max().unwrap()
    };
    let highest = highest_number(&copy);
    fs::write(copy.join("deep/er/created"), "in the copy").unwrap();
    fs::remove_file(copy.join("deep/er/100")).unwrap();
    assert!(highest_number(&copy) > highest, "the number of an inode was given again");
    scratch.run(["flush", "copy"]).expect_code(0);
    assert_eq!(fs::read_to_string(copy.join("deep/er/created")).unwrap(), "in the copy");
    assert!(source.join("deep/er/100").exists() && !source.join("deep/er/created").exists());
    scratch.run(["umount", "copy"]).expect_code(0);
    scratch.run(["fsck", "second", "--data"]).expect_code(0);
    scratch.run(["fsck", "mnt", "--data"]).expect_code(0);
}

/// What a load does to the rows that are the volume's own affairs.
fn assert_own_rows(dumped: &DumpFile, loaded: &DumpFile) {
    let [sessions, members, replies, settings] = [10, 11, 12, 13].map(|table| rows_of(loaded, table));
    let mut ended = rows_of(dumped, 10);
    // The last byte of a session's row says whether it is over.
    ended.iter_mut().for_each(|(_, row)| *row.last_mut().unwrap() = 1);
    assert_eq!(sessions[..ended.len()], ended[..], "every session of the source is over");
    assert_eq!(sessions.len(), ended.len() + 1, "there is one of the process that loaded");
    assert_eq!((members, replies), (Vec::new(), Vec::new()), "members and replies of the source");
    let mut expected = rows_of(dumped, 13);
    for (key, row) in &mut expected {
        // A key is the table, eight zeros and a name; a row begins with its version.
        match &key[9..] {
            b"ack" => *row = b"\0local".to_vec(),
            b"archives" => *row = b"\0[]".to_vec(),
            _ => {}
        }
    }
    assert_eq!(settings, expected);
}
