//! Reading the log on disk, behind its writer.
//!
//! Invariants:
//! - Only durable frames come out, in order, without a gap; whoever is slower than the frames kept in memory reads the files.
//! - A reader does not keep the log alive: when that is gone, the reader is at its tail.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use super::{SegmentRef, Shared};
use crate::{
    Frame, FrameSource, Lsn, OpenError, ReadError,
    segment::{Scan, Step},
};

/// The last durable frames, kept for readers that are close to the tail.
#[derive(Debug)]
pub(super) struct RecentFrames {
    frames: VecDeque<Frame>,
    bytes: usize,
    limit: usize,
}

impl RecentFrames {
    pub(super) fn new(limit: usize) -> RecentFrames {
        RecentFrames { frames: VecDeque::new(), bytes: 0, limit }
    }

    pub(super) fn extend(&mut self, frames: Vec<Frame>) {
        self.bytes += frames.iter().map(|frame| frame.bytes().len()).sum::<usize>();
        self.frames.extend(frames);
        while self.bytes > self.limit
            && let Some(oldest) = self.frames.pop_front()
        {
            self.bytes -= oldest.bytes().len();
        }
    }

    /// The frame that holds `lsn`.
    fn holding(&self, lsn: Lsn) -> Option<Frame> {
        let at = self.frames.partition_point(|frame| frame.last() < lsn);
        self.frames.get(at).filter(|frame| frame.first() <= lsn).cloned()
    }
}

/// Reads a log on disk.
pub(super) struct DiskSource {
    shared: Weak<Shared>,
    next: Lsn,
    scan: Option<(SegmentRef, Scan)>,
    /// Frames that are in memory are taken from there.
    takes_recent: bool,
}

impl DiskSource {
    pub(super) fn new(shared: Weak<Shared>, next: Lsn) -> DiskSource {
        DiskSource { shared, next, scan: None, takes_recent: true }
    }

    /// The same, from the files alone.
    pub(super) fn of_files(self) -> DiskSource {
        DiskSource { takes_recent: false, ..self }
    }

    /// Reads the frame that holds the next LSN, which is durable, from its segment.
    fn read_file(&mut self, shared: &Shared) -> Result<Frame, ReadError> {
        let mut fresh = false;
        loop {
            if self.scan.is_none() {
                self.scan = Some(self.open(shared)?);
                fresh = true;
            }
            let Some((segment, scan)) = &mut self.scan else { continue };
            let place = scan.path.display().to_string();
            // Only what is durable is read, and on the chain.
            let step = scan.next_over_mark();
            match step.map_err(|error| ReadError::Io { place: place.clone(), message: error.to_string() })? {
                Step::Frame(frame) if frame.last() < self.next => {}
                Step::Frame(frame) => return Ok(frame),
                Step::End(end) if fresh => {
                    let message = scan.told(&end);
                    return Err(ReadError::Damaged { place, lsn: scan.position().lsn.next(), message });
                }
                Step::End(_) => {
                    // What was read ahead is out of date, or the log has gone on in another file.
                    if shared.queue.lock().segments.holding(self.next) == Some(*segment) {
                        scan.forget_window();
                        fresh = true;
                    } else {
                        self.scan = None;
                    }
                }
            }
        }
    }

    /// Opens the segment that holds the next LSN.
    fn open(&self, shared: &Shared) -> Result<(SegmentRef, Scan), ReadError> {
        let (found, first) = {
            let queue = shared.queue.lock();
            (queue.segments.holding(self.next), queue.segments.first())
        };
        let segment = found.ok_or(ReadError::Trimmed { lsn: self.next, first })?;
        let place = shared.options.place();
        let scan = place.read_header(segment.first).and_then(|header| place.scan(&header));
        scan.map(|scan| (segment, scan)).map_err(|error| self.open_failed(shared, segment, &error))
    }

    fn open_failed(&self, shared: &Shared, segment: SegmentRef, error: &OpenError) -> ReadError {
        let first = shared.queue.lock().segments.first();
        if segment.first < first {
            return ReadError::Trimmed { lsn: self.next, first };
        }
        let place = shared.options.directory.display().to_string();
        match error {
            OpenError::Io { path, message } => {
                ReadError::Io { place: path.display().to_string(), message: message.clone() }
            }
            other => ReadError::Damaged { place, lsn: segment.first, message: other.to_string() },
        }
    }
}

impl FrameSource for DiskSource {
    fn next_frame(&mut self) -> Result<Option<Frame>, ReadError> {
        let Some(shared) = self.shared.upgrade() else {
            return Ok(None);
        };
        let shared: Arc<Shared> = shared;
        if self.next > shared.publisher.state().position.lsn {
            return Ok(None);
        }
        let recent = if self.takes_recent { shared.queue.lock().recent.holding(self.next) } else { None };
        let frame = match recent {
            Some(frame) => {
                self.scan = None;
                frame
            }
            None => self.read_file(&shared)?,
        };
        self.next = frame.last().next();
        Ok(Some(frame))
    }
}
