//! The model's open files: open, read, write, release.
//!
//! Invariants:
//! - Every change of data goes through [`State::data_changed`], which moves mtime and ctime and drops privileges.

use bytes::Bytes;
use murphy_fs::{Caller, Errno, Handle, Ino, OpenFlags, Opened, Timespec};

use super::{
    Body, FILE_BYTES_MAX, OpenFile, ROOT, SETGID, SETUID, State, attributes::CAPABILITY, sparse::Sparse,
};

impl State {
    pub(super) fn open_file(
        &mut self,
        now: Timespec,
        caller: &Caller,
        ino: Ino,
        flags: OpenFlags,
    ) -> Result<Opened, Errno> {
        match &mut self.node_mut(ino)?.body {
            Body::File(contents) if flags.truncate => contents.resize(0),
            Body::File(_) => {}
            Body::Directory(_) => return Err(Errno::EISDIR),
            Body::Symlink(_) => return Err(Errno::ELOOP),
            Body::Special(..) => return Err(Errno::ENXIO),
        }
        if flags.truncate {
            self.data_changed(now, caller, ino)?;
        }
        let node = self.node_mut(ino)?;
        let unchanged = node.version_opened == Some(node.version);
        node.version_opened = Some(node.version);
        self.last_handle += 1;
        let handle = Handle(self.last_handle);
        self.handles.insert(handle, OpenFile { ino, flags });
        Ok(Opened { handle, unchanged, decides: true })
    }

    pub(super) fn read(&self, ino: Ino, handle: Handle, offset: u64, length: u32) -> Result<Bytes, Errno> {
        if !self.handle(ino, handle)?.flags.read {
            return Err(Errno::EBADF);
        }
        match &self.node(ino)?.body {
            Body::File(contents) => Ok(contents.read(offset, u64::from(length)).into()),
            _ => Err(Errno::EINVAL),
        }
    }

    pub(super) fn write(
        &mut self,
        now: Timespec,
        caller: &Caller,
        ino: Ino,
        handle: Handle,
        offset: u64,
        data: &[u8],
    ) -> Result<u32, Errno> {
        let flags = self.handle(ino, handle)?.flags;
        if !flags.write {
            return Err(Errno::EBADF);
        }
        let contents = self.contents_mut(ino)?;
        let offset = if flags.append { contents.size() } else { offset };
        let count = u32::try_from(data.len()).map_err(|_| Errno::EINVAL)?;
        if offset.checked_add(u64::from(count)).is_none_or(|end| end > FILE_BYTES_MAX) {
            return Err(Errno::EFBIG);
        }
        if count > 0 {
            contents.write(offset, data);
            self.data_changed(now, caller, ino)?;
        }
        Ok(count)
    }

    pub(super) fn release(&mut self, ino: Ino, handle: Handle) {
        if self.handle(ino, handle).is_ok() {
            self.handles.remove(&handle);
            self.purge_if_unreachable(ino);
        }
    }

    pub(super) fn handle(&self, ino: Ino, handle: Handle) -> Result<&OpenFile, Errno> {
        self.handles.get(&handle).filter(|open| open.ino == ino).ok_or(Errno::EBADF)
    }

    pub(super) fn contents_mut(&mut self, ino: Ino) -> Result<&mut Sparse, Errno> {
        match &mut self.node_mut(ino)?.body {
            Body::File(contents) => Ok(contents),
            Body::Directory(_) => Err(Errno::EISDIR),
            Body::Symlink(_) | Body::Special(..) => Err(Errno::EINVAL),
        }
    }

    /// The contents were written or cut: times move, and what was trusted about the old contents is trusted no more.
    pub(super) fn data_changed(&mut self, now: Timespec, caller: &Caller, ino: Ino) -> Result<(), Errno> {
        let node = self.node_mut(ino)?;
        node.version += 1;
        node.mtime = now;
        node.ctime = now;
        if caller.uid != ROOT {
            node.mode &= !(SETUID | SETGID);
        }
        node.xattrs.retain(|name, _| name.as_bytes() != CAPABILITY);
        Ok(())
    }
}
