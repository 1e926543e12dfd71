//! Moving a name, with all flags of `renameat2`.

use super::{
    Draft, EntryKind, NewInode, Operation, Refusal, Victim,
    names::{Found, PlacedName},
    remove::Fate,
};
use crate::{Errno, Ino, InodeRow, Kind, RenameMode, RowKey};

/// Moves a name.
#[derive(Clone, Debug)]
pub(crate) struct Rename {
    pub(crate) from: (Ino, PlacedName),
    pub(crate) to: (Ino, PlacedName),
    pub(crate) mode: RenameMode,
    /// What the caller saw moving, if it saw a name in the way.
    pub(crate) source: Option<Ino>,
    /// What the caller saw that is to be exchanged with it.
    pub(crate) target: Option<Ino>,
    /// What the caller knows of the file that is replaced, if it saw one.
    pub(crate) victim: Option<Victim>,
}

impl Operation for Rename {
    /// What became of the inode in the way, if there was one.
    type Reply = Option<(Ino, Fate)>;
    const KIND: EntryKind = EntryKind::Rename;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Option<(Ino, Fate)>, Refusal> {
        let ((from, from_name), (to, to_name)) = (&self.from, &self.to);
        draft.directory(*from)?;
        draft.directory(*to)?;
        let source = draft.find_name(*from, from_name)?.ok_or(Errno::ENOENT)?;
        let target = draft.find_name(*to, to_name)?;
        match (&target, self.mode) {
            (None, RenameMode::Exchange) => return Err(Errno::ENOENT.into()),
            (Some(_), RenameMode::NoReplace) => return Err(Errno::EEXIST.into()),
            (Some(target), _) if target.ino == source.ino => return Ok(None),
            (Some(_), _) if self.source != Some(source.ino) => return Err(Refusal::Stale),
            // Its bytes may not be stored.
            (Some(target), RenameMode::Exchange) if self.target != Some(target.ino) => {
                return Err(Refusal::Stale);
            }
            _ => {}
        }
        let source_row = draft.inode(source.ino)?;
        if source.kind == Kind::Directory {
            draft.refuse_below_itself(source.ino, *to)?;
        }
        if let (Some(target), RenameMode::Exchange) = (&target, self.mode)
            && target.kind == Kind::Directory
        {
            draft.refuse_below_itself(target.ino, *from)?;
        }
        draft.may_remove(&draft.inode(*from)?, &source_row)?;
        draft.mention(from_name.name.to_bytes());
        draft.mention(to_name.name.to_bytes());
        let Some(target) = target else {
            self.take_free_name(draft, &source, source_row)?;
            return Ok(None);
        };
        draft.may_remove(&draft.inode(*to)?, &draft.inode(target.ino)?)?;
        if self.mode == RenameMode::Exchange {
            self.exchange(draft, &source, &target)?;
            return Ok(None);
        }
        let fate = self.replace(draft, &source, source_row, &target)?;
        Ok(Some((target.ino, fate)))
    }
}

impl Rename {
    fn take_free_name(
        &self,
        draft: &mut Draft<'_>,
        source: &Found,
        mut row: InodeRow,
    ) -> Result<(), Refusal> {
        let (from, (to, to_name)) = (self.from.0, &self.to);
        let cookie = draft.add_name(*to, to_name, source.ino, source.kind)?;
        draft.move_link(source.ino, &mut row, (from, source.cookie), (*to, cookie))?;
        row.ctime = draft.now();
        draft.put_inode(source.ino, &row)?;
        let directories = i32::from(source.kind == Kind::Directory);
        draft.touch_directory(*to, 1, directories)?;
        self.vacate(draft, source, directories)
    }

    /// Takes the old name away, or leaves a whiteout in its place.
    fn vacate(&self, draft: &mut Draft<'_>, source: &Found, directories: i32) -> Result<(), Refusal> {
        let (from, from_name) = &self.from;
        if self.mode != RenameMode::Whiteout {
            draft.remove_name(*from, source.cookie)?;
            return draft.touch_directory(*from, -1, -directories);
        }
        let whiteout = NewInode { kind: Kind::CharDevice, mode: 0, rdev: 0, size: 0 };
        let (ino, row) = (draft.newborn(), whiteout.row(draft, *from, source.cookie)?);
        draft.put_newborn(RowKey::inode(ino), row.encode());
        draft.count_inode();
        draft.replace_name(*from, source.cookie, &from_name.name, ino, Kind::CharDevice)?;
        draft.touch_directory(*from, 0, -directories)
    }

    fn exchange(&self, draft: &mut Draft<'_>, source: &Found, target: &Found) -> Result<(), Refusal> {
        let ((from, from_name), (to, to_name)) = (&self.from, &self.to);
        draft.replace_name(*from, source.cookie, &from_name.name, target.ino, target.kind)?;
        draft.replace_name(*to, target.cookie, &to_name.name, source.ino, source.kind)?;
        for (moved, place, goal) in [
            (source, (*from, source.cookie), (*to, target.cookie)),
            (target, (*to, target.cookie), (*from, source.cookie)),
        ] {
            let mut row = draft.inode(moved.ino)?;
            draft.move_link(moved.ino, &mut row, place, goal)?;
            row.ctime = draft.now();
            draft.put_inode(moved.ino, &row)?;
        }
        let difference =
            i32::from(source.kind == Kind::Directory) - i32::from(target.kind == Kind::Directory);
        draft.touch_directory(*to, 0, difference)?;
        draft.touch_directory(*from, 0, -difference)
    }

    fn replace(
        &self,
        draft: &mut Draft<'_>,
        source: &Found,
        mut row: InodeRow,
        target: &Found,
    ) -> Result<Fate, Refusal> {
        let (from, (to, to_name)) = (self.from.0, &self.to);
        match (source.kind == Kind::Directory, target.kind == Kind::Directory) {
            (true, false) => return Err(Errno::ENOTDIR.into()),
            (false, true) => return Err(Errno::EISDIR.into()),
            (true, true) if draft.directory(target.ino)?.children > 0 => return Err(Errno::ENOTEMPTY.into()),
            _ => {}
        }
        let target_row = draft.inode(target.ino)?;
        draft.replace_name(*to, target.cookie, &to_name.name, source.ino, source.kind)?;
        let fate = if target.kind == Kind::Directory {
            draft.erase_directory(target.ino, target_row)?
        } else {
            let victim =
                self.victim.as_ref().filter(|victim| victim.ino == target.ino).ok_or(Refusal::Stale)?;
            draft.drop_link(victim, target_row, (*to, target.cookie))?
        };
        draft.move_link(source.ino, &mut row, (from, source.cookie), (*to, target.cookie))?;
        row.ctime = draft.now();
        draft.put_inode(source.ino, &row)?;
        // A directory that replaces a directory leaves the counts of the target's parent as they are.
        draft.touch_directory(*to, 0, 0)?;
        self.vacate(draft, source, i32::from(source.kind == Kind::Directory))?;
        Ok(fate)
    }
}

impl Draft<'_> {
    /// EINVAL if `directory` is `below` or one of its ancestors.
    fn refuse_below_itself(&self, directory: Ino, below: Ino) -> Result<(), Refusal> {
        let mut at = below;
        while at != Ino::ROOT {
            if at == directory {
                return Err(Errno::EINVAL.into());
            }
            at = self.inode(at)?.parent;
        }
        Ok(())
    }
}
