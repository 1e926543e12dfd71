//! The index on disk, in fjall.
//!
//! Two keyspaces: `names` has the dentries, with blooms, because lookups of missing names are common; `rows` has everything else. Rows
//! go in by sorted ingestion, past fjall's journal: when `finish` returns, the new tables and the version that names them are synced.
//!
//! Invariants:
//! - Every ingestion of a keyspace carries a marker, the state of its generation, under a key below all rows. So a keyspace says itself
//!   how far it is, and one that was rolled back is found out when it is opened.
//! - Readers read through one snapshot of both keyspaces, taken when a generation is complete.
//! - What is opened is at its synced record; anything that cannot be shown to reach it is refused, never repaired.
//! - fjall has one worker: with more, its first one spins while another compacts.

use std::{
    fs::{self, File, TryLockError},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use fjall::{
    CompressionType, Database, Keyspace, KeyspaceCreateOptions, PersistMode, Readable, Snapshot,
    config::{BloomConstructionPolicy, CompressionPolicy, FilterPolicy, FilterPolicyEntry},
};
use murphy_log::{Files, Lsn, OsFiles, State};
use parking_lot::Mutex;

use super::{
    Index, IndexError, IndexSnapshot, IngestOrder,
    fjall_files::check_files,
    fjall_snapshot::{FjallSnapshot, guarded, is_name, panic_text},
    goes_back,
    synced::{SyncedRecord, decode_state, encode_state, sync_directory},
};
use crate::RowKey;

/// The index of a node, in a directory of its own.
///
/// The directory is locked while the index or a snapshot of it lives. Dropping it syncs nothing: whoever stops cleanly calls
/// [`sync`](Index::sync) first, and has nothing to apply again at the next start.
pub struct FjallIndex {
    dir: PathBuf,
    place: Arc<str>,
    tables: Tables,
    current: ArcSwap<FjallSnapshot>,
    progress: Mutex<Progress>,
    /// Set by an error of writing: what is on disk is then known only to whoever opens it anew.
    failed: AtomicBool,
    _lock: File,
}

/// How an index uses memory and file descriptors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FjallOptions {
    /// Bytes of the block cache.
    pub cache_bytes: u64,
    /// How many table files are kept open.
    pub max_open_files: usize,
}

impl Default for FjallOptions {
    fn default() -> FjallOptions {
        FjallOptions { cache_bytes: 64 << 20, max_open_files: 512 }
    }
}

impl FjallIndex {
    /// Opens the index in `dir`, or an empty one if nothing is there. Its state is the last synced one.
    pub fn open(dir: &Path, options: FjallOptions) -> Result<FjallIndex, OpenIndexError> {
        let lock = lock(dir)?;
        open_locked(dir, options, lock)
    }

    /// Like [`open`](FjallIndex::open), but what cannot be used is deleted, with a warning that says why; the index is then empty.
    pub fn open_or_reset(dir: &Path, options: FjallOptions) -> Result<FjallIndex, OpenIndexError> {
        let lock = lock(dir)?;
        let again = lock.try_clone().map_err(|source| OpenIndexError::io(dir, source))?;
        match open_locked(dir, options, lock) {
            Err(OpenIndexError::Unusable { path, reason }) => {
                tracing::warn!(%path, reason, "the index cannot be used, it begins anew");
                clear(dir).map_err(|source| OpenIndexError::io(dir, source))?;
                open_locked(dir, options, again)
            }
            opened => opened,
        }
    }

    /// The state that the index in `dir` was last synced at, by its record alone: nothing is opened or changed. `None` if there is none that can
    /// be read; what it says of is to be proven by [`open`](FjallIndex::open).
    pub fn synced_in(dir: &Path) -> Option<State> {
        SyncedRecord::read(dir).ok()?.map(|record| record.state)
    }

    /// Deletes the index in `dir`.
    pub fn reset(dir: &Path) -> Result<(), OpenIndexError> {
        let _lock = lock(dir)?;
        clear(dir).map_err(|source| OpenIndexError::io(dir, source))
    }

