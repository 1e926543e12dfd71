//! Archives, restores and dumps as a user runs them, with a mount at both ends.

use std::{collections::BTreeSet, fs, path::Path};

use murphy_log::SEGMENT_HEADER_BYTES;
use murphy_tests::{PATIENCE, Scratch, assert_same_tree, can_mount, copy_tree, wait_for_ok, wait_until};
use rustix::process::Signal;

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

fn sow(place: &Path) {
    fs::create_dir_all(place.join("a/b")).unwrap();
    for i in 0..100 {
        fs::write(place.join(format!("a/b/{i}")), format!("line {i}\n").repeat(i * 7)).unwrap();
    }
    fs::hard_link(place.join("a/b/7"), place.join("a/seven")).unwrap();
    std::os::unix::fs::symlink("b/9", place.join("a/nine")).unwrap();
}

/// A mounted source with an archive that claims another failure domain, and a tree in it that is archived.
fn archived() -> (Scratch, String) {
    let scratch = scratch();
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    scratch
        .run(["format", "node", "--name", "home", "--blocks", &scratch.url("blocks"), "--archive", &archive])
        .expect_code(0)
        .stdout();
    scratch.make_dir("mnt");
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0).stdout();
    sow(&scratch.path("mnt"));
    scratch.run(["flush", "mnt"]).expect_code(0).stdout();
    let flushed = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    wait_archived(&scratch, flushed);
    (scratch, archive)
}

fn wait_archived(scratch: &Scratch, lsn: u64) {
    wait_for_ok(&format!("lsn {lsn} in the archive"), PATIENCE, || {
        let status = scratch.run(["status", "mnt", "--json"]).json();
        let held = status["archives"][0]["lsn"].as_u64() >= Some(lsn);
        held.then_some(()).ok_or(status)
    });
}

/// The machine and its whole account are gone; what was archived is all there is, and it is everything.
#[test]
fn a_lost_region_comes_back_from_its_archive() {
    if !can_mount("a_lost_region_comes_back_from_its_archive") {
        return;
    }
    let (scratch, archive) = archived();
    let tree = scratch.make_dir("tree");
    copy_tree(&scratch.path("mnt/a"), &tree);
    let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    wait_archived(&scratch, durable);
    let verified = scratch.run(["verify", &archive, "--data", "100", "--json"]).expect_code(0).json();
    assert!(verified["packs_read"].as_u64() >= Some(1), "{verified}");
    scratch.signal_all(Signal::KILL);
    rustix::mount::unmount(scratch.path("mnt"), rustix::mount::UnmountFlags::DETACH).unwrap();
    fs::remove_dir_all(scratch.path("node")).unwrap();
    fs::remove_dir_all(scratch.path("blocks")).unwrap();
    let plan = scratch.run(["restore", &archive, "new", "--dry-run", "--json"]).expect_code(0).json();
    assert!(plan["entries"].as_u64() >= Some(100), "{plan}");
    assert!(!scratch.path("new").exists());
    let blocks = scratch.url("newblocks");
    let restored =
        scratch.run(["restore", &archive, "new", "--blocks", &blocks, "--json"]).expect_code(0).json();
    assert_eq!(restored["missing_packs"], 0);
    scratch.run(["mount", "new", "mnt", "-d"]).expect_code(0).stdout();
    assert_same_tree(&scratch.path("tree/a"), &scratch.path("mnt/a"));
    assert_eq!(scratch.run(["fsck", "mnt", "--data", "--json"]).expect_code(0).json()["findings"], 0);
}

