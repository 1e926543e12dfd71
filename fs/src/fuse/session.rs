//! One connection to the kernel, from mount to unmount, for any fuser file system.
//!
//! Invariants:
//! - As root it is mounted by mount(2) on a `/dev/fuse` of its own, without any helper program.
//! - Whether this process can mount is found out by mounting, by the same code: nothing is concluded from who somebody is or which files are there.
//! - It never unmounts what somebody else has mounted at the same place after it: the device number is compared first.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use fuser::{Config, MountOption, SessionACL};
use parking_lot::{Condvar, Mutex};
use rustix::mount::{MountFlags, UnmountFlags};
use thiserror::Error;

use super::{
    kernel::REQUEST_BYTES_MAX,
    mount_table::{self, MountError},
    options::MountOptions,
};

/// Why a mount did not end, or how it ended badly.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the fields are in the messages")]
pub enum UnmountError {
    /// Files are open on it, or processes have their working directory there.
    #[error("{} is in use", path.display())]
    Busy { path: PathBuf },
    /// The connection to the kernel failed.
    #[error("the mount at {} ended with an error: {reason}", path.display())]
    Session { path: PathBuf, reason: String },
    /// Anything else that the system answered.
    #[error("cannot unmount {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// A mounted fuser file system. Dropping it detaches the mount, without waiting for open files.
#[derive(Debug)]
pub struct Session {
    path: PathBuf,
    device: String,
    notifier: fuser::Notifier,
    end: Arc<End>,
}

/// How the session ended, once it has.
#[derive(Debug, Default)]
struct End {
    result: Mutex<Option<Result<(), String>>>,
    changed: Condvar,
}

impl Session {
    /// Mounts `filesystem` and serves it on threads of its own.
    pub fn start<F: fuser::Filesystem>(
        filesystem: F,
        mount_point: &Path,
        options: &MountOptions,
    ) -> Result<Session, MountError> {
        let source = options.source()?;
        let path = mount_table::prepare(mount_point, &source)?;
        let failed = |step, source| MountError::Io { path: path.clone(), step, source };
        let session = match mount_directly(&path, &source, options)? {
            Some(device) => {
                let session =
                    fuser::Session::from_fd(filesystem, device.into(), acl(options), config(options));
                session.map_err(|error| {
                    detach(&path);
                    failed("agreeing with the kernel", error)
                })?
            }
            None => {
                mount_table::fusermount().ok_or(MountError::NoFusermount)?;
                let config = helper_config(&source, options);
                fuser::Session::new(filesystem, &path, &config)
                    .map_err(|error| failed("calling fusermount", error))?
            }
        };
        let line =
            mount_table::mounted_at(&path).map_err(|error| failed("reading the mount table", error))?;
        let device = line.map(|line| line.device).unwrap_or_default();
        read_ahead(&device, options.read_ahead);
        let (notifier, end) = (session.notifier(), Arc::new(End::default()));
        let ended = Arc::clone(&end);
        let serve = move || {
            *ended.result.lock() = Some(session.run().map_err(|error| error.to_string()));
            ended.changed.notify_all();
        };
        thread::Builder::new().name("fuse-session".into()).spawn(serve).map_err(|error| {
            detach(&path);
            failed("starting a thread", error)
        })?;
        Ok(Session { path, device, notifier, end })
    }

    /// Where it is mounted, without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sends invalidations from the calling thread, which must not be one that answers requests.
    pub fn notifier(&self) -> fuser::Notifier {
        self.notifier.clone()
    }

    /// Whether it is not mounted any more.
    pub fn has_ended(&self) -> bool {
        self.end.result.lock().is_some()
    }

