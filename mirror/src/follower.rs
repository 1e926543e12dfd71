//! The mirror's side of its connection, without I/O: what it does with what the source sends.
//!
//! Invariants:
//! - A frame is appended only after its checksum, its linkage to the frame before and the chain over its entries have been
//!   verified, and only if its epoch is not older than what this mirror has promised without the source's knowing.
//! - The tail never passes a frame that was refused or could not be appended: whatever fails, the next connection goes on from there.
//! - Only what is durable in the mirror's own log is acknowledged, and after a promise nothing of an older epoch.
//! - A different history stops it: it looks for the common ancestor and has the own branch kept before anything else happens. Without a common
//!   ancestor it gives nothing up before a snapshot has come that takes the place of what it holds.
//! - Only a tail of older epochs than the one that the source decides in is ever set aside. A source without the frames of its own epoch that
//!   this mirror holds has lost them, and they may have been acknowledged.

mod report;

use std::{collections::VecDeque, time::Duration};

use murphy_log::{
    BranchId, Epoch, Frame, FrameError, Lsn, NodeId, Position, State, UnverifiedFrame, VolumeId, VolumeKeys,
};

use crate::{
    history::{AncestorSearch, Lookup, Point, SearchStep, is_older},
    message::{Ack, Frames, Hello, Message, Refusal, Refused, Resume, Verdict, Welcome},
    replica::forbidding_promise,
    status::{FollowerStatus, LagMeter, millis},
};
pub use report::FollowerReport;

/// The mirror's side of one connection after another.
#[derive(Debug)]
pub struct Follower {
    config: FollowerConfig,
    keys: VolumeKeys,
    phase: Phase,
    /// The last durable state of the own log; `None` while there is none.
    durable: Option<State>,
    /// Appended and not yet durable, oldest first.
    pending: VecDeque<State>,
    /// What was pending when the connection was made: the source sends it once more, whether or not it is durable by then.
    resent: VecDeque<Point>,
    data_lsn: Lsn,
    promised: Option<Epoch>,
    /// What the source of this connection was told of it.
    told: Option<Epoch>,
    acked: Option<Ack>,
    /// What is held has no point in common with what the source has left: a snapshot is to take its place.
    is_unrelated: bool,
    lag: LagMeter,
    source_lsn: Lsn,
    last_heard: Duration,
    error: Option<String>,
    /// The source has said that this mirror is no member any more.
    revoked: bool,
}

/// What a follower knows of itself and how it behaves.
#[derive(Clone, Debug)]
pub struct FollowerConfig {
    /// The volume it mirrors.
    pub volume: VolumeId,
    /// The branch it follows.
    pub branch: BranchId,
    /// The node it runs on.
    pub node: NodeId,
    /// After so long without a word of the source the connection is given up, and the lag grows.
    pub silence: Duration,
}

#[derive(Debug)]
enum Phase {
    Disconnected,
    Greeting,
    Following,
    Seeding(State),
    Searching {
        search: AncestorSearch,
        /// What the source said to be its durable position.
        source: Position,
        /// The epoch that it decides in.
        leads: Epoch,
    },
    /// This connection is over; it only has to be closed.
    Stopped,
}

/// What the shell does for the core.
#[derive(Debug)]
pub enum FollowerAction {
    /// Send on the control stream.
    Send(Message),
    /// Append to the own log. If that fails, call [`Follower::append_failed`] and drop the actions after it.
    Append {
        /// What to append.
        frame: Frame,
        /// The promise that the source was told of.
        told: Option<Epoch>,
    },
    /// Look an LSN up in the own log and hand the answer to [`Follower::own`].
    LookupOwn(Lsn),
    /// Get ready to take the parts of a snapshot of this state; what is held now stays until the snapshot is complete.
    BeginSeed {
        /// The state in the snapshot.
        state: State,
    },
    /// The snapshot has so many parts and bytes: when they are all there, install it and call [`Follower::seeded`].
    FinishSeed {
        /// The number of parts.
        parts: u32,
        /// The length in bytes.
        bytes: u64,
    },
    /// Keep what the own log holds after `ancestor` as a branch of its own, and go back to the ancestor. If that fails, call
    /// [`Follower::set_aside_failed`] and drop the actions after it.
    SetAside {
        /// The last common point.
        ancestor: Point,
        /// The end of what is kept.
        tail: Position,
    },
    /// Tell people.
    Report(FollowerReport),
    /// Give the connection up; connect again after a while.
    Disconnect,
}