/// The fear: on the morning after, all that is left is the URL of an archive, and to see what is in it a whole node has to be restored first.
#[test]
fn an_archive_is_looked_at_and_dumped_at_any_moment_without_a_node() {
    if !can_mount("an_archive_is_looked_at_and_dumped_at_any_moment_without_a_node") {
        return;
    }
    let (scratch, archive) = archived();
    let kept = scratch.make_dir("kept");
    sow(&kept);
    let then = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].to_string();
    fs::remove_dir_all(scratch.path("mnt/a/b")).unwrap();
    fs::write(scratch.path("mnt/later"), "later").unwrap();
    scratch.run(["flush", "mnt"]).expect_code(0);
    let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    wait_archived(&scratch, durable);
    scratch.umount("mnt");
    fs::rename(scratch.path("node"), scratch.path("away")).unwrap();
    let before = scratch.prints_of("archive");
    let held = scratch.run(["status", &archive, "--json"]).expect_code(0).json();
    assert_eq!((&held["name"], &held["kind"], &held["sealed"]), (&"home".into(), &"full".into(), &().into()));
    assert!(held["first"]["lsn"] == 2 && held["last"]["lsn"].as_u64() >= Some(durable), "{held}");
    let said = scratch.run(["status", &archive]).expect_code(0).stdout();
    assert!(
        said.contains("home") && said.contains("restores") && said.contains("verified    never"),
        "{said}"
    );
    assert!(scratch.prints_of("archive") == before, "whoever looks changes nothing");
    let dump = |more: &[&str]| scratch.run(["dump", &archive].iter().chain(more).copied());
    dump(&["now", "--json"]).expect_code(0);
    let lsn = dump(&["then", "--lsn", &then, "--json"]).expect_code(0).json()["lsn"].to_string();
    assert!(lsn.parse::<u64>().unwrap() <= then.parse().unwrap(), "{lsn} at {then}");
    dump(&["then"]).expect_error(1, "exists already");
    dump(&["never", "--at", "2001-01-01T00:00:00Z"]).expect_error(1, "before the first entry");
    scratch.run(["dump", "away", "past", "--at", "1s ago"]).expect_error(2, "a node is dumped as it is now");
    assert!(!scratch.path("never").exists() && !scratch.path("past").exists());
    let names = || fs::read_dir(scratch.path(".")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(names().all(|name| !name.to_string_lossy().contains("murphy-dump")), "nothing is left behind");
    let held = scratch.run(["status", &archive, "--json"]).expect_code(0).json();
    assert_eq!(held["pins"], serde_json::json!([]), "it is read no more");
    for (file, mount) in [("then", "mthen"), ("now", "mnow")] {
        let node = format!("node of {file}");
        scratch.run(["load", file, &node, "--blocks", &scratch.url("blocks")]).expect_code(0);
        scratch.mount(&node, mount);
    }
    assert_same_tree(&kept, &scratch.path("mthen"));
    assert_eq!(fs::read(scratch.path("mnow/later")).unwrap(), b"later");
    assert!(!scratch.path("mnow/a/b").exists());
}

/// What production, a rehearsal and another rehearsal do to the same tree; each leaves a tree that the others do not.
fn live_on(root: &Path, who: &str) {
    fs::write(root.join(format!("only in {who}")), who.repeat(50_000)).unwrap();
    fs::write(root.join("a/b/7"), format!("overwritten in {who}")).unwrap();
    fs::remove_file(root.join(format!("a/b/{}", 20 + who.len()))).unwrap();
    fs::rename(root.join("a/b/50"), root.join(format!("a/moved in {who}"))).unwrap();
    let grown = fs::File::options().append(true).open(root.join("a/b/60")).unwrap();
    std::io::Write::write_all(&mut &grown, who.as_bytes()).unwrap();
    grown.sync_all().unwrap();
}

