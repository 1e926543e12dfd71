//! Attributes of an inode, as `stat` shows them, and requests to change them.
//!
//! Invariants:
//! - A [`Timespec`] has fewer than 10^9 nanoseconds and seconds within [`Timespec::MIN`] and [`Timespec::MAX`], the range that a
//!   row can hold.

use murphy_log::LogTime;

use crate::Ino;

/// What an inode is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Kind {
    /// A regular file.
    File = 1,
    /// A directory.
    Directory = 2,
    /// A symbolic link.
    Symlink = 3,
    /// A named pipe.
    Fifo = 4,
    /// A socket.
    Socket = 5,
    /// A character device.
    CharDevice = 6,
    /// A block device.
    BlockDevice = 7,
}

impl Kind {
    /// The kind with this number in a row.
    pub const fn from_number(number: u8) -> Option<Kind> {
        Some(match number {
            1 => Kind::File,
            2 => Kind::Directory,
            3 => Kind::Symlink,
            4 => Kind::Fifo,
            5 => Kind::Socket,
            6 => Kind::CharDevice,
            7 => Kind::BlockDevice,
            _ => return None,
        })
    }

    /// The type bits of `st_mode`.
    pub const fn mode_bits(self) -> u32 {
        match self {
            Kind::File => libc::S_IFREG,
            Kind::Directory => libc::S_IFDIR,
            Kind::Symlink => libc::S_IFLNK,
            Kind::Fifo => libc::S_IFIFO,
            Kind::Socket => libc::S_IFSOCK,
            Kind::CharDevice => libc::S_IFCHR,
            Kind::BlockDevice => libc::S_IFBLK,
        }
    }

    /// The kind that the type bits of `st_mode` name.
    pub const fn from_mode(mode: u32) -> Option<Kind> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFREG => Kind::File,
            libc::S_IFDIR => Kind::Directory,
            libc::S_IFLNK => Kind::Symlink,
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFCHR => Kind::CharDevice,
            libc::S_IFBLK => Kind::BlockDevice,
            _ => return None,
        })
    }
}

/// A time of a file: seconds and nanoseconds since the Unix epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Timespec {
    /// Seconds; negative before 1970.
    pub seconds: i64,
    /// Nanoseconds after the second, below 10^9.
    pub nanos: u32,
}

impl Timespec {
    /// The earliest time that a row can hold (about 15,000 years before 1970).
    pub const MIN: Timespec = Timespec { seconds: -(1 << 39), nanos: 0 };
    /// The latest time that a row can hold.
    pub const MAX: Timespec = Timespec { seconds: (1 << 39) - 1, nanos: 999_999_999 };

    /// The nearest time that a row can hold, as the kernel clamps times to a file system's range.
    #[must_use]
    pub fn clamped(self) -> Timespec {
        self.clamp(Timespec::MIN, Timespec::MAX)
    }
}

impl From<LogTime> for Timespec {
    fn from(time: LogTime) -> Timespec {
        let nanos = time.as_nanos();
        Timespec { seconds: (nanos / 1_000_000_000).cast_signed(), nanos: (nanos % 1_000_000_000) as u32 }
    }
}

/// What `stat` shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attr {
    /// The inode.
    pub ino: Ino,
    /// Which life of the number this is (for NFS handles): the epoch number in which the inode was born.
    pub generation: u32,
    /// What it is.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky: `0o7777` at most.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device.
    pub rdev: u32,
    /// Number of names; 0 for an orphan. For a directory 2 plus its subdirectories.
    pub nlink: u32,
    /// Length in bytes; of a symlink its target's, of a directory [`DIRECTORY_BYTES`] for each entry.
    pub size: u64,
    /// Allocated units of 512 bytes; holes take none.
    pub blocks: u64,
    /// Last read. Moved by `utimens` and by mounts that ask for it, not by every read (`noatime`).
    pub atime: Timespec,
    /// Last change of the contents.
    pub mtime: Timespec,
    /// Last change of the inode.
    pub ctime: Timespec,
}

/// Which attributes to change; `None` leaves one as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SetAttr {
    /// New permission bits (`0o7777` at most).
    pub mode: Option<u16>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New length: cut off, or extended with a hole.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SetTime>,
    /// New modification time.
    pub mtime: Option<SetTime>,
}

/// How to set a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SetTime {
    /// To the time of the operation; allowed to whoever may write.
    Now,
    /// To this time; allowed to the owner.
    At(Timespec),
}

/// The size and room of a file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StatFs {
    /// Inodes in use.
    pub inodes: u64,
    /// Bytes allocated to file data.
    pub bytes: u64,
}

/// How long each entry of a directory makes its `st_size`.
pub const DIRECTORY_BYTES: u64 = 32;
