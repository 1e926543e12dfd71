//! The volume: a tree, its files' bytes and the log under both, as one [`FileSystem`].
//!
//! ```text
//!   volume.rs      opening, closing, what holds it together
//!   volume/tree    names and attributes        volume/io      reading and writing bytes
//!   volume/files   open files, their locks     volume/flush   from dirty bytes to packs to entries
//!   volume/purge   the end of orphans          volume/dirty   bytes that no entry refers to yet
//!   volume/workers its threads                 volume/members who may follow it
//!   volume/durable what an fsync waits for     volume/length  how long a file is
//!   volume/memory  what dirty bytes take       volume/placed where bytes without an entry are
//!   volume/glance  the rows of one answer      volume/packs   the packs that it refers to
//!   volume/undelivered  handles on their way
//! ```
//!
//! Invariants:
//! - Lock order: a file's lock, then the sequencer's. No lock is held while something is awaited.
//! - Whatever changes a file's extents holds the file's lock while the entry is sequenced.
//! - A future that waits owns what it needs and may be dropped: what it began goes on.

mod dirty;
mod durable;
mod file_system;
mod files;
mod flush;
mod glance;
mod io;
mod length;
mod members;
mod memory;
mod packs;
mod placed;
mod purge;
#[cfg(test)]
mod tests;
mod tree;
mod undelivered;
mod workers;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use murphy_log::{Clock, Epoch, Log, LogTime, Position, State, VolumeKeys};
use tokio::{runtime::Handle as Runtime, sync::watch};

use crate::{
    Acknowledger, Answer, Caller, ChangeObserver, Errno, Index, IndexSnapshot, Mandate, NameHasher,
    Observation, RowKey, SettingRow, SilentStore, View, ViewError,
    data::{BlockStore, PackFetcher, WriterId},
    decide::{BeginSession, ChangeSettings, Genesis, Operation},
    sequencer::{Limits, Sequencer, SubmitError},
};
use files::{FileTable, Handles};
use flush::Flusher;
use io::Stamps;
use workers::Workers;

/// A volume on this node. Cloning shares it; the last clone to go stops its threads.
#[derive(Clone)]
pub struct Volume {
    shared: Arc<Shared>,
}

struct Shared {
    sequencer: Arc<Sequencer>,
    hasher: NameHasher,
    files: FileTable,
    handles: Handles,
    stamps: Stamps,
    flusher: Flusher,
    fetcher: PackFetcher,
    blocks: Arc<dyn BlockStore>,
    writer: WriterId,
    packs_begun: AtomicU64,
    runtime: Runtime,
    options: VolumeOptions,
    /// Whom an fsync waits for; those that wait see it change.
    acknowledger: watch::Sender<Option<Arc<dyn Acknowledger>>>,
    /// Who knows whether this node may acknowledge anything, once there is somebody.
    mandate: OnceLock<Arc<dyn Mandate>>,
    index: Arc<dyn Index>,
    workers: Workers,
}

/// What a volume is made of.
pub struct VolumeParts {
    /// Where entries become durable.
    pub log: Arc<dyn Log>,
    /// Where rows are; it has everything up to `state`.
    pub index: Arc<dyn Index>,
    /// The log's durable end, which the index has reached.
    pub state: State,
    /// When its last entry was.
    pub last_time: LogTime,
    /// The keyed hashes of the volume.
    pub keys: VolumeKeys,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Where new packs go.
    pub blocks: Arc<dyn BlockStore>,
    /// How packs are read.
    pub fetcher: PackFetcher,
    /// Where waiting is done.
    pub runtime: Runtime,
    /// What can be chosen.
    pub options: VolumeOptions,
}

/// What can be chosen about a volume on a node.
#[derive(Clone, Copy, Debug)]
pub struct VolumeOptions {
    /// Dirty data is flushed at most this long after it was written.
    pub flush_after: Duration,
    /// No request waits longer.
    pub io_timeout: Duration,
    /// A pack that is not stored within this time, or `io_timeout` if that is longer, is given up and tried again.
    pub put_timeout: Duration,
    /// Every operation is durable before it returns.
    pub sync: bool,
    /// Writers wait while dirty data takes more bytes of memory than this. It takes as much as was written and has no entry yet, at most the
    /// same again for buffers that are not full, 256 bytes for each run of bytes, and the packs that are on their way.
    pub dirty_bytes: u64,
    /// How many rows are cached in memory.
    pub cached_rows: usize,
    /// Changes are moved into the index in portions of about this many bytes of memory.
    pub generation_bytes: usize,
}

