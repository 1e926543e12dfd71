//! The end of orphans: an inode without a name, once nobody has it open, is removed in entries of bounded size.

use super::Volume;
use crate::{
    Caller, Errno, Ino, RowKey,
    decide::{PURGE_BATCH, Purge},
    sequencer::SubmitError,
    view::ViewError,
};

impl Volume {
    /// Purges `ino` in the background.
    pub(super) fn purge_later(&self, ino: Ino) {
        let volume = self.clone();
        self.shared.runtime.spawn(async move {
            match volume.purge(ino).await {
                // Of another source, which purges it.
                Ok(()) | Err(Errno::EROFS) => {}
                Err(errno) => {
                    tracing::error!(%ino, %errno, "an orphan was not purged; the next start goes on with it");
                }
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
        let result = loop {
            match self.purge_some(ino) {
                Ok(true) => break Ok(()),
                Ok(false) | Err(SubmitError::Stale) => tokio::task::yield_now().await,
                Err(SubmitError::Full) => self.shared.sequencer.room().await,
                Err(SubmitError::Errno(errno)) => break Err(errno),
            }
        };
        file.lock().purging = false;
        self.shared.files.forget(file);
        result
    }

    /// Removes a part of an orphan; says whether it was the last.
    fn purge_some(&self, ino: Ino) -> Result<bool, SubmitError> {
        if self.inode_row(ino)?.is_none() {
            return Ok(true);
        }
        let mut extents = Vec::new();
        for extent in self.view().extents(ino, 0, u64::MAX).take(PURGE_BATCH + 1) {
            extents.push(super::tree::logged(extent)?.offset);
        }
        let mut last = extents.len() <= PURGE_BATCH;
        extents.truncate(PURGE_BATCH);
        let mut xattrs = if last { self.xattr_names(ino)? } else { Vec::new() };
        last &= xattrs.len() <= PURGE_BATCH;
        xattrs.truncate(PURGE_BATCH);
        let purge = Purge { ino, extents, xattrs, last };
        self.shared.sequencer.submit(None::<&Caller>, &purge)?;
        Ok(last)
    }
}
