//! Who belongs to a volume, with real processes and mounts: members that lag, members that are removed, members whose source was replaced.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
};

use murphy_tests::{Print, can_mount, free_address, read_summed};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::mirrors::{Pair, wait_for, write_safely};

/// Waits until the source of `node` knows where so many mirrors listen.
pub(super) fn wait_for_addresses(pair: &Pair, node: &str, count: usize) {
    wait_for("the mirrors' addresses at the source", || {
        let mirrors = pair.status(node)["mirrors"].clone();
        let known = |mirror: &Value| mirror["addresses"].as_array().is_some_and(|all| !all.is_empty());
        mirrors.as_array().is_some_and(|all| all.len() == count && all.iter().all(known))
    });
}

/// Waits until what was written at `a` is in its store, and the entries that say so in its log, without an fsync.
fn wait_for_stored(pair: &Pair) {
    wait_for("the bytes to be stored", || {
        let status = pair.status("a");
        status["dirty_bytes"] == 0 && status["durable_lsn"] == status["position"]["lsn"]
    });
}

/// Waits until `mirror` has everything, bytes included, that is durable at `source`.
pub(super) fn wait_for_bytes(pair: &Pair, source: &str, mirror: &str) {
    let wanted = pair.status(source)["durable_lsn"].as_u64();
    wait_for("the mirror to have every byte", || {
        status_of(pair, mirror).is_some_and(|status| status["data_lsn"].as_u64() >= wanted)
    });
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
    pair.mount("c", &free_address());
    fs::write(ma.join("late"), b"on one of two").unwrap();
    wait_for_stored(&pair);
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
    assert_eq!(read_summed(&pair.scratch.path("b/promised.json")).unwrap()["number"], 2);
}

/// A mirror of `source` that listens there, or not at all.
pub(super) fn join(pair: &Pair, source: &str, mirror: &str, listen: Option<&str>) {
    pair.join(source, mirror, &format!("b{mirror}"));
    mount(pair, mirror, listen);
}

pub(super) fn mount(pair: &Pair, node: &str, listen: Option<&str>) {
    match listen {
        Some(listen) => pair.mount(node, listen),
        None => {
            let place = format!("m{node}");
            let _there_already = fs::create_dir(pair.scratch.path(&place));
            pair.scratch.run(["mount", node, &place, "-d", "--io-timeout", "20s"]).expect_code(0).stdout();
        }
    }
}

/// The id of the member that people call `name`.
fn id(pair: &Pair, name: &str) -> String {
    id_at(pair, "a", name)
}

/// The same, as `node` knows it.
pub(super) fn id_at(pair: &Pair, node: &str, name: &str) -> String {
    let listed = pair.scratch.run(["member", "list", node, "--json"]).expect_code(0).stdout();
    let members: Vec<Value> = listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let found = members.iter().find(|member| member["name"] == name);
    found.unwrap_or_else(|| panic!("{listed}"))["node"].as_str().unwrap().to_owned()
}

/// All packs in a store, each with its inode.
pub(super) fn packs_of(pair: &Pair, store: &str) -> BTreeSet<(PathBuf, u64)> {
    let packs = pair.scratch.prints_of(store).into_keys();
    let packs = packs.filter(|path| path.is_file() && path.parent().is_some_and(|dir| !dir.ends_with(store)));
    packs.map(|path| (path.clone(), fs::metadata(&path).unwrap().ino())).collect()
}

/// Waits until a mirror follows.
pub(super) fn wait_for_following(pair: &Pair, mirror: &str) {
    wait_for("the mirror to follow", || {
        status_of(pair, mirror).is_some_and(|status| status["source"]["connected"] == true)
    });
}

/// The status of a mirror. One that is seeded begins anew, and answers nothing meanwhile.
pub(super) fn status_of(pair: &Pair, mirror: &str) -> Option<Value> {
    serde_json::from_str(&pair.scratch.run(["status", mirror, "--json"]).stdout()).ok()
}

/// Waits until an fsync is acknowledged by mirrors: those that joined last may not count yet.
fn wait_for_acknowledged(path: &std::path::Path) {
    wait_for("an fsync to be acknowledged", || write_safely(path, b"safe").is_ok());
}

