//! The node of a mirror: its log, filled by a source, its promise, and the snapshot that its log begins after.
//!
//! ```text
//!   base/seed.partial-N   a snapshot that is arriving
//!   base/seed.ready       one that is complete and verified: the next start puts it in place, over whatever is there
//!   base/base.snapshot    what the log begins after            promised.json   the epoch that has been promised
//!   branches/N/           a log that was set aside, with its base: see [`settle`]
//! ```
//!
//! Invariants:
//! - No frame of an epoch older than the promise is queued; both are decided under one lock.
//! - A process that is killed between any two steps leaves a node that starts again: [`settle`] finishes what was begun.
//! - Once it takes over, nothing is put in the place of its log any more: that, and that something else has become complete, are decided under
//!   one lock.
//! - While a volume is open above the log, the log is replaced only by a process that begins anew.
//! - A snapshot replaces what was held when it began to arrive, and nothing else: once entries were added, another one was begun, or somebody
//!   else is followed, it is given up.
//! - What is held is given up in one step, for something else that is complete and durable: until a snapshot is, the log that it replaces is
//!   read, lent, promised with and promoted.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufReader},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use murphy_fs::verify_snapshot;
use murphy_log::{
    BranchId, DiskLog, Epoch, Files, Frame, Log, Lsn, OsFiles, Position, State, VolumeKeys, append_copy,
    rename_durably,
};
use murphy_mirror::{Point, Replica, ReplicaError, SeedWriter, check_append, check_promise};
use tokio::{runtime::Handle, sync::watch};

use super::heard;
use crate::{
    config::NodeConfig,
    error::CliError,
    node::{
        SEED_READY, log_directory, open_log, open_whole_log, order_beginning, order_snapshot, seed_file,
        settle,
    },
    promise,
};

/// A mirror's node on disk.
pub(crate) struct DiskReplica {
    directory: PathBuf,
    branch: BranchId,
    keys: VolumeKeys,
    shared: Arc<Mutex<Shared>>,
    /// Held, before `shared` is, by whoever writes down what takes the place of the log, which takes a while.
    ordering: Arc<Mutex<()>>,
    data: watch::Sender<Lsn>,
    /// Why the process has to begin anew, once it has to.
    restart: Arc<watch::Sender<Option<String>>>,
}

struct Shared {
    config: NodeConfig,
    log: Option<Arc<DiskLog>>,
    promised: Option<Epoch>,
    /// A volume is open above the log.
    in_use: bool,
    /// It takes over: what it holds is its own from here on, and nothing takes the place of that.
    closed: bool,
    /// The number of the last snapshot that may still take the place of what is held; those before it were given up.
    seed: u64,
}

impl DiskReplica {
    /// The last LSN that the source of the own epoch was heard of, as far as it was noted; 0 for nothing.
    pub(super) fn heard(&self) -> Lsn {
        let noted = self.state().and_then(|state| heard::load(&self.directory, state.position.epoch));
        noted.unwrap_or(Lsn::new(0))
    }

    /// Notes up to where the source was heard of.
    pub(super) fn note_heard(&self, lsn: Lsn) -> Result<(), CliError> {
        match self.state() {
            Some(state) => heard::save(&self.directory, state.position.epoch, lsn),
            None => Ok(()),
        }
    }

    /// Opens what is in `directory`, whose lock the caller holds. What its log has lost comes from others first.
    pub(crate) fn open(
        directory: &Path,
        config: &NodeConfig,
        runtime: &Handle,
    ) -> Result<DiskReplica, CliError> {
        settle(directory, config)?;
        let held = log_directory(directory).is_dir();
        let log = held.then(|| open_whole_log(directory, config, runtime)).transpose()?;
        DiskReplica::above(directory, config, log.map(Arc::new))
    }

    /// A replica above a log that is open already.
    pub(crate) fn above(
        directory: &Path,
        config: &NodeConfig,
        log: Option<Arc<DiskLog>>,
    ) -> Result<DiskReplica, CliError> {
        let promised = promise::load(directory)?;
        let shared = Shared { config: config.clone(), log, promised, in_use: false, closed: false, seed: 0 };
        Ok(DiskReplica {
            directory: directory.to_owned(),
            branch: config.branch,
            keys: VolumeKeys::derive(config.volume),
            shared: Arc::new(Mutex::new(shared)),
            ordering: Arc::default(),
            data: watch::Sender::new(Lsn::new(0)),
            restart: Arc::new(watch::Sender::new(None)),
        })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        lock(&self.shared)
    }

    /// The log, once there is one. From here on it stays in place while this process lives.
    pub(crate) fn use_log(&self) -> Option<Arc<DiskLog>> {
        let mut shared = self.shared();
        shared.in_use = shared.log.is_some();
        shared.log.clone()
    }

    /// Tells how far the bytes are here.
    pub(crate) fn data_sender(&self) -> watch::Sender<Lsn> {
        self.data.clone()
    }

