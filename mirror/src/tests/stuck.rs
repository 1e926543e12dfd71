//! Peers that answer the network and take nothing that they are sent: they are given up, with a reason, and hold nobody's place.

use std::{
    borrow::Cow,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture, stream::BoxStream};
use murphy_fs::{BlockStore, BlockStoreError, MemberRole, ObjectBlockStore, PackName, StoredPack, WriterId};
use murphy_log::{Log, Lsn};

use super::{
    BRANCH, VOLUME, base_state, log_of, ms, packs,
    quic::{Node, admit, dialer, follow},
    test_frames,
};
use crate::{
    Ask, Dialer, Hello, LendRequest, Message, PackFetchError, Point, RemotePacks, Resume,
    endpoint::{Grants, dial_granting},
    session::{Connection, MessageReader, MessageWriter},
};

/// A member that allows the node so much, and what it has said first.
struct Guest {
    connection: Connection,
    reader: MessageReader,
    _writer: MessageWriter,
}

impl Guest {
    async fn says(node: &Node, grants: Grants, first: impl Fn(&Dialer) -> Message) -> Guest {
        let dialer = dialer();
        admit(&node.book, dialer.identity.public_key(), MemberRole::Mirror);
        let Dialer { identity, sockets, options } = &dialer;
        let key = node.identity.public_key();
        let connection = dial_granting(grants, identity, &**sockets, node.address, key, options).await;
        let connection = connection.unwrap();
        let (reader, mut writer) = connection.open_both().await.unwrap();
        writer.send(&first(&dialer)).await.unwrap();
        Guest { connection, reader, _writer: writer }
    }

    /// Why its connection has ended.
    async fn ended(&self) -> String {
        let ended = tokio::time::timeout(ms(20_000), self.connection.closed()).await;
        ended.expect("its connection is kept")
    }
}

fn hello(resume: Resume) -> impl Fn(&Dialer) -> Message {
    move |dialer| {
        let (node, data_lsn) = (dialer.identity.node(), Lsn::ROOT);
        Message::Hello(Hello { volume: VOLUME, branch: BRANCH, node, resume, data_lsn, promised: None })
    }
}

fn ask(_: &Dialer) -> Message {
    Message::Ask(Ask { volume: VOLUME, branch: BRANCH, epoch: None })
}

const DEAF: Grants = Grants { window: 0, ..Grants::FOLLOWER };

/// The fear: two members that take nothing hold both places of those who are seeded, and no mirror ever begins again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_take_nothing_are_given_up_and_others_are_seeded() {
    let node = Node::start_patient(ms(100)).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 30, 3)));
    node.lead(&log, 20_000);
    for _ in 0..2 {
        let deaf = Guest::says(&node, DEAF, hello(Resume::Fresh)).await;
        let ended = deaf.ended().await;
        assert!(ended.contains("the peer takes nothing for 100ms"), "{ended}");
    }
    let narrow = Grants { parts: 0, ..Grants::FOLLOWER };
    let narrow = Guest::says(&node, narrow, hello(Resume::After(base_state().position))).await;
    let ended = narrow.ended().await;
    assert!(ended.contains("the peer allows no stream for 100ms"), "{ended}");
    let mirror = follow(&node, None);
    mirror.reach(log.tail()).await;
    mirror.stop().await;
    node.stop().await;
}

/// The fear: one that asks and never takes an answer keeps its connection, and each of its requests the node's log open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_asks_and_takes_no_answer_is_given_up() {
    let node = Node::start_patient(ms(100)).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 300, 3)));
    node.lead(&log, 1000);
    let deaf = Guest::says(&node, DEAF, ask).await;
    let ended = deaf.ended().await;
    assert!(ended.contains("the peer takes nothing for 100ms"), "{ended}");

    // What it has asked for first it has read.
    let mut slow = Guest::says(&node, Grants { window: 1000, ..Grants::FOLLOWER }, ask).await;
    assert!(matches!(slow.reader.expect().await, Ok(Message::Stands(_))));
    let base = base_state().position;
    let request =
        LendRequest { after: Point { lsn: base.lsn, hash: base.hash }, to: log.tail().position.lsn };
    let mut unread = Vec::new();
    // As many as are answered at a time, and one that waits for the end of another one.
    for _ in 0..=Grants::LISTENER.requests {
        let (reader, mut writer) = slow.connection.open_both().await.unwrap();
        writer.send(&Message::LendRequest(request)).await.unwrap();
        unread.push(reader);
    }
    node.stop().await;
}

