//! Restores that take over from a source whose region is gone: which archives they seal, what they carry over, and what a kill leaves.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use murphy_tests::{PATIENCE, copy_tree, wait_until};
use serde_json::Value;

use super::{Region, write_safely};

/// A region that is gone, and its two archives, the second of which lacks the end.
fn region_lost_with_an_archive_behind(test: &str) -> Option<(Region, PathBuf, PathBuf)> {
    let region = Region::sown(test, "local")?;
    // The second archive is behind when the region is lost.
    fs::rename(region.path("two"), region.path("away")).unwrap();
    write_safely(&region.path("ma/last"), b"in the first archive only").unwrap();
    region.wait_archived("a", &[0]);
    region.kill("a");
    region.put_back("two");
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
    // Each watches the archives for a minute: they wait together.
    std::thread::scope(|scope| {
        for case in moments.into_iter().enumerate() {
            let (region, one, two) = (&region, &one, &two);
            scope.spawn(move || assert_killed_and_run_again(region, (one, two), case));
        }
    });
}

/// A take-over that is killed at `moment`, and run again.
fn assert_killed_and_run_again(region: &Region, (one, two): (&Path, &Path), (number, moment): (usize, &str)) {
    let place = region.scratch.make_dir(&format!("case{number}"));
    for archive in [&one, &two] {
        copy_tree(archive, &place);
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
    wait_until("the moment of the kill", RESTORE_MAX, || {
        count() != before || restoring.try_wait().unwrap().is_some()
    });
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
        assert!(pins == 0 || (moment == "next" && ran.code() != Some(0)), "killed at {moment}: {verified}");
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

/// The fear: a restore has sealed one archive when the old source wakes and gets more into the other one, and no restore goes on from there.
#[test]
fn a_restore_carries_over_what_came_into_an_archive_after_another_one_was_sealed() {
    let test = "a_restore_carries_over_what_came_into_an_archive_after_another_one_was_sealed";
    let Some(region) = Region::sown(test, "local") else { return };
    let (before, after) = (region.scratch.make_dir("before"), region.scratch.make_dir("after"));
    ["one", "two"].iter().for_each(|name| copy_tree(&region.path(name), &before.join(name)));
    write_safely(&region.path("ma/last"), b"between two seals").unwrap();
    region.wait_archived("a", &[0, 1]);
    region.kill("a");
    ["one", "two"].iter().for_each(|name| fs::rename(region.path(name), after.join(name)).unwrap());
    let [gone, gone_too] = &region.archives;
    let (place, take_over) = (0..)
        .find_map(|attempt| {
            let place = region.scratch.make_dir(&format!("case{attempt}"));
            ["one", "two"].iter().for_each(|name| copy_tree(&before.join(name), &place.join(name)));
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
            wait_until("the first seal", RESTORE_MAX, || {
                sealed() != unsealed || restoring.try_wait().unwrap().is_some()
            });
            restoring.kill().unwrap();
            restoring.wait().unwrap();
            assert!(sealed() != unsealed);
            // One that was faster than the kill is no use here.
            (!place.join("next").exists()).then_some((place, take_over))
        })
        .unwrap();
    fs::remove_dir_all(place.join("two")).unwrap();
    copy_tree(&after.join("two"), &place.join("two"));
    let ran = region.scratch.run(&take_over).expect_code(0);
    assert!(["they are restored too", "is followed"].iter().any(|said| ran.stderr().contains(said)), "{ran}");
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
    let before = region.scratch.prints_of("two/log");
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
    assert!(!region.path("next").exists() && region.scratch.prints_of("two/log") == before);
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
    write_safely(&region.path("ma/precious"), b"acknowledged by the mirror only").unwrap();
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

/// A take-over watches the archives for a minute before it restores anything.
const RESTORE_MAX: Duration = PATIENCE.saturating_mul(4);
