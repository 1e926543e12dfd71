//! Taking over when a volume has archives: what a promotion seals and fetches, who is shut out, and what a kill in the middle leaves;
//! and what a restore does that takes over ([`restores`]).

mod given_up;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use murphy_tests::{Scratch, assert_same_tree, can_mount, free_address, is_dead};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::mirrors::{wait_for, write_safely};

mod restores;

/// A source `a` at `ma` with two archives, and a mirror `b` at `mb` that nobody can call.
struct Region {
    scratch: Scratch,
    archives: [String; 2],
}

impl Region {
    /// A region with files, every one of which the mirror and both archives have. `None`, which is said, where `test` cannot mount.
    fn sown(test: &str, ack: &str) -> Option<Region> {
        if !can_mount(test) {
            return None;
        }
        let region = Region::start(ack);
        sow(&region.path("ma"));
        region.settle();
        Some(region)
    }

    fn start(ack: &str) -> Region {
        let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
        let url = |name: &str, domain: &str| format!("{}?domain={domain}", scratch.url(name));
        let archives = [url("one", "first"), url("two", "second")];
        let blocks = scratch.url("ba");
        let format = ["format", "a", "--blocks", &blocks, "--name", "vol", "--ack", ack];
        let with = ["--archive", &archives[0], "--archive", &archives[1]];
        scratch.run(format.iter().chain(&with)).expect_code(0);
        let region = Region { scratch, archives };
        region.mount("a", &["--listen", &free_address()]);
        let token = region.scratch.run(["invite", "a"]).expect_code(0).stdout();
        fs::write(region.path("token"), token).unwrap();
        let url = region.scratch.url("bb");
        region.scratch.run(["join", "b", "--token-file", "token", "--blocks", &url]).expect_code(0);
        region.mount("b", &[]);
        region
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    fn mount(&self, node: &str, more: &[&str]) {
        let place = format!("m{node}");
        // The mount of a process that was killed is still there; the next one replaces it.
        let _there_already = fs::create_dir(self.path(&place));
        let mount = ["mount", node, &place, "-d", "--io-timeout", "20s"];
        self.scratch.run(mount.iter().chain(more)).expect_code(0);
    }

    /// Begins a command that may be killed.
    fn begin(&self, arguments: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_murphy-program"));
        command.args(arguments).current_dir(self.path("."));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    fn status(&self, node: &str) -> Value {
        self.scratch.run(["status", node, "--json"]).json()
    }

    fn pid(&self, node: &str) -> Pid {
        Pid::from_raw(self.status(node)["running"]["pid"].as_i64().unwrap() as i32).unwrap()
    }

    fn kill(&self, node: &str) {
        kill_process(self.pid(node), Signal::KILL).unwrap();
        let place = self.path(&format!("m{node}"));
        wait_for("the mount to die", || is_dead(&place));
    }

    /// The source, its store and its whole machine are gone.
    fn lose_source(&self) {
        self.kill("a");
        rustix::mount::unmount(self.path("ma"), rustix::mount::UnmountFlags::DETACH).unwrap();
        fs::remove_dir_all(self.path("a")).unwrap();
        fs::remove_dir_all(self.path("ba")).unwrap();
    }

    /// An archive that was moved away is there again; whoever asked for it meanwhile may have begun its directory anew.
    fn put_back(&self, archive: &str) {
        fs::remove_dir_all(self.path(archive)).unwrap_or_default();
        fs::rename(self.path("away"), self.path(archive)).unwrap();
    }

    /// Waits until the mirror and both archives have everything.
    fn settle(&self) {
        self.scratch.run(["flush", "ma"]).expect_code(0);
        let wanted = self.status("a")["durable_lsn"].as_u64();
        wait_for("the mirror to have every byte", || self.status("b")["data_lsn"].as_u64() >= wanted);
        self.wait_archived("a", &[0, 1]);
    }

    /// Waits until these archives hold everything that is durable on `node` now.
    fn wait_archived(&self, node: &str, archives: &[usize]) {
        let wanted = self.status(node)["durable_lsn"].as_u64();
        let held = |status: &Value, at: &usize| status["archives"][*at]["lsn"].as_u64() >= wanted;
        wait_for("the archives", || {
            let status = self.status(node);
            archives.iter().all(|at| held(&status, at))
        });
    }

    fn plan(&self) -> Value {
        self.scratch.run(["promote", "b", "--dry-run", "--json"]).expect_code(0).json()
    }

    fn promote(&self) -> Value {
        self.scratch.run(["promote", "b", "--confirm", "vol", "--json"]).expect_code(0).json()
    }

    /// Both archives are whole, were sealed once, and restore to what the mount of `b` shows.
    fn assert_archives_are_those_of_b(&self) {
        self.scratch.run(["flush", "mb"]).expect_code(0);
        self.wait_archived("b", &[0, 1]);
        for (number, archive) in self.archives.iter().enumerate() {
            let verified = self.scratch.run(["verify", archive, "--data", "100", "--json"]).expect_code(0);
            assert_eq!(verified.json()["seals"], 1, "{archive}");
            let (copy, place) = (format!("copy{number}"), format!("mcopy{number}"));
            self.scratch.run(["restore", archive, &copy]).expect_code(0);
            self.scratch.make_dir(&place);
            self.scratch.run(["mount", &copy, &place, "-d"]).expect_code(0);
            assert_same_tree(&self.path("mb"), &self.path(&place));
            self.scratch.run(["umount", &place]).expect_code(0);
        }
    }
}

fn sow(place: &Path) {
    fs::create_dir_all(place.join("deep")).unwrap();
    let large: Vec<u8> = (0..1_500_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(place.join("deep/large"), large).unwrap();
    for i in 0..40 {
        fs::write(place.join(format!("deep/{i}")), format!("file {i}\n").repeat(i)).unwrap();
    }
}

/// Two sources on one archive would be two histories: the seal decides, without a word between the two nodes.
#[test]
fn a_promotion_seals_the_archives_and_ships_to_them_at_once() {
    let Some(region) = Region::sown("a_promotion_seals_the_archives_and_ships_to_them_at_once", "local")
    else {
        return;
    };
    region.kill("a");
    let plan = region.plan();
    for at in [0, 1] {
        assert_eq!(plan["archives"][at]["act"], "seal", "{plan}");
        assert!(plan["text"].as_str().unwrap().contains(plan["archives"][at]["url"].as_str().unwrap()));
    }
    let promoted = region.promote();
    assert_eq!((&promoted["lost_entries"], &promoted["epoch"]), (&0.into(), &2.into()), "{promoted}");
    fs::write(region.path("mb/new"), b"in the new epoch").unwrap();
    region.assert_archives_are_those_of_b();
    let status = region.status("b");
    assert!(status["archives"][0]["lag_ms"].is_u64() && status["archives"][0]["error"].is_null(), "{status}");
    // Nobody can call the successor: the old source hears of it from its archives.
    let stopped = region.scratch.run(["serve", "a"]).expect_error(1, "another source has taken over");
    assert!(stopped.stderr().contains("was sealed at"), "{}", stopped.stderr());
}

/// With `--ack archive` what an fsync was answered for may be in one archive only, its bytes too.
#[test]
fn what_only_an_archive_holds_is_fetched_by_a_promotion() {
    let Some(region) = Region::sown("what_only_an_archive_holds_is_fetched_by_a_promotion", "archive") else {
        return;
    };
    region.kill("b");
    let large: Vec<u8> = (0..900_000u32).map(|i| (i.wrapping_mul(2_246_822_519) >> 11) as u8).collect();
    write_safely(&region.path("ma/precious"), b"precious").unwrap();
    write_safely(&region.path("ma/large"), &large).unwrap();
    region.lose_source();
    region.mount("b", &[]);
    assert!(!region.path("mb/precious").exists());
    let acts: Vec<Value> = (0..2).map(|at| region.plan()["archives"][at]["act"].clone()).collect();
    assert!(acts.contains(&"fetch and seal".into()), "{acts:?}");
    region.promote();
    let read = || {
        assert_eq!(fs::read(region.path("mb/precious")).unwrap(), b"precious");
        assert!(fs::read(region.path("mb/large")).unwrap() == large);
    };
    read();
    write_safely(&region.path("mb/later"), b"acknowledged by an archive").unwrap();
    region.assert_archives_are_those_of_b();
    region.scratch.run(["umount", "mb"]).expect_code(0);
    region.mount("b", &[]);
    read();
    assert_eq!(region.scratch.run(["fsck", "mb", "--data", "--json"]).expect_code(0).json()["findings"], 0);
}

/// An archive that does not answer could go on with the old source: it is named, and given up only by name.
#[test]
fn an_archive_that_does_not_answer_is_given_up_by_its_url_only() {
    let Some(region) = Region::sown("an_archive_that_does_not_answer_is_given_up_by_its_url_only", "local")
    else {
        return;
    };
    region.kill("a");
    fs::rename(region.path("two"), region.path("away")).unwrap();
    let plan = region.plan();
    assert!(plan["archives"][1]["error"].is_string(), "{plan}");
    let promote = ["promote", "b", "--confirm", "vol"];
    let refused = region.scratch.run(promote).expect_error(1, "two?domain=second cannot be sealed");
    assert!(refused.stderr().contains("--assume-lost"), "{}", refused.stderr());
    let with = |lost: &'static str| promote.iter().copied().chain(["--assume-lost", lost]);
    region.scratch.run(with("file:///nowhere")).expect_error(2, "neither a member nor an archive");
    let other = region.archives[1].clone();
    region.scratch.run(promote.iter().copied().chain(["--assume-lost", &other])).expect_code(0);
    write_safely(&region.path("mb/new"), b"without the second archive").unwrap();
    // It comes back: the new source seals it and goes on with it, before the old one can.
    fs::rename(region.path("away"), region.path("two")).unwrap();
    region.assert_archives_are_those_of_b();
    region.scratch.run(["serve", "a"]).expect_error(1, "another source has taken over");
}

/// The fear: an archive that was given up holds more of the old epoch than the new source has decided when that one is killed, and the new
/// source takes this for its own loss: it does not start any more, and no command takes the archive out of the volume.
#[test]
fn an_archive_that_was_given_up_keeps_the_new_source_from_nothing_but_acknowledging() {
    let test = "an_archive_that_was_given_up_keeps_the_new_source_from_nothing_but_acknowledging";
    let Some(region) = Region::sown(test, "archive") else { return };
    region.kill("b");
    fs::rename(region.path("one"), region.path("away")).unwrap();
    for i in 0..40 {
        write_safely(&region.path(&format!("ma/only-{i}")), b"in the second archive only").unwrap();
    }
    region.kill("a");
    region.put_back("one");
    fs::rename(region.path("two"), region.path("away")).unwrap();
    region.mount("b", &[]);
    let two = region.archives[1].clone();
    let promote = ["promote", "b", "--confirm", "vol", "--assume-lost", &two];
    region.scratch.run(promote).expect_code(0);
    region.kill("b");
    region.put_back("two");
    region.mount("b", &[]);
    // Another source has acknowledged through it, and might go on: that is said, and nothing is acknowledged.
    let write = || fs::File::create(region.path("mb/new")).and_then(|file| file.sync_all());
    write().unwrap_err();
    let said = region.status("b")["archives"][1]["error"].to_string();
    assert!(said.contains("holds entries up to"), "{said}");
    let refused = region.scratch.run(["archive", "remove", "b", &two]).expect_code(1);
    assert!(refused.stderr().contains("--assume-lost"), "{}", refused.stderr());
    region.scratch.run(["archive", "remove", "b", &two, "--assume-lost", "--confirm", "vol"]).expect_code(0);
    write().unwrap();
    // The same of a node that is not served.
    region.kill("b");
    region.scratch.run(["archive", "remove", "b", &two]).expect_error(1, "is not an archive of this volume");
    region.mount("b", &[]);
    write().unwrap();
}

/// The seal of a successor that nobody knows of stops a promotion, and names it.
#[test]
fn a_mirror_does_not_take_over_from_a_successor() {
    let Some(region) = Region::sown("a_mirror_does_not_take_over_from_a_successor", "local") else { return };
    region.scratch.run(["umount", "mb"]).expect_code(0);
    // A clone of the mirror's directory with a key of its own would be such a successor; so is a restore.
    region.kill("a");
    let [one, two] = &region.archives;
    let blocks = region.scratch.url("bn");
    let take_over = ["restore", one, two, "next", "--take-over", "--confirm", "vol", "--blocks", &blocks];
    region.scratch.run(take_over).expect_code(0);
    let plan = region.plan();
    assert!(plan["archives"][0]["error"].as_str().unwrap().contains("sealed"), "{plan}");
    let refused = region.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "sealed at");
    assert!(refused.stderr().contains("by node"), "{}", refused.stderr());
    assert!(refused.stderr().contains("this run has changed nothing"), "{}", refused.stderr());
    region.mount("next", &[]);
    fs::write(region.path("mnext/new"), b"of the successor").unwrap();
    region.scratch.run(["umount", "mnext"]).expect_code(0);
    region.scratch.run(["verify", one]).expect_code(0);
}

/// The promoter is killed as soon as it has remembered its epoch, and as soon as it has sealed one archive, and both.
#[test]
fn a_promoter_that_is_killed_in_between_is_promoted_again() {
    const TEST: &str = "a_promoter_that_is_killed_in_between_is_promoted_again";
    let seal = |place: &str| format!("{place}/log/0000000001");
    let moments = [vec!["b/promoting.json".to_owned()], vec![seal("one")], vec![seal("one"), seal("two")]];
    for moment in moments {
        let Some(region) = Region::sown(TEST, "local") else { return };
        region.kill("a");
        let count = |place: &String| match fs::read_dir(region.path(place)) {
            Ok(entries) => entries.count(),
            Err(_) => usize::from(region.path(place).exists()),
        };
        let before: Vec<usize> = moment.iter().map(count).collect();
        let pid = region.pid("b");
        let mut promoting = region.begin(&["promote", "b", "--confirm", "vol"]);
        wait_for("the moment of the kill", || {
            let has_come = moment.iter().zip(&before).all(|(place, before)| count(place) != *before);
            has_come || promoting.try_wait().unwrap().is_some()
        });
        kill_process(pid, Signal::KILL).unwrap();
        promoting.wait().unwrap();
        wait_for("the mount to die", || is_dead(&region.path("mb")));
        region.mount("b", &[]);
        if region.status("b")["role"] == "mirror" {
            region.promote();
        }
        assert_eq!(region.status("b")["position"]["epoch"], 2, "the epoch that was remembered");
        fs::write(region.path("mb/new"), b"in the new epoch").unwrap();
        region.assert_archives_are_those_of_b();
        region.scratch.run(["serve", "a"]).expect_error(1, "another source has taken over");
    }
}
