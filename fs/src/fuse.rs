//! The way in through the kernel: each request is converted, handed to [`FileSystem`], and answered.
//!
//! Invariants:
//! - No rule of the file system lives here: what a request means is decided below.
//! - Every request is answered exactly once. A panic below is EIO, an answer that takes longer than the limit too.
//! - A FUSE thread never waits: what cannot be answered at once goes on on the tokio runtime, with the owned reply.
//! - The kernel's node id is the inode number; nothing is kept per inode, so FORGET has nothing to do.
//!
//! What is not passed on, and what the kernel does instead:
//!
//! | request | answer | then the kernel |
//! |---|---|---|
//! | OPENDIR | ENOSYS | opens directories itself from now on, and caches their listings |
//! | COPY_FILE_RANGE | ENOSYS | copies through the page cache |
//! | FALLOCATE | ENOSYS | answers EOPNOTSUPP; `posix_fallocate` writes instead |
//! | LSEEK | ENOSYS | sees every file as one piece of data with a hole at its end |
//! | IOCTL | ENOSYS | answers ENOTTY |
//! | POLL | ENOSYS | reports every file as ready |
//! | BMAP | ENOSYS | answers EINVAL |
//! | TMPFILE, STATX, SYNCFS | ENOSYS from fuser | `O_TMPFILE` fails with EOPNOTSUPP, statx shows no birth time, syncfs does nothing |
//! | INTERRUPT | ENOSYS from fuser | waits for the answer, which comes within the limit |
//! | ACCESS | never sent | checks with `default_permissions` |
//! | GETLK, SETLK, SETLKW | never sent | keeps locks itself, for this mount |

mod convert;
mod count;
mod followed;
mod growth;
mod held;
mod invalidate;
mod kernel;
mod lane;
mod mount;
mod mount_table;
mod notify;
mod options;
mod reply;
mod session;

#[cfg(test)]
mod memory;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsStr,
    future::Future,
    io,
    os::unix::ffi::OsStrExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, FileType, Generation, INodeNo, IoctlFlags, KernelConfig,
    LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyBmap,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle as Runtime;

use self::{
    convert::{caller, handle, ino, name, xattr_name},
    followed::{Followed, Watch},
    held::Held,
    reply::{DirectoryReply, Filled, Reply, send_entry},
};
pub use self::{
    count::{RequestCounters, RequestCounts, RequestKind},
    invalidate::{InvalidationStats, Invalidator},
    kernel::{Lifetimes, kernel_config},
    mount::{Mount, NODE_XATTR},
    mount_table::{MountError, detach_below},
    notify::Notifier,
    options::MountOptions,
    session::{Session, UnmountError, try_mount},
};
use crate::{Answer, Attr, Errno, FileSystem, Ino, OpenFlags as Flags, StatFs};

/// The adapter: a fuser file system on top of [`FileSystem`].
struct Fuse {
    fs: Arc<dyn FileSystem>,
    held: Arc<Held>,
    lifetimes: Arc<ArcSwap<Lifetimes>>,
    counters: Arc<RequestCounters>,
    runtime: Runtime,
    io_timeout: Duration,
    /// The value of [`NODE_XATTR`].
    node: Option<Bytes>,
    /// What a followed source changes, if the file system is a volume that may follow one.
    followed: Option<Arc<Followed>>,
}

impl Fuse {
    /// Begins a request whose answer the kernel may keep.
    fn watch(&self) -> Watch {
        Watch::begin(self.followed.as_ref(), **self.lifetimes.load())
    }

    fn lifetimes(&self) -> Lifetimes {
        self.watch().asked()
    }

