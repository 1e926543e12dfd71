//! The scrub: a node that is served compares by itself, and slowly, its index with its log, and reads the log again.
//!
//! Nobody reads most rows and most frames for months. A mirror whose index has lost a row, or whose disk has lost a sector of the log, is to say
//! so while its source still lives, and not in the hour in which it is promoted.
//!
//! Invariants:
//! - It takes a tenth of one processor at most, and holds nothing that an operation, a promotion or the end of the process waits for.
//! - It changes nothing but its note, and notes only a round that came to its end.
//! - It ends before the node is given back.

use std::{
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use murphy_fs::Volume;
use murphy_log::{Clock, DiskLog, Log, Lsn, SystemClock, VolumeKeys};

use crate::{
    check::compare_index,
    config::NodeConfig,
    error::{CliError, failed},
    node::{Node, NodeOptions},
    scrub_notes::{self, ScrubNote},
    units::parse_duration,
};

/// The thread that scrubs. Dropping it ends it.
pub(super) struct Scrub {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl Scrub {
    /// Scrubs `node` from now on, a round every so often; with `every` zero, never.
    pub(super) fn start(node: &Node, every: Duration) -> Result<Scrub, CliError> {
        let stop = Arc::new(Stop::default());
        let scrubber = Scrubber {
            directory: node.directory.clone(),
            volume: node.volume.clone(),
            log: Arc::clone(&node.log),
            keys: node.keys.clone(),
            clock: SystemClock::new(),
            stop: Arc::clone(&stop),
        };
        let run = move || scrubber.run(every);
        let thread = match every {
            Duration::ZERO => None,
            _ => Some(thread::Builder::new().name("murphy-scrub".to_owned()).spawn(run).map_err(failed)?),
        };
        Ok(Scrub { stop, thread })
    }
}

impl Drop for Scrub {
    fn drop(&mut self) {
        *self.stop.asked() = true;
        self.stop.changed.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the scrub has ended in a panic");
        }
    }
}

/// Whether it is to end.
#[derive(Default)]
struct Stop {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    fn asked(&self) -> MutexGuard<'_, bool> {
        // A flag is whole after every change of it.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits so long, unless it is to end; whether it goes on.
    fn pause(&self, time: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.asked(), time, |asked| !*asked);
        let (asked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !*asked
    }
}

struct Scrubber {
    directory: PathBuf,
    volume: Volume,
    log: Arc<DiskLog>,
    keys: VolumeKeys,
    clock: SystemClock,
    stop: Arc<Stop>,
}

impl Scrubber {
    fn run(&self, every: Duration) {
        // What was damaged may have been mended by this start.
        let sound = scrub_notes::load(&self.directory).filter(|note| note.trouble().is_none());
        let age = sound.map_or(every, |note| note.age());
        // A node that has just been started has other things to do.
        let mut wait = every.saturating_sub(age).max(FIRST_AFTER.min(every));
        while self.stop.pause(wait) {
            match self.round() {
                Ok(Some(note)) => self.keep(&note),
                Ok(None) => return,
                Err(error) => tracing::error!(%error, "the scrub could not read the index"),
            }
            wait = every;
        }
    }

    /// One look at everything; `None` if it is to end first.
    fn round(&self) -> Result<Option<ScrubNote>, CliError> {
        let began = self.clock.monotonic();
        let mut pace = Pace { clock: &self.clock, stop: &self.stop, since: began };
        let compared = compare_index(&*self.volume.index_snapshot(), &self.keys, &mut || pace.go_on())?;
        let Some(index) = compared else { return Ok(None) };
        let Some(log) = self.read_log(index.lsn, &mut pace) else { return Ok(None) };
        let took = self.clock.monotonic().saturating_sub(began);
        Ok(Some(ScrubNote {
            lsn: index.lsn.get(),
            ended: self.clock.wall().as_nanos(),
            took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            index: index.differs,
            log: log.err(),
        }))
    }

    /// Reads every frame up to `last`, which checks its bytes and that it continues the one before; `None` if it is to end first.
    fn read_log(&self, last: Lsn, pace: &mut Pace<'_>) -> Option<Result<(), String>> {
        // Not from memory: what the disk has is asked for.
        let frames = match self.log.read_files(self.log.first()) {
            Ok(frames) => frames,
            Err(error) => return Some(Err(error.to_string())),
        };
        for frame in frames {
            match frame {
                Ok(frame) if frame.last() >= last => break,
                Ok(_) => {}
                Err(error) => return Some(Err(error.to_string())),
            }
            if !pace.go_on() {
                return None;
            }
        }
        Some(Ok(()))
    }

    fn keep(&self, note: &ScrubNote) {
        match note.trouble() {
            Some(trouble) => tracing::error!(trouble, "the scrub has found damage"),
            None => {
                tracing::info!(lsn = note.lsn, took_ms = note.took_ms, "index and log were compared: sound");
            }
        }
        if let Err(error) = scrub_notes::save(&self.directory, note) {
            tracing::error!(%error, "what the scrub has found is not in status");
        }
    }
}

/// Work in short turns, and nine times as much rest.
struct Pace<'a> {
    clock: &'a SystemClock,
    stop: &'a Stop,
    /// When this turn began.
    since: Duration,
}

impl Pace<'_> {
    fn go_on(&mut self) -> bool {
        let worked = self.clock.monotonic().saturating_sub(self.since);
        if worked < TURN {
            return true;
        }
        // What took long because a disk was busy is no reason to wait for minutes.
        let goes_on = self.stop.pause((worked * REST_SHARE).min(REST_MAX));
        self.since = self.clock.monotonic();
        goes_on
    }
}

/// How often a node is scrubbed.
pub(super) fn every(config: &NodeConfig, options: &NodeOptions) -> Result<Duration, CliError> {
    let configured = config.mount.scrub_every.as_deref().map(parse_duration).transpose();
    let configured = configured.map_err(|error| CliError::new(format!("murphy.toml: {error}")))?;
    Ok(options.scrub_every.or(configured).unwrap_or(EVERY))
}

/// How often, unless told otherwise.
const EVERY: Duration = Duration::from_secs(24 * 60 * 60);
const FIRST_AFTER: Duration = Duration::from_secs(10 * 60);
const TURN: Duration = Duration::from_millis(5);
const REST_SHARE: u32 = 9;
const REST_MAX: Duration = Duration::from_secs(1);
