//! Changing attributes other than the length.

use super::{Draft, EntryKind, Operation, Refusal};
use crate::{
    Attr, DirectoryRow, Errno, Ino, InodeRow, Kind, RowKey, SetAttr, SetTime, Timespec, table::Table,
};

/// Changes mode, owner and times. The length is [`super::Truncate`]'s.
#[derive(Clone, Debug)]
pub(crate) struct SetAttributes {
    pub(crate) ino: Ino,
    pub(crate) change: SetAttr,
}

impl Operation for SetAttributes {
    type Reply = Attr;
    const KIND: EntryKind = EntryKind::Setattr;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Attr, Refusal> {
        let mut row = draft.inode(self.ino)?;
        let mut directory = match row.kind {
            Kind::Directory if row.nlink > 0 => Some(draft.directory(self.ino)?),
            _ => None,
        };
        apply(draft, self.ino, &mut row, directory.as_mut(), &self.change)?;
        draft.put_inode(self.ino, &row)?;
        if let Some(directory) = &directory {
            draft.put_directory(self.ino, directory)?;
        }
        Ok(row.attr(self.ino, directory.as_ref()))
    }
}

/// Takes from a file what somebody's writing to it takes away.
#[derive(Clone, Debug)]
pub(crate) struct DropPrivilege {
    pub(crate) ino: Ino,
}

impl Operation for DropPrivilege {
    type Reply = ();
    const KIND: EntryKind = EntryKind::Setattr;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(), Refusal> {
        let mut row = draft.inode(self.ino)?;
        drop_privilege(draft, self.ino, &mut row)?;
        draft.put_inode(self.ino, &row)
    }
}

/// Changes everything but the length in `row`, and the times of a directory in `directory`.
pub(super) fn apply(
    draft: &mut Draft<'_>,
    ino: Ino,
    row: &mut InodeRow,
    directory: Option<&mut DirectoryRow>,
    change: &SetAttr,
) -> Result<(), Refusal> {
    if change.mode.is_some() && row.kind == Kind::Symlink {
        return Err(Errno::EOPNOTSUPP.into());
    }
    change_owner(draft, ino, row, change.uid, change.gid)?;
    if let Some(mode) = change.mode {
        change_mode(draft, row, mode)?;
    }
    if let Some(time) = change.atime {
        row.atime = time_to_set(draft, row, time)?;
    }
    if let Some(time) = change.mtime {
        let mtime = time_to_set(draft, row, time)?;
        match directory {
            Some(directory) => directory.mtime = mtime,
            None if row.kind != Kind::Directory => row.mtime = mtime,
            None => {}
        }
    }
    if *change != SetAttr::default() {
        row.ctime = draft.now();
    }
    Ok(())
}

/// chown: the owner is root's to change, the group the owner's. Which groups an owner may choose, the kernel checks: it knows them.
/// Anything but a directory loses its privileges, whoever asks.
fn change_owner(
    draft: &mut Draft<'_>,
    ino: Ino,
    row: &mut InodeRow,
    uid: Option<u32>,
    gid: Option<u32>,
) -> Result<(), Refusal> {
    if uid.is_none() && gid.is_none() {
        return Ok(());
    }
    let caller = draft.caller().uid;
    let keeps_owner = uid.is_none_or(|uid| uid == row.uid);
    if caller != 0 && !(caller == row.uid && keeps_owner) {
        return Err(Errno::EPERM.into());
    }
    row.uid = uid.unwrap_or(row.uid);
    row.gid = gid.unwrap_or(row.gid);
    if row.kind != Kind::Directory {
        row.mode &= !SETUID;
        if row.mode & GROUP_EXECUTE != 0 {
            row.mode &= !SETGID;
        }
        drop_capability(draft, ino, row)?;
    }
    Ok(())
}

/// chmod: for the owner and root.
fn change_mode(draft: &Draft<'_>, row: &mut InodeRow, mode: u16) -> Result<(), Refusal> {
    if draft.caller().uid != 0 && draft.caller().uid != row.uid {
        return Err(Errno::EPERM.into());
    }
    row.mode = mode & 0o7777;
    Ok(())
}

fn time_to_set(draft: &Draft<'_>, row: &InodeRow, time: SetTime) -> Result<Timespec, Refusal> {
    match time {
        SetTime::Now => Ok(draft.now()),
        SetTime::At(_) if draft.caller().uid != 0 && draft.caller().uid != row.uid => {
            Err(Errno::EPERM.into())
        }
        SetTime::At(time) => Ok(time.clamped()),
    }
}

/// What writing takes away from a file: its capabilities, and unless root writes, setuid and setgid.
pub(super) fn drop_privilege(draft: &mut Draft<'_>, ino: Ino, row: &mut InodeRow) -> Result<(), Refusal> {
    if draft.caller().uid != 0 {
        row.mode &= !(SETUID | SETGID);
    }
    drop_capability(draft, ino, row)
}

fn drop_capability(draft: &mut Draft<'_>, ino: Ino, row: &InodeRow) -> Result<(), Refusal> {
    if !row.has_xattrs {
        return Ok(());
    }
    draft.put(capability_key(ino), None)
}

/// Where the capabilities of an executable are.
pub(crate) fn capability_key(ino: Ino) -> RowKey {
    let mut key = ino.get().to_be_bytes().to_vec();
    key.extend_from_slice(b"security.capability");
    RowKey::from_parts(Table::Xattr.number(), &key)
}

/// Whether a write by `uid` takes setuid or setgid away.
pub(crate) fn loses_mode_bits(row: &InodeRow, uid: u32) -> bool {
    uid != 0 && row.mode & (SETUID | SETGID) != 0
}

const SETUID: u16 = 0o4000;
const SETGID: u16 = 0o2000;
const GROUP_EXECUTE: u16 = 0o010;
