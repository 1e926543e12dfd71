//! A glance at the tree: the rows that one answer is put together from.
//!
//! Invariants:
//! - Everything that a glance shows is as of one entry. The lock of a file orders what this node decides, and nothing that it follows.
//! - It is taken under the lock of the file, where there is one: bytes that are not dirty any more are in its extents.
//! - An inode whose purge has begun is not there.

use bytes::Bytes;

use super::{Volume, tree::logged};
use crate::{
    DentryRow, DirectoryRow, Errno, Ino, InodeRow, Kind, RowError, RowKey,
    decide::{PlacedName, find},
    sequencer::Sequencer,
    view::View,
};

/// The tree as of one entry, read through the cache. It is held for one answer only: it holds up the index.
pub(super) struct Glance<'a> {
    sequencer: &'a Sequencer,
    view: View,
}

impl Volume {
    /// The tree as it is now.
    pub(super) fn glance(&self) -> Glance<'_> {
        Glance { sequencer: &self.shared.sequencer, view: self.view() }
    }
}

impl Glance<'_> {
    /// For the rows of a range.
    pub(super) fn view(&self) -> &View {
        &self.view
    }

    pub(super) fn row<T>(
        &self,
        key: &RowKey,
        decode: impl FnOnce(&Bytes) -> Result<T, RowError>,
    ) -> Result<Option<T>, Errno> {
        logged(self.sequencer.in_view(&self.view, key, decode))
    }

    pub(super) fn inode(&self, ino: Ino) -> Result<Option<InodeRow>, Errno> {
        let row = self.row(&RowKey::inode(ino), |row| InodeRow::decode(row))?;
        Ok(row.filter(|row| !row.purging))
    }

    pub(super) fn directory(&self, ino: Ino) -> Result<Option<DirectoryRow>, Errno> {
        self.row(&RowKey::directory(ino), |row| DirectoryRow::decode(row))
    }

    /// ENOTDIR if `ino` is not a directory, ENOENT if there is no such inode.
    pub(super) fn require_directory(&self, ino: Ino) -> Result<DirectoryRow, Errno> {
        if let Some(row) = self.directory(ino)? {
            return Ok(row);
        }
        let is_other = self.inode(ino)?.is_some_and(|row| row.kind != Kind::Directory);
        Err(if is_other { Errno::ENOTDIR } else { Errno::ENOENT })
    }

    pub(super) fn child(&self, parent: Ino, name: &PlacedName) -> Result<Option<Ino>, Errno> {
        let found = find(parent, name, |key| self.row(key, DentryRow::decode))?;
        Ok(found.map(|found| found.ino))
    }
}
