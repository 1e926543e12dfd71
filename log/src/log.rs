//! The trait of every log: disk, memory, and whatever else can keep frames in order.
//!
//! Invariants:
//! - No file, offset or host in a signature: a log is known by positions alone.
//! - [`conformance`](crate::conformance) runs against every implementation.

use std::fmt;

use crate::{DurableWatch, Epoch, Frame, FrameError, Lsn, Position, State, Terminal};

/// An append-only sequence of frames.
///
/// ```text
///   trimmed          |          durable           |     queued     |  not appended
///   gone, or may be  |  read() yields these only  |  in flight     |
/// -------------------+----------------------------+----------------+--------------->  LSN
///                first()                 durable().state()       tail()
/// ```
///
/// * The caller assigns LSNs and hashes; the log refuses what does not continue its tail.
/// * **Durable** means: it survives the crash and the power cut of what this log stands on. Only durable frames are read,
///   so nothing leaves a node before it is durable there. Durability is reached in order and never taken back.
/// * **Several appends may be in flight.** If one fails, none after it becomes durable.
/// * **Terminal**: after [`Terminal`] nothing more becomes durable. Whoever holds the log drops what is above durable, drops
///   the log, opens it anew and goes on from the state that `claim` returns. Nothing is retried on the old one.
/// * Reading and waiting stay possible after the end.
pub trait Log: Send + Sync + fmt::Debug {
    /// Begins to append in `epoch`, after everything queued is durable, and returns the durable tail.
    ///
    /// The same epoch may be claimed again (a source restarts), a later one at any time; after that, frames of the earlier
    /// one are refused. Durable when it returns.
    fn claim(&self, epoch: Epoch) -> Result<State, ClaimError>;

    /// Queues a frame of the claimed epoch that continues `previous`, which must be the tail; returns when it is queued.
    ///
    /// It may wait for what is queued already to be written, as long as that gets on; callers hold locks meanwhile. On an error nothing was
    /// queued, and nothing has changed.
    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError>;

    /// Follows what is durable.
    fn durable(&self) -> DurableWatch;

    /// Reads durable frames, beginning with the one that holds `from`; `from` may be one beyond the last durable LSN.
    fn read(&self, from: Lsn) -> Result<FrameReader, ReadError>;

    /// The state after the last frame queued.
    fn tail(&self) -> State;

    /// The LSN of the oldest entry that can be read; one beyond the tail if there is none.
    fn first(&self) -> Lsn;

    /// Allows everything below `below` to be deleted; some or all of it stays readable. Returns the oldest LSN left.
    ///
    /// What is not durable is never deleted, nor the last durable frame.
    fn trim(&self, below: Lsn) -> Result<Lsn, TrimError>;

    /// The largest frame that can be appended, header included, in bytes.
    fn max_frame(&self) -> usize;
}

/// Reads durable frames in order. At the durable tail it yields `None`, and goes on when there is more: wait on the
/// log's [`DurableWatch`] in between. After an error it yields the same error again.
pub struct FrameReader {
    source: Box<dyn FrameSource>,
    failed: Option<ReadError>,
}

/// What a log implements to be read.
pub trait FrameSource: Send {
    /// The next durable frame, or `None` at the tail.
    fn next_frame(&mut self) -> Result<Option<Frame>, ReadError>;
}

impl FrameReader {
    /// A reader of this source.
    pub fn new(source: Box<dyn FrameSource>) -> FrameReader {
        FrameReader { source, failed: None }
    }
}

impl Iterator for FrameReader {
    type Item = Result<Frame, ReadError>;

    fn next(&mut self) -> Option<Result<Frame, ReadError>> {
        if let Some(failed) = &self.failed {
            return Some(Err(failed.clone()));
        }
        let next = self.source.next_frame();
        self.failed = next.as_ref().err().cloned();
        next.transpose()
    }
}

