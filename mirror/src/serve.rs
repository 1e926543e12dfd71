//! What a node answers to those who connect: members follow, the invited join, promoters seal, mirrors fetch packs.
//!
//! Invariants:
//! - Nothing but a redemption is answered before the peer's key has been found in the member book; a question where the node stands also if
//!   it is the key of the source that the node follows.
//! - No disk is read and no lock waited for on an async worker.
//! - Whatever one peer does, its connection ends and the others go on; what is buffered for it is bounded.

mod lend;
mod members;
mod packs;
mod source;

use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use murphy_fs::{BlockStore, MemberRole};
use murphy_log::{BranchId, Clock, Epoch, Log, Lsn, NodeId, VolumeKeys};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, watch};

use crate::{
    board::MirrorBoard,
    book::{MemberBook, authorize},
    endpoint::{Attempt, ListenError, ListeningEndpoint, NetworkOptions, Sockets},
    identity::{Identity, PublicKey},
    message::{Ask, Message, Refusal, Refused},
    replica::{Replica, SnapshotSource},
    session::{Connection, MessageReader, MessageWriter, SessionError},
    status::FollowerStatus,
    vouch::Proof,
};

/// What a node offers to those who connect.
pub struct Services {
    /// The keys of its volume.
    pub keys: VolumeKeys,
    /// Its branch.
    pub branch: BranchId,
    /// The node.
    pub node: NodeId,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// Who may connect.
    pub book: Arc<dyn MemberBook>,
    /// How far the mirrors are.
    pub board: Arc<MirrorBoard>,
    /// The packs that mirrors may fetch from here.
    pub packs: Option<Arc<dyn BlockStore>>,
    /// The key that this node vouches with for members, as a source.
    pub identity: Option<Arc<Identity>>,
    /// What the node shows for itself to those who do not know it.
    proof: RwLock<Proof>,
    part: RwLock<Part>,
    /// The key of the source that the node follows.
    upstream: RwLock<Option<PublicKey>>,
    /// Counts changes of the members.
    members: watch::Sender<u64>,
    /// How many followers are connected.
    followers: AtomicUsize,
    /// How many connections each node has.
    connections: Mutex<HashMap<NodeId, usize>>,
    seeds: Arc<Semaphore>,
    /// Whole packs that may be lent at a time.
    lending: Semaphore,
}

/// What the node is.
#[derive(Clone)]
pub enum Part {
    /// It decides; others follow.
    Source(SourcePart),
    /// It follows; it can be asked for a promise.
    Mirror(MirrorPart),
    /// Neither, at the moment.
    Neither,
}

/// What a source offers.
#[derive(Clone)]
pub struct SourcePart {
    /// Its log.
    pub log: Arc<dyn Log>,
    /// The epoch that it decides in.
    pub epoch: Epoch,
    /// What new mirrors begin with.
    pub snapshots: Arc<dyn SnapshotSource>,
    /// How often mirrors hear where the source stands.
    pub heartbeat: Duration,
}

/// What a mirror offers.
#[derive(Clone)]
pub struct MirrorPart {
    /// Its node.
    pub replica: Arc<dyn Replica>,
    /// What it heard of its source.
    pub heard: watch::Receiver<Lsn>,
    /// How it does; nobody is followed any more once its sender is gone.
    pub status: watch::Receiver<FollowerStatus>,
    /// Whom it is to follow, once a member has said that it leads.
    pub leader: Arc<watch::Sender<Option<Leader>>>,
}

impl MirrorPart {
    /// The part of a mirror that nobody has told of another source yet.
    pub fn new(
        replica: Arc<dyn Replica>,
        heard: watch::Receiver<Lsn>,
        status: watch::Receiver<FollowerStatus>,
    ) -> MirrorPart {
        MirrorPart { replica, heard, status, leader: Arc::new(watch::Sender::new(None)) }
    }
}

/// A member that leads, as it says; its epoch is promised.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leader {
    /// The epoch that it leads.
    pub epoch: Epoch,
    /// The key that it has proven.
    pub key: PublicKey,
    /// Where it listens, `host:port`.
    pub addresses: Vec<String>,
}

