//! Nodes of the demo, each served by a process of its own, and the ways to their files.
//!
//! Invariants:
//! - What is done to a volume goes through its mount, or, where nothing can be mounted, through the library in the process that serves the
//!   node: never past that process.
//! - What is changed in a volume is durable when the call returns, but for the copying in of a whole tree, which a flush ends.
//! - Whatever was started is killed and unmounted when its handle is dropped.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::Value;

use super::{
    look::Look,
    operations::{self, Operation, Sync},
    place::{Place, Process, murphy},
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
    /// A mount, unless mounting fails here; then also why.
    pub(super) fn choose(place: &Place) -> Result<(Way, Option<String>), CliError> {
        if std::env::var_os(WITHOUT_FUSE).is_some() {
            return Ok((Way::Library, Some(format!("{WITHOUT_FUSE} is set"))));
        }
        let trial = place.directory("trial")?;
        if let Err(error) = murphy_fs::try_mount(&trial) {
            return Ok((Way::Library, Some(error.to_string())));
        }
        std::fs::remove_dir(&trial).map_err(at(&trial))?;
        Ok((Way::Mount, None))
    }
}

/// A node, as anybody reaches it while it is served.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) directory: PathBuf,
    /// Where it is mounted; if it is not, what is handed over and what was looked at lies there.
    root: PathBuf,
    way: Way,
}

impl Node {
    /// The node in `directory`, which will be mounted at `root`.
    pub(super) fn new(way: Way, directory: PathBuf, root: PathBuf) -> Node {
        Node { directory, root, way }
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

    /// Up to which entry the node's log is durable.
    pub(super) fn durable_lsn(&self) -> Result<u64, CliError> {
        number(&self.status()?, "durable_lsn")
    }

    /// Copies the sources in, and makes the directories that operations use below `ledger`. All of it is durable in the end.
    pub(super) fn fill(&self, sources: &Sources, ledger: &Path) -> Result<(), CliError> {
        match self.way {
            Way::Mount => {
                sources.copy_to(&self.root)?;
                let ledger = self.root.join(ledger);
                operations::prepare(&ledger).map_err(at(&ledger))?;
            }
            Way::Library => {
                let mut paths = sources.directories();
                paths.extend(operations::directories().map(|directory| ledger.join(directory)));
                self.ask(&Request::Tree(TreeRequest::MakeDirs { paths }))?;
                for (from, to) in &sources.files {
                    let (from, to) = (std::path::absolute(from).map_err(at(from))?, to.clone());
                    let write = TreeRequest::Write { from, to, append: false, keep_time: true, sync: false };
                    self.ask(&Request::Tree(write))?;
                }
            }
        }
        self.ask(&Request::Flush).map(drop)
    }

    /// Performs an operation below `below`; it is durable when this returns.
    pub(super) fn apply(&self, operation: &Operation, below: &Path) -> Result<(), CliError> {
        if self.way == Way::Mount {
            let root = self.root.join(below);
            let named = || root.join(operation.path());
            return operation.apply(&root, Sync::Each).map_err(|error| at(&named())(error));
        }
        let request = match operation {
            Operation::Write { path, seed, length } | Operation::Append { path, seed, length } => {
                let from = self.root.join("handed-over");
                std::fs::write(&from, operations::contents(*seed, *length)).map_err(at(&from))?;
                let append = matches!(operation, Operation::Append { .. });
                TreeRequest::Write { from, to: below.join(path), append, keep_time: false, sync: true }
            }
            Operation::Rename { from, to } => {
                TreeRequest::Rename { from: below.join(from), to: below.join(to) }
            }
            Operation::Remove { path } => TreeRequest::Remove { path: below.join(path) },
        };
        self.ask(&Request::Tree(request)).map(drop)
    }

    /// The tree as it is now: the mount, or a copy that the library made of every byte that can be read.
    pub(super) fn look(&self) -> Result<Look, CliError> {
        if self.way == Way::Mount {
            return Ok(Look::at_mount(self.root.clone()));
        }
        let mut names = (1_u32..).map(|number| self.root.join(format!("look-{number}")));
        let into = names.find(|path| !path.exists()).ok_or_else(|| CliError::new("too many looks"))?;
        let said = self.ask(&Request::Tree(TreeRequest::Export { into: into.clone() }))?;
        let unreadable = serde_json::from_value(said["left_out"].clone()).map_err(CliError::new)?;
        Ok(Look::at_copy(into, unreadable))
    }

    /// Whether it is mounted where it is to be, or need not be. Its device is not its parent's then.
    fn is_mounted(&self) -> bool {
        let device = |path: &Path| std::fs::symlink_metadata(path).map(|metadata| metadata.dev()).ok();
        let differs = |parent| device(&self.root).is_some_and(|own| Some(own) != device(parent));
        self.way == Way::Library || self.root.parent().is_some_and(differs)
    }
}

/// A node, and the process that serves it.
pub(super) struct Served {
    pub(super) node: Node,
    process: Arc<Process>,
}

impl Served {
    /// Serves a node, mounted if that is the way, and waits until it answers.
    pub(super) fn start(place: &Place, node: Node, options: &[&str]) -> Result<Served, CliError> {
        std::fs::create_dir_all(&node.root).map_err(at(&node.root))?;
        let log = node.directory.with_extension("process.log");
        let output = File::options().create(true).append(true).open(&log).map_err(at(&log))?;
        let errors = output.try_clone().map_err(at(&log))?;
        let mut command = match node.way {
            Way::Mount => murphy("mount")?,
            Way::Library => murphy("serve")?,
        };
        command.arg(&node.directory);
        if node.way == Way::Mount {
            command.arg(&node.root);
        }
        command.args(options).stdout(Stdio::from(output)).stderr(Stdio::from(errors));
        let served = Served { process: place.start(&mut command)?, node };
        wait_for("the node", PROCESS_MAX, || {
            if let Some(status) = served.process.ended().map_err(CliError::new)? {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                return Err(CliError::new(format!("its process ended with {status}: {}", said.trim()))
                    .hint(format!("{WITHOUT_FUSE}=1 murphy demo does without mounts")));
            }
            Ok(served.node.is_mounted() && Control::connect(&served.node.directory)?.is_some())
        })?;
        Ok(served)
    }

