//! The disk of a node: a log that is synced when the disk gets round to it, what a node remembers beside it, and how both fail.
//!
//! Invariants:
//! - After a crash there is what was synced, and nothing else.
//! - The judge sees a frame when it is durable at a source, and when it is queued anywhere else, before anybody can read it there.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use murphy_backup::{Boundary, CursorError, LostPacks, SaveCursor};
use murphy_fs::{Index, IndexError, IndexSnapshot, MemoryIndex, RowKey, SnapshotReader};
use murphy_log::{
    AppendError, ClaimError, DurableWatch, Epoch, Frame, FrameReader, Log, LogTime, Lsn, MemoryLog, Position,
    ReadError, State, Terminal, TrimError, append_copy,
};
use murphy_mirror::{AcknowledgingSet, Point, Proof, PublicKey};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Canary, gate::Gate, stage::Stage};

/// What survives the process.
#[derive(Clone)]
pub(super) struct Disk {
    /// Who the node is.
    pub(super) node: NodeName,
    /// What the log begins after, if not with the volume.
    pub(super) base: Option<Base>,
    /// The log, as far as it is synced; none while the node holds nothing.
    pub(super) log: Option<Arc<MemoryLog>>,
    pub(super) index: Arc<MemoryIndex>,
    pub(super) cursors: Arc<Mutex<HashMap<String, Boundary>>>,
    /// The epoch that was promised to a successor.
    pub(super) promised: Arc<Mutex<Option<Epoch>>>,
    /// What the source has vouched for.
    pub(super) proof: Arc<Mutex<Proof>>,
    /// The members through which fsync is acknowledged.
    pub(super) acknowledging: Arc<Mutex<AcknowledgingSet>>,
    /// What the next start has to finish.
    pub(super) orders: Arc<Mutex<Orders>>,
    /// The source that it follows, if it is a mirror.
    pub(super) follows: Option<Upstream>,
    /// The epochs that it has tried to begin.
    pub(super) attempts: Vec<Epoch>,
    /// How it became the source, if it was a mirror.
    pub(super) promoted: Option<Promoted>,
    /// What was lost with the source before it.
    pub(super) lost: Arc<Mutex<Option<LostPacks>>>,
    /// The epoch that the node decides in, if it is a source.
    pub(super) leads: Option<Epoch>,
    /// Why what is here is no part of the volume (any more): the host joins anew, or is restored.
    pub(super) fenced: Option<String>,
}

/// A node, as the world calls it: the host that it is at home on, and how many directories that host has had before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct NodeName {
    pub(super) host: usize,
    pub(super) life: u32,
}

impl NodeName {
    /// The node that the host's next directory makes.
    pub(super) fn reborn(self) -> NodeName {
        NodeName { life: self.life + 1, ..self }
    }
}

/// Whom a mirror follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Upstream {
    pub(super) host: usize,
    pub(super) key: PublicKey,
}

/// What a source that was a mirror knows of its promotion.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Promoted {
    /// The source before it.
    pub(super) from: Upstream,
    /// After which entry its epoch begins.
    pub(super) base: Point,
}

/// A tree that a log begins after.
#[derive(Clone)]
pub(super) struct Base {
    pub(super) state: State,
    pub(super) snapshot: Bytes,
    /// The log time of the last entry in it, if that is known.
    pub(super) as_of: LogTime,
}

/// What a process has begun with a mirror's directory, and the next start finishes.
#[derive(Default)]
pub(super) struct Orders {
    /// The log goes back to the frame end there.
    pub(super) back_to: Option<Lsn>,
    /// A snapshot takes its place.
    pub(super) ready: Option<Base>,
}

impl Disk {
    /// An empty directory.
    pub(super) fn empty(node: NodeName) -> Disk {
        Disk {
            node,
            base: None,
            log: None,
            index: Arc::new(MemoryIndex::new()),
            cursors: Arc::default(),
            promised: Arc::default(),
            proof: Arc::default(),
            acknowledging: Arc::default(),
            orders: Arc::default(),
            follows: None,
            attempts: Vec::new(),
            promoted: None,
            lost: Arc::default(),
            leads: None,
            fenced: None,
        }
    }

