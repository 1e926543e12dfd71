//! Peers that break the protocol, and media that fail, in the middle of a conversation: each gets an answer that names the reason, and
//! nothing more happens on that connection.

use std::sync::Arc;

use murphy_fs::MemberRole;
use murphy_log::{
    BranchId, Frame, FrameError, Log, LogTime, Lsn, MemoryLog, NodeId, Position, ReadError, State, Terminal,
    VolumeId,
};

use super::{BRANCH, VOLUME, base_state, epoch, keys, log_of, ms, test_frames, world::World};
use crate::{
    Ack, Durability, Follower, FollowerAction, FollowerConfig, FollowerReport, Frames, Hello, Lookup,
    MemoryReplica, Message, MessageError, MessageFault, Peer, Refusal, Refused, Replica, Resume, SeedReason,
    Source, SourceAction, SourceConfig, SourceReport, Verdict, Welcome, look_up,
};

const NODE: NodeId = NodeId::from_bytes([2; 16]);
const SOURCE: NodeId = NodeId::from_bytes([1; 16]);

fn source(log: &MemoryLog, role: MemberRole) -> Source {
    let config = SourceConfig {
        volume: VOLUME,
        branch: BRANCH,
        node: SOURCE,
        epoch: epoch(1),
        window_bytes: 20_000,
        heartbeat: ms(1000),
    };
    Source::new(config, Peer { node: NODE, role }, log.durable().state(), ms(0))
}

fn hello(resume: Resume) -> Hello {
    Hello { volume: VOLUME, branch: BRANCH, node: NODE, resume, data_lsn: Lsn::ROOT, promised: None }
}

/// A source that follows this mirror's log, and is asked to read.
fn following(log: &MemoryLog) -> Source {
    let mut source = source(log, MemberRole::Mirror);
    source.handle(Message::Hello(hello(Resume::After(base_state().position))));
    source.found(Lsn::ROOT, look_up(log, Lsn::ROOT));
    source
}

/// The one refusal in these actions, after which the source closes and does nothing more, whatever comes.
fn refusal(source: &mut Source, actions: &[SourceAction]) -> (Refusal, String) {
    let refused = actions.iter().find_map(|action| match action {
        SourceAction::Send(Message::Refused(refused)) => Some((refused.reason, refused.detail.clone())),
        _ => None,
    });
    let (reason, detail) = refused.unwrap_or_else(|| panic!("not refused: {actions:?}"));
    let told = |action: &SourceAction| matches!(action, SourceAction::Report(SourceReport::Refused { reason: told, .. }) if *told == reason);
    assert!(actions.iter().any(told) && matches!(actions.last(), Some(SourceAction::Close)), "{actions:?}");
    assert!(source.is_closed());
    let state = base_state();
    let later = [
        source.handle(Message::Hello(hello(Resume::Fresh))),
        source.handle(Message::Ack(Ack { position: state.position, data_lsn: Lsn::ROOT })),
        source.durable(State { position: Position { lsn: Lsn::new(99), ..state.position }, ..state }),
        source.found(Lsn::ROOT, Ok(Lookup::Beyond { durable: Lsn::ROOT })),
        source.found(Lsn::ROOT, Err(damaged())),
        source.read(state, Ok(Vec::new())),
        source.snapshot(Ok(state)),
        source.snapshot_sent(Ok((1, 1))),
        source.ended(&Terminal::Fenced { by: epoch(9) }),
        source.tick(ms(1_000_000), LogTime::from_nanos(1)),
    ];
    assert!(later.iter().all(Vec::is_empty), "{later:?}");
    (reason, detail)
}

fn damaged() -> ReadError {
    ReadError::Damaged { place: "segment 7".to_owned(), lsn: Lsn::new(5), message: "a bit".to_owned() }
}

