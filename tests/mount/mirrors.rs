//! Mirrors with real processes and mounts: what follows, what survives a kill, what a promotion keeps.

use std::{
    fs,
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use murphy_fs::{FjallIndex, FjallOptions, Index, Ino, InodeRow, RowKey};
use murphy_tests::{
    PATIENCE, Scratch, assert_same_tree, can_mount, free_address, is_dead, output_of, wait_for_ok, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

/// A source `a` mounted at `ma` and a mirror `b` mounted at `mb`.
pub(super) struct Pair {
    pub(super) scratch: Scratch,
}

impl Pair {
    pub(super) fn start(ack: &str) -> Pair {
        let scratch = scratch();
        let format = ["format", "a", "--blocks", &scratch.url("ba"), "--name", "vol", "--ack", ack];
        scratch.run(format).expect_code(0).stdout();
        let pair = Pair { scratch };
        pair.mount("a", &free_address());
        pair.join("a", "b", "bb");
        pair.mount("b", &free_address());
        pair
    }

    pub(super) fn join(&self, source: &str, mirror: &str, blocks: &str) {
        let token = self.scratch.run(["invite", source]).expect_code(0).stdout();
        fs::write(self.scratch.path("token"), token).unwrap();
        let url = self.scratch.url(blocks);
        let join = ["join", mirror, "--token-file", "token", "--blocks", &url];
        self.scratch.run(join).expect_code(0).stdout();
    }

    pub(super) fn mount(&self, node: &str, listen: &str) {
        let place = format!("m{node}");
        // The mount of a process that was killed is still there; the next one replaces it.
        let _there_already = fs::create_dir(self.scratch.path(&place));
        let mount = ["mount", node, &place, "-d", "--listen", listen, "--io-timeout", "20s"];
        self.scratch.run(mount).expect_code(0).stdout();
    }

    pub(super) fn status(&self, node: &str) -> Value {
        let ran = self.scratch.run(["status", node, "--json"]);
        ran.json()
    }

    pub(super) fn listens(&self, node: &str) -> String {
        self.status(node)["listen"].as_str().unwrap().to_owned()
    }

    fn signal(&self, node: &str, signal: Signal) {
        let pid = self.status(node)["running"]["pid"].as_i64().unwrap();
        kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    }

    pub(super) fn kill(&self, node: &str) {
        self.signal(node, Signal::KILL);
        // The mount goes with the process, the lock a moment later.
        let place = self.scratch.path(&format!("m{node}"));
        wait_for("the mount to die", || is_dead(&place));
    }

    /// The source, its store and its whole machine are gone.
    pub(super) fn lose_source(&self) {
        self.kill("a");
        rustix::mount::unmount(self.scratch.path("ma"), rustix::mount::UnmountFlags::DETACH).unwrap();
        fs::remove_dir_all(self.scratch.path("a")).unwrap();
        fs::remove_dir_all(self.scratch.path("ba")).unwrap();
    }

    /// Waits until both have the same history, bytes included, and compares what they have.
    pub(super) fn settle(&self) {
        self.scratch.run(["flush", "ma"]).expect_code(0).stdout();
        let wanted = self.status("a")["durable_lsn"].as_u64().unwrap();
        wait_for("the mirror to have every byte", || self.status("b")["data_lsn"].as_u64() >= Some(wanted));
        wait_for("one position and one digest", || {
            let (a, b) = (self.status("a"), self.status("b"));
            a["position"] == b["position"] && a["digest"] == b["digest"]
        });
    }
}

#[track_caller]
pub(super) fn wait_for(what: &str, ready: impl FnMut() -> bool) {
    wait_until(what, PATIENCE, ready);
}

pub(super) fn sow(place: &Path) {
    fs::create_dir_all(place.join("deep")).unwrap();
    let large: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(place.join("deep/large"), large).unwrap();
    fs::write(place.join("small"), b"some text\n").unwrap();
    fs::hard_link(place.join("small"), place.join("deep/link")).unwrap();
    std::os::unix::fs::symlink("../small", place.join("deep/soft")).unwrap();
    for i in 0..100 {
        fs::write(place.join(format!("deep/{i}")), format!("file {i}\n").repeat(i)).unwrap();
    }
}

/// Equal bytes, and equal answers to everything that `find` can print but the times of reading.
fn assert_mirrored(a: &Path, b: &Path) {
    assert_same_tree(a, b);
    let listed = [a, b].map(|tree| {
        let attributes = "%P %i %y %m %U %G %n %s %b %T@ %C@ %l\n";
        let found = output_of(Command::new("find").arg(tree).args(["-printf", attributes]));
        assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
        let mut lines: Vec<String> =
            String::from_utf8(found.stdout).unwrap().lines().map(str::to_owned).collect();
        lines.sort();
        lines
    });
    assert_eq!(listed[0], listed[1]);
}

/// Writes a file and returns when an fsync said that it is safe.
pub(super) fn write_safely(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A mirror is the same tree, also after either side was killed, and changes nothing by itself.
#[test]
fn a_mirror_is_the_same_tree_whoever_is_killed() {
    if !can_mount("a_mirror_is_the_same_tree_whoever_is_killed") {
        return;
    }
    let pair = Pair::start("local");
    let (ma, mb) = (pair.scratch.path("ma"), pair.scratch.path("mb"));
    sow(&ma);
    pair.settle();
    assert_mirrored(&ma, &mb);
    let refused = fs::write(mb.join("x"), b"x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()));
    pair.kill("b");
    fs::write(ma.join("meanwhile"), b"written while the mirror was away").unwrap();
    pair.mount("b", &free_address());
    pair.settle();
    assert_mirrored(&ma, &mb);
    let address = pair.listens("a");
    pair.kill("a");
    assert_eq!(fs::read(mb.join("small")).unwrap(), b"some text\n", "reads go on without the source");
    pair.mount("a", &address);
    fs::write(ma.join("later"), b"written after the source was killed").unwrap();
    pair.settle();
    assert_mirrored(&ma, &mb);
    let mirrors = pair.status("a")["mirrors"].clone();
    assert_eq!(mirrors.as_array().unwrap().len(), 1, "{mirrors}");
    assert_eq!(mirrors[0]["connected"], true);
}

/// One account held the source, its store and the machine that ran it; the copy that was to outlive it must not ask for any of them.
#[test]
fn a_mirror_restarts_serves_and_mounts_when_everything_of_its_source_is_gone() {
    if !can_mount("a_mirror_restarts_serves_and_mounts_when_everything_of_its_source_is_gone") {
        return;
    }
    let pair = Pair::start("local");
    let (ma, mb, kept) = (pair.scratch.path("ma"), pair.scratch.path("mb"), pair.scratch.path("kept"));
    sow(&ma);
    sow(&kept);
    pair.settle();
    pair.kill("b");
    pair.lose_source();
    // Its disk cache may hold what its own store should have.
    let _no_cache = fs::remove_dir_all(pair.scratch.path("b/cache"));
    pair.mount("b", &free_address());
    assert_same_tree(&kept, &mb);
    let status = pair.status("b");
    assert_eq!(
        (&status["role"], &status["source"]["connected"]),
        (&"mirror".into(), &false.into()),
        "{status}"
    );
    let refused = fs::write(mb.join("x"), b"x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()));
    pair.scratch.run(["umount", "mb"]).expect_code(0).stdout();
    pair.scratch.run(["fsck", "b", "--data"]).expect_code(0);
}

/// The region is gone, and what fsync said was safe is not.
#[test]
fn a_promoted_mirror_has_every_acknowledged_byte() {
    if !can_mount("a_promoted_mirror_has_every_acknowledged_byte") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let (ma, mb) = (pair.scratch.path("ma"), pair.scratch.path("mb"));
    let mut ledger = Vec::new();
    for i in 0..40usize {
        let bytes = format!("record {i}\n").repeat(1 + i * 97).into_bytes();
        let name = format!("record-{i}");
        // The mirror may not be there yet.
        wait_for("an fsync to be acknowledged", || write_safely(&ma.join(&name), &bytes).is_ok());
        ledger.push((name, bytes));
    }
    fs::write(ma.join("not-safe"), b"nobody said that this is safe").unwrap();
    pair.lose_source();
    let plan = pair.scratch.run(["promote", "b", "--dry-run", "--json"]).expect_code(0).json();
    assert_eq!(plan["lost_entries"], 0, "{plan}");
    pair.scratch.run(["promote", "b"]).expect_error(2, "has to be confirmed");
    pair.scratch.run(["promote", "b", "--confirm", "other"]).expect_error(2, "is called");
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0).stdout();
    for (name, bytes) in &ledger {
        assert_eq!(&fs::read(mb.join(name)).unwrap(), bytes, "{name}");
    }
    write_safely(&mb.join("new"), b"the mount takes writes now").unwrap();
    let status = pair.status("b");
    assert_eq!((&status["role"], &status["position"]["epoch"]), (&"source".into(), &2.into()), "{status}");
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "source already");
    pair.join("b", "c", "bc");
    pair.mount("c", &free_address());
    wait_for("a mirror of the new source", || {
        pair.status("c")["data_lsn"].as_u64() >= pair.status("b")["durable_lsn"].as_u64()
    });
    assert_mirrored(&mb, &pair.scratch.path("mc"));
    // A process that begins anew is the source of the same epoch.
    pair.scratch.run(["umount", "mb"]).expect_code(0).stdout();
    pair.mount("b", &free_address());
    assert_eq!(pair.status("b")["position"]["epoch"], 2);
}

/// A promotion that failed halfway has taken a promise with it: the next one, of another mirror, must not fail for ever because of it.
#[test]
fn a_promotion_after_one_that_failed_asks_for_a_later_epoch() {
    if !can_mount("a_promotion_after_one_that_failed_asks_for_a_later_epoch") {
        return;
    }
    let pair = Pair::start("mirror=1");
    pair.join("a", "c", "bc");
    pair.mount("c", &free_address());
    let (ma, mc) = (pair.scratch.path("ma"), pair.scratch.path("mc"));
    write_safely(&ma.join("file"), b"acknowledged").unwrap();
    pair.settle();
    let wanted = pair.status("a")["durable_lsn"].as_u64();
    wait_for("the other mirror", || pair.status("c")["data_lsn"].as_u64() >= wanted);
    pair.kill("c");
    pair.kill("a");
    // Both mirrors have to be sealed, and one is away.
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "of 2 needed");
    pair.mount("c", &free_address());
    let outbid = pair.scratch.run(["promote", "c", "--confirm", "vol"]).expect_error(1, "has been promised");
    assert!(outbid.stderr().contains("run it again"), "{}", outbid.stderr());
    pair.scratch.run(["promote", "c", "--confirm", "vol"]).expect_code(0).stdout();
    let status = pair.status("c");
    assert_eq!((&status["role"], &status["position"]["epoch"]), (&"source".into(), &3.into()), "{status}");
    assert_eq!(fs::read(mc.join("file")).unwrap(), b"acknowledged");
}

/// Two sources would be two histories: the one that was replaced stops, and what only it holds is not forgotten.
#[test]
fn a_stale_source_stops_and_its_tail_is_listed() {
    if !can_mount("a_stale_source_stops_and_its_tail_is_listed") {
        return;
    }
    let pair = Pair::start("local");
    let (ma, mb) = (pair.scratch.path("ma"), pair.scratch.path("mb"));
    fs::write(ma.join("shared"), b"on both").unwrap();
    pair.settle();
    let address = pair.listens("a");
    pair.kill("b");
    fs::write(ma.join("alone"), b"only at the old source").unwrap();
    pair.scratch.run(["flush", "ma"]).expect_code(0).stdout();
    pair.kill("a");
    pair.mount("b", &free_address());
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0).stdout();
    fs::write(mb.join("other"), b"at the new source").unwrap();
    pair.scratch.run(["flush", "mb"]).expect_code(0).stdout();
    let mount = ["mount", "a", "ma", "-d", "--listen", &address];
    let knows = pair.scratch.run(mount);
    if knows.stderr().is_empty() {
        // It did not know where its successor listens, which tells it within moments.
        wait_for("the old source to stop", || {
            is_dead(&ma) || fs::read_dir(&ma).is_ok_and(|mut names| names.next().is_none())
        });
    }
    wait_for("the old source to refuse", || {
        pair.scratch.run(["serve", "a"]).stderr().contains("no longer the source")
    });
    let branches = pair.status("a")["branches"].clone();
    assert_eq!(branches.as_array().unwrap().len(), 1, "{branches}");
    assert_eq!(fs::read(mb.join("shared")).unwrap(), b"on both");
    assert!(!mb.join("alone").exists());
}

/// A source that was only out of reach is told when it is reachable again.
#[test]
fn a_source_that_was_paused_is_told_that_it_was_replaced() {
    if !can_mount("a_source_that_was_paused_is_told_that_it_was_replaced") {
        return;
    }
    let pair = Pair::start("local");
    fs::write(pair.scratch.path("ma/shared"), b"on both").unwrap();
    pair.settle();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "alive");
    let pid = pair.status("a")["running"]["pid"].as_i64().unwrap();
    let pid = Pid::from_raw(pid as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0).stdout();
    kill_process(pid, Signal::CONT).unwrap();
    wait_for("the old source to end", || {
        pair.scratch.run(["serve", "a"]).stderr().contains("no longer the source")
    });
}

