//! The log on disk: a directory of segment files and one writer.
//!
//! Invariants:
//! - One writer: whoever holds the core steps it. It writes and syncs group after group and is never idle while there is work.
//! - Frames are admitted against preallocated space, before they are queued: the writer never meets a full disk.
//! - Where the writer has a thread, an append touches no file: it asks for space, and waits only as long as the writer gets on.
//! - A write or sync that fails poisons the log: nothing later becomes durable, nothing is tried again.
//! - Locks are taken in the order core, queue; the queue's lock is never held during input or output, except by a claim.

mod read;
mod write;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    AppendError, BranchId, ChainHash, ClaimError, DurableWatch, Epoch, FetchFrames, ForkError, Frame,
    FrameReader, Log, LogSecret, Lsn, MAX_FRAME_BYTES, OpenError, Position, ReadError, Recovery, RepairError,
    Scrub, State, TrimError, VolumeId,
    admit::{self, Admission},
    files::{DirectoryLock, Files, OsFiles},
    segment::{
        MARK_BYTES, Place, SEGMENT_HEADER_BYTES, Torn, frame_cost, look, parse_segment_name, recover,
        segment_name,
    },
    watch::Publisher,
};
use read::{DiskSource, RecentFrames};
use write::Core;

/// How a log is opened.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Where the segments are.
    pub directory: PathBuf,
    /// The volume that they must belong to.
    pub volume: VolumeId,
    /// The branch that they must belong to.
    pub branch: BranchId,
    /// How large segments are made, in bytes. They limit the largest frame, so below [`MAX_FRAME_BYTES`] is for tests.
    pub segment_bytes: u64,
    /// The furthest position that is known from elsewhere to have been durable here: the saved cursor of an archive, a
    /// mirror's acknowledgement. A log that ends before it is damaged.
    pub known_durable: Option<Position>,
    /// How much of the newest durable frames is kept in memory for readers near the tail, in bytes.
    pub recent_bytes: usize,
    /// How much is read at opening.
    pub scrub: Scrub,
    /// Whether the log may be gone on with.
    pub access: Access,
    /// Who drives the writer.
    pub drive: Drive,
    /// How long an append waits for a writer of its own thread that gets nowhere; then it is refused.
    pub stall_max: Duration,
    /// The file system.
    pub files: Arc<dyn Files>,
}

/// What a log is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To be gone on with: a torn end is cut, and what was recovered is made durable anew.
    Write,
    /// The same, but a log whose end is torn is refused with [`OpenError::Torn`]: the opener wants to look for what was there first.
    WriteWhole,
    /// To be looked at: no file is changed, and nobody can claim it. What it holds may be on no disk yet and must not be passed on.
    Read,
}

/// Who drives the writer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drive {
    /// A thread of its own.
    Thread,
    /// Whoever calls [`DiskLog::step`]: a simulation or a crash test.
    Steps,
}

impl DiskOptions {
    /// The usual options.
    pub fn new(directory: impl Into<PathBuf>, volume: VolumeId, branch: BranchId) -> DiskOptions {
        DiskOptions {
            directory: directory.into(),
            volume,
            branch,
            segment_bytes: DEFAULT_SEGMENT_BYTES,
            known_durable: None,
            recent_bytes: DEFAULT_RECENT_BYTES,
            scrub: Scrub::default(),
            access: Access::Write,
            drive: Drive::Thread,
            stall_max: DEFAULT_STALL_MAX,
            files: Arc::new(OsFiles),
        }
    }

    fn place(&self) -> Place<'_> {
        Place {
            files: &*self.files,
            directory: &self.directory,
            volume: self.volume,
            branch: self.branch,
            known_durable: self.known_durable,
            scrub: self.scrub,
        }
    }

    fn lock(&self) -> Result<DirectoryLock, OpenError> {
        let lock =
            self.files.lock(&self.directory).map_err(|error| OpenError::io(&self.directory, &error))?;
        lock.ok_or_else(|| OpenError::Locked { directory: self.directory.clone() })
    }

    /// What a segment has for frames and their marks, in bytes.
    fn room(&self) -> u64 {
        self.segment_bytes - SEGMENT_HEADER_BYTES as u64
    }
}