/// The fear: a follower that says the wrong thing gets frames, or an answer that tells nobody what was wrong.
#[test]
fn a_follower_that_says_the_wrong_thing_is_refused_by_name() {
    let log = log_of(base_state(), &test_frames(base_state(), 1, 5, 3));
    let mut early = source(&log, MemberRole::Mirror);
    let actions = early.handle(Message::Ack(Ack { position: base_state().position, data_lsn: Lsn::ROOT }));
    let (reason, detail) = refusal(&mut early, &actions);
    assert_eq!((reason, detail.contains("ack message")), (Refusal::Protocol, true), "{detail}");

    let mut late = following(&log);
    let actions = late.handle(Message::Hello(hello(Resume::Fresh)));
    assert_eq!(refusal(&mut late, &actions).0, Refusal::Protocol, "a second hello");

    let mut lies = source(&log, MemberRole::Mirror);
    let other = NodeId::from_bytes([3; 16]);
    let actions = lies.handle(Message::Hello(Hello { node: other, ..hello(Resume::Fresh) }));
    let (reason, detail) = refusal(&mut lies, &actions);
    assert_eq!(reason, Refusal::UnknownMember);
    assert!(detail.contains(&other.to_string()) && detail.contains(&NODE.to_string()), "{detail}");

    let mut ahead = source(&log, MemberRole::Observer);
    let actions = ahead.handle(Message::Hello(hello(Resume::From(Lsn::new(18)))));
    let (reason, detail) = refusal(&mut ahead, &actions);
    assert_eq!(
        (reason, detail.contains("beyond the durable end at 16")),
        (Refusal::Trimmed, true),
        "{detail}"
    );
    let next = source(&log, MemberRole::Observer).handle(Message::Hello(hello(Resume::From(Lsn::new(17)))));
    assert!(
        matches!(next[..], [SourceAction::Send(Message::Welcome(_))]),
        "the next entry may be waited for"
    );

    // An observer cannot be given a snapshot.
    log.trim(Lsn::new(10)).unwrap();
    let mut behind = source(&log, MemberRole::Observer);
    behind.handle(Message::Hello(hello(Resume::After(base_state().position))));
    let actions = behind.found(Lsn::ROOT, look_up(&log, Lsn::ROOT));
    let (reason, detail) = refusal(&mut behind, &actions);
    assert_eq!((reason, detail.as_str()), (Refusal::Trimmed, "the log begins at lsn 8"));
}

/// The fear: a source whose log cannot be read sends what it has not read, or waits without a word.
#[test]
fn a_source_that_cannot_read_its_log_says_so_and_sends_nothing() {
    let frames = test_frames(base_state(), 1, 5, 3);
    let log = log_of(base_state(), &frames);
    let durable = log.durable().state();

    let mut unread = following(&log);
    let actions = unread.read(durable, Err(damaged()));
    assert_eq!(refusal(&mut unread, &actions), (Refusal::Unreadable, damaged().to_string()));

    let mut trimmed = following(&log);
    let error = ReadError::Trimmed { lsn: Lsn::FIRST, first: Lsn::new(9) };
    let actions = trimmed.read(durable, Err(error));
    assert_eq!(refusal(&mut trimmed, &actions).0, Refusal::Trimmed);

    let mut checking = source(&log, MemberRole::Mirror);
    checking.handle(Message::Hello(hello(Resume::After(base_state().position))));
    let actions = checking.found(Lsn::ROOT, Err(damaged()));
    assert_eq!(refusal(&mut checking, &actions), (Refusal::Unreadable, damaged().to_string()));

    // What is read and not durable stays here: a log that hands it out is not believed.
    let early = log_of(base_state(), &frames[..2]);
    let mut following = following(&early);
    let actions = following.read(early.durable().state(), Ok(frames.clone()));
    let (reason, detail) = refusal(&mut following, &actions);
    assert_eq!((reason, detail.contains("before it was durable")), (Refusal::Unreadable, true), "{detail}");
}

#[test]
fn a_snapshot_that_cannot_be_opened_or_sent_ends_the_connection_with_the_reason() {
    let log = log_of(base_state(), &test_frames(base_state(), 1, 5, 3));
    let fresh = || {
        let mut source = source(&log, MemberRole::Mirror);
        let actions = source.handle(Message::Hello(hello(Resume::Fresh)));
        assert!(matches!(actions[..], [SourceAction::OpenSnapshot]), "{actions:?}");
        source
    };
    let mut unopened = fresh();
    let actions = unopened.snapshot(Err("the index is gone".to_owned()));
    let (reason, detail) = refusal(&mut unopened, &actions);
    assert_eq!((reason, detail.contains("the index is gone")), (Refusal::Unreadable, true), "{detail}");

    let mut unsent = fresh();
    unsent.snapshot(Ok(log.tail()));
    let actions = unsent.snapshot_sent(Err("a block is damaged".to_owned()));
    let (reason, detail) = refusal(&mut unsent, &actions);
    assert_eq!((reason, detail.contains("a block is damaged")), (Refusal::Unreadable, true), "{detail}");
}

