//! Source and follower over a network that delays, loses connections and flips bits.

use std::{sync::Arc, time::Duration};

use murphy_fs::MemberRole;
use murphy_log::{Epoch, Log, Lsn, MemoryLog, NodeId, State, VolumeId};

use super::{
    BRANCH, VOLUME, base_state, epoch, extend, frames_in, keys, log_of, ms, test_frames,
    world::{Random, World},
};
use crate::{
    Durability, Follower, FollowerConfig, FollowerReport, Hello, MemoryReplica, Message, Peer, Refusal,
    Replica, ReplicaError, Resume, Source, SourceAction, SourceReport, look_up,
};

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
        replica.append(frame.clone(), None).unwrap();
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

/// A mirror whose tail of epoch 1 has lost, and a source of epoch 2 whose log begins behind where they part.
fn unrelated(seed: u64) -> (World, State) {
    let shared = test_frames(base_state(), 0, 30, 3);
    let fork = shared.last().unwrap().state();
    let tail = test_frames(fork, 1, 9, 2);
    let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
    shared.iter().chain(&tail).for_each(|frame| replica.append(frame.clone(), None).unwrap());
    let log = log_of(base_state(), &shared);
    extend(&log, &frames_in(epoch(2), fork, 2, 30, 2));
    log.trim(fork.position.lsn.advanced(6)).unwrap();
    let mut world = World::with_replica(seed, log, replica);
    world.config.epoch = epoch(2);
    (world, tail.last().unwrap().state())
}

/// The fear: for the whole time of a long seeding a mirror holds nothing, and a second disaster in that time takes the volume.
#[test]
fn a_mirror_without_a_common_ancestor_holds_what_it_has_until_the_snapshot_is_there() {
    for lost_after in [None, Some(10), Some(40), Some(90), Some(150)] {
        let (mut world, held) = unrelated(3);
        for step in 0..60_000 {
            if world.source.is_none() {
                world.connect();
            }
            if lost_after == Some(step) {
                world.disconnect();
            }
            world.run(1);
            let state = world.replica.state().expect("it never holds nothing");
            assert!(state == held || state.position.epoch == epoch(2), "{state:?}");
            if state == world.log.durable().state() {
                break;
            }
        }
        assert_eq!(world.replica.state(), Some(world.log.durable().state()));
        let kept = world.replica.kept();
        assert_eq!((kept.len(), kept[0].ancestor, kept[0].log.tail()), (1, None, held));
        let unrelated = |report: &FollowerReport| matches!(report, FollowerReport::Unrelated { .. });
        assert!(world.reports.iter().any(unrelated), "{:?}", world.reports);
    }
}

/// The fear: a mirror that was about to give its log up for a successor gives it up for whoever else answers there.
#[test]
fn what_was_to_be_replaced_for_a_later_epoch_is_not_for_an_earlier_one() {
    let (mut world, held) = unrelated(3);
    world.connect();
    while !matches!(world.reports[..], [FollowerReport::Unrelated { .. }]) {
        world.run(1);
    }
    world.config.epoch = epoch(1);
    world.connect();
    world.run(500);
    let refused = |report: &FollowerReport| matches!(report, FollowerReport::NotReplaced { leads, .. } if *leads == epoch(1));
    assert!(world.reports.iter().any(refused), "{:?}", world.reports);
    assert_eq!((world.replica.state(), world.replica.kept().len()), (Some(held), 0));
}

/// The source lost what the mirror holds: it must hear so, and the mirror throws nothing away.
#[test]
fn a_mirror_ahead_of_its_source_stops_and_keeps_everything() {
    let frames = test_frames(base_state(), 0, 30, 3);
    let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
    frames.iter().for_each(|frame| replica.append(frame.clone(), None).unwrap());
    let mut world = World::with_replica(9, log_of(base_state(), &frames[..20]), replica);
    world.ahead = true;
    world.connect();
    world.run(2000);
    let lost = SourceReport::Lost { position: frames[29].position(), durable: frames[19].last() };
    assert_eq!(world.source_reports.first(), Some(&lost), "{:?}", world.source_reports);
    let refused = |report: &FollowerReport| matches!(report, FollowerReport::Refused { reason, .. } if *reason == Refusal::Lost);
    assert!(world.reports.iter().all(refused) && !world.reports.is_empty(), "{:?}", world.reports);
    assert_eq!(world.replica.state(), Some(frames[29].state()));
    assert!(world.replica.kept().is_empty());
}

/// The source lost entries, did not notice, and went on in the same epoch. A mirror that gave its frames up would acknowledge again, as if
/// nothing had been lost.
#[test]
fn frames_of_the_epoch_that_the_source_still_leads_are_not_set_aside() {
    for own in [1, 7] {
        let shared = test_frames(base_state(), 0, 30, 3);
        let fork = shared.last().unwrap().state();
        let lost = test_frames(fork, 1, own, 2);
        let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
        shared.iter().chain(&lost).for_each(|frame| replica.append(frame.clone(), None).unwrap());
        let log = log_of(base_state(), &shared);
        extend(&log, &test_frames(fork, 2, 11, 4));
        let mut world = World::with_replica(9, log, replica);
        for _ in 0..3 {
            world.connect();
            world.run(1000);
            world.disconnect();
        }
        let ancestor = Some(crate::Point { lsn: fork.position.lsn, hash: fork.position.hash });
        let position = lost.last().unwrap().position();
        let own_lsn = position.lsn;
        assert_eq!(world.reports, vec![FollowerReport::Forked { ancestor, own_lsn }; 3]);
        assert_eq!(world.source_reports, vec![SourceReport::Forked { position }; 3]);
        let error = world.follower.status(world.now, "a".to_owned()).error.unwrap();
        assert!(error.contains("murphy promote"), "{error}");
        assert_eq!(world.replica.state(), Some(lost.last().unwrap().state()));
        assert!(world.replica.kept().is_empty());
    }
}

