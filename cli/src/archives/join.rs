//! How the archives that acknowledge change.
//!
//! Invariants:
//! - The set changes under the old set: an archive that was added acknowledges once one that acknowledged before has the entry that names it.
//!   Whoever takes over through that one then knows, and seals, the new one.
//! - Only an order that gives an archive up changes the set without it.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use murphy_fs::{FileSystem, Volume};

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
        }
        Ok(made)
    }

    /// Lets these acknowledge, now that an archive that does has the entries that named them.
    pub(crate) async fn let_acknowledge(&self, urls: &[String]) -> Result<(), CliError> {
        self.change(|archives| {
            let named = archives.iter_mut().filter(|archive| urls.contains(&archive.url));
            named.for_each(|archive| archive.joining = false);
            Ok(())
        })
        .await
    }

    /// Lets those that are joining acknowledge as soon as an archive that does has everything up to now.
    pub(crate) fn join_later(self: &Arc<Archives>) {
        let (this, volume) = (Arc::downgrade(self), self.context.volume.clone());
        self.context.runtime.spawn(join(this, volume));
    }

    /// Those that acknowledge nothing yet.
    fn joining(&self) -> Vec<String> {
        let shipped = self.shipped();
        let joining = shipped.iter().filter(|shipped| shipped.shared.joining);
        joining.map(|shipped| shipped.shared.url.clone()).collect()
    }
}

async fn join(this: Weak<Archives>, volume: Volume) {
    loop {
        // Those that are named meanwhile are not in what is waited for.
        let joining = this.upgrade().map(|archives| archives.joining()).unwrap_or_default();
        if joining.is_empty() || volume.ended().is_some() {
            return;
        }
        match volume.sync_all().wait().await {
            Ok(()) => {
                let Some(archives) = this.upgrade() else { return };
                if let Err(error) = archives.let_acknowledge(&joining).await {
                    tracing::error!(%error, "an archive that was added acknowledges nothing before the next start");
                    return;
                }
            }
            Err(_) => {
                tracing::warn!("an archive that was added acknowledges nothing yet: no other one answers");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

const AGAIN: Duration = Duration::from_secs(5);