    /// Calls the file system and answers with `finish`, or with the error.
    fn run<R: Reply, T: Send + 'static>(
        &self,
        kind: RequestKind,
        reply: R,
        call: impl FnOnce(&Arc<dyn FileSystem>) -> Result<Answer<T>, Errno>,
        finish: impl FnOnce(R, T) + Send + 'static,
    ) {
        self.run_result(kind, reply, call, move |reply, result| match result {
            Ok(value) => finish(reply, value),
            Err(errno) => reply.fail(errno),
        });
    }

    /// As [`Fuse::run`], with `finish` also deciding what an error means.
    fn run_result<R: Reply, T: Send + 'static>(
        &self,
        kind: RequestKind,
        reply: R,
        call: impl FnOnce(&Arc<dyn FileSystem>) -> Result<Answer<T>, Errno>,
        finish: impl FnOnce(R, Result<T, Errno>) + Send + 'static,
    ) {
        self.guard(kind, move || match call(&self.fs) {
            Err(errno) => finish(reply, Err(errno)),
            Ok(Answer::Now(result)) => finish(reply, result),
            Ok(Answer::Later(future)) => self.finish_later(kind, future, move |result| finish(reply, result)),
        });
    }

    /// Counts a request and survives its panic: a reply that is dropped unsent is answered with EIO.
    fn guard(&self, kind: RequestKind, request: impl FnOnce()) {
        self.counters.add(kind);
        if catch_unwind(AssertUnwindSafe(request)).is_err() {
            tracing::error!(request = kind.name(), "a request panicked and was answered with EIO");
        }
    }

    fn finish_later<T: Send + 'static>(
        &self,
        kind: RequestKind,
        future: Pin<Box<dyn Future<Output = Result<T, Errno>> + Send>>,
        finish: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        let limit = self.io_timeout;
        self.runtime.spawn(async move {
            finish(tokio::time::timeout(limit, future).await.unwrap_or_else(|_| {
                let seconds = limit.as_secs_f64();
                tracing::error!(
                    request = kind.name(),
                    seconds,
                    "no answer in time; it was answered with EIO"
                );
                Err(Errno::EIO)
            }));
        });
    }

    /// Answers with the attributes of an inode, once the kernel may have them.
    fn run_attr<R: Reply>(
        &self,
        kind: RequestKind,
        reply: R,
        call: impl FnOnce(&Arc<dyn FileSystem>) -> Result<Answer<Attr>, Errno>,
        finish: impl FnOnce(R, &Watch, Result<Attr, Errno>) + Send + 'static,
    ) {
        let (watch, runtime, fs) = (self.watch(), self.runtime.clone(), Arc::clone(&self.fs));
        self.run_result(kind, reply, call, move |reply, result| match result {
            Ok(attr) if !watch.is_settled(&attr) => {
                runtime.spawn(async move {
                    watch.settle(&fs, &[attr]).await;
                    finish(reply, &watch, Ok(attr));
                });
            }
            result => finish(reply, &watch, result),
        });
    }

    /// Fills a listing batch by batch while answers come at once; one that comes later is sent as far as it goes.
    fn list<R: DirectoryReply>(&self, kind: RequestKind, directory: Ino, offset: u64, mut reply: R) {
        self.guard(kind, move || {
            let (mut watch, mut cookie, mut any) = (self.watch(), offset, false);
            let (runtime, fs) = (self.runtime.clone(), Arc::clone(&self.fs));
            let send =
                move |reply: R, watch: Watch| reply::send_listing(reply, directory, watch, fs, &runtime);
            loop {
                match reply::batch::<R>(&self.fs, directory, cookie) {
                    Answer::Now(Ok(batch)) => {
                        match reply::fill(&mut reply, directory, cookie, &batch, &mut watch) {
                            Filled::RoomAfter(last) => (cookie, any) = (last, true),
                            Filled::Complete => return send(reply, watch),
                        }
                    }
                    _ if any => return send(reply, watch),
                    Answer::Now(Err(errno)) => return reply.fail(errno),
                    Answer::Later(future) => {
                        return self.finish_later(kind, future, move |result| match result {
                            Err(errno) => reply.fail(errno),
                            Ok(batch) => {
                                reply::fill(&mut reply, directory, cookie, &batch, &mut watch);
                                send(reply, watch);
                            }
                        });
                    }
                }
            }
        });
    }

    /// Answers with a new or found name.
    fn run_entry(
        &self,
        kind: RequestKind,
        reply: ReplyEntry,
        call: impl FnOnce(&Arc<dyn FileSystem>) -> Result<Answer<Attr>, Errno>,
    ) {
        let lifetimes = self.lifetimes();
        self.run(kind, reply, call, move |reply, attr| send_entry(reply, &attr, &lifetimes));
    }

    fn run_empty(
        &self,
        kind: RequestKind,
        reply: ReplyEmpty,
        call: impl FnOnce(&Arc<dyn FileSystem>) -> Result<Answer<()>, Errno>,
    ) {
        self.run(kind, reply, call, |reply, ()| reply.ok());
    }

    fn unsupported(&self) -> fuser::Errno {
        self.counters.add(RequestKind::Unsupported);
        fuser::Errno::ENOSYS
    }
}

