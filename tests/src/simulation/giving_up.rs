//! What people give up when a mirror is to take over, and whom they let take over: what a refusal names is given up by name, or another
//! mirror is tried.
//!
//! Invariants:
//! - Nothing is given up that somebody can still bring up.

use std::{collections::BTreeSet, sync::Arc};

use murphy_fs::Volume;
use murphy_log::{Log, NodeId};

use super::{account::Account, disk::NodeName, members::holders, world::World};

/// What stood in the way of promotions since the last one.
#[derive(Default)]
pub(super) struct Refused {
    /// The host that lacks bytes of another one.
    lacks_bytes: Option<usize>,
    /// The host that goes on without what only others have.
    pub(super) gives_up: Option<usize>,
    /// Archives that cannot be brought up: given up by name.
    pub(super) spoiled: BTreeSet<String>,
    /// Hosts that came too late to take over: their logs do not reach back to what archives lack, another member lags behind the entry that
    /// admitted them, and does not know them, or holds more and cannot lend what comes first of that, or somebody else has taken over before them.
    too_late: BTreeSet<usize>,
}

impl Refused {
    /// Whether others are tried before the mirror on `host`.
    fn is_passed_over(&self, host: usize) -> bool {
        self.too_late.contains(&host) || self.lacks_bytes == Some(host)
    }
}

impl World {
    /// Nobody leads: whoever looks after the volume lets the mirror that holds most take over.
    pub(super) async fn promote_somebody(self: &Arc<Self>) {
        let candidate = *self.candidate.lock();
        if let Some(host) = candidate.or_else(|| self.next_candidate()) {
            self.promote(host).await;
        }
    }

    /// The mirror that holds most; rather one that nobody has refused yet.
    fn next_candidate(&self) -> Option<usize> {
        let held = |host: &usize| {
            let home = self.hosts[*host].lock();
            let process = home.process.as_ref().filter(|_| home.disk.follows.is_some())?;
            let position = process.log.durable().state().position;
            drop(home);
            if self.is_removed(*host) {
                return None;
            }
            let is_in_time = !self.refused.lock().is_passed_over(*host);
            let rank = (is_in_time, position.epoch, position.lsn, *host);
            self.has_caught_up(&position).then_some(rank)
        };
        (0..self.hosts.len()).filter_map(|host| held(&host)).max().map(|(.., host)| host)
    }

    /// Members that hold nothing yet do not listen, and cannot be sealed: they are stopped, given up by name, and join again.
    pub(super) fn dismiss_the_unseeded(self: &Arc<Self>) {
        for host in 0..self.hosts.len() {
            {
                let mut home = self.hosts[host].lock();
                let is_unseeded = home.disk.follows.is_some() && home.disk.log.is_none();
                if !is_unseeded || home.disk.fenced.is_some() {
                    continue;
                }
                home.disk.fenced = Some("it holds nothing".to_owned());
            }
            self.give_up_node(host);
            self.crash(host);
            self.rejoin_later(host);
        }
    }

    /// Members that were admitted and have no directory, since whoever was to join died meanwhile: there is nobody to be reached, and nothing
    /// to be lost. They are given up by name; the host joins as yet another node.
    pub(super) fn dismiss_the_absent(&self, volume: &Volume) {
        let names: Vec<NodeName> = self.hosts.iter().map(|home| home.lock().disk.node).collect();
        let at_home: Vec<NodeId> =
            names.iter().filter_map(|name| Some(self.ground.identity(*name).ok()?.node())).collect();
        let absent = holders(volume).into_keys().filter(|node| !at_home.contains(node));
        self.ground.gone.lock().extend(absent);
    }

    /// The directory on `host` is gone for ever, as everybody knows who looks after the volume: it is nobody whom one could let take over.
    pub(super) fn give_up_node(&self, host: usize) {
        let node = self.hosts[host].lock().disk.node;
        if let Ok(identity) = self.ground.identity(node) {
            self.ground.gone.lock().insert(identity.node());
        }
        self.candidate.lock().take_if(|candidate| *candidate == host);
    }

    /// Archives that cannot be brought up are given up by name: a disaster has changed what is in them, or no mirror is left whose log reaches
    /// back to what they lack. The old source, which could go on with them, is seen to first: it never comes back.
    pub(super) fn give_up_archives(self: &Arc<Self>, host: usize, source: usize, error: &str) {
        let is_out_of_reach = error.contains("no other archive has what comes then");
        let lags = error.contains("is not a member of volume");
        let is_overtaken = error.contains(", which began epoch");
        // Another mirror holds more, and its log does not reach back to where this one ends.
        let is_left_behind =
            error.contains("which holds more") && error.contains("no longer reaches back so far");
        if is_out_of_reach || lags || is_overtaken || is_left_behind {
            self.refused.lock().too_late.insert(host);
            let is_other_left = (0..self.hosts.len()).any(|other| self.was_in_time(other));
            let is_sealer_gone =
                self.ground.gone.lock().iter().any(|node| error.contains(&format!("by node {node}")));
            if is_other_left || (is_overtaken && !is_sealer_gone) {
                // Who has taken over is gone on with, or whoever follows that one; if there is nobody else, whoever lags is given up by then.
                *self.candidate.lock() = None;
                return;
            }
        }
        if lags || error.contains("an earlier attempt of this node has ended the epoch") {
            // The member that does not know of this one holds less than it. The one without which an earlier attempt has ended the epoch had been
            // given up by then.
            self.refused.lock().gives_up = Some(host);
        }
        let is_spoiled = |account: &&Arc<Account>| {
            let is_unreadable = error.contains("has other content") || error.contains("is damaged");
            let is_changed = account.is_damaged() && is_unreadable;
            // One that somebody has sealed who is gone ends there, below what is left.
            error.contains(&account.name) && (is_changed || is_out_of_reach || is_overtaken)
        };
        let every = self.ground.every_archive();
        let spoiled: Vec<String> =
            every.iter().filter(is_spoiled).map(|account| account.name.clone()).collect();
        if spoiled.is_empty() {
            return;
        }
        {
            let mut refused = self.refused.lock();
            refused.spoiled.extend(spoiled);
            // Nobody is too late for what is given up.
            refused.too_late.clear();
        }
        self.stage().count("archives that were given up by name");
        self.crash(source);
        self.hosts[source].lock().disk.fenced = Some("it was taken away".to_owned());
        self.rejoin_later(source);
    }

    /// Whether the mirror on `host` may take over where others came too late: one that anybody would promote.
    fn was_in_time(&self, host: usize) -> bool {
        let held = {
            let home = self.hosts[host].lock();
            let is_mirror = home.disk.follows.is_some() && home.disk.fenced.is_none();
            home.disk.durable().filter(|_| is_mirror)
        };
        held.is_some_and(|held| self.has_caught_up(&held)) && !self.refused.lock().is_passed_over(host)
    }

    /// One mirror may have more entries and the other more bytes. Whoever lacks acknowledged bytes must not take over; the other gives up the
    /// entries that only the first one has: they were not acknowledged without their bytes.
    pub(super) fn note_refusal(&self, host: usize, error: &str) {
        let mut refused = self.refused.lock();
        if error.contains("has every byte") {
            refused.lacks_bytes = Some(host);
        } else if refused.lacks_bytes.is_some_and(|other| other != host) {
            refused.gives_up = Some(host);
        }
    }
}
