//! Time, injected: the only place where the ambient clocks may be read.
//!
//! Invariants:
//! - Log time never runs backwards within a branch, whatever the wall clock does; the sequencer sees to it.
//! - A machine that was suspended has lost no monotonic time, where the system can tell: log time keeps up, and whoever was not heard of meanwhile
//!   was silent for as long.
//! - Everything else takes a [`Clock`] or a moment as an argument, so that a simulation can own time.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A moment of log time: nanoseconds since 1970-01-01T00:00:00Z, monotone within a branch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogTime(u64);

impl LogTime {
    /// The moment this many nanoseconds after the Unix epoch.
    pub const fn from_nanos(nanos: u64) -> LogTime {
        LogTime(nanos)
    }

    /// Nanoseconds since the Unix epoch.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The moment `duration` later.
    #[must_use]
    pub fn after(self, duration: Duration) -> LogTime {
        LogTime(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this moment is; zero if it is before.
    pub fn since(self, earlier: LogTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The nine bytes by which rows name a time, ordered as the times are: five big-endian bytes of the seconds since
    /// the Unix epoch plus 2^39 (so that rows can name times before 1970), four big-endian bytes of nanoseconds.
    pub fn row_bytes(self) -> [u8; 9] {
        let seconds = (self.0 / NANOS_PER_SECOND + ROW_SECONDS_BIAS).to_be_bytes();
        // The remainder is below 10^9 and fits four bytes.
        let nanos = (self.0 % NANOS_PER_SECOND).to_be_bytes();
        let mut bytes = [0; 9];
        bytes[..5].copy_from_slice(&seconds[3..]);
        bytes[5..].copy_from_slice(&nanos[4..]);
        bytes
    }
}

impl fmt::Debug for LogTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogTime({}.{:09})", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

/// A source of time.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The wall clock. It may step in either direction.
    fn wall(&self) -> LogTime;
    /// Time since an arbitrary start. It never runs backwards and does not step; of the operating system it counts while the machine is
    /// suspended, too, where the system has a clock that does (on Linux).
    fn monotonic(&self) -> Duration;
}

/// The clocks of the operating system.
#[derive(Debug)]
pub struct SystemClock {
    start: Duration,
}

impl SystemClock {
    /// A clock whose monotonic time begins now.
    pub fn new() -> SystemClock {
        SystemClock { start: since_boot() }
    }
}

impl Default for SystemClock {
    fn default() -> SystemClock {
        SystemClock::new()
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock that the others are told to use")]
    fn wall(&self) -> LogTime {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        LogTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    fn monotonic(&self) -> Duration {
        since_boot().saturating_sub(self.start)
    }
}

/// Time since the machine was started, also while it was suspended.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // Neither is negative: this clock begins at zero.
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Time since the machine was started, as far as the system counts it.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// A clock that moves only when told to; for tests and simulations.
#[derive(Debug, Default)]
pub struct ManualClock {
    wall: AtomicU64,
    monotonic: AtomicU64,
}

impl ManualClock {
    /// A clock whose wall time is `wall` and whose monotonic time is zero.
    pub fn new(wall: LogTime) -> ManualClock {
        ManualClock { wall: AtomicU64::new(wall.0), monotonic: AtomicU64::new(0) }
    }

    /// Lets `duration` pass on both clocks.
    pub fn advance(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.wall.fetch_add(nanos, Ordering::SeqCst);
        self.monotonic.fetch_add(nanos, Ordering::SeqCst);
    }

    /// Steps the wall clock alone, as an administrator or NTP would.
    pub fn step_wall(&self, to: LogTime) {
        self.wall.store(to.0, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> LogTime {
        LogTime(self.wall.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_nanos(self.monotonic.load(Ordering::SeqCst))
    }
}

const NANOS_PER_SECOND: u64 = 1_000_000_000;
/// What rows add to the seconds of a time.
const ROW_SECONDS_BIAS: u64 = 1 << 39;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: a machine that was suspended for an hour has a log that is an hour late until the node is started again.
    #[test]
    #[cfg(target_os = "linux")]
    fn the_monotonic_clock_counts_what_the_machine_slept() {
        let boot = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
            Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap())
        };
        let before = boot();
        let clock = SystemClock::new();
        let (first, between) = (clock.monotonic(), boot());
        // It began between the two readings, and is the same clock.
        assert!(clock.start >= before && clock.start + first <= between);
        assert!(clock.monotonic() >= first);
    }
}
