//! Two nodes in one process, over real QUIC on the loopback interface.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_fs::{Acknowledger, BlockStore, MemberRole, MemberRow, MemberState};
use murphy_log::{BranchId, Log, LogTime, Lsn, MemoryLog, NodeId, State, SystemClock};
use tokio::{sync::watch, task::JoinHandle};

use super::{
    BRANCH, PATIENCE, VOLUME, base_state, comes, epoch, extend, keys, log_of, ms, stays, test_frames, until,
};
use crate::{
    Dialer, Durability, EntryLine, ExchangeError, FollowHandle, FollowSetup, Following, Identity, Listener,
    MemberBook, MemoryBook, MemoryReplica, MemorySnapshots, MirrorAcknowledger, MirrorPart, NetworkOptions,
    Observer, Part, Proof, PublicKey, Refusal, Refused, RemotePacks, Replica, Seal, Secret, Services,
    SourcePart, Token, UdpSockets, compare,
};

/// A node that listens.
pub(super) struct Node {
    pub(super) identity: Arc<Identity>,
    pub(super) book: Arc<MemoryBook>,
    pub(super) services: Arc<Services>,
    pub(super) address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Node {
    pub(super) async fn start(book: Arc<MemoryBook>, packs: Option<Arc<dyn BlockStore>>) -> Node {
        let identity = Arc::new(Identity::generate().unwrap());
        Node::start_as(identity, book, packs, BRANCH, ([127, 0, 0, 1], 0).into()).await
    }

    pub(super) async fn start_as(
        identity: Arc<Identity>,
        book: Arc<MemoryBook>,
        packs: Option<Arc<dyn BlockStore>>,
        branch: BranchId,
        local: SocketAddr,
    ) -> Node {
        Node::start_with(NetworkOptions::default(), identity, book, packs, (branch, local)).await
    }

    /// One that gives those up who take nothing for so long.
    pub(super) async fn start_patient(patience: Duration) -> Node {
        let identity = Arc::new(Identity::generate().unwrap());
        let options = NetworkOptions { patience, ..NetworkOptions::default() };
        let place = (BRANCH, ([127, 0, 0, 1], 0).into());
        Node::start_with(options, identity, Arc::default(), None, place).await
    }

    async fn start_with(
        options: NetworkOptions,
        identity: Arc<Identity>,
        book: Arc<MemoryBook>,
        packs: Option<Arc<dyn BlockStore>>,
        (branch, local): (BranchId, SocketAddr),
    ) -> Node {
        let clock = Arc::new(SystemClock::new());
        let mut services = Services::new(keys(), branch, identity.node(), clock, book.clone());
        services.packs = packs;
        services.identity = Some(Arc::clone(&identity));
        let services = Arc::new(services);
        // The socket of a node that has just stopped is closed by its endpoint's own task, a moment later.
        let mut listener = None;
        until("the address to become free", || {
            listener = Listener::bind(&identity, &UdpSockets, local, &options, services.clone()).ok();
            listener.is_some()
        })
        .await;
        let listener = listener.expect("it was waited for");
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(listener.run(stopped));
        Node { identity, book, services, address, stop, task }
    }

    pub(super) fn lead(&self, log: &Arc<MemoryLog>, seed_bytes: usize) {
        let snapshots = Arc::new(MemorySnapshots { log: log.clone(), bytes: seed_bytes });
        let epoch = log.tail().position.epoch;
        let heartbeat = ms(100);
        self.services.become_part(Part::Source(SourcePart { log: log.clone(), epoch, snapshots, heartbeat }));
    }

    pub(super) async fn stop(self) {
        self.stop.send_replace(true);
        self.task.await.unwrap();
    }

    pub(super) fn token(&self, secret: &Secret) -> Token {
        Token {
            addresses: vec![self.address.to_string()],
            volume: VOLUME,
            branch: BRANCH,
            source_key: self.identity.public_key(),
            secret: secret.clone(),
            role: MemberRole::Mirror,
            expires: LogTime::from_nanos(u64::MAX),
        }
    }
}

pub(super) fn dialer() -> Dialer {
    let identity = Arc::new(Identity::generate().unwrap());
    Dialer { identity, sockets: Arc::new(UdpSockets), options: NetworkOptions::default() }
}

pub(super) fn admit(book: &MemoryBook, key: PublicKey, role: MemberRole) {
    let state = MemberState::Joined { public_key: *key.as_bytes() };
    book.put(key.node(), MemberRow { role, state, name: "m".to_owned(), addresses: Vec::new() });
}

/// Asks for the promise of epoch `number`, with nothing to show.
pub(super) fn seal(number: u32) -> Seal {
    let (proof, leads) = (Proof::default(), Vec::new());
    Seal { volume: VOLUME, branch: BRANCH, epoch: epoch(number), proof, leads }
}

/// A mirror that follows.
pub(super) struct Mirror {
    pub(super) replica: Arc<MemoryReplica>,
    pub(super) handle: FollowHandle,
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<(), crate::FollowError>>,
    pub(super) node: NodeId,
    pub(super) dialer: Dialer,
}

pub(super) fn follow(source: &Node, base: Option<State>) -> Mirror {
    let dialer = dialer();
    admit(&source.book, dialer.identity.public_key(), MemberRole::Mirror);
    let replica = Arc::new(MemoryReplica::new(keys(), base, Durability::Immediate));
    follow_as(dialer, replica, source.address, source.identity.public_key())
}

pub(super) fn follow_as(
    dialer: Dialer,
    replica: Arc<MemoryReplica>,
    address: SocketAddr,
    key: PublicKey,
) -> Mirror {
    follow_with(dialer, replica.clone(), replica, address, key)
}

/// With a node that does something else than `replica`, which it is made of.
pub(super) fn follow_with(
    dialer: Dialer,
    replica: Arc<MemoryReplica>,
    node: Arc<dyn Replica>,
    address: SocketAddr,
    key: PublicKey,
) -> Mirror {
    let id = dialer.identity.node();
    let (following, handle) = Following::new(FollowSetup {
        addresses: vec![address.to_string()],
        source_key: key,
        branch: BRANCH,
        replica: node,
        dialer: dialer.clone(),
        clock: Arc::new(SystemClock::new()),
        random: Arc::new(|| 7),
        silence: Duration::from_secs(3),
        heard: Lsn::new(0),
    });
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(following.run(stopped));
    Mirror { replica, handle, stop, task, node: id, dialer }
}

impl Mirror {
    /// The way to the packs of the source, as the connection comes and goes.
    pub(super) fn packs(&self) -> RemotePacks {
        self.handle.packs.clone()
    }

