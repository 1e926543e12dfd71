//! The process that serves a node: its mounts, its control socket, and its end.
//!
//! Invariants:
//! - It ends cleanly on SIGTERM and SIGINT, and when its last mount is unmounted if it was started by `mount`: everything durable first,
//!   then the mounts, then whatever was written in between.
//! - When the volume has ended (the log is poisoned, another source took over) it says why, exits with 1, and its mounts go with it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use murphy_fs::{Errno, FileSystem, Mount, MountOptions, UnmountError, Volume};
use serde_json::Value;
use tokio::{
    runtime::{Handle, Runtime},
    signal::unix::{SignalKind, signal},
};

use crate::{
    background,
    check::{self, Finding},
    control::{ControlServer, Handler, MountRequest, Replies, Request},
    error::{CliError, Code, failed},
    node::{Node, NodeOptions},
    output::Output,
    progress::Progress,
    status::{self, Running},
};

/// What to serve.
pub(crate) struct Plan {
    pub(crate) directory: PathBuf,
    pub(crate) options: NodeOptions,
    /// The first mount. A process that was started with one ends with its last one.
    pub(crate) mount: Option<MountRequest>,
}

/// Serves until it is over.
pub(crate) fn run(plan: &Plan, output: &Output) -> Result<Code, CliError> {
    if background::is_child() {
        background::detach()?;
    }
    let runtime = Runtime::new().map_err(failed)?;
    // From here on a signal means a clean end, however early it comes.
    let mut signals = Signals::listen(&runtime)?;
    let node = Node::open(&plan.directory, &plan.options, runtime.handle())?;
    {
        let _entered = runtime.enter();
        node.lead()?;
    }
    let host = Arc::new(Host {
        node,
        runtime: runtime.handle().clone(),
        mounts: Mutex::new(Vec::new()),
        io_timeout: plan.options.io_timeout,
        ends_with_mounts: plan.mount.is_some(),
    });
    let server = ControlServer::start(&plan.directory, Arc::clone(&host) as Arc<dyn Handler>)?;
    if let Some(request) = &plan.mount {
        host.mount(request)?;
    }
    tracing::info!(node = %plan.directory.display(), "serving");
    background::report_ready();
    let why = runtime.block_on(host.wait(&mut signals));
    let code = host.end(&why, output);
    server.drain();
    drop(server);
    // What has not come to its end by now waits for a store that does not answer.
    runtime.shutdown_timeout(SHUTDOWN);
    code
}

/// Why serving is over.
enum Over {
    Signal,
    Unmounted,
    Ended(String),
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen(runtime: &Runtime) -> Result<Signals, CliError> {
        let _entered = runtime.enter();
        Ok(Signals {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
        })
    }
}

/// The node and its mounts, as commands see them.
struct Host {
    node: Node,
    runtime: Handle,
    mounts: Mutex<Vec<Arc<Mount>>>,
    io_timeout: Option<Duration>,
    ends_with_mounts: bool,
}

impl Host {
    fn volume(&self) -> &Volume {
        &self.node.volume
    }

