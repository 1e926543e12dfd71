//! A source and a volume that follows it, both in memory, with one block store; the test is the wire between their logs.
//!
//! Invariants:
//! - A frame reaches the follower's log only when the test says so, in order and unchanged.

use std::{sync::Arc, time::Duration};

use murphy_fs::{
    BlockStore, Errno, FileSystem, MemoryIndex, ObjectBlockStore, Volume, VolumeOptions, VolumeParts,
};
use murphy_log::{Log, Lsn, MemoryLog, Position, State, SystemClock};
use parking_lot::Mutex;

use crate::{Driver, epoch, lead_new, new_log, volume_parts, wait_for};

/// Two volumes of one history.
pub struct Pair {
    /// The one that decides.
    pub source: Volume,
    /// The one that follows.
    pub follower: Volume,
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
        Pair::over(options, Arc::new(ObjectBlockStore::in_memory()))
    }

    /// The same over this block store.
    ///
    /// # Panics
    /// If either volume cannot be opened.
    pub fn over(options: VolumeOptions, blocks: Arc<dyn BlockStore>) -> Pair {
        let driver = Driver::new();
        let _runtime = driver.enter();
        let parts = |log: Arc<MemoryLog>| {
            let clock = Arc::new(SystemClock::new());
            let parts = volume_parts(log, Arc::new(MemoryIndex::new()), blocks.clone(), clock);
            VolumeParts { options, ..parts }
        };
        let source = lead_new(parts(new_log()));
        let follower_log = new_log();
        follower_log.claim(epoch(1)).expect("a new log can be claimed");
        let follower = Volume::open(parts(follower_log.clone())).expect("a volume in memory opens");
        follower.follow().expect("a follower follows");
        drop(_runtime);
        let copied = Mutex::new(State::origin(epoch(1)).position);
        Pair { source, follower, driver, follower_log, copied }
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
