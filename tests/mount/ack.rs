//! What an fsync waits for, changed while the volume is in use: what it promises before, in between and afterwards.

use std::{fs, thread};

use murphy_tests::{can_mount, free_address};
use serde_json::{Value, json};

use super::mirrors::{Pair, wait_for, write_safely};

fn level(pair: &Pair, node: &str) -> Value {
    pair.scratch.run(["ack", node, "--json"]).expect_code(0).json()
}

/// The id of the mirror that people call `name`.
fn id(pair: &Pair, name: &str) -> String {
    let listed = pair.scratch.run(["member", "list", "a", "--json"]).expect_code(0).stdout();
    let members = listed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let found = members.into_iter().find(|member| member["name"] == name);
    found.unwrap_or_else(|| panic!("{listed}"))["node"].as_str().unwrap().to_owned()
}

fn join(pair: &Pair, source: &str, mirror: &str) {
    pair.join(source, mirror, &format!("b{mirror}"));
    pair.mount(mirror, &free_address());
}

/// Waits until the source counts so many mirrors as connected.
fn wait_for_connected(pair: &Pair, source: &str, count: usize) {
    wait_for("the mirrors to be connected", || {
        let mirrors = level(pair, source)["mirrors"].clone();
        mirrors.as_array().unwrap().iter().filter(|mirror| mirror["connected"] == true).count() == count
    });
}

/// A promotion falls back to `local`, and the volume must get from there to what it promised before; what was written meanwhile, too.
#[test]
fn a_level_that_is_raised_after_a_promotion_holds_for_everything_so_far() {
    if !can_mount("a_level_that_is_raised_after_a_promotion_holds_for_everything_so_far") {
        return;
    }
    let pair = Pair::start("mirror=1");
    write_safely(&pair.scratch.path("ma/early"), b"acknowledged by b").unwrap();
    pair.lose_source();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0);
    assert_eq!(level(&pair, "b")["ack"], "local");
    write_safely(&pair.scratch.path("mb/meanwhile"), b"acknowledged by nobody else").unwrap();
    pair.scratch.run(["ack", "b", "mirror=1"]).expect_error(1, "every one would fail");
    join(&pair, "b", "c");
    wait_for_connected(&pair, "b", 1);
    let raised = pair.scratch.run(["ack", "b", "mirror=1", "--json"]).expect_code(0).json();
    assert_eq!((&raised["ack"], &raised["in_force"]), (&json!("mirror=1"), &json!(true)), "{raised}");
    assert_eq!(raised["mirrors"][0]["acknowledges"], true, "{raised}");
    // A restart keeps it.
    let address = pair.listens("b");
    pair.kill("b");
    pair.mount("b", &address);
    let kept = level(&pair, "b");
    assert_eq!((&kept["ack"], &kept["waits_for"]), (&json!("mirror=1"), &json!("mirror=1")), "{kept}");
    assert!(pair.scratch.run(["status", "b"]).stdout().contains("fsync waits   mirror=1\n"));
    let refused = pair.scratch.run(["ack", "c", "local"]).expect_error(1, "is a mirror of").stderr();
    assert!(refused.contains(&address), "{refused}");
    wait_for_connected(&pair, "b", 1);
    write_safely(&pair.scratch.path("mb/later"), b"acknowledged by c").unwrap();
    pair.kill("b");
    fs::remove_dir_all(pair.scratch.path("b")).unwrap();
    fs::remove_dir_all(pair.scratch.path("bb")).unwrap();
    pair.scratch.run(["promote", "c", "--confirm", "vol"]).expect_code(0);
    for name in ["early", "meanwhile", "later"] {
        assert!(fs::read(pair.scratch.path("mc").join(name)).is_ok(), "{name}");
    }
}

