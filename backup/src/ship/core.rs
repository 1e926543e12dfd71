//! The decisions of shipping, without any I/O: what becomes a slot and when, and what its fate means.
//!
//! Invariants:
//! - Slots are cut in order, several may be under way, and they are acknowledged in the order of their names.
//! - Nothing is cut beyond what is durable: only frames that were read from the log get here.
//! - A slot that was adopted makes everything cut behind it void; it is cut anew from there.
//! - Before anything of this process is archived one slot is under way alone.
//! - After an end nothing more happens.

use std::{collections::VecDeque, time::Duration};

use murphy_fs::Sealed;
use murphy_log::{Epoch, Frame, LogTime, Lsn, Position};

use crate::{slot::end_time, strays::Stray, walk::Boundary};

/// What has to be done.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// Read frames from `from` on, about `bytes` of them.
    Read { from: Lsn, bytes: usize },
    /// Do this and tell the outcome.
    Start(Job),
    /// The archive holds everything up to here: remember it, then tell whoever waits.
    Archived { boundary: Boundary, time: Option<LogTime> },
}

/// A slot to create.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) id: u64,
    /// Where the slot goes.
    pub(crate) at: Boundary,
    pub(crate) work: Work,
}

#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// Create the slot of these frames, their packs first.
    Ship(Vec<Frame>),
    /// End the epoch: the next frame of the log is of this one.
    Seal(Epoch),
}

/// What became of a job.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// The object is there, and counts.
    Done,
    /// The name holds a slot of the same history that ends here.
    Adopted(Position, LogTime),
    /// The name holds a slot that was given up: the next name of its place is used.
    Abandoned,
    /// Try again later.
    Failed(String),
    /// Shipping is over.
    Ended(ShipEnd),
}

/// Why shipping ended for good.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShipEnd {
    /// Another source has taken over.
    #[error("fenced: sealed at {} by node {}, which began epoch {}", .0.base, .0.by, .0.next)]
    Fenced(Sealed),
    /// The archive was given up when this source took over, and somebody has sealed it for an epoch that does not come behind this source's, and perhaps
    /// written there since: it is lost to the source, which nobody has replaced by that.
    #[error("sealed at {} by node {}, which began epoch {}", .0.base, .0.by, .0.next)]
    Lost(Sealed),
    /// The archive holds another history: another source ships to it.
    #[error(
        "{url} holds another history from lsn {lsn} on: another source ships to it, or this one has gone back to an earlier state"
    )]
    Forked {
        /// The archive.
        url: String,
        /// The first LSN that differs.
        lsn: Lsn,
    },
    /// The archive holds entries that this log does not have: they must be fetched before anything is appended.
    #[error("{url} holds entries up to {}, this log ends at {log}", .held.position)]
    Ahead {
        /// The archive.
        url: String,
        /// Where the archive ends.
        held: Boundary,
        /// Where the log ends.
        log: Position,
    },
    /// The archive holds what neither this log has nor anything leads to. See [`crate::strays()`].
    #[error(
        "{stray}, which this log does not have and nothing leads to (the archive ends before, at lsn {archived}; the log at lsn {log}): \
         this node has lost what it had archived, or a copy of it has shipped"
    )]
    Stray {
        /// The object that goes furthest.
        stray: Stray,
        /// Where the archive's chain ends.
        archived: Lsn,
        /// Where the log ends.
        log: Lsn,
    },
    /// Somebody may have taken over, and nobody can read who. See [`crate::strays()`].
    #[error(
        "{object} may be the seal of a node that has taken over, and cannot be read ({reason}): nothing is shipped there or acknowledged through it"
    )]
    BrokenSeal {
        /// The object.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What comes next for the archive was trimmed from the log, or deleted from the archive by others.
    #[error("{url} cannot be continued from lsn {lsn}: {reason}")]
    Gap {
        /// The archive.
        url: String,
        /// What would come next.
        lsn: Lsn,
        /// Why it is gone.
        reason: String,
    },
    /// The log ended; everything durable in it is archived.
    #[error("the log has ended")]
    LogEnded,
    /// As much as was asked for is archived.
    #[error("done")]
    Reached,
}

