//! A source that has lost what a mirror holds, with real processes and mounts: it gets it back, or does not go on without it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use murphy_tests::{can_mount, copy_tree, free_address, is_dead};
use serde_json::Value;

use super::mirrors::{Pair, wait_for, write_safely};

/// What fsync acknowledged.
#[derive(Default)]
struct Ledger(Vec<(String, Vec<u8>)>);

impl Ledger {
    /// Writes files of many sizes: some travel in entries, some in packs.
    fn write(&mut self, place: &Path, what: &str, count: usize) {
        for i in 0..count {
            let (name, bytes) = (format!("{what}-{i}"), format!("{what} {i}\n").repeat(1 + i * 1500));
            // A mirror that was away takes a while to come back.
            wait_for("an fsync to be acknowledged", || {
                write_safely(&place.join(&name), bytes.as_bytes()).is_ok()
            });
            self.0.push((name, bytes.into_bytes()));
        }
    }

    fn assert_kept(&self, place: &Path) {
        for (name, bytes) in &self.0 {
            assert!(fs::read(place.join(name)).unwrap() == *bytes, "{name} is not what was acknowledged");
        }
    }
}

/// What of a node is put back to an earlier copy, or deleted: less and less is left that knows of the loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Loss {
    /// The log; the note about mirrors and the index know more.
    Log,
    /// The log; of the rest only the note is left.
    AllButTheNote,
    /// Everything: only the mirror knows.
    Node,
}

/// A source `a` whose disk has gone back to an earlier moment, while its mirror `b` has everything.
struct Rolled {
    pair: Pair,
    ledger: Ledger,
    /// Where `a` listens.
    address: String,
    /// Where `b` listens.
    mirror_address: String,
    /// The id of `b`.
    node: String,
    /// How much `b` holds.
    held: u64,
}

impl Rolled {
    /// With the mirror there or not when the source is started again.
    fn back(loss: Loss, mirror_stays: bool) -> Rolled {
        Rolled::back_from(Pair::start("mirror=1"), loss, mirror_stays)
    }

    /// The same with other mirrors, which stay as they are.
    fn back_from(pair: Pair, loss: Loss, mirror_stays: bool) -> Rolled {
        let (ma, mut ledger) = (pair.scratch.path("ma"), Ledger::default());
        ledger.write(&ma, "early", 3);
        wait_for("the mirror's address at the source", || {
            pair.status("a")["mirrors"][0]["addresses"].as_array().is_some_and(|all| !all.is_empty())
        });
        pair.settle();
        let (address, mirror_address) = (pair.listens("a"), pair.listens("b"));
        let node = member(&pair, "b");
        let mut rolled = Rolled { pair, ledger, address, mirror_address, node, held: 0 };
        rolled.lose(loss, mirror_stays);
        rolled
    }

