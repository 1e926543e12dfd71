//! Joining without a mount: tokens of every kind, and what is left behind.

use std::fs;

use murphy_tests::Scratch;

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

/// A token admits once, in time, to one volume; whatever is wrong leaves no node behind.
#[test]
fn a_token_that_is_wrong_or_used_makes_no_node() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.run(["invite", "node"]).expect_error(1, "nobody serves");
    scratch.run(["serve", "node", "-d"]).expect_code(0).stdout();
    scratch.run(["invite", "node"]).expect_error(1, "does not listen");
    scratch.signal_all(rustix::process::Signal::TERM);
    scratch.run(["serve", "node", "-d", "--listen", "127.0.0.1:0"]).expect_code(0).stdout();
    let join = |token: &str| {
        fs::write(scratch.path("token"), token).unwrap();
        scratch.run(["join", "mirror", "--token-file", "token", "--blocks", &scratch.url("other")])
    };
    join("hello").expect_error(1, "not an invitation token");
    let token = scratch.run(["invite", "node"]).expect_code(0).stdout();
    join(&token[..40]).expect_error(1, "damaged or incomplete");
    let expired = scratch.run(["invite", "node", "--expires", "0s"]).expect_code(0).stdout();
    join(&expired).expect_error(1, "expired");
    let observer = scratch.run(["invite", "node", "--role", "observer"]).expect_code(0).stdout();
    join(&observer).expect_error(1, "holds no copy");
    let left = fs::read_dir(scratch.path(".")).unwrap().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("mirror")).collect();
    assert!(left.is_empty(), "{left:?}");
    join(&token).expect_code(0).stdout();
    let again = ["join", "second", "--token-file", "token", "--blocks", &scratch.url("third")];
    scratch.run(again).expect_error(1, "was used");
    scratch.run(["invite", "mirror"]).expect_error(1, "nobody serves");
    scratch.run(["status", "mirror"]).expect_error(1, "holds nothing yet");
}

/// Without its source a token leads nowhere, and says so.
#[test]
fn a_source_that_does_not_answer_is_named() {
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.run(["serve", "node", "-d", "--listen", "127.0.0.1:0"]).expect_code(0).stdout();
    let token = scratch.run(["invite", "node"]).expect_code(0).stdout();
    fs::write(scratch.path("token"), token).unwrap();
    scratch.signal_all(rustix::process::Signal::KILL);
    let join = ["join", "mirror", "--token-file", "token"];
    scratch.run(join).expect_error(1, "cannot reach");
    assert!(!scratch.path("mirror").exists());
}
