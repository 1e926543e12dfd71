//! What every log checks before it takes a claim, a frame or a reader.
//!
//! Invariants:
//! - The tail moves only by a frame that continues it, in the claimed epoch.

use crate::{
    AppendError, ClaimError, Epoch, Frame, Lsn, Position, ReadError, State, Terminal, watch::Publisher,
};

/// The writing end of a log: where it ends, and who may append.
#[derive(Debug)]
pub(crate) struct Admission {
    tail: State,
    /// The epoch of the last claim, of this process or an earlier one.
    epoch: Epoch,
    /// Whether this process made that claim.
    claimed: bool,
}

impl Admission {
    /// A log that has been opened and that nobody has claimed yet.
    pub(crate) fn reopened(tail: State, epoch: Epoch) -> Admission {
        Admission { tail, epoch, claimed: false }
    }

    pub(crate) fn tail(&self) -> State {
        self.tail
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub(crate) fn check_claim(&self, epoch: Epoch) -> Result<(), ClaimError> {
        if epoch.number < self.epoch.number
            || (epoch.number == self.epoch.number && epoch.id != self.epoch.id)
        {
            return Err(ClaimError::Fenced { by: self.epoch });
        }
        Ok(())
    }

    pub(crate) fn claim(&mut self, epoch: Epoch) {
        self.epoch = epoch;
        self.claimed = true;
    }

    pub(crate) fn check(&self, previous: &Position, frame: &Frame, limit: usize) -> Result<(), AppendError> {
        if !self.claimed {
            return Err(AppendError::NotClaimed);
        }
        if *previous != self.tail.position {
            return Err(AppendError::WrongPrevious { tail: self.tail.position });
        }
        frame.header().follows(previous).map_err(AppendError::NotNext)?;
        if frame.epoch() != self.epoch {
            return Err(AppendError::WrongEpoch { lsn: frame.first(), claimed: self.epoch });
        }
        let length = frame.bytes().len();
        if length > limit {
            return Err(AppendError::TooLarge { length, limit });
        }
        Ok(())
    }

    /// Moves the tail behind a frame that has been checked.
    pub(crate) fn queued(&mut self, frame: &Frame) {
        self.tail = frame.state();
    }
}

/// Refuses when the log has ended.
pub(crate) fn check_open(publisher: &Publisher) -> Result<(), Terminal> {
    publisher.current().terminal.map_or(Ok(()), Err)
}

/// Refuses to read what is gone or not there yet.
pub(crate) fn check_read(from: Lsn, first: Lsn, durable: Lsn) -> Result<(), ReadError> {
    if from < first {
        return Err(ReadError::Trimmed { lsn: from, first });
    }
    if from > durable.next() {
        return Err(ReadError::Beyond { lsn: from, durable });
    }
    Ok(())
}
