//! What nodes lend each other, over real QUIC on the loopback interface.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_fs::{AcknowledgeError, Acknowledger, BlockStore, MemberRole, ObjectBlockStore};
use murphy_log::{
    Appender, Epoch, EpochId, Frame, Log, LogTime, Lsn, MemoryLog, Position, State, VolumeId, VolumeKeys,
};
use tokio::sync::watch;

use super::{
    BRANCH, PATIENCE, VOLUME, base_state, entry, epoch, frames_in, keys, log_of,
    packs::pack,
    quic::{Node, admit, dialer, follow, follow_as},
    test_frames,
};
use crate::{
    Ask, BorrowError, Dialer, Durability, ExchangeError, FollowerStatus, GiveError, Lender, MemoryReplica,
    MirrorAcknowledger, MirrorPart, Part, Refusal, Replica, ReplicaError, Stands,
};

/// The part of a mirror that follows nobody.
pub(super) fn alone(replica: Arc<dyn Replica>, heard: watch::Receiver<Lsn>) -> MirrorPart {
    let status = FollowerStatus {
        address: String::new(),
        connected: false,
        source_lsn: *heard.borrow(),
        metadata_lsn: Lsn::new(0),
        data_lsn: Lsn::new(0),
        lag_ms: 0,
        error: None,
        revoked: false,
    };
    MirrorPart::new(replica, heard, watch::Sender::new(status).subscribe())
}

/// A mirror that listens, and holds these frames.
pub(super) struct Mirror {
    pub(super) node: Node,
    pub(super) replica: Arc<MemoryReplica>,
    _heard: watch::Sender<Lsn>,
}

impl Mirror {
    pub(super) async fn start(frames: &[Frame], packs: Option<Arc<dyn BlockStore>>) -> Mirror {
        let node = Node::start(Arc::default(), packs).await;
        let replica = Arc::new(MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate));
        frames.iter().for_each(|frame| replica.append(frame.clone(), None).unwrap());
        let heard = watch::Sender::new(Lsn::new(77));
        node.services.become_part(Part::Mirror(alone(replica.clone(), heard.subscribe())));
        Mirror { node, replica, _heard: heard }
    }

    /// Asks as a member, on behalf of `epoch`.
    async fn ask(&self, epoch: Option<Epoch>) -> Lender {
        let dialer = dialer();
        admit(&self.node.book, dialer.identity.public_key(), MemberRole::Observer);
        self.ask_as(&dialer, epoch).await.unwrap()
    }

    async fn ask_as(&self, dialer: &Dialer, epoch: Option<Epoch>) -> Result<Lender, ExchangeError> {
        let ask = Ask { volume: VOLUME, branch: BRANCH, epoch };
        let addresses = [self.node.address.to_string()];
        dialer.lender(&addresses, self.node.identity.public_key(), ask).await
    }
}

/// Everything behind `after`, and how it ended.
async fn borrow(lender: &Lender, after: Position, to: Lsn) -> (Vec<Bytes>, Result<(), BorrowError>) {
    let mut all = Vec::new();
    let mut borrowing = lender.frames(&keys(), after, to).await.unwrap();
    loop {
        match borrowing.next().await {
            Ok(frames) if frames.is_empty() => return (all, Ok(())),
            Ok(frames) => all.extend(frames.iter().map(|frame| frame.bytes().clone())),
            Err(error) => return (all, Err(error)),
        }
    }
}

async fn refusal(lender: &Lender, after: Position) -> Refusal {
    match borrow(lender, after, Lsn::new(1 << 40)).await {
        (frames, Err(BorrowError::Exchange(ExchangeError::Refused(refused)))) if frames.is_empty() => {
            refused.reason
        }
        other => panic!("{other:?}"),
    }
}

fn bytes_of(frames: &[Frame]) -> Vec<Bytes> {
    frames.iter().map(|frame| frame.bytes().clone()).collect()
}