/// A rehearsal must never disturb production: all three go on, and none sees another, nor does anything that production or its archive held
/// change.
#[test]
fn two_restored_copies_and_their_source_go_on_apart() {
    if !can_mount("two_restored_copies_and_their_source_go_on_apart") {
        return;
    }
    let (scratch, archive) = archived();
    let before = (scratch.prints_of("archive"), scratch.prints_of("blocks"));
    let branch = |node: &str| scratch.run(["status", node, "--json"]).json()["branch"].to_string();
    let position = || scratch.run(["status", "mnt", "--json"]).json()["position"].clone();
    let epoch = position()["epoch"].clone();
    // One copy reads its packs from the archive, the other has its own.
    let trees = [("production", "mnt"), ("first", "m1"), ("the second", "m2")];
    scratch.run(["restore", &archive, "first"]).expect_code(0);
    scratch.run(["restore", &archive, "the second", "--blocks", &scratch.url("blocks2")]).expect_code(0);
    for (node, mount) in &trees[1..] {
        scratch.mount(node, mount);
    }
    let branches = BTreeSet::from(["node", "first", "the second"].map(branch));
    assert_eq!(branches.len(), 3, "each has a branch of its own: {branches:?}");
    for (who, _) in trees {
        let shadow = scratch.make_dir(&format!("shadow of {who}"));
        sow(&shadow);
        live_on(&shadow, who);
    }
    std::thread::scope(|scope| {
        for (who, mount) in trees {
            let root = scratch.path(mount);
            scope.spawn(move || live_on(&root, who));
        }
    });
    for (who, mount) in trees {
        scratch.run(["flush", mount]).expect_code(0);
        assert_same_tree(&scratch.path(&format!("shadow of {who}")), &scratch.path(mount));
    }
    for (node, mount) in &trees[1..] {
        scratch.run(["umount", mount]).expect_code(0);
        let status = scratch.run(["status", node, "--json"]).expect_code(3).json();
        assert_eq!(status["archives"], serde_json::json!([]), "a copy has no archive until one is given");
        scratch.run(["fsck", node, "--data"]).expect_code(0);
    }
    // Production ships on in its own epoch, also as a process that begins anew: nobody has sealed it.
    scratch.run(["verify", &archive]).expect_code(0);
    scratch.umount("mnt");
    let mount = scratch.mount("node", "mnt");
    fs::write(mount.join("after a restart"), "of production").unwrap();
    fs::write(scratch.path("shadow of production/after a restart"), "of production").unwrap();
    scratch.run(["flush", "mnt"]).expect_code(0);
    let status = scratch.run(["status", "mnt", "--json"]).json();
    wait_archived(&scratch, status["durable_lsn"].as_u64().unwrap());
    let status = scratch.run(["status", "mnt", "--json"]).json();
    assert_eq!((&status["archives"][0]["error"], &position()["epoch"]), (&serde_json::Value::Null, &epoch));
    wait_for_ok("the proof of the archive", PATIENCE, || {
        let said = scratch.run(["status", "mnt"]).stdout();
        said.lines().any(|line| line.contains("; verified up to lsn")).then_some(()).ok_or(said)
    });
    let after = (scratch.prints_of("archive"), scratch.prints_of("blocks"));
    for (path, bytes) in before.0.iter().chain(&before.1) {
        let now = after.0.get(path).or_else(|| after.1.get(path));
        assert!(now == Some(bytes), "{} was changed or removed", path.display());
    }
    scratch.run(["verify", &archive, "--data", "100"]).expect_code(0);
    scratch.run(["restore", &archive, "third"]).expect_code(0);
    // What was rehearsed is on record, with how long it took.
    let proofs = fs::read_dir(scratch.path("archive/proofs")).unwrap().map(|entry| entry.unwrap().path());
    let newest: serde_json::Value =
        serde_json::from_slice(&fs::read(proofs.max().unwrap()).unwrap()).unwrap();
    let proof = &newest["body"];
    assert_eq!((&proof["kind"], &proof["findings"]), (&"restore".into(), &serde_json::json!([])), "{newest}");
    assert!(proof["ended"].as_u64() > proof["began"].as_u64(), "{newest}");
    scratch.mount("third", "m3");
    assert_same_tree(&scratch.path("shadow of production"), &scratch.path("m3"));
}