    /// Follows why the process has to begin anew.
    pub(crate) fn restart(&self) -> watch::Receiver<Option<String>> {
        self.restart.subscribe()
    }

    /// Nothing takes the place of what it holds any more, also if it has arrived. Refused if something has: the process begins anew with that.
    pub(super) fn close(&self) -> Result<(), ReplicaError> {
        let mut shared = self.shared();
        self.check_stays()?;
        shared.closed = true;
        shared.give_up_seed();
        Ok(())
    }

    /// It follows a source again, another one or after a promotion that did not come about: what one sent of a snapshot before is given up.
    pub(super) fn reopen(&self) {
        let mut shared = self.shared();
        shared.closed = false;
        shared.give_up_seed();
    }

    fn check_stays(&self) -> Result<(), ReplicaError> {
        match &*self.restart.borrow() {
            Some(_) => Err(ReplicaError::Storage("this node is about to begin anew".to_owned())),
            None => Ok(()),
        }
    }

    fn log(&self) -> Option<Arc<DiskLog>> {
        if self.restart.borrow().is_some() {
            return None;
        }
        self.shared().log.clone()
    }
}

impl Replica for DiskReplica {
    fn begins_anew(&self) -> bool {
        self.restart.borrow().is_some()
    }

    fn state(&self) -> Option<State> {
        self.log().map(|log| log.durable().state())
    }

    fn keys(&self) -> &VolumeKeys {
        &self.keys
    }

    fn append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError> {
        let shared = self.shared();
        // What is about to be replaced acknowledges nothing more.
        self.check_stays()?;
        check_append(shared.promised, frame.epoch(), told)?;
        let log = shared.log.as_ref().ok_or_else(|| ReplicaError::Storage("no log".to_owned()))?;
        Ok(append_copy(&**log, frame)?)
    }

    fn data(&self) -> watch::Receiver<Lsn> {
        self.data.subscribe()
    }

    fn history(&self) -> Option<Arc<dyn Log>> {
        self.log().map(|log| log as Arc<dyn Log>)
    }

    fn promised(&self) -> Option<Epoch> {
        self.shared().promised
    }

    fn promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError> {
        let log = {
            let mut shared = self.shared();
            let held = shared.log.as_ref().map(|log| log.tail().position.epoch);
            check_promise(shared.promised, held, epoch)?;
            if shared.promised != Some(epoch) {
                promise::save(&self.directory, epoch).map_err(|error| storage(&error))?;
                shared.promised = Some(epoch);
            }
            shared.log.clone()
        };
        let Some(log) = log else { return Ok(None) };
        let tail = log.tail().position.lsn;
        let durable = log.durable().wait_blocking(tail, DURABLE_MAX);
        durable.map(Some).map_err(|error| ReplicaError::Ended(error.to_string()))
    }

    fn begin_seed(&self, state: State) -> Result<Box<dyn SeedWriter>, ReplicaError> {
        let mut shared = self.shared();
        self.check_stays()?;
        shared.check_open()?;
        shared.give_up_seed();
        // Under the lock: one that is begun later must not lose its file by this.
        let made = begin_file(&self.directory, shared.seed);
        let (file, path) = made.map_err(|error| storage(&error))?;
        Ok(Box::new(Seed {
            file,
            path,
            state,
            number: shared.seed,
            replaces: shared.tail(),
            directory: self.directory.clone(),
            keys: self.keys.clone(),
            branch: self.branch,
            shared: Arc::clone(&self.shared),
            ordering: Arc::clone(&self.ordering),
            restart: Arc::clone(&self.restart),
        }))
    }

    fn set_aside(&self, ancestor: Point, tail: Position) -> Result<(), ReplicaError> {
        let _ordering = lock(&self.ordering);
        let mut shared = self.shared();
        shared.check_open()?;
        shared.give_up_seed();
        let held = shared.log.clone().filter(|log| log.tail().position == tail);
        let log = held.filter(|_| self.restart.borrow().is_none());
        let log = log.ok_or_else(|| ReplicaError::Storage("what is held has changed".to_owned()))?;
        let kept = order_beginning(&self.directory, &log, (ancestor, tail), *self.data.borrow());
        let kept = kept.map_err(|error| storage(&error))?;
        let why = format!("its history differs from the source's: kept {kept}");
        if shared.in_use {
            self.restart.send_replace(Some(why));
            return Ok(());
        }
        tracing::warn!("{why}");
        drop(log);
        shared.settled(&self.directory, &self.restart)
    }
}

impl Shared {
    fn check_open(&self) -> Result<(), ReplicaError> {
        match self.closed {
            true => Err(ReplicaError::Storage("this node takes over, and keeps what it holds".to_owned())),
            false => Ok(()),
        }
    }

    /// Where the log ends, if there is one.
    fn tail(&self) -> Option<Position> {
        self.log.as_ref().map(|log| log.tail().position)
    }

