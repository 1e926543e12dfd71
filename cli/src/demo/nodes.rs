//! Processes of the demo: this program again, with other arguments.
//!
//! Invariants:
//! - Whatever was started is killed and unmounted when its handle is dropped.
//! - What is done to a volume and what is looked at goes through its mount, or, without FUSE, through the library in the process that serves
//!   the node: never past that process.

use std::{
    cell::Cell,
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

use super::{
    operations::{self, Operation, Sync},
    tree::Sources,
};
use crate::{
    control::{Control, Request},
    error::{CliError, at},
    output::Output,
    tree::TreeRequest,
};

/// How the demo reaches the files of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Way {
    /// By a FUSE mount.
    Mount,
    /// By the library, in the process that serves the node.
    Library,
}

impl Way {
    /// A mount, unless there is no FUSE here; then also why.
    pub(super) fn choose() -> (Way, Option<String>) {
        if std::env::var_os(WITHOUT_FUSE).is_some() {
            return (Way::Library, Some(format!("{WITHOUT_FUSE} is set")));
        }
        match File::options().read(true).write(true).open(FUSE) {
            Ok(_) => (Way::Mount, None),
            Err(error) => (Way::Library, Some(format!("{FUSE}: {error}"))),
        }
    }
}

/// A node that is served by a process of its own.
pub(super) struct Served {
    pub(super) directory: PathBuf,
    /// Where it is mounted; below it are the trees that were looked at, if it is not.
    root: PathBuf,
    way: Way,
    process: Child,
    log: PathBuf,
    looks: Cell<u32>,
}

impl Served {
    /// Serves the node in `directory`, at `root` if it is mounted, and waits until it answers.
    pub(super) fn start(
        way: Way,
        directory: &Path,
        root: &Path,
        options: &[&str],
    ) -> Result<Served, CliError> {
        std::fs::create_dir_all(root).map_err(at(root))?;
        let log = directory.with_extension("process.log");
        let output = File::options().create(true).append(true).open(&log).map_err(at(&log))?;
        let errors = output.try_clone().map_err(at(&log))?;
        let mut command = program()?;
        match way {
            Way::Mount => command.arg("mount").arg(directory).arg(root).args(options),
            Way::Library => command.arg("serve").arg(directory).args(options),
        };
        let process =
            command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn().map_err(CliError::new)?;
        let (directory, root) = (directory.to_owned(), root.to_owned());
        let mut served = Served { directory, root, way, process, log, looks: Cell::default() };
        wait_for("the node", START_MAX, || {
            if let Some(status) = served.process.try_wait().map_err(CliError::new)? {
                let said = std::fs::read_to_string(&served.log).unwrap_or_default();
                return Err(CliError::new(format!("its process ended with {status}: {}", said.trim()))
                    .hint(format!("{WITHOUT_FUSE}=1 murphy demo does without mounts")));
            }
            let is_there = way == Way::Library || is_mounted(&served.root);
            Ok(is_there && Control::connect(&served.directory)?.is_some())
        })?;
        Ok(served)
    }

    fn ask(&self, request: &Request) -> Result<Value, CliError> {
        let gone = || CliError::new(format!("nobody serves {}", self.directory.display()));
        let mut control = Control::connect(&self.directory)?.ok_or_else(gone)?;
        control.ask(request, &Output::new(true), |_| Ok(()))
    }

    /// `murphy status --json` of the node.
    pub(super) fn status(&self) -> Result<Value, CliError> {
        self.ask(&Request::Status)
    }

    /// Makes everything durable.
    pub(super) fn flush(&self) -> Result<(), CliError> {
        run(&[Path::new("flush"), &self.directory]).map(drop)
    }

    /// Copies the sources in, and makes the directories that operations use below `ledger`.
    pub(super) fn fill(&self, sources: &Sources, ledger: &Path) -> Result<(), CliError> {
        if self.way == Way::Mount {
            sources.copy_to(&self.root)?;
            let ledger = self.root.join(ledger);
            return operations::prepare(&ledger).map_err(at(&ledger));
        }
        let mut paths = sources.directories();
        paths.extend(operations::directories().map(|directory| ledger.join(directory)));
        self.ask(&Request::Tree(TreeRequest::MakeDirs { paths }))?;
        for (from, to) in &sources.files {
            let (from, to) = (std::path::absolute(from).map_err(at(from))?, to.clone());
            let write = TreeRequest::Write { from, to, append: false, keep_time: true, sync: false };
            self.ask(&Request::Tree(write))?;
        }
        Ok(())
    }

    /// Performs an operation below `ledger`; it is durable when this returns.
    pub(super) fn apply(&self, operation: &Operation, ledger: &Path) -> Result<(), CliError> {
        if self.way == Way::Mount {
            let root = self.root.join(ledger);
            return operation.apply(&root, Sync::Each).map_err(at(&root));
        }
        let (to, bytes, append) = match operation {
            Operation::Rename { from, to } => {
                let (from, to) = (ledger.join(from), ledger.join(to));
                return self.ask(&Request::Tree(TreeRequest::Rename { from, to })).map(drop);
            }
            Operation::Remove { path } => {
                let path = ledger.join(path);
                return self.ask(&Request::Tree(TreeRequest::Remove { path })).map(drop);
            }
            Operation::Write { path, seed, length } => (path, operations::contents(*seed, *length), false),
            Operation::Append { path, seed, length } => (path, operations::contents(*seed, *length), true),
        };
        self.write(&ledger.join(to), &bytes, append)
    }

    /// Writes a file, durably.
    pub(super) fn write(&self, path: &Path, bytes: &[u8], append: bool) -> Result<(), CliError> {
        if self.way == Way::Mount {
            let path = self.root.join(path);
            return std::fs::write(&path, bytes).map_err(at(&path));
        }
        let from = self.root.join("staged");
        std::fs::write(&from, bytes).map_err(at(&from))?;
        let write = TreeRequest::Write { from, to: path.to_owned(), append, keep_time: false, sync: true };
        self.ask(&Request::Tree(write)).map(drop)
    }

    /// The tree as it is now: the mount, or a copy that the library made of every byte.
    pub(super) fn look(&self) -> Result<PathBuf, CliError> {
        if self.way == Way::Mount {
            return Ok(self.root.clone());
        }
        self.looks.set(self.looks.get() + 1);
        let into = self.root.join(format!("look-{}", self.looks.get()));
        self.ask(&Request::Tree(TreeRequest::Export { into: into.clone() }))?;
        Ok(into)
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

    /// Ends it with everything durable, and waits for the process to end.
    pub(super) fn end(mut self) -> Result<(), CliError> {
        match self.way {
            Way::Mount => drop(run(&[Path::new("umount"), &self.root])?),
            Way::Library => self.signal(Signal::TERM)?,
        }
        wait_for("the process to end", START_MAX, || {
            Ok(self.process.try_wait().map_err(CliError::new)?.is_some())
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // One that is gone already needs no killing, and one that is not mounted no unmounting.
        let _gone = self.process.kill().and_then(|()| self.process.wait());
        if self.way == Way::Mount {
            let _unmounted = rustix::mount::unmount(&self.root, UnmountFlags::DETACH);
        }
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

const FUSE: &str = "/dev/fuse";
/// Makes the demo do without FUSE where it is.
const WITHOUT_FUSE: &str = "MURPHY_DEMO_WITHOUT_FUSE";
const START_MAX: Duration = Duration::from_secs(60);
