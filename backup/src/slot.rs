//! The slot: a run of frames of one epoch as one object of an archive.
//!
//! ```text
//! | header, 256 bytes | frame headers, 184 bytes each | run table, 16 bytes each | stored bodies of each run |
//! ```
//!
//! Invariants:
//! - Frames are stored as they are: a reader puts header and body together again and checks the frame's own checksum.
//! - A run is stored compressed only if decompressing it gave the same bytes back.
//! - Every length is checked against a limit, and against the others, before anything is allocated or sliced.
//! - The header can be believed without the rest (it has its own checksum), the rest not without the header.

use bytes::Bytes;
use murphy_log::{
    BranchId, ChainHash, Epoch, EpochId, FRAME_HEADER_BYTES, Frame, FrameError, FrameHeader, LogTime, Lsn,
    MAX_FRAME_BYTES, NodeId, Position, UnverifiedFrame, VolumeId, VolumeKeys,
};

use crate::fields::{FieldReader, short_hash};

/// Whose history a slot or seal belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lineage {
    /// The volume.
    pub volume: VolumeId,
    /// The branch.
    pub branch: BranchId,
}

/// What a slot says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotHeader {
    /// Whose history it is.
    pub lineage: Lineage,
    /// The epoch of all its frames.
    pub epoch: Epoch,
    /// The first entry.
    pub first: Lsn,
    /// The last entry.
    pub last: Lsn,
    /// The node that wrote it.
    pub node: NodeId,
    /// The chain hash before the first entry.
    pub hash_before: ChainHash,
    /// The chain hash after the last entry.
    pub hash_after: ChainHash,
    /// The log time of the first entry.
    pub first_time: LogTime,
    /// The log time of the last entry.
    pub last_time: LogTime,
    /// The wall clock when the last frame was closed.
    pub wall_time: LogTime,
    /// How many frames it holds.
    pub frames: u32,
    /// The length of all bodies, in bytes.
    pub body_bytes: u64,
    /// The length of the object, in bytes.
    pub object_bytes: u64,
    runs: u32,
    rest_hash: [u8; 32],
}

