//! Bytes after a promotion, with real processes: what another mirror has is fetched, and what nobody has holds up nobody.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use murphy_tests::{Scratch, can_mount, free_address, pause};
use rustix::process::Signal;

use super::mirrors::{Pair, sow, wait_for, write_safely};

/// Every object below `store`.
fn objects(store: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for item in fs::read_dir(store).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() {
            found.extend(objects(&path));
        } else {
            found.insert(path);
        }
    }
    found
}

/// A pair with a third node, `c`, which is another mirror.
fn three(ack: &str) -> Pair {
    let pair = Pair::start(ack);
    pair.join("a", "c", "bc");
    pair.mount("c", &free_address());
    sow(&pair.scratch.path("ma"));
    pair.settle();
    follow_bytes(&pair, "a", "c");
    pair
}

fn follow_bytes(pair: &Pair, source: &str, mirror: &str) {
    let wanted = pair.status(source)["durable_lsn"].as_u64();
    wait_for("a mirror to have every byte", || pair.status(mirror)["data_lsn"].as_u64() >= wanted);
}

/// Waits until `mirror` has every entry of `a`, and not the bytes.
fn follow_entries_only(pair: &Pair, mirror: &str) {
    let wanted = pair.status("a")["durable_lsn"].as_u64();
    wait_for("the mirror to have every entry", || pair.status(mirror)["metadata_lsn"].as_u64() >= wanted);
    let status = pair.status(mirror);
    assert!(status["data_lsn"].as_u64() < wanted, "{status}");
}

