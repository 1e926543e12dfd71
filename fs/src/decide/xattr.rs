//! Extended attributes.

use bytes::Bytes;

use super::{Draft, EntryKind, Operation, Refusal};
use crate::{Errno, Ino, InodeRow, Kind, RowKey, XattrMode, XattrName, XattrRow};

/// Sets an attribute.
#[derive(Clone, Debug)]
pub(crate) struct SetXattr {
    pub(crate) ino: Ino,
    pub(crate) name: XattrName,
    pub(crate) value: Bytes,
    pub(crate) mode: XattrMode,
    /// Whether somebody has it open. An orphan that nobody has open is being purged: what comes to it now would stay behind.
    pub(crate) open: bool,
}

impl Operation for SetXattr {
    type Reply = ();
    const KIND: EntryKind = EntryKind::Setxattr;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(), Refusal> {
        let mut row = draft.inode(self.ino)?;
        check_namespace(&self.name)?;
        if row.nlink == 0 && !self.open {
            return Err(Errno::ESTALE.into());
        }
        if self.value.len() > XATTR_MAX {
            return Err(Errno::E2BIG.into());
        }
        may_change(draft, &row, &self.name)?;
        let key = RowKey::xattr(self.ino, &self.name);
        match (draft.row(&key)?.is_some(), self.mode) {
            (true, XattrMode::Create) => return Err(Errno::EEXIST.into()),
            (false, XattrMode::Replace) => return Err(Errno::ENODATA.into()),
            _ => {}
        }
        draft.mention(self.name.to_bytes());
        draft.put(key, Some(XattrRow { value: self.value.clone() }.encode()))?;
        row.has_xattrs = true;
        row.ctime = draft.now();
        draft.put_inode(self.ino, &row)
    }
}

/// Removes an attribute. The inode's flag stays: a wrong "may have some" costs a lookup, a wrong "has none" would hide one.
#[derive(Clone, Debug)]
pub(crate) struct RemoveXattr {
    pub(crate) ino: Ino,
    pub(crate) name: XattrName,
}

impl Operation for RemoveXattr {
    type Reply = ();
    const KIND: EntryKind = EntryKind::Removexattr;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(), Refusal> {
        let mut row = draft.inode(self.ino)?;
        may_change(draft, &row, &self.name)?;
        let key = RowKey::xattr(self.ino, &self.name);
        if draft.row(&key)?.is_none() {
            return Err(Errno::ENODATA.into());
        }
        draft.mention(self.name.to_bytes());
        draft.put(key, None)?;
        row.ctime = draft.now();
        draft.put_inode(self.ino, &row)
    }
}

/// Whether attributes with this name exist at all.
pub(crate) fn check_namespace(name: &XattrName) -> Result<(), Errno> {
    let name = name.as_bytes();
    let known = NAMESPACES.iter().any(|prefix| name.starts_with(prefix));
    match (known, NAMESPACES.contains(&name)) {
        (true, false) => Ok(()),
        (true, true) => Err(Errno::EINVAL),
        (false, _) => Err(Errno::EOPNOTSUPP),
    }
}

/// `user.` on files and directories; `trusted.` for root; `security.` for root, as without a security module.
fn may_change(draft: &Draft<'_>, row: &InodeRow, name: &XattrName) -> Result<(), Refusal> {
    check_namespace(name)?;
    let bytes = name.as_bytes();
    if bytes.starts_with(b"user.") {
        if !matches!(row.kind, Kind::File | Kind::Directory) {
            return Err(Errno::EPERM.into());
        }
    } else if draft.caller().uid != 0 {
        return Err(Errno::EPERM.into());
    }
    Ok(())
}

const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
/// The longest value of an attribute, in bytes (Linux's own limit).
const XATTR_MAX: usize = 65_536;
