//! Between the kernel's words, as fuser gives them, and those of [`FileSystem`](crate::FileSystem).
//!
//! Invariants:
//! - Nothing that the kernel sends panics here; what has no meaning is EINVAL.
//! - A time survives the way down and up unchanged, before 1970 too.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use fuser::{
    FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, RenameFlags, Request, TimeOrNow,
};

use super::growth::PageCache;
use crate::{
    Attr, Caller, Errno, Handle, Ino, Kind, Name, NewNode, OpenFlags, RenameMode, SetAttr, SetTime, Timespec,
    XattrMode, XattrName,
};

pub(super) fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

pub(super) fn ino(number: INodeNo) -> Ino {
    Ino::new(number.0)
}

pub(super) fn handle(number: FileHandle) -> Handle {
    Handle(number.0)
}

pub(super) fn name(name: &OsStr) -> Result<Name, Errno> {
    Name::new(Bytes::copy_from_slice(name.as_bytes()))
}

pub(super) fn xattr_name(name: &OsStr) -> Result<XattrName, Errno> {
    XattrName::new(Bytes::copy_from_slice(name.as_bytes()))
}

pub(super) fn errno(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.code())
}

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
    }
}

pub(super) fn generation(attr: &Attr) -> Generation {
    Generation(u64::from(attr.generation))
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino.get()),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// What stands for an inode where only its number and kind are looked at: `.` and `..`, and, with number 0, a missing name.
pub(super) fn bare_attr(number: u64, kind: FileType) -> FileAttr {
    FileAttr {
        ino: INodeNo(number),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

pub(super) fn system_time(time: Timespec) -> SystemTime {
    let time = time.clamped();
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let second = if time.seconds < 0 { UNIX_EPOCH - seconds } else { UNIX_EPOCH + seconds };
    second + Duration::from_nanos(u64::from(time.nanos))
}

/// The time that the kernel sent.
///
/// The kernel means `seconds + nanos`; fuser 0.18 decodes negative seconds as `seconds - nanos`. That is undone here, exactly.
pub(super) fn timespec(sent: SystemTime) -> Timespec {
    let time = match sent.duration_since(UNIX_EPOCH) {
        Ok(after) => Timespec {
            seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nanos: after.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            Timespec {
                seconds: 0_i64.saturating_sub_unsigned(before.as_secs()),
                nanos: before.subsec_nanos(),
            }
        }
    };
    time.clamped()
}

fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(timespec(time)),
    }
}

/// What SETATTR asks for, before conversion.
pub(super) struct AskedAttr {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) atime: Option<TimeOrNow>,
    pub(super) mtime: Option<TimeOrNow>,
}

pub(super) fn set_attr(asked: &AskedAttr) -> SetAttr {
    SetAttr {
        mode: asked.mode.map(permissions),
        uid: asked.uid,
        gid: asked.gid,
        size: asked.size,
        atime: asked.atime.map(set_time),
        mtime: asked.mtime.map(set_time),
    }
}

/// The permission bits of a mode, with setuid, setgid and sticky.
pub(super) fn permissions(mode: u32) -> u16 {
    (mode & 0o7777) as u16
}

pub(super) fn new_node(mode: u32, rdev: u32) -> Result<NewNode, Errno> {
    let kind = if mode & libc::S_IFMT == 0 { Some(Kind::File) } else { Kind::from_mode(mode) };
    match kind {
        None | Some(Kind::Directory | Kind::Symlink) => Err(Errno::EINVAL),
        Some(kind) => Ok(NewNode { kind, mode: permissions(mode), rdev }),
    }
}

/// How a file is opened.
///
/// `append` is never set: the kernel has chosen the offset of each write itself, `O_APPEND` can change after opening, and pages
/// of a mapping come back through handles that were opened with it and must land where they are.
pub(super) fn open_flags(flags: i32) -> OpenFlags {
    let access = flags & libc::O_ACCMODE;
    OpenFlags {
        read: access == libc::O_RDONLY || access == libc::O_RDWR,
        write: access == libc::O_WRONLY || access == libc::O_RDWR,
        append: false,
        truncate: flags & libc::O_TRUNC != 0,
        sync: flags & libc::O_DSYNC != 0,
    }
}

/// What the kernel may do with an open file: skip FLUSH where nothing can be written, keep its pages if they are still true.
pub(super) fn opened_flags(flags: OpenFlags, pages: PageCache) -> FopenFlags {
    let mut answer = FopenFlags::empty();
    answer.set(FopenFlags::FOPEN_NOFLUSH, !flags.write);
    answer.set(FopenFlags::FOPEN_KEEP_CACHE, pages == PageCache::Kept);
    answer.set(FopenFlags::FOPEN_DIRECT_IO, pages == PageCache::Bypassed);
    answer
}

pub(super) fn rename_mode(flags: RenameFlags) -> Result<RenameMode, Errno> {
    if flags.is_empty() {
        Ok(RenameMode::Replace)
    } else if flags == RenameFlags::RENAME_NOREPLACE {
        Ok(RenameMode::NoReplace)
    } else if flags == RenameFlags::RENAME_EXCHANGE {
        Ok(RenameMode::Exchange)
    } else if flags == RenameFlags::RENAME_WHITEOUT {
        Ok(RenameMode::Whiteout)
    } else {
        Err(Errno::EINVAL)
    }
}

