//! The program with a mount: what a user does, and what a power cut or a kill does to it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use murphy_tests::{Scratch, assert_same_tree, can_mount, copy_tree, output_of, skip};
use rustix::process::Signal;

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

/// A tree with what a file system must keep: links, times, modes, sparse and large files.
fn sow(place: &Path) {
    fs::create_dir_all(place.join("deep/er")).unwrap();
    fs::write(place.join("small"), b"some text\n").unwrap();
    fs::write(place.join("empty"), b"").unwrap();
    let large: Vec<u8> = (0..6_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(place.join("deep/large"), large).unwrap();
    fs::hard_link(place.join("small"), place.join("deep/link")).unwrap();
    std::os::unix::fs::symlink("../small", place.join("deep/soft")).unwrap();
    for i in 0..200 {
        fs::write(place.join(format!("deep/er/{i}")), format!("file {i}\n").repeat(i)).unwrap();
    }
    fs::File::create(place.join("sparse")).unwrap().set_len(64 << 20).unwrap();
}

struct Mounted {
    scratch: Scratch,
    tree: PathBuf,
    mount: PathBuf,
}

/// A mounted volume with a copy of a tree in it.
fn mounted() -> Mounted {
    let scratch = scratch();
    let tree = scratch.make_dir("tree");
    sow(&tree);
    scratch.format("node", "blocks");
    let mount = scratch.make_dir("mnt");
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0).stdout();
    copy_tree(&tree, &mount);
    Mounted { scratch, tree, mount }
}

/// The promise of every file system, and of `umount` on top of it.
#[test]
fn a_tree_survives_umount_and_remount() {
    if !can_mount("a_tree_survives_umount_and_remount") {
        return;
    }
    let Mounted { scratch, tree, mount } = mounted();
    assert_same_tree(&tree, &mount.join("tree"));
    let live = scratch.run(["fsck", "node", "--data", "--json"]).expect_code(0).json();
    assert_eq!(live["findings"], 0);
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
    scratch.wait_for_the_end();
    assert!(fs::read_dir(&mount).unwrap().next().is_none());
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0).stdout();
    assert_same_tree(&tree, &mount.join("tree"));
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
    let summary = scratch.run(["fsck", "node", "--data", "--json"]).expect_code(0).json();
    assert!(summary["verified_bytes"].as_u64().unwrap() > 10_000, "{summary}");
}

/// A crash may cost what nobody has made durable, and nothing else; the dead mount must not be in the way.
#[test]
fn what_was_flushed_survives_a_kill() {
    if !can_mount("what_was_flushed_survives_a_kill") {
        return;
    }
    let Mounted { scratch, tree, mount } = mounted();
    scratch.run(["flush", "mnt"]).expect_code(0).stdout();
    fs::write(mount.join("late"), b"not flushed").unwrap();
    scratch.signal_all(Signal::KILL);
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0).stdout();
    assert_same_tree(&tree, &mount.join("tree"));
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
    assert_eq!(scratch.run(["fsck", "node", "--data", "--json"]).expect_code(0).json()["findings"], 0);
}

/// The index is derived: without it the tree is the same.
#[test]
fn a_lost_index_is_made_anew() {
    if !can_mount("a_lost_index_is_made_anew") {
        return;
    }
    let Mounted { scratch, tree, mount } = mounted();
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
    let before = scratch.run(["status", "node", "--json"]).expect_code(3).json();
    fs::remove_dir_all(scratch.path("node/index")).unwrap();
    let after = scratch.run(["status", "node", "--json"]).expect_code(3).json();
    assert_eq!(before["digest"], after["digest"]);
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0).stdout();
    assert_same_tree(&tree, &mount.join("tree"));
}

/// What systemd and docker send must lose nothing.
#[test]
fn a_signal_ends_it_with_everything_durable() {
    if !can_mount("a_signal_ends_it_with_everything_durable") {
        return;
    }
    let Mounted { scratch, tree, mount } = mounted();
    scratch.signal_all(Signal::TERM);
    assert!(fs::read_dir(&mount).unwrap().next().is_none(), "the mount went with it");
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0).stdout();
    assert_same_tree(&tree, &mount.join("tree"));
}

/// Two mount points are two caches in the kernel: what was created at one stayed missing at the other.
#[test]
fn a_second_mount_point_is_refused_and_the_first_goes_on() {
    if !can_mount("a_second_mount_point_is_refused_and_the_first_goes_on") {
        return;
    }
    let Mounted { scratch, tree, mount } = mounted();
    scratch.make_dir("second");
    let refused = format!("mounted already, at {}", mount.display());
    scratch.run(["mount", "node", "second", "-d"]).expect_error(1, &refused);
    assert_eq!(scratch.processes().len(), 1);
    assert_same_tree(&tree, &mount.join("tree"));
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
    scratch.wait_for_the_end();
}

/// One process serves a node; to mount it is to ask that process, which stays when it is unmounted.
#[test]
fn a_node_that_is_served_mounts_unmounts_and_mounts_again() {
    if !can_mount("a_node_that_is_served_mounts_unmounts_and_mounts_again") {
        return;
    }
    let Mounted { scratch, tree, mount } = mounted();
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
    scratch.wait_for_the_end();
    scratch.run(["serve", "node", "-d"]).expect_code(0).stdout();
    let second = scratch.make_dir("second");
    for (name, path) in [("mnt", &mount), ("second", &second), ("mnt", &mount)] {
        scratch.run(["mount", "node", name, "-d"]).expect_code(0).stdout();
        assert_eq!(scratch.processes().len(), 1);
        assert_same_tree(&tree, &path.join("tree"));
        let status = scratch.run(["status", name, "--json"]).expect_code(3).json();
        assert_eq!(status["running"]["mounts"], serde_json::json!([path]));
        scratch.run(["umount", name]).expect_code(0).stdout();
        assert!(fs::read_dir(path).unwrap().next().is_none());
    }
}