/// The fear: one mirror is gone for good, and every promotion has to give somebody up, for ever.
#[test]
fn a_mirror_that_is_gone_is_removed_and_nobody_waits_for_it() {
    if !can_mount("a_mirror_that_is_gone_is_removed_and_nobody_waits_for_it") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let (ma, mb) = (pair.scratch.path("ma"), pair.scratch.path("mb"));
    join(&pair, "a", "c", Some(&free_address()));
    wait_for_addresses(&pair, "a", 2);
    wait_for("both mirrors to count", || {
        let set = read_summed(&pair.scratch.path("a/acknowledging.json"));
        set.is_some_and(|set| set.as_array().is_some_and(|set| set.len() == 2))
    });
    write_safely(&ma.join("early"), b"acknowledged by one of two").unwrap();
    pair.kill("c");
    write_safely(&ma.join("later"), b"acknowledged by the other one").unwrap();
    pair.settle();
    let gone = id(&pair, "c");
    pair.scratch.run(["member", "remove", "b", &gone]).expect_error(1, "is a mirror");
    pair.scratch.run(["member", "remove", "a", "nobody"]).expect_error(2, "not the id of a member");
    let removed = pair.scratch.run(["member", "remove", "a", &gone, "--json"]).expect_code(0).json();
    assert_eq!((&removed["removed"], &removed["waits"]), (&gone.as_str().into(), &Value::Null), "{removed}");
    assert_eq!(removed["not_known_to"], serde_json::json!([]), "{removed}");
    pair.scratch.run(["member", "remove", "a", &gone]).expect_error(1, "removed already");
    assert_eq!(pair.status("a")["mirrors"].as_array().map(Vec::len), Some(1));
    write_safely(&ma.join("latest"), b"nobody waits for the one that is gone").unwrap();
    pair.lose_source();
    // No --assume-lost: the one that is left knows that it is the only one.
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0).stdout();
    for name in ["early", "later", "latest"] {
        assert!(fs::read(mb.join(name)).is_ok(), "{name}");
    }
}

/// The fear: an order that leaves nobody who could acknowledge; or a mirror that was removed goes on as if nothing had happened, or loses what it has.
#[test]
fn a_mirror_that_was_removed_is_told_keeps_what_it_has_and_joins_anew() {
    if !can_mount("a_mirror_that_was_removed_is_told_keeps_what_it_has_and_joins_anew") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let (ma, mb) = (pair.scratch.path("ma"), pair.scratch.path("mb"));
    write_safely(&ma.join("early"), b"on both").unwrap();
    pair.settle();
    let node = id(&pair, "b");
    pair.scratch.run(["member", "remove", "a", &node]).expect_error(1, "every fsync would fail");
    write_safely(&ma.join("still"), b"it acknowledges as before").unwrap();
    let removed = pair
        .scratch
        .run(["member", "remove", "a", &node, "--assume-lost", "--confirm", "vol"])
        .expect_code(0)
        .stdout();
    assert!(removed.contains("it fails until another one joins"), "{removed}");
    wait_for("the mirror to be told", || pair.status("b")["removed"] == true);
    let status = pair.status("b");
    assert!(status["verdict"].as_str().unwrap().starts_with("REMOVED"), "{status}");
    assert!(status["advice"].as_str().unwrap().contains("murphy join"), "{status}");
    fs::write(ma.join("meanwhile"), b"without the one that was removed").unwrap();
    wait_for_stored(&pair);
    assert_eq!(fs::read(mb.join("early")).unwrap(), b"on both");
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "was removed");
    // It is remembered without the source, too.
    let address = pair.listens("a");
    pair.kill("a");
    pair.scratch.run(["umount", "mb"]).expect_code(0);
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "was removed");
    pair.mount("a", &address);
    // What it holds may be what was given up, or lack what was acknowledged without it: it comes back without that, and with its packs.
    let before = (pair.scratch.prints_of("b"), packs_of(&pair, "bb"));
    let token = pair.scratch.run(["invite", "a"]).expect_code(0).stdout();
    fs::write(pair.scratch.path("again"), token).unwrap();
    let join = ["join", "b", "--token-file", "again"];
    let refused = pair.scratch.run(join).expect_error(1, "was removed").stderr();
    assert!(refused.contains("new directory"), "{refused}");
    assert!(pair.scratch.prints_of("b") == before.0, "it keeps what it holds");
    let url = pair.scratch.url("bb");
    pair.scratch.run(["join", "c", "--token-file", "again", "--blocks", &url]).expect_code(0).stdout();
    pair.mount("c", &free_address());
    wait_for_acknowledged(&ma.join("after"));
    wait_for_bytes(&pair, "a", "c");
    assert!(!before.1.is_empty() && before.1.is_subset(&packs_of(&pair, "bb")), "packs were copied again");
    let mc = pair.scratch.path("mc");
    for name in ["early", "meanwhile", "after"] {
        assert_eq!(fs::read(mc.join(name)).unwrap(), fs::read(ma.join(name)).unwrap(), "{name}");
    }
}

