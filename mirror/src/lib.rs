//! Murphy's mirrors: copies of a volume that follow its log live.
//!
//! [`Source`] and [`Follower`] are the two ends of the protocol without I/O.

mod acknowledge;
mod board;
mod book;
mod dial;
mod endpoint;
mod follow;
mod follower;
mod history;
mod identity;
mod memory;
mod message;
mod replica;
mod serve;
mod session;
mod source;
mod status;
#[cfg(test)]
mod tests;
mod token;

pub use acknowledge::MirrorAcknowledger;
pub use board::{BoardEntry, MirrorBoard};
pub use book::{Admission, AdmitError, MemberBook, MemoryBook, authorize, redeem};
pub use dial::{Dialer, ExchangeError, PackFetchError, RemotePacks};
pub use endpoint::{BoundSocket, Congestion, ListenError, NetworkOptions, Sockets, UdpSockets};
pub use follow::{FollowError, FollowHandle, FollowSetup, Following};
pub use follower::{Follower, FollowerAction, FollowerConfig, FollowerReport};
pub use history::{AncestorSearch, Lookup, Point, SearchStep, look_up};
pub use identity::{Identity, IdentityError, PublicKey};
pub use memory::{Durability, KeptBranch, MemoryReplica, MemorySnapshots};
pub use message::*;
pub use replica::{Replica, ReplicaError, SeedSnapshot, SeedWriter, SnapshotSource};
pub use serve::{Listener, MirrorPart, Part, Services, SourcePart};
pub use source::{Peer, Source, SourceAction, SourceConfig, SourceReport};
pub use status::{FollowerStatus, MirrorStatus};
pub use token::{MAX_TOKEN_CHARS, SECRET_BYTES, Secret, SecretHash, TOKEN_PREFIX, Token, TokenError};
