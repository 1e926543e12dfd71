//! Changing the length of a file.
//!
//! Invariants:
//! - No entry gives a file a length behind bytes that were written before it and are not stored: a crash would show zeros in their place.
//! - The file's lock is held for one entry at a time: whoever asks for the file meanwhile finds a length between the old and the new one.
//! - A change that nobody waits for any more ends where it is: it must not cut off what is written later.

use std::sync::Arc;

use super::{
    STALE_TRIES, Volume,
    files::{FileInner, FileState},
    io::may_truncate,
    tree::logged,
    undelivered::Undelivered,
};
use crate::{
    Answer, Attr, Caller, Errno, Ino, Kind, OpenFlags, Opened, SetAttr,
    decide::{FILE_MAX, PURGE_BATCH, Truncate},
    sequencer::SubmitError,
};

/// A new length, and what else changes with it.
#[derive(Clone, Copy)]
pub(super) struct Resize {
    pub(super) ino: Ino,
    pub(super) size: u64,
    /// Its `size` is not looked at.
    pub(super) change: SetAttr,
}

/// Why a length is not changed at once.
#[derive(Clone, Copy)]
enum Obstacle {
    /// Bytes before the new end are to be stored first.
    Unstored,
    /// More lies behind the new end than one entry removes.
    Long,
}

type Tried<T> = Result<Result<T, Obstacle>, SubmitError>;

impl Volume {
    /// Changes the length of a file. What takes more than one entry, or waits for bytes, is answered later.
    pub(super) fn resize(&self, caller: Caller, resize: Resize) -> Answer<Attr> {
        if resize.size > FILE_MAX {
            return Answer::Now(Err(Errno::EFBIG));
        }
        self.past_obstacles(caller, resize, move |volume, caller| {
            let row = volume.inode_row(resize.ino)?.ok_or(Errno::ESTALE)?;
            if resize.change.mode.is_some() && row.kind == Kind::Symlink {
                return Err(Errno::EOPNOTSUPP.into());
            }
            may_truncate(&row)?;
            match volume.resize_at_once(caller, resize)? {
                Ok(()) => Ok(Ok(volume.attr(resize.ino)?)),
                Err(obstacle) => Ok(Err(obstacle)),
            }
        })
    }

    /// Opens a file and empties it.
    pub(super) fn open_emptied(&self, caller: Caller, ino: Ino, flags: OpenFlags) -> Answer<Opened> {
        let resize = Resize { ino, size: 0, change: SetAttr::default() };
        let opened = self.past_obstacles(caller, resize, move |volume, caller| {
            let handle = volume.begin_open(ino, flags)?;
            match volume.resize_at_once(caller, resize) {
                Ok(Ok(())) => Ok(Ok(volume.undelivered(volume.end_open(ino, handle)?))),
                failed => {
                    volume.close_handle(handle);
                    failed?.map_or_else(|obstacle| Ok(Err(obstacle)), |()| Err(Errno::EIO.into()))
                }
            }
        });
        opened.map(Undelivered::deliver)
    }

