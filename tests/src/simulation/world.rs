//! A simulated world: its accounts, its hosts, and the clients that go from one to the other.
//!
//! Invariants:
//! - Disasters end after a while; then everything that is left catches up, or a stall is a violation.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::AtomicBool},
};

use bytes::Bytes;
use murphy_backup::{Archive, Lineage, Occupant};
use murphy_log::{
    BranchId, ChainHash, Digest, Epoch, EpochId, LogTime, Lsn, Position, State, Usage, VolumeId, VolumeKeys,
};
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Level,
    account::{Account, Weather},
    client::{Client, Place},
    disk::{Disk, NodeName},
    gate::{Gate, Life},
    giving_up::Refused,
    mirrors::Waiting,
    network::Network,
    node::{Ground, Process},
    stage::Stage,
};

/// Everything there is.
pub(super) struct World {
    pub(super) ground: Arc<Ground>,
    pub(super) hosts: Vec<Mutex<Host>>,
    /// What is between them, if there are several.
    pub(super) network: Option<Arc<Network>>,
    /// The archive that the volume does not begin with.
    pub(super) late: Option<Arc<Account>>,
    /// A promotion is under way.
    pub(super) promoting: Mutex<bool>,
    /// Who has begun to take over and has not sealed everybody.
    pub(super) candidate: Mutex<Option<usize>>,
    /// What stood in the way of promotions.
    pub(super) refused: Mutex<Refused>,
    /// Archives that were given up by name when somebody took over.
    pub(super) given_up: Mutex<BTreeSet<String>>,
    /// An archive was taken out, and another one is to take its place.
    pub(super) lacks_archive: AtomicBool,
    /// Whether bytes were lost with a source, as its level allows.
    pub(super) bytes_lost: AtomicBool,
    /// A restore took over without all bytes: nobody looks for those.
    pub(super) restore_lacks: AtomicBool,
    /// Where copiers keep how far they have come.
    pub(super) folder: tempfile::TempDir,
    /// Where file systems can be used.
    places: watch::Sender<Vec<Place>>,
}

/// A machine: a disk, and perhaps a process.
pub(super) struct Host {
    pub(super) disk: Disk,
    pub(super) process: Option<Process>,
    /// A mirror's process that is not open yet.
    pub(super) waiting: Option<Waiting>,
    /// A start is under way, or somebody is about to see to it.
    pub(super) starting: bool,
}

impl Host {
    /// The gate of the process that runs here, open or not.
    pub(super) fn gate(&self) -> Option<&Arc<Gate>> {
        let open = self.process.as_ref().map(|process| &process.gate);
        open.or(self.waiting.as_ref().map(|waiting| &waiting.begun.gate))
    }