/// Looking back: what was deleted is there at an earlier entry.
#[test]
fn what_was_deleted_comes_back_at_an_earlier_entry() {
    if !can_mount("what_was_deleted_comes_back_at_an_earlier_entry") {
        return;
    }
    let (scratch, archive) = archived();
    let before = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    fs::remove_dir_all(scratch.path("mnt/a")).unwrap();
    scratch.run(["flush", "mnt"]).expect_code(0).stdout();
    let after = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    wait_archived(&scratch, after);
    scratch.run(["restore", &archive, "past", "--lsn", &before.to_string()]).expect_code(0).stdout();
    let past = scratch.make_dir("pastmnt");
    scratch.run(["mount", "past", "pastmnt", "-d"]).expect_code(0).stdout();
    assert_eq!(fs::read_to_string(past.join("a/nine")).unwrap(), "line 9\n".repeat(63));
    scratch.run(["restore", &archive, "never", "--lsn", "1000000000"]).expect_code(1).stdout();
    scratch.run(["restore", &archive, "never", "--at", "tomorrow"]).expect_error(2, "is not a time");
    assert!(!scratch.path("never").exists());
}

/// A volume with a past gets an archive that needs nothing older.
#[test]
fn an_archive_that_is_added_later_restores_alone() {
    if !can_mount("an_archive_that_is_added_later_restores_alone") {
        return;
    }
    let (scratch, first) = archived();
    let second = format!("{}?domain=third", scratch.url("second"));
    scratch.run(["archive", "add", "mnt", &second]).expect_code(0).stdout();
    scratch.run(["archive", "add", "mnt", &second]).expect_error(1, "already");
    scratch.run(["archive", "add", "mnt", &scratch.url("blocks")]).expect_error(1, "block store");
    scratch.run(["archive", "remove", "mnt", &first]).expect_code(0).stdout();
    fs::write(scratch.path("mnt/later"), "later").unwrap();
    scratch.run(["flush", "mnt"]).expect_code(0).stdout();
    let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    wait_archived(&scratch, durable);
    scratch.run(["verify", &second, "--data", "100"]).expect_code(0).stdout();
    scratch.run(["restore", &second, "copy", "--blocks", &scratch.url("b2")]).expect_code(0).stdout();
    scratch.make_dir("copymnt");
    scratch.run(["mount", "copy", "copymnt", "-d"]).expect_code(0).stdout();
    assert_same_tree(&scratch.path("mnt"), &scratch.path("copymnt"));
}

/// The fear: the first snapshot of an archive that is added breaks off, the archive is added once more at a later entry and acknowledges from then on;
/// the other one dies with the region, and from this one nothing can be restored.
#[test]
fn an_archive_whose_first_snapshot_did_not_come_about_is_not_gone_on_with() {
    if !can_mount("an_archive_whose_first_snapshot_did_not_come_about_is_not_gone_on_with") {
        return;
    }
    let (scratch, first) = archived();
    let second = format!("{}?domain=third", scratch.url("second"));
    scratch.make_dir("second");
    fs::write(scratch.path("second/packs"), "in the way").unwrap();
    scratch.run(["archive", "add", "mnt", &second]).expect_error(1, "pack");
    fs::remove_file(scratch.path("second/packs")).unwrap();
    fs::write(scratch.path("mnt/later"), "later").unwrap();
    scratch.run(["archive", "add", "mnt", &second]).expect_code(0);
    scratch.run(["archive", "remove", "mnt", &first]).expect_code(0);
    scratch.run(["restore", &second, "copy", "--blocks", &scratch.url("b2")]).expect_code(0);
    // The same if the process was killed in between, or the snapshot is gone.
    scratch.run(["archive", "add", "mnt", &first]).expect_code(0);
    wait_until("a slot", PATIENCE, || scratch.path("second/log").exists());
    scratch.run(["archive", "remove", "mnt", &second]).expect_code(0);
    for folder in ["snapshots", "registry"] {
        fs::remove_dir_all(scratch.path("second").join(folder)).unwrap();
    }
    fs::write(scratch.path("mnt/still-later"), "still later").unwrap();
    scratch.run(["archive", "add", "mnt", &second]).expect_error(1, "no snapshot");
}