impl fuser::Filesystem for Fuse {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let Some(followed) = &self.followed else { return kernel_config(config) };
        followed.allow_bypass(kernel::follower_config(config)?);
        Ok(())
    }

    /// A missing name is answered as inode 0, which the kernel may remember too.
    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (caller, parent) = (caller(req), ino(parent));
        let call = |fs: &Arc<dyn FileSystem>| reply::find(fs, caller, parent, name);
        self.run_attr(RequestKind::Lookup, reply, call, move |reply, watch, result| match result {
            Ok(attr) => send_entry(reply, &attr, &watch.lifetimes(parent, Some(attr.ino))),
            Err(Errno::ENOENT) => {
                let missing = convert::bare_attr(0, FileType::RegularFile);
                let lifetime = watch.lifetimes(parent, None).missing;
                reply.entry_with_ttls(&Duration::ZERO, &lifetime, &missing, Generation(0));
            }
            Err(errno) => reply.fail(errno),
        });
    }

    fn forget(&self, _: &Request, _: INodeNo, _: u64) {
        self.counters.add(RequestKind::Forget);
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let call = |fs: &Arc<dyn FileSystem>| Ok(fs.getattr(ino(node)));
        self.run_attr(RequestKind::Getattr, reply, call, |reply: ReplyAttr, watch, result| match result {
            Ok(attr) => reply.attr(&watch.asked().attr, &convert::file_attr(&attr)),
            Err(errno) => reply.fail(errno),
        });
    }

    fn setattr(
        &self,
        req: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        fh: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let lifetime = self.lifetimes().attr;
        let change = convert::set_attr(&convert::AskedAttr { mode, uid, gid, size, atime, mtime });
        let call = |fs: &Arc<dyn FileSystem>| Ok(fs.setattr(&caller(req), ino(node), fh.map(handle), change));
        let finish = move |reply: ReplyAttr, attr| reply.attr(&lifetime, &convert::file_attr(&attr));
        self.run(RequestKind::Setattr, reply, call, finish);
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        let finish = |reply: ReplyData, target: Bytes| reply.data(&target);
        self.run(RequestKind::Readlink, reply, |fs| Ok(fs.readlink(ino(node))), finish);
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        new: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        self.run_entry(RequestKind::Mknod, reply, |fs| {
            Ok(fs.mknod(&caller(req), ino(parent), &name(new)?, convert::new_node(mode, rdev)?))
        });
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, new: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        self.run_entry(RequestKind::Mkdir, reply, |fs| {
            Ok(fs.mkdir(&caller(req), ino(parent), &name(new)?, convert::permissions(mode)))
        });
    }

    fn symlink(&self, req: &Request, parent: INodeNo, new: &OsStr, target: &Path, reply: ReplyEntry) {
        self.run_entry(RequestKind::Symlink, reply, |fs| {
            Ok(fs.symlink(&caller(req), ino(parent), &name(new)?, target.as_os_str().as_bytes()))
        });
    }

    fn link(&self, req: &Request, node: INodeNo, parent: INodeNo, new: &OsStr, reply: ReplyEntry) {
        self.run_entry(RequestKind::Link, reply, |fs| {
            Ok(fs.link(&caller(req), ino(node), ino(parent), &name(new)?))
        });
    }

    fn unlink(&self, req: &Request, parent: INodeNo, old: &OsStr, reply: ReplyEmpty) {
        self.run_empty(RequestKind::Unlink, reply, |fs| {
            Ok(fs.unlink(&caller(req), ino(parent), &name(old)?))
        });
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, old: &OsStr, reply: ReplyEmpty) {
        self.run_empty(RequestKind::Rmdir, reply, |fs| Ok(fs.rmdir(&caller(req), ino(parent), &name(old)?)));
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        old: &OsStr,
        new_parent: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.run_empty(RequestKind::Rename, reply, |fs| {
            let (from, to) = (name(old)?, name(new)?);
            let (from, to) = ((ino(parent), &from), (ino(new_parent), &to));
            Ok(fs.rename(&caller(req), from, to, convert::rename_mode(flags)?))
        });
    }

    /// If the name is there although the kernel believed it was not, and `O_EXCL` is not given, ESTALE makes the kernel look it
    /// up again and open it with all checks.
    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        new: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (watch, open, fs) = (self.watch(), convert::open_flags(flags), Arc::clone(&self.fs));
        let (lifetime, held) = (watch.asked().entry_and_attr(), Arc::clone(&self.held));
        let call = |fs: &Arc<dyn FileSystem>| {
            Ok(fs.create(&caller(req), ino(parent), &name(new)?, convert::permissions(mode), open))
        };
        self.run_result(RequestKind::Create, reply, call, move |reply: ReplyCreate, result| match result {
            Ok((attr, opened)) => {
                held.opened(attr.ino, opened.handle);
                let flags = convert::opened_flags(open, watch.opened(&fs, attr.ino, open, opened));
                let (attr, generation) = (convert::file_attr(&attr), convert::generation(&attr));
                reply.created(&lifetime, &attr, generation, FileHandle(opened.handle.0), flags);
            }
            Err(Errno::EEXIST) if flags & libc::O_EXCL == 0 => reply.fail(Errno::ESTALE),
            Err(errno) => reply.fail(errno),
        });
    }

    fn open(&self, req: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (watch, fs, held) = (self.watch(), Arc::clone(&self.fs), Arc::clone(&self.held));
        let flags: Flags = convert::open_flags(flags.0);
        let call = |fs: &Arc<dyn FileSystem>| Ok(fs.open(&caller(req), ino(node), flags));
        self.run(RequestKind::Open, reply, call, move |reply: ReplyOpen, opened| {
            held.opened(ino(node), opened.handle);
            let answer = convert::opened_flags(flags, watch.opened(&fs, ino(node), flags, opened));
            reply.opened(FileHandle(opened.handle.0), answer);
        });
    }

    fn read(
        &self,
        _: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let finish = |reply: ReplyData, data: Bytes| reply.data(&data);
        self.run(RequestKind::Read, reply, |fs| Ok(fs.read(ino(node), handle(fh), offset, size)), finish);
    }

    /// Pages of a mapping (WRITE_CACHE) come with any handle that may write, and with the credentials of nobody in particular.
    fn write(
        &self,
        req: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let call = |fs: &Arc<dyn FileSystem>| {
            Ok(fs.write(&caller(req), ino(node), handle(fh), offset, Bytes::copy_from_slice(data)))
        };
        self.run(RequestKind::Write, reply, call, |reply: ReplyWrite, count| reply.written(count));
    }

    fn flush(&self, _: &Request, node: INodeNo, fh: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.run_empty(RequestKind::Flush, reply, |fs| Ok(fs.flush(ino(node), handle(fh))));
    }

    fn fsync(&self, _: &Request, node: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.run_empty(RequestKind::Fsync, reply, |fs| Ok(fs.fsync(ino(node), Some(handle(fh)))));
    }

    fn release(
        &self,
        _: &Request,
        node: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Some(followed) = &self.followed {
            followed.growth.closed(ino(node), handle(fh));
        }
        self.held.released(handle(fh));
        self.run_empty(RequestKind::Release, reply, |fs| {
            fs.release(ino(node), handle(fh));
            Ok(Answer::Now(Ok(())))
        });
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.counters.add(RequestKind::Opendir);
        reply.fail(Errno::ENOSYS);
    }

    fn readdir(&self, _: &Request, node: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.list(RequestKind::Readdir, ino(node), offset, reply);
    }

    fn readdirplus(&self, _: &Request, node: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        self.list(RequestKind::Readdirplus, ino(node), offset, reply);
    }

    fn fsyncdir(&self, _: &Request, node: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.run_empty(RequestKind::Fsyncdir, reply, |fs| Ok(fs.fsync(ino(node), None)));
    }

    /// The room of an object store is nobody's to know: [`FREE_BYTES`] and [`FREE_INODES`] are shown as free.
    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        self.run(
            RequestKind::Statfs,
            reply,
            |fs| Ok(fs.statfs()),
            |reply: ReplyStatfs, used: StatFs| {
                let block = u64::from(convert::BLOCK_BYTES);
                let (free, files) = (FREE_BYTES / block, used.inodes.saturating_add(FREE_INODES));
                let blocks = used.bytes.div_ceil(block) + free;
                let (size, name_max) = (convert::BLOCK_BYTES, crate::NAME_MAX as u32);
                reply.statfs(blocks, free, free, files, FREE_INODES, size, name_max, size);
            },
        );
    }

    fn setxattr(
        &self,
        req: &Request,
        node: INodeNo,
        key: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.run_empty(RequestKind::Setxattr, reply, |fs| {
            let (key, mode) = (xattr_name(key)?, convert::xattr_mode(flags)?);
            Ok(fs.setxattr(&caller(req), ino(node), &key, Bytes::copy_from_slice(value), mode))
        });
    }

    fn getxattr(&self, req: &Request, node: INodeNo, key: &OsStr, size: u32, reply: ReplyXattr) {
        if let Some(directory) = &self.node
            && node == INodeNo::ROOT
            && key.as_bytes() == NODE_XATTR.as_bytes()
        {
            return reply::sized(reply, directory, size);
        }
        let call = |fs: &Arc<dyn FileSystem>| Ok(fs.getxattr(&caller(req), ino(node), &xattr_name(key)?));
        self.run(RequestKind::Getxattr, reply, call, move |reply, value| reply::sized(reply, &value, size));
    }

    fn listxattr(&self, req: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let call = |fs: &Arc<dyn FileSystem>| Ok(fs.listxattr(&caller(req), ino(node)));
        self.run(RequestKind::Listxattr, reply, call, move |reply, names| {
            reply::sized(reply, &convert::xattr_list(&names), size);
        });
    }

    fn removexattr(&self, req: &Request, node: INodeNo, key: &OsStr, reply: ReplyEmpty) {
        self.run_empty(RequestKind::Removexattr, reply, |fs| {
            Ok(fs.removexattr(&caller(req), ino(node), &xattr_name(key)?))
        });
    }

    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(self.unsupported());
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(self.unsupported());
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(self.unsupported());
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(self.unsupported());
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(self.unsupported());
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(self.unsupported());
    }
}

/// Shown as free: a pebibyte, and 2^40 inodes.
const FREE_BYTES: u64 = 1 << 50;
const FREE_INODES: u64 = 1 << 40;
