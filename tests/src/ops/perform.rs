//! Each operation on both sides, and what of its answer must be the same.
//!
//! Invariants:
//! - An operation that needs a handle or a scan, when there is none, does nothing.

use std::time::Duration;

use bytes::Bytes;
use murphy_fs::{
    Answer, Attr, Caller, Errno, FileSystem, Name, NewNode, OpenFlags, Opened, RenameMode, SetAttr, SetTime,
    XattrMode, XattrName,
};

use super::{
    AttributePick, Length, Operation, Pick, Place, Step, TimePick,
    choose::{pool_name, xattr_name},
    contest::{Contest, Open, Side, Twin, Verdict},
};
use crate::pause;

impl Contest<'_> {
    pub(super) fn perform(&mut self, step: &Step) -> Verdict {
        use Operation as O;
        let caller = step.who.caller();
        match &step.operation {
            O::Lookup { place } => self.lookup(&caller, *place),
            O::Mkdir { .. } | O::Mknod { .. } | O::Symlink { .. } => self.make(&caller, &step.operation),
            O::Create { place, mode, flags } => self.create(&caller, *place, *mode, *flags),
            O::MkdirIn { node, name } => self.mkdir_in(&caller, *node, *name),
            O::InRemoved { removed, name } => self.in_removed(&caller, *removed, *name),
            O::Link { node, place } => self.link(&caller, self.pick(*node), *place),
            O::LinkOpen { handle, place } => match self.handle(*handle) {
                Some(open) => self.link(&caller, open.twin, *place),
                None => Ok(()),
            },
            O::Unlink { place } => {
                let (parent, name) = self.place(*place)?;
                self.equal(|fs, side| fs.unlink(&caller, parent.on(side), &name))
            }
            O::Rmdir { place } => {
                let (parent, name) = self.place(*place)?;
                self.equal(|fs, side| fs.rmdir(&caller, parent.on(side), &name))
            }
            O::Rename { from, to, mode } => self.rename(&caller, *from, *to, *mode),
            O::List { node, page } => self.list_node(*node, *page),
            O::BeginScan { directory } => self.begin_scan(*directory),
            O::GoOnScanning { scan, page } => self.go_on_scanning(*scan, *page),
            O::Statfs => self.compare_usage(),
            O::SyncAll => self.equal(|fs, _| fs.sync_all()),
            O::Wait { duration } => {
                self.pass(*duration);
                // The candidate's own tasks get a chance to run.
                pause(Duration::from_micros(100));
                Ok(())
            }
            O::Getattr { .. }
            | O::Setattr { .. }
            | O::SetattrByHandle { .. }
            | O::Readlink { .. }
            | O::Setxattr { .. }
            | O::Getxattr { .. }
            | O::Listxattr { .. }
            | O::Removexattr { .. } => self.perform_on_attributes(&caller, &step.operation),
            O::Open { .. }
            | O::Read { .. }
            | O::ReadAll { .. }
            | O::Write { .. }
            | O::Flush { .. }
            | O::Fsync { .. }
            | O::FsyncOpen { .. }
            | O::Release { .. }
            | O::ReadWrongFile { .. } => self.perform_on_data(&caller, &step.operation),
        }
    }

    fn perform_on_attributes(&mut self, caller: &Caller, operation: &Operation) -> Verdict {
        use Operation as O;
        match operation {
            O::Setattr { node, change } => self.setattr(caller, self.pick(*node), None, *change),
            O::SetattrByHandle { handle, change } => match self.handle(*handle) {
                Some(open) => self.setattr(caller, open.twin, Some(open), *change),
                None => Ok(()),
            },
            O::Readlink { node } => {
                let twin = self.pick(*node);
                self.equal(|fs, side| fs.readlink(twin.on(side)))
            }
            O::Setxattr { node, name, length, seed, mode } => {
                self.setxattr(caller, self.pick(*node), *name, &pattern(*seed, *length), *mode)
            }
            O::Getxattr { node, name } => {
                let (twin, name) = (self.pick(*node), attribute(*name));
                self.equal(|fs, side| fs.getxattr(caller, twin.on(side), &name))
            }
            O::Listxattr { node } => {
                let twin = self.pick(*node);
                self.equal(|fs, side| fs.listxattr(caller, twin.on(side)))
            }
            O::Removexattr { node, name } => {
                let (twin, name) = (self.pick(*node), attribute(*name));
                self.equal(|fs, side| fs.removexattr(caller, twin.on(side), &name))
            }
            // Every live inode's attributes are compared after every step.
            _ => Ok(()),
        }
    }

    fn perform_on_data(&mut self, caller: &Caller, operation: &Operation) -> Verdict {
        use Operation as O;
        let number = match operation {
            O::Open { node, flags } => return self.open(caller, *node, *flags),
            O::Fsync { node } => {
                let twin = self.pick(*node);
                return self.equal(|fs, side| fs.fsync(twin.on(side), None));
            }
            O::Read { handle, .. }
            | O::ReadAll { handle }
            | O::Write { handle, .. }
            | O::Flush { handle }
            | O::FsyncOpen { handle }
            | O::Release { handle }
            | O::ReadWrongFile { handle, .. } => *handle,
            _ => return Ok(()),
        };
        let Some(open) = self.handle(number) else { return Ok(()) };
        let twin = open.twin;
        match operation {
            O::Read { offset, length, .. } => self.read(open, twin, *offset, *length),
            O::ReadWrongFile { node, .. } => self.read(open, self.pick(*node), 0, 100),
            O::ReadAll { .. } => self.compare_contents(open),
            O::Write { offset, length, seed, .. } => {
                let data = pattern(*seed, *length);
                self.equal(|fs, side| fs.write(caller, twin.on(side), open.on(side), *offset, data.clone()))
            }
            O::Flush { .. } => self.equal(|fs, side| fs.flush(twin.on(side), open.on(side))),
            O::FsyncOpen { .. } => self.equal(|fs, side| fs.fsync(twin.on(side), Some(open.on(side)))),
            _ => {
                self.open.swap_remove(usize::from(number) % self.open.len());
                self.release(open);
                self.equal(|fs, side| fs.flush(twin.on(side), open.on(side)))
            }
        }
    }

    fn handle(&self, number: u16) -> Option<Open> {
        self.open.get(usize::from(number).checked_rem(self.open.len())?).copied()
    }

    fn lookup(&self, caller: &Caller, place: Place) -> Verdict {
        let (parent, name) = self.place(place)?;
        match self.agree(|fs, side| fs.lookup(caller, parent.on(side), &name))? {
            Some((first, second)) => self.same(&first, &second),
            None => Ok(()),
        }
    }

    /// Whatever creates an inode and gives its attributes.
    fn make(&mut self, caller: &Caller, operation: &Operation) -> Verdict {
        let (Operation::Mkdir { place, .. }
        | Operation::Mknod { place, .. }
        | Operation::Symlink { place, .. }) = operation
        else {
            return Ok(());
        };
        let (parent, name) = self.place(*place)?;
        self.bear(|fs, side| {
            let parent = parent.on(side);
            match operation {
                Operation::Mknod { kind, mode, rdev, .. } => {
                    fs.mknod(caller, parent, &name, NewNode { kind: *kind, mode: *mode, rdev: *rdev })
                }
                Operation::Symlink { target, .. } => fs.symlink(caller, parent, &name, target),
                Operation::Mkdir { mode, .. } => fs.mkdir(caller, parent, &name, *mode),
                _ => Answer::Now(Err(Errno::ENOSYS)),
            }
        })
    }

    fn mkdir_in(&mut self, caller: &Caller, node: Pick, number: u8) -> Verdict {
        let twin = self.pick(node);
        self.bear(|fs, side| fs.mkdir(caller, twin.on(side), &name(number), 0o755))
    }

    fn bear(&mut self, call: impl Fn(&dyn FileSystem, Side) -> Answer<Attr>) -> Verdict {
        match self.agree(call)? {
            Some((first, second)) => self.born(&first, &second),
            None => Ok(()),
        }
    }

    fn create(&mut self, caller: &Caller, place: Place, mode: u16, flags: OpenFlags) -> Verdict {
        let (parent, name) = self.place(place)?;
        match self.agree(|fs, side| fs.create(caller, parent.on(side), &name, mode, flags))? {
            Some(((first, opened), (second, also_opened))) => {
                self.born(&first, &second)?;
                let twin = self.nodes.last().expect("was just born").twin;
                self.opened(twin, opened, also_opened)
            }
            None => Ok(()),
        }
    }

    fn open(&mut self, caller: &Caller, node: Pick, flags: OpenFlags) -> Verdict {
        let twin = self.pick(node);
        if self.open.len() == HANDLES_MAX {
            return Ok(());
        }
        match self.agree(|fs, side| fs.open(caller, twin.on(side), flags))? {
            Some((first, second)) => self.opened(twin, first, second),
            None => Ok(()),
        }
    }

    /// A cache above may only be kept if the judge knows that nothing changed.
    fn opened(&mut self, twin: Twin, first: Opened, second: Opened) -> Verdict {
        self.open.push(Open { twin, reference: first.handle, candidate: second.handle });
        if second.unchanged && !first.unchanged {
            return Err(
                "the candidate says that data is unchanged that was changed since the last open".to_owned()
            );
        }
        Ok(())
    }

    fn read(&self, open: Open, twin: Twin, offset: u64, length: u32) -> Verdict {
        let answers = self.agree(|fs, side| fs.read(twin.on(side), open.on(side), offset, length))?;
        let Some((first, second)) = answers else { return Ok(()) };
        if first.len() != second.len() {
            return Err(format!("{} bytes, not {}", first.len(), second.len()));
        }
        match first.iter().zip(&second).position(|(first, second)| first != second) {
            Some(at) => {
                Err(format!("byte {} is {:#04x}, not {:#04x}", offset + at as u64, first[at], second[at]))
            }
            None => Ok(()),
        }
    }

    fn link(&self, caller: &Caller, twin: Twin, place: Place) -> Verdict {
        let (parent, name) = self.place(place)?;
        match self.agree(|fs, side| fs.link(caller, twin.on(side), parent.on(side), &name))? {
            Some((first, second)) => self.same(&first, &second),
            None => Ok(()),
        }
    }

    fn rename(&mut self, caller: &Caller, from: Place, to: Place, mode: RenameMode) -> Verdict {
        let (from_parent, from) = self.place(from)?;
        let (to_parent, to) = self.place(to)?;
        self.equal(|fs, side| {
            fs.rename(caller, (from_parent.on(side), &from), (to_parent.on(side), &to), mode)
        })?;
        if mode != RenameMode::Whiteout {
            return Ok(());
        }
        // A whiteout is a new inode whose number no answer tells.
        self.compare_lists(from_parent, usize::from(u8::MAX))
    }

    /// In a directory that is gone nothing may be made or found; whether it is still known is free.
    fn in_removed(&self, caller: &Caller, removed: u16, number: u8) -> Verdict {
        let count = self.removed_directories.len();
        let Some(index) = usize::from(removed).checked_rem(count) else { return Ok(()) };
        let (twin, root) = (self.removed_directories[index], self.directory(0));
        for side in Side::BOTH {
            let (fs, directory, name) = (self.side(side), twin.on(side), name(number));
            let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
            let answers = [
                self.driver.wait(fs.lookup(caller, directory, &name)).map(|_| ()),
                self.driver.wait(fs.mkdir(caller, directory, &name, 0o755)).map(|_| ()),
                self.driver.wait(fs.create(caller, directory, &name, 0o644, flags)).map(|_| ()),
                self.driver.wait(fs.symlink(caller, directory, &name, b"target")).map(|_| ()),
            ];
            if let Some(answer) =
                answers.into_iter().find(|answer| !matches!(answer, Err(Errno::ENOENT | Errno::ESTALE)))
            {
                return Err(format!("{side:?}: in a removed directory: {answer:?}"));
            }
            let entries = self.list(Side::Reference, root, usize::from(u8::MAX))?;
            if let Some((existing, _)) = entries.first_key_value() {
                let moved =
                    fs.rename(caller, (root.on(side), existing), (directory, &name), RenameMode::Replace);
                if !matches!(self.driver.wait(moved), Err(Errno::ENOENT | Errno::ESTALE)) {
                    return Err(format!("{side:?}: a name was moved into a removed directory"));
                }
            }
            if self.driver.wait(fs.readdir(directory, 0, 10)).is_ok_and(|entries| !entries.is_empty()) {
                return Err(format!("{side:?}: a removed directory has entries"));
            }
        }
        Ok(())
    }

    fn list_node(&mut self, node: Pick, page: u8) -> Verdict {
        let twin = self.pick(node);
        if self.agree(|fs, side| fs.readdir(twin.on(side), 0, usize::from(page)))?.is_none() {
            return Ok(());
        }
        self.compare_lists(twin, usize::from(page))?;
        match self.agree(|fs, side| fs.parent(twin.on(side)))? {
            Some((first, second)) if self.candidate_of(first) != Some(second) => {
                Err(format!("parent {first}, not {second}"))
            }
            _ => Ok(()),
        }
    }

    fn setattr(&self, caller: &Caller, twin: Twin, open: Option<Open>, pick: AttributePick) -> Verdict {
        let size = self.driver.wait(self.side(Side::Reference).getattr(twin.on(Side::Reference)));
        let size = size.map_or(0, |attr| attr.size);
        let change = SetAttr {
            mode: pick.mode,
            uid: pick.uid.map(|who| who.caller().uid),
            gid: pick.gid.map(|who| who.caller().gid),
            size: pick.size.map(|length| match length {
                Length::Bytes(bytes) => bytes,
                Length::Relative(by) => size.saturating_add_signed(i64::from(by)),
            }),
            atime: time(pick.atime),
            mtime: time(pick.mtime),
        };
        let answers = self
            .agree(|fs, side| fs.setattr(caller, twin.on(side), open.map(|open| open.on(side)), change))
            .map_err(|what| format!("{change:?}: {what}"))?;
        match answers {
            Some((first, second)) => self.same(&first, &second),
            None => Ok(()),
        }
    }

    fn setxattr(&self, caller: &Caller, twin: Twin, name: u8, value: &Bytes, mode: XattrMode) -> Verdict {
        let name = attribute(name);
        self.equal(|fs, side| fs.setxattr(caller, twin.on(side), &name, value.clone(), mode))?;
        let shown = self.agree(|fs, side| fs.getxattr(&Caller::default(), twin.on(side), &name))?;
        match shown {
            Some((first, second)) if first != second => Err(format!("{name:?} has another value")),
            _ => Ok(()),
        }
    }
}

pub(super) fn name(number: u8) -> Name {
    Name::new(pool_name(number)).expect("the pool has names")
}

fn attribute(number: u8) -> XattrName {
    XattrName::new(xattr_name(number)).expect("the pool has names of attributes")
}

fn time(pick: TimePick) -> Option<SetTime> {
    match pick {
        TimePick::Omit => None,
        TimePick::Now => Some(SetTime::Now),
        TimePick::At(time) => Some(SetTime::At(time)),
    }
}

/// Bytes that differ from place to place, so that a shifted or repeated block is seen.
fn pattern(seed: u8, length: u32) -> Bytes {
    let byte = |at: u32| (at.wrapping_mul(0x9e37_79b1).rotate_left(9) >> 24) as u8 ^ seed;
    (0..length).map(byte).collect::<Vec<u8>>().into()
}

/// Open files at once.
const HANDLES_MAX: usize = 40;