impl SlotHeader {
    /// Reads the header at the start of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<SlotHeader, SlotError> {
        let Some(bytes) = bytes.first_chunk::<SLOT_HEADER_BYTES>() else {
            return Err(SlotError::Truncated { needed: SLOT_HEADER_BYTES as u64, have: bytes.len() as u64 });
        };
        if bytes[..8] != SLOT_MAGIC {
            return Err(SlotError::NotASlot);
        }
        let mut fields = FieldReader::new(&bytes[8..]);
        let version = fields.u16();
        if version != VERSION {
            return Err(SlotError::Version { found: version, known: VERSION });
        }
        if short_hash(&bytes[..HEADER_SUM_AT]) != bytes[HEADER_SUM_AT..] {
            return Err(SlotError::HeaderChecksum);
        }
        let reserved = fields.u16();
        let frames = fields.u32();
        let lineage = Lineage {
            volume: VolumeId::from_bytes(fields.bytes()),
            branch: BranchId::from_bytes(fields.bytes()),
        };
        let (epoch_number, runs) = (fields.u32(), fields.u32());
        let header = SlotHeader {
            lineage,
            epoch: Epoch { number: epoch_number, id: EpochId::from_bytes(fields.bytes()) },
            first: Lsn::new(fields.u64()),
            last: Lsn::new(fields.u64()),
            node: NodeId::from_bytes(fields.bytes()),
            hash_before: ChainHash::from_bytes(fields.bytes()),
            hash_after: ChainHash::from_bytes(fields.bytes()),
            first_time: LogTime::from_nanos(fields.u64()),
            last_time: LogTime::from_nanos(fields.u64()),
            wall_time: LogTime::from_nanos(fields.u64()),
            frames,
            body_bytes: fields.u64(),
            object_bytes: fields.u64(),
            runs,
            rest_hash: fields.bytes(),
        };
        header.check(reserved)?;
        Ok(header)
    }

    fn check(&self, reserved: u16) -> Result<(), SlotError> {
        let first = self.first;
        let refused = |at, what| Err(SlotError::Field { first, at, what });
        if reserved != 0 {
            return refused(10, "reserved bytes that are not zero");
        }
        if self.first < Lsn::FIRST || self.last < self.first || self.last.get() > LSN_LIMIT {
            return refused(72, "an impossible range of lsns");
        }
        let entries = self.last.since(self.first) + 1;
        if self.frames == 0 || u64::from(self.frames) > entries || self.frames > SLOT_FRAMES_MAX {
            return refused(12, "an impossible number of frames");
        }
        if self.runs == 0 || self.runs > self.frames {
            return refused(52, "an impossible number of runs");
        }
        if self.body_bytes > SLOT_BODY_BYTES_MAX {
            return refused(BODY_BYTES_AT, "bodies beyond the limit");
        }
        let tables = self.runs_end() as u64;
        if self.object_bytes < tables || self.object_bytes > tables + self.body_bytes {
            return refused(BODY_BYTES_AT + 8, "an impossible length");
        }
        Ok(())
    }

    fn encode(&self) -> [u8; SLOT_HEADER_BYTES] {
        let mut out = Vec::with_capacity(SLOT_HEADER_BYTES);
        out.extend_from_slice(&SLOT_MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.frames.to_le_bytes());
        out.extend_from_slice(self.lineage.volume.as_bytes());
        out.extend_from_slice(self.lineage.branch.as_bytes());
        out.extend_from_slice(&self.epoch.number.to_le_bytes());
        out.extend_from_slice(&self.runs.to_le_bytes());
        out.extend_from_slice(self.epoch.id.as_bytes());
        out.extend_from_slice(&self.first.get().to_le_bytes());
        out.extend_from_slice(&self.last.get().to_le_bytes());
        out.extend_from_slice(self.node.as_bytes());
        out.extend_from_slice(self.hash_before.as_bytes());
        out.extend_from_slice(self.hash_after.as_bytes());
        for time in [self.first_time, self.last_time, self.wall_time] {
            out.extend_from_slice(&time.as_nanos().to_le_bytes());
        }
        out.extend_from_slice(&self.body_bytes.to_le_bytes());
        out.extend_from_slice(&self.object_bytes.to_le_bytes());
        out.extend_from_slice(&self.rest_hash);
        let sum = short_hash(&out);
        out.extend_from_slice(&sum);
        out.try_into().expect("the fields add up to the length of the header")
    }

    /// The position after the last entry.
    pub fn end(&self) -> Position {
        Position { epoch: self.epoch, lsn: self.last, hash: self.hash_after }
    }

    fn headers_end(&self) -> usize {
        SLOT_HEADER_BYTES + self.frames as usize * FRAME_HEADER_BYTES
    }

    fn runs_end(&self) -> usize {
        self.headers_end() + self.runs as usize * RUN_BYTES
    }
}

/// A slot that was read: its frames are whole, and contiguous; that they continue a history is for [`Slot::verify`].
#[derive(Clone, Debug)]
pub struct Slot {
    /// What it says of itself.
    pub header: SlotHeader,
    frames: Vec<UnverifiedFrame>,
}

impl Slot {
    /// Reads a whole object.
    pub fn decode(bytes: &Bytes) -> Result<Slot, SlotError> {
        let header = SlotHeader::parse(bytes)?;
        if header.object_bytes != bytes.len() as u64 {
            return Err(SlotError::Truncated { needed: header.object_bytes, have: bytes.len() as u64 });
        }
        if blake3::hash(&bytes[SLOT_HEADER_BYTES..]) != header.rest_hash {
            return Err(SlotError::Checksum { first: header.first });
        }
        let slot = Slot { header, frames: read_frames(&header, bytes)? };
        slot.check_frames()?;
        Ok(slot)
    }

    /// The frames, if they continue the history that ends at `previous`.
    pub fn verify(self, keys: &VolumeKeys, previous: &Position) -> Result<Vec<Frame>, FrameError> {
        let mut previous = *previous;
        let verify = |frame: UnverifiedFrame| {
            let frame = frame.verify(keys, &previous)?;
            previous = frame.position();
            Ok(frame)
        };
        self.frames.into_iter().map(verify).collect()
    }

    /// The frames, on the slot's own word for what comes before them.
    pub fn verify_alone(self, keys: &VolumeKeys) -> Result<Vec<Frame>, FrameError> {
        let header = &self.header;
        let previous =
            Position { epoch: header.epoch, lsn: header.first.previous(), hash: header.hash_before };
        self.verify(keys, &previous)
    }