    fn lose(&mut self, loss: Loss, mirror_stays: bool) {
        let (node, kept) = (self.path("a"), self.path("kept"));
        self.pair.scratch.run(["umount", "ma"]).expect_code(0).stdout();
        self.pair.scratch.run(["fsck", "a"]).expect_code(0);
        copy_tree(&node, &kept);
        self.pair.mount("a", &self.address);
        self.ledger.write(&self.path("ma"), "late", 6);
        self.pair.settle();
        self.held = self.pair.status("b")["durable_lsn"].as_u64().unwrap();
        // It is saved at most once a second.
        wait_for("the note about the mirror", || noted(&node).is_some_and(|lsn| lsn >= self.held));
        if !mirror_stays {
            self.pair.kill("b");
            // The source writes a tick of its own a second after its last entry.
            self.held = self.pair.status("b")["position"]["lsn"].as_u64().unwrap();
        }
        self.pair.kill("a");
        match loss {
            Loss::Node => put_back(&kept, &node),
            Loss::Log | Loss::AllButTheNote => {
                put_back(&kept.join("log"), &node.join("log"));
                if loss == Loss::AllButTheNote {
                    put_back(&kept.join("index"), &node.join("index"));
                }
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.pair.scratch.path(name)
    }

    /// Everything is there, on both, in one history, and goes on.
    fn assert_whole(&mut self) {
        let ma = self.path("ma");
        self.ledger.assert_kept(&ma);
        self.ledger.write(&ma, "after", 2);
        self.pair.settle();
        self.ledger.assert_kept(&self.path("mb"));
        for node in ["a", "b"] {
            let status = self.pair.status(node);
            assert_eq!(status["branches"].as_array().map(Vec::len), Some(0), "{status}");
            assert_eq!(status["position"]["epoch"], 1, "{status}");
        }
        self.pair.scratch.run(["fsck", "a", "--data"]).expect_code(0);
    }
}

/// What gives up what only a member holds.
const GIVE_UP: [&str; 3] = ["--assume-lost", "--confirm", "vol"];

/// The id of the member that people call `name`.
fn member(pair: &Pair, name: &str) -> String {
    let listed = pair.scratch.run(["member", "list", "a", "--json"]).expect_code(0).stdout();
    let mut members = listed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    members.find(|member| member["name"] == name).unwrap()["node"].as_str().unwrap().to_owned()
}

/// Up to where the source has noted that its mirror is.
fn noted(node: &Path) -> Option<u64> {
    let text = fs::read_to_string(node.join("mirrored")).ok()?;
    serde_json::from_str::<Value>(text.lines().next()?).ok()?["lsn"].as_u64()
}

fn put_back(kept: &Path, place: &Path) {
    fs::remove_dir_all(place).unwrap();
    copy_tree(kept, place);
}

/// Only a mirror has what an fsync acknowledged, and the source is about to decide without it.
#[test]
fn a_source_that_lost_its_tail_gets_it_back_from_a_mirror() {
    if !can_mount("a_source_that_lost_its_tail_gets_it_back_from_a_mirror") {
        return;
    }
    for loss in [Loss::Log, Loss::AllButTheNote, Loss::Node] {
        let mut rolled = Rolled::back(loss, true);
        rolled.pair.mount("a", &rolled.address);
        let status = rolled.pair.status("a");
        assert!(status["durable_lsn"].as_u64() >= Some(rolled.held), "{loss:?}: {status}");
        rolled.assert_whole();
    }
}

/// Nobody answers who has it: going on would be another history under the same epoch.
#[test]
fn a_source_that_lost_its_tail_does_not_start_without_the_mirror_that_has_it() {
    if !can_mount("a_source_that_lost_its_tail_does_not_start_without_the_mirror_that_has_it") {
        return;
    }
    for loss in [Loss::Log, Loss::AllButTheNote] {
        let mut rolled = Rolled::back(loss, false);
        let before = rolled.pair.scratch.prints_of("a/log");
        let said = rolled.pair.scratch.run(["serve", "a"]).expect_error(1, "known").stderr();
        for part in [rolled.node.as_str(), rolled.mirror_address.as_str(), "murphy promote", "--listen"] {
            assert!(said.contains(part), "no {part} in {said}");
        }
        assert!(rolled.pair.scratch.prints_of("a/log") == before, "something was changed");
        rolled.pair.mount("b", &rolled.mirror_address);
        rolled.pair.mount("a", &rolled.address);
        rolled.assert_whole();
    }
}

/// Neither a note nor anybody who answered knew of it, and the source has gone on. Once the mirror comes it must not acknowledge for a moment
/// longer, and what was acknowledged before is in the mirror.
#[test]
fn a_source_that_hears_from_a_mirror_what_it_lost_ends_and_the_mirror_goes_on() {
    if !can_mount("a_source_that_hears_from_a_mirror_what_it_lost_ends_and_the_mirror_goes_on") {
        return;
    }
    let rolled = Rolled::back(Loss::Node, false);
    let (ma, mb) = (rolled.path("ma"), rolled.path("mb"));
    rolled.pair.mount("a", &rolled.address);
    assert!(rolled.pair.status("a")["durable_lsn"].as_u64() < Some(rolled.held));
    rolled.pair.mount("b", &rolled.mirror_address);
    wait_for("the source to end", || {
        is_dead(&ma) || fs::read_dir(&ma).is_ok_and(|mut names| names.next().is_none())
    });
    wait_for("the source to say why it does not start", || {
        let said = rolled.pair.scratch.run(["serve", "a"]).stderr();
        said.contains(&rolled.node) && said.contains("murphy promote")
    });
    let status = rolled.pair.status("b");
    assert_eq!(status["branches"].as_array().map(Vec::len), Some(0), "{status}");
    // A tick may have come before the source was killed.
    assert!(status["durable_lsn"].as_u64() >= Some(rolled.held), "{status}");
    rolled.pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0).stdout();
    rolled.ledger.assert_kept(&mb);
    // With the last mirror promoted nobody is left to wait for.
    write_safely(&mb.join("new"), b"the mount takes writes now").unwrap();
}

/// The same when the source has written more meanwhile than it had lost: where both have entries they are different ones.
#[test]
fn a_source_that_went_on_without_what_a_mirror_holds_ends_and_people_decide() {
    if !can_mount("a_source_that_went_on_without_what_a_mirror_holds_ends_and_people_decide") {
        return;
    }
    for gives_up in [false, true] {
        let rolled = Rolled::back(Loss::Node, false);
        let (ma, mb) = (rolled.path("ma"), rolled.path("mb"));
        rolled.pair.mount("a", &rolled.address);
        let mut written = 0;
        wait_for("the source to be further than the mirror", || {
            fs::write(ma.join(format!("instead-{written}")), b"of another history").unwrap();
            written += 1;
            rolled.pair.status("a")["durable_lsn"].as_u64() > Some(rolled.held + 5)
        });
        rolled.pair.mount("b", &rolled.mirror_address);
        wait_for("the source to end", || {
            is_dead(&ma) || fs::read_dir(&ma).is_ok_and(|mut names| names.next().is_none())
        });
        wait_for("the source to say why it does not start", || {
            let said = rolled.pair.scratch.run(["serve", "a"]).stderr();
            said.contains("another ") && said.contains("murphy promote")
        });
        let status = rolled.pair.status("b");
        assert_eq!(status["branches"].as_array().map(Vec::len), Some(0), "{status}");
        if gives_up {
            let remove = ["member", "remove", "a", &rolled.node];
            rolled.pair.scratch.run(remove).expect_error(1, "another ");
            rolled.pair.scratch.run([&remove[..], &GIVE_UP].concat()).expect_code(0).stdout();
            rolled.pair.mount("a", &rolled.address);
            assert_eq!(fs::read(ma.join("instead-0")).unwrap(), b"of another history");
            wait_for("the mirror to be told", || rolled.pair.status("b")["removed"] == true);
        } else {
            rolled.pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0).stdout();
        }
        rolled.ledger.assert_kept(&mb);
    }
}