/// Where a promotion begins is decided before it has an entry of its own: what an older epoch has beyond it has lost.
#[test]
fn an_older_tail_is_set_aside_also_before_the_new_epoch_has_an_entry() {
    let shared = test_frames(base_state(), 0, 30, 3);
    let fork = shared.last().unwrap().state();
    let tail = test_frames(fork, 1, 7, 2);
    let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
    shared.iter().chain(&tail).for_each(|frame| replica.append(frame.clone(), None).unwrap());
    let mut world = World::with_replica(9, log_of(base_state(), &shared), replica);
    world.ahead = true;
    world.config.epoch = epoch(2);
    world.settle();
    assert_eq!(world.replica.kept().len(), 1);
    assert!(matches!(world.reports[..], [FollowerReport::Diverged { .. }]), "{:?}", world.reports);
    assert!(matches!(world.source_reports[..], [SourceReport::Diverged { .. }]));
}

/// One that holds nothing durable proves nothing.
#[test]
fn an_observer_that_claims_a_position_beyond_the_end_does_not_end_the_source() {
    let log = log_of(base_state(), &test_frames(base_state(), 0, 5, 3));
    let node = NodeId::from_bytes([2; 16]);
    let mut position = log.tail().position;
    position.lsn = position.lsn.next();
    let config = World::new(1, log_of(base_state(), &[]), None, Durability::Immediate).config;
    for role in [MemberRole::Observer, MemberRole::Mirror] {
        let mut source = Source::new(config.clone(), Peer { node, role }, log.tail(), ms(0));
        let resume = Resume::After(position);
        let hello =
            Hello { volume: VOLUME, branch: BRANCH, node, resume, data_lsn: Lsn::ROOT, promised: None };
        source.handle(Message::Hello(hello));
        let actions = source.found(position.lsn, look_up(&log, position.lsn));
        let lost = |action: &SourceAction| matches!(action, SourceAction::Report(SourceReport::Lost { .. }));
        assert_eq!(actions.iter().any(lost), role == MemberRole::Mirror, "{actions:?}");
    }
}

/// The fear: an observer, which holds no copy and takes over from nobody, says that it has promised a later epoch, and every fsync ends.
#[test]
fn the_promise_of_an_observer_ends_no_source() {
    let log = log_of(base_state(), &test_frames(base_state(), 0, 5, 3));
    let node = NodeId::from_bytes([2; 16]);
    let config = World::new(1, log_of(base_state(), &[]), None, Durability::Immediate).config;
    for role in [MemberRole::Observer, MemberRole::Mirror, MemberRole::Writer] {
        for resume in [Resume::From(Lsn::FIRST), Resume::After(log.tail().position), Resume::Fresh] {
            let mut source = Source::new(config.clone(), Peer { node, role }, log.tail(), ms(0));
            let promised = Some(epoch(2));
            let hello = Hello { volume: VOLUME, branch: BRANCH, node, resume, data_lsn: Lsn::ROOT, promised };
            let mut actions = source.handle(Message::Hello(hello));
            actions.extend(source.found(log.tail().position.lsn, look_up(&log, log.tail().position.lsn)));
            let fenced = |action: &SourceAction| matches!(action, SourceAction::Report(SourceReport::Fenced(by)) if *by == epoch(2));
            assert_eq!(actions.iter().any(fenced), role.holds_copy(), "{role}, {resume:?}: {actions:?}");
        }
    }
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
    // The source of the promised epoch is followed, also through what it holds of the epoch before and this mirror lacks.
    let log = log_of(base_state(), &[]);
    for frame in world.log.read(Lsn::FIRST).unwrap() {
        extend(&log, &[frame.unwrap()]);
    }
    assert!(log.tail().position.lsn > world.replica.state().unwrap().position.lsn);
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

/// The fear: a mirror that was joined by hand to the successor has promised nothing, and lets somebody who begins the epoch before that, or
/// another one of its number, count it.
#[test]
fn a_mirror_promises_nothing_older_than_what_it_holds() {
    let old = test_frames(base_state(), 1, 3, 2);
    let fork = old[2].state();
    for promised in [None, Some(epoch(2)), Some(epoch(3))] {
        let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
        if let Some(promised) = promised {
            replica.promise(promised).unwrap();
        }
        // A source that was told of the promise has sent them.
        for frame in old.iter().chain(&frames_in(epoch(3), fork, 1, 2, 2)) {
            replica.append(frame.clone(), promised).unwrap();
        }
        let held = replica.state();
        for older in [epoch(1), epoch(2), Epoch { number: 3, ..epoch(9) }] {
            let refused = replica.promise(older);
            assert!(
                matches!(refused, Err(ReplicaError::Promised { .. })),
                "{promised:?}, {older}: {refused:?}"
            );
            assert_eq!(replica.promised(), promised, "a refused promise changes nothing");
        }
        for good in [epoch(3), epoch(4)] {
            assert_eq!(replica.promise(good), Ok(held), "{promised:?}");
            assert_eq!(replica.promised(), Some(good));
        }
        // A later promise counts more than the log.
        assert_eq!(replica.promise(epoch(3)), Err(ReplicaError::Promised { promised: epoch(4) }));
    }
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
