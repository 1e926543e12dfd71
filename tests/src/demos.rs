//! `murphy demo` as a stranger runs it, over a small tree of a test's own.
//!
//! Invariants:
//! - Everything that a demo makes lies below the scratch directory, so that what it leaves behind is found there.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{PATIENCE, RUN_MAX, Scratch, finish, wait_until};

/// A demo that a test starts, in a scratch directory: the tree is `tree`, temporary files are in `tmp`, what it says goes to `said`.
pub struct Demo<'a> {
    scratch: &'a Scratch,
    running: Option<Child>,
}

impl<'a> Demo<'a> {
    /// Its tree is made, and it is not started yet.
    pub fn new(scratch: &'a Scratch) -> Demo<'a> {
        let tree = scratch.make_dir("tree/below");
        for number in 0..30 {
            let text = format!("line {number}\n").repeat(number * 50);
            fs::write(tree.join(number.to_string()), text).expect("a file of the tree");
        }
        scratch.make_dir("tmp");
        Demo { scratch, running: None }
    }

    /// What a command needs to run it; more arguments may follow.
    pub fn prepare(&self, command: &mut Command) {
        command.args(["demo", "--json", "--tree"]).arg(self.scratch.path("tree"));
        command.env("TMPDIR", self.scratch.path("tmp")).current_dir(self.scratch.path("."));
    }

    /// Starts it by such a command.
    pub fn start(&mut self, command: &mut Command) {
        let said = fs::File::create(self.scratch.path("said")).expect("a file for what it says");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(said);
        self.running = Some(command.spawn().expect("the demo"));
    }

    /// What it has said so far that is no data.
    pub fn said(&self) -> String {
        fs::read_to_string(self.scratch.path("said")).unwrap_or_default()
    }

    /// Waits until the writer of a round has written lines into its ledger.
    pub fn wait_for_writer(&mut self, round: &str) {
        let name = format!("{round}-ledger");
        wait_until(&format!("the writer of {round}"), PATIENCE * 2, || {
            let running = self.running.as_mut().expect("a demo that runs");
            assert!(running.try_wait().expect("a child").is_none(), "it ended: {}", self.said());
            let ledger = self.place().and_then(|place| fs::read(place.join(&name)).ok());
            ledger.is_some_and(|lines| !lines.is_empty())
        });
    }

    fn place(&self) -> Option<PathBuf> {
        let mut entries = fs::read_dir(self.scratch.path("tmp")).ok()?;
        entries.next().map(|entry| entry.expect("an entry").path())
    }

    /// Waits for its end.
    pub fn finish(&mut self) -> Output {
        let running = self.running.take().expect("a demo that runs");
        finish(running, "the demo", RUN_MAX)
    }

    /// Its report, which it must have given.
    pub fn report(&self, output: &Output) -> serde_json::Value {
        let said = self.said();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
    }

    /// Sends it a signal, and checks that it says so, ends with that signal's code, and leaves nothing behind.
    ///
    /// # Panics
    /// If it does anything else.
    pub fn interrupt(&mut self, signal: Signal, name: &str) {
        let running = self.running.as_ref().expect("a demo that runs");
        kill_process(Pid::from_child(running), signal).expect("a signal");
        let output = self.finish();
        let said = self.said();
        assert_eq!(output.status.code(), Some(128 + signal.as_raw()), "{said}");
        assert!(said.contains(&format!("Interrupted by {name}: ")), "{said}");
        assert!(!said.contains("Error:"), "an interruption is no failure: {said}");
        assert!(output.stdout.is_empty(), "there is nothing to report yet");
        self.expect_nothing_left();
    }

    /// Checks that no process, no mount and no file is left.
    ///
    /// # Panics
    /// If there is one.
    pub fn expect_nothing_left(&self) {
        assert_eq!(self.scratch.processes(), [] as [i32; 0], "processes are left: {}", self.said());
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("a mount table");
        let root = self.scratch.path("").display().to_string();
        assert!(!mounts.contains(&root), "something is left mounted: {mounts}");
        assert_eq!(self.place(), None, "files are left: {}", self.said());
    }
}

impl Drop for Demo<'_> {
    fn drop(&mut self) {
        if let Some(running) = &mut self.running {
            // One that has ended needs no killing.
            let _ended = running.kill().and_then(|()| running.wait());
        }
    }
}

/// Checks what every demo must show that goes well: who lost what, and which moments came back.
///
/// # Panics
/// If it does not show that.
pub fn expect_proven(report: &serde_json::Value, through: &str) {
    let count = |value: &serde_json::Value| value.as_u64().unwrap_or_else(|| panic!("{value}: {report}"));
    assert_eq!(report["through"], through);
    let rounds = report["rounds"].as_array().expect("rounds");
    assert_eq!(
        rounds.iter().map(|round| &round["name"]).collect::<Vec<_>>(),
        ["crash", "round-one", "round-two"]
    );
    for round in rounds {
        assert!(count(&round["lines"]) >= 200 && count(&round["files"]) > 30, "{round}");
        assert_eq!(round["broken"], serde_json::json!([]), "{round}");
        let (lost, lines) = (&round["lost"], round["lost"]["lines"].as_array().expect("lost lines"));
        let data = count(&round["position"]["data_lsn"]);
        assert!(lines.iter().all(|line| count(&line["lsn"]) > data), "{round}");
        assert_eq!(count(&lost["entries"]) > 0, !lines.is_empty(), "{round}");
        assert!(count(&lost["files"]) <= lines.len() as u64, "{round}");
        let is_allowed = round["promise"] == "up-to-the-data-position";
        assert_eq!(is_allowed, round["name"] == "round-one");
        assert!(is_allowed || lines.is_empty(), "{round}");
    }
    let moments = report["moments"].as_array().expect("moments");
    assert_eq!(moments.len(), 2, "{report}");
    for (moment, name) in moments.iter().zip(["middle-of-the-burst", "before-the-deletion"]) {
        assert_eq!((&moment["milestone"], &moment["differences"]), (&name.into(), &serde_json::json!([])));
        let matching = count(&moment["matching"]);
        assert_eq!(moment["possible"], serde_json::json!([matching, matching]), "{moment}");
    }
    assert_eq!(count(&moments[1]["matching"]), 2 * count(&moments[0]["matching"]), "{report}");
}