impl Default for VolumeOptions {
    fn default() -> VolumeOptions {
        let limits = Limits::default();
        VolumeOptions {
            flush_after: Duration::from_secs(5),
            io_timeout: Duration::from_secs(60),
            put_timeout: Duration::from_secs(60),
            sync: false,
            dirty_bytes: 512 << 20,
            cached_rows: limits.cached_rows,
            generation_bytes: limits.generation_bytes,
        }
    }
}

/// Why a volume does not begin to serve.
#[derive(Debug, thiserror::Error)]
pub enum OpenVolumeError {
    /// Its threads cannot be started, or there is no randomness.
    #[error("cannot start: {0}")]
    System(String),
    /// Its first entries cannot be written.
    #[error("the volume takes no entries: {0}")]
    Refused(Errno),
    /// Its tree cannot be read.
    #[error(transparent)]
    Unreadable(#[from] ViewError),
}

impl Volume {
    /// Opens a volume that decides nothing yet: it can be read, and follow a source, until [`Volume::lead`].
    pub fn open(parts: VolumeParts) -> Result<Volume, OpenVolumeError> {
        let options = parts.options;
        let limits = Limits {
            generation_bytes: options.generation_bytes,
            overlay_bytes: options.generation_bytes.saturating_mul(8),
            cached_rows: options.cached_rows,
        };
        let hasher = NameHasher::of(&parts.keys);
        let snapshot = parts.index.snapshot();
        let sequencer = Sequencer::new(
            parts.log,
            parts.keys,
            parts.clock,
            snapshot,
            parts.state,
            parts.last_time,
            limits,
        );
        let sequencer = Arc::new(sequencer);
        let workers = Workers::start(&parts.runtime, &sequencer, &parts.index);
        let shared = Shared {
            sequencer,
            hasher,
            files: FileTable::default(),
            handles: Handles::default(),
            stamps: Stamps::default(),
            flusher: Flusher::default(),
            fetcher: parts.fetcher,
            blocks: parts.blocks,
            writer: WriterId::random().map_err(|error| OpenVolumeError::System(error.to_string()))?,
            packs_begun: AtomicU64::new(0),
            runtime: parts.runtime,
            options,
            acknowledger: watch::Sender::new(None),
            mandate: OnceLock::new(),
            index: parts.index,
            workers: workers.map_err(|error| OpenVolumeError::System(error.to_string()))?,
        };
        let volume = Volume { shared: Arc::new(shared) };
        volume.start_flusher();
        Ok(volume)
    }

    /// Begins to decide in `epoch`, which the log has been claimed for. A new volume gets its first entry, with `genesis` as its shared
    /// settings; what an earlier source left half done goes on. Waits, for a bounded time, until those who observe what was followed are
    /// through with it: a kernel that is told late of what somebody else decided would take it for the state after what it asked for itself.
    pub fn lead(&self, epoch: Epoch, genesis: Option<&[(String, String)]>) -> Result<(), OpenVolumeError> {
        self.shared.workers.stop_following();
        self.shared.workers.observers().end();
        self.shared.sequencer.lead(epoch);
        if let Some(settings) = genesis {
            self.submit_now(&Genesis { settings: settings.to_vec() })?;
        }
        let ended = self.open_sessions()?;
        self.submit_now(&BeginSession { writer: self.shared.writer.as_u64(), ended })?;
        self.purge_orphans()?;
        Ok(())
    }

    /// Gives no entry a log time before `moment`: that of the last entry before a log that begins empty.
    pub fn not_before(&self, moment: LogTime) {
        self.shared.sequencer.not_before(moment);
    }

    /// How far log time is ahead of the wall clock, in milliseconds; negative if it is behind. Of no meaning unless this volume decides.
    pub fn log_time_ahead_ms(&self) -> i64 {
        self.shared.sequencer.log_time_ahead_ms()
    }

