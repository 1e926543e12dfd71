//! Murphy's log: the append-only, hash-chained ground that everything else is derived from.
//!
//! [`Entry`] is one mutation, [`Position`] names a history, [`Clock`] is where time comes from.

mod clock;
mod entry;
mod lsn;
mod position;

pub use clock::{Clock, LogTime, ManualClock, SystemClock};
pub use entry::{Change, Entry, ForwardedRequest, KIND_TICK, MAX_CHANGES, MAX_ENTRY_BYTES, Requester};
pub use lsn::Lsn;
pub use position::{
    BranchId, ChainHash, Digest, Epoch, EpochId, NodeId, ParseIdError, Position, State, Usage, VolumeId,
};
