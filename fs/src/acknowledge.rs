//! What the file system asks of those who hold copies: acknowledgements, and the fence that decides who is the source.
//!
//! Archives and mirrors implement these traits; the program joins them to a volume. Neither knows the other.

use std::{future::Future, pin::Pin, time::Duration};

use murphy_log::{Epoch, Lsn, Position};

/// A holder of copies whose acknowledgement an fsync may wait for (`--ack`).
pub trait Acknowledger: Send + Sync {
    /// Returns when the entries up to `lsn`, and every byte that they refer to, are durable in enough copies. After `deadline` it
    /// fails, and says which copies are missing. Cancel safe.
    fn acknowledged(&self, lsn: Lsn, deadline: Duration) -> Acknowledgement<'_>;
}

/// The future of an acknowledgement.
pub type Acknowledgement<'a> = Pin<Box<dyn Future<Output = Result<(), AcknowledgeError>> + Send + 'a>>;

/// Why copies did not acknowledge.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AcknowledgeError {
    /// Fewer copies than the volume asks for answered in time.
    #[error("{held} of {wanted} copies acknowledged lsn {lsn}: {missing}")]
    TooFew {
        /// What was waited for.
        lsn: Lsn,
        /// How many copies have it.
        held: usize,
        /// How many must have it.
        wanted: usize,
        /// Which copies do not, and why.
        missing: String,
    },
    /// Another source has taken over.
    #[error("fenced: {0}")]
    Fenced(String),
}

/// A place whose contents decide who is the source (an archive). Used at start, and to take over.
pub trait Fence: Send + Sync {
    /// How far this place holds the branch's history, contiguously and on one chain, and the seal that ends it if there is one.
    fn adopt(&self) -> FenceFuture<'_, Held>;

    /// Creates the seal that ends the epoch at `base` and names `next`. Exactly one of several callers succeeds.
    fn seal(&self, base: Position, next: Epoch) -> FenceFuture<'_, ()>;
}

/// A future of a fence's answer.
pub type FenceFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, FenceError>> + Send + 'a>>;

/// What a fence holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// The last entry held; `None` for an empty place.
    pub last: Option<Position>,
    /// The seal behind it: who ended the epoch, and the epoch that follows.
    pub seal: Option<Sealed>,
}

/// A seal that was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sealed {
    /// Where the sealed epoch ends.
    pub base: Position,
    /// The epoch that follows.
    pub next: Epoch,
    /// The node that sealed.
    pub by: murphy_log::NodeId,
}

/// Why a fence did not do what it was asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FenceError {
    /// Somebody else has sealed.
    #[error("sealed at {} by node {}, which began epoch {}", .0.base, .0.by, .0.next)]
    Sealed(Sealed),
    /// The place holds another history.
    #[error("{place} holds another history from lsn {lsn} on")]
    Forked {
        /// The place.
        place: String,
        /// The first LSN that differs.
        lsn: Lsn,
    },
    /// The place does not answer, or its answer cannot be read.
    #[error("{place}: {reason}")]
    Unavailable {
        /// The place.
        place: String,
        /// What it said.
        reason: String,
    },
}
