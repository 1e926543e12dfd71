//! Who leads after a promotion, and through whom it acknowledges, with real processes and mounts: members that lag, are given up, or are new;
//! two that are promoted at once.

use std::{collections::BTreeSet, fs, path::Path};

use murphy_tests::{Misdeed, S3Endpoint, Scratch, can_mount, free_address, read_summed};
use serde_json::Value;

use super::{
    members::{id_at, join, mount, status_of, wait_for_addresses, wait_for_bytes, wait_for_following},
    mirrors::{Pair, wait_for, write_safely},
};

/// The members through which `node` acknowledges, as it remembers them.
fn acknowledging(pair: &Pair, node: &str) -> BTreeSet<String> {
    let set = read_summed(&pair.scratch.path(&format!("{node}/acknowledging.json")));
    set.and_then(|set| serde_json::from_value(set).ok()).unwrap_or_default()
}

/// Writes `bytes` until an fsync has been acknowledged, and then they are.
fn acknowledge(path: &Path, bytes: &[u8]) {
    wait_for("an fsync to be acknowledged", || write_safely(path, bytes).is_ok());
}

/// The fear: right after a promotion one mirror that has caught up acknowledges, or a new one that the others have not heard of; then the
/// promoted source is gone too, and one of the others takes over without what was acknowledged.
#[test]
fn a_promoted_source_waits_for_all_that_were_not_given_up_until_they_have_caught_up() {
    if !can_mount("a_promoted_source_waits_for_all_that_were_not_given_up_until_they_have_caught_up") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let ma = pair.scratch.path("ma");
    for mirror in ["c", "d"] {
        join(&pair, "a", mirror, Some(&free_address()));
    }
    wait_for_addresses(&pair, "a", 3);
    let (at_c, at_d) = (pair.listens("c"), pair.listens("d"));
    write_safely(&ma.join("early"), b"on all").unwrap();
    wait_for_bytes(&pair, "a", "c");
    // One lags, and one that has never been there is given up.
    pair.kill("c");
    pair.join("a", "x", "bx");
    let [c, d, x] = ["c", "d", "x"].map(|name| id_at(&pair, "a", name));
    acknowledge(&ma.join("later"), b"on two of three");
    pair.settle();
    wait_for_bytes(&pair, "a", "d");
    // The promoted one does not listen at first, so that nobody can catch up.
    pair.scratch.run(["umount", "mb"]).expect_code(0);
    mount(&pair, "b", None);
    pair.lose_source();
    pair.mount("c", &at_c);
    pair.scratch.run(["promote", "b", "--confirm", "vol", "--assume-lost", &x]).expect_code(0);
    assert_eq!(
        acknowledging(&pair, "b"),
        BTreeSet::from([c.clone(), d.clone()]),
        "not the one that was given up"
    );
    pair.kill("c");
    // It is killed in between, and listens from then on.
    pair.kill("b");
    pair.scratch
        .run(["mount", "b", "mb", "-d", "--listen", &free_address(), "--io-timeout", "5s"])
        .expect_code(0);
    wait_for_following(&pair, "d");
    join(&pair, "b", "e", Some(&free_address()));
    let e = id_at(&pair, "b", "e");
    let mb = pair.scratch.path("mb");
    fs::write(mb.join("waits"), b"for the one that lags").unwrap();
    wait_for_bytes(&pair, "b", "d");
    wait_for_bytes(&pair, "b", "e");
    for _ in 0..2 {
        let refused = write_safely(&mb.join("waits"), b"for the one that lags").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{refused}");
    }
    assert_eq!(acknowledging(&pair, "b"), BTreeSet::from([c.clone(), d.clone()]), "the set has not grown");
    pair.mount("c", &at_c);
    acknowledge(&mb.join("caught up"), b"on all that were not given up");
    wait_for("the new one to count", || acknowledging(&pair, "b").contains(&e));
    assert!(acknowledging(&pair, "b").is_superset(&BTreeSet::from([c, d])));
    // From now on one of them is enough.
    pair.kill("c");
    pair.kill("d");
    acknowledge(&mb.join("latest"), b"on the new one only");
    pair.kill("b");
    for (node, address) in [("c", &at_c), ("d", &at_d)] {
        pair.mount(node, address);
    }
    pair.scratch.run(["promote", "c", "--confirm", "vol", "--assume-lost", &x]).expect_code(0);
    let mc = pair.scratch.path("mc");
    for (name, bytes) in [
        ("early", &b"on all"[..]),
        ("later", b"on two of three"),
        ("caught up", b"on all that were not given up"),
        ("latest", b"on the new one only"),
    ] {
        assert_eq!(fs::read(mc.join(name)).unwrap(), bytes, "{name}");
    }
    assert_eq!(pair.status("c")["position"]["epoch"], 3);
}

