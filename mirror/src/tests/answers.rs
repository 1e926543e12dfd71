//! Nodes with the right key that answer something else than they were asked: nobody believes them, and each error says what came.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use murphy_fs::{MemberRole, PackName, WriterId};
use murphy_log::{Epoch, Log, LogTime, Lsn, NodeId, State};
use tokio::task::JoinHandle;

use super::{
    BRANCH, VOLUME, base_state, epoch, keys, log_of, ms,
    quic::{dialer, follow_as, seal},
    test_frames,
};
use crate::{
    Ask, BorrowError, Dialer, Durability, ExchangeError, Frames, Heartbeat, Identity, Lender, MemoryReplica,
    Message, NetworkOptions, ObserveError, Observer, PackFetchError, PackReply, PublicKey, Refusal, Refused,
    Replica, Sealed, Secret, SeedPart, SeedReason, Stands, Token, UdpSockets, Verdict, Welcome, compare,
    endpoint::{Grants, ListeningEndpoint},
    session::MessageWriter,
};

/// What a node says on one stream that it accepts: after it has heard a message, these bytes; then the stream ends, or stays.
#[derive(Clone)]
struct Line {
    bytes: Vec<u8>,
    then: Then,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Stay,
    End,
}

fn says(messages: &[Message]) -> Line {
    Line { bytes: messages.iter().flat_map(Message::encode).collect(), then: Then::Stay }
}

fn heartbeat() -> Message {
    Message::Heartbeat(Heartbeat { state: base_state(), time: LogTime::from_nanos(1) })
}

fn welcome(state: State, verdict: Verdict) -> Message {
    let (volume, branch, node) = (VOLUME, BRANCH, NodeId::from_bytes([1; 16]));
    Message::Welcome(Welcome { volume, branch, node, state, epoch: epoch(2), first: Lsn::FIRST, verdict })
}

