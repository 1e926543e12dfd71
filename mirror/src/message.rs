//! The messages that nodes exchange; `docs/formats/wire.md` has their byte rulers.
//!
//! Invariants:
//! - A message is a header of [`HEADER_BYTES`] and a body whose length is checked against the limit of its kind before a byte of it is
//!   read or allocated.
//! - Decoding accepts exactly what encoding produces: trailing bytes, reserved bits and unknown tags are errors that name the message
//!   and the offset.
//! - Frames travel in their stored form and are parsed, checksum included, before anybody sees them; nothing here is verified against
//!   a history yet.

mod codec;
mod fields;
mod proof;

use bytes::Bytes;
use murphy_fs::{MemberRole, PackName};
use murphy_log::{
    BranchId, Epoch, Frame, FrameError, LogTime, Lsn, MAX_FRAME_BYTES, NodeId, Position, State,
    UnverifiedFrame, VolumeId,
};

use crate::{
    history::{Lookup, Point, is_older},
    token::Secret,
    vouch::Proof,
};

pub use codec::MessageHeader;

/// One message.
#[derive(Clone, Debug)]
pub enum Message {
    /// A follower says who it is and where it stands. The first message of a connection that follows.
    Hello(Hello),
    /// The source says what it will do about it.
    Welcome(Welcome),
    /// Durable frames, in order.
    Frames(Frames),
    /// How far the follower is durable.
    Ack(Ack),
    /// Where the source stands, so that the lag is true when nothing happens.
    Heartbeat(Heartbeat),
    /// Asks what the source's log holds at an LSN.
    Probe {
        /// The LSN.
        lsn: Lsn,
    },
    /// The answer to a probe.
    Probed {
        /// The LSN that was asked about.
        lsn: Lsn,
        /// What is there.
        found: Lookup,
    },
    /// A snapshot follows, in parts on streams of their own.
    SeedOffer {
        /// The state of the tree in the snapshot.
        state: State,
    },
    /// The header of one part; its bytes follow on the same stream.
    SeedPart(SeedPart),
    /// Every part of the snapshot has been sent.
    SeedDone {
        /// How many parts there were.
        parts: u32,
        /// The length of the snapshot, in bytes.
        bytes: u64,
    },
    /// Asks for bytes of a pack; on a stream of its own.
    PackRequest(PackRequest),
    /// Bytes of a pack.
    PackReply(PackReply),
    /// The peer does not go on, and closes.
    Refused(Refused),
    /// Proves the secret of an invitation, to become a member.
    Redeem(Redeem),
    /// The invitation was good, and the member is in the log.
    Admitted(Admitted),
    /// Asks a mirror to promise an epoch and to refuse older ones.
    Seal(Seal),
    /// The promise is durable.
    Sealed(Sealed),
    /// A member says where it listens; answered like a redemption.
    Announce(Announce),
    /// Asks a node where it stands; the first message of a connection on which it lends.
    Ask(Ask),
    /// Where the node stands.
    Stands(Stands),
    /// Asks for frames, on a stream of its own; `frames` messages come back until the stream ends.
    LendRequest(LendRequest),
}

/// See [`Message::Hello`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// The volume that the follower holds.
    pub volume: VolumeId,
    /// The branch that it follows.
    pub branch: BranchId,
    /// The follower; must be the node that the connection's certificate names.
    pub node: NodeId,
    /// From where it wants to go on.
    pub resume: Resume,
    /// Up to which LSN it has every byte too.
    pub data_lsn: Lsn,
    /// The epoch that it has promised; it takes nothing older.
    pub promised: Option<Epoch>,
}

/// From where a follower goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resume {
    /// It has nothing and wants a snapshot.
    Fresh,
    /// After the position that it holds durably.
    After(Position),
    /// From the frame that holds this LSN: for observers, who hold nothing.
    From(Lsn),
}

/// See [`Message::Welcome`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// The volume of the source.
    pub volume: VolumeId,
    /// Its branch.
    pub branch: BranchId,
    /// The source.
    pub node: NodeId,
    /// What is durable there.
    pub state: State,
    /// The epoch that it decides in; its log may not have an entry of it yet.
    pub epoch: Epoch,
    /// Where the frames that follow begin, with [`Verdict::Tail`].
    pub first: Lsn,
    /// What comes next.
    pub verdict: Verdict,
}

/// What the source does about a follower's position.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Same history: frames follow.
    Tail,
    /// A snapshot follows.
    Seed(SeedReason),
    /// The position is not in the source's history: the follower may probe.
    Diverged,
}

/// Why a follower is seeded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SeedReason {
    /// It holds nothing.
    Fresh,
    /// The log no longer reaches back to its position, which therefore could not be compared.
    Trimmed,
}

/// See [`Message::Frames`].
#[derive(Clone, Debug)]
pub struct Frames {
    /// What is durable at the source now.
    pub durable_lsn: Lsn,
    /// The frames, at least one.
    pub run: Vec<UnverifiedFrame>,
}

