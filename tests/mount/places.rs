//! Stores in directories: who may read them, and what is left of one when nothing came of it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use murphy_tests::{PATIENCE, Scratch, can_mount, free_address, wait_until};

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

/// Every file and directory below `root`, and itself.
fn all_below(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned()];
    let mut at = 0;
    while let Some(path) = found.get(at).cloned() {
        at += 1;
        if path.is_dir() {
            found.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    found
}

/// The fear: whoever has an account on the machine reads the bytes of private files out of the packs, and names out of log and dump.
#[test]
fn what_the_program_makes_is_readable_by_its_owner_alone() {
    if !can_mount("what_the_program_makes_is_readable_by_its_owner_alone") {
        return;
    }
    let scratch = scratch();
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    scratch.run(["format", "node", "--blocks", &scratch.url("blocks"), "--archive", &archive]).expect_code(0);
    scratch.mount("node", "mnt");
    fs::write(scratch.path("mnt/secret"), vec![7; 100_000]).unwrap();
    scratch.run(["flush", "mnt"]).expect_code(0);
    scratch.run(["dump", "mnt", "tree"]).expect_code(0);
    let packs = || all_below(&scratch.path("blocks/packs")).iter().any(|path| path.is_file());
    wait_until("a pack", PATIENCE, packs);
    scratch.umount("mnt");
    for root in ["node", "blocks", "archive", "tree"] {
        for path in all_below(&scratch.path(root)) {
            let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
        }
    }
}

/// The fear: a typing error leaves a store behind that nobody made on purpose, and the next try meets it.
#[test]
fn a_node_that_is_refused_leaves_no_store_behind() {
    let scratch = scratch();
    let inside = scratch.url("node/blocks");
    let blocks = scratch.url("blocks");
    scratch.run(["format", "node", "--blocks", &inside]).expect_error(2, "lies in");
    scratch.run(["format", "node", "--blocks", &blocks, "--archive", &inside]).expect_error(2, "--archive");
    assert!(!scratch.path("node").exists() && !scratch.path("blocks").exists());
    fs::write(scratch.make_dir("full").join("x"), "x").unwrap();
    let full = scratch.url("full");
    scratch.run(["format", "node", "--blocks", &scratch.url("deep/er"), "--archive", &full]).expect_code(1);
    assert!(!scratch.path("node").exists() && !scratch.path("deep").exists());
    scratch.format("node", "blocks");
    scratch.run(["dump", "node", "tree"]).expect_code(0);
    scratch.run(["load", "tree", "copy", "--blocks", &scratch.url("copy/blocks")]).expect_error(2, "lies in");
    assert!(!scratch.path("copy").exists());
    scratch.run(["serve", "node", "-d", "--listen", &free_address()]).expect_code(0);
    let token = scratch.run(["invite", "node"]).expect_code(0).stdout();
    fs::write(scratch.path("token"), token).unwrap();
    let join = |node: &str, blocks: &str| {
        scratch.run(["join", node, "--token-file", "token", "--blocks", &scratch.url(blocks)])
    };
    join("mirror", "mirror/blocks").expect_error(2, "lies in");
    join("mirror", "mirror-blocks").expect_code(0);
    join("second", "second-blocks").expect_code(1);
    assert!(!scratch.path("second").exists() && !scratch.path("second-blocks").exists());
}

/// The fear: the mark of a copy that was refused keeps the store from whoever it belongs to.
#[test]
fn a_dump_without_its_packs_leaves_no_store_behind() {
    if !can_mount("a_dump_without_its_packs_leaves_no_store_behind") {
        return;
    }
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.mount("node", "mnt");
    fs::write(scratch.path("mnt/file"), vec![7; 100_000]).unwrap();
    scratch.run(["dump", "mnt", "tree"]).expect_code(0);
    scratch.umount("mnt");
    scratch.run(["load", "tree", "copy", "--blocks", &scratch.url("other")]).expect_error(1, "lacks 1 packs");
    scratch.make_dir("empty");
    scratch.run(["load", "tree", "copy", "--blocks", &scratch.url("empty")]).expect_error(1, "lacks 1 packs");
    assert!(!scratch.path("copy").exists() && !scratch.path("other").exists());
    assert_eq!(all_below(&scratch.path("empty")).len(), 1);
}
