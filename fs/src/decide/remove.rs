//! Removing names and inodes.
//!
//! An inode that loses its last name goes at once if it is closed and small; otherwise it becomes an orphan, and entries of bounded size
//! purge it later. The first of them says that its purge has begun, and from then on it is gone to everybody: who reads it on another
//! node must not take what is purged for holes. Whoever is the source then goes on with a purge that an earlier one began.

use super::{Draft, EntryKind, Operation, Refusal, names::PlacedName};
use crate::{Errno, Extent, ExtentTarget, Ino, InodeRow, Kind, OrphanRow, RowKey, XattrName};

/// What the caller knows of an inode that may lose its last name. It holds the inode's lock.
#[derive(Clone, Debug)]
pub(crate) struct Victim {
    pub(crate) ino: Ino,
    /// Whether somebody has it open.
    pub(crate) open: bool,
    /// The file offsets of its extents, if there are few.
    pub(crate) extents: Option<Vec<u64>>,
}

/// Removes a name of anything but a directory.
#[derive(Clone, Debug)]
pub(crate) struct Unlink {
    pub(crate) parent: Ino,
    pub(crate) name: PlacedName,
    pub(crate) victim: Victim,
}

impl Operation for Unlink {
    /// Whether an orphan is left behind.
    type Reply = Fate;
    const KIND: EntryKind = EntryKind::Unlink;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Fate, Refusal> {
        draft.directory(self.parent)?;
        let found = draft.find_name(self.parent, &self.name)?.ok_or(Errno::ENOENT)?;
        if found.ino != self.victim.ino {
            return Err(Refusal::Stale);
        }
        let row = draft.inode(found.ino)?;
        draft.may_remove(&draft.inode(self.parent)?, &row)?;
        if found.kind == Kind::Directory {
            return Err(Errno::EISDIR.into());
        }
        draft.mention(self.name.name.to_bytes());
        draft.remove_name(self.parent, found.cookie)?;
        draft.touch_directory(self.parent, -1, 0)?;
        draft.drop_link(&self.victim, row, (self.parent, found.cookie))
    }
}

/// What became of an inode that lost a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    /// It has further names.
    Lives,
    /// It is gone.
    Gone,
    /// It is an orphan.
    Orphaned,
}

impl Draft<'_> {
    /// Takes one name from an inode that is not a directory; `row` is its row.
    pub(crate) fn drop_link(
        &mut self,
        victim: &Victim,
        mut row: InodeRow,
        name: (Ino, crate::Cookie),
    ) -> Result<Fate, Refusal> {
        self.forget_link(victim.ino, &mut row, name.0, name.1)?;
        row.nlink -= 1;
        row.ctime = self.now();
        if row.nlink > 0 {
            self.put_inode(victim.ino, &row)?;
            return Ok(Fate::Lives);
        }
        let small = victim.extents.as_ref().filter(|extents| extents.len() as u64 == row.extents);
        if let (false, false, Some(extents)) = (victim.open, row.has_xattrs, small) {
            for extent in self.extents(victim.ino, extents)? {
                self.remove_extent(victim.ino, extent)?;
            }
            self.erase_inode(victim.ino, &row)?;
            return Ok(Fate::Gone);
        }
        row.cookie = 0;
        self.put_inode(victim.ino, &row)?;
        self.put(RowKey::orphan(victim.ino), Some(OrphanRow.encode()))?;
        Ok(Fate::Orphaned)
    }

    /// Removes the rows of an inode that has no extents and no attributes left.
    fn erase_inode(&mut self, ino: Ino, row: &InodeRow) -> Result<(), Refusal> {
        if row.kind == Kind::Symlink {
            self.put(RowKey::symlink(ino), None)?;
        }
        self.put(RowKey::inode(ino), None)?;
        self.uncount_inode();
        Ok(())
    }

    /// Removes a whole extent and gives its bytes back to its pack.
    fn remove_extent(&mut self, ino: Ino, extent: Extent) -> Result<(), Refusal> {
        self.put(RowKey::extent(ino, extent.offset), None)?;
        self.release_bytes(extent.row.target, u64::from(extent.row.length))
    }

    /// Counts `bytes` of a target as not referred to any more.
    pub(crate) fn release_bytes(&mut self, target: ExtentTarget, bytes: u64) -> Result<(), Refusal> {
        self.count_bytes(-bytes.cast_signed());
        if let ExtentTarget::Pack { pack: number, .. } = target {
            let mut pack = self.pack(number)?;
            pack.live_bytes = pack.live_bytes.saturating_sub(bytes);
            self.put(RowKey::pack(number.0), Some(pack.encode()))?;
        }
        Ok(())
    }
}

