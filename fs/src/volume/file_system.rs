//! The volume as a [`FileSystem`]: each call to what does it.
//!
//! Invariants:
//! - What changes something is refused with EROFS while the node follows, before anything else is looked at.
//! - A request that cannot be answered at once owns what it needs: nothing in an answer borrows from the caller.

use std::sync::Arc;

use bytes::Bytes;

use super::{Volume, files::Urgency, length::Resize};
use crate::{
    Answer, Attr, Caller, DirEntry, DirEntryPlus, Errno, FileSystem, Handle, Ino, Kind, Name, NewNode,
    OpenFlags, Opened, RenameMode, SetAttr, StatFs, XattrMode, XattrName,
    decide::{MakeDirectory, MakeLink, MakeNode, MakeSymlink, RemoveXattr, SetXattr},
    sequencer::SubmitError,
};

impl FileSystem for Volume {
    fn lookup(&self, _caller: &Caller, parent: Ino, name: &Name) -> Answer<Attr> {
        Answer::Now(self.lookup_name(parent, name))
    }

    fn parent(&self, directory: Ino) -> Answer<Ino> {
        Answer::Now(self.parent_of(directory))
    }

    fn getattr(&self, ino: Ino) -> Answer<Attr> {
        Answer::Now(self.attr(ino))
    }

    fn setattr(&self, caller: &Caller, ino: Ino, handle: Option<Handle>, change: SetAttr) -> Answer<Attr> {
        let handle = handle.map_or(Ok(()), |handle| self.open_handle(ino, handle).map(drop));
        if let Err(errno) = self.check_leads().and(handle) {
            return Answer::Now(Err(errno));
        }
        let Some(size) = change.size else {
            return self
                .mutate_with(*caller, move |volume, caller| volume.set_attributes(caller, ino, change));
        };
        self.resize(*caller, Resize { ino, size, change })
    }

    fn readlink(&self, ino: Ino) -> Answer<Bytes> {
        Answer::Now(self.symlink_target(ino))
    }

    fn mkdir(&self, caller: &Caller, parent: Ino, name: &Name, mode: u16) -> Answer<Attr> {
        self.mutate(*caller, MakeDirectory { parent, name: self.placed(name), mode })
    }

    fn mknod(&self, caller: &Caller, parent: Ino, name: &Name, node: NewNode) -> Answer<Attr> {
        self.mutate(*caller, MakeNode { parent, name: self.placed(name), node })
    }

    fn create(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &Name,
        mode: u16,
        flags: OpenFlags,
    ) -> Answer<(Attr, Opened)> {
        let node = NewNode { kind: Kind::File, mode, rdev: 0 };
        let make = MakeNode { parent, name: self.placed(name), node };
        let made = self.mutate_with(*caller, move |volume, caller| {
            let attr = volume.shared.sequencer.submit(Some(caller), &make)?;
            let flags = OpenFlags { truncate: false, ..flags };
            Ok((attr, volume.undelivered(volume.open_file(attr.ino, flags)?)))
        });
        made.map(|(attr, opened)| (attr, opened.deliver()))
    }

    fn symlink(&self, caller: &Caller, parent: Ino, name: &Name, target: &[u8]) -> Answer<Attr> {
        let target = Bytes::copy_from_slice(target);
        self.mutate(*caller, MakeSymlink { parent, name: self.placed(name), target })
    }

    fn link(&self, caller: &Caller, ino: Ino, parent: Ino, name: &Name) -> Answer<Attr> {
        let make = MakeLink { ino, parent, name: self.placed(name) };
        self.mutate_with(*caller, move |volume, caller| {
            volume.shared.sequencer.submit(Some(caller), &make)?;
            Ok(volume.attr(ino)?)
        })
    }

