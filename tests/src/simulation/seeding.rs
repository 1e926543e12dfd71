//! A mirror's node over its disk, and the snapshots that mirrors begin with.
//!
//! Invariants:
//! - The judge sees a frame, or a snapshot, before it is queued at a mirror.
//! - A snapshot replaces what was held when it began to arrive, and nothing else.
//! - While a volume is open above the log, the log is replaced only by a process that begins anew.

use std::{
    io::Cursor,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use murphy_backup::Lineage;
use murphy_fs::{IndexSnapshot, SnapshotOrigin, Volume, verify_snapshot, write_snapshot};
use murphy_log::{
    Clock, Epoch, Frame, Log, LogTime, Lsn, MemoryLog, Position, State, VolumeKeys, append_copy,
};
use murphy_mirror::{
    Point, Replica, ReplicaError, SeedSnapshot, SeedWriter, SnapshotSource, check_append, check_promise,
};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    Canary,
    disk::{Base, Disk, NodeLog, Orders},
    node::Ground,
    stage::{NodeClock, Stage},
};

/// A mirror's node over its disk.
pub(super) struct NodeReplica {
    held: Arc<Held>,
    promised: Arc<Mutex<Option<Epoch>>>,
    pub(super) data: watch::Sender<Lsn>,
}

/// What is there, and may be replaced.
struct Held {
    stage: Arc<Stage>,
    host: usize,
    keys: VolumeKeys,
    lineage: Lineage,
    log: Mutex<Option<Arc<NodeLog>>>,
    orders: Arc<Mutex<Orders>>,
    /// A volume is open above the log.
    in_use: AtomicBool,
    /// The process has to begin anew.
    restart: AtomicBool,
    /// How many snapshots were begun; only the last one counts.
    seeds: AtomicU64,
}

impl Held {
    fn tail(&self) -> Option<Position> {
        self.log.lock().as_ref().map(|log| log.tail().position)
    }
}

impl NodeReplica {
    /// The node on `disk`.
    pub(super) fn new(ground: &Ground, host: usize, disk: &Disk) -> NodeReplica {
        let log = disk.log.as_ref().map(|log| NodeLog::new(&ground.stage, host, Arc::clone(log)));
        let held = Held {
            stage: Arc::clone(&ground.stage),
            host,
            keys: ground.keys.clone(),
            lineage: ground.lineage,
            log: Mutex::new(log),
            orders: Arc::clone(&disk.orders),
            in_use: AtomicBool::new(false),
            restart: AtomicBool::new(false),
            seeds: AtomicU64::new(0),
        };
        NodeReplica {
            held: Arc::new(held),
            promised: Arc::clone(&disk.promised),
            data: watch::Sender::new(Lsn::new(0)),
        }
    }

    /// The log, once there is one. From here on it stays in place while this process lives.
    pub(super) fn use_log(&self) -> Option<Arc<NodeLog>> {
        let log = self.held.log.lock().clone();
        self.held.in_use.store(log.is_some(), Ordering::Relaxed);
        log
    }

    /// Whether what is held is to be replaced by a process that begins anew.
    pub(super) fn is_to_begin_anew(&self) -> bool {
        self.held.restart.load(Ordering::Relaxed)
    }

    fn log(&self) -> Option<Arc<NodeLog>> {
        if self.is_to_begin_anew() { None } else { self.held.log.lock().clone() }
    }
}

impl Replica for NodeReplica {
    fn state(&self) -> Option<State> {
        self.log().map(|log| log.durable().state())
    }

    fn keys(&self) -> &VolumeKeys {
        &self.held.keys
    }

    fn append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError> {
        let promised = self.promised.lock();
        check_append(*promised, frame.epoch(), told)?;
        let log = self.log().ok_or_else(|| ReplicaError::Storage("no log".to_owned()))?;
        let place = format!("mirror {}", self.held.host);
        self.held.stage.judge(|judge, _| judge.copied(&place, &frame));
        Ok(append_copy(&*log, frame)?)
    }

    fn data(&self) -> watch::Receiver<Lsn> {
        self.data.subscribe()
    }

    fn history(&self) -> Option<Arc<dyn Log>> {
        self.log().map(|log| log as Arc<dyn Log>)
    }

    fn promised(&self) -> Option<Epoch> {
        *self.promised.lock()
    }

    fn promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError> {
        let mut promised = self.promised.lock();
        let held = self.log().map(|log| log.tail().position.epoch);
        check_promise(*promised, held, epoch)?;
        let Held { stage, host, .. } = &*self.held;
        if !stage.has(Canary::ForgottenPromise) {
            *promised = Some(epoch);
        }
        stage.note(format!("host {host}: promises epoch {}", epoch.number));
        if let Some(log) = self.log() {
            log.sync();
        }
        Ok(self.state())
    }

