//! The real program: a node's directory is put back to an earlier state, and its archive has lost a slot.

use std::{collections::BTreeSet, fs, path::PathBuf};

use murphy_tests::{Scratch, copy_tree};
use rustix::process::Signal;

/// A node with `--ack archive`; its directory was copied, and it has acknowledged more since.
struct Forgotten {
    scratch: Scratch,
    archives: Vec<String>,
    /// The slots that came after the copy, in order.
    later: Vec<PathBuf>,
    /// How far it was.
    durable: u64,
}

impl Forgotten {
    fn with_archives(names: &[&str]) -> Forgotten {
        let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
        let archives: Vec<String> =
            names.iter().map(|name| format!("{}?domain={name}", scratch.url(name))).collect();
        let blocks = scratch.url("blocks");
        let mut format = vec!["format", "node", "--blocks", &blocks, "--ack", "archive"];
        archives.iter().for_each(|url| format.extend(["--archive", url]));
        scratch.run(format).expect_code(0);
        let mut forgotten = Forgotten { scratch, archives, later: Vec::new(), durable: 0 };
        forgotten.live();
        copy_tree(&forgotten.scratch.path("node"), &forgotten.scratch.path("kept"));
        let before: BTreeSet<PathBuf> = forgotten.slots().into_iter().collect();
        for _ in 0..4 {
            forgotten.live();
        }
        forgotten.later = forgotten.slots();
        forgotten.later.retain(|slot| !before.contains(slot));
        assert!(forgotten.later.len() >= 3, "{:?}", forgotten.later);
        forgotten
    }

    /// Serves the node for a while; everything that it writes is acknowledged.
    fn live(&mut self) {
        self.scratch.run(["serve", "node", "-d"]).expect_code(0);
        self.scratch.run(["flush", "node"]).expect_code(0);
        let status = self.scratch.run(["status", "node", "--json"]).json();
        self.durable = status["durable_lsn"].as_u64().unwrap();
        self.scratch.signal_all(Signal::TERM);
        self.scratch.wait_for_the_end();
    }

    fn slots(&self) -> Vec<PathBuf> {
        let all = self.scratch.bytes_of("one/log");
        all.into_keys().filter(|path| path.extension().is_some_and(|extension| extension == "seg")).collect()
    }

    fn put_back(&self) {
        fs::remove_dir_all(self.scratch.path("node")).unwrap();
        copy_tree(&self.scratch.path("kept"), &self.scratch.path("node"));
    }

    fn last(&self) -> &str {
        self.later.last().unwrap().file_name().unwrap().to_str().unwrap()
    }
}

/// The fear: a machine is put back to a snapshot, its archive has lost one object, and the source acknowledges on from there: what it had
/// acknowledged before is in the archive, behind the lost object, and nobody ever looks at it again.
#[test]
fn a_source_that_was_put_back_does_not_start_while_its_archive_holds_what_it_forgot() {
    let mut forgotten = Forgotten::with_archives(&["one"]);
    forgotten.put_back();
    let lost = fs::read(&forgotten.later[0]).unwrap();
    fs::remove_file(&forgotten.later[0]).unwrap();
    let (scratch, url) = (&forgotten.scratch, forgotten.archives[0].clone());
    let held = || (scratch.prints_of("one"), scratch.run(["fsck", "node", "--json"]).json()["lsn"].clone());
    let before = held();
    let refused = scratch.run(["serve", "node"]).expect_error(1, forgotten.last()).stderr();
    for part in ["nothing leads to", "murphy promote", "--take-over", "murphy archive abandon", &url] {
        assert!(refused.contains(part), "no {part:?} in {refused}");
    }
    // A command that changes something decides as well.
    let more = ["archive", "add", "node", &scratch.url("another")];
    scratch.run(more).expect_error(1, forgotten.last());
    assert!(held() == before, "something was changed");
    // The object is found again, and everything with it.
    fs::write(&forgotten.later[0], &lost).unwrap();
    let known = forgotten.durable;
    forgotten.live();
    assert!(forgotten.durable > known, "{} {known}", forgotten.durable);
}

/// The same, and another archive has everything: it comes back from there, and what the first one has lost is made good.
#[test]
fn a_source_that_was_put_back_gets_from_another_archive_what_one_has_lost() {
    let mut forgotten = Forgotten::with_archives(&["one", "two"]);
    forgotten.put_back();
    fs::remove_file(&forgotten.later[0]).unwrap();
    let known = forgotten.durable;
    forgotten.live();
    assert!(forgotten.durable > known, "{} {known}", forgotten.durable);
    for url in &forgotten.archives {
        forgotten.scratch.run(["verify", url]).expect_code(0);
    }
}

/// The way out when nobody has it any more, or when it was a copy's: people say so, and see before what they give up.
#[test]
fn what_nothing_leads_to_is_given_up_by_name_only() {
    let mut forgotten = Forgotten::with_archives(&["one"]);
    let abandon = |forgotten: &Forgotten, more: &[&str]| {
        let arguments = ["archive", "abandon", "node", &forgotten.archives[0]];
        forgotten.scratch.run(arguments.into_iter().chain(more.iter().copied()))
    };
    let nothing = abandon(&forgotten, &["--confirm", "node"]).expect_code(0);
    assert!(nothing.stdout().is_empty() && nothing.stderr().contains("Nothing"), "{nothing}");
    forgotten.put_back();
    fs::remove_file(&forgotten.later[0]).unwrap();
    let before = forgotten.scratch.prints_of("one");
    let shown = abandon(&forgotten, &["--dry-run"]).expect_code(0).stdout();
    assert!(shown.contains(forgotten.last()) && shown.contains("written 20"), "{shown}");
    abandon(&forgotten, &[]).expect_code(2);
    abandon(&forgotten, &["--confirm", "another"]).expect_code(2);
    assert!(forgotten.scratch.prints_of("one") == before, "something was changed");
    let name =
        forgotten.scratch.run(["status", "node", "--json"]).json()["name"].as_str().unwrap().to_owned();
    abandon(&forgotten, &["--confirm", &name]).expect_code(0);
    for _ in 0..2 {
        forgotten.live();
    }
    forgotten.scratch.run(["restore", &forgotten.archives[0], "copy"]).expect_code(0);
}

/// The archive does not answer when the source is started, and says only later what the source has forgotten.
#[test]
fn a_source_that_hears_later_what_it_forgot_ends() {
    let forgotten = Forgotten::with_archives(&["one"]);
    forgotten.put_back();
    fs::remove_file(&forgotten.later[0]).unwrap();
    let scratch = &forgotten.scratch;
    let (place, away) = (scratch.path("one"), scratch.path("away"));
    fs::rename(&place, &away).unwrap();
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    fs::rename(&away, &place).unwrap();
    scratch.wait_for_the_end();
    scratch.run(["serve", "node"]).expect_error(1, forgotten.last());
}
