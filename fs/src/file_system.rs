//! The one trait below every way into the file system: FUSE, tests, the demo, and later a client over the network.
//!
//! Semantics live in implementations of this trait, documented in `docs/semantics.md`; an adapter above converts, calls and replies.
//!
//! Invariants:
//! - No method blocks on a store, a network, a log sync or a full buffer: what must wait is returned as [`Answer::Later`].
//!   Reads of the local index may happen inside a call.
//! - Permission to *reach* an inode (search and access bits) is checked by the caller (the kernel with `default_permissions`);
//!   rules that need the tree (sticky bit, setgid clearing, ownership for chmod/chown/utimens) are checked here.
//! - An operation that returned is visible to every later one on this node; what is durable is a matter of [`FileSystem::fsync`].

use std::{future::Future, pin::Pin};

use bytes::Bytes;

use crate::{Attr, Errno, Ino, Kind, Name, SetAttr, StatFs, XattrName};

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Caller {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Process; 0 if unknown.
    pub pid: u32,
}

/// An answer that is there now, or one that somebody must wait for.
pub enum Answer<T> {
    /// The result.
    Now(Result<T, Errno>),
    /// The result, once a store, the log or a buffer has answered. To be driven on a tokio runtime. Dropping it does not undo
    /// what the call has begun.
    Later(Pin<Box<dyn Future<Output = Result<T, Errno>> + Send>>),
}

impl<T> Answer<T> {
    /// An answer that must be waited for.
    pub fn later(future: impl Future<Output = Result<T, Errno>> + Send + 'static) -> Answer<T> {
        Answer::Later(Box::pin(future))
    }

    /// The same with its result turned into something else, once it is there.
    pub(crate) fn map<U>(self, turn: impl FnOnce(T) -> U + Send + 'static) -> Answer<U>
    where
        T: 'static,
    {
        match self {
            Answer::Now(result) => Answer::Now(result.map(turn)),
            Answer::Later(future) => Answer::later(async move { future.await.map(turn) }),
        }
    }

    /// Waits where waiting is allowed.
    pub async fn wait(self) -> Result<T, Errno> {
        match self {
            Answer::Now(result) => result,
            Answer::Later(future) => future.await,
        }
    }
}

/// An open file or directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Handle(pub u64);

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenFlags {
    /// Reads are allowed.
    pub read: bool,
    /// Writes are allowed.
    pub write: bool,
    /// Each write goes to the end (`O_APPEND`).
    pub append: bool,
    /// The file is emptied on opening (`O_TRUNC`).
    pub truncate: bool,
    /// Each write is durable before it returns (`O_SYNC`, `O_DSYNC`).
    pub sync: bool,
}

/// What opening a file gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opened {
    /// To be passed to read, write, flush, fsync and release.
    pub handle: Handle,
    /// The file's data has not changed since this node's last open of it: a cache above may keep it.
    pub unchanged: bool,
    /// This node decides: the data changes only through this interface, and a cache above that sees every change may keep what it has.
    pub decides: bool,
}

/// What to create, for [`FileSystem::mknod`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewNode {
    /// Anything but a directory or a symlink.
    pub kind: Kind,
    /// Permission bits, the umask already applied.
    pub mode: u16,
    /// Device number of a device.
    pub rdev: u32,
}

/// How `rename` treats what is in its way (`renameat2`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RenameMode {
    /// Replace it.
    #[default]
    Replace,
    /// Fail with EEXIST (`RENAME_NOREPLACE`).
    NoReplace,
    /// Swap the two (`RENAME_EXCHANGE`).
    Exchange,
    /// Replace it and leave a whiteout behind: a character device 0:0 (`RENAME_WHITEOUT`).
    Whiteout,
}

/// One entry of a directory. `.` and `..` are not among them; an adapter adds them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntry {
    /// The position of this entry: pass it to go on after it. At least 3, below 2^63, stable while the entry lives.
    pub cookie: u64,
    /// Its name.
    pub name: Name,
    /// Its inode.
    pub ino: Ino,
    /// What the inode is.
    pub kind: Kind,
}

/// A [`DirEntry`] with the attributes of its inode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntryPlus {
    /// The entry.
    pub entry: DirEntry,
    /// Its attributes.
    pub attr: Attr,
}

/// How setxattr treats an attribute that is or is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum XattrMode {
    /// Create or replace.
    #[default]
    Set,
    /// Fail with EEXIST if it is there.
    Create,
    /// Fail with ENODATA if it is not there.
    Replace,
}

