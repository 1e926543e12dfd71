//! Names and attributes: what is read of them, and what removes, moves and changes them.
//!
//! Invariants:
//! - Attributes are shown with the file's dirty bytes, under the file's lock.
//! - A row that cannot be read is EIO to whoever asked, and said once in the log of the process.

use bytes::Bytes;

use super::{Volume, files::FileInner, glance::Glance};
use crate::{
    Attr, Caller, Cookie, DentryRow, DirEntry, DirEntryPlus, Errno, Ino, InodeRow, Kind, Name, RenameMode,
    RowKey, SetAttr, SymlinkRow, XattrName, XattrRow,
    decide::{
        Fate, PlacedName, RemoveDirectory, Rename, SetAttributes, SetXattr, Unlink, Victim, check_namespace,
    },
    sequencer::{SubmitError, unreadable},
    table::Table,
    view::{View, ViewError},
};

impl Volume {
    pub(super) fn placed(&self, name: &Name) -> PlacedName {
        PlacedName::new(&self.shared.hasher, name)
    }

    /// The newest row of an inode.
    pub(super) fn inode_row(&self, ino: Ino) -> Result<Option<InodeRow>, Errno> {
        self.glance().inode(ino)
    }

    pub(super) fn find_child(&self, parent: Ino, name: &Name) -> Result<Option<Ino>, Errno> {
        self.glance().child(parent, &self.placed(name))
    }

    pub(super) fn lookup_name(&self, parent: Ino, name: &Name) -> Result<Attr, Errno> {
        let placed = self.placed(name);
        loop {
            let glance = self.glance();
            let Some(ino) = glance.child(parent, &placed)? else {
                return glance.require_directory(parent).and(Err(Errno::ENOENT));
            };
            drop(glance);
            let file = self.shared.files.find(ino);
            let inner = file.as_ref().map(|file| file.lock());
            let glance = self.glance();
            // Otherwise it was moved, removed or replaced meanwhile.
            if glance.child(parent, &placed)? == Some(ino) {
                return attr_in(&glance, ino, inner.as_deref())?.ok_or_else(|| {
                    tracing::error!(%parent, %ino, "a name stands for an inode that is not there");
                    Errno::EIO
                });
            }
        }
    }

    /// The attributes of `ino` as this node sees them: dirty data included.
    pub(super) fn attr(&self, ino: Ino) -> Result<Attr, Errno> {
        let file = self.shared.files.find(ino);
        let inner = file.as_ref().map(|file| file.lock());
        attr_in(&self.glance(), ino, inner.as_deref())?.ok_or(Errno::ESTALE)
    }

    pub(super) fn parent_of(&self, directory: Ino) -> Result<Ino, Errno> {
        let row = self.inode_row(directory)?.ok_or(Errno::ESTALE)?;
        if row.kind == Kind::Directory { Ok(row.parent) } else { Err(Errno::ENOTDIR) }
    }

    pub(super) fn symlink_target(&self, ino: Ino) -> Result<Bytes, Errno> {
        let glance = self.glance();
        let row = glance.inode(ino)?.ok_or(Errno::ESTALE)?;
        if row.kind != Kind::Symlink {
            return Err(Errno::EINVAL);
        }
        glance.row(&RowKey::symlink(ino), SymlinkRow::decode)?.map(|row| row.target).ok_or_else(|| {
            tracing::error!(%ino, "a symbolic link has no target");
            Errno::EIO
        })
    }

    /// Entries after `cookie`, in cookie order.
    pub(super) fn entries(&self, directory: Ino, cookie: u64, limit: usize) -> Result<Vec<DirEntry>, Errno> {
        let glance = self.glance();
        glance.require_directory(directory)?;
        let mut entries = Vec::new();
        let start = RowKey::dentry(directory, cookie.saturating_add(1));
        for row in glance.view().rows(start..RowKey::range_start(Table::Dentry, directory.get() + 1)) {
            if entries.len() == limit {
                break;
            }
            let (key, value) = logged(row.map_err(ViewError::from))?;
            let dentry =
                DentryRow::decode(&value).map_err(|reason| ViewError::Row { key: key.clone(), reason });
            if let (Some((name, ino, kind)), Some(cookie)) = (logged(dentry)?.named, key.second()) {
                entries.push(DirEntry { cookie: Cookie::new(cookie).get(), name, ino, kind });
            }
        }
        Ok(entries)
    }