/// The fear: a mirror was given up for the source's own history, joins anew with the other one, and ends the source again. Or it gives up what it
/// has while it is still a member, which is what was acknowledged.
#[test]
fn a_mirror_that_was_given_up_joins_anew_and_its_directory_keeps_its_history() {
    if !can_mount("a_mirror_that_was_given_up_joins_anew_and_its_directory_keeps_its_history") {
        return;
    }
    // One knows that it was removed, the other one does not; the source is behind it, or further.
    for (knows, further) in [(true, true), (false, false)] {
        let rolled = Rolled::back(Loss::Node, false);
        let (scratch, ma) = (&rolled.pair.scratch, rolled.path("ma"));
        rolled.pair.mount("a", &rolled.address);
        let mut written = 0;
        wait_for("the source to go on", || {
            fs::write(ma.join(format!("instead-{written}")), b"of another history").unwrap();
            written += 1;
            !further || rolled.pair.status("a")["durable_lsn"].as_u64() > Some(rolled.held + 5)
        });
        let token = scratch.run(["invite", "a"]).expect_code(0).stdout();
        fs::write(rolled.path("token"), token).unwrap();
        let join = ["join", "b", "--token-file", "token"];
        let refused = scratch.run(join).expect_error(1, "has lost entries").stderr();
        assert!(refused.contains("murphy promote") && refused.contains("--assume-lost"), "{refused}");
        assert_eq!(rolled.pair.status("a")["role"], "source", "nobody has ended it");
        scratch
            .run(["member", "remove", "a", &rolled.node, "--assume-lost", "--confirm", "vol"])
            .expect_code(0)
            .stdout();
        if knows {
            rolled.pair.mount("b", &rolled.mirror_address);
            wait_for("the mirror to be told", || rolled.pair.status("b")["removed"] == true);
            scratch.run(["umount", "mb"]).expect_code(0);
        }
        let refused = scratch.run(join).expect_error(1, "was removed").stderr();
        assert!(refused.contains("new directory"), "{refused}");
        let url = scratch.url("bb");
        scratch.run(["join", "c", "--token-file", "token", "--blocks", &url]).expect_code(0).stdout();
        rolled.pair.mount("c", &free_address());
        wait_for("an fsync to be acknowledged", || write_safely(&ma.join("after"), b"by the mirror").is_ok());
        let mc = rolled.path("mc");
        wait_for("the mirror to have it", || {
            fs::read(mc.join("after")).is_ok_and(|read| read == b"by the mirror")
        });
        assert_eq!(fs::read(mc.join("instead-0")).unwrap(), b"of another history");
        let status = rolled.pair.status("b");
        assert!(status["removed"] == true && status["position"]["lsn"] == rolled.held, "{status}");
    }
}

