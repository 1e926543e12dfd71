//! The appender: turns sequenced entries into frames.
//!
//! Invariants:
//! - Pure: no thread, no clock, no file. The sequencer pushes inside its critical section.
//! - The entries of consecutive frames are dense, and their hashes link; a refused entry changes nothing.
//! - No frame exceeds [`MAX_FRAME_BYTES`], even if nobody closes frames for a long time.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;

use crate::{
    ChainHash, Digest, EncodeError, Entry, Epoch, FEATURE_LEVEL, FRAME_BYTES, FRAME_HEADER_BYTES, Frame,
    FrameHeader, LogTime, Lsn, MAX_FRAME_BYTES, Position, State, Usage, VolumeKeys, WrittenRow,
    chain::{LINK_START_BYTES, start_link},
    entry::{EncodedBody, Said},
};

/// Builds the frames of one epoch.
#[derive(Debug)]
pub struct Appender {
    keys: VolumeKeys,
    epoch: Epoch,
    /// The state after the last entry.
    state: State,
    open: Option<OpenFrame>,
    /// Frames that had to be ended before anybody closed them.
    full: VecDeque<OpenFrame>,
    wanted: bool,
    /// The time of the last entry pushed.
    last_time: LogTime,
    /// The input of the chain hash; kept for its memory.
    link: Vec<u8>,
    /// What is known of the last entry's body; kept for its memory.
    encoded: EncodedBody,
    /// What the open frame has said.
    said: Said,
    /// The memory of a frame that was closed, for the next one.
    spare: Vec<u8>,
}

impl Appender {
    /// An appender that continues `state` in `epoch`; both come from the log's `claim`.
    pub fn new(keys: VolumeKeys, epoch: Epoch, state: State) -> Appender {
        let link = Vec::with_capacity(FRAME_BYTES);
        let last_time = LogTime::default();
        Appender {
            keys,
            epoch,
            state,
            open: None,
            full: VecDeque::new(),
            wanted: false,
            last_time,
            link,
            encoded: EncodedBody::default(),
            said: Said::default(),
            spare: Vec::new(),
        }
    }

    /// Adds the next entry, with the digest and size of the tree after it, and says which position it has.
    pub fn push<R: WrittenRow>(
        &mut self,
        entry: &Entry<R>,
        digest_after: Digest,
        usage_after: Usage,
    ) -> Result<Position, PushError> {
        let previous = self.state.position;
        if entry.lsn != previous.lsn.next() {
            return Err(PushError::Gap { expected: previous.lsn.next(), found: entry.lsn });
        }
        if entry.time < self.last_time {
            return Err(PushError::TimeBackwards { lsn: entry.lsn });
        }
        start_link(&mut self.link, &previous.hash, entry.lsn, entry.time, entry.kind);
        self.encoded.encode(entry, &mut self.link)?;
        let hash = self.keys.chained(&self.link);

        let body = &self.link[LINK_START_BYTES..];
        let fits = |open: &OpenFrame| open.body_len() < FRAME_BYTES && open.delta(entry.time).is_some();
        if !self.open.as_ref().is_none_or(fits) {
            self.full.extend(self.open.take());
        }
        let (spare, said) = (&mut self.spare, &mut self.said);
        let open = self.open.get_or_insert_with(|| {
            said.clear();
            OpenFrame::new(std::mem::take(spare), entry, previous.hash)
        });
        open.add(entry, &self.encoded, body, said);
        open.hash_after = hash;
        let position = Position { epoch: self.epoch, lsn: entry.lsn, hash };
        self.state = State { position, digest: digest_after, usage: usage_after };
        self.last_time = entry.time;
        (open.digest_after, open.usage) = (digest_after, usage_after);
        Ok(position)
    }

    /// The state after the last entry pushed.
    pub fn state(&self) -> State {
        self.state
    }

    /// The epoch of the frames.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether no entry waits to be closed.
    pub fn is_empty(&self) -> bool {
        self.open.is_none() && self.full.is_empty()
    }

    /// Says that somebody waits for what has been pushed so far.
    pub fn request_close(&mut self) {
        self.wanted = true;
    }

