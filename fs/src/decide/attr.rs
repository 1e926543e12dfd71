//! Changing attributes other than the length.

use super::{Draft, EntryKind, Operation, Refusal};
use crate::{Attr, DirectoryRow, Errno, Ino, InodeRow, Kind, SetAttr, SetTime, Timespec};

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
        apply(draft, &mut row, directory.as_mut(), &self.change)?;
        draft.put_inode(self.ino, &row)?;
        if let Some(directory) = &directory {
            draft.put_directory(self.ino, directory)?;
        }
        Ok(row.attr(self.ino, directory.as_ref()))
    }
}

/// Takes setuid and setgid away because somebody without privilege wrote to the file.
#[derive(Clone, Debug)]
pub(crate) struct DropPrivilege {
    pub(crate) ino: Ino,
}

impl Operation for DropPrivilege {
    type Reply = ();
    const KIND: EntryKind = EntryKind::Setattr;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<(), Refusal> {
        let mut row = draft.inode(self.ino)?;
        row.mode = without_privilege(row.mode);
        draft.put_inode(self.ino, &row)
    }
}

/// Changes everything but the length in `row`, and the times of a directory in `directory`.
pub(super) fn apply(
    draft: &Draft<'_>,
    row: &mut InodeRow,
    directory: Option<&mut DirectoryRow>,
    change: &SetAttr,
) -> Result<(), Refusal> {
    change_owner(draft, row, change.uid, change.gid)?;
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

/// chown: root may do all; an owner may give the file to the own group. Executables lose setuid and setgid.
fn change_owner(
    draft: &Draft<'_>,
    row: &mut InodeRow,
    uid: Option<u32>,
    gid: Option<u32>,
) -> Result<(), Refusal> {
    let caller = draft.caller();
    if uid.is_none() && gid.is_none() {
        return Ok(());
    }
    if caller.uid != 0 {
        let keeps_owner = uid.is_none_or(|uid| uid == row.uid && uid == caller.uid);
        let may_group = gid.is_none_or(|gid| caller.uid == row.uid && (gid == row.gid || gid == caller.gid));
        if !keeps_owner || !may_group {
            return Err(Errno::EPERM.into());
        }
    }
    row.uid = uid.unwrap_or(row.uid);
    row.gid = gid.unwrap_or(row.gid);
    if row.kind != Kind::Directory {
        row.mode = without_privilege(row.mode);
    }
    Ok(())
}

/// chmod: for the owner and root. Setgid is dropped silently for a caller outside the file's group.
fn change_mode(draft: &Draft<'_>, row: &mut InodeRow, mode: u16) -> Result<(), Refusal> {
    let caller = draft.caller();
    if caller.uid != 0 && caller.uid != row.uid {
        return Err(Errno::EPERM.into());
    }
    row.mode = mode & 0o7777;
    if caller.uid != 0 && caller.gid != row.gid {
        row.mode &= !SETGID;
    }
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

/// The mode that is left when somebody without privilege changes a file: no setuid, and no setgid if its group may execute it.
pub(crate) fn without_privilege(mode: u16) -> u16 {
    let mode = mode & !SETUID;
    if mode & GROUP_EXECUTE != 0 { mode & !SETGID } else { mode }
}

const SETUID: u16 = 0o4000;
const SETGID: u16 = 0o2000;
const GROUP_EXECUTE: u16 = 0o010;