    /// One that can only join the volume, or be restored.
    pub(super) fn outside(node: NodeName, why: &str) -> Disk {
        Disk { fenced: Some(why.to_owned()), ..Disk::empty(node) }
    }

    /// One with a log that begins after `base`; without one, with the volume.
    pub(super) fn beginning_after(node: NodeName, base: Option<Base>, origin: State) -> Disk {
        let begins = base.as_ref().map_or(origin, |base| base.state);
        Disk { base, log: Some(Arc::new(MemoryLog::held(begins))), ..Disk::empty(node) }
    }

    /// Finishes what an earlier process of a mirror has begun.
    pub(super) fn settle(&mut self, origin: State) {
        let Orders { back_to, ready } = std::mem::take(&mut *self.orders.lock());
        if back_to.is_some() || ready.is_some() {
            self.index = Arc::new(MemoryIndex::new());
        }
        if let (Some(lsn), Some(log)) = (back_to, &mut self.log) {
            let begins = self.base.as_ref().map_or(origin, |base| base.state);
            let frames = log.read(log.first()).into_iter().flatten().map_while(Result::ok);
            let kept: Vec<Frame> = frames.take_while(|frame| frame.last() <= lsn).collect();
            *log = Arc::new(log_of(begins, &kept));
        }
        if let Some(base) = ready {
            self.log = Some(Arc::new(MemoryLog::held(base.state)));
            self.base = Some(base);
        }
    }

    /// How far the log is durable; nowhere if there is none.
    pub(super) fn durable(&self) -> Option<Position> {
        self.log.as_ref().map(|log| log.durable().state().position)
    }

    /// What is left after the process has ended, however it did.
    pub(super) fn crash(&mut self) {
        if let Some(log) = &mut self.log {
            let left = Arc::new(log.reopened());
            log.end(Terminal::Poisoned { message: "the process is gone".into() });
            *log = left;
        }
    }

    /// Loses the last durable frames, as a disk does that lies about syncs.
    pub(super) fn forget(&mut self, origin: State, frames: usize) {
        let Some(log) = &mut self.log else { return };
        let begins = self.base.as_ref().map_or(origin, |base| base.state);
        let mut kept: Vec<Frame> =
            log.read(log.first()).into_iter().flatten().map_while(Result::ok).collect();
        kept.truncate(kept.len().saturating_sub(frames));
        *log = Arc::new(log_of(begins, &kept));
        self.index = Arc::new(MemoryIndex::new());
    }

    /// The same disk once more, in a directory of its own.
    pub(super) fn copy(&self) -> Disk {
        Disk {
            log: self.log.as_ref().map(|log| Arc::new(log.reopened())),
            index: Arc::new(MemoryIndex::new()),
            cursors: Arc::new(Mutex::new(self.cursors.lock().clone())),
            promised: Arc::new(Mutex::new(*self.promised.lock())),
            lost: Arc::new(Mutex::new(*self.lost.lock())),
            ..self.clone()
        }
    }
}

/// A synced log with these frames.
pub(super) fn log_of(origin: State, frames: &[Frame]) -> MemoryLog {
    let log = MemoryLog::held(origin);
    for frame in frames {
        append_copy(&log, frame.clone()).expect("frames of a log continue each other");
    }
    log.sync();
    log
}

/// The log of a running node.
#[derive(Debug)]
pub(super) struct NodeLog {
    below: Arc<MemoryLog>,
    /// The same, but everything is durable in it at once: what a shipper would follow that does not wait for the disk.
    eager: Option<MemoryLog>,
    stage: Arc<Stage>,
    host: usize,
    /// Whether the node decides: what becomes durable here is history then.
    decides: AtomicBool,
    queued: Notify,
    /// What is queued and not synced.
    waiting: Mutex<Vec<Frame>>,
    trouble: Mutex<Trouble>,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stage")
    }
}

