//! The model's names: creating, linking, removing, listing.
//!
//! Invariants:
//! - A directory has one name; every other inode has `links` names.
//! - Who adds or removes a name moves mtime and ctime of the directory.

use murphy_fs::{Attr, Caller, DirEntry, Errno, Ino, Kind, Name, Timespec};

use super::{Body, Dentry, MODE_BITS, Node, ROOT, SETGID, SETUID, STICKY, State};

impl State {
    pub(super) fn entry(&self, parent: Ino, name: &Name) -> Result<Ino, Errno> {
        self.directory(parent)?.entries.get(name).map(|dentry| dentry.ino).ok_or(Errno::ENOENT)
    }

    /// Creates an inode with a first name.
    pub(super) fn add(
        &mut self,
        now: Timespec,
        caller: &Caller,
        (parent, name): (Ino, &Name),
        body: Body,
        mode: u16,
    ) -> Result<Attr, Errno> {
        if self.directory(parent)?.entries.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        let above = self.node(parent)?;
        let inherits = above.mode & SETGID != 0;
        let gid = if inherits { above.gid } else { caller.gid };
        let mut mode = mode & MODE_BITS;
        if body.kind() == Kind::Directory {
            mode &= !(SETUID | SETGID);
            mode |= if inherits { SETGID } else { 0 };
        }
        self.last_ino += 1;
        let ino = Ino::new(self.last_ino);
        self.nodes.insert(ino, Node::new(body, mode, (caller.uid, gid), now));
        self.put_name(now, parent, name, ino)?;
        self.attr(ino)
    }

    pub(super) fn link(&mut self, now: Timespec, ino: Ino, parent: Ino, name: &Name) -> Result<Attr, Errno> {
        let node = self.node(ino)?;
        if self.directory(parent)?.entries.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        if node.kind() == Kind::Directory {
            return Err(Errno::EPERM);
        }
        if node.links == 0 {
            return Err(Errno::ENOENT);
        }
        let node = self.node_mut(ino)?;
        node.links += 1;
        node.ctime = now;
        self.put_name(now, parent, name, ino)?;
        self.attr(ino)
    }

    pub(super) fn unlink(
        &mut self,
        now: Timespec,
        caller: &Caller,
        parent: Ino,
        name: &Name,
    ) -> Result<(), Errno> {
        let ino = self.entry(parent, name)?;
        self.may_remove(caller, parent, ino)?;
        if self.node(ino)?.kind() == Kind::Directory {
            return Err(Errno::EISDIR);
        }
        self.take_name(now, parent, name)?;
        self.lose_name(now, ino)
    }

    pub(super) fn rmdir(
        &mut self,
        now: Timespec,
        caller: &Caller,
        parent: Ino,
        name: &Name,
    ) -> Result<(), Errno> {
        let ino = self.entry(parent, name)?;
        self.may_remove(caller, parent, ino)?;
        if !self.directory(ino)?.entries.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        self.take_name(now, parent, name)?;
        self.lose_name(now, ino)
    }

    pub(super) fn list(&self, directory: Ino, cookie: u64, limit: usize) -> Result<Vec<DirEntry>, Errno> {
        let mut entries = Vec::new();
        for (name, dentry) in &self.directory(directory)?.entries {
            if dentry.cookie > cookie {
                let kind = self.node(dentry.ino)?.kind();
                entries.push(DirEntry { cookie: dentry.cookie, name: name.clone(), ino: dentry.ino, kind });
            }
        }
        entries.sort_by_key(|entry| entry.cookie);
        entries.truncate(limit);
        Ok(entries)
    }

    /// The rule of the sticky bit: in such a directory only the owner of the file, of the directory, or root removes a name.
    pub(super) fn may_remove(&self, caller: &Caller, parent: Ino, ino: Ino) -> Result<(), Errno> {
        let above = self.node(parent)?;
        if above.mode & STICKY == 0 || caller.uid == ROOT {
            return Ok(());
        }
        if caller.uid == above.uid || caller.uid == self.node(ino)?.uid { Ok(()) } else { Err(Errno::EPERM) }
    }

    pub(super) fn put_name(
        &mut self,
        now: Timespec,
        parent: Ino,
        name: &Name,
        ino: Ino,
    ) -> Result<(), Errno> {
        let directory = self.directory_mut(parent)?;
        directory.last_cookie += 1;
        let cookie = directory.last_cookie;
        directory.entries.insert(name.clone(), Dentry { ino, cookie });
        self.touch(now, parent)?;
        if let Ok(moved) = self.directory_mut(ino) {
            moved.parent = parent;
        }
        Ok(())
    }

    pub(super) fn take_name(&mut self, now: Timespec, parent: Ino, name: &Name) -> Result<(), Errno> {
        self.directory_mut(parent)?.entries.remove(name);
        self.touch(now, parent)
    }

    /// One name of `ino` is gone.
    pub(super) fn lose_name(&mut self, now: Timespec, ino: Ino) -> Result<(), Errno> {
        let node = self.node_mut(ino)?;
        node.links -= 1;
        node.ctime = now;
        self.purge_if_unreachable(ino);
        Ok(())
    }

    pub(super) fn purge_if_unreachable(&mut self, ino: Ino) {
        let is_orphan = self.nodes.get(&ino).is_some_and(|node| node.links == 0);
        if is_orphan && self.handles.values().all(|open| open.ino != ino) {
            self.nodes.remove(&ino);
        }
    }

    fn touch(&mut self, now: Timespec, ino: Ino) -> Result<(), Errno> {
        let node = self.node_mut(ino)?;
        node.mtime = now;
        node.ctime = now;
        Ok(())
    }
}
