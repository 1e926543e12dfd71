//! System calls into a [`FileSystem`], with the part of a kernel in between: paths, permission bits, open files.

use bytes::Bytes;
use murphy_fs::{
    Attr, Caller, Errno, FileSystem, Handle, Ino, Kind, Name, NewNode, OpenFlags, SetAttr, SetTime, Timespec,
    XattrName,
};

use super::{Call, Calls, Failed, How, NOWHERE, Reply, Spot, attribute, owner, pattern};
use crate::{Driver, Who};

/// A file system under a small kernel.
pub struct Modelled<'a> {
    driver: &'a Driver,
    fs: &'a dyn FileSystem,
    open: Vec<OpenFile>,
}

/// An open file or directory.
#[derive(Clone, Copy)]
struct OpenFile {
    ino: Ino,
    /// None for a directory.
    handle: Option<Handle>,
    how: How,
}

type Answered<T = Reply> = Result<T, Errno>;

impl<'a> Modelled<'a> {
    /// A kernel over `fs`, in whose root everybody may write.
    ///
    /// # Panics
    /// If the root cannot be changed.
    pub fn new(driver: &'a Driver, fs: &'a dyn FileSystem) -> Modelled<'a> {
        let all = SetAttr { mode: Some(0o777), uid: Some(0), gid: Some(0), ..SetAttr::default() };
        driver.wait(fs.setattr(&Caller::default(), Ino::ROOT, None, all)).expect("the root takes a mode");
        Modelled { driver, fs, open: Vec::new() }
    }

    fn attr(&self, ino: Ino) -> Answered<Attr> {
        self.driver.wait(self.fs.getattr(ino))
    }

    /// The directory in which `at` is, searched by the caller from the root on.
    fn directory(&self, caller: &Caller, at: &Spot) -> Answered<Ino> {
        let mut ino = Ino::ROOT;
        for name in at.directory() {
            ino = self.child(caller, ino, &Name::new(name.to_vec()).map_err(|_| Errno::EINVAL)?)?.ino;
            match self.attr(ino)?.kind {
                Kind::Directory => {}
                // It leads nowhere.
                Kind::Symlink => return Err(Errno::ENOENT),
                _ => return Err(Errno::ENOTDIR),
            }
        }
        self.permit(caller, ino, SEARCH)?;
        Ok(ino)
    }

    fn child(&self, caller: &Caller, directory: Ino, name: &Name) -> Answered<Attr> {
        self.permit(caller, directory, SEARCH)?;
        self.driver.wait(self.fs.lookup(caller, directory, name))
    }

    /// The directory and the name, which may be too long.
    fn place(&self, caller: &Caller, at: &Spot) -> Answered<(Ino, Name)> {
        let directory = self.directory(caller, at)?;
        Ok((directory, Name::new(at.name()).map_err(|_| Errno::ENAMETOOLONG)?))
    }

    fn node(&self, caller: &Caller, at: &Spot) -> Answered<Attr> {
        let (directory, name) = self.place(caller, at)?;
        self.child(caller, directory, &name)
    }

    /// As [`Modelled::node`], following a link at the end, to nowhere.
    fn followed(&self, caller: &Caller, at: &Spot) -> Answered<Attr> {
        let attr = self.node(caller, at)?;
        if attr.kind == Kind::Symlink { Err(Errno::ENOENT) } else { Ok(attr) }
    }

    fn permit(&self, caller: &Caller, ino: Ino, wanted: u16) -> Answered<()> {
        let attr = self.attr(ino)?;
        let shift = match attr {
            _ if caller.uid == 0 => {
                let executable = attr.kind == Kind::Directory || attr.mode & 0o111 != 0;
                return if wanted & SEARCH == 0 || executable { Ok(()) } else { Err(Errno::EACCES) };
            }
            attr if attr.uid == caller.uid => 6,
            attr if attr.gid == caller.gid => 3,
            _ => 0,
        };
        if attr.mode >> shift & wanted == wanted { Ok(()) } else { Err(Errno::EACCES) }
    }

    /// A name that is to be made: it must not be there, and the directory must be writable.
    fn vacant(&self, caller: &Caller, at: &Spot) -> Answered<(Ino, Name)> {
        let (directory, name) = self.place(caller, at)?;
        match self.child(caller, directory, &name) {
            Ok(_) => Err(Errno::EEXIST),
            Err(Errno::ENOENT) => self.permit(caller, directory, WRITE | SEARCH).map(|()| (directory, name)),
            Err(errno) => Err(errno),
        }
    }

    /// A name that is to be removed.
    fn removable(&self, caller: &Caller, at: &Spot) -> Answered<(Ino, Name, Attr)> {
        let (directory, name) = self.place(caller, at)?;
        let attr = self.child(caller, directory, &name)?;
        self.permit(caller, directory, WRITE | SEARCH)?;
        let above = self.attr(directory)?;
        let sticky = above.mode & 0o1000 != 0 && caller.uid != 0;
        if sticky && caller.uid != above.uid && caller.uid != attr.uid {
            return Err(Errno::EPERM);
        }
        Ok((directory, name, attr))
    }

    fn run(&mut self, caller: &Caller, call: &Call) -> Answered {
        match call {
            Call::Open { at, how, mode } => self.open(caller, at, *how, *mode),
            Call::Close { .. }
            | Call::Read { .. }
            | Call::Write { .. }
            | Call::TruncateOpen { .. }
            | Call::Fsync { .. }
            | Call::StatOpen { .. } => self.on_open(caller, call),
            Call::Setxattr { .. }
            | Call::Getxattr { .. }
            | Call::Listxattr { .. }
            | Call::Removexattr { .. } => self.on_attributes(caller, call),
            Call::Chmod { .. }
            | Call::Chown { .. }
            | Call::Utimens { .. }
            | Call::Truncate { .. }
            | Call::Stat { .. }
            | Call::Readlink { .. }
            | Call::List { .. } => self.on_nodes(caller, call),
            _ => self.on_names(caller, call),
        }
    }

    fn open(&mut self, caller: &Caller, at: &Spot, how: How, mode: u16) -> Answered {
        let flags = OpenFlags {
            read: how.read,
            write: how.write,
            append: how.append,
            truncate: how.truncate,
            sync: false,
        };
        let (directory, name) = self.place(caller, at)?;
        let found = match self.child(caller, directory, &name) {
            Err(Errno::ENOENT) if how.create => {
                self.permit(caller, directory, WRITE | SEARCH)?;
                let created = self.fs.create(caller, directory, &name, mode, flags);
                let (attr, opened) = self.driver.wait(created)?;
                self.open.push(OpenFile { ino: attr.ino, handle: Some(opened.handle), how });
                return Ok(Reply::Done);
            }
            found => found?,
        };
        if how.exclusive {
            return Err(Errno::EEXIST);
        }
        let wanted = if how.read { READ } else { 0 } | if how.write { WRITE } else { 0 };
        match found.kind {
            Kind::Symlink => return Err(Errno::ELOOP),
            Kind::Directory if how.create || how.write => return Err(Errno::EISDIR),
            _ => self.permit(caller, found.ino, wanted)?,
        }
        let handle = match found.kind {
            Kind::Directory => None,
            Kind::File => Some(self.driver.wait(self.fs.open(caller, found.ino, flags))?.handle),
            _ => return Err(Errno::ENXIO),
        };
        self.open.push(OpenFile { ino: found.ino, handle, how });
        Ok(Reply::Done)
    }

    fn on_open(&mut self, caller: &Caller, call: &Call) -> Answered {
        let (Call::Close { file: number }
        | Call::Read { file: number, .. }
        | Call::Write { file: number, .. }
        | Call::TruncateOpen { file: number, .. }
        | Call::Fsync { file: number }
        | Call::StatOpen { file: number }) = call
        else {
            return Err(Errno::ENOSYS);
        };
        let at = usize::from(*number).checked_rem(self.open.len()).ok_or(Errno::EBADF)?;
        let OpenFile { ino, handle, how } = self.open[at];
        match (call, handle) {
            (Call::Close { .. }, _) => {
                self.open.remove(at);
                if let Some(handle) = handle {
                    self.driver.wait(self.fs.flush(ino, handle))?;
                    self.fs.release(ino, handle);
                }
                Ok(Reply::Done)
            }
            (Call::StatOpen { .. }, _) => Ok(stat_reply(&self.attr(ino)?)),
            (Call::Fsync { .. }, _) => {
                self.driver.wait(self.fs.fsync(ino, handle))?;
                Ok(Reply::Done)
            }
            (Call::Read { .. }, _) if !how.read => Err(Errno::EBADF),
            (Call::Write { .. }, _) if !how.write => Err(Errno::EBADF),
            (Call::TruncateOpen { .. }, _) if !how.write => Err(Errno::EINVAL),
            (_, None) => Err(Errno::EISDIR),
            (Call::Read { offset, length, .. }, Some(handle)) => {
                let bytes = self.driver.wait(self.fs.read(ino, handle, *offset, u32::from(*length)))?;
                Ok(Reply::Bytes(bytes.to_vec()))
            }
            (Call::Write { offset, length, seed, .. }, Some(handle)) => {
                // A kernel does not pass an empty write on.
                if *length == 0 {
                    return Ok(Reply::Count(0));
                }
                let data = Bytes::from(pattern(*length, *seed));
                let count = self.driver.wait(self.fs.write(caller, ino, handle, *offset, data))?;
                Ok(Reply::Count(u64::from(count)))
            }
            (Call::TruncateOpen { size, .. }, Some(handle)) => {
                let change = SetAttr { size: Some(*size), ..SetAttr::default() };
                self.driver.wait(self.fs.setattr(caller, ino, Some(handle), change))?;
                Ok(Reply::Done)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    fn on_names(&self, caller: &Caller, call: &Call) -> Answered {
        match call {
            Call::Mkdir { at, mode } => {
                let (directory, name) = self.vacant(caller, at)?;
                self.driver.wait(self.fs.mkdir(caller, directory, &name, *mode & 0o1777))?;
            }
            Call::Socket { at, mode } => {
                let (directory, name) = self.vacant(caller, at)?;
                let node = NewNode { kind: Kind::Socket, mode: *mode, rdev: 0 };
                self.driver.wait(self.fs.mknod(caller, directory, &name, node))?;
            }
            Call::Symlink { at } => {
                let (directory, name) = self.vacant(caller, at)?;
                self.driver.wait(self.fs.symlink(caller, directory, &name, NOWHERE))?;
            }
            Call::Link { from, to } => {
                let attr = self.node(caller, from)?;
                let (directory, name) = self.vacant(caller, to)?;
                self.driver.wait(self.fs.link(caller, attr.ino, directory, &name))?;
            }
            Call::Unlink { at } => {
                let (directory, name, _) = self.removable(caller, at)?;
                self.driver.wait(self.fs.unlink(caller, directory, &name))?;
            }
            Call::Rmdir { at } => {
                let (directory, name, _) = self.removable(caller, at)?;
                self.driver.wait(self.fs.rmdir(caller, directory, &name))?;
            }
            Call::Rename { from, to, mode } => self.rename(caller, (from, to), *mode)?,
            _ => return Err(Errno::ENOSYS),
        }
        Ok(Reply::Done)
    }

    fn rename(
        &self,
        caller: &Caller,
        (from, to): (&Spot, &Spot),
        mode: murphy_fs::RenameMode,
    ) -> Answered<()> {
        use murphy_fs::RenameMode::{Exchange, NoReplace};
        let (from_directory, to_directory) = (self.directory(caller, from)?, self.directory(caller, to)?);
        let name = |at: &Spot| Name::new(at.name()).map_err(|_| Errno::ENAMETOOLONG);
        let from_name = name(from)?;
        let source = self.child(caller, from_directory, &from_name)?;
        let to_name = name(to)?;
        let target = match self.child(caller, to_directory, &to_name) {
            Ok(_) if mode == NoReplace => return Err(Errno::EEXIST),
            Ok(target) => Some(target),
            Err(Errno::ENOENT) if mode != Exchange => None,
            Err(errno) => return Err(errno),
        };
        self.check_loops((from_directory, &source), (to_directory, target.as_ref()), mode == Exchange)?;
        // Both names of one inode: nothing happens, whoever asks.
        if target.is_some_and(|target| target.ino == source.ino) {
            return Ok(());
        }
        self.removable(caller, from)?;
        match target {
            None => self.permit(caller, to_directory, WRITE | SEARCH)?,
            Some(target) => {
                self.removable(caller, to)?;
                let is_directory = |attr: &Attr| attr.kind == Kind::Directory;
                if mode != Exchange && is_directory(&source) != is_directory(&target) {
                    return Err(if is_directory(&source) { Errno::ENOTDIR } else { Errno::EISDIR });
                }
            }
        }
        if from_directory != to_directory {
            let moved = [Some(source), target.filter(|_| mode == Exchange)];
            for moved in moved.into_iter().flatten().filter(|attr| attr.kind == Kind::Directory) {
                // Its `..` changes.
                self.permit(caller, moved.ino, WRITE)?;
            }
        }
        self.driver.wait(self.fs.rename(caller, (from_directory, &from_name), (to_directory, &to_name), mode))
    }

    /// A directory must not come below itself, nor take the place of one above it.
    fn check_loops(&self, from: (Ino, &Attr), to: (Ino, Option<&Attr>), exchange: bool) -> Answered<()> {
        if self.is_above(from.1.ino, to.0)? {
            return Err(Errno::EINVAL);
        }
        if let Some(target) = to.1
            && self.is_above(target.ino, from.0)?
        {
            return Err(if exchange { Errno::EINVAL } else { Errno::ENOTEMPTY });
        }
        Ok(())
    }

    fn is_above(&self, ino: Ino, below: Ino) -> Answered<bool> {
        let mut at = below;
        loop {
            if at == ino {
                return Ok(true);
            }
            if at == Ino::ROOT {
                return Ok(false);
            }
            at = self.driver.wait(self.fs.parent(at))?;
        }
    }

    fn on_nodes(&self, caller: &Caller, call: &Call) -> Answered {
        let change = |ino, change| self.driver.wait(self.fs.setattr(caller, ino, None, change));
        match call {
            Call::Chmod { at, mode } => {
                let attr = self.followed(caller, at)?;
                change(attr.ino, SetAttr { mode: Some(*mode), ..SetAttr::default() })?;
            }
            Call::Chown { at, uid, gid } => {
                let attr = self.node(caller, at)?;
                let (uid, gid) = (owner(*uid, |who| who.caller().uid), owner(*gid, |who| who.caller().gid));
                // Whose groups somebody is in only a kernel knows.
                let foreign = gid.is_some_and(|gid| gid != caller.gid && gid != attr.gid);
                if caller.uid != 0 && foreign {
                    return Err(Errno::EPERM);
                }
                change(attr.ino, SetAttr { uid, gid, ..SetAttr::default() })?;
            }
            Call::Utimens { at, seconds, nanos } => {
                let attr = self.node(caller, at)?;
                let time = Timespec { seconds: *seconds, nanos: *nanos };
                let attr =
                    change(attr.ino, SetAttr { mtime: Some(SetTime::At(time)), ..SetAttr::default() })?;
                return Ok(Reply::Time { seconds: attr.mtime.seconds, nanos: attr.mtime.nanos });
            }
            Call::Truncate { at, size } => {
                let attr = self.followed(caller, at)?;
                match attr.kind {
                    Kind::Directory => return Err(Errno::EISDIR),
                    Kind::File => self.permit(caller, attr.ino, WRITE)?,
                    _ => return Err(Errno::EINVAL),
                }
                change(attr.ino, SetAttr { size: Some(*size), ..SetAttr::default() })?;
            }
            Call::Stat { at } => return Ok(stat_reply(&self.node(caller, at)?)),
            Call::Readlink { at } => {
                let attr = self.node(caller, at)?;
                return Ok(Reply::Bytes(self.driver.wait(self.fs.readlink(attr.ino))?.to_vec()));
            }
            Call::List { at } => return self.list(caller, at),
            _ => return Err(Errno::ENOSYS),
        }
        Ok(Reply::Done)
    }

    fn list(&self, caller: &Caller, at: &Spot) -> Answered {
        let mut directory = Ino::ROOT;
        for name in at.directory() {
            directory =
                self.child(caller, directory, &Name::new(name.to_vec()).map_err(|_| Errno::EINVAL)?)?.ino;
            match self.attr(directory)?.kind {
                Kind::Directory => {}
                Kind::Symlink => return Err(Errno::ENOENT),
                _ => return Err(Errno::ENOTDIR),
            }
        }
        self.permit(caller, directory, READ)?;
        let (mut names, mut cookie) = (Vec::new(), 0);
        loop {
            let page = self.driver.wait(self.fs.readdir(directory, cookie, 100))?;
            let Some(last) = page.last() else { break };
            cookie = last.cookie;
            names.extend(page.iter().map(|entry| entry.name.as_bytes().to_vec()));
        }
        names.sort();
        Ok(Reply::Names(names))
    }

    fn on_attributes(&self, caller: &Caller, call: &Call) -> Answered {
        let key = |name: &u8| XattrName::new(attribute(*name)).map_err(|_| Errno::EINVAL);
        let holds = |attr: &Attr| matches!(attr.kind, Kind::File | Kind::Directory);
        match call {
            Call::Setxattr { at, name, length, mode } => {
                let attr = self.node(caller, at)?;
                self.may_change_attribute(caller, &attr)?;
                let value = Bytes::from(pattern(*length, *name));
                self.driver.wait(self.fs.setxattr(caller, attr.ino, &key(name)?, value, *mode))?;
                Ok(Reply::Done)
            }
            Call::Removexattr { at, name } => {
                let attr = self.node(caller, at)?;
                self.may_change_attribute(caller, &attr)?;
                self.driver.wait(self.fs.removexattr(caller, attr.ino, &key(name)?))?;
                Ok(Reply::Done)
            }
            Call::Getxattr { at, name } => {
                let attr = self.node(caller, at)?;
                if !holds(&attr) {
                    return Err(Errno::ENODATA);
                }
                self.permit(caller, attr.ino, READ)?;
                let value = self.driver.wait(self.fs.getxattr(caller, attr.ino, &key(name)?))?;
                Ok(Reply::Bytes(value.to_vec()))
            }
            Call::Listxattr { at } => {
                let attr = self.node(caller, at)?;
                let names = self.driver.wait(self.fs.listxattr(caller, attr.ino))?;
                let mut names: Vec<Vec<u8>> = names.iter().map(|name| name.as_bytes().to_vec()).collect();
                names.sort();
                Ok(Reply::Names(names))
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    /// The rules for attributes of users: files and directories only, and of a sticky directory only by its owner.
    fn may_change_attribute(&self, caller: &Caller, attr: &Attr) -> Answered<()> {
        let sticky = attr.kind == Kind::Directory && attr.mode & 0o1000 != 0;
        let is_owner = caller.uid == 0 || caller.uid == attr.uid;
        if !matches!(attr.kind, Kind::File | Kind::Directory) || sticky && !is_owner {
            return Err(Errno::EPERM);
        }
        self.permit(caller, attr.ino, WRITE)
    }
}

impl Calls for Modelled<'_> {
    fn name(&self) -> &'static str {
        "the reference"
    }

    fn call(&mut self, who: Who, call: &Call) -> Result<Reply, Failed> {
        self.run(&who.caller(), call).map_err(|errno| Failed(errno.code()))
    }
}

fn stat_reply(attr: &Attr) -> Reply {
    Reply::Stat {
        kind: attr.kind,
        mode: attr.mode,
        uid: attr.uid,
        gid: attr.gid,
        nlink: attr.nlink,
        size: if attr.kind == Kind::Directory { 0 } else { attr.size },
    }
}

const READ: u16 = 4;
const WRITE: u16 = 2;
const SEARCH: u16 = 1;
