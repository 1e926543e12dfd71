//! Log time: the wall clock, made monotone and guarded against steps.
//!
//! Invariants:
//! - Never runs backwards, not across restarts either: it begins at the last entry's time.
//! - Never stands still: while the wall clock is behind what was given before, time goes on at half speed until the wall clock has caught
//!   up. Frames are closed and ticks are due by log time.
//! - A wall clock that moves more than [`STEP_LIMIT`] against the monotonic clock is reported once and then not believed: time goes on
//!   with the monotonic clock until the two agree again.

use std::{sync::Arc, time::Duration};

use murphy_log::{Clock, LogTime};

/// Gives entries their time.
#[derive(Debug)]
pub(crate) struct LogClock {
    clock: Arc<dyn Clock>,
    last: LogTime,
    /// A moment at which both clocks were read and believed.
    wall: LogTime,
    monotonic: Duration,
    /// The monotonic clock when time was given last.
    given: Duration,
    stepped: bool,
}

impl LogClock {
    /// A clock that begins no earlier than `last`.
    pub(crate) fn new(clock: Arc<dyn Clock>, last: LogTime) -> LogClock {
        let (wall, monotonic) = (clock.wall(), clock.monotonic());
        LogClock { clock, last, wall, monotonic, given: monotonic, stepped: false }
    }

    /// The time of the next entry.
    pub(crate) fn now(&mut self) -> LogTime {
        let (wall, monotonic) = (self.clock.wall(), self.clock.monotonic());
        let expected = self.wall.after(monotonic.saturating_sub(self.monotonic));
        let off = wall.since(expected).max(expected.since(wall));
        let time = if off > STEP_LIMIT { expected } else { wall };
        if off > STEP_LIMIT && !self.stepped {
            tracing::warn!(
                seconds = off.as_secs(),
                "the wall clock stepped; entries follow the monotonic clock"
            );
        }
        self.stepped = off > STEP_LIMIT;
        if !self.stepped {
            (self.wall, self.monotonic) = (wall, monotonic);
        }
        let slow = self.last.after(monotonic.saturating_sub(self.given) / 2);
        self.given = monotonic;
        self.last = if time >= self.last { time } else { slow };
        self.last
    }

    /// Gives no time before `moment` any more.
    pub(crate) fn not_before(&mut self, moment: LogTime) {
        self.last = self.last.max(moment);
    }

    /// The wall clock as it is, for a frame's header.
    pub(crate) fn wall(&self) -> LogTime {
        self.clock.wall()
    }
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
        let mut clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start);
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
        let mut clock =
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
        let mut clock = LogClock::new(Arc::clone(&manual) as Arc<dyn Clock>, start);
        let minute = Duration::from_secs(60);
        manual.step_wall(LogTime::from_nanos(start.as_nanos() - 4 * 60 * 1_000_000_000));
        for passed in 1..=6_u32 {
            manual.advance(minute);
            assert_eq!(clock.now(), start.after(minute * passed / 2));
        }
        manual.advance(3 * minute);
        assert_eq!(clock.now(), start.after(5 * minute), "with the wall clock again");
    }
}
