//! The archives in a promotion: what each of them is sealed with and brought up from.
//!
//! Invariants:
//! - Every archive of the volume is sealed, or given up by its URL.

use std::{collections::BTreeSet, sync::Arc};

use murphy_backup::{ArchiveKind, Losses, LostPacks, Supplies, TakeOverLog};
use murphy_fs::{BlockStore, BlockStores, Fence, StoreUrl};
use murphy_log::{Clock, Epoch, Log, Lsn, NodeId, VolumeKeys};
use tokio::sync::watch;

use crate::{
    config::NodeConfig,
    error::CliError,
    settings::SharedArchive,
    take_over::{GivenUp, Taker},
};

/// What the promoted node is, as far as archives are concerned.
pub(super) struct Promoted {
    pub(super) config: NodeConfig,
    pub(super) node: NodeId,
    pub(super) log: Arc<dyn Log>,
    pub(super) keys: VolumeKeys,
    pub(super) blocks: Arc<BlockStores>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) lost: Arc<dyn Losses>,
}

impl Promoted {
    /// This node as one that opens archives.
    pub(super) fn taker(&self) -> Taker<'_> {
        Taker { config: &self.config, node: self.node, clock: Arc::clone(&self.clock) }
    }
}

/// Packs that may be gone with the source before: those of entries that this node holds without their bytes, as it is whenever it is asked. A
/// promotion fetches entries, and bytes, while it goes on.
#[derive(Debug)]
pub(super) struct Lacking {
    /// What else is known to be lost.
    pub(super) known: Arc<dyn Losses>,
    pub(super) data: watch::Receiver<Lsn>,
    pub(super) log: Arc<dyn Log>,
}

impl Losses for Lacking {
    fn may_have(&self, since: Lsn) -> bool {
        let now = LostPacks { after: *self.data.borrow(), upto: self.log.durable().state().position.lsn };
        now.may_have(since) || self.known.may_have(since)
    }
}

/// The archives that a promotion seals, open.
pub(super) struct Places {
    /// All archives of the volume, as the log named them.
    pub(super) shared: Vec<SharedArchive>,
    pub(super) log: TakeOverLog,
    /// The full ones: how this node reaches them, and their packs.
    pub(super) full: Vec<(StoreUrl, Arc<dyn BlockStore>)>,
    /// The epochs that they are in, and those that are given up and answer all the same.
    pub(super) epochs: Vec<Epoch>,
    /// The members that were given up.
    pub(super) given_up: BTreeSet<NodeId>,
    /// The archives that were given up.
    pub(super) archives_given_up: BTreeSet<String>,
}

impl Places {
    /// Opens every archive that is not given up, and asks each how far it is.
    pub(super) async fn open(
        promoted: &Promoted,
        shared: &[SharedArchive],
        given_up: &GivenUp,
    ) -> Result<Places, CliError> {
        let mut opened = Vec::new();
        for archive in shared.iter().filter(|archive| !given_up.archives.contains(&archive.url)) {
            opened.push(promoted.taker().open(archive).await.map_err(|error| {
                CliError::new(format!("{} cannot be sealed: {error}", archive.url)).hint(format!(
                    "the source before could go on with it; --assume-lost {} gives it up, with what only it holds",
                    archive.url
                ))
            })?);
        }
        let full: Vec<(StoreUrl, Arc<dyn BlockStore>)> = opened
            .iter()
            .filter(|one| one.fence.archive().descriptor().kind == ArchiveKind::Full)
            .map(|one| (one.url.clone(), Arc::new(one.fence.archive().packs()) as Arc<dyn BlockStore>))
            .collect();
        let own: Arc<dyn BlockStore> = promoted.blocks.clone();
        let others = full.iter().map(|(_, packs)| Arc::clone(packs)).collect();
        let packs: Arc<dyn BlockStore> = Arc::new(BlockStores::new(own, others));
        let supplies =
            Supplies { log: Arc::clone(&promoted.log), packs, lost: Some(Arc::clone(&promoted.lost)) };
        // Whoever has sealed one of these must not have begun the epoch of the same number.
        let lost = shared.iter().filter(|archive| given_up.archives.contains(&archive.url));
        let taker = promoted.taker();
        let lost = futures::future::join_all(lost.map(|archive| taker.give_up(archive))).await;
        let epochs = opened.iter().map(|one| one.held.epoch);
        let epochs = epochs.chain(lost.iter().filter_map(|one| one.epoch)).collect();
        let places = opened
            .into_iter()
            .map(|one| Arc::new(one.fence.with_supplies(supplies.clone())) as Arc<dyn Fence>)
            .collect();
        let log = TakeOverLog { log: Arc::clone(&promoted.log), keys: promoted.keys.clone(), places };
        let (nodes, archives_given_up) = (given_up.nodes.clone(), given_up.archives.clone());
        Ok(Places { shared: shared.to_vec(), log, full, epochs, given_up: nodes, archives_given_up })
    }
}

#[cfg(test)]
mod tests {
    use murphy_log::{MemoryLog, conformance::History};

    use super::*;

    #[derive(Debug)]
    struct Only(Lsn);

    impl Losses for Only {
        fn may_have(&self, since: Lsn) -> bool {
            since == self.0
        }
    }

    /// The fear: entries come from another member without their bytes, and the archive waits for those for ever; or bytes that did come are
    /// given up.
    #[test]
    fn what_may_be_lost_is_what_lacks_its_bytes_at_the_moment() {
        let origin = History::origin();
        let mut history = History::new(origin.position.epoch, origin);
        let log = Arc::new(MemoryLog::new(origin));
        log.claim(origin.position.epoch).unwrap();
        let data = watch::Sender::new(origin.position.lsn);
        let far = Lsn::new(1000);
        let lacking = Lacking {
            known: Arc::new(Only(far)),
            data: data.subscribe(),
            log: Arc::clone(&log) as Arc<dyn Log>,
        };
        let next = origin.position.lsn.next();
        assert!(!lacking.may_have(next) && lacking.may_have(far));
        log.append(&origin.position, history.frame(3)).unwrap();
        let end = log.tail().position.lsn;
        assert!(lacking.may_have(next) && lacking.may_have(end) && !lacking.may_have(end.next()));
        data.send_replace(next);
        assert!(!lacking.may_have(next) && lacking.may_have(end));
    }
}
