//! System calls into a real directory, as somebody.

use std::{
    ffi::CString,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use murphy_fs::{Kind, RenameMode, XattrMode};
use rustix::{
    fs::{
        AtFlags, CWD, Gid, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
    },
    io::Errno,
};

use super::{Call, Calls, Failed, How, NOWHERE, Reply, Spot, attribute, owner, pattern};
use crate::Who;

/// A directory of the machine in which programs run.
pub struct RealDirectory {
    name: &'static str,
    root: PathBuf,
    open: Vec<OwnedFd>,
}

impl RealDirectory {
    /// The directory `root`, which people know as `name`. Everybody may write in it.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn new(name: &'static str, root: &Path) -> std::io::Result<RealDirectory> {
        std::fs::create_dir(root)?;
        rustix::fs::chmod(root, Mode::from_raw_mode(0o777))?;
        Ok(RealDirectory { name, root: root.to_owned(), open: Vec::new() })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn directory(&self, at: &Spot) -> PathBuf {
        at.directory()
            .iter()
            .fold(self.root.clone(), |path, name| path.join(std::ffi::OsStr::from_bytes(name)))
    }

    fn path(&self, at: &Spot) -> PathBuf {
        self.directory(at).join(std::ffi::OsStr::from_bytes(&at.name()))
    }

    fn file(&self, number: u8) -> Result<BorrowedFd<'_>, Errno> {
        let at = usize::from(number).checked_rem(self.open.len()).ok_or(Errno::BADF)?;
        Ok(self.open[at].as_fd())
    }

    fn run(&mut self, call: &Call) -> Result<Reply, Errno> {
        match call {
            Call::Open { at, how, mode } => {
                let path = self.path(at);
                let file = rustix::fs::open(&path, flags(how), Mode::from_raw_mode(u32::from(*mode)))?;
                self.open.push(file);
                Ok(Reply::Done)
            }
            Call::Close { file } => {
                let at = usize::from(*file).checked_rem(self.open.len()).ok_or(Errno::BADF)?;
                drop(self.open.remove(at));
                Ok(Reply::Done)
            }
            Call::Read { .. }
            | Call::Write { .. }
            | Call::TruncateOpen { .. }
            | Call::Fsync { .. }
            | Call::StatOpen { .. } => self.on_open(call),
            Call::Setxattr { .. }
            | Call::Getxattr { .. }
            | Call::Listxattr { .. }
            | Call::Removexattr { .. } => self.on_attributes(call),
            _ => self.on_names(call),
        }
    }

    fn on_open(&self, call: &Call) -> Result<Reply, Errno> {
        Ok(match call {
            Call::Read { file, offset, length } => {
                let mut bytes = vec![0; usize::from(*length)];
                let count = rustix::io::pread(self.file(*file)?, &mut bytes[..], *offset)?;
                bytes.truncate(count);
                Reply::Bytes(bytes)
            }
            Call::Write { file, offset, length, seed } => {
                let count = rustix::io::pwrite(self.file(*file)?, &pattern(*length, *seed), *offset)?;
                Reply::Count(count as u64)
            }
            Call::TruncateOpen { file, size } => {
                rustix::fs::ftruncate(self.file(*file)?, *size)?;
                Reply::Done
            }
            Call::Fsync { file } => {
                rustix::fs::fsync(self.file(*file)?)?;
                Reply::Done
            }
            Call::StatOpen { file } => match stat_reply(&rustix::fs::fstat(self.file(*file)?)?) {
                // Said in `docs/semantics.md`: a removed directory has no attributes any more.
                Reply::Stat { kind: Kind::Directory, nlink: 0, .. } => return Err(Errno::STALE),
                reply => reply,
            },
            _ => return Err(Errno::NOSYS),
        })
    }

    fn on_names(&self, call: &Call) -> Result<Reply, Errno> {
        let raw = |mode: &u16| Mode::from_raw_mode(u32::from(*mode));
        match call {
            Call::Mkdir { at, mode } => rustix::fs::mkdir(self.path(at), raw(mode))?,
            Call::Socket { at, mode } => {
                rustix::fs::mknodat(CWD, self.path(at), rustix::fs::FileType::Socket, raw(mode), 0)?;
            }
            Call::Rename { from, to, mode } => {
                let flags = match mode {
                    RenameMode::NoReplace => RenameFlags::NOREPLACE,
                    RenameMode::Exchange => RenameFlags::EXCHANGE,
                    RenameMode::Replace | RenameMode::Whiteout => RenameFlags::empty(),
                };
                rustix::fs::renameat_with(CWD, self.path(from), CWD, self.path(to), flags)?;
            }
            Call::Link { from, to } => {
                rustix::fs::linkat(CWD, self.path(from), CWD, self.path(to), AtFlags::empty())?;
            }
            Call::Symlink { at } => rustix::fs::symlink(NOWHERE, self.path(at))?,
            Call::Unlink { at } => rustix::fs::unlink(self.path(at))?,
            Call::Rmdir { at } => rustix::fs::rmdir(self.path(at))?,
            Call::Truncate { at, size } => truncate(&self.path(at), *size)?,
            Call::Chmod { at, mode } => rustix::fs::chmod(self.path(at), raw(mode))?,
            Call::Chown { at, uid, gid } => {
                let uid = owner(*uid, |who| who.caller().uid).map(Uid::from_raw);
                let gid = owner(*gid, |who| who.caller().gid).map(Gid::from_raw);
                rustix::fs::chownat(CWD, self.path(at), uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            Call::Utimens { at, seconds, nanos } => {
                let omitted = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
                let set = Timespec { tv_sec: *seconds, tv_nsec: i64::from(*nanos) };
                let times = Timestamps { last_access: omitted, last_modification: set };
                rustix::fs::utimensat(CWD, self.path(at), &times, AtFlags::SYMLINK_NOFOLLOW)?;
                let stat = rustix::fs::lstat(self.path(at))?;
                return Ok(Reply::Time { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 });
            }
            Call::Stat { at } => return Ok(stat_reply(&rustix::fs::lstat(self.path(at))?)),
            Call::Readlink { at } => {
                return Ok(Reply::Bytes(rustix::fs::readlink(self.path(at), Vec::new())?.into_bytes()));
            }
            Call::List { at } => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                let directory = rustix::fs::open(self.directory(at), flags, Mode::empty())?;
                let entries = rustix::fs::Dir::new(directory)?;
                let names: Result<Vec<Vec<u8>>, Errno> =
                    entries.map(|entry| entry.map(|entry| entry.file_name().to_bytes().to_vec())).collect();
                let mut names: Vec<_> =
                    names?.into_iter().filter(|name| name != b"." && name != b"..").collect();
                names.sort();
                return Ok(Reply::Names(names));
            }
            _ => return Err(Errno::NOSYS),
        }
        Ok(Reply::Done)
    }

    fn on_attributes(&self, call: &Call) -> Result<Reply, Errno> {
        match call {
            Call::Setxattr { at, name, length, mode } => {
                let flags = match mode {
                    XattrMode::Set => XattrFlags::empty(),
                    XattrMode::Create => XattrFlags::CREATE,
                    XattrMode::Replace => XattrFlags::REPLACE,
                };
                rustix::fs::lsetxattr(self.path(at), attribute(*name), &pattern(*length, *name), flags)?;
                Ok(Reply::Done)
            }
            Call::Getxattr { at, name } => {
                let mut value = vec![0; ATTRIBUTE_BYTES];
                let length = rustix::fs::lgetxattr(self.path(at), attribute(*name), &mut value[..])?;
                value.truncate(length);
                Ok(Reply::Bytes(value))
            }
            Call::Listxattr { at } => {
                let mut list = vec![0; ATTRIBUTE_BYTES];
                let length = rustix::fs::llistxattr(self.path(at), &mut list[..])?;
                list.truncate(length);
                let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
                let mut names: Vec<Vec<u8>> = names.map(<[u8]>::to_vec).collect();
                names.sort();
                Ok(Reply::Names(names))
            }
            Call::Removexattr { at, name } => {
                rustix::fs::lremovexattr(self.path(at), attribute(*name))?;
                Ok(Reply::Done)
            }
            _ => Err(Errno::NOSYS),
        }
    }
}

impl Calls for RealDirectory {
    fn name(&self) -> &'static str {
        self.name
    }

    fn call(&mut self, who: Who, call: &Call) -> Result<Reply, Failed> {
        let _guard = Guise::of(who);
        self.run(call).map_err(|errno| Failed(errno.raw_os_error()))
    }
}

