//! The members of a simulated volume: entries of its log, as the program keeps them, and through which of them fsync is acknowledged.
//!
//! Invariants:
//! - The set that acknowledges takes the steps that the program takes, with W = 1, and is remembered. Members whose directories are gone for
//!   ever are no members to it: people have removed them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::future::BoxFuture;
use murphy_fs::{Acknowledger, MemberRole, MemberRow, MemberState, Volume};
use murphy_log::{Clock, Lsn, NodeId};
use murphy_mirror::{
    AcknowledgingSet, Admission, AdmitError, Identity, MemberBook, MirrorAcknowledger, MirrorBoard, SetStep,
};
use parking_lot::Mutex;

use super::{
    network::address_of,
    node::{Ground, Process},
    stage::NodeClock,
};

/// The member book above a volume. Invitations are redeemed by whoever looks after the volume, at the source.
pub(super) struct Book(pub(super) Volume);

impl MemberBook for Book {
    fn row(&self, node: NodeId) -> Option<MemberRow> {
        self.0.member(node).ok().flatten()
    }

    fn members(&self) -> Vec<(NodeId, MemberRow)> {
        self.0.members().unwrap_or_default()
    }

    fn admit(&self, _: Admission) -> BoxFuture<'_, Result<MemberRole, AdmitError>> {
        Box::pin(async { Err(AdmitError::Unknown) })
    }

    fn announce(&self, _: NodeId, _: Vec<String>) -> BoxFuture<'_, Result<(), AdmitError>> {
        Box::pin(async { Ok(()) })
    }
}

/// The members that hold a copy.
pub(super) fn holders(volume: &Volume) -> BTreeMap<NodeId, MemberRow> {
    let members = volume.members().unwrap_or_default();
    members.into_iter().filter(|(_, row)| row.role.holds_copy()).collect()
}

/// The row of a node at home on `host`.
pub(super) fn row_of(host: usize, identity: &Identity, role: MemberRole) -> MemberRow {
    MemberRow {
        role,
        state: MemberState::Joined { public_key: *identity.public_key().as_bytes() },
        name: format!("host-{host}"),
        addresses: vec![address_of(host).to_string()],
    }
}

/// Writes a row; durable when it returns.
pub(super) async fn record(volume: &Volume, node: NodeId, row: MemberRow) -> Result<(), String> {
    let change = move |found: Option<&MemberRow>, _| {
        let same = found == Some(&row);
        Ok::<_, String>(if same { Vec::new() } else { vec![(node, Some(row.clone()))] })
    };
    let failed = |errno| format!("a member cannot be recorded: {errno:?}");
    volume.change_members(node, change).wait().await.map_err(failed)??;
    volume.durable_here().await.map_err(failed)?;
    Ok(())
}

/// What a source does about its members, for as long as it leads.
pub(super) struct Census {
    ground: Arc<Ground>,
    host: usize,
    identity: Arc<Identity>,
    volume: Volume,
    board: Arc<MirrorBoard>,
    clock: Arc<NodeClock>,
    /// The set that acknowledged last.
    set: Arc<Mutex<AcknowledgingSet>>,
    acknowledger: Option<Arc<MirrorAcknowledger>>,
}

impl Census {
    /// For `process` on `host`; if fsync waits for mirrors it does so from now on.
    pub(super) fn new(
        ground: &Arc<Ground>,
        host: usize,
        process: &Process,
        board: &Arc<MirrorBoard>,
        set: &Arc<Mutex<AcknowledgingSet>>,
    ) -> Census {
        let waits = ground.level == super::Level::Mirror;
        let acknowledger = waits.then(|| {
            let set = set.lock().clone();
            Arc::new(MirrorAcknowledger::new(Arc::clone(board), set.needed(WANTED), set.members))
        });
        if let Some(acknowledger) = &acknowledger {
            process.volume.acknowledge_with(Arc::clone(acknowledger) as Arc<dyn Acknowledger>);
        }
        Census {
            ground: Arc::clone(ground),
            host,
            identity: Arc::clone(&process.identity),
            volume: process.volume.clone(),
            board: Arc::clone(board),
            clock: Arc::clone(&process.clock),
            set: Arc::clone(set),
            acknowledger,
        }
    }

    /// Makes the source known as one that holds no copy for itself, and keeps the board and the set true to the members.
    pub(super) async fn keep(self) {
        let own = self.identity.node();
        let as_source = row_of(self.host, &self.identity, MemberRole::Observer);
        while record(&self.volume, own, as_source.clone()).await.is_err() {
            tokio::time::sleep(AGAIN).await;
        }
        loop {
            let members = self.mirrors();
            for node in &members {
                self.board.list_member(self.clock.monotonic(), *node);
            }
            self.follow(&members).await;
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// The members that hold a copy, without this node and those that are gone for ever.
    fn mirrors(&self) -> BTreeSet<NodeId> {
        let (own, gone) = (self.identity.node(), self.ground.gone.lock().clone());
        holders(&self.volume).into_keys().filter(|node| *node != own && !gone.contains(node)).collect()
    }

    /// Takes the steps that lead the set to `members`, as far as they answer.
    async fn follow(&self, members: &BTreeSet<NodeId>) {
        let Some(acknowledger) = &self.acknowledger else { return };
        loop {
            let set = self.set.lock().clone();
            let changed = match set.towards(WANTED, members) {
                SetStep::Stay => return,
                SetStep::Leave(kept) => AcknowledgingSet { members: kept, ..set },
                SetStep::Settle(base) => {
                    if !self.have(base, set.members.len(), &set.members, members).await {
                        return;
                    }
                    AcknowledgingSet { unsettled: None, ..set }
                }
                SetStep::Grow { asked, of } => {
                    // Whatever entries made `members` what they are are below.
                    let Ok(lsn) = self.volume.durable_here().await else { return };
                    if !self.have(lsn, asked, &of, members).await {
                        return;
                    }
                    AcknowledgingSet { members: members.clone(), ..set }
                }
            };
            self.set.lock().clone_from(&changed);
            acknowledger.set(changed.needed(WANTED), changed.members);
            self.ground.stage.count("changes of who acknowledges");
        }
    }

    /// Returns whether so many of these have `lsn` in time, while the members stay what they are.
    async fn have(&self, lsn: Lsn, asked: usize, of: &BTreeSet<NodeId>, members: &BTreeSet<NodeId>) -> bool {
        let all = MirrorAcknowledger::new(Arc::clone(&self.board), asked, of.clone());
        let changed = async {
            while self.mirrors() == *members {
                tokio::time::sleep(AGAIN).await;
            }
        };
        tokio::select! {
            biased;
            acknowledged = all.acknowledged(lsn, CHANGE_MAX) => acknowledged.is_ok(),
            () = changed => false,
        }
    }
}

/// One mirror acknowledges.
const WANTED: usize = 1;
const AGAIN: Duration = Duration::from_millis(500);
const CHANGE_MAX: Duration = Duration::from_secs(60);
