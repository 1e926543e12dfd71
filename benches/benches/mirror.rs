//! Mirror lag and catch-up over loopback: `cargo bench -p murphy-benches --bench mirror [-- SAMPLES]`.
//!
//! Both logs are in memory, so the figures are those of protocol and network. Lag: from "durable at the source" to "durable at the mirror",
//! one frame at a time on an idle connection, and the same with 1,000 frames a second. Catch-up: entries a second of a mirror that
//! begins far behind.

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use murphy_fs::{MemberRole, MemberRow, MemberState};
use murphy_log::{
    Appender, BranchId, Change, Clock, Digest, Entry, Epoch, EpochId, Frame, Log, LogTime, Lsn, MemoryLog,
    State, SystemClock, Usage, VolumeId, VolumeKeys,
};
use murphy_mirror::{
    Dialer, Durability, FollowSetup, Following, Identity, Listener, MemoryBook, MemoryReplica,
    MemorySnapshots, NetworkOptions, Part, Replica, Services, SourcePart, UdpSockets,
};
use tokio::sync::watch;

const VOLUME: VolumeId = VolumeId::from_bytes([1; 16]);
const BRANCH: BranchId = BranchId::from_bytes([2; 16]);
const EPOCH: Epoch = Epoch { number: 1, id: EpochId::from_bytes([3; 16]) };
const CATCH_UP_ENTRIES: u64 = 1_000_000;
/// A group commit of a busy source: about 64 KiB.
const ENTRIES_PER_FRAME: u64 = 500;

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    let samples: usize = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(2_000);
    let log = Arc::new(MemoryLog::new(base()));
    log.claim(EPOCH).expect("the log is new");
    let (pair, replica) = Pair::start(&log).await;
    let mut writer = Writer::new(&log);

    writer.append(&log, 1);
    pair.reach(&replica, log.tail().position.lsn).await;
    let mut idle = Vec::with_capacity(samples);
    for _ in 0..samples {
        tokio::time::sleep(Duration::from_millis(2)).await;
        idle.push(pair.lag_of_one(&log, &replica, &mut writer).await);
    }
    report("lag, idle", &mut idle);
    let mut busy = Vec::with_capacity(samples);
    let mut due = Instant::now();
    for _ in 0..samples {
        due += Duration::from_millis(1);
        tokio::time::sleep_until(due.into()).await;
        busy.push(pair.lag_of_one(&log, &replica, &mut writer).await);
    }
    report("lag, 1,000 frames/s", &mut busy);
    pair.stop().await;

    let log = Arc::new(MemoryLog::new(base()));
    log.claim(EPOCH).expect("the log is new");
    let mut writer = Writer::new(&log);
    let mut bytes = 0;
    for _ in 0..CATCH_UP_ENTRIES / ENTRIES_PER_FRAME {
        bytes += writer.append(&log, ENTRIES_PER_FRAME);
    }
    let start = Instant::now();
    let (pair, replica) = Pair::start(&log).await;
    pair.reach(&replica, log.tail().position.lsn).await;
    let time = start.elapsed().as_secs_f64();
    println!(
        "catch-up:            {:>10.0} entries/s, {:.1} MiB/s of log (verified, not applied)",
        CATCH_UP_ENTRIES as f64 / time,
        bytes as f64 / time / f64::from(1 << 20),
    );
    pair.stop().await;
    ExitCode::SUCCESS
}

