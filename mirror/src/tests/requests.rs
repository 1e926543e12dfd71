//! What a listener answers to those who ask for the wrong thing, ask it of the wrong node, or ask a store that fails.

use std::{
    borrow::Cow,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture, stream::BoxStream};
use murphy_fs::{BlockStore, BlockStoreError, MemberRole, ObjectBlockStore, PackName, StoredPack, WriterId};
use murphy_log::{BranchId, Epoch, Frame, Log, Lsn, MemoryLog, Position, Terminal, VolumeId};
use tokio::sync::watch;

use super::{
    BRANCH, ReplicaLayer, VOLUME, base_state, epoch, extend, frames_in, keys,
    lend::alone,
    log_of, ms, packs,
    quic::{Node, admit, dialer, follow, follow_with, seal},
    test_frames,
};
use crate::{
    Ask, Congestion, Dialer, Durability, ExchangeError, FollowError, Heartbeat, Hello, LendRequest,
    MemberBook, MemberPacks, MemoryBook, MemoryReplica, Message, ObserveError, Observer, PackFetchError,
    PackReply, PackRequest, PackSource, Part, Point, Redeem, Refusal, Replica, ReplicaError, Resume, Seal,
    Secret, compare,
    endpoint::{Grants, dial_granting},
    session::{Connection, MessageReader, MessageWriter},
};

/// A node, a member of it, and a connection of that member.
struct Visit {
    node: Node,
    dialer: Dialer,
    connection: Connection,
    /// The stream on which it has asked where the node stands.
    control: Option<(MessageReader, MessageWriter)>,
}

impl Visit {
    async fn to(node: Node) -> Visit {
        let dialer = dialer();
        admit(&node.book, dialer.identity.public_key(), MemberRole::Mirror);
        let (connection, _) =
            dialer.dial(&[node.address.to_string()], node.identity.public_key()).await.unwrap();
        Visit { node, dialer, connection, control: None }
    }

    /// To a source, which has said where it stands: now packs and frames may be asked for.
    async fn asking(node: Node) -> Visit {
        node.lead(&Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 3, 3))), 1000);
        let mut visit = Visit::to(node).await;
        let (mut reader, mut writer) = visit.connection.open_both().await.unwrap();
        writer.send(&Message::Ask(ask())).await.unwrap();
        assert!(matches!(reader.expect().await.unwrap(), Message::Stands(_)));
        visit.control = Some((reader, writer));
        visit
    }

    /// Says this on a stream of its own, and hears the answer.
    async fn say(&self, message: &Message) -> Message {
        let (mut reader, mut writer) = self.connection.open_both().await.unwrap();
        writer.send(message).await.unwrap();
        reader.expect().await.unwrap()
    }

    async fn refusal(&self, message: &Message, text: &str) -> Refusal {
        match self.say(message).await {
            Message::Refused(refused) => {
                assert!(refused.detail.contains(text), "{}", refused.detail);
                refused.reason
            }
            other => panic!("{other:?}"),
        }
    }

    fn addresses(&self) -> [String; 1] {
        [self.node.address.to_string()]
    }

    fn hello(&self) -> Message {
        Message::Hello(Hello {
            volume: VOLUME,
            branch: BRANCH,
            node: self.dialer.identity.node(),
            resume: Resume::Fresh,
            data_lsn: Lsn::ROOT,
            promised: None,
        })
    }
}

async fn neither() -> Visit {
    Visit::to(Node::start(Arc::default(), None).await).await
}

fn ask() -> Ask {
    Ask { volume: VOLUME, branch: BRANCH, epoch: None }
}

fn heartbeat() -> Message {
    Message::Heartbeat(Heartbeat { state: base_state(), time: murphy_log::LogTime::from_nanos(1) })
}

/// The fear: one peer's nonsense ends the listener, or goes unanswered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_ends_the_connection_that_brought_it_and_no_other() {
    let visit = neither().await;
    let (mut reader, mut writer) = visit.connection.open_both().await.unwrap();
    writer.send_raw(Bytes::from_static(&[0xff; 64]), ms(5000)).await.unwrap();
    assert!(reader.expect().await.is_err());
    visit.connection.closed().await;
    let visit = Visit::to(visit.node).await;
    let reason = visit.refusal(&heartbeat(), "a heartbeat message cannot be the first").await;
    assert_eq!(reason, Refusal::Protocol);
    let visit = Visit::to(visit.node).await;
    assert_eq!(visit.refusal(&visit.hello(), "not the source").await, Refusal::Protocol);
    visit.node.stop().await;
}

