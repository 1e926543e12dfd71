//! The network between nodes: datagrams that are lost, doubled, late and out of order, and links that are cut in one direction or both.
//!
//! Invariants:
//! - What arrives is what was sent, whole: QUIC's own checksums are not on trial here.
//! - A process that is dead or paused neither sends nor receives.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use murphy_mirror::{BoundSocket, Sockets};
use parking_lot::Mutex;
use quinn::{
    AsyncTimer, AsyncUdpSocket, Runtime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use tokio::{sync::Notify, time::Sleep};

use super::{
    gate::{Gate, Life},
    stage::Stage,
};

/// All links of a world.
pub(super) struct Network {
    stage: Arc<Stage>,
    inner: Mutex<Inner>,
    wake: Notify,
}

#[derive(Default)]
struct Inner {
    sockets: BTreeMap<SocketAddr, Weak<Socket>>,
    queue: BTreeMap<(Duration, u64), Packet>,
    sent: u64,
    ports: u16,
    seeds: u8,
    /// Nothing gets from the first to the second.
    cut: BTreeSet<(usize, usize)>,
    air: Air,
}

struct Packet {
    from: SocketAddr,
    to: SocketAddr,
    bytes: Bytes,
}

/// What the network does with datagrams.
#[derive(Clone, Copy, Debug)]
pub(super) struct Air {
    pub(super) lost_per_mille: u64,
    pub(super) doubled_per_mille: u64,
    /// A datagram takes up to so long, so that they overtake each other.
    pub(super) latest: Duration,
}

impl Default for Air {
    fn default() -> Air {
        Air { lost_per_mille: 0, doubled_per_mille: 0, latest: Duration::from_millis(3) }
    }
}

impl Network {
    pub(super) fn new(stage: &Arc<Stage>) -> Arc<Network> {
        let network =
            Arc::new(Network { stage: Arc::clone(stage), inner: Mutex::default(), wake: Notify::new() });
        tokio::spawn(Arc::clone(&network).deliver());
        network
    }

    pub(super) fn change_air(&self, air: Air) {
        self.inner.lock().air = air;
    }

    /// Nothing gets from `from` to `to` any more, until it is mended.
    pub(super) fn cut(&self, from: usize, to: usize) {
        self.inner.lock().cut.insert((from, to));
    }

    pub(super) fn mend(&self, from: usize, to: usize) {
        self.inner.lock().cut.remove(&(from, to));
    }

    /// Everything is well again.
    pub(super) fn heal(&self) {
        let mut inner = self.inner.lock();
        inner.cut.clear();
        inner.air = Air::default();
    }

    /// The sockets of the process behind `gate` on `host`.
    pub(super) fn sockets(self: &Arc<Self>, host: usize, gate: &Arc<Gate>) -> Arc<dyn Sockets> {
        Arc::new(HostSockets { network: Arc::clone(self), host, gate: Arc::clone(gate) })
    }

    fn send(&self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let stage = &self.stage;
        let mut inner = self.inner.lock();
        let air = inner.air;
        if inner.cut.contains(&(host_at(from), host_at(to))) {
            return stage.count("datagrams into a cut");
        }
        if stage.below(1000) < air.lost_per_mille {
            return stage.count("datagrams lost");
        }
        let copies = if stage.below(1000) < air.doubled_per_mille { 2 } else { 1 };
        if copies > 1 {
            stage.count("datagrams doubled");
        }
        for _ in 0..copies {
            let due = stage.now() + stage.ms(1, air.latest.as_millis() as u64);
            inner.sent += 1;
            let number = inner.sent;
            if inner.queue.last_key_value().is_some_and(|((last, _), _)| *last > due) {
                stage.count("datagrams that overtook others");
            }
            inner.queue.insert((due, number), Packet { from, to, bytes: Bytes::copy_from_slice(bytes) });
        }
        drop(inner);
        self.wake.notify_one();
    }

    async fn deliver(self: Arc<Self>) {
        loop {
            let next = self.inner.lock().queue.first_key_value().map(|((due, _), _)| *due);
            let now = self.stage.now();
            match next {
                Some(due) if due <= now => self.deliver_one(),
                Some(due) => {
                    // Whether it is time or something earlier was sent, the next look finds out.
                    let _woken = tokio::time::timeout(due - now, self.wake.notified()).await;
                }
                None => self.wake.notified().await,
            }
        }
    }

    fn deliver_one(&self) {
        let mut inner = self.inner.lock();
        let Some((_, packet)) = inner.queue.pop_first() else { return };
        let socket = inner.sockets.get(&packet.to).and_then(Weak::upgrade);
        drop(inner);
        if let Some(socket) = socket.filter(|socket| socket.gate.life() == Life::Runs) {
            socket.take(packet.from, packet.bytes);
        }
    }
}

/// Where `host` listens.
pub(super) fn address_of(host: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 0, 0, host as u8 + 1), PORT).into()
}

