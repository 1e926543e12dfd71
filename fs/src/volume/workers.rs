//! The threads of a volume: one closes frames and appends ticks, one applies generations; while the volume follows a source, one shows
//! what has become durable in its log. Where work is done in place they are tasks.
//!
//! Invariants:
//! - Each thread ends when the last volume goes, and is waited for.
//! - Observers hear of an entry before it is shown, and again after.

mod in_place;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use murphy_log::{Frame, Lsn};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use self::in_place::Tasks;
use crate::{
    Index,
    applier::Applier,
    changes::Observers,
    sequencer::{FollowError, Sequencer},
};

/// Running threads; dropping this stops them.
pub(super) struct Workers {
    stop: Arc<AtomicBool>,
    sequencer: Arc<Sequencer>,
    threads: Vec<JoinHandle<()>>,
    /// Instead of threads, where work is done in place.
    tasks: Option<Tasks>,
    follower: Mutex<Option<Follower>>,
    observers: Arc<Observers>,
}

/// What shows what has become durable.
enum Follower {
    Thread { stop: Arc<AtomicBool>, thread: JoinHandle<()> },
    Task(tokio::task::JoinHandle<()>),
}

impl Workers {
    pub(super) fn start(
        runtime: &Handle,
        sequencer: &Arc<Sequencer>,
        index: &Arc<dyn Index>,
    ) -> io::Result<Workers> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut workers = Workers {
            stop: Arc::clone(&stop),
            sequencer: Arc::clone(sequencer),
            threads: Vec::new(),
            tasks: None,
            follower: Mutex::default(),
            observers: Arc::default(),
        };
        if murphy_log::works_in_place() {
            workers.tasks = Some(Tasks::start(runtime, sequencer, index));
            return Ok(workers);
        }
        let (closer, closing) = (Arc::clone(sequencer), Arc::clone(&stop));
        workers.spawn("murphy-frames", move || {
            while !closing.load(Ordering::Relaxed) {
                let idle = closer.step();
                closer.wait_for_work(idle);
            }
        })?;
        let applier = Applier::new(Arc::clone(sequencer), Arc::clone(index));
        workers.spawn("murphy-applier", move || applier.run(&stop))?;
        Ok(workers)
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(thread::Builder::new().name(name.to_owned()).spawn(body)?);
        Ok(())
    }

    /// Begins to show every entry that becomes durable in the log, whoever appends it.
    pub(super) fn follow(&self) -> io::Result<()> {
        let mut follower = self.follower.lock();
        if follower.is_some() {
            return Ok(());
        }
        if let Some(tasks) = &self.tasks {
            *follower = Some(Follower::Task(tasks.follow(&self.sequencer, &self.observers)));
            return Ok(());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (sequencer, stopping) = (Arc::clone(&self.sequencer), Arc::clone(&stop));
        let observers = Arc::clone(&self.observers);
        let thread = thread::Builder::new().name("murphy-follow".to_owned()).spawn(move || {
            if let Err(error) = show_durable(&sequencer, &observers, &stopping) {
                sequencer.fail(format!("the log cannot be followed: {error}"));
            }
        })?;
        *follower = Some(Follower::Thread { stop, thread });
        Ok(())
    }

    /// Who hears of what is shown.
    pub(super) fn observers(&self) -> &Arc<Observers> {
        &self.observers
    }

    /// Shows what is durable by now and stops following.
    pub(super) fn stop_following(&self) {
        match self.follower.lock().take() {
            Some(Follower::Thread { stop, thread }) => {
                stop.store(true, Ordering::Relaxed);
                // A thread that panicked has said so; there is nobody left to tell.
                let _panicked = thread.join();
            }
            Some(Follower::Task(task)) => {
                task.abort();
                if let Err(error) = show_frames(&self.sequencer, &self.observers) {
                    self.sequencer.fail(format!("the log cannot be followed: {error}"));
                }
            }
            None => {}
        }
    }

    /// Returns when the index has everything up to `lsn`, which must be sealed; waits at most `patience`. At once if its disk is full,
    /// since the log has it.
    pub(super) fn wait_indexed(&self, lsn: Lsn, patience: Duration) -> Result<(), String> {
        let mut waited = Duration::ZERO;
        while self.sequencer.view().indexed() < lsn && self.sequencer.oldest_sealed().is_some() {
            if let Some(reason) = self.sequencer.ended() {
                return Err(reason);
            }
            if waited >= patience {
                return Err(format!("not at lsn {lsn} in time"));
            }
            if !self.sequencer.has_index_room() {
                return Ok(());
            }
            match &self.tasks {
                Some(tasks) => drop(tasks.apply()?),
                None => thread::sleep(POLL),
            }
            waited += POLL;
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop_following();
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It may have looked just before it was told, and be about to wait.
            while !thread.is_finished() {
                self.sequencer.wake();
                thread::sleep(STOP_POLL);
            }
            // A thread that panicked has said so; there is nobody left to tell.
            let _panicked = thread.join();
        }
    }
}

/// Shows durable frames in order, until `stop` and the durable end.
fn show_durable(sequencer: &Sequencer, observers: &Observers, stop: &AtomicBool) -> Result<(), FollowError> {
    let durable = sequencer.log().durable();
    let mut frames = sequencer.log().read(sequencer.state().position.lsn.next())?;
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        for frame in frames.by_ref() {
            let frame = frame?;
            while sequencer.is_full() && !stop.load(Ordering::Relaxed) {
                thread::sleep(POLL);
            }
            show(sequencer, observers, &frame)?;
        }
        if stopping {
            return Ok(());
        }
        // Whether it came or not, the frames say what is there.
        let _reached = durable.wait_blocking(sequencer.state().position.lsn.next(), FOLLOW_WAIT);
    }
}

/// Shows the frames that are durable now.
fn show_frames(sequencer: &Sequencer, observers: &Observers) -> Result<(), FollowError> {
    for frame in sequencer.log().read(sequencer.state().position.lsn.next())? {
        show(sequencer, observers, &frame?)?;
    }
    Ok(())
}

fn show(sequencer: &Sequencer, observers: &Observers, frame: &Frame) -> Result<(), FollowError> {
    let entries = frame.entries()?;
    observers.announce(&entries);
    sequencer.follow(frame, &entries)?;
    observers.tell(&entries);
    Ok(())
}

/// How long a follower waits before it looks whether to stop.
const FOLLOW_WAIT: Duration = Duration::from_millis(50);
const POLL: Duration = Duration::from_millis(2);
const STOP_POLL: Duration = Duration::from_micros(200);