impl Frames {
    /// A run of frames of one's own log.
    pub fn of(durable_lsn: Lsn, run: &[Frame]) -> Result<Frames, FrameError> {
        let unverified = |frame: &Frame| Ok(UnverifiedFrame::parse(frame.bytes(), 0)?.0);
        Ok(Frames { durable_lsn, run: run.iter().map(unverified).collect::<Result<_, FrameError>>()? })
    }
}

/// See [`Message::Ack`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ack {
    /// What is durable in the follower's log.
    pub position: Position,
    /// Up to which LSN it has every byte too; never above the position.
    pub data_lsn: Lsn,
}

/// See [`Message::Heartbeat`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heartbeat {
    /// What is durable at the source.
    pub state: State,
    /// The source's wall clock.
    pub time: LogTime,
}

/// See [`Message::SeedPart`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SeedPart {
    /// Which part; it begins at `index * SEED_PART_BYTES` of the snapshot.
    pub index: u32,
    /// Its length, in bytes; only the last part is shorter than [`SEED_PART_BYTES`].
    pub length: u32,
}

/// See [`Message::PackRequest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackRequest {
    /// Which pack.
    pub pack: PackName,
    /// From which byte of the object.
    pub offset: u64,
    /// How many bytes; 0 for all the rest.
    pub length: u32,
}

/// See [`Message::PackReply`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PackReply {
    /// The bytes asked for.
    Found(Bytes),
    /// The store does not hold such a pack.
    Missing,
    /// The store does not answer.
    Failed(String),
}

/// See [`Message::Refused`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// The kind of refusal, for programs.
    pub reason: Refusal,
    /// What a person should read.
    pub detail: String,
}

impl std::fmt::Display for Refused {
    /// The kind, and what a person should read, which may begin with it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.detail.starts_with(&self.reason.to_string()) {
            true => f.write_str(&self.detail),
            false => write!(f, "{}: {}", self.reason, self.detail),
        }
    }
}

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// Why a peer does not go on.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum Refusal {
            $($(#[$doc])* $name = $code,)*
        }

        impl Refusal {
            /// The refusal with this code.
            pub fn from_code(code: u8) -> Option<Refusal> {
                match code {
                    $($code => Some(Refusal::$name),)*
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for Refusal {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $(Refusal::$name => $text,)*
                })
            }
        }
    };
}

refusals! {
    /// The message is not one that the peer expects now.
    Protocol = 1, "the message is not expected here";
    /// The peer serves another volume.
    ForeignVolume = 2, "another volume";
    /// The peer serves another branch.
    ForeignBranch = 3, "another branch";
    /// The node is not a member.
    UnknownMember = 4, "not a member";
    /// The node was a member once.
    Revoked = 5, "the membership was revoked";
    /// The member's role does not allow it.
    Role = 6, "the role does not allow it";
    /// No invitation has this secret.
    BadInvitation = 7, "no such invitation";
    /// The invitation is too old.
    ExpiredInvitation = 8, "the invitation has expired";
    /// Somebody has redeemed the invitation.
    UsedInvitation = 9, "the invitation was used";
    /// A later epoch has been promised or has begun.
    Fenced = 10, "fenced by a later epoch";
    /// The log was trimmed while the follower read it: connect again for a snapshot.
    Trimmed = 11, "the log no longer reaches back so far";
    /// The source cannot read its own log, or offer a snapshot.
    Unreadable = 12, "the source cannot read what it should send";
    /// The source's log has ended.
    Ended = 13, "the source's log has ended";
    /// Too many are connected.
    Busy = 14, "too many connections";
    /// A frame was damaged or does not continue the follower's history.
    BadFrame = 15, "a frame was refused";
    /// The peer cannot store what it should.
    Storage = 16, "the peer cannot store";
    /// The position after which frames are asked for is not in the peer's history.
    OtherHistory = 17, "another history";
    /// The source holds less than the follower of its own epoch, and ends.
    Lost = 18, "the source has lost entries";
}

/// See [`Message::Redeem`].
#[derive(Clone, Debug)]
pub struct Redeem {
    /// What proves the invitation.
    pub secret: Secret,
    /// What people call the node.
    pub name: String,
    /// Where it listens, `host:port`; empty if it does not.
    pub addresses: Vec<String>,
    /// The epoch that it has promised, if it was a mirror before: a source that leads an older one does not take it.
    pub promised: Option<Epoch>,
}

/// See [`Message::Admitted`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Admitted {
    /// The volume.
    pub volume: VolumeId,
    /// The branch.
    pub branch: BranchId,
    /// What the member may do.
    pub role: MemberRole,
    /// The word of the source for those who do not know the member yet; empty for one that holds no copy.
    pub proof: Proof,
}