    /// Begins to show every entry that becomes durable in the log: for a mirror, whose log somebody else fills. Ends with
    /// [`Volume::lead`].
    pub fn follow(&self) -> Result<(), OpenVolumeError> {
        self.shared.workers.follow().map_err(|error| OpenVolumeError::System(error.to_string()))
    }

    /// Tells `observer` of every entry that is followed from now on, until the observation is dropped.
    pub fn observe(&self, observer: Arc<dyn ChangeObserver>) -> Observation {
        self.shared.workers.observers().add(observer)
    }

    /// EROFS while this node follows another source.
    pub(crate) fn check_leads(&self) -> Result<(), Errno> {
        if self.shared.sequencer.leads() { Ok(()) } else { Err(Errno::EROFS) }
    }

    /// Where names are placed in their directories.
    pub(crate) fn name_hasher(&self) -> &NameHasher {
        &self.shared.hasher
    }

    fn submit_now<O: Operation>(&self, operation: &O) -> Result<O::Reply, OpenVolumeError> {
        self.shared.sequencer.submit(None, operation).map_err(|error| match error {
            SubmitError::Errno(errno) => OpenVolumeError::Refused(errno),
            SubmitError::Stale | SubmitError::Full => OpenVolumeError::Refused(Errno::EBUSY),
        })
    }

    fn open_sessions(&self) -> Result<Vec<u64>, OpenVolumeError> {
        let mut open = Vec::new();
        for row in self.view().rows(RowKey::session(0)..RowKey::session(u64::MAX)) {
            let (key, value) = row.map_err(ViewError::from)?;
            let session = crate::SessionRow::decode(&value);
            let session = session.map_err(|reason| ViewError::Row { key: key.clone(), reason })?;
            open.extend(key.number().filter(|_| !session.ended));
        }
        Ok(open)
    }

    /// Changes shared settings, as an entry; `None` removes one. Not durable when it returns; see [`Volume::durable_here`].
    pub fn change_settings(&self, settings: Vec<(String, Option<String>)>) -> Answer<()> {
        self.record(ChangeSettings { settings })
    }

    /// A shared setting.
    pub fn setting(&self, name: &str) -> Result<Option<String>, ViewError> {
        let row = self.shared.sequencer.newest(&RowKey::setting(name), SettingRow::decode)?;
        Ok(row.map(|row| String::from_utf8_lossy(&row.text).into_owned()))
    }

    /// The tree as it is now.
    pub fn view(&self) -> View {
        self.shared.sequencer.view()
    }

    /// The tree as it is now, at the end of a frame, with its state: what a snapshot is written from.
    pub fn view_with_state(&self) -> View {
        self.shared.sequencer.view_with_state()
    }

    /// The state after the last entry, durable or not.
    pub fn state(&self) -> State {
        self.shared.sequencer.state()
    }

    /// The position after the last entry that is durable on this node.
    pub fn durable(&self) -> Position {
        self.shared.sequencer.log().durable().state().position
    }

    /// How long a request waits at most.
    pub fn io_timeout(&self) -> Duration {
        self.shared.options.io_timeout
    }

    /// How many bytes have been written and are in no stored pack yet.
    pub fn dirty_bytes(&self) -> u64 {
        self.shared.files.dirty_bytes.load(Ordering::Relaxed)
    }

    /// The log below.
    pub fn log(&self) -> &Arc<dyn Log> {
        self.shared.sequencer.log()
    }

    /// The stores that have not answered readers lately: they are asked last until they do.
    pub fn silent_stores(&self) -> Vec<SilentStore> {
        self.shared.fetcher.silent_stores()
    }

    /// Why the volume has stopped deciding, if it has.
    pub fn ended(&self) -> Option<String> {
        self.shared.sequencer.ended()
    }

    /// Sequences an entry, waiting for room if there is none, and for durability with `--sync`.
    pub(crate) fn mutate<O>(&self, caller: Caller, operation: O) -> Answer<O::Reply>
    where
        O: Operation + Send + 'static,
        O::Reply: Send + 'static,
    {
        self.mutate_with(caller, move |volume, caller| {
            volume.shared.sequencer.submit(Some(caller), &operation)
        })
    }

