//! What the file system asks of those who hold copies: acknowledgements, and the fence that decides who is the source.
//!
//! Archives and mirrors implement these traits; the program joins them to a volume. Neither knows the other.

use std::{future::Future, pin::Pin, time::Duration};

use murphy_log::{Epoch, Frame, Lsn, Position};

/// A holder of copies whose acknowledgement an fsync may wait for (`--ack`).
pub trait Acknowledger: Send + Sync {
    /// Returns when the entries up to `lsn`, and every byte that they refer to, are durable in enough copies. After `deadline` it
    /// fails, and says which copies are missing. Cancel safe.
    fn acknowledged(&self, lsn: Lsn, deadline: Duration) -> Acknowledgement<'_>;
}

/// Knows whether this node may still answer for the volume. It is asked before an fsync returns, whoever has acknowledged it.
pub trait Mandate: Send + Sync {
    /// Fails once another source is known to have taken over, or entries of this one to be lost. It never stands again after that. Does not
    /// block.
    fn stands(&self) -> Result<(), AcknowledgeError>;
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
    /// This source has lost entries that a copy holds.
    #[error("entries have been lost: {0}")]
    Lost(String),
}

/// A place whose contents decide who is the source (an archive). Used to take over.
///
/// The order is: [`adopt`](Fence::adopt); [`entries`](Fence::entries) until nothing is held that the successor's log lacks;
/// [`ship`](Fence::ship) what the place lacks; [`seal`](Fence::seal). Every step may be repeated, by another process too.
pub trait Fence: Send + Sync {
    /// What messages call the place.
    fn place(&self) -> &str;

    /// Where it comes among other places, the same for everybody who reaches it: whoever seals several does so in this order.
    fn rank(&self) -> String;

    /// How far this place holds the branch's history, contiguously and on one chain, and the seals in it.
    fn adopt(&self) -> FenceFuture<'_, Held>;

    /// The next frames that are held behind `after`, verified to continue it, a bounded number; none if nothing is held there.
    fn entries(&self, after: Position) -> FenceFuture<'_, Vec<Frame>>;

    /// Brings the place up to the entry `to` of the caller's log, under the epochs that the log has.
    fn ship(&self, to: Lsn) -> FenceFuture<'_, ()>;

    /// Brings the place, which ends at `from`, further with what `other` holds there, up to `to` at most: what the caller's log does not
    /// reach back to. Says where it ends then; at `from` if `other` holds nothing behind it.
    fn relay<'a>(&'a self, from: Position, to: Lsn, other: &'a dyn Fence) -> FenceFuture<'a, Position>;

    /// Creates the seal that ends the epoch at `base` and names `next`. Exactly one of several callers succeeds; the one that did may
    /// ask again.
    fn seal(&self, base: Position, next: Epoch) -> FenceFuture<'_, ()>;
}

/// A future of a fence's answer.
pub type FenceFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, FenceError>> + Send + 'a>>;

/// What a fence holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    /// The last entry held; of an empty place the one that it begins after.
    pub end: Position,
    /// The epoch that the next entry here must be of: later than that of `end` if a seal lies behind it.
    pub epoch: Epoch,
    /// The seals, oldest first.
    pub seals: Vec<Sealed>,
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