    /// What its frames say, without opening them.
    pub fn frame_headers(&self) -> impl Iterator<Item = &FrameHeader> {
        self.frames.iter().map(UnverifiedFrame::header)
    }

    /// The frame headers agree with the slot's header and with each other.
    fn check_frames(&self) -> Result<(), SlotError> {
        let slot = &self.header;
        let refused = |at, what| Err(SlotError::Field { first: slot.first, at, what });
        let mut end = (slot.first, slot.hash_before);
        for (number, header) in self.frame_headers().enumerate() {
            let at = SLOT_HEADER_BYTES + number * FRAME_HEADER_BYTES;
            if (header.first, header.hash_before) != end {
                return refused(at, "frames that do not follow each other");
            }
            if header.epoch != slot.epoch {
                return refused(at, "a frame of another epoch");
            }
            end = (header.last().next(), header.hash_after);
        }
        if end != (slot.last.next(), slot.hash_after) {
            return refused(80, "an end that its frames do not have");
        }
        Ok(())
    }
}

/// Makes the object of a run of frames, which are of one epoch and follow each other.
pub fn encode_slot(lineage: Lineage, node: NodeId, frames: &[Frame]) -> Result<Bytes, EncodeSlotError> {
    let (Some(first), Some(last)) = (frames.first(), frames.last()) else {
        return Err(EncodeSlotError::Empty);
    };
    if frames.iter().any(|frame| frame.epoch() != first.epoch()) {
        return Err(EncodeSlotError::Epochs { first: first.first() });
    }
    let body_bytes: u64 = frames.iter().map(|frame| u64::from(frame.header().body_len)).sum();
    if body_bytes > SLOT_BODY_BYTES_MAX || frames.len() > SLOT_FRAMES_MAX as usize {
        return Err(EncodeSlotError::TooLarge { first: first.first(), limit: SLOT_BODY_BYTES_MAX });
    }
    let mut compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(EncodeSlotError::Zstd)?;
    let runs: Vec<Run> = cut_runs(frames)
        .into_iter()
        .map(|run| Run::encode(run, &mut compressor))
        .collect::<Result<_, _>>()?;
    let mut rest = Vec::new();
    frames.iter().for_each(|frame| rest.extend_from_slice(&frame.bytes()[..FRAME_HEADER_BYTES]));
    runs.iter().for_each(|run| rest.extend_from_slice(&run.head()));
    runs.iter().for_each(|run| rest.extend_from_slice(&run.stored));
    let header = SlotHeader {
        lineage,
        epoch: first.epoch(),
        first: first.first(),
        last: last.last(),
        node,
        hash_before: first.previous_hash(),
        hash_after: last.position().hash,
        first_time: first.header().base_time,
        last_time: end_time(last),
        wall_time: last.header().wall_time,
        frames: frames.len() as u32,
        body_bytes,
        object_bytes: (SLOT_HEADER_BYTES + rest.len()) as u64,
        runs: runs.len() as u32,
        rest_hash: *blake3::hash(&rest).as_bytes(),
    };
    let mut object = Vec::with_capacity(SLOT_HEADER_BYTES + rest.len());
    object.extend_from_slice(&header.encode());
    object.extend_from_slice(&rest);
    Ok(object.into())
}

/// The log time of the last entry of a frame; of a frame that this version cannot open, when it was closed.
pub(crate) fn end_time(frame: &Frame) -> LogTime {
    let closed = frame.header().wall_time.max(frame.header().base_time);
    frame.iter().last().map_or(closed, |entry| entry.map_or(closed, |entry| entry.time))
}

/// The bodies of consecutive frames, stored together.
struct Run {
    frames: u32,
    raw_bytes: u32,
    encoding: u8,
    stored: Vec<u8>,
}

