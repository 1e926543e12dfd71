//! The model's attributes: mode, owner, size, times and extended attributes.
//!
//! Invariants:
//! - A request changes all that it names, or nothing.
//! - Every change moves ctime.

use bytes::Bytes;
use murphy_fs::{Attr, Caller, Errno, Handle, Ino, Kind, SetAttr, SetTime, Timespec, XattrMode, XattrName};

use super::{FILE_BYTES_MAX, GROUP_EXECUTE, MODE_BITS, Node, ROOT, SETGID, SETUID, State, XATTR_BYTES_MAX};

impl State {
    pub(super) fn set_attributes(
        &mut self,
        now: Timespec,
        caller: &Caller,
        ino: Ino,
        handle: Option<Handle>,
        change: SetAttr,
    ) -> Result<Attr, Errno> {
        if change.size.is_some_and(|size| size > FILE_BYTES_MAX) {
            return Err(Errno::EFBIG);
        }
        let node = self.node(ino)?;
        if let Some(handle) = handle {
            self.handle(ino, handle)?;
        }
        may_apply(node.kind(), &change)?;
        may_change(node, caller, &change)?;
        if change == SetAttr::default() {
            return self.attr(ino);
        }
        if let Some(size) = change.size {
            self.contents_mut(ino)?.resize(size);
            self.data_changed(now, caller, ino)?;
        }
        let node = self.node_mut(ino)?;
        if change.uid.is_some() || change.gid.is_some() {
            node.change_owner(change.uid, change.gid);
        }
        if let Some(mode) = change.mode {
            node.mode = mode & MODE_BITS;
        }
        if let Some(time) = change.atime {
            node.atime = resolve(time, now);
        }
        if let Some(time) = change.mtime {
            node.mtime = resolve(time, now);
        }
        node.ctime = now;
        self.attr(ino)
    }

    pub(super) fn set_xattr(
        &mut self,
        now: Timespec,
        caller: &Caller,
        ino: Ino,
        (name, value): (&XattrName, Bytes),
        mode: XattrMode,
    ) -> Result<(), Errno> {
        let namespace = Namespace::of(name)?;
        if value.len() > XATTR_BYTES_MAX {
            return Err(Errno::E2BIG);
        }
        let node = self.node_mut(ino)?;
        namespace.may_change(caller, node.kind())?;
        match (mode, node.xattrs.contains_key(name)) {
            (XattrMode::Create, true) => return Err(Errno::EEXIST),
            (XattrMode::Replace, false) => return Err(Errno::ENODATA),
            _ => {}
        }
        node.xattrs.insert(name.clone(), value);
        node.ctime = now;
        Ok(())
    }

    pub(super) fn xattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Result<Bytes, Errno> {
        let namespace = Namespace::of(name)?;
        let node = self.node(ino)?;
        if !namespace.is_visible_to(caller) {
            return Err(Errno::ENODATA);
        }
        node.xattrs.get(name).cloned().ok_or(Errno::ENODATA)
    }

    pub(super) fn xattr_names(&self, caller: &Caller, ino: Ino) -> Result<Vec<XattrName>, Errno> {
        let is_visible =
            |name: &&XattrName| Namespace::of(name).is_ok_and(|space| space.is_visible_to(caller));
        Ok(self.node(ino)?.xattrs.keys().filter(is_visible).cloned().collect())
    }

    pub(super) fn remove_xattr(
        &mut self,
        now: Timespec,
        caller: &Caller,
        ino: Ino,
        name: &XattrName,
    ) -> Result<(), Errno> {
        let namespace = Namespace::of(name)?;
        let node = self.node_mut(ino)?;
        namespace.may_change(caller, node.kind())?;
        node.xattrs.remove(name).ok_or(Errno::ENODATA)?;
        node.ctime = now;
        Ok(())
    }
}

impl Node {
    /// Even root's chown drops the privileges of a program: they were another owner's.
    fn change_owner(&mut self, uid: Option<u32>, gid: Option<u32>) {
        self.uid = uid.unwrap_or(self.uid);
        self.gid = gid.unwrap_or(self.gid);
        if self.kind() == Kind::Directory {
            return;
        }
        self.mode &= !SETUID;
        // Without the right to execute, setgid was the mark of mandatory locking and gives no privilege.
        if self.mode & GROUP_EXECUTE != 0 {
            self.mode &= !SETGID;
        }
        self.xattrs.retain(|name, _| name.as_bytes() != CAPABILITY);
    }
}

/// The namespaces of extended attributes that are supported.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Namespace {
    User,
    Trusted,
    Security,
}

impl Namespace {
    fn of(name: &XattrName) -> Result<Namespace, Errno> {
        let prefixes = [
            (&b"user."[..], Namespace::User),
            (&b"trusted."[..], Namespace::Trusted),
            (&b"security."[..], Namespace::Security),
        ];
        for (prefix, namespace) in prefixes {
            match name.as_bytes().strip_prefix(prefix) {
                Some(b"") => return Err(Errno::EINVAL),
                Some(_) => return Ok(namespace),
                None => {}
            }
        }
        Err(Errno::EOPNOTSUPP)
    }

    fn may_change(self, caller: &Caller, kind: Kind) -> Result<(), Errno> {
        let allowed = match self {
            Namespace::User => matches!(kind, Kind::File | Kind::Directory),
            Namespace::Trusted | Namespace::Security => caller.uid == ROOT,
        };
        if allowed { Ok(()) } else { Err(Errno::EPERM) }
    }

    fn is_visible_to(self, caller: &Caller) -> bool {
        self != Namespace::Trusted || caller.uid == ROOT
    }
}

/// Whether an inode of this kind has what the request would change.
fn may_apply(kind: Kind, change: &SetAttr) -> Result<(), Errno> {
    if change.mode.is_some() && kind == Kind::Symlink {
        return Err(Errno::EOPNOTSUPP);
    }
    match kind {
        _ if change.size.is_none() => Ok(()),
        Kind::File => Ok(()),
        Kind::Directory => Err(Errno::EISDIR),
        _ => Err(Errno::EINVAL),
    }
}

/// The rules of ownership.
fn may_change(node: &Node, caller: &Caller, change: &SetAttr) -> Result<(), Errno> {
    if change.uid.is_some_and(|uid| uid != node.uid) && caller.uid != ROOT {
        return Err(Errno::EPERM);
    }
    let is_explicit = |time: Option<SetTime>| matches!(time, Some(SetTime::At(_)));
    let needs_owner = change.mode.is_some()
        || change.uid.is_some()
        || change.gid.is_some()
        || is_explicit(change.atime)
        || is_explicit(change.mtime);
    if needs_owner && !node.is_owned_by(caller) { Err(Errno::EPERM) } else { Ok(()) }
}

fn resolve(time: SetTime, now: Timespec) -> Timespec {
    match time {
        SetTime::Now => now,
        SetTime::At(time) => time.clamped(),
    }
}

/// The attribute that gives a program capabilities; it does not outlive a change of contents or owner.
pub(super) const CAPABILITY: &[u8] = b"security.capability";