/// The fear: so many who never take their answer that nobody else is let in any more, the mirrors included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_take_its_last_words_is_let_go() {
    let node = Node::start(Arc::default(), None).await;
    let redeem = Redeem {
        secret: Secret::random().unwrap(),
        name: "n".to_owned(),
        addresses: Vec::new(),
        promised: None,
    };
    for first in [Message::Ask(ask()), Message::Redeem(redeem)] {
        let Dialer { identity, sockets, options } = dialer();
        let key = node.identity.public_key();
        let none = Grants { window: 0, ..Grants::FOLLOWER };
        let connection = dial_granting(none, &identity, &*sockets, node.address, key, &options).await;
        let connection = connection.unwrap();
        let (_reader, mut writer) = connection.open_both().await.unwrap();
        writer.send(&first).await.unwrap();
        let gone = tokio::time::timeout(ms(30_000), connection.closed()).await;
        assert!(gone.is_ok(), "it keeps its connection after a {} message", first.name());
    }
    node.stop().await;
}

/// The fear: a follower that is about to say something finds its stream stopped, and never reads why it was refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_may_go_on_talking_until_it_has_read_why_it_was_refused() {
    let visit = Visit::asking(Node::start(Arc::default(), None).await).await;
    let (connection, _) =
        visit.dialer.dial(&visit.addresses(), visit.node.identity.public_key()).await.unwrap();
    let (mut reader, mut writer) = connection.open_both().await.unwrap();
    let Message::Hello(hello) = visit.hello() else { panic!("it is a hello") };
    let foreign = Hello { volume: VolumeId::from_bytes([9; 16]), ..hello };
    writer.send(&Message::Hello(foreign)).await.unwrap();
    let Message::Refused(refused) = reader.expect().await.unwrap() else { panic!("not refused") };
    assert_eq!(refused.reason, Refusal::ForeignVolume);
    // Whatever stops the other direction has arrived before the end of this one.
    assert!(matches!(reader.next().await, Ok(None)));
    writer.send(&heartbeat()).await.unwrap();
    visit.node.stop().await;
}

/// A promise is asked of one mirror of one branch: anything else that promised would count as a copy that is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promise_is_given_only_by_a_mirror_of_that_volume_and_branch() {
    let visit = neither().await;
    let seal = seal(2);
    let (volume, branch) = (VolumeId::from_bytes([9; 16]), BranchId::from_bytes([9; 16]));
    for (seal, expected) in [
        (Seal { volume, ..seal.clone() }, Refusal::ForeignVolume),
        (Seal { branch, ..seal.clone() }, Refusal::ForeignBranch),
        (seal, Refusal::Protocol),
    ] {
        let key = visit.node.identity.public_key();
        match visit.dialer.seal(&visit.addresses(), key, seal).await {
            Err(ExchangeError::Refused(refused)) => assert_eq!(refused.reason, expected),
            other => panic!("{other:?}"),
        }
    }
    visit.node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_nothing_at_the_moment_lends_nothing_and_says_so() {
    let visit = neither().await;
    let foreign = Ask { branch: BranchId::from_bytes([9; 16]), ..ask() };
    assert_eq!(visit.refusal(&Message::Ask(foreign), "branch").await, Refusal::ForeignBranch);
    let visit = Visit::to(visit.node).await;
    assert_eq!(visit.refusal(&Message::Ask(ask()), "neither source nor mirror").await, Refusal::Protocol);

    let mut visit = Visit::asking(visit.node).await;
    visit.node.services.become_part(Part::Neither);
    let base = base_state().position;
    let request = LendRequest { after: Point { lsn: base.lsn, hash: base.hash }, to: Lsn::new(100) };
    let reason = visit.refusal(&Message::LendRequest(request), "holds nothing at the moment").await;
    assert_eq!(reason, Refusal::Protocol);
    assert_eq!(visit.refusal(&heartbeat(), "not expected here").await, Refusal::Protocol);
    let (mut reader, mut writer) = visit.control.take().unwrap();
    writer.send(&heartbeat()).await.unwrap();
    let Message::Refused(refused) = reader.expect().await.unwrap() else { panic!("not refused") };
    assert!(refused.detail.contains("heartbeat message is not expected now"), "{}", refused.detail);
    visit.node.stop().await;
}