fn host_at(address: SocketAddr) -> usize {
    match address.ip() {
        IpAddr::V4(ip) => usize::from(ip.octets()[3]).saturating_sub(1),
        IpAddr::V6(_) => usize::MAX,
    }
}

/// The sockets of one process.
struct HostSockets {
    network: Arc<Network>,
    host: usize,
    gate: Arc<Gate>,
}

impl fmt::Debug for HostSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the sockets of host {}", self.host)
    }
}

impl Sockets for HostSockets {
    fn bind(&self, local: SocketAddr) -> io::Result<BoundSocket> {
        let mut inner = self.network.inner.lock();
        inner.ports = (inner.ports + 1) % (u16::MAX - FIRST_PORT);
        inner.seeds = inner.seeds.wrapping_add(1);
        let port = if local.port() == 0 { FIRST_PORT + inner.ports } else { local.port() };
        let local = SocketAddr::new(address_of(self.host).ip(), port);
        let socket = Arc::new(Socket {
            network: Arc::clone(&self.network),
            gate: Arc::clone(&self.gate),
            local,
            received: Mutex::default(),
        });
        inner.sockets.insert(local, Arc::downgrade(&socket));
        let seed = Some([inner.seeds; 32]);
        Ok(BoundSocket { socket, runtime: Arc::new(VirtualTime), seed })
    }
}

struct Socket {
    network: Arc<Network>,
    gate: Arc<Gate>,
    local: SocketAddr,
    received: Mutex<Received>,
}

/// What has arrived and was not read, and who waits for it.
#[derive(Default)]
struct Received {
    datagrams: VecDeque<(SocketAddr, Bytes)>,
    reader: Option<Waker>,
}

impl Socket {
    fn take(&self, from: SocketAddr, bytes: Bytes) {
        let mut received = self.received.lock();
        if received.datagrams.len() < BUFFERED {
            received.datagrams.push_back((from, bytes));
        }
        if let Some(waker) = received.reader.take() {
            waker.wake();
        }
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the socket at {}", self.local)
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.gate.life() == Life::Runs {
            self.network.send(self.local, transmit.destination, transmit.contents);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut received = self.received.lock();
        let (Some(buffer), Some(meta)) = (buffers.first_mut(), metas.first_mut()) else {
            return Poll::Ready(Ok(0));
        };
        let Some((from, bytes)) = received.datagrams.pop_front() else {
            received.reader = Some(context.waker().clone());
            return Poll::Pending;
        };
        let length = bytes.len().min(buffer.len());
        buffer[..length].copy_from_slice(&bytes[..length]);
        *meta = RecvMeta { addr: from, len: length, stride: length, ecn: None, dst_ip: None };
        Poll::Ready(Ok(1))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.local)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Timers and tasks of the world's own runtime.
#[derive(Debug)]
struct VirtualTime;

impl Runtime for VirtualTime {
    fn new_timer(&self, at: std::time::Instant) -> Pin<Box<dyn AsyncTimer>> {
        Box::pin(Timer(Box::pin(tokio::time::sleep_until(at.into()))))
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::spawn(future);
    }

    fn wrap_udp_socket(&self, _: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn now(&self) -> std::time::Instant {
        tokio::time::Instant::now().into_std()
    }
}

#[derive(Debug)]
struct Timer(Pin<Box<Sleep>>);

impl AsyncTimer for Timer {
    fn reset(mut self: Pin<&mut Self>, at: std::time::Instant) {
        self.0.as_mut().reset(at.into());
    }

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        Future::poll(self.0.as_mut(), context)
    }
}

const PORT: u16 = 7000;
const FIRST_PORT: u16 = 20_000;
/// So many datagrams wait for a process that does not read.
const BUFFERED: usize = 4096;
