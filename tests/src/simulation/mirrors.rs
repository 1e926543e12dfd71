//! A node among other nodes: it follows a source, or is followed; it copies packs, promises, and hears that it was replaced.
//!
//! Invariants:
//! - Listener, follower, copier and dialer are the product's, over simulated datagrams.
//! - The judge sees a frame before it is queued at a mirror.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use murphy_fs::{Acknowledger, MemberRole, MemberRow, MemberState};
use murphy_log::{Clock, DurableWatch, Epoch, Frame, Log, Lsn, NodeId, Position, State, VolumeKeys};
use murphy_mirror::{
    Copier, CopyError, CursorFile, Dialer, FollowHandle, FollowSetup, Following, Identity, Listener, Lookup,
    MemoryBook, MirrorAcknowledger, MirrorPart, NetworkOptions, Part, Point, Replica, ReplicaError,
    SeedSnapshot, SeedWriter, Services, SnapshotSource, SourcePart, compare, forbidding_promise, look_up,
};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Canary, Level,
    disk::{Disk, NodeLog, append_any},
    network::{Network, address_of},
    node::{Ground, Process},
    stage::Stage,
    world::BRANCH,
};

/// What a process is among other nodes.
pub(super) struct Among {
    pub(super) services: Arc<Services>,
    pub(super) dialer: Dialer,
    pub(super) followed: Option<Followed>,
    /// Ends the listener, and what follows.
    _stop: watch::Sender<bool>,
}

/// A mirror's part.
pub(super) struct Followed {
    pub(super) replica: Arc<NodeReplica>,
    pub(super) handle: FollowHandle,
    /// Ends following and copying.
    pub(super) stop: watch::Sender<bool>,
}

impl Ground {
    /// The part of `process` that speaks with other nodes; it listens from now on, and is neither source nor mirror yet.
    pub(super) fn among(
        &self,
        host: usize,
        process: &Process,
        network: &Arc<Network>,
    ) -> Result<Among, String> {
        let identity = Arc::clone(&self.identities[host]);
        let sockets = network.sockets(host, &process.gate);
        let options = NetworkOptions { idle_timeout: IDLE_TIMEOUT, ..NetworkOptions::default() };
        let dialer = Dialer { identity: Arc::clone(&identity), sockets: Arc::clone(&sockets), options };
        let clock = Arc::clone(&process.clock) as Arc<dyn Clock>;
        let book = Arc::new(self.book());
        let mut services = Services::new(self.keys.clone(), BRANCH, identity.node(), clock, book);
        services.packs = Some(self.layered(host, &process.gate));
        let services = Arc::new(services);
        let bound = Listener::bind(&identity, &*sockets, address_of(host), &options, Arc::clone(&services));
        let listener = bound.map_err(|error| error.to_string())?;
        let (stop, stopped) = watch::channel(false);
        process.tasks.run(listener.run(stopped));
        Ok(Among { services, dialer, followed: None, _stop: stop })
    }

    /// Every host is a member that may hold a copy.
    fn book(&self) -> MemoryBook {
        let book = MemoryBook::default();
        for (host, identity) in self.identities.iter().enumerate() {
            let row = MemberRow {
                role: MemberRole::Mirror,
                state: MemberState::Joined { public_key: *identity.public_key().as_bytes() },
                name: format!("host-{host}"),
                addresses: vec![address_of(host).to_string()],
            };
            book.put(identity.node(), row);
        }
        book
    }

    /// The nodes of all hosts but this one.
    pub(super) fn others(&self, host: usize) -> BTreeSet<NodeId> {
        let others = self.identities.iter().enumerate().filter(|(other, _)| *other != host);
        others.map(|(_, identity)| identity.node()).collect()
    }

    /// Whether another node leads a later epoch than `log`, as far as any of them answers.
    pub(super) async fn successor(&self, host: usize, among: &Among, log: &Arc<NodeLog>) -> Option<Epoch> {
        let log = Arc::clone(log) as Arc<dyn Log>;
        for other in (0..self.identities.len()).filter(|other| *other != host) {
            let key = self.identities[other].public_key();
            let addresses = [address_of(other).to_string()];
            let ask = compare(&among.dialer, &addresses, key, (&self.keys, BRANCH), &log);
            if let Ok(Ok(Some(found))) = tokio::time::timeout(ASK_MAX, ask).await {
                return Some(found.state.position.epoch);
            }
        }
        None
    }

    /// Offers what a source offers, and lets fsync wait for mirrors if that is the level.
    pub(super) fn offer(&self, host: usize, process: &Process, among: &Among, epoch: Epoch) {
        among.services.become_part(Part::Source(SourcePart {
            log: process.log.shipped(),
            epoch,
            snapshots: Arc::new(NoSnapshots),
            heartbeat: HEARTBEAT,
        }));
        let others = self.others(host);
        for node in &others {
            among.services.board.set_member(process.clock.monotonic(), *node, true);
        }
        if self.level == Level::Mirror {
            let acknowledger = MirrorAcknowledger::new(Arc::clone(&among.services.board), 1, others);
            process.volume.acknowledge_with(Arc::new(acknowledger) as Arc<dyn Acknowledger>);
        }
    }