    pub(super) fn entries_plus(
        &self,
        directory: Ino,
        cookie: u64,
        limit: usize,
    ) -> Result<Vec<DirEntryPlus>, Errno> {
        let (mut plus, mut from) = (Vec::new(), cookie);
        loop {
            let entries = self.entries(directory, from, limit)?;
            let Some(last) = entries.last() else { return Ok(plus) };
            from = last.cookie;
            for entry in entries {
                match self.attr(entry.ino) {
                    Ok(attr) if attr.nlink > 0 => plus.push(DirEntryPlus { entry, attr }),
                    // Removed since the names were read.
                    Ok(_) | Err(Errno::ESTALE) => {}
                    Err(errno) => return Err(errno),
                }
            }
            // An empty answer would be the end of the directory.
            if !plus.is_empty() {
                return Ok(plus);
            }
        }
    }

    /// What is known of the inode that `name` stands for, in case it loses its last name; run `then` while that cannot change.
    fn with_victim<T>(
        &self,
        ino: Ino,
        then: impl FnOnce(Victim) -> Result<(T, Option<Fate>), SubmitError>,
    ) -> Result<T, SubmitError> {
        let file = self.shared.files.state(ino);
        let mut inner = file.lock();
        let row = self.inode_row(ino)?;
        let extents = match row.map_or(0, |row| row.extents) {
            0 => Some(Vec::new()),
            1..=INLINE_EXTENTS => Some(self.extent_offsets(ino, 0)?),
            _ => None,
        };
        let victim = Victim { ino, open: inner.opens > 0, extents };
        let result = then(victim);
        let mut purge = false;
        if let Ok((_, Some(fate))) = &result
            && *fate != Fate::Lives
            && inner.opens == 0
        {
            self.discard_dirty(&file, &mut inner);
            purge = *fate == Fate::Orphaned;
        }
        drop(inner);
        self.shared.files.forget(file);
        if purge {
            self.purge_later(ino);
        }
        result.map(|(reply, _)| reply)
    }

    /// The file offsets of all extents that end after `from`.
    pub(super) fn extent_offsets(&self, ino: Ino, from: u64) -> Result<Vec<u64>, Errno> {
        self.view().extents(ino, from, u64::MAX).map(|extent| Ok(logged(extent)?.offset)).collect()
    }

    pub(super) fn remove_name(&self, caller: &Caller, parent: Ino, name: &Name) -> Result<(), SubmitError> {
        let glance = self.glance();
        let Some(ino) = glance.child(parent, &self.placed(name))? else {
            return Err(glance.require_directory(parent).err().unwrap_or(Errno::ENOENT).into());
        };
        drop(glance);
        self.with_victim(ino, |victim| {
            let unlink = Unlink { parent, name: self.placed(name), victim };
            self.shared.sequencer.submit(Some(caller), &unlink).map(|fate| ((), Some(fate)))
        })
    }

    pub(super) fn remove_directory(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &Name,
    ) -> Result<(), SubmitError> {
        let rmdir = RemoveDirectory { parent, name: self.placed(name) };
        let (ino, fate) = self.shared.sequencer.submit(Some(caller), &rmdir)?;
        if fate == Fate::Orphaned {
            self.purge_later(ino);
        }
        Ok(())
    }

    /// Moves a name. If a name would stand for another file than before, and bytes of that file are not stored, nothing happens and the
    /// file is returned, unless it is among those `flushed`: a crash must leave the old file or the new one, whole.
    pub(super) fn move_name(
        &self,
        caller: &Caller,
        from: &(Ino, Name),
        to: &(Ino, Name),
        mode: RenameMode,
        flushed: &[Ino],
    ) -> Result<Option<Ino>, SubmitError> {
        let target = self.find_child(to.0, &to.1)?.filter(|_| mode != RenameMode::NoReplace);
        let source = if target.is_some() { self.find_child(from.0, &from.1)? } else { None };
        let is_dirty = |ino| self.shared.files.find(ino).is_some_and(|file| !file.lock().dirty.is_empty());
        let exchanged = target.filter(|_| mode == RenameMode::Exchange);
        let mut moving = source.into_iter().chain(exchanged);
        if let Some(ino) = moving.find(|ino| !flushed.contains(ino) && is_dirty(*ino)) {
            return Ok(Some(ino));
        }
        let rename = |victim| Rename {
            from: (from.0, self.placed(&from.1)),
            to: (to.0, self.placed(&to.1)),
            mode,
            source,
            target: exchanged,
            victim,
        };
        match target {
            Some(ino) if mode != RenameMode::Exchange => self.with_victim(ino, |victim| {
                let replaced = self.shared.sequencer.submit(Some(caller), &rename(Some(victim)))?;
                Ok((None, replaced.map(|(_, fate)| fate)))
            }),
            _ => self.shared.sequencer.submit(Some(caller), &rename(None)).map(|_| None),
        }
    }

