//! How the list of archives changes.
//!
//! Invariants:
//! - One that is joining acknowledges nothing; when that ends is told in `serve/joining.rs`.
//! - Nobody acknowledges by the word of one that was removed meanwhile.
//! - One that was removed, or is joining again, acknowledges nothing from before the moment on at which the log says so.

use std::sync::atomic::Ordering;

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
        if before.iter().any(|archive| archives.iter().all(|left| left.url != archive.url)) {
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
        self.set_leaving(url, true);
        self.removals.fetch_add(1, Ordering::SeqCst);
        Leaving { archives: self, url: url.to_owned() }
    }

    fn set_leaving(&self, url: &str, is_leaving: bool) {
        let mut shipped = self.shipped();
        shipped.iter_mut().filter(|one| one.shared.url == url).for_each(|one| one.is_leaving = is_leaving);
        drop(shipped);
        self.context.changed();
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
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.archives.set_leaving(&self.url, false);
    }
}