/// A POSIX file system.
///
/// Errors are those of the system calls; the table in `docs/semantics.md` lists them per operation. Every method that changes
/// something answers EROFS on a file system that may not change.
pub trait FileSystem: Send + Sync + 'static {
    /// Finds `name` in `parent`. ENOENT, ENOTDIR.
    fn lookup(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<Attr>;
    /// The parent of a directory; the root is its own.
    fn parent(&self, directory: Ino) -> Answer<Ino>;
    /// Attributes of an inode, orphans included. ESTALE if there is none.
    fn getattr(&self, ino: Ino) -> Answer<Attr>;
    /// Changes attributes, all or none. Truncation is a change of `size`; `handle` names the open file if there is one.
    fn setattr(&self, caller: &Caller, ino: Ino, handle: Option<Handle>, change: SetAttr) -> Answer<Attr>;
    /// The target of a symbolic link. EINVAL on anything else.
    fn readlink(&self, ino: Ino) -> Answer<Bytes>;

    /// Creates a directory. `mode` has the umask applied; setgid is inherited.
    fn mkdir(&self, caller: &Caller, parent: Ino, name: &Name, mode: u16) -> Answer<Attr>;
    /// Creates a file, pipe, socket or device.
    fn mknod(&self, caller: &Caller, parent: Ino, name: &Name, node: NewNode) -> Answer<Attr>;
    /// Creates a regular file and opens it. EEXIST if the name is there.
    fn create(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &Name,
        mode: u16,
        flags: OpenFlags,
    ) -> Answer<(Attr, Opened)>;
    /// Creates a symbolic link. ENAMETOOLONG for targets above 4095 bytes, ENOENT for an empty one.
    fn symlink(&self, caller: &Caller, parent: Ino, name: &Name, target: &[u8]) -> Answer<Attr>;
    /// Adds a name to an inode. EPERM for a directory, EMLINK above the limit.
    fn link(&self, caller: &Caller, ino: Ino, parent: Ino, name: &Name) -> Answer<Attr>;
    /// Removes a name of anything but a directory. EISDIR for a directory.
    fn unlink(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<()>;
    /// Removes an empty directory. ENOTEMPTY, ENOTDIR.
    fn rmdir(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<()>;
    /// Moves a name. EINVAL when a directory would move below itself. Two names of one inode: nothing happens.
    /// Replacing a file with one whose bytes are not durable yet waits for them.
    fn rename(&self, caller: &Caller, from: (Ino, &Name), to: (Ino, &Name), mode: RenameMode) -> Answer<()>;
    /// Up to `limit` entries after `cookie` (0: from the start), in cookie order. An empty answer is the end. An entry that is
    /// there during the whole scan is seen exactly once.
    fn readdir(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntry>>;
    /// As [`FileSystem::readdir`], with attributes.
    fn readdir_plus(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntryPlus>>;

    /// Opens a regular file. EISDIR for a directory open for writing.
    fn open(&self, caller: &Caller, ino: Ino, flags: OpenFlags) -> Answer<Opened>;
    /// Up to `length` bytes from `offset`; fewer only at the end of the file.
    fn read(&self, ino: Ino, handle: Handle, offset: u64, length: u32) -> Answer<Bytes>;
    /// Writes all of `data` at `offset` (at the end for `O_APPEND`); returns the count. Clears setuid and setgid unless the caller
    /// is root. EFBIG beyond 2^62.
    fn write(&self, caller: &Caller, ino: Ino, handle: Handle, offset: u64, data: Bytes) -> Answer<u32>;
    /// Called when a descriptor is closed: reports an error of an earlier flush once, starts a flush, does not wait for it.
    fn flush(&self, ino: Ino, handle: Handle) -> Answer<()>;
    /// Returns when the file's bytes and every entry so far are durable at the volume's level. Without a handle the inode may be gone: a
    /// directory that was removed while it was open.
    fn fsync(&self, ino: Ino, handle: Option<Handle>) -> Answer<()>;
    /// Closes an open file. An orphan without further handles is purged.
    fn release(&self, ino: Ino, handle: Handle);

    /// Sets an extended attribute of at most 65,536 bytes. E2BIG above that, EOPNOTSUPP for namespaces that are not supported.
    fn setxattr(
        &self,
        caller: &Caller,
        ino: Ino,
        name: &XattrName,
        value: Bytes,
        mode: XattrMode,
    ) -> Answer<()>;
    /// The value of an extended attribute. ENODATA if it is not there.
    fn getxattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Answer<Bytes>;
    /// The names of the extended attributes, in byte order.
    fn listxattr(&self, caller: &Caller, ino: Ino) -> Answer<Vec<XattrName>>;
    /// Removes an extended attribute. ENODATA if it is not there.
    fn removexattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Answer<()>;

    /// Size and room of the volume.
    fn statfs(&self) -> Answer<StatFs>;
    /// Makes everything durable at the volume's level: dirty data of every file, then the log.
    fn sync_all(&self) -> Answer<()>;
}
