//! A node's process: a volume over the node's disk, the shippers of its archives, and what watches over them.
//!
//! Invariants:
//! - The process does what the program does, in the same order: fences first, then the claim, then it decides.
//! - When it ends, however it ends, its gate is closed: nothing of it reaches the world any more.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use murphy_backup::{Archive, ArchiveStore, Lineage, Objection, walk};
use murphy_fs::{
    BlockStore, BlockStores, CellCache, ObjectBlockStore, PackFetcher, Volume, VolumeOptions, VolumeParts,
};
use murphy_log::{Clock, Epoch, Log, LogTime, NodeId, State, VolumeKeys};
use murphy_mirror::Identity;
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::{runtime::Handle, task::AbortHandle};

use super::{
    Canary, Level,
    account::Account,
    disk::{Disk, ForgetfulIndex, NodeLog, NodeName, open_index},
    gate::{Gate, Life},
    gathering::Gathering,
    mirrors::Among,
    shipping::{ByArchives, Shipping, watch_shipping},
    stage::{NodeClock, Stage},
};

/// What every node of a world knows.
pub(super) struct Ground {
    pub(super) stage: Arc<Stage>,
    pub(super) level: Level,
    /// How many mirrors acknowledge, if they do.
    pub(super) wanted: usize,
    pub(super) origin: State,
    pub(super) keys: VolumeKeys,
    pub(super) lineage: Lineage,
    /// The accounts of the archives that the world began with: those that disasters befall.
    pub(super) archives: Vec<Arc<Account>>,
    /// Those of archives that were begun in the place of others.
    pub(super) replacements: Mutex<Vec<Arc<Account>>>,
    /// The account of each host's own store.
    pub(super) stores: Vec<Mutex<Arc<Account>>>,
    /// Who each node is that there ever was.
    pub(super) identities: Mutex<BTreeMap<NodeName, Arc<Identity>>>,
    /// The nodes whose directories are gone for ever, as everybody knows who looks after the volume.
    pub(super) gone: Mutex<BTreeSet<NodeId>>,
}

/// A process that runs.
pub(super) struct Process {
    pub(super) gate: Arc<Gate>,
    pub(super) volume: Volume,
    pub(super) log: Arc<NodeLog>,
    pub(super) clock: Arc<NodeClock>,
    pub(super) identity: Arc<Identity>,
    /// How it ships, if it is a source.
    pub(super) shipping: Option<Arc<Shipping>>,
    /// What it is among other nodes, if there are others.
    pub(super) among: Option<Among>,
    pub(super) tasks: Tasks,
}

/// Tasks that end with their owner.
#[derive(Default)]
pub(super) struct Tasks(Mutex<Vec<AbortHandle>>);

impl Tasks {
    pub(super) fn run(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let handle = tokio::spawn(task).abort_handle();
        self.0.lock().push(handle.clone());
        handle
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.lock().drain(..).for_each(|task| task.abort());
    }
}

/// What a process has from its first moment on.
pub(super) struct Begun {
    pub(super) gate: Arc<Gate>,
    pub(super) clock: Arc<NodeClock>,
    pub(super) tasks: Tasks,
}

impl Begun {
    pub(super) fn new(stage: &Stage) -> Begun {
        Begun { gate: Arc::new(Gate::new()), clock: Arc::new(NodeClock::new(stage)), tasks: Tasks::default() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.gate.set(Life::Dead);
    }
}

impl Ground {
    /// The identity in the directory of `node`.
    pub(super) fn identity(&self, node: NodeName) -> Result<Arc<Identity>, String> {
        let mut identities = self.identities.lock();
        if let Some(known) = identities.get(&node) {
            return Ok(Arc::clone(known));
        }
        let mut seed = [node.host as u8 + 1; 32];
        seed[..4].copy_from_slice(&node.life.to_le_bytes());
        let identity = Arc::new(Identity::of_seed(seed).map_err(|error| error.to_string())?);
        identities.insert(node, Arc::clone(&identity));
        Ok(identity)
    }

