//! Source and follower in simulated time, over a network that delays, loses connections and flips bits.
//!
//! One seed is one exact schedule. Control messages and frames travel on streams of their own and overtake each other.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use murphy_fs::MemberRole;
use murphy_log::{Epoch, Frame, Log, LogTime, Lsn, MemoryLog, NodeId, State, VolumeId};

use super::{BRANCH, VOLUME, base_state, epoch, extend, frames_in, keys, log_of, ms, test_frames};
use crate::{
    Durability, Follower, FollowerAction, FollowerConfig, FollowerReport, MemoryReplica, MemorySnapshots,
    Message, Peer, Refusal, Replica, SeedWriter, SnapshotSource, Source, SourceAction, SourceConfig,
    SourceReport, look_up,
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
struct World {
    now: Duration,
    random: Random,
    log: Arc<MemoryLog>,
    replica: MemoryReplica,
    follower: Follower,
    source: Option<Source>,
    config: SourceConfig,
    seed: Option<Box<dyn SeedWriter>>,
    queue: BTreeMap<(Duration, u64), (u64, Delivery)>,
    last: BTreeMap<Stream, Duration>,
    connection: u64,
    sequence: u64,
    flip_one_in: u64,
    source_reports: Vec<SourceReport>,
    reports: Vec<FollowerReport>,
    most_in_flight: usize,
    /// Whether the mirror begins ahead of its source.
    ahead: bool,
    in_flight: VecDeque<(Lsn, usize)>,
    /// Frames in order; the shell does not read them before the welcome.
    early: VecDeque<(u64, Bytes)>,
}

impl World {
    fn new(seed: u64, log: MemoryLog, base: Option<State>, durability: Durability) -> World {
        let replica = MemoryReplica::new(keys(), base, durability);
        World::with_replica(seed, log, replica)
    }

    fn with_replica(seed: u64, log: MemoryLog, replica: MemoryReplica) -> World {
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

    fn connect(&mut self) {
        self.connection += 1;
        self.last.clear();
        self.in_flight.clear();
        let peer = Peer { node: NodeId::from_bytes([2; 16]), role: MemberRole::Mirror };
        self.source = Some(Source::new(self.config.clone(), peer, self.log.durable().state(), self.now));
        let actions = self.follower.connected(self.now, self.replica.state());
        self.follower_does(actions);
    }

    fn disconnect(&mut self) {
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
                FollowerAction::Append(frame) => {
                    let first = frame.first();
                    match self.replica.append(frame) {
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

    fn run(&mut self, steps: u64) {
        (0..steps).for_each(|_| self.step());
    }

    /// Runs with reconnects until the mirror has everything durable that the source has.
    fn settle(&mut self) {
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

    fn all_frames(log: &dyn Log) -> Vec<Bytes> {
        log.read(log.first()).unwrap().map(|frame| frame.unwrap().bytes().clone()).collect()
    }
}

#[test]
fn a_mirror_ends_with_the_bytes_of_its_source_whatever_the_network_does() {
    for seed in 0..40 {
        let log = MemoryLog::held(base_state());
        let mut world = World::new(seed, log, Some(base_state()), Durability::Held);
        let mut random = Random(seed + 77);
        for round in 0..60 {
            let frames = 1 + random.below(9) as usize;
            let more = test_frames(world.log.tail(), 1, frames, 1 + random.below(5) as usize);
            extend(&world.log, &more);
            world.run(random.below(40));
            world.log.sync();
            match random.below(6) {
                0 => world.disconnect(),
                1 if world.source.is_none() || round % 7 == 0 => world.connect(),
                2 => {
                    world.disconnect();
                    world.replica.crash();
                    // A crash of the mirror's process takes the core with it.
                    let config = FollowerConfig {
                        volume: VOLUME,
                        branch: BRANCH,
                        node: NodeId::from_bytes([2; 16]),
                        silence: ms(5000),
                    };
                    world.follower = Follower::new(config, keys(), world.replica.state(), None);
                }
                _ => {}
            }
            world.run(random.below(60));
        }
        world.settle();
        let mirror = world.replica.log().unwrap();
        assert_eq!(World::all_frames(&*mirror), World::all_frames(&*world.log), "seed {seed}");
        assert_eq!(world.reports, [], "seed {seed}");
        assert_eq!(world.source_reports, [], "seed {seed}");
        assert!(world.most_in_flight < 20_000 + (1 << 16), "window: {}", world.most_in_flight);
    }
}

/// Nothing that is not durable at the source may be anywhere else.
#[test]
fn what_the_source_has_not_synced_reaches_no_mirror() {
    let mut world = World::new(3, MemoryLog::held(base_state()), Some(base_state()), Durability::Immediate);
    extend(&world.log, &test_frames(base_state(), 1, 20, 3));
    world.connect();
    world.run(3000);
    assert_eq!(world.replica.state(), Some(base_state()));
    world.log.sync();
    world.settle();
    assert_eq!(world.replica.state(), Some(world.log.tail()));
}

#[test]
fn flipped_bits_are_refused_and_reported_and_never_stored() {
    let mut refused = 0;
    for seed in 0..10 {
        let frames = test_frames(base_state(), 1, 300, 4);
        let mut world =
            World::new(seed, log_of(base_state(), &frames), Some(base_state()), Durability::Immediate);
        world.flip_one_in = 3;
        world.config.window_bytes = 4000;
        world.settle();
        assert_eq!(World::all_frames(&*world.replica.log().unwrap()), World::all_frames(&*world.log));
        refused += world.reports.len();
        for report in &world.reports {
            let expected = matches!(report, FollowerReport::BadFrame(_) | FollowerReport::Protocol(_));
            assert!(expected, "{report}");
        }
    }
    assert!(refused > 50, "only {refused} flips were noticed");
}

#[test]
fn a_fresh_mirror_is_seeded_and_then_follows() {
    let frames = test_frames(base_state(), 1, 50, 4);
    let log = log_of(base_state(), &frames);
    log.trim(Lsn::new(100)).unwrap();
    let mut world = World::new(5, log, None, Durability::Immediate);
    world.settle();
    extend(&world.log, &test_frames(world.log.tail(), 1, 5, 2));
    world.settle();
    assert!(matches!(world.reports[..], [FollowerReport::Seeding { .. }]), "{:?}", world.reports);
}

/// A follower that cannot bridge a gap says so and seeds itself anew, within seconds.
#[test]
fn a_mirror_below_the_trimmed_log_is_seeded_and_says_so() {
    let frames = test_frames(base_state(), 1, 50, 4);
    let log = log_of(base_state(), &frames);
    log.trim(Lsn::new(100)).unwrap();
    let mut world = World::new(5, log, Some(base_state()), Durability::Immediate);
    world.settle();
    assert!(world.now < Duration::from_secs(2));
    let trimmed = crate::SeedReason::Trimmed;
    assert!(
        matches!(world.reports[..], [FollowerReport::Seeding { reason, .. }] if reason == trimmed),
        "{:?}",
        world.reports
    );
}

#[test]
fn a_connection_lost_while_seeding_starts_again() {
    for steps in 1..60 {
        let log = log_of(base_state(), &test_frames(base_state(), 1, 20, 4));
        let mut world = World::new(steps, log, None, Durability::Immediate);
        world.connect();
        world.run(steps);
        world.disconnect();
        world.settle();
    }
}

/// An old source that comes back: its tail is kept and named, and it follows the new one.
#[test]
fn a_divergent_tail_is_kept_and_the_mirror_follows_from_the_common_ancestor() {
    let shared = test_frames(base_state(), 0, 30, 3);
    let fork = shared.last().unwrap().state();
    let own_tail = test_frames(fork, 1, 7, 2);
    let new_tail = frames_in(epoch(2), fork, 2, 11, 4);
    let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
    for frame in shared.iter().chain(&own_tail) {
        replica.append(frame.clone()).unwrap();
    }
    let log = log_of(base_state(), &shared);
    extend(&log, &new_tail);
    let mut world = World::with_replica(9, log, replica);
    world.settle();
    let kept = world.replica.kept();
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].ancestor.map(|point| point.lsn), Some(fork.position.lsn));
    assert_eq!(kept[0].log.tail(), own_tail.last().unwrap().state());
    assert!(matches!(world.reports[..], [FollowerReport::Diverged { .. }]), "{:?}", world.reports);
    assert!(matches!(world.source_reports[..], [SourceReport::Diverged { .. }]));
    assert_eq!(World::all_frames(&*world.replica.log().unwrap()), World::all_frames(&*world.log));
}

/// The source lost what the mirror holds: the mirror throws nothing away.
#[test]
fn a_mirror_ahead_of_its_source_stops_and_keeps_everything() {
    let frames = test_frames(base_state(), 0, 30, 3);
    let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
    frames.iter().for_each(|frame| replica.append(frame.clone()).unwrap());
    let mut world = World::with_replica(9, log_of(base_state(), &frames[..20]), replica);
    world.ahead = true;
    world.connect();
    world.run(2000);
    assert!(matches!(world.reports[..], [FollowerReport::Ahead { .. }]), "{:?}", world.reports);
    assert!(matches!(world.source_reports[..], [SourceReport::Diverged { .. }]));
    assert_eq!(world.replica.state(), Some(frames[29].state()));
    assert!(world.replica.kept().is_empty());
}

#[test]
fn a_foreign_volume_is_refused_by_name() {
    let mut world = World::new(1, log_of(base_state(), &[]), Some(base_state()), Durability::Immediate);
    world.config.volume = VolumeId::from_bytes([9; 16]);
    world.connect();
    world.run(100);
    let [FollowerReport::Refused { reason: Refusal::ForeignVolume, detail }] = &world.reports[..] else {
        panic!("{:?}", world.reports)
    };
    assert!(detail.contains(&world.config.volume.to_string()), "{detail}");
}

/// A sealed mirror must not help the old source to acknowledge anything.
#[test]
fn after_a_promise_older_frames_and_acknowledgements_end() {
    let mut world = World::new(4, MemoryLog::new(base_state()), Some(base_state()), Durability::Immediate);
    extend(&world.log, &test_frames(base_state(), 1, 3, 2));
    world.settle();
    world.run(100);
    let sealed = world.replica.promise(epoch(2)).unwrap();
    world.follower.promised(epoch(2));
    extend(&world.log, &test_frames(world.log.tail(), 1, 3, 2));
    world.run(200);
    assert_eq!(world.replica.state(), sealed);
    assert!(matches!(world.reports[..], [FollowerReport::OldEpoch { .. }]), "{:?}", world.reports);
    world.connect();
    world.run(200);
    assert!(world.source_reports.contains(&SourceReport::Fenced(epoch(2))), "{:?}", world.source_reports);
    assert_eq!(world.replica.state(), sealed);
    // The source of the promised epoch is followed.
    extend(&world.log, &[]);
    let log = log_of(base_state(), &[]);
    for frame in world.replica.log().unwrap().read(Lsn::FIRST).unwrap() {
        extend(&log, &[frame.unwrap()]);
    }
    extend(&log, &frames_in(epoch(2), log.tail(), 1, 4, 2));
    world.log = Arc::new(log);
    world.config.epoch = epoch(2);
    world.disconnect();
    world.settle();
}

/// An epoch of the same number that another node began is as old as any.
#[test]
fn a_promise_is_to_one_epoch_of_that_number_only() {
    let other = Epoch { number: 2, ..epoch(7) };
    let mut world = World::new(4, MemoryLog::new(base_state()), Some(base_state()), Durability::Immediate);
    world.replica.promise(epoch(2)).unwrap();
    world.follower.promised(epoch(2));
    world.config.epoch = other;
    extend(&world.log, &frames_in(other, base_state(), 1, 3, 2));
    world.connect();
    world.run(200);
    assert!(world.source_reports.contains(&SourceReport::Fenced(epoch(2))));
    assert_eq!(world.replica.state(), Some(base_state()));
    assert!(world.replica.promise(other).is_err());
}

/// The lag is true when nothing happens, and grows when nothing is heard.
#[test]
fn the_lag_is_zero_on_an_idle_source_and_grows_when_it_is_gone() {
    let mut world = World::new(4, MemoryLog::new(base_state()), Some(base_state()), Durability::Immediate);
    extend(&world.log, &test_frames(base_state(), 1, 3, 2));
    world.settle();
    world.run(10_000);
    let idle = world.follower.status(world.now, "a".to_owned());
    assert_eq!((idle.connected, idle.lag_ms, idle.error), (true, 0, None));
    world.disconnect();
    extend(&world.log, &test_frames(world.log.tail(), 1, 3, 2));
    world.run(3_000);
    let gone = world.follower.status(world.now, "a".to_owned());
    assert!(!gone.connected && (3_000..4_100).contains(&gone.lag_ms), "{gone:?}");
    world.settle();
    world.run(50);
    assert_eq!(world.follower.status(world.now, "a".to_owned()).lag_ms, 0);
}

/// Losing the source without a goodbye must not leave the mirror waiting for ever.
#[test]
fn a_silent_source_is_given_up() {
    let mut world = World::new(4, MemoryLog::new(base_state()), Some(base_state()), Durability::Immediate);
    world.connect();
    world.run(100);
    world.source = None;
    world.run(5_200);
    assert!(matches!(world.reports[..], [FollowerReport::Silent(_)]), "{:?}", world.reports);
}

#[test]
fn an_acknowledgement_of_what_was_not_sent_is_refused() {
    let mut world = World::new(4, MemoryLog::new(base_state()), Some(base_state()), Durability::Immediate);
    extend(&world.log, &test_frames(base_state(), 1, 3, 2));
    world.settle();
    let mut forged = world.log.tail().position;
    forged.lsn = forged.lsn.next();
    let actions = world
        .source
        .as_mut()
        .unwrap()
        .handle(Message::Ack(crate::Ack { position: forged, data_lsn: Lsn::ROOT }));
    let refused = |action: &SourceAction| matches!(action, SourceAction::Send(Message::Refused(refused)) if refused.reason == Refusal::Protocol);
    assert!(actions.iter().any(refused), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, SourceAction::Acked(_))));
}