/// Mirrors must learn that a source has been replaced from itself too, and that is another reason than a broken disk.
#[test]
fn a_source_whose_log_has_ended_says_whether_it_was_replaced() {
    let log = log_of(base_state(), &[]);
    let ends = [
        (Terminal::Fenced { by: epoch(2) }, Refusal::Fenced),
        (Terminal::Poisoned { message: Arc::from("a sync failed") }, Refusal::Ended),
        (Terminal::Unknown { message: Arc::from("no answer") }, Refusal::Ended),
    ];
    for (terminal, expected) in ends {
        let mut source = following(&log);
        let actions = source.ended(&terminal);
        assert_eq!(refusal(&mut source, &actions), (expected, terminal.to_string()));
    }
}

/// A follower with this much in its own log, whose hello has been sent.
fn follower(durable: Option<State>) -> Follower {
    let config = FollowerConfig { volume: VOLUME, branch: BRANCH, node: NODE, silence: ms(5000) };
    let mut follower = Follower::new(config, keys(), durable, None);
    follower.connected(ms(0), durable);
    follower
}

fn welcome(state: State, verdict: Verdict) -> Message {
    let (volume, branch, first) = (VOLUME, BRANCH, Lsn::FIRST);
    Message::Welcome(Welcome { volume, branch, node: SOURCE, state, epoch: epoch(1), first, verdict })
}

/// How the follower ended the connection: its report, and what the source is told.
fn ending(follower: &mut Follower, mut actions: Vec<FollowerAction>) -> (FollowerReport, Option<Refused>) {
    assert!(matches!(actions.pop(), Some(FollowerAction::Disconnect)), "{actions:?}");
    let Some(FollowerAction::Report(report)) = actions.pop() else { panic!("no report: {actions:?}") };
    let told = match actions.pop() {
        None => None,
        Some(FollowerAction::Send(Message::Refused(refused))) => Some(refused),
        other => panic!("{other:?}"),
    };
    assert!(actions.is_empty(), "{actions:?}");
    assert_eq!(follower.status(ms(0), "a".to_owned()).error, Some(report.to_string()));
    // Whatever still comes on this connection, nothing happens.
    let heartbeat = crate::Heartbeat { state: base_state(), time: LogTime::from_nanos(1) };
    assert!(follower.handle(ms(1), Message::Heartbeat(heartbeat)).is_empty());
    assert!(follower.handle(ms(1), welcome(base_state(), Verdict::Tail)).is_empty());
    assert!(follower.tick(ms(1_000_000)).is_empty());
    (report, told)
}

fn protocol(follower: &mut Follower, message: Message, text: &str) {
    let actions = follower.handle(ms(0), message);
    let (report, told) = ending(follower, actions);
    let told = told.expect("the source hears what was wrong");
    assert!(matches!(&report, FollowerReport::Protocol(what) if what.contains(text)), "{report}");
    assert_eq!((told.reason, told.detail.contains(text)), (Refusal::Protocol, true), "{}", told.detail);
}

