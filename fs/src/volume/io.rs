//! Reading and writing bytes.
//!
//! Invariants:
//! - A read sees dirty bytes over extents over holes, all as of one moment: all are collected under the file's lock, length and extents in
//!   one glance.
//! - A write is visible when it returns, whole.

use std::{ops::Range, sync::atomic::Ordering};

use bytes::{Bytes, BytesMut};
use quick_cache::sync::Cache;

use super::{
    Volume,
    files::{FileInner, FileState, OpenFile},
    glance::Glance,
    tree::logged,
};
use crate::{
    Answer, Attr, Caller, Errno, Extent, ExtentTarget, Handle, Ino, InodeRow, Kind, OpenFlags, Opened,
    PackRow, RowKey,
    data::PackMeta,
    decide::{DropPrivilege, FILE_MAX, capability_key, loses_mode_bits},
    sequencer::SubmitError,
};

/// The state of a file's bytes when it was last opened, to tell whether a cache above may keep them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stamp {
    size: u64,
    mtime: crate::Timespec,
    ctime: crate::Timespec,
}

/// The stamps of files opened lately.
pub(super) struct Stamps(Cache<Ino, Stamp>);

impl Default for Stamps {
    fn default() -> Stamps {
        Stamps(Cache::new(STAMPS))
    }
}

impl Stamps {
    /// Whether the file is as it was when this was last asked.
    fn unchanged(&self, attr: &Attr) -> bool {
        let stamp = Stamp { size: attr.size, mtime: attr.mtime, ctime: attr.ctime };
        let before = self.0.get(&attr.ino);
        self.0.insert(attr.ino, stamp);
        before == Some(stamp)
    }
}

impl Volume {
    /// Opens a regular file as it is.
    pub(super) fn open_file(&self, ino: Ino, flags: OpenFlags) -> Result<Opened, SubmitError> {
        self.end_open(ino, self.begin_open(ino, flags)?)
    }

    /// Makes a handle of a regular file.
    pub(super) fn begin_open(&self, ino: Ino, flags: OpenFlags) -> Result<Handle, SubmitError> {
        let row = self.inode_row(ino)?.ok_or(Errno::ESTALE)?;
        match row.kind {
            Kind::File => {}
            Kind::Directory => return Err(Errno::EISDIR.into()),
            Kind::Symlink => return Err(Errno::ELOOP.into()),
            _ => return Err(Errno::ENXIO.into()),
        }
        let file = self.shared.files.state(ino);
        let counted = self.count_open(ino, &mut file.lock());
        if let Err(errno) = counted {
            self.shared.files.forget(file);
            return Err(errno.into());
        }
        Ok(self.shared.handles.add(file, flags))
    }

    /// Says what is known of a file that was opened; closes it if that cannot be said.
    pub(super) fn end_open(&self, ino: Ino, handle: Handle) -> Result<Opened, SubmitError> {
        match self.attr(ino) {
            Ok(attr) => {
                let (unchanged, decides) = (self.shared.stamps.unchanged(&attr), self.check_leads().is_ok());
                Ok(Opened { handle, unchanged, decides })
            }
            Err(errno) => {
                self.close_handle(handle);
                Err(errno.into())
            }
        }
    }

    /// Counts one more handle. Under the file's lock: whoever removes the last name of the inode sees it open, or it is seen here that
    /// the inode is gone, or about to be.
    fn count_open(&self, ino: Ino, inner: &mut FileInner) -> Result<(), Errno> {
        let row = self.inode_row(ino)?.ok_or(Errno::ESTALE)?;
        if inner.purging || (row.nlink == 0 && inner.opens == 0) {
            return Err(Errno::ESTALE);
        }
        inner.opens += 1;
        Ok(())
    }

    /// Closes a handle. An orphan that nobody has open any more is purged.
    pub(super) fn close_handle(&self, handle: Handle) {
        let Some(OpenFile { file, .. }) = self.shared.handles.remove(handle) else { return };
        let mut inner = file.lock();
        inner.opens = inner.opens.saturating_sub(1);
        // A tree that cannot be read says so; the next start goes on with what it holds.
        let purge = inner.opens == 0
            && self.inode_row(file.ino).is_ok_and(|row| row.is_some_and(|row| row.nlink == 0));
        if purge {
            self.discard_dirty(&file, &mut inner);
        }
        drop(inner);
        let ino = file.ino;
        self.shared.files.forget(file);
        if purge {
            self.purge_later(ino);
        }
    }