/// One file brings the tree anywhere; without its packs it is refused rather than half there.
#[test]
fn a_dump_is_loaded_where_its_packs_are() {
    if !can_mount("a_dump_is_loaded_where_its_packs_are") {
        return;
    }
    let (scratch, _) = archived();
    scratch.run(["dump", "mnt", "tree.murphy"]).expect_code(0).stdout();
    scratch.run(["dump", "mnt", "tree.murphy"]).expect_error(1, "exists already");
    scratch.run(["load", "tree.murphy", "copy", "--blocks", &scratch.url("none")]).expect_error(1, "lacks");
    assert!(!scratch.path("copy").exists());
    let whole = fs::read(scratch.path("tree.murphy")).unwrap();
    let (mut later, mut flipped, mut longer) = (whole.clone(), whole.clone(), whole.clone());
    later[8] = 9;
    flipped[whole.len() / 2] ^= 0x10;
    longer.push(0);
    let store = scratch.bytes_of("blocks");
    for (name, bytes, part) in [
        ("cut", &whole[..whole.len() / 2], "cut short"),
        ("of its header only half", &whole[..80], "cut short"),
        ("junk", &b"This is not a dump. ".repeat(40), "not a snapshot"),
        ("nothing", &[], "cut short"),
        ("later", &later, "format version 9"),
        ("flipped", &flipped, "block"),
        ("longer", &longer, "block"),
    ] {
        fs::write(scratch.path(name), bytes).unwrap();
        let load = ["load", name, "copy", "--blocks", &scratch.url("blocks")];
        let refused = scratch.run(load).expect_error(1, part);
        assert!(refused.stderr().contains(&format!("{name}: ")), "the file is not named: {refused}");
        assert!(fs::read(scratch.path(name)).unwrap() == bytes, "{refused}");
        assert!(scratch.bytes_of("blocks") == store, "something in the store was changed: {refused}");
        let left = fs::read_dir(scratch.path("")).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = left.filter(|left| left.to_string_lossy().contains("copy")).collect();
        assert!(left.is_empty(), "{left:?} is left of {name}");
    }
    scratch.run(["load", "tree.murphy", "copy", "--blocks", &scratch.url("blocks")]).expect_code(0).stdout();
    fs::remove_dir_all(scratch.path("copy/index")).unwrap();
    scratch.make_dir("copymnt");
    scratch.run(["mount", "copy", "copymnt", "-d"]).expect_code(0).stdout();
    assert_same_tree(&scratch.path("mnt"), &scratch.path("copymnt"));
}

/// With `--ack archive` an fsync that returned is in the archive.
#[test]
fn an_fsync_waits_for_the_archive_when_told_so() {
    if !can_mount("an_fsync_waits_for_the_archive_when_told_so") {
        return;
    }
    let scratch = scratch();
    let (blocks, same) = (scratch.url("blocks"), scratch.url("same"));
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    let refused = |given: &[&str]| {
        let common = ["format", "node", "--blocks", &blocks, "--ack", "archive"];
        scratch.run(common.iter().chain(given)).expect_error(2, "--ack archive needs");
    };
    refused(&[]);
    refused(&["--archive", &same]);
    refused(&["--log-archive", &archive]);
    scratch
        .run(["format", "node", "--blocks", &blocks, "--ack", "archive", "--archive", &archive])
        .expect_code(0)
        .stdout();
    let mount = scratch.make_dir("mnt");
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0).stdout();
    let file = fs::File::create(mount.join("file")).unwrap();
    std::io::Write::write_all(&mut &file, b"precious").unwrap();
    file.sync_all().unwrap();
    scratch.signal_all(Signal::KILL);
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    fs::remove_dir_all(scratch.path("node")).unwrap();
    fs::remove_dir_all(scratch.path("blocks")).unwrap();
    scratch.run(["restore", &archive, "new"]).expect_code(0).stdout();
    scratch.run(["mount", "new", "mnt", "-d"]).expect_code(0).stdout();
    assert_eq!(fs::read(mount.join("file")).unwrap(), b"precious");
}

