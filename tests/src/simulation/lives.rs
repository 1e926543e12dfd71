//! The lives of hosts: how a node starts, what ends it, and how it comes back, as itself or as a mirror that begins anew.
//!
//! Invariants:
//! - What a directory holds comes back with it; a host without one that is of use joins as another node.
//! - A host that neither runs nor is lost is being seen to by somebody.

use std::{sync::Arc, time::Duration};

use murphy_fs::MemberRole;
use murphy_log::{Log, Position};

use super::{
    Canary,
    disk::{Disk, NodeLog, Upstream},
    gate::Life,
    going_over::announcing,
    members::{record, row_of},
    mirrors::{Waiting, watch_following},
    node::{Begun, Ending, Process},
    world::World,
};

impl World {
    /// Starts the node on `host`, whatever it is; it may refuse.
    pub(super) async fn start(self: &Arc<Self>, host: usize) {
        let (follows, fenced) = {
            let home = self.hosts[host].lock();
            (home.disk.follows, home.disk.fenced.clone())
        };
        let started = match (fenced, follows) {
            (Some(why), _) => Err(why),
            (None, Some(source)) => self.start_mirror(host, source),
            (None, None) => self.start_source(host).await.map(Some),
        };
        self.hosts[host].lock().starting = false;
        match started {
            Ok(Some(tail)) => self.stage().note(format!("host {host}: runs after lsn {}", tail.lsn)),
            Ok(None) => self.stage().note(format!("host {host}: waits to be seeded")),
            Err(error) => {
                self.stage().note(format!("host {host}: does not start: {error}"));
                let is_fenced = self.hosts[host].lock().disk.fenced.is_some();
                if is_fenced {
                    self.rejoin_later(host);
                }
            }
        }
        self.publish();
    }

    async fn start_source(self: &Arc<Self>, host: usize) -> Result<Position, String> {
        let mut disk = self.hosts[host].lock().disk.clone();
        let epoch = disk.leads.ok_or("this node is no source")?;
        let below = disk.log.clone().ok_or("this node holds nothing")?;
        let log = NodeLog::new(self.stage(), host, below);
        let mut process = self.ground.open(host, &mut disk, log, Begun::new(self.stage()))?;
        let found = process.log.durable().state().position;
        self.stage().judge(|judge, _| judge.restarted(host, &found));
        if let Some(network) = &self.network {
            let dialer = self.ground.dialer(host, &process.identity, &process.gate, network);
            process.among = Some(self.ground.among(host, (&process, &disk), dialer, None)?);
        }
        self.check_replaced(host, &process, &disk).await?;
        process.log.decide();
        let claimed = process.log.claim(epoch).map_err(|error| error.to_string())?;
        let tail = claimed.position;
        let genesis = (tail == self.ground.origin.position).then(|| {
            let archives = self.genesis_archives();
            archives.iter().map(|account| account.name.as_str()).collect::<Vec<_>>().join(",")
        });
        self.ground.lead(host, &mut process, &disk, epoch, genesis.as_deref())?;
        self.watch_over(host, &process);
        {
            let mut home = self.hosts[host].lock();
            home.disk = disk;
            home.process = Some(process);
        }
        self.tell_predecessor(host);
        self.speak_with_members(host);
        Ok(tail)
    }

    /// Refuses to decide if anybody says that another node does.
    async fn check_replaced(&self, host: usize, process: &Process, disk: &Disk) -> Result<(), String> {
        let mut replaced = self.ground.check_fences(process, disk).await.err();
        if let (None, Some(among)) = (&replaced, &process.among) {
            let own = disk.leads.ok_or("this node is no source")?;
            let epoch = self.ground.successor(process, among, own).await;
            replaced = epoch.map(|epoch| format!("a member knows of epoch {}", epoch.number));
        }
        match replaced {
            None => Ok(()),
            Some(why) => {
                self.hosts[host].lock().disk.fenced = Some(why.clone());
                Err(why)
            }
        }
    }

