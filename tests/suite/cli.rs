//! The program without a mount: bad input of every kind is one clear error that changes nothing.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use murphy_tests::{PATIENCE, Scratch, finish, pause, wait_for, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

/// A format that half happened, or happened over something, would be the end of somebody's data.
#[test]
fn format_refuses_what_is_in_use_and_leaves_nothing_behind() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    let before = (scratch.prints_of("node"), scratch.prints_of("blocks"));
    let again = ["format", "node", "--blocks", &scratch.url("other")];
    scratch.run(again).expect_error(1, "not empty");
    let same_blocks = ["format", "second", "--blocks", &scratch.url("blocks")];
    scratch.run(same_blocks).expect_error(1, "holds the packs of volume");
    fs::write(scratch.make_dir("full").join("x"), b"x").unwrap();
    let full = ["format", "second", "--blocks", &scratch.url("full")];
    scratch.run(full).expect_error(1, "not empty");
    assert_eq!((scratch.prints_of("node"), scratch.prints_of("blocks")), before);
    // The places of one that has an archive too, whichever of them is used: the other ones stay as they are, or are not made.
    let (full, archive) = (scratch.url("full"), scratch.url("archive"));
    scratch.run(["format", "third", "--blocks", &scratch.url("b3"), "--archive", &archive]).expect_code(0);
    scratch.make_dir("empty");
    let used = scratch.prints_of(".");
    for (blocks, given, part) in [
        ("none", [&scratch.url("fresh"), &full], format!("{full} is not empty and no archive: it holds x")),
        ("empty", [&full, &scratch.url("fresh")], format!("{full} is not empty and no archive: it holds x")),
        ("none", [&archive, &scratch.url("fresh")], format!("{archive} is the archive of another history")),
        ("full", [&scratch.url("fresh"), &scratch.url("more")], format!("{full} is not empty: it holds x")),
        (
            "blocks",
            [&scratch.url("fresh"), &scratch.url("more")],
            format!("{} holds the packs", scratch.url("blocks")),
        ),
    ] {
        let [one, other] = given;
        let blocks = scratch.url(blocks);
        let format = ["format", "second", "--blocks", &blocks, "--archive", one, "--archive", other];
        let refused = scratch.run(format).expect_error(1, &part);
        assert!(scratch.prints_of(".") == used, "{refused}");
    }
    let left: Vec<_> = fs::read_dir(scratch.path(".")).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(
        left.iter().all(|name| name != "second" && !name.to_string_lossy().ends_with(".new")),
        "{left:?}"
    );
}

/// Two processes with one log would be two histories.
#[test]
fn a_node_is_served_by_one_process() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.run(["serve", "node", "-d"]).expect_code(0).stdout();
    scratch.run(["serve", "node"]).expect_error(1, "served already");
    // Without its socket the lock still keeps a second process out.
    fs::remove_file(scratch.path("node/control.sock")).unwrap();
    scratch.run(["serve", "node"]).expect_error(1, "in use by another process");
    scratch.signal_all(Signal::TERM);
    scratch.run(["status", "node"]).expect_code(3).stdout();
}

/// A running node answers, and says so.
#[test]
fn commands_work_on_a_live_node() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    let stopped = scratch.run(["status", "node", "--json"]).expect_code(3).json();
    assert!(stopped["running"].is_null());
    scratch.run(["serve", "node", "-d"]).expect_code(0).stdout();
    let live = scratch.run(["status", "node", "--json"]).expect_code(3).json();
    assert!(live["running"]["pid"].as_u64().unwrap() > 1);
    for field in [
        "volume",
        "name",
        "branch",
        "role",
        "position",
        "digest",
        "durable_lsn",
        "inodes",
        "bytes",
        "archives",
    ] {
        assert!(!live[field].is_null(), "{field}: {live}");
    }
    assert_eq!((&live["volume"], &live["digest"]), (&stopped["volume"], &stopped["digest"]));
    assert_eq!(scratch.run(["fsck", "node", "--json"]).expect_code(0).json()["findings"], 0);
    scratch.run(["flush", "node"]).expect_code(0).stdout();
}

/// A kill leaves a socket and a lock file; neither may be in the way of the next start.
#[test]
fn a_killed_process_is_followed_by_the_next() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.run(["serve", "node", "-d"]).expect_code(0).stdout();
    scratch.signal_all(Signal::KILL);
    assert!(scratch.path("node/control.sock").exists());
    scratch.run(["serve", "node", "-d"]).expect_code(0).stdout();
    scratch.signal_all(Signal::TERM);
    assert!(!scratch.path("node/control.sock").exists());
}

