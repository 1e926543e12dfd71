//! Names in directories, shared by everything that adds, finds or removes one.

use super::{Draft, Refusal};
use crate::{Cookie, DentryRow, DirectoryRow, Errno, Ino, InodeRow, Kind, Name, NameHasher, RowKey, SLOTS};

/// A name that was found.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) cookie: Cookie,
    pub(crate) ino: Ino,
    pub(crate) kind: Kind,
}

/// A name together with where its hash places it.
#[derive(Clone, Debug)]
pub(crate) struct PlacedName {
    pub(crate) name: Name,
    pub(crate) place: Cookie,
}

impl PlacedName {
    pub(crate) fn new(hasher: &NameHasher, name: &Name) -> PlacedName {
        PlacedName { name: name.clone(), place: hasher.place(name) }
    }

    /// Where the search for it in `parent` begins.
    pub(crate) fn first_key(&self, parent: Ino) -> RowKey {
        RowKey::dentry(parent, self.place.in_slot(0).get())
    }
}

/// Finds a name through `row`, which gives the dentry row at a key: the one search that decisions and readers share.
pub(crate) fn find<E>(
    parent: Ino,
    name: &PlacedName,
    mut row: impl FnMut(&RowKey) -> Result<Option<DentryRow>, E>,
) -> Result<Option<Found>, E> {
    for slot in 0..SLOTS {
        let cookie = name.place.in_slot(slot);
        let Some(dentry) = row(&RowKey::dentry(parent, cookie.get()))? else { return Ok(None) };
        match dentry.named {
            Some((found, ino, kind)) if found == name.name => return Ok(Some(Found { cookie, ino, kind })),
            _ if !dentry.more => return Ok(None),
            _ => {}
        }
    }
    Ok(None)
}

impl Draft<'_> {
    fn dentry(&self, key: &RowKey) -> Result<Option<DentryRow>, Refusal> {
        self.decoded(key, DentryRow::decode)
    }

    /// The name in `parent`, if it is there.
    pub(crate) fn find_name(&self, parent: Ino, name: &PlacedName) -> Result<Option<Found>, Refusal> {
        find(parent, name, |key| self.dentry(key))
    }

    /// Adds a name that is known not to be there. ENOSPC when all slots of its hash are taken.
    pub(crate) fn add_name(
        &mut self,
        parent: Ino,
        name: &PlacedName,
        ino: Ino,
        kind: Kind,
    ) -> Result<Cookie, Refusal> {
        for slot in 0..SLOTS {
            let cookie = name.place.in_slot(slot);
            let key = RowKey::dentry(parent, cookie.get());
            let dentry = self.dentry(&key)?;
            let more = dentry.as_ref().is_some_and(|dentry| dentry.more);
            if dentry.is_none_or(|dentry| dentry.named.is_none()) {
                let row = DentryRow { named: Some((name.name.clone(), ino, kind)), more };
                self.put(key, Some(row.encode()))?;
                self.mark_more_below(parent, cookie)?;
                return Ok(cookie);
            }
        }
        Err(Errno::ENOSPC.into())
    }

    /// Makes every slot below `cookie` say that a higher one is in use.
    fn mark_more_below(&mut self, parent: Ino, cookie: Cookie) -> Result<(), Refusal> {
        for slot in 0..cookie.slot() {
            let key = RowKey::dentry(parent, cookie.in_slot(slot).get());
            if let Some(mut dentry) = self.dentry(&key)?
                && !dentry.more
            {
                dentry.more = true;
                self.put(key, Some(dentry.encode()))?;
            }
        }
        Ok(())
    }

    /// Removes the name at `cookie`. The slot stays as a vacancy while a higher one is in use.
    pub(crate) fn remove_name(&mut self, parent: Ino, cookie: Cookie) -> Result<(), Refusal> {
        let key = RowKey::dentry(parent, cookie.get());
        let dentry = self.dentry(&key)?.ok_or_else(|| Refusal::Damaged(key.clone()))?;
        if dentry.more {
            return self.put(key, Some(DentryRow { named: None, more: true }.encode()));
        }
        self.put(key, None)?;
        for slot in (0..cookie.slot()).rev() {
            let key = RowKey::dentry(parent, cookie.in_slot(slot).get());
            match self.dentry(&key)? {
                Some(DentryRow { named: None, .. }) => self.put(key, None)?,
                Some(named) => return self.put(key, Some(DentryRow { more: false, ..named }.encode())),
                None => return Err(Refusal::Damaged(key)),
            }
        }
        Ok(())
    }

    /// Lets the name at `cookie` stand for another inode.
    pub(crate) fn replace_name(
        &mut self,
        parent: Ino,
        cookie: Cookie,
        name: &Name,
        ino: Ino,
        kind: Kind,
    ) -> Result<(), Refusal> {
        let key = RowKey::dentry(parent, cookie.get());
        let dentry = self.dentry(&key)?.ok_or_else(|| Refusal::Damaged(key.clone()))?;
        let row = DentryRow { named: Some((name.clone(), ino, kind)), more: dentry.more };
        self.put(key, Some(row.encode()))
    }

    /// Counts `children` more names and `subdirectories` more directories in `parent`, whose times move.
    pub(crate) fn touch_directory(
        &mut self,
        parent: Ino,
        children: i64,
        subdirectories: i32,
    ) -> Result<(), Refusal> {
        let key = RowKey::directory(parent);
        let row = self.directory(parent)?;
        let counts = (
            row.children.checked_add_signed(children),
            row.subdirectories.checked_add_signed(subdirectories),
        );
        let (Some(children), Some(subdirectories)) = counts else { return Err(Refusal::Damaged(key)) };
        let now = self.now();
        self.put_directory(parent, &DirectoryRow { children, subdirectories, mtime: now, ctime: now })
    }

    /// EPERM if the sticky bit of `parent` keeps the caller from removing an inode of this owner.
    pub(crate) fn may_remove(&self, parent: &InodeRow, victim: &InodeRow) -> Result<(), Refusal> {
        let uid = self.caller().uid;
        if parent.mode & STICKY != 0 && uid != 0 && uid != victim.uid && uid != parent.uid {
            return Err(Errno::EPERM.into());
        }
        Ok(())
    }
}

const STICKY: u16 = 0o1000;
