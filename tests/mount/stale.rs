//! A source that hears from its archive alone that it was replaced: it stops, stays away, and what only it holds is listed and can be read.

use std::{fs, path::Path, process::Command};

use murphy_tests::{PATIENCE, Random, Scratch, can_mount, output_of, wait_for_ok, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn status(scratch: &Scratch, node: &str) -> Value {
    scratch.run(["status", node, "--json"]).json()
}

fn lsn(scratch: &Scratch) -> u64 {
    scratch.run(["flush", "mnt"]).expect_code(0);
    status(scratch, "mnt")["durable_lsn"].as_u64().unwrap()
}

/// It is fenced, refuses to be the source, and lists the entries behind `common` up to `last`.
fn assert_stays_away(scratch: &Scratch, node: &str, (common, last): (u64, u64)) {
    scratch.make_dir("elsewhere");
    for arguments in [&["mount", node, "elsewhere", "-d"][..], &["serve", node]] {
        let refused = scratch.run(arguments).expect_error(1, "another source has taken over");
        let hint = refused.stderr();
        assert!(hint.contains("murphy status") && hint.contains("murphy join"), "{refused}");
    }
    let status = status(scratch, node);
    assert!(status["verdict"].as_str().unwrap().starts_with("FENCED"), "{status}");
    let branches = status["branches"].as_array().unwrap();
    let listed = format!("lsn {} to {last} of epoch 1", common + 1);
    assert!(matches!(&branches[..], [one] if one.as_str().unwrap().starts_with(&listed)), "{status}");
    let shown = scratch.run(["status", node]).expect_code(3).stdout();
    assert!(shown.contains(&listed), "{shown}");
}

/// The tail is in the log of the old source, and a dump of it brings the files elsewhere.
fn assert_can_be_copied_out(scratch: &Scratch, node: &str, bytes: &[u8]) {
    let (dump, copy) = (format!("{node}.dump"), format!("copy of {node}"));
    scratch.run(["dump", node, &dump]).expect_code(0);
    scratch.run(["load", &dump, &copy, "--blocks", &scratch.url("blocks")]).expect_code(0);
    let mount = scratch.mount(&copy, "copied");
    assert!(fs::read(mount.join("alone")).unwrap() == bytes);
    scratch.umount("copied");
}

fn copy(from: &Path, to: &Path) {
    assert!(output_of(Command::new("cp").arg("-a").args([from, to])).status.success());
}

/// The fear: what the old source wrote while the archive was away is forgotten, and nobody is told that it is there. It is found by the
/// source that goes on when its process does, and by one that is started again.
#[test]
fn a_tail_that_only_an_archive_speaks_of_is_listed_as_a_branch() {
    if !can_mount("a_tail_that_only_an_archive_speaks_of_is_listed_as_a_branch") {
        return;
    }
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    let blocks = scratch.url("blocks");
    scratch
        .run(["format", "node", "--name", "vol", "--blocks", &blocks, "--archive", &archive])
        .expect_code(0);
    let mount = scratch.mount("node", "mnt");
    fs::write(mount.join("shared"), b"on both sides").unwrap();
    let common = lsn(&scratch);
    wait_for_ok("the archive", PATIENCE, || {
        let status = status(&scratch, "mnt");
        (status["archives"][0]["lsn"].as_u64() >= Some(common)).then_some(()).ok_or(status)
    });
    fs::rename(scratch.path("archive"), scratch.path("away")).unwrap();
    let bytes = Random::new(5).bytes(50_000);
    fs::write(mount.join("alone"), &bytes).unwrap();
    lsn(&scratch);
    let source = Pid::from_raw(status(&scratch, "node")["running"]["pid"].as_i64().unwrap() as i32).unwrap();
    kill_process(source, Signal::STOP).unwrap();
    copy(&scratch.path("node"), &scratch.path("started again"));
    fs::remove_file(scratch.path("started again/control.sock")).unwrap();
    fs::rename(scratch.path("away"), scratch.path("archive")).unwrap();

    // It is watched for a minute; one that is alive shows it every 20 s.
    let take_over =
        ["restore", &archive, "next", "--take-over", "--confirm", "vol", "--blocks", &blocks, "--json"];
    let taken = scratch.run(take_over).expect_code(0).json();
    let common = taken["lsn"].as_u64().unwrap();
    kill_process(source, Signal::CONT).unwrap();
    wait_until("the old source to end", PATIENCE, || scratch.processes().is_empty());
    let said = fs::read_to_string(scratch.path("node/murphy.log")).unwrap();
    let hint = said.lines().rfind(|line| line.starts_with("Hint: ")).unwrap_or_default();
    assert!(hint.contains("murphy dump") && !hint.contains("start again once"), "{said}");

    let last = status(&scratch, "node")["durable_lsn"].as_u64().unwrap();
    assert!(last > common, "{last} is not behind {common}");
    assert_stays_away(&scratch, "node", (common, last));
    assert_can_be_copied_out(&scratch, "node", &bytes);

    let last = status(&scratch, "started again")["durable_lsn"].as_u64().unwrap();
    assert_stays_away(&scratch, "started again", (common, last));
    assert_can_be_copied_out(&scratch, "started again", &bytes);

    let mount = scratch.mount("next", "mnt");
    assert_eq!(fs::read(mount.join("shared")).unwrap(), b"on both sides");
    assert!(!mount.join("alone").exists());
    scratch.umount("mnt");
}
