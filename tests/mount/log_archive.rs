//! Log archives: they hold every entry and no byte of a file. Whoever restores from one brings the block store, and is told when it is not there.

use std::fs;

use murphy_tests::{PATIENCE, Random, Scratch, can_mount, wait_for_ok};

/// A volume at rest whose log archive holds all of it; gives the archive, the last entry before there was a file, and what is in the file.
fn logged(scratch: &Scratch) -> (String, u64, Vec<u8>) {
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    let format = ["format", "node", "--name", "vol", "--blocks", &scratch.url("blocks"), "--log-archive"];
    scratch.run(format.iter().copied().chain([&archive[..]])).expect_code(0);
    let mount = scratch.mount("node", "mnt");
    let early = archived(scratch);
    let bytes = Random::new(3).bytes(100_000);
    fs::write(mount.join("file"), &bytes).unwrap();
    archived(scratch);
    scratch.umount("mnt");
    (archive, early, bytes)
}

fn archived(scratch: &Scratch) -> u64 {
    scratch.run(["flush", "mnt"]).expect_code(0);
    let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64();
    wait_for_ok("the archive", PATIENCE, || {
        let status = scratch.run(["status", "mnt", "--json"]).json();
        (status["archives"][0]["lsn"].as_u64() >= durable).then_some(()).ok_or(status)
    });
    durable.unwrap()
}

/// The fear: the restore of a log archive says that it is done, and every file of the copy is EIO.
#[test]
fn a_tree_without_its_bytes_is_not_restored_silently() {
    if !can_mount("a_tree_without_its_bytes_is_not_restored_silently") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let (archive, early, bytes) = logged(&scratch);

    // What it is worth is said by whoever verifies it, and by whoever plans with it.
    let verified = scratch.run(["verify", &archive]).expect_code(0).stdout();
    assert!(verified.contains("with the block store"), "{verified}");
    let before = scratch.bytes_of("archive");
    let plan = scratch.run(["restore", &archive, "copy", "--dry-run", "--json"]).expect_code(0).json();
    assert!(plan["problems"].to_string().contains("--blocks"), "{plan}");
    let planned = scratch.run(["restore", &archive, "copy", "--dry-run"]).expect_code(0).stdout();
    assert!(planned.contains("problem: "), "{planned}");
    let refused = scratch.run(["restore", &archive, "copy"]).expect_error(1, "holds packs");
    assert!(refused.stderr().contains("--blocks"), "the way out is not said: {refused}");
    assert!(!scratch.path("copy").exists(), "{refused}");
    assert!(scratch.bytes_of("archive") == before, "the refused restore has changed the archive");
    let left = fs::read_dir(scratch.path("")).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("copy")).collect();
    assert!(left.is_empty(), "{left:?} is left");

    // With the block store everything is there, and nothing is copied.
    let with = |node: &str, blocks: &str| {
        scratch.run(["restore", &archive, node, "--blocks", &scratch.url(blocks), "--json"])
    };
    let whole = with("whole", "blocks").expect_code(0).json();
    assert_eq!((&whole["missing_packs"], &whole["packs_copied"]), (&0.into(), &0.into()), "{whole}");
    let mount = scratch.mount("whole", "mnt");
    assert!(fs::read(mount.join("file")).unwrap() == bytes);
    scratch.umount("mnt");
    scratch.run(["fsck", "whole", "--data"]).expect_code(0);

    // With another one the packs are counted as missing, and the exit code says that something is wrong.
    scratch.make_dir("empty");
    let without = with("without", "empty").expect_code(3).json();
    assert_eq!(without["missing_packs"], 1, "{without}");
    scratch.run(["fsck", "without"]).expect_code(3);

    // A moment without any byte needs no store, and is restored.
    let to = early.to_string();
    let empty = scratch.run(["restore", &archive, "early", "--lsn", &to, "--json"]).expect_code(0).json();
    assert_eq!((&empty["lsn"], &empty["missing_packs"]), (&early.into(), &0.into()), "{empty}");
}

/// The fear: a successor begins without a byte, and its source has been sealed for that.
#[test]
fn a_take_over_without_the_bytes_seals_nothing() {
    if !can_mount("a_take_over_without_the_bytes_seals_nothing") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let (archive, _, bytes) = logged(&scratch);
    let take_over = ["restore", &archive, "next", "--take-over", "--confirm", "vol"];
    let plan = scratch.run(take_over.iter().copied().chain(["--dry-run", "--json"])).expect_code(0).json();
    assert!(plan["problems"].to_string().contains("--blocks"), "{plan}");
    let log = scratch.bytes_of("archive/log");
    let refused = scratch.run(take_over).expect_code(1);
    assert!(refused.stderr().contains("--blocks"), "{refused}");
    assert!(!scratch.path("next").exists() && scratch.bytes_of("archive/log") == log, "{refused}");
    let mount = scratch.mount("node", "mnt");
    assert!(fs::read(mount.join("file")).unwrap() == bytes, "the source goes on");
    scratch.umount("mnt");
}
