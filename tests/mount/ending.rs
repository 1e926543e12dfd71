//! The end of a mount by other hands than `murphy umount`: what comes right after it, and what it leaves behind.

use std::{fs, io::Write, path::Path, time::Duration};

use murphy_tests::{PATIENCE, Scratch, can_mount, pause, wait_until};
use rustix::{
    mount::{UnmountFlags, unmount},
    process::{Pid, Signal, kill_process},
};

fn scratch() -> Scratch {
    Scratch::new(env!("CARGO_BIN_EXE_murphy-program"))
}

/// Mounts the node again while the process `old` may be about to end, and sees that the new mount is there when that is gone.
fn mount_again(scratch: &Scratch, old: i32) {
    scratch.run(["mount", "node", "mnt", "-d"]).expect_code(0);
    fs::write(scratch.path("mnt/new"), b"new").expect("the file system takes a file");
    wait_until("the old process to end", PATIENCE, || !scratch.processes().contains(&old));
    assert_eq!(fs::read(scratch.path("mnt/new")).unwrap(), b"new");
    let status = scratch.run(["status", "node", "--json"]).json();
    assert_eq!(status["running"]["mounts"], serde_json::json!([scratch.path("mnt")]), "{status}");
    scratch.umount("mnt");
    let below = fs::read_dir(scratch.path("mnt")).unwrap().count();
    assert_eq!(below, 0, "something was written beside the volume");
}

fn mounted(scratch: &Scratch) -> i32 {
    scratch.mount("node", "mnt");
    let processes = scratch.processes();
    assert_eq!(processes.len(), 1);
    processes[0]
}

/// The fear: `umount`, then `murphy mount`, which the process that is about to end takes; minutes later people write beside the volume.
#[test]
fn a_mount_right_after_a_plain_umount_stays() {
    if !can_mount("a_mount_right_after_a_plain_umount_stays") {
        return;
    }
    let scratch = scratch();
    scratch.format("node", "blocks");
    for (dirty, rest) in [(0, 0), (0, 45), (0, 90), (40 << 20, 100)] {
        let old = mounted(&scratch);
        fs::write(scratch.path("mnt/dirty"), vec![7; dirty]).unwrap();
        unmount(scratch.path("mnt"), UnmountFlags::empty()).unwrap();
        pause(Duration::from_millis(rest));
        mount_again(&scratch, old);
    }
}

/// The fear: the same after the signal with which systemd ends a service before it starts it again.
#[test]
fn a_mount_right_after_a_signal_stays() {
    if !can_mount("a_mount_right_after_a_signal_stays") {
        return;
    }
    let scratch = scratch();
    scratch.format("node", "blocks");
    for (dirty, rest) in [(0, 0), (40 << 20, 30)] {
        let old = mounted(&scratch);
        fs::write(scratch.path("mnt/dirty"), vec![7; dirty]).unwrap();
        kill_process(Pid::from_raw(old).unwrap(), Signal::TERM).unwrap();
        pause(Duration::from_millis(rest));
        mount_again(&scratch, old);
    }
}

/// The fear: a service that is started again at once is told that the node is served, by a process that is gone a moment later.
#[test]
fn a_node_whose_process_is_about_to_end_can_be_served_again() {
    if !can_mount("a_node_whose_process_is_about_to_end_can_be_served_again") {
        return;
    }
    let scratch = scratch();
    scratch.format("node", "blocks");
    let old = mounted(&scratch);
    fs::write(scratch.path("mnt/dirty"), vec![7; 20 << 20]).unwrap();
    unmount(scratch.path("mnt"), UnmountFlags::empty()).unwrap();
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    wait_until("the old process to end", PATIENCE, || !scratch.processes().contains(&old));
    let status = scratch.run(["status", "node", "--json"]).json();
    assert_eq!(status["running"]["ends_with_mounts"], false, "{status}");
}

/// The fear: a mount that hangs is aborted, and what programs had open there takes room until the node is restarted.
#[test]
fn what_was_open_on_a_mount_that_was_aborted_is_purged() {
    if !can_mount("what_was_open_on_a_mount_that_was_aborted_is_purged") {
        return;
    }
    let scratch = scratch();
    scratch.format("node", "blocks");
    scratch.run(["serve", "node", "-d"]).expect_code(0);
    scratch.mount("node", "mnt");
    let open: Vec<fs::File> = (0..10)
        .map(|number| {
            let path = scratch.path(&format!("mnt/{number}"));
            let mut file = fs::File::create(&path).unwrap();
            file.write_all(&[7; 5000]).unwrap();
            fs::remove_file(&path).unwrap();
            file
        })
        .collect();
    abort(&scratch.path("mnt"));
    drop(open);
    let state = || scratch.run(["status", "node", "--json"]).json();
    wait_until("the orphans to go", PATIENCE, || {
        let state = state();
        state["inodes"] == 1 && state["dirty_bytes"] == 0
    });
}

/// What `umount -f` and `umount -l` do to a mount that is in use.
fn abort(mount: &Path) {
    // It is in use: that it is refused does not keep it from ending the connection.
    let _busy = unmount(mount, UnmountFlags::FORCE);
    let _gone_already = unmount(mount, UnmountFlags::DETACH);
}
