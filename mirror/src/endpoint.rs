//! Listening and dialling over QUIC.
//!
//! Invariants:
//! - Every dial uses a fresh socket: whatever a network has learned about the old one, a new attempt does not inherit it.
//! - A connection is handed out only with the key that its peer has proven.
//! - Windows are set for who sends what: a listener takes little from its peers, a follower takes a run of frames and parts of a
//!   snapshot.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{
    AsyncUdpSocket, EndpointConfig, Runtime, TransportConfig, VarInt, congestion,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::pki_types::CertificateDer;

use crate::{
    identity::{Identity, PublicKey, SERVER_NAME},
    session::Connection,
};

/// Where sockets come from: the system, or a simulated network.
pub trait Sockets: Send + Sync + fmt::Debug {
    /// A new socket bound to `local`.
    fn bind(&self, local: SocketAddr) -> io::Result<BoundSocket>;
}

/// A socket and what drives it.
#[derive(Debug)]
pub struct BoundSocket {
    /// The socket.
    pub socket: Arc<dyn AsyncUdpSocket>,
    /// Timers and tasks.
    pub runtime: Arc<dyn Runtime>,
    /// Makes connection ids and the like reproducible, in a simulation.
    pub seed: Option<[u8; 32]>,
}

/// The sockets of the system.
#[derive(Clone, Copy, Debug, Default)]
pub struct UdpSockets;

impl Sockets for UdpSockets {
    fn bind(&self, local: SocketAddr) -> io::Result<BoundSocket> {
        let runtime = Arc::new(quinn::TokioRuntime);
        let socket = runtime.wrap_udp_socket(std::net::UdpSocket::bind(local)?)?;
        Ok(BoundSocket { socket, runtime, seed: None })
    }
}

/// How to behave on a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NetworkOptions {
    /// How to find the rate.
    pub congestion: Congestion,
    /// A connection without an answer for so long is dead.
    pub idle_timeout: Duration,
    /// One that answers and takes nothing that it is sent for so long is given up.
    pub patience: Duration,
}

impl Default for NetworkOptions {
    fn default() -> NetworkOptions {
        NetworkOptions { congestion: Congestion::Cubic, idle_timeout: IDLE_TIMEOUT, patience: PATIENCE }
    }
}

/// How to find the rate at which to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Congestion {
    /// Backs off on loss; for networks that rarely lose, at any distance.
    Cubic,
    /// Models the path; for long paths that lose some.
    Bbr,
}

/// What a node allows its peers on one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grants {
    /// What it takes before it has looked at it, per stream, in bytes.
    pub(crate) window: u32,
    /// How many requests it answers at a time.
    pub(crate) requests: u32,
    /// How many streams of frames and parts may be open to it.
    pub(crate) parts: u32,
}

impl Grants {
    /// What one allows who listens.
    pub(crate) const LISTENER: Grants =
        Grants { window: LISTENER_WINDOW, requests: MAX_REQUESTS, parts: MAX_PARTS };
    /// What one allows who dials.
    pub(crate) const FOLLOWER: Grants = Grants { window: FOLLOWER_WINDOW, ..Grants::LISTENER };
}

/// Accepts connections.
#[derive(Debug)]
pub(crate) struct ListeningEndpoint {
    endpoint: quinn::Endpoint,
    patience: Duration,
}

impl ListeningEndpoint {
    pub(crate) fn bind(
        identity: &Identity,
        sockets: &dyn Sockets,
        local: SocketAddr,
        options: &NetworkOptions,
    ) -> Result<ListeningEndpoint, ListenError> {
        ListeningEndpoint::bind_granting(Grants::LISTENER, identity, sockets, local, options)
    }

    /// The same for one that allows its peers something else.
    pub(crate) fn bind_granting(
        grants: Grants,
        identity: &Identity,
        sockets: &dyn Sockets,
        local: SocketAddr,
        options: &NetworkOptions,
    ) -> Result<ListeningEndpoint, ListenError> {
        let failed = |error: &dyn fmt::Display| ListenError { address: local, message: error.to_string() };
        let tls = identity.server_config().map_err(|error| failed(&error))?;
        let tls = QuicServerConfig::try_from(tls).map_err(|error| failed(&error))?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        config.transport_config(Arc::new(transport(options, grants)));
        let bound = sockets.bind(local).map_err(|error| failed(&error))?;
        let endpoint = endpoint(bound, Some(config)).map_err(|error| failed(&error))?;
        Ok(ListeningEndpoint { endpoint, patience: options.patience })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The next connection attempt; the handshake is still to be done. `None` when the endpoint is closed. Cancel safe.
    pub(crate) async fn accept(&self) -> Option<Attempt> {
        loop {
            let incoming = self.endpoint.accept().await?;
            if self.endpoint.open_connections() < MAX_CONNECTIONS {
                return Some(Attempt { incoming, patience: self.patience });
            }
            incoming.refuse();
        }
    }

    pub(crate) fn close(&self) {
        self.endpoint.close(VarInt::from_u32(0), b"closing");
    }
}

/// Somebody who wants to connect.
#[derive(Debug)]
pub(crate) struct Attempt {
    incoming: quinn::Incoming,
    patience: Duration,
}

impl Attempt {
    /// Does the handshake.
    pub(crate) async fn complete(self) -> Result<Connection, String> {
        let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.incoming);
        let connection = handshake.await.map_err(|_| "no handshake in time".to_owned())?;
        let connection = connection.map_err(|error| error.to_string())?;
        let peer = peer_key(&connection).ok_or_else(|| "the peer has no usable key".to_owned())?;
        Ok(Connection::new(connection, None, peer, self.patience))
    }
}

