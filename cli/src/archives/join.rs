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
    /// returns.
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
        }
        Ok(made)
    }

    /// Lets those that are joining acknowledge, now that one of the others has the entries that named them, or is given up.
    pub(crate) async fn let_all_acknowledge(&self) -> Result<(), CliError> {
        self.change(|archives| {
            archives.iter_mut().for_each(|archive| archive.joining = false);
            Ok(())
        })
        .await?;
        self.shipped().iter_mut().for_each(|shipped| shipped.shared.joining = false);
        Ok(())
    }

    /// Does so as soon as an archive that acknowledges has everything up to now; at once if none is joining.
    pub(crate) fn join_later(self: &Arc<Archives>) {
        if !self.shipped().iter().any(|shipped| shipped.shared.joining) {
            return;
        }
        let (this, volume) = (Arc::downgrade(self), self.context.volume.clone());
        self.context.runtime.spawn(join(this, volume));
    }
}

async fn join(this: Weak<Archives>, volume: Volume) {
    loop {
        match volume.sync_all().wait().await {
            Ok(()) => break,
            Err(_) if volume.ended().is_some() || this.strong_count() == 0 => return,
            Err(_) => {
                tracing::warn!("an archive that was added acknowledges nothing yet: no other one answers");
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
    let Some(archives) = this.upgrade() else { return };
    if let Err(error) = archives.let_all_acknowledge().await {
        tracing::error!(%error, "an archive that was added acknowledges nothing before the next start");
    }
}

const AGAIN: Duration = Duration::from_secs(5);
