//! The end of orphans: an inode without a name, once nobody has it open, is removed in entries of bounded size.
//!
//! Invariants:
//! - An inode is purged by one task at a time, and only while nobody has it open.
//! - A purge that was cut short is gone on with by whoever leads next: the orphan's row goes last.

use std::{sync::Arc, time::Duration};

use super::{STALE_TRIES, Volume};
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
                    // Of another source, which purges it.
                    Ok(()) | Err(Errno::EROFS) => return,
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
        {
            let mut inner = file.lock();
            if inner.opens > 0 || inner.purging {
                return Ok(());
            }
            inner.purging = true;
            self.discard_dirty(&mut inner);
        }
        let (mut from, mut stale) = (0, 0);
        let result = loop {
            match self.purge_some(ino, from) {
                Ok(None) => break Ok(()),
                Ok(Some(next)) => {
                    from = next;
                    tokio::task::yield_now().await;
                }
                Err(SubmitError::Stale) if stale < STALE_TRIES => {
                    (from, stale) = (0, stale + 1);
                    tokio::task::yield_now().await;
                }
                // Its rows do not fit each other.
                Err(SubmitError::Stale) => break Err(Errno::EIO),
                Err(SubmitError::Full) => self.shared.sequencer.room().await,
                Err(SubmitError::Errno(errno)) => break Err(errno),
            }
        };
        file.lock().purging = false;
        self.shared.files.forget(file);
        result
    }

    /// Removes a part of an orphan, whose extents before `from` are gone already: a scan from the beginning would pass what was removed
    /// once more for every part. Says from where to go on, `None` when nothing is left.
    fn purge_some(&self, ino: Ino, from: u64) -> Result<Option<u64>, SubmitError> {
        if self.inode_row(ino)?.is_none() {
            return Ok(None);
        }
        let (mut extents, mut end) = (Vec::new(), from);
        for extent in self.view().extents(ino, from, u64::MAX).take(PURGE_BATCH + 1) {
            let extent = super::tree::logged(extent)?;
            if extents.len() < PURGE_BATCH {
                end = extent.end();
            }
            extents.push(extent.offset);
        }
        let mut last = extents.len() <= PURGE_BATCH;
        extents.truncate(PURGE_BATCH);
        let mut xattrs = if last { self.xattr_names(ino)? } else { Vec::new() };
        last &= xattrs.len() <= PURGE_BATCH;
        xattrs.truncate(PURGE_BATCH);
        let purge = Purge { ino, extents, xattrs, last };
        self.shared.sequencer.submit(None::<&Caller>, &purge)?;
        Ok((!last).then_some(end))
    }
}

/// An orphan that found no room is not looked at again before this.
const PAUSE_MIN: Duration = Duration::from_millis(10);