    pub(super) async fn reach(&self, state: State) {
        let reached = comes(|| self.replica.state() == Some(state)).await;
        assert!(reached, "not reached {state:?}: {:?}", self.handle.status.borrow());
    }

    /// Waits for an error that contains `text`.
    pub(super) async fn complains(&mut self, text: &str) {
        let said =
            self.handle.status.wait_for(|status| status.error.as_ref().is_some_and(|e| e.contains(text)));
        let said = tokio::time::timeout(PATIENCE, said).await.map(|said| said.is_ok());
        assert_eq!(said, Ok(true), "{:?}", self.handle.status.borrow());
    }

    /// Waits until it has ended by itself.
    pub(super) async fn ended(self) -> crate::FollowError {
        self.task.await.unwrap().unwrap_err()
    }

    pub(super) async fn stop(self) {
        self.stop.send_replace(true);
        self.task.await.unwrap().unwrap();
    }
}

fn bytes_of(log: &dyn Log) -> Vec<Bytes> {
    log.read(log.first()).unwrap().map(|frame| frame.unwrap().bytes().clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invited_node_joins_once_and_follows_as_a_member() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 30, 4)));
    source.lead(&log, 20_000);
    let secret = Secret::random().unwrap();
    source.book.invite(secret.hash(&keys()), MemberRole::Mirror, LogTime::from_nanos(100));
    let token = Token::parse(&source.token(&secret).to_text().unwrap()).unwrap();

    let refusal = |outcome: Result<_, ExchangeError>| match outcome {
        Err(ExchangeError::Refused(Refused { reason, .. })) => reason,
        other => panic!("{other:?}"),
    };
    let wrong = Token { secret: Secret::random().unwrap(), ..token.clone() };
    let outcome = dialer().join(&wrong, "x".to_owned(), Vec::new()).await;
    assert_eq!(refusal(outcome), Refusal::BadInvitation);

    let joiner = dialer();
    let admitted = joiner.join(&token, "berlin".to_owned(), vec!["h:1".to_owned()]).await.unwrap();
    assert_eq!((admitted.role, admitted.branch), (MemberRole::Mirror, BRANCH));
    let members = source.book.members();
    assert_eq!((members[0].0, members[0].1.name.as_str()), (joiner.identity.node(), "berlin"));

    let outcome = dialer().join(&token, "y".to_owned(), Vec::new()).await;
    let said = outcome.as_ref().err().map(ToString::to_string);
    assert_eq!(said.unwrap(), "refused: the invitation was used: find out by whom if it was not you");
    assert_eq!(refusal(outcome), Refusal::UsedInvitation);

    let late = Secret::random().unwrap();
    source.book.invite(late.hash(&keys()), MemberRole::Mirror, LogTime::from_nanos(100));
    source.book.set_time(LogTime::from_nanos(101));
    let outcome = dialer().join(&source.token(&late), "z".to_owned(), Vec::new()).await;
    assert_eq!(refusal(outcome), Refusal::ExpiredInvitation);

    let replica = Arc::new(MemoryReplica::new(keys(), None, Durability::Immediate));
    let mirror = follow_as(joiner, replica, source.address, source.identity.public_key());
    mirror.reach(log.tail()).await;
    mirror.stop().await;
    source.stop().await;
}