/// Whoever asks a node that is being killed is told so, and not what the system calls it.
#[test]
fn a_command_that_meets_a_kill_says_that_the_node_is_not_running() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    for _ in 0..5 {
        let served = scratch.run(["serve", "node", "-d", "--json"]).expect_code(0).json();
        let pid =
            served["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw).unwrap();
        std::thread::scope(|scope| {
            let asked = ["flush", "status"].map(|command| {
                let scratch = &scratch;
                scope.spawn(move || {
                    wait_for("the kill to show", PATIENCE, || {
                        let ran = scratch.run([command, "node", "--json"]);
                        let running = ran.code() == Some(0) || ran.stdout().contains("\"pid\"");
                        (!running).then_some(ran)
                    })
                })
            });
            // The node alone: who asks it is in its directory too.
            kill_process(pid, Signal::KILL).unwrap();
            let [flush, status] = asked.map(|thread| thread.join().unwrap());
            let said = flush.expect_code(1).stderr();
            assert!(said.contains("is not running") && said.contains("node"), "{said}");
            assert!(status.expect_code(3).json()["running"].is_null());
        });
    }
    let said = scratch.run(["flush", "node"]).expect_error(1, "is not running").stderr();
    assert!(said.contains(&scratch.path("node").display().to_string()), "{said}");
}

/// A damaged or foreign murphy.toml must be named, not guessed around.
#[test]
fn a_bad_configuration_is_one_error_and_changes_nothing() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.format("other", "blocks2");
    let path = scratch.path("node/murphy.toml");
    let whole = fs::read_to_string(&path).unwrap();
    let foreign = fs::read_to_string(scratch.path("other/murphy.toml")).unwrap();
    let cases = [
        ("format = 0\nvolume = ".to_owned(), "murphy.toml is damaged"),
        ("\0\0\0\0".to_owned(), "murphy.toml is damaged"),
        (whole.replace("format = 0", "format = 9"), "format version 9"),
        (whole.replace("file://", "ftp://"), "murphy.toml is damaged"),
        (foreign, "a segment of volume"),
    ];
    for (text, error) in cases {
        // It looks at what is there if it is told where.
        let found = if error == "a segment of volume" { 3 } else { 1 };
        fs::write(&path, text).unwrap();
        let before = (scratch.prints_of("node"), scratch.prints_of("blocks"));
        for (command, code) in [("serve", 1), ("status", 1), ("fsck", found)] {
            scratch.run([command, "node"]).expect_error(code, error);
        }
        scratch.run(["serve", "node", "-d"]).expect_error(1, error);
        let log = "murphy.log";
        let mut after = (scratch.prints_of("node"), scratch.prints_of("blocks"));
        after.0.remove(&scratch.path("node").join(log));
        let mut before = before;
        before.0.remove(&scratch.path("node").join(log));
        assert!(after == before, "something changed after {error:?}");
    }
    fs::write(&path, whole).unwrap();
    scratch.run(["status", "node"]).expect_code(3).stdout();
}

/// What was durable and is damaged is never cut off silently, nor written to.
#[test]
fn damage_in_the_middle_of_the_log_is_refused() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    // Each start appends a session; marks after the first frames prove that they were durable.
    for _ in 0..3 {
        scratch.run(["serve", "node", "-d"]).expect_code(0).stdout();
        scratch.signal_all(Signal::TERM);
    }
    let mut segments: Vec<_> = scratch
        .bytes_of("node/log")
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|e| e == "seg"))
        .collect();
    segments.sort();
    let (first, bytes) = segments.first().unwrap();
    let mut bytes = bytes.clone();
    bytes[400] ^= 0x10;
    fs::write(first, &bytes).unwrap();
    fs::remove_dir_all(scratch.path("node/index")).unwrap();
    scratch.run(["status", "node"]).expect_error(1, "damaged");
    assert_eq!(fs::read(first).unwrap(), bytes);
    for (segment, _) in &segments {
        assert!(segment.exists(), "{}", segment.display());
    }
}

/// A disk that is not mounted must not be replaced by the directory below it.
#[test]
fn a_block_store_that_is_gone_is_refused() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    fs::rename(scratch.path("blocks"), scratch.path("elsewhere")).unwrap();
    scratch.run(["serve", "node"]).expect_error(1, "is not there");
    assert!(!scratch.path("blocks").exists());
    scratch.make_dir("blocks");
    scratch.run(["serve", "node"]).expect_error(1, "not a block store of this volume");
}