impl ShipEnd {
    /// Whether it shows that another source writes, or has written, what this one did not.
    pub fn shows_another_source(&self) -> bool {
        match self {
            ShipEnd::Fenced(_)
            | ShipEnd::Forked { .. }
            | ShipEnd::Ahead { .. }
            | ShipEnd::Stray { .. }
            | ShipEnd::BrokenSeal { .. } => true,
            ShipEnd::Lost(_) | ShipEnd::Gap { .. } | ShipEnd::LogEnded | ShipEnd::Reached => false,
        }
    }
}

/// How slots are cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShipLimits {
    /// A slot is cut when its frames have so many bytes.
    pub slot_bytes: usize,
    /// A slot is cut when its first frame has waited so long.
    pub slot_age: Duration,
    /// So many slots are under way at once.
    pub in_flight: usize,
}

impl Default for ShipLimits {
    fn default() -> ShipLimits {
        ShipLimits { slot_bytes: 4 << 20, slot_age: Duration::from_millis(800), in_flight: 4 }
    }
}

/// The state of shipping.
#[derive(Debug)]
pub(crate) struct Core {
    limits: ShipLimits,
    /// What the archive holds.
    archived: Boundary,
    /// Behind everything cut so far.
    cut: Boundary,
    /// Behind everything read so far.
    read: Position,
    durable: Lsn,
    is_reading: bool,
    /// When the log is read again, after it could not be.
    read_again: Option<Duration>,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
    flights: VecDeque<Flight>,
    next_id: u64,
    /// Whether a slot of ours has been archived since the start.
    is_proven: bool,
    wanted: Lsn,
    /// Since when something durable has not been read.
    unread_since: Option<Duration>,
    error: Option<String>,
    end: Option<ShipEnd>,
}

/// A frame that was read and not cut.
#[derive(Debug)]
struct Pending {
    frame: Frame,
    /// When it was closed, on the monotonic clock; negative ages are cut to the start of the clock.
    since: Duration,
}

#[derive(Debug)]
struct Flight {
    job: Job,
    end: Boundary,
    time: Option<LogTime>,
    since: Duration,
    attempts: u32,
    state: FlightState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FlightState {
    Running,
    Waiting(Duration),
    Done,
}

impl Core {
    /// The archive holds everything up to `archived`, which the log has too; it is durable up to `durable`.
    pub(crate) fn new(limits: ShipLimits, archived: Boundary, durable: Lsn) -> Core {
        let slot_bytes = limits.slot_bytes.min(SLOT_BYTES_LIMIT);
        let in_flight = limits.in_flight.max(1);
        Core {
            limits: ShipLimits { slot_bytes, in_flight, ..limits },
            archived,
            cut: archived,
            read: archived.position,
            durable,
            is_reading: false,
            read_again: None,
            pending: VecDeque::new(),
            pending_bytes: 0,
            flights: VecDeque::new(),
            next_id: 0,
            is_proven: false,
            wanted: Lsn::default(),
            unread_since: None,
            error: None,
            end: None,
        }
    }

    /// The log is durable up to `lsn`.
    pub(crate) fn durable(&mut self, lsn: Lsn) {
        self.durable = self.durable.max(lsn);
    }

    /// Somebody waits for `lsn`.
    pub(crate) fn wanted(&mut self, lsn: Lsn) {
        self.wanted = self.wanted.max(lsn);
    }

    /// The answer to [`Action::Read`].
    pub(crate) fn frames(&mut self, frames: Vec<Frame>, now: Duration, wall: LogTime) {
        self.is_reading = false;
        if self.read_again.take().is_some() {
            self.error = None;
        }
        for frame in frames {
            // What was asked for before an adoption may come after it.
            if frame.header().follows(&self.read).is_err() {
                break;
            }
            self.read = frame.position();
            self.pending_bytes += frame.bytes().len();
            let age = wall.since(frame.header().wall_time);
            self.pending.push_back(Pending { frame, since: now.saturating_sub(age) });
        }
    }

