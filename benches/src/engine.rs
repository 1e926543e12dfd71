//! A volume on a real log and a real index, for the benchmarks: through the library, or mounted.

use std::{io, path::Path, sync::Arc};

use murphy_fs::{
    BlockStore, CellCache, FjallIndex, FjallOptions, Index, Ino, Mount, MountOptions, Name, ObjectBlockStore,
    PackFetcher, RequestCounts, StoreUrl, Volume, VolumeOptions, VolumeParts,
};
use murphy_log::{
    BranchId, Clock, DiskLog, DiskOptions, Epoch, EpochId, Log, State, SystemClock, VolumeId, VolumeKeys,
};

use crate::mount_load::Target;

/// The volume of every benchmark.
pub const VOLUME: VolumeId = VolumeId::from_bytes([2; 16]);
/// Its branch.
pub const BRANCH: BranchId = BranchId::from_bytes([3; 16]);

/// A new volume in `directory`: log, index and blocks on its file system.
///
/// # Panics
/// If the directory cannot be used; a benchmark has nobody to tell.
pub fn new_volume(directory: &Path, options: VolumeOptions) -> Volume {
    new_volume_with_log(directory, options).0
}

/// The same, and its log.
///
/// # Panics
/// As [`new_volume`].
pub fn new_volume_with_log(directory: &Path, options: VolumeOptions) -> (Volume, Arc<dyn Log>) {
    let url = StoreUrl::from_directory(&directory.join("blocks")).expect("an absolute path");
    let blocks = Arc::new(ObjectBlockStore::open(&url).expect("an empty directory"));
    new_volume_over(directory, options, blocks, CellCache::new(64 << 20))
}

/// The same with another store, and so much memory for what was read from it.
///
/// # Panics
/// As [`new_volume`].
pub fn new_volume_over(
    directory: &Path,
    options: VolumeOptions,
    blocks: Arc<dyn BlockStore>,
    cache: CellCache,
) -> (Volume, Arc<dyn Log>) {
    murphy_cli::allocator::keep_freed_memory();
    let epoch = Epoch { number: 1, id: EpochId::from_bytes([1; 16]) };
    let origin = State::origin(epoch);
    let log = DiskLog::create(DiskOptions::new(directory.join("log"), VOLUME, BRANCH), origin)
        .expect("an empty directory");
    let state = log.claim(epoch).expect("a new log");
    let log: Arc<dyn Log> = Arc::new(log);
    let index =
        FjallIndex::open(&directory.join("index"), FjallOptions::default()).expect("an empty directory");
    let index: Arc<dyn Index> = Arc::new(index);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let parts = VolumeParts {
        log: Arc::clone(&log),
        index,
        state,
        last_time: clock.wall(),
        keys: VolumeKeys::derive(VOLUME),
        clock,
        fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], cache, None),
        blocks,
        runtime: tokio::runtime::Handle::current(),
        options,
    };
    let volume = Volume::open(parts).expect("threads can be started");
    volume.lead(epoch, Some(&[])).expect("a new volume takes entries");
    (volume, log)
}

/// A mounted volume, with the runtime that it runs on.
pub struct MountedVolume {
    mount: Mount,
    // Dropped after the mount: it drives what the mount's requests wait for.
    runtime: tokio::runtime::Runtime,
}

impl MountedVolume {
    /// Mounts a new volume, whose state is in `directory`, at `mount_point`.
    pub fn new(directory: &Path, mount_point: &Path, options: &MountOptions) -> io::Result<MountedVolume> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let volume = {
            let _entered = runtime.enter();
            new_volume(&directory.canonicalize()?, VolumeOptions::default())
        };
        let mount = Mount::new(Arc::new(volume), mount_point, options, runtime.handle().clone());
        Ok(MountedVolume { mount: mount.map_err(io::Error::other)?, runtime })
    }
}

impl Target for MountedVolume {
    fn requests(&self) -> RequestCounts {
        self.mount.requests()
    }

    fn forget(&self, name: &str) -> io::Result<()> {
        let name = Name::new(name.as_bytes().to_vec()).map_err(io::Error::other)?;
        if self.mount.notifier().entry(Ino::ROOT, &name) {
            Ok(())
        } else {
            Err(io::Error::other("the notifier is full"))
        }
    }

    fn unmount(self: Box<Self>) -> io::Result<()> {
        self.mount.unmount().map_err(io::Error::other)?;
        drop(self.mount);
        self.runtime.shutdown_timeout(std::time::Duration::from_secs(5));
        Ok(())
    }
}