    /// Opens the node on `disk`, whose log is `log`: its tree. Nothing is decided yet.
    pub(super) fn open(
        &self,
        host: usize,
        disk: &mut Disk,
        log: Arc<NodeLog>,
        begun: Begun,
    ) -> Result<Process, String> {
        let Begun { gate, clock, tasks } = begun;
        let state = open_index(disk, self.origin)?;
        let blocks = self.blocks(host, &gate);
        let parts = VolumeParts {
            log: Arc::clone(&log) as Arc<dyn Log>,
            index: if self.stage.has(Canary::ForgetfulIndex) && host > 0 {
                Arc::new(ForgetfulIndex(Arc::clone(&disk.index)))
            } else {
                Arc::clone(&disk.index) as Arc<dyn murphy_fs::Index>
            },
            state,
            last_time: last_time(&*log, &state).unwrap_or_else(|| {
                let before = disk.base.as_ref().map(|base| base.as_of);
                clock.wall().max(before.unwrap_or_default())
            }),
            keys: self.keys.clone(),
            clock: Arc::clone(&clock) as Arc<dyn Clock>,
            blocks,
            fetcher: PackFetcher::new(vec![self.layered(host, &gate)], CellCache::new(1 << 20), None),
            runtime: Handle::current(),
            options: OPTIONS,
        };
        let volume = Volume::open(parts).map_err(|error| error.to_string())?;
        tasks.run(Arc::clone(&log).sync_on(Arc::clone(&gate)));
        let identity = self.identity(disk.node)?;
        Ok(Process { gate, volume, log, clock, identity, shipping: None, among: None, tasks })
    }

    /// The account of the store that `host` has now.
    pub(super) fn store(&self, host: usize) -> Arc<Account> {
        // A machine without a store of its own runs a copy of host 0.
        let own = self.stores.get(host).or(self.stores.first());
        Arc::clone(&own.expect("there is a host").lock())
    }

    /// The archives of the volume, as its log names them.
    pub(super) fn archives_of(&self, volume: &Volume) -> Result<Vec<Arc<Account>>, String> {
        let text = volume.setting(ARCHIVES).map_err(|error| error.to_string())?.unwrap_or_default();
        Ok(self.named(&text))
    }

    /// Those that the setting with this text names.
    pub(super) fn named(&self, text: &str) -> Vec<Arc<Account>> {
        let mut named = self.every_archive();
        named.retain(|account| text.split(',').any(|name| name == account.name));
        named
    }

    /// Every archive that there ever was.
    pub(super) fn every_archive(&self) -> Vec<Arc<Account>> {
        self.archives.iter().cloned().chain(self.replacements.lock().iter().cloned()).collect()
    }

    /// The packs of `host`'s own store.
    pub(super) fn blocks(&self, host: usize, gate: &Arc<Gate>) -> Arc<dyn BlockStore> {
        let account = self.store(host);
        Arc::new(ObjectBlockStore::new(account.through(gate), Path::from("blocks"), account.name.clone()))
    }

    /// The same, and behind it the packs of the archives that are not gone for ever.
    pub(super) fn layered(&self, host: usize, gate: &Arc<Gate>) -> Arc<dyn BlockStore> {
        self.layered_without(host, gate, &BTreeSet::new())
    }

    /// The same, without the archives of these names, too.
    pub(super) fn layered_without(
        &self,
        host: usize,
        gate: &Arc<Gate>,
        given_up: &BTreeSet<String>,
    ) -> Arc<dyn BlockStore> {
        let is_left = |account: &Arc<Account>| !account.is_gone() && !given_up.contains(&account.name);
        let others = self.every_archive().into_iter().filter(is_left).map(|account| {
            let store =
                ObjectBlockStore::new(account.through(gate), Path::from("archive"), account.name.clone());
            Arc::new(store) as Arc<dyn BlockStore>
        });
        Arc::new(BlockStores::new(self.blocks(host, gate), others.collect()))
    }

    /// Refuses to go on as the source if an archive says that another one does, or holds what this node has lost.
    pub(super) async fn check_fences(&self, process: &Process, disk: &Disk) -> Result<(), String> {
        let own = disk.leads.ok_or("this node is no source")?;
        let tail = process.log.durable().state().position;
        let known = disk.cursors.lock().clone();
        let archives = self.archives_of(&process.volume)?;
        let asked = archives.iter().map(|account| {
            let known = known.get(&account.name).copied();
            async move {
                let look = async {
                    let archive = self.archive(account, &process.gate).await?;
                    walk(&archive, known).await.map_err(|error| error.to_string())
                };
                tokio::time::timeout(ANSWER_MAX, look).await.unwrap_or_else(|_| Err("no answer".to_owned()))
            }
        });
        for (walked, account) in futures::future::join_all(asked).await.into_iter().zip(&archives) {
            let Ok(walked) = walked else { continue };
            match walked.objection(own, tail.lsn) {
                None => {}
                Some(Objection::Replaced) => {
                    return Err(format!("{} is in epoch {}", account.name, walked.end.epoch.number));
                }
                Some(Objection::Lost { held }) => {
                    return Err(format!("{} holds lsn {held}, this node ends at {}", account.name, tail.lsn));
                }
            }
        }
        Ok(())
    }

