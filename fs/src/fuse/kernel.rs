//! What is agreed with the kernel at mount time, the same for Murphy and for the empty file system that it is measured against.
//!
//! Invariants:
//! - Never asked for: WRITEBACK_CACHE (the kernel then ignores sizes and times of the file system), AUTO_INVAL_DATA, lock flags,
//!   POSIX_ACL, DONT_MASK (the kernel applies the umask), passthrough.
//! - A flag that this kernel does not know is left out; nothing that is promised depends on one.

use std::{io, time::Duration};

use fuser::{InitFlags, KernelConfig};

/// For how long the kernel may answer from its own cache. Invalidation by [`crate::Notifier`] ends a lifetime at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lifetimes {
    /// Of a name that is there.
    pub entry: Duration,
    /// Of attributes.
    pub attr: Duration,
    /// Of a name that is not there.
    pub missing: Duration,
}

impl Lifetimes {
    /// For a file system whose every change goes through this mount.
    pub const EXCLUSIVE: Lifetimes =
        Lifetimes { entry: EXCLUSIVE_LIFETIME, attr: EXCLUSIVE_LIFETIME, missing: EXCLUSIVE_LIFETIME };

    /// The kernel caches nothing: every access is a request.
    pub const NONE: Lifetimes =
        Lifetimes { entry: Duration::ZERO, attr: Duration::ZERO, missing: Duration::ZERO };

    /// The lifetime where one value serves for name and attributes.
    pub fn entry_and_attr(&self) -> Duration {
        self.entry.min(self.attr)
    }
}

impl Default for Lifetimes {
    fn default() -> Lifetimes {
        Lifetimes::EXCLUSIVE
    }
}

/// Settles flags and sizes of a connection; to be called from `init`.
pub fn kernel_config(config: &mut KernelConfig) -> io::Result<()> {
    settle(config, WANTED)
}

/// The same for a mount of a volume that follows a source, without EXPLICIT_INVAL_DATA. What the kernel reads beyond the length that it
/// knows it fills with zeros, asking nobody; once it learns that the source has appended, it would show them as data. Without the flag
/// it drops a file's pages whenever it learns another length.
///
/// Says whether files may be opened past the page cache. A kernel that does not know DIRECT_IO_ALLOW_MMAP refuses shared mappings of them.
pub(super) fn follower_config(config: &mut KernelConfig) -> io::Result<bool> {
    let may_bypass = InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
    settle(config, WANTED.difference(InitFlags::FUSE_EXPLICIT_INVAL_DATA).union(may_bypass))?;
    Ok(config.capabilities().contains(may_bypass))
}

fn settle(config: &mut KernelConfig, wanted: InitFlags) -> io::Result<()> {
    let wanted = wanted & config.capabilities();
    config.add_capabilities(wanted).map_err(|flags| refused("flags", &flags))?;
    config.set_max_write(REQUEST_BYTES_MAX).map_err(|size| refused("max_write", &size))?;
    config.set_max_background(BACKGROUND_MAX).map_err(|count| refused("max_background", &count))?;
    config
        .set_congestion_threshold(BACKGROUND_CONGESTED)
        .map_err(|count| refused("congestion_threshold", &count))?;
    Ok(())
}

fn refused(what: &str, answer: &dyn std::fmt::Debug) -> io::Error {
    io::Error::other(format!("the kernel refuses {what}: {answer:?}"))
}

/// The flags that are asked for.
///
/// * ATOMIC_O_TRUNC: opening and emptying are one request.
/// * DO_READDIRPLUS, READDIRPLUS_AUTO: a listing brings the attributes when they are going to be asked for.
/// * PARALLEL_DIROPS: lookups in one directory do not wait for each other.
/// * HANDLE_KILLPRIV_V2: no GETXATTR of `security.capability` before each write; setuid and setgid are cleared below.
/// * EXPLICIT_INVAL_DATA: cached data lives until it is invalidated by name, not until an attribute looks different.
/// * CACHE_SYMLINKS: a target is read once.
/// * EXPORT_SUPPORT: file handles (NFS, `open_by_handle_at`) survive the eviction of an inode.
const WANTED: InitFlags = InitFlags::FUSE_ATOMIC_O_TRUNC
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_READDIRPLUS_AUTO)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_HANDLE_KILLPRIV_V2)
    .union(InitFlags::FUSE_EXPLICIT_INVAL_DATA)
    .union(InitFlags::FUSE_CACHE_SYMLINKS)
    .union(InitFlags::FUSE_EXPORT_SUPPORT);

/// The most data in one READ or WRITE, in bytes.
pub(super) const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// Requests that nobody waits for (read-ahead, asynchronous I/O) in flight at most.
const BACKGROUND_MAX: u16 = 128;

/// From how many of them on the kernel holds back more.
const BACKGROUND_CONGESTED: u16 = 96;

/// An hour: long enough that a tree in use stays cached, short enough that what is no longer used is asked for again.
const EXCLUSIVE_LIFETIME: Duration = Duration::from_secs(3600);