impl Follower {
    /// A follower that is not connected; `durable` is the state of its own log, `promised` what it has promised.
    pub fn new(
        config: FollowerConfig,
        keys: VolumeKeys,
        durable: Option<State>,
        promised: Option<Epoch>,
    ) -> Follower {
        let mut lag = LagMeter::default();
        lag.reached(durable.map_or(Lsn::new(0), |state| state.position.lsn));
        Follower {
            config,
            keys,
            phase: Phase::Disconnected,
            durable,
            pending: VecDeque::new(),
            resent: VecDeque::new(),
            data_lsn: Lsn::new(0),
            promised,
            told: None,
            acked: None,
            is_unrelated: false,
            lag,
            source_lsn: Lsn::new(0),
            last_heard: Duration::ZERO,
            error: None,
            revoked: false,
        }
    }

    /// Says that a connection to the source stands, and what is durable in the own log now. Appended frames stay appended.
    pub fn connected(&mut self, now: Duration, durable: Option<State>) -> Vec<FollowerAction> {
        self.last_heard = now;
        self.acked = None;
        self.settle(durable);
        let point = |held: &State| Point { lsn: held.position.lsn, hash: held.position.hash };
        self.resent = self.pending.iter().map(point).collect();
        self.phase = Phase::Greeting;
        let held = self.durable.filter(|_| !self.is_unrelated);
        let resume = held.map_or(Resume::Fresh, |state| Resume::After(state.position));
        let FollowerConfig { volume, branch, node, .. } = self.config;
        let data_lsn = self.shown_data_lsn();
        self.told = self.promised;
        let hello = Hello { volume, branch, node, resume, data_lsn, promised: self.promised };
        vec![FollowerAction::Send(Message::Hello(hello))]
    }

    /// Says that the connection is gone, or could not be made.
    pub fn disconnected(&mut self, error: Option<String>) {
        self.phase = Phase::Disconnected;
        self.error = error.or_else(|| self.error.take());
    }

    /// Takes a message of the source.
    pub fn handle(&mut self, now: Duration, message: Message) -> Vec<FollowerAction> {
        if matches!(self.phase, Phase::Disconnected | Phase::Stopped) {
            return Vec::new();
        }
        self.last_heard = now;
        match (&mut self.phase, message) {
            (_, Message::Refused(Refused { reason, detail })) => {
                self.revoked = reason == Refusal::Revoked;
                self.stop(FollowerReport::Refused { reason, detail }, None)
            }
            (Phase::Greeting, Message::Welcome(welcome)) => self.welcomed(now, &welcome),
            (Phase::Following, Message::Frames(frames)) => self.take_frames(now, frames),
            (_, Message::Heartbeat(heartbeat)) => {
                self.hear(now, heartbeat.state.position.lsn);
                Vec::new()
            }
            (Phase::Seeding(state), Message::SeedOffer { state: offered }) => {
                *state = offered;
                vec![FollowerAction::BeginSeed { state: offered }]
            }
            (Phase::Seeding(_), Message::SeedDone { parts, bytes }) => {
                vec![FollowerAction::FinishSeed { parts, bytes }]
            }
            (Phase::Searching { search, .. }, Message::Probed { lsn, found }) => {
                match search.other(lsn, found) {
                    Some(step) => self.search_on(step),
                    None => self.protocol(format!("an answer about lsn {lsn}, which was not asked for")),
                }
            }
            (_, other) => self.protocol(format!("a {} message is not expected now", other.name())),
        }
    }