/// The fear: a mirror that was away knows of `local` only, and is promoted without asking whoever has acknowledged since.
#[test]
fn a_level_that_a_mirror_cannot_hear_of_is_refused_and_changes_nothing() {
    if !can_mount("a_level_that_a_mirror_cannot_hear_of_is_refused_and_changes_nothing") {
        return;
    }
    let pair = Pair::start("local");
    join(&pair, "a", "c");
    wait_for_connected(&pair, "a", 2);
    let (ma, away) = (pair.scratch.path("ma"), id(&pair, "c"));
    pair.kill("c");
    fs::write(ma.join("behind"), b"c does not hear of it").unwrap();
    let refused = pair.scratch.run(["ack", "a", "mirror=1"]).expect_error(1, "nothing was changed").stderr();
    assert!(refused.contains(&away) && refused.contains("member remove"), "{refused}");
    let after = level(&pair, "a");
    assert_eq!((&after["ack"], &after["waits_for"]), (&json!("local"), &json!("local")), "{after}");
    write_safely(&ma.join("still"), b"for itself").unwrap();
    pair.scratch.run(["member", "remove", "a", &away]).expect_code(0);
    pair.scratch.run(["ack", "a", "mirror=1"]).expect_code(0);
    write_safely(&ma.join("safe"), b"on b").unwrap();
    pair.scratch.run(["ack", "a", "mirror=2"]).expect_error(1, "1 could acknowledge");
    assert_eq!(level(&pair, "a")["ack"], "mirror=1");
    // Nobody serves it: nobody can say what anybody has, and nobody has to for `local`.
    pair.scratch.run(["umount", "ma"]).expect_code(0);
    wait_for("the process of a to end", || pair.status("a")["running"].is_null());
    pair.scratch.run(["ack", "a", "mirror=1"]).expect_error(1, "nobody serves this node");
    pair.scratch.run(["ack", "a", "local"]).expect_error(2, "has to be confirmed");
    pair.scratch.run(["ack", "a", "local", "--confirm", "vol"]).expect_code(0);
    assert_eq!(level(&pair, "a")["ack"], "local");
}

/// The main use of a lower level: what is waited for is gone, every fsync hangs, and people say that they go on without.
#[test]
fn a_level_is_lowered_at_once_when_what_is_waited_for_is_gone() {
    if !can_mount("a_level_is_lowered_at_once_when_what_is_waited_for_is_gone") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let ma = pair.scratch.path("ma");
    write_safely(&ma.join("early"), b"acknowledged by b").unwrap();
    pair.kill("b");
    let waiting = ma.join("waiting");
    let waiting = thread::spawn(move || write_safely(&waiting, b"it waits for b"));
    wait_for("the file to be there", || ma.join("waiting").exists());
    pair.scratch.run(["ack", "a", "local"]).expect_error(2, "has to be confirmed");
    pair.scratch.run(["ack", "a", "local", "--confirm", "other"]).expect_error(2, "nothing was changed");
    let plan = pair.scratch.run(["ack", "a", "local", "--dry-run", "--json"]).expect_code(0).json();
    assert_eq!((&plan["weakens"], &plan["waits_for"]), (&json!(true), &json!("mirror=1")), "{plan}");
    pair.scratch.run(["ack", "a", "local", "--confirm", "vol"]).expect_code(0);
    waiting.join().unwrap().expect("an fsync that waited goes on without the mirror");
    write_safely(&ma.join("later"), b"for itself").unwrap();
    pair.kill("a");
    pair.mount("a", &free_address());
    write_safely(&ma.join("latest"), b"a restart keeps it").unwrap();
}