/// A source that lost its tail gets exactly that back, in its own bytes, though the mirror's book does not know it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_lends_what_comes_behind_a_position() {
    let frames = test_frames(base_state(), 1, 3000, 9);
    let mirror = Mirror::start(&frames, None).await;
    mirror.replica.set_data(Lsn::new(20));
    let source = dialer();
    mirror.node.services.set_source_key(source.identity.public_key());
    let lender = mirror.ask_as(&source, Some(epoch(1))).await.unwrap();
    let end = frames[2999].state();
    let expected =
        Stands { state: Some(end), data_lsn: Lsn::new(20), heard_lsn: Lsn::new(77), promised: None };
    assert_eq!(lender.stands, expected);
    for kept in [0, 1, 1700, 2999, 3000] {
        let after = if kept == 0 { base_state() } else { frames[kept - 1].state() };
        let (lent, ended) = borrow(&lender, after.position, end.position.lsn).await;
        assert_eq!((lent, ended), (bytes_of(&frames[kept..]), Ok(())), "{kept} kept");
    }
    // Only whole frames are lent, and none that goes too far.
    let (lent, ended) = borrow(&lender, frames[9].position(), frames[12].last().next().next()).await;
    assert_eq!((lent, ended), (bytes_of(&frames[10..13]), Ok(())));
    let (lent, ended) = borrow(&lender, frames[9].position(), Lsn::ROOT).await;
    assert_eq!((lent, ended), (Vec::new(), Ok(())));
    drop(lender);
    mirror.node.stop().await;
}

/// What a promotion fetches from a member that holds more, though both have promised the epoch that is to begin.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_given_what_a_sealed_member_holds_beyond_it() {
    let frames = test_frames(base_state(), 1, 300, 5);
    let mirror = Mirror::start(&frames, None).await;
    mirror.replica.promise(epoch(2)).unwrap();
    let lender = mirror.ask(Some(epoch(2))).await;
    let holding = |frames: &[Frame]| {
        let replica = MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate);
        frames.iter().for_each(|frame| replica.append(frame.clone(), None).unwrap());
        Arc::new(replica) as Arc<dyn Replica>
    };
    let (replica, to) = (holding(&frames[..100]), frames[199].position());
    replica.promise(epoch(2)).unwrap();
    lender.give_frames(&replica, epoch(2), to).await.unwrap();
    assert_eq!(replica.state(), Some(frames[199].state()));
    // What is not there does not come, and what is there stays.
    let wanted = Position { lsn: frames[299].last().next(), ..frames[299].position() };
    let short = lender.give_frames(&replica, epoch(2), wanted).await.unwrap_err();
    assert_eq!(short, GiveError::Short { reached: frames[299].position(), wanted });
    assert_eq!(replica.state(), Some(frames[299].state()));
    // Somebody else has asked for its promise meanwhile.
    let promised = holding(&frames[..100]);
    promised.promise(epoch(3)).unwrap();
    let refused = lender.give_frames(&promised, epoch(2), to).await.unwrap_err();
    assert_eq!(refused, GiveError::Replica(ReplicaError::Promised { promised: epoch(3) }));
    assert_eq!(promised.state(), Some(frames[99].state()));
    let empty: Arc<dyn Replica> = Arc::new(MemoryReplica::new(keys(), None, Durability::Immediate));
    assert_eq!(lender.give_frames(&empty, epoch(2), to).await, Err(GiveError::Empty));
    drop(lender);
    mirror.node.stop().await;
}

