//! The inode row and, for directories, the row that every create in them rewrites.

use bytes::Bytes;

use super::codec::{RowError, RowReader, RowWriter};
use crate::{Attr, DIRECTORY_BYTES, Ino, Kind, Timespec};

/// Everything about an inode that is not bytes, names or attributes of its own table.
///
/// Invariants: a directory's `nlink` is 1, its `mtime` zero and its `size` 0: what `stat` shows of them comes from its
/// [`DirectoryRow`]. `extents` and `allocated` count the extent rows of the inode and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InodeRow {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, `0o7777` at most.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: u32,
    /// Number of names.
    pub nlink: u32,
    /// Length in bytes.
    pub size: u64,
    /// Bytes in its extents.
    pub allocated: u64,
    /// How many extent rows it has.
    pub extents: u64,
    /// Whether it has rows in the xattr table.
    pub has_xattrs: bool,
    /// Whether its purge has begun: only who goes on with that may look at what is left of it. It has no name.
    pub purging: bool,
    /// The number of the epoch it was born in.
    pub generation: u32,
    /// The project that its quota counts for.
    pub project: u32,
    /// The directory that holds one of its names; itself for the root.
    pub parent: Ino,
    /// Where in that directory; 0 for the root and for orphans.
    pub cookie: u64,
    /// Last read.
    pub atime: Timespec,
    /// Last change of the contents; zero in a directory.
    pub mtime: Timespec,
    /// Last change of the inode.
    pub ctime: Timespec,
}

impl InodeRow {
    /// An inode with one name, made at `now`, with nothing in it: root's, with no permission for anybody, not placed in any directory yet.
    pub fn empty(kind: Kind, now: Timespec) -> InodeRow {
        InodeRow {
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
            nlink: 1,
            size: 0,
            allocated: 0,
            extents: 0,
            has_xattrs: false,
            purging: false,
            generation: 1,
            project: 0,
            parent: Ino::ROOT,
            cookie: 0,
            atime: now,
            mtime: if kind == Kind::Directory { Timespec::default() } else { now },
            ctime: now,
        }
    }

    /// The bytes of the row.
    pub fn encode(&self) -> Bytes {
        let mut row = RowWriter::new(VERSION);
        let xattrs = if self.has_xattrs { HAS_XATTRS } else { 0 };
        let purging = if self.purging { PURGING } else { 0 };
        row.byte(self.kind as u8 | xattrs | purging)
            .varint(u64::from(self.mode))
            .varint(u64::from(self.uid))
            .varint(u64::from(self.gid))
            .varint(u64::from(self.nlink))
            .varint(u64::from(self.generation))
            .varint(u64::from(self.project))
            .varint(self.parent.get())
            .fixed(self.cookie);
        match self.kind {
            Kind::File => {
                row.varint(self.size).varint(self.allocated).varint(self.extents);
            }
            Kind::Symlink => {
                row.varint(self.size);
            }
            Kind::CharDevice | Kind::BlockDevice => {
                row.varint(u64::from(self.rdev));
            }
            Kind::Directory | Kind::Fifo | Kind::Socket => {}
        }
        row.time(self.atime).time(self.ctime);
        if self.kind != Kind::Directory {
            row.time(self.mtime);
        }
        row.finish()
    }

    /// The row that `value` is.
    pub fn decode(value: &[u8]) -> Result<InodeRow, RowError> {
        let mut row = RowReader::new(value, VERSION)?;
        let first = row.byte()?;
        let kind = Kind::from_number(first & !(HAS_XATTRS | PURGING)).ok_or(RowError::Field("kind"))?;
        let mode = u16::try_from(row.varint()?).ok().filter(|mode| *mode <= 0o7777);
        let mut inode = InodeRow {
            mode: mode.ok_or(RowError::Field("mode"))?,
            uid: row.varint32("uid")?,
            gid: row.varint32("gid")?,
            nlink: row.varint32("nlink")?,
            has_xattrs: first & HAS_XATTRS != 0,
            purging: first & PURGING != 0,
            generation: row.varint32("generation")?,
            project: row.varint32("project")?,
            parent: Ino::new(row.varint()?),
            cookie: row.fixed()?,
            ..InodeRow::empty(kind, Timespec::default())
        };
        if inode.purging && inode.nlink > 0 {
            return Err(RowError::Field("nlink"));
        }
        match kind {
            Kind::File => {
                inode.size = row.varint()?;
                inode.allocated = row.varint()?;
                inode.extents = row.varint()?;
            }
            Kind::Symlink => inode.size = row.varint()?,
            Kind::CharDevice | Kind::BlockDevice => inode.rdev = row.varint32("rdev")?,
            Kind::Directory | Kind::Fifo | Kind::Socket => {}
        }
        inode.atime = row.time()?;
        inode.ctime = row.time()?;
        if kind != Kind::Directory {
            inode.mtime = row.time()?;
        }
        row.finish()?;
        Ok(inode)
    }

    /// What `stat` shows of the inode `ino`; `directory` is its directory row if it is one.
    pub fn attr(&self, ino: Ino, directory: Option<&DirectoryRow>) -> Attr {
        let mut attr = Attr {
            ino,
            generation: self.generation,
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            nlink: self.nlink,
            size: self.size,
            blocks: self.allocated.div_ceil(512),
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
        };
        if let Some(directory) = directory {
            attr.nlink = if self.nlink == 0 { 0 } else { 2 + directory.subdirectories };
            attr.size = directory.children * DIRECTORY_BYTES;
            attr.mtime = directory.mtime;
            attr.ctime = self.ctime.max(directory.ctime);
        }
        attr
    }
}

/// The counters and times of a directory: the row that each create and remove in it rewrites.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DirectoryRow {
    /// How many names it holds.
    pub children: u64,
    /// How many of them are directories.
    pub subdirectories: u32,
    /// Last change of its entries.
    pub mtime: Timespec,
    /// The same in the inode's sense; the later of this and the inode row's ctime counts.
    pub ctime: Timespec,
}

impl DirectoryRow {
    /// The bytes of the row.
    pub fn encode(&self) -> Bytes {
        RowWriter::new(VERSION)
            .varint(self.children)
            .varint(u64::from(self.subdirectories))
            .time(self.mtime)
            .time(self.ctime)
            .finish()
    }

    /// The row that `value` is.
    pub fn decode(value: &[u8]) -> Result<DirectoryRow, RowError> {
        let mut row = RowReader::new(value, VERSION)?;
        let directory = DirectoryRow {
            children: row.varint()?,
            subdirectories: row.varint32("subdirectories")?,
            mtime: row.time()?,
            ctime: row.time()?,
        };
        row.finish()?;
        Ok(directory)
    }
}

const VERSION: u8 = 0;
const HAS_XATTRS: u8 = 0x80;
const PURGING: u8 = 0x40;
