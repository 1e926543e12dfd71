//! The bytes of files: which packs hold them, and how long a file is.
//!
//! Both operations are decided while the caller holds the inode's lock: nobody else changes its extents meanwhile, and the extents that
//! the caller has listed are all that there are in the range.
//!
//! Invariants:
//! - Put, then decide: an entry names only packs that are stored.
//! - After a decision no two extents of the inode overlap, and none crosses a slot.

use super::{Draft, EntryKind, Operation, Refusal, attr};
use crate::{
    Attr, Errno, Extent, ExtentRow, ExtentTarget, Ino, InodeRow, Kind, PackNumber, PackRow, RowKey,
    SLOT_BYTES, SetAttr, Timespec,
};

/// Which pack a [`Store`] refers to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PackUse {
    /// One that the tree knows already.
    Known(PackNumber),
    /// One that this entry makes known, all of its bytes live.
    New(PackRow),
}

/// A run of bytes of the file that a pack holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    /// Where in the file.
    pub(crate) offset: u64,
    /// How many bytes; the piece does not cross a slot.
    pub(crate) length: u32,
    /// Where in the plain bytes of the pack.
    pub(crate) pack_offset: u32,
}

impl Piece {
    /// The offset in the file after its last byte.
    pub(crate) fn end(&self) -> u64 {
        self.offset + u64::from(self.length)
    }
}

/// Makes stored bytes part of a file.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pub(crate) ino: Ino,
    pub(crate) pack: PackUse,
    /// In offset order, without overlap.
    pub(crate) pieces: Vec<Piece>,
    /// File offsets of all extents that a piece touches.
    pub(crate) overlapped: Vec<u64>,
    /// When the bytes were written; `None` if somebody has set the time since.
    pub(crate) mtime: Option<Timespec>,
    /// When the bytes were written.
    pub(crate) ctime: Timespec,
}

impl Operation for Store {
    /// The number by which the tree knows the pack.
    type Reply = PackNumber;
    const KIND: EntryKind = EntryKind::Write;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<PackNumber, Refusal> {
        let mut row = file_row(draft, self.ino)?;
        let replaced: Vec<(Extent, Vec<Extent>)> = draft
            .extents(self.ino, &self.overlapped)?
            .into_iter()
            .map(|extent| (extent, self.kept_of(extent)))
            .collect();
        let kept = replaced.iter().flat_map(|(_, kept)| kept).map(|part| part.offset);
        let begins = self.pieces.iter().map(|piece| piece.offset).chain(kept);
        draft.need(begins.map(|offset| RowKey::extent(self.ino, offset)))?;
        for (old, kept) in replaced {
            take_extent(draft, &mut row, self.ino, old)?;
            let kept_bytes: u64 = kept.iter().map(|part| u64::from(part.row.length)).sum();
            draft.release_bytes(old.row.target, u64::from(old.row.length) - kept_bytes)?;
            // What is kept was uncounted with the rest of the old extent; `put_extent` counts it again.
            draft.count_bytes(-kept_bytes.cast_signed());
            kept.into_iter().try_for_each(|part| put_extent(draft, &mut row, self.ino, part))?;
        }
        let pack = match self.pack {
            PackUse::Known(number) => number,
            PackUse::New(row) => {
                draft.put_newborn(RowKey::pack(draft.new_pack().0), row.encode());
                draft.new_pack()
            }
        };
        for piece in &self.pieces {
            let target = ExtentTarget::Pack { pack, offset: piece.pack_offset };
            let part = Extent { offset: piece.offset, row: ExtentRow { length: piece.length, target } };
            row.size = row.size.max(part.end());
            put_extent(draft, &mut row, self.ino, part)?;
        }
        if let Some(mtime) = self.mtime {
            row.mtime = mtime;
        }
        row.ctime = row.ctime.max(self.ctime);
        draft.put_inode(self.ino, &row)?;
        Ok(pack)
    }
}

impl Store {
    /// The parts of an old extent that no piece covers.
    fn kept_of(&self, old: Extent) -> Vec<Extent> {
        let mut kept = Vec::new();
        let mut from = old.offset;
        let first = self.pieces.partition_point(|piece| piece.end() <= old.offset);
        for piece in self.pieces[first..].iter().take_while(|piece| piece.offset < old.end()) {
            kept.extend(old.clipped(from, piece.offset));
            from = from.max(piece.end());
        }
        kept.extend(old.clipped(from, old.end()));
        kept
    }
}

/// Changes the length of a file, and other attributes with it.
#[derive(Clone, Debug)]
pub(crate) struct Truncate {
    pub(crate) ino: Ino,
    pub(crate) size: u64,
    /// File offsets of all extents that end after `size`; at most [`super::PURGE_BATCH`].
    pub(crate) beyond: Vec<u64>,
    /// What else changes; its `size` is not looked at.
    pub(crate) change: SetAttr,
}

impl Operation for Truncate {
    type Reply = Attr;
    const KIND: EntryKind = EntryKind::Truncate;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Attr, Refusal> {
        if self.size > FILE_MAX {
            return Err(Errno::EFBIG.into());
        }
        let mut row = file_row(draft, self.ino)?;
        for old in draft.extents(self.ino, &self.beyond)? {
            take_extent(draft, &mut row, self.ino, old)?;
            let kept = old.clipped(0, self.size);
            let kept_bytes = kept.map_or(0, |part| u64::from(part.row.length));
            draft.release_bytes(old.row.target, u64::from(old.row.length) - kept_bytes)?;
            draft.count_bytes(-kept_bytes.cast_signed());
            if let Some(part) = kept {
                put_extent(draft, &mut row, self.ino, part)?;
            }
        }
        row.size = self.size;
        row.mtime = draft.now();
        row.ctime = draft.now();
        attr::drop_privilege(draft, self.ino, &mut row)?;
        attr::apply(draft, self.ino, &mut row, None, &SetAttr { size: None, ..self.change })?;
        draft.put_inode(self.ino, &row)?;
        Ok(row.attr(self.ino, None))
    }
}

fn file_row(draft: &Draft<'_>, ino: Ino) -> Result<InodeRow, Refusal> {
    let row = draft.inode(ino)?;
    match row.kind {
        Kind::File => Ok(row),
        Kind::Directory => Err(Errno::EISDIR.into()),
        _ => Err(Errno::EINVAL.into()),
    }
}

/// Takes an extent out of the file, row and counts, without giving its bytes back to the pack.
fn take_extent(draft: &mut Draft<'_>, row: &mut InodeRow, ino: Ino, extent: Extent) -> Result<(), Refusal> {
    draft.put(RowKey::extent(ino, extent.offset), None)?;
    row.extents = row.extents.saturating_sub(1);
    row.allocated = row.allocated.saturating_sub(u64::from(extent.row.length));
    Ok(())
}

fn put_extent(draft: &mut Draft<'_>, row: &mut InodeRow, ino: Ino, extent: Extent) -> Result<(), Refusal> {
    if extent.end() > FILE_MAX || extent.offset / SLOT_BYTES != (extent.end() - 1) / SLOT_BYTES {
        return Err(Errno::EFBIG.into());
    }
    draft.put(RowKey::extent(ino, extent.offset), Some(extent.row.encode()))?;
    draft.count_bytes(i64::from(extent.row.length));
    row.extents += 1;
    row.allocated += u64::from(extent.row.length);
    Ok(())
}

/// The longest file, in bytes.
pub(crate) const FILE_MAX: u64 = 1 << 62;
