//! A log in memory, for tests, simulations and volumes that need not survive.
//!
//! Invariants:
//! - It keeps the contract of [`Log`], with the life of the process as its medium.
//! - A held log makes nothing durable by itself: whoever simulates says when, and can make it fail.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::{
    AppendError, ClaimError, DurableWatch, Epoch, Frame, FrameReader, FrameSource, Log, Lsn, MAX_FRAME_BYTES,
    Position, ReadError, State, Terminal, TrimError,
    admit::{self, Admission},
    watch::Publisher,
};

/// A log in memory.
#[derive(Debug)]
pub struct MemoryLog {
    shared: Arc<Mutex<Shared>>,
    sync: Sync,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sync {
    AtOnce,
    Held,
}

#[derive(Debug)]
struct Shared {
    /// Everything queued and not trimmed, oldest first.
    frames: Vec<Frame>,
    /// The LSN of the oldest entry in `frames`, or of the next one if there is none.
    first: Lsn,
    admission: Admission,
    publisher: Publisher,
}

impl MemoryLog {
    /// A log that begins after `base`, and in which every frame is durable as soon as it is appended.
    pub fn new(base: State) -> MemoryLog {
        MemoryLog::with_frames(base, base, Vec::new(), Sync::AtOnce)
    }

    /// A log in which frames become durable only when [`sync`](MemoryLog::sync) is called.
    pub fn held(base: State) -> MemoryLog {
        MemoryLog::with_frames(base, base, Vec::new(), Sync::Held)
    }

    /// The log that a crash and a restart would leave: the durable frames, and no claim.
    #[must_use]
    pub fn reopened(&self) -> MemoryLog {
        let shared = self.shared.lock();
        let durable = shared.publisher.state();
        let kept =
            shared.frames.iter().filter(|frame| frame.last() <= durable.position.lsn).cloned().collect();
        let reopened = MemoryLog::with_frames(durable, durable, kept, self.sync);
        {
            let mut new = reopened.shared.lock();
            new.first = shared.first;
            new.admission = Admission::reopened(durable, shared.admission.epoch());
        }
        reopened
    }

    fn with_frames(base: State, tail: State, frames: Vec<Frame>, sync: Sync) -> MemoryLog {
        let shared = Shared {
            frames,
            first: base.position.lsn.next(),
            admission: Admission::reopened(tail, tail.position.epoch),
            publisher: Publisher::new(tail),
        };
        MemoryLog { shared: Arc::new(Mutex::new(shared)), sync }
    }

    /// Makes everything queued durable.
    pub fn sync(&self) {
        let shared = self.shared.lock();
        shared.publisher.advance(shared.admission.tail());
    }

    /// Ends the log, as a failing medium or another source would.
    pub fn end(&self, terminal: Terminal) {
        self.shared.lock().publisher.end(terminal);
    }
}

impl Log for MemoryLog {
    fn claim(&self, epoch: Epoch) -> Result<State, ClaimError> {
        let mut shared = self.shared.lock();
        admit::check_open(&shared.publisher)?;
        shared.admission.check_claim(epoch)?;
        let tail = shared.admission.tail();
        shared.publisher.advance(tail);
        shared.admission.claim(epoch);
        Ok(tail)
    }

    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError> {
        let mut shared = self.shared.lock();
        admit::check_open(&shared.publisher)?;
        shared.admission.check(previous, &frame, MAX_FRAME_BYTES)?;
        shared.admission.queued(&frame);
        let state = frame.state();
        shared.frames.push(frame);
        if self.sync == Sync::AtOnce {
            shared.publisher.advance(state);
        }
        Ok(())
    }

    fn durable(&self) -> DurableWatch {
        self.shared.lock().publisher.watch()
    }

    fn read(&self, from: Lsn) -> Result<FrameReader, ReadError> {
        let shared = self.shared.lock();
        admit::check_read(from, shared.first, shared.publisher.state().position.lsn)?;
        let shared = Arc::downgrade(&self.shared);
        Ok(FrameReader::new(Box::new(MemorySource { shared, next: from })))
    }

    fn tail(&self) -> State {
        self.shared.lock().admission.tail()
    }

    fn first(&self) -> Lsn {
        self.shared.lock().first
    }

    fn trim(&self, below: Lsn) -> Result<Lsn, TrimError> {
        let mut shared = self.shared.lock();
        let durable = shared.publisher.state().position.lsn;
        let last_durable = shared.frames.partition_point(|frame| frame.last() <= durable).saturating_sub(1);
        let cut = shared.frames.partition_point(|frame| frame.last() < below).min(last_durable);
        shared.frames.drain(..cut);
        if let Some(oldest) = shared.frames.first().map(Frame::first) {
            shared.first = oldest;
        }
        Ok(shared.first)
    }

    fn max_frame(&self) -> usize {
        MAX_FRAME_BYTES
    }
}

/// Reads a memory log as long as it lives; then it is at its tail for good.
struct MemorySource {
    shared: Weak<Mutex<Shared>>,
    next: Lsn,
}

impl FrameSource for MemorySource {
    fn next_frame(&mut self) -> Result<Option<Frame>, ReadError> {
        let Some(shared) = self.shared.upgrade() else {
            return Ok(None);
        };
        let shared = shared.lock();
        if self.next < shared.first {
            return Err(ReadError::Trimmed { lsn: self.next, first: shared.first });
        }
        let at = shared.frames.partition_point(|frame| frame.last() < self.next);
        let durable = shared.publisher.state().position.lsn;
        let frame = shared.frames.get(at).filter(|frame| frame.last() <= durable).cloned();
        if let Some(frame) = &frame {
            self.next = frame.last().next();
        }
        Ok(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{History, Subject, conforms, epoch};

    struct InMemory(Arc<MemoryLog>);

    impl Subject for InMemory {
        fn log(&self) -> Arc<dyn Log> {
            Arc::<MemoryLog>::clone(&self.0)
        }

        fn reopened(self: Box<Self>) -> Box<dyn Subject> {
            Box::new(InMemory(Arc::new(self.0.reopened())))
        }

        fn break_medium(&self) {
            self.0.end(Terminal::Poisoned { message: "broken".into() });
        }
    }

    #[test]
    fn the_log_in_memory_conforms() {
        conforms(&|base| Box::new(InMemory(Arc::new(MemoryLog::new(base)))));
    }

    #[test]
    fn a_held_log_shows_nothing_before_it_is_synced() {
        let log = MemoryLog::held(History::origin());
        let state = log.claim(epoch(1)).unwrap();
        let frame = History::new(epoch(1), state).frame(3);
        log.append(&state.position, frame.clone()).unwrap();
        assert_eq!(log.durable().state(), state);
        assert_eq!(log.read(Lsn::FIRST).unwrap().count(), 0);
        assert_eq!(log.reopened().tail(), state, "a crash loses what was not synced");
        log.sync();
        assert_eq!(log.durable().state(), frame.state());
        assert_eq!(log.read(Lsn::FIRST).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_watch_of_a_dropped_log_does_not_wait_for_ever() {
        let log = MemoryLog::new(History::origin());
        let watch = log.durable();
        drop(log);
        assert_eq!(watch.wait_for(Lsn::FIRST).await, Err(crate::WaitError::Closed));
        let waited = watch.wait_blocking(Lsn::FIRST, std::time::Duration::from_secs(30));
        assert_eq!(waited, Err(crate::WaitError::Closed));
    }
}