    /// Bytes of its tables on disk. fjall's journal, which is never written, is left out.
    pub fn disk_bytes(&self) -> u64 {
        self.tables.names.disk_space() + self.tables.rows.disk_space()
    }

    /// Merges all tables, down to what is alive. Takes long and writes everything anew.
    pub fn compact(&self) -> Result<(), IndexError> {
        let Tables { names, rows, .. } = &self.tables;
        guarded(&self.place, || names.major_compact())?;
        guarded(&self.place, || rows.major_compact())
    }

    fn error(&self, reason: impl Into<String>) -> IndexError {
        IndexError { path: self.place.to_string(), reason: reason.into() }
    }

    fn check_usable(&self) -> Result<(), IndexError> {
        if self.failed.load(Ordering::Acquire) {
            return Err(self.error("an earlier write failed, it must be opened anew"));
        }
        // A failed compaction poisons the database, and only a write of its journal says so.
        guarded(&self.place, || self.tables.db.persist(PersistMode::Buffer))
    }

    /// Whatever fails here leaves the tables in an unknown state.
    fn or_fail<T>(&self, result: Result<T, IndexError>) -> Result<T, IndexError> {
        if result.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        result
    }

    fn ingest_rows(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
        progress: &mut Progress,
    ) -> Result<(), IndexError> {
        let Tables { names, rows: others, .. } = &self.tables;
        let marker = Bytes::copy_from_slice(&encode_state(state));
        let (mut into_names, mut into_rows) = (None, None);
        let mut order = IngestOrder::default();
        // Keys share pieces of memory: one allocation each would cost more than sorting them.
        let mut memory = BytesMut::with_capacity(KEY_MEMORY);
        for (key, value) in rows {
            order.admit(&key).map_err(|reason| self.error(reason))?;
            memory.extend_from_slice(key.as_bytes());
            let stored = memory.split().freeze();
            let (keyspace, ingestion) =
                if is_name(&key) { (names, &mut into_names) } else { (others, &mut into_rows) };
            guarded(&self.place, || {
                if ingestion.is_none() {
                    let mut begun = keyspace.start_ingestion()?;
                    begun.write(Bytes::from_static(MARKER), marker.clone())?;
                    *ingestion = Some(begun);
                }
                let Some(ingestion) = ingestion else { return Ok(()) };
                match value {
                    Some(value) => ingestion.write(stored, value),
                    None => ingestion.write_tombstone(stored),
                }
            })?;
        }
        for (ingestion, reached) in [(into_names, &mut progress.names), (into_rows, &mut progress.rows)] {
            if let Some(ingestion) = ingestion {
                progress.reached = Some(*state);
                guarded(&self.place, || ingestion.finish())?;
                *reached = Some(*state);
            }
        }
        Ok(())
    }

    /// Lets readers see `snapshot`.
    fn show(&self, snapshot: Snapshot, state: Option<State>) {
        self.current.store(Arc::new(self.tables.snapshot(&self.place, snapshot, state)));
    }

    /// Takes the current snapshot anew: the old one keeps the tables that were merged since, the new one does not.
    fn refresh(&self) {
        self.show(self.tables.db.snapshot(), self.current.load().state);
    }

    /// Reads the markers back: an ingestion that the tables hide (sequence numbers begun anew after a damaged start) must not go on.
    fn check_markers(&self, snapshot: &Snapshot, progress: &Progress) -> Result<(), IndexError> {
        let Tables { names, rows, .. } = &self.tables;
        for (keyspace, expected) in [(names, &progress.names), (rows, &progress.rows)] {
            let found = guarded(&self.place, || marker(snapshot, keyspace))?;
            if found != *expected {
                return Err(self.error("rows that were ingested cannot be seen"));
            }
        }
        Ok(())
    }