impl Services {
    /// The services of a node that is neither source nor mirror yet.
    pub fn new(
        keys: VolumeKeys,
        branch: BranchId,
        node: NodeId,
        clock: Arc<dyn Clock>,
        book: Arc<dyn MemberBook>,
    ) -> Services {
        Services {
            keys,
            branch,
            node,
            clock,
            book,
            board: Arc::default(),
            packs: None,
            identity: None,
            proof: RwLock::default(),
            part: RwLock::new(Part::Neither),
            upstream: RwLock::new(None),
            members: watch::Sender::new(0),
            followers: AtomicUsize::new(0),
            connections: Mutex::default(),
            seeds: Arc::new(Semaphore::new(MAX_SEEDS)),
            lending: Semaphore::new(packs::MAX_LENT),
        }
    }

    /// Changes what the node is; connections that follow the old part end by themselves.
    pub fn become_part(&self, part: Part) {
        *self.part.write() = part;
    }

    /// Says whose key the source that the node follows has: it may ask where the node stands, also if it is no member of its own volume.
    pub fn set_source_key(&self, key: PublicKey) {
        *self.upstream.write() = Some(key);
    }

    /// Says what this node shows for itself to those who do not know it.
    pub fn set_proof(&self, proof: Proof) {
        *self.proof.write() = proof;
    }

    /// What it shows.
    pub fn proof(&self) -> Proof {
        self.proof.read().clone()
    }

    /// Says that the member book has changed: connections of those who are no members any more end.
    pub fn members_changed(&self) {
        self.members.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Returns when the membership of the node with this key is revoked.
    async fn dismissed(&self, key: PublicKey) {
        let mut changes = self.members.subscribe();
        loop {
            if authorize(self.book.row(key.node()).as_ref(), key) == Err(Refusal::Revoked) {
                return;
            }
            // The sender lives as long as this.
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn is_upstream(&self, key: PublicKey) -> bool {
        *self.upstream.read() == Some(key)
    }

    #[cfg(test)]
    pub(crate) fn part_now(&self) -> Part {
        self.part()
    }

    fn part(&self) -> Part {
        self.part.read().clone()
    }

    /// Counts a connection of `node`; `None` if it has as many as one may have.
    fn count_connection(&self, node: NodeId) -> Option<ConnectionCount<'_>> {
        let mut connections = self.connections.lock();
        let count = connections.entry(node).or_default();
        if *count >= MAX_CONNECTIONS_OF_ONE {
            return None;
        }
        *count += 1;
        Some(ConnectionCount { connections: &self.connections, node })
    }

    /// Counts a follower, and says how much may be sent to it before it acknowledges: all of them together stay within a budget.
    fn count_follower(&self) -> (FollowerCount<'_>, usize) {
        let count = self.followers.fetch_add(1, Ordering::Relaxed) + 1;
        (
            FollowerCount(&self.followers),
            (ALL_WINDOWS_BYTES / count).clamp(MIN_WINDOW_BYTES, MAX_WINDOW_BYTES),
        )
    }

    /// Keeps the lag of mirrors that are not connected true.
    async fn note_durable(&self) {
        loop {
            if let Part::Source(source) = self.part() {
                self.board.durable(self.clock.monotonic(), source.log.durable().state().position.lsn);
            }
            tokio::time::sleep(NOTE_INTERVAL).await;
        }
    }
}

/// A follower that is connected.
struct FollowerCount<'a>(&'a AtomicUsize);

impl Drop for FollowerCount<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that is open.
struct ConnectionCount<'a> {
    connections: &'a Mutex<HashMap<NodeId, usize>>,
    node: NodeId,
}