    /// The file behind a handle of `ino`.
    pub(super) fn open_handle(&self, ino: Ino, handle: Handle) -> Result<OpenFile, Errno> {
        self.shared
            .handles
            .find(handle)
            .and_then(|open| if open.file.ino == ino { Ok(open) } else { Err(Errno::EBADF) })
    }

    pub(super) fn read_bytes(&self, ino: Ino, handle: Handle, offset: u64, length: u32) -> Answer<Bytes> {
        let plan = self.open_handle(ino, handle).and_then(|open| {
            if !open.flags.read {
                return Err(Errno::EBADF);
            }
            let plan = self.plan_read(&open.file.lock(), ino, offset, length)?;
            let sequential = open.read_end.swap(plan.range.end, Ordering::Relaxed) == offset;
            if sequential && offset > 0 {
                self.read_ahead(ino, plan.range.end);
            }
            Ok(plan)
        });
        let plan = match plan {
            Ok(plan) => plan,
            Err(errno) => return Answer::Now(Err(errno)),
        };
        let cached = plan.stored.iter().map(|part| self.shared.fetcher.try_cached(&part.pack, part.range()));
        if let Some(cached) = cached.collect::<Option<Vec<Bytes>>>() {
            return Answer::Now(Ok(plan.assemble(cached)));
        }
        let volume = self.clone();
        Answer::later(async move { volume.read_planned(plan, ino, handle, offset, length).await })
    }

    /// Fetches what is planned. A file that grew while its end was fetched is read on: a kernel that hears of the new size before it has the
    /// answer would take what the answer lacks for zeros.
    async fn read_planned(
        &self,
        mut plan: ReadPlan,
        ino: Ino,
        handle: Handle,
        offset: u64,
        length: u32,
    ) -> Result<Bytes, Errno> {
        loop {
            let reads = plan.stored.iter().map(|part| self.shared.fetcher.read(&part.pack, part.range()));
            let stored = futures::future::try_join_all(reads).await.map_err(|error| {
                tracing::error!(%ino, offset, %error, "file data cannot be read");
                Errno::EIO
            })?;
            let read = plan.assemble(stored);
            if read.len() >= length as usize {
                return Ok(read);
            }
            let open = self.open_handle(ino, handle);
            match open.and_then(|open| self.plan_read(&open.file.lock(), ino, offset, length)) {
                Ok(now) if now.range.end > plan.range.end => plan = now,
                // It has not grown, or it is gone: this is how it was.
                Ok(_) | Err(_) => return Ok(read),
            }
        }
    }

    fn plan_read(&self, inner: &FileInner, ino: Ino, offset: u64, length: u32) -> Result<ReadPlan, Errno> {
        let glance = self.glance();
        let row = glance.inode(ino)?.ok_or(Errno::ESTALE)?;
        let size = row.size.max(inner.dirty.end());
        let end = offset.saturating_add(u64::from(length)).min(size).max(offset);
        let dirty = inner.dirty.read(offset..end);
        let covered: u64 = dirty.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let mut stored = Vec::new();
        if row.extents > 0 && covered < end - offset {
            for extent in glance.view().extents(ino, offset, end) {
                if let Some(part) = logged(extent)?.clipped(offset, end) {
                    stored.push(stored_part(&glance, part)?);
                }
            }
        }
        Ok(ReadPlan { range: offset..end, stored, dirty })
    }

    /// Brings what follows `from` into the cache.
    fn read_ahead(&self, ino: Ino, from: u64) {
        let until = from.saturating_add(READ_AHEAD);
        let glance = self.glance();
        for extent in glance.view().extents(ino, from, until).flatten() {
            let stored = |extent: Extent| stored_part(&glance, extent).ok();
            let (whole, part) = (stored(extent), extent.clipped(from, until).and_then(stored));
            if let (Some(whole), Some(part)) = (whole, part) {
                let fetcher = &self.shared.fetcher;
                fetcher.prefetch(&self.shared.runtime, &part.pack, part.range(), whole.range().end);
            }
        }
    }

