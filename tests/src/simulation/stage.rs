//! What everybody in a simulated world shares: time, chance, the trace and the judge.
//!
//! Invariants:
//! - Time is the paused clock of the runtime, chance is the seed's: nothing else decides anything.

use std::{
    collections::BTreeMap,
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use murphy_log::{Clock, LogTime};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::{Canary, judge::Judge, trace::Trace};
use crate::Random;

/// How often each kind of thing happened.
pub(super) type Tally = BTreeMap<&'static str, u64>;

/// The ground of a simulated world.
pub(super) struct Stage {
    started: Instant,
    random: Mutex<Random>,
    /// What later kinds of worlds are drawn from: those of before stay as they were.
    kinds: Mutex<Random>,
    trace: Mutex<Trace>,
    judge: Mutex<Judge>,
    violation: Mutex<Option<String>>,
    over: Notify,
    canary: Option<Canary>,
    /// Disasters that befell this world, by their kind.
    disasters: Mutex<Tally>,
    /// What else happened, small mishaps and what people did about it.
    events: Mutex<Tally>,
    /// Operations of clients, and how many fsyncs were acknowledged.
    pub(super) operations: AtomicU64,
    pub(super) acknowledged: AtomicU64,
}

impl Stage {
    pub(super) fn new(seed: u64, canary: Option<Canary>, print: bool) -> Stage {
        Stage {
            started: Instant::now(),
            random: Mutex::new(Random::new(seed)),
            kinds: Mutex::new(Random::new(seed ^ KINDS)),
            trace: Mutex::new(Trace::new(print)),
            judge: Mutex::default(),
            violation: Mutex::default(),
            over: Notify::new(),
            canary,
            disasters: Mutex::default(),
            events: Mutex::default(),
            operations: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn note(&self, what: impl AsRef<str>) {
        self.trace.lock().note(self.now(), what.as_ref());
    }

    /// A disaster of a kind: noted and counted.
    pub(super) fn disaster(&self, kind: &'static str, what: impl AsRef<str>) {
        *self.disasters.lock().entry(kind).or_default() += 1;
        self.note(format!("DISASTER {}", what.as_ref()));
    }

    /// Counts something that happened.
    pub(super) fn count(&self, event: &'static str) {
        *self.events.lock().entry(event).or_default() += 1;
    }

    /// How many disasters there were of each kind, and how often everything else happened.
    pub(super) fn tallies(&self) -> (Tally, Tally) {
        (self.disasters.lock().clone(), self.events.lock().clone())
    }

    pub(super) fn below(&self, limit: u64) -> u64 {
        self.random.lock().below(limit)
    }

    /// True once in `times`.
    pub(super) fn once_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// True for one world in `times`, drawn apart from everything else.
    pub(super) fn is_kind(&self, times: u64) -> bool {
        self.below_apart(times) == 0
    }

    /// A number below `limit`, drawn from the same stream.
    pub(super) fn below_apart(&self, limit: u64) -> u64 {
        self.kinds.lock().below(limit)
    }

    /// A duration between `least` and `most` milliseconds.
    pub(super) fn ms(&self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.below(most - least + 1))
    }

    pub(super) async fn pause(&self, least: u64, most: u64) {
        let pause = self.ms(least, most);
        tokio::time::sleep(pause).await;
    }

    pub(super) fn has(&self, canary: Canary) -> bool {
        self.canary == Some(canary)
    }

    /// Asks the judge; what it objects to ends the run.
    pub(super) fn judge<T>(&self, act: impl FnOnce(&mut Judge, Duration) -> Result<T, String>) -> Option<T> {
        let verdict = act(&mut self.judge.lock(), self.now());
        verdict.map_err(|what| self.violated(&what)).ok()
    }

    /// Ends the run: an invariant does not hold. The first one stands.
    pub(super) fn violated(&self, what: &str) {
        let mut violation = self.violation.lock();
        if violation.is_none() {
            self.note(format!("VIOLATION {what}"));
            *violation = Some(what.to_owned());
            self.over.notify_waiters();
        }
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.violation.lock().clone()
    }

    /// Returns when an invariant does not hold.
    pub(super) async fn broken(&self) {
        loop {
            let over = self.over.notified();
            tokio::pin!(over);
            over.as_mut().enable();
            if self.violation().is_some() {
                return;
            }
            over.await;
        }
    }

    pub(super) fn hash(&self) -> String {
        self.trace.lock().hash()
    }

    pub(super) fn tail(&self) -> Vec<String> {
        self.trace.lock().tail()
    }
}

/// The clocks of one node: the monotonic one is the world's, the wall clock steps when told to.
pub(super) struct NodeClock {
    started: Instant,
    /// How far the wall clock is from the world's, in milliseconds, beside [`FAST_MS`].
    step_ms: AtomicU64,
}

impl NodeClock {
    pub(super) fn new(stage: &Stage) -> NodeClock {
        NodeClock { started: stage.started, step_ms: AtomicU64::new(FAST_MS) }
    }

    /// Sets the wall clock so far from the world's.
    pub(super) fn step(&self, milliseconds: i64) {
        self.step_ms.store(FAST_MS.saturating_add_signed(milliseconds), Ordering::Relaxed);
    }
}

impl fmt::Debug for NodeClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NodeClock")
    }
}

impl Clock for NodeClock {
    fn wall(&self) -> LogTime {
        let step = Duration::from_millis(self.step_ms.load(Ordering::Relaxed));
        LogTime::from_nanos(EPOCH_NANOS).after(step + self.started.elapsed())
    }

    fn monotonic(&self) -> Duration {
        self.started.elapsed()
    }
}

/// What sets the stream of kinds apart.
const KINDS: u64 = 0x0001_08ac_0000_0000;
/// A world begins so far after the Unix epoch, less [`FAST_MS`].
const EPOCH_NANOS: u64 = 1_700_000_000_000_000_000;
/// Room to step back: ten years.
const FAST_MS: u64 = 315_360_000_000;