/// A successor and its predecessor must never both be the source: the one that was replaced finds out and stays away.
#[test]
fn a_source_that_was_replaced_refuses_to_be_one() {
    if !can_mount("a_source_that_was_replaced_refuses_to_be_one") {
        return;
    }
    let (scratch, archive) = archived();
    let blocks = scratch.url("blocks");
    let take_over = ["restore", &archive, "next", "--blocks", &blocks, "--take-over", "--confirm"];
    let with = |name: &'static str| take_over.iter().copied().chain([name]).collect::<Vec<_>>();
    scratch.run(with("other")).expect_code(2).stdout();
    scratch.run(&take_over[..6]).expect_code(2).stdout();
    // A source that does nothing ticks every 20 s: it is watched, before anything is restored.
    let refused = scratch.run(with("home")).expect_error(1, "sign of life").stderr();
    assert!(refused.contains(&archive) && refused.contains(".seg"), "{refused}");
    assert!(refused.contains("nothing was changed"), "{refused}");
    assert!(!scratch.path("next").exists());
    assert_eq!(scratch.run(["verify", &archive, "--json"]).json()["seals"], 0);
    scratch.signal_all(Signal::KILL);
    rustix::mount::unmount(scratch.path("mnt"), rustix::mount::UnmountFlags::DETACH).unwrap();
    let taken = scratch.run(with("home")).expect_code(0);
    assert!(taken.stderr().contains("Watching the archives"), "{taken}");
    scratch.run(["serve", "node"]).expect_error(1, "another source has taken over");
    fs::rename(scratch.path("archive"), scratch.path("out of reach")).unwrap();
    scratch.run(["serve", "node"]).expect_error(1, "another source has taken over");
    let status = scratch.run(["status", "node", "--json"]).expect_code(3).json();
    assert!(status["verdict"].as_str().unwrap().starts_with("FENCED"), "{status}");
    fs::rename(scratch.path("out of reach"), scratch.path("archive")).unwrap();
    scratch.run(["mount", "next", "mnt", "-d"]).expect_code(0).stdout();
    assert_eq!(fs::read_to_string(scratch.path("mnt/a/nine")).unwrap(), "line 9\n".repeat(63));
    fs::write(scratch.path("mnt/new"), "new").unwrap();
    scratch.run(["umount", "mnt"]).expect_code(0).stdout();
    scratch.run(["verify", &archive, "--data", "100"]).expect_code(0).stdout();
}

