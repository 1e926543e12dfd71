//! How to mount: what whoever mounts may choose, and its defaults.

use std::{num::NonZeroUsize, path::PathBuf, thread, time::Duration};

use super::{kernel::Lifetimes, mount_table::MountError};

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The volume's id: the mount table shows `murphy:<name>`, and a dead mount of the same name is replaced.
    pub name: String,
    /// How long the kernel may keep names and attributes.
    pub lifetimes: Lifetimes,
    /// Threads that read requests.
    pub threads: NonZeroUsize,
    /// Gives each thread its own descriptor and queue of the connection.
    pub clone_fd: bool,
    /// After how long a request that waits for a store or the log is answered with EIO.
    pub io_timeout: Duration,
    /// How far the kernel reads ahead in a file that is read from front to back, in bytes.
    pub read_ahead: u32,
    /// Users other than the one who mounts may enter, as permissions allow.
    pub allow_other: bool,
    /// The kernel itself refuses changes (a past moment). A mirror is mounted without it and answers EROFS below.
    pub read_only: bool,
    /// The directory of the node that serves it: the root has it as [`NODE_XATTR`](super::NODE_XATTR), by which a program at the mount point finds the node.
    pub node: Option<PathBuf>,
}

impl MountOptions {
    /// The options of a volume's source, for the volume with this id.
    pub fn new(name: impl Into<String>) -> MountOptions {
        MountOptions {
            name: name.into(),
            lifetimes: Lifetimes::EXCLUSIVE,
            threads: default_threads(),
            clone_fd: false,
            io_timeout: IO_TIMEOUT,
            read_ahead: READ_AHEAD_BYTES,
            allow_other: false,
            read_only: false,
            node: None,
        }
    }

    /// What the mount table shows.
    pub(super) fn source(&self) -> Result<String, MountError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if self.name.is_empty() || self.name.len() > NAME_BYTES_MAX || !self.name.bytes().all(plain) {
            return Err(MountError::Name { name: self.name.clone() });
        }
        Ok(format!("murphy:{}", self.name))
    }
}

/// As many request threads as processors, within [`THREADS_MIN`] and [`THREADS_MAX`]: more only wake each other up.
fn default_threads() -> NonZeroUsize {
    let processors = thread::available_parallelism().unwrap_or(THREADS_MIN);
    processors.clamp(THREADS_MIN, THREADS_MAX)
}

/// With one thread a request that reads the index would hold up all others.
const THREADS_MIN: NonZeroUsize = NonZeroUsize::new(2).expect("two is not zero");

/// Each thread has a buffer of up to the largest request, and they share one queue.
const THREADS_MAX: NonZeroUsize = NonZeroUsize::new(16).expect("sixteen is not zero");

/// The default of `--io-timeout`.
const IO_TIMEOUT: Duration = Duration::from_secs(60);

/// One request of the largest size ahead.
const READ_AHEAD_BYTES: u32 = 1 << 20;

/// The longest name in the mount table.
const NAME_BYTES_MAX: usize = 128;
