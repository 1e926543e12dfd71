//! A simulated world: accounts, hosts, clients, disasters, and the judgement at the end.
//!
//! Invariants:
//! - Disasters end after a while; then everything that is left catches up, or a stall is a violation.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

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
    judge::Certain,
    mirrors::identity_of,
    network::Network,
    node::{Ending, Ground, Process},
    promotion::Refused,
    restores,
    stage::Stage,
};

/// Everything there is.
pub(super) struct World {
    pub(super) ground: Arc<Ground>,
    pub(super) hosts: Vec<Mutex<Host>>,
    /// What is between them, if there are several.
    pub(super) network: Option<Arc<Network>>,
    /// A promotion is under way.
    pub(super) promoting: Mutex<bool>,
    /// Who has begun to take over and has not sealed everybody.
    pub(super) candidate: Mutex<Option<usize>>,
    /// What stood in the way of promotions.
    pub(super) refused: Mutex<Refused>,
    /// Whether bytes were lost with a source, as its level allows.
    pub(super) bytes_lost: AtomicBool,
    /// Where copiers keep how far they have come.
    folder: tempfile::TempDir,
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

impl Host {
    fn new(origin: State) -> Host {
        Host { disk: Disk::new(origin), process: None, starting: false }
    }
}

impl World {
    /// A world in which a volume has just been formatted on host 0.
    pub(super) async fn new(stage: &Arc<Stage>, level: Level, hosts: usize) -> Result<Arc<World>, String> {
        let keys = VolumeKeys::derive(VOLUME);
        let origin = origin();
        let none: super::account::Witness = Arc::new(|_, _| {});
        // A node alone has a machine beside it, where a copy of its directory may be started: with the same identity and store.
        let machines = hosts.max(2);
        let home = |machine: usize| if machine < hosts { machine } else { 0 };
        let stores = (0..hosts).map(|host| Account::new(stage, &format!("store-{host}"), Arc::clone(&none)));
        let stores: Vec<_> = stores.collect();
        let archives =
            ["archive-a", "archive-b"].map(|name| Account::new(stage, name, witness(stage, name, &keys)));
        let ground = Arc::new(Ground {
            stage: Arc::clone(stage),
            level,
            origin,
            keys,
            lineage: Lineage { volume: VOLUME, branch: BRANCH },
            stores: (0..machines).map(|machine| Arc::clone(&stores[home(machine)])).collect(),
            archives: archives.to_vec(),
            identities: (0..machines)
                .map(|machine| identity_of(home(machine)).map(Arc::new))
                .collect::<Result<_, _>>()?,
        });
        let machine = |_| Mutex::new(Host::new(origin));
        let world = World {
            ground,
            hosts: (0..machines).map(machine).collect(),
            network: (hosts > 1).then(|| Network::new(stage)),
            promoting: Mutex::default(),
            candidate: Mutex::default(),
            refused: Mutex::default(),
            bytes_lost: AtomicBool::new(false),
            folder: in_memory()?,
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
        for (host, home) in self.hosts.iter().enumerate() {
            let disk = &mut home.lock().disk;
            if host == 0 {
                disk.leads = Some(epoch_of(1, 0));
            } else {
                disk.follows = self.network.is_some().then_some(0);
            }
        }
        Ok(())
    }

    /// Starts the node on `host`, whatever it is; it may refuse.
    pub(super) async fn start(self: &Arc<Self>, host: usize) {
        let follows = self.hosts[host].lock().disk.follows;
        let started = match follows {
            Some(source) => self.start_mirror(host, source),
            None => self.start_source(host).await,
        };
        self.hosts[host].lock().starting = false;
        match started {
            Ok(tail) => self.stage().note(format!("host {host}: runs after lsn {}", tail.lsn)),
            Err(error) => {
                self.stage().note(format!("host {host}: does not start: {error}"));
                let home = self.hosts[host].lock();
                let is_fenced = home.disk.fenced.is_some();
                drop(home);
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
        let mut process = self.ground.open(host, &mut disk)?;
        let found = process.log.durable().state().position;
        self.stage().judge(|judge, _| judge.restarted(host, &found));
        if let Some(network) = &self.network {
            process.among = Some(self.ground.among(host, &process, network)?);
        }
        self.check_replaced(host, &process, &disk).await?;
        process.log.decide();
        let claimed = process.log.claim(epoch).map_err(|error| error.to_string())?;
        let tail = claimed.position;
        let genesis = tail == self.ground.origin.position;
        self.ground.lead(host, &mut process, &disk, epoch, genesis)?;
        self.watch_over(host, &process);
        let mut home = self.hosts[host].lock();
        home.disk = disk;
        home.process = Some(process);
        Ok(tail)
    }

    /// Refuses to decide if anybody says that another node does.
    async fn check_replaced(&self, host: usize, process: &Process, disk: &Disk) -> Result<(), String> {
        let mut replaced = self.ground.check_fences(process, disk).await.err();
        if let (None, Some(among)) = (&replaced, &process.among) {
            let epoch = self.ground.successor(host, among, &process.log).await;
            replaced = epoch.map(|epoch| format!("a member leads epoch {}", epoch.number));
        }
        match replaced {
            None => Ok(()),
            Some(why) => {
                self.hosts[host].lock().disk.fenced = Some(why.clone());
                Err(why)
            }
        }
    }

    fn start_mirror(self: &Arc<Self>, host: usize, source: usize) -> Result<Position, String> {
        let mut home = self.hosts[host].lock();
        let mut process = self.ground.open(host, &mut home.disk)?;
        let network = self.network.as_ref().ok_or("there is no network")?;
        let mut among = self.ground.among(host, &process, network)?;
        let folder = self.folder.path().to_owned();
        among.followed = Some(self.ground.follow(host, source, &process, &among, &home.disk, folder)?);
        process.among = Some(among);
        self.watch_over(host, &process);
        let tail = process.log.durable().state().position;
        home.process = Some(process);
        Ok(tail)
    }

    /// The node on `host`, which was replaced, joins again as a mirror, with an empty directory.
    pub(super) fn rejoin_later(self: &Arc<Self>, host: usize) {
        if self.network.is_none() {
            return;
        }
        let world = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                world.stage().pause(500, 4000).await;
                let leads = |other: &usize| {
                    let home = world.hosts[*other].lock();
                    let leads = home.disk.leads.filter(|_| home.disk.fenced.is_none());
                    leads.map(|epoch| (epoch, *other))
                };
                let leader =
                    (0..world.hosts.len()).filter(|other| *other != host).filter_map(|o| leads(&o)).max();
                if world.hosts[host].lock().disk.fenced.is_none() {
                    return;
                }
                if let Some((_, leader)) = leader {
                    world.hosts[host].lock().disk.begin_anew(world.ground.origin, leader);
                    world.stage().note(format!("host {host}: joins again, as a mirror of host {leader}"));
                    return world.start(host).await;
                }
            }
        });
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
                    Some(Ending::Anew) => {
                        world.crash(host);
                        let origin = world.ground.origin;
                        let mut home = world.hosts[host].lock();
                        let source = home.disk.follows.unwrap_or_default();
                        home.disk.begin_anew(origin, source);
                        drop(home);
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
            world.start(host).await;
        });
    }