fn large() -> Vec<u8> {
    (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

/// Loses what the store of `a` got since it had `before`.
fn lose_packs(pair: &Pair, before: &BTreeSet<PathBuf>) {
    let late = objects(&pair.scratch.path("ba"));
    let mut lost = late.difference(before).peekable();
    assert!(lost.peek().is_some());
    lost.for_each(|pack| fs::remove_file(pack).unwrap());
}

/// A source and two mirrors; what was written while `b` was away is in the store of `c` alone.
fn only_c_has_the_late_bytes() -> Pair {
    let pair = three("local");
    let before = objects(&pair.scratch.path("ba"));
    pair.kill("b");
    write_safely(&pair.scratch.path("ma/late"), &large()).unwrap();
    follow_bytes(&pair, "a", "c");
    lose_packs(&pair, &before);
    pair
}

/// The fear: the one store that has the bytes goes next, and with it what was acknowledged.
#[test]
fn a_promoted_mirror_gets_the_bytes_that_only_another_mirror_has() {
    if !can_mount("a_promoted_mirror_gets_the_bytes_that_only_another_mirror_has") {
        return;
    }
    let pair = only_c_has_the_late_bytes();
    pair.mount("b", &free_address());
    follow_entries_only(&pair, "b");
    pair.lose_source();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0);
    wait_for("every byte", || {
        let status = pair.status("b");
        status["packs"]["found"].as_u64() > Some(0) && status["data_lsn"] == status["durable_lsn"]
    });
    assert_eq!(pair.status("b")["packs"]["missing"], 0);
    pair.kill("c");
    assert!(fs::read(pair.scratch.path("mb/late")).unwrap() == large());
    pair.scratch.run(["fsck", "b", "--data"]).expect_code(0);
}

/// The fear: one pack that nobody has any more keeps every fsync of the volume from being acknowledged, for ever.
#[test]
fn what_nobody_has_after_a_promotion_is_called_missing_and_mirrors_acknowledge_again() {
    if !can_mount("what_nobody_has_after_a_promotion_is_called_missing_and_mirrors_acknowledge_again") {
        return;
    }
    let pair = three("mirror=1");
    let before = objects(&pair.scratch.path("ba"));
    pair.kill("b");
    pair.kill("c");
    fs::write(pair.scratch.path("ma/late"), large()).unwrap();
    wait_for("the bytes to be stored", || {
        let status = pair.status("a");
        status["dirty_bytes"] == 0 && status["durable_lsn"] == status["position"]["lsn"]
    });
    lose_packs(&pair, &before);
    for mirror in ["b", "c"] {
        pair.mount(mirror, &free_address());
        follow_entries_only(&pair, mirror);
    }
    wait_for("both mirrors to have the same bytes", || {
        pair.status("b")["data_lsn"] == pair.status("c")["data_lsn"]
    });
    pair.lose_source();
    pair.scratch.run(["promote", "b", "--confirm", "vol"]).expect_code(0);
    wait_for("the loss to be known", || {
        let status = pair.status("b");
        status["packs"]["missing"] == 1 && status["data_lsn"] == status["durable_lsn"]
    });
    let mb = pair.scratch.path("mb");
    let unreadable = fs::read(mb.join("late")).unwrap_err();
    assert_eq!(unreadable.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert_eq!(fs::read(mb.join("small")).unwrap(), b"some text\n");
    let found = pair.scratch.run(["fsck", "b"]).expect_code(3).stdout();
    assert!(found.contains("lost with a source"), "{found}");
    // The other mirror, whose bytes end before the gap, follows the new source.
    pair.join("b", "d", "bd");
    pair.kill("c");
    follow_as(&pair, "c", "d");
    pair.mount("c", &free_address());
    follow_bytes(&pair, "b", "c");
    write_safely(&mb.join("new"), b"a mirror has this").unwrap();
    assert_eq!(fs::read(pair.scratch.path("mb/new")).unwrap(), b"a mirror has this");
    let lost = fs::read(pair.scratch.path("mc/late")).unwrap_err();
    assert_eq!(lost.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
}

/// The id of the mirror that listens there, as its source knows it.
fn member_at(pair: &Pair, source: &str, address: &str) -> String {
    let status = pair.status(source);
    let mirrors = status["mirrors"].as_array().unwrap();
    let found = mirrors.iter().find(|mirror| mirror["addresses"][0] == address);
    found.unwrap_or_else(|| panic!("{status}"))["node"].as_str().unwrap().to_owned()
}

/// The fear: the only member that has the bytes is given up since it is out of reach, and nobody asks it any more when it is back.
#[test]
fn a_member_that_was_given_up_is_asked_for_packs_when_it_is_back() {
    if !can_mount("a_member_that_was_given_up_is_asked_for_packs_when_it_is_back") {
        return;
    }
    let pair = only_c_has_the_late_bytes();
    let address = pair.listens("c");
    let given_up = member_at(&pair, "a", &address);
    pair.kill("c");
    pair.mount("b", &free_address());
    follow_entries_only(&pair, "b");
    pair.lose_source();
    pair.scratch.run(["promote", "b", "--confirm", "vol", "--assume-lost", &given_up]).expect_code(0);
    // Nobody waits for it.
    wait_for("the loss to be known", || pair.status("b")["packs"]["missing"] == 1);
    let unreadable = fs::read(pair.scratch.path("mb/late")).unwrap_err();
    assert_eq!(unreadable.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    pair.mount("c", &address);
    // The next look is at the next start, or within ten minutes. On a busy machine the member may not answer in time.
    wait_for("every byte", || {
        pair.kill("b");
        pair.mount("b", &free_address());
        (0..50).any(|_| {
            pause(Duration::from_millis(200));
            pair.status("b")["packs"]["missing"] == 0
        })
    });
    pair.kill("c");
    assert!(fs::read(pair.scratch.path("mb/late")).unwrap() == large());
    pair.scratch.run(["fsck", "b", "--data"]).expect_code(0);
}

/// Lets a mirror follow whom another one has joined.
fn follow_as(pair: &Pair, mirror: &str, joined: &str) {
    let path = |node: &str| pair.scratch.path(&format!("{node}/murphy.toml"));
    let texts = [mirror, joined].map(|node| fs::read_to_string(path(node)).unwrap());
    let section = |text: &str| {
        let begin = text.find("[source]").unwrap();
        let end = text[begin + 1..].find("\n[").map_or(text.len(), |end| begin + 1 + end);
        begin..end
    };
    let [own, other] = &texts;
    let mut changed = own.clone();
    changed.replace_range(section(own), &other[section(other)]);
    fs::write(path(mirror), changed).unwrap();
}

/// A source `a` that was lost with its machine while its archive `one` lacks the packs of three files, the second of which its archive `two`
/// has; that one and its store are `two-away` and `away`, and what `one` lacks is aside too.
struct Lost {
    scratch: Scratch,
    archive: String,
    /// Another one, which is not there when the restore is made.
    other: String,
    /// Objects of the archive that are not there, and where they are.
    kept: Vec<(PathBuf, PathBuf)>,
}

const FILES: [&str; 3] = ["first", "second", "third"];

impl Lost {
    fn new() -> Lost {
        let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
        let archive = format!("{}?domain=elsewhere", scratch.url("one"));
        let other = format!("{}?domain=far-away", scratch.url("two"));
        let format = ["format", "a", "--blocks", &scratch.url("ba"), "--name", "vol", "--archive", &archive];
        scratch.run(format.into_iter().chain(["--archive", &other])).expect_code(0);
        scratch.mount("a", "ma");
        sow(&scratch.path("ma"));
        let lost = Lost { scratch, archive, other, kept: Vec::new() };
        lost.archive_all();
        let mut kept = Vec::new();
        for name in FILES {
            let before = objects(&lost.scratch.path("one/packs"));
            write_safely(&lost.scratch.path("ma").join(name), &large()).unwrap();
            lost.archive_all();
            let packs = objects(&lost.scratch.path("one/packs"));
            for (number, pack) in packs.difference(&before).enumerate() {
                let aside = lost.scratch.path(&format!("{name}-{number}"));
                fs::rename(pack, &aside).unwrap();
                if name != "second" {
                    let also = pack.strip_prefix(lost.scratch.path("one")).unwrap();
                    fs::remove_file(lost.scratch.path("two").join(also)).unwrap();
                }
                kept.push((pack.clone(), aside));
            }
        }
        assert_eq!(kept.len(), FILES.len(), "{kept:?}");
        lost.scratch.signal_all(Signal::KILL);
        wait_for("the mount to die", || murphy_tests::is_dead(&lost.scratch.path("ma")));
        rustix::mount::unmount(lost.scratch.path("ma"), rustix::mount::UnmountFlags::DETACH).unwrap();
        fs::remove_dir_all(lost.scratch.path("a")).unwrap();
        fs::rename(lost.scratch.path("ba"), lost.scratch.path("away")).unwrap();
        fs::rename(lost.scratch.path("two"), lost.scratch.path("two-away")).unwrap();
        Lost { kept, ..lost }
    }

    /// Waits until the archives have everything.
    fn archive_all(&self) {
        self.scratch.run(["flush", "ma"]).expect_code(0);
        let status = || self.scratch.run(["status", "a", "--json"]).json();
        let wanted = status()["durable_lsn"].as_u64();
        for archive in [0, 1] {
            wait_for("an archive", || status()["archives"][archive]["lsn"].as_u64() >= wanted);
        }
    }

    fn mount(&self, node: &str) {
        let place = format!("m{node}");
        let _there_already = fs::create_dir(self.scratch.path(&place));
        self.scratch.run(["mount", node, &place, "-d", "--listen", &free_address()]).expect_code(0);
    }

    fn wait_missing(&self, node: &str, wanted: u64) {
        wait_for(&format!("{wanted} missing packs"), || {
            let status = self.scratch.run(["status", node, "--json"]).json();
            status["packs"]["missing"].as_u64() == Some(wanted)
        });
    }

    /// Which of the files can be read at the mount of `node`; the others are EIO.
    fn readable(&self, node: &str) -> [bool; 3] {
        FILES.map(|name| match fs::read(self.scratch.path(&format!("m{node}/{name}"))) {
            Ok(bytes) => {
                assert!(bytes == large(), "{name}");
                true
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{name}");
                false
            }
        })
    }

    /// What an archive lacked is there again.
    fn mend(&self, number: usize) {
        let (pack, aside) = &self.kept[number];
        fs::rename(aside, pack).unwrap();
    }
}

/// The fear: a restore takes over without all packs, and nobody ever looks for the others again although somebody who has them comes back.
#[test]
fn what_a_restore_that_takes_over_lacks_is_found_when_somebody_has_it() {
    if !can_mount("what_a_restore_that_takes_over_lacks_is_found_when_somebody_has_it") {
        return;
    }
    let lost = Lost::new();
    let blocks = lost.scratch.url("bn");
    let take_over =
        ["restore", &lost.archive, "n", "--take-over", "--confirm", "vol", "--blocks", &blocks, "--json"];
    let restored = lost.scratch.run(take_over.into_iter().chain(["--assume-lost", &lost.other]));
    let restored = restored.expect_code(3).json();
    assert_eq!(restored["missing_packs"], 3, "{restored}");
    lost.mount("n");
    lost.wait_missing("n", 3);
    assert_eq!(lost.readable("n"), [false; 3]);
    assert_eq!(fs::read(lost.scratch.path("mn/small")).unwrap(), b"some text\n");
    assert!(!lost.scratch.path("two").exists(), "an archive is made where one is looked for");
    // The archive gives what it has again.
    lost.mend(0);
    lost.scratch.umount("mn");
    lost.mount("n");
    lost.wait_missing("n", 2);
    assert_eq!(lost.readable("n"), [true, false, false]);
    // Another archive of the volume is back, which the restore was not made of.
    lost.scratch.umount("mn");
    fs::rename(lost.scratch.path("two-away"), lost.scratch.path("two")).unwrap();
    lost.mount("n");
    lost.wait_missing("n", 1);
    assert_eq!(lost.readable("n"), [true, true, false]);
    // The store of the source before comes back as that of a mirror.
    let token = lost.scratch.run(["invite", "n"]).expect_code(0).stdout();
    fs::write(lost.scratch.path("token"), token).unwrap();
    let url = lost.scratch.url("away");
    lost.scratch.run(["join", "d", "--token-file", "token", "--blocks", &url]).expect_code(0);
    lost.mount("d");
    lost.wait_missing("n", 0);
    lost.scratch.run(["umount", "md"]).expect_code(0);
    assert_eq!(lost.readable("n"), [true; 3]);
    // So it comes into the archive, too.
    wait_for("an archive that is whole", || {
        lost.scratch.run(["verify", &lost.archive, "--data", "100"]).code() == Some(0)
    });
    lost.scratch.run(["fsck", "n", "--data"]).expect_code(0);
}

/// The fear: a restore takes over and reads its packs in the archives, nobody calls missing what none of them has: no mirror ever has every byte
/// or acknowledges again, no archive goes on, and nobody looks for it although somebody has it.
#[test]
fn what_a_take_over_that_reads_in_archives_lacks_holds_up_nobody_and_is_found() {
    if !can_mount("what_a_take_over_that_reads_in_archives_lacks_holds_up_nobody_and_is_found") {
        return;
    }
    let lost = Lost::new();
    let take_over = ["restore", &lost.archive, "n", "--take-over", "--confirm", "vol", "--json"];
    let restored = lost.scratch.run(take_over.into_iter().chain(["--assume-lost", &lost.other]));
    let restored = restored.expect_code(3).json();
    assert_eq!((&restored["missing_packs"], &restored["packs_copied"]), (&3.into(), &0.into()), "{restored}");
    lost.mount("n");
    lost.wait_missing("n", 3);
    assert_eq!(lost.readable("n"), [false; 3]);
    assert_eq!(fs::read(lost.scratch.path("mn/small")).unwrap(), b"some text\n");
    // A mirror has every byte that anybody has.
    let token = lost.scratch.run(["invite", "n"]).expect_code(0).stdout();
    fs::write(lost.scratch.path("token"), token).unwrap();
    lost.scratch.run(["join", "d", "--token-file", "token"]).expect_code(0);
    lost.mount("d");
    let status = || lost.scratch.run(["status", "n", "--json"]).json();
    wait_for("a mirror with every byte", || {
        let status = status();
        status["mirrors"][0]["data_lsn"].as_u64() >= status["durable_lsn"].as_u64()
    });
    lost.scratch.run(["umount", "md"]).expect_code(0);
    lost.mend(0);
    lost.mend(2);
    lost.scratch.umount("mn");
    lost.mount("n");
    lost.wait_missing("n", 1);
    assert_eq!(lost.readable("n"), [true, false, true]);
}

/// The fear: a copy without all bytes can be archived nowhere, because what is missing is waited for.
#[test]
fn a_copy_knows_what_it_lacks_and_can_be_archived_and_gets_it_when_its_archive_has_it() {
    if !can_mount("a_copy_knows_what_it_lacks_and_can_be_archived_and_gets_it_when_its_archive_has_it") {
        return;
    }
    let lost = Lost::new();
    let blocks = lost.scratch.url("bn");
    let restored = lost.scratch.run(["restore", &lost.archive, "n", "--blocks", &blocks, "--json"]);
    assert_eq!(restored.expect_code(3).json()["missing_packs"], 3);
    lost.mount("n");
    lost.wait_missing("n", 3);
    assert_eq!(lost.readable("n"), [false; 3]);
    let own = format!("{}?domain=elsewhere", lost.scratch.url("own"));
    lost.scratch.run(["archive", "add", "n", &own]).expect_code(0);
    lost.scratch.run(["flush", "mn"]).expect_code(0);
    let status = || lost.scratch.run(["status", "n", "--json"]).json();
    wait_for("the archive of the copy", || {
        let status = status();
        status["archives"][0]["lsn"].as_u64() >= status["durable_lsn"].as_u64()
    });
    (0..FILES.len()).for_each(|number| lost.mend(number));
    lost.scratch.umount("mn");
    lost.mount("n");
    lost.wait_missing("n", 0);
    assert_eq!(lost.readable("n"), [true; 3]);
    wait_for("an archive that is whole", || {
        lost.scratch.run(["verify", &own, "--data", "100"]).code() == Some(0)
    });
}
