//! Closing frames: when sequenced entries leave for the log, and what happens to those that it does not take.
//!
//! Invariants:
//! - Frames go to the log in order, each continuing the one before it; one that the log has no room for is kept and tried again.
//! - Pure but for the log: no clock, no lock, no thread. Whoever holds it is inside the critical section.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use murphy_log::{
    AppendError, Appender, Digest, Entry, Epoch, Frame, Log, LogTime, Position, PushError, Usage, WrittenRow,
};

/// The way of entries from the sequencer into the log.
pub(super) struct Frames {
    log: Arc<dyn Log>,
    /// `None` while this node follows another source.
    appender: Option<Appender>,
    /// The end of what the log has taken.
    logged: Position,
    /// Frames that the log had no room for.
    waiting: VecDeque<Frame>,
    /// When the last entry was sequenced, and whether it was a tick.
    last_entry: LogTime,
    ticking: bool,
}

/// What time it is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Due {
    /// Closing the open frame, or trying again what the log did not take.
    Close,
    /// An idle tick.
    Tick,
    /// Nothing, for so long.
    In(Duration),
}

impl Frames {
    /// The way into `log`, which ends at `logged`; its last entry is of `last_entry`.
    pub(super) fn new(log: Arc<dyn Log>, logged: Position, last_entry: LogTime) -> Frames {
        Frames { log, appender: None, logged, waiting: VecDeque::new(), last_entry, ticking: false }
    }

    /// Begins to take entries.
    pub(super) fn lead(&mut self, appender: Appender) {
        self.appender = Some(appender);
    }

    /// Takes no entries any more.
    pub(super) fn retire(&mut self) {
        self.appender = None;
    }

    /// The epoch of the entries that are taken; `None` if none are.
    pub(super) fn epoch(&self) -> Option<Epoch> {
        self.appender.as_ref().map(Appender::epoch)
    }

    /// When the last entry was sequenced.
    pub(super) fn last_entry(&self) -> LogTime {
        self.last_entry
    }

    /// Whether no entry waits to be closed.
    pub(super) fn is_empty(&self) -> bool {
        self.appender.as_ref().is_none_or(Appender::is_empty)
    }

    /// Whether the log has no room for a frame.
    pub(super) fn is_stuck(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes the next entry; `None` if this node follows another source.
    pub(super) fn push<R: WrittenRow>(
        &mut self,
        entry: &Entry<R>,
        digest: Digest,
        usage: Usage,
    ) -> Option<Result<Position, PushError>> {
        let pushed = self.appender.as_mut()?.push(entry, digest, usage);
        if pushed.is_ok() {
            (self.last_entry, self.ticking) = (entry.time, entry.kind == murphy_log::KIND_TICK);
        }
        Some(pushed)
    }

    /// Notes that the log ends at `position` by somebody else's doing, with an entry of this time.
    pub(super) fn followed(&mut self, position: Position, last_entry: LogTime) {
        (self.logged, self.last_entry) = (position, last_entry);
    }

    /// What is due at `now`.
    pub(super) fn due(&self, now: LogTime) -> Due {
        if self.is_stuck() {
            return Due::Close;
        }
        let Some(appender) = &self.appender else { return Due::In(IDLE) };
        if appender.should_close(now) {
            return Due::Close;
        }
        if let Some(due) = appender.close_due() {
            return Due::In(due.since(now).max(SHORTEST_WAIT));
        }
        let quiet = if self.ticking { TICK_INTERVAL } else { FIRST_TICK };
        let idle = now.since(self.last_entry);
        if idle < quiet { Due::In((quiet - idle).min(IDLE)) } else { Due::Tick }
    }

    /// Closes what is open and hands it to the log. An error is the end of the log; that it has no room is none.
    pub(super) fn close(&mut self, wall: LogTime) -> Result<(), AppendError> {
        let durable = self.log.durable().state().position.lsn;
        while let Some(frame) = self.appender.as_mut().and_then(|appender| appender.close(wall, durable)) {
            self.waiting.push_back(frame);
        }
        while let Some(frame) = self.waiting.front() {
            let end = frame.position();
            match self.log.append(&self.logged, frame.clone()) {
                Ok(()) => {
                    self.waiting.pop_front();
                    self.logged = end;
                }
                Err(AppendError::NoSpace { message }) => {
                    tracing::warn!(message, "the log has no room; changes are refused until it has");
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The first idle tick comes after this much quiet, ...
const FIRST_TICK: Duration = Duration::from_secs(1);
/// ... and the further ones at this interval.
const TICK_INTERVAL: Duration = Duration::from_secs(20);
/// The longest that nothing is looked at.
pub(super) const IDLE: Duration = Duration::from_millis(500);
/// The shortest wait for a frame to become old enough.
const SHORTEST_WAIT: Duration = Duration::from_micros(100);

#[cfg(test)]
mod tests {
    use murphy_log::{EpochId, Lsn, MemoryLog, State, VolumeId, VolumeKeys};

    use super::*;

    fn frames() -> (Frames, Arc<MemoryLog>) {
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([1; 16]) };
        let state = State::origin(epoch);
        let log = Arc::new(MemoryLog::new(state));
        log.claim(epoch).unwrap();
        let mut frames = Frames::new(Arc::clone(&log) as Arc<dyn Log>, state.position, at(0));
        let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
        frames.lead(Appender::new(keys, epoch, state));
        (frames, log)
    }

    fn at(millis: u64) -> LogTime {
        LogTime::from_nanos(1_700_000_000_000_000_000 + millis * 1_000_000)
    }

    fn push(frames: &mut Frames, lsn: u64, time: LogTime, kind: u8) {
        let entry = Entry { kind, ..Entry::tick(Lsn::new(lsn), time) };
        frames.push(&entry, Digest::default(), Usage::default()).unwrap().unwrap();
    }

    #[test]
    fn an_idle_source_ticks_after_a_second_and_then_every_twenty() {
        let (mut frames, _log) = frames();
        assert_eq!(frames.due(at(0)), Due::In(IDLE));
        assert_eq!(frames.due(at(999)), Due::In(Duration::from_millis(1)));
        assert_eq!(frames.due(at(1000)), Due::Tick);
        push(&mut frames, 2, at(1000), murphy_log::KIND_TICK);
        frames.close(at(1000)).unwrap();
        assert_eq!(frames.due(at(20_999)), Due::In(Duration::from_millis(1)));
        assert_eq!(frames.due(at(21_000)), Due::Tick);
        push(&mut frames, 3, at(21_000), 9);
        frames.close(at(21_000)).unwrap();
        assert_eq!(frames.due(at(22_000)), Due::Tick, "after an entry the first tick is early again");
    }

    #[test]
    fn a_frame_is_closed_when_it_is_old_whoever_waits() {
        let (mut frames, log) = frames();
        push(&mut frames, 2, at(0), 9);
        assert!(!frames.is_empty());
        assert_eq!(frames.due(at(3)), Due::In(Duration::from_millis(2)));
        assert_eq!(frames.due(at(5)), Due::Close);
        frames.close(at(5)).unwrap();
        assert!(frames.is_empty());
        assert_eq!(log.durable().state().position.lsn, Lsn::new(2));
        frames.retire();
        assert_eq!((frames.due(at(9_000)), frames.epoch()), (Due::In(IDLE), None), "a follower ticks not");
    }
}