/// The fear: fewer acknowledge from now on, and a mirror that has not heard of it asks too few of them. As many as before must know.
#[test]
fn fewer_mirrors_are_enough_once_as_many_as_before_have_heard_of_it() {
    if !can_mount("fewer_mirrors_are_enough_once_as_many_as_before_have_heard_of_it") {
        return;
    }
    let pair = Pair::start("mirror=1");
    join(&pair, "a", "c");
    wait_for("both mirrors to count", || {
        let mirrors = level(&pair, "a")["mirrors"].clone();
        mirrors.as_array().unwrap().iter().filter(|mirror| mirror["acknowledges"] == true).count() == 2
    });
    let ma = pair.scratch.path("ma");
    pair.scratch.run(["ack", "a", "mirror=2"]).expect_code(0);
    write_safely(&ma.join("early"), b"on both").unwrap();
    let gone = id(&pair, "c");
    pair.kill("c");
    let lower = ["ack", "a", "mirror=1", "--confirm", "vol"];
    let refused = pair.scratch.run(lower).expect_error(1, "is set and not in force yet").stderr();
    assert!(refused.contains("fsync waits for mirror=2 until then"), "{refused}");
    assert!(refused.contains(&gone) && refused.contains("murphy member remove"), "{refused}");
    // It is not forgotten, and goes no other way than on or back.
    let address = pair.listens("a");
    pair.kill("a");
    pair.mount("a", &address);
    let shown = level(&pair, "a");
    assert_eq!((&shown["ack"], &shown["waits_for"]), (&json!("mirror=1"), &json!("mirror=2")), "{shown}");
    assert_eq!(pair.status("a")["ack_before"], "mirror=2");
    pair.scratch.run(["ack", "a", "archive", "--confirm", "vol"]).expect_error(1, "is not in force yet");
    wait_for_connected(&pair, "a", 1);
    pair.scratch.run(["member", "remove", "a", &gone, "--assume-lost", "--confirm", "vol"]).expect_code(0);
    wait_for("the lower level to be in force by itself", || level(&pair, "a")["in_force"] == true);
    assert_eq!(pair.status("a")["ack_before"], Value::Null);
    write_safely(&ma.join("later"), b"on the one that is left").unwrap();
    pair.lose_source();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0);
    for name in ["early", "later"] {
        assert!(fs::read(pair.scratch.path("mb").join(name)).is_ok(), "{name}");
    }
}

/// What only an archive has acknowledged is lost if whoever takes over does not know the archive.
#[test]
fn archives_acknowledge_once_everybody_knows_them() {
    if !can_mount("archives_acknowledge_once_everybody_knows_them") {
        return;
    }
    let pair = Pair::start("local");
    let (ma, run) = (pair.scratch.path("ma"), |arguments: &[&str]| pair.scratch.run(arguments));
    run(&["ack", "a", "archive"]).expect_error(2, "a log archive holds no bytes");
    let (log, here) = (pair.scratch.url("log"), pair.scratch.url("here"));
    run(&["archive", "add", "a", &format!("{log}?domain=far"), "--log-only"]).expect_code(0);
    run(&["ack", "a", "archive"]).expect_error(2, "a log archive holds no bytes");
    run(&["archive", "add", "a", &here]).expect_code(0);
    run(&["ack", "a", "archive"]).expect_error(2, "does not die together with the source");
    pair.settle();
    pair.kill("b");
    let far = format!("{}?domain=far", pair.scratch.url("far"));
    run(&["archive", "add", "a", &far]).expect_code(0);
    let refused = run(&["ack", "a", "archive"]).expect_error(1, "nothing was changed").stderr();
    assert!(refused.contains("not every mirror has"), "{refused}");
    assert_eq!(level(&pair, "a")["waits_for"], "local");
    pair.mount("b", &free_address());
    pair.settle();
    fs::write(ma.join("before"), b"not synced").unwrap();
    let raised = run(&["ack", "a", "archive", "--json"]).expect_code(0).json();
    let counts = |url: &str| {
        let archives = raised["archives"].as_array().unwrap();
        archives.iter().find(|archive| archive["url"] == url).unwrap()["acknowledges"].clone()
    };
    assert_eq!((counts(&far), counts(&here)), (json!(true), json!(false)), "{raised}");
    pair.kill("b");
    write_safely(&ma.join("precious"), b"in the archives only").unwrap();
    fs::rename(pair.scratch.path("far"), pair.scratch.path("away")).unwrap();
    fs::write(pair.scratch.path("far"), b"no archive").unwrap();
    write_safely(&ma.join("refused"), b"no archive answers").unwrap_err();
    run(&["ack", "a", "local", "--confirm", "vol"]).expect_code(0);
    write_safely(&ma.join("alone"), b"for itself").unwrap();
    fs::remove_file(pair.scratch.path("far")).unwrap();
    fs::rename(pair.scratch.path("away"), pair.scratch.path("far")).unwrap();
    pair.lose_source();
    pair.mount("b", &free_address());
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0);
    assert_eq!(fs::read(pair.scratch.path("mb/precious")).unwrap(), b"in the archives only");
}