    /// Whether it is time to close: somebody waits, the frame is large, or it has been open for 5 ms of log time.
    pub fn should_close(&self, now: LogTime) -> bool {
        let Some(open) = &self.open else {
            return !self.full.is_empty();
        };
        self.wanted
            || !self.full.is_empty()
            || open.body_len() >= FRAME_BYTES
            || now.since(open.base_time) >= MAX_FRAME_AGE
    }

    /// When the open frame becomes old enough to be closed; `None` if there is none.
    pub fn close_due(&self) -> Option<LogTime> {
        self.open.as_ref().map(|open| open.base_time.after(MAX_FRAME_AGE))
    }

    /// The next frame, oldest first; call it until it returns `None`.
    ///
    /// `durable_lsn` is what the log holds durably by now.
    pub fn close(&mut self, wall: LogTime, durable_lsn: Lsn) -> Option<Frame> {
        let mut open = self.full.pop_front().or_else(|| self.open.take())?;
        if self.is_empty() {
            self.wanted = false;
        }
        let frame = open.seal(self.epoch, wall, durable_lsn);
        self.spare = open.bytes;
        self.spare.shrink_to(SPARE_BYTES);
        Some(frame)
    }
}

/// A frame that still grows: room for the header, then the body.
#[derive(Debug)]
struct OpenFrame {
    bytes: Vec<u8>,
    first: Lsn,
    count: u32,
    base_time: LogTime,
    hash_before: ChainHash,
    hash_after: ChainHash,
    digest_after: Digest,
    usage: Usage,
}

impl OpenFrame {
    fn new<R>(mut bytes: Vec<u8>, entry: &Entry<R>, hash_before: ChainHash) -> OpenFrame {
        bytes.clear();
        bytes.resize(FRAME_HEADER_BYTES, 0);
        OpenFrame {
            bytes,
            first: entry.lsn,
            count: 0,
            base_time: entry.time,
            hash_before,
            hash_after: hash_before,
            digest_after: Digest::default(),
            usage: Usage::default(),
        }
    }

    fn body_len(&self) -> usize {
        self.bytes.len() - FRAME_HEADER_BYTES
    }

    fn delta(&self, time: LogTime) -> Option<u32> {
        u32::try_from(time.as_nanos().checked_sub(self.base_time.as_nanos())?).ok()
    }

    fn add<R: WrittenRow>(&mut self, entry: &Entry<R>, encoded: &EncodedBody, body: &[u8], said: &mut Said) {
        let delta = self.delta(entry.time).expect("push begins a new frame when the time does not fit");
        encoded.push_stored(entry, body, delta, said, &mut self.bytes);
        self.count += 1;
    }

    fn seal(&mut self, epoch: Epoch, wall_time: LogTime, durable_lsn: Lsn) -> Frame {
        debug_assert!(self.bytes.len() <= MAX_FRAME_BYTES);
        let length = u32::try_from(self.body_len()).expect("a frame is below its limit");
        let mut header = FrameHeader {
            feature_level: FEATURE_LEVEL,
            epoch,
            first: self.first,
            count: self.count,
            base_time: self.base_time,
            wall_time,
            durable_lsn: durable_lsn.min(self.first.previous()),
            hash_before: self.hash_before,
            hash_after: self.hash_after,
            digest_after: self.digest_after,
            usage: self.usage,
            body_len: length,
            raw_len: length,
            checksum: [0; 16],
        };
        header.checksum = header.checksum_with(&self.bytes[FRAME_HEADER_BYTES..]);
        self.bytes[..FRAME_HEADER_BYTES].copy_from_slice(&header.encode());
        // The copy has no spare capacity: frames may be kept for long.
        Frame::built(header, Bytes::copy_from_slice(&self.bytes))
    }
}

/// Why an entry was not taken; nothing has changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PushError {
    /// It is not the next one.
    #[error("expected entry {expected}, got entry {found}")]
    Gap {
        /// The LSN that comes next.
        expected: Lsn,
        /// The LSN of the entry.
        found: Lsn,
    },
    /// Its time is before that of the entry before it.
    #[error("the time of entry {lsn} runs backwards")]
    TimeBackwards {
        /// The entry.
        lsn: Lsn,
    },
    /// It cannot be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// A frame is closed when it has been open for so long.
const MAX_FRAME_AGE: Duration = Duration::from_millis(5);
/// At most so much memory is kept for the next frame.
const SPARE_BYTES: usize = 2 * FRAME_BYTES;

#[cfg(test)]
mod tests;