    fn unlink(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<()> {
        let name = name.clone();
        self.mutate_with(*caller, move |volume, caller| volume.remove_name(caller, parent, &name))
    }

    fn rmdir(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<()> {
        let name = name.clone();
        self.mutate_with(*caller, move |volume, caller| volume.remove_directory(caller, parent, &name))
    }

    fn rename(&self, caller: &Caller, from: (Ino, &Name), to: (Ino, &Name), mode: RenameMode) -> Answer<()> {
        let (from, to) = (Arc::new((from.0, from.1.clone())), Arc::new((to.0, to.1.clone())));
        let (volume, caller) = (self.clone(), *caller);
        let rename = move |flushed: &[Ino]| {
            let (from, to, flushed) = (Arc::clone(&from), Arc::clone(&to), flushed.to_vec());
            volume.mutate_with(caller, move |volume, caller| {
                volume.move_name(caller, &from, &to, mode, &flushed)
            })
        };
        if let Err(errno) = self.check_leads() {
            return Answer::Now(Err(errno));
        }
        let mut renamed = match rename(&[]) {
            Answer::Now(Err(errno)) => return Answer::Now(Err(errno)),
            Answer::Now(Ok(None)) => return Answer::Now(Ok(())),
            later => later,
        };
        let volume = self.clone();
        Answer::later(async move {
            let mut flushed = Vec::new();
            while let Some(ino) = renamed.wait().await? {
                volume.flush_file(ino).await?;
                flushed.push(ino);
                renamed = rename(&flushed);
            }
            Ok(())
        })
    }

    fn readdir(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntry>> {
        Answer::Now(self.entries(directory, cookie, limit))
    }

    fn readdir_plus(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntryPlus>> {
        Answer::Now(self.entries_plus(directory, cookie, limit))
    }

    fn open(&self, caller: &Caller, ino: Ino, flags: OpenFlags) -> Answer<Opened> {
        if let (true, Err(errno)) = (flags.write || flags.truncate, self.check_leads()) {
            return Answer::Now(Err(errno));
        }
        if !flags.truncate {
            return Answer::Now(self.open_file(ino, flags).map_err(errno_of));
        }
        self.open_emptied(*caller, ino, flags)
    }

    fn read(&self, ino: Ino, handle: Handle, offset: u64, length: u32) -> Answer<Bytes> {
        self.read_bytes(ino, handle, offset, length)
    }

    fn write(&self, caller: &Caller, ino: Ino, handle: Handle, offset: u64, data: Bytes) -> Answer<u32> {
        if let Err(errno) = self.check_leads() {
            return Answer::Now(Err(errno));
        }
        let sync =
            self.shared.handles.find(handle).is_ok_and(|open| open.flags.sync) || self.shared.options.sync;
        if !self.is_dirty_full() && !sync {
            match self.write_bytes(caller, ino, handle, offset, &data) {
                Err(SubmitError::Full | SubmitError::Stale) => {}
                result => return Answer::Now(result.map_err(errno_of)),
            }
        }
        let (volume, caller) = (self.clone(), *caller);
        Answer::later(async move {
            volume.wait_cleaner().await?;
            let write = move |volume: &Volume, caller: &Caller| {
                volume.write_bytes(caller, ino, handle, offset, &data)
            };
            let written = volume.mutate_with(caller, write).wait().await?;
            if sync {
                volume.sync_file(ino).await?;
            }
            Ok(written)
        })
    }

    fn flush(&self, ino: Ino, handle: Handle) -> Answer<()> {
        Answer::Now(self.open_handle(ino, handle).and_then(|open| {
            let inner = open.file.lock();
            // Also of bytes that others wrote; whoever cannot write has nothing to lose.
            let error = inner.failure.filter(|_| open.flags.write && !inner.dirty.is_empty());
            let rests = inner.rest.is_some_and(|rest| !self.is_over(rest));
            let dirty = inner.dirty.has_grounded() && inner.queued.is_none() && !rests;
            drop(inner);
            if dirty {
                self.request_flush(&open.file, Urgency::Soon);
            }
            error.map_or(Ok(()), Err)
        }))
    }

    fn fsync(&self, ino: Ino, handle: Option<Handle>) -> Answer<()> {
        if let Some(Err(errno)) = handle.map(|handle| self.open_handle(ino, handle)) {
            return Answer::Now(Err(errno));
        }
        match self.inode_row(ino) {
            Ok(Some(_)) => {}
            // A directory that was removed while it was open: what came before is to be durable all the same.
            Ok(None) if handle.is_none() => {}
            Ok(None) => return Answer::Now(Err(Errno::ESTALE)),
            Err(errno) => return Answer::Now(Err(errno)),
        }
        let volume = self.clone();
        Answer::later(async move { volume.sync_file(ino).await })
    }

    fn release(&self, _ino: Ino, handle: Handle) {
        self.close_handle(handle);
    }

    fn setxattr(
        &self,
        caller: &Caller,
        ino: Ino,
        name: &XattrName,
        value: Bytes,
        mode: XattrMode,
    ) -> Answer<()> {
        let set = SetXattr { ino, name: name.clone(), value, mode, open: false };
        self.mutate_with(*caller, move |volume, caller| volume.set_xattr(caller, &set))
    }

    fn getxattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Answer<Bytes> {
        Answer::Now(self.xattr(caller, ino, name))
    }

    fn listxattr(&self, caller: &Caller, ino: Ino) -> Answer<Vec<XattrName>> {
        let hidden = |name: &XattrName| caller.uid != 0 && name.as_bytes().starts_with(b"trusted.");
        let names = self.xattr_names(ino);
        Answer::Now(names.map(|names| names.into_iter().filter(|name| !hidden(name)).collect()))
    }

    fn removexattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Answer<()> {
        self.mutate(*caller, RemoveXattr { ino, name: name.clone() })
    }

    fn statfs(&self) -> Answer<StatFs> {
        let usage = self.state().usage;
        Answer::Now(Ok(StatFs { inodes: usage.inodes, bytes: usage.bytes }))
    }

    fn sync_all(&self) -> Answer<()> {
        let volume = self.clone();
        Answer::later(async move {
            volume.flush_all().await?;
            volume.make_durable().await.map(|_| ())
        })
    }
}

impl Volume {
    async fn sync_file(&self, ino: Ino) -> Result<(), Errno> {
        self.flush_file(ino).await?;
        self.make_durable().await.map(|_| ())
    }
}

/// For answers that need no second try.
fn errno_of(error: SubmitError) -> Errno {
    match error {
        SubmitError::Errno(errno) => errno,
        SubmitError::Full | SubmitError::Stale => Errno::EBUSY,
    }
}