/// A restore waits for nobody, or for members that were given up: what is raised there holds for what was restored, too.
#[test]
fn a_level_that_is_raised_after_a_restore_holds_for_everything_so_far() {
    if !can_mount("a_level_that_is_raised_after_a_restore_holds_for_everything_so_far") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let run = |arguments: &[&str]| pair.scratch.run(arguments);
    let [far, other] = ["far", "other"].map(|name| format!("{}?domain={name}", pair.scratch.url(name)));
    run(&["archive", "add", "a", &far]).expect_code(0);
    write_safely(&pair.scratch.path("ma/early"), b"acknowledged by b").unwrap();
    let gone = id(&pair, "b");
    let wanted = pair.status("a")["durable_lsn"].as_u64();
    wait_for("the archive", || pair.status("a")["archives"][0]["lsn"].as_u64() >= wanted);
    pair.kill("b");
    pair.lose_source();
    // A copy waits for nobody, and has no archive until one is given.
    run(&["restore", &far, "copy"]).expect_code(0);
    pair.scratch.make_dir("mcopy");
    run(&["mount", "copy", "mcopy", "-d"]).expect_code(0);
    assert_eq!(level(&pair, "copy")["waits_for"], "local");
    run(&["ack", "copy", "archive"]).expect_error(2, "--archive");
    run(&["archive", "add", "copy", &other]).expect_code(0);
    let raised = run(&["ack", "copy", "archive", "--json"]).expect_code(0).json();
    assert_eq!((&raised["ack"], &raised["in_force"]), (&json!("archive"), &json!(true)), "{raised}");
    write_safely(&pair.scratch.path("mcopy/later"), b"in the other archive").unwrap();
    run(&["umount", "mcopy"]).expect_code(0);
    run(&["restore", &other, "second"]).expect_code(0);
    pair.scratch.make_dir("msecond");
    run(&["mount", "second", "msecond", "-d"]).expect_code(0);
    assert_eq!(fs::read(pair.scratch.path("msecond/later")).unwrap(), b"in the other archive");
    run(&["umount", "msecond"]).expect_code(0);
    // The successor lacks whom its volume waits for, until somebody joins.
    run(&["restore", &far, "d", "--take-over", "--confirm", "vol", "--assume-lost", &gone]).expect_code(0);
    pair.mount("d", &free_address());
    run(&["ack", "d", "local", "--confirm", "vol"]).expect_code(0);
    run(&["member", "remove", "d", &gone, "--assume-lost", "--confirm", "vol"]).expect_code(0);
    join(&pair, "d", "c");
    wait_for_connected(&pair, "d", 1);
    let raised = run(&["ack", "d", "mirror=1", "--json"]).expect_code(0).json();
    assert_eq!((&raised["ack"], &raised["in_force"]), (&json!("mirror=1"), &json!(true)), "{raised}");
    write_safely(&pair.scratch.path("md/later"), b"acknowledged by c").unwrap();
    pair.kill("d");
    fs::remove_dir_all(pair.scratch.path("d")).unwrap();
    run(&["promote", "c", "--confirm", "vol"]).expect_code(0);
    for name in ["early", "later"] {
        assert!(fs::read(pair.scratch.path("mc").join(name)).is_ok(), "{name}");
    }
}