    /// Tries, puts what is in the way aside, and tries again, for no longer than a request may take.
    fn past_obstacles<T: Send + 'static>(
        &self,
        caller: Caller,
        resize: Resize,
        attempt: impl Fn(&Volume, &Caller) -> Tried<T> + Clone + Send + Sync + 'static,
    ) -> Answer<T> {
        let mut tried = match self.mutate_with(caller, attempt.clone()) {
            Answer::Now(Ok(Ok(done))) => return Answer::Now(Ok(done)),
            Answer::Now(Err(errno)) => return Answer::Now(Err(errno)),
            not_yet => not_yet,
        };
        let volume = self.clone();
        Answer::later(async move {
            let patience = volume.shared.options.io_timeout;
            let resizing = async {
                loop {
                    match tried.wait().await? {
                        Ok(done) => return Ok(done),
                        Err(Obstacle::Unstored) => volume.flush_file(resize.ino).await?,
                        Err(Obstacle::Long) => volume.cut_parts(&caller, resize).await?,
                    }
                    tried = volume.mutate_with(caller, attempt.clone());
                }
            };
            tokio::time::timeout(patience, resizing).await.unwrap_or_else(|_| {
                tracing::error!(ino = %resize.ino, "a length was not changed in time; it may be half way");
                Err(Errno::EIO)
            })
        })
    }

    /// Changes the length if one entry can do it and may.
    fn resize_at_once(&self, caller: &Caller, resize: Resize) -> Tried<()> {
        let Resize { ino, size, change } = resize;
        let file = self.shared.files.state(ino);
        let mut inner = file.lock();
        let resized = (|| {
            let glance = self.glance();
            let beyond = glance.view().extents(ino, size, u64::MAX).take(PURGE_BATCH + 1);
            let beyond: Vec<u64> =
                beyond.map(|extent| Ok(logged(extent)?.offset)).collect::<Result<_, Errno>>()?;
            if beyond.len() > PURGE_BATCH {
                return Ok(Err(Obstacle::Long));
            }
            let stored = glance.inode(ino)?.ok_or(Errno::ESTALE)?.size;
            // Where the last byte before the new end is to be stored itself, it brings the length with it: unless somebody waits for bytes on
            // their way from behind the new end, who would get neither these nor the new length.
            let brings_length = inner.dirty.touches(size.saturating_sub(1)..size);
            let size = match inner.dirty.touches(stored..size) {
                true if brings_length && inner.dirty.flying_end() <= size => stored,
                true => return Ok(Err(Obstacle::Unstored)),
                false => size,
            };
            self.shared.sequencer.submit(Some(caller), &Truncate { ino, size, beyond, change })?;
            Ok(Ok(()))
        })();
        if let Ok(Ok(())) = resized {
            self.cut_dirty(&file, &mut inner, size);
            (inner.dirty.mtime, inner.dirty.ctime) = (None, None);
        }
        drop(inner);
        self.shared.files.forget(file);
        resized
    }

    /// Shortens a file from its end, until one entry can do the rest.
    async fn cut_parts(&self, caller: &Caller, resize: Resize) -> Result<(), Errno> {
        let file = self.shared.files.state(resize.ino);
        let result = self.cut_parts_of(&file, caller, resize).await;
        self.shared.files.forget(file);
        result
    }

    async fn cut_parts_of(
        &self,
        file: &Arc<FileState>,
        caller: &Caller,
        resize: Resize,
    ) -> Result<(), Errno> {
        let mut listed_at = Some(file.lock().stores);
        let listing = self.clone();
        let beyond = murphy_log::aside(move || listing.extent_offsets(resize.ino, resize.size)).await?;
        // What is left to the last entry.
        let mut left = beyond.len() % PURGE_BATCH;
        if left == 0 {
            left = PURGE_BATCH.min(beyond.len());
        }
        let mut parts = beyond[left..].chunks(PURGE_BATCH).rev();
        let (mut part, mut stale) = (parts.next(), 0);
        while let Some(offsets) = part {
            let cut = self.cut_part(file, &mut file.lock(), caller, resize, offsets, listed_at);
            match cut {
                Ok(true) => part = parts.next(),
                Ok(false) => {}
                Err(SubmitError::Full) => self.shared.sequencer.room().await,
                // Somebody else has cut off some of it.
                Err(SubmitError::Stale) if stale < STALE_TRIES => (listed_at, stale) = (None, stale + 1),
                // Its rows do not fit each other.
                Err(SubmitError::Stale) => return Err(Errno::EIO),
                Err(SubmitError::Errno(errno)) => return Err(errno),
            }
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Cuts the last extents off, as many as one entry removes and none before those of `part`; these are all that there are if nothing was
    /// stored since. Says whether they are gone. Every part has the whole change, so that what refuses it does so before anything is cut off.
    fn cut_part(
        &self,
        file: &FileState,
        inner: &mut FileInner,
        caller: &Caller,
        Resize { ino, size, change }: Resize,
        part: &[u64],
        listed_at: Option<u64>,
    ) -> Result<bool, SubmitError> {
        let Some(begin) = part.first() else { return Ok(true) };
        let mut beyond = part.to_vec();
        if listed_at != Some(inner.stores) {
            // Nothing lies behind the end; what was removed there before would only be passed.
            let glance = self.glance();
            let end = glance.inode(ino)?.ok_or(Errno::ESTALE)?.size;
            let now = glance.view().extents(ino, *begin, end);
            beyond = now.map(|extent| Ok(logged(extent)?.offset)).collect::<Result<_, Errno>>()?;
        }
        let rest = beyond.len().saturating_sub(PURGE_BATCH);
        let beyond = beyond.split_off(rest);
        let Some(first) = beyond.first() else { return Ok(true) };
        let size = size.max(*first);
        self.shared.sequencer.submit(Some(caller), &Truncate { ino, size, beyond, change })?;
        // What lies before is still part of the file, and somebody may wait for it.
        self.cut_dirty(file, inner, size);
        Ok(rest == 0)
    }
}
