//! Answers on their way back to the kernel: which can fail, which are directories, and chaining one answer to the next.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, sync::Arc};

use fuser::{
    FileType, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
};

use tokio::runtime::Handle as Runtime;

use super::{convert, followed::Watch, kernel::Lifetimes};
use crate::{Answer, Attr, Caller, DirEntry, DirEntryPlus, Errno, FileSystem, Ino};

/// A reply that can be an error.
pub(super) trait Reply: Send + 'static {
    fn fail(self, errno: Errno);
}

macro_rules! replies {
    ($($reply:ident),*) => {
        $(impl Reply for $reply {
            fn fail(self, errno: Errno) {
                self.error(convert::errno(errno));
            }
        })*
    };
}

replies!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyOpen,
    ReplyStatfs,
    ReplyWrite,
    ReplyXattr
);

/// Goes on with the result of `first`, now or when it is there.
pub(super) fn and_then<T: Send + 'static, U: Send + 'static>(
    first: Answer<T>,
    next: impl FnOnce(T) -> Answer<U> + Send + 'static,
) -> Answer<U> {
    match first {
        Answer::Now(Ok(value)) => next(value),
        Answer::Now(Err(errno)) => Answer::Now(Err(errno)),
        Answer::Later(future) => Answer::later(async move { next(future.await?).wait().await }),
    }
}

/// Looks up a name; `.` and `..` come from file handles whose path the kernel does not know (EXPORT_SUPPORT).
pub(super) fn find(
    fs: &Arc<dyn FileSystem>,
    caller: Caller,
    parent: Ino,
    wanted: &OsStr,
) -> Result<Answer<Attr>, Errno> {
    match wanted.as_bytes() {
        b"." => Ok(fs.getattr(parent)),
        b".." => {
            let later = Arc::clone(fs);
            Ok(and_then(fs.parent(parent), move |parent| later.getattr(parent)))
        }
        _ => Ok(fs.lookup(&caller, parent, &convert::name(wanted)?)),
    }
}

/// Replies with an extended attribute or a list of them: the size if `room` is 0, ERANGE if it does not fit.
pub(super) fn sized(reply: ReplyXattr, value: &[u8], room: u32) {
    match u32::try_from(value.len()) {
        Ok(size) if room == 0 => reply.size(size),
        Ok(size) if size <= room => reply.data(value),
        _ => reply.fail(Errno::ERANGE),
    }
}

/// Part of a directory, as it comes from the file system.
pub(super) struct Batch<E> {
    /// The directory's parent, if the part begins before `..`.
    parent: Option<Ino>,
    entries: Vec<E>,
}

/// What a directory reply made of a batch.
pub(super) enum Filled {
    /// The reply is complete: it is full, or the directory has no more entries.
    Complete,
    /// There is room: go on after this cookie.
    RoomAfter(u64),
}

/// READDIR and READDIRPLUS, which differ in their entries only.
pub(super) trait DirectoryReply: Reply {
    type Entry: Send + 'static;

    fn entries(fs: &dyn FileSystem, directory: Ino, cookie: u64) -> Answer<Vec<Self::Entry>>;
    fn cookie(entry: &Self::Entry) -> u64;
    /// Adds an entry; true if there was no room for it.
    fn add_entry(&mut self, directory: Ino, entry: &Self::Entry, watch: &mut Watch) -> bool;
    /// Adds `.` or `..`; true if there was no room for it.
    fn add_dot(&mut self, ino: Ino, cookie: u64, name: &OsStr) -> bool;
    fn send(self);
}

/// The entries after `cookie`, `..` included where it is among them.
pub(super) fn batch<R: DirectoryReply>(
    fs: &Arc<dyn FileSystem>,
    directory: Ino,
    cookie: u64,
) -> Answer<Batch<R::Entry>> {
    if cookie >= DOT_DOT_COOKIE {
        let start = if cookie == DOT_DOT_COOKIE { 0 } else { cookie };
        return and_then(R::entries(&**fs, directory, start), |entries| {
            Answer::Now(Ok(Batch { parent: None, entries }))
        });
    }
    let later = Arc::clone(fs);
    and_then(fs.parent(directory), move |parent| {
        and_then(R::entries(&*later, directory, 0), move |entries| {
            Answer::Now(Ok(Batch { parent: Some(parent), entries }))
        })
    })
}

