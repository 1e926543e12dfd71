//! The writer of the log on disk, as steps; who drives it does not matter.
//!
//! Invariants:
//! - A group is one write and one sync, in one segment; it is published after the sync, in order.
//! - A frame that begins a segment is written only after everything before it is durable.
//! - After a failed write or sync nothing is written any more.

use std::io;

use super::{DiskOptions, Job, Queue, Roll, Shared, Spare};
use crate::{
    ClaimError, Epoch, Frame, LogSecret, Lsn, State, Terminal, admit,
    files::SegmentFile,
    segment::{SegmentHeader, SegmentWriter, prepare_spare},
};

/// What the writer alone knows.
#[derive(Debug)]
pub(super) struct Core {
    options: DiskOptions,
    /// What its marks are made of.
    secret: LogSecret,
    epoch: Option<Epoch>,
    /// The segment that is written to; none before the first claim.
    current: Option<SegmentWriter>,
    /// The first entry of the newest segment, and of the one before it.
    newest: Option<Lsn>,
    before: Option<Lsn>,
    /// The space for the next one.
    spare: Option<Box<dyn SegmentFile>>,
}

impl Core {
    /// A core above the segments that are there, oldest first.
    pub(super) fn new(options: DiskOptions, segments: &[Lsn], secret: LogSecret) -> Core {
        let mut newest = segments.iter().rev().copied();
        let (newest, before) = (newest.next(), newest.next());
        Core { options, secret, epoch: None, current: None, newest, before, spare: None }
    }

    /// Creates the first segment of a new log, which begins behind `base`.
    pub(super) fn begin_first(&mut self, base: State) -> io::Result<()> {
        self.reserve()?;
        self.begin(base.position.epoch, base)
    }

    /// Writes and syncs the next group of frames; says whether there was one.
    pub(super) fn step(&mut self, shared: &Shared) -> bool {
        let group = next_group(&mut shared.queue.lock().jobs);
        let Some(first) = group.first() else {
            return false;
        };
        let durable = shared.publisher.state();
        let rolled = match first.roll {
            Roll::Stay => Ok(()),
            Roll::Next => self.roll(shared, durable),
        };
        let frames: Vec<Frame> = group.into_iter().map(|job| job.frame).collect();
        if let Err(error) = rolled.and_then(|()| self.commit(durable, &frames)) {
            self.poison(shared, &error);
            return false;
        }
        if let Some(last) = frames.last() {
            shared.publisher.advance(last.state());
        }
        let spare_wanted = {
            let mut queue = shared.queue.lock();
            queue.recent.extend(frames);
            shared.moved(&mut queue);
            queue.spare == Spare::Wanted
        };
        if spare_wanted && let Err(error) = self.provide_spare(shared) {
            // Appends meet this when the segment is full; until then nothing is lost.
            tracing::warn!("cannot reserve the next segment of the log: {error}");
        }
        true
    }

    /// Reserves the next segment. If the reserved one is planned for, writes first what comes before it.
    pub(super) fn provide_spare(&mut self, shared: &Shared) -> io::Result<()> {
        while shared.queue.lock().spare == Spare::Planned {
            if !self.step(shared) {
                // The log has ended, which the caller is going to see.
                return Ok(());
            }
        }
        if shared.queue.lock().spare == Spare::Ready {
            return Ok(());
        }
        let reserved = self.reserve();
        let mut queue = shared.queue.lock();
        queue.spare = if reserved.is_ok() { Spare::Ready } else { Spare::Failed };
        if let Err(error) = &reserved {
            queue.refusal = error.to_string();
        }
        shared.moved(&mut queue);
        reserved
    }

    /// Writes what is queued, then begins a segment of `epoch`.
    pub(super) fn claim(&mut self, shared: &Shared, epoch: Epoch) -> Result<State, ClaimError> {
        loop {
            while self.step(shared) {}
            let mut queue = shared.queue.lock();
            admit::check_open(&shared.publisher)?;
            queue.admission.check_claim(epoch)?;
            if queue.jobs.is_empty() {
                return self.claim_idle(shared, &mut queue, epoch);
            }
        }
    }

