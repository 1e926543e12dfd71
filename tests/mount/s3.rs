//! Block store and archive in S3, over HTTP: the same promises as with directories, and what a store may do to them.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    time::Duration,
};

use murphy_tests::{
    Misdeed, PATIENCE, Random, S3Endpoint, Scratch, TreeRules, can_mount, compare_directories, wait_for_ok,
    wait_until,
};
use rustix::{mount::UnmountFlags, process::Signal};

/// A scratch directory with an endpoint in it.
fn world() -> (Scratch, S3Endpoint) {
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let endpoint = S3Endpoint::start(&scratch.make_dir("s3"), &["blocks", "archive"]);
    (scratch, endpoint)
}

fn write_synced(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

fn wait_archived(scratch: &Scratch) {
    scratch.run(["flush", "mnt"]).expect_code(0);
    let status = || scratch.run(["status", "mnt", "--json"]).json();
    let durable = status()["durable_lsn"].as_u64();
    wait_for_ok("the archive", PATIENCE, || {
        let status = status();
        (status["archives"][0]["lsn"].as_u64() >= durable).then_some(()).ok_or(status)
    });
}

/// What users have: everything in buckets, a machine that dies, and another one that comes up from the archive alone.
#[test]
fn a_volume_in_buckets_survives_a_kill_and_comes_back_from_its_archive() {
    if !can_mount("a_volume_in_buckets_survives_a_kill_and_comes_back_from_its_archive") {
        return;
    }
    let (scratch, s3) = world();
    let (blocks, archive) = (s3.url("blocks", "home", "here"), s3.url("archive", "home", "elsewhere"));
    let format = ["format", "node", "--blocks", &blocks, "--archive", &archive, "--ack", "archive"];
    scratch.run(format).expect_code(0);
    let mount = scratch.mount("node", "mnt");
    let shadow = scratch.make_dir("shadow");
    let mut random = Random::new(1);
    for number in 0..20 {
        let bytes = random.bytes(if number == 3 { 6_000_000 } else { number * 1000 });
        for root in [&mount, &shadow] {
            write_synced(&root.join(format!("file-{number}")), &bytes);
        }
    }
    scratch.signal_all(Signal::KILL);
    scratch.mount("node", "mnt");
    assert_eq!(compare_directories(&shadow, &mount, TreeRules::UNTIMED).unwrap(), []);
    for root in [&mount, &shadow] {
        write_synced(&root.join("after the kill"), b"and synced");
    }
    scratch.signal_all(Signal::KILL);
    rustix::mount::unmount(&mount, UnmountFlags::DETACH).unwrap();
    fs::remove_dir_all(scratch.path("node")).unwrap();
    fs::remove_dir_all(s3.bucket("blocks").join("home")).unwrap();
    let verified = scratch.run(["verify", &archive, "--data", "100", "--json"]).expect_code(0).json();
    assert!(verified["packs_read"].as_u64() >= Some(1), "{verified}");
    let new_blocks = s3.url("blocks", "new home", "here");
    scratch.run(["restore", &archive, "new", "--blocks", &new_blocks]).expect_code(0);
    scratch.mount("new", "mnt");
    assert_eq!(compare_directories(&shadow, &mount, TreeRules::UNTIMED).unwrap(), []);
    scratch.run(["fsck", "mnt", "--data"]).expect_code(0);
    scratch.umount("mnt");
}

/// Slots and pack names are claims: a store that lets a second claim replace the first would lose what was acknowledged.
#[test]
fn a_store_that_ignores_put_if_absent_is_refused() {
    let (scratch, s3) = world();
    let (blocks, archive) = (s3.url("blocks", "home", "here"), s3.url("archive", "home", "elsewhere"));
    for (part, name) in [("/blocks/", "blocks"), ("/archive/", "archive")] {
        s3.misbehave(Some("PUT"), part, Misdeed::IgnoreCondition);
        let format = ["format", "node", "--blocks", &blocks, "--archive", &archive];
        let refused = scratch.run(format).expect_error(1, "does not honour put-if-absent");
        assert!(s3.misdeeds() > 0 && refused.stderr().contains(name), "{refused}");
        assert!(!scratch.path("node").exists(), "nothing is left of it");
    }
    // One that says yes and keeps nothing is found out as early.
    for (part, name) in [("/blocks/", "blocks"), ("/archive/", "archive")] {
        s3.misbehave(Some("PUT"), part, Misdeed::Pretend);
        scratch.run(["format", "node", "--blocks", &blocks, "--archive", &archive]).expect_error(1, name);
        assert!(s3.misdeeds() > 0 && !scratch.path("node").exists());
    }
    s3.behave();
    // What was refused is nobody's: the same command works once the store does.
    scratch.run(["format", "node", "--blocks", &blocks]).expect_code(0);
    s3.misbehave(Some("PUT"), "/archive/", Misdeed::IgnoreCondition);
    let refused = scratch.run(["archive", "add", "node", &archive]);
    let refused = refused.expect_error(1, "does not honour put-if-absent");
    assert!(s3.misdeeds() > 0 && refused.stderr().contains("archive"), "{refused}");
    s3.behave();
    let status = scratch.run(["status", "node", "--json"]).expect_code(3).json();
    assert_eq!(status["archives"], serde_json::json!([]));
    scratch.run(["archive", "add", "node", &archive]).expect_code(0);
}

/// Stores fail for a while: the source goes on, says so, and the archive has everything in the end.
#[test]
fn a_store_that_fails_hangs_up_or_loses_answers_costs_time_and_nothing_else() {
    if !can_mount("a_store_that_fails_hangs_up_or_loses_answers_costs_time_and_nothing_else") {
        return;
    }
    let (scratch, s3) = world();
    let (blocks, archive) = (s3.url("blocks", "home", "here"), s3.url("archive", "home", "elsewhere"));
    scratch.run(["format", "node", "--blocks", &blocks, "--archive", &archive]).expect_code(0);
    let mount = scratch.mount("node", "mnt");
    let mut random = Random::new(2);
    let misdeeds = [
        ("fail", Misdeed::Fail),
        ("hang up", Misdeed::HangUp),
        ("lose answers", Misdeed::LoseAnswer),
        ("are slow", Misdeed::Delay(Duration::from_millis(300))),
    ];
    let mut contents = Vec::new();
    for (name, misdeed) in misdeeds {
        for part in ["/archive/", "/blocks/"] {
            s3.misbehave(Some("PUT"), part, misdeed.clone());
            let path = mount.join(format!("while puts to {} {name}", part.trim_matches('/')));
            let bytes = random.bytes(300_000);
            fs::write(&path, &bytes).unwrap();
            contents.push((path, bytes));
            wait_until(&format!("puts to {part} that {name}"), PATIENCE, || s3.misdeeds() > 0);
            s3.behave();
            // Nobody has lost anything, and fsync may fail only as long as the store does.
            let file = File::open(&contents.last().unwrap().0).unwrap();
            wait_for_ok("an fsync", PATIENCE, || file.sync_all());
        }
    }
    wait_archived(&scratch);
    for (path, bytes) in &contents {
        assert!(fs::read(path).unwrap() == *bytes, "{}", path.display());
    }
    scratch.run(["verify", &archive, "--data", "100"]).expect_code(0);
    scratch.umount("mnt");
    scratch.run(["fsck", "node", "--data"]).expect_code(0);
    scratch.run(["restore", &archive, "copy"]).expect_code(0);
    let copy = scratch.mount("copy", "mnt");
    for (path, bytes) in &contents {
        assert!(fs::read(copy.join(path.file_name().unwrap())).unwrap() == *bytes, "{}", path.display());
    }
    scratch.umount("mnt");
}

/// What a store gives back is verified wherever it is read: other bytes are an error that names the object, never contents.
#[test]
fn a_store_that_answers_with_other_bytes_is_found_out() {
    if !can_mount("a_store_that_answers_with_other_bytes_is_found_out") {
        return;
    }
    let (scratch, s3) = world();
    let (blocks, archive) = (s3.url("blocks", "home", "here"), s3.url("archive", "home", "elsewhere"));
    scratch.run(["format", "node", "--blocks", &blocks, "--archive", &archive]).expect_code(0);
    let mount = scratch.mount("node", "mnt");
    let bytes = Random::new(3).bytes(500_000);
    fs::write(mount.join("file"), &bytes).unwrap();
    wait_archived(&scratch);
    scratch.run(["archive", "snapshot", "mnt"]).expect_code(0);
    scratch.umount("mnt");
    let before = (scratch.bytes_of("s3/blocks"), scratch.bytes_of("s3/archive"));
    s3.misbehave(Some("GET"), "/blocks/home/packs/", Misdeed::ChangeByte);
    let found = scratch.run(["fsck", "node", "--data"]).expect_code(3);
    assert!(s3.misdeeds() > 0 && found.stdout().contains("pack "), "{found}");
    scratch.run(["mount", "node", "mnt", "-d", "--cache-size", "0"]).expect_code(0);
    // The archive has them intact. Once that lies as well there is nothing to read.
    assert!(fs::read(mount.join("file")).unwrap() == bytes, "other bytes");
    scratch.umount("mnt");
    s3.misbehave(Some("GET"), "/home/packs/", Misdeed::ChangeByte);
    scratch.run(["mount", "node", "mnt", "-d", "--cache-size", "0"]).expect_code(0);
    let error = fs::read(mount.join("file")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
    scratch.umount("mnt");
    for (part, name) in [("/log/", "log/"), ("/packs/", "pack"), ("/snapshots/", "snapshots/")] {
        s3.misbehave(Some("GET"), &format!("/archive/home{part}"), Misdeed::ChangeByte);
        let found = scratch.run(["verify", &archive, "--data", "100"]).expect_code(3);
        let said = found.stdout() + &found.stderr();
        assert!(s3.misdeeds() > 0 && said.contains(name), "{part}: {found}");
    }
    // What can be had without the damaged object is restored, and the exit code says that something is wrong.
    for (number, part) in ["log/", "snapshots/"].into_iter().enumerate() {
        s3.misbehave(Some("GET"), &format!("/archive/home/{part}"), Misdeed::ChangeByte);
        let (copy, mount) = (format!("copy-{number}"), format!("mnt-{number}"));
        let found = scratch.run(["restore", &archive, &copy]).expect_code(3);
        assert!(s3.misdeeds() > 0 && found.stderr().contains(part), "{found}");
        assert!(fs::read(scratch.mount(&copy, &mount).join("file")).unwrap() == bytes, "{found}");
        scratch.run(["umount", &mount]).expect_code(0);
    }
    s3.misbehave(Some("GET"), "/archive/home/murphy.json", Misdeed::ChangeByte);
    scratch.run(["restore", &archive, "copy"]).expect_error(1, "murphy.json");
    assert!(!scratch.path("copy").exists());
    s3.behave();
    assert!(scratch.bytes_of("s3/blocks") == before.0, "looking changed the block store");
    let after = scratch.bytes_of("s3/archive");
    for (path, bytes) in &before.1 {
        assert!(after.get(path) == Some(bytes), "{} was changed", path.display());
    }
    scratch.run(["verify", &archive, "--data", "100"]).expect_code(0);
}

/// The most common mistake: the store is named, and nothing secret is.
#[test]
fn wrong_credentials_are_one_error_and_stay_secret() {
    let (scratch, s3) = world();
    let wrong = scratch.path("wrong credentials");
    fs::write(&wrong, "AWS_ACCESS_KEY_ID=murphy\nAWS_SECRET_ACCESS_KEY=hunter2\n").unwrap();
    let right = scratch.path("s3/credentials").display().to_string();
    let blocks = s3.url("blocks", "home", "here").replace(&right, &wrong.display().to_string());
    let refused = scratch.run(["format", "node", "--blocks", &blocks]).expect_error(1, "s3://blocks/home");
    assert!(!refused.stderr().contains("hunter2"), "{refused}");
    assert!(!scratch.path("node").exists());
    let nowhere = s3.url("no-such-bucket", "home", "here");
    scratch.run(["format", "node", "--blocks", &nowhere]).expect_error(1, "no-such-bucket");
    assert!(!scratch.path("node").exists());
}

/// An archive that may only be read is restored from all the same; whoever expires there does not know of it, and that must be said.
#[test]
fn a_restore_that_could_not_pin_an_archive_says_so() {
    let (scratch, s3) = world();
    let (blocks, archive) = (s3.url("blocks", "home", "here"), s3.url("archive", "home", "elsewhere"));
    scratch.run(["format", "node", "--blocks", &blocks, "--archive", &archive]).expect_code(0);
    // The root is there once a node was served.
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    scratch.run(["flush", "node"]).expect_code(0);
    scratch.signal_all(Signal::TERM);
    let whole = scratch.run(["restore", &archive, "whole", "--json"]).expect_code(0).json();
    assert_eq!(
        (&whole["unpinned"], &whole["unregistered"]),
        (&serde_json::json!([]), &serde_json::json!([]))
    );
    s3.misbehave(Some("PUT"), "/archive/home/registry/", Misdeed::Fail);
    let told = scratch.run(["restore", &archive, "told", "--json"]).expect_code(0).json();
    for field in ["unpinned", "unregistered"] {
        let [unwritten] = &told[field].as_array().unwrap()[..] else { panic!("{field}: {told}") };
        assert!(unwritten["url"].as_str().unwrap().contains("/archive/home"), "{told}");
        assert!(unwritten["reason"].as_str().unwrap().contains("registry/"), "{told}");
    }
    let text = scratch.run(["restore", &archive, "text"]).expect_code(0).stdout();
    assert!(text.contains("read without a pin") && text.contains("does not know of this copy"), "{text}");
    assert!(s3.misdeeds() > 0);
}