/// The fear: two mirrors hold the other history, and neither can be given up because of the other one.
#[test]
fn two_mirrors_that_hold_the_other_history_are_given_up_together() {
    if !can_mount("two_mirrors_that_hold_the_other_history_are_given_up_together") {
        return;
    }
    let pair = Pair::start("mirror=1");
    pair.join("a", "c", "bc");
    pair.mount("c", &free_address());
    wait_for("the other mirror's address at the source", || {
        let mirrors = pair.status("a")["mirrors"].clone();
        let known = |mirror: &Value| mirror["addresses"].as_array().is_some_and(|all| !all.is_empty());
        mirrors.as_array().is_some_and(|all| all.len() == 2 && all.iter().all(known))
    });
    let (other, address) = (member(&pair, "c"), pair.listens("c"));
    let rolled = Rolled::back_from(pair, Loss::Node, false);
    let (pair, ma) = (&rolled.pair, rolled.path("ma"));
    wait_for("the other mirror to hold as much", || {
        pair.status("c")["durable_lsn"].as_u64() >= Some(rolled.held)
    });
    pair.kill("c");
    pair.mount("a", &rolled.address);
    let mut written = 0;
    wait_for("the source to be further than the mirrors", || {
        fs::write(ma.join(format!("instead-{written}")), b"of another history").unwrap();
        written += 1;
        pair.status("a")["durable_lsn"].as_u64() > Some(rolled.held + 5)
    });
    pair.mount("b", &rolled.mirror_address);
    pair.mount("c", &address);
    wait_for("the source to end", || {
        is_dead(&ma) || fs::read_dir(&ma).is_ok_and(|mut names| names.next().is_none())
    });
    // It may be noted of either of them, or found out when both are asked.
    wait_for("the source to name the way out", || {
        let said = pair.scratch.run(["serve", "a"]).stderr();
        let named = [&rolled.node, &other].into_iter().any(|node| said.contains(node.as_str()));
        named && said.contains("murphy member remove DIR") && said.contains("--assume-lost")
    });
    let remove = ["member", "remove", "a", &rolled.node];
    let one = [&remove[..], &GIVE_UP].concat();
    let refused = pair.scratch.run(one).expect_error(1, &other).stderr();
    assert!(refused.contains("murphy member remove DIR"), "{refused}");
    let wrong = [&remove[..], &[&other, "nobody"], &GIVE_UP].concat();
    pair.scratch.run(wrong).expect_error(2, "not the id of a member");
    pair.scratch.run(["serve", "a"]).expect_error(1, "another ");
    let both = [&remove[..], &[&other, "--json"], &GIVE_UP].concat();
    let said = pair.scratch.run(both).expect_code(0).stdout();
    let removed: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(removed.len(), 2, "{said}");
    for node in [&rolled.node, &other] {
        assert!(removed.iter().any(|member| member["removed"] == node.as_str()), "{said}");
    }
    pair.mount("a", &rolled.address);
    assert_eq!(fs::read(ma.join("instead-0")).unwrap(), b"of another history");
    for mirror in ["b", "c"] {
        wait_for("the mirror to be told", || pair.status(mirror)["removed"] == true);
        rolled.ledger.assert_kept(&rolled.path(&format!("m{mirror}")));
    }
}

