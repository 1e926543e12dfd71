//! The open node and everything that runs with it.
//!
//! Invariants:
//! - One mount a node.
//! - A process that ends with its mounts mounts once: whoever comes after that mount, or before it, is told to ask somebody else in a moment.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
    time::Duration,
};

use murphy_fs::{Errno, FileSystem, Mount, MountOptions, UnmountError, Volume};
use murphy_log::{Log, Lsn, NodeId};
use serde_json::Value;
use tokio::runtime::Handle;

use super::{
    gate::{Gate, Inside},
    joining::{join_later, wait_after_taking_over},
};
use crate::{
    archive_notes::remember_fence,
    archives::{self, Archives, acknowledge_as_set, check_fences},
    config::NodeConfig,
    control::{MountRequest, Replies},
    error::{CliError, failed},
    mirrors::{Mirroring, PromoteOrder},
    node::Node,
    progress::Progress,
    settings::{Ack, Settings},
    status::{self, ArchiveStatus, Running},
};

/// A node and everything that runs with it.
pub(crate) struct Host {
    pub(super) node: Node,
    pub(super) runtime: Handle,
    pub(super) archives: Arc<Archives>,
    pub(super) mirroring: Arc<Mirroring>,
    mounts: Mutex<Vec<Arc<Mount>>>,
    /// Orders that are being followed.
    gate: Gate,
    /// Held while what an fsync waits for is changed.
    pub(super) level_turn: Mutex<()>,
    options: HostOptions,
    /// Where the log ended before this process decided anything, and with what it had lost and was given back.
    pub(super) settled: Lsn,
    /// The archives that have said what they hold before a node that nobody serves decides anything, by URL.
    pub(super) reached: BTreeSet<String>,
}

/// How a node is opened.
#[derive(Clone, Debug)]
pub(super) struct HostOptions {
    pub(super) purpose: Purpose,
    /// Of mounts.
    pub(super) io_timeout: Option<Duration>,
    /// Whether the process ends with its last mount.
    pub(super) ends_with_mounts: bool,
    /// Members that are given up: what they hold keeps the node from nothing.
    pub(super) given_up: BTreeSet<NodeId>,
}

/// What a node is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// To go on: it decides and ships.
    Serve,
    /// For one command that changes something: it decides.
    Change,
    /// For one command that looks.
    Look,
}

impl Host {
    /// A node that is served leads or follows already.
    pub(super) fn start(
        node: Node,
        mirroring: Arc<Mirroring>,
        options: HostOptions,
        runtime: &Handle,
    ) -> Result<Host, CliError> {
        let _entered = runtime.enter();
        let settings = Settings::of(&node.volume)?;
        let mut reached = BTreeSet::new();
        if options.purpose == Purpose::Change {
            mirroring.check_source()?;
            mirroring.ask_members(&node, &options.given_up)?;
            reached = check_fences(&node, &settings.archives, runtime)?;
        }
        let settled = node.log.tail().position.lsn;
        if options.purpose == Purpose::Change {
            node.lead()?;
        }
        let archives = Arc::new(Archives::new(&node, runtime.clone()));
        mirroring.ships_with(&archives);
        if options.purpose == Purpose::Serve && !mirroring.is_mirror() {
            wait_after_taking_over(&archives, &node.config.archives_given_up, runtime)?;
            archives.start_all(Settings::of(&node.volume)?.archives)?;
            let outside = outside(&node)?;
            acknowledge_as_set(&node.volume, mirroring.waited_for()?, &archives, outside.clone());
            join_later(&archives, &mirroring, outside);
        }
        let (mounts, gate, level_turn) = Default::default();
        let runtime = runtime.clone();
        Ok(Host { node, runtime, archives, mirroring, mounts, gate, level_turn, options, settled, reached })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.node.directory
    }

    pub(super) fn volume(&self) -> &Volume {
        &self.node.volume
    }

    /// Whether it ships to its archives.
    pub(super) fn ships(&self) -> bool {
        self.options.purpose == Purpose::Serve
    }

    /// Whether an fsync waits for archives, or is to.
    pub(super) fn waits_for_archives(&self) -> Result<bool, CliError> {
        let set = Settings::of(self.volume())?.ack;
        Ok(set == Ack::Archive || self.mirroring.waited_for()? == Ack::Archive)
    }

    /// Where the volume is mounted.
    pub(super) fn mount_points(&self) -> Vec<PathBuf> {
        self.mounts().iter().map(|mount| mount.path().to_owned()).collect()
    }

    fn mounts(&self) -> MutexGuard<'_, Vec<Arc<Mount>>> {
        // A list is whole after every operation on it.
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why nothing can be decided any more, if that is so.
    pub(super) fn ended(&self) -> Option<String> {
        let archived = || self.sealed();
        let among_nodes =
            || self.mirroring.fenced().or_else(|| self.mirroring.lost()).or_else(|| self.mirroring.broken());
        self.volume().ended().or_else(archived).or_else(among_nodes).or_else(|| self.archives.lost())
    }

