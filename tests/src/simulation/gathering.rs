//! After a promotion without all bytes: the product's gathering, over simulated stores and datagrams.
//!
//! Invariants:
//! - It goes on after every start until all is settled, as the program's does.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use murphy_backup::LostPacks;
use murphy_fs::{BlockStore, MemberRow, MemberState, ObjectBlockStore, Volume};
use murphy_log::{Clock, NodeId};
use murphy_mirror::{
    Ask, Dialer, Gap, GatherStatus, Gatherer, MemberPacks, PackPlace, PackPlaces, PackSource, PublicKey,
};
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    gate::Gate,
    members::holders,
    node::{Ground, Process},
    world::{BRANCH, VOLUME},
};

/// What a source does about the packs that its promotion lacked.
pub(super) struct Gathering {
    ground: Arc<Ground>,
    host: usize,
    own: NodeId,
    volume: Volume,
    gate: Arc<Gate>,
    clock: Arc<dyn Clock>,
    dialer: Dialer,
    /// What the promotion left open, as the disk has it.
    lost: Arc<Mutex<Option<LostPacks>>>,
}

impl Gathering {
    pub(super) fn of(
        ground: &Arc<Ground>,
        host: usize,
        process: &Process,
        dialer: Dialer,
        lost: &Arc<Mutex<Option<LostPacks>>>,
    ) -> Gathering {
        Gathering {
            ground: Arc::clone(ground),
            host,
            own: process.identity.node(),
            volume: process.volume.clone(),
            gate: Arc::clone(&process.gate),
            clock: Arc::clone(&process.clock) as Arc<dyn Clock>,
            dialer,
            lost: Arc::clone(lost),
        }
    }

    pub(super) async fn run(self) {
        let Gathering { ground, host, own, volume, gate, clock, dialer, lost } = self;
        let everybody = Everybody {
            ground: Arc::clone(&ground),
            own,
            volume: volume.clone(),
            gate: Arc::clone(&gate),
            dialer,
            members: Mutex::default(),
        };
        let gap = lost.lock().map(|lost| Gap { after: lost.after, upto: lost.upto });
        let gatherer = Gatherer {
            volume,
            store: ground.blocks(host, &gate),
            places: Arc::new(everybody),
            gap,
            clock,
            helpers: 3,
            asking: ASKING,
            status: watch::Sender::new(GatherStatus::default()),
        };
        while let Err(error) = gatherer.settle().await {
            ground.stage.note(format!("host {host}: gathers again: {error}"));
            tokio::time::sleep(AGAIN).await;
        }
        if gap.is_some() {
            let GatherStatus { found, missing, .. } = *gatherer.status.borrow();
            ground.stage.note(format!("host {host}: has gathered: {found} packs found, {missing} missing"));
        }
        *lost.lock() = None;
        while let Err(error) = gatherer.look_again().await {
            ground.stage.note(format!("host {host}: looks again: {error}"));
            tokio::time::sleep(AGAIN).await;
        }
    }
}

/// The archives that exist, and the members whose directories are not gone for ever.
struct Everybody {
    ground: Arc<Ground>,
    own: NodeId,
    volume: Volume,
    gate: Arc<Gate>,
    dialer: Dialer,
    members: Mutex<HashMap<NodeId, Arc<MemberPacks>>>,
}

impl Everybody {
    fn member(&self, node: NodeId, row: MemberRow) -> Option<PackPlace> {
        let MemberState::Joined { public_key } = row.state else { return None };
        let mut members = self.members.lock();
        let member = members.entry(node).or_insert_with(|| {
            let ask = Ask { volume: VOLUME, branch: BRANCH, epoch: None };
            let key = PublicKey::from_bytes(public_key);
            Arc::new(MemberPacks::new(self.dialer.clone(), row.addresses, key, ask))
        });
        let source = Arc::clone(member) as Arc<dyn PackSource>;
        Some(PackPlace { name: row.name, source, is_awaited: true })
    }
}

impl PackPlaces for Everybody {
    fn places(&self) -> Vec<PackPlace> {
        let archives = self.ground.every_archive().into_iter().filter(|account| !account.is_gone());
        let archives = archives.map(|account| {
            let packs = account.through(&self.gate);
            let store = ObjectBlockStore::new(packs, Path::from("archive"), account.name.clone());
            let source = Arc::new(Arc::new(store) as Arc<dyn BlockStore>);
            PackPlace { name: account.name.clone(), source, is_awaited: true }
        });
        let gone = self.ground.gone.lock().clone();
        let others = holders(&self.volume).into_iter();
        let others = others.filter(|(node, _)| *node != self.own && !gone.contains(node));
        archives.chain(others.filter_map(|(node, row)| self.member(node, row))).collect()
    }

    /// Nobody says so; the next look comes by itself.
    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }
}

/// Longer than anybody is out of reach who comes back.
const ASKING: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(2);