/// A source that was replaced while it was away must learn after which entry its own history is nobody's, and nothing less.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_comes_back_learns_where_its_history_parted() {
    let common = test_frames(base_state(), 1, 10, 3);
    let shared = common.last().unwrap().state();
    let old = log_of(base_state(), &common);
    extend(&old, &test_frames(shared, 7, 4, 3));
    let new = Arc::new(log_of(base_state(), &common));
    extend(&new, &super::frames_in(epoch(2), shared, 8, 6, 2));
    let source = Node::start(Arc::default(), None).await;
    source.lead(&new, 1000);
    let dialer = dialer();
    admit(&source.book, dialer.identity.public_key(), MemberRole::Mirror);
    let (addresses, key) = ([source.address.to_string()], source.identity.public_key());
    let ask =
        async |log: Arc<dyn Log>| compare(&dialer, &addresses, key, (&keys(), BRANCH), &log).await.unwrap();
    let found = ask(Arc::new(old)).await.unwrap();
    assert_eq!((found.node, found.state), (source.identity.node(), new.tail()));
    let parted = found.common.unwrap();
    assert_eq!((parted.lsn, parted.hash), (shared.position.lsn, shared.position.hash));
    let behind = ask(Arc::new(log_of(base_state(), &common))).await.unwrap();
    assert_eq!(behind.common.unwrap().lsn, shared.position.lsn, "all of it is part of that history");
    assert_eq!(ask(new).await, None, "the same epoch leads nothing later");
    source.stop().await;
}

