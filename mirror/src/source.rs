//! The source's side of one connection, without I/O: what it sends to one follower, and when.
//!
//! Invariants:
//! - Nothing is sent that is not durable at the source.
//! - A position that a follower gives is compared with the source's own log before anything is sent after it, and an acknowledgement
//!   with what was sent: neither is trusted.
//! - A follower that holds more of the source's own epoch than the source, or other entries of it, proves that the source has lost entries:
//!   that is reported, and the follower gets nothing.
//! - At most one read of the log and one lookup are under way; what is sent and not acknowledged stays within the window, or is
//!   one run.

use std::{collections::VecDeque, time::Duration};

use murphy_fs::MemberRole;
use murphy_log::{
    BranchId, Epoch, Frame, LogTime, Lsn, NodeId, Position, ReadError, State, Terminal, VolumeId,
};

use crate::{
    history::{Lookup, Point, is_older},
    message::{
        Ack, Frames, Heartbeat, Hello, Message, Refusal, Refused, Resume, SeedReason, Verdict, Welcome,
    },
};

/// The source's side of one connection.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    peer: Peer,
    phase: Phase,
    /// What is durable, as far as this core was told.
    durable: State,
    /// Sent and not acknowledged, oldest first.
    in_flight: VecDeque<Sent>,
    in_flight_bytes: usize,
    heartbeat_due: Duration,
}

/// What a source knows of itself and how it behaves.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// The volume it serves.
    pub volume: VolumeId,
    /// Its branch.
    pub branch: BranchId,
    /// The node it runs on.
    pub node: NodeId,
    /// The epoch that it decides in.
    pub epoch: Epoch,
    /// How many bytes may be sent and not acknowledged; a single run always may.
    pub window_bytes: usize,
    /// How often it says where it stands.
    pub heartbeat: Duration,
}

/// Who is at the other end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// The node whose key the connection has proven.
    pub node: NodeId,
    /// What it may do.
    pub role: MemberRole,
}

#[derive(Debug)]
enum Phase {
    AwaitHello,
    /// The follower's position is being looked up.
    Checking(Ack),
    /// The snapshot is being opened.
    OpeningSeed(SeedReason),
    /// The snapshot is being sent; frames follow when the follower has it.
    Seeding(State),
    /// Frames go out.
    Following(Following),
    /// The follower looks for the common ancestor.
    Diverged {
        asked: Option<Lsn>,
    },
    Closed,
}

#[derive(Debug)]
struct Following {
    /// The next LSN to send.
    next: Lsn,
    /// What the follower has acknowledged; `None` for an observer that began in the middle.
    acked: Option<Position>,
    reading: bool,
}

#[derive(Debug)]
struct Sent {
    position: Position,
    bytes: usize,
}

/// What the shell does for the core.
#[derive(Debug)]
pub enum SourceAction {
    /// Send on the control stream.
    Send(Message),
    /// Send on the stream of frames.
    SendFrames(Frames),
    /// Look an LSN up in the log and hand the answer to [`Source::found`].
    Lookup(Lsn),
    /// Read frames from here on, at most about so many bytes, and hand them to [`Source::read`].
    Read {
        /// The first LSN.
        from: Lsn,
        /// Stop after the frame that reaches so many bytes.
        max_bytes: usize,
    },
    /// Open a snapshot and hand its state to [`Source::snapshot`].
    OpenSnapshot,
    /// Send the opened snapshot in parts and hand their number to [`Source::snapshot_sent`].
    StreamSnapshot,
    /// The follower proved that it shares the history up to here, or acknowledged it.
    Acked(Ack),
    /// Tell people.
    Report(SourceReport),
    /// Close the connection once what was sent has left.
    Close,
}

/// What a source has to say about a follower.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SourceReport {
    /// It was refused.
    #[error("refused: {reason}: {detail}")]
    Refused {
        /// Why.
        reason: Refusal,
        /// What it was told.
        detail: String,
    },
    /// It refused what it was sent.
    #[error("was refused by the follower: {0}")]
    RefusedByPeer(String),
    /// It holds entries that are not in this source's history.
    #[error("holds lsn {lsn}, which is not in this history; the source is durable up to {durable}")]
    Diverged {
        /// Where it stands.
        lsn: Lsn,
        /// Where the source stands.
        durable: Lsn,
    },
    /// It holds more of the epoch that this source decides in than the source itself: the source has lost what was durable.
    #[error("holds lsn {} of this source's epoch, and the source's log ends at {durable}: the source has lost entries", .position.lsn)]
    Lost {
        /// Where the follower stands.
        position: Position,
        /// Where the source's log ends.
        durable: Lsn,
    },
    /// It holds other frames of the epoch that this source decides in: the source has lost those, and has gone on.
    #[error(
        "holds another lsn {} of this source's epoch: the source has lost entries, and has gone on without them",
        .position.lsn
    )]
    Forked {
        /// Where it stands.
        position: Position,
    },
    /// It has promised a later epoch: this source has been replaced.
    #[error("has promised epoch {0}, which is later than this source's")]
    Fenced(Epoch),
    /// It is seeded.
    #[error("is being seeded with the snapshot at lsn {0}")]
    Seeding(Lsn),
}