    fn begin_seed(&self, state: State) -> Result<Box<dyn SeedWriter>, ReplicaError> {
        if self.is_to_begin_anew() {
            return Err(ReplicaError::Storage("this node is about to begin anew".to_owned()));
        }
        let number = self.held.seeds.fetch_add(1, Ordering::Relaxed) + 1;
        let replaces = self.held.tail();
        Ok(Box::new(Seed { held: Arc::clone(&self.held), state, number, replaces, content: Vec::new() }))
    }

    fn set_aside(&self, ancestor: Point, tail: Position) -> Result<(), ReplicaError> {
        let Held { stage, host, orders, restart, .. } = &*self.held;
        stage.note(format!("host {host}: lsn {} to {} is set aside", ancestor.lsn.next(), tail.lsn));
        stage.count("tails that were set aside");
        orders.lock().back_to = Some(ancestor.lsn);
        restart.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// A snapshot that is arriving.
struct Seed {
    held: Arc<Held>,
    state: State,
    number: u64,
    /// Where the log ended, if there was one, when it was begun.
    replaces: Option<Position>,
    content: Vec<u8>,
}

impl SeedWriter for Seed {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ReplicaError> {
        let from = usize::try_from(offset).map_err(|error| ReplicaError::NoSpace(error.to_string()))?;
        let end = from + bytes.len();
        if self.content.len() < end {
            self.content.resize(end, 0);
        }
        self.content[from..end].copy_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>, bytes: u64) -> Result<State, ReplicaError> {
        let bad = |what: &dyn std::fmt::Display| ReplicaError::BadSnapshot(what.to_string());
        let Seed { held, state, number, replaces, content } = *self;
        if content.len() as u64 != bytes {
            return Err(bad(&format!("{} bytes where {bytes} belong", content.len())));
        }
        let header = verify_snapshot(Cursor::new(&content), &|_| {}).map_err(|error| bad(&error))?.header;
        if (header.volume, header.branch, header.state) != (held.lineage.volume, held.lineage.branch, state) {
            return Err(bad(&format!("it holds {}", header.state.position)));
        }
        let is_last = held.seeds.load(Ordering::Relaxed) == number && !held.restart.load(Ordering::Relaxed);
        if !is_last || held.tail() != replaces {
            return Err(ReplicaError::Storage("the snapshot was given up".to_owned()));
        }
        let Held { stage, host, .. } = &*held;
        stage.judge(|judge, _| {
            judge.mirrored(*host, state.position);
            judge.has_state(&format!("the seed of mirror {host}"), &state)
        });
        stage.count("mirrors seeded by a snapshot");
        stage.note(format!("host {host}: is seeded at lsn {}", state.position.lsn));
        let base = Base { state, snapshot: Bytes::from(content), as_of: LogTime::default() };
        let in_use = held.in_use.load(Ordering::Relaxed);
        held.orders.lock().ready = Some(base);
        if in_use {
            held.restart.store(true, Ordering::Relaxed);
            return Err(ReplicaError::Storage("the node begins anew with the snapshot".to_owned()));
        }
        let log = NodeLog::new(stage, *host, Arc::new(MemoryLog::held(state)));
        *held.log.lock() = Some(log);
        Ok(state)
    }
}

/// What new mirrors begin with: a snapshot of the tree of now.
pub(super) struct Snapshots {
    pub(super) volume: Volume,
    pub(super) log: Arc<NodeLog>,
    pub(super) keys: VolumeKeys,
    pub(super) lineage: Lineage,
    pub(super) clock: Arc<NodeClock>,
}

impl SnapshotSource for Snapshots {
    fn open(&self) -> Result<SeedSnapshot, ReplicaError> {
        let storage = |error: &dyn std::fmt::Display| ReplicaError::Storage(error.to_string());
        let view = self.volume.view_with_state();
        let state = view.state().ok_or_else(|| ReplicaError::Storage("there is no state".to_owned()))?;
        // Nothing leaves a node before it is durable there. Nobody can wait here: the disk is quick for once.
        self.log.sync();
        let durable = self.log.durable().current();
        if durable.state.position.lsn < state.position.lsn {
            return Err(storage(&format!("the log has ended below lsn {}", state.position.lsn)));
        }
        let origin = SnapshotOrigin { branch: self.lineage.branch, created: self.clock.wall() };
        let mut content = Vec::new();
        write_snapshot(&view, &self.keys, origin, &mut content, &|_| {}).map_err(|error| storage(&error))?;
        Ok(SeedSnapshot { state, reader: Box::new(Cursor::new(content)), hold: Box::new(()) })
    }
}