    /// Says that something arrived that is no message: damaged on the way, or not of this protocol.
    pub fn undecodable(&mut self, error: &crate::MessageError) -> Vec<FollowerAction> {
        match &error.what {
            crate::MessageFault::Frame(frame) => self.bad_frame(frame.clone()),
            _ => self.protocol(error.to_string()),
        }
    }

    /// Takes a later durable state of the own log.
    pub fn durable(&mut self, state: State) -> Vec<FollowerAction> {
        self.settle(Some(state));
        self.acknowledge()
    }

    /// Takes the LSN up to which every byte is in the own store.
    pub fn data(&mut self, lsn: Lsn) -> Vec<FollowerAction> {
        self.data_lsn = lsn;
        self.acknowledge()
    }

    /// Says that the frame beginning at `first` could not be appended.
    pub fn append_failed(&mut self, first: Lsn, message: String) -> Vec<FollowerAction> {
        self.pending.retain(|state| state.position.lsn < first);
        let reply = Refused { reason: Refusal::Storage, detail: message.clone() };
        self.stop(FollowerReport::Append { lsn: first, message }, Some(reply))
    }

    /// Takes the answer to [`FollowerAction::LookupOwn`].
    pub fn own(&mut self, found: Result<Lookup, String>) -> Vec<FollowerAction> {
        let Phase::Searching { search, .. } = &mut self.phase else { return Vec::new() };
        match found {
            Ok(found) => {
                let step = search.own(found);
                self.search_on(step)
            }
            Err(message) => {
                let lsn = self.tail().map_or(Lsn::ROOT, |state| state.position.lsn);
                self.stop(FollowerReport::Unreadable { lsn, message }, None)
            }
        }
    }

    /// Says that the own branch could not be set aside.
    pub fn set_aside_failed(&mut self, message: String) -> Vec<FollowerAction> {
        self.stop(FollowerReport::NotSetAside(message), None)
    }

    /// Says how the snapshot was installed: the state that the own log begins with now.
    pub fn seeded(&mut self, installed: Result<State, String>) -> Vec<FollowerAction> {
        let Phase::Seeding(offered) = &self.phase else { return Vec::new() };
        match installed {
            Ok(state) if state == *offered => {
                self.restart(state);
                self.phase = Phase::Following;
                self.acknowledge()
            }
            Ok(state) => {
                let found = format!("it holds {}, not the state that was offered", state.position);
                self.stop(FollowerReport::SeedFailed(found), None)
            }
            Err(error) => {
                let reply = Refused { reason: Refusal::Storage, detail: error.clone() };
                self.stop(FollowerReport::SeedFailed(error), Some(reply))
            }
        }
    }

    /// Says that `epoch` has been promised durably: frames and acknowledgements of older epochs end here, unless a source brings them that
    /// knows of the promise.
    pub fn promised(&mut self, epoch: Epoch) {
        if self.promised.is_none_or(|promised| is_older(promised, epoch)) {
            self.promised = Some(epoch);
        }
    }

    /// Lets time pass.
    pub fn tick(&mut self, now: Duration) -> Vec<FollowerAction> {
        let silent = now.saturating_sub(self.last_heard);
        if matches!(self.phase, Phase::Disconnected | Phase::Stopped) || silent < self.config.silence {
            return Vec::new();
        }
        self.stop(FollowerReport::Silent(silent), None)
    }

    /// Whether frames, or the parts of a snapshot, may come now.
    pub fn is_welcome(&self) -> bool {
        matches!(self.phase, Phase::Following | Phase::Seeding(_))
    }

    /// Whether frames may come now.
    pub fn is_following(&self) -> bool {
        matches!(self.phase, Phase::Following)
    }

    /// The last LSN known to be durable at the source.
    pub fn source_lsn(&self) -> Lsn {
        self.source_lsn
    }

