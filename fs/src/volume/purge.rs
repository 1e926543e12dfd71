//! The end of orphans: an inode without a name, once nobody has it open, is removed in entries of bounded size.
//!
//! Invariants:
//! - An inode is purged by one task at a time. A purge begins only while nobody has the inode open at the source; from its first entry on the
//!   inode is gone, also to those who have it open at a mirror.
//! - A purge that was cut short is gone on with by whoever leads next, whoever has it open there: the orphan's row goes last.

use std::{sync::Arc, time::Duration};

use super::{
    STALE_TRIES, Volume,
    files::FileState,
    tree::{logged, xattr_names_in},
};
use crate::{
    Caller, Errno, Ino, RowKey,
    decide::{PURGE_BATCH, Purge},
    sequencer::SubmitError,
    view::ViewError,
};

impl Volume {
    /// Purges `ino` in the background. If the log has no room it is tried again, as long as somebody uses
    /// the volume.
    pub(super) fn purge_later(&self, ino: Ino) {
        let (weak, mut volume) = (Arc::downgrade(&self.shared), self.clone());
        let pause = self.shared.options.flush_after.max(PAUSE_MIN);
        self.shared.runtime.spawn(async move {
            loop {
                match volume.purge(ino).await {
                    Err(Errno::ENOSPC) => {}
                    Ok(()) => return,
                    // Of another source, which purges it; unless this node has begun to lead and found the purge under way.
                    Err(Errno::EROFS) if volume.check_leads().is_err() => return,
                    Err(Errno::EROFS) => {}
                    Err(errno) => {
                        tracing::error!(%ino, %errno, "an orphan was not purged; the next start goes on with it");
                        return;
                    }
                }
                drop(volume);
                tokio::time::sleep(pause).await;
                let Some(shared) = weak.upgrade() else { return };
                volume = Volume { shared };
            }
        });
    }

    /// Purges every orphan that an earlier source left.
    pub(super) fn purge_orphans(&self) -> Result<(), ViewError> {
        for row in self.view().rows(RowKey::orphan(Ino::new(0))..RowKey::orphan(Ino::new(u64::MAX))) {
            if let Some(number) = row?.0.number() {
                self.purge_later(Ino::new(number));
            }
        }
        Ok(())
    }

    async fn purge(&self, ino: Ino) -> Result<(), Errno> {
        let file = self.shared.files.state(ino);
        let result = match self.may_purge(&file) {
            Ok(true) => {
                let purged = self.purge_all(ino).await;
                file.lock().purging = false;
                purged
            }
            Ok(false) => Ok(()),
            Err(errno) => Err(errno),
        };
        self.shared.files.forget(file);
        result
    }

    /// Whether it is to be purged now; if so nobody else purges it, and nothing is stored for it.
    fn may_purge(&self, file: &FileState) -> Result<bool, Errno> {
        let mut inner = file.lock();
        let row = logged(self.view().inode(file.ino))?;
        let has_begun = row.is_none_or(|row| row.purging);
        if inner.purging || (inner.opens > 0 && !has_begun) {
            return Ok(false);
        }
        inner.purging = true;
        self.discard_dirty(file, &mut inner);
        Ok(true)
    }

    async fn purge_all(&self, ino: Ino) -> Result<(), Errno> {
        let (mut from, mut stale) = (0, 0);
        loop {
            match self.purge_some(ino, from) {
                Ok(None) => return Ok(()),
                Ok(Some(next)) => {
                    from = next;
                    tokio::task::yield_now().await;
                }
                Err(SubmitError::Stale) if stale < STALE_TRIES => {
                    (from, stale) = (0, stale + 1);
                    tokio::task::yield_now().await;
                }
                // Its rows do not fit each other.
                Err(SubmitError::Stale) => return Err(Errno::EIO),
                Err(SubmitError::Full) => self.shared.sequencer.room().await,
                Err(SubmitError::Errno(errno)) => return Err(errno),
            }
        }
    }

    /// Removes a part of an orphan, whose extents before `from` are gone already: a scan from the beginning would pass what was removed
    /// once more for every part. Says from where to go on, `None` when nothing is left.
    fn purge_some(&self, ino: Ino, from: u64) -> Result<Option<u64>, SubmitError> {
        let view = self.view();
        let Some(row) = logged(view.inode(ino))? else { return Ok(None) };
        let (mut extents, mut end) = (Vec::new(), from);
        for extent in view.extents(ino, from, u64::MAX).take(PURGE_BATCH + 1) {
            let extent = logged(extent)?;
            if extents.len() < PURGE_BATCH {
                end = extent.end();
            }
            extents.push(extent.offset);
        }
        let mut last = extents.len() <= PURGE_BATCH;
        extents.truncate(PURGE_BATCH);
        let mut xattrs = if last && row.has_xattrs { xattr_names_in(&view, ino)? } else { Vec::new() };
        last &= xattrs.len() <= PURGE_BATCH;
        xattrs.truncate(PURGE_BATCH);
        let purge = Purge { ino, extents, xattrs, last };
        self.shared.sequencer.submit(None::<&Caller>, &purge)?;
        Ok((!last).then_some(end))
    }
}

/// An orphan that found no room is not looked at again before this.
const PAUSE_MIN: Duration = Duration::from_millis(10);