/// The only mirror of a volume is dead, and another one takes its place: it does not count before the dead one is given up by name.
#[test]
fn a_dead_mirror_that_alone_acknowledged_is_replaced() {
    if !can_mount("a_dead_mirror_that_alone_acknowledged_is_replaced") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let ma = pair.scratch.path("ma");
    write_safely(&ma.join("early"), b"acknowledged by the one that dies").unwrap();
    let dead = id(&pair, "b");
    pair.kill("b");
    join(&pair, "a", "c", Some(&free_address()));
    wait_for_bytes(&pair, "a", "c");
    pair.scratch.run(["member", "remove", "a", &dead]).expect_error(1, "do not count before");
    pair.scratch
        .run(["member", "remove", "a", &dead, "--assume-lost", "--confirm", "vol"])
        .expect_code(0)
        .stdout();
    wait_for_acknowledged(&ma.join("after"));
    pair.lose_source();
    pair.scratch.run(["promote", "c", "--confirm", "vol"]).expect_code(0).stdout();
    assert_eq!(fs::read(pair.scratch.path("mc/early")).unwrap(), b"acknowledged by the one that dies");
    assert_eq!(fs::read(pair.scratch.path("mc/after")).unwrap(), b"safe");
}

/// The fear: after a promotion the other mirrors follow a dead source until somebody looks, and the volume has one copy less than it shows.
#[test]
fn mirrors_follow_a_promoted_one_by_themselves() {
    if !can_mount("mirrors_follow_a_promoted_one_by_themselves") {
        return;
    }
    let pair = Pair::start("local");
    let mb = pair.scratch.path("mb");
    // One is there, one is away at the promotion, and has not even heard of the one that is promoted.
    join(&pair, "a", "d", Some(&free_address()));
    wait_for_addresses(&pair, "a", 2);
    let away = pair.listens("d");
    pair.kill("d");
    join(&pair, "a", "c", Some("0.0.0.0:0"));
    wait_for_addresses(&pair, "a", 3);
    fs::write(pair.scratch.path("ma/early"), b"on all that are there").unwrap();
    pair.settle();
    wait_for_bytes(&pair, "a", "c");
    pair.lose_source();
    pair.scratch.run(["promote", "c", "--confirm", "vol"]).expect_code(0).stdout();
    wait_for_following(&pair, "b");
    let mc = pair.scratch.path("mc");
    fs::write(mc.join("later"), b"at the new source").unwrap();
    pair.scratch.run(["flush", "mc"]).expect_code(0);
    wait_for_bytes(&pair, "c", "b");
    assert_eq!(fs::read(mb.join("later")).unwrap(), b"at the new source");
    pair.mount("d", &away);
    wait_for_following(&pair, "d");
    wait_for_bytes(&pair, "c", "d");
    for node in ["b", "d"] {
        let status = pair.status(node);
        let listens = pair.listens("c").replace("0.0.0.0", "127.0.0.1");
        assert_eq!(status["source"]["address"], listens.as_str(), "{status}");
        // The one that was away may begin with a snapshot, if the new source's log begins behind what it has: that is kept then.
        let kept = status["branches"].as_array().map_or(0, Vec::len);
        assert!(kept <= usize::from(node == "d"), "{status}");
        assert!(status["advice"].is_null(), "{status}");
    }
    // A process that begins anew follows the same one.
    pair.kill("b");
    pair.mount("b", &free_address());
    wait_for_following(&pair, "b");
    assert_eq!(fs::read(mb.join("early")).unwrap(), b"on all that are there");
}

/// A mirror that does not listen cannot be told; its status says what to do, and nothing is copied again.
#[test]
fn a_mirror_that_nobody_can_tell_says_so_and_joins_anew_with_one_command() {
    if !can_mount("a_mirror_that_nobody_can_tell_says_so_and_joins_anew_with_one_command") {
        return;
    }
    let pair = Pair::start("local");
    join(&pair, "a", "c", None);
    fs::write(pair.scratch.path("ma/early"), vec![7; 300_000]).unwrap();
    pair.settle();
    wait_for_bytes(&pair, "a", "c");
    pair.lose_source();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0).stdout();
    wait_for("advice", || {
        pair.status("c")["advice"].as_str().is_some_and(|text| text.contains("murphy join"))
    });
    let said = pair.scratch.run(["status", "c"]).stdout();
    assert!(said.contains("does not listen") && said.contains("murphy promote"), "{said}");
    let token = pair.scratch.run(["invite", "b"]).expect_code(0).stdout();
    fs::write(pair.scratch.path("token"), token).unwrap();
    pair.scratch.run(["join", "c", "--token-file", "token"]).expect_error(1, "in use");
    pair.scratch.run(["umount", "mc"]).expect_code(0);
    let held = packs_of(&pair, "bc");
    pair.scratch.run(["join", "c", "--token-file", "token"]).expect_code(0).stdout();
    mount(&pair, "c", None);
    wait_for_following(&pair, "c");
    wait_for_bytes(&pair, "b", "c");
    let kept = packs_of(&pair, "bc");
    assert!(!held.is_empty() && held.is_subset(&kept), "packs were copied again: {held:?} {kept:?}");
    assert_eq!(fs::read(pair.scratch.path("mc/early")).unwrap(), vec![7; 300_000]);
}

