//! The members of a simulated volume: entries of its log, as the program keeps them, and through which of them fsync is acknowledged.
//!
//! Invariants:
//! - The set that acknowledges takes the steps that the program takes, with W = 1 or 2, and is remembered. Members whose directories are gone for
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
    AcknowledgingSet, Admission, AdmitError, Identity, MemberBook, MirrorAcknowledger, MirrorBoard, Services,
    SetStep,
};
use parking_lot::Mutex;

use super::{
    mirrors::Among,
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
    let members = volume.members().unwrap_or_default().into_iter();
    let joined = |row: &MemberRow| matches!(row.state, MemberState::Joined { .. });
    members.filter(|(_, row)| joined(row) && row.role.holds_copy()).collect()
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
    services: Arc<Services>,
    /// Who is to be removed.
    removal: Arc<Mutex<Option<NodeId>>>,
    /// The set that acknowledged last.
    set: Arc<Mutex<AcknowledgingSet>>,
    acknowledger: Option<Arc<MirrorAcknowledger>>,
}

impl Census {
    /// For `process` on `host`; if fsync waits for mirrors it does so from now on.
    pub(super) fn new(
        ground: &Arc<Ground>,
        host: usize,
        (process, among): (&Process, &Among),
        set: &Arc<Mutex<AcknowledgingSet>>,
    ) -> Census {
        let board = &among.services.board;
        let waits = ground.level == super::Level::Mirror;
        let acknowledger = waits.then(|| {
            let set = set.lock().clone();
            Arc::new(MirrorAcknowledger::new(
                Arc::clone(board),
                asked(ground, set.needed(ground.wanted)),
                set.members,
            ))
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
            services: Arc::clone(&among.services),
            removal: Arc::clone(&among.removal),
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
            let removed = *self.removal.lock();
            if let Some(node) = removed {
                self.remove(node).await;
                *self.removal.lock() = None;
            }
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
            let changed = match set.towards(self.ground.wanted, members) {
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
            let needed = asked(&self.ground, changed.needed(self.ground.wanted));
            acknowledger.set(needed, changed.members);
            self.ground.stage.count("changes of who acknowledges");
        }
    }

    /// Removes a member, with the steps of the program; it stays one if the others do not have what it may have acknowledged.
    async fn remove(&self, node: NodeId) {
        let (stage, wanted) = (&self.ground.stage, self.ground.wanted);
        let Some(row) = holders(&self.volume).remove(&node) else { return };
        let MemberState::Joined { public_key } = row.state else { return };
        let old = self.set.lock().clone();
        let kept: BTreeSet<NodeId> = old.members.iter().copied().filter(|member| *member != node).collect();
        let kept = AcknowledgingSet { members: kept, ..old.clone() };
        if let Some(acknowledger) = &self.acknowledger {
            acknowledger.set(asked(&self.ground, kept.needed(wanted)), kept.members.clone());
            if !self.hand_over(node, (&old, &kept), acknowledger).await {
                acknowledger.set(asked(&self.ground, old.needed(wanted)), old.members);
                return stage.note(format!("host {}: member {node} stays", self.host));
            }
        }
        let revoked = MemberRow { state: MemberState::Revoked { public_key }, addresses: Vec::new(), ..row };
        if let Err(error) = record(&self.volume, node, revoked).await {
            return stage.note(format!("host {}: member {node} is not removed: {error}", self.host));
        }
        self.services.members_changed();
        self.board.unlist_member(node);
        *self.set.lock() = kept;
        stage.count("mirrors that were removed");
        stage.note(format!("host {}: member {node} is removed", self.host));
    }

    /// Returns whether what `node` may have acknowledged is at the others too, of whom enough are left.
    async fn hand_over(
        &self,
        node: NodeId,
        (old, kept): (&AcknowledgingSet, &AcknowledgingSet),
        acknowledger: &MirrorAcknowledger,
    ) -> bool {
        let wanted = self.ground.wanted;
        let left = self.mirrors().into_iter().filter(|member| *member != node).count();
        if left < wanted || (!old.members.contains(&node) && old.members.len() >= wanted) {
            return left >= wanted;
        }
        if kept.members.len() < wanted {
            return false;
        }
        let Ok(lsn) = self.volume.durable_here().await else { return false };
        acknowledger.acknowledged(lsn, REMOVE_MAX).await.is_ok()
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

/// How many mirrors an fsync waits for where it should wait for `needed`.
fn asked(ground: &Ground, needed: usize) -> usize {
    if ground.stage.has(super::Canary::HastySource) { needed - 1 } else { needed }
}

const AGAIN: Duration = Duration::from_millis(500);
const CHANGE_MAX: Duration = Duration::from_secs(60);
/// So long the mirrors that are left get to have what the one that is removed has.
const REMOVE_MAX: Duration = Duration::from_secs(20);