    /// Waits while compaction is behind: reads cost one probe for each table of the first level.
    fn wait_for_compaction(&self) -> Result<(), IndexError> {
        for waited in 0.. {
            let behind = self.tables.names.l0_table_count().max(self.tables.rows.l0_table_count());
            if behind <= MAX_FIRST_LEVEL_TABLES {
                return Ok(());
            }
            if waited == MAX_WAITS {
                if behind > MAX_FIRST_LEVEL_TABLES * 16 {
                    return Err(self.error(format!("compaction is {behind} tables behind")));
                }
                tracing::warn!(path = %self.place, behind, "compaction of the index does not keep up");
                return Ok(());
            }
            self.check_usable()?;
            thread::sleep(WAIT);
        }
        Ok(())
    }
}

impl Index for FjallIndex {
    fn snapshot(&self) -> Arc<dyn IndexSnapshot> {
        self.current.load_full()
    }

    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
    ) -> Result<(), IndexError> {
        let mut progress = self.progress.lock();
        self.or_fail(self.check_usable())?;
        if let Some(reason) = goes_back(self.current.load().state, state) {
            return self.or_fail(Err(self.error(reason)));
        }
        self.refresh();
        self.or_fail(self.ingest_rows(rows, state, &mut progress))?;
        let snapshot = self.tables.db.snapshot();
        self.or_fail(self.check_markers(&snapshot, &progress))?;
        self.show(snapshot, Some(*state));
        progress.reached = further(progress.reached, Some(*state));
        self.or_fail(self.wait_for_compaction())
    }

    fn sync(&self) -> Result<(), IndexError> {
        let mut progress = self.progress.lock();
        self.or_fail(self.check_usable())?;
        let Some(state) = self.current.load().state else {
            return Ok(());
        };
        let lsn = |marker: Option<State>| marker.map_or(Lsn::new(0), |state| state.position.lsn);
        let record = SyncedRecord { state, names: lsn(progress.names), rows: lsn(progress.rows) };
        if progress.synced == Some(record) {
            return Ok(());
        }
        // Tables are durable since their ingestion finished; the journal is synced for the case that anything is in it.
        self.or_fail(guarded(&self.place, || self.tables.db.persist(PersistMode::SyncAll)))?;
        self.or_fail(record.write(&self.dir).map_err(|error| self.error(error.to_string())))?;
        progress.synced = Some(record);
        self.refresh();
        Ok(())
    }

    fn has_room(&self, bytes: usize) -> bool {
        // A disk that cannot say how full it is says so when it is written to.
        rustix::fs::statvfs(&self.dir)
            .map_or(true, |disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= ROOM_BYTES + 2 * bytes as u64)
    }

    fn reached(&self) -> Option<State> {
        self.progress.lock().reached
    }
}

impl std::fmt::Debug for FjallIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FjallIndex").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// What fjall has open.
struct Tables {
    db: Database,
    names: Keyspace,
    rows: Keyspace,
}

impl Tables {
    fn snapshot(&self, place: &Arc<str>, snapshot: Snapshot, state: Option<State>) -> FjallSnapshot {
        let (names, rows) = (self.names.clone(), self.rows.clone());
        FjallSnapshot { place: Arc::clone(place), names, rows, snapshot, state }
    }
}

/// How far the keyspaces are.
#[derive(Default)]
struct Progress {
    /// The newest generation in each keyspace.
    names: Option<State>,
    rows: Option<State>,
    reached: Option<State>,
    synced: Option<SyncedRecord>,
}

/// Why an index cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenIndexError {
    /// Another process, or this one, has it open.
    #[error("index {path} is in use")]
    Locked {
        /// Its directory.
        path: String,
    },
    /// Something else stands in its place, which may be of worth to somebody.
    #[error("index {path} is not a directory")]
    NotADirectory {
        /// Where it should be.
        path: String,
    },
    /// What is there is damaged, unknown, or older than its record. It can be made anew.
    #[error("index {path} cannot be used: {reason}")]
    Unusable {
        /// Its directory.
        path: String,
        /// What was found.
        reason: String,
    },
    /// The directory cannot be read or written; nothing is known about what is in it.
    #[error("index {path}: {source}")]
    Io {
        /// Its directory.
        path: String,
        /// What the system said.
        source: io::Error,
    },
}

