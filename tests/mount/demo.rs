//! `murphy demo` as it is meant to be seen: through mounts.

use std::process::Command;

use murphy_tests::{Demo, Scratch, can_mount, expect_proven};
use rustix::process::Signal;

const PROGRAM: &str = env!("CARGO_BIN_EXE_murphy-program");

/// The demo where mounting works.
fn with_fuse(demo: &Demo<'_>) -> Command {
    let mut command = Command::new(PROGRAM);
    demo.prepare(&mut command);
    command.env_remove("MURPHY_DEMO_WITHOUT_FUSE");
    command
}

#[test]
fn the_demo_goes_through_mounts_and_leaves_nothing_behind() {
    if !can_mount("the_demo_goes_through_mounts_and_leaves_nothing_behind") {
        return;
    }
    let scratch = Scratch::new(PROGRAM);
    let mut demo = Demo::new(&scratch);
    demo.start(&mut with_fuse(&demo));
    let output = demo.finish();
    let (report, said) = (demo.report(&output), demo.said());
    assert_eq!(output.status.code(), Some(0), "{report} {said}");
    expect_proven(&report, "mount");
    // Both promotions say what region B has, before anything is changed and after.
    for (words, count) in [
        ("metadata position lsn", 2),
        (", data position lsn", 2),
        ("source last known  lsn", 2),
        ("source last known lsn", 2),
    ] {
        assert_eq!(said.matches(words).count(), count, "{words}: {said}");
    }
    demo.expect_nothing_left();
}

/// The fear: Ctrl-C leaves mounts whose process is gone, processes that stand still, and hundreds of megabytes in the temporary directory.
#[test]
fn a_demo_that_is_interrupted_unmounts_everything_and_takes_it_away() {
    if !can_mount("a_demo_that_is_interrupted_unmounts_everything_and_takes_it_away") {
        return;
    }
    let scratch = Scratch::new(PROGRAM);
    let mut demo = Demo::new(&scratch);
    demo.start(&mut with_fuse(&demo));
    demo.wait_for_writer("round-one");
    demo.interrupt(Signal::INT, "SIGINT");
}
