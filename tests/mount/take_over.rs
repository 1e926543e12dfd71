//! Taking over when a volume has archives: what a promotion seals and fetches, who is shut out, and what a kill in the middle leaves.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use murphy_tests::{PATIENCE, Scratch, can_mount, is_dead, output_of, pause, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

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
        region.mount("a", &["--listen", "127.0.0.1:0"]);
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
            assert_same(&self.path("mb"), &self.path(&place));
            self.scratch.run(["umount", &place]).expect_code(0);
        }
    }
}

fn wait_for(what: &str, ready: impl FnMut() -> bool) {
    wait_until(what, PATIENCE, ready);
}

fn sow(place: &Path) {
    fs::create_dir_all(place.join("deep")).unwrap();
    let large: Vec<u8> = (0..1_500_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(place.join("deep/large"), large).unwrap();
    for i in 0..40 {
        fs::write(place.join(format!("deep/{i}")), format!("file {i}\n").repeat(i)).unwrap();
    }
}

fn assert_same(a: &Path, b: &Path) {
    let compared = output_of(Command::new("diff").arg("-r").arg(a).arg(b));
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
}

fn write_safely(path: &Path, bytes: &[u8]) {
    let mut file = fs::File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
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
    write_safely(&region.path("ma/precious"), b"precious");
    write_safely(&region.path("ma/large"), &large);
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
    write_safely(&region.path("mb/later"), b"acknowledged by an archive");
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
    write_safely(&region.path("mb/new"), b"without the second archive");
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
        write_safely(&region.path(&format!("ma/only-{i}")), b"in the second archive only");
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
    region.scratch.run(["archive", "remove", "b", &two, "--assume-lost"]).expect_code(0);
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
    pause(SILENCE);
    let [one, two] = &region.archives;
    let blocks = region.scratch.url("bn");
    let take_over = ["restore", one, two, "next", "--take-over", "--confirm", "vol", "--blocks", &blocks];
    region.scratch.run(take_over).expect_code(0);
    let plan = region.plan();
    assert!(plan["archives"][0]["error"].as_str().unwrap().contains("sealed"), "{plan}");
    let refused = region.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "sealed at");
    assert!(refused.stderr().contains("by node"), "{}", refused.stderr());
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

/// A source that ticked so long ago is taken for gone.
const SILENCE: Duration = Duration::from_secs(61);

/// A region that is gone for longer than a source is silent, and its two archives, the second of which lacks the end.
fn region_lost_with_an_archive_behind(test: &str) -> Option<(Region, PathBuf, PathBuf)> {
    let region = Region::sown(test, "local")?;
    // The second archive is behind when the region is lost.
    fs::rename(region.path("two"), region.path("away")).unwrap();
    write_safely(&region.path("ma/last"), b"in the first archive only");
    region.wait_archived("a", &[0]);
    region.kill("a");
    region.put_back("two");
    pause(SILENCE);
    // Successors ship to the places that the log names: what each case begins with is out of their reach.
    let silent = region.scratch.make_dir("silent");
    for name in ["one", "two"] {
        fs::rename(region.path(name), silent.join(name)).unwrap();
    }
    let (one, two) = (silent.join("one"), silent.join("two"));
    Some((region, one, two))
}

/// The fear: the successor dies between its seal and its rename, and its archives are sealed for ever by nobody.
#[test]
fn a_restore_that_takes_over_and_is_killed_is_run_again() {
    let test = "a_restore_that_takes_over_and_is_killed_is_run_again";
    let Some((region, one, two)) = region_lost_with_an_archive_behind(test) else { return };
    // What is there when the restore is killed: in the hidden directory, or in an archive.
    let moments = ["index", "base", "taking-over", "one/log/0000000001", "two/log/0000000001", "log", "next"];
    for (number, moment) in moments.into_iter().enumerate() {
        let place = region.scratch.make_dir(&format!("case{number}"));
        for archive in [&one, &two] {
            assert!(output_of(Command::new("cp").arg("-a").args([archive, &place])).status.success());
        }
        let url = |name: &str, domain: &str| format!("file://{}/{name}?domain={domain}", place.display());
        let (one, two) = (url("one", "first"), url("two", "second"));
        let blocks = format!("file://{}/blocks", place.display());
        let target = format!("case{number}/next");
        // The places that the log names are gone; what is given are copies of them.
        let [gone, gone_too] = &region.archives;
        let take_over = ["restore", &one, &two, &target, "--take-over", "--confirm", "vol"];
        let more = ["--blocks", &blocks, "--assume-lost", gone, "--assume-lost", gone_too];
        let take_over: Vec<&str> = take_over.into_iter().chain(more).collect();
        let count = || match moment {
            "one/log/0000000001" | "two/log/0000000001" => fs::read_dir(place.join(moment)).unwrap().count(),
            "next" => usize::from(place.join("next/murphy.toml").exists()),
            inner => hidden(&place).map_or(0, |hidden| usize::from(hidden.join(inner).exists())),
        };
        let before = count();
        let mut restoring = region.begin(&take_over);
        wait_for("the moment of the kill", || count() != before || restoring.try_wait().unwrap().is_some());
        restoring.kill().unwrap();
        restoring.wait().unwrap();
        let ran = region.scratch.run(&take_over);
        match ran.code() {
            Some(0) => {}
            _ => assert!(ran.stderr().contains("is not empty"), "killed at {moment}: {ran}"),
        }
        assert_eq!(fs::read_dir(&place).unwrap().count() - 4, leftovers(&place, &target), "{moment}");
        for archive in [&one, &two] {
            let verified = region.scratch.run(["verify", archive, "--data", "100", "--json"]).expect_code(0);
            let verified = verified.json();
            assert_eq!(verified["seals"], 1, "killed at {moment}: {archive}");
            // After its rename nobody is left to take a pin back; it is seen, and does no harm.
            let pins = verified["pins"].as_array().unwrap().len();
            assert!(
                pins == 0 || (moment == "next" && ran.code() != Some(0)),
                "killed at {moment}: {verified}"
            );
        }
        let mount = region.scratch.make_dir(&format!("m{number}"));
        region.scratch.run(["mount", &target, &format!("m{number}"), "-d"]).expect_code(0);
        assert_eq!(fs::read(mount.join("last")).unwrap(), b"in the first archive only");
        assert_eq!(fs::read_dir(mount.join("deep")).unwrap().count(), 41, "killed at {moment}");
        region.scratch.run(["umount", &format!("m{number}")]).expect_code(0);
        let checked = region.scratch.run(["fsck", &target, "--data", "--json"]).expect_code(0).json();
        assert_eq!(checked["findings"], 0, "killed at {moment}");
        // Another successor is told who it was, and leaves what is there.
        let other = format!("case{number}/other");
        let again: Vec<&str> =
            take_over.iter().map(|part| if *part == target { other.as_str() } else { part }).collect();
        let refused = region.scratch.run(again).expect_error(1, "sealed at");
        assert!(refused.stderr().contains("by node"), "{}", refused.stderr());
    }
}

/// The fear: a restore has sealed one archive when the old source wakes and gets more into the other one, and no restore goes on from there.
#[test]
fn a_restore_carries_over_what_came_into_an_archive_after_another_one_was_sealed() {
    let test = "a_restore_carries_over_what_came_into_an_archive_after_another_one_was_sealed";
    let Some(region) = Region::sown(test, "local") else { return };
    let copy = |from: &Path, to: &Path| {
        let copied = output_of(Command::new("cp").arg("-a").args([from, to]));
        assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
    };
    let (before, after) = (region.scratch.make_dir("before"), region.scratch.make_dir("after"));
    ["one", "two"].iter().for_each(|name| copy(&region.path(name), &before.join(name)));
    write_safely(&region.path("ma/last"), b"between two seals");
    region.wait_archived("a", &[0, 1]);
    region.kill("a");
    pause(SILENCE);
    ["one", "two"].iter().for_each(|name| fs::rename(region.path(name), after.join(name)).unwrap());
    let [gone, gone_too] = &region.archives;
    let (place, take_over) = (0..)
        .find_map(|attempt| {
            let place = region.scratch.make_dir(&format!("case{attempt}"));
            ["one", "two"].iter().for_each(|name| copy(&before.join(name), &place.join(name)));
            let url = |name: &str, domain: &str| format!("file://{}/{name}?domain={domain}", place.display());
            let target = place.join("next").display().to_string();
            let blocks = format!("file://{}/blocks", place.display());
            let given = [&url("one", "first"), &url("two", "second"), &target, "--blocks", &blocks];
            let given_up = ["--assume-lost", gone, "--assume-lost", gone_too];
            let arguments = ["restore", "--take-over", "--confirm", "vol"].into_iter().chain(given);
            let take_over: Vec<String> = arguments.chain(given_up).map(str::to_owned).collect();
            let sealed = || {
                let there = fs::read_dir(place.join("one/log/0000000001"))
                    .unwrap()
                    .map(|entry| entry.unwrap().path());
                there.filter(|path| path.extension().is_some_and(|extension| extension == "seg")).count()
            };
            let unsealed = sealed();
            let mut restoring = region.begin(&take_over.iter().map(String::as_str).collect::<Vec<_>>());
            wait_for("the first seal", || sealed() != unsealed || restoring.try_wait().unwrap().is_some());
            restoring.kill().unwrap();
            restoring.wait().unwrap();
            assert!(sealed() != unsealed);
            // One that was faster than the kill is no use here.
            (!place.join("next").exists()).then_some((place, take_over))
        })
        .unwrap();
    fs::remove_dir_all(place.join("two")).unwrap();
    copy(&after.join("two"), &place.join("two"));
    let ran = region.scratch.run(&take_over).expect_code(0);
    assert!(ran.stderr().contains("they are restored too"), "{ran}");
    let archives = ["one?domain=first", "two?domain=second"];
    let archives = archives.map(|name| format!("file://{}/{name}", place.display()));
    for (number, archive) in archives.iter().enumerate() {
        let verified = region.scratch.run(["verify", archive, "--data", "100", "--json"]).expect_code(0);
        assert_eq!(verified.json()["seals"], 1, "{archive}");
        let node = format!("alone{number}");
        region.scratch.run(["restore", archive, &node]).expect_code(0);
        region.mount(&node, &[]);
        assert_eq!(fs::read(region.path(&format!("m{node}/last"))).unwrap(), b"between two seals");
    }
    region.scratch.make_dir("mnext");
    region.scratch.run(["mount", &take_over[6], "mnext", "-d"]).expect_code(0);
    assert_eq!(fs::read(region.path("mnext/last")).unwrap(), b"between two seals");
    region.scratch.run(["umount", "mnext"]).expect_code(0);
    assert_eq!(
        region.scratch.run(["fsck", &take_over[6], "--data", "--json"]).expect_code(0).json()["findings"],
        0
    );
}

/// The fear: an operator gives the archive that comes to mind, and the old source goes on acknowledging through the other one.
#[test]
fn a_restore_seals_every_archive_that_the_log_names_given_or_not() {
    let test = "a_restore_seals_every_archive_that_the_log_names_given_or_not";
    let Some((region, one, two)) = region_lost_with_an_archive_behind(test) else { return };
    let [whole, stale] = &region.archives;
    let blocks = region.scratch.url("bn");
    fs::rename(two, region.path("two")).unwrap();
    let before = region.scratch.bytes_of("two/log");
    let take_over = ["restore", stale, "next", "--take-over", "--confirm", "vol", "--blocks", &blocks];
    // The other one cannot be asked: nothing is done, and the way out is named.
    let refused = region.scratch.run(take_over).expect_error(1, &format!("{whole}: ")).stderr();
    assert!(refused.contains(&format!("--assume-lost '{whole}'")), "{refused}");
    assert!(refused.contains("behind lsn"), "{refused}");
    let plan = |more: &[&str]| {
        let dry = take_over.iter().chain(&["--dry-run", "--json"]);
        region.scratch.run(dry.chain(more)).expect_code(0).json()["take_over"].clone()
    };
    let act = |plan: &Value, url: &str| {
        let archives = plan["archives"].as_array().unwrap();
        archives.iter().find(|archive| archive["url"] == url).unwrap()["act"].clone()
    };
    let planned = plan(&[]);
    assert_eq!((act(&planned, whole), act(&planned, stale)), ("none".into(), "seal".into()), "{planned}");
    let planned = plan(&["--assume-lost", whole]);
    assert_eq!((act(&planned, whole), &planned["name"]), ("give up".into(), &"vol".into()), "{planned}");
    region.scratch.run(take_over.iter().chain(&["--assume-lost", "file:///nowhere"])).expect_code(2);
    assert!(!region.path("next").exists() && region.scratch.bytes_of("two/log") == before);
    // It is there: it is found by the log of the one that was given, read, and sealed.
    fs::rename(one, region.path("one")).unwrap();
    let planned = plan(&[]);
    assert_eq!((act(&planned, whole), act(&planned, stale)), ("seal".into(), "ship and seal".into()));
    region.scratch.run(take_over).expect_code(0);
    region.scratch.run(["serve", "a"]).expect_error(1, "another source has taken over");
    region.mount("next", &[]);
    assert_eq!(fs::read(region.path("mnext/last")).unwrap(), b"in the first archive only");
    region.scratch.run(["umount", "mnext"]).expect_code(0);
    for archive in [whole, stale] {
        let verified = region.scratch.run(["verify", archive, "--data", "100", "--json"]).expect_code(0);
        assert_eq!(verified.json()["seals"], 1, "{archive}");
    }
}

/// The fear: archives lag, a mirror has acknowledged more, and a restore leaves that behind without a word.
#[test]
fn a_restore_does_not_leave_behind_what_a_mirror_has_acknowledged() {
    let test = "a_restore_does_not_leave_behind_what_a_mirror_has_acknowledged";
    let Some(region) = Region::sown(test, "mirror=1") else { return };
    for name in ["one", "two"] {
        fs::rename(region.path(name), region.path(&format!("{name} away"))).unwrap();
    }
    write_safely(&region.path("ma/precious"), b"acknowledged by the mirror only");
    region.kill("a");
    for name in ["one", "two"] {
        fs::remove_dir_all(region.path(name)).unwrap_or_default();
        fs::rename(region.path(&format!("{name} away")), region.path(name)).unwrap();
    }
    let [one, two] = &region.archives;
    let take_over = ["restore", one, two, "next", "--take-over", "--confirm", "vol"];
    let dry = ["--dry-run", "--json"];
    let planned = region.scratch.run(take_over.iter().chain(&dry)).expect_code(0).json();
    let member = planned["take_over"]["members"][0].clone();
    let node = member["node"].as_str().unwrap();
    assert_eq!((&member["act"], &planned["take_over"]["ack"]), (&"none".into(), &"mirror=1".into()));
    let refused = region.scratch.run(take_over).expect_error(1, "fsync waited for members").stderr();
    assert!(refused.contains(&format!("--assume-lost {node}")), "{refused}");
    assert!(refused.contains("murphy promote") && refused.contains("behind lsn"), "{refused}");
    assert!(!region.path("next").exists());
    let given_up = ["--dry-run", "--assume-lost", node];
    let planned = region.scratch.run(take_over.iter().chain(&given_up)).expect_code(0).stdout();
    assert!(planned.contains(node), "{planned}");
    assert!(planned.contains("is given up: what only it holds behind lsn"), "{planned}");
    region.promote();
    assert_eq!(fs::read(region.path("mb/precious")).unwrap(), b"acknowledged by the mirror only");
}

/// The directory in which a restore is at work.
fn hidden(place: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(place).unwrap().map(|entry| entry.unwrap());
    let is_hidden = |name: &std::ffi::OsStr| name.as_encoded_bytes().ends_with(b".new");
    entries.map(|entry| entry.path()).find(|path| path.file_name().is_some_and(is_hidden))
}

/// How many directories are left behind of restores that were killed before they had remembered anything.
fn leftovers(place: &Path, target: &str) -> usize {
    let entries = fs::read_dir(place).unwrap().map(|entry| entry.unwrap().path());
    let left: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "new")).collect();
    let has_remembered = |path: &PathBuf| {
        let kept = fs::read_dir(path.join("taking-over")).into_iter().flatten();
        kept.flatten().any(|kept| kept.path().extension().is_some_and(|extension| extension == "json"))
    };
    assert!(!left.iter().any(has_remembered), "{target}: {left:?}");
    left.len()
}