    /// Waits until it has been unmounted, by whomever.
    pub fn wait(&self) -> Result<(), UnmountError> {
        let mut result = self.end.result.lock();
        while result.is_none() {
            self.end.changed.wait(&mut result);
        }
        match result.as_ref() {
            Some(Err(reason)) => {
                Err(UnmountError::Session { path: self.path.clone(), reason: reason.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Unmounts and waits until every thread has answered its last request. [`UnmountError::Busy`] leaves it mounted and working.
    ///
    /// One that is busy is tried again for a second or two: a process that is about to begin holds for a moment what its parent has open.
    pub fn unmount(&self) -> Result<(), UnmountError> {
        let mut looks = 0;
        while let Err(refused) = self.unmount_now() {
            if !matches!(refused, UnmountError::Busy { .. }) || looks == BUSY_LOOKS {
                return Err(refused);
            }
            looks += 1;
            thread::sleep(BUSY_PAUSE);
        }
        self.wait()
    }

    fn unmount_now(&self) -> Result<(), UnmountError> {
        if !self.is_ours()? {
            return Ok(());
        }
        match rustix::mount::unmount(&self.path, UnmountFlags::empty()) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::BUSY) => Err(UnmountError::Busy { path: self.path.clone() }),
            Err(rustix::io::Errno::PERM) => self.unmount_with_helper(),
            Err(error) => Err(self.failed(error.into())),
        }
    }

    /// Whether the mount at this path is still this one.
    fn is_ours(&self) -> Result<bool, UnmountError> {
        let line = mount_table::mounted_at(&self.path).map_err(|error| self.failed(error))?;
        Ok(!self.has_ended() && line.is_some_and(|line| line.device == self.device))
    }

    /// Whether it is where it was mounted; yes if that cannot be said.
    pub fn is_in_place(&self) -> bool {
        self.is_ours().unwrap_or(true)
    }

    fn unmount_with_helper(&self) -> Result<(), UnmountError> {
        let helper = mount_table::fusermount().ok_or_else(|| self.failed(mount_table::no_helper()))?;
        let output = Command::new(helper).arg("-u").arg("--").arg(&self.path).output();
        let output = output.map_err(|error| self.failed(error))?;
        if output.status.success() {
            return Ok(());
        }
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if reason.contains("busy") {
            return Err(UnmountError::Busy { path: self.path.clone() });
        }
        Err(self.failed(io::Error::other(reason)))
    }

    fn failed(&self, source: io::Error) -> UnmountError {
        UnmountError::Io { path: self.path.clone(), source }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        match self.is_ours() {
            Ok(true) => detach(&self.path),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "a mount may have been left behind"),
        }
    }
}

/// Mounts a file system without anything in it at `directory`, which must be empty, and unmounts it again. The error says in one line why
/// volumes cannot be mounted there.
pub fn try_mount(directory: &Path) -> Result<(), MountError> {
    let session = Session::start(Nothing, directory, &MountOptions::new(TRIAL))?;
    session.unmount().map_err(|error| MountError::Io {
        path: directory.to_owned(),
        step: "unmounting again",
        source: match error {
            UnmountError::Io { source, .. } => source,
            error => io::Error::other(error),
        },
    })
}

/// Answers every request with ENOSYS.
struct Nothing;

impl fuser::Filesystem for Nothing {}

/// Mounts with mount(2); `None` if this process may not.
fn mount_directly(path: &Path, source: &str, options: &MountOptions) -> Result<Option<File>, MountError> {
    let device = match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(device) => device,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !is_root() => return Ok(None),
        Err(source) => return Err(MountError::Device { source }),
    };
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mut data = format!(
        "fd={},rootmode={:o},user_id={user},group_id={group},default_permissions,max_read={REQUEST_BYTES_MAX}",
        device.as_raw_fd(),
        libc::S_IFDIR,
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let mut flags = MountFlags::NODEV | MountFlags::NOSUID;
    flags.set(MountFlags::RDONLY, options.read_only);
    let data = std::ffi::CString::new(data).map_err(io::Error::other);
    let failed = |step, source| MountError::Io { path: path.to_owned(), step, source };
    let data = data.map_err(|error| failed("writing the options", error))?;
    match rustix::mount::mount(source, path, FILE_SYSTEM_TYPE, flags, data.as_c_str()) {
        Ok(()) => Ok(Some(device)),
        Err(rustix::io::Errno::PERM) => Ok(None),
        Err(error) => Err(failed("mount", error.into())),
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn acl(options: &MountOptions) -> SessionACL {
    if options.allow_other { SessionACL::All } else { SessionACL::Owner }
}

fn config(options: &MountOptions) -> Config {
    let mut config = Config::default();
    config.acl = acl(options);
    config.n_threads = Some(options.threads.get());
    config.clone_fd = options.clone_fd;
    config
}

/// What fuser hands to fusermount, which mounts in our place.
fn helper_config(source: &str, options: &MountOptions) -> Config {
    let mut config = config(options);
    config.mount_options = vec![
        MountOption::FSName(source.to_owned()),
        MountOption::Subtype("murphy".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::CUSTOM(format!("max_read={REQUEST_BYTES_MAX}")),
    ];
    if options.read_only {
        config.mount_options.push(MountOption::RO);
    }
    config
}

/// Lets the kernel read ahead further than its 128 KiB. Only root may; without it reads are smaller, nothing else.
fn read_ahead(device: &str, bytes: u32) {
    let knob = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = fs::write(&knob, (bytes / 1024).to_string()) {
        tracing::debug!(knob, %error, "the read-ahead stays as the kernel has set it");
    }
}

/// Takes the mount away from its place; what is open on it goes on until it is closed.
fn detach(path: &Path) {
    if let Err(error) = mount_table::detach(path) {
        tracing::error!(path = %path.display(), %error, "cannot detach the mount");
    }
}

/// How the mount table names the kind of file system.
const FILE_SYSTEM_TYPE: &str = "fuse.murphy";
/// What the mount table shows while it is tried whether anything can be mounted.
const TRIAL: &str = "trial";
/// A busy mount is tried so often once more.
const BUSY_LOOKS: u32 = 50;
const BUSY_PAUSE: Duration = Duration::from_millis(30);
