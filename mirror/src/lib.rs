//! Murphy's mirrors: copies of a volume that follow its log live.
//!
//! [`Source`] and [`Follower`] are the two ends of the protocol without I/O.

mod acknowledge;
mod board;
mod book;
mod copier;
mod dial;
mod endpoint;
mod follow;
mod follower;
mod history;
mod identity;
mod memory;
mod message;
mod promote;
mod replica;
mod serve;
mod session;
mod source;
mod status;
mod subscribe;
#[cfg(test)]
mod tests;
mod token;

pub use acknowledge::MirrorAcknowledger;
pub use board::{BoardEntry, MirrorBoard};
pub use book::{Admission, AdmitError, MemberBook, MemoryBook, authorize, redeem};
pub use copier::{
    Copier, CopyError, CopyPlan, CursorError, CursorFile, FallbackStore, PackCopyError, PackNeed, PackSource,
    ScanError,
};
pub use dial::{Dialer, ExchangeError, PackFetchError, RemotePacks};
pub use endpoint::{BoundSocket, Congestion, ListenError, NetworkOptions, Sockets, UdpSockets};
pub use follow::{FollowError, FollowHandle, FollowSetup, Following};
pub use follower::{Follower, FollowerAction, FollowerConfig, FollowerReport};
pub use history::{AncestorSearch, Lookup, Point, SearchStep, look_up};
pub use identity::{Identity, IdentityError, PublicKey};
pub use memory::{Durability, KeptBranch, MemoryReplica, MemorySnapshots};
pub use message::*;
pub use promote::{
    AckPolicy, Missing, PlanError, PromoteError, PromotePlan, PromoteRequest, Standing, TakeOver, Unsealed,
    promote,
};
pub use replica::{Replica, ReplicaError, SeedSnapshot, SeedWriter, SnapshotSource};
pub use serve::{Listener, MirrorPart, Part, Services, SourcePart};
pub use source::{Peer, Source, SourceAction, SourceConfig, SourceReport};
pub use status::{FollowerStatus, MirrorStatus};
pub use subscribe::{CallerLine, ChangeLine, EntryLine, ObserveError, Observer, RequestLine, Text};
pub use token::{MAX_TOKEN_CHARS, SECRET_BYTES, Secret, SecretHash, TOKEN_PREFIX, Token, TokenError};
