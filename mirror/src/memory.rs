//! A mirror's node and snapshots in memory, for tests, simulations and measurements.
//!
//! Invariants:
//! - They keep the contracts of [`Replica`] and [`SnapshotSource`], with the life of the process as their medium.

use std::{io::Read, sync::Arc};

use bytes::Bytes;
use murphy_log::{Epoch, Frame, Log, Lsn, MemoryLog, Position, State, VolumeKeys, append_copy};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    history::Point,
    message::Message,
    replica::{Replica, ReplicaError, SeedSnapshot, SeedWriter, SnapshotSource, check_append, check_promise},
};

/// The node of a mirror, in memory.
#[derive(Debug)]
pub struct MemoryReplica {
    keys: VolumeKeys,
    shared: Arc<Mutex<Shared>>,
    data: watch::Sender<Lsn>,
}

#[derive(Debug)]
struct Shared {
    log: Option<Arc<MemoryLog>>,
    base: Option<State>,
    promised: Option<Epoch>,
    kept: Vec<KeptBranch>,
    durability: Durability,
    /// How many snapshots were begun; only the last one counts.
    seeds: u64,
}

impl Shared {
    fn tail(&self) -> Option<Position> {
        self.log.as_ref().map(|log| log.tail().position)
    }
}

/// When a log in memory makes things durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// At once.
    Immediate,
    /// When [`MemoryReplica::sync`] is called.
    Held,
}

/// A tail that was set aside.
#[derive(Clone, Debug)]
pub struct KeptBranch {
    /// Where it left the common history, if that is known.
    pub ancestor: Option<Point>,
    /// Its end.
    pub tail: Position,
    /// The log that holds it.
    pub log: Arc<MemoryLog>,
}

impl MemoryReplica {
    /// A node whose log begins after `base`; one that holds nothing without it.
    pub fn new(keys: VolumeKeys, base: Option<State>, durability: Durability) -> MemoryReplica {
        let log = base.map(|base| new_log(base, durability));
        let shared = Shared { log, base, promised: None, kept: Vec::new(), durability, seeds: 0 };
        MemoryReplica { keys, shared: Arc::new(Mutex::new(shared)), data: watch::Sender::new(Lsn::new(0)) }
    }

    /// The node's log, if it has one.
    pub fn log(&self) -> Option<Arc<MemoryLog>> {
        self.shared.lock().log.clone()
    }

    /// Makes what is queued durable.
    pub fn sync(&self) {
        if let Some(log) = self.log() {
            log.sync();
        }
    }

    /// Loses what is not durable, as a crash and a restart would.
    pub fn crash(&self) {
        let mut shared = self.shared.lock();
        shared.log = shared.log.take().map(|log| Arc::new(log.reopened()));
    }

    /// Says that every byte up to `lsn` is in the own store.
    pub fn set_data(&self, lsn: Lsn) {
        self.data.send_replace(lsn);
    }

    /// The tails that were set aside.
    pub fn kept(&self) -> Vec<KeptBranch> {
        self.shared.lock().kept.clone()
    }
}

impl Replica for MemoryReplica {
    fn state(&self) -> Option<State> {
        self.log().map(|log| log.durable().state())
    }

    fn keys(&self) -> &VolumeKeys {
        &self.keys
    }

    fn append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError> {
        let shared = self.shared.lock();
        check_append(shared.promised, frame.epoch(), told)?;
        let log = shared.log.as_ref().ok_or_else(|| ReplicaError::Storage("no log".to_owned()))?;
        Ok(append_copy(&**log, frame)?)
    }

    fn data(&self) -> watch::Receiver<Lsn> {
        self.data.subscribe()
    }

    fn history(&self) -> Option<Arc<dyn Log>> {
        self.log().map(|log| log as Arc<dyn Log>)
    }

    fn promised(&self) -> Option<Epoch> {
        self.shared.lock().promised
    }

    fn promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError> {
        let mut shared = self.shared.lock();
        let held = shared.log.as_ref().map(|log| log.tail().position.epoch);
        check_promise(shared.promised, held, epoch)?;
        shared.promised = Some(epoch);
        if let Some(log) = &shared.log {
            log.sync();
        }
        Ok(shared.log.as_ref().map(|log| log.durable().state()))
    }