/// See [`Message::Seal`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seal {
    /// The volume.
    pub volume: VolumeId,
    /// The branch.
    pub branch: BranchId,
    /// The epoch to promise.
    pub epoch: Epoch,
    /// That the sender is a member, for a mirror that does not know it yet.
    pub proof: Proof,
    /// Where the sender listens, `host:port`, if it leads the epoch already; empty as long as it does not.
    pub leads: Vec<String>,
}

/// See [`Message::Sealed`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sealed {
    /// The epoch that was promised.
    pub epoch: Epoch,
    /// The last state of older epochs that this mirror will ever hold; `None` if it holds nothing.
    pub state: Option<State>,
    /// Up to which LSN it has every byte too.
    pub data_lsn: Lsn,
    /// The last LSN that it heard of from the source.
    pub heard_lsn: Lsn,
}

/// See [`Message::Announce`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announce {
    /// Where the member listens, `host:port`; empty if it does not.
    pub addresses: Vec<String>,
    /// What its copy dies with: the failure domains of its machine and of its block store.
    pub domains: Vec<String>,
}

/// See [`Message::Ask`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ask {
    /// The volume.
    pub volume: VolumeId,
    /// The branch.
    pub branch: BranchId,
    /// The epoch that the asker leads, or would lead; `None` if it leads nothing yet, as one that mends a log that it cannot open.
    pub epoch: Option<Epoch>,
}

/// See [`Message::Stands`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stands {
    /// What is durable in the node's log; `None` if it holds nothing.
    pub state: Option<State>,
    /// Up to which LSN a mirror has every byte too; 0 from a source.
    pub data_lsn: Lsn,
    /// The last LSN that it heard of from its source.
    pub heard_lsn: Lsn,
    /// The epoch that a mirror has promised; of a source the one that it leads.
    pub promised: Option<Epoch>,
}

impl Stands {
    /// The epoch, promised or held there, that ends `epoch`: a later one, or another one of the same number.
    pub fn ends(&self, epoch: Epoch) -> Option<Epoch> {
        let held = self.state.map(|state| state.position.epoch);
        self.promised.into_iter().chain(held).filter(|known| is_older(epoch, *known)).max()
    }

    /// The epoch, promised or held there, for which a source that leads `epoch` has to stop: a later one, or another one of the same number
    /// that has begun. One of the same number that was only promised is an attempt of somebody else to replace the source before: whoever made
    /// it meets this source's promises and seals, and has to ask for a later one.
    pub fn replaces(&self, epoch: Epoch) -> Option<Epoch> {
        let held = self.state.map(|state| state.position.epoch);
        let promised = self.promised.filter(|promised| promised.number > epoch.number);
        promised.into_iter().chain(held).filter(|known| is_older(epoch, *known)).max()
    }
}

/// See [`Message::LendRequest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LendRequest {
    /// The end of what the asker holds: a frame end of the lender's log too, or nothing is lent.
    pub after: Point,
    /// The last LSN that is wanted; a frame that goes beyond it is not sent.
    pub to: Lsn,
}

/// Bytes that are not a message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message} message, offset {offset}: {what}")]
pub struct MessageError {
    /// The kind of the message, as far as it is known.
    pub message: &'static str,
    /// Where in the body, in bytes; in the header for a message of unknown kind.
    pub offset: usize,
    /// What is wrong there.
    pub what: MessageFault,
}

/// What is wrong with the bytes of a message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MessageFault {
    /// The peer speaks another version.
    #[error("version {0} of the protocol is not spoken here")]
    Version(u8),
    /// No such message.
    #[error("no message has the kind {0}")]
    Kind(u8),
    /// The body is longer than such a message may be.
    #[error("a body of {length} bytes is beyond the limit of {limit}")]
    TooLong {
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The body ends before the message does.
    #[error("the body is cut short")]
    Short,
    /// Bytes follow the last field.
    #[error("{0} bytes too many")]
    Trailing(usize),
    /// A field holds what it cannot hold.
    #[error("impossible {0}")]
    Field(&'static str),
    /// A frame is damaged.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// The version of the protocol that this program speaks.
pub const WIRE_VERSION: u8 = 0;
/// The length of a message's header, in bytes.
pub const HEADER_BYTES: usize = 8;
/// The frames of one message hold at most this much, in bytes, in their stored form; a single frame always fits.
pub const MAX_RUN_BYTES: usize = 4 << 20;
/// At most so many frames are in one message.
pub const MAX_RUN_FRAMES: usize = 8192;
/// The length of every part of a snapshot but the last, in bytes.
pub const SEED_PART_BYTES: usize = 4 << 20;
/// No pack object, and no answer about one, is larger, in bytes.
pub const MAX_PACK_BYTES: usize = 8 << 20;
/// What people are told is at most so long, in bytes.
pub const MAX_DETAIL_BYTES: usize = 1024;
const _: () = assert!(MAX_RUN_BYTES >= MAX_FRAME_BYTES);
