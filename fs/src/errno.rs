//! The error numbers that the file system answers with.
//!
//! Every error of a lower layer becomes one of these at exactly one place, where it also is logged.

/// A POSIX error number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(i32)]
#[expect(missing_docs, reason = "the names are POSIX's own")]
pub enum Errno {
    EPERM = libc::EPERM,
    ENOENT = libc::ENOENT,
    EIO = libc::EIO,
    ENXIO = libc::ENXIO,
    E2BIG = libc::E2BIG,
    EBADF = libc::EBADF,
    EACCES = libc::EACCES,
    EBUSY = libc::EBUSY,
    EEXIST = libc::EEXIST,
    EXDEV = libc::EXDEV,
    ENOTDIR = libc::ENOTDIR,
    EISDIR = libc::EISDIR,
    EINVAL = libc::EINVAL,
    EFBIG = libc::EFBIG,
    ENOSPC = libc::ENOSPC,
    EROFS = libc::EROFS,
    EMLINK = libc::EMLINK,
    ERANGE = libc::ERANGE,
    ENAMETOOLONG = libc::ENAMETOOLONG,
    ENOTEMPTY = libc::ENOTEMPTY,
    ELOOP = libc::ELOOP,
    ENODATA = libc::ENODATA,
    EOPNOTSUPP = libc::EOPNOTSUPP,
    ESTALE = libc::ESTALE,
    EINTR = libc::EINTR,
    ENOSYS = libc::ENOSYS,
}

impl Errno {
    /// The number that the kernel understands.
    pub const fn code(self) -> i32 {
        self as i32
    }
}

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

impl std::error::Error for Errno {}