    /// Begins to follow. The node opens at once if it holds something, or else when it is seeded; then it says after which entry it runs.
    fn start_mirror(self: &Arc<Self>, host: usize, source: Upstream) -> Result<Option<Position>, String> {
        let network = self.network.as_ref().ok_or("there is no network")?;
        let gate = {
            let mut home = self.hosts[host].lock();
            home.disk.settle(self.ground.origin);
            let (waiting, following) = self.ground.begin_following(host, &home.disk, source, network)?;
            let gate = Arc::clone(&waiting.begun.gate);
            if self.stage().has(Canary::SilentMirror) {
                waiting.begun.tasks.run(async move {
                    tokio::time::sleep(Duration::from_secs(4)).await;
                    following.abort();
                });
            }
            home.waiting = Some(waiting);
            gate
        };
        if let Some(tail) = self.open_mirror(host)? {
            return Ok(Some(tail));
        }
        let world = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SEED_LOOK).await;
                gate.pass_or_death().await;
                if gate.life() == Life::Dead {
                    return;
                }
                if world.hosts[host].lock().waiting.as_ref().is_some_and(Waiting::is_removed) {
                    return world.dismiss_the_removed(host);
                }
                match world.open_mirror(host) {
                    Ok(None) => {}
                    Ok(Some(tail)) => {
                        return world.stage().note(format!("host {host}: runs after lsn {}", tail.lsn));
                    }
                    Err(error) => {
                        world.stage().note(format!("host {host}: does not open: {error}"));
                        world.crash(host);
                        return world.restart_later(host);
                    }
                }
            }
        });
        Ok(None)
    }

    /// Opens the mirror on `host`, which follows, if it holds something.
    fn open_mirror(self: &Arc<Self>, host: usize) -> Result<Option<Position>, String> {
        let mut home = self.hosts[host].lock();
        let home = &mut *home;
        let log = home.waiting.as_ref().and_then(|waiting| waiting.followed.replica.use_log());
        let Some((log, waiting)) = log.and_then(|log| Some((log, home.waiting.take()?))) else {
            return Ok(None);
        };
        // What it was seeded with is in place already.
        if let Some(base) = home.disk.orders.lock().ready.take() {
            (home.disk.base, home.disk.log) = (Some(base), Some(log.below()));
        }
        let mut process = self.ground.open(host, &mut home.disk, log, waiting.begun)?;
        let dialer = waiting.dialer.clone();
        let among =
            self.ground.among(host, (&process, &home.disk), waiting.dialer, Some(waiting.followed))?;
        process.volume.follow().map_err(|error| error.to_string())?;
        if let Some(followed) = &among.followed {
            let copying = self.copying(&process, followed, home.disk.node);
            self.ground.begin_copying(host, &process, followed, &copying);
            if let Some(source) = home.disk.follows {
                process.tasks.run(watch_following(self.stage(), (host, source), &process, followed));
                let kept = (Arc::clone(&among.services), Arc::clone(&home.disk.proof));
                process.tasks.run(announcing((host, source), dialer, followed, kept));
            }
        }
        process.among = Some(among);
        self.watch_over(host, &process);
        self.begin_going_over(host, &process);
        let tail = process.log.durable().state().position;
        home.process = Some(process);
        Ok(Some(tail))
    }

    /// Lets `host`, which has nothing of use, join as a mirror with an empty directory, as soon as somebody leads.
    pub(super) fn rejoin_later(self: &Arc<Self>, host: usize) {
        if self.network.is_none() || std::mem::replace(&mut self.hosts[host].lock().starting, true) {
            return;
        }
        let world = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                world.stage().pause(500, 4000).await;
                if let Ok(leader) = world.join(host).await {
                    world.stage().note(format!("host {host}: joins as a mirror of host {leader}"));
                    world.stage().count("mirrors that joined with an empty directory");
                    return world.start(host).await;
                }
            }
        });
    }

    /// Invites `host`, and redeems the token: it has an empty directory, and is a member.
    async fn join(&self, host: usize) -> Result<usize, String> {
        let leads = |other: usize| {
            let home = self.hosts[other].lock();
            Some((home.leads()?, other, home.disk.node))
        };
        let find = || (0..self.hosts.len()).filter(|other| *other != host).filter_map(leads).max();
        let (epoch, leader, source) = find().ok_or("nobody leads")?;
        let volume = self.hosts[leader].lock().process.as_ref().map(|process| process.volume.clone());
        let volume = volume.ok_or("the source does not run")?;
        self.give_up_node(host);
        let mut node = self.hosts[host].lock().disk.node.reborn();
        // One that was given up before it had a directory is nobody any more.
        while self.ground.gone.lock().contains(&self.ground.identity(node)?.node()) {
            node = node.reborn();
        }
        let identity = self.ground.identity(node)?;
        let row = row_of(host, &identity, MemberRole::Mirror);
        let recorded = tokio::time::timeout(RECORD_MAX, record(&volume, identity.node(), row)).await;
        recorded.map_err(|_| "the source does not answer")??;
        let is_given_up = self.ground.gone.lock().contains(&identity.node());
        if is_given_up || find() != Some((epoch, leader, source)) {
            return Err("somebody has taken over meanwhile".to_owned());
        }
        let key = self.ground.identity(source)?.public_key();
        self.hosts[host].lock().disk =
            Disk { follows: Some(Upstream { host: leader, key }), ..Disk::empty(node) };
        Ok(leader)
    }

    /// Ends the process when it has to end, and starts it again if it may.
    fn watch_over(self: &Arc<Self>, host: usize, process: &Process) {
        let (world, gate) = (Arc::clone(self), Arc::clone(&process.gate));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(100)).await;
                if gate.life() == Life::Dead {
                    return;
                }
                gate.pass_or_death().await;
                let ending = world.hosts[host].lock().process.as_ref().and_then(Process::ended);
                match ending {
                    Some(Ending::Fenced(why)) => {
                        world.stage().note(format!("host {host}: {why}"));
                        world.hosts[host].lock().disk.fenced = Some(why);
                        world.crash(host);
                        return world.rejoin_later(host);
                    }
                    Some(Ending::Removed) => return world.dismiss_the_removed(host),
                    Some(Ending::Anew) => {
                        world.crash(host);
                        return world.restart_later(host);
                    }
                    Some(Ending::Broken(why)) => {
                        world.stage().note(format!("host {host}: ends: {why}"));
                        world.crash(host);
                        return world.restart_later(host);
                    }
                    None => {}
                }
            }
        });
    }

    /// The process on `host` is gone; what was synced stays.
    pub(super) fn crash(self: &Arc<Self>, host: usize) {
        let ended = {
            let mut home = self.hosts[host].lock();
            if let Some(gate) = home.gate().cloned() {
                gate.set(Life::Dead);
                home.disk.crash();
            }
            (home.process.take(), home.waiting.take())
        };
        drop(ended);
        self.publish();
    }

    /// Starts `host` again after a while.
    pub(super) fn restart_later(self: &Arc<Self>, host: usize) {
        let world = Arc::clone(self);
        let mut home = self.hosts[host].lock();
        if std::mem::replace(&mut home.starting, true) {
            return;
        }
        drop(home);
        tokio::spawn(async move {
            world.stage().pause(20, 4000).await;
            world.start(host).await;
        });
    }

    /// Starts a copy of the node's directory on the machine beside it, with the node still running.
    pub(super) async fn clone_node(self: &Arc<Self>) {
        let copy = {
            let home = self.hosts[0].lock();
            if home.process.is_none() || self.hosts[1].lock().disk.leads.is_some() {
                return;
            }
            home.disk.copy()
        };
        self.stage().disaster("a copied directory", "the directory of host 0 is copied, and both copies run");
        self.hosts[1].lock().disk = copy;
        self.start(1).await;
    }

    /// Whether two copies of one node have run.
    pub(super) fn was_cloned(&self) -> bool {
        self.network.is_none() && self.hosts[1].lock().disk.leads.is_some()
    }
}

/// Whether a mirror has been seeded is looked at so often.
const SEED_LOOK: Duration = Duration::from_millis(10);
/// A source that has not admitted a mirror after so long is asked again.
const RECORD_MAX: Duration = Duration::from_secs(10);
