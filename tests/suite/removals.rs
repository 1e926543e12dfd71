//! Taking archives and members out, and making nodes: what is lost is said before it is done, and done only for somebody who agreed.

use std::{collections::BTreeMap, fs, path::PathBuf};

use murphy_tests::{PATIENCE, Scratch, wait_until};
use serde_json::Value;

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

/// A volume at rest with an archive that acknowledges; its URL.
fn archived() -> (Scratch, String) {
    let scratch = scratch();
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    let blocks = scratch.url("blocks");
    let format = ["format", "node", "--name", "vol", "--blocks", &blocks, "--ack", "archive", "--archive"];
    scratch.run(format.iter().copied().chain([&archive[..]])).expect_code(0);
    (scratch, archive)
}

/// Every byte of the log and of the archive.
fn bytes(scratch: &Scratch) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut bytes = scratch.bytes_of("node/log");
    bytes.extend(scratch.bytes_of("archive"));
    bytes.retain(|path, _| !path.ends_with("lock"));
    bytes
}

/// The fear: a slip of the hand gives up the only archive.
#[test]
fn an_archive_is_given_up_by_somebody_who_has_seen_the_plan() {
    let (scratch, archive) = archived();
    let before = bytes(&scratch);
    let remove = |more: &[&'static str]| {
        let order: Vec<&str> =
            ["archive", "remove", "node", &archive].into_iter().chain(more.iter().copied()).collect();
        scratch.run(order)
    };
    remove(&[]).expect_error(1, "--assume-lost");
    remove(&["--dry-run"]).expect_error(1, "--assume-lost");
    remove(&["--assume-lost"]).expect_error(2, "--confirm vol");
    remove(&["--assume-lost", "--confirm", "other"]).expect_error(2, "is called \"vol\"");
    let planned = remove(&["--assume-lost", "--dry-run"]).expect_code(0).stdout();
    assert!(planned.contains("none is left that acknowledges") && planned.contains("given up"), "{planned}");
    let plan = remove(&["--assume-lost", "--dry-run", "--json"]).expect_code(0).json();
    assert_eq!(
        (&plan["gives_up"], &plan["name"], &plan["archive"]),
        (&true.into(), &"vol".into(), &archive.as_str().into())
    );
    scratch.wait_for_the_end();
    assert!(bytes(&scratch) == before, "a plan and a refusal change nothing");
    let done = remove(&["--assume-lost", "--confirm", "vol"]).expect_code(0);
    assert!(done.stderr().contains("given up"), "the plan is shown: {done}");
    let listed = scratch.run(["archive", "list", "node"]).expect_code(0);
    assert!(!listed.stdout().contains(&archive), "{listed}");
}

/// The last archive of a volume that waits for nobody is asked for too; one of two is not.
#[test]
fn an_archive_beside_which_another_one_stays_is_removed_without_a_question() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    let name = scratch.run(["status", "node", "--json"]).json()["name"].as_str().unwrap().to_owned();
    let url = |name: &str| format!("{}?domain={name}", scratch.url(name));
    let (one, two) = (url("one"), url("two"));
    for url in [&one, &two] {
        scratch.run(["archive", "add", "node", url]).expect_code(0);
    }
    let removed = scratch.run(["archive", "remove", "node", &one]).expect_code(0);
    assert!(removed.stderr().contains("stays") && removed.stderr().contains(&two), "{removed}");
    let refused = scratch.run(["archive", "remove", "node", &two]).expect_error(2, "--confirm");
    assert!(refused.stderr().contains("is in no archive"), "{refused}");
    scratch.run(["archive", "remove", "node", &two, "--confirm", &name]).expect_code(0);
}

/// The fear: what only a mirror has acknowledged is given up by an order that did not say so.
#[test]
fn a_member_is_given_up_by_somebody_who_has_seen_the_plan() {
    let scratch = scratch();
    let blocks = scratch.url("blocks");
    scratch.run(["format", "node", "--blocks", &blocks, "--name", "vol", "--ack", "mirror=1"]).expect_code(0);
    scratch.run(["serve", "node", "-d", "--listen", "127.0.0.1:0"]).expect_code(0);
    let token = scratch.run(["invite", "node"]).expect_code(0).stdout();
    fs::write(scratch.path("token"), token).unwrap();
    scratch.run(["join", "mirror", "--token-file", "token"]).expect_code(0);
    let used = scratch.run(["join", "again", "--token-file", "token"]).expect_code(1).stderr();
    assert_eq!(used.matches("invitation").count(), 1, "it says so once: {used}");
    let members = || -> Vec<Value> {
        let listed = scratch.run(["member", "list", "node", "--json"]).expect_code(0).stdout();
        listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    wait_until("the source to be listed", PATIENCE, || {
        members().iter().any(|member| member["role"] == "source")
    });
    let node = members().iter().find(|member| member["role"] == "mirror").unwrap()["node"]
        .as_str()
        .unwrap()
        .to_owned();
    let before = members();
    let remove = |more: &[&'static str]| {
        let order: Vec<&str> =
            ["member", "remove", "node", &node].into_iter().chain(more.iter().copied()).collect();
        scratch.run(order)
    };
    remove(&["--assume-lost"]).expect_error(2, "--confirm vol");
    let planned = remove(&["--assume-lost", "--dry-run"]).expect_code(0).stdout();
    assert!(planned.contains("0 are left") && planned.contains("given up"), "{planned}");
    remove(&["--dry-run"]).expect_code(0);
    remove(&[]).expect_error(1, "every fsync would fail");
    assert_eq!(members(), before, "a plan and a refusal remove nobody");
    remove(&["--assume-lost", "--confirm", "vol"]).expect_code(0);
    assert!(members().iter().any(|member| member["removed"] == true));
}

/// The fear: two restores into one directory go on side by side, and the first one that ends takes back what keeps the archive as it is for the
/// other.
#[test]
fn a_second_restore_into_a_directory_is_refused_and_changes_nothing() {
    let (scratch, archive) = archived();
    // The root is there once a node was served.
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    scratch.run(["flush", "node"]).expect_code(0);
    scratch.signal_all(rustix::process::Signal::TERM);
    let other = fs::File::create(scratch.path(".copy.making")).unwrap();
    other.lock().unwrap();
    fs::write(scratch.path(".copy.making"), "murphy restore, process 4711").unwrap();
    let before = bytes(&scratch);
    scratch
        .run(["restore", &archive, "copy"])
        .expect_error(1, "by another process (murphy restore, process 4711)");
    scratch
        .run(["load", "nothing", "copy", "--blocks", &scratch.url("blocks")])
        .expect_error(1, "by another process");
    assert!(bytes(&scratch) == before && !scratch.path("copy").exists());
    drop(other);
    scratch.run(["restore", &archive, "copy"]).expect_code(0);
    assert!(!scratch.path(".copy.making").exists(), "nothing is left behind");
}