/// Puts a batch that follows `cookie` into the reply.
pub(super) fn fill<R: DirectoryReply>(
    reply: &mut R,
    directory: Ino,
    cookie: u64,
    batch: &Batch<R::Entry>,
    watch: &mut Watch,
) -> Filled {
    if let Some(parent) = batch.parent {
        let full = cookie < DOT_COOKIE && reply.add_dot(directory, DOT_COOKIE, OsStr::new("."));
        if full || reply.add_dot(parent, DOT_DOT_COOKIE, OsStr::new("..")) {
            return Filled::Complete;
        }
    }
    for entry in &batch.entries {
        if reply.add_entry(directory, entry, watch) {
            return Filled::Complete;
        }
    }
    match batch.entries.last() {
        Some(last) => Filled::RoomAfter(R::cookie(last)),
        None => Filled::Complete,
    }
}

/// Sends a listing, once the kernel may have the attributes in it.
pub(super) fn send_listing<R: DirectoryReply>(
    reply: R,
    directory: Ino,
    mut watch: Watch,
    fs: Arc<dyn FileSystem>,
    runtime: &Runtime,
) {
    let held = watch.held();
    if held.is_empty() {
        watch.listed(directory);
        return reply.send();
    }
    runtime.spawn(async move {
        watch.settle(&fs, &held).await;
        watch.listed(directory);
        reply.send();
    });
}

pub(super) fn send_entry(reply: ReplyEntry, attr: &Attr, lifetimes: &Lifetimes) {
    let generation = convert::generation(attr);
    reply.entry_with_ttls(&lifetimes.attr, &lifetimes.entry, &convert::file_attr(attr), generation);
}

impl DirectoryReply for ReplyDirectory {
    type Entry = DirEntry;

    fn entries(fs: &dyn FileSystem, directory: Ino, cookie: u64) -> Answer<Vec<DirEntry>> {
        fs.readdir(directory, cookie, BATCH_ENTRIES)
    }

    fn cookie(entry: &DirEntry) -> u64 {
        entry.cookie
    }

    fn add_entry(&mut self, _: Ino, entry: &DirEntry, _: &mut Watch) -> bool {
        let name = OsStr::from_bytes(entry.name.as_bytes());
        self.add(INodeNo(entry.ino.get()), entry.cookie, convert::file_type(entry.kind), name)
    }

    fn add_dot(&mut self, ino: Ino, cookie: u64, name: &OsStr) -> bool {
        self.add(INodeNo(ino.get()), cookie, FileType::Directory, name)
    }

    fn send(self) {
        self.ok();
    }
}

impl DirectoryReply for ReplyDirectoryPlus {
    type Entry = DirEntryPlus;

    fn entries(fs: &dyn FileSystem, directory: Ino, cookie: u64) -> Answer<Vec<DirEntryPlus>> {
        fs.readdir_plus(directory, cookie, BATCH_ENTRIES_PLUS)
    }

    fn cookie(entry: &DirEntryPlus) -> u64 {
        entry.entry.cookie
    }

    fn add_entry(
        &mut self,
        parent: Ino,
        DirEntryPlus { entry, attr }: &DirEntryPlus,
        watch: &mut Watch,
    ) -> bool {
        let name = OsStr::from_bytes(entry.name.as_bytes());
        let lifetime = watch.lifetimes(parent, Some(entry.ino)).entry_and_attr();
        watch.hold_for(attr);
        let generation = convert::generation(attr);
        let (ino, attr) = (INodeNo(entry.ino.get()), convert::file_attr(attr));
        self.add(ino, entry.cookie, name, &lifetime, &attr, generation)
    }

    /// The kernel makes no inode of `.` and `..`: it looks at their number and kind only.
    fn add_dot(&mut self, ino: Ino, cookie: u64, name: &OsStr) -> bool {
        let attr = convert::bare_attr(ino.get(), FileType::Directory);
        self.add(INodeNo(ino.get()), cookie, name, &Lifetimes::NONE.entry, &attr, Generation(0))
    }

    fn send(self) {
        self.ok();
    }
}

/// The positions after `.` and `..`; those of entries are higher.
const DOT_COOKIE: u64 = 1;
const DOT_DOT_COOKIE: u64 = 2;

/// Entries asked for at once. fuser does not say how much room a reply has (4 KiB, or the caller's buffer on newer kernels), so a
/// reply is filled batch by batch; these fill 4 KiB with names of about 15 bytes.
const BATCH_ENTRIES: usize = 96;
const BATCH_ENTRIES_PLUS: usize = 24;
