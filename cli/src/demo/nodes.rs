//! Processes of the demo: this program again, with other arguments.
//!
//! Invariants:
//! - Whatever was started is killed and unmounted when its handle is dropped.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    mount::UnmountFlags,
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;

use crate::{
    control::{Control, Request},
    error::{CliError, at},
    output::Output,
};

/// A node whose volume is mounted by a process of its own.
pub(super) struct Mounted {
    pub(super) directory: PathBuf,
    pub(super) root: PathBuf,
    process: Child,
    log: PathBuf,
}

impl Mounted {
    /// Mounts the node in `directory` at `root` and waits until it is there.
    pub(super) fn start(directory: &Path, root: &Path, options: &[&str]) -> Result<Mounted, CliError> {
        std::fs::create_dir_all(root).map_err(at(root))?;
        let log = directory.with_extension("process.log");
        let output = File::options().create(true).append(true).open(&log).map_err(at(&log))?;
        let errors = output.try_clone().map_err(at(&log))?;
        let mut command = program()?;
        command.arg("mount").arg(directory).arg(root).args(options);
        let process =
            command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn().map_err(CliError::new)?;
        let mut mounted = Mounted { directory: directory.to_owned(), root: root.to_owned(), process, log };
        wait_for("the mount", START_MAX, || {
            if let Some(status) = mounted.process.try_wait().map_err(CliError::new)? {
                let said = std::fs::read_to_string(&mounted.log).unwrap_or_default();
                return Err(CliError::new(format!("murphy mount ended with {status}: {}", said.trim())));
            }
            Ok(is_mounted(&mounted.root) && Control::connect(&mounted.directory)?.is_some())
        })?;
        Ok(mounted)
    }

    /// `murphy status --json` of the node.
    pub(super) fn status(&self) -> Result<Value, CliError> {
        let gone = || CliError::new(format!("nobody serves {}", self.directory.display()));
        let mut control = Control::connect(&self.directory)?.ok_or_else(gone)?;
        control.ask(&Request::Status, &Output::new(true), |_| Ok(()))
    }

    /// Up to which entry the node's log is durable.
    pub(super) fn durable_lsn(&self) -> Result<u64, CliError> {
        number(&self.status()?, "durable_lsn")
    }

    /// Stops the process where it is, or lets it go on.
    pub(super) fn signal(&self, signal: Signal) -> Result<(), CliError> {
        let pid = Pid::from_child(&self.process);
        kill_process(pid, signal)
            .map_err(|error| CliError::new(format!("cannot signal process {pid:?}: {error}")))
    }

    /// Kills the process, as a power cut would.
    pub(super) fn kill(mut self) -> Result<(), CliError> {
        self.process.kill().map_err(CliError::new)?;
        self.process.wait().map_err(CliError::new)?;
        Ok(())
    }

    /// Unmounts with everything durable, and waits for the process to end.
    pub(super) fn unmount(mut self) -> Result<(), CliError> {
        run(&[Path::new("umount"), &self.root])?;
        wait_for("the process to end", START_MAX, || {
            Ok(self.process.try_wait().map_err(CliError::new)?.is_some())
        })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // One that is gone already needs no killing, and one that is not mounted no unmounting.
        let _gone = self.process.kill().and_then(|()| self.process.wait());
        let _unmounted = rustix::mount::unmount(&self.root, UnmountFlags::DETACH);
    }
}

/// Runs one command of this program; its stdout, or its error.
pub(super) fn run(arguments: &[&Path]) -> Result<String, CliError> {
    run_with_input(arguments, Stdio::null())
}

/// The same with something on its stdin.
pub(super) fn run_with_input(arguments: &[&Path], input: Stdio) -> Result<String, CliError> {
    let done = program()?.args(arguments).stdin(input).output().map_err(CliError::new)?;
    let named: Vec<String> = arguments.iter().take(1).map(|name| name.display().to_string()).collect();
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(CliError::new(format!("murphy {} failed: {}", named.join(" "), said.trim())));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn program() -> Result<Command, CliError> {
    std::env::current_exe()
        .map(Command::new)
        .map_err(|error| CliError::new(format!("cannot find this program: {error}")))
}

/// Whether something is mounted at `path`: its device is not its parent's.
fn is_mounted(path: &Path) -> bool {
    let device = |path: &Path| std::fs::symlink_metadata(path).map(|metadata| metadata.dev()).ok();
    path.parent().is_some_and(|parent| device(path).is_some() && device(path) != device(parent))
}

/// Asks until the answer is yes.
pub(super) fn wait_for(
    what: &str,
    longest: Duration,
    mut ready: impl FnMut() -> Result<bool, CliError>,
) -> Result<(), CliError> {
    let start = clock();
    while !ready()? {
        if start.elapsed() > longest {
            return Err(CliError::new(format!("waited {} s for {what}", longest.as_secs())));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A number in a status.
pub(super) fn number(status: &Value, field: &str) -> Result<u64, CliError> {
    status[field].as_u64().ok_or_else(|| CliError::new(format!("the status has no {field}")))
}

/// Now, for durations that are printed.
#[expect(clippy::disallowed_methods, reason = "the demo measures how long real things take")]
pub(super) fn clock() -> Instant {
    Instant::now()
}

const START_MAX: Duration = Duration::from_secs(60);