    /// A snapshot that is arriving takes the place of nothing any more.
    fn give_up_seed(&mut self) {
        self.seed += 1;
    }

    /// Lets what was ordered come about, where no volume is open above the log.
    fn settled(
        &mut self,
        directory: &Path,
        restart: &watch::Sender<Option<String>>,
    ) -> Result<(), ReplicaError> {
        let was_held = self.log.take().is_some();
        let opened = settle(directory, &self.config).and_then(|()| open_log(directory, &self.config));
        match opened {
            Ok(log) => self.log = Some(Arc::new(log)),
            Err(error) => {
                if was_held {
                    restart.send_replace(Some(format!(
                        "what was to take the place of its log is not there: {error}"
                    )));
                }
                return Err(storage(&error));
            }
        }
        Ok(())
    }
}

/// A snapshot that is arriving.
struct Seed {
    file: File,
    path: PathBuf,
    state: State,
    number: u64,
    /// Where the log ended, if there was one, when it began to arrive.
    replaces: Option<Position>,
    directory: PathBuf,
    keys: VolumeKeys,
    branch: BranchId,
    shared: Arc<Mutex<Shared>>,
    ordering: Arc<Mutex<()>>,
    restart: Arc<watch::Sender<Option<String>>>,
}

impl Seed {
    /// Whether it may take the place of what `shared` holds, which may have followed somebody else since, or taken over.
    fn check_counts(&self, shared: &Shared) -> Result<(), ReplicaError> {
        shared.check_open()?;
        match shared.seed == self.number && shared.tail() == self.replaces && self.restart.borrow().is_none()
        {
            true => Ok(()),
            false => Err(ReplicaError::Storage(format!(
                "the snapshot of lsn {} was given up before it was complete: something else has come since",
                self.state.position.lsn
            ))),
        }
    }
}

impl SeedWriter for Seed {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ReplicaError> {
        self.file.write_all_at(bytes, offset).map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull => ReplicaError::NoSpace(error.to_string()),
            _ => storage(&error),
        })
    }

    fn finish(self: Box<Self>, bytes: u64) -> Result<State, ReplicaError> {
        let bad = |what: &dyn std::fmt::Display| ReplicaError::BadSnapshot(what.to_string());
        let found = self.file.metadata().map_err(|error| storage(&error))?.len();
        if found != bytes {
            return Err(bad(&format!("{found} bytes where {bytes} belong")));
        }
        self.file.sync_all().map_err(|error| storage(&error))?;
        // By now its name may be gone, with what was given up.
        let verified = verify_snapshot(BufReader::with_capacity(BUFFER_BYTES, &self.file), &|_| {});
        let header = verified.map_err(|error| bad(&error))?.header;
        if header.volume != self.keys.volume() || header.branch != self.branch {
            return Err(bad(&format!("it is of volume {}, branch {}", header.volume, header.branch)));
        }
        if header.state != self.state {
            return Err(bad(&format!("it holds {}", header.state.position)));
        }
        let ready = seed_file(&self.directory, SEED_READY);
        let ordering = Arc::clone(&self.ordering);
        let _ordering = lock(&ordering);
        // Not the lock that whoever talks to the source asks for often: files are written here.
        let config = {
            let shared = lock(&self.shared);
            self.check_counts(&shared)?;
            shared.config.clone()
        };
        if let Some(tail) = self.replaces {
            // It may not be known whether that is part of the same history: it is kept.
            let ordered = order_snapshot(&self.directory, &config, self.state, tail);
            ordered.map_err(|error| storage(&error))?;
        }
        let mut shared = lock(&self.shared);
        self.check_counts(&shared)?;
        // From here on the snapshot is what the node holds; before, all is as it was, and the order counts for nothing.
        rename_durably(&OsFiles, &self.path, &ready).map_err(|error| storage(&error))?;
        if shared.in_use {
            self.restart.send_replace(Some("a snapshot has replaced what it held".to_owned()));
            return Err(ReplicaError::Storage("the node begins anew with the snapshot".to_owned()));
        }
        shared.settled(&self.directory, &self.restart)?;
        Ok(self.state)
    }
}

/// Makes the file for a snapshot, in the place of all that were begun before.
fn begin_file(directory: &Path, number: u64) -> io::Result<(File, PathBuf)> {
    let path = seed_file(directory, &format!("{PARTIAL}-{number}"));
    let folder = path.parent().unwrap_or(directory);
    OsFiles.create_dir(folder)?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
            fs::remove_file(entry.path())?;
        }
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    Ok((file, path))
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change of it is one assignment.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn storage(error: &dyn std::fmt::Display) -> ReplicaError {
    ReplicaError::Storage(error.to_string())
}

const PARTIAL: &str = "seed.partial";
const DURABLE_MAX: Duration = Duration::from_secs(60);
const BUFFER_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;