    /// Stops the process where it is, or lets it go on.
    pub(super) fn signal(&self, signal: Signal) -> Result<(), CliError> {
        self.process.signal(signal)
    }

    /// Kills the process, as a power cut would, and takes its mount away.
    pub(super) fn kill(self) -> Result<Node, CliError> {
        match self.process.kill().map_err(CliError::new)? {
            true => Ok(self.node.clone()),
            false => {
                Err(CliError::new(format!("the process of {} had ended", self.node.directory.display())))
            }
        }
    }

    /// Ends it with everything durable, and waits for the process to end.
    pub(super) fn end(self) -> Result<(), CliError> {
        self.signal(Signal::TERM)?;
        wait_for("the process to end", PROCESS_MAX, || {
            Ok(self.process.ended().map_err(CliError::new)?.is_some())
        })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // One that is gone already needs no killing. What stays mounted is met again when the place is cleared, which says so.
        let _gone = self.process.kill();
        let _detached = murphy_fs::detach_below(&self.node.root);
    }
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
        thread::sleep(LOOK_PAUSE);
    }
    Ok(())
}

/// A number in what a node said.
pub(super) fn number(said: &Value, field: &str) -> Result<u64, CliError> {
    said[field].as_u64().ok_or_else(|| CliError::new(format!("the answer has no {field}: {said}")))
}

/// Now, for durations that are printed.
#[expect(clippy::disallowed_methods, reason = "the demo measures how long real things take")]
pub(super) fn clock() -> Instant {
    Instant::now()
}

/// Makes the demo do without FUSE where it is.
const WITHOUT_FUSE: &str = "MURPHY_DEMO_WITHOUT_FUSE";
/// How long a process may take to begin or to end.
const PROCESS_MAX: Duration = Duration::from_secs(60);
const LOOK_PAUSE: Duration = Duration::from_millis(5);
