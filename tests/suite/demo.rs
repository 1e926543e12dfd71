//! `murphy demo` where there is no FUSE: the same disasters, through the library.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use murphy_tests::{PATIENCE, RUN_MAX, Scratch, finish, output_of, wait_until};

/// The demo over `tree`, with everything in `keep`, as on a machine without FUSE.
fn demo(scratch: &Scratch) -> Command {
    let tree = scratch.make_dir("tree/below");
    for number in 0..30 {
        fs::write(tree.join(format!("{number}")), format!("line {number}\n").repeat(number * 50)).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_murphy-program"));
    command.args(["demo", "--json", "--tree"]).arg(scratch.path("tree"));
    command.arg("--keep").arg(scratch.path("keep")).current_dir(scratch.path("."));
    command.env("MURPHY_DEMO_WITHOUT_FUSE", "1").stdin(Stdio::null());
    command
}

fn report(output: &Output) -> serde_json::Value {
    let said = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// The first thing that people run must work on their machine, and must not claim mounts that it has not made.
#[test]
fn the_demo_without_fuse_goes_through_the_library_and_says_so() {
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let output = output_of(&mut demo(&scratch));
    let (report, said) = (report(&output), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{report} {said}");
    assert!(said.contains("no FUSE") && said.contains("through the library"), "{said}");
    assert_eq!(report["through"], "library");
    let rounds = report["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 3, "{report}");
    for round in rounds {
        assert!(round["lines"].as_u64() >= Some(300), "{round}");
        assert_eq!(round["broken"], serde_json::json!([]), "{round}");
    }
    assert_eq!(report["moments"].as_array().unwrap().len(), 2);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&scratch.path("keep").display().to_string()), "something was mounted");
}

/// A demo that cannot fail proves nothing.
#[test]
fn the_demo_fails_when_a_byte_differs() {
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let mut command = demo(&scratch);
    let running = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Everything is copied in before the writer begins.
    let shadow = scratch.path("keep/kill-shadow");
    let has_files = |directory: &Path| fs::read_dir(directory).is_ok_and(|mut files| files.next().is_some());
    wait_until("the writer", PATIENCE, || (0..8).any(|number| has_files(&shadow.join(format!("d{number}")))));
    let changed = scratch.path("tree/below/17");
    let mut bytes = fs::read(&changed).unwrap();
    bytes[100] ^= 1;
    fs::write(&changed, bytes).unwrap();
    let output = finish(running, "the demo", RUN_MAX);
    let report = report(&output);
    assert_eq!(output.status.code(), Some(1), "{report}");
    let broken = report["rounds"][0]["broken"].to_string();
    assert!(broken.contains("below/17"), "{report}");
}