impl Source {
    /// A core for a connection whose peer has been authenticated.
    pub fn new(config: SourceConfig, peer: Peer, durable: State, now: Duration) -> Source {
        Source {
            heartbeat_due: now + config.heartbeat,
            config,
            peer,
            phase: Phase::AwaitHello,
            durable,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
        }
    }

    /// Takes a message of the follower.
    pub fn handle(&mut self, message: Message) -> Vec<SourceAction> {
        match (&mut self.phase, message) {
            (Phase::Closed, _) => Vec::new(),
            (Phase::AwaitHello, Message::Hello(hello)) => self.greet(&hello),
            (Phase::Following(_), Message::Ack(ack)) => self.acknowledged(ack),
            (Phase::Seeding(state), Message::Ack(ack)) if ack.position == state.position => {
                self.follow(Some(ack.position), ack.position.lsn.next(), vec![SourceAction::Acked(ack)])
            }
            (Phase::Diverged { asked: asked @ None }, Message::Probe { lsn }) => {
                *asked = Some(lsn);
                vec![SourceAction::Lookup(lsn)]
            }
            (_, Message::Refused(refused)) => self.refused_by_peer(&refused),
            (_, other) => {
                self.refuse(Refusal::Protocol, format!("a {} message is not expected now", other.name()))
            }
        }
    }

    /// Takes a later durable state of the source's log.
    pub fn durable(&mut self, state: State) -> Vec<SourceAction> {
        if state.position.lsn > self.durable.position.lsn {
            self.durable = state;
        }
        self.pump(Vec::new())
    }

    /// Takes the answer to [`SourceAction::Lookup`].
    pub fn found(&mut self, lsn: Lsn, found: Result<Lookup, ReadError>) -> Vec<SourceAction> {
        let found = match found {
            Ok(found) => found,
            Err(error) => return self.refuse(Refusal::Unreadable, error.to_string()),
        };
        match &mut self.phase {
            Phase::Checking(held) if held.position.lsn == lsn => {
                let held = *held;
                self.checked(held, found)
            }
            Phase::Diverged { asked } if *asked == Some(lsn) => {
                *asked = None;
                vec![SourceAction::Send(Message::Probed { lsn, found })]
            }
            _ => Vec::new(),
        }
    }

    /// Takes the frames that were read, together with what is durable in the same log now.
    pub fn read(&mut self, durable: State, frames: Result<Vec<Frame>, ReadError>) -> Vec<SourceAction> {
        let Phase::Following(following) = &mut self.phase else { return Vec::new() };
        following.reading = false;
        let frames = match frames {
            Ok(frames) => frames,
            Err(error @ ReadError::Trimmed { .. }) => {
                return self.refuse(Refusal::Trimmed, error.to_string());
            }
            Err(error) => return self.refuse(Refusal::Unreadable, error.to_string()),
        };
        if durable.position.lsn > self.durable.position.lsn {
            self.durable = durable;
        }
        let Some(last) = frames.last().map(Frame::last) else { return self.pump(Vec::new()) };
        if last > self.durable.position.lsn {
            let detail = format!("lsn {last} was read before it was durable");
            return self.refuse(Refusal::Unreadable, detail);
        }
        following.next = last.next();
        let message = match Frames::of(self.durable.position.lsn, &frames) {
            Ok(message) => message,
            Err(error) => return self.refuse(Refusal::Unreadable, error.to_string()),
        };
        for frame in &frames {
            let bytes = frame.bytes().len();
            self.in_flight_bytes += bytes;
            self.in_flight.push_back(Sent { position: frame.position(), bytes });
        }
        self.pump(vec![SourceAction::SendFrames(message)])
    }