/// Usage errors have a code of their own, so that scripts can tell.
#[test]
fn wrong_usage_ends_with_two() {
    let scratch = scratch();
    for arguments in [
        &["format", "node"][..],
        &["format", "node", "--blocks", "nonsense"],
        &["format", "node", "--blocks", "s3://key:secret@bucket"],
        &["format", "node", "--blocks", "file:///x", "--ack", "maybe"],
        &["format", "node", "--blocks", "file:///x", "--window", "soon"],
        &["format", "node", "--blocks", "file:///x", "--name", "a/b"],
        &["fly"],
        &[],
    ] {
        let ran = scratch.run(arguments).expect_code(2);
        assert!(!ran.stderr().contains("key:secret"), "{ran}");
    }
    scratch.run(["--help"]).expect_code(0).stdout();
    scratch.make_dir("empty");
    for command in [&["status"][..], &["serve"], &["serve", "-d"], &["fsck"]] {
        for place in ["nowhere", "empty"] {
            let ran = scratch.run(command.iter().chain(&[place]));
            ran.expect_error(1, &format!("{place} is not a node"));
        }
        assert_eq!(fs::read_dir(scratch.path("empty")).unwrap().count(), 0, "{command:?}");
    }
    scratch.run(["restore", "file:///x"]).expect_error(2, "at least one archive");
}

/// The fear: a script that reads what people read is broken by the next nicer sentence.
#[test]
fn every_command_that_prints_prints_json_when_asked() {
    let scratch = scratch();
    let said = |code: i32, arguments: &[&str]| -> Vec<Value> {
        let ran = scratch.run(arguments.iter().chain(&["--json"])).expect_code(code);
        let lines: Result<Vec<Value>, _> = ran.stdout().lines().map(serde_json::from_str).collect();
        let lines = lines.unwrap_or_else(|error| panic!("{error}: {ran}"));
        assert!(!lines.is_empty(), "nothing is printed: {ran}");
        lines
    };
    let (blocks, archive) = (scratch.url("blocks"), format!("{}?domain=elsewhere", scratch.url("archive")));
    let formatted = said(0, &["format", "node", "--blocks", &blocks, "--name", "vol"]);
    assert_eq!(formatted[0]["name"], "vol");
    assert!(said(0, &["subscribe", "node"]).len() > 1, "one line an entry");
    said(0, &["serve", "node", "-d", "--listen", "127.0.0.1:0"]);
    assert_eq!(said(3, &["status", "node"])[0]["danger"], true);
    assert_eq!(said(0, &["archive", "add", "node", &archive])[0]["url"], archive);
    assert_eq!(said(0, &["archive", "list", "node"])[0]["url"], archive);
    let taken = said(0, &["archive", "snapshot", "node"]);
    said(0, &["flush", "node"]);
    let token = said(0, &["invite", "node"])[0]["token"].as_str().unwrap().to_owned();
    fs::write(scratch.path("token"), token).unwrap();
    assert_eq!(said(0, &["join", "mirror", "--token-file", "token"])[0]["role"], "mirror");
    assert_eq!(said(0, &["dump", "node", "tree"])[0]["inodes"], 1);
    assert_eq!(said(0, &["load", "tree", "copy", "--blocks", &blocks])[0]["inodes"], 1);
    let lsn = taken[0]["lsn"].as_u64().unwrap();
    assert!(said(0, &["restore", &archive, "then", "--dry-run"])[0]["position"]["lsn"].as_u64() >= Some(lsn));
    assert_eq!(said(0, &["restore", &archive, "then"])[0]["missing_packs"], 0);
    assert_eq!(said(0, &["verify", &archive])[0]["findings"], Value::Array(Vec::new()));
    assert_eq!(said(0, &["status", &archive])[0]["name"], "vol");
    assert_eq!(said(0, &["dump", &archive, "past"])[0]["inodes"], 1);
    assert_eq!(said(0, &["fsck", "node", "--data"])[0]["findings"], 0);
    assert_eq!(said(0, &["archive", "remove", "node", &archive, "--confirm", "vol"])[0]["removed"], archive);
    let refused = scratch.run(["status", "nowhere", "--json"]).expect_code(1);
    let refused: Value = serde_json::from_str(&refused.stderr()).unwrap();
    assert!(refused["error"]["message"].as_str().unwrap().contains("nowhere"), "{refused}");
}