impl Run {
    fn encode(frames: &[Frame], compressor: &mut zstd::bulk::Compressor<'_>) -> Result<Run, EncodeSlotError> {
        let mut raw = Vec::new();
        frames.iter().for_each(|frame| raw.extend_from_slice(&frame.body()));
        let (count, raw_bytes) = (frames.len() as u32, raw.len() as u32);
        let packed = compressor.compress(&raw).map_err(EncodeSlotError::Zstd)?;
        // What the compressor made is trusted only after it has been turned back.
        let smaller = packed.len() < raw.len();
        let intact = smaller && zstd::bulk::decompress(&packed, raw.len()).is_ok_and(|back| back == raw);
        if smaller && !intact {
            let lsn = frames.first().map_or(0, |frame| frame.first().get());
            tracing::error!(lsn, "zstd did not give back what it was given; the run is stored plain");
        }
        let (encoding, stored) = if intact { (ENCODING_ZSTD, packed) } else { (ENCODING_PLAIN, raw) };
        Ok(Run { frames: count, raw_bytes, encoding, stored })
    }

    fn head(&self) -> [u8; RUN_BYTES] {
        let mut head = [0; RUN_BYTES];
        head[..4].copy_from_slice(&self.frames.to_le_bytes());
        head[4..8].copy_from_slice(&self.raw_bytes.to_le_bytes());
        head[8..12].copy_from_slice(&(self.stored.len() as u32).to_le_bytes());
        head[12] = self.encoding;
        head
    }
}

/// Cuts frames into runs whose bodies have about [`RUN_BODY_BYTES`].
fn cut_runs(frames: &[Frame]) -> Vec<&[Frame]> {
    let (mut runs, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (at, frame) in frames.iter().enumerate() {
        let body = frame.header().body_len as usize;
        if at > start && bytes + body > RUN_BODY_BYTES {
            runs.push(&frames[start..at]);
            (start, bytes) = (at, 0);
        }
        bytes += body;
    }
    runs.push(&frames[start..]);
    runs
}

/// Puts the frames of a slot together, whose header and checksum have been checked.
fn read_frames(header: &SlotHeader, bytes: &Bytes) -> Result<Vec<UnverifiedFrame>, SlotError> {
    let refused = |at, what| SlotError::Field { first: header.first, at, what };
    let runs = bytes[header.headers_end()..header.runs_end()].chunks_exact(RUN_BYTES);
    let mut headers = (SLOT_HEADER_BYTES..header.headers_end()).step_by(FRAME_HEADER_BYTES);
    let mut stored = &bytes[header.runs_end()..];
    let mut frames = Vec::with_capacity(header.frames as usize);
    let mut total = 0;
    for (number, run) in runs.enumerate() {
        let at = header.headers_end() + number * RUN_BYTES;
        let (count, raw) =
            open_run(run, &mut stored, header.body_bytes - total).map_err(|what| refused(at, what))?;
        total += raw.len() as u64;
        let mut bodies = raw.as_slice();
        for _ in 0..count {
            let head_at = headers.next().ok_or_else(|| refused(at, "more frames than it says"))?;
            let damaged = |source| SlotError::Frame { at: head_at, source };
            let head = FrameHeader::parse(&bytes[head_at..header.headers_end()]).map_err(damaged)?;
            let body = bodies.split_off(..head.body_len as usize);
            let body = body.ok_or_else(|| refused(head_at, "a body that is cut"))?;
            frames.push(Frame::from_parts(&head, body).map_err(damaged)?);
        }
        if !bodies.is_empty() {
            return Err(refused(at, "bytes after the last body of a run"));
        }
    }
    if headers.next().is_some() || !stored.is_empty() || total != header.body_bytes {
        return Err(refused(BODY_BYTES_AT, "more bytes than its runs have"));
    }
    Ok(frames)
}

/// Takes a run off the front of `stored`: how many frames it has, and their bodies, of at most `room` bytes.
fn open_run(run: &[u8], stored: &mut &[u8], room: u64) -> Result<(u32, Vec<u8>), &'static str> {
    let mut fields = FieldReader::new(run);
    let (count, raw_bytes, stored_bytes) = (fields.u32(), fields.u32() as usize, fields.u32() as usize);
    let encoding = fields.bytes::<4>();
    if count == 0 || raw_bytes > RUN_BYTES_MAX {
        return Err("an impossible run");
    }
    let part = stored.split_off(..stored_bytes).ok_or("an impossible run")?;
    // A few bytes expand to megabytes: what is too much is noticed before it is held.
    if raw_bytes as u64 > room {
        return Err("more bytes in its runs than it says");
    }
    let raw = match encoding {
        [ENCODING_PLAIN, 0, 0, 0] if raw_bytes == stored_bytes => part.to_vec(),
        [ENCODING_ZSTD, 0, 0, 0] => {
            zstd::bulk::decompress(part, raw_bytes).map_err(|_| "a run that does not decompress")?
        }
        _ => return Err("a run of unknown encoding"),
    };
    if raw.len() == raw_bytes { Ok((count, raw)) } else { Err("a run of another length") }
}