    /// Takes the state of the opened snapshot.
    pub fn snapshot(&mut self, opened: Result<State, String>) -> Vec<SourceAction> {
        let Phase::OpeningSeed(reason) = &self.phase else { return Vec::new() };
        match opened {
            Err(error) => self.refuse(Refusal::Unreadable, format!("no snapshot: {error}")),
            Ok(state) => {
                let welcome = self.welcome(Lsn::ROOT, Verdict::Seed(*reason));
                self.phase = Phase::Seeding(state);
                vec![
                    SourceAction::Report(SourceReport::Seeding(state.position.lsn)),
                    SourceAction::Send(welcome),
                    SourceAction::Send(Message::SeedOffer { state }),
                    SourceAction::StreamSnapshot,
                ]
            }
        }
    }

    /// Says that every part of the snapshot has been written to its stream.
    pub fn snapshot_sent(&mut self, sent: Result<(u32, u64), String>) -> Vec<SourceAction> {
        match (&self.phase, sent) {
            (Phase::Seeding(_), Ok((parts, bytes))) => {
                vec![SourceAction::Send(Message::SeedDone { parts, bytes })]
            }
            (Phase::Seeding(_), Err(error)) => {
                self.refuse(Refusal::Unreadable, format!("the snapshot cannot be sent: {error}"))
            }
            _ => Vec::new(),
        }
    }

    /// Says that the source's log has ended.
    pub fn ended(&mut self, terminal: &Terminal) -> Vec<SourceAction> {
        let reason =
            if matches!(terminal, Terminal::Fenced { .. }) { Refusal::Fenced } else { Refusal::Ended };
        self.refuse(reason, terminal.to_string())
    }

    /// Lets time pass; `wall` is the source's wall clock.
    pub fn tick(&mut self, now: Duration, wall: LogTime) -> Vec<SourceAction> {
        let talking = !matches!(self.phase, Phase::AwaitHello | Phase::Checking(_) | Phase::Closed);
        if !talking || now < self.heartbeat_due {
            return Vec::new();
        }
        self.heartbeat_due = now + self.config.heartbeat;
        let heartbeat = Heartbeat { state: self.durable, time: wall };
        vec![SourceAction::Send(Message::Heartbeat(heartbeat))]
    }

    /// When [`Source::tick`] has something to do again.
    pub fn tick_due(&self) -> Duration {
        self.heartbeat_due
    }

