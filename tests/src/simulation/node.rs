//! A node's process: a volume over the node's disk, the shippers of its archives, and what watches over them.
//!
//! Invariants:
//! - The process does what the program does, in the same order: fences first, then the claim, then it decides.
//! - When it ends, however it ends, its gate is closed: nothing of it reaches the world any more.

use std::{sync::Arc, time::Duration};

use murphy_backup::{
    Archive, ArchiveAcknowledger, ArchiveStore, KnownLosses, Lineage, ShipEnd, ShipHandle, ShipLimits,
    Shipper, ShipperParts, walk,
};
use murphy_fs::{
    AcknowledgeError, Acknowledgement, Acknowledger, BlockStore, CellCache, ObjectBlockStore, PackFetcher,
    Volume, VolumeOptions, VolumeParts,
};
use murphy_log::{Clock, Epoch, Log, LogTime, Lsn, State, VolumeKeys};
use murphy_mirror::Identity;
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::{runtime::Handle, task::AbortHandle};

use super::{
    Canary, Level,
    account::Account,
    disk::{Disk, DiskCursor, ForgetfulIndex, NodeLog, open_index},
    gate::{Gate, Life},
    layered::Layered,
    mirrors::Among,
    stage::{NodeClock, Stage},
};

/// What every node of a world knows.
pub(super) struct Ground {
    pub(super) stage: Arc<Stage>,
    pub(super) level: Level,
    pub(super) origin: State,
    pub(super) keys: VolumeKeys,
    pub(super) lineage: Lineage,
    /// The accounts of the archives.
    pub(super) archives: Vec<Arc<Account>>,
    /// The account of each host's own store.
    pub(super) stores: Vec<Arc<Account>>,
    /// Who each host is.
    pub(super) identities: Vec<Arc<Identity>>,
}

/// A process that runs.
pub(super) struct Process {
    pub(super) gate: Arc<Gate>,
    pub(super) volume: Volume,
    pub(super) log: Arc<NodeLog>,
    pub(super) clock: Arc<NodeClock>,
    pub(super) shipped: Vec<Arc<Shipped>>,
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

/// An archive that a source ships to.
pub(super) struct Shipped {
    pub(super) account: Arc<Account>,
    pub(super) handle: Mutex<Option<ShipHandle>>,
    /// Why it cannot be opened, if so.
    pub(super) error: Mutex<Option<String>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.gate.set(Life::Dead);
    }
}

impl Ground {
    /// Opens the node on `disk`: its log and its tree. Nothing is decided yet.
    pub(super) fn open(&self, host: usize, disk: &mut Disk) -> Result<Process, String> {
        let gate = Arc::new(Gate::new());
        let state = open_index(disk, self.origin)?;
        let log = NodeLog::new(&self.stage, host, Arc::clone(&disk.log));
        let clock = Arc::new(NodeClock::new(&self.stage));
        let blocks = self.blocks(host, &gate);
        let parts = VolumeParts {
            log: Arc::clone(&log) as Arc<dyn Log>,
            index: if self.stage.has(Canary::ForgetfulIndex) && host > 0 {
                Arc::new(ForgetfulIndex(Arc::clone(&disk.index)))
            } else {
                Arc::clone(&disk.index) as Arc<dyn murphy_fs::Index>
            },
            state,
            last_time: last_time(&*log, &state),
            keys: self.keys.clone(),
            clock: Arc::clone(&clock) as Arc<dyn Clock>,
            blocks,
            fetcher: PackFetcher::new(vec![self.layered(host, &gate)], CellCache::new(1 << 20), None),
            runtime: Handle::current(),
            options: OPTIONS,
        };
        let volume = Volume::open(parts).map_err(|error| error.to_string())?;
        let tasks = Tasks::default();
        tasks.run(Arc::clone(&log).sync_on(Arc::clone(&gate)));
        Ok(Process { gate, volume, log, clock, shipped: Vec::new(), among: None, tasks })
    }

    /// The packs of `host`'s own store.
    pub(super) fn blocks(&self, host: usize, gate: &Arc<Gate>) -> Arc<dyn BlockStore> {
        let account = &self.stores[host];
        Arc::new(ObjectBlockStore::new(account.through(gate), Path::from("blocks"), account.name.clone()))
    }

    /// The same, and behind it the packs of the archives.
    pub(super) fn layered(&self, host: usize, gate: &Arc<Gate>) -> Arc<dyn BlockStore> {
        let others = self.archives.iter().map(|account| {
            let store =
                ObjectBlockStore::new(account.through(gate), Path::from("archive"), account.name.clone());
            Arc::new(store) as Arc<dyn BlockStore>
        });
        Arc::new(Layered { own: self.blocks(host, gate), others: others.collect() })
    }

