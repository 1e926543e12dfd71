//! Adding a name to an inode, and keeping track of where an inode's names are.

use bytes::Bytes;

use super::{Draft, EntryKind, Operation, Refusal, names::PlacedName};
use crate::{Attr, Cookie, Errno, Ino, InodeRow, Kind, RowKey};

/// Adds a name to an inode.
#[derive(Clone, Debug)]
pub(crate) struct MakeLink {
    pub(crate) ino: Ino,
    pub(crate) parent: Ino,
    pub(crate) name: PlacedName,
}

impl Operation for MakeLink {
    type Reply = Attr;
    const KIND: EntryKind = EntryKind::Link;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Attr, Refusal> {
        let mut row = draft.inode(self.ino)?;
        draft.directory(self.parent)?;
        if draft.find_name(self.parent, &self.name)?.is_some() {
            return Err(Errno::EEXIST.into());
        }
        if row.kind == Kind::Directory {
            return Err(Errno::EPERM.into());
        }
        if row.nlink == 0 {
            return Err(Errno::ENOENT.into());
        }
        if row.nlink >= LINK_MAX {
            return Err(Errno::EMLINK.into());
        }
        draft.mention(self.name.name.to_bytes());
        let cookie = draft.add_name(self.parent, &self.name, self.ino, row.kind)?;
        draft.put(RowKey::link(self.ino, self.parent, cookie.get()), Some(link_row()))?;
        row.nlink += 1;
        row.ctime = draft.now();
        draft.put_inode(self.ino, &row)?;
        draft.touch_directory(self.parent, 1, 0)?;
        Ok(row.attr(self.ino, None))
    }
}

impl Draft<'_> {
    /// Forgets that (`parent`, `cookie`) is a name of `ino`: the caller has lowered or is about to lower `row.nlink`, and writes `row`.
    pub(crate) fn forget_link(
        &mut self,
        ino: Ino,
        row: &mut InodeRow,
        parent: Ino,
        cookie: Cookie,
    ) -> Result<(), Refusal> {
        if (row.parent, row.cookie) != (parent, cookie.get()) {
            return self.put(RowKey::link(ino, parent, cookie.get()), None);
        }
        if row.nlink <= 1 {
            return Ok(());
        }
        let further = self.further_link(ino)?;
        (row.parent, row.cookie) =
            place_of_link(&further).ok_or_else(|| Refusal::Damaged(further.clone()))?;
        self.put(further, None)
    }

    /// Notes that a name of `ino` has moved; the caller writes `row`.
    pub(crate) fn move_link(
        &mut self,
        ino: Ino,
        row: &mut InodeRow,
        from: (Ino, Cookie),
        to: (Ino, Cookie),
    ) -> Result<(), Refusal> {
        if (row.parent, row.cookie) == (from.0, from.1.get()) {
            (row.parent, row.cookie) = (to.0, to.1.get());
            return Ok(());
        }
        self.put(RowKey::link(ino, from.0, from.1.get()), None)?;
        self.put(RowKey::link(ino, to.0, to.1.get()), Some(link_row()))
    }
}

fn link_row() -> Bytes {
    Bytes::from_static(&[0])
}

fn place_of_link(key: &RowKey) -> Option<(Ino, u64)> {
    let bytes = key.key().get(8..24)?;
    let (parent, cookie) = bytes.split_at(8);
    Some((Ino::new(u64::from_be_bytes(parent.try_into().ok()?)), u64::from_be_bytes(cookie.try_into().ok()?)))
}

/// More names than this make `link` fail with EMLINK.
const LINK_MAX: u32 = 1 << 31;
