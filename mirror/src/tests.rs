//! Histories to test with, and the suites that need both ends of the protocol.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_log::{
    Appender, BranchId, Change, Digest, Entry, Epoch, EpochId, Frame, Log, LogTime, Lsn, MemoryLog, Position,
    State, Usage, VolumeId, VolumeKeys,
};
use tokio::sync::watch;

use crate::{MemoryReplica, Point, Replica, ReplicaError, SeedWriter};

mod answers;
mod lend;
mod members;
mod packs;
mod peers;
mod quic;
mod requests;
mod sealed;
mod simulation;
mod stuck;
mod world;

pub(crate) const VOLUME: VolumeId = VolumeId::from_bytes([0xaa; 16]);
pub(crate) const BRANCH: BranchId = BranchId::from_bytes([0xbb; 16]);

pub(crate) fn keys() -> VolumeKeys {
    VolumeKeys::derive(VOLUME)
}

pub(crate) fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
}

/// The state that every test's history begins with.
pub(crate) fn base_state() -> State {
    let position = Position { epoch: epoch(1), lsn: Lsn::ROOT, hash: murphy_log::ChainHash::default() };
    State { position, digest: Digest(7), usage: Usage { inodes: 1, bytes: 0 } }
}

/// An entry that depends on `seed`, so that other seeds make other histories.
pub(crate) fn entry(lsn: Lsn, seed: u64) -> Entry {
    let mut entry = Entry::tick(lsn, LogTime::from_nanos(1_000_000_000 + lsn.get()));
    entry.kind = 9;
    entry.names = vec![Bytes::from(format!("name-{seed}-{lsn}"))];
    let value = Bytes::from(format!("value {seed} of {lsn}"));
    entry.changes =
        vec![Change { table: 1, key: Bytes::copy_from_slice(&lsn.get().to_be_bytes()), value: Some(value) }];
    entry
}

/// `count` frames of `size` entries each that continue `from` in its epoch.
pub(crate) fn test_frames(from: State, seed: u64, count: usize, size: usize) -> Vec<Frame> {
    frames_in(from.position.epoch, from, seed, count, size)
}

/// The same in another epoch.
pub(crate) fn frames_in(epoch: Epoch, from: State, seed: u64, count: usize, size: usize) -> Vec<Frame> {
    let mut appender = Appender::new(keys(), epoch, from);
    let mut frames = Vec::new();
    for _ in 0..count {
        for _ in 0..size {
            let entry = entry(appender.state().position.lsn.next(), seed);
            let digest = Digest(u128::from(entry.lsn.get()) * 31);
            appender.push(&entry, digest, Usage { inodes: entry.lsn.get(), bytes: 0 }).unwrap();
        }
        frames.push(appender.close(LogTime::from_nanos(5), from.position.lsn).unwrap());
    }
    frames
}

/// A log with these frames, all durable.
pub(crate) fn log_of(base: State, frames: &[Frame]) -> MemoryLog {
    let log = MemoryLog::new(base);
    extend(&log, frames);
    log
}

pub(crate) fn extend(log: &MemoryLog, frames: &[Frame]) {
    for frame in frames {
        // Claiming syncs, which a held log must not do on its own.
        if log.append(&log.tail().position, frame.clone()).is_err() {
            log.claim(frame.epoch()).unwrap();
            log.append(&log.tail().position, frame.clone()).unwrap();
        }
    }
}

pub(crate) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A mirror's node that does what the one below does, but for what a test changes.
pub(crate) trait ReplicaLayer: Send + Sync {
    fn below(&self) -> &MemoryReplica;

    /// Called for [`Replica::append`].
    fn on_append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError> {
        self.below().append(frame, told)
    }

    /// Called for [`Replica::promised`].
    fn on_promised(&self) -> Option<Epoch> {
        self.below().promised()
    }

    /// Called for [`Replica::promise`].
    fn on_promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError> {
        self.below().promise(epoch)
    }

    /// Called for [`Replica::set_aside`].
    fn on_set_aside(&self, ancestor: Point, tail: Position) -> Result<(), ReplicaError> {
        self.below().set_aside(ancestor, tail)
    }
}

impl<L: ReplicaLayer> Replica for L {
    fn state(&self) -> Option<State> {
        self.below().state()
    }

    fn keys(&self) -> &VolumeKeys {
        self.below().keys()
    }

    fn append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError> {
        self.on_append(frame, told)
    }

    fn data(&self) -> watch::Receiver<Lsn> {
        self.below().data()
    }

    fn history(&self) -> Option<Arc<dyn Log>> {
        self.below().history()
    }

    fn promised(&self) -> Option<Epoch> {
        self.on_promised()
    }

    fn promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError> {
        self.on_promise(epoch)
    }

    fn begin_seed(&self, state: State) -> Result<Box<dyn SeedWriter>, ReplicaError> {
        self.below().begin_seed(state)
    }

    fn set_aside(&self, ancestor: Point, tail: Position) -> Result<(), ReplicaError> {
        self.on_set_aside(ancestor, tail)
    }
}

/// Waits until `ready` says so; false if it does not within [`PATIENCE`].
pub(crate) async fn comes(mut ready: impl FnMut() -> bool) -> bool {
    let waiting = async {
        while !ready() {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.is_ok()
}

/// The same, where nothing else is to be told if it does not.
pub(crate) async fn until(what: &str, ready: impl FnMut() -> bool) {
    assert!(comes(ready).await, "waited {PATIENCE:?} for {what}");
}

/// Looks again and again for as long as `span`: what must not happen does not happen meanwhile.
pub(crate) async fn stays(what: &str, span: Duration, mut holds: impl FnMut() -> bool) {
    let looking = async {
        while holds() {
            tokio::time::sleep(POLL).await;
        }
    };
    assert!(tokio::time::timeout(span, looking).await.is_err(), "no longer: {what}");
}

/// How long anything that happens within moments may take on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = ms(1);