impl fmt::Debug for FrameReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameReader").field("failed", &self.failed).finish_non_exhaustive()
    }
}

/// Queues a frame that another source has decided, behind everything that is queued; its epoch is claimed first if the log is in an earlier
/// one. For whoever is the only one to append.
pub fn append_copy(log: &dyn Log, frame: Frame) -> Result<(), AppendCopyError> {
    let tail = log.tail().position;
    match log.append(&tail, frame.clone()) {
        Err(AppendError::NotClaimed | AppendError::WrongEpoch { .. }) => {
            log.claim(frame.epoch())?;
            Ok(log.append(&tail, frame)?)
        }
        appended => Ok(appended?),
    }
}

/// Why a copy of a frame was not queued.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AppendCopyError {
    /// The log does not take the frame.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The log cannot begin its epoch.
    #[error(transparent)]
    Claim(#[from] ClaimError),
}

/// Why an epoch cannot be claimed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClaimError {
    /// A later epoch, or another one of the same number, holds the log. Only this claim is refused.
    #[error("the log belongs to epoch {by}")]
    Fenced {
        /// The epoch that holds it.
        by: Epoch,
    },
    /// There is no room to begin.
    #[error("no space to begin an epoch: {message}")]
    NoSpace {
        /// What the medium said.
        message: String,
    },
    /// It was opened to be looked at.
    #[error("the log was opened for reading")]
    ReadOnly,
    /// The log has ended.
    #[error(transparent)]
    Ended(#[from] Terminal),
}

/// Why a frame was not queued.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AppendError {
    /// No epoch has been claimed since the log was opened.
    #[error("no epoch has been claimed")]
    NotClaimed,
    /// The frame is not of the claimed epoch.
    #[error("frame at lsn {lsn} is not of the claimed epoch {claimed}")]
    WrongEpoch {
        /// The first entry of the frame.
        lsn: Lsn,
        /// The epoch that may append.
        claimed: Epoch,
    },
    /// `previous` is not the tail.
    #[error("the log ends at {tail}")]
    WrongPrevious {
        /// The tail.
        tail: Position,
    },
    /// The frame does not continue `previous`.
    #[error(transparent)]
    NotNext(FrameError),
    /// The frame is too large for this log.
    #[error("a frame of {length} bytes is beyond the limit of {limit}")]
    TooLarge {
        /// Its length, in bytes.
        length: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// There is no room for it, or the medium takes nothing; the same frame may be tried again.
    #[error("no space for the log: {message}")]
    NoSpace {
        /// What the medium said.
        message: String,
    },
    /// The log has ended.
    #[error(transparent)]
    Ended(#[from] Terminal),
}

/// Why frames cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    /// They have been trimmed.
    #[error("lsn {lsn} has been trimmed, the log begins at {first}")]
    Trimmed {
        /// What was asked for.
        lsn: Lsn,
        /// The oldest LSN that is left.
        first: Lsn,
    },
    /// They are beyond what is durable.
    #[error("lsn {lsn} is beyond the durable end of the log at {durable}")]
    Beyond {
        /// What was asked for.
        lsn: Lsn,
        /// The last durable LSN.
        durable: Lsn,
    },
    /// They were durable and are damaged or gone.
    #[error("{place} is damaged at lsn {lsn}: {message}")]
    Damaged {
        /// The file or object.
        place: String,
        /// The first LSN that cannot be read.
        lsn: Lsn,
        /// What was found.
        message: String,
    },
    /// The medium does not answer.
    #[error("cannot read {place}: {message}")]
    Io {
        /// The file or object.
        place: String,
        /// What the medium said.
        message: String,
    },
}

/// Why nothing was trimmed, or not all.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TrimError {
    /// The medium refused a deletion; what was deleted before stays deleted.
    #[error("cannot delete {place}: {message}")]
    Io {
        /// The file or object.
        place: String,
        /// What the medium said.
        message: String,
    },
}