/// Removes an empty directory.
#[derive(Clone, Debug)]
pub(crate) struct RemoveDirectory {
    pub(crate) parent: Ino,
    pub(crate) name: PlacedName,
}

impl Operation for RemoveDirectory {
    /// The directory that is gone, and whether it left an orphan.
    type Reply = (Ino, Fate);
    const KIND: EntryKind = EntryKind::Rmdir;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(Ino, Fate), Refusal> {
        draft.directory(self.parent)?;
        let found = draft.find_name(self.parent, &self.name)?.ok_or(Errno::ENOENT)?;
        let row = draft.inode(found.ino)?;
        draft.may_remove(&draft.inode(self.parent)?, &row)?;
        if found.kind != Kind::Directory {
            return Err(Errno::ENOTDIR.into());
        }
        if draft.directory(found.ino)?.children > 0 {
            return Err(Errno::ENOTEMPTY.into());
        }
        draft.mention(self.name.name.to_bytes());
        draft.remove_name(self.parent, found.cookie)?;
        draft.touch_directory(self.parent, -1, -1)?;
        let fate = draft.erase_directory(found.ino, row)?;
        Ok((found.ino, fate))
    }
}

impl Draft<'_> {
    /// Removes an empty directory whose name is gone already. One with attributes stays as an orphan until they are purged.
    pub(crate) fn erase_directory(&mut self, ino: Ino, mut row: InodeRow) -> Result<Fate, Refusal> {
        self.put(RowKey::directory(ino), None)?;
        if !row.has_xattrs {
            self.erase_inode(ino, &row)?;
            return Ok(Fate::Gone);
        }
        (row.nlink, row.cookie) = (0, 0);
        self.put_inode(ino, &row)?;
        self.put(RowKey::orphan(ino), Some(OrphanRow.encode()))?;
        Ok(Fate::Orphaned)
    }
}

/// Removes a part of an orphan that nobody has open at the source, or its last part.
#[derive(Clone, Debug)]
pub(crate) struct Purge {
    pub(crate) ino: Ino,
    /// Extents to remove, at most [`PURGE_BATCH`].
    pub(crate) extents: Vec<u64>,
    /// Attributes to remove.
    pub(crate) xattrs: Vec<XattrName>,
    /// Whether nothing else is left of it.
    pub(crate) last: bool,
}

impl Operation for Purge {
    type Reply = ();
    const KIND: EntryKind = EntryKind::Purge;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(), Refusal> {
        let orphan = RowKey::orphan(self.ino);
        if draft.row(&orphan)?.is_none() {
            return Err(Refusal::Stale);
        }
        let mut row = draft.find_inode(self.ino)?.ok_or(Errno::ESTALE)?;
        for extent in draft.extents(self.ino, &self.extents)? {
            draft.remove_extent(self.ino, extent)?;
            row.allocated = row.allocated.saturating_sub(u64::from(extent.row.length));
            row.extents = row.extents.saturating_sub(1);
        }
        draft.need(self.xattrs.iter().map(|name| RowKey::xattr(self.ino, name)))?;
        for name in &self.xattrs {
            draft.put(RowKey::xattr(self.ino, name), None)?;
        }
        if !self.last {
            row.purging = true;
            return draft.put_inode(self.ino, &row);
        }
        if row.extents > 0 {
            return Err(Refusal::Stale);
        }
        draft.put(orphan, None)?;
        draft.erase_inode(self.ino, &row)
    }
}

/// How many extents one purge removes: decided in about 100 us of the critical section, far below an entry's limits.
pub(crate) const PURGE_BATCH: usize = 256;
