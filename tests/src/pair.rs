//! A source and a volume that follows it, both in memory, with one block store; the test is the wire between their logs.
//!
//! Invariants:
//! - A frame reaches the follower's log only when the test says so, in order and unchanged.

use std::{sync::Arc, time::Duration};

use murphy_fs::{
    BlockStore, CellCache, Errno, FileSystem, MemoryIndex, ObjectBlockStore, PackFetcher, Volume,
    VolumeOptions, VolumeParts,
};
use murphy_log::{
    ChainHash, Digest, Epoch, EpochId, Log, Lsn, MemoryLog, Position, State, SystemClock, Usage, VolumeId,
    VolumeKeys,
};
use parking_lot::Mutex;

use crate::{Driver, wait_for};

/// Two volumes of one history.
pub struct Pair {
    /// The one that decides.
    pub source: Volume,
    /// The one that follows.
    pub follower: Volume,
    /// The epoch of the source.
    pub epoch: Epoch,
    driver: Driver,
    follower_log: Arc<MemoryLog>,
    /// The end of what has been copied.
    copied: Mutex<Position>,
}

impl Pair {
    /// A new volume, and a follower of it that has nothing yet.
    ///
    /// # Panics
    /// If either volume cannot be opened.
    pub fn new(options: VolumeOptions) -> Pair {
        let driver = Driver::new();
        let _runtime = driver.enter();
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([7; 16]) };
        let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
        let state = State { position, digest: Digest::default(), usage: Usage::default() };
        let blocks: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
        let volume = || {
            let log = Arc::new(MemoryLog::new(state));
            log.claim(epoch).expect("a new log can be claimed");
            let clock = Arc::new(SystemClock::new());
            let parts = VolumeParts {
                log: log.clone(),
                index: Arc::new(MemoryIndex::new()),
                state,
                last_time: murphy_log::LogTime::default(),
                keys: VolumeKeys::derive(VolumeId::from_bytes([1; 16])),
                clock,
                fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], CellCache::new(1 << 20), None),
                blocks: Arc::clone(&blocks),
                runtime: driver.handle().clone(),
                options,
            };
            (Volume::open(parts).expect("a volume in memory opens"), log)
        };
        let ((source, _), (follower, follower_log)) = (volume(), volume());
        source.lead(epoch, Some(&[])).expect("the source of a new volume leads");
        follower.follow().expect("a follower follows");
        drop(_runtime);
        Pair { source, follower, epoch, driver, follower_log, copied: Mutex::new(position) }
    }

    /// Waits for answers of either volume.
    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    /// Makes everything durable at the source and copies it to the follower's log; returns up to where that goes.
    ///
    /// # Panics
    /// If the source cannot flush, or a log refuses what the other has taken.
    pub fn copy(&self) -> Lsn {
        self.driver.wait(self.source.sync_all()).expect("the source flushes");
        let mut copied = self.copied.lock();
        for frame in self.source.log().read(copied.lsn.next()).expect("the source's log is whole") {
            let frame = frame.expect("the source's log can be read");
            let end = frame.position();
            self.follower_log.append(&copied, frame).expect("the follower's log takes what follows");
            *copied = end;
        }
        copied.lsn
    }

    /// Waits until the follower shows everything up to `lsn`. EIO if it ends before.
    ///
    /// # Panics
    /// If it does not within `timeout`.
    pub fn wait_shown(&self, lsn: Lsn, timeout: Duration) -> Result<(), Errno> {
        wait_for(&format!("lsn {lsn} at the follower"), timeout, || {
            if self.follower.state().position.lsn >= lsn {
                return Some(Ok(()));
            }
            self.follower.ended().map(|_| Err(Errno::EIO))
        })
    }
}
