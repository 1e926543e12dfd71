//! Frames: the entries of one group commit, with everything that a reader needs to order and check them.
//!
//! Invariants:
//! - A [`Frame`] has been checked: limits, checksum, linkage to the frame before it, and, if this version knows its feature
//!   level, the chain over its entries. [`UnverifiedFrame`] has passed only what it can prove alone.
//! - The stored form is never changed: the bytes on disk, on the wire and in an archive carry the same checksum.
//! - A frame of an unknown feature level can be checked, linked, stored and forwarded; only its entries stay closed.

mod header;

use bytes::Bytes;

use crate::{ChainHash, DecodeError, Entry, Epoch, Lsn, Position, State, VolumeKeys, entry::StoredEntries};

use header::{BODY_LEN_AT, CHECKSUM_AT};
pub use header::{FEATURE_LEVEL, FRAME_HEADER_BYTES, FRAME_MAGIC, FrameHeader};

/// A frame of which only the form and the checksum are known to be right.
#[derive(Clone, Debug)]
pub struct UnverifiedFrame {
    header: FrameHeader,
    bytes: Bytes,
}

impl UnverifiedFrame {
    /// Reads the frame that begins at `offset` of `bytes`, and says where the next one would begin.
    ///
    /// The frame shares the memory of `bytes`.
    pub fn parse(bytes: &Bytes, offset: usize) -> Result<(UnverifiedFrame, usize), FrameError> {
        let rest = bytes.get(offset..).unwrap_or_default();
        let header = FrameHeader::parse(rest)?;
        let length = header.frame_len();
        if rest.len() < length {
            return Err(FrameError::Truncated { needed: length, have: rest.len() });
        }
        let end = offset + length;
        let bytes = bytes.slice(offset..end);
        header.check_sum(&bytes[FRAME_HEADER_BYTES..])?;
        Ok((UnverifiedFrame { header, bytes }, end))
    }

    /// What the header says.
    pub fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// The stored form.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Checks that the frame continues the history that ends at `previous`, and the chain over its entries.
    pub fn verify(self, keys: &VolumeKeys, previous: &Position) -> Result<Frame, FrameError> {
        self.header.follows(previous)?;
        if !self.header.is_foreign() {
            let found = self.rechain(keys)?;
            if found != self.header.hash_after {
                return Err(FrameError::Chain { lsn: self.header.first });
            }
        }
        Ok(Frame { header: self.header, bytes: self.bytes })
    }

    /// Computes the chain hash after the last entry from the bodies.
    fn rechain(&self, keys: &VolumeKeys) -> Result<ChainHash, FrameError> {
        let header = &self.header;
        let mut entries =
            StoredEntries::new(&self.bytes[FRAME_HEADER_BYTES..], header.first, header.base_time);
        let (mut hash, mut link) = (header.hash_before, Vec::new());
        for _ in 0..header.count {
            entries.next_link(&hash, &mut link)?;
            hash = keys.chained(&link);
        }
        entries.finish()?;
        Ok(hash)
    }
}

/// A frame that continues a known history. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Frame {
    header: FrameHeader,
    bytes: Bytes,
}

impl Frame {
    /// Puts a frame together from a header and a body that travelled apart; the checksum must fit both.
    pub fn from_parts(header: &FrameHeader, body: &[u8]) -> Result<UnverifiedFrame, FrameError> {
        if body.len() != header.body_len as usize {
            return Err(FrameError::Header {
                lsn: header.first,
                at: BODY_LEN_AT,
                what: "a body of another length",
            });
        }
        let mut bytes = Vec::with_capacity(FRAME_HEADER_BYTES + body.len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(body);
        let (frame, _) = UnverifiedFrame::parse(&Bytes::from(bytes), 0)?;
        Ok(frame)
    }

    /// A frame that this process has just built: `bytes` are a sealed header and its body.
    pub(crate) fn built(header: FrameHeader, bytes: Bytes) -> Frame {
        debug_assert_eq!(bytes.len(), header.frame_len());
        Frame { header, bytes }
    }

    /// What the header says.
    pub fn header(&self) -> &FrameHeader {
        &self.header
    }

    /// The LSN of the first entry.
    pub fn first(&self) -> Lsn {
        self.header.first
    }

    /// The LSN of the last entry.
    pub fn last(&self) -> Lsn {
        self.header.last()
    }

    /// The epoch that the entries belong to.
    pub fn epoch(&self) -> Epoch {
        self.header.epoch
    }

    /// The chain hash before the first entry.
    pub fn previous_hash(&self) -> ChainHash {
        self.header.hash_before
    }

    /// The position after the last entry.
    pub fn position(&self) -> Position {
        Position { epoch: self.header.epoch, lsn: self.last(), hash: self.header.hash_after }
    }

    /// Everything known about the state after the last entry.
    pub fn state(&self) -> State {
        State { position: self.position(), digest: self.header.digest_after, usage: self.header.usage }
    }

    /// The stored form: header and body.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The stored body.
    pub fn body(&self) -> Bytes {
        self.bytes.slice(FRAME_HEADER_BYTES..)
    }

    /// All entries.
    pub fn entries(&self) -> Result<Vec<Entry>, DecodeError> {
        self.iter().collect()
    }

    /// The entries one by one; after an error nothing follows.
    pub fn iter(&self) -> Entries<'_> {
        let header = &self.header;
        let stored = StoredEntries::new(&self.bytes[FRAME_HEADER_BYTES..], header.first, header.base_time);
        Entries { header, stored, left: header.count }
    }
}

