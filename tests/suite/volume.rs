//! The volume judged by the reference model, over the memory log and the memory index.
//!
//! Invariants:
//! - Generations, caches and packs are made so small that a short program crosses every border between them.

use std::{sync::Arc, time::Duration};

use murphy_fs::{
    BlockStore, CellCache, FileSystem, MemoryIndex, ObjectBlockStore, PackFetcher, Volume, VolumeOptions,
    VolumeParts,
};
use murphy_log::{
    ChainHash, Clock, Digest, Epoch, EpochId, Log, Lsn, MemoryLog, Position, State, Usage, VolumeId,
    VolumeKeys,
};
use murphy_tests::judge;

/// The state before the first entry of a new branch.
pub(crate) fn origin(epoch: Epoch) -> State {
    let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
    State { position, digest: Digest::default(), usage: Usage::default() }
}

fn memory_volume(clock: Arc<dyn Clock>, options: VolumeOptions) -> Volume {
    let epoch = Epoch { number: 1, id: EpochId::from_bytes([7; 16]) };
    let log = MemoryLog::new(origin(epoch));
    let state = log.claim(epoch).unwrap();
    let blocks: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
    let parts = VolumeParts {
        log: Arc::new(log),
        index: Arc::new(MemoryIndex::new()),
        state,
        last_time: clock.wall(),
        keys: VolumeKeys::derive(VolumeId::from_bytes([1; 16])),
        clock,
        fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], CellCache::new(1 << 20), None),
        blocks,
        runtime: tokio::runtime::Handle::current(),
        options,
    };
    let volume = Volume::open(parts).unwrap();
    volume.lead(epoch, Some(&[])).unwrap();
    volume
}

/// The main judge: whatever a program does, the volume and the model agree.
#[test]
fn the_volume_is_the_reference() {
    let options = VolumeOptions { generation_bytes: 4096, cached_rows: 64, ..VolumeOptions::default() };
    judge(|clock| Arc::new(memory_volume(clock, options)), 100);
}

/// Flushes land between any two operations when everything is flushed at once.
#[test]
fn the_volume_is_the_reference_while_it_flushes_all_the_time() {
    let options = VolumeOptions {
        flush_after: Duration::from_millis(20),
        dirty_bytes: 1 << 20,
        ..VolumeOptions::default()
    };
    judge(|clock| Arc::new(memory_volume(clock, options)) as Arc<dyn FileSystem>, 50);
}