/// The fear: a source that says the wrong thing moves a mirror to somewhere that it has not checked.
#[test]
fn a_source_that_says_the_wrong_thing_is_left_and_told_why() {
    let frames = test_frames(base_state(), 1, 2, 3);
    let run = || Message::Frames(Frames::of(frames[1].last(), &frames).unwrap());
    protocol(&mut follower(Some(base_state())), run(), "frames message is not expected");
    protocol(&mut follower(None), welcome(base_state(), Verdict::Tail), "holds nothing");
    protocol(&mut follower(None), welcome(base_state(), Verdict::Diverged), "holds nothing");
    let mut follows = follower(Some(base_state()));
    follows.handle(ms(0), welcome(base_state(), Verdict::Tail));
    protocol(&mut follows, Message::SeedOffer { state: base_state() }, "seed");
    let mut searches = follower(Some(frames[1].state()));
    searches.handle(ms(0), welcome(base_state(), Verdict::Diverged));
    let (lsn, found) = (Lsn::new(2), Lookup::Beyond { durable: Lsn::ROOT });
    protocol(&mut searches, Message::Probed { lsn, found }, "lsn 2, which was not asked for");

    for (volume, branch) in [(VolumeId::from_bytes([9; 16]), BRANCH), (VOLUME, BranchId::from_bytes([9; 16]))]
    {
        let Message::Welcome(good) = welcome(base_state(), Verdict::Tail) else { unreachable!() };
        let mut foreign = follower(Some(base_state()));
        let actions = foreign.handle(ms(0), Message::Welcome(Welcome { volume, branch, ..good }));
        assert_eq!(ending(&mut foreign, actions).0, FollowerReport::Foreign { volume, branch });
    }

    let mut garbled = follower(Some(base_state()));
    let what = MessageFault::Version(99);
    let actions = garbled.undecodable(&MessageError { message: "welcome", offset: 4, what });
    let (report, told) = ending(&mut garbled, actions);
    assert!(report.to_string().contains("welcome message, offset 4"), "{report}");
    assert_eq!(told.map(|told| told.reason), Some(Refusal::Protocol));
}

/// The fear: the mirror's own disk fails, and the mirror goes on with a gap, or stops for ever.
#[test]
fn a_log_that_takes_no_frame_ends_the_connection_and_the_next_one_goes_on_from_there() {
    let frames = test_frames(base_state(), 1, 6, 3);
    let mut follower = follower(Some(base_state()));
    follower.handle(ms(0), welcome(frames[5].state(), Verdict::Tail));
    let run = |from: usize| Message::Frames(Frames::of(frames[5].last(), &frames[from..]).unwrap());
    let appends = |actions: &[FollowerAction]| -> Vec<Lsn> {
        let first = |action: &FollowerAction| match action {
            FollowerAction::Append { frame, .. } => Some(frame.first()),
            _ => None,
        };
        actions.iter().filter_map(first).collect()
    };
    let firsts = |from: usize| frames[from..].iter().map(Frame::first).collect::<Vec<_>>();
    assert_eq!(appends(&follower.handle(ms(0), run(0))), firsts(0));
    // Two were queued, the third failed; of the two the first is durable when the connection is made again.
    let actions = follower.append_failed(frames[2].first(), "no space".to_owned());
    let (report, told) = ending(&mut follower, actions);
    assert_eq!(report, FollowerReport::Append { lsn: frames[2].first(), message: "no space".to_owned() });
    assert_eq!(told.unwrap().reason, Refusal::Storage);
    follower.disconnected(None);
    let actions = follower.connected(ms(10), Some(frames[0].state()));
    let [FollowerAction::Send(Message::Hello(hello))] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!(hello.resume, Resume::After(frames[0].position()));
    follower.handle(ms(10), welcome(frames[5].state(), Verdict::Tail));
    assert_eq!(appends(&follower.handle(ms(11), run(1))), firsts(2), "what is queued is not queued twice");
}

/// The fear: a frame that is sent again is another one, and the mirror holds a history that its source does not.
#[test]
fn what_is_sent_once_more_must_be_what_was_queued() {
    let frames = test_frames(base_state(), 1, 3, 3);
    let other = test_frames(base_state(), 2, 3, 3);
    let mut follower = follower(Some(base_state()));
    follower.handle(ms(0), welcome(frames[2].state(), Verdict::Tail));
    let run = |frames: &[Frame]| Message::Frames(Frames::of(frames[0].last(), frames).unwrap());
    follower.handle(ms(0), run(&frames));
    follower.disconnected(None);
    follower.connected(ms(1), Some(base_state()));
    follower.handle(ms(1), welcome(other[2].state(), Verdict::Tail));
    let actions = follower.handle(ms(1), run(&other));
    let (report, told) = ending(&mut follower, actions);
    assert_eq!(report, FollowerReport::BadFrame(FrameError::Fork { lsn: other[0].first() }));
    assert_eq!(told.unwrap().reason, Refusal::BadFrame);
}