impl<'a> IntoIterator for &'a Frame {
    type Item = Result<Entry, DecodeError>;
    type IntoIter = Entries<'a>;
    fn into_iter(self) -> Entries<'a> {
        self.iter()
    }
}

/// The entries of a frame, decoded one by one.
#[derive(Debug)]
pub struct Entries<'a> {
    header: &'a FrameHeader,
    stored: StoredEntries<'a>,
    left: u32,
}

impl Entries<'_> {
    fn decode_next(&mut self) -> Result<Entry, DecodeError> {
        let header = self.header;
        if header.is_foreign() {
            let level = header.feature_level;
            return Err(DecodeError::FeatureLevel { lsn: header.first, level, known: FEATURE_LEVEL });
        }
        self.stored.next_entry()
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry, DecodeError>;

    fn next(&mut self) -> Option<Result<Entry, DecodeError>> {
        self.left = self.left.checked_sub(1)?;
        let entry = self.decode_next();
        if entry.is_err() {
            self.left = 0;
        }
        Some(entry)
    }
}

/// Why bytes are not a frame, or not the frame that was expected.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// The bytes end before the frame does.
    #[error("a frame of {needed} bytes ends at byte {have}")]
    Truncated {
        /// How many bytes it needs.
        needed: usize,
        /// How many there are.
        have: usize,
    },
    /// The bytes do not begin as a frame does.
    #[error("no frame begins here, at byte 0 of what should be one")]
    NotAFrame,
    /// A field of the header has an impossible value.
    #[error("frame at lsn {lsn} has a damaged header: {what} at byte {at}")]
    Header {
        /// The first entry, as far as the header can be believed.
        lsn: Lsn,
        /// Where in the frame, in bytes.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// The stored bytes are not those that were written.
    #[error("frame at lsn {lsn} does not match its checksum at byte {CHECKSUM_AT}")]
    Checksum {
        /// The first entry, as far as the header can be believed.
        lsn: Lsn,
    },
    /// The frame is not the next one.
    #[error("expected the frame at lsn {expected}, found lsn {found}")]
    Gap {
        /// The LSN that should come next.
        expected: Lsn,
        /// The first LSN of the frame.
        found: Lsn,
    },
    /// The frame continues another history.
    #[error("frame at lsn {lsn} continues another history")]
    Fork {
        /// The first entry.
        lsn: Lsn,
    },
    /// The frame is of an epoch that has ended.
    #[error("frame at lsn {lsn} is of epoch {found}, after epoch {current}")]
    Epoch {
        /// The first entry.
        lsn: Lsn,
        /// The epoch of the frame.
        found: Epoch,
        /// The epoch of the history before it.
        current: Epoch,
    },
    /// The entries are not those that the chain hash was computed over.
    #[error("the entries of the frame at lsn {lsn} do not match its chain hash")]
    Chain {
        /// The first entry.
        lsn: Lsn,
    },
    /// An entry is malformed.
    #[error(transparent)]
    Entry(#[from] DecodeError),
}

/// A frame is closed when its body has reached this many bytes.
pub const FRAME_BYTES: usize = 64 << 10;
/// No frame is larger, header included: room for a nearly full frame and one entry of the largest size.
pub const MAX_FRAME_BYTES: usize = 2 << 20;
const _: () = assert!(
    FRAME_HEADER_BYTES + FRAME_BYTES + crate::MAX_ENTRY_BYTES + crate::MAX_CHANGES + 16 <= MAX_FRAME_BYTES
);

#[cfg(test)]
mod tests;
