//! People take a mirror out of the volume that is well, and let its host join again: as another member, over the same block store.
//!
//! Invariants:
//! - One that was removed takes over from nobody, and nobody counts on what it holds.

use std::{sync::Arc, time::Duration};

use murphy_fs::MemberState;
use murphy_log::NodeId;

use super::{disk::NodeName, world::World};

impl World {
    /// People remove a mirror now and then, until `end`.
    pub(super) async fn remove_mirrors(self: Arc<Self>, end: Duration) {
        let stage = Arc::clone(self.stage());
        loop {
            tokio::time::sleep(Duration::from_millis(PAUSE_MS + stage.below_apart(PAUSE_MS))).await;
            if stage.now() >= end {
                return;
            }
            self.order_removal();
        }
    }

    /// `murphy member remove`, at the source, of one of the mirrors that run.
    fn order_removal(&self) {
        let runs = |host: &usize| {
            let home = self.hosts[*host].lock();
            home.process.is_some() && home.disk.follows.is_some() && home.disk.fenced.is_none()
        };
        let mirrors: Vec<usize> = (0..self.hosts.len()).filter(runs).collect();
        // Another one is left.
        let (Some(leader), true) = (self.leader(), mirrors.len() > 1) else { return };
        let host = mirrors[self.stage().below_apart(mirrors.len() as u64) as usize];
        let Some(node) = self.node_of(host) else { return };
        let home = self.hosts[leader].lock();
        let among = home.process.as_ref().and_then(|process| process.among.as_ref());
        if let (Some(among), false) = (among, *self.promoting.lock()) {
            self.stage().note(format!("host {leader}: is to remove host {host}"));
            *among.removal.lock() = Some(node);
        }
    }

    /// The node on `host` was removed: its directory is of no use any more, its packs are.
    pub(super) fn dismiss_the_removed(self: &Arc<Self>, host: usize) {
        self.stage().count("removed mirrors that joined anew");
        self.stage().note(format!("host {host}: was removed"));
        self.give_up_node(host);
        self.crash(host);
        self.hosts[host].lock().disk.fenced = Some("it was removed".to_owned());
        self.rejoin_later(host);
    }

    /// Whether the node on `host` was removed, as its own log says, or that of whoever leads.
    pub(super) fn is_removed(&self, host: usize) -> bool {
        let Some(node) = self.node_of(host) else { return false };
        let says = |other: usize| {
            let volume = self.hosts[other].lock().process.as_ref().map(|process| process.volume.clone());
            let row = volume.and_then(|volume| volume.member(node).ok().flatten());
            row.is_some_and(|row| matches!(row.state, MemberState::Revoked { .. }))
        };
        says(host) || self.leader().is_some_and(says)
    }

    /// Whether a mirror is being removed, or was removed and does not know it.
    pub(super) fn is_removing(&self) -> bool {
        let is_ordered = |host: usize| {
            let home = self.hosts[host].lock();
            let among = home.process.as_ref().and_then(|process| process.among.as_ref());
            among.is_some_and(|among| among.removal.lock().is_some())
        };
        (0..self.hosts.len()).any(|host| is_ordered(host) || self.is_removed(host))
    }

    fn node_of(&self, host: usize) -> Option<NodeId> {
        let name: NodeName = self.hosts[host].lock().disk.node;
        Some(self.ground.identity(name).ok()?.node())
    }
}

/// People take at least so long, and at most twice that.
const PAUSE_MS: u64 = 4000;
