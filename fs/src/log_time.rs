//! Log time: the wall clock, made monotone and guarded against steps.
//!
//! Invariants:
//! - Never runs backwards, not across restarts either: it begins at the last entry's time.
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
    stepped: bool,
}

impl LogClock {
    /// A clock that begins no earlier than `last`.
    pub(crate) fn new(clock: Arc<dyn Clock>, last: LogTime) -> LogClock {
        let (wall, monotonic) = (clock.wall(), clock.monotonic());
        LogClock { clock, last, wall, monotonic, stepped: false }
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
        self.last = self.last.max(time);
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
}