    /// The answer to [`Action::Read`] when the log could not be read now.
    pub(crate) fn read_failed(&mut self, error: String, now: Duration) {
        self.is_reading = false;
        self.read_again = Some(now + READ_PAUSE);
        self.error = Some(error);
    }

    /// The answer to [`Action::Start`].
    pub(crate) fn outcome(&mut self, id: u64, outcome: Outcome, now: Duration) {
        let Some(at) = self.flights.iter().position(|flight| flight.job.id == id) else {
            return;
        };
        match outcome {
            Outcome::Done => self.flights[at].state = FlightState::Done,
            Outcome::Failed(error) => {
                let flight = &mut self.flights[at];
                let pause = BACKOFF_FIRST * 2u32.saturating_pow(flight.attempts.min(BACKOFF_DOUBLINGS));
                flight.attempts += 1;
                flight.state = FlightState::Waiting(now + pause.min(BACKOFF_MAX));
                self.error = Some(error);
            }
            Outcome::Abandoned => {
                let flight = &mut self.flights[at];
                flight.job.at.turn += 1;
                flight.state = FlightState::Waiting(now);
            }
            Outcome::Adopted(position, time) => self.adopt(at, position, time),
            Outcome::Ended(end) => self.finish(end),
        }
    }

    /// Ends shipping; the first end stands.
    pub(crate) fn finish(&mut self, end: ShipEnd) {
        self.end.get_or_insert(end);
    }

    /// Something that is not a job failed; it is tried again by whoever did it.
    pub(crate) fn failed(&mut self, error: String) {
        self.error = Some(error);
    }

    /// What is to be done now. Call it after every input and at [`Core::wake_at`].
    pub(crate) fn step(&mut self, now: Duration) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.end.is_some() {
            return actions;
        }
        self.acknowledge(&mut actions);
        for flight in &mut self.flights {
            if matches!(flight.state, FlightState::Waiting(at) if at <= now) {
                flight.state = FlightState::Running;
                actions.push(Action::Start(flight.job.clone()));
            }
        }
        while self.flights.len() < self.in_flight_max() {
            let Some(job) = self.cut_next(now) else { break };
            actions.push(Action::Start(job));
        }
        let has_more = self.durable > self.read.lsn;
        self.unread_since = if has_more { self.unread_since.or(Some(now)) } else { None };
        let may_read = !self.is_reading && self.read_again.is_none_or(|at| at <= now);
        if has_more && may_read && self.pending_bytes < 2 * self.limits.slot_bytes {
            self.is_reading = true;
            actions.push(Action::Read { from: self.read.lsn.next(), bytes: self.limits.slot_bytes });
        }
        actions
    }

    /// When [`Core::step`] has something to do even if nothing happens before.
    pub(crate) fn wake_at(&self) -> Option<Duration> {
        let retries = self.flights.iter().filter_map(|flight| match flight.state {
            FlightState::Waiting(at) => Some(at),
            FlightState::Running | FlightState::Done => None,
        });
        let cut = self.pending.front().filter(|_| self.flights.len() < self.in_flight_max());
        let read = self.read_again.filter(|_| !self.is_reading);
        retries.chain(cut.map(|oldest| oldest.since + self.limits.slot_age)).chain(read).min()
    }

    pub(crate) fn archived(&self) -> Boundary {
        self.archived
    }

    pub(crate) fn end(&self) -> Option<&ShipEnd> {
        self.end.as_ref()
    }

    pub(crate) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Whether everything durable is archived.
    pub(crate) fn is_idle(&self) -> bool {
        self.archived.position.lsn >= self.durable
    }