    /// Changes everything but the length.
    pub(super) fn set_attributes(
        &self,
        caller: &Caller,
        ino: Ino,
        change: SetAttr,
    ) -> Result<Attr, SubmitError> {
        let file = self.shared.files.find(ino);
        let mut inner = file.as_ref().map(|file| file.lock());
        self.shared.sequencer.submit(Some(caller), &SetAttributes { ino, change })?;
        if let Some(inner) = &mut inner
            && change.mtime.is_some()
        {
            inner.dirty.mtime = None;
        }
        drop(inner);
        Ok(self.attr(ino)?)
    }

    /// Sets an attribute; whether the inode is open is seen under its lock, so that its last handle is not closed meanwhile.
    pub(super) fn set_xattr(&self, caller: &Caller, set: &SetXattr) -> Result<(), SubmitError> {
        let file = self.shared.files.find(set.ino);
        let inner = file.as_ref().map(|file| file.lock());
        let open = inner.as_ref().is_some_and(|inner| inner.opens > 0 && !inner.purging);
        self.shared.sequencer.submit(Some(caller), &SetXattr { open, ..set.clone() })
    }

    pub(super) fn xattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Result<Bytes, Errno> {
        check_namespace(name)?;
        let glance = self.glance();
        let row = glance.inode(ino)?.ok_or(Errno::ESTALE)?;
        if !row.has_xattrs || (name.as_bytes().starts_with(b"trusted.") && caller.uid != 0) {
            return Err(Errno::ENODATA);
        }
        let row = glance.row(&RowKey::xattr(ino, name), XattrRow::decode)?;
        row.map(|row| row.value).ok_or(Errno::ENODATA)
    }

    /// All names of extended attributes of `ino`, in byte order.
    pub(super) fn xattr_names(&self, ino: Ino) -> Result<Vec<XattrName>, Errno> {
        let glance = self.glance();
        let row = glance.inode(ino)?.ok_or(Errno::ESTALE)?;
        if row.has_xattrs { xattr_names_in(glance.view(), ino) } else { Ok(Vec::new()) }
    }
}

/// The attributes of `ino`, with the dirty bytes of `inner`.
fn attr_in(glance: &Glance<'_>, ino: Ino, inner: Option<&FileInner>) -> Result<Option<Attr>, Errno> {
    let Some(row) = glance.inode(ino)? else { return Ok(None) };
    let directory = if row.kind == Kind::Directory { glance.directory(ino)? } else { None };
    let mut attr = row.attr(ino, directory.as_ref());
    if let Some(dirty) = inner.map(|inner| &inner.dirty).filter(|dirty| !dirty.is_empty()) {
        attr.size = attr.size.max(dirty.end());
        attr.blocks = (row.allocated + dirty.len()).div_ceil(512);
        attr.mtime = dirty.mtime.unwrap_or(attr.mtime);
        attr.ctime = dirty.ctime.map_or(attr.ctime, |ctime| ctime.max(attr.ctime));
    }
    Ok(Some(attr))
}

/// The names of the extended attributes that `ino` has in `view`, in byte order.
pub(super) fn xattr_names_in(view: &View, ino: Ino) -> Result<Vec<XattrName>, Errno> {
    let mut names = Vec::new();
    for row in view.rows_of(Table::Xattr, ino.get()) {
        let (key, _) = logged(row.map_err(ViewError::from))?;
        names.extend(XattrName::new(key.key_bytes().slice(8..)).ok());
    }
    Ok(names)
}

/// A tree that cannot be read becomes EIO here, and is logged here.
pub(super) fn logged<T>(result: Result<T, ViewError>) -> Result<T, Errno> {
    result.map_err(|error| match unreadable(&error) {
        SubmitError::Errno(errno) => errno,
        SubmitError::Stale | SubmitError::Full => Errno::EIO,
    })
}

/// A closed file with at most this many extents goes in the entry that removes its last name.
const INLINE_EXTENTS: u64 = 16;