/// The fear: a source that was replaced gets its tail back, and goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_whose_epoch_has_ended_is_lent_nothing() {
    let frames = test_frames(base_state(), 1, 30, 3);
    let mirror = Mirror::start(&frames, None).await;
    let after = frames[9].position();
    let stale = mirror.ask(Some(epoch(1))).await;
    assert_eq!(borrow(&stale, after, frames[29].last()).await.1, Ok(()));
    mirror.replica.promise(epoch(2)).unwrap();
    // Also on a connection that is older than the promise.
    assert_eq!(refusal(&stale, after).await, Refusal::Fenced);
    let stale = mirror.ask(Some(epoch(1))).await;
    assert_eq!(stale.stands.ends(epoch(1)), Some(epoch(2)));
    assert_eq!(refusal(&stale, after).await, Refusal::Fenced);
    let other = Epoch { number: 2, ..epoch(9) };
    assert_eq!(refusal(&mirror.ask(Some(other)).await, after).await, Refusal::Fenced);
    for good in [epoch(2), epoch(3)] {
        let lender = mirror.ask(Some(good)).await;
        assert_eq!(borrow(&lender, after, frames[29].last()).await, (bytes_of(&frames[10..]), Ok(())));
    }
    // Who cannot say its epoch leads nothing yet.
    let mends = mirror.ask(None).await;
    assert_eq!(borrow(&mends, after, frames[29].last()).await.1, Ok(()));
    mirror.node.stop().await;
}

/// A mirror that follows a successor has promised nothing, and must not help the old source all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_holds_a_later_epoch_lends_nothing_of_the_older_one() {
    let mut frames = test_frames(base_state(), 1, 10, 3);
    frames.extend(frames_in(epoch(2), frames[9].state(), 1, 2, 2));
    let mirror = Mirror::start(&frames, None).await;
    let stale = mirror.ask(Some(epoch(1))).await;
    assert_eq!(stale.stands.ends(epoch(1)), Some(epoch(2)));
    assert_eq!(refusal(&stale, frames[5].position()).await, Refusal::Fenced);
    let leads = mirror.ask(Some(epoch(2))).await;
    let (lent, ended) = borrow(&leads, frames[5].position(), frames[11].last()).await;
    assert_eq!((lent, ended), (bytes_of(&frames[6..]), Ok(())));
    mirror.node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lent_behind_what_the_lender_does_not_have() {
    let frames = test_frames(base_state(), 1, 30, 3);
    let mirror = Mirror::start(&frames, None).await;
    let lender = mirror.ask(Some(epoch(1))).await;
    let other = test_frames(frames[9].state(), 2, 30, 3);
    assert_eq!(refusal(&lender, other[3].position()).await, Refusal::OtherHistory, "a fork");
    assert_eq!(refusal(&lender, other[29].position()).await, Refusal::OtherHistory, "a longer one");
    let inside = Position { lsn: frames[4].last().previous(), ..frames[4].position() };
    assert_eq!(refusal(&lender, inside).await, Refusal::OtherHistory, "within a frame");
    mirror.replica.log().unwrap().trim(frames[20].first()).unwrap();
    assert_eq!(refusal(&lender, frames[4].position()).await, Refusal::Trimmed);
    mirror.node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_is_not_told_where_a_node_stands() {
    let mirror = Mirror::start(&test_frames(base_state(), 1, 3, 3), None).await;
    mirror.node.services.set_source_key(dialer().identity.public_key());
    let refused = mirror.ask_as(&dialer(), Some(epoch(1))).await.unwrap_err();
    assert!(refused.to_string().contains("not a member"), "{refused}");
    let member = dialer();
    admit(&mirror.node.book, member.identity.public_key(), MemberRole::Mirror);
    let (addresses, key) = ([mirror.node.address.to_string()], mirror.node.identity.public_key());
    let foreign = Ask { volume: VolumeId::from_bytes([9; 16]), branch: BRANCH, epoch: None };
    let refused = member.lender(&addresses, key, foreign).await.unwrap_err();
    assert!(matches!(&refused, ExchangeError::Refused(r) if r.reason == Refusal::ForeignVolume), "{refused}");
    mirror.node.stop().await;
}

/// A lender is believed nothing: entries that somebody has changed do not get into the log that asks for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_borrowed_frame_is_verified_before_it_is_handed_out() {
    let good = test_frames(base_state(), 1, 3, 2);
    let mut forger =
        Appender::new(VolumeKeys::derive(VolumeId::from_bytes([7; 16])), epoch(1), good[2].state());
    let forged = entry(good[2].last().next(), 5);
    forger.push(&forged, good[2].state().digest, good[2].state().usage).unwrap();
    let forged = forger.close(LogTime::from_nanos(5), Lsn::ROOT).unwrap();
    let frames: Vec<Frame> = good.iter().cloned().chain([forged.clone()]).collect();
    let mirror = Mirror::start(&frames, None).await;
    let lender = mirror.ask(Some(epoch(1))).await;
    let (lent, ended) = borrow(&lender, good[0].position(), forged.last()).await;
    assert!(matches!(ended, Err(BorrowError::Frame(_))), "{ended:?}");
    assert!(lent.is_empty(), "a run with a forged frame is not handed out in part");
    mirror.node.stop().await;
}