impl OpenIndexError {
    fn io(dir: &Path, source: io::Error) -> OpenIndexError {
        OpenIndexError::Io { path: dir.display().to_string(), source }
    }

    fn unusable(dir: &Path, reason: impl Into<String>) -> OpenIndexError {
        OpenIndexError::Unusable { path: dir.display().to_string(), reason: reason.into() }
    }

    /// Tells damage from a system that refuses.
    fn of_fjall(dir: &Path, error: fjall::Error) -> OpenIndexError {
        let source = match error {
            fjall::Error::Locked => return OpenIndexError::Locked { path: dir.display().to_string() },
            fjall::Error::Io(source) | fjall::Error::Storage(fjall::LsmError::Io(source)) => source,
            other => return OpenIndexError::unusable(dir, other.to_string()),
        };
        match source.kind() {
            io::ErrorKind::NotFound
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::InvalidData
            | io::ErrorKind::InvalidInput => OpenIndexError::unusable(dir, source.to_string()),
            _ => OpenIndexError::io(dir, source),
        }
    }
}

fn lock(dir: &Path) -> Result<File, OpenIndexError> {
    let io = |source| OpenIndexError::io(dir, source);
    if fs::metadata(dir).is_ok_and(|found| !found.is_dir()) {
        return Err(OpenIndexError::NotADirectory { path: dir.display().to_string() });
    }
    OsFiles.create_dir(dir).map_err(io)?;
    let lock = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK)).map_err(io)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(OpenIndexError::Locked { path: dir.display().to_string() }),
        Err(TryLockError::Error(source)) => Err(io(source)),
    }
}

fn clear(dir: &Path) -> io::Result<()> {
    // The record goes first: without it the tables mean nothing.
    SyncedRecord::remove(dir)?;
    match fs::remove_dir_all(dir.join(TABLES)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_directory(dir),
    }
}

fn open_locked(dir: &Path, options: FjallOptions, lock: File) -> Result<FjallIndex, OpenIndexError> {
    let record = SyncedRecord::read(dir).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => OpenIndexError::unusable(dir, error.to_string()),
        _ => OpenIndexError::io(dir, error),
    })?;
    let tables = open_tables(dir, options, record.is_some())?;
    let place: Arc<str> = dir.display().to_string().into();
    let snapshot = tables.db.snapshot();
    let progress = check_progress(&tables, &snapshot, &place, record)
        .map_err(|error| OpenIndexError::unusable(dir, error.reason))?;
    sync_directory(dir).map_err(|source| OpenIndexError::io(dir, source))?;
    let current = tables.snapshot(&place, snapshot, record.map(|record| record.state));
    Ok(FjallIndex {
        dir: dir.to_owned(),
        place,
        tables,
        current: ArcSwap::from_pointee(current),
        progress: Mutex::new(progress),
        failed: AtomicBool::new(false),
        _lock: lock,
    })
}

/// Opens the database; with a record it must have both keyspaces.
fn open_tables(dir: &Path, options: FjallOptions, recorded: bool) -> Result<Tables, OpenIndexError> {
    let files = check_files(&dir.join(TABLES));
    files.map_err(|error| OpenIndexError::of_fjall(dir, fjall::Error::Io(error)))?;
    let open = || {
        let db = Database::builder(dir.join(TABLES))
            .cache_size(options.cache_bytes)
            .max_cached_files(Some(options.max_open_files.max(MIN_OPEN_FILES)))
            .journal_compression(CompressionType::None)
            .worker_threads(1)
            .open()?;
        if recorded && !(db.keyspace_exists(NAMES) && db.keyspace_exists(ROWS)) {
            return Ok(None);
        }
        let names = db.keyspace(NAMES, || keyspace_options(true))?;
        let rows = db.keyspace(ROWS, || keyspace_options(false))?;
        Ok(Some(Tables { db, names, rows }))
    };
    match catch_unwind(AssertUnwindSafe(open)) {
        Ok(Ok(Some(tables))) => Ok(tables),
        Ok(Ok(None)) => Err(OpenIndexError::unusable(dir, "a keyspace is missing")),
        Ok(Err(error)) => Err(OpenIndexError::of_fjall(dir, error)),
        Err(panic) => Err(OpenIndexError::unusable(dir, panic_text(panic.as_ref()))),
    }
}