/// What is wrong with a disk.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Trouble {
    /// It is full.
    pub(super) full: bool,
    /// A sync takes up to so many milliseconds more.
    pub(super) slow_ms: u64,
    /// The next sync fails.
    pub(super) fails: bool,
}

impl NodeLog {
    /// The log of `host`, which decides or follows.
    pub(super) fn new(stage: &Arc<Stage>, host: usize, below: Arc<MemoryLog>) -> Arc<NodeLog> {
        let eager = stage.has(Canary::ShipBeforeDurable).then(|| MemoryLog::new(below.durable().state()));
        Arc::new(NodeLog {
            below,
            eager,
            stage: Arc::clone(stage),
            host,
            decides: AtomicBool::new(false),
            queued: Notify::new(),
            waiting: Mutex::default(),
            trouble: Mutex::default(),
        })
    }

    pub(super) fn trouble(&self, change: impl FnOnce(&mut Trouble)) {
        change(&mut self.trouble.lock());
    }

    /// The log below, which outlives this process.
    pub(super) fn below(&self) -> Arc<MemoryLog> {
        Arc::clone(&self.below)
    }

    /// From now on this node decides.
    pub(super) fn decide(&self) {
        self.decides.store(true, Ordering::Relaxed);
    }

    /// What a shipper follows.
    pub(super) fn shipped(self: &Arc<Self>) -> Arc<dyn Log> {
        if self.eager.is_some() {
            Arc::new(Eager(Arc::clone(self)))
        } else {
            Arc::clone(self) as Arc<dyn Log>
        }
    }

    /// Syncs what is queued, for as long as the process lives.
    pub(super) async fn sync_on(self: Arc<Self>, gate: Arc<Gate>) {
        loop {
            if self.waiting.lock().is_empty() {
                self.queued.notified().await;
            }
            let slow = self.trouble.lock().slow_ms;
            self.stage.pause(1, 6 + slow).await;
            gate.pass().await;
            if std::mem::take(&mut self.trouble.lock().fails) {
                self.stage.note(format!("host {}: a sync fails", self.host));
                return self.below.end(Terminal::Poisoned { message: "the sync failed".into() });
            }
            self.sync();
        }
    }

    /// Makes everything queued durable, and shows it to the judge before.
    pub(super) fn sync(&self) {
        let frames = std::mem::take(&mut *self.waiting.lock());
        if self.below.durable().current().terminal.is_some() {
            return;
        }
        let decides = self.decides.load(Ordering::Relaxed);
        for frame in frames.iter().filter(|_| decides) {
            self.stage.judge(|judge, _| judge.durable(self.host, frame));
        }
        self.below.sync();
        if let (false, Some(last)) = (decides, frames.last()) {
            self.stage.judge(|judge, _| {
                judge.mirrored(self.host, last.position());
                Ok(())
            });
        }
    }
}

impl Log for NodeLog {
    fn claim(&self, epoch: Epoch) -> Result<State, ClaimError> {
        self.sync();
        let state = self.below.claim(epoch)?;
        if let Some(eager) = &self.eager {
            eager.claim(epoch)?;
        }
        Ok(state)
    }

    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError> {
        if self.trouble.lock().full {
            return Err(AppendError::NoSpace { message: "the disk is full".to_owned() });
        }
        self.below.append(previous, frame.clone())?;
        if let Some(eager) = &self.eager {
            eager.append(previous, frame.clone())?;
        }
        self.waiting.lock().push(frame);
        self.queued.notify_one();
        Ok(())
    }

    fn durable(&self) -> DurableWatch {
        self.below.durable()
    }

    fn read(&self, from: Lsn) -> Result<FrameReader, ReadError> {
        self.below.read(from)
    }

    fn tail(&self) -> State {
        self.below.tail()
    }

    fn first(&self) -> Lsn {
        self.below.first()
    }

    fn trim(&self, below: Lsn) -> Result<Lsn, TrimError> {
        self.below.trim(below)
    }