/// The fear: a mirror once tried to take over and could not, was removed, joins anew, and its old promise ends the living source for good.
#[test]
fn a_mirror_that_tried_to_take_over_joins_anew_and_the_source_goes_on() {
    if !can_mount("a_mirror_that_tried_to_take_over_joins_anew_and_the_source_goes_on") {
        return;
    }
    let pair = Pair::start("mirror=1");
    let ma = pair.scratch.path("ma");
    join(&pair, "a", "c", Some(&free_address()));
    wait_for_addresses(&pair, "a", 2);
    write_safely(&ma.join("early"), b"on all").unwrap();
    pair.settle();
    let (address, gone, tried) = (pair.listens("a"), id(&pair, "c"), id(&pair, "b"));
    pair.kill("c");
    pair.kill("a");
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_error(1, "members are sealed");
    pair.scratch.run(["umount", "mb"]).expect_code(0);
    pair.mount("a", &address);
    for node in [&tried, &gone] {
        pair.scratch
            .run(["member", "remove", "a", node, "--assume-lost", "--confirm", "vol"])
            .expect_code(0)
            .stdout();
    }
    let token = pair.scratch.run(["invite", "a"]).expect_code(0).stdout();
    fs::write(pair.scratch.path("again"), token).unwrap();
    let kept = pair.scratch.prints_of("b");
    let join = ["join", "b", "--token-file", "again"];
    let refused = pair.scratch.run(join).expect_error(1, "was removed").stderr();
    assert!(refused.contains("new directory") && refused.contains("still good"), "{refused}");
    let url = pair.scratch.url("bb");
    pair.scratch.run(["join", "d", "--token-file", "again", "--blocks", &url]).expect_code(0).stdout();
    let promise = |name: &str| name.contains("promised.json") || name.contains("promoting.json");
    let promises = |from: &BTreeMap<PathBuf, Print>| -> Vec<Print> {
        let all = from.iter().filter(|(path, _)| promise(&path.to_string_lossy()));
        all.map(|(_, print)| print.clone()).collect()
    };
    assert_eq!((promises(&kept).len(), promises(&pair.scratch.prints_of("d")).len()), (2, 0));
    assert_eq!(promises(&kept), promises(&pair.scratch.prints_of("b")));
    pair.mount("d", &free_address());
    wait_for_acknowledged(&ma.join("after"));
    wait_for_bytes(&pair, "a", "d");
    let status = pair.status("a");
    assert_eq!((&status["role"], &status["position"]["epoch"]), (&"source".into(), &1.into()), "{status}");
    // It takes over as any mirror does.
    pair.lose_source();
    pair.scratch.run(["promote", "d", "--confirm", "vol"]).expect_code(0).stdout();
    assert_eq!(fs::read(pair.scratch.path("md/after")).unwrap(), b"safe");
}

/// The fear: with `--ack local` nobody's promise keeps the old source from acknowledging, and the new one that would tell it is gone. Whoever
/// has left it for the new one knows, too.
#[test]
fn a_mirror_that_goes_over_tells_the_source_that_it_leaves() {
    if !can_mount("a_mirror_that_goes_over_tells_the_source_that_it_leaves") {
        return;
    }
    let pair = Pair::start("local");
    let ma = pair.scratch.path("ma");
    join(&pair, "a", "c", Some(&free_address()));
    wait_for_addresses(&pair, "a", 2);
    fs::write(ma.join("early"), b"on all").unwrap();
    pair.settle();
    wait_for_bytes(&pair, "a", "c");
    let pid = Pid::from_raw(pair.status("a")["running"]["pid"].as_i64().unwrap() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    pair.scratch.run(["promote", "c", "--confirm", "vol"]).expect_code(0).stdout();
    wait_for_following(&pair, "b");
    pair.kill("c");
    kill_process(pid, Signal::CONT).unwrap();
    wait_for("the old source to end", || {
        pair.scratch.run(["serve", "a"]).stderr().contains("no longer the source")
    });
}
