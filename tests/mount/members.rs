//! Who belongs to a volume, with real processes and mounts: members that lag, members that are removed, members whose source was replaced.

use std::fs;

use murphy_tests::can_mount;
use serde_json::Value;

use super::mirrors::{Pair, wait_for, write_safely};

/// Waits until the source of `node` knows where so many mirrors listen.
fn wait_for_addresses(pair: &Pair, node: &str, count: usize) {
    wait_for("the mirrors' addresses at the source", || {
        let mirrors = pair.status(node)["mirrors"].clone();
        let known = |mirror: &Value| mirror["addresses"].as_array().is_some_and(|all| !all.is_empty());
        mirrors.as_array().is_some_and(|all| all.len() == count && all.iter().all(known))
    });
}

/// Waits until `mirror` has everything, bytes included, that is durable at `source`.
fn wait_for_bytes(pair: &Pair, source: &str, mirror: &str) {
    let wanted = pair.status(source)["durable_lsn"].as_u64();
    wait_for("the mirror to have every byte", || pair.status(mirror)["data_lsn"].as_u64() >= wanted);
}

/// The better mirror joined while the other one was away, and the source is gone. Nobody may have to be given up for that.
#[test]
fn a_mirror_is_promoted_by_members_that_have_not_heard_of_it() {
    if !can_mount("a_mirror_is_promoted_by_members_that_have_not_heard_of_it") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let (ma, mc) = (pair.scratch.path("ma"), pair.scratch.path("mc"));
    write_safely(&ma.join("early"), b"on all").unwrap();
    wait_for_addresses(&pair, "a", 1);
    pair.settle();
    let address = pair.listens("b");
    pair.kill("b");
    pair.join("a", "c", "bc");
    pair.mount("c", "127.0.0.1:0");
    fs::write(ma.join("late"), b"on one of two").unwrap();
    wait_for("the bytes to be stored", || pair.status("a")["dirty_bytes"] == 0);
    wait_for_bytes(&pair, "a", "c");
    pair.lose_source();
    pair.mount("b", &address);
    let behind = pair.status("b")["durable_lsn"].as_u64();
    assert!(behind < pair.status("c")["durable_lsn"].as_u64());
    pair.scratch.run(["promote", "c", "--confirm", "vol"]).expect_code(0).stdout();
    let status = pair.status("c");
    assert_eq!((&status["role"], &status["position"]["epoch"]), (&"source".into(), &2.into()), "{status}");
    for (name, bytes) in [("early", &b"on all"[..]), ("late", b"on one of two")] {
        assert_eq!(fs::read(mc.join(name)).unwrap(), bytes);
    }
    // The one that was sealed does not help the old source any more.
    let promised = fs::read_to_string(pair.scratch.path("b/promised.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&promised).unwrap()["number"], 2);
}
