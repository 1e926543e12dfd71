//! An archive that gives back what a node has lost.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use murphy_backup::{ArchiveFence, TakeOverLog};
use murphy_fs::Fence;
use murphy_log::{Clock, DiskLog, Epoch, Frame, Log, NodeId, Position, SystemClock, VolumeKeys};
use tokio::sync::OnceCell;

use super::{Giver, NotGiven};
use crate::{
    config::NodeConfig,
    error::{CliError, failed},
    places::{local_url, open_archive},
    settings::SharedArchive,
};

/// An archive of the volume, opened when it is first asked.
pub(crate) struct ArchiveGiver {
    config: NodeConfig,
    shared: SharedArchive,
    node: NodeId,
    place: OnceCell<ArchiveFence>,
}

impl ArchiveGiver {
    /// The archive as `node` reaches it.
    pub(crate) fn new(config: &NodeConfig, shared: SharedArchive, node: NodeId) -> ArchiveGiver {
        ArchiveGiver { config: config.clone(), shared, node, place: OnceCell::new() }
    }

    async fn place(&self) -> Result<&ArchiveFence, CliError> {
        let opened = self.place.get_or_try_init(|| async {
            let archive = open_archive(&self.config, &local_url(&self.config, &self.shared)?).await;
            let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
            Ok(ArchiveFence::new(archive.map_err(failed)?, self.node, clock, None))
        });
        opened.await
    }
}

impl Giver for ArchiveGiver {
    fn name(&self) -> String {
        self.shared.url.clone()
    }

    fn frames(&self, after: Position) -> BoxFuture<'_, Result<Vec<Frame>, NotGiven>> {
        Box::pin(async move { Ok(self.place().await?.entries(after).await.map_err(failed)?) })
    }

    fn give_back(&self, log: Arc<DiskLog>, own: Epoch) -> BoxFuture<'_, Result<(), CliError>> {
        Box::pin(async move {
            let late = || CliError::new(format!("{} does not answer in time", self.shared.url));
            let place = tokio::time::timeout(ANSWER_MAX, self.place()).await.map_err(|_| late())??;
            let places: Vec<Arc<dyn Fence>> = vec![Arc::new(place.clone())];
            let keys = VolumeKeys::derive(self.config.volume);
            let lost = TakeOverLog { log: log as Arc<dyn Log>, keys, places };
            let given = place.archive().store().while_answering(ANSWER_MAX, lost.recover(own)).await;
            given.ok_or_else(late)?.map(drop).map_err(failed)
        })
    }
}

/// An archive that answers nothing for so long does not give back what was lost.
const ANSWER_MAX: Duration = Duration::from_secs(120);