/// Whoever listens at the source's address without its key learns nothing, not even the secret.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_with_another_key_gets_no_secret() {
    let impostor = Node::start(Arc::default(), None).await;
    let secret = Secret::random().unwrap();
    impostor.book.invite(secret.hash(&keys()), MemberRole::Mirror, LogTime::from_nanos(u64::MAX));
    let token = Token { source_key: Identity::generate().unwrap().public_key(), ..impostor.token(&secret) };
    let outcome = dialer().join(&token, "x".to_owned(), Vec::new()).await;
    assert!(matches!(outcome, Err(ExchangeError::Unreachable(_))), "{outcome:?}");
    assert!(impostor.book.members().is_empty());
    impostor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_is_refused_and_says_so() {
    let source = Node::start(Arc::default(), None).await;
    source.lead(&Arc::new(log_of(base_state(), &[])), 1000);
    let replica = Arc::new(MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate));
    let mut stranger = follow_as(dialer(), replica, source.address, source.identity.public_key());
    stranger.complains("not a member").await;
    stranger.stop().await;
    source.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_frames_arrive_as_they_were_written() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(MemoryLog::new(base_state()));
    source.lead(&log, 1000);
    let frames = test_frames(base_state(), 1, 6000, 5);
    extend(&log, &frames[..4000]);
    let mirror = follow(&source, Some(base_state()));
    mirror.reach(frames[3999].state()).await;
    for run in frames[4000..].chunks(7) {
        extend(&log, run);
        if run[0].first().get() % 5 == 0 {
            tokio::task::yield_now().await;
        }
    }
    mirror.reach(log.tail()).await;
    assert_eq!(bytes_of(&*mirror.replica.log().unwrap()), bytes_of(&*log));
    let status = || source.services.board.status(source.services.clock.monotonic());
    let held = || status().first().map(|mirror| mirror.metadata_lsn);
    until("the source to know", || held() == Some(log.tail().position.lsn)).await;
    let status = status();
    assert_eq!((status.len(), status[0].node), (1, mirror.node));
    assert_eq!((status[0].connected, status[0].lag_ms), (true, 0));
    mirror.stop().await;
    source.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_resumes_after_its_source_was_restarted() {
    let book: Arc<MemoryBook> = Arc::default();
    let source = Node::start(Arc::clone(&book), None).await;
    let log = Arc::new(MemoryLog::new(base_state()));
    source.lead(&log, 1000);
    let frames = test_frames(base_state(), 1, 3000, 5);
    extend(&log, &frames[..1500]);
    let mirror = follow(&source, Some(base_state()));
    // Somewhere in the middle of the stream the source goes away.
    until("some frames", || mirror.replica.state().unwrap().position.lsn >= Lsn::new(50)).await;
    let (identity, address) = (source.identity.clone(), source.address);
    source.stop().await;
    extend(&log, &frames[1500..]);
    until("the mirror to notice", || !mirror.handle.status.borrow().connected).await;
    let source = Node::start_as(identity, book, None, BRANCH, address).await;
    source.lead(&log, 1000);
    mirror.reach(log.tail()).await;
    assert_eq!(bytes_of(&*mirror.replica.log().unwrap()), bytes_of(&*log));
    mirror.stop().await;
    source.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_is_never_ahead_of_what_its_source_has_synced() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(MemoryLog::held(base_state()));
    source.lead(&log, 1000);
    extend(&log, &test_frames(base_state(), 1, 10, 3));
    log.sync();
    let synced = log.tail();
    let mirror = follow(&source, Some(base_state()));
    mirror.reach(synced).await;
    extend(&log, &test_frames(synced, 1, 100, 3));
    stays("only what is synced", ms(200), || mirror.replica.state() == Some(synced)).await;
    log.sync();
    mirror.reach(log.tail()).await;
    mirror.stop().await;
    source.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_mirror_is_seeded_in_parts_and_goes_on_from_there() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 200, 4)));
    log.trim(Lsn::new(500)).unwrap();
    // Five parts and a bit.
    source.lead(&log, (5 << 22) + 12_345);
    let mirror = follow(&source, None);
    mirror.reach(log.tail()).await;
    extend(&log, &test_frames(log.tail(), 1, 10, 2));
    mirror.reach(log.tail()).await;
    assert_eq!(mirror.handle.status.borrow().error, None);
    mirror.stop().await;
    source.stop().await;
}

/// Seeding is limited to a few at a time; the others wait, and are not forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_new_mirrors_are_all_seeded_in_their_turn() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 50, 4)));
    source.lead(&log, 9 << 20);
    let mirrors: Vec<Mirror> = (0..5).map(|_| follow(&source, None)).collect();
    for mirror in mirrors {
        mirror.reach(log.tail()).await;
        mirror.stop().await;
    }
    source.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_branch_is_refused() {
    let identity = Arc::new(Identity::generate().unwrap());
    let other = BranchId::from_bytes([0xcc; 16]);
    let source = Node::start_as(identity, Arc::default(), None, other, ([127, 0, 0, 1], 0).into()).await;
    source.lead(&Arc::new(log_of(base_state(), &[])), 1000);
    let mut mirror = follow(&source, Some(base_state()));
    mirror.complains("another branch").await;
    mirror.stop().await;
    source.stop().await;
}