    fn begin_seed(&self, _: State) -> Result<Box<dyn SeedWriter>, ReplicaError> {
        let mut shared = self.shared.lock();
        shared.seeds += 1;
        let (number, replaces) = (shared.seeds, shared.tail());
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(MemorySeed { shared, number, replaces, bytes: Vec::new(), written: 0 }))
    }

    fn set_aside(&self, ancestor: Point, tail: Position) -> Result<(), ReplicaError> {
        let mut shared = self.shared.lock();
        let shared = &mut *shared;
        let (Some(old), Some(base)) = (shared.log.clone(), shared.base) else { return Ok(()) };
        let log = new_log(base, Durability::Immediate);
        let frames = old.read(old.first()).map_err(|error| ReplicaError::Storage(error.to_string()))?;
        for frame in frames.map_while(Result::ok).take_while(|frame| frame.last() <= ancestor.lsn) {
            append_copy(&*log, frame)?;
        }
        shared.log = Some(log);
        shared.kept.push(KeptBranch { ancestor: Some(ancestor), tail, log: old });
        Ok(())
    }
}

struct MemorySeed {
    shared: Arc<Mutex<Shared>>,
    number: u64,
    /// Where the log ended, if there was one, when it was begun.
    replaces: Option<Position>,
    bytes: Vec<u8>,
    written: u64,
}

impl SeedWriter for MemorySeed {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ReplicaError> {
        let end = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(bytes.len()));
        let end = end.filter(|end| *end <= MAX_MEMORY_SEED);
        let end = end.ok_or_else(|| ReplicaError::NoSpace(format!("{MAX_MEMORY_SEED} bytes")))?;
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[end - bytes.len()..end].copy_from_slice(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn finish(self: Box<Self>, bytes: u64) -> Result<State, ReplicaError> {
        let bad = |what: &str| ReplicaError::BadSnapshot(what.to_owned());
        if self.written != bytes || self.bytes.len() as u64 != bytes {
            return Err(bad("bytes are missing"));
        }
        let (content, sum) = self.bytes.split_last_chunk::<32>().ok_or_else(|| bad("too short"))?;
        if blake3::hash(content).as_bytes() != sum {
            return Err(bad("damaged"));
        }
        let head = Bytes::copy_from_slice(content.get(..SEED_HEAD_BYTES).ok_or_else(|| bad("too short"))?);
        let Ok(Message::SeedOffer { state }) = Message::decode(&head) else { return Err(bad("no state")) };
        let mut shared = self.shared.lock();
        if (shared.seeds, shared.tail()) != (self.number, self.replaces) {
            return Err(ReplicaError::Storage("the snapshot was given up".to_owned()));
        }
        let log = new_log(state, shared.durability);
        if let Some(old) = shared.log.replace(log) {
            let tail = old.tail().position;
            shared.kept.push(KeptBranch { ancestor: None, tail, log: old });
        }
        shared.base = Some(state);
        Ok(state)
    }
}

/// Snapshots of a log in memory: a state and as many bytes as wanted.
#[derive(Debug)]
pub struct MemorySnapshots {
    /// The log whose durable state is offered.
    pub log: Arc<MemoryLog>,
    /// The length of the snapshot, about, in bytes.
    pub bytes: usize,
}

impl SnapshotSource for MemorySnapshots {
    fn open(&self) -> Result<SeedSnapshot, ReplicaError> {
        let state = self.log.durable().state();
        let mut content = Message::SeedOffer { state }.encode();
        content.extend((content.len()..self.bytes).map(|at| (at / 7) as u8));
        let sum = blake3::hash(&content);
        content.extend_from_slice(sum.as_bytes());
        let reader: Box<dyn Read + Send> = Box::new(std::io::Cursor::new(content));
        Ok(SeedSnapshot { state, reader, hold: Box::new(()) })
    }
}

fn new_log(base: State, durability: Durability) -> Arc<MemoryLog> {
    Arc::new(match durability {
        Durability::Immediate => MemoryLog::new(base),
        Durability::Held => MemoryLog::held(base),
    })
}

/// The length of an encoded seed offer.
const SEED_HEAD_BYTES: usize = 8 + 92;
const MAX_MEMORY_SEED: usize = 1 << 30;