/// A node that says one line on every control stream, another on every stream after it, and sends these streams of its own.
struct Scripted {
    key: PublicKey,
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Scripted {
    async fn start(control: Line, further: Line, parts: Vec<Vec<u8>>) -> Scripted {
        Scripted::granting(Grants::LISTENER, control, further, parts).await
    }

    async fn granting(grants: Grants, control: Line, further: Line, parts: Vec<Vec<u8>>) -> Scripted {
        let identity = Identity::generate().unwrap();
        let (local, options) = (([127, 0, 0, 1], 0).into(), NetworkOptions::default());
        let endpoint =
            ListeningEndpoint::bind_granting(grants, &identity, &UdpSockets, local, &options).unwrap();
        let (key, address) = (identity.public_key(), endpoint.local_addr().unwrap());
        let task = tokio::spawn(async move {
            while let Some(attempt) = endpoint.accept().await {
                let Ok(connection) = attempt.complete().await else { continue };
                let (control, further, parts) = (control.clone(), further.clone(), parts.clone());
                tokio::spawn(async move {
                    let mut lines = std::iter::once(control).chain(std::iter::repeat(further));
                    let mut open = Vec::new();
                    while let Ok((mut reader, mut writer)) = connection.accept_both().await {
                        reader.expect().await.unwrap();
                        let Line { bytes, then } = lines.next().unwrap();
                        writer.send_raw(bytes.into(), ms(5000)).await.unwrap();
                        open.push(reader);
                        say(writer, then);
                        for part in &parts {
                            let mut stream = connection.open_one().await.unwrap();
                            stream.send_raw(part.clone().into(), ms(5000)).await.unwrap();
                            say(stream, Then::End);
                        }
                    }
                });
            }
        });
        Scripted { key, address, task }
    }

    async fn answering(control: &[Message]) -> Scripted {
        Scripted::start(says(control), says(&[]), Vec::new()).await
    }

    fn addresses(&self) -> [String; 1] {
        [self.address.to_string()]
    }

    async fn lender(&self) -> Result<Lender, ExchangeError> {
        self.lender_of(&dialer()).await
    }

    async fn lender_of(&self, dialer: &Dialer) -> Result<Lender, ExchangeError> {
        let ask = Ask { volume: VOLUME, branch: BRANCH, epoch: None };
        dialer.lender(&self.addresses(), self.key, ask).await
    }

    async fn observer(&self) -> Result<Observer, ObserveError> {
        self.observer_of(&dialer()).await
    }

    async fn observer_of(&self, dialer: &Dialer) -> Result<Observer, ObserveError> {
        let volume = (keys(), BRANCH);
        Observer::connect(dialer, &self.addresses(), self.key, volume, Lsn::FIRST, None).await
    }

    /// What a mirror that follows this node says of it.
    async fn complaint(&self, base: Option<State>, text: &str) -> Arc<MemoryReplica> {
        self.complaint_of(dialer(), base, text).await
    }

    async fn complaint_of(&self, dialer: Dialer, base: Option<State>, text: &str) -> Arc<MemoryReplica> {
        let replica = Arc::new(MemoryReplica::new(keys(), base, Durability::Immediate));
        let mut mirror = follow_as(dialer, replica.clone(), self.address, self.key);
        mirror.complains(text).await;
        mirror.stop().await;
        replica
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Ends the stream once it has arrived, or keeps it for as long as the test runs.
fn say(writer: MessageWriter, then: Then) {
    tokio::spawn(async move {
        if then == Then::Stay {
            return std::future::pending().await;
        }
        // Whoever asked may be gone by then.
        writer.finish(ms(5000)).await.unwrap_or_default();
    });
}

fn protocol<T: std::fmt::Debug>(outcome: Result<T, ExchangeError>, text: &str) {
    match outcome {
        Err(ExchangeError::Protocol(what)) => assert!(what.contains(text), "{what}"),
        other => panic!("{other:?}"),
    }
}

/// The fear: an exchange counts as done because something came back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_something_else_is_no_answer() {
    let node = Scripted::answering(&[heartbeat()]).await;
    let (dialer, addresses, text) = (dialer(), node.addresses(), "heartbeat message");
    let token = Token {
        addresses: addresses.to_vec(),
        volume: VOLUME,
        branch: BRANCH,
        source_key: node.key,
        secret: Secret::random().unwrap(),
        role: MemberRole::Mirror,
        expires: LogTime::from_nanos(u64::MAX),
    };
    protocol(dialer.join(&token, "x".to_owned(), Vec::new()).await, text);
    let seal = seal(2);
    protocol(dialer.seal(&addresses, node.key, seal).await, text);
    protocol(dialer.announce(&addresses, node.key, Vec::new(), Vec::new()).await, text);
    protocol(dialer.tell_fenced(&addresses, node.key, (&keys(), BRANCH), epoch(2), None).await, text);
    protocol(node.lender().await, text);
    let log: Arc<dyn Log> = Arc::new(log_of(base_state(), &[]));
    protocol(compare(&dialer, &addresses, node.key, (&keys(), BRANCH), &log).await, text);
    let Err(ObserveError::Protocol(what)) = node.observer().await else { panic!("observed") };
    assert!(what.contains(text), "{what}");
}

/// A promise to another epoch than was asked for would count one mirror too many as sealed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promise_to_another_epoch_does_not_count() {
    let promise = |epoch: Epoch| {
        Message::Sealed(Sealed { epoch, state: None, data_lsn: Lsn::ROOT, heard_lsn: Lsn::ROOT })
    };
    for (promised, counts) in [(epoch(3), false), (Epoch { number: 2, ..epoch(9) }, false), (epoch(2), true)]
    {
        let node = Scripted::answering(&[promise(promised)]).await;
        let seal = seal(2);
        let sealed = dialer().seal(&node.addresses(), node.key, seal).await;
        assert_eq!(sealed.is_ok(), counts, "{sealed:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_cut_off_or_garbled_is_told_apart_from_a_refusal() {
    let whole = heartbeat().encode();
    let mut version = whole.clone();
    version[4] = 99;
    let cut = Line { bytes: whole[..whole.len() - 1].to_vec(), then: Then::End };
    let none = Line { bytes: Vec::new(), then: Then::End };
    let garbled = Line { bytes: version, then: Then::Stay };
    for (line, expected) in [
        (cut, "cannot reach the node: the stream ends inside a message"),
        (none, "cannot reach the node: the stream has ended"),
        (garbled, "breaks the protocol"),
    ] {
        let node = Scripted::start(line, says(&[]), Vec::new()).await;
        let error = dialer().announce(&node.addresses(), node.key, Vec::new(), Vec::new()).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// The fear: too few bytes, or other frames than were asked for, are taken for what was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lender_that_sends_something_else_than_it_was_asked_for_is_not_believed() {
    let frames = test_frames(base_state(), 1, 4, 3);
    let stands = Message::Stands(Stands {
        state: Some(frames[3].state()),
        data_lsn: Lsn::ROOT,
        heard_lsn: Lsn::ROOT,
        promised: None,
    });
    let lender = async |further: Line| {
        let node = Scripted::start(says(std::slice::from_ref(&stands)), further, Vec::new()).await;
        (node.lender().await.unwrap(), node)
    };
    let pack = PackName::new(WriterId::from_u64(7), 1);
    let replies = [
        (
            Message::PackReply(PackReply::Found(Bytes::from_static(b"short"))),
            "5 bytes where 10 were asked for",
        ),
        (Message::PackReply(PackReply::Failed("the store is full".to_owned())), "the store is full"),
        (heartbeat(), "a heartbeat message is no answer"),
    ];
    for (reply, expected) in replies {
        let (lender, _node) = lender(says(&[reply])).await;
        match lender.packs.read(pack, 0..10).await {
            Err(PackFetchError::Failed(what)) => assert!(what.contains(expected), "{what}"),
            other => panic!("{other:?}"),
        }
    }
    let (lent, _node) = lender(says(&[])).await;
    let beyond = lent.packs.read(pack, 0..1 << 40).await;
    assert!(matches!(&beyond, Err(PackFetchError::Failed(what)) if what.contains("limit")), "{beyond:?}");

    let run = Message::Frames(Frames::of(frames[3].last(), &frames).unwrap());
    let (lent, _node) = lender(says(&[run])).await;
    let mut borrowing = lent.frames(&keys(), base_state().position, frames[1].last()).await.unwrap();
    let error = borrowing.next().await.unwrap_err().to_string();
    assert!(error.contains("nothing beyond 7 was asked for"), "{error}");
    let (lent, _node) = lender(says(&[heartbeat()])).await;
    let mut borrowing = lent.frames(&keys(), base_state().position, frames[1].last()).await.unwrap();
    let error = borrowing.next().await.unwrap_err();
    assert!(matches!(error, BorrowError::Exchange(ExchangeError::Protocol(_))), "{error}");
    assert_eq!(borrowing.position(), base_state().position);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_search_that_is_answered_with_something_else_ends() {
    let own = test_frames(base_state(), 1, 4, 3);
    let log: Arc<dyn Log> = Arc::new(log_of(base_state(), &own));
    let ask = async |node: &Scripted| {
        compare(&dialer(), &node.addresses(), node.key, (&keys(), BRANCH), &log).await
    };
    let diverged = welcome(base_state(), Verdict::Diverged);
    let other = Message::Probe { lsn: Lsn::FIRST };
    // A heartbeat may come between question and answer.
    let node = Scripted::answering(&[diverged.clone(), heartbeat(), other]).await;
    protocol(ask(&node).await, "probe message");
    let found = crate::Lookup::Beyond { durable: Lsn::ROOT };
    let unasked = Message::Probed { lsn: Lsn::new(1000), found };
    let node = Scripted::answering(&[diverged, unasked]).await;
    protocol(ask(&node).await, "lsn 1000");
    // A source that no longer reaches back has no point in common that anybody knows of.
    let node = Scripted::answering(&[welcome(base_state(), Verdict::Seed(SeedReason::Trimmed))]).await;
    let comparison = ask(&node).await.unwrap().unwrap();
    assert_eq!((comparison.common, comparison.epoch), (None, epoch(2)));
    let refused = Refused { reason: Refusal::ForeignBranch, detail: "this is branch x".to_owned() };
    let node = Scripted::answering(&[Message::Refused(refused.clone())]).await;
    assert_eq!(ask(&node).await, Err(ExchangeError::Refused(refused)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_says_how_it_has_ended() {
    let next = async |messages: &[Message], then: Then| {
        let mut line = says(&[welcome(base_state(), Verdict::Tail)]);
        line.bytes.extend(messages.iter().flat_map(Message::encode));
        let node = Scripted::start(Line { then, ..line }, says(&[]), Vec::new()).await;
        let mut observer = node.observer().await.unwrap();
        observer.next().await
    };
    assert_eq!(next(&[heartbeat()], Then::End).await.unwrap_err(), ObserveError::Ended);
    let refused = Refused { reason: Refusal::Ended, detail: "the log has ended".to_owned() };
    let ended = next(&[Message::Refused(refused.clone())], Then::Stay).await;
    assert_eq!(ended.unwrap_err(), ObserveError::Refused(refused));
    let ended = next(&[Message::Probe { lsn: Lsn::FIRST }], Then::Stay).await.unwrap_err();
    assert!(matches!(&ended, ObserveError::Protocol(what) if what.contains("probe")), "{ended}");
    let node = Scripted::answering(&[welcome(base_state(), Verdict::Diverged)]).await;
    assert_eq!(node.observer().await.err(), Some(ObserveError::Diverged));
    let cut = Line { bytes: vec![0; 3], then: Then::End };
    let node = Scripted::start(cut, says(&[]), Vec::new()).await;
    assert!(matches!(
        node.observer().await.err(),
        Some(ObserveError::Exchange(ExchangeError::Unreachable(_)))
    ));
}

/// The fear: a mirror that is shown nonsense by its source ends, or says nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_says_what_its_source_did_wrong_and_tries_again() {
    let base = Some(base_state());
    let node = Scripted::start(
        Line { then: Then::End, ..says(&[welcome(base_state(), Verdict::Tail)]) },
        says(&[]),
        Vec::new(),
    );
    node.await.complaint(base, "the source has closed the connection").await;
    let mut garbled = welcome(base_state(), Verdict::Tail).encode();
    garbled[4] = 99;
    let node = Scripted::start(Line { bytes: garbled, then: Then::Stay }, says(&[]), Vec::new()).await;
    node.complaint(base, "version 99").await;
}

fn part(index: u32, length: u32, bytes: &[u8]) -> Vec<u8> {
    [Message::SeedPart(SeedPart { index, length }).encode(), bytes.to_vec()].concat()
}

/// The fear: a mirror begins with a snapshot that is not whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_whose_parts_are_not_what_was_announced_is_not_installed() {
    let state = base_state();
    let script = |parts: u32, bytes: u64| {
        says(&[
            welcome(state, Verdict::Seed(SeedReason::Fresh)),
            Message::SeedOffer { state },
            Message::SeedDone { parts, bytes },
        ])
    };
    let cases = [
        (script(2, 10), vec![part(0, 5, b"first"), part(0, 5, b"again")], "part 0 came twice"),
        (script(1, 9), vec![part(0, 5, b"first")], "5 bytes in 1 parts where 9 in 1 were announced"),
        (script(1, 5), vec![part(7, 5, b"first")], "5 bytes in 1 parts where 5 in 1 were announced"),
        (script(1, 5), vec![part(0, 5, b"four")], "the stream ends too early"),
        (
            script(1, 5),
            vec![heartbeat().encode()],
            "a heartbeat message where a part of a snapshot should be",
        ),
        (script(1, 5), vec![part(0, 5, b"first")], "bad snapshot"),
    ];
    for (control, parts, expected) in cases {
        let node = Scripted::start(control, says(&[]), parts).await;
        let replica = node.complaint(None, expected).await;
        assert_eq!(replica.state(), None, "{expected}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_where_nobody_is_is_named_and_the_next_one_is_tried() {
    let stands = Stands { state: None, data_lsn: Lsn::ROOT, heard_lsn: Lsn::ROOT, promised: Some(epoch(4)) };
    let node = Scripted::answering(&[Message::Stands(stands)]).await;
    let (dialer, ask) = (dialer(), Ask { volume: VOLUME, branch: BRANCH, epoch: None });
    let nowhere = "127.0.0.1:0".to_owned();
    let error = dialer.lender(std::slice::from_ref(&nowhere), node.key, ask).await.unwrap_err();
    assert!(matches!(&error, ExchangeError::Unreachable(why) if why.contains(&nowhere)), "{error}");
    let addresses = [nowhere, node.address.to_string()];
    assert_eq!(dialer.lender(&addresses, node.key, ask).await.unwrap().stands, stands);
}

/// The fear: a source that answers the network and does nothing else holds a mirror, a borrower or a subscriber for ever, and none of them
/// says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_allows_no_stream_or_takes_nothing_is_left_and_that_is_said() {
    let impatient = || {
        let mut dialer = dialer();
        dialer.options.patience = ms(100);
        dialer
    };
    let granting = async |grants: Grants, control: &[Message]| {
        Scripted::granting(grants, says(control), says(&[]), Vec::new()).await
    };
    let closed = granting(Grants { requests: 0, ..Grants::LISTENER }, &[]).await;
    closed.complaint_of(impatient(), Some(base_state()), "the peer allows no stream for 100ms").await;
    assert!(matches!(
        closed.observer_of(&impatient()).await.err(),
        Some(ObserveError::Exchange(ExchangeError::NoAnswer))
    ));
    let deaf = granting(Grants { window: 0, ..Grants::LISTENER }, &[]).await;
    deaf.complaint_of(impatient(), Some(base_state()), "the peer takes nothing for 100ms").await;
    let stands = Stands { state: None, data_lsn: Lsn::ROOT, heard_lsn: Lsn::ROOT, promised: None };
    let mean = granting(Grants { requests: 1, ..Grants::LISTENER }, &[Message::Stands(stands)]).await;
    let lender = mean.lender_of(&impatient()).await.unwrap();
    let lent = lender.frames(&keys(), base_state().position, Lsn::new(9)).await;
    assert_eq!(lent.err(), Some(ExchangeError::NoAnswer));
}