/// The disk of the source went back in time; what it had archived is not lost, and nothing is decided anew in its place.
#[test]
fn a_log_that_lost_its_end_gets_it_back_from_its_archive() {
    if !can_mount("a_log_that_lost_its_end_gets_it_back_from_its_archive") {
        return;
    }
    let (scratch, archive) = archived();
    let (mount, log) = (scratch.path("mnt"), scratch.path("node/log"));
    let kill = || {
        scratch.signal_all(Signal::KILL);
        rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    };
    // What vouches for the lost end: the cursor of the archive, the index, or only the archive itself.
    for (round, gone) in [&[][..], &["archives"], &["archives", "index"]].into_iter().enumerate() {
        kill();
        let old = scratch.path(&format!("old{round}"));
        copy_tree(&log, &old);
        scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0);
        let name = format!("precious{round}");
        fs::write(mount.join(&name), vec![round as u8 + 1; 300_000]).unwrap();
        scratch.run(["flush", "mnt"]).expect_code(0);
        let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
        wait_archived(&scratch, durable);
        kill();
        fs::remove_dir_all(&log).unwrap();
        copy_tree(&old, &log);
        for part in gone {
            fs::remove_dir_all(scratch.path("node").join(part)).unwrap();
        }
        if gone.is_empty() {
            // Nobody has it: nothing is decided, and the way out is said.
            fs::rename(scratch.path("archive"), scratch.path("away")).unwrap();
            let refused = scratch.run(["serve", "node"]).expect_error(1, "archive");
            assert!(refused.stderr().contains("Hint: "), "{refused}");
            fs::rename(scratch.path("away"), scratch.path("archive")).unwrap();
        }
        scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0);
        assert_eq!(fs::read(mount.join(&name)).unwrap(), vec![round as u8 + 1; 300_000], "without {gone:?}");
        fs::write(mount.join("after"), name.as_bytes()).unwrap();
        scratch.run(["flush", "mnt"]).expect_code(0);
        let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
        wait_archived(&scratch, durable);
    }
    assert_eq!(scratch.run(["fsck", "mnt", "--data", "--json"]).expect_code(0).json()["findings"], 0);
    scratch.run(["verify", &archive, "--data", "100"]).expect_code(0);
}

/// A rotten sector in the middle of the log is no reason to lose what lies behind it, while an archive has what was there.
#[test]
fn a_log_that_is_damaged_in_its_middle_is_mended_from_its_archive() {
    if !can_mount("a_log_that_is_damaged_in_its_middle_is_mended_from_its_archive") {
        return;
    }
    let (scratch, archive) = archived();
    let (mount, log) = (scratch.path("mnt"), scratch.path("node/log"));
    // Two segments: a source that starts again begins one.
    scratch.run(["umount", "mnt"]).expect_code(0);
    scratch.wait_for_the_end();
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0);
    fs::write(mount.join("archived"), "archived").unwrap();
    scratch.run(["flush", "mnt"]).expect_code(0);
    let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    wait_archived(&scratch, durable);
    // What comes last is in no archive.
    fs::rename(scratch.path("archive"), scratch.path("away")).unwrap();
    fs::write(mount.join("alone"), "only in this log").unwrap();
    scratch.run(["flush", "mnt"]).expect_code(0);
    scratch.signal_all(Signal::KILL);
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    let mut segments: Vec<_> = fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    segments.sort();
    let newest = segments.pop().unwrap();
    let older = segments.pop().unwrap();
    let mut bytes = fs::read(&newest).unwrap();
    bytes[SEGMENT_HEADER_BYTES + 60] ^= 1;
    fs::write(&newest, bytes).unwrap();
    let refused = scratch.run(["serve", "node"]).expect_error(1, "nobody who answers has them");
    assert!(refused.stderr().contains("within reach"), "{refused}");
    fs::rename(scratch.path("away"), scratch.path("archive")).unwrap();
    fs::remove_file(&older).unwrap();
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0);
    assert_eq!(fs::read_to_string(mount.join("archived")).unwrap(), "archived");
    assert_eq!(fs::read_to_string(mount.join("alone")).unwrap(), "only in this log");
    assert_eq!(fs::read_to_string(mount.join("a/nine")).unwrap(), "line 9\n".repeat(63));
    let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    wait_archived(&scratch, durable);
    assert_eq!(scratch.run(["fsck", "mnt", "--data", "--json"]).expect_code(0).json()["findings"], 0);
    scratch.run(["verify", &archive, "--data", "100"]).expect_code(0);
}