/// A mirror need not be served to take over.
#[test]
fn a_mirror_at_rest_is_promoted() {
    if !can_mount("a_mirror_at_rest_is_promoted") {
        return;
    }
    let pair = Pair::start("local");
    sow(&pair.scratch.path("ma"));
    pair.settle();
    pair.scratch.run(["umount", "mb"]).expect_code(0).stdout();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "alive");
    pair.kill("a");
    let plan = pair.scratch.run(["promote", "b", "--dry-run", "--json"]).expect_code(0).json();
    assert_eq!(plan["entries_without_bytes"], 0, "{plan}");
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0).stdout();
    pair.mount("b", &free_address());
    assert_eq!(fs::read(pair.scratch.path("mb/small")).unwrap(), b"some text\n");
    fs::write(pair.scratch.path("mb/new"), b"new").unwrap();
}

/// Other programs hear of every entry, from the node and over the network.
#[test]
fn a_subscriber_hears_of_every_entry() {
    if !can_mount("a_subscriber_hears_of_every_entry") {
        return;
    }
    let pair = Pair::start("local");
    let token = pair.scratch.run(["invite", "a", "--role", "observer"]).expect_code(0).stdout();
    fs::write(pair.scratch.path("observer"), token).unwrap();
    let subscribe = |arguments: &[&str], file: &str| {
        let out = fs::File::create(pair.scratch.path(file)).unwrap();
        Command::new(env!("CARGO_BIN_EXE_murphy-program"))
            .arg("subscribe")
            .args(arguments)
            .current_dir(pair.scratch.path("."))
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut near = subscribe(&["a", "--from", "2"], "near");
    let mut far = subscribe(&["--token-file", "observer", "--from", "2"], "far");
    fs::write(pair.scratch.path("ma/heard-of"), b"x").unwrap();
    let lines = |file: &str| -> Vec<Value> {
        let text = fs::read_to_string(pair.scratch.path(file)).unwrap();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    for file in ["near", "far"] {
        wait_for("the entry", || {
            lines(file).iter().any(|line| line["changes"].to_string().contains(HEARD_OF))
        });
        let found = lines(file);
        for (at, line) in found.iter().enumerate() {
            assert_eq!(line["lsn"].as_u64(), Some(at as u64 + 2), "{file} has a gap");
        }
    }
    for child in [&mut near, &mut far] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

/// `heard-of`, as a row holds it.
const HEARD_OF: &str = "68656172642d6f66";

/// Changes the mode of an inode in the index of a node that nobody serves, and nothing else: a tree that is sound, and another.
fn change_a_row(index: &Path, ino: Ino) {
    // A process that has just ended gives its locks back one after the other.
    let open = || FjallIndex::open(index, FjallOptions::default());
    let index = wait_for_ok("the index", PATIENCE, open);
    let snapshot = index.snapshot();
    let state = snapshot.state().unwrap();
    let mut row = InodeRow::decode(&snapshot.get(&RowKey::inode(ino)).unwrap().unwrap()).unwrap();
    row.mode ^= 0o7;
    index.ingest(&mut std::iter::once((RowKey::inode(ino), Some(row.encode()))), &state).unwrap();
    index.sync().unwrap();
}

fn first_segment(log: &Path) -> PathBuf {
    let files = fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "seg")).min().unwrap()
}

fn flip_a_bit(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// A mirror that shows another tree than its source, and says nothing, is worse than none.
#[test]
fn a_row_that_changed_behind_a_mirrors_back_is_found_by_its_digest() {
    if !can_mount("a_row_that_changed_behind_a_mirrors_back_is_found_by_its_digest") {
        return;
    }
    let pair = Pair::start("local");
    let (ma, mb) = (pair.scratch.path("ma"), pair.scratch.path("mb"));
    sow(&ma);
    pair.settle();
    let small = fs::metadata(ma.join("small")).unwrap();
    pair.scratch.run(["fsck", "b"]).expect_code(0);
    pair.scratch.run(["umount", "mb"]).expect_code(0);
    change_a_row(&pair.scratch.path("b/index"), Ino::new(small.ino()));
    let assert_found = || {
        let found = pair.scratch.run(["fsck", "b", "--json"]).expect_code(3).stdout();
        let digest = pair.status("a")["digest"].as_str().unwrap().to_owned();
        let lines: Vec<Value> = found.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let [finding, summary] = &lines[..] else { panic!("{found}") };
        let text = finding["finding"].as_str().unwrap();
        assert!(text.contains("index") && text.contains("digest") && text.contains(&digest), "{text}");
        assert_eq!(summary["findings"], 1, "{found}");
    };
    assert_found();
    // The process that shows it finds it too, while it follows.
    pair.mount("b", &free_address());
    assert_ne!(fs::metadata(mb.join("small")).unwrap().mode(), small.mode());
    pair.settle();
    assert_found();
    pair.scratch.run(["fsck", "a"]).expect_code(0);
    // By itself, and a promotion would not make it the volume.
    pair.scratch.run(["umount", "mb"]).expect_code(0);
    pair.scratch
        .run(["mount", "b", "mb", "-d", "--listen", &free_address(), "--scrub-every", "20ms"])
        .expect_code(0);
    wait_for("the scrub of the mirror", || pair.status("b")["scrubbed"]["trouble"].is_string());
    let status = pair.status("b");
    let verdict = status["verdict"].as_str().unwrap();
    assert!(verdict.starts_with("DAMAGED: the index has digest") && status["danger"] == true, "{status}");
    let refused = pair.scratch.run(["promote", "b", "--dry-run"]).expect_code(1).stderr();
    assert!(refused.contains("the tree of this mirror is damaged"), "{refused}");
    // The index is derived: the next start makes it anew, and the tree is the source's again.
    pair.scratch.run(["umount", "mb"]).expect_code(0);
    pair.scratch
        .run(["mount", "b", "mb", "-d", "--listen", &free_address(), "--scrub-every", "20ms"])
        .expect_code(0);
    pair.settle();
    wait_for("a sound round of the scrub", || {
        let scrubbed = pair.status("b")["scrubbed"].clone();
        scrubbed["lsn"].is_u64() && scrubbed["trouble"].is_null()
    });
    assert!(!pair.status("b")["verdict"].as_str().unwrap().contains("DAMAGED"));
    // So does a log that nobody has read since it was written, and says where.
    let flip = || flip_a_bit(&first_segment(&pair.scratch.path("b/log")), 1000);
    flip();
    wait_for("the scrub of the log", || pair.status("b")["scrubbed"]["trouble"].is_string());
    let trouble = pair.status("b")["scrubbed"]["trouble"].to_string();
    assert!(trouble.contains("segment") || trouble.contains(".seg"), "{trouble}");
    flip();
    wait_for("a sound log", || pair.status("b")["scrubbed"]["trouble"].is_null());
    pair.scratch.run(["fsck", "b"]).expect_code(0);
    assert_eq!(fs::metadata(mb.join("small")).unwrap().mode(), small.mode());
}