/// Why bytes are not a slot.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SlotError {
    /// They end too early, or go on too long.
    #[error("a slot of {needed} bytes ends at byte {have}")]
    Truncated {
        /// How many there should be.
        needed: u64,
        /// How many there are.
        have: u64,
    },
    /// They do not begin as a slot does.
    #[error("it is not a slot: it begins otherwise at byte 0")]
    NotASlot,
    /// A later version wrote them.
    #[error("the slot has format version {found} at byte 8, this version knows {known}")]
    Version {
        /// The version.
        found: u16,
        /// The version that can be read.
        known: u16,
    },
    /// The header is damaged.
    #[error("the header of the slot does not match its checksum at byte {HEADER_SUM_AT}")]
    HeaderChecksum,
    /// What follows the header is damaged.
    #[error("the slot at lsn {first} does not match its checksum at byte {REST_HASH_AT}")]
    Checksum {
        /// The first entry.
        first: Lsn,
    },
    /// It contradicts itself.
    #[error("the slot at lsn {first} has {what} at byte {at}")]
    Field {
        /// The first entry.
        first: Lsn,
        /// Where it says so, in bytes.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// One of its frames is damaged.
    #[error("the slot's frame whose header is at byte {at}: {source}")]
    Frame {
        /// Where its header stands, in bytes.
        at: usize,
        /// What is wrong with it.
        source: FrameError,
    },
}

/// Why frames cannot be made a slot.
#[derive(Debug, thiserror::Error)]
pub enum EncodeSlotError {
    /// There are none.
    #[error("a slot needs a frame")]
    Empty,
    /// They are of several epochs.
    #[error("the frames from lsn {first} are of several epochs")]
    Epochs {
        /// The first entry.
        first: Lsn,
    },
    /// They are too many.
    #[error("the frames from lsn {first} have more than {limit} bytes")]
    TooLarge {
        /// The first entry.
        first: Lsn,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The compressor failed.
    #[error("cannot compress: {0}")]
    Zstd(std::io::Error),
}

/// The first bytes of every slot.
pub const SLOT_MAGIC: [u8; 8] = *b"MurSlot\0";
/// The length of a slot's header, in bytes.
pub const SLOT_HEADER_BYTES: usize = 256;
/// No slot is longer, in bytes.
pub const SLOT_BYTES_MAX: u64 = SLOT_BODY_BYTES_MAX
    + (SLOT_FRAMES_MAX as usize * (FRAME_HEADER_BYTES + RUN_BYTES) + SLOT_HEADER_BYTES) as u64;
/// The bodies of a slot have at most so many bytes.
pub const SLOT_BODY_BYTES_MAX: u64 = 32 << 20;
/// A slot has at most so many frames.
pub const SLOT_FRAMES_MAX: u32 = 1 << 16;
const VERSION: u16 = 0;
/// Where the header has the length of all bodies, the hash of what follows it, and its own checksum.
const BODY_BYTES_AT: usize = 192;
const REST_HASH_AT: usize = HEADER_SUM_AT - 32;
const HEADER_SUM_AT: usize = SLOT_HEADER_BYTES - 16;
const RUN_BYTES: usize = 16;
/// A run is ended before its bodies exceed this, in bytes.
const RUN_BODY_BYTES: usize = 1 << 20;
/// A run of one frame may be longer.
const RUN_BYTES_MAX: usize = MAX_FRAME_BYTES;
const ENCODING_PLAIN: u8 = 0;
const ENCODING_ZSTD: u8 = 1;
const ZSTD_LEVEL: i32 = 3;
const LSN_LIMIT: u64 = 1 << 62;
const _: () = assert!(RUN_BODY_BYTES <= RUN_BYTES_MAX);

#[cfg(test)]
mod tests;