/// Also by one that leads nothing: a mirror that lacks a pack asks its siblings.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_are_lent_over_the_connection_of_the_question() {
    let store: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
    let pack = pack(3);
    store.put(pack.name, pack.bytes.clone()).await.unwrap();
    let mirror = Mirror::start(&[], Some(store)).await;
    let lender = mirror.ask(None).await;
    assert_eq!(lender.stands.state, Some(base_state()));
    assert_eq!(lender.packs.read(pack.name, 0..0).await.unwrap(), pack.bytes);
    let packs = lender.packs.clone();
    drop(lender);
    assert!(packs.read(pack.name, 0..0).await.is_err(), "the connection ends with the lender");
    mirror.node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_answers_with_the_epoch_that_it_leads() {
    let source = Node::start(Arc::default(), None).await;
    let log: Arc<MemoryLog> = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 3, 3)));
    source.lead(&log, 1000);
    let dialer = dialer();
    admit(&source.book, dialer.identity.public_key(), MemberRole::Mirror);
    let ask = Ask { volume: VOLUME, branch: BRANCH, epoch: Some(epoch(1)) };
    let addresses = [source.address.to_string()];
    let lender = dialer.lender(&addresses, source.identity.public_key(), ask).await.unwrap();
    assert_eq!((lender.stands.state, lender.stands.promised), (Some(log.tail()), Some(epoch(1))));
    source.stop().await;
}

#[test]
fn what_is_promised_or_held_ends_older_epochs_and_others_of_its_number() {
    let held = |epoch| State { position: Position { epoch, ..base_state().position }, ..base_state() };
    let stands = |state: Option<Epoch>, promised| Stands {
        state: state.map(held),
        data_lsn: Lsn::ROOT,
        heard_lsn: Lsn::ROOT,
        promised,
    };
    let other = Epoch { number: 2, id: EpochId::from_bytes([0xee; 16]) };
    assert_eq!(stands(None, None).ends(epoch(1)), None);
    assert_eq!(stands(Some(epoch(1)), None).ends(epoch(1)), None);
    assert_eq!(stands(Some(epoch(1)), Some(epoch(2))).ends(epoch(2)), None);
    assert_eq!(stands(Some(epoch(1)), Some(epoch(2))).ends(epoch(1)), Some(epoch(2)));
    assert_eq!(stands(Some(epoch(3)), Some(epoch(2))).ends(epoch(1)), Some(epoch(3)));
    assert_eq!(stands(None, Some(epoch(2))).ends(other), Some(epoch(2)));
    assert_eq!(stands(Some(other), None).ends(epoch(2)), Some(other));
    // The fear: the promise of a promotion that came to nothing stops the source that has taken over meanwhile.
    assert_eq!(stands(Some(epoch(1)), Some(other)).replaces(epoch(2)), None);
    assert_eq!(stands(None, Some(other)).replaces(epoch(2)), None);
    assert_eq!(stands(Some(other), Some(other)).replaces(epoch(2)), Some(other));
    assert_eq!(stands(Some(other), Some(epoch(2))).replaces(epoch(2)), Some(other));
    assert_eq!(stands(Some(epoch(1)), Some(epoch(3))).replaces(epoch(2)), Some(epoch(3)));
    assert_eq!(stands(Some(epoch(3)), Some(other)).replaces(epoch(2)), Some(epoch(3)));
    assert_eq!(stands(Some(epoch(2)), Some(epoch(2))).replaces(epoch(2)), None);
}