/// A mirror that promised no longer helps the old source, and tells the promoter what it holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sealed_mirror_answers_with_its_last_state_and_ends_the_old_source() {
    let book: Arc<MemoryBook> = Arc::default();
    let source = Node::start(Arc::clone(&book), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 30, 3)));
    source.lead(&log, 1000);
    let mirror = follow(&source, Some(base_state()));
    mirror.reach(log.tail()).await;
    // The mirror listens too, so that it can be asked.
    let listening = Node::start(Arc::clone(&book), None).await;
    let (heard, status) = (mirror.handle.heard.clone(), mirror.handle.status.clone());
    let part = MirrorPart::new(mirror.replica.clone(), heard, status);
    listening.services.become_part(Part::Mirror(part));
    let promoter = dialer();
    let addresses = [listening.address.to_string()];
    let key = listening.identity.public_key();
    let refused = promoter.seal(&addresses, key, seal(2)).await.unwrap_err();
    assert!(refused.to_string().contains("not a member"), "{refused}");
    admit(&book, promoter.identity.public_key(), MemberRole::Observer);
    let refused = promoter.seal(&addresses, key, seal(2)).await.unwrap_err();
    assert!(refused.to_string().contains("role"), "{refused}");
    admit(&book, promoter.identity.public_key(), MemberRole::Mirror);
    let sealed = promoter.seal(&addresses, key, seal(2)).await.unwrap();
    assert_eq!(sealed.state, Some(log.tail()));
    assert_eq!(sealed.heard_lsn, log.tail().position.lsn);
    let before = log.tail();
    extend(&log, &test_frames(before, 1, 5, 2));
    until("the source to be told", || source.services.board.fenced_by() == Some(epoch(2))).await;
    assert_eq!(mirror.replica.state(), Some(before));
    let older = promoter.seal(&addresses, key, seal(1)).await.unwrap_err();
    assert!(matches!(older, ExchangeError::Refused(Refused { reason: Refusal::Fenced, .. })), "{older}");
    mirror.stop().await;
    listening.stop().await;
    source.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_observer_hears_every_entry_and_may_do_nothing_else() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 30, 3)));
    source.lead(&log, 1000);
    let dialer = dialer();
    admit(&source.book, dialer.identity.public_key(), MemberRole::Observer);
    let (addresses, key) = ([source.address.to_string()], source.identity.public_key());
    let volume = (keys(), BRANCH);
    let mut observer =
        Observer::connect(&dialer, &addresses, key, volume.clone(), Lsn::new(50), None).await.unwrap();
    let mut lines = Vec::new();
    while lines.last().is_none_or(|line: &EntryLine| line.lsn < 91) {
        lines.extend(EntryLine::of_frame(&observer.next().await.unwrap()).unwrap());
    }
    extend(&log, &test_frames(log.tail(), 1, 1, 3));
    lines.extend(EntryLine::of_frame(&observer.next().await.unwrap()).unwrap());
    let lsns: Vec<u64> = lines.iter().map(|line| line.lsn).collect();
    assert_eq!(lsns, (50..=94).collect::<Vec<_>>());
    let after = observer.position();
    drop(observer);
    extend(&log, &test_frames(log.tail(), 1, 1, 2));
    let mut observer = Observer::connect(&dialer, &addresses, key, volume, Lsn::FIRST, after).await.unwrap();
    assert_eq!(observer.next().await.unwrap().first(), Lsn::new(95));
    assert!(source.services.board.status(ms(0)).is_empty(), "an observer holds no copy");
    let replica = Arc::new(MemoryReplica::new(keys(), None, Durability::Immediate));
    let mut mirror = follow_as(dialer, replica, source.address, key);
    mirror.complains("observer gets no snapshot").await;
    mirror.stop().await;
    source.stop().await;
}

/// The lag of an idle mirror is what an fsync with `--ack mirror` waits for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_fsync_waits_for_the_mirror_and_returns_when_it_has_entries_and_bytes() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(MemoryLog::new(base_state()));
    source.lead(&log, 1000);
    let mirror = follow(&source, Some(base_state()));
    let board = Arc::clone(&source.services.board);
    let acknowledger = MirrorAcknowledger::new(board, 1, [mirror.node].into());
    extend(&log, &test_frames(base_state(), 1, 5, 2));
    let lsn = log.tail().position.lsn;
    mirror.reach(log.tail()).await;
    assert!(acknowledger.acknowledged(lsn, ms(100)).await.is_err(), "the bytes are not there yet");
    mirror.replica.set_data(lsn);
    acknowledger.acknowledged(lsn, Duration::from_secs(5)).await.unwrap();
    mirror.stop().await;
    source.stop().await;
}
