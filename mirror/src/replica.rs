//! What the protocol needs from the nodes at both ends.
//!
//! A mirror's node is a [`Replica`]; a source's is a log, a [`SnapshotSource`] and a [`MemberBook`](crate::MemberBook).

use std::{fmt, io::Read, sync::Arc};

use murphy_log::{
    AppendCopyError, AppendError, ClaimError, DurableWatch, Epoch, Frame, Log, Lsn, Position, State,
    VolumeKeys,
};
use tokio::sync::watch;

use crate::history::{Lookup, Point, is_older, look_up};

/// The promise that forbids to take entries of `epoch` from a source that welcomed this node knowing that it had promised `told`.
///
/// A source that was told of a promise leads that epoch or a later one, or it would have refused: what it sends of older epochs is the
/// history before its own, which a sealed mirror may lack.
pub fn forbidding_promise(promised: Option<Epoch>, epoch: Epoch, told: Option<Epoch>) -> Option<Epoch> {
    promised.filter(|promised| told != Some(*promised) && is_older(epoch, *promised))
}

/// Whether a node that has promised `promised` may take an entry of `epoch` from a source that was told of `told`; see [`forbidding_promise`].
pub fn check_append(promised: Option<Epoch>, epoch: Epoch, told: Option<Epoch>) -> Result<(), ReplicaError> {
    match forbidding_promise(promised, epoch, told) {
        Some(promised) => Err(ReplicaError::Promised { promised }),
        None => Ok(()),
    }
}

/// Whether a node that has promised `promised`, and whose log ends in `held`, may promise `epoch`: neither may be later, nor another one of
/// the same number. One that was joined by hand is in an epoch that it never promised.
pub fn check_promise(promised: Option<Epoch>, held: Option<Epoch>, epoch: Epoch) -> Result<(), ReplicaError> {
    promised.into_iter().chain(held).try_for_each(|known| check_append(Some(known), epoch, None))
}

/// The node of a mirror.
///
/// Its log is where received frames become durable. A replica that has never been seeded holds nothing: no state, no watch.
pub trait Replica: Send + Sync {
    /// The last durable state of the own log; `None` while it holds nothing.
    fn state(&self) -> Option<State>;

    /// The keys of the volume.
    fn keys(&self) -> &VolumeKeys;

    /// Whether its process is about to begin anew, with something else than what it holds: until then it follows nobody.
    fn begins_anew(&self) -> bool {
        false
    }

    /// Queues a frame that continues the tail into the own log, whatever its epoch, and returns. It becomes durable later, in order.
    ///
    /// `told` is the promise that the source heard of before it welcomed this node. Refused if [`check_append`] says so: the check and
    /// the queueing are one step, so that nothing slips past a promise, nor is added to what is about to be replaced. On an error nothing was queued.
    fn append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError>;

    /// Follows what is durable; `None` while it holds nothing. Installing a snapshot and setting a tail aside make a new watch.
    fn durable(&self) -> Option<DurableWatch> {
        self.history().map(|log| log.durable())
    }

    /// Follows up to which LSN every byte that the tree refers to is in the own store.
    fn data(&self) -> watch::Receiver<Lsn>;

    /// The own log, to read from and never to append to; `None` while it holds nothing, or is about to be replaced.
    fn history(&self) -> Option<Arc<dyn Log>>;

    /// What the own log holds at `lsn`; see [`look_up`](crate::look_up). May read a disk.
    fn look_up(&self, lsn: Lsn) -> Result<Lookup, ReplicaError> {
        let log = self.history().ok_or_else(|| ReplicaError::Storage("no log".to_owned()))?;
        look_up(&*log, lsn).map_err(|error| ReplicaError::Storage(error.to_string()))
    }

    /// The epoch that has been promised, if one has.
    fn promised(&self) -> Option<Epoch>;

    /// Promises `epoch`, durably: afterwards no frame of an older one is appended. What was queued before is durable when this returns; the
    /// state returned is the last one of older epochs. The same promise may be made again; one that [`check_promise`] forbids is refused. Blocks.
    fn promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError>;

    /// Gets ready to receive a snapshot of `state`. What is held now stays as it is, to be read, lent, promised with and promoted, until
    /// [`SeedWriter::finish`] replaces it in one step; it is kept as a branch then. One that was begun before is given up: what it sends may still
    /// be written when its connection is long gone. May read a disk.
    fn begin_seed(&self, state: State) -> Result<Box<dyn SeedWriter>, ReplicaError>;

    /// Keeps everything after `ancestor` up to `tail` as a branch of its own, listed by `status`, and goes back to the ancestor in one step: after
    /// an error, or a crash, all is as it was or all is done. If that cannot be done in place, nothing is held until the process has begun anew. Blocks.
    fn set_aside(&self, ancestor: Point, tail: Position) -> Result<(), ReplicaError>;
}

/// Takes a snapshot that arrives in pieces. Dropped unfinished, it leaves the node as it was.
pub trait SeedWriter: Send {
    /// Takes bytes of the snapshot; pieces come in any order and do not overlap. May write to a disk.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ReplicaError>;

    /// Says that all `bytes` are there: verifies the snapshot (counts, digest), installs it durably and returns its state. After an error, or a
    /// crash, what was held before is there, or all of the snapshot. Fails if another one was begun since, or anything was appended: that may
    /// have been acknowledged. Blocks.
    fn finish(self: Box<Self>, bytes: u64) -> Result<State, ReplicaError>;
}

/// What went wrong in a replica.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReplicaError {
    /// A later epoch has been promised.
    #[error("epoch {promised} has been promised")]
    Promised {
        /// It.
        promised: Epoch,
    },
    /// There is no room; it may be tried again.
    #[error("no space: {0}")]
    NoSpace(String),
    /// The log has ended, or its medium fails: the process should end too.
    #[error("the log has ended: {0}")]
    Ended(String),
    /// A snapshot is not what it should be.
    #[error("bad snapshot: {0}")]
    BadSnapshot(String),
    /// The medium does not answer, or refuses.
    #[error("{0}")]
    Storage(String),
}

impl From<AppendCopyError> for ReplicaError {
    fn from(error: AppendCopyError) -> ReplicaError {
        match error {
            AppendCopyError::Append(AppendError::NoSpace { message })
            | AppendCopyError::Claim(ClaimError::NoSpace { message }) => ReplicaError::NoSpace(message),
            AppendCopyError::Append(AppendError::Ended(end))
            | AppendCopyError::Claim(ClaimError::Ended(end)) => ReplicaError::Ended(end.to_string()),
            error => ReplicaError::Storage(error.to_string()),
        }
    }
}

/// Opens snapshots to seed mirrors with.
pub trait SnapshotSource: Send + Sync {
    /// Opens a snapshot of a recent state. Blocks.
    fn open(&self) -> Result<SeedSnapshot, ReplicaError>;
}

/// An opened snapshot.
pub struct SeedSnapshot {
    /// The state in it.
    pub state: State,
    /// Its bytes.
    pub reader: Box<dyn Read + Send>,
    /// Holds the log after `state` against trimming until it is dropped, so that the mirror can go on from there.
    pub hold: Box<dyn Send>,
}

impl fmt::Debug for SeedSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeedSnapshot").field("state", &self.state).finish_non_exhaustive()
    }
}