    /// Who has taken over, if an archive says that somebody has. It is noted, and what only this node holds is listed.
    fn sealed(&self) -> Option<String> {
        let (sealed, reason) = self.archives.fenced()?;
        self.mirroring.note_sealed(&sealed);
        remember_fence(&self.node.directory, &reason);
        Some(reason)
    }

    /// Whether another source has taken over, for good, whatever else has ended the volume. What only this node holds is listed if anybody
    /// says where the histories part. Blocks.
    pub(super) fn is_replaced(&self) -> bool {
        let is_sealed = self.sealed().is_some();
        self.mirroring.find_branch();
        is_sealed || self.mirroring.fenced().is_some()
    }

    /// Whether it ends now because its last mount is gone. Once it does no order is taken any more; one that is being followed comes first.
    pub(super) fn ends_with_its_mounts(&self) -> bool {
        let mut mounts = self.mounts();
        mounts.retain(|mount| !mount.has_ended());
        self.options.ends_with_mounts && mounts.is_empty() && self.gate.close_if_empty()
    }

    /// Takes no order any more, and waits for those that are being followed, so long at most. Blocks.
    pub(super) fn take_no_more(&self, longest: Duration) {
        let left = self.gate.close(longest);
        if left > 0 {
            tracing::warn!(left, "orders have not come to their end; this process ends all the same");
        }
    }

