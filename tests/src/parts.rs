//! What the volumes of tests are made of, as far as a test has nothing else to say.
//!
//! Invariants:
//! - They are all of one volume, [`VOLUME`], and begin in [`epoch`] 1: a log, an index or a store of one can be handed to another.

use std::sync::Arc;

use murphy_fs::{
    BlockStore, CellCache, Index, MemoryIndex, ObjectBlockStore, PackFetcher, Volume, VolumeOptions,
    VolumeParts,
};
use murphy_log::{Clock, Epoch, EpochId, Log, MemoryLog, State, VolumeId, VolumeKeys};

/// The volume of the tests.
pub const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);

/// The epoch with this number.
pub fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
}

/// The keyed hashes of [`VOLUME`].
pub fn volume_keys() -> VolumeKeys {
    VolumeKeys::derive(VOLUME)
}

/// A log in memory that begins with epoch 1.
pub fn new_log() -> Arc<MemoryLog> {
    Arc::new(MemoryLog::new(State::origin(epoch(1))))
}

/// A volume over these, at the durable end of `log`, on the runtime that this is called on.
pub fn volume_parts(
    log: Arc<dyn Log>,
    index: Arc<dyn Index>,
    blocks: Arc<dyn BlockStore>,
    clock: Arc<dyn Clock>,
) -> VolumeParts {
    VolumeParts {
        state: log.durable().state(),
        log,
        index,
        last_time: clock.wall(),
        keys: volume_keys(),
        clock,
        fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], CellCache::new(1 << 20), None),
        blocks,
        runtime: tokio::runtime::Handle::current(),
        options: VolumeOptions::default(),
    }
}

/// A new volume that leads in epoch 1, with its log and its index in memory and its packs in `blocks`.
///
/// # Panics
/// If its threads cannot be started.
pub fn new_volume(blocks: Arc<dyn BlockStore>, clock: Arc<dyn Clock>, options: VolumeOptions) -> Volume {
    let parts = volume_parts(new_log(), Arc::new(MemoryIndex::new()), blocks, clock);
    lead_new(VolumeParts { options, ..parts })
}

/// The same, with its packs in memory too.
///
/// # Panics
/// As [`new_volume`].
pub fn memory_volume(clock: Arc<dyn Clock>, options: VolumeOptions) -> Volume {
    new_volume(Arc::new(ObjectBlockStore::in_memory()), clock, options)
}

/// Opens the volume over an empty log, which leads in epoch 1 from then on.
///
/// # Panics
/// If the log belongs to somebody else, or threads cannot be started.
pub fn lead_new(parts: VolumeParts) -> Volume {
    parts.log.claim(epoch(1)).expect("nobody else claims a new log");
    let volume = Volume::open(parts).expect("a volume in memory opens");
    volume.lead(epoch(1), Some(&[])).expect("a new volume leads");
    volume
}