/// The fear: two mirrors are promoted at once. One has everybody's promise and is about to begin; meanwhile the other one asks for a later
/// epoch, gets the promise of the first, too, and begins. Then the first one begins as well.
#[test]
fn one_that_has_promised_a_later_epoch_meanwhile_does_not_begin_its_own() {
    if !can_mount("one_that_has_promised_a_later_epoch_meanwhile_does_not_begin_its_own") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let s3 = S3Endpoint::start(&scratch.make_dir("s3"), &["archive"]);
    let archive = s3.url("archive", "home", "elsewhere");
    let format = ["format", "a", "--blocks", &scratch.url("ba"), "--name", "vol", "--ack", "mirror=1"];
    scratch.run(format.into_iter().chain(["--archive", &archive])).expect_code(0);
    let pair = Pair { scratch };
    pair.mount("a", &free_address());
    for mirror in ["b", "c"] {
        pair.join("a", mirror, &format!("b{mirror}"));
        // The log names the archive, and not with what credentials it is reached.
        let file = pair.scratch.path(&format!("{mirror}/murphy.toml"));
        let config = fs::read_to_string(&file).unwrap();
        assert!(!config.contains("\narchives"), "{config}");
        fs::write(&file, format!("archives = [{archive:?}]\n{config}")).unwrap();
        pair.mount(mirror, &free_address());
    }
    wait_for_addresses(&pair, "a", 2);
    write_safely(&pair.scratch.path("ma/file"), b"on all").unwrap();
    pair.settle();
    wait_for_bytes(&pair, "a", "c");
    // The log of a mirror begins with its snapshot: it could not bring the archive up from before that.
    wait_for("the archive to have everything", || {
        let status = pair.status("a");
        status["archives"][0]["lsn"].as_u64() >= status["durable_lsn"].as_u64()
    });
    pair.lose_source();
    s3.misbehave(Some("PUT"), "/archive/home/log/", Misdeed::Hold);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| pair.scratch.run(["promote", "b", "--confirm", "vol"]));
        wait_for("the first to seal the archive", || s3.misdeeds() > 0 || first.is_finished());
        assert!(!first.is_finished(), "{}", first.join().unwrap());
        let second = ["promote", "c", "--confirm", "vol", "--assume-lost", &archive];
        pair.scratch.run(second).expect_code(0);
        s3.behave();
        // By its own promise, or by the seal of the other one, whichever it meets first.
        let refused = first.join().unwrap().expect_error(1, "cannot begin the next epoch").stderr();
        let met = ["has promised another epoch meanwhile", "which began epoch 3"];
        assert!(met.iter().any(|why| refused.contains(why)), "{refused}");
    });
    assert_eq!(pair.status("c")["position"]["epoch"], 3);
    wait_for_following(&pair, "b");
    assert_eq!(status_of(&pair, "b").map(|status| status["role"].clone()), Some(Value::from("mirror")));
    acknowledge(&pair.scratch.path("mc/after"), b"there is one source");
    wait_for_bytes(&pair, "c", "b");
    assert_eq!(fs::read(pair.scratch.path("mb/after")).unwrap(), b"there is one source");
}