    /// Refuses to go on as the source if an archive says that another one does, or holds what this node has lost.
    pub(super) async fn check_fences(&self, process: &Process, disk: &Disk) -> Result<(), String> {
        let own = disk.leads.ok_or("this node is no source")?;
        let tail = process.log.durable().state().position;
        let known = disk.cursors.lock().clone();
        let asked = self.archives.iter().map(|account| {
            let known = known.get(&account.name).copied();
            async move {
                let look = async {
                    let archive = self.archive(account, &process.gate).await?;
                    walk(&archive, known).await.map_err(|error| error.to_string())
                };
                tokio::time::timeout(ANSWER_MAX, look).await.unwrap_or_else(|_| Err("no answer".to_owned()))
            }
        });
        for (walked, account) in futures::future::join_all(asked).await.into_iter().zip(&self.archives) {
            let Ok(walked) = walked else { continue };
            let end = walked.end;
            if end.epoch.number > own.number || (end.epoch.number == own.number && end.epoch != own) {
                return Err(format!("{} is in epoch {}", account.name, end.epoch.number));
            }
            if end.position.lsn > tail.lsn {
                return Err(format!(
                    "{} holds lsn {}, this node ends at {}",
                    account.name, end.position.lsn, tail.lsn
                ));
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

    /// Begins to decide in `epoch`, and to ship.
    pub(super) fn lead(
        self: &Arc<Self>,
        host: usize,
        process: &mut Process,
        disk: &Disk,
        epoch: Epoch,
        genesis: bool,
    ) -> Result<(), String> {
        let settings: &[(String, String)] = &[];
        process.volume.lead(epoch, genesis.then_some(settings)).map_err(|error| error.to_string())?;
        for account in &self.archives {
            let shipped = Arc::new(Shipped {
                account: Arc::clone(account),
                handle: Mutex::default(),
                error: Mutex::default(),
            });
            process.shipped.push(Arc::clone(&shipped));
            let ship = Ship {
                ground: Arc::clone(self),
                host,
                gate: Arc::clone(&process.gate),
                log: process.log.shipped(),
                clock: Arc::clone(&process.clock),
                epoch,
                cursors: Arc::clone(&disk.cursors),
                lost: KnownLosses::new(process.volume.clone(), disk.lost),
                shipped,
            };
            let task = process.tasks.run(ship.run());
            if self.stage.has(Canary::SilentShipper) {
                process.tasks.run(async move {
                    tokio::time::sleep(Duration::from_secs(4)).await;
                    task.abort();
                });
            }
        }
        let shipped = process.shipped.clone();
        process.tasks.run(watch_shipping(Arc::clone(&self.stage), Arc::clone(&process.log), shipped));
        if let Some(among) = &process.among {
            self.offer(host, process, among, epoch);
        }
        if self.level == Level::Archive {
            let shipped = process.shipped.clone();
            process.volume.acknowledge_with(Arc::new(ByArchives { shipped }));
        }
        Ok(())
    }
}

impl Process {
    /// Whether an archive has turned it away, because another copy of the node ships there.
    pub(super) fn is_forked(&self) -> bool {
        self.shipped.iter().any(|shipped| {
            let end = shipped.handle.lock().as_ref().and_then(|handle| handle.status().end);
            matches!(end, Some(ShipEnd::Forked { .. } | ShipEnd::Ahead { .. }))
        })
    }

    /// Who has taken over, or what else ends this process.
    pub(super) fn ended(&self) -> Option<Ending> {
        let fenced =
            self.shipped.iter().find_map(|shipped| match shipped.handle.lock().as_ref()?.status().end {
                Some(ShipEnd::Fenced(sealed)) => Some(format!("fenced: epoch {}", sealed.next.number)),
                _ => None,
            });
        let ended = self.volume.ended().map(Ending::Broken);
        let poisoned = self.log.durable().current().terminal.map(|end| Ending::Broken(end.to_string()));
        let replaced = self.among.as_ref().and_then(|among| among.services.board.fenced_by());
        let replaced = replaced.map(|epoch| format!("fenced by a mirror: epoch {}", epoch.number));
        let followed = self.among.as_ref().and_then(|among| among.followed.as_ref());
        let anew = followed.is_some_and(|followed| *followed.replica.restart.borrow());
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
    /// A mirror begins again with an empty directory.
    Anew,
}

/// The life of one shipper.
struct Ship {
    ground: Arc<Ground>,
    host: usize,
    gate: Arc<Gate>,
    log: Arc<dyn Log>,
    clock: Arc<NodeClock>,
    epoch: Epoch,
    cursors: Arc<Mutex<std::collections::HashMap<String, murphy_backup::Boundary>>>,
    lost: KnownLosses,
    shipped: Arc<Shipped>,
}

impl Ship {
    async fn run(self) {
        let account = &self.shipped.account;
        let archive = loop {
            match self.ground.archive(account, &self.gate).await {
                Ok(archive) => break archive,
                Err(error) => *self.shipped.error.lock() = Some(error),
            }
            tokio::time::sleep(OPEN_AGAIN).await;
        };
        *self.shipped.error.lock() = None;
        let known = self.cursors.lock().get(&account.name).copied();
        let parts = ShipperParts {
            archive,
            log: self.log,
            packs: self.ground.layered(self.host, &self.gate),
            node: self.ground.identities[self.host].node(),
            epoch: self.epoch,
            known,
            cursor: Arc::new(DiskCursor { cursors: self.cursors, archive: account.name.clone() }),
            clock: self.clock,
            lost: Some(Arc::new(self.lost)),
            limits: ShipLimits::default(),
        };
        let (shipper, handle) = Shipper::new(parts);
        *self.shipped.handle.lock() = Some(handle);
        let end = shipper.run().await;
        self.ground.stage.note(format!("host {}: shipping to {} has ended: {end}", self.host, account.name));
    }
}

/// An archive that does not go on has to say so.
async fn watch_shipping(stage: Arc<Stage>, log: Arc<NodeLog>, shipped: Vec<Arc<Shipped>>) {
    let mut marks: Vec<(Duration, Lsn)> = Vec::new();
    // How often in a row each archive was behind, stood still and said nothing.
    let mut silent: Vec<(Lsn, u32)> = vec![(Lsn::default(), 0); shipped.len()];
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = stage.now();
        marks.push((now, log.durable().state().position.lsn));
        let old = marks.partition_point(|(at, _)| now.saturating_sub(*at) > UNREPORTED_MAX);
        let Some((_, goal)) = old.checked_sub(1).map(|last| marks[last]) else { continue };
        marks.drain(..old - 1);
        for (one, (last, looks)) in shipped.iter().zip(&mut silent) {
            let Some(handle) = one.handle.lock().clone() else { continue };
            let status = handle.status();
            let held = status.archived.map_or(Lsn::default(), |held| held.position.lsn);
            // Until the archive has been walked the status says that nothing is known of it.
            let is_unknown = status.archived.is_none();
            let says = is_unknown || status.error.is_some() || status.end.is_some() || status.lag_ms > 0;
            let stands = held < goal && held == *last && !says && one.error.lock().is_none();
            (*last, *looks) = (held, if stands { *looks + 1 } else { 0 });
            if *looks > SILENT_LOOKS_MAX {
                stage.violated(&format!(
                    "silent stall: {} holds lsn {held}, lsn {goal} has been durable for {UNREPORTED_MAX:?}, \
                     and its status says nothing of it",
                    one.account.name
                ));
            }
        }
    }
}

/// `--ack archive`.
struct ByArchives {
    shipped: Vec<Arc<Shipped>>,
}

impl Acknowledger for ByArchives {
    fn acknowledged(&self, lsn: Lsn, deadline: Duration) -> Acknowledgement<'_> {
        Box::pin(async move {
            let mut waited = Duration::ZERO;
            loop {
                let handles: Vec<_> =
                    self.shipped.iter().filter_map(|one| one.handle.lock().clone()).collect();
                if !handles.is_empty() {
                    let left = deadline.saturating_sub(waited);
                    return ArchiveAcknowledger::new(handles).acknowledged(lsn, left).await;
                }
                if waited >= deadline {
                    let missing = "no archive answers".to_owned();
                    return Err(AcknowledgeError::TooFew { lsn, held: 0, wanted: 1, missing });
                }
                tokio::time::sleep(OPEN_AGAIN).await;
                waited += OPEN_AGAIN;
            }
        })
    }
}

/// When the last entry of a log was decided.
fn last_time(log: &dyn Log, state: &State) -> LogTime {
    let frame = log.read(state.position.lsn).ok().and_then(|mut frames| frames.next()?.ok());
    let entry = frame.and_then(|frame| frame.iter().last()?.ok());
    entry.map_or(LogTime::default(), |entry| entry.time)
}

/// Small generations, so that the index is written often; a flush soon, so that there is something to interrupt.
const OPTIONS: VolumeOptions = VolumeOptions {
    flush_after: Duration::from_millis(800),
    io_timeout: Duration::from_secs(60),
    sync: false,
    dirty_bytes: 4 << 20,
    cached_rows: 4096,
    generation_bytes: 12 << 10,
};
const ANSWER_MAX: Duration = Duration::from_secs(10);
const OPEN_AGAIN: Duration = Duration::from_millis(500);
/// What says nothing at so many looks in a row says nothing.
const SILENT_LOOKS_MAX: u32 = 3;
/// What is behind for longer says so.
const UNREPORTED_MAX: Duration = Duration::from_secs(5);
