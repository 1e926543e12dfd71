//! Copying what the tree needs, where the log does not tell it all.
//!
//! Invariants:
//! - The data position moves to that of a tree only when the own store has every pack that the tree needs.

use std::time::Duration;

use murphy_fs::{IndexSnapshot, Volume};
use tokio::sync::watch;

use super::{Copier, CopyError};
use crate::history::Point;

impl Copier {
    /// Copies packs until `stopping` says true or the log has ended. When the log does not reach back to the first one, or too many do not
    /// come, what the tree of now needs is copied, then what follows.
    pub async fn keep_up(&self, volume: &Volume, stopping: watch::Receiver<bool>) -> Result<(), CopyError> {
        loop {
            match self.run(stopping.clone()).await {
                Err(error @ (CopyError::NoBase { .. } | CopyError::Stuck { .. })) => {
                    tracing::info!(%error, "what the tree of now needs is copied");
                }
                other => return other,
            }
            let mut stopped = stopping.clone();
            tokio::select! {
                copied = self.copy_tree(volume) => copied?,
                _ = stopped.wait_for(|stop| *stop) => return Ok(()),
            }
        }
    }

    /// Copies what the tree of now needs. A log that has ended says so elsewhere.
    async fn copy_tree(&self, volume: &Volume) -> Result<(), CopyError> {
        loop {
            // The view is not held while copying: it would hold up the index.
            let state = volume.view_with_state().state();
            if let Some(state) = state {
                let at = Point { lsn: state.position.lsn, hash: state.position.hash };
                if volume.log().durable().wait_for(at.lsn).await.is_err() {
                    return Ok(());
                }
                let packs = volume.packs();
                let packs = packs.map(|row| row.map_err(|error| CopyError::Tree(error.to_string())));
                match self.copy_base(packs, at).await {
                    Err(error @ CopyError::Lacks { .. }) => {
                        tracing::warn!(%error, "they are asked for again");
                    }
                    copied => return copied,
                }
            }
            tokio::time::sleep(TREE_AGAIN).await;
        }
    }
}

const TREE_AGAIN: Duration = Duration::from_secs(5);
