//! Peers that answer the network and take nothing that they are sent: they are given up, with a reason, and hold nobody's place.

use std::sync::Arc;

use murphy_fs::MemberRole;
use murphy_log::{Log, Lsn};

use super::{
    BRANCH, VOLUME, base_state, log_of, ms,
    quic::{Node, admit, dialer, follow},
    test_frames,
};
use crate::{
    Ask, Dialer, Hello, LendRequest, Message, Point, Resume,
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