    /// Lets an order in.
    pub(super) fn enter(&self) -> Result<Inside<'_>, CliError> {
        self.gate.enter().ok_or_else(|| self.passing())
    }

    /// Whether somebody else takes orders in a moment.
    pub(super) fn takes_no_orders(&self) -> bool {
        if self.gate.is_closed() {
            return true;
        }
        if !self.options.ends_with_mounts {
            return false;
        }
        self.settle_mounts();
        match self.mounts.try_lock() {
            Ok(mounts) => mounts.iter().all(|mount| mount.has_ended()),
            Err(TryLockError::Poisoned(mounts)) => mounts.get_ref().iter().all(|mount| mount.has_ended()),
            // Something is being mounted.
            Err(TryLockError::WouldBlock) => false,
        }
    }

    fn passing(&self) -> CliError {
        let node = self.directory().display();
        CliError::passing(format!(
            "the process that serves node {node} is about to end, with what is mounted by it"
        ))
        .hint("nothing was changed; ask again when it has ended: murphy status shows whether it has")
    }

    /// A mount that somebody has taken away ends a moment later. One that is in use all the same (`umount -l`) stays.
    fn settle_mounts(&self) {
        let mounts = match self.mounts.try_lock() {
            Ok(mounts) => mounts.clone(),
            Err(_) => return,
        };
        for _ in 0..SETTLE_STEPS {
            if mounts.iter().all(|mount| mount.has_ended() || mount.is_in_place()) {
                return;
            }
            std::thread::sleep(SETTLE_PAUSE);
        }
    }

    pub(super) fn take_mounts(&self) -> Vec<Arc<Mount>> {
        std::mem::take(&mut *self.mounts())
    }

    /// Mounts the volume. One mount point a node: each has a kernel cache of its own, and the kernel would not learn at one what was
    /// done at another.
    pub(super) fn mount(&self, request: &MountRequest) -> Result<(), CliError> {
        self.settle_mounts();
        let mut mounts = self.mounts();
        mounts.retain(|mount| !mount.has_ended());
        // Looked at with the list locked: whoever ends the mounts closes the gate before, and takes the list after.
        if self.gate.is_closed() || self.options.ends_with_mounts && mounts.is_empty() {
            return Err(self.passing());
        }
        self.mount_at(&mut mounts, request)
    }

    /// Mounts what the process was started for.
    pub(super) fn mount_first(&self, request: &MountRequest) -> Result<(), CliError> {
        self.mount_at(&mut self.mounts(), request)
    }

    fn mount_at(&self, mounts: &mut Vec<Arc<Mount>>, request: &MountRequest) -> Result<(), CliError> {
        if let Some(mount) = mounts.first() {
            let (first, wanted) = (mount.path().display(), request.path.display());
            return Err(CliError::new(format!("this node is mounted already, at {first}"))
                .hint(format!("the same tree elsewhere: mount --bind {first} {wanted}")));
        }
        let mut options = MountOptions::new(self.node.config.volume.to_string());
        options.read_only = request.read_only;
        options.allow_other = request.allow_other;
        options.node = Some(self.node.directory.clone());
        options.io_timeout = self.options.io_timeout.unwrap_or(options.io_timeout);
        let mount = if self.mirroring.is_mirror() {
            Mount::following(self.volume(), &request.path, &options, self.runtime.clone())
        } else {
            let volume = Arc::new(self.volume().clone()) as Arc<dyn FileSystem>;
            Mount::new(volume, &request.path, &options, self.runtime.clone())
        };
        let mount = mount.map_err(failed)?;
        mounts.push(Arc::new(mount));
        Ok(())
    }

    /// Makes everything durable at the volume's level, and says how far it is.
    pub(super) fn flush(&self, progress: &mut dyn FnMut(Progress)) -> Result<(), CliError> {
        let volume = self.volume().clone();
        let flushing = self.runtime.spawn(async move { volume.sync_all().wait().await });
        let total = self.volume().dirty_bytes();
        while !flushing.is_finished() {
            let left = self.volume().dirty_bytes().min(total);
            progress(Progress::new("bytes made durable", total - left, total));
            std::thread::sleep(LOOK);
        }
        self.runtime
            .block_on(flushing)
            .map_err(failed)?
            .map_err(|errno| self.not_durable(errno, "are kept and tried again"))
    }

    /// Ends what the node has begun: everything is durable, and indexed, when it returns; what can be, if it fails. Archives are given a
    /// moment.
    pub(super) fn close(&self) -> Result<(), CliError> {
        let closed = self.runtime.block_on(self.volume().close());
        for url in self.archives.settle(self.volume().durable().lsn, ARCHIVES_SETTLE) {
            tracing::warn!(url, "the archive does not hold everything yet; the next start goes on");
        }
        closed.map_err(|errno| self.not_durable(errno, "were written and are lost with this process"))
    }

    /// Why not everything is durable, and what becomes of the bytes that are not.
    fn not_durable(&self, errno: Errno, fate: &str) -> CliError {
        let left = self.volume().dirty_bytes();
        let why = self.volume().ended().unwrap_or_else(|| format!("{errno:?}"));
        CliError::new(format!("not everything is durable: {why}; {left} bytes {fate}"))
            .hint("the process that serves the node has logged what failed")
    }

    /// Makes a mirror the source; it ships to its archives from then on.
    pub(super) fn promote(&self, order: &PromoteOrder) -> Result<Value, CliError> {
        let outside = outside(&self.node)?;
        let answer = self.mirroring.promote(order, &|ack| {
            acknowledge_as_set(self.volume(), ack, &self.archives, outside.clone());
            Ok(())
        })?;
        if self.ships() && !order.dry_run {
            if let Err(error) = self.ship_after_promotion() {
                // The node is the source all the same.
                tracing::error!(%error, "an archive is not shipped to before the next start");
            }
            join_later(&self.archives, &self.mirroring, outside);
        }
        Ok(answer)
    }

    fn ship_after_promotion(&self) -> Result<(), CliError> {
        // The file as it is now: it says which were given up.
        let given_up = NodeConfig::read(self.directory())?.archives_given_up;
        wait_after_taking_over(&self.archives, &given_up, &self.runtime)?;
        self.archives.start_all(Settings::of(self.volume())?.archives)
    }

    pub(super) fn unmount(&self, path: &Path, replies: &mut dyn Replies) -> Result<Value, CliError> {
        let mount = self.mounts().iter().find(|mount| mount.path() == path).cloned();
        let Some(mount) = mount else {
            return Err(CliError::new(format!("{} is not a mount of this node", path.display())));
        };
        self.flush(&mut |progress| replies.progress(progress))?;
        mount.unmount().map_err(|error| match error {
            UnmountError::Busy { .. } => failed(error)
                .hint("everything written so far is durable; close what is open there and try again"),
            UnmountError::Session { .. } | UnmountError::Io { .. } => failed(error),
        })?;
        self.flush(&mut |progress| replies.progress(progress))?;
        self.mounts().retain(|mount| !mount.has_ended());
        Ok(serde_json::json!({ "unmounted": path }))
    }

    /// How each archive does, as far as is known.
    pub(super) fn archive_status(&self) -> Result<Vec<ArchiveStatus>, CliError> {
        match self.ships() {
            true => Ok(self.archives.status()),
            false => archives::status_at_rest(&self.node, &Settings::of(self.volume())?.archives),
        }
    }

    pub(super) fn status(&self) -> Result<Value, CliError> {
        let running = self.ships().then(|| Running {
            pid: std::process::id(),
            mounts: self.mount_points(),
            ends_with_mounts: self.options.ends_with_mounts,
        });
        let archives = self.archive_status()?;
        let mut status = status::of(&self.node, running, archives)?;
        self.mirroring.describe(&mut status);
        status::judge_again(&mut status);
        serde_json::to_value(status).map_err(failed)
    }
}

/// The failure domains that an archive must be outside of to acknowledge.
pub(super) fn outside(node: &Node) -> Result<Vec<String>, CliError> {
    Ok(vec![node.failure_domain()?.to_string(), node.config.blocks.failure_domain().to_string()])
}

const LOOK: Duration = Duration::from_millis(50);
/// A second in all.
const SETTLE_STEPS: u32 = 100;
const SETTLE_PAUSE: Duration = Duration::from_millis(10);
const ARCHIVES_SETTLE: Duration = Duration::from_secs(5);