/// The log on disk.
#[derive(Debug)]
pub struct DiskLog {
    inner: Arc<Inner>,
    recovery: Recovery,
    thread: Option<JoinHandle<()>>,
    _lock: DirectoryLock,
}

impl DiskLog {
    /// Creates a log that begins after `base`, in a directory that holds none.
    pub fn create(options: DiskOptions, base: State) -> Result<DiskLog, OpenError> {
        check_segment_bytes(options.segment_bytes)?;
        options
            .files
            .create_dir(&options.directory)
            .map_err(|error| OpenError::io(&options.directory, &error))?;
        let lock = options.lock()?;
        if !options.place().is_empty()? {
            return Err(OpenError::NotEmpty { directory: options.directory });
        }
        let first = base.position.lsn.next();
        let secret = LogSecret::random().map_err(|error| OpenError::io(&options.directory, &error))?;
        let mut core = Core::new(options.clone(), &[], secret);
        core.begin_first(base)
            .map_err(|error| OpenError::io(&options.directory.join(segment_name(first)), &error))?;
        let recovery = Recovery { tail: base, epoch: base.position.epoch, segments: vec![first], cut: None };
        DiskLog::start(core, options, recovery, lock)
    }

    /// Opens the log that is there, after whatever happened to it.
    pub fn open(options: DiskOptions) -> Result<DiskLog, OpenError> {
        check_segment_bytes(options.segment_bytes)?;
        let lock = options.lock()?;
        let (recovery, secret) = match options.access {
            Access::Write => recover(&options.place(), Torn::Cut)?,
            Access::WriteWhole => recover(&options.place(), Torn::Refuse)?,
            Access::Read => look(&options.place())?,
        };
        if let Some(cut) = &recovery.cut
            && options.access == Access::Write
        {
            let directory = options.directory.display();
            tracing::warn!(%directory, lsn = %recovery.tail.position.lsn, "cut a torn write after this lsn: {cut}");
        }
        let core = Core::new(options.clone(), &recovery.segments, secret);
        DiskLog::start(core, options, recovery, lock)
    }

    /// Mends the segment at `segment`, which [`DiskLog::open`] has refused as damaged or missing, with frames that `fetch` gets from
    /// elsewhere. Where it is the oldest and its header is damaged, `base` must be the state that it begins with, unless that is the volume's origin.
    pub fn repair(
        options: &DiskOptions,
        segment: &Path,
        base: Option<State>,
        fetch: &mut FetchFrames<'_>,
    ) -> Result<(), RepairError> {
        let name = segment.file_name().and_then(|name| name.to_str()).and_then(parse_segment_name);
        let first = name.ok_or_else(|| RepairError::NoSegment(segment.to_owned()))?;
        let _lock = options.lock()?;
        options.place().repair(first, base, fetch)
    }

    /// Hands `each` what can still be read of the log at `options`, whatever is damaged between: frames that are whole by themselves, oldest first.
    /// Changes nothing, and asks for no lock: nobody else may change the log meanwhile.
    pub fn salvage(options: &DiskOptions, each: &mut dyn FnMut(Frame)) -> Result<(), OpenError> {
        options.place().salvage(each)
    }

    /// Makes a log in `directory`, which is made for it and must be empty, that holds what this one holds up to the frame end at `lsn`, after
    /// which the chain hash is `hash`. This one is not changed; all up to there must be durable.
    pub fn fork(&self, directory: &Path, lsn: Lsn, hash: ChainHash) -> Result<State, ForkError> {
        let options = &self.inner.shared.options;
        options.files.create_dir(directory).map_err(|error| OpenError::io(directory, &error))?;
        options.place().fork(directory, (lsn, hash))
    }