    /// Sequences an entry about the volume itself. It waits for no copy, with `--sync` neither: it may be what gives up those that are gone.
    pub(crate) fn record<O>(&self, operation: O) -> Answer<O::Reply>
    where
        O: Operation + Send + 'static,
        O::Reply: Send + 'static,
    {
        if let Err(errno) = self.check_leads() {
            return Answer::Now(Err(errno));
        }
        let volume = self.clone();
        Answer::later(async move {
            let trying = volume.clone();
            let attempt = move || trying.shared.sequencer.submit(Some(&Caller::default()), &operation);
            volume.retry(attempt(), attempt).await
        })
    }

    /// The same for a request that prepares itself anew at every try.
    pub(crate) fn mutate_with<T: Send + 'static>(
        &self,
        caller: Caller,
        attempt: impl Fn(&Volume, &Caller) -> Result<T, SubmitError> + Send + 'static,
    ) -> Answer<T> {
        if let Err(errno) = self.check_leads() {
            return Answer::Now(Err(errno));
        }
        let mut first = attempt(self, &caller);
        for _ in 0..STALE_TRIES {
            if !matches!(first, Err(SubmitError::Stale)) {
                break;
            }
            first = attempt(self, &caller);
        }
        match first {
            Ok(reply) if !self.shared.options.sync => Answer::Now(Ok(reply)),
            Err(SubmitError::Errno(errno)) => Answer::Now(Err(errno)),
            first => {
                let volume = self.clone();
                Answer::later(async move {
                    let trying = volume.clone();
                    let reply = volume.retry(first, move || attempt(&trying, &caller)).await?;
                    if volume.shared.options.sync {
                        volume.make_durable().await?;
                    }
                    Ok(reply)
                })
            }
        }
    }

    /// Tries again until there is room, or for the longest that a request may take.
    async fn retry<T>(
        &self,
        first: Result<T, SubmitError>,
        attempt: impl Fn() -> Result<T, SubmitError>,
    ) -> Result<T, Errno> {
        let trying = async move {
            let mut result = first;
            loop {
                match result {
                    Ok(reply) => return Ok(reply),
                    Err(SubmitError::Errno(errno)) => return Err(errno),
                    Err(SubmitError::Full) => self.shared.sequencer.room().await,
                    Err(SubmitError::Stale) => tokio::task::yield_now().await,
                }
                result = attempt();
            }
        };
        tokio::time::timeout(self.shared.options.io_timeout, trying).await.unwrap_or_else(|_| {
            tracing::error!("a change waited too long for room: the index, or the log, does not keep up");
            Err(Errno::EIO)
        })
    }

    /// Makes everything durable, moves it into the index and stops deciding, as far as each of these can be done. The volume can still be
    /// read. The error is the first of them.
    pub async fn close(&self) -> Result<(), Errno> {
        let flushed = self.flush_all().await;
        let durable = self.make_durable().await.map(drop);
        self.shared.sequencer.retire();
        // What was decided meanwhile, too. Whoever has just been waited for in vain is not waited for again.
        let rest = match durable {
            Ok(()) => self.make_durable().await.map(drop),
            Err(_) => self.durable_here().await.map(drop),
        };
        let volume = self.clone();
        let settled = murphy_log::aside(move || volume.settle_index()).await;
        flushed.and(durable).and(rest).and(settled)
    }

    /// The rows that are in the index by now, all of them of durable entries. Whoever keeps it for long keeps nobody waiting: only the
    /// disk space of older rows is not given back meanwhile.
    pub fn index_snapshot(&self) -> Arc<dyn IndexSnapshot> {
        self.shared.index.snapshot()
    }

    /// Moves every durable entry into the index, which then survives a power cut. EIO if that takes longer than a request may.
    pub fn settle_index(&self) -> Result<(), Errno> {
        let lsn = self.shared.sequencer.seal_now();
        self.shared
            .workers
            .wait_indexed(lsn, self.shared.options.io_timeout)
            .and_then(|()| self.shared.index.sync().map_err(|e| e.to_string()))
            .map_err(|error| {
                tracing::error!(
                    error,
                    "the index did not take everything in; it will be caught up at the next start"
                );
                Errno::EIO
            })
    }
}

/// How often a request that was prepared from rows that have changed since is tried again on the caller's own thread.
const STALE_TRIES: u32 = 16;
