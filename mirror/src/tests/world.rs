//! A source, a mirror and a network in simulated time.
//!
//! One seed is one exact schedule. Control messages and frames travel on streams of their own and overtake each other.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use murphy_fs::MemberRole;
use murphy_log::{Frame, Log, LogTime, Lsn, MemoryLog, NodeId, State};

use super::{BRANCH, VOLUME, keys, ms};
use crate::{
    Durability, Follower, FollowerAction, FollowerConfig, FollowerReport, MemoryReplica, MemorySnapshots,
    Message, Peer, Replica, SeedWriter, SnapshotSource, Source, SourceAction, SourceConfig, SourceReport,
    look_up,
};

/// A small generator; good enough to choose delays.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Stream {
    ToSource,
    ToFollower,
    Frames,
}

enum Delivery {
    Message(Stream, Bytes),
    Seed(u64, Vec<u8>),
}

/// A source, a mirror and what lies between them.
pub(super) struct World {
    pub(super) now: Duration,
    random: Random,
    pub(super) log: Arc<MemoryLog>,
    pub(super) replica: MemoryReplica,
    pub(super) follower: Follower,
    pub(super) source: Option<Source>,
    pub(super) config: SourceConfig,
    seed: Option<Box<dyn SeedWriter>>,
    queue: BTreeMap<(Duration, u64), (u64, Delivery)>,
    last: BTreeMap<Stream, Duration>,
    connection: u64,
    sequence: u64,
    pub(super) flip_one_in: u64,
    pub(super) source_reports: Vec<SourceReport>,
    pub(super) reports: Vec<FollowerReport>,
    pub(super) most_in_flight: usize,
    /// Whether the mirror begins ahead of its source.
    pub(super) ahead: bool,
    in_flight: VecDeque<(Lsn, usize)>,
    /// Frames in order; the shell does not read them before the welcome.
    early: VecDeque<(u64, Bytes)>,
}

impl World {
    pub(super) fn new(seed: u64, log: MemoryLog, base: Option<State>, durability: Durability) -> World {
        let replica = MemoryReplica::new(keys(), base, durability);
        World::with_replica(seed, log, replica)
    }

    pub(super) fn with_replica(seed: u64, log: MemoryLog, replica: MemoryReplica) -> World {
        let node = NodeId::from_bytes([2; 16]);
        let config = FollowerConfig { volume: VOLUME, branch: BRANCH, node, silence: ms(5000) };
        let follower = Follower::new(config, keys(), replica.state(), replica.promised());
        let config = SourceConfig {
            volume: VOLUME,
            branch: BRANCH,
            node: NodeId::from_bytes([1; 16]),
            epoch: log.tail().position.epoch,
            window_bytes: 20_000,
            heartbeat: ms(1000),
        };
        World {
            now: Duration::ZERO,
            random: Random(seed * 2 + 1),
            log: Arc::new(log),
            replica,
            follower,
            source: None,
            config,
            seed: None,
            queue: BTreeMap::new(),
            last: BTreeMap::new(),
            connection: 0,
            sequence: 0,
            flip_one_in: 0,
            source_reports: Vec::new(),
            reports: Vec::new(),
            most_in_flight: 0,
            ahead: false,
            in_flight: VecDeque::new(),
            early: VecDeque::new(),
        }
    }

    fn send(&mut self, stream: Stream, message: &Message) {
        let mut bytes = message.encode();
        if self.flip_one_in > 0 && stream == Stream::Frames && self.random.below(self.flip_one_in) == 0 {
            let at = 8 + self.random.below(bytes.len() as u64 - 8) as usize;
            bytes[at] ^= 1 << self.random.below(8);
        }
        let due = self.now + ms(1 + self.random.below(20));
        let due = due.max(self.last.get(&stream).copied().unwrap_or_default());
        self.last.insert(stream, due);
        self.push(due, Delivery::Message(stream, bytes.into()));
    }

    fn push(&mut self, due: Duration, delivery: Delivery) {
        self.sequence += 1;
        self.queue.insert((due, self.sequence), (self.connection, delivery));
    }