fn keyspace_options(names: bool) -> KeyspaceCreateOptions {
    let bloom = FilterPolicyEntry::Bloom(BloomConstructionPolicy::BitsPerKey(10.0));
    // Rows that are asked for exist: in the last levels, where nearly all are, a bloom would only take room.
    let last = if names { bloom } else { FilterPolicyEntry::None };
    KeyspaceCreateOptions::default()
        .filter_policy(FilterPolicy::new([bloom, bloom, last]))
        .data_block_compression_policy(CompressionPolicy::new([CompressionType::None, CompressionType::Lz4]))
}

/// Compares the markers with the record.
fn check_progress(
    tables: &Tables,
    snapshot: &Snapshot,
    place: &str,
    record: Option<SyncedRecord>,
) -> Result<Progress, IndexError> {
    let error = |reason: &str| IndexError { path: place.to_owned(), reason: reason.to_owned() };
    let names = guarded(place, || marker(snapshot, &tables.names))?;
    let rows = guarded(place, || marker(snapshot, &tables.rows))?;
    let Some(synced) = record else {
        let first = |keyspace| snapshot.first_key_value(keyspace);
        if guarded(place, || Ok(first(&tables.names).is_some() || first(&tables.rows).is_some()))? {
            return Err(error("it has rows but no record of a synced state"));
        }
        return Ok(Progress::default());
    };
    for (marker, recorded) in [(names, synced.names), (rows, synced.rows)] {
        let lsn = marker.map_or(Lsn::new(0), |state| state.position.lsn);
        if lsn < recorded {
            return Err(error("its tables are older than its record"));
        }
        if lsn == synced.state.position.lsn && marker != Some(synced.state) {
            return Err(error("its tables and its record are of two histories"));
        }
    }
    let reached = further(further(Some(synced.state), names), rows);
    Ok(Progress { names, rows, reached, synced: Some(synced) })
}

/// The marker of a keyspace.
fn marker(snapshot: &Snapshot, keyspace: &Keyspace) -> fjall::Result<Option<State>> {
    Ok(snapshot.get(keyspace, MARKER)?.and_then(|bytes| decode_state(&bytes)))
}

fn further(a: Option<State>, b: Option<State>) -> Option<State> {
    match (a, b) {
        (Some(a), Some(b)) => Some(if b.position.lsn > a.position.lsn { b } else { a }),
        (a, b) => a.or(b),
    }
}

const LOCK: &str = "lock";
const TABLES: &str = "tables";
const NAMES: &str = "names";
const ROWS: &str = "rows";
/// The key of a keyspace's marker: no table has this number.
const MARKER: &[u8] = &[0];
/// fjall refuses to work with fewer.
const MIN_OPEN_FILES: usize = 16;
/// Above so many tables in a first level an ingestion waits; compaction begins at four.
const MAX_FIRST_LEVEL_TABLES: usize = 24;
/// Keys are copied into pieces of about this many bytes.
const KEY_MEMORY: usize = 64 << 10;
/// Left free on the disk for compactions: one that fails ends the process.
const ROOM_BYTES: u64 = 32 << 20;
const WAIT: Duration = Duration::from_millis(5);
/// For at most 10 s in all.
const MAX_WAITS: usize = 2000;
