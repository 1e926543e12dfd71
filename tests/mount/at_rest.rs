//! A node that nobody serves: what is refused there changes no byte of log, store and archive, and whoever only looks does not either.

use std::{collections::BTreeMap, fs, path::PathBuf};

use murphy_tests::{PATIENCE, Scratch, can_mount, wait_for_ok};

/// A volume at rest with something in its log and in its archive.
struct Resting {
    scratch: Scratch,
    archive: String,
}

impl Resting {
    fn new(test: &str) -> Option<Resting> {
        if !can_mount(test) {
            return None;
        }
        let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
        let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
        let format = ["format", "node", "--name", "vol", "--blocks", &scratch.url("blocks"), "--archive"];
        scratch.run(format.iter().copied().chain([&archive[..]])).expect_code(0);
        let mount = scratch.mount("node", "mnt");
        fs::write(mount.join("file"), vec![7; 100_000]).unwrap();
        scratch.run(["flush", "mnt"]).expect_code(0);
        wait_for_ok("the archive", PATIENCE, || {
            let status = scratch.run(["status", "mnt", "--json"]).json();
            let held = status["archives"][0]["lsn"].as_u64() >= status["durable_lsn"].as_u64();
            held.then_some(()).ok_or(status)
        });
        scratch.umount("mnt");
        Some(Resting { scratch, archive })
    }

    /// Every byte that counts, and the names of everything: of the node all but the lock, which whoever looks takes, what was said, and
    /// the index, which is derived.
    fn bytes(&self, places: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut bytes: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
        for place in ["node", "blocks", "archive"].iter().chain(places) {
            bytes.extend(self.scratch.bytes_of(place));
        }
        let (node, index) = (self.scratch.path("node"), self.scratch.path("node/index"));
        bytes.retain(|path, _| {
            let is_lock = path.ends_with("lock") && path.starts_with(&node);
            !is_lock && !path.ends_with("node/murphy.log") && !path.starts_with(&index)
        });
        bytes
    }

    /// Runs it, and checks that nothing here or at `places` is another than before.
    fn assert_refused(&self, arguments: &[&str], places: &[&str], (code, part): (i32, &str)) {
        let before = self.bytes(places);
        let ran = self.scratch.run(arguments).expect_error(code, part);
        self.scratch.wait_for_the_end();
        self.assert_same(&before, places, &ran.to_string());
    }

    fn assert_same(&self, before: &BTreeMap<PathBuf, Vec<u8>>, places: &[&str], what: &str) {
        let after = self.bytes(places);
        let changed = |path: &&PathBuf| before.get(*path) != after.get(*path);
        let changed: Vec<_> = before.keys().chain(after.keys()).filter(changed).collect();
        assert!(changed.is_empty(), "{changed:?} changed: {what}");
    }
}

/// The fear: a mistyped mount point costs a log that nobody served an entry, and each try another segment.
#[test]
fn a_bad_mount_point_writes_nothing_into_a_node_at_rest() {
    let Some(resting) = Resting::new("a_bad_mount_point_writes_nothing_into_a_node_at_rest") else { return };
    fs::write(resting.scratch.make_dir("full").join("something"), b"of others").unwrap();
    fs::write(resting.scratch.path("a file"), b"of others").unwrap();
    for (place, part) in [
        ("full", "not empty"),
        ("a file", "not a directory"),
        ("nowhere", "does not exist"),
        ("/proc", "is a mount point already"),
    ] {
        resting.assert_refused(&["mount", "node", place], &["full", "a file"], (1, part));
        resting.assert_refused(&["mount", "node", place, "-d"], &["full", "a file"], (1, part));
    }
}

/// The fear: what cannot be becomes known only after the node was opened and has begun to go on.
#[test]
fn a_refused_change_writes_nothing_into_a_node_at_rest() {
    let Some(resting) = Resting::new("a_refused_change_writes_nothing_into_a_node_at_rest") else { return };
    let scratch = &resting.scratch;
    fs::write(scratch.make_dir("foreign").join("holiday.jpg"), b"jpeg").unwrap();
    let other = ["format", "other", "--blocks", &scratch.url("other blocks"), "--archive"];
    scratch.run(other.iter().copied().chain([&scratch.url("other archive")[..]])).expect_code(0);
    let places = ["foreign", "other", "other blocks", "other archive"];
    for (place, part) in [
        ("foreign", "not empty and no archive"),
        ("other archive", "the archive of another history"),
        ("other blocks", "not empty and no archive"),
        ("blocks", "block store"),
        ("archive", "already"),
    ] {
        let url = match place {
            "archive" => resting.archive.clone(),
            _ => scratch.url(place),
        };
        resting.assert_refused(&["archive", "add", "node", &url], &places, (1, part));
    }
    let unknown = scratch.url("foreign");
    resting.assert_refused(
        &["archive", "remove", "node", &unknown],
        &places,
        (1, "is not an archive of this volume"),
    );
    resting.assert_refused(&["ack", "node", "mirror=1"], &places, (1, "nobody serves this node"));
    resting.assert_refused(&["ack", "node", "archive"], &places, (1, "nobody serves this node"));
    let nobody = "00000000000000000000000000000000";
    resting.assert_refused(&["member", "remove", "node", nobody], &places, (1, "is not a member"));
    // What is not refused is done all the same.
    let added = format!("{}?domain=third", scratch.url("third"));
    scratch.run(["archive", "add", "node", &added]).expect_code(0);
    let remove = scratch.run(["archive", "remove", "node", &added]);
    remove.expect_code(0);
}

/// The fear: whoever looks at a node changes what is looked at.
#[test]
fn looking_at_a_node_at_rest_changes_no_file() {
    let Some(resting) = Resting::new("looking_at_a_node_at_rest_changes_no_file") else { return };
    let before = resting.bytes(&[]);
    for arguments in [
        &["status", "node"][..],
        &["status", "node", "--json"],
        &["archive", "list", "node"],
        &["member", "list", "node"],
        &["ack", "node"],
        &["ack", "node", "local", "--dry-run"],
        &["fsck", "node", "--data"],
    ] {
        let ran = resting.scratch.run(arguments).expect_code(0);
        resting.assert_same(&before, &[], &ran.to_string());
    }
}