/// What destroys asks for the volume's name, and a script that has not thought of it changes nothing.
#[test]
fn taking_over_has_to_be_confirmed_by_name() {
    let scratch = scratch();
    let (blocks, archive) = (scratch.url("blocks"), format!("{}?domain=elsewhere", scratch.url("archive")));
    let format = ["format", "node", "--blocks", &blocks, "--name", "vol", "--archive", &archive];
    scratch.run(format).expect_code(0);
    let before = scratch.prints_of("archive/log");
    let restore = ["restore", &archive, "next", "--take-over"];
    let refused = scratch.run(restore).expect_error(2, "has to be confirmed").stderr();
    assert!(refused.contains("--confirm vol") && refused.contains("--dry-run"), "{refused}");
    let refused = scratch.run(restore.iter().chain(&["--confirm", "other"]));
    refused.expect_error(2, "the volume is called \"vol\"");
    assert!(!scratch.path("next").exists() && scratch.prints_of("archive/log") == before);
}

/// The fear: whoever looks for the cause of damage loses it by looking: a torn end is cut, an index is brought up or made anew.
#[test]
fn fsck_of_a_node_that_is_not_served_changes_no_file() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    for _ in 0..3 {
        scratch.run(["serve", "node", "-d"]).expect_code(0);
        scratch.signal_all(Signal::KILL);
    }
    let unchanged = |what: &str, code: i32| {
        let before = (scratch.prints_of("node"), scratch.prints_of("blocks"));
        let ran = scratch.run(["fsck", "node", "--data", "--json"]).expect_code(code);
        let after = (scratch.prints_of("node"), scratch.prints_of("blocks"));
        assert!(before == after, "{what}: {ran}");
        ran
    };
    let sound = unchanged("killed", 0).json();
    let mut segments = scratch.bytes_of("node/log");
    segments.retain(|path, _| path.extension().is_some_and(|extension| extension == "seg"));
    let (path, whole) = segments.pop_last().unwrap();
    let end = whole.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let mut torn = whole.clone();
    torn.truncate(end);
    torn.extend_from_slice(b"half of what was never acknowledged");
    fs::write(&path, &torn).unwrap();
    assert_eq!(unchanged("a torn end", 0).json(), sound);
    fs::create_dir(scratch.path("node/look.tmp")).unwrap();
    fs::write(scratch.path("node/look.tmp/left by a kill"), b"x").unwrap();
    scratch.run(["fsck", "node"]).expect_code(0);
    assert!(!scratch.path("node/look.tmp").exists());
    fs::write(&path, &whole).unwrap();
    let (path, whole) = segments.pop_first().unwrap();
    let end = whole.iter().rposition(|byte| *byte != 0).unwrap();
    let mut damaged = whole.clone();
    damaged[end] ^= 1;
    fs::write(&path, &damaged).unwrap();
    unchanged("a damaged frame in the middle", 3);
    fs::write(&path, &whole).unwrap();
    fs::remove_dir_all(scratch.path("node/index")).unwrap();
    assert_eq!(unchanged("no index", 0).json(), sound);
    fs::remove_dir_all(scratch.path("node/identity")).unwrap();
    let found = unchanged("no identity", 3).stdout();
    assert!(found.contains("identity"), "{found}");
}

/// The fear: whoever adds an archive to a node that nobody serves is told that there is still no copy, and does not believe the next verdict.
#[test]
fn an_archive_that_was_added_at_rest_counts_at_once() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    scratch.run(["archive", "add", "node", &archive]).expect_code(0);
    let status = scratch.run(["status", "node", "--json"]).expect_code(0).json();
    let held = status["archives"][0]["lsn"].as_u64().unwrap();
    assert!(held > 1 && held < status["durable_lsn"].as_u64().unwrap(), "{status}");
    // What it holds is there, and the node goes on from it when it is served.
    let refused = scratch.run(["restore", &archive, "then", "--at", "@1000"]).expect_error(1, "alone");
    assert!(refused.stderr().contains(&format!("(lsn {held})")), "{}", refused.stderr());
    scratch.run(["restore", &archive, "then"]).expect_code(0);
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    wait_until("the archive to have everything", PATIENCE, || {
        let status = scratch.run(["status", "node", "--json"]).expect_code(0).json();
        status["archives"][0]["lsn"].as_u64() >= status["durable_lsn"].as_u64()
    });
    scratch.run(["verify", &archive, "--data", "100"]).expect_code(0);
}

