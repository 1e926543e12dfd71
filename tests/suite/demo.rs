//! `murphy demo` where nothing can be mounted: the same disasters, through the library.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use murphy_tests::{Demo, PATIENCE, Scratch, expect_proven, output_of, skip, wait_until};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_murphy-program");

/// The demo as on a machine without FUSE.
fn without_fuse(demo: &Demo<'_>) -> Command {
    let mut command = Command::new(PROGRAM);
    demo.prepare(&mut command);
    command.env("MURPHY_DEMO_WITHOUT_FUSE", "1");
    command
}

/// The first thing that people run must work on their machine, and must not claim mounts that it has not made.
#[test]
fn the_demo_without_fuse_goes_through_the_library_and_says_so() {
    let scratch = Scratch::new(PROGRAM);
    let mut demo = Demo::new(&scratch);
    let mut command = without_fuse(&demo);
    demo.start(command.arg("--keep").arg(scratch.path("keep")));
    let output = demo.finish();
    let (report, said) = (demo.report(&output), demo.said());
    assert_eq!(output.status.code(), Some(0), "{report} {said}");
    assert!(said.contains("Nothing is mounted here") && said.contains("through the library"), "{said}");
    expect_proven(&report, "library");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&scratch.path("keep").display().to_string()), "something was mounted");
    // The ledgers are there for whoever wants to look, line by line.
    for round in report["rounds"].as_array().unwrap() {
        let ledger = scratch.path("keep").join(format!("{}-ledger", round["name"].as_str().unwrap()));
        let lines = fs::read_to_string(ledger).unwrap().lines().count() as u64;
        assert_eq!(round["lines"], lines);
    }
    demo.expect_nothing_left();
}

/// A demo that cannot fail proves nothing.
#[test]
fn the_demo_fails_when_a_byte_differs() {
    let scratch = Scratch::new(PROGRAM);
    let mut demo = Demo::new(&scratch);
    demo.start(&mut without_fuse(&demo));
    // Everything is copied in before the writer begins.
    demo.wait_for_writer("crash");
    let changed = scratch.path("tree/below/17");
    let mut bytes = fs::read(&changed).unwrap();
    bytes[100] ^= 1;
    fs::write(&changed, bytes).unwrap();
    let output = demo.finish();
    let report = demo.report(&output);
    assert_eq!(output.status.code(), Some(1), "{report}");
    let broken = report["rounds"][0]["broken"].to_string();
    assert!(broken.contains("below/17"), "{report}");
    demo.expect_nothing_left();
}

#[test]
fn a_demo_that_is_told_to_end_takes_everything_away() {
    let scratch = Scratch::new(PROGRAM);
    let mut demo = Demo::new(&scratch);
    demo.start(&mut without_fuse(&demo));
    demo.wait_for_writer("round-one");
    demo.interrupt(Signal::TERM, "SIGTERM");
}

/// The fear: `/dev/fuse` can be opened, and mounting fails all the same, because this is not root and fusermount3 is not installed.
#[test]
fn a_user_who_may_not_mount_gets_the_library_and_hears_why() {
    const TEST: &str = "a_user_who_may_not_mount_gets_the_library_and_hears_why";
    let scratch = Scratch::new(PROGRAM);
    let mut demo = Demo::new(&scratch);
    let open =
        |name: &str, mode| fs::set_permissions(scratch.path(name), fs::Permissions::from_mode(mode)).unwrap();
    open("", 0o755);
    open("tmp", 0o777);
    let mut allowed = as_nobody(&scratch.path("fuse"), &[PROGRAM, "--version"]);
    let allowed = output_of(&mut allowed);
    if !allowed.status.success() {
        return skip(TEST, String::from_utf8_lossy(&allowed.stderr).trim());
    }
    let mut command = as_nobody(&scratch.path("fuse"), &[PROGRAM]);
    demo.prepare(&mut command);
    demo.start(&mut command);
    wait_until("it to say how it goes on", PATIENCE, || demo.said().contains("through the library"));
    let said = demo.said();
    let why = said.lines().find(|line| line.contains("Nothing is mounted here")).unwrap();
    assert!(why.contains("fusermount3") && why.contains("not installed"), "{why}");
    demo.wait_for_writer("crash");
    demo.interrupt(Signal::TERM, "SIGTERM");
}

/// A command in a world where `/dev/fuse`, made at `device`, is open to everybody, run by a user who may not mount and finds nobody to do it.
fn as_nobody(device: &Path, arguments: &[&str]) -> Command {
    const WORLD: &str = r#"
        device=$1; shift
        [ -e "$device" ] || mknod "$device" c 10 229
        chmod 666 "$device"
        mount --bind "$device" /dev/fuse
        for helper in /usr/bin/fusermount3 /usr/bin/fusermount /bin/fusermount3 /bin/fusermount /sbin/fusermount3 /sbin/fusermount; do
            [ ! -e "$helper" ] || mount --bind /dev/null "$helper"
        done
        exec setpriv --reuid 65534 --regid 65534 --clear-groups sh -ec '
            true <>/dev/fuse
            PATH=/none exec "$@"' sh "$@"
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", WORLD, "sh"]).arg(device).args(arguments);
    command.env_remove("MURPHY_DEMO_WITHOUT_FUSE");
    command
}