/// One mirror has acknowledged what the other one lacks; whichever is promoted goes on with all of it, bytes included.
#[test]
fn a_mirror_that_is_promoted_fetches_what_another_one_holds() {
    if can_mount("a_mirror_that_is_promoted_fetches_what_another_one_holds") {
        promote_the_shorter_one(None);
    }
}

/// The same for an archive that lacks it too: it gets the entries and the packs before it is sealed, and is the new source's.
#[test]
fn what_a_promoted_mirror_fetched_is_shipped_to_an_archive_that_lags() {
    if can_mount("what_a_promoted_mirror_fetched_is_shipped_to_an_archive_that_lags") {
        promote_the_shorter_one(Some("archive"));
    }
}

fn promote_the_shorter_one(archive: Option<&str>) {
    let pair = Pair::start("mirror=1");
    pair.join("a", "c", "bc");
    pair.mount("c", &free_address());
    let (ma, mb, mut ledger) = (pair.scratch.path("ma"), pair.scratch.path("mb"), Ledger::default());
    ledger.write(&ma, "early", 3);
    wait_for("the mirrors' addresses at the source", || {
        let mirrors = pair.status("a")["mirrors"].clone();
        let known = |mirror: &Value| mirror["addresses"].as_array().is_some_and(|all| !all.is_empty());
        mirrors.as_array().is_some_and(|all| all.len() == 2 && all.iter().all(known))
    });
    let url = archive.map(|name| format!("{}?domain=elsewhere", pair.scratch.url(name)));
    let archived = |node: &str| pair.status(node)["archives"][0]["lsn"].as_u64();
    if let Some(url) = &url {
        pair.scratch.run(["archive", "add", "ma", url]).expect_code(0).stdout();
        let durable = pair.status("a")["durable_lsn"].as_u64();
        wait_for("the archive", || archived("a") >= durable);
    }
    pair.settle();
    pair.kill("b");
    let (place, away) = (pair.scratch.path("archive"), pair.scratch.path("away"));
    if archive.is_some() {
        fs::rename(&place, &away).unwrap();
    }
    ledger.write(&ma, "late", 6);
    let wanted = pair.status("a")["durable_lsn"].as_u64();
    wait_for("the other mirror", || pair.status("c")["data_lsn"].as_u64() >= wanted);
    pair.kill("a");
    if archive.is_some() {
        // Whatever the shipper has made in its place.
        fs::remove_dir_all(&place).unwrap_or_default();
        fs::rename(&away, &place).unwrap();
    }
    rustix::mount::unmount(&ma, rustix::mount::UnmountFlags::DETACH).unwrap();
    fs::remove_dir_all(pair.scratch.path("a")).unwrap();
    fs::remove_dir_all(pair.scratch.path("ba")).unwrap();
    pair.mount("b", &free_address());
    let held = pair.status("b")["durable_lsn"].as_u64();
    assert!(held < wanted, "{held:?} {wanted:?}");
    let said = pair.scratch.run(["promote", "b", "--confirm", "vol", "--json"]).expect_code(0).json();
    assert!(said["text"].as_str().is_some_and(|text| text.contains("fetched first")), "{said}");
    ledger.assert_kept(&mb);
    let status = pair.status("b");
    assert_eq!((&status["role"], &status["position"]["epoch"]), (&"source".into(), &2.into()), "{status}");
    assert!(status["data_lsn"].as_u64() >= wanted, "{status}");
    pair.scratch.run(["fsck", "b", "--data"]).expect_code(0);
    if let Some(url) = &url {
        // The other mirror follows nobody, so no fsync returns.
        fs::write(mb.join("new"), b"in the new epoch").unwrap();
        let durable = pair.status("b")["durable_lsn"].as_u64();
        wait_for("the archive of the new source", || archived("b") >= durable);
        pair.scratch.run(["verify", url, "--data", "100"]).expect_code(0);
        pair.scratch.run(["restore", url, "copy", "--blocks", &pair.scratch.url("copied")]).expect_code(0);
        pair.mount("copy", &free_address());
        ledger.assert_kept(&pair.scratch.path("mcopy"));
    }
}