/// The fear: an archive is added, the node goes on acknowledging through it alone, and whoever takes over through the one before it does not
/// know that it must be sealed.
#[test]
fn an_archive_that_was_added_acknowledges_once_another_one_knows_of_it() {
    let (scratch, _, second) = acknowledged_by_archive();
    scratch.run(["archive", "add", "node", &second]).expect_code(0);
    let away = |away: bool| {
        let (here, there) = (scratch.path("first"), scratch.path("first.away"));
        if away { fs::rename(here, there).unwrap() } else { fs::rename(there, here).unwrap() }
    };
    away(true);
    let serve = ["serve", "node", "-d", "--io-timeout", "1s"];
    scratch.run(serve).expect_code(0);
    let flush = || scratch.run(["flush", "node"]);
    flush().expect_error(1, "not everything is durable");
    let listed = scratch.run(["archive", "list", "node", "--json"]).expect_code(0).stdout();
    assert!(listed.contains("acknowledges nothing before another archive"), "{listed}");
    away(false);
    wait_until("the first archive has the entry that added the second", PATIENCE, || {
        let listed = scratch.run(["archive", "list", "node", "--json"]).expect_code(0).stdout();
        !listed.contains("acknowledges nothing before")
    });
    stop(&scratch);
    away(true);
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    flush().expect_code(0);
}

/// The fear: nobody serves the node, so nobody can wait until the other archives have what only one has acknowledged, and that one is taken out.
#[test]
fn an_archive_is_taken_out_at_rest_only_if_another_one_is_known_to_have_everything() {
    let (scratch, first, second) = acknowledged_by_archive();
    scratch.run(["archive", "add", "node", &second]).expect_code(0);
    let serve = || scratch.run(["serve", "node", "-d"]).expect_code(0);
    serve();
    wait_until("the second archive acknowledges", PATIENCE, || {
        let listed = scratch.run(["archive", "list", "node", "--json"]).expect_code(0).stdout();
        !listed.contains("acknowledges nothing before")
    });
    stop(&scratch);
    let (here, there) = (scratch.path("second"), scratch.path("second.away"));
    fs::rename(&here, &there).unwrap();
    serve();
    scratch.run(["archive", "add", "node", &scratch.url("log"), "--log-only"]).expect_code(0);
    scratch.run(["flush", "node"]).expect_code(0);
    stop(&scratch);
    fs::rename(&there, &here).unwrap();
    let remove = ["archive", "remove", "node", &first];
    let refused = scratch.run(remove).expect_error(1, "nobody serves this node");
    assert!(refused.stderr().contains("--assume-lost"), "{}", refused.stderr());
    assert!(scratch.run(["archive", "list", "node"]).expect_code(0).stdout().contains(&first));
    serve();
    scratch.run(remove).expect_code(0);
}

/// The same where this node has lost the end of its log: what came back from the one that is taken out is nowhere else.
#[test]
fn an_archive_that_gave_back_what_was_lost_is_not_taken_out_at_rest_before_another_one_has_it() {
    let (scratch, first, second) = acknowledged_by_archive();
    scratch.run(["archive", "add", "node", &second]).expect_code(0);
    let serve = || scratch.run(["serve", "node", "-d"]).expect_code(0);
    serve();
    wait_until("the second archive acknowledges", PATIENCE, || {
        let listed = scratch.run(["archive", "list", "node", "--json"]).expect_code(0).stdout();
        !listed.contains("acknowledges nothing before")
    });
    stop(&scratch);
    let copy = |from: &str, to: &str| {
        fs::create_dir(scratch.path(to)).unwrap();
        for file in fs::read_dir(scratch.path(from)).unwrap().map(Result::unwrap) {
            fs::copy(file.path(), scratch.path(to).join(file.file_name())).unwrap();
        }
    };
    copy("node/log", "log.before");
    copy("node/archives", "archives.before");
    let (here, there) = (scratch.path("second"), scratch.path("second.away"));
    fs::rename(&here, &there).unwrap();
    serve();
    scratch.run(["archive", "add", "node", &scratch.url("log"), "--log-only"]).expect_code(0);
    scratch.run(["flush", "node"]).expect_code(0);
    stop(&scratch);
    fs::rename(&there, &here).unwrap();
    // Only the first archive knows of what came then.
    for part in ["node/log", "node/archives", "node/index"] {
        fs::remove_dir_all(scratch.path(part)).unwrap();
    }
    copy("log.before", "node/log");
    copy("archives.before", "node/archives");
    let remove = ["archive", "remove", "node", &first];
    scratch.run(remove).expect_error(1, "nobody serves this node");
    assert!(scratch.run(["archive", "list", "node"]).expect_code(0).stdout().contains(&first));
    serve();
    scratch.run(remove).expect_code(0);
}

