//! A simulated world: accounts, hosts, clients, disasters, and the judgement at the end.
//!
//! Invariants:
//! - Disasters end after a while; then everything that is left catches up, or a stall is a violation.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_backup::{Archive, ArchiveKind, Descriptor, Lineage, Occupant};
use murphy_fs::{FileSystem, IndexSnapshot, check_digest};
use murphy_log::{
    BranchId, ChainHash, Digest, Epoch, EpochId, Log, LogTime, Lsn, Position, State, Usage, VolumeId,
    VolumeKeys,
};
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Level,
    account::{Account, Weather},
    client::{Client, Place, compare},
    disk::Disk,
    gate::{Gate, Life},
    node::{Ending, Ground, Process},
    restores,
    stage::Stage,
};

/// Everything there is.
pub(super) struct World {
    pub(super) ground: Arc<Ground>,
    pub(super) hosts: Vec<Mutex<Host>>,
    /// Where file systems can be used.
    places: watch::Sender<Vec<Place>>,
}

/// A machine: a disk, and perhaps a process.
pub(super) struct Host {
    pub(super) disk: Disk,
    pub(super) process: Option<Process>,
    /// A start is under way.
    pub(super) starting: bool,
}

impl World {
    /// A world in which a volume has just been formatted on host 0.
    pub(super) async fn new(stage: &Arc<Stage>, level: Level, hosts: usize) -> Result<Arc<World>, String> {
        let keys = VolumeKeys::derive(VOLUME);
        let origin = origin();
        let none: super::account::Witness = Arc::new(|_, _| {});
        let stores = (0..hosts).map(|host| Account::new(stage, &format!("store-{host}"), Arc::clone(&none)));
        let archives =
            ["archive-a", "archive-b"].map(|name| Account::new(stage, name, witness(stage, name, &keys)));
        let ground = Arc::new(Ground {
            stage: Arc::clone(stage),
            level,
            origin,
            keys,
            lineage: Lineage { volume: VOLUME, branch: BRANCH },
            stores: stores.collect(),
            archives: archives.to_vec(),
        });
        let machine = |_| Mutex::new(Host { disk: Disk::new(origin), process: None, starting: false });
        let world = World {
            ground,
            hosts: (0..hosts).map(machine).collect(),
            places: watch::Sender::new(Vec::new()),
        };
        world.format().await?;
        Ok(Arc::new(world))
    }

    pub(super) fn stage(&self) -> &Arc<Stage> {
        &self.ground.stage
    }

    async fn format(&self) -> Result<(), String> {
        let gate = Arc::new(Gate::new());
        for account in &self.ground.archives {
            let descriptor = Descriptor {
                lineage: self.ground.lineage,
                name: "simulated".to_owned(),
                kind: ArchiveKind::Full,
                failure_domain: account.name.clone(),
                created: LogTime::from_nanos(1),
                base: self.ground.origin.position,
            };
            let made = Archive::create(self.ground.archive_store(account, &gate), descriptor).await;
            made.map_err(|error| error.to_string())?;
        }
        self.hosts[0].lock().disk.leads = Some(epoch_of(1, 0));
        Ok(())
    }

    /// Starts the source on `host`; it may refuse.
    pub(super) async fn start_source(self: &Arc<Self>, host: usize) {
        let started = self.try_start(host).await;
        self.hosts[host].lock().starting = false;
        match started {
            Ok(tail) => self.stage().note(format!("host {host}: leads after lsn {}", tail.lsn)),
            Err(error) => self.stage().note(format!("host {host}: does not start: {error}")),
        }
        self.publish();
    }