#[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
fn report(what: &str, lags: &mut [Duration]) {
    lags.sort();
    let at = |share: f64| lags[((lags.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    println!(
        "{:<20} {:>10.3} ms p50, {:.3} ms p99, {:.3} ms max",
        format!("{what}:"),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

/// Source and mirror.
struct Pair {
    stop: watch::Sender<bool>,
    listening: tokio::task::JoinHandle<()>,
    following: tokio::task::JoinHandle<Result<(), murphy_mirror::FollowError>>,
}

impl Pair {
    async fn start(log: &Arc<MemoryLog>) -> (Pair, Arc<MemoryReplica>) {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let keys = VolumeKeys::derive(VOLUME);
        let source = Identity::generate().expect("a key");
        let mirror = Arc::new(Identity::generate().expect("a key"));
        let book = Arc::new(MemoryBook::default());
        let state = MemberState::Joined { public_key: *mirror.public_key().as_bytes() };
        let row = MemberRow { role: MemberRole::Mirror, state, name: String::new(), addresses: Vec::new() };
        book.put(mirror.node(), row);
        let services = Arc::new(Services::new(keys.clone(), BRANCH, source.node(), Arc::clone(&clock), book));
        services.become_part(Part::Source(SourcePart {
            log: log.clone(),
            epoch: EPOCH,
            snapshots: Arc::new(MemorySnapshots { log: Arc::clone(log), bytes: 0 }),
            heartbeat: Duration::from_secs(1),
        }));
        let options = NetworkOptions::default();
        let local = ([127, 0, 0, 1], 0).into();
        let listener = Listener::bind(&source, &UdpSockets, local, &options, services).expect("a free port");
        let address = listener.local_addr().expect("a bound socket").to_string();
        let (stop, stopped) = watch::channel(false);
        let listening = tokio::spawn(listener.run(stopped.clone()));
        let replica = Arc::new(MemoryReplica::new(keys, Some(base()), Durability::Immediate));
        let (following, _handle) = Following::new(FollowSetup {
            addresses: vec![address],
            source_key: source.public_key(),
            branch: BRANCH,
            replica: replica.clone(),
            dialer: Dialer { identity: mirror, sockets: Arc::new(UdpSockets), options },
            clock,
            random: Arc::new(|| 0),
            silence: Duration::from_secs(10),
            heard: Lsn::new(0),
        });
        let following = tokio::spawn(following.run(stopped));
        (Pair { stop, listening, following }, replica)
    }

    async fn reach(&self, replica: &MemoryReplica, lsn: Lsn) {
        let watch = replica.durable().expect("the mirror has a log");
        watch.wait_for(lsn).await.expect("the mirror's log goes on");
    }

    #[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
    async fn lag_of_one(&self, log: &MemoryLog, replica: &MemoryReplica, writer: &mut Writer) -> Duration {
        let start = Instant::now();
        writer.append(log, 1);
        self.reach(replica, log.tail().position.lsn).await;
        start.elapsed()
    }

    async fn stop(self) {
        self.stop.send_replace(true);
        self.listening.await.expect("no panic");
        self.following.await.expect("no panic").expect("the mirror's log goes on");
    }
}

/// Makes entries as large as those of a create.
struct Writer(Appender);

impl Writer {
    fn new(log: &MemoryLog) -> Writer {
        Writer(Appender::new(VolumeKeys::derive(VOLUME), EPOCH, log.tail()))
    }

    /// Appends one frame and returns its length in bytes.
    fn append(&mut self, log: &MemoryLog, entries: u64) -> usize {
        let previous = log.tail().position;
        for _ in 0..entries {
            let lsn = self.0.state().position.lsn.next();
            self.0.push(&entry(lsn), Digest(lsn.get().into()), Usage::default()).expect("the next entry");
        }
        let frame: Frame = self.0.close(LogTime::from_nanos(1), previous.lsn).expect("there are entries");
        let bytes = frame.bytes().len();
        log.append(&previous, frame).expect("the log takes it");
        bytes
    }
}

fn entry(lsn: Lsn) -> Entry {
    let mut entry = Entry::tick(lsn, LogTime::from_nanos(1_000_000_000 + lsn.get() * 10_000));
    entry.kind = 3;
    entry.names = vec![Bytes::from(format!("file{:08}.txt", lsn.get()))];
    let key = Bytes::copy_from_slice(&lsn.get().to_be_bytes());
    let change =
        |table, length| Change { table, key: key.clone(), value: Some(Bytes::from(vec![table; length])) };
    entry.changes = vec![change(1, 48), change(2, 24), change(3, 32)];
    entry
}

fn base() -> State {
    State::origin(EPOCH)
}
