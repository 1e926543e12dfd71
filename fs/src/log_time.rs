//! Log time: the wall clock, made monotone and guarded against steps.
//!
//! Whoever writes data asks for the time as often as whoever sequences entries, and not in the critical section: no lock is taken here.
//!
//! Invariants:
//! - Never runs backwards, whoever asks, not across restarts either: it begins at the last entry's time, and what is given is no earlier
//!   than anything that was given before the question.
//! - Never stands still: while the wall clock is behind what was given before, time goes on at half speed until the wall clock has caught
//!   up. Frames are closed and ticks are due by log time.
//! - Log time that is more than [`APART_MAX`] away from the wall clock, in either direction, is told once, and once more when it is not any more.
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
    /// Whether log time and the wall clock were further apart than they should be, when time was given last.
    apart: AtomicBool,
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
            apart: AtomicBool::new(false),
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
        let time = self.last.fetch_max(time, Ordering::AcqRel).max(time);
        let apart = time.abs_diff(wall) > APART_MAX.as_nanos() as u64;
        if apart != self.apart.load(Ordering::Relaxed) {
            self.report_apart(apart, time, wall);
        }
        LogTime::from_nanos(time)
    }

    /// How far log time would be ahead of the wall clock if it were asked for now; negative if it is behind. Whole milliseconds. Nothing is given.
    pub(crate) fn ahead_ms(&self) -> i64 {
        let (wall, monotonic) = (self.clock.wall().as_nanos(), nanos(self.clock.monotonic()));
        let expected = monotonic.wrapping_add(self.ahead.load(Ordering::Relaxed));
        let stepped = wall.abs_diff(expected) > nanos(STEP_LIMIT);
        let time = if stepped { expected } else { wall };
        let ahead = i128::from(time.max(self.last.load(Ordering::Acquire))) - i128::from(wall);
        i64::try_from(ahead / NANOS_PER_MS).unwrap_or(i64::MAX)
    }

    fn report_step(&self, stepped: bool, off: Duration) {
        if !self.stepped.swap(stepped, Ordering::Relaxed) && stepped {
            let seconds = off.as_secs();
            tracing::warn!(seconds, "the wall clock stepped; entries follow the monotonic clock");
        }
    }

    fn report_apart(&self, apart: bool, time: u64, wall: u64) {
        if self.apart.swap(apart, Ordering::Relaxed) == apart {
            return;
        }
        let seconds = Duration::from_nanos(time.abs_diff(wall)).as_secs();
        match (apart, time > wall) {
            (true, true) => tracing::warn!(
                seconds,
                "log time is ahead of the wall clock: it never runs backwards, and goes on at half speed until the two agree; --at means log time"
            ),
            (true, false) => tracing::warn!(
                seconds,
                "log time is behind the wall clock, which stepped: it follows the monotonic clock until this node is started again; --at means log time"
            ),
            (false, _) => tracing::info!("log time and the wall clock agree again"),
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
/// Log time that is further from the wall clock than this is told.
const APART_MAX: Duration = Duration::from_secs(60);
const NANOS_PER_MS: i128 = 1_000_000;

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

    /// The fear: a source that was once started with a clock a year ahead dates its log so for two years, and nobody is told.
    #[test]
    fn a_log_time_away_from_the_wall_clock_is_told_while_it_lasts() {
        let start = LogTime::from_nanos(1_700_000_000_000_000_000);
        let minute = Duration::from_secs(60);
        for (before, is_apart) in [(60, false), (61, true), (31_536_000, true)] {
            let manual = Arc::new(ManualClock::new(start));
            let before = start.after(Duration::from_secs(before));
            let clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, before);
            assert_eq!(clock.ahead_ms(), i64::try_from(before.since(start).as_millis()).unwrap());
            clock.now();
            assert_eq!(clock.apart.load(Ordering::Relaxed), is_apart, "at the start");
        }
        let manual = Arc::new(ManualClock::new(start));
        let clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start);
        let apart = || {
            clock.now();
            (clock.apart.load(Ordering::Relaxed), clock.ahead_ms())
        };
        assert_eq!(apart(), (false, 0));
        manual.step_wall(start.after(60 * minute));
        assert_eq!(apart(), (true, -3_600_000), "it follows the monotonic clock");
        manual.step_wall(start);
        assert_eq!(apart(), (false, 0));
        manual.step_wall(LogTime::from_nanos(start.as_nanos() - 120 * 1_000_000_000));
        assert_eq!(apart(), (true, 120_000), "it never runs backwards");
        manual.advance(minute);
        assert_eq!(apart(), (true, 90_000), "and waits for the wall clock, at half speed");
        manual.advance(minute);
        assert_eq!(apart(), (false, 60_000));
        manual.step_wall(LogTime::default());
        assert!(apart().0);
    }

    /// The fear: a machine sleeps for an hour, its monotonic clock with it, and everything that it writes then is dated an hour too early, so that it
    /// looks silent although it ships.
    #[test]
    fn log_time_keeps_up_after_a_suspend_that_the_monotonic_clock_counts() {
        let start = LogTime::from_nanos(1_700_000_000_000_000_000);
        let manual = Arc::new(ManualClock::new(start));
        let clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start);
        let hour = Duration::from_secs(3600);
        manual.advance(hour);
        assert_eq!((clock.now(), clock.ahead_ms()), (start.after(hour), 0));
        // A clock that does not count it: the wall clock seems to step, and log time stays behind.
        manual.step_wall(start.after(2 * hour));
        assert_eq!((clock.now(), clock.ahead_ms()), (start.after(hour), -3_600_000));
    }

    /// The fear: what continues a log whose clock was ahead dates its first entries before the last ones of that log.
    #[test]
    fn nothing_is_dated_before_the_log_that_is_continued() {
        let start = LogTime::from_nanos(1_700_000_000_000_000_000);
        let manual = Arc::new(ManualClock::new(start));
        let clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start);
        let year = Duration::from_secs(31_536_000);
        clock.not_before(start.after(year));
        manual.advance(Duration::from_secs(10));
        assert_eq!(clock.now(), start.after(year + Duration::from_secs(5)));
    }
}