    /// Whether it decides, as far as it knows.
    pub(super) fn leads(&self) -> Option<Epoch> {
        self.disk.leads.filter(|_| self.disk.fenced.is_none())
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
        let store = |host| Mutex::new(Account::new(stage, &format!("store-{host}"), Arc::clone(&none)));
        let archives =
            ["archive-a", "archive-b"].map(|name| Account::new(stage, name, witness(stage, name, &keys)));
        let late = stage.once_in(4).then(|| Arc::clone(&archives[1]));
        let ground = Arc::new(Ground {
            stage: Arc::clone(stage),
            level,
            wanted: if level == Level::Mirror && stage.is_kind(3) { 2 } else { 1 },
            origin,
            keys,
            lineage: Lineage { volume: VOLUME, branch: BRANCH },
            stores: (0..hosts).map(store).collect(),
            archives: archives.to_vec(),
            replacements: Mutex::default(),
            identities: Mutex::new(BTreeMap::new()),
            gone: Mutex::new(BTreeSet::new()),
        });
        let outside =
            |host| Disk::outside(NodeName { host: if host < hosts { host } else { 0 }, life: 0 }, "new");
        let host = |number| Host { disk: outside(number), process: None, waiting: None, starting: false };
        let world = World {
            ground,
            hosts: (0..machines).map(|number| Mutex::new(host(number))).collect(),
            network: (hosts > 1).then(|| Network::new(stage)),
            late,
            promoting: Mutex::default(),
            candidate: Mutex::default(),
            refused: Mutex::default(),
            given_up: Mutex::default(),
            lacks_archive: AtomicBool::new(false),
            bytes_lost: AtomicBool::new(false),
            restore_lacks: AtomicBool::new(false),
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
        for account in self.genesis_archives() {
            let store = self.ground.archive_store(&account, &gate);
            let base = self.ground.origin.position;
            let descriptor = self.ground.descriptor(&account, LogTime::from_nanos(1), base);
            Archive::create(store, descriptor).await.map_err(|error| error.to_string())?;
        }
        let disk = Disk::beginning_after(FIRST, None, self.ground.origin);
        self.hosts[0].lock().disk = Disk { leads: Some(epoch_of(1, FIRST)), ..disk };
        Ok(())
    }

    /// The archives that the volume begins with.
    pub(super) fn genesis_archives(&self) -> Vec<Arc<Account>> {
        self.ground.archives.iter().filter(|account| !self.is_late(account)).cloned().collect()
    }

    /// Whether `account` is the archive that is added later.
    pub(super) fn is_late(&self, account: &Arc<Account>) -> bool {
        self.late.as_ref().is_some_and(|late| Arc::ptr_eq(late, account))
    }

    /// The archives that whoever leads knows of.
    pub(super) fn known_archives(&self) -> Vec<Arc<Account>> {
        let volume = self.leader().and_then(|leader| {
            self.hosts[leader].lock().process.as_ref().map(|process| process.volume.clone())
        });
        volume.and_then(|volume| self.ground.archives_of(&volume).ok()).unwrap_or_default()
    }

    /// Whether something may happen to an archive: not if every fsync waits for it alone.
    pub(super) fn may_harm(&self, archive: &Arc<Account>) -> bool {
        let others = || self.known_archives().iter().any(|known| !Arc::ptr_eq(known, archive));
        self.ground.level != Level::Archive || others()
    }

    /// Whether a directory may be copied, and both copies run: where one archive is left that decides.
    pub(super) fn may_be_cloned(&self) -> bool {
        let is_first = self.hosts[0].lock().disk.base.is_none();
        self.ground.level == Level::Archive && self.known_archives().len() == 2 && is_first
    }

    /// Tells clients where file systems can be used.
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

    /// A client that goes from place to place until `stop`.
    pub(super) async fn employ(self: Arc<Self>, number: u64, mut stop: watch::Receiver<bool>) {
        let stage = Arc::clone(self.stage());
        let mut client = Client {
            stage,
            number,
            made: 0,
            files: Vec::new(),
            level: self.ground.level,
            wanted: self.ground.wanted,
        };
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
        let stores = (0..self.ground.stores.len()).map(|host| self.ground.store(host));
        for account in self.ground.every_archive().into_iter().chain(stores) {
            account.change_weather(|weather| *weather = Weather { gone: weather.gone, ..Weather::FAIR });
        }
        for host in 0..self.hosts.len() {
            let may_start = {
                let home = self.hosts[host].lock();
                if let Some(gate) = home.gate() {
                    gate.set(Life::Runs);
                }
                if let Some(process) = &home.process {
                    process.log.trouble(|trouble| *trouble = Default::default());
                }
                let has_part = home.disk.leads.is_some() || home.disk.follows.is_some();
                home.gate().is_none() && has_part && home.disk.fenced.is_none()
            };
            if may_start {
                self.restart_later(host);
            }
            if host > 0 && self.hosts[host].lock().disk.fenced.is_some() {
                self.rejoin_later(host);
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
}

/// Sees every object of an archive before anybody else does.
pub(super) fn witness(stage: &Arc<Stage>, name: &str, keys: &VolumeKeys) -> super::account::Witness {
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
    let position = Position { epoch: epoch_of(1, FIRST), lsn: Lsn::ROOT, hash: ChainHash::default() };
    State { position, digest: Digest::default(), usage: Usage::default() }
}

/// The epoch of this number that `node` begins.
pub(super) fn epoch_of(number: u32, node: NodeName) -> Epoch {
    let mut id = [node.host as u8 + 1; 16];
    id[..4].copy_from_slice(&number.to_le_bytes());
    id[4..8].copy_from_slice(&node.life.to_le_bytes());
    Epoch { number, id: EpochId::from_bytes(id) }
}

/// The node on which the volume is formatted.
const FIRST: NodeName = NodeName { host: 0, life: 0 };
pub(super) const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
pub(super) const BRANCH: BranchId = BranchId::from_bytes([2; 16]);