/// The fear: the source was replaced while it was away, the one that replaced it is lost before it could say so, and of those that are left
/// nobody answers when the old source starts. Nobody has a predecessor to tell then, and the old source goes on for ever beside the new one.
#[test]
fn a_source_whose_successor_is_lost_hears_from_the_next_one_that_it_was_replaced() {
    if !can_mount("a_source_whose_successor_is_lost_hears_from_the_next_one_that_it_was_replaced") {
        return;
    }
    let pair = Pair::start("local");
    join(&pair, "a", "c", Some(&free_address()));
    fs::write(pair.scratch.path("ma/shared"), b"on all").unwrap();
    pair.settle();
    wait_for_bytes(&pair, "a", "c");
    wait_for_addresses(&pair, "a", 2);
    let (at_a, at_c) = (pair.listens("a"), pair.listens("c"));
    pair.kill("a");
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0);
    let b = pair.listens("b");
    wait_for("the other mirror to go over", || {
        let source = status_of(&pair, "c").map(|status| status["source"].clone()).unwrap_or_default();
        source["connected"] == true && source["address"].as_str().is_some_and(|address| address == b)
    });
    pair.kill("b");
    fs::remove_dir_all(pair.scratch.path("b")).unwrap();
    pair.scratch.run(["promote", "c", "--confirm", "vol"]).expect_code(0);
    pair.kill("c");
    pair.mount("a", &at_a);
    fs::write(pair.scratch.path("ma/alone"), b"at the old source").unwrap();
    pair.mount("c", &at_c);
    wait_for("the old source to end", || {
        pair.scratch.run(["serve", "a"]).stderr().contains("no longer the source")
    });
    assert!(!pair.scratch.path("mc/alone").exists());
    assert_eq!(fs::read(pair.scratch.path("mc/shared")).unwrap(), b"on all");
}

/// The fear: a promotion comes to nothing, and another mirror takes over without the one that tried. What that one has promised itself stops
/// the new source, and then nobody leads.
#[test]
fn the_promise_of_a_promotion_that_failed_does_not_end_the_next_source() {
    if !can_mount("the_promise_of_a_promotion_that_failed_does_not_end_the_next_source") {
        return;
    }
    let pair = Pair::start("mirror=1");
    join(&pair, "a", "c", Some(&free_address()));
    wait_for_addresses(&pair, "a", 2);
    acknowledge(&pair.scratch.path("ma/shared"), b"on all");
    pair.settle();
    wait_for_bytes(&pair, "a", "c");
    let (b, at_b, at_c) = (id_at(&pair, "a", "b"), pair.listens("b"), pair.listens("c"));
    pair.kill("c");
    pair.lose_source();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "--assume-lost");
    let promised = read_summed(&pair.scratch.path("b/promised.json")).unwrap();
    pair.kill("b");
    pair.mount("c", &at_c);
    pair.scratch.run(["promote", "c", "--confirm", "vol", "--assume-lost", &b]).expect_code(0);
    assert_eq!((&promised["number"], &pair.status("c")["position"]["epoch"]), (&2.into(), &2.into()));
    pair.mount("b", &at_b);
    // It follows nobody in an epoch of that number: that is said, and what to do.
    wait_for("the member that is bound to be told of", || {
        let status = pair.status("c");
        let refuses = status["mirrors"][0]["refuses"].as_str().unwrap_or_default();
        refuses.contains("epoch 2-") && refuses.contains("murphy member remove")
    });
    // It asks the members whether it was replaced before it decides, and those that do not follow for as long as it leads.
    pair.kill("c");
    pair.mount("c", &at_c);
    pair.scratch.run(["member", "remove", "c", &b, "--assume-lost", "--confirm", "vol"]).expect_code(0);
    join(&pair, "c", "d", Some(&free_address()));
    acknowledge(&pair.scratch.path("mc/after"), b"there is a source");
    assert_eq!(pair.status("c")["role"], "source");
    assert_eq!(fs::read(pair.scratch.path("mc/shared")).unwrap(), b"on all");
}
