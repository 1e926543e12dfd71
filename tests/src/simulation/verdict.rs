//! The verdict on a world: once its disasters are over, everything that is left catches up, and has what was promised.
//!
//! Invariants:
//! - Nothing is judged before everything that can catch up has; what cannot must have said so.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use murphy_fs::{FileSystem, IndexSnapshot, check_digest};
use murphy_log::{Log, Lsn};
use parking_lot::Mutex;

use super::{
    Level,
    client::compare,
    judge::Certain,
    losses::has_snapshot,
    restores,
    shipping::Shipped,
    world::{Host, World},
};

impl World {
    /// Waits until somebody leads, who is seen to meanwhile, for as long as that may take.
    pub(super) async fn find_leader(self: &Arc<Self>) {
        let mut waited = Duration::ZERO;
        while self.leader().is_none() && !self.is_over() && waited < LEADER_MAX {
            tokio::time::sleep(SETTLE_LOOK).await;
            waited += SETTLE_LOOK;
            self.see_to_a_leader().await;
        }
    }

    /// Nobody leads: whoever looks after the volume lets a mirror take over.
    async fn see_to_a_leader(self: &Arc<Self>) {
        if self.leader().is_none() && self.network.is_some() {
            self.promote_somebody().await;
        }
    }

    /// Judges what is left, once it has had time to catch up.
    pub(super) async fn settle(self: &Arc<Self>) {
        let mut waited = Duration::ZERO;
        let behind = loop {
            tokio::time::sleep(SETTLE_LOOK).await;
            waited += SETTLE_LOOK;
            match self.behind().await {
                None => break None,
                Some(behind) if waited >= SETTLE_MAX => break Some(behind),
                Some(_) => {}
            }
            self.see_to_a_leader().await;
            if self.stage().violation().is_some() {
                return;
            }
        };
        if let Some(behind) = behind {
            self.stage().violated(&format!("stall: {SETTLE_MAX:?} after all was healed {behind}"));
        }
    }

    /// A single node that was replaced by nobody cannot come back by itself, unless somebody restores it: as long as anything is left to restore from.
    fn is_over(&self) -> bool {
        let is_lost = |home: &Mutex<Host>| {
            let home = home.lock();
            home.leads().is_none() && !home.starting
        };
        self.network.is_none() && self.hosts.iter().all(is_lost)
    }

    /// What has not caught up.
    async fn behind(&self) -> Option<String> {
        if *self.promoting.lock() {
            return Some("a promotion is under way".to_owned());
        }
        let Some(leader) = self.leader() else {
            return (!self.is_over()).then(|| "nobody leads".to_owned());
        };
        if let Some(what) = self.archive_to_see_to() {
            return Some(what);
        }
        let (volume, log, shipped) = {
            let home = self.hosts[leader].lock();
            let process = home.process.as_ref()?;
            if self.network.is_none() && process.is_forked() {
                // Turned away by the archive for which it competes with its copy; it has said so.
                return None;
            }
            let shipped = process.shipping.as_ref().map(|shipping| shipping.archives()).unwrap_or_default();
            (process.volume.clone(), Arc::clone(&process.log), shipped)
        };
        // The data position of mirrors stays below bytes that a restore lacked, and so does what they acknowledge.
        let restore_lacks = self.restore_lacks.load(Ordering::Relaxed);
        let waits_for_lost = self.ground.level == Level::Mirror && restore_lacks;
        // Nor is there an fsync if none of the archives through which it is acknowledged can be continued; another one cannot be added then.
        let is_stranded =
            self.ground.level == Level::Archive && shipped.iter().all(|one| self.is_excused(one));
        if let (Err(errno), false) = (volume.sync_all().wait().await, waits_for_lost) {
            if is_stranded {
                self.stage().count("volumes whose archives nobody can continue");
                return None;
            }
            return Some(format!("host {leader} cannot sync: {errno:?}"));
        }
        let tip = log.durable().state().position.lsn;
        let mirror = (0..self.hosts.len()).filter(|host| *host != leader && self.network.is_some());
        let archive = || shipped.iter().find_map(|one| self.archive_behind(one, tip));
        let behind = mirror.filter_map(|host| self.mirror_behind(host, tip)).next().or_else(archive);
        if behind.is_some() {
            return behind;
        }
        for one in shipped.iter().filter(|one| self.is_late(&one.account) && !self.is_excused(one)) {
            if !has_snapshot(&one.account).await {
                return Some(format!("{} has no snapshot to begin with", one.account.name));
            }
        }
        None
    }

    /// Whether an archive need not catch up: a disaster has struck it, or it has said why it ends.
    fn is_excused(&self, one: &Shipped) -> bool {
        let has_ended = || one.handle.lock().as_ref().is_some_and(|handle| handle.status().end.is_some());
        one.account.is_gone() || one.account.is_damaged() || has_ended()
    }