    /// Whether nothing more will happen.
    pub fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed)
    }

    fn greet(&mut self, hello: &Hello) -> Vec<SourceAction> {
        if hello.volume != self.config.volume {
            let detail = format!("this is volume {}, not {}", self.config.volume, hello.volume);
            return self.refuse(Refusal::ForeignVolume, detail);
        }
        if hello.branch != self.config.branch {
            let detail = format!("this is branch {}, not {}", self.config.branch, hello.branch);
            return self.refuse(Refusal::ForeignBranch, detail);
        }
        if hello.node != self.peer.node {
            let detail = format!("the connection belongs to node {}, not {}", self.peer.node, hello.node);
            return self.refuse(Refusal::UnknownMember, detail);
        }
        if let Some(promised) = hello.promised
            && is_older(self.config.epoch, promised)
            && self.peer.role.holds_copy()
        {
            let mut actions = vec![SourceAction::Report(SourceReport::Fenced(promised))];
            actions.extend(self.refuse(Refusal::Fenced, format!("you have promised epoch {promised}")));
            return actions;
        }
        match hello.resume {
            Resume::Fresh if !self.peer.role.holds_copy() => {
                self.refuse(Refusal::Role, "an observer gets no snapshot".to_owned())
            }
            Resume::Fresh => self.seed(SeedReason::Fresh),
            Resume::After(position) => {
                self.phase = Phase::Checking(Ack { position, data_lsn: hello.data_lsn.min(position.lsn) });
                vec![SourceAction::Lookup(position.lsn)]
            }
            Resume::From(lsn) => {
                let from = lsn.max(Lsn::FIRST);
                if from > self.durable.position.lsn.next() {
                    let detail =
                        format!("lsn {lsn} is beyond the durable end at {}", self.durable.position.lsn);
                    return self.refuse(Refusal::Trimmed, detail);
                }
                let welcome = self.welcome(from, Verdict::Tail);
                self.follow(None, from, vec![SourceAction::Send(welcome)])
            }
        }
    }

    fn checked(&mut self, held: Ack, found: Lookup) -> Vec<SourceAction> {
        let position = held.position;
        let claimed = Point { lsn: position.lsn, hash: position.hash };
        match found {
            Lookup::End(point) if point == claimed => {
                let welcome = self.welcome(position.lsn.next(), Verdict::Tail);
                let actions = vec![SourceAction::Acked(held), SourceAction::Send(welcome)];
                self.follow(Some(position), position.lsn.next(), actions)
            }
            // The end was looked up after the position had come, and nothing leaves a source before it is durable there.
            Lookup::Beyond { durable }
                if position.epoch == self.config.epoch && self.peer.role.holds_copy() =>
            {
                let (lsn, number) = (position.lsn, position.epoch.number);
                let detail = format!("you hold lsn {lsn} of epoch {number}, the source only {durable}");
                let mut actions = vec![SourceAction::Report(SourceReport::Lost { position, durable })];
                actions.extend(self.refuse(Refusal::Lost, detail));
                actions
            }
            Lookup::Trimmed { .. } if self.peer.role.holds_copy() => self.seed(SeedReason::Trimmed),
            Lookup::Trimmed { first } => {
                self.refuse(Refusal::Trimmed, format!("the log begins at lsn {first}"))
            }
            Lookup::End(_) | Lookup::Inside { .. } | Lookup::Beyond { .. } => {
                let welcome = self.welcome(Lsn::ROOT, Verdict::Diverged);
                self.phase = Phase::Diverged { asked: None };
                let (lsn, durable) = (position.lsn, self.durable.position.lsn);
                let is_own = position.epoch == self.config.epoch && self.peer.role.holds_copy();
                let report = match is_own {
                    true => SourceReport::Forked { position },
                    false => SourceReport::Diverged { lsn, durable },
                };
                vec![SourceAction::Report(report), SourceAction::Send(welcome)]
            }
        }
    }

    fn seed(&mut self, reason: SeedReason) -> Vec<SourceAction> {
        self.phase = Phase::OpeningSeed(reason);
        vec![SourceAction::OpenSnapshot]
    }

    fn follow(
        &mut self,
        acked: Option<Position>,
        next: Lsn,
        actions: Vec<SourceAction>,
    ) -> Vec<SourceAction> {
        self.phase = Phase::Following(Following { next, acked, reading: false });
        self.pump(actions)
    }

    fn acknowledged(&mut self, ack: Ack) -> Vec<SourceAction> {
        let Phase::Following(following) = &mut self.phase else { return Vec::new() };
        let known = following.acked == Some(ack.position)
            || self.in_flight.iter().any(|sent| sent.position == ack.position);
        if !known {
            let detail = format!("an acknowledgement of {}, which was not sent", ack.position);
            return self.refuse(Refusal::Protocol, detail);
        }
        following.acked = Some(ack.position);
        while let Some(sent) = self.in_flight.pop_front_if(|sent| sent.position.lsn <= ack.position.lsn) {
            self.in_flight_bytes -= sent.bytes;
        }
        self.pump(vec![SourceAction::Acked(ack)])
    }

    /// Reads on if there is something to send and room to send it.
    fn pump(&mut self, mut actions: Vec<SourceAction>) -> Vec<SourceAction> {
        let room = self.config.window_bytes.saturating_sub(self.in_flight_bytes);
        if let Phase::Following(following) = &mut self.phase
            && !following.reading
            && following.next <= self.durable.position.lsn
            && (room > 0 || self.in_flight.is_empty())
        {
            following.reading = true;
            let max_bytes = room.min(RUN_BYTES);
            actions.push(SourceAction::Read { from: following.next, max_bytes });
        }
        actions
    }

    fn welcome(&self, first: Lsn, verdict: Verdict) -> Message {
        let SourceConfig { volume, branch, node, epoch, .. } = self.config;
        Message::Welcome(Welcome { volume, branch, node, state: self.durable, epoch, first, verdict })
    }

    fn refuse(&mut self, reason: Refusal, detail: String) -> Vec<SourceAction> {
        if self.is_closed() {
            return Vec::new();
        }
        self.phase = Phase::Closed;
        vec![
            SourceAction::Report(SourceReport::Refused { reason, detail: detail.clone() }),
            SourceAction::Send(Message::Refused(Refused { reason, detail })),
            SourceAction::Close,
        ]
    }

    fn refused_by_peer(&mut self, refused: &Refused) -> Vec<SourceAction> {
        self.phase = Phase::Closed;
        let report = SourceReport::RefusedByPeer(refused.to_string());
        vec![SourceAction::Report(report), SourceAction::Close]
    }
}

/// One message carries about so many bytes of frames.
const RUN_BYTES: usize = 1 << 20;