    async fn try_start(self: &Arc<Self>, host: usize) -> Result<Position, String> {
        let mut disk = self.hosts[host].lock().disk.clone();
        if let Some(fenced) = &disk.fenced {
            return Err(fenced.clone());
        }
        let epoch = disk.leads.ok_or("this node is no source")?;
        let mut process = self.ground.open(host, &mut disk)?;
        if let Err(refused) = self.ground.check_fences(&process, &disk).await {
            process.gate.set(Life::Dead);
            return Err(refused);
        }
        let claimed = process.log.claim(epoch).map_err(|error| error.to_string())?;
        let tail = claimed.position;
        self.stage().judge(|judge, _| judge.restarted(host, &tail));
        let genesis = tail == self.ground.origin.position;
        self.ground.lead(host, &mut process, &disk, epoch, genesis)?;
        self.watch_over(host, &process);
        let mut home = self.hosts[host].lock();
        home.disk = disk;
        home.process = Some(process);
        Ok(tail)
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
                        return world.crash(host);
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
            let ended = home.process.take();
            if let Some(process) = &ended {
                process.gate.set(Life::Dead);
                home.disk.crash();
            }
            ended
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
            world.start_source(host).await;
        });
    }

    fn publish(&self) {
        let places = self.hosts.iter().enumerate().filter_map(|(host, home)| {
            let home = home.lock();
            let process = home.process.as_ref()?;
            let (volume, gate) = (process.volume.clone(), Arc::clone(&process.gate));
            home.disk.leads?;
            Some(Place { host, volume, gate })
        });
        self.places.send_replace(places.collect());
    }

    /// A client that goes from place to place until `stop`.
    pub(super) async fn employ(self: Arc<Self>, number: u64, mut stop: watch::Receiver<bool>) {
        let stage = Arc::clone(self.stage());
        let mut client = Client { stage, number, made: 0, files: Vec::new(), level: self.ground.level };
        let mut places = self.places.subscribe();
        loop {
            let found = places.borrow_and_update().clone();
            if found.is_empty() {
                tokio::select! {
                    _ = places.changed() => continue,
                    _ = stop.wait_for(|stop| *stop) => return,
                }
            }
            let place = found[self.stage().below(found.len() as u64) as usize].clone();
            tokio::select! {
                () = client.use_place(&place) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            self.stage().pause(50, 500).await;
        }
    }

    /// Ends all disasters: what can recover does.
    pub(super) async fn heal(self: &Arc<Self>) {
        self.stage().note("the disasters are over");
        for account in self.ground.archives.iter().chain(&self.ground.stores) {
            account.change_weather(|weather| *weather = Weather { gone: weather.gone, ..Weather::FAIR });
        }
        for host in 0..self.hosts.len() {
            let may_start = {
                let home = self.hosts[host].lock();
                if let Some(process) = &home.process {
                    process.gate.set(Life::Runs);
                    process.log.trouble(|trouble| *trouble = Default::default());
                }
                home.process.is_none() && home.disk.leads.is_some() && home.disk.fenced.is_none()
            };
            if may_start {
                self.restart_later(host);
            }
        }
    }

    /// The host that decides: the one of the latest epoch that runs.
    pub(super) fn leader(&self) -> Option<usize> {
        let leads = |(host, home): (usize, &Mutex<Host>)| {
            let home = home.lock();
            home.process.as_ref()?;
            Some((home.disk.leads?, host))
        };
        self.hosts.iter().enumerate().filter_map(leads).max().map(|(_, host)| host)
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
            if self.stage().violation().is_some() {
                return;
            }
        };
        if let Some(behind) = behind {
            self.stage().violated(&format!("stall: {SETTLE_MAX:?} after all was healed {behind}"));
        }
    }

    /// What has not caught up.
    async fn behind(&self) -> Option<String> {
        let leader = self.leader();
        let Some(leader) = leader else {
            let is_lost = |home: &Mutex<Host>| {
                let home = home.lock();
                home.disk.leads.is_none() || home.disk.fenced.is_some()
            };
            return if self.hosts.iter().all(is_lost) { None } else { Some("nobody leads".to_owned()) };
        };
        let (volume, log, shipped) = {
            let home = self.hosts[leader].lock();
            let process = home.process.as_ref()?;
            (process.volume.clone(), Arc::clone(&process.log), process.shipped.clone())
        };
        if let Err(errno) = volume.sync_all().wait().await {
            return Some(format!("host {leader} cannot sync: {errno:?}"));
        }
        let tip = log.durable().state().position;
        for one in &shipped {
            if one.account.is_gone() || one.account.is_damaged() {
                continue;
            }
            let Some(handle) = one.handle.lock().clone() else {
                return Some(format!("{} is not shipped to", one.account.name));
            };
            let status = handle.status();
            let held = status.archived.map_or(Lsn::default(), |held| held.position.lsn);
            // What has ended has said so.
            if held < tip.lsn && status.end.is_none() {
                return Some(format!(
                    "{} is at lsn {held} of {}: {:?}",
                    one.account.name, tip.lsn, status.error
                ));
            }
        }
        None
    }

    /// The last judgement: what was acknowledged is there, trees are what their digests say, and archives restore.
    pub(super) async fn conclude(self: &Arc<Self>) {
        let Some(leader) = self.leader() else {
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
        for (name, certain) in files {
            if let Err(lost) = compare(&volume, &name, &certain).await {
                return self.stage().violated(&format!("{lost} (by host {})", certain.host));
            }
        }
        self.check_tree(leader);
        restores::judge(self, tip).await;
    }

    /// Recomputes the digest of a tree from its rows.
    pub(super) fn check_tree(&self, host: usize) {
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

/// Sees every object of an archive before anybody else does.
fn witness(stage: &Arc<Stage>, name: &str, keys: &VolumeKeys) -> super::account::Witness {
    let (stage, name, keys) = (Arc::clone(stage), name.to_owned(), keys.clone());
    Arc::new(move |at: &Path, bytes: &Bytes| {
        if !at.as_ref().starts_with("archive/log/") {
            return;
        }
        match Occupant::decode(bytes) {
            Ok(Occupant::Slot(slot)) => match slot.verify_alone(&keys) {
                Ok(frames) => {
                    for frame in &frames {
                        stage.judge(|judge, _| judge.copied(&name, frame));
                    }
                }
                Err(error) => {
                    stage.violated(&format!("{name}: {at} holds frames that do not verify: {error}"))
                }
            },
            Ok(Occupant::Seal(seal)) => {
                stage.note(format!(
                    "{name}: sealed after lsn {}, epoch {} follows",
                    seal.base.lsn, seal.next.number
                ));
            }
            Err(error) => stage.violated(&format!("{name}: {at} is neither slot nor seal: {error}")),
        }
    })
}

/// The state before the first entry.
pub(super) fn origin() -> State {
    let position = Position { epoch: epoch_of(1, 0), lsn: Lsn::ROOT, hash: ChainHash::default() };
    State { position, digest: Digest::default(), usage: Usage::default() }
}

/// The epoch of this number that `host` begins.
pub(super) fn epoch_of(number: u32, host: usize) -> Epoch {
    let mut id = [host as u8 + 1; 16];
    id[..4].copy_from_slice(&number.to_le_bytes());
    Epoch { number, id: EpochId::from_bytes(id) }
}

pub(super) const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
pub(super) const BRANCH: BranchId = BranchId::from_bytes([2; 16]);
const SETTLE_LOOK: Duration = Duration::from_secs(2);
/// Puts without an answer, and pauses between attempts, may add up to this.
const SETTLE_MAX: Duration = Duration::from_secs(400);
