//! Creating inodes: files, directories, symlinks, pipes, sockets, devices.

use bytes::Bytes;

use super::{Draft, EntryKind, Operation, Refusal, names::PlacedName};
use crate::{Attr, Cookie, DirectoryRow, Errno, Ino, InodeRow, Kind, NewNode, RowKey, SymlinkRow};

/// Creates anything but a directory or a symlink.
#[derive(Clone, Debug)]
pub(crate) struct MakeNode {
    pub(crate) parent: Ino,
    pub(crate) name: PlacedName,
    pub(crate) node: NewNode,
}

impl Operation for MakeNode {
    type Reply = Attr;
    const KIND: EntryKind = EntryKind::Mknod;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Attr, Refusal> {
        let NewNode { kind, mode, rdev } = self.node;
        if matches!(kind, Kind::Directory | Kind::Symlink) {
            return Err(Errno::EINVAL.into());
        }
        let rdev = if matches!(kind, Kind::CharDevice | Kind::BlockDevice) { rdev } else { 0 };
        let new = NewInode { kind, mode, rdev, size: 0 };
        new.born(draft, self.parent, &self.name).map(|(ino, row)| row.attr(ino, None))
    }

    fn foreseen(&self) -> Option<RowKey> {
        Some(self.name.first_key(self.parent))
    }
}

/// Creates a directory.
#[derive(Clone, Debug)]
pub(crate) struct MakeDirectory {
    pub(crate) parent: Ino,
    pub(crate) name: PlacedName,
    pub(crate) mode: u16,
}

impl Operation for MakeDirectory {
    type Reply = Attr;
    const KIND: EntryKind = EntryKind::Mkdir;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Attr, Refusal> {
        let new = NewInode { kind: Kind::Directory, mode: self.mode & 0o1777, rdev: 0, size: 0 };
        let (ino, row) = new.born(draft, self.parent, &self.name)?;
        let now = draft.now();
        let directory = DirectoryRow { mtime: now, ctime: now, ..DirectoryRow::default() };
        draft.put_newborn(RowKey::directory(ino), directory.encode());
        Ok(row.attr(ino, Some(&directory)))
    }

    fn foreseen(&self) -> Option<RowKey> {
        Some(self.name.first_key(self.parent))
    }
}

/// Creates a symbolic link.
#[derive(Clone, Debug)]
pub(crate) struct MakeSymlink {
    pub(crate) parent: Ino,
    pub(crate) name: PlacedName,
    pub(crate) target: Bytes,
}

impl Operation for MakeSymlink {
    type Reply = Attr;
    const KIND: EntryKind = EntryKind::Symlink;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Attr, Refusal> {
        if self.target.is_empty() {
            return Err(Errno::ENOENT.into());
        }
        if self.target.len() > SYMLINK_MAX {
            return Err(Errno::ENAMETOOLONG.into());
        }
        let new = NewInode { kind: Kind::Symlink, mode: 0o777, rdev: 0, size: self.target.len() as u64 };
        let (ino, row) = new.born(draft, self.parent, &self.name)?;
        draft.mention(self.target.clone());
        draft.put_newborn(RowKey::symlink(ino), SymlinkRow { target: self.target.clone() }.encode());
        Ok(row.attr(ino, None))
    }

    fn foreseen(&self) -> Option<RowKey> {
        Some(self.name.first_key(self.parent))
    }
}

/// An inode about to be created.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewInode {
    pub(crate) kind: Kind,
    pub(crate) mode: u16,
    pub(crate) rdev: u32,
    pub(crate) size: u64,
}

impl NewInode {
    /// Writes the name, the inode and the parent's counters. EEXIST if the name is there.
    fn born(self, draft: &mut Draft<'_>, parent: Ino, name: &PlacedName) -> Result<(Ino, InodeRow), Refusal> {
        draft.directory(parent)?;
        if draft.find_name(parent, name)?.is_some() {
            return Err(Errno::EEXIST.into());
        }
        draft.mention(name.name.to_bytes());
        let ino = draft.newborn();
        let cookie = draft.add_name(parent, name, ino, self.kind)?;
        let row = self.row(draft, parent, cookie)?;
        draft.put_newborn(RowKey::inode(ino), row.encode());
        draft.touch_directory(parent, 1, i32::from(self.kind == Kind::Directory))?;
        draft.count_inode();
        Ok((ino, row))
    }

    /// The row of the new inode. A setgid directory gives its group, and to directories the bit itself.
    pub(crate) fn row(self, draft: &Draft<'_>, parent: Ino, cookie: Cookie) -> Result<InodeRow, Refusal> {
        let above = draft.inode(parent)?;
        let inherits = above.mode & SETGID != 0;
        let mut mode = self.mode & 0o7777;
        if inherits && self.kind == Kind::Directory {
            mode |= SETGID;
        }
        Ok(InodeRow {
            mode,
            uid: draft.caller().uid,
            gid: if inherits { above.gid } else { draft.caller().gid },
            rdev: self.rdev,
            size: self.size,
            generation: draft.epoch(),
            project: above.project,
            parent,
            cookie: cookie.get(),
            ..InodeRow::empty(self.kind, draft.now())
        })
    }
}

const SETGID: u16 = 0o2000;
/// The longest target of a symlink, in bytes.
const SYMLINK_MAX: usize = 4095;