    fn mirror_behind(&self, host: usize, tip: Lsn) -> Option<String> {
        let home = self.hosts[host].lock();
        let Some(process) = &home.process else {
            let waiting = home.waiting.as_ref();
            let why = waiting.map(|waiting| waiting.followed.handle.status.borrow().error.clone());
            return Some(format!("host {host} does not run; as a mirror that waits it says {why:?}"));
        };
        let followed = process.among.as_ref().and_then(|among| among.followed.as_ref());
        let Some(followed) = followed else { return Some(format!("host {host} follows nobody")) };
        let (held, data) = (process.log.durable().state().position.lsn, *followed.replica.data.borrow());
        let is_behind = held < tip || (data < tip && !self.restore_lacks.load(Ordering::Relaxed));
        is_behind.then(|| {
            let error = followed.handle.status.borrow().error.clone();
            format!("mirror {host} is at lsn {held}, data {data}, of {tip}: {error:?}")
        })
    }

    fn archive_behind(&self, one: &Shipped, tip: Lsn) -> Option<String> {
        if self.is_excused(one) {
            return None;
        }
        let name = &one.account.name;
        let Some(handle) = one.handle.lock().clone() else {
            return Some(format!("{name} is not shipped to"));
        };
        let status = handle.status();
        let held = status.archived.map_or(Lsn::default(), |held| held.position.lsn);
        // What has ended has said so; and so has what waits for a pack that a disaster took from the only place it can read.
        let lacks_pack =
            self.ground.every_archive().iter().any(|account| account.is_damaged() || account.is_gone())
                && status.error.as_ref().is_some_and(|error| error.starts_with("pack "));
        let is_behind = held < tip && !lacks_pack;
        is_behind.then(|| format!("{name} is at lsn {held} of {tip}: {:?}", status.error))
    }

    /// The last judgement: what was acknowledged is there, trees are what their digests say, and archives restore.
    pub(super) async fn conclude(self: &Arc<Self>) {
        let leader = if self.was_cloned() { self.rightful_copy() } else { self.leader() };
        let Some(leader) = leader else {
            return self.stage().note("nobody leads any more");
        };
        let (volume, log) = {
            let home = self.hosts[leader].lock();
            let Some(process) = &home.process else { return };
            (process.volume.clone(), Arc::clone(&process.log))
        };
        let tip = log.durable().state().position;
        self.stage().note(format!("the end: host {leader} leads, lsn {}", tip.lsn));
        self.stage().judge(|judge, _| judge.all_held(&format!("host {leader}, which leads,"), &tip));
        let files = self.stage().judge(|judge, _| Ok(judge.files())).unwrap_or_default();
        let is_held = |certain: &Certain| {
            self.stage().judge(|judge, _| Ok(judge.is_on(&certain.position, &tip))) == Some(true)
        };
        for (name, certain) in files.into_iter().filter(|(_, certain)| is_held(certain)) {
            if let Err(lost) = compare(&volume, &name, &certain).await {
                return self.stage().violated(&format!("{lost} (by host {})", certain.host));
            }
        }
        (0..self.hosts.len()).for_each(|host| self.check_tree(host));
        restores::judge(self, tip).await;
        if self.stage().violation().is_none() && self.stage().is_kind(3) {
            self.judge_rot(leader, &volume, &tip).await;
        }
    }

    /// Of two copies of one node the one that has everything that was acknowledged; there must be one.
    fn rightful_copy(&self) -> Option<usize> {
        let holds = |host: &usize| {
            let tip = self.hosts[*host].lock().disk.durable();
            let holds = |tip| self.stage().judge(|judge, _| Ok(judge.all_held("", &tip).is_ok()));
            tip.and_then(holds) == Some(true)
        };
        let found = (0..self.hosts.len()).find(holds);
        if found.is_none() {
            self.stage().violated("lost: neither copy of the node has everything that was acknowledged");
        }
        found
    }

    /// Recomputes the digest of a tree from its rows.
    fn check_tree(&self, host: usize) {
        let Some(volume) = self.hosts[host].lock().process.as_ref().map(|process| process.volume.clone())
        else {
            return;
        };
        let (view, state) = if self.leader() == Some(host) {
            let view = volume.view_with_state();
            let state = IndexSnapshot::state(&view);
            (view, state)
        } else {
            (volume.view(), Some(volume.state()))
        };
        let Some(state) = state else { return };
        match check_digest(&view, &self.ground.keys) {
            Ok(check) if check.digest == state.digest => {}
            Ok(check) => self.stage().violated(&format!(
                "digest: the rows at host {host}, lsn {}, have {}, the log says {}",
                state.position.lsn, check.digest, state.digest
            )),
            Err(error) => self.stage().violated(&format!("digest: host {host}: {error}")),
        }
    }
}

const SETTLE_LOOK: Duration = Duration::from_secs(2);
/// Puts without an answer, and pauses between attempts, may add up to this.
const SETTLE_MAX: Duration = Duration::from_secs(400);
/// A source that is gone is restored after a minute of silence, at the earliest; whoever is interrupted watches for another one.
const LEADER_MAX: Duration = Duration::from_secs(400);
