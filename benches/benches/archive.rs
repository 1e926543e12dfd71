//! Archive lag: how long after an entry became durable it is in an archive on a store that takes 30 ms to answer.
//!
//! `cargo bench -p murphy-benches --bench archive [-- SECONDS]`: two rates, a steady one and as many entries as the engine's budget
//! allows, SECONDS (10) each. Budget: p99 under 2 s.
//!
//! Invariants:
//! - The lag of a frame is taken from its append to the moment when the shipper says that the archive holds it.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_backup::{
    Archive, ArchiveKind, ArchiveStore, Descriptor, Lineage, NoCursor, ShipHandle, ShipLimits, Shipper,
    ShipperParts,
};
use murphy_fs::{ObjectBlockStore, Table};
use murphy_log::{
    Appender, BranchId, Change, Clock, Digest, Entry, Epoch, EpochId, Log, LogTime, Lsn, MemoryLog, NodeId,
    Position, State, SystemClock, Usage, VolumeId, VolumeKeys,
};
use object_store::{
    memory::InMemory,
    path::Path,
    throttle::{ThrottleConfig, ThrottledStore},
};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // cargo passes `--bench` to a benchmark without a harness.
    let seconds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(SECONDS);
    println!("store latency {} ms", LATENCY.as_millis());
    for rate in [STEADY_RATE, FULL_RATE] {
        measure(rate, seconds).await;
    }
}

async fn measure(rate: u64, seconds: u64) {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let epoch = Epoch { number: 1, id: EpochId::from_bytes([2; 16]) };
    let base = State::origin(epoch);
    let log = Arc::new(MemoryLog::new(base));
    log.claim(epoch).expect("nobody else claims it");
    let archive = archive(base.position, clock.wall()).await;
    let (shipper, handle) = Shipper::new(ShipperParts {
        archive,
        log: Arc::clone(&log) as Arc<dyn Log>,
        packs: Arc::new(ObjectBlockStore::in_memory()),
        node: NodeId::default(),
        epoch,
        known: None,
        cursor: Arc::new(NoCursor),
        clock: Arc::clone(&clock),
        limits: ShipLimits::default(),
        lost: None,
    });
    let shipping = tokio::spawn(shipper.run());
    let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
    let writing = {
        let (log, clock) = (Arc::clone(&log), Arc::clone(&clock));
        std::thread::spawn(move || write(&log, &*clock, Appender::new(keys, epoch, base), rate, seconds))
    };
    let mut lags = follow(&*clock, &log, handle, || writing.is_finished()).await;
    let (appended, late) = writing.join().expect("the writer does not panic");
    lags.record(&appended);
    shipping.abort();
    print(rate, appended.len(), late, &lags);
}

/// When the archive was seen to hold which LSN.
struct Held {
    seen: Vec<(Lsn, Duration)>,
    lags: Vec<Duration>,
}

impl Held {
    fn record(&mut self, appended: &VecDeque<(Lsn, Duration)>) {
        let mut seen = self.seen.iter().peekable();
        for (lsn, at) in appended {
            while seen.next_if(|(held, _)| held < lsn).is_some() {}
            if let Some((_, held)) = seen.peek() {
                self.lags.push(held.saturating_sub(*at));
            }
        }
        self.lags.sort();
    }

    fn percentile(&self, percent: usize) -> f64 {
        let at = (self.lags.len() * percent / 100).min(self.lags.len().saturating_sub(1));
        self.lags.get(at).map_or(f64::NAN, Duration::as_secs_f64)
    }
}

async fn follow(
    clock: &dyn Clock,
    log: &MemoryLog,
    mut handle: ShipHandle,
    is_over: impl Fn() -> bool,
) -> Held {
    let mut held = Held { seen: Vec::new(), lags: Vec::new() };
    while handle.changed().await {
        let Some(archived) = handle.status().archived else { continue };
        let lsn = archived.position.lsn;
        if held.seen.last().is_none_or(|(last, _)| *last < lsn) {
            held.seen.push((lsn, clock.monotonic()));
            log.trim(lsn).expect("memory can be trimmed");
        }
        if is_over() && lsn == log.tail().position.lsn {
            break;
        }
    }
    held
}

/// Appends `rate` entries a second in frames of 5 ms, and tells when each frame was appended and how late the writer ended.
fn write(
    log: &MemoryLog,
    clock: &dyn Clock,
    mut appender: Appender,
    rate: u64,
    seconds: u64,
) -> (VecDeque<(Lsn, Duration)>, Duration) {
    let (start, mut appended) = (clock.monotonic(), VecDeque::new());
    let frames = seconds * FRAMES_PER_SECOND;
    for frame in 0..frames {
        for _ in 0..rate / FRAMES_PER_SECOND {
            let entry = entry(appender.state().position.lsn.next(), clock.wall());
            appender.push(&entry, Digest::default(), Usage::default()).expect("the entry is sound");
        }
        while let Some(frame) = appender.close(clock.wall(), log.tail().position.lsn) {
            appended.push_back((frame.last(), clock.monotonic()));
            let previous = log.tail().position;
            log.append(&previous, frame).expect("the frame follows");
        }
        let due = start
            + Duration::from_secs(1) * u32::try_from(frame + 1).unwrap_or(u32::MAX)
                / FRAMES_PER_SECOND as u32;
        std::thread::sleep(due.saturating_sub(clock.monotonic()));
    }
    (appended, clock.monotonic().saturating_sub(start + Duration::from_secs(seconds)))
}

/// As many bytes as an entry of `cp -a` has on average, half of which do not compress.
fn entry(lsn: Lsn, time: LogTime) -> Entry {
    let mut value = [0; VALUE_BYTES];
    let noise = lsn.get().wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    value[..8].copy_from_slice(&noise);
    let mut entry = Entry::tick(lsn, time);
    entry.kind = 1;
    entry.changes = vec![Change {
        table: Table::Inode.number(),
        key: Bytes::copy_from_slice(&lsn.get().to_be_bytes()),
        value: Some(Bytes::copy_from_slice(&value)),
    }];
    entry
}

fn print(rate: u64, frames: usize, late: Duration, lags: &Held) {
    let (p50, p99, max) = (lags.percentile(50), lags.percentile(99), lags.percentile(100));
    println!("{rate} entries/s: {frames} frames, lag p50 {p50:.3} s, p99 {p99:.3} s, max {max:.3} s");
    if late > Duration::from_millis(100) {
        println!("  the machine did not keep up with the rate: the writer ended {late:?} late");
    }
}

async fn archive(base: Position, now: LogTime) -> Archive {
    let latency = ThrottleConfig {
        wait_put_per_call: LATENCY,
        wait_get_per_call: LATENCY,
        wait_list_per_call: LATENCY,
        ..ThrottleConfig::default()
    };
    let store = Arc::new(ThrottledStore::new(InMemory::new(), latency));
    let descriptor = Descriptor {
        lineage: Lineage { volume: VolumeId::from_bytes([1; 16]), branch: BranchId::from_bytes([2; 16]) },
        name: "bench".to_owned(),
        kind: ArchiveKind::Full,
        failure_domain: "elsewhere".to_owned(),
        created: now,
        base,
    };
    let store = ArchiveStore::new(store, Path::default(), "memory");
    Archive::create(store, descriptor).await.expect("memory takes an archive")
}

const LATENCY: Duration = Duration::from_millis(30);
const SECONDS: u64 = 10;
const STEADY_RATE: u64 = 10_000;
/// The engine's budget.
const FULL_RATE: u64 = 200_000;
const FRAMES_PER_SECOND: u64 = 200;
const VALUE_BYTES: usize = 24;