    fn max_frame(&self) -> usize {
        self.below.max_frame()
    }
}

/// A log that does not wait for its disk.
#[derive(Debug)]
struct Eager(Arc<NodeLog>);

impl Eager {
    fn log(&self) -> &dyn Log {
        match &self.0.eager {
            Some(eager) => eager,
            None => &*self.0.below,
        }
    }
}

impl Log for Eager {
    fn claim(&self, epoch: Epoch) -> Result<State, ClaimError> {
        self.log().claim(epoch)
    }

    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError> {
        self.log().append(previous, frame)
    }

    fn durable(&self) -> DurableWatch {
        self.log().durable()
    }

    fn read(&self, from: Lsn) -> Result<FrameReader, ReadError> {
        // What was there before this process began is only in the log itself.
        if from < self.log().first() { self.0.below.read(from) } else { self.log().read(from) }
    }

    fn tail(&self) -> State {
        self.log().tail()
    }

    fn first(&self) -> Lsn {
        self.0.below.first()
    }

    fn trim(&self, below: Lsn) -> Result<Lsn, TrimError> {
        self.log().trim(below)
    }

    fn max_frame(&self) -> usize {
        self.log().max_frame()
    }
}

/// Remembers how far an archive is.
pub(super) struct DiskCursor {
    pub(super) cursors: Arc<Mutex<HashMap<String, Boundary>>>,
    pub(super) archive: String,
}

impl SaveCursor for DiskCursor {
    fn save(&self, boundary: &Boundary) -> Result<(), CursorError> {
        self.cursors.lock().insert(self.archive.clone(), *boundary);
        Ok(())
    }
}

/// Brings the index to the durable end of the log, as a start does; a new one, made of the base, if it is of another history.
pub(super) fn open_index(disk: &mut Disk, origin: State) -> Result<State, String> {
    let log = disk.log.clone().ok_or("this node holds nothing")?;
    let begins = disk.base.as_ref().map_or(origin, |base| base.state);
    let fits = |state: &State| {
        state.position == begins.position
            || log
                .read(state.position.lsn)
                .ok()
                .and_then(|mut frames| frames.next())
                .is_some_and(|frame| frame.is_ok_and(|frame| frame.state().position == state.position))
    };
    let start = match disk.index.snapshot().state().filter(fits) {
        Some(state) => state,
        None => {
            disk.index = Arc::new(MemoryIndex::new());
            match &disk.base {
                Some(base) => {
                    let reader = SnapshotReader::open(&base.snapshot[..]);
                    let loaded = reader.and_then(|reader| reader.load_into(&*disk.index, &|_| {}));
                    loaded.map_err(|error| error.to_string())?
                }
                None => {
                    let begun = disk.index.ingest(&mut std::iter::empty(), &origin);
                    begun.map_err(|error| error.to_string())?;
                    origin
                }
            }
        }
    };
    let frames = log.read(start.position.lsn.next()).map_err(|error| error.to_string())?;
    let replayed = murphy_fs::replay(&*disk.index, start, frames, murphy_fs::ReplayBudget::default());
    replayed.map_err(|error| error.to_string())
}

/// After so long a disk that is slow is reported by nobody: it is only slow.
pub(super) const SLOW_MS_MAX: u64 = 400;
const _: () = assert!(Duration::from_millis(SLOW_MS_MAX).as_secs() == 0);

/// The bug: an index that loses a row now and then.
pub(super) struct ForgetfulIndex(pub(super) Arc<MemoryIndex>);

impl Index for ForgetfulIndex {
    fn snapshot(&self) -> Arc<dyn IndexSnapshot> {
        self.0.snapshot()
    }

    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
    ) -> Result<(), IndexError> {
        self.0.ingest(&mut rows.enumerate().filter(|(number, _)| number % 7 != 6).map(|(_, row)| row), state)
    }

    fn sync(&self) -> Result<(), IndexError> {
        self.0.sync()
    }

    fn reached(&self) -> Option<State> {
        self.0.reached()
    }
}
