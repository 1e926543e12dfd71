//! Mirrors whose log is damaged, ends too early, or has parted from the volume's, with real processes and mounts: what they lack comes from
//! whoever has it, and what they have stays.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use murphy_tests::{can_mount, free_address};

use super::{
    members::{packs_of, wait_for_addresses, wait_for_bytes},
    mirrors::{Pair, wait_for, write_safely},
};

/// The newest segment of a node's log, and how much of it is in use.
fn newest_segment(pair: &Pair, node: &str) -> (PathBuf, u64) {
    let names = fs::read_dir(pair.scratch.path(&format!("{node}/log"))).unwrap();
    let segments = names.map(|entry| entry.unwrap().path());
    let newest = segments.filter(|path| path.extension().is_some_and(|ending| ending == "seg")).max();
    let newest = newest.unwrap();
    let bytes = fs::read(&newest).unwrap();
    (newest, bytes.iter().rposition(|byte| *byte != 0).unwrap() as u64 + 1)
}

/// Flips a bit in the first half of what a log holds: behind it comes what proves that it was durable.
fn flip(pair: &Pair, node: &str) {
    let (path, used) = newest_segment(pair, node);
    let mut bytes = fs::read(&path).unwrap();
    // In a frame: a mark alone is stepped over.
    let third = (used / 3) as usize;
    let mark = bytes[third..].windows(4).position(|window| window == b"MsyX").unwrap();
    bytes[third + mark + 100] ^= 4;
    File::options().write(true).open(path).unwrap().write_all_at(&bytes, 0).unwrap();
}

/// Takes the second half of what a log holds away: only the index knows that it was there.
fn cut(pair: &Pair, node: &str) {
    let (path, used) = newest_segment(pair, node);
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&vec![0; (used - used / 2) as usize], used / 2).unwrap();
}

/// Whoever looks at a damaged mirror is told what to do, and no file is changed.
fn assert_looks_change_nothing(pair: &Pair) {
    let scratch = &pair.scratch;
    for (node, store) in [("b", "bb"), ("c", "bc")] {
        let before = scratch.prints_of(node);
        for (command, code) in [("status", 1), ("fsck", 3)] {
            let said = scratch.run([command, node]).expect_error(code, "durable").stderr();
            for part in ["start this mirror again", "murphy join NEW-DIR", &scratch.url(store)] {
                assert!(said.contains(part), "no {part} in {said}");
            }
        }
        let after = scratch.prints_of(node);
        let changed: Vec<_> = after.iter().filter(|(path, print)| before.get(*path) != Some(print)).collect();
        assert!(
            changed.is_empty() && after.len() == before.len(),
            "a look has changed {changed:?} of {node}"
        );
    }
}

/// The fear: the region of the source is gone, the one mirror has a rotten sector, and an archive has everything that it takes; but the mirror
/// is opened by nothing, and nobody says what to do. Or it is opened with less than it has acknowledged.
#[test]
fn damaged_mirrors_are_promoted_and_follow_with_what_an_archive_or_a_member_has() {
    if !can_mount("damaged_mirrors_are_promoted_and_follow_with_what_an_archive_or_a_member_has") {
        return;
    }
    let pair = Pair::start("local");
    let scratch = &pair.scratch;
    let (ma, mb, mc) = (scratch.path("ma"), scratch.path("mb"), scratch.path("mc"));
    let url = format!("{}?domain=elsewhere", scratch.url("archive"));
    scratch.run(["archive", "add", "ma", &url]).expect_code(0);
    pair.join("a", "c", "bc");
    pair.mount("c", &free_address());
    wait_for_addresses(&pair, "a", 2);
    let files: Vec<(String, Vec<u8>)> = (0..30)
        .map(|i| (format!("file {i}"), format!("line {i}\n").repeat(1 + i * 700).into_bytes()))
        .collect();
    for (name, bytes) in &files {
        write_safely(&ma.join(name), bytes).unwrap();
    }
    pair.settle();
    wait_for_bytes(&pair, "a", "c");
    let wanted = pair.status("a")["durable_lsn"].as_u64();
    wait_for("the archive", || pair.status("a")["archives"][0]["lsn"].as_u64() >= wanted);
    let (held, listened) = (pair.status("b")["durable_lsn"].as_u64(), [pair.listens("b"), pair.listens("c")]);
    for mount in ["mb", "mc"] {
        scratch.run(["umount", mount]).expect_code(0);
    }
    pair.lose_source();
    flip(&pair, "b");
    cut(&pair, "c");

    let (place, away) = (scratch.path("archive"), scratch.path("away"));
    fs::rename(&place, &away).unwrap();
    assert_looks_change_nothing(&pair);
    // Nobody who has it answers: it says who was asked, and goes on with nothing less.
    let before = scratch.prints_of("b/log");
    let said =
        scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "nobody who answers").stderr();
    assert!(said.contains("archive") && said.contains("damaged at lsn"), "{said}");
    assert!(scratch.prints_of("b/log") == before, "something was changed");
    let said = scratch.run(["serve", "c"]).expect_error(1, "nobody who answers").stderr();
    assert!(said.contains("is known to have been durable") && said.contains(&listened[0]), "{said}");
    fs::rename(&away, &place).unwrap();

    let said = scratch.run(["promote", "b", "--confirm", "vol", "--json"]).expect_code(0).json();
    assert_eq!(said["lost_entries"], 0, "{said}");
    pair.mount("b", &listened[0]);
    let kept = |place: &PathBuf| {
        for (name, bytes) in &files {
            assert!(fs::read(place.join(name)).unwrap() == *bytes, "{name}");
        }
    };
    kept(&mb);
    assert!(pair.status("b")["durable_lsn"].as_u64() > held, "with an epoch of its own behind all of it");
    scratch.run(["fsck", "b", "--data"]).expect_code(0);

    // The other one gets the end of its log back, and follows the new source with it.
    pair.mount("c", &listened[1]);
    assert!(pair.status("c")["durable_lsn"].as_u64() >= held, "{}", pair.status("c"));
    write_safely(&mb.join("later"), b"at the new source").unwrap();
    wait_for_bytes(&pair, "b", "c");
    kept(&mc);
    assert_eq!(fs::read(mc.join("later")).unwrap(), b"at the new source");
    assert_eq!(pair.status("c")["branches"].as_array().map(Vec::len), Some(0), "{}", pair.status("c"));

    // The last way out: another member, over the same packs.
    scratch.run(["umount", "mc"]).expect_code(0);
    scratch.run(["fsck", "c", "--data"]).expect_code(0);
    flip(&pair, "c");
    let packs = packs_of(&pair, "bc");
    pair.join("b", "d", "bc");
    pair.mount("d", &free_address());
    wait_for_bytes(&pair, "b", "d");
    kept(&scratch.path("md"));
    assert!(!packs.is_empty() && packs.is_subset(&packs_of(&pair, "bc")), "packs were copied again");
}