    pub(super) fn publish(&self) {
        let places = self.hosts.iter().enumerate().filter_map(|(host, home)| {
            let home = home.lock();
            let process = home.process.as_ref()?;
            let (volume, gate) = (process.volume.clone(), Arc::clone(&process.gate));
            home.disk.leads?;
            Some(Place { host, volume, gate })
        });
        self.places.send_replace(places.collect());
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
        self.stage().disaster("the directory of host 0 is copied, and both copies run");
        self.hosts[1].lock().disk = copy;
        self.start(1).await;
    }

    /// Whether two copies of one node have run.
    pub(super) fn was_cloned(&self) -> bool {
        self.network.is_none() && self.hosts[1].lock().disk.leads.is_some()
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
        if let Some(network) = &self.network {
            network.heal();
        }
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
                let has_part = home.disk.leads.is_some() || home.disk.follows.is_some();
                home.process.is_none() && has_part && home.disk.fenced.is_none()
            };
            if may_start {
                self.restart_later(host);
            }
        }
    }

    /// The host that decides: the one of the latest epoch that runs. Of two copies of one node the one that no archive has turned away.
    pub(super) fn leader(&self) -> Option<usize> {
        let leads = |(host, home): (usize, &Mutex<Host>)| {
            let home = home.lock();
            let is_forked = home.process.as_ref()?.is_forked();
            Some(((home.disk.leads?, !is_forked), host))
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
            if self.leader().is_none() && self.network.is_some() {
                self.promote_somebody().await;
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
            // A single node that was replaced by nobody cannot come back by itself.
            let is_over = self.network.is_none() && self.hosts.iter().all(is_lost);
            return if is_over { None } else { Some("nobody leads".to_owned()) };
        };
        let (volume, log, shipped) = {
            let home = self.hosts[leader].lock();
            let process = home.process.as_ref()?;
            if self.network.is_none() && process.is_forked() {
                // Turned away by the archive for which it competes with its copy; it has said so.
                return None;
            }
            (process.volume.clone(), Arc::clone(&process.log), process.shipped.clone())
        };
        // The data position of mirrors stays below bytes that are gone with a source, and so does what they acknowledge.
        let waits_for_lost = self.ground.level == Level::Mirror && self.bytes_lost.load(Ordering::Relaxed);
        if let (Err(errno), false) = (volume.sync_all().wait().await, waits_for_lost) {
            return Some(format!("host {leader} cannot sync: {errno:?}"));
        }
        let tip = log.durable().state().position;
        let others = self.hosts.iter().enumerate().filter(|(host, _)| *host != leader);
        for (host, home) in others.filter(|_| self.network.is_some()) {
            let home = home.lock();
            let Some(process) = &home.process else { return Some(format!("host {host} does not run")) };
            let followed = process.among.as_ref().and_then(|among| among.followed.as_ref());
            let Some(followed) = followed else { return Some(format!("host {host} follows nobody")) };
            let (held, data) = (process.log.durable().state().position.lsn, *followed.replica.data.borrow());
            if held < tip.lsn || (data < tip.lsn && !self.bytes_lost.load(Ordering::Relaxed)) {
                let error = followed.handle.status.borrow().error.clone();
                return Some(format!(
                    "mirror {host} is at lsn {held}, data {data}, of {}: {error:?}",
                    tip.lsn
                ));
            }
        }
        for one in &shipped {
            if one.account.is_gone() || one.account.is_damaged() {
                continue;
            }
            let Some(handle) = one.handle.lock().clone() else {
                return Some(format!("{} is not shipped to", one.account.name));
            };
            let status = handle.status();
            let held = status.archived.map_or(Lsn::default(), |held| held.position.lsn);
            // What has ended has said so; and so has what waits for a pack that a disaster took from the only place it can read.
            let lacks_pack =
                self.ground.archives.iter().any(|account| account.is_damaged() || account.is_gone())
                    && status.error.as_ref().is_some_and(|error| error.starts_with("pack "));
            if held < tip.lsn && status.end.is_none() && !lacks_pack {
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
    }

    /// Of two copies of one node the one that has everything that was acknowledged; there must be one.
    fn rightful_copy(&self) -> Option<usize> {
        let holds = |host: &usize| {
            let tip = self.hosts[*host].lock().disk.log.durable().state().position;
            self.stage().judge(|judge, _| Ok(judge.all_held("", &tip).is_ok())) == Some(true)
        };
        let found = (0..self.hosts.len()).find(holds);
        if found.is_none() {
            self.stage().violated("lost: neither copy of the node has everything that was acknowledged");
        }
        found
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
                    stage.violated(&format!("{name}: {at} holds frames that do not verify: {error}"));
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

/// A folder in memory, where syncs cost nothing.
fn in_memory() -> Result<tempfile::TempDir, String> {
    let memory = std::path::Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    folder.map_err(|error| error.to_string())
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