/// The fear: the last frames are damaged and nobody has them at the moment; what is left of them is cut off by a start that is refused.
#[test]
fn what_is_damaged_at_the_end_is_not_cut_before_somebody_gives_it_back() {
    if !can_mount("what_is_damaged_at_the_end_is_not_cut_before_somebody_gives_it_back") {
        return;
    }
    let (scratch, _) = archived();
    let (mount, log) = (scratch.path("mnt"), scratch.path("node/log"));
    // What vouches for them: the cursor of the archive, or the index.
    for (round, gone) in [&[][..], &["archives"]].into_iter().enumerate() {
        let name = format!("precious{round}");
        fs::write(mount.join(&name), name.repeat(9)).unwrap();
        scratch.run(["flush", "mnt"]).expect_code(0);
        let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
        wait_archived(&scratch, durable);
        scratch.run(["umount", "mnt"]).expect_code(0);
        scratch.wait_for_the_end();
        let mut segments: Vec<_> = fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path()).collect();
        segments.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
        let newest = segments.into_iter().max().unwrap();
        let mut bytes = fs::read(&newest).unwrap();
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        // The frame in the middle is torn, and nothing behind it says that it was durable.
        bytes[end / 2..].fill(0);
        bytes[end / 2 - 1] ^= 1;
        fs::write(&newest, bytes).unwrap();
        for part in gone {
            fs::remove_dir_all(scratch.path("node").join(part)).unwrap();
        }
        fs::rename(scratch.path("archive"), scratch.path("away")).unwrap();
        let before = scratch.prints_of("node/log");
        let refused = scratch.run(["serve", "node"]).expect_error(1, "archive");
        assert!(scratch.prints_of("node/log") == before, "without {gone:?}, something was cut: {refused}");
        fs::rename(scratch.path("away"), scratch.path("archive")).unwrap();
        scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0);
        assert_eq!(fs::read_to_string(mount.join(&name)).unwrap(), name.repeat(9), "without {gone:?}");
    }
    assert_eq!(scratch.run(["fsck", "mnt", "--data", "--json"]).expect_code(0).json()["findings"], 0);
}

/// The fear: what is rotten in the block store of a restore counts as there; or nobody has a pack, and the tree does not say so.
#[test]
fn a_restore_replaces_rotten_packs_and_calls_missing_what_nobody_has_intact() {
    if !can_mount("a_restore_replaces_rotten_packs_and_calls_missing_what_nobody_has_intact") {
        return;
    }
    let (scratch, archive) = archived();
    let durable = scratch.run(["status", "mnt", "--json"]).json()["durable_lsn"].as_u64().unwrap();
    wait_archived(&scratch, durable);
    let blocks = scratch.url("again");
    let restore = |node: &str| scratch.run(["restore", &archive, node, "--blocks", &blocks, "--json"]);
    restore("one").expect_code(0);
    let packs = scratch.bytes_of("again/packs").into_iter().filter(|(path, _)| path.is_file());
    let (here, bytes) = packs.max_by_key(|(_, bytes)| bytes.len()).unwrap();
    let there = scratch.path("archive").join(here.strip_prefix(scratch.path("again")).unwrap());
    let mut rotten = bytes.clone();
    rotten[bytes.len() / 3] ^= 1;
    fs::write(&here, &rotten).unwrap();
    fs::write(&there, &rotten).unwrap();
    let restored = restore("two").expect_code(3).json();
    assert_eq!(
        (&restored["missing_packs"], &restored["packs_replaced"]),
        (&1.into(), &0.into()),
        "{restored}"
    );
    let found = scratch.run(["fsck", "two", "--data"]).expect_code(3).stdout();
    assert!(found.contains("the volume knows that it was lost"), "{found}");
    fs::write(&there, &bytes).unwrap();
    let restored = restore("three").expect_code(3).json();
    assert_eq!(
        (&restored["missing_packs"], &restored["packs_replaced"]),
        (&0.into(), &1.into()),
        "{restored}"
    );
    assert!(fs::read(&here).unwrap() == bytes);
    scratch.run(["fsck", "three", "--data"]).expect_code(0);
}
