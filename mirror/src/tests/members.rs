//! Members over real QUIC on the loopback interface: who may seal whom, and what becomes of one that is removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::future::BoxFuture;
use murphy_fs::{MemberRole, MemberRow, MemberState};
use murphy_log::{Epoch, EpochId, Log, LogTime, Lsn, NodeId, Position, State};
use tokio::sync::watch;

use super::{
    ReplicaLayer, base_state, epoch, keys,
    lend::{Mirror, alone},
    log_of, ms,
    quic::{Node, admit, dialer, follow, seal},
    test_frames, until,
};
use crate::{
    AckPolicy, Dialer, ExchangeError, Leader, MemberBook, MemoryBook, MemoryReplica, Part, PlanError,
    PromoteError, PromoteRequest, Proof, PublicKey, Refusal, Refused, Replica, ReplicaError, Seal, Sealed,
    Secret, Services, Standing, TakeOver, promote,
};

fn revoke(book: &MemoryBook, key: PublicKey) {
    let state = MemberState::Revoked { public_key: *key.as_bytes() };
    let row = MemberRow { role: MemberRole::Mirror, state, name: "m".to_owned(), addresses: Vec::new() };
    book.put(key.node(), row);
}

/// A source that admits a newcomer behind frame 30, and a mirror that follows it and has ten frames.
struct Lag {
    source: Node,
    mirror: Mirror,
    newcomer: Dialer,
    /// What the newcomer got when it joined.
    proof: Proof,
}

impl Lag {
    async fn begin() -> Lag {
        let frames = test_frames(base_state(), 1, 30, 3);
        let source = Node::start(Arc::default(), None).await;
        source.lead(&Arc::new(log_of(base_state(), &frames)), 1000);
        let mirror = Mirror::start(&frames[..10], None).await;
        mirror.node.services.set_source_key(source.identity.public_key());
        let secret = Secret::random().unwrap();
        source.book.invite(secret.hash(&keys()), MemberRole::Mirror, LogTime::from_nanos(100));
        let newcomer = dialer();
        let admitted = newcomer.join(&source.token(&secret), "new".to_owned(), Vec::new()).await.unwrap();
        Lag { source, mirror, newcomer, proof: admitted.proof }
    }

    async fn seal_as(&self, dialer: &Dialer, seal: Seal) -> Result<Sealed, Refused> {
        let node = &self.mirror.node;
        match dialer.seal(&[node.address.to_string()], node.identity.public_key(), seal).await {
            Ok(sealed) => Ok(sealed),
            Err(ExchangeError::Refused(refused)) => Err(refused),
            Err(other) => panic!("{other}"),
        }
    }

    async fn refused(&self, dialer: &Dialer, proof: &Proof) -> Refused {
        let refused = self.seal_as(dialer, Seal { proof: proof.clone(), ..seal(2) }).await.unwrap_err();
        assert_eq!(self.mirror.replica.promised(), None, "nothing was promised to it");
        refused
    }

    async fn end(self) {
        self.mirror.node.stop().await;
        self.source.stop().await;
    }
}

/// The fear: the better mirror is not promoted although everybody is there, and a living node is given up instead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lags_behind_the_promoters_admission_is_sealed_by_the_word_of_its_source() {
    let lag = Lag::begin().await;
    let refused = lag.refused(&lag.newcomer, &Proof::default()).await;
    assert_eq!(refused.reason, Refusal::UnknownMember, "{}", refused.detail);
    let sealed = lag.seal_as(&lag.newcomer, Seal { proof: lag.proof.clone(), ..seal(2) }).await.unwrap();
    assert_eq!((sealed.state, lag.mirror.replica.promised()), (lag.mirror.replica.state(), Some(epoch(2))));
    lag.end().await;
}

/// The fear: whoever knows the volume's id, or has read a proof, or was a member once, ends the source.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_sealed_for_a_stranger_or_for_one_that_was_removed() {
    let lag = Lag::begin().await;
    let (stranger, key) = (dialer(), lag.newcomer.identity.public_key());
    let stolen = lag.refused(&stranger, &lag.proof).await;
    assert!(stolen.detail.contains("another node"), "{}", stolen.detail);
    let (place, lsn) = ((keys().volume(), super::BRANCH), Lsn::new(200));
    let about = crate::Vouched {
        volume: place.0,
        branch: place.1,
        epoch: epoch(1),
        lsn,
        member: stranger.identity.public_key(),
        role: MemberRole::Mirror,
    };
    let forged = lag.refused(&stranger, &Proof::default().vouch(&stranger.identity, &about)).await;
    assert!(forged.detail.contains("nobody who vouches"), "{}", forged.detail);
    // An observer is a member, and its word is none.
    admit(&lag.mirror.node.book, stranger.identity.public_key(), MemberRole::Observer);
    let friend = crate::Vouched { member: key, ..about };
    let watched = lag.refused(&lag.newcomer, &Proof::default().vouch(&stranger.identity, &friend)).await;
    assert!(watched.detail.contains("nobody who vouches"), "{}", watched.detail);
    revoke(&lag.mirror.node.book, key);
    let removed = lag.refused(&lag.newcomer, &lag.proof).await;
    assert_eq!(removed.reason, Refusal::Revoked, "{}", removed.detail);
    lag.end().await;
}