    /// What to show of this follower, whose source is tried at `address`.
    pub fn status(&self, now: Duration, address: String) -> FollowerStatus {
        let connected = self.is_welcome();
        let quiet = now.saturating_sub(self.last_heard);
        let fresh = connected && quiet < self.config.silence / 2;
        let lag = if fresh { self.lag.lag(now) } else { self.lag.lag(now).max(quiet) };
        FollowerStatus {
            address,
            connected,
            source_lsn: self.source_lsn,
            metadata_lsn: self.durable.map_or(Lsn::new(0), |state| state.position.lsn),
            data_lsn: self.shown_data_lsn(),
            lag_ms: millis(lag),
            error: self.error.clone(),
            revoked: self.revoked,
        }
    }

    fn welcomed(&mut self, now: Duration, welcome: &Welcome) -> Vec<FollowerAction> {
        let Welcome { volume, branch, state, .. } = *welcome;
        if volume != self.config.volume || branch != self.config.branch {
            return self.stop(FollowerReport::Foreign { volume, branch }, None);
        }
        self.revoked = false;
        self.hear(now, state.position.lsn);
        match (welcome.verdict, self.durable) {
            (Verdict::Tail | Verdict::Diverged, Some(_)) if self.is_unrelated => {
                self.protocol(format!("{:?} where a snapshot was asked for", welcome.verdict))
            }
            (Verdict::Seed(_), Some(State { position: tail, .. }))
                if self.is_unrelated && !is_older(tail.epoch, welcome.epoch) =>
            {
                self.is_unrelated = false;
                self.stop(FollowerReport::NotReplaced { tail, leads: welcome.epoch }, None)
            }
            (Verdict::Tail, Some(_)) => {
                self.phase = Phase::Following;
                self.error = None;
                self.acknowledge()
            }
            (Verdict::Diverged, Some(own)) => {
                let search = AncestorSearch::new(own.position.lsn);
                let step = search.start();
                self.phase = Phase::Searching { search, source: state.position, leads: welcome.epoch };
                self.search_on(step)
            }
            (Verdict::Seed(reason), _) => {
                self.phase = Phase::Seeding(state);
                self.error = None;
                vec![FollowerAction::Report(FollowerReport::Seeding { lsn: state.position.lsn, reason })]
            }
            (verdict, None) => self.protocol(format!("{verdict:?} for a mirror that holds nothing")),
        }
    }

    fn take_frames(&mut self, now: Duration, frames: Frames) -> Vec<FollowerAction> {
        let mut actions = Vec::new();
        for frame in frames.run {
            match self.take_frame(now, frame) {
                Ok(frame) => {
                    let told = self.told;
                    actions.extend(frame.map(|frame| FollowerAction::Append { frame, told }));
                }
                Err(stop) => {
                    // What came before the refused frame is good, and is kept.
                    actions.extend(stop);
                    return actions;
                }
            }
        }
        self.hear(now, frames.durable_lsn);
        actions
    }

    fn take_frame(
        &mut self,
        now: Duration,
        frame: UnverifiedFrame,
    ) -> Result<Option<Frame>, Vec<FollowerAction>> {
        let header = *frame.header();
        if let Some(promised) = forbidding_promise(self.promised, header.epoch, self.told) {
            let report = FollowerReport::OldEpoch { lsn: header.first, found: header.epoch, promised };
            let reply = Refused { reason: Refusal::Fenced, detail: report.to_string() };
            return Err(self.stop(report, Some(reply)));
        }
        let Some(tail) = self.tail() else {
            return Err(self.protocol("frames for a mirror that holds nothing".to_owned()));
        };
        // A new connection goes on after what is durable; what is appended already comes once more.
        if header.last() <= tail.position.lsn {
            let end = Point { lsn: header.last(), hash: header.hash_after };
            let held = self.resent.pop_front_if(|held| *held == end).is_some();
            let fork = FrameError::Fork { lsn: header.first };
            return if held { Ok(None) } else { Err(self.bad_frame(fork)) };
        }
        match frame.verify(&self.keys, &tail.position) {
            Ok(frame) => {
                self.pending.push_back(frame.state());
                self.hear(now, frame.last());
                Ok(Some(frame))
            }
            Err(error) => Err(self.bad_frame(error)),
        }
    }

