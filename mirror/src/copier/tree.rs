//! Copying what the tree needs, where the log does not tell it all.
//!
//! Invariants:
//! - The data position moves to that of a tree only when the own store has every pack that the tree needs.
//! - Copying goes on for as long as the node follows: what keeps it from that is told, and tried again.

use std::{convert::Infallible, future::pending, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use murphy_fs::{IndexSnapshot, Volume};
use murphy_log::Lsn;
use tokio::sync::watch;

use super::{Copier, CopyError};
use crate::history::Point;

impl Copier {
    /// Copies packs until `stopping` says true or the log has ended. When the log does not reach back to the first one, or too many do not
    /// come, what the tree of now needs is copied, then what follows. After any other error it begins again, and `trouble` says why until it has
    /// gone on.
    pub async fn keep_up(
        &self,
        volume: &Volume,
        stopping: watch::Receiver<bool>,
        trouble: &watch::Sender<Option<String>>,
    ) {
        let copy = || self.follow(volume, stopping.clone()).boxed();
        self.persist(copy, stopping.clone(), trouble).await;
    }

    /// Copies until that ends without an error, or `stopping` says true between two attempts.
    pub(super) async fn persist<'a>(
        &self,
        copy: impl Fn() -> BoxFuture<'a, Result<(), CopyError>>,
        mut stopping: watch::Receiver<bool>,
        trouble: &watch::Sender<Option<String>>,
    ) {
        let mut pause = AGAIN_MIN;
        loop {
            let before = *self.data.borrow();
            let ended = tokio::select! {
                ended = copy() => ended,
                never = self.tell_progress(before, trouble) => match never {},
            };
            let Err(error) = ended else { return };
            tracing::error!(%error, "packs are not copied; it is tried again, and reads go on from the source");
            trouble.send_replace(Some(error.to_string()));
            pause = if *self.data.borrow() == before { (pause * 2).min(AGAIN_MAX) } else { AGAIN_MIN };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stopping.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// Takes back what `trouble` says when the data position has moved, or nothing has gone wrong for a while.
    async fn tell_progress(&self, before: Lsn, trouble: &watch::Sender<Option<String>>) -> Infallible {
        let mut data = self.data.subscribe();
        let moved = async { data.wait_for(|data| *data != before).await.is_ok() };
        if let Ok(false) = tokio::time::timeout(QUIET, moved).await {
            return pending().await;
        }
        trouble.send_if_modified(|trouble| trouble.take().is_some());
        pending().await
    }

    async fn follow(&self, volume: &Volume, stopping: watch::Receiver<bool>) -> Result<(), CopyError> {
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
/// Copying begins again after so long, and later each time that it has got nowhere.
const AGAIN_MIN: Duration = Duration::from_millis(500);
const AGAIN_MAX: Duration = Duration::from_secs(30);
/// Copying that has gone on for so long is well again, even if there was nothing to copy.
const QUIET: Duration = Duration::from_secs(10);