    fn mounts(&self) -> MutexGuard<'_, Vec<Arc<Mount>>> {
        // A list is whole after every operation on it.
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn wait(&self, signals: &mut Signals) -> Over {
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                _ = signals.terminate.recv() => return Over::Signal,
                _ = signals.interrupt.recv() => return Over::Signal,
                _ = look.tick() => {}
            }
            if let Some(reason) = self.volume().ended() {
                return Over::Ended(reason);
            }
            let mut mounts = self.mounts();
            mounts.retain(|mount| !mount.has_ended());
            if self.ends_with_mounts && mounts.is_empty() {
                return Over::Unmounted;
            }
        }
    }

    fn mount(&self, request: &MountRequest) -> Result<(), CliError> {
        let mut mounts = self.mounts();
        let mut options = MountOptions::new(self.node.config.volume.to_string());
        options.read_only = request.read_only;
        options.allow_other = request.allow_other;
        options.node = Some(self.node.directory.clone());
        options.io_timeout = self.io_timeout.unwrap_or(options.io_timeout);
        let volume = Arc::new(self.volume().clone()) as Arc<dyn FileSystem>;
        let mount = Mount::new(volume, &request.path, &options, self.runtime.clone()).map_err(failed)?;
        mounts.push(Arc::new(mount));
        Ok(())
    }

    /// Makes everything durable at the volume's level, and says how far it is.
    fn flush(&self, mut progress: impl FnMut(Progress)) -> Result<(), CliError> {
        let volume = self.volume().clone();
        let flushing = self.runtime.spawn(async move { volume.sync_all().wait().await });
        let total = self.volume().dirty_bytes();
        while !flushing.is_finished() {
            let left = self.volume().dirty_bytes().min(total);
            progress(Progress::new("bytes made durable", total - left, total));
            std::thread::sleep(LOOK);
        }
        self.runtime.block_on(flushing).map_err(failed)?.map_err(|errno| self.not_durable(errno))
    }

    fn not_durable(&self, errno: Errno) -> CliError {
        let left = self.volume().dirty_bytes();
        let why = self.volume().ended().unwrap_or_else(|| format!("{errno:?}"));
        CliError::new(format!("not everything is durable: {why}; {left} bytes are kept and tried again"))
            .hint("the process that serves the node has logged what failed")
    }

    fn unmount(&self, path: &Path, replies: &mut Replies<'_>) -> Result<Value, CliError> {
        let mount = self.mounts().iter().find(|mount| mount.path() == path).cloned();
        let Some(mount) = mount else {
            return Err(CliError::new(format!("{} is not a mount of this node", path.display())));
        };
        self.flush(|progress| replies.progress(progress))?;
        mount.unmount().map_err(|error| match error {
            UnmountError::Busy { .. } => failed(error)
                .hint("everything written so far is durable; close what is open there and try again"),
            UnmountError::Session { .. } | UnmountError::Io { .. } => failed(error),
        })?;
        self.flush(|progress| replies.progress(progress))?;
        self.mounts().retain(|mount| !mount.has_ended());
        Ok(serde_json::json!({ "unmounted": path }))
    }

    /// Ends everything in order.
    fn end(&self, why: &Over, output: &Output) -> Result<Code, CliError> {
        let mounts = std::mem::take(&mut *self.mounts());
        if let Over::Ended(reason) = why {
            // The mounts are detached: nothing that is written there could be kept.
            drop(mounts);
            return Err(CliError::new(format!("the volume has ended: {reason}"))
                .hint("everything acknowledged is in the log; start again once the cause is gone"));
        }
        if matches!(why, Over::Signal) && !mounts.is_empty() {
            output.note("Ending: everything is made durable first");
        }
        let flushed = self.flush(|_| {});
        if let Err(error) = &flushed {
            tracing::error!(%error, "the mounts end all the same");
        }
        for mount in mounts {
            if let Err(error) = mount.unmount() {
                tracing::warn!(%error, "detaching it: open files there fail from now on");
            }
        }
        self.runtime.block_on(self.volume().close()).map_err(|errno| self.not_durable(errno))?;
        flushed.map(|()| Code::Done)
    }

    fn fsck(&self, data: bool, replies: &mut Replies<'_>) -> Result<Value, CliError> {
        let mut found = |finding: Finding| match serde_json::to_value(&finding) {
            Ok(value) => replies.item(value),
            Err(error) => tracing::error!(%error, "a finding cannot be sent"),
        };
        let summary = check::check(&self.node, data, &self.runtime, &mut found)?;
        serde_json::to_value(summary).map_err(failed)
    }
}

impl Handler for Host {
    fn handle(&self, request: Request, replies: &mut Replies<'_>) -> Result<Value, CliError> {
        match request {
            Request::Status => {
                let mounts = self.mounts().iter().map(|mount| mount.path().to_owned()).collect();
                let ends_with_mounts = self.ends_with_mounts;
                let running = Running { pid: std::process::id(), mounts, ends_with_mounts };
                let status = status::of(&self.node, Some(running))?;
                serde_json::to_value(status).map_err(failed)
            }
            Request::Flush => {
                self.flush(|progress| replies.progress(progress))?;
                Ok(serde_json::json!({ "durable_lsn": self.volume().durable().lsn.get() }))
            }
            Request::Mount(request) => {
                self.mount(&request)?;
                Ok(serde_json::json!({ "mounted": request.path, "pid": std::process::id() }))
            }
            Request::Unmount { path } => self.unmount(&path, replies),
            Request::Fsck { data } => self.fsck(data, replies),
        }
    }
}

const LOOK: Duration = Duration::from_millis(50);
const SHUTDOWN: Duration = Duration::from_secs(2);