    fn search_on(&mut self, step: SearchStep) -> Vec<FollowerAction> {
        match step {
            SearchStep::Own(lsn) => vec![FollowerAction::LookupOwn(lsn)],
            SearchStep::Other(lsn) => vec![FollowerAction::Send(Message::Probe { lsn })],
            SearchStep::Found(ancestor) => self.diverged(ancestor),
        }
    }

    fn diverged(&mut self, ancestor: Option<Point>) -> Vec<FollowerAction> {
        let (Phase::Searching { source, leads, .. }, Some(own)) = (&self.phase, self.durable) else {
            return Vec::new();
        };
        let (tail, own_lsn) = (own.position, own.position.lsn);
        if !is_older(tail.epoch, *leads) {
            let source_end = Point { lsn: source.lsn, hash: source.hash };
            let report = match ancestor == Some(source_end) {
                true => FollowerReport::Ahead { source_lsn: source.lsn, own_lsn },
                false => FollowerReport::Forked { ancestor, own_lsn },
            };
            return self.stop(report, None);
        }
        let Some(ancestor) = ancestor else {
            self.is_unrelated = true;
            return self.stop(FollowerReport::Unrelated { tail }, None);
        };
        let mut actions = vec![FollowerAction::SetAside { ancestor, tail }];
        actions.extend(self.stop(FollowerReport::Diverged { ancestor, tail }, None));
        actions
    }

    fn acknowledge(&mut self) -> Vec<FollowerAction> {
        let (Phase::Following, Some(state)) = (&self.phase, self.durable) else { return Vec::new() };
        let sealed = forbidding_promise(self.promised, state.position.epoch, self.told).is_some();
        let ack = Ack { position: state.position, data_lsn: self.shown_data_lsn() };
        if sealed || self.acked == Some(ack) {
            return Vec::new();
        }
        self.acked = Some(ack);
        vec![FollowerAction::Send(Message::Ack(ack))]
    }

    /// The data position never passes the metadata position.
    fn shown_data_lsn(&self) -> Lsn {
        self.durable.map_or(Lsn::new(0), |state| state.position.lsn.min(self.data_lsn))
    }

    fn tail(&self) -> Option<State> {
        self.pending.back().copied().or(self.durable)
    }

    /// Takes over what is durable now; a log that begins anew or ends earlier than was appended takes its tail with it.
    fn settle(&mut self, durable: Option<State>) {
        let Some(state) = durable else {
            self.pending.clear();
            self.durable = None;
            return;
        };
        if self.durable.is_some_and(|known| state.position.lsn < known.position.lsn) {
            return self.restart(state);
        }
        while self.pending.pop_front_if(|held| held.position.lsn <= state.position.lsn).is_some() {}
        self.durable = Some(state);
        self.lag.reached(state.position.lsn);
    }

    fn restart(&mut self, state: State) {
        self.is_unrelated = false;
        self.pending.clear();
        self.resent.clear();
        self.durable = Some(state);
        self.acked = None;
        self.lag.restart(state.position.lsn);
    }

    fn hear(&mut self, now: Duration, lsn: Lsn) {
        self.source_lsn = self.source_lsn.max(lsn);
        self.lag.heard(now, lsn);
    }

    fn bad_frame(&mut self, error: FrameError) -> Vec<FollowerAction> {
        let reply = Refused { reason: Refusal::BadFrame, detail: error.to_string() };
        self.stop(FollowerReport::BadFrame(error), Some(reply))
    }

    fn protocol(&mut self, what: String) -> Vec<FollowerAction> {
        let reply = Refused { reason: Refusal::Protocol, detail: what.clone() };
        self.stop(FollowerReport::Protocol(what), Some(reply))
    }

    fn stop(&mut self, report: FollowerReport, reply: Option<Refused>) -> Vec<FollowerAction> {
        self.phase = Phase::Stopped;
        self.error = Some(report.to_string());
        let reply = reply.map(|reply| FollowerAction::Send(Message::Refused(reply)));
        let end = [FollowerAction::Report(report), FollowerAction::Disconnect];
        reply.into_iter().chain(end).collect()
    }
}