/// The fear: a mirror that was ahead of the one that was promoted gives everything up for that, and holds nothing until it was seeded anew; and
/// nobody can read what it has put aside.
#[test]
fn a_mirror_whose_history_parted_goes_back_to_where_and_its_branch_can_be_read() {
    if !can_mount("a_mirror_whose_history_parted_goes_back_to_where_and_its_branch_can_be_read") {
        return;
    }
    let pair = Pair::start("local");
    let scratch = &pair.scratch;
    let (ma, mb, mc) = (scratch.path("ma"), scratch.path("mb"), scratch.path("mc"));
    pair.join("a", "c", "bc");
    pair.mount("c", &free_address());
    wait_for_addresses(&pair, "a", 2);
    write_safely(&ma.join("shared"), b"on all").unwrap();
    pair.settle();
    let listened = [pair.listens("b"), pair.listens("c")];
    pair.kill("b");
    write_safely(&ma.join("alone"), &[7; 300_000]).unwrap();
    wait_for_bytes(&pair, "a", "c");
    pair.kill("c");
    pair.lose_source();
    pair.mount("b", &listened[0]);
    scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0);
    write_safely(&mb.join("other"), b"at the new source").unwrap();
    pair.mount("c", &listened[1]);
    wait_for("the mirror to go on with the new source", || {
        fs::read(mc.join("other")).is_ok_and(|read| read == b"at the new source")
    });
    wait_for_bytes(&pair, "b", "c");
    assert_eq!(fs::read(mc.join("shared")).unwrap(), b"on all");
    assert!(!mc.join("alone").exists());
    let said = fs::read_to_string(scratch.path("c/murphy.log")).unwrap();
    assert_eq!(said.matches("receiving a snapshot").count(), 1, "only when it had joined: {said}");

    let branches = pair.status("c")["branches"].clone();
    let [branch] = &branches.as_array().unwrap()[..] else { panic!("{branches}") };
    let (_, place) = branch.as_str().unwrap().rsplit_once(" in ").unwrap();
    let branch = format!("c/{place}");
    scratch.run(["fsck", &branch, "--data"]).expect_code(0);
    for command in [&["promote", &branch, "--confirm", "vol"][..], &["serve", &branch]] {
        let refused = scratch.run(command).expect_error(1, "put aside").stderr();
        assert!(refused.contains("murphy dump") && refused.contains(&scratch.url("bc")), "{refused}");
    }
    scratch.run(["dump", &branch, "tail"]).expect_code(0);
    scratch.run(["load", "tail", "copy", "--blocks", &scratch.url("bc")]).expect_code(0);
    let copy = scratch.mount("copy", "mcopy");
    assert_eq!(fs::read(copy.join("alone")).unwrap(), [7; 300_000]);
    assert!(!copy.join("other").exists());
    scratch.run(["umount", "mcopy"]).expect_code(0);
    scratch.run(["umount", "mc"]).expect_code(0);
    scratch.run(["fsck", "c", "--data"]).expect_code(0);
}