/// One who has the entries knows better than any old voucher.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_has_caught_up_believes_its_own_log() {
    let lag = Lag::begin().await;
    for frame in &test_frames(base_state(), 1, 30, 3)[10..] {
        lag.mirror.replica.append(frame.clone(), None).unwrap();
    }
    let refused = lag.refused(&lag.newcomer, &lag.proof).await;
    assert!(refused.detail.contains("does not know it"), "{}", refused.detail);
    lag.end().await;
}

/// A member that was removed keeps its old proof. Whoever hears the source waits for its word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_that_hears_its_source_takes_no_proof() {
    let lag = Lag::begin().await;
    let follower = follow(&lag.source, Some(base_state()));
    follower.reach(lag.source_tail()).await;
    let (heard, status) = (watch::Sender::new(Lsn::new(0)).subscribe(), follower.handle.status.clone());
    let mut part = alone(lag.mirror.replica.clone(), heard);
    part.status = status;
    lag.mirror.node.services.become_part(Part::Mirror(part));
    let refused = lag.refused(&lag.newcomer, &lag.proof).await;
    assert!(refused.detail.contains("hears its source"), "{}", refused.detail);
    follower.stop().await;
    lag.end().await;
}

impl Lag {
    fn source_tail(&self) -> State {
        test_frames(base_state(), 1, 30, 3)[29].state()
    }
}

/// A mirror is told whom to follow by whoever it has promised to, and by nobody whose epoch has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_is_told_who_leads_the_epoch_that_it_has_promised() {
    let lag = Lag::begin().await;
    let Part::Mirror(part) = lag.mirror.node.services.part_now() else { panic!("it is a mirror") };
    let leader = part.leader.subscribe();
    let told = |number| Seal { proof: lag.proof.clone(), leads: vec!["new:1".to_owned()], ..seal(number) };
    lag.seal_as(&lag.newcomer, Seal { proof: lag.proof.clone(), ..seal(3) }).await.unwrap();
    assert_eq!(*leader.borrow(), None, "it does not lead yet");
    let late = lag.seal_as(&lag.newcomer, told(2)).await.unwrap_err();
    assert_eq!((late.reason, leader.borrow().clone()), (Refusal::Fenced, None));
    lag.seal_as(&lag.newcomer, told(3)).await.unwrap();
    let key = lag.newcomer.identity.public_key();
    let expected = Leader { epoch: epoch(3), key, addresses: vec!["new:1".to_owned()] };
    assert_eq!(*leader.borrow(), Some(expected));
    lag.end().await;
}

/// The acts of a promotion whose members are asked over the network.
struct Asking<'a> {
    dialer: &'a Dialer,
    members: BTreeMap<NodeId, &'a Mirror>,
    own: Standing,
}

impl TakeOver for Asking<'_> {
    fn promise(&self, _: Epoch) -> BoxFuture<'_, Result<Standing, String>> {
        Box::pin(async { Ok(self.own) })
    }

    fn seal(&self, member: NodeId, epoch: Epoch) -> BoxFuture<'_, Result<Option<Standing>, String>> {
        Box::pin(async move {
            let node = &self.members[&member].node;
            let (addresses, key) = ([node.address.to_string()], node.identity.public_key());
            let sealed = self.dialer.seal(&addresses, key, Seal { epoch, ..seal(2) }).await;
            let Sealed { state, data_lsn, heard_lsn, .. } = sealed.map_err(|error| error.to_string())?;
            Ok(state.map(|state| Standing { state, data_lsn, heard_lsn }))
        })
    }

    fn catch_up(&self, _: NodeId, to: Position) -> BoxFuture<'_, Result<Standing, String>> {
        Box::pin(async move { Err(format!("nobody holds more, up to {to}")) })
    }

    fn claim(&self, _: Epoch, base: State) -> BoxFuture<'_, Result<State, String>> {
        Box::pin(async move { Ok(base) })
    }
}