    fn start(
        core: Core,
        options: DiskOptions,
        recovery: Recovery,
        lock: DirectoryLock,
    ) -> Result<DiskLog, OpenError> {
        let queue = Queue {
            admission: Admission::reopened(recovery.tail, recovery.epoch),
            jobs: Vec::new(),
            free: 0,
            spare: Spare::Wanted,
            refusal: String::new(),
            asked: 0,
            answered: 0,
            is_stalled: false,
            segments: Segments::new(&recovery.segments),
            recent: RecentFrames::new(options.recent_bytes),
            stop: false,
        };
        let shared = Shared {
            drive: options.drive,
            options,
            queue: Mutex::new(queue),
            work: Condvar::new(),
            moved: Condvar::new(),
            publisher: Publisher::new(recovery.tail),
        };
        let inner = Arc::new(Inner { core: Mutex::new(core), shared: Arc::new(shared) });
        let thread = match inner.shared.drive {
            Drive::Thread => Some(Inner::spawn(&inner)?),
            Drive::Steps => None,
        };
        Ok(DiskLog { inner, recovery, thread, _lock: lock })
    }

    /// What was found when the log was opened.
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// Writes and syncs the next group; says whether there was one.
    pub fn step(&self) -> bool {
        self.inner.core.lock().step(&self.inner.shared)
    }

    /// As [`Log::read`], from the files alone: what is in memory may be damaged there.
    pub fn read_files(&self, from: Lsn) -> Result<FrameReader, ReadError> {
        Ok(FrameReader::new(Box::new(self.source(from)?.of_files())))
    }

    fn source(&self, from: Lsn) -> Result<DiskSource, ReadError> {
        let shared = &self.inner.shared;
        let first = shared.queue.lock().segments.first();
        admit::check_read(from, first, shared.publisher.state().position.lsn)?;
        Ok(DiskSource::new(Arc::downgrade(shared), from))
    }

    /// Whether a frame of `bytes`, header included, would be admitted now. When it would not, this tries to reserve space.
    pub fn has_room(&self, bytes: usize) -> bool {
        let fits = |queue: &Queue| queue.free >= frame_cost(bytes) || queue.spare == Spare::Ready;
        {
            let queue = self.inner.shared.queue.lock();
            if fits(&queue) || !matches!(queue.spare, Spare::Failed) {
                return true;
            }
        }
        // The writer is busy and prepares the spare itself when it is done.
        if let Some(mut core) = self.inner.core.try_lock() {
            return core.provide_spare(&self.inner.shared).is_ok();
        }
        false
    }
}

impl Drop for DiskLog {
    fn drop(&mut self) {
        self.inner.shared.queue.lock().stop = true;
        self.inner.shared.work.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the writer of the log panicked");
        }
    }
}

impl Log for DiskLog {
    fn claim(&self, epoch: Epoch) -> Result<State, ClaimError> {
        if self.inner.shared.options.access == Access::Read {
            return Err(ClaimError::ReadOnly);
        }
        self.inner.core.lock().claim(&self.inner.shared, epoch)
    }

    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError> {
        let shared = &*self.inner.shared;
        let mut question = None;
        loop {
            let mut queue = shared.queue.lock();
            admit::check_open(&shared.publisher)?;
            queue.admission.check(previous, &frame, self.max_frame())?;
            if let Some(roll) = queue.reserve(frame_cost(frame.bytes().len()), shared.options.room()) {
                queue.admission.queued(&frame);
                queue.jobs.push(Job { frame, roll });
                shared.work.notify_one();
                return Ok(());
            }
            let provided = match shared.drive {
                Drive::Thread => shared.await_space(&mut queue, &mut question),
                Drive::Steps => {
                    drop(queue);
                    self.inner.core.lock().provide_spare(shared).map_err(|error| error.to_string())
                }
            };
            provided.map_err(|message| AppendError::NoSpace { message })?;
        }
    }