    pub(super) fn connect(&mut self) {
        self.connection += 1;
        self.last.clear();
        self.in_flight.clear();
        let peer = Peer { node: NodeId::from_bytes([2; 16]), role: MemberRole::Mirror };
        self.source = Some(Source::new(self.config.clone(), peer, self.log.durable().state(), self.now));
        let actions = self.follower.connected(self.now, self.replica.state());
        self.follower_does(actions);
    }

    pub(super) fn disconnect(&mut self) {
        self.connection += 1;
        self.source = None;
        self.seed = None;
        self.follower.disconnected(None);
    }

    /// One millisecond: deliveries, durability, ticks.
    fn step(&mut self) {
        self.now += ms(1);
        while let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (connection, delivery) = entry.remove();
            if connection == self.connection {
                self.deliver(delivery);
            }
            self.deliver_early();
        }
        let durable = self.log.durable().state();
        self.source_event(|source| source.durable(durable));
        let (now, wall) = (self.now, LogTime::from_nanos(self.now.as_nanos() as u64));
        self.source_event(|source| source.tick(now, wall));
        if self.random.below(3) == 0 {
            self.replica.sync();
        }
        if let Some(state) = self.replica.state() {
            let actions = self.follower.durable(state);
            self.follower_does(actions);
        }
        let actions = self.follower.tick(self.now);
        self.follower_does(actions);
        self.never_ahead();
    }

    /// What every mirror must hold at any time.
    fn never_ahead(&self) {
        if let Some(log) = self.replica.log() {
            let (queued, durable) = (log.tail().position.lsn, self.log.durable().state().position.lsn);
            let same_branch = self.replica.kept().is_empty() && self.reports.is_empty() && !self.ahead;
            assert!(!same_branch || queued <= durable, "mirror at {queued}, source durable at {durable}");
        }
    }

    fn deliver(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Message(Stream::Frames, bytes) => {
                self.early.push_back((self.connection, bytes));
            }
            Delivery::Message(Stream::ToSource, bytes) => {
                let message = Message::decode(&bytes).unwrap();
                if let Message::Ack(ack) = &message {
                    while self.in_flight.pop_front_if(|(lsn, _)| *lsn <= ack.position.lsn).is_some() {}
                }
                self.source_event(|source| source.handle(message));
            }
            Delivery::Message(Stream::ToFollower, bytes) => self.deliver_to_follower(&bytes),
            Delivery::Seed(offset, bytes) => match &mut self.seed {
                Some(seed) => seed.write_at(offset, &bytes).unwrap(),
                None => self.push(self.now + ms(1), Delivery::Seed(offset, bytes)),
            },
        }
    }

    fn deliver_early(&mut self) {
        while self.follower.is_welcome()
            && let Some((connection, bytes)) = self.early.pop_front()
        {
            if connection == self.connection {
                self.deliver_to_follower(&bytes);
            }
        }
    }

    fn deliver_to_follower(&mut self, bytes: &Bytes) {
        let actions = match Message::decode(bytes) {
            Ok(message) => self.follower.handle(self.now, message),
            Err(error) => self.follower.undecodable(&error),
        };
        self.follower_does(actions);
    }

    fn source_event(&mut self, event: impl FnOnce(&mut Source) -> Vec<SourceAction>) {
        let Some(source) = &mut self.source else { return };
        let mut actions: VecDeque<SourceAction> = event(source).into();
        while let Some(action) = actions.pop_front() {
            let more = self.source_does(action);
            actions.extend(more);
        }
    }

    fn source_does(&mut self, action: SourceAction) -> Vec<SourceAction> {
        let Some(source) = &mut self.source else { return Vec::new() };
        match action {
            SourceAction::Send(message) => self.send(Stream::ToFollower, &message),
            SourceAction::SendFrames(frames) => {
                for frame in &frames.run {
                    self.in_flight.push_back((frame.header().last(), frame.bytes().len()));
                }
                self.most_in_flight = self.most_in_flight.max(self.in_flight.iter().map(|sent| sent.1).sum());
                self.send(Stream::Frames, &Message::Frames(frames));
            }
            SourceAction::Lookup(lsn) => return source.found(lsn, look_up(&*self.log, lsn)),
            SourceAction::Read { from, max_bytes } => {
                let frames = self.log.read(from).map(|reader| {
                    let mut bytes = 0;
                    let fits = |frame: &Frame| {
                        let fits = bytes < max_bytes.max(1);
                        bytes += frame.bytes().len();
                        fits
                    };
                    reader.map(Result::unwrap).take_while(fits).collect()
                });
                return source.read(self.log.durable().state(), frames);
            }
            SourceAction::OpenSnapshot => return source.snapshot(Ok(self.log.durable().state())),
            SourceAction::StreamSnapshot => {
                let mut content = Vec::new();
                let snapshots = MemorySnapshots { log: Arc::clone(&self.log), bytes: 5000 };
                snapshots.open().unwrap().reader.read_to_end(&mut content).unwrap();
                let parts: Vec<_> = content.chunks(1000).map(<[u8]>::to_vec).collect();
                let sent = (parts.len() as u32, content.len() as u64);
                for (index, part) in parts.into_iter().enumerate() {
                    let due = self.now + ms(1 + self.random.below(20));
                    self.push(due, Delivery::Seed(index as u64 * 1000, part));
                }
                return self.source.as_mut().map_or_else(Vec::new, |source| source.snapshot_sent(Ok(sent)));
            }
            SourceAction::Acked(ack) => {
                let held = self.log.read(ack.position.lsn).ok().and_then(|mut reader| reader.next());
                if let Some(Ok(frame)) = held {
                    assert_eq!(frame.position(), ack.position, "an acknowledgement of another history");
                }
            }
            SourceAction::Report(report) => self.source_reports.push(report),
            SourceAction::Close => {}
        }
        Vec::new()
    }

    fn follower_does(&mut self, actions: Vec<FollowerAction>) {
        for action in actions {
            let more = match action {
                FollowerAction::Send(message) => {
                    self.send(Stream::ToSource, &message);
                    Vec::new()
                }
                FollowerAction::Append { frame, told } => {
                    let first = frame.first();
                    match self.replica.append(frame, told) {
                        Ok(()) => Vec::new(),
                        Err(error) => {
                            let actions = self.follower.append_failed(first, error.to_string());
                            return self.follower_does(actions);
                        }
                    }
                }
                FollowerAction::LookupOwn(lsn) => {
                    self.follower.own(self.replica.look_up(lsn).map_err(|error| error.to_string()))
                }
                FollowerAction::BeginSeed { state } => {
                    self.seed = Some(self.replica.begin_seed(state).unwrap());
                    Vec::new()
                }
                FollowerAction::FinishSeed { bytes, .. } => {
                    // The parts that are still under way arrive first.
                    while self
                        .queue
                        .values()
                        .any(|(c, d)| *c == self.connection && matches!(d, Delivery::Seed(..)))
                    {
                        let key =
                            *self.queue.iter().find(|(_, (_, d))| matches!(d, Delivery::Seed(..))).unwrap().0;
                        if let Some((_, Delivery::Seed(offset, part))) = self.queue.remove(&key) {
                            self.seed.as_mut().unwrap().write_at(offset, &part).unwrap();
                        }
                    }
                    let seed = self.seed.take().unwrap();
                    self.follower.seeded(seed.finish(bytes).map_err(|error| error.to_string()))
                }
                FollowerAction::SetAside { ancestor, tail } => {
                    self.replica.set_aside(ancestor, tail).unwrap();
                    Vec::new()
                }
                FollowerAction::Report(report) => {
                    self.reports.push(report);
                    Vec::new()
                }
                FollowerAction::Disconnect => {
                    self.disconnect();
                    Vec::new()
                }
            };
            self.follower_does(more);
        }
    }

    pub(super) fn run(&mut self, steps: u64) {
        (0..steps).for_each(|_| self.step());
    }

    /// Runs with reconnects until the mirror has everything durable that the source has.
    pub(super) fn settle(&mut self) {
        for _ in 0..60_000 {
            if self.source.is_none() {
                self.connect();
            }
            self.step();
            if self.replica.state() == Some(self.log.durable().state()) {
                return;
            }
        }
        panic!("the mirror did not catch up: {:?} {:?}", self.reports, self.source_reports);
    }

    pub(super) fn all_frames(log: &dyn Log) -> Vec<Bytes> {
        log.read(log.first()).unwrap().map(|frame| frame.unwrap().bytes().clone()).collect()
    }
}