    pub(super) async fn archive(&self, account: &Arc<Account>, gate: &Arc<Gate>) -> Result<Archive, String> {
        let opened = Archive::open_for(self.archive_store(account, gate), self.lineage).await;
        opened.map_err(|error| error.to_string())
    }

    pub(super) fn archive_store(&self, account: &Arc<Account>, gate: &Arc<Gate>) -> ArchiveStore {
        ArchiveStore::new(account.through(gate), Path::from("archive"), &account.name)
    }

    /// Begins to decide in `epoch`, and to ship. `genesis` names the archives of a volume that begins.
    pub(super) fn lead(
        self: &Arc<Self>,
        host: usize,
        process: &mut Process,
        disk: &Disk,
        epoch: Epoch,
        genesis: Option<&str>,
    ) -> Result<(), String> {
        let settings = genesis.map(|archives| [(ARCHIVES.to_owned(), archives.to_owned())]);
        let settings = settings.as_ref().map(|settings| &settings[..]);
        process.volume.lead(epoch, settings).map_err(|error| error.to_string())?;
        let shipping = Shipping::new(self, host, process, disk, epoch);
        for account in self.archives_of(&process.volume)? {
            shipping.begin(&account, &process.tasks);
        }
        process.tasks.run(watch_shipping(Arc::clone(&shipping)));
        if let Some(among) = &process.among {
            self.offer(process, among, disk, epoch);
            let gathering = Gathering::of(self, host, process, among.dialer.clone(), &disk.lost);
            process.tasks.run(gathering.run());
        }
        if self.level == Level::Archive {
            process.volume.acknowledge_with(Arc::new(ByArchives(Arc::downgrade(&shipping))));
        }
        process.shipping = Some(shipping);
        Ok(())
    }
}

impl Process {
    /// Whether an archive has turned it away, because another copy of the node ships there.
    pub(super) fn is_forked(&self) -> bool {
        self.shipping.as_ref().is_some_and(|shipping| shipping.is_forked())
    }

    /// Who has taken over, or what else ends this process.
    pub(super) fn ended(&self) -> Option<Ending> {
        let fenced = self.shipping.as_ref().and_then(|shipping| shipping.fenced());
        let ended = self.volume.ended().map(Ending::Broken);
        let poisoned = self.log.durable().current().terminal.map(|end| Ending::Broken(end.to_string()));
        let replaced = self.among.as_ref().and_then(|among| among.services.board.fenced_by());
        let replaced = replaced.map(|epoch| format!("fenced by a mirror: epoch {}", epoch.number));
        let followed = self.among.as_ref().and_then(|among| among.followed.as_ref());
        let anew = followed.is_some_and(|followed| followed.replica.is_to_begin_anew());
        if followed.is_some_and(|followed| followed.handle.status.borrow().revoked) {
            return Some(Ending::Removed);
        }
        let fenced = fenced.or(replaced).map(Ending::Fenced);
        fenced.or(anew.then_some(Ending::Anew)).or(ended).or(poisoned)
    }
}

/// Why a process ends by itself.
pub(super) enum Ending {
    /// It will never decide again.
    Fenced(String),
    /// It is started again.
    Broken(String),
    /// What a mirror holds is to be replaced.
    Anew,
    /// It is no member any more.
    Removed,
}

/// When the last entry of a log was decided; `None` if the log has none.
fn last_time(log: &dyn Log, state: &State) -> Option<LogTime> {
    let frame = log.read(state.position.lsn).ok()?.next()?.ok()?;
    let entry = frame.iter().last()?.ok()?;
    Some(entry.time)
}

/// The setting that names the archives, as the program has one.
pub(super) const ARCHIVES: &str = "archives";

/// Small generations, so that the index is written often; a flush soon, so that there is something to interrupt.
const OPTIONS: VolumeOptions = VolumeOptions {
    flush_after: Duration::from_millis(800),
    io_timeout: Duration::from_secs(60),
    put_timeout: Duration::from_secs(60),
    sync: false,
    dirty_bytes: 4 << 20,
    cached_rows: 4096,
    generation_bytes: 12 << 10,
};
const ANSWER_MAX: Duration = Duration::from_secs(10);