/// Its own log cannot be read while the common ancestor is looked for: nothing may be set aside.
#[test]
fn a_search_that_cannot_read_the_own_log_stops_and_sets_nothing_aside() {
    let own = test_frames(base_state(), 1, 3, 3);
    let mut follower = follower(Some(own[2].state()));
    let actions = follower.handle(ms(0), welcome(base_state(), Verdict::Diverged));
    assert!(matches!(actions[..], [FollowerAction::LookupOwn(_)]), "{actions:?}");
    let actions = follower.own(Err(damaged().to_string()));
    let (report, told) = ending(&mut follower, actions);
    let text = report.to_string();
    assert!(text.contains("own log") && text.contains(&damaged().to_string()), "{text}");
    assert_eq!(told, None);
    assert!(follower.own(Ok(Lookup::Beyond { durable: Lsn::ROOT })).is_empty(), "the search is over");
}

#[test]
fn a_snapshot_that_is_not_what_was_offered_is_refused_and_the_mirror_does_not_follow() {
    let offered = test_frames(base_state(), 1, 3, 3)[2].state();
    let seeding = || {
        let mut follower = follower(None);
        follower.handle(ms(0), welcome(offered, Verdict::Seed(SeedReason::Fresh)));
        let actions = follower.handle(ms(0), Message::SeedOffer { state: offered });
        assert!(matches!(actions[..], [FollowerAction::BeginSeed { state }] if state == offered));
        follower
    };
    let mut other = seeding();
    let actions = other.seeded(Ok(base_state()));
    let (report, told) = ending(&mut other, actions);
    assert!(matches!(&report, FollowerReport::SeedFailed(what) if what.contains("was offered")), "{report}");
    assert_eq!(told, None);
    let mut failed = seeding();
    let actions = failed.seeded(Err("digest differs".to_owned()));
    let (report, told) = ending(&mut failed, actions);
    assert_eq!(report, FollowerReport::SeedFailed("digest differs".to_owned()));
    assert_eq!(told.unwrap().reason, Refusal::Storage);
    assert!(failed.seeded(Ok(offered)).is_empty() && !failed.is_following(), "nobody waits for it any more");
}

/// A frame that is whole and in its place, and whose chain was made with other keys, is of another volume.
#[test]
fn frames_that_do_not_continue_the_own_history_are_refused_and_what_came_before_is_kept() {
    let good = test_frames(base_state(), 1, 4, 3);
    let elsewhere = test_frames(good[0].state(), 2, 3, 3);
    let mut follower = follower(Some(base_state()));
    follower.handle(ms(0), welcome(good[3].state(), Verdict::Tail));
    let run = [good[0].clone(), good[1].clone(), elsewhere[1].clone()];
    let mut actions = follower.handle(ms(0), Message::Frames(Frames::of(good[3].last(), &run).unwrap()));
    let rest = actions.split_off(2);
    assert!(actions.iter().all(|action| matches!(action, FollowerAction::Append { .. })), "{actions:?}");
    let (report, told) = ending(&mut follower, rest);
    assert!(matches!(report, FollowerReport::BadFrame(_)), "{report}");
    assert_eq!(told.unwrap().reason, Refusal::BadFrame);
}

/// A source that holds a prefix and nothing else has lost entries; so the mirror says, if the source itself does not notice.
#[test]
fn a_source_that_holds_only_a_prefix_of_the_mirror_is_said_to_have_lost_entries() {
    let frames = test_frames(base_state(), 1, 6, 3);
    let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
    frames.iter().for_each(|frame| replica.append(frame.clone(), None).unwrap());
    let mut world = World::with_replica(3, log_of(base_state(), &frames[..4]), replica);
    let log = Arc::clone(&world.log);
    let own = frames[5].last();
    world.follower.connected(ms(0), world.replica.state());
    let mut actions = world.follower.handle(ms(0), welcome(frames[3].state(), Verdict::Diverged));
    while let Some(action) = actions.pop() {
        actions = match action {
            FollowerAction::LookupOwn(lsn) => world.follower.own(Ok(world.replica.look_up(lsn).unwrap())),
            FollowerAction::Send(Message::Probe { lsn }) => {
                let found = look_up(&*log, lsn).unwrap();
                world.follower.handle(ms(0), Message::Probed { lsn, found })
            }
            other => {
                actions.push(other);
                break;
            }
        };
    }
    let expected = FollowerReport::Ahead { source_lsn: frames[3].last(), own_lsn: own };
    assert_eq!(ending(&mut world.follower, actions).0, expected);
    assert_eq!(world.replica.state(), Some(frames[5].state()), "nothing is set aside");
}
