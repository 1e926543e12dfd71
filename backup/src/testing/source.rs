//! A source without a file system: entries that write rows, framed and appended to a log in memory.

use std::sync::Arc;

use bytes::Bytes;
use murphy_fs::{Index, IndexSnapshot, MemoryIndex, PackRow, RowKey, Table};
use murphy_log::{
    Appender, BranchId, Change, Digest, Entry, Epoch, EpochId, Frame, Log, LogTime, Lsn, MemoryLog, State,
    Usage, VolumeId, VolumeKeys,
};

use crate::slot::Lineage;

/// Makes frames of entries, ten milliseconds of log time apart.
pub(crate) struct Source {
    keys: VolumeKeys,
    base: State,
    appender: Appender,
    time: u64,
    base_time: u64,
    rows: std::collections::BTreeMap<RowKey, Bytes>,
    digest: Digest,
}

impl Source {
    pub(crate) fn new() -> Source {
        Source::of_branch(2)
    }

    pub(crate) fn of_branch(byte: u8) -> Source {
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([byte; 16]) };
        let base = State::origin(epoch);
        Source::continuing(base, epoch)
    }

    /// A source that goes on after `base` in `epoch`, with an empty tree.
    pub(crate) fn continuing(base: State, epoch: Epoch) -> Source {
        let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
        let appender = Appender::new(keys.clone(), epoch, base);
        Source {
            keys,
            base,
            appender,
            time: START,
            base_time: START,
            rows: Default::default(),
            digest: base.digest,
        }
    }

    /// The same history from here on written by another source, in `epoch`.
    pub(crate) fn taken_over(&self, epoch: Epoch) -> Source {
        let state = self.appender.state();
        Source {
            keys: self.keys.clone(),
            base: state,
            appender: Appender::new(self.keys.clone(), epoch, state),
            time: self.time,
            base_time: self.time,
            rows: self.rows.clone(),
            digest: self.digest,
        }
    }

    pub(crate) fn keys(&self) -> &VolumeKeys {
        &self.keys
    }

    pub(crate) fn base(&self) -> State {
        self.base
    }

    pub(crate) fn state(&self) -> State {
        self.appender.state()
    }

    pub(crate) fn lineage(&self) -> Lineage {
        Lineage { volume: self.keys.volume(), branch: BranchId::from_bytes([2; 16]) }
    }

    pub(crate) fn now(&self) -> LogTime {
        LogTime::from_nanos(self.time)
    }

    /// The log time at the base.
    pub(crate) fn base_time(&self) -> u64 {
        self.base_time
    }

    /// Lets log time pass.
    pub(crate) fn wait(&mut self, nanos: u64) {
        self.time += nanos;
    }

    pub(crate) fn rows(&self) -> &std::collections::BTreeMap<RowKey, Bytes> {
        &self.rows
    }

    /// The rows as an index shows them.
    pub(crate) fn tree(&self) -> Arc<dyn IndexSnapshot> {
        let index = MemoryIndex::new();
        let mut rows = self.rows.iter().map(|(key, value)| (key.clone(), Some(value.clone())));
        index.ingest(&mut rows, &self.state()).unwrap();
        index.snapshot()
    }

    /// `count` frames of `entries` entries each.
    pub(crate) fn frames(&mut self, count: usize, entries: usize) -> Vec<Frame> {
        (0..count).map(|_| self.frame(entries, None)).collect()
    }

    /// A frame of one entry that begins to refer to a pack.
    pub(crate) fn frame_with_pack(&mut self, pack: &PackRow) -> Frame {
        self.frame(1, Some(pack))
    }

    /// A frame of one entry that writes the row of the pack that the entry `since` was the first to name.
    pub(crate) fn frame_releasing_pack(&mut self, since: Lsn, pack: &PackRow) -> Frame {
        self.time += 10_000_000;
        let lsn = self.appender.state().position.lsn.next();
        let mut entry = Entry::tick(lsn, LogTime::from_nanos(self.time));
        entry.changes = vec![self.change(RowKey::pack(since.get()), pack.encode())];
        self.appender.push(&entry, self.digest, Usage::default()).unwrap();
        self.appender.close(LogTime::from_nanos(self.time), self.base.position.lsn).unwrap()
    }

    /// A frame of one entry that writes `bytes` bytes that do not compress.
    pub(crate) fn large_frame(&mut self, bytes: usize) -> Frame {
        let mut value = vec![0; bytes];
        blake3::Hasher::new().finalize_xof().fill(&mut value);
        let lsn = self.appender.state().position.lsn.next();
        let mut entry = Entry::tick(lsn, LogTime::from_nanos(self.time));
        entry.changes = vec![self.change(RowKey::symlink(murphy_fs::Ino::new(lsn.get())), value.into())];
        self.appender.push(&entry, self.digest, Usage::default()).unwrap();
        self.appender.close(LogTime::from_nanos(self.time), self.base.position.lsn).unwrap()
    }

    pub(crate) fn frame(&mut self, entries: usize, pack: Option<&PackRow>) -> Frame {
        for _ in 0..entries {
            self.time += 10_000_000;
            let lsn = self.appender.state().position.lsn.next();
            let mut changes = vec![
                self.change(RowKey::from_parts(Table::Symlink.number(), &(lsn.get() % 50).to_be_bytes()), {
                    Bytes::from(format!("row of {lsn}, {}", "x".repeat(lsn.get() as usize % 40)))
                }),
            ];
            if let Some(pack) = pack {
                changes.push(self.change(RowKey::pack(lsn.get()), pack.encode()));
            }
            let mut entry = Entry::tick(lsn, LogTime::from_nanos(self.time));
            entry.kind = 9;
            entry.changes = changes;
            let usage = Usage::default();
            self.appender.push(&entry, self.digest, usage).unwrap();
        }
        let durable = self.base.position.lsn;
        self.appender.close(LogTime::from_nanos(self.time + 1_000_000), durable).unwrap()
    }

    fn change(&mut self, key: RowKey, value: Bytes) -> Change {
        let digest = |value: &Bytes| self.keys.row_digest(key.table(), key.key(), value);
        if let Some(old) = self.rows.get(&key) {
            self.digest = self.digest.minus(digest(old));
        }
        self.digest = self.digest.plus(digest(&value));
        let change = Change { table: key.table(), key: key.key_bytes(), value: Some(value.clone()) };
        self.rows.insert(key, value);
        change
    }
}

/// Appends `frames` to a log that has been claimed.
pub(crate) fn append(log: &MemoryLog, frames: &[Frame]) {
    for frame in frames {
        let previous = log.tail().position;
        log.append(&previous, frame.clone()).unwrap();
    }
}

/// 2023-11-14T22:13:20Z.
const START: u64 = 1_700_000_000_000_000_000;
