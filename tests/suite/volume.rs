//! The volume judged by the reference model, over the memory log and the memory index.
//!
//! Invariants:
//! - Generations, caches and packs are made so small that a short program crosses every border between them.

use std::{sync::Arc, time::Duration};

use murphy_fs::{
    BlockStore, CellCache, FileSystem, IndexSnapshot, MemoryIndex, ObjectBlockStore, PackFetcher, Volume,
    VolumeOptions, VolumeParts, check_digest, check_tree,
};
use murphy_log::{
    ChainHash, Clock, Digest, Epoch, EpochId, Log, Lsn, MemoryLog, Position, State, Usage, VolumeId,
    VolumeKeys,
};
use murphy_tests::judge_inside;

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

/// A volume, and a look into it: its tree is sound, and the digest and the totals that it has kept up are those of its rows.
fn judged(
    clock: Arc<dyn Clock>,
    options: VolumeOptions,
) -> (Arc<dyn FileSystem>, impl FnOnce() -> Result<(), String>) {
    let volume = memory_volume(clock, options);
    let looked = volume.clone();
    let look = move || {
        let view = looked.view_with_state();
        let findings = check_tree(&view).map_err(|error| error.to_string())?;
        let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
        let digest = check_digest(&view, &keys).map_err(|error| error.to_string())?.digest;
        let kept = view.state().map(|state| state.digest);
        if kept != Some(digest) {
            return Err(format!("the rows have digest {digest}, {kept:?} was kept up"));
        }
        if findings.is_empty() { Ok(()) } else { Err(format!("the tree is not sound: {findings:?}")) }
    };
    (Arc::new(volume), look)
}

/// The main judge: whatever a program does, the volume and the model agree.
#[test]
fn the_volume_is_the_reference() {
    let options = VolumeOptions { generation_bytes: 4096, cached_rows: 64, ..VolumeOptions::default() };
    judge_inside(|clock| judged(clock, options), 100);
}

/// Flushes land between any two operations when everything is flushed at once.
#[test]
fn the_volume_is_the_reference_while_it_flushes_all_the_time() {
    let options = VolumeOptions {
        flush_after: Duration::from_millis(20),
        dirty_bytes: 1 << 20,
        ..VolumeOptions::default()
    };
    judge_inside(|clock| judged(clock, options), 50);
}
