//! The volume judged by the reference model, over the memory log and the memory index.
//!
//! Invariants:
//! - Generations, caches and packs are made so small that a short program crosses every border between them.

use std::{sync::Arc, time::Duration};

use murphy_fs::{FileSystem, VolumeOptions};
use murphy_log::Clock;
use murphy_tests::{check_sound, judge_inside, memory_volume};

/// A volume, and a look into it.
fn judged(
    clock: Arc<dyn Clock>,
    options: VolumeOptions,
) -> (Arc<dyn FileSystem>, impl FnOnce() -> Result<(), String>) {
    let volume = memory_volume(clock, options);
    let looked = volume.clone();
    (Arc::new(volume), move || check_sound(&looked))
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