pub(super) fn xattr_mode(flags: i32) -> Result<XattrMode, Errno> {
    match flags {
        0 => Ok(XattrMode::Set),
        libc::XATTR_CREATE => Ok(XattrMode::Create),
        libc::XATTR_REPLACE => Ok(XattrMode::Replace),
        _ => Err(Errno::EINVAL),
    }
}

/// The names as `listxattr` returns them, each with a NUL behind it.
pub(super) fn xattr_list(names: &[XattrName]) -> Vec<u8> {
    let mut list = Vec::with_capacity(names.iter().map(|name| name.as_bytes().len() + 1).sum());
    for name in names {
        list.extend_from_slice(name.as_bytes());
        list.push(0);
    }
    list
}

/// The unit of `st_blksize` and `statfs`, in bytes.
pub(super) const BLOCK_BYTES: u32 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// What fuser 0.18 makes of the seconds and nanoseconds of a request.
    fn as_fuser_decodes(seconds: i64, nanos: u32) -> SystemTime {
        if seconds >= 0 {
            UNIX_EPOCH + Duration::new(seconds.unsigned_abs(), nanos)
        } else {
            UNIX_EPOCH - Duration::new(seconds.unsigned_abs(), nanos)
        }
    }

    #[test]
    fn a_time_before_1970_keeps_its_nanoseconds() {
        for (seconds, nanos) in
            [(0, 0), (0, 1), (-1, 500_000_000), (-1, 0), (-86_400, 999_999_999), (1 << 33, 7)]
        {
            let time = Timespec { seconds, nanos };
            assert_eq!(timespec(as_fuser_decodes(seconds, nanos)), time);
        }
        let half_a_second_before = system_time(Timespec { seconds: -1, nanos: 500_000_000 });
        assert_eq!(half_a_second_before, UNIX_EPOCH - Duration::from_millis(500));
    }

    #[test]
    fn a_time_that_no_row_can_hold_is_clamped() {
        assert_eq!(timespec(as_fuser_decodes(i64::MAX, 5)), Timespec::MAX);
        assert_eq!(timespec(as_fuser_decodes(i64::MIN + 1, 5)), Timespec::MIN);
    }

    #[test]
    fn every_kind_survives_the_way_to_the_kernel() {
        for number in 1..=7 {
            let kind = Kind::from_number(number).unwrap();
            let mode = kind.mode_bits();
            assert_eq!(Kind::from_mode(mode), Some(kind));
            let made = new_node(mode | 0o644, 9);
            match kind {
                Kind::Directory | Kind::Symlink => assert_eq!(made, Err(Errno::EINVAL)),
                _ => assert_eq!(made, Ok(NewNode { kind, mode: 0o644, rdev: 9 })),
            }
        }
        assert_eq!(new_node(0o600, 0).map(|node| node.kind), Ok(Kind::File));
        assert_eq!(new_node(0o170_000, 0), Err(Errno::EINVAL));
    }

    #[test]
    fn append_is_left_to_the_kernel() {
        let flags = open_flags(libc::O_WRONLY | libc::O_APPEND | libc::O_TRUNC | libc::O_SYNC);
        let wanted = OpenFlags { read: false, write: true, append: false, truncate: true, sync: true };
        assert_eq!(flags, wanted);
        let none = open_flags(libc::O_ACCMODE);
        assert!(!none.read && !none.write);
    }

    #[test]
    fn only_read_only_opens_skip_flush_and_only_unchanged_data_is_kept() {
        let read = open_flags(libc::O_RDONLY);
        let write = open_flags(libc::O_RDWR);
        assert_eq!(opened_flags(read, PageCache::Fresh), FopenFlags::FOPEN_NOFLUSH);
        assert_eq!(opened_flags(write, PageCache::Kept), FopenFlags::FOPEN_KEEP_CACHE);
        assert_eq!(opened_flags(write, PageCache::Fresh), FopenFlags::empty());
        assert_eq!(opened_flags(write, PageCache::Bypassed), FopenFlags::FOPEN_DIRECT_IO);
    }

    #[test]
    fn unknown_or_combined_flags_are_refused() {
        assert_eq!(rename_mode(RenameFlags::RENAME_WHITEOUT), Ok(RenameMode::Whiteout));
        let both = RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE;
        assert_eq!(rename_mode(both), Err(Errno::EINVAL));
        assert_eq!(rename_mode(RenameFlags::from_bits_retain(1 << 9)), Err(Errno::EINVAL));
        assert_eq!(xattr_mode(libc::XATTR_CREATE), Ok(XattrMode::Create));
        assert_eq!(xattr_mode(3), Err(Errno::EINVAL));
    }

    #[test]
    fn names_that_are_too_long_or_hostile_are_refused() {
        assert_eq!(name(OsStr::from_bytes(&[b'a'; 256])), Err(Errno::ENAMETOOLONG));
        assert_eq!(name(OsStr::new("..")), Err(Errno::EINVAL));
        assert_eq!(xattr_name(OsStr::new("")), Err(Errno::EINVAL));
        let names = [XattrName::new("user.a").unwrap(), XattrName::new("user.b").unwrap()];
        assert_eq!(xattr_list(&names), b"user.a\0user.b\0");
    }
}