/// This thread is somebody else, for the file system, until it is dropped.
struct Guise;

impl Guise {
    fn of(who: Who) -> Guise {
        let caller = who.caller();
        // SAFETY: these calls change the credentials that this thread alone shows to file systems; they take numbers only.
        unsafe {
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>());
            libc::setfsgid(caller.gid);
            libc::setfsuid(caller.uid);
        }
        Guise
    }
}

impl Drop for Guise {
    fn drop(&mut self) {
        // SAFETY: as above; the thread was root before.
        unsafe {
            libc::setfsuid(0);
            libc::setfsgid(0);
        }
    }
}

/// Gives this thread a file mode mask of its own, which takes nothing away.
///
/// # Panics
/// If the kernel does not let it.
pub fn own_umask() {
    // SAFETY: the call takes a number only; what is unshared is this thread's own view.
    let unshared = unsafe { libc::unshare(libc::CLONE_FS) };
    assert_eq!(unshared, 0, "a thread of root may have a mask of its own");
    rustix::process::umask(Mode::empty());
}

fn flags(how: &How) -> OFlags {
    let mut flags = match (how.read, how.write) {
        (true, true) => OFlags::RDWR,
        (false, true) => OFlags::WRONLY,
        (_, false) => OFlags::RDONLY,
    };
    flags |= OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for (is_set, flag) in [
        (how.append, OFlags::APPEND),
        (how.truncate, OFlags::TRUNC),
        (how.create, OFlags::CREATE),
        (how.exclusive, OFlags::EXCL),
    ] {
        if is_set {
            flags |= flag;
        }
    }
    flags
}

/// `truncate`, which rustix has only for open files.
fn truncate(path: &Path, size: u64) -> Result<(), Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
    // SAFETY: the path is a string that ends with a zero and lives as long as the call.
    let result = unsafe { libc::truncate(path.as_ptr(), size.cast_signed()) };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}

fn stat_reply(stat: &Stat) -> Reply {
    let kind = Kind::from_mode(stat.st_mode).unwrap_or(Kind::Fifo);
    Reply::Stat {
        kind,
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        nlink: stat.st_nlink as u32,
        size: if kind == Kind::Directory { 0 } else { stat.st_size as u64 },
    }
}

const ATTRIBUTE_BYTES: usize = 64 << 10;
