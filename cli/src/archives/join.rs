//! How the list of archives changes.
//!
//! Invariants:
//! - One that is joining acknowledges nothing; when that ends is told in `serve/joining.rs`.
//! - Nobody acknowledges by the word of one that was removed meanwhile.
//! - One that was removed, or is joining again, acknowledges nothing from before the moment on at which the log says so.
//! - One that is about to be removed acknowledges nothing for as long as any order to remove it is under way.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use murphy_log::Lsn;

use super::Archives;
use crate::{
    error::CliError,
    settings::{Settings, SharedArchive},
};

impl Archives {
    /// Reads the shared list of archives, lets `change` have it, and writes it down if it has become another; durable on this node when it
    /// returns. Who acknowledges follows the list, and whoever does not any more ceases to before the entry is there.
    pub(crate) async fn change<T>(
        &self,
        change: impl FnOnce(&mut Vec<SharedArchive>) -> Result<T, CliError>,
    ) -> Result<T, CliError> {
        let volume = &self.context.volume;
        let _changing = self.changing.lock().await;
        let before = Settings::of(volume)?.archives;
        let mut archives = before.clone();
        let made = change(&mut archives)?;
        self.restrict(&archives);
        let may_no_more = |archive: &SharedArchive| {
            let left = archives.iter().find(|left| left.url == archive.url);
            left.is_none_or(|left| left.joining && !archive.joining)
        };
        if before.iter().any(may_no_more) {
            self.removals.fetch_add(1, Ordering::SeqCst);
        }
        let written = self.write(&before, &archives).await;
        // An entry that could not be waited for is decided all the same.
        self.follow(&Settings::of(volume)?.archives);
        written.map(|()| made)
    }

    async fn write(&self, before: &[SharedArchive], archives: &[SharedArchive]) -> Result<(), CliError> {
        let volume = &self.context.volume;
        let refused = |errno| CliError::new(format!("the shared setting cannot be changed: {errno:?}"));
        if archives != before {
            let changed = volume.change_settings(Settings::set_archives(archives)?);
            changed.wait().await.map_err(refused)?;
        }
        volume.durable_here().await.map(|_| ()).map_err(refused)
    }

    /// Lets those acknowledge nothing more that must not by this list.
    fn restrict(&self, list: &[SharedArchive]) {
        for shipped in self.shipped().iter_mut() {
            let listed = list.iter().find(|archive| archive.url == shipped.shared.url);
            shipped.is_removed |= listed.is_none();
            shipped.shared.joining |= listed.is_some_and(|archive| archive.joining);
        }
        self.context.changed();
    }

    /// Lets those acknowledge that may by this list, and only those.
    fn follow(&self, list: &[SharedArchive]) {
        let decided = self.context.volume.state().position.lsn;
        for shipped in self.shipped().iter_mut() {
            let listed = list.iter().find(|archive| archive.url == shipped.shared.url);
            if shipped.is_removed && listed.is_some() {
                // It was named anew.
                shipped.named = decided;
            }
            shipped.is_removed = listed.is_none();
            shipped.shared.joining = listed.is_some_and(|archive| archive.joining);
        }
        self.context.changed();
    }

    /// Lets an archive that is about to be removed acknowledge nothing, by itself or by its word, for as long as the answer is held.
    pub(crate) fn leave(&self, url: &str) -> Leaving<'_> {
        let mark = self.leaving_mark(url);
        if let Some(orders) = &mark {
            orders.fetch_add(1, Ordering::SeqCst);
        }
        self.context.changed();
        let removals = self.removals.fetch_add(1, Ordering::SeqCst) + 1;
        Leaving { archives: self, url: url.to_owned(), mark, removals }
    }

    fn leaving_mark(&self, url: &str) -> Option<Arc<AtomicUsize>> {
        let shipped = self.shipped();
        shipped.iter().find(|one| one.shared.url == url).map(|one| Arc::clone(&one.leaving))
    }

    /// Lets these acknowledge, now that whoever takes over meets the entries that named them: as it was after so many `removals`.
    pub(crate) async fn let_acknowledge(&self, urls: &[String], removals: u64) -> Result<(), CliError> {
        self.change(|archives| {
            if self.removals() != removals {
                return Err(CliError::new("an archive was removed meanwhile"));
            }
            let named = archives.iter_mut().filter(|archive| urls.contains(&archive.url));
            named.for_each(|archive| archive.joining = false);
            Ok(())
        })
        .await
    }

    /// Notes that whoever may take over knows these.
    pub(crate) async fn note_known(&self, urls: &[String]) -> Result<(), CliError> {
        self.change(|archives| {
            let named = archives.iter_mut().filter(|archive| urls.contains(&archive.url));
            named.for_each(|archive| archive.known = true);
            Ok(())
        })
        .await
    }

    /// How many times archives were removed by now.
    pub(crate) fn removals(&self) -> u64 {
        self.removals.load(Ordering::SeqCst)
    }

    /// An entry behind which the one that names this archive does not come, if it is shipped to.
    pub(crate) fn named(&self, url: &str) -> Option<Lsn> {
        self.shipped().iter().find(|shipped| shipped.shared.url == url).map(|shipped| shipped.named)
    }

    /// Those that acknowledge nothing yet, if there are any, and an entry behind which none of those does come that name them.
    pub(crate) fn joining(&self) -> Option<(Vec<String>, Lsn)> {
        let shipped = self.shipped();
        let joining = shipped.iter().filter(|shipped| shipped.shared.joining);
        let (urls, named): (Vec<_>, Vec<_>) =
            joining.map(|shipped| (shipped.shared.url.clone(), shipped.named)).unzip();
        Some((urls, named.into_iter().max()?))
    }
}

/// An archive that is about to be removed.
pub(crate) struct Leaving<'a> {
    archives: &'a Archives,
    url: String,
    /// Counts the orders by which it leaves; `None` if it was not shipped to.
    mark: Option<Arc<AtomicUsize>>,
    /// How many removals there were by then, this one included.
    removals: u64,
}

impl Leaving<'_> {
    /// Refuses if it may have acknowledged anything since, or one of the others does not acknowledge any more. Asked while nobody else changes the
    /// list.
    pub(crate) fn check_unchanged(&self) -> Result<(), CliError> {
        let is_marked = match (&self.mark, self.archives.leaving_mark(&self.url)) {
            (Some(mark), Some(there)) => Arc::ptr_eq(mark, &there),
            (None, None) => true,
            _ => false,
        };
        if is_marked && self.archives.removals() == self.removals {
            return Ok(());
        }
        Err(CliError::new("nothing was changed: who acknowledges an fsync was changed meanwhile")
            .hint("run it again"))
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if let Some(orders) = &self.mark {
            orders.fetch_sub(1, Ordering::SeqCst);
        }
        self.archives.context.changed();
    }
}
