//! A file system on a mount point.
//!
//! Invariants:
//! - `Mount` knows nothing of what it serves but [`FileSystem`]; of a volume that follows it also hears what changes.
//! - RELEASE of files closed just before the end may be lost with the connection, and of one that is aborted no file is released: what
//!   the kernel still holds is closed when the mount has ended.

use std::{os::unix::ffi::OsStrExt, path::Path, sync::Arc};

use arc_swap::ArcSwap;
use bytes::Bytes;
use murphy_log::SystemClock;
use tokio::runtime::Handle as Runtime;

use super::{
    Fuse,
    count::{RequestCounters, RequestCounts},
    followed::Followed,
    held::Held,
    invalidate::{Invalidator, ToKernel},
    kernel::Lifetimes,
    mount_table::{self, MountError},
    notify::{self, Notice, Notifier},
    options::MountOptions,
    session::{Session, UnmountError},
};
use crate::{FileSystem, Volume};

/// A mounted [`FileSystem`]. Dropping it detaches the mount without making anything durable.
#[derive(Debug)]
pub struct Mount {
    session: Session,
    lifetimes: Arc<ArcSwap<Lifetimes>>,
    counters: Arc<RequestCounters>,
    notifier: Notifier,
    invalidator: Option<Invalidator>,
}

impl Mount {
    /// Mounts `fs` at `mount_point`, an empty directory. Answers that come later are driven on `runtime`, which must have its timer on.
    pub fn new(
        fs: Arc<dyn FileSystem>,
        mount_point: &Path,
        options: &MountOptions,
        runtime: Runtime,
    ) -> Result<Mount, MountError> {
        Mount::serve(fs, mount_point, options, runtime, None)
    }

    /// Refuses a `mount_point` that would be refused, and changes nothing.
    pub fn check(mount_point: &Path, options: &MountOptions) -> Result<(), MountError> {
        mount_table::check(mount_point, &options.source()?)
    }

    /// Mounts a volume that follows a source, or may do so later: the kernel is told of every entry that is followed, so that lifetimes
    /// may be as long as one likes. It is mounted for reading and writing; the volume answers EROFS until it leads.
    pub fn following(
        volume: &Volume,
        mount_point: &Path,
        options: &MountOptions,
        runtime: Runtime,
    ) -> Result<Mount, MountError> {
        let followed = Arc::new(Followed::new(Arc::new(SystemClock::new())));
        let observation = volume.observe(Arc::<Followed>::clone(&followed));
        // What is visible before the first request is never old.
        followed.begin(volume.state().position.lsn);
        let fs: Arc<dyn FileSystem> = Arc::new(volume.clone());
        let mut mount = Mount::serve(fs, mount_point, options, runtime, Some(Arc::clone(&followed)))?;
        let kernel = mount.session.notifier();
        let send: ToKernel = Arc::new(move |notice: &Notice| notify::send(&kernel, notice));
        let parts = (Arc::clone(volume.log()), volume.name_hasher().clone());
        let invalidator = Invalidator::start(followed, observation, parts, &send);
        mount.invalidator = Some(invalidator.map_err(|source| MountError::Io {
            path: mount_point.to_owned(),
            step: "starting the invalidator",
            source,
        })?);
        Ok(mount)
    }

    fn serve(
        fs: Arc<dyn FileSystem>,
        mount_point: &Path,
        options: &MountOptions,
        runtime: Runtime,
        followed: Option<Arc<Followed>>,
    ) -> Result<Mount, MountError> {
        let lifetimes = Arc::new(ArcSwap::from_pointee(options.lifetimes));
        let counters = Arc::new(RequestCounters::default());
        let fuse = Fuse {
            held: Held::of(&fs),
            fs,
            lifetimes: Arc::clone(&lifetimes),
            counters: Arc::clone(&counters),
            runtime,
            io_timeout: options.io_timeout,
            node: options.node.as_ref().map(|node| Bytes::copy_from_slice(node.as_os_str().as_bytes())),
            followed,
        };
        let session = Session::start(fuse, mount_point, options)?;
        let notifier = Notifier::new(session.notifier()).map_err(|source| MountError::Io {
            path: mount_point.to_owned(),
            step: "starting the notifier",
            source,
        })?;
        Ok(Mount { session, lifetimes, counters, notifier, invalidator: None })
    }

    /// Where it is mounted, without links.
    pub fn path(&self) -> &Path {
        self.session.path()
    }

    /// Requests since the mount.
    pub fn requests(&self) -> RequestCounts {
        self.counters.snapshot()
    }

    /// Tells the kernel what has changed other than through this mount.
    pub fn notifier(&self) -> &Notifier {
        &self.notifier
    }

    /// What tells the kernel of followed entries, if the mount is [`Mount::following`] a volume.
    pub fn invalidator(&self) -> Option<&Invalidator> {
        self.invalidator.as_ref()
    }

    /// Changes the lifetimes of what is answered from now on.
    pub fn set_lifetimes(&self, lifetimes: Lifetimes) {
        self.lifetimes.store(Arc::new(lifetimes));
    }

    /// Whether it is not mounted any more.
    pub fn has_ended(&self) -> bool {
        self.session.has_ended()
    }

    /// Whether it is where it was mounted. One that is not, and has not ended, is just ending, or in use though it was taken away
    /// (`umount -l`). Yes where the mount table cannot be read.
    pub fn is_in_place(&self) -> bool {
        self.session.is_in_place()
    }

    /// Waits until it has been unmounted, by whomever. Blocks the thread.
    pub fn wait(&self) -> Result<(), UnmountError> {
        self.session.wait()
    }

    /// Unmounts and waits for the last answer. Blocks the thread. [`UnmountError::Busy`] leaves it mounted and working.
    pub fn unmount(&self) -> Result<(), UnmountError> {
        self.session.unmount()
    }
}

/// The extended attribute of the root of a mount whose value is the directory of the node.
pub const NODE_XATTR: &str = "user.murphy.node";
