//! Murphy's mirrors: copies of a volume that follow its log live.
//!
//! [`Source`] and [`Follower`] are the two ends of the protocol, without I/O: messages and time in, actions out. [`Listener`] and
//! [`Following`] drive them over QUIC, on behalf of a node that is a [`Replica`] (a mirror) or has a log, a [`SnapshotSource`] and a
//! [`MemberBook`] (a source). Around them: [`Identity`] and [`Token`] say who is who, [`Copier`] lets data follow the log,
//! [`MirrorAcknowledger`] waits for mirrors, a [`Lender`] gives back what others have lost, [`promote`] takes over, and [`Observer`] with
//! [`EntryLine`] tells other programs.
//!
//! quinn appears in `endpoint.rs` and `session.rs` only.
//!
//! ```
//! use murphy_mirror::{Durability, MemoryReplica, Replica};
//! use murphy_log::{VolumeId, VolumeKeys};
//!
//! // A mirror that holds nothing yet asks its source for a snapshot.
//! let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
//! let replica = MemoryReplica::new(keys, None, Durability::Immediate);
//! assert!(replica.state().is_none());
//! ```

mod acknowledge;
mod acknowledging;
mod board;
mod book;
mod compare;
mod copier;
mod dial;
mod endpoint;
mod follow;
mod follower;
mod gather;
mod history;
mod identity;
mod lend;
mod memory;
mod message;
mod promote;
mod replica;
mod serve;
mod session;
mod source;
mod source_store;
mod status;
mod subscribe;
#[cfg(test)]
mod tests;
mod token;
mod vouch;

pub use acknowledge::MirrorAcknowledger;
pub use acknowledging::{AcknowledgingSet, SetStep};
pub use board::{BoardEntry, MirrorBoard};
pub use book::{Admission, AdmitError, MemberBook, MemoryBook, authorize, redeem};
pub use compare::{Comparison, compare};
pub use copier::{
    Copier, CopyError, CopyPlan, CursorError, CursorFile, PackCopyError, PackNeed, PackSource, ScanError,
};
pub use dial::{Dialer, ExchangeError, PackFetchError, RemotePacks};
pub use endpoint::{BoundSocket, Congestion, ListenError, NetworkOptions, Sockets, UdpSockets};
pub use follow::{FollowError, FollowHandle, FollowSetup, Following};
pub use follower::{Follower, FollowerAction, FollowerConfig, FollowerReport};
pub use gather::{ASKING, Gap, GatherError, GatherStatus, Gatherer, MemberPacks, PackPlace, PackPlaces};
pub use history::{AncestorSearch, Lookup, Point, SearchStep, look_up};
pub use identity::{Identity, IdentityError, PublicKey};
pub use lend::{BorrowError, Borrowing, GiveError, Lender};
pub use memory::{Durability, KeptBranch, MemoryReplica, MemorySnapshots};
pub use message::{
    Ack, Admitted, Ask, Frames, HEADER_BYTES, Heartbeat, Hello, LendRequest, MAX_DETAIL_BYTES,
    MAX_PACK_BYTES, MAX_RUN_BYTES, MAX_RUN_FRAMES, Message, MessageError, MessageFault, MessageHeader,
    PackReply, PackRequest, Redeem, Refusal, Refused, Resume, SEED_PART_BYTES, Seal, Sealed, SeedPart,
    SeedReason, Stands, Verdict, WIRE_VERSION, Welcome,
};
pub use promote::{
    AckPolicy, Missing, PlanError, PromoteError, PromotePlan, PromoteRequest, Standing, TakeOver, Unsealed,
    promote,
};
pub use replica::{
    Replica, ReplicaError, SeedSnapshot, SeedWriter, SnapshotSource, check_append, check_promise,
    forbidding_promise,
};
pub use serve::{Leader, Listener, MirrorPart, Part, Services, SourcePart};
pub use source::{Peer, Source, SourceAction, SourceConfig, SourceReport};
pub use source_store::SourceStore;
pub use status::{FollowerStatus, MirrorStatus};
pub use subscribe::{CallerLine, ChangeLine, EntryLine, ObserveError, Observer, RequestLine, Text};
pub use token::{
    MAX_ADDRESSES, MAX_NAME_BYTES, MAX_TOKEN_CHARS, SECRET_BYTES, Secret, SecretHash, TOKEN_PREFIX, Token,
    TokenError,
};
pub use vouch::{Proof, ProofError, Trust, Vouched, Voucher};