/// A shell that stands in the mount must not make `umount` fail halfway.
#[test]
fn a_busy_mount_stays_and_works() {
    if !can_mount("a_busy_mount_stays_and_works") {
        return;
    }
    let Mounted { scratch, tree, mount } = mounted();
    let open = fs::File::open(mount.join("tree/small")).unwrap();
    scratch.run(["umount", "mnt"]).expect_error(1, "in use");
    assert_same_tree(&tree, &mount.join("tree"));
    drop(open);
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
}

/// Mounting over something would hide it.
#[test]
fn a_bad_mount_point_is_one_error_and_changes_nothing() {
    if !can_mount("a_bad_mount_point_is_one_error_and_changes_nothing") {
        return;
    }
    let scratch = scratch();
    scratch.format("node", "blocks");
    fs::write(scratch.make_dir("full").join("x"), b"x").unwrap();
    fs::write(scratch.path("file"), b"x").unwrap();
    for (mount, error) in [("full", "not empty"), ("file", "not a directory"), ("none", "does not exist")] {
        scratch.run(["mount", "node", mount, "-d"]).expect_error(1, error);
        scratch.run(["mount", "node", mount]).expect_error(1, error);
        assert!(scratch.processes().is_empty());
    }
    scratch.run(["umount", "full"]).expect_error(1, "not a mount point of murphy");
    scratch.run(["flush", "full"]).expect_error(1, "not a mount point of murphy");
}

/// A pack that is gone or rotten must be found before somebody needs it.
#[test]
fn fsck_finds_a_damaged_and_a_missing_pack() {
    if !can_mount("fsck_finds_a_damaged_and_a_missing_pack") {
        return;
    }
    let Mounted { scratch, .. } = mounted();
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
    let packs = scratch.bytes_of("blocks/packs").into_iter().filter(|(_, bytes)| bytes.len() > 1000);
    let (path, mut bytes) = packs.max().unwrap();
    bytes[700] ^= 1;
    fs::write(&path, &bytes).unwrap();
    scratch.run(["fsck", "node"]).expect_code(0).stdout();
    let found = scratch.run(["fsck", "node", "--data"]).expect_code(3).stdout();
    assert!(found.contains("1 findings"), "{found}");
    fs::remove_file(&path).unwrap();
    let found = scratch.run(["fsck", "node"]).expect_code(3).stdout();
    assert!(found.contains("does not exist"), "{found}");
}

/// The fear: whoever mounts a served node believes that it listens, or writes back early, and it does not.
#[test]
fn options_that_a_served_node_would_ignore_are_refused() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.make_dir("mnt");
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    let mount = ["mount", "node", "mnt", "-d"];
    let given = ["--listen", "127.0.0.1:0", "--flush-after", "1s", "--io-timeout", "9s", "--cache-size", "0"];
    let refused = scratch.run(mount.iter().chain(&given));
    let named = "without the --listen and --flush-after and --io-timeout and --cache-size given here";
    let refused = refused.expect_error(2, named).stderr();
    assert!(refused.contains("murphy umount") && refused.contains("SIGTERM"), "{refused}");
    let running = scratch.run(["status", "node", "--json"]).json()["running"].clone();
    assert_eq!(running["mounts"], serde_json::json!([]), "{running}");
}

/// The fear: on a bad night each command asks for another name of the same volume.
#[test]
fn a_loaded_volume_has_one_name_everywhere() {
    let scratch = scratch();
    let (blocks, archive) = (scratch.url("blocks"), format!("{}?domain=elsewhere", scratch.url("archive")));
    scratch.run(["format", "node", "--blocks", &blocks, "--name", "home"]).expect_code(0);
    scratch.run(["dump", "node", "tree"]).expect_code(0);
    let name = |node: &str| scratch.run(["status", node, "--json"]).json()["name"].clone();
    scratch.run(["load", "tree", "same", "--blocks", &blocks]).expect_code(0);
    assert_eq!(name("same"), "home");
    scratch.run(["load", "tree", "copy", "--blocks", &blocks, "--name", "other"]).expect_code(0);
    assert_eq!(name("copy"), "other");
    scratch.run(["archive", "add", "copy", &archive]).expect_code(0);
    let take_over = scratch.run(["restore", &archive, "next", "--take-over"]);
    let refused = take_over.expect_error(2, "has to be confirmed").stderr();
    assert!(refused.contains("--confirm other"), "{refused}");
}

/// The fear: a container, where whoever started the program leads a session that has no number in there.
#[test]
fn a_process_goes_into_the_background_in_a_process_namespace_of_its_own() {
    const TEST: &str = "a_process_goes_into_the_background_in_a_process_namespace_of_its_own";
    if !can_mount(TEST) {
        return;
    }
    let apart = |command: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--pid", "--fork", "--kill-child", "sh", "-c", command]);
        unshare
    };
    let allowed = output_of(&mut apart("true"));
    if !allowed.status.success() {
        return skip(TEST, String::from_utf8_lossy(&allowed.stderr).trim());
    }
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.make_dir("mnt");
    let program = env!("CARGO_BIN_EXE_murphy-program");
    let life = format!("{program} mount node mnt -d && echo kept > mnt/file && {program} umount mnt");
    let lived = output_of(apart(&life).current_dir(scratch.path("")));
    assert!(lived.status.success(), "{}", String::from_utf8_lossy(&lived.stderr));
    let mount = scratch.mount("node", "mnt");
    assert_eq!(fs::read(mount.join("file")).unwrap(), b"kept\n");
    scratch.umount("mnt");
}