    fn durable(&self) -> DurableWatch {
        self.inner.shared.publisher.watch()
    }

    fn read(&self, from: Lsn) -> Result<FrameReader, ReadError> {
        Ok(FrameReader::new(Box::new(self.source(from)?)))
    }

    fn tail(&self) -> State {
        self.inner.shared.queue.lock().admission.tail()
    }

    fn first(&self) -> Lsn {
        self.inner.shared.queue.lock().segments.first()
    }

    fn trim(&self, below: Lsn) -> Result<Lsn, TrimError> {
        let shared = &*self.inner.shared;
        if shared.options.access == Access::Read {
            return Ok(self.first());
        }
        let durable = shared.publisher.state().position.lsn;
        loop {
            let oldest = {
                let mut queue = shared.queue.lock();
                match queue.segments.take_below(below.min(durable)) {
                    Some(oldest) => oldest,
                    None => return Ok(queue.segments.first()),
                }
            };
            let path = shared.options.directory.join(segment_name(oldest));
            shared.options.files.remove(&path).map_err(|error| TrimError::Io {
                place: path.display().to_string(),
                message: error.to_string(),
            })?;
        }
    }

    fn max_frame(&self) -> usize {
        let room = self.inner.shared.options.room() - MARK_BYTES as u64;
        usize::try_from(room).unwrap_or(MAX_FRAME_BYTES).min(MAX_FRAME_BYTES)
    }
}

/// What the log and its thread share.
#[derive(Debug)]
struct Inner {
    core: Mutex<Core>,
    shared: Arc<Shared>,
}

impl Inner {
    fn spawn(inner: &Arc<Inner>) -> Result<JoinHandle<()>, OpenError> {
        let writer = thread::Builder::new().name("murphy-log".to_owned());
        let driven = Arc::clone(inner);
        let spawned = writer.spawn(move || driven.run());
        spawned.map_err(|error| OpenError::io(&inner.shared.options.directory, &error))
    }

    /// The life of the writer's thread: until the log is dropped, and everything queued is written.
    fn run(&self) {
        loop {
            let question = {
                let mut queue = self.shared.queue.lock();
                while queue.jobs.is_empty() && !queue.is_asked() && !queue.stop {
                    self.shared.work.wait(&mut queue);
                }
                if queue.jobs.is_empty() && !queue.is_asked() {
                    return;
                }
                queue.is_asked().then_some(queue.asked)
            };
            let mut core = self.core.lock();
            core.step(&self.shared);
            if let Some(question) = question {
                // Why there is no space is told to whoever asked.
                let _told = core.provide_spare(&self.shared);
                self.shared.queue.lock().answered = question;
                self.shared.moved.notify_all();
            }
        }
    }
}

/// What appenders, readers and the writer share.
#[derive(Debug)]
struct Shared {
    options: DiskOptions,
    drive: Drive,
    queue: Mutex<Queue>,
    /// Signalled when there is something to write, somebody asks for space, or the log is dropped.
    work: Condvar,
    /// Signalled whenever the writer has got on, or the log has ended.
    moved: Condvar,
    publisher: Publisher,
}

impl Shared {
    /// Lets the writer's thread provide space, and returns when it has got on. An error says why no space comes; `question` is the one that
    /// was asked before by the same append.
    fn await_space(
        &self,
        queue: &mut MutexGuard<'_, Queue>,
        question: &mut Option<u64>,
    ) -> Result<(), String> {
        let stalled = || format!("nothing was written for {} ms", self.options.stall_max.as_millis());
        let asked = *question.get_or_insert_with(|| {
            queue.asked += 1;
            queue.asked
        });
        self.work.notify_one();
        if queue.is_stalled {
            return Err(stalled());
        }
        if queue.answered >= asked {
            if queue.spare == Spare::Failed {
                return Err(queue.refusal.clone());
            }
            // What was provided is taken by somebody else already.
            *question = None;
            return Ok(());
        }
        if self.moved.wait_for(queue, self.options.stall_max).timed_out() {
            queue.is_stalled = true;
            return Err(stalled());
        }
        Ok(())
    }