    /// Begins to follow `source`, and to copy its packs.
    pub(super) fn follow(
        &self,
        host: usize,
        source: usize,
        process: &Process,
        among: &Among,
        disk: &Disk,
        folder: PathBuf,
    ) -> Result<Followed, String> {
        process.volume.follow().map_err(|error| error.to_string())?;
        let replica = Arc::new(NodeReplica {
            stage: Arc::clone(&self.stage),
            host,
            keys: self.keys.clone(),
            log: Arc::clone(&process.log),
            promised: Arc::clone(&disk.promised),
            data: watch::Sender::new(Lsn::new(0)),
            restart: watch::Sender::new(false),
        });
        let stage = Arc::clone(&self.stage);
        let setup = FollowSetup {
            addresses: vec![address_of(source).to_string()],
            source_key: self.identities[source].public_key(),
            branch: BRANCH,
            replica: Arc::clone(&replica) as Arc<dyn Replica>,
            dialer: among.dialer.clone(),
            clock: Arc::clone(&process.clock) as Arc<dyn Clock>,
            random: Arc::new(move || stage.below(u64::MAX)),
            silence: SILENCE,
        };
        let (following, handle) = Following::new(setup);
        let (stop, stopped) = watch::channel(false);
        let (stage, stopping) = (Arc::clone(&self.stage), stopped.clone());
        process.tasks.run(async move {
            if let Err(error) = following.run(stopping).await {
                stage.note(format!("host {host}: follows no more: {error}"));
            }
        });
        let copier = Copier {
            log: Arc::clone(&process.log) as Arc<dyn Log>,
            source: Arc::new(handle.packs.clone()),
            store: self.blocks(host, &process.gate),
            cursor: CursorFile::new(folder.join(format!("copied-{host}-{}", disk.life))),
            data: replica.data.clone(),
            clock: Arc::clone(&process.clock) as Arc<dyn Clock>,
            helpers: 3,
        };
        process.tasks.run(copy(Arc::clone(&self.stage), host, copier, stopped));
        among.services.become_part(Part::Mirror(MirrorPart {
            replica: Arc::clone(&replica) as Arc<dyn Replica>,
            heard: handle.heard.clone(),
        }));
        Ok(Followed { replica, handle, stop })
    }
}

async fn copy(stage: Arc<Stage>, host: usize, copier: Copier, stopped: watch::Receiver<bool>) {
    if let Err(error) = copier.run(stopped).await {
        // A log that has ended has said so elsewhere.
        let expected = matches!(error, CopyError::Log(_));
        stage.note(format!("host {host}: copies no more: {error}"));
        if !expected {
            stage.violated(&format!("stall: the copier of host {host} has ended: {error}"));
        }
    }
}

/// A mirror's node over its disk.
pub(super) struct NodeReplica {
    stage: Arc<Stage>,
    host: usize,
    keys: VolumeKeys,
    log: Arc<NodeLog>,
    promised: Arc<Mutex<Option<Epoch>>>,
    pub(super) data: watch::Sender<Lsn>,
    /// The node has to begin anew, from nothing.
    pub(super) restart: watch::Sender<bool>,
}

impl Replica for NodeReplica {
    fn state(&self) -> Option<State> {
        Some(self.log.durable().state())
    }

    fn keys(&self) -> &VolumeKeys {
        &self.keys
    }

    fn append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError> {
        let promised = self.promised.lock();
        if let Some(promised) = forbidding_promise(*promised, frame.epoch(), told) {
            return Err(ReplicaError::Promised { promised });
        }
        let place = format!("mirror {}", self.host);
        self.stage.judge(|judge, _| judge.copied(&place, &frame));
        append_any(&*self.log, &frame).map_err(|error| match error {
            murphy_log::AppendError::Ended(end) => ReplicaError::Ended(end.to_string()),
            murphy_log::AppendError::NoSpace { message } => ReplicaError::NoSpace(message),
            other => ReplicaError::Storage(other.to_string()),
        })
    }

    fn durable(&self) -> Option<DurableWatch> {
        Some(self.log.durable())
    }

    fn data(&self) -> watch::Receiver<Lsn> {
        self.data.subscribe()
    }

    fn history(&self) -> Option<Arc<dyn Log>> {
        Some(Arc::clone(&self.log) as Arc<dyn Log>)
    }

    fn look_up(&self, lsn: Lsn) -> Result<Lookup, ReplicaError> {
        look_up(&*self.log, lsn).map_err(|error| ReplicaError::Storage(error.to_string()))
    }

    fn promised(&self) -> Option<Epoch> {
        *self.promised.lock()
    }

    fn promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError> {
        let mut promised = self.promised.lock();
        if let Some(promised) = forbidding_promise(*promised, epoch, None) {
            return Err(ReplicaError::Promised { promised });
        }
        if !self.stage.has(Canary::ForgottenPromise) {
            *promised = Some(epoch);
        }
        self.stage.note(format!("host {}: promises epoch {}", self.host, epoch.number));
        self.log.sync();
        Ok(self.state())
    }

    fn begin_seed(&self, _: State) -> Result<Box<dyn SeedWriter>, ReplicaError> {
        Err(ReplicaError::Storage("no snapshot is taken here".to_owned()))
    }

    fn set_aside(&self, ancestor: Option<Point>, tail: Position) -> Result<(), ReplicaError> {
        let from = ancestor.map_or(0, |point| point.lsn.get());
        self.stage.note(format!("host {}: lsn {from} to {} is set aside", self.host, tail.lsn));
        self.restart.send_replace(true);
        Ok(())
    }
}

/// A source that never trims needs no snapshots.
struct NoSnapshots;

impl SnapshotSource for NoSnapshots {
    fn open(&self) -> Result<SeedSnapshot, ReplicaError> {
        Err(ReplicaError::Storage("there are no snapshots here".to_owned()))
    }
}

/// The identity of the node at home on `host`.
pub(super) fn identity_of(host: usize) -> Result<Identity, String> {
    Identity::of_seed([host as u8 + 1; 32]).map_err(|error| error.to_string())
}

const HEARTBEAT: Duration = Duration::from_millis(250);
const SILENCE: Duration = Duration::from_secs(2);
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
const ASK_MAX: Duration = Duration::from_secs(3);
