//! A directory with very many names, read in pages while it changes, and over remounts.
//!
//! `MURPHY_ENTRIES` says how many names there are; the full measure is ten million.

use std::{collections::BTreeSet, fs, mem::MaybeUninit, path::Path};

use murphy_tests::{Random, Scratch, can_mount, number_from_env};
use rustix::fs::{Mode, OFlags, RawDir, SeekFrom};

/// The fear: a name is skipped or shown twice because others came and went, because somebody else reads the same directory, or because
/// the file system was mounted anew between two pages.
#[test]
fn a_huge_directory_is_read_once_while_it_changes_and_over_remounts() {
    if !can_mount("a_huge_directory_is_read_once_while_it_changes_and_over_remounts") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    scratch.format("node", "blocks");
    let directory = scratch.mount("node", "mnt").join("huge");
    fs::create_dir(&directory).unwrap();
    let entries = number_from_env("MURPHY_ENTRIES", ENTRIES);
    let lasting: BTreeSet<String> = (0..entries).map(|number| format!("lasting {number}")).collect();
    for name in &lasting {
        fs::File::create(directory.join(name)).unwrap();
    }
    let mut random = Random::new(4);
    // Two readers with places of their own, as of a directory that was opened, cloned and read twice.
    let (mut seen, mut cookies) = ([Vec::new(), Vec::new()], [Some(0), Some(0)]);
    for round in 0.. {
        for (seen, cookie) in seen.iter_mut().zip(&mut cookies) {
            if let Some(from) = *cookie {
                *cookie = page(&directory, from, 1 + random.index(PAGE), seen);
            }
        }
        if cookies == [None, None] {
            break;
        }
        for number in 0..20 {
            fs::File::create(directory.join(format!("passing {round} {number}"))).unwrap();
            if round > 0 {
                fs::remove_file(directory.join(format!("passing {} {number}", round - 1))).unwrap();
            }
        }
        if round % REMOUNT_EVERY == REMOUNT_EVERY - 1 && round < 3 * REMOUNT_EVERY {
            scratch.umount("mnt");
            scratch.mount("node", "mnt");
        }
    }
    for seen in seen {
        let stayed: Vec<&String> = seen.iter().filter(|name| name.starts_with("lasting")).collect();
        assert_eq!(stayed.len(), lasting.len(), "names are skipped or shown twice");
        assert!(stayed.into_iter().collect::<BTreeSet<_>>().into_iter().eq(&lasting));
        let passing = seen.iter().filter(|name| name.starts_with("passing"));
        assert_eq!(passing.clone().count(), passing.collect::<BTreeSet<_>>().len(), "a name is shown twice");
    }
    scratch.umount("mnt");
    scratch.run(["fsck", "node"]).expect_code(0);
}

/// Reads about `count` names from the place `from` on, with a descriptor of its own; says where to go on, if anything is left.
fn page(directory: &Path, from: u64, count: usize, names: &mut Vec<String>) -> Option<u64> {
    let opened = rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    rustix::fs::seek(&opened, SeekFrom::Start(from)).unwrap();
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let mut entries = RawDir::new(&opened, &mut buffer);
    let mut taken = 0;
    while let Some(entry) = entries.next() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_string_lossy();
        if name != "." && name != ".." {
            names.push(name.into_owned());
            taken += 1;
        }
        if taken == count {
            return Some(entry.next_entry_cookie());
        }
    }
    None
}

const ENTRIES: u64 = 6000;
/// Names in a page, at most.
const PAGE: usize = 700;
const REMOUNT_EVERY: usize = 4;