/// The fear: a source whose disk lied goes on, and the mirror that has what it lost cannot make itself heard.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_hears_that_a_mirror_holds_more_of_its_epoch_and_acknowledges_nothing_after_it() {
    let frames = test_frames(base_state(), 1, 30, 3);
    let source = Node::start(Arc::default(), None).await;
    source.lead(&Arc::new(log_of(base_state(), &frames[..20])), 1000);
    let mirror = follow(&source, Some(base_state()));
    mirror.reach(frames[19].state()).await;
    let acknowledger = MirrorAcknowledger::new(Arc::clone(&source.services.board), 1, [mirror.node].into());
    mirror.replica.set_data(frames[19].last());
    acknowledger.acknowledged(frames[19].last(), Duration::from_secs(5)).await.unwrap();
    assert_eq!(source.services.board.furthest(), Some((mirror.node, frames[19].position())));
    // It gets what the source loses from nobody: here the test is the disk that lied.
    frames[20..].iter().for_each(|frame| mirror.replica.append(frame.clone(), None).unwrap());
    let (replica, dialer) = (Arc::clone(&mirror.replica), mirror.dialer.clone());
    mirror.stop().await;
    let mirror = follow_as(dialer, replica, source.address, source.identity.public_key());
    let mut changes = source.services.board.changes();
    let lost = async {
        while source.services.board.lost().is_none() {
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, lost).await.unwrap();
    assert_eq!(source.services.board.lost(), Some((mirror.node, frames[29].position())));
    let refused = acknowledger.acknowledged(frames[19].last(), Duration::from_secs(5)).await;
    assert!(matches!(refused, Err(AcknowledgeError::Lost(_))), "{refused:?}");
    assert_eq!(mirror.replica.state(), Some(frames[29].state()));
    mirror.stop().await;
    source.stop().await;
}

/// The fear: a source whose disk went back has written more than it lost when the mirror comes, and goes on acknowledging a history that lacks
/// what it has acknowledged before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_hears_that_a_mirror_holds_other_entries_of_its_epoch_and_acknowledges_nothing_after_it() {
    let mut frames = test_frames(base_state(), 1, 20, 3);
    let shared = frames[19].state();
    let log = Arc::new(log_of(base_state(), &frames));
    super::extend(&log, &test_frames(shared, 9, 30, 3));
    frames.extend(test_frames(shared, 2, 10, 3));
    let source = Node::start(Arc::default(), None).await;
    source.lead(&log, 1000);
    let dialer = dialer();
    admit(&source.book, dialer.identity.public_key(), MemberRole::Mirror);
    let replica = Arc::new(MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate));
    frames.iter().for_each(|frame| replica.append(frame.clone(), None).unwrap());
    let mut mirror = follow_as(dialer, replica, source.address, source.identity.public_key());
    mirror.complains("still leads the epoch").await;
    assert_eq!(source.services.board.lost(), Some((mirror.node, frames[29].position())));
    let acknowledger = MirrorAcknowledger::new(Arc::clone(&source.services.board), 1, [mirror.node].into());
    let refused = acknowledger.acknowledged(frames[19].last(), Duration::from_secs(5)).await;
    assert!(matches!(refused, Err(AcknowledgeError::Lost(_))), "{refused:?}");
    assert_eq!(mirror.replica.state(), Some(frames[29].state()), "it keeps everything");
    mirror.stop().await;
    source.stop().await;
}