/// Frames are lent to those who asked where the node stands, and so showed their epoch; nobody gets round that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_are_not_lent_on_a_connection_that_did_not_ask() {
    let visit = neither().await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 3, 3)));
    visit.node.lead(&log, 1000);
    let (mut reader, mut writer) = visit.connection.open_both().await.unwrap();
    writer.send(&visit.hello()).await.unwrap();
    reader.expect().await.unwrap();
    let base = base_state().position;
    let request = LendRequest { after: Point { lsn: base.lsn, hash: base.hash }, to: Lsn::new(100) };
    let reason = visit.refusal(&Message::LendRequest(request), "lend request").await;
    assert_eq!(reason, Refusal::Protocol);
    visit.node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_says_where_it_listens_and_a_stranger_does_not() {
    let visit = neither().await;
    let (addresses, key) = (visit.addresses(), visit.node.identity.public_key());
    let listens = vec!["mirror.example:7".to_owned()];
    let admitted =
        visit.dialer.announce(&addresses, key, listens.clone(), vec!["machine m".to_owned()]).await.unwrap();
    assert_eq!((admitted.volume, admitted.branch, admitted.role), (VOLUME, BRANCH, MemberRole::Mirror));
    let row = visit.node.book.row(visit.dialer.identity.node()).unwrap();
    assert_eq!(row.addresses, listens);
    let error = dialer().announce(&addresses, key, listens, Vec::new()).await.unwrap_err();
    assert!(error.to_string().contains("not a member"), "{error}");
    assert_eq!(visit.node.book.members().len(), 1);
    visit.node.stop().await;
}

/// A store that can only fail.
#[derive(Debug)]
struct Broken;

impl Broken {
    fn error<T>() -> Result<T, BlockStoreError> {
        let source = Arc::new(std::io::Error::other("a loose cable"));
        Err(BlockStoreError::Unavailable { object: "the pack".to_owned(), retryable: true, source })
    }
}

impl BlockStore for Broken {
    fn label(&self) -> Cow<'_, str> {
        "broken".into()
    }

    fn put(&self, _: PackName, _: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        async { Broken::error() }.boxed()
    }

    fn mend(&self, _: PackName, _: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        async { Broken::error() }.boxed()
    }

    fn get_range(&self, _: PackName, _: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        async { Broken::error() }.boxed()
    }

    fn get(&self, _: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        async { Broken::error() }.boxed()
    }

    fn size(&self, _: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        async { Broken::error() }.boxed()
    }

    fn delete(&self, _: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        async { Broken::error() }.boxed()
    }

    fn list(&self, _: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        Box::pin(futures::stream::iter([Broken::error()]))
    }
}

fn pack(number: u64) -> PackName {
    PackName::new(WriterId::from_u64(7), number)
}

/// The fear: a store that fails looks like one that has no such pack, and somebody calls the pack lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_cannot_be_read_is_told_apart_from_one_that_is_not_there() {
    let request =
        |number, offset, length| Message::PackRequest(PackRequest { pack: pack(number), offset, length });
    let stores: [(Option<Arc<dyn BlockStore>>, &str); 2] =
        [(Some(Arc::new(Broken)), "loose cable"), (None, "serves no packs")];
    for (store, expected) in stores {
        let visit = Visit::asking(Node::start(Arc::default(), store).await).await;
        for (offset, length) in [(0, 0), (3, 0), (3, 5)] {
            match visit.say(&request(1, offset, length)).await {
                Message::PackReply(PackReply::Failed(why)) => assert!(why.contains(expected), "{why}"),
                other => panic!("{other:?}"),
            }
        }
        visit.node.stop().await;
    }
    let store = Arc::new(ObjectBlockStore::in_memory());
    store.put(pack(1), Bytes::from_static(b"0123456789")).await.unwrap();
    let visit = Visit::asking(Node::start(Arc::default(), Some(store)).await).await;
    let replies = [
        (4, 0, PackReply::Found(Bytes::from_static(b"456789"))),
        (10, 0, PackReply::Found(Bytes::new())),
        (2, 3, PackReply::Found(Bytes::from_static(b"234"))),
        (u64::MAX, 3, PackReply::Failed("a range beyond any pack".to_owned())),
    ];
    for (offset, length, expected) in replies {
        match visit.say(&request(1, offset, length)).await {
            Message::PackReply(reply) => assert_eq!(reply, expected, "{length} bytes at {offset}"),
            other => panic!("{other:?}"),
        }
    }
    for (offset, length) in [(0, 0), (4, 0), (2, 3)] {
        let reply = visit.say(&request(2, offset, length)).await;
        assert!(matches!(reply, Message::PackReply(PackReply::Missing)), "{reply:?}");
    }
    visit.node.stop().await;
}