    /// Begins a segment of `epoch` while nothing is queued, and nobody can queue anything.
    fn claim_idle(&mut self, shared: &Shared, queue: &mut Queue, epoch: Epoch) -> Result<State, ClaimError> {
        let tail = shared.publisher.state();
        if let Err(error) = self.reserve() {
            return Err(ClaimError::NoSpace { message: error.to_string() });
        }
        if let Err(error) = self.begin(epoch, tail) {
            return Err(ClaimError::Ended(poisoned(shared, queue, &error)));
        }
        self.epoch = Some(epoch);
        queue.segments.begin(tail.position.lsn.next());
        queue.free = self.options.room();
        queue.spare = Spare::Wanted;
        queue.admission.claim(epoch);
        Ok(tail)
    }

    /// Makes sure that there is a spare file.
    fn reserve(&mut self) -> io::Result<()> {
        if self.spare.is_none() {
            let options = &self.options;
            self.spare = Some(prepare_spare(&*options.files, &options.directory, options.segment_bytes)?);
        }
        Ok(())
    }

    /// Goes on in the next segment; everything before it is durable.
    fn roll(&mut self, shared: &Shared, durable: State) -> io::Result<()> {
        let epoch = self.epoch.ok_or_else(|| io::Error::other("a frame was admitted before a claim"))?;
        self.begin(epoch, durable)?;
        let mut queue = shared.queue.lock();
        queue.segments.begin(durable.position.lsn.next());
        queue.spare = Spare::Wanted;
        Ok(())
    }

    /// The first entry of the segment before one that begins behind `base`. A segment without entries is replaced by such a one.
    fn previous(&self, base: State) -> Option<Lsn> {
        if self.newest == Some(base.position.lsn.next()) { self.before } else { self.newest }
    }

    /// Turns the spare file into the current segment, of `epoch`, which begins behind `base`.
    fn begin(&mut self, epoch: Epoch, base: State) -> io::Result<()> {
        let spare =
            self.spare.take().ok_or_else(|| io::Error::other("no space was reserved for a segment"))?;
        let options = &self.options;
        let header = SegmentHeader {
            previous: self.previous(base),
            ..SegmentHeader::plain(options.volume, options.branch, epoch, base, self.secret)
        };
        let next = SegmentWriter::begin(&*options.files, &options.directory, spare, &header)?;
        (self.newest, self.before) = (Some(header.first()), header.previous);
        if let Some(finished) = self.current.replace(next)
            && let Err(error) = finished.finish()
        {
            // Only unused space stays reserved.
            tracing::warn!("cannot shorten a finished segment of the log: {error}");
        }
        Ok(())
    }

    fn commit(&mut self, durable: State, frames: &[Frame]) -> io::Result<()> {
        let current =
            self.current.as_mut().ok_or_else(|| io::Error::other("a frame was admitted before a claim"))?;
        current.commit(durable.position.lsn, frames)
    }

    fn poison(&mut self, shared: &Shared, error: &io::Error) {
        self.current = None;
        poisoned(shared, &mut shared.queue.lock(), error);
    }
}

/// Ends the log because of `error`; what is queued will never be durable.
fn poisoned(shared: &Shared, queue: &mut Queue, error: &io::Error) -> Terminal {
    let directory = shared.options.directory.display();
    let terminal = Terminal::Poisoned { message: format!("{directory}: {error}").into() };
    queue.jobs.clear();
    shared.moved(queue);
    shared.publisher.end(terminal.clone());
    terminal
}

/// Takes the frames that go to disk in one write.
fn next_group(jobs: &mut Vec<Job>) -> Vec<Job> {
    let mut bytes = 0;
    let end = jobs.iter().enumerate().position(|(index, job)| {
        bytes += job.frame.bytes().len();
        index > 0 && (job.roll == Roll::Next || bytes > GROUP_BYTES)
    });
    let rest = jobs.split_off(end.unwrap_or(jobs.len()));
    std::mem::replace(jobs, rest)
}

/// More frames than this wait for the next write, so that the first of them do not wait for the last.
const GROUP_BYTES: usize = 4 << 20;