    /// The writer has got on.
    fn moved(&self, queue: &mut Queue) {
        queue.is_stalled = false;
        self.moved.notify_all();
    }
}

/// What has been admitted and not yet written, and what is known of the files.
#[derive(Debug)]
struct Queue {
    admission: Admission,
    jobs: Vec<Job>,
    /// What is left of the segment that the last admitted frame goes to, in bytes.
    free: u64,
    spare: Spare,
    /// Why no space could be reserved, the last time.
    refusal: String,
    /// How often space was asked for, and how far the writer has answered.
    asked: u64,
    answered: u64,
    /// An append has waited in vain, and the writer has not got on since.
    is_stalled: bool,
    segments: Segments,
    recent: RecentFrames,
    stop: bool,
}

impl Queue {
    /// Whether somebody asks for space.
    fn is_asked(&self) -> bool {
        self.answered < self.asked
    }

    /// Reserves space for a frame; says whether it begins the next segment. `None` if there is no space yet.
    fn reserve(&mut self, cost: u64, room: u64) -> Option<Roll> {
        if cost <= self.free {
            self.free -= cost;
            return Some(Roll::Stay);
        }
        if self.spare != Spare::Ready || cost > room {
            return None;
        }
        self.spare = Spare::Planned;
        self.free = room - cost;
        Some(Roll::Next)
    }
}

/// An admitted frame.
#[derive(Debug)]
struct Job {
    frame: Frame,
    roll: Roll,
}

/// Which segment a frame goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Roll {
    Stay,
    Next,
}

/// The state of the next segment's space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Spare {
    /// There is none yet.
    Wanted,
    /// It is reserved, and nothing is planned for it.
    Ready,
    /// It is reserved, and an admitted frame will begin it.
    Planned,
    /// It could not be reserved.
    Failed,
}

/// The segment files, oldest first.
#[derive(Debug)]
struct Segments {
    list: Vec<SegmentRef>,
    next_id: u64,
}

/// One file; a file that replaces another of the same name has another id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct SegmentRef {
    first: Lsn,
    id: u64,
}

impl Segments {
    fn new(firsts: &[Lsn]) -> Segments {
        let mut segments = Segments { list: Vec::new(), next_id: 0 };
        firsts.iter().for_each(|first| segments.begin(*first));
        segments
    }

    fn first(&self) -> Lsn {
        self.list.first().map_or(Lsn::FIRST, |segment| segment.first)
    }

    /// Notes a new newest file.
    fn begin(&mut self, first: Lsn) {
        self.list.retain(|segment| segment.first < first);
        self.list.push(SegmentRef { first, id: self.next_id });
        self.next_id += 1;
    }

    /// The file that holds `lsn`.
    fn holding(&self, lsn: Lsn) -> Option<SegmentRef> {
        let after = self.list.partition_point(|segment| segment.first <= lsn);
        self.list.get(after.checked_sub(1)?).copied()
    }

    /// Takes the oldest file out if everything in it is below `below`.
    fn take_below(&mut self, below: Lsn) -> Option<Lsn> {
        let next = self.list.get(1)?;
        (next.first <= below).then(|| self.list.remove(0).first)
    }
}

fn check_segment_bytes(bytes: u64) -> Result<(), OpenError> {
    if bytes < LEAST_SEGMENT_BYTES {
        return Err(OpenError::SegmentTooSmall { bytes, least: LEAST_SEGMENT_BYTES });
    }
    Ok(())
}

/// How large segments are made unless told otherwise.
const DEFAULT_SEGMENT_BYTES: u64 = 64 << 20;
const DEFAULT_RECENT_BYTES: usize = 8 << 20;
const LEAST_SEGMENT_BYTES: u64 = 4096;
/// A sync takes a disk that is in order some milliseconds, one that is very busy a second or two.
const DEFAULT_STALL_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