/// The fear: a member that was started again is never asked for packs any more, because its old connection is kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_of_a_member_come_over_a_new_connection_once_the_old_one_has_failed() {
    let (book, store): (Arc<MemoryBook>, Arc<dyn BlockStore>) =
        (Arc::default(), Arc::new(ObjectBlockStore::in_memory()));
    let whole = packs::pack(1);
    store.put(whole.name, whole.bytes.clone()).await.unwrap();
    let node = Node::start(Arc::clone(&book), Some(Arc::clone(&store))).await;
    node.lead(&Arc::new(MemoryLog::new(base_state())), 1000);
    let (identity, address, dialer) = (Arc::clone(&node.identity), node.address, dialer());
    admit(&book, dialer.identity.public_key(), MemberRole::Mirror);
    let addresses = vec![address.to_string()];
    let member = MemberPacks::new(dialer, addresses.clone(), identity.public_key(), ask());
    assert!(member.is_of(&addresses, identity.public_key()) && !member.is_of(&[], identity.public_key()));
    assert_eq!(member.fetch(whole.name).await.unwrap(), whole.bytes);
    assert_eq!(member.fetch(pack(2)).await, Err(PackFetchError::Missing(pack(2))));
    node.stop().await;
    assert!(matches!(member.fetch(whole.name).await, Err(PackFetchError::Failed(_))), "the old connection");
    assert_eq!(member.fetch(whole.name).await, Err(PackFetchError::NotConnected), "a new one cannot be made");
    let node = Node::start_as(identity, book, Some(store), BRANCH, address).await;
    node.lead(&Arc::new(MemoryLog::new(base_state())), 1000);
    assert_eq!(member.fetch(whole.name).await.unwrap(), whole.bytes);
    node.stop().await;
}

/// The fear: an old source that is told of its successor does not hear it, or the one that tells it thinks that it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_source_that_is_told_of_its_successor_knows_where_the_histories_part() {
    let visit = neither().await;
    let frames = test_frames(base_state(), 1, 3, 3);
    let (log, key) = (Arc::new(log_of(base_state(), &frames)), visit.node.identity.public_key());
    let (addresses, keys) = (visit.addresses(), keys());
    let base = Point { lsn: frames[1].last(), hash: frames[1].position().hash };
    let tell =
        async |epoch| visit.dialer.tell_fenced(&addresses, key, (&keys, BRANCH), epoch, Some(base)).await;
    let error = tell(epoch(2)).await.unwrap_err();
    assert!(
        matches!(&error, ExchangeError::Refused(refused) if refused.reason == Refusal::Protocol),
        "{error}"
    );
    visit.node.lead(&log, 1000);
    assert!(tell(epoch(1)).await.is_err(), "its own epoch ends nothing");
    let board = &visit.node.services.board;
    assert_eq!((board.fenced_by(), board.successor_base()), (None, None));
    tell(epoch(2)).await.unwrap();
    assert_eq!((board.fenced_by(), board.successor_base()), (Some(epoch(2)), Some(base)));
    visit.node.stop().await;
}

/// A source that comes back asks everybody: most of them are mirrors, or do not know it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_or_a_stranger_leads_nothing_that_ends_a_source() {
    let visit = neither().await;
    let replica = Arc::new(MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate));
    let heard = watch::Sender::new(Lsn::ROOT).subscribe();
    visit.node.services.become_part(Part::Mirror(alone(replica, heard)));
    let log: Arc<dyn Log> = Arc::new(log_of(base_state(), &[]));
    let key = visit.node.identity.public_key();
    for dialer in [visit.dialer.clone(), dialer()] {
        assert_eq!(compare(&dialer, &visit.addresses(), key, (&keys(), BRANCH), &log).await, Ok(None));
    }
    visit.node.stop().await;
}

/// The fear: the source's disk ends it, and its mirrors and subscribers wait without a word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_whose_log_ends_tells_those_who_follow() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 3, 3)));
    source.lead(&log, 1000);
    let mut mirror = follow(&source, Some(base_state()));
    mirror.reach(log.tail()).await;
    let dialer = dialer();
    admit(&source.book, dialer.identity.public_key(), MemberRole::Observer);
    let (addresses, key) = ([source.address.to_string()], source.identity.public_key());
    let mut observer =
        Observer::connect(&dialer, &addresses, key, (keys(), BRANCH), Lsn::new(11), None).await.unwrap();
    log.end(Terminal::Poisoned { message: Arc::from("a sync failed") });
    mirror.complains("a sync failed").await;
    let ended = observer.next().await.unwrap_err();
    assert!(matches!(&ended, ObserveError::Refused(refused) if refused.reason == Refusal::Ended), "{ended}");
    assert_eq!(mirror.replica.state(), Some(log.durable().state()));
    mirror.stop().await;
    source.stop().await;
}