    pub(super) fn write_bytes(
        &self,
        caller: &Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        data: &Bytes,
    ) -> Result<u32, SubmitError> {
        let open = self.open_handle(ino, handle)?;
        if !open.flags.write {
            return Err(Errno::EBADF.into());
        }
        let mut inner = open.file.lock();
        let row = self.inode_row(ino)?.ok_or(Errno::ESTALE)?;
        let offset = if open.flags.append { row.size.max(inner.dirty.end()) } else { offset };
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > FILE_MAX) {
            return Err(Errno::EFBIG.into());
        }
        if data.is_empty() {
            return Ok(0);
        }
        if loses_mode_bits(&row, caller.uid) || (row.has_xattrs && self.has_capability(ino)?) {
            self.shared.sequencer.submit(Some(caller), &DropPrivilege { ino })?;
        }
        let written = self.shared.sequencer.time_of_write()?;
        self.shared.files.count_dirty(inner.dirty.write(offset, data, written.into()));
        drop(inner);
        u32::try_from(data.len()).map_err(|_| Errno::EINVAL.into())
    }

    fn has_capability(&self, ino: Ino) -> Result<bool, Errno> {
        Ok(logged(self.shared.sequencer.newest_row(&capability_key(ino)))?.is_some())
    }

    /// Forgets bytes that nobody can read any more.
    pub(super) fn discard_dirty(&self, file: &FileState, inner: &mut FileInner) {
        self.cut_dirty(file, inner, 0);
    }

    /// Forgets the bytes from `end` on. A flight of which nothing is left ends here, whatever becomes of its puts; if nothing is left at all
    /// there is nothing to wait for, and nothing that failed.
    pub(super) fn cut_dirty(&self, file: &FileState, inner: &mut FileInner, end: u64) {
        let mut removed = inner.dirty.remove(end..u64::MAX);
        if inner.flushes_begun > inner.flushes_ended && !inner.dirty.is_flying() {
            removed += inner.end_flight(None);
            file.flushed.notify_waiters();
        }
        self.shared.files.count_dirty(-removed.cast_signed());
        if inner.dirty.is_empty() {
            (inner.failure, inner.rest) = (None, None);
            file.flushed.notify_waiters();
        }
    }
}

/// Where the bytes of a read come from.
struct ReadPlan {
    range: Range<u64>,
    stored: Vec<StoredPart>,
    dirty: Vec<(u64, Bytes)>,
}

struct StoredPart {
    at: u64,
    length: u32,
    pack: PackMeta,
    from: u32,
}

/// Where the bytes of an extent are.
fn stored_part(glance: &Glance<'_>, extent: Extent) -> Result<StoredPart, Errno> {
    let ExtentTarget::Pack { pack, offset } = extent.row.target else {
        tracing::error!(?extent, "this version reads no bytes from the log");
        return Err(Errno::EIO);
    };
    let key = RowKey::pack(pack.0);
    let row = glance.row(&key, |row| PackRow::decode(row))?.ok_or_else(|| {
        tracing::error!(?key, "an extent refers to a pack that the tree does not know");
        Errno::EIO
    })?;
    Ok(StoredPart { at: extent.offset, length: extent.row.length, pack: row.meta(), from: offset })
}

impl StoredPart {
    /// The range of the pack's plain bytes.
    fn range(&self) -> Range<u64> {
        u64::from(self.from)..u64::from(self.from) + u64::from(self.length)
    }
}

impl ReadPlan {
    fn assemble(&self, stored: Vec<Bytes>) -> Bytes {
        let length = (self.range.end - self.range.start) as usize;
        if let ([part], true) = (&self.stored[..], self.dirty.is_empty())
            && part.length as usize == length
            && let Some(only) = stored.first()
        {
            return only.clone();
        }
        let mut bytes = BytesMut::zeroed(length);
        let stored = self.stored.iter().zip(stored).map(|(part, bytes)| (part.at, bytes));
        for (at, part) in stored.chain(self.dirty.iter().cloned()) {
            let from = (at - self.range.start) as usize;
            bytes[from..from + part.len()].copy_from_slice(&part);
        }
        bytes.freeze()
    }
}

/// Whether an inode's kind has bytes that can be truncated; the errno that says no.
pub(super) fn may_truncate(row: &InodeRow) -> Result<(), Errno> {
    match row.kind {
        Kind::File => Ok(()),
        Kind::Directory => Err(Errno::EISDIR),
        _ => Err(Errno::EINVAL),
    }
}

/// How far a sequential reader is kept ahead of, in bytes.
const READ_AHEAD: u64 = 8 << 20;
/// Of how many files it is remembered how they were when last opened.
const STAMPS: usize = 65_536;
