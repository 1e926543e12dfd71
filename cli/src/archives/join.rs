//! How the list of archives changes.
//!
//! Invariants:
//! - One that is joining acknowledges nothing; when that ends is told in `serve/joining.rs`.
//! - Nobody acknowledges by the word of one that was removed meanwhile.
//! - One that was removed acknowledges nothing from the moment on at which the log says so.

use std::sync::atomic::Ordering;

use murphy_log::Lsn;

use super::Archives;
use crate::{
    error::CliError,
    settings::{Settings, SharedArchive},
};

impl Archives {
    /// Reads the shared list of archives, lets `change` have it, and writes it down if it has become another; durable on this node when it
    /// returns. Who acknowledges follows the list.
    pub(crate) async fn change<T>(
        &self,
        change: impl FnOnce(&mut Vec<SharedArchive>) -> Result<T, CliError>,
    ) -> Result<T, CliError> {
        let volume = &self.context.volume;
        let _changing = self.changing.lock().await;
        let before = Settings::of(volume)?.archives;
        let mut archives = before.clone();
        let made = change(&mut archives)?;
        if archives != before {
            let refused = |errno| CliError::new(format!("the shared setting cannot be changed: {errno:?}"));
            let changed = volume.change_settings(Settings::set_archives(&archives)?);
            changed.wait().await.map_err(refused)?;
            volume.durable_here().await.map_err(refused)?;
            for shipped in self.shipped().iter_mut() {
                let listed = archives.iter().find(|archive| archive.url == shipped.shared.url);
                shipped.is_removed = listed.is_none();
                shipped.shared.joining = listed.is_some_and(|archive| archive.joining);
            }
            self.context.changed();
            // Only now none of them acknowledges any more: whoever looks before is told afterwards.
            if before.iter().any(|archive| archives.iter().all(|left| left.url != archive.url)) {
                self.removals.fetch_add(1, Ordering::SeqCst);
            }
        }
        Ok(made)
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