impl Drop for ConnectionCount<'_> {
    fn drop(&mut self) {
        let mut connections = self.connections.lock();
        if let Entry::Occupied(mut count) = connections.entry(self.node) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// A node that accepts connections.
pub struct Listener {
    endpoint: ListeningEndpoint,
    services: Arc<Services>,
}

impl Listener {
    /// Opens the listener at `local`. Must be called inside a tokio runtime.
    pub fn bind(
        identity: &Identity,
        sockets: &dyn Sockets,
        local: SocketAddr,
        options: &NetworkOptions,
        services: Arc<Services>,
    ) -> Result<Listener, ListenError> {
        let endpoint = ListeningEndpoint::bind(identity, sockets, local, options)?;
        Ok(Listener { endpoint, services })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Serves until `shutdown` says true, then closes every connection. Cancelled, it does the same.
    pub async fn run(self, mut shutdown: watch::Receiver<bool>) {
        let mut connections = tokio::task::JoinSet::new();
        let services = Arc::clone(&self.services);
        connections.spawn(async move { services.note_durable().await });
        loop {
            tokio::select! {
                attempt = self.endpoint.accept() => match attempt {
                    Some(attempt) => {
                        connections.spawn(serve(Arc::clone(&self.services), attempt));
                    }
                    None => {
                        tracing::error!("the listener has ended: nobody can connect to this node any more");
                        break;
                    }
                },
                Some(ended) = connections.join_next() => if let Err(error) = ended {
                    tracing::error!(%error, "what served a connection has failed");
                },
                _ = shutdown.wait_for(|stop| *stop) => break,
            }
        }
        self.endpoint.close();
    }
}

/// One connection, from handshake to end.
async fn serve(services: Arc<Services>, attempt: Attempt) {
    let connection = match attempt.complete().await {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(error, "a connection attempt failed");
            return;
        }
    };
    let node = connection.peer().node();
    let Some(_counted) = services.count_connection(node) else {
        tracing::warn!(%node, "a node has as many connections as one may have; another one was refused");
        return connection.close("this node has too many connections of yours");
    };
    let ended = serve_peer(&services, &connection).await;
    match &ended {
        Ok(()) => tracing::debug!(%node, "a connection has ended"),
        Err(SessionError::Message(error)) => tracing::warn!(%node, %error, "a peer sent nonsense"),
        Err(SessionError::Lost(error)) => tracing::info!(%node, error, "a connection was lost"),
        Err(stuck @ SessionError::Stuck { .. }) => tracing::warn!(%node, %stuck, "a peer was given up"),
    }
    connection.close(&ended.map_or_else(|error| error.to_string(), |()| "done".to_owned()));
}

async fn serve_peer(services: &Arc<Services>, connection: &Connection) -> Result<(), SessionError> {
    let (mut reader, writer) = in_time(connection.accept_both()).await?;
    let first = in_time(reader.expect()).await?;
    if let Message::Redeem(redeem) = first {
        let answer = members::admit(services, connection, redeem).await;
        return part(connection, writer, Some(answer)).await;
    }
    let key = connection.peer();
    let role = match authorize(services.book.row(key.node()).as_ref(), key) {
        Ok(role) => role,
        Err(Refusal::UnknownMember) if matches!(first, Message::Ask(_)) && services.is_upstream(key) => {
            MemberRole::Observer
        }
        Err(Refusal::UnknownMember) if let Message::Seal(seal) = &first => {
            match members::proven(services, key, seal).await {
                Ok(role) => role,
                Err(Refused { reason, detail }) => return refuse(connection, writer, reason, detail).await,
            }
        }
        Err(reason) => {
            let (node, volume) = (key.node(), services.keys.volume());
            let detail = match reason {
                Refusal::Revoked => format!("node {node} was removed from volume {volume}; {JOIN_ANEW}"),
                _ => format!("node {node} is not a member of volume {volume}"),
            };
            return refuse(connection, writer, reason, detail).await;
        }
    };
    let asked = if let Message::Ask(ask) = &first { Some(*ask) } else { None };
    let session = async {
        match first {
            Message::Hello(hello) => source::serve(services, connection, role, hello, reader, writer).await,
            Message::Seal(seal) => {
                let answer = members::promise(services, connection, role, seal).await;
                part(connection, writer, Some(answer)).await
            }
            Message::Announce(announce) => {
                let answer = members::announced(services, connection, role, announce).await;
                part(connection, writer, Some(answer)).await
            }
            Message::Ask(ask) => lend::answer(services, connection, ask, reader, writer).await,
            other => {
                let detail = format!("a {} message cannot be the first", other.name());
                refuse(connection, writer, Refusal::Protocol, detail).await
            }
        }
    };
    tokio::select! {
        outcome = session => outcome,
        outcome = serve_requests(services, connection, asked) => outcome,
        () = services.dismissed(key) => {
            tracing::warn!(node = %key.node(), "a member was removed, and is not served any more");
            Ok(())
        }
    }
}

/// Says why nothing goes on, and lets the peer hear it.
async fn refuse(
    connection: &Connection,
    writer: MessageWriter,
    reason: Refusal,
    detail: String,
) -> Result<(), SessionError> {
    tracing::info!(node = %connection.peer().node(), %reason, detail, "refused");
    part(connection, writer, Some(Message::Refused(Refused { reason, detail }))).await
}

/// Says the last words, if they were not said yet, and waits until the peer has read them and closed, or is gone; not for ever, also if it does
/// not take them. What has arrived and was not read yet is lost to it once the connection is closed from here.
async fn part(
    connection: &Connection,
    mut writer: MessageWriter,
    last_words: Option<Message>,
) -> Result<(), SessionError> {
    let heard = async {
        if let Some(words) = last_words {
            writer.send(&words).await?;
        }
        if writer.finish(FAREWELL_TIMEOUT).await.is_ok() {
            connection.closed().await;
        }
        Ok(())
    };
    tokio::time::timeout(FAREWELL_TIMEOUT, heard).await.unwrap_or_else(|_| {
        tracing::debug!(node = %connection.peer().node(), "a peer does not close after the last words");
        Ok(())
    })
}

async fn in_time<T>(wait: impl Future<Output = Result<T, SessionError>>) -> Result<T, SessionError> {
    let late = |_| SessionError::Lost("no word of the peer in time".to_owned());
    tokio::time::timeout(GREETING_TIMEOUT, wait).await.map_err(late)?
}

/// Answers requests for packs and frames, each on its own stream, until the connection ends. Frames are lent only to one who has asked
/// where this node stands.
async fn serve_requests(
    services: &Services,
    connection: &Connection,
    asked: Option<Ask>,
) -> Result<(), SessionError> {
    use futures::StreamExt;
    let to_peer = Semaphore::new(packs::MAX_LENT_TO_ONE);
    let mut requests = futures::stream::FuturesUnordered::new();
    loop {
        tokio::select! {
            stream = connection.accept_both() => {
                let (reader, writer) = stream?;
                requests.push(serve_request(services, &to_peer, asked, reader, writer));
            }
            Some(outcome) = requests.next() => {
                if let Err(error) = outcome {
                    tracing::debug!(%error, "what was asked for was not delivered");
                }
            }
        }
    }
}

async fn serve_request(
    services: &Services,
    to_peer: &Semaphore,
    asked: Option<Ask>,
    mut reader: MessageReader,
    mut writer: MessageWriter,
) -> Result<(), SessionError> {
    match (in_time(reader.expect()).await?, asked) {
        (Message::PackRequest(request), _) => packs::answer(services, to_peer, &request, writer).await,
        (Message::LendRequest(request), Some(ask)) => lend::lend(services, ask.epoch, request, writer).await,
        (other, _) => {
            let detail = format!("a {} message is not expected here", other.name());
            writer.send(&Message::Refused(Refused { reason: Refusal::Protocol, detail })).await
        }
    }
}

/// What a node that was removed can do about it.
const JOIN_ANEW: &str =
    "murphy join there in a new directory, with a new token and the same --blocks, makes a mirror anew";
/// A peer must say something within this time.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// The last words are given so much time to arrive.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// One node gets so many connections at a time; those of a process that was killed count until they are silent for too long.
const MAX_CONNECTIONS_OF_ONE: usize = if cfg!(test) { 16 } else { 128 };
/// So many mirrors are seeded at a time; the others wait, and hear heartbeats.
const MAX_SEEDS: usize = 2;
/// What may be sent to one follower and not acknowledged, in bytes: 100 ms at 1 Gbit/s.
const MAX_WINDOW_BYTES: usize = 12 << 20;
const MIN_WINDOW_BYTES: usize = 256 << 10;
/// The windows of all followers together, in bytes.
const ALL_WINDOWS_BYTES: usize = 512 << 20;
/// How often mirrors that are not connected are compared with the source.
const NOTE_INTERVAL: Duration = Duration::from_millis(500);