/// A store that never answers for one pack, and counts what it is asked for at a time.
#[derive(Debug)]
struct Hanging {
    below: ObjectBlockStore,
    hangs: PackName,
    asked: AtomicUsize,
}

impl Hanging {
    async fn read<T>(&self, name: PackName, read: BoxFuture<'_, T>) -> T {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if name == self.hangs {
            std::future::pending::<()>().await;
        }
        read.await
    }
}

impl BlockStore for Hanging {
    fn label(&self) -> Cow<'_, str> {
        "hanging".into()
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.put(name, bytes)
    }

    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.mend(name, bytes)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.read(name, self.below.get_range(name, range)).boxed()
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.read(name, self.below.get(name)).boxed()
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        self.below.size(name)
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.delete(name)
    }

    fn list(&self, of: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.below.list(of)
    }
}

/// The fear: reads of a store that hangs keep every place of those who are lent a pack, and long parts, which have no place, fill the memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_are_lent_although_a_store_hangs_and_long_parts_wait_for_a_place() {
    let (hangs, good) = (packs::pack(1), packs::pack(2));
    let below = ObjectBlockStore::in_memory();
    below.put(good.name, good.bytes.clone()).await.unwrap();
    let store = Arc::new(Hanging { below, hangs: hangs.name, asked: AtomicUsize::new(0) });
    let node = Node::start(Arc::default(), Some(store.clone())).await;
    node.lead(&Arc::new(log_of(base_state(), &[])), 1000);
    let mut guest = Guest::says(&node, Grants::FOLLOWER, ask).await;
    assert!(matches!(guest.reader.expect().await, Ok(Message::Stands(_))));
    let packs = RemotePacks::over(guest.connection.clone());
    let mut asking: Vec<_> = (0..20).map(|_| Box::pin(packs.read(hangs.name, 0..1 << 20))).collect();
    let small = async {
        // It takes no place; and by then all who come before it have been let in, or wait.
        while packs.read(good.name, 0..1000).await.is_err() {}
    };
    tokio::select! {
        _ = futures::future::join_all(asking.iter_mut()) => panic!("a store that hangs has answered"),
        () = small => {}
    }
    let most = store.asked.load(Ordering::SeqCst);
    assert!(most <= 9, "{most} were read at a time, by one peer");
    let whole = async {
        // While those who hang are given up, somebody waits too long as well.
        loop {
            match packs.read(good.name, 0..0).await {
                Ok(bytes) => return bytes,
                Err(error) => assert!(matches!(error, PackFetchError::Failed(_)), "{error}"),
            }
        }
    };
    let hanging = futures::future::join_all(asking);
    let (whole, hanging) =
        tokio::time::timeout(ms(60_000), async { tokio::join!(whole, hanging) }).await.unwrap();
    assert_eq!(whole, good.bytes);
    assert!(hanging.iter().all(Result::is_err));
    node.stop().await;
}

/// The fear: one member that connects again and again, and leaves nothing, takes every place that there is, and no mirror follows any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_does_not_take_all_connections() {
    let node = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 3, 3)));
    node.lead(&log, 1000);
    let greedy = dialer();
    admit(&node.book, greedy.identity.public_key(), MemberRole::Mirror);
    let (addresses, key) = ([node.address.to_string()], node.identity.public_key());
    let asked = Ask { volume: VOLUME, branch: BRANCH, epoch: None };
    let mut lenders = Vec::new();
    let refused = loop {
        match greedy.lender(&addresses, key, asked).await {
            Ok(lender) => lenders.push(lender),
            Err(error) => break error.to_string(),
        }
        assert!(lenders.len() <= 16, "it has as many as it likes");
    };
    assert!(refused.contains("too many connections"), "{refused}");
    let mirror = follow(&node, Some(base_state()));
    mirror.reach(log.tail()).await;
    // It is let in again once it has left.
    lenders.clear();
    let again = async { while greedy.lender(&addresses, key, asked).await.is_err() {} };
    tokio::time::timeout(ms(20_000), again).await.expect("its places are free");
    mirror.stop().await;
    node.stop().await;
}