/// The fear: a mirror whose own log has ended goes on following, and acknowledges what it does not have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_whose_own_log_ends_stops_following_and_says_why() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 3, 3)));
    source.lead(&log, 1000);
    let mirror = follow(&source, Some(base_state()));
    mirror.reach(log.tail()).await;
    mirror.replica.log().unwrap().end(Terminal::Poisoned { message: Arc::from("a sync failed") });
    let FollowError::Ended(why) = mirror.ended().await;
    assert!(why.contains("a sync failed"), "{why}");
    source.stop().await;
}

/// The fear: a log that refuses a frame, here of an epoch that was promised meanwhile, leaves a gap, or stops the mirror for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_the_own_log_refuses_is_named_and_is_asked_for_again() {
    let source = Node::start(Arc::default(), None).await;
    let frames = test_frames(base_state(), 1, 3, 3);
    let log = Arc::new(log_of(base_state(), &frames[..2]));
    source.lead(&log, 1000);
    let dialer = dialer();
    admit(&source.book, dialer.identity.public_key(), MemberRole::Mirror);
    let replica = Arc::new(MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate));
    let full = Arc::new(Full { replica: Arc::clone(&replica), is_full: AtomicBool::new(false) });
    let key = source.identity.public_key();
    let mut mirror = follow_with(dialer, replica, full.clone(), source.address, key);
    mirror.reach(frames[1].state()).await;
    full.is_full.store(true, Ordering::SeqCst);
    extend(&log, &frames[2..]);
    mirror.complains(&format!("cannot append lsn {}: no space: the disk is full", frames[2].first())).await;
    assert_eq!(mirror.replica.state(), Some(frames[1].state()));
    full.is_full.store(false, Ordering::SeqCst);
    mirror.reach(frames[2].state()).await;
    mirror.stop().await;
    source.stop().await;
}

/// A mirror whose disk is full when it is told so.
struct Full {
    replica: Arc<MemoryReplica>,
    is_full: AtomicBool,
}

impl ReplicaLayer for Full {
    fn below(&self) -> &MemoryReplica {
        &self.replica
    }

    fn on_append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError> {
        if self.is_full.load(Ordering::SeqCst) {
            return Err(ReplicaError::NoSpace("the disk is full".to_owned()));
        }
        self.replica.append(frame, told)
    }

    fn on_set_aside(&self, ancestor: Point, tail: Position) -> Result<(), ReplicaError> {
        if self.is_full.load(Ordering::SeqCst) {
            return Err(ReplicaError::NoSpace("the disk is full".to_owned()));
        }
        self.replica.set_aside(ancestor, tail)
    }
}

/// An old source that was made a mirror: its tail is kept and it follows its successor. The fear: a tail that could not be kept is said to
/// be, or is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_with_an_older_tail_follows_once_it_could_keep_it_as_a_branch() {
    let shared = test_frames(base_state(), 1, 20, 3);
    let fork = shared[19].state();
    let log = Arc::new(log_of(base_state(), &shared));
    extend(&log, &frames_in(epoch(2), fork, 8, 6, 2));
    let source = Node::start(Arc::default(), None).await;
    source.lead(&log, 1000);
    let mut dialer = dialer();
    dialer.options.congestion = Congestion::Bbr;
    admit(&source.book, dialer.identity.public_key(), MemberRole::Mirror);
    let replica = Arc::new(MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate));
    let tail = test_frames(fork, 7, 4, 3);
    shared.iter().chain(&tail).for_each(|frame| replica.append(frame.clone(), None).unwrap());
    let full = Arc::new(Full { replica: Arc::clone(&replica), is_full: AtomicBool::new(true) });
    let key = source.identity.public_key();
    let mut mirror = follow_with(dialer, replica, full.clone(), source.address, key);
    mirror.complains("could not be set aside: no space: the disk is full").await;
    assert_eq!((mirror.replica.state(), mirror.replica.kept().len()), (Some(tail[3].state()), 0));
    full.is_full.store(false, Ordering::SeqCst);
    mirror.reach(log.tail()).await;
    let kept = mirror.replica.kept();
    assert_eq!(kept.len(), 1);
    assert_eq!(kept[0].ancestor.map(|point| point.lsn), Some(fork.position.lsn));
    assert_eq!(kept[0].log.tail(), tail[3].state());
    mirror.stop().await;
    source.stop().await;
}