    /// How long the oldest durable entry that is not archived has existed; zero if there is none.
    pub(crate) fn lag(&self, now: Duration) -> Duration {
        let flying = self.flights.iter().find(|flight| matches!(flight.job.work, Work::Ship(_)));
        let oldest = flying.map(|flight| flight.since);
        let oldest = oldest.or(self.pending.front().map(|pending| pending.since)).or(self.unread_since);
        oldest.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// The first slot goes alone: of two sources that start at once one loses all of it, and nothing of it lies further on.
    fn in_flight_max(&self) -> usize {
        if self.is_proven { self.limits.in_flight } else { 1 }
    }

    fn acknowledge(&mut self, actions: &mut Vec<Action>) {
        while self.flights.front().is_some_and(|flight| flight.state == FlightState::Done) {
            let Some(flight) = self.flights.pop_front() else { break };
            self.archived = flight.end;
            self.is_proven = true;
            if self.flights.iter().all(|flight| flight.attempts == 0) {
                self.error = None;
            }
            actions.push(Action::Archived { boundary: flight.end, time: flight.time });
        }
    }

    /// The flight `at` found a slot that ends at `position`: those before it are unaffected, those behind it were cut wrong.
    fn adopt(&mut self, at: usize, position: Position, time: LogTime) {
        self.flights.truncate(at + 1);
        let flight = &mut self.flights[at];
        flight.end = Boundary::after(position);
        flight.time = Some(time);
        flight.state = FlightState::Done;
        self.cut = flight.end;
        self.read = position;
        self.pending.clear();
        self.pending_bytes = 0;
        self.is_reading = false;
    }

    fn cut_next(&mut self, now: Duration) -> Option<Job> {
        let oldest = self.pending.front()?;
        let (epoch, since) = (oldest.frame.epoch(), oldest.since);
        if epoch != self.cut.epoch {
            return self.seal_next(epoch, now);
        }
        let (mut count, mut bytes) = (0, 0);
        let mut is_whole = false;
        for pending in &self.pending {
            is_whole = pending.frame.epoch() != epoch || count >= FRAMES_MAX;
            if is_whole {
                break;
            }
            count += 1;
            bytes += pending.frame.bytes().len();
            is_whole = bytes >= self.limits.slot_bytes;
            if is_whole {
                break;
            }
        }
        let is_awaited = self.wanted >= self.cut.next();
        if !is_whole && !is_awaited && now.saturating_sub(since) < self.limits.slot_age {
            return None;
        }
        self.pending_bytes -= bytes;
        let frames: Vec<Frame> = self.pending.drain(..count).map(|pending| pending.frame).collect();
        let last = frames.last()?;
        let (end, time) = (Boundary::after(last.position()), Some(end_time(last)));
        Some(self.start(Work::Ship(frames), end, time, since))
    }

    /// The log goes on in a later epoch: the archive's own must be ended first, when everything of it is there.
    fn seal_next(&mut self, next: Epoch, now: Duration) -> Option<Job> {
        if !self.flights.is_empty() {
            return None;
        }
        let end = Boundary::before(self.cut.position, next);
        Some(self.start(Work::Seal(next), end, None, now))
    }

    fn start(&mut self, work: Work, end: Boundary, time: Option<LogTime>, since: Duration) -> Job {
        let job = Job { id: self.next_id, at: self.cut, work };
        self.next_id += 1;
        self.cut = end;
        let state = FlightState::Running;
        self.flights.push_back(Flight { job: job.clone(), end, time, since, attempts: 0, state });
        job
    }
}

/// A log that could not be read is read again after so long.
const READ_PAUSE: Duration = Duration::from_secs(1);
/// The pause after the first failure of a job; it doubles with each.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
const BACKOFF_DOUBLINGS: u32 = 8;
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A slot is cut when it has so many frames, however small.
const FRAMES_MAX: usize = 16 << 10;
/// Slots are not made larger than this, in bytes and before the last frame, whatever the limits say.
const SLOT_BYTES_LIMIT: usize = 16 << 20;
const _: () =
    assert!(SLOT_BYTES_LIMIT + murphy_log::MAX_FRAME_BYTES <= crate::slot::SLOT_BODY_BYTES_MAX as usize);
const _: () = assert!(FRAMES_MAX <= crate::slot::SLOT_FRAMES_MAX as usize);

#[cfg(test)]
mod tests;