/// The fear: the only archive that acknowledges is gone for good, and nothing leads out of it.
#[test]
fn a_last_archive_that_is_gone_for_good_can_be_given_up() {
    let (scratch, first, second) = acknowledged_by_archive();
    fs::remove_dir_all(scratch.path("first")).unwrap();
    scratch.run(["serve", "node", "-d", "--io-timeout", "5s"]).expect_code(0);
    scratch.run(["archive", "add", "node", &second]).expect_error(1, "not everything is durable");
    scratch.run(["archive", "remove", "node", &first]).expect_error(1, "--assume-lost");
    scratch.run(["archive", "remove", "node", &first, "--assume-lost", "--confirm", "node"]).expect_code(0);
    scratch.run(["flush", "node"]).expect_error(1, "not everything is durable");
    scratch.run(["archive", "add", "node", &second]).expect_code(0);
    wait_until("the flush", PATIENCE, || scratch.run(["flush", "node"]).code() == Some(0));
}

/// The fear: one directory counts as two archives, and `status` says that nothing can be lost; or an archive lies in what it archives, and grows by itself.
#[test]
fn an_archive_lies_in_no_other_store_nor_in_the_node() {
    let (scratch, first, second) = acknowledged_by_archive();
    std::os::unix::fs::symlink("first", scratch.path("link")).unwrap();
    let within = |name: &str| format!("{}?domain=elsewhere", scratch.url(name));
    let before = scratch.prints_of(".");
    for taken in ["first", "link", "first/below", "blocks", "blocks/below", "node/archive"] {
        let refused = scratch.run(["archive", "add", "node", &within(taken)]).code();
        assert_eq!(refused, Some(1), "{taken}");
        let format = ["format", "other", "--blocks", &within("first"), "--archive", &within(taken)];
        if taken.contains("first") || taken == "link" {
            scratch.run(format).expect_error(2, "every store has a prefix of its own");
        }
    }
    assert!(before == scratch.prints_of("."), "nothing was made");
    scratch.run(["archive", "add", "node", &first]).expect_error(1, "already");
    scratch.run(["archive", "add", "node", &second]).expect_code(0);
}

/// The fear: a restore of a moment before the volume had a root is a volume that nobody can look into, and says that all is well.
#[test]
fn a_restore_to_before_the_root_is_refused() {
    let (scratch, first, _) = acknowledged_by_archive();
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    scratch.run(["flush", "node"]).expect_code(0);
    stop(&scratch);
    scratch.run(["restore", &first, "copy", "--lsn", "1"]).expect_error(1, "no root directory yet");
    assert!(!scratch.path("copy").exists());
    scratch.run(["restore", &first, "copy"]).expect_code(0);
}

/// The fear: somebody interrupts an order to a node that is served, is told nothing, and it takes effect later.
#[test]
fn whoever_interrupts_an_order_is_told_that_the_node_goes_on() {
    let scratch = scratch();
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    let blocks = scratch.url("blocks");
    scratch.run(["format", "node", "--blocks", &blocks, "--archive", &archive]).expect_code(0);
    fs::rename(scratch.path("archive"), scratch.path("away")).unwrap();
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    let mut command = Command::new(env!("CARGO_BIN_EXE_murphy-program"));
    command.args(["ack", "node", "archive"]).current_dir(scratch.path("."));
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It waits for the archive for ten times as long.
    pause(Duration::from_secs(2));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let said = finish(child, "murphy ack", PATIENCE);
    let text = String::from_utf8_lossy(&said.stderr);
    assert_eq!(said.status.code(), Some(130), "{text}");
    assert!(text.contains("goes on with what it was asked for"), "{text}");
}

/// A node whose fsync waits for its archive; the URLs of that one and of another.
fn acknowledged_by_archive() -> (Scratch, String, String) {
    let scratch = scratch();
    let url = |name: &str| format!("{}?domain={name}", scratch.url(name));
    let (first, second) = (url("first"), url("second"));
    let blocks = scratch.url("blocks");
    let format = ["format", "node", "--blocks", &blocks, "--ack", "archive", "--archive", &first];
    scratch.run(format).expect_code(0);
    (scratch, first, second)
}

/// Ends everything that is served.
fn stop(scratch: &Scratch) {
    scratch.signal_all(Signal::TERM);
    let code = scratch.run(["status", "node", "--json"]);
    assert!(code.json()["running"].is_null());
}