/// The fear: a member that has just promised itself and is about to lead promises somebody else, too, or is counted without a promise: two
/// begin an epoch, and each believes that the other one cannot acknowledge.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_neither_source_nor_mirror_promises_nothing_and_does_not_count() {
    let frames = test_frames(base_state(), 1, 10, 3);
    let (one, other) = (Mirror::start(&frames, None).await, Mirror::start(&frames, None).await);
    let promoter = dialer();
    for mirror in [&one, &other] {
        admit(&mirror.node.book, promoter.identity.public_key(), MemberRole::Mirror);
    }
    let members: BTreeMap<NodeId, &Mirror> =
        [&one, &other].map(|mirror| (mirror.node.identity.node(), mirror)).into();
    let own = promoter.identity.node();
    let state = frames[9].state();
    let lsn = state.position.lsn;
    let acts = Asking { dialer: &promoter, members, own: Standing { state, data_lsn: lsn, heard_lsn: lsn } };
    let request = |number| PromoteRequest {
        own,
        next: epoch(number),
        policy: AckPolicy::Mirrors {
            wanted: 1,
            members: acts.members.keys().copied().chain([own]).collect(),
        },
        assume_lost: BTreeSet::new(),
    };
    other.replica.promise(epoch(2)).unwrap();
    other.node.services.become_part(Part::Neither);
    let node = other.node.identity.node();
    match promote(&request(3), &acts).await {
        Err(PromoteError::Plan(PlanError::TooFew { sealed: 2, needed: 3, missing })) => {
            assert_eq!(missing.0.iter().map(|missing| missing.node).collect::<Vec<_>>(), [node]);
        }
        outcome => panic!("{outcome:?}"),
    }
    assert_eq!((one.replica.promised(), other.replica.promised()), (Some(epoch(3)), Some(epoch(2))));
    let (heard, replica) = (watch::Sender::new(lsn), Arc::clone(&other.replica));
    other.node.services.become_part(Part::Mirror(alone(replica, heard.subscribe())));
    assert_eq!(promote(&request(3), &acts).await.unwrap().base, state, "as a mirror it counts");
    one.node.stop().await;
    other.node.stop().await;
}

/// A mirror's node that begins to take over while it promises: it has looked at its promise just before.
struct Claiming {
    replica: Arc<MemoryReplica>,
    services: Arc<Services>,
}

impl ReplicaLayer for Claiming {
    fn below(&self) -> &MemoryReplica {
        &self.replica
    }

    fn on_promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError> {
        self.services.become_part(Part::Neither);
        assert_eq!(self.promised(), None, "nothing keeps it from beginning its epoch");
        self.replica.promise(epoch)
    }
}

/// The fear: a mirror is asked for a promise, and before it is on its disk the same mirror finds that it has promised nobody else and begins
/// its own epoch; whoever asked counts it all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promise_that_crosses_the_beginning_of_an_epoch_is_not_given() {
    let frames = test_frames(base_state(), 1, 10, 3);
    let mirror = Mirror::start(&frames, None).await;
    let (promoter, node) = (dialer(), &mirror.node);
    admit(&node.book, promoter.identity.public_key(), MemberRole::Mirror);
    let replica = Claiming { replica: Arc::clone(&mirror.replica), services: Arc::clone(&node.services) };
    let heard = watch::Sender::new(frames[9].last());
    node.services.become_part(Part::Mirror(alone(Arc::new(replica), heard.subscribe())));
    let sealed = promoter.seal(&[node.address.to_string()], node.identity.public_key(), seal(3)).await;
    assert!(
        matches!(&sealed, Err(ExchangeError::Refused(refused)) if refused.reason == Refusal::Protocol),
        "{sealed:?}"
    );
    mirror.node.stop().await;
}

/// The fear: a mirror that was removed goes on to be fed, and to acknowledge, for as long as its connection stands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_removed_is_cut_off_and_told() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 30, 3)));
    source.lead(&log, 1000);
    let mut mirror = follow(&source, Some(base_state()));
    let kept = log.tail();
    mirror.reach(kept).await;
    revoke(&source.book, mirror.dialer.identity.public_key());
    source.services.members_changed();
    mirror.complains("was removed").await;
    assert!(mirror.handle.status.borrow().revoked);
    super::extend(&log, &test_frames(log.tail(), 1, 5, 2));
    let connected = || source.services.board.status(ms(0)).iter().any(|mirror| mirror.connected);
    until("the end of its connection", || !connected()).await;
    assert_eq!(mirror.replica.state(), Some(kept), "it keeps what it has, and gets no more");
    mirror.stop().await;
    source.stop().await;
}

/// The fear: a mirror that was removed has once tried to take over, joins anew, and its first word ends the source for good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_has_promised_a_later_epoch_is_not_admitted_and_ends_nothing() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 30, 3)));
    source.lead(&log, 1000);
    let secret = Secret::random().unwrap();
    source.book.invite(secret.hash(&keys()), MemberRole::Mirror, LogTime::from_nanos(100));
    let (token, joiner, name) = (source.token(&secret), dialer(), || "again".to_owned());
    let other = Epoch { id: EpochId::from_bytes([77; 16]), ..epoch(1) };
    for promised in [epoch(2), other] {
        let refused = joiner.join_again(&token, name(), Vec::new(), Some(promised)).await;
        let Err(ExchangeError::Refused(refused)) = refused else { panic!("{refused:?}") };
        assert_eq!(refused.reason, Refusal::Fenced, "{}", refused.detail);
        assert!(refused.detail.contains(&promised.to_string()), "{}", refused.detail);
        assert_eq!(source.book.row(joiner.identity.node()), None, "it is no member");
    }
    assert_eq!(source.services.board.fenced_by(), None);
    // The invitation was not used up, and a promise that this source's own epoch keeps is none against it.
    joiner.join_again(&token, name(), Vec::new(), Some(epoch(1))).await.unwrap();
    assert!(source.book.row(joiner.identity.node()).is_some());
    source.stop().await;
}
