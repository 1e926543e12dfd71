//! Histories to test with, and the suites that need both ends of the protocol.

use std::time::Duration;

use bytes::Bytes;
use murphy_log::{
    Appender, BranchId, Change, Digest, Entry, Epoch, EpochId, Frame, Log, LogTime, Lsn, MemoryLog, Position,
    State, Usage, VolumeId, VolumeKeys,
};

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
