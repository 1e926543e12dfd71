//! Log time: the wall clock, made monotone and guarded against steps.
//!
//! Whoever writes data asks for the time as often as whoever sequences entries, and not in the critical section: no lock is taken here.
//!
//! Invariants:
//! - Never runs backwards, whoever asks, not across restarts either: it begins at the last entry's time, and what is given is no earlier
//!   than anything that was given before the question.
//! - Never stands still: while the wall clock is behind what was given before, time goes on at half speed until the wall clock has caught
//!   up. Frames are closed and ticks are due by log time.
//! - A wall clock that moves more than [`STEP_LIMIT`] against the monotonic clock is reported once and then not believed: time goes on
//!   with the monotonic clock until the two agree again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use murphy_log::{Clock, LogTime};

/// Gives entries, and the bytes that are written, their time.
#[derive(Debug)]
pub(crate) struct LogClock {
    clock: Arc<dyn Clock>,
    /// The latest time given, in nanoseconds.
    last: AtomicU64,
    /// The wall clock less the monotonic one, when both were last believed; modulo 2^64, in nanoseconds.
    ahead: AtomicU64,
    /// The monotonic clock when time was given last, in nanoseconds.
    given: AtomicU64,
    stepped: AtomicBool,
}

impl LogClock {
    /// A clock that begins no earlier than `last`.
    pub(crate) fn new(clock: Arc<dyn Clock>, last: LogTime) -> LogClock {
        let (wall, monotonic) = (clock.wall().as_nanos(), nanos(clock.monotonic()));
        LogClock {
            clock,
            last: AtomicU64::new(last.as_nanos()),
            ahead: AtomicU64::new(wall.wrapping_sub(monotonic)),
            given: AtomicU64::new(monotonic),
            stepped: AtomicBool::new(false),
        }
    }

    /// The time now: no earlier than any that was given before.
    pub(crate) fn now(&self) -> LogTime {
        let (wall, monotonic) = (self.clock.wall().as_nanos(), nanos(self.clock.monotonic()));
        let expected = monotonic.wrapping_add(self.ahead.load(Ordering::Relaxed));
        let off = Duration::from_nanos(wall.abs_diff(expected));
        let stepped = off > STEP_LIMIT;
        if stepped != self.stepped.load(Ordering::Relaxed) {
            self.report_step(stepped, off);
        }
        if !stepped {
            self.ahead.store(wall.wrapping_sub(monotonic), Ordering::Relaxed);
        }
        let time = if stepped { expected } else { wall };
        // Each stretch of the monotonic clock counts for one of those who ask at the same time.
        let passed = monotonic.saturating_sub(self.given.fetch_max(monotonic, Ordering::Relaxed));
        let last = self.last.load(Ordering::Acquire);
        let time = if time >= last { time } else { last.saturating_add(passed / 2) };
        LogTime::from_nanos(self.last.fetch_max(time, Ordering::AcqRel).max(time))
    }

    fn report_step(&self, stepped: bool, off: Duration) {
        if !self.stepped.swap(stepped, Ordering::Relaxed) && stepped {
            let seconds = off.as_secs();
            tracing::warn!(seconds, "the wall clock stepped; entries follow the monotonic clock");
        }
    }

    /// Gives no time before `moment` any more.
    pub(crate) fn not_before(&self, moment: LogTime) {
        self.last.fetch_max(moment.as_nanos(), Ordering::AcqRel);
    }

    /// The wall clock as it is, for a frame's header.
    pub(crate) fn wall(&self) -> LogTime {
        self.clock.wall()
    }
}

/// 584 years of nanoseconds fit.
fn nanos(monotonic: Duration) -> u64 {
    u64::try_from(monotonic.as_nanos()).unwrap_or(u64::MAX)
}

/// A wall clock that is off by more than this is not believed.
const STEP_LIMIT: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use murphy_log::ManualClock;

    use super::*;

    #[test]
    fn a_clock_that_steps_a_year_moves_no_entry() {
        let start = LogTime::from_nanos(1_700_000_000_000_000_000);
        let manual = Arc::new(ManualClock::new(start));
        let clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start);
        let second = Duration::from_secs(1);
        for year in [Duration::from_secs(31_536_000), Duration::from_secs(3600)] {
            let before = clock.now();
            manual.step_wall(manual.wall().after(year));
            manual.advance(second);
            assert_eq!(clock.now(), before.after(second));
            manual.step_wall(before.after(second));
            manual.advance(second);
            assert_eq!(clock.now(), before.after(2 * second));
        }
    }

    #[test]
    fn small_corrections_are_followed_but_never_backwards() {
        let start = LogTime::from_nanos(1_700_000_000_000_000_000);
        let manual = Arc::new(ManualClock::new(start));
        let clock =
            LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start.after(Duration::from_millis(5)));
        assert_eq!(clock.now(), start.after(Duration::from_millis(5)));
        manual.step_wall(LogTime::from_nanos(start.as_nanos() - 1_000_000_000));
        assert_eq!(clock.now(), start.after(Duration::from_millis(5)));
        manual.advance(Duration::from_secs(2));
        assert_eq!(clock.now(), start.after(Duration::from_secs(1)));
    }

    /// The fear: no frame is closed and no tick appended for as long as the wall clock was set back.
    #[test]
    fn a_wall_clock_that_was_set_back_does_not_stop_log_time() {
        let start = LogTime::from_nanos(1_700_000_000_000_000_000);
        let manual = Arc::new(ManualClock::new(start));
        let clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start);
        let minute = Duration::from_secs(60);
        manual.step_wall(LogTime::from_nanos(start.as_nanos() - 4 * 60 * 1_000_000_000));
        for passed in 1..=6_u32 {
            manual.advance(minute);
            assert_eq!(clock.now(), start.after(minute * passed / 2));
        }
        manual.advance(3 * minute);
        assert_eq!(clock.now(), start.after(5 * minute), "with the wall clock again");
    }

    /// The fear: a write is given an earlier time than an entry that was there when it began, and its file's mtime runs backwards.
    #[test]
    fn many_who_ask_at_the_same_time_are_given_no_time_before_one_that_was_given() {
        let start = LogTime::from_nanos(1_700_000_000_000_000_000);
        let manual = Arc::new(ManualClock::new(start));
        let clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start);
        let latest = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (clock, manual, latest) = (&clock, &manual, &latest);
                scope.spawn(move || {
                    for round in 0..5_000_u64 {
                        let before = latest.load(Ordering::SeqCst);
                        let now = clock.now().as_nanos();
                        assert!(now >= before, "{now} after {before}");
                        latest.fetch_max(now, Ordering::SeqCst);
                        manual.advance(Duration::from_nanos(1 + round % 7));
                        if round % 50 == thread {
                            let back = (round % 3) * 1_000;
                            manual.step_wall(LogTime::from_nanos(start.as_nanos() + 10_000 * thread - back));
                        }
                    }
                });
            }
        });
    }
}