/// Connects to the node with the key `pinned` at `address`. A success proves nothing about what the node thinks of us: that takes an
/// exchange of messages.
pub(crate) async fn dial(
    identity: &Identity,
    sockets: &dyn Sockets,
    address: SocketAddr,
    pinned: PublicKey,
    options: &NetworkOptions,
) -> Result<Connection, String> {
    dial_granting(Grants::FOLLOWER, identity, sockets, address, pinned, options).await
}

/// The same for one that allows its peer something else.
pub(crate) async fn dial_granting(
    grants: Grants,
    identity: &Identity,
    sockets: &dyn Sockets,
    address: SocketAddr,
    pinned: PublicKey,
    options: &NetworkOptions,
) -> Result<Connection, String> {
    let tls = identity.client_config(pinned).map_err(|error| error.to_string())?;
    let tls = QuicClientConfig::try_from(tls).map_err(|error| error.to_string())?;
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport(options, grants)));
    let any: SocketAddr = if address.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let bound = sockets.bind(any).map_err(|error| error.to_string())?;
    let endpoint = endpoint(bound, None).map_err(|error| error.to_string())?;
    let connecting =
        endpoint.connect_with(config, address, SERVER_NAME).map_err(|error| error.to_string())?;
    let connection = tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await;
    let connection = connection.map_err(|_| "no answer".to_owned())?.map_err(|error| error.to_string())?;
    Ok(Connection::new(connection, Some(endpoint), pinned, options.patience))
}

fn endpoint(bound: BoundSocket, server: Option<quinn::ServerConfig>) -> io::Result<quinn::Endpoint> {
    let mut config = EndpointConfig::default();
    config.rng_seed(bound.seed);
    quinn::Endpoint::new_with_abstract_socket(config, server, bound.socket, bound.runtime)
}

fn peer_key(connection: &quinn::Connection) -> Option<PublicKey> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    PublicKey::of_certificate(chain.first()?)
}

fn transport(options: &NetworkOptions, grants: Grants) -> TransportConfig {
    let Grants { window, requests, parts } = grants;
    let mut config = TransportConfig::default();
    config
        .stream_receive_window(VarInt::from_u32(window))
        .receive_window(VarInt::from_u32(window.saturating_mul(2)))
        .send_window(SEND_WINDOW)
        .max_concurrent_bidi_streams(VarInt::from_u32(requests))
        .max_concurrent_uni_streams(VarInt::from_u32(parts))
        .max_idle_timeout(options.idle_timeout.try_into().ok())
        .keep_alive_interval(Some(options.idle_timeout / 4));
    match options.congestion {
        Congestion::Cubic => {
            let mut cubic = congestion::CubicConfig::default();
            cubic.initial_window(INITIAL_WINDOW);
            config.congestion_controller_factory(Arc::new(cubic));
        }
        Congestion::Bbr => {
            config.congestion_controller_factory(Arc::new(congestion::BbrConfig::default()));
        }
    }
    config
}

/// A listener that could not be opened.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cannot listen on {address}: {message}")]
pub struct ListenError {
    /// Where.
    pub address: SocketAddr,
    /// Why not.
    pub message: String,
}

const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// All that is ever on its way to one peer fits into what it takes unread, so that an honest one makes room at once.
const PATIENCE: Duration = Duration::from_secs(30);
/// A handshake takes at most so long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// More connections than this are refused at once.
const MAX_CONNECTIONS: usize = 4096;
/// What a follower takes before it has looked at it, per stream, in bytes: more than a window of frames at 150 ms and 1 Gbit/s.
const FOLLOWER_WINDOW: u32 = 64 << 20;
/// What a listener takes from each peer before it has looked at it, per stream, in bytes.
const LISTENER_WINDOW: u32 = 256 << 10;
/// What may be on its way to one peer, in bytes.
const SEND_WINDOW: u64 = 64 << 20;
/// Where Cubic starts, in bytes: slow start from the default takes seconds at 150 ms.
const INITIAL_WINDOW: u64 = 10 << 20;
/// So many requests of one peer are answered at a time.
const MAX_REQUESTS: u32 = 64;
/// So many streams of frames and parts may be open to one follower.
const MAX_PARTS: u32 = 16;
