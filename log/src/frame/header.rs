//! The fixed-size header of a frame, in clear; `docs/formats/segment.md` has its byte ruler.
//!
//! Invariants:
//! - All numbers are little-endian; the reserved bytes are zero.
//! - The checksum is over every other byte of the header and over the stored body.

use super::{FrameError, MAX_FRAME_BYTES};
use crate::{ChainHash, Digest, Epoch, EpochId, LogTime, Lsn, MAX_ENTRY_BYTES, Position, Usage};

/// What is known of a frame without opening its body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Which entries it may hold; see [`FEATURE_LEVEL`].
    pub feature_level: u16,
    /// The epoch of its entries.
    pub epoch: Epoch,
    /// The LSN of its first entry.
    pub first: Lsn,
    /// How many entries it holds; at least one.
    pub count: u32,
    /// The log time that the entries' times are relative to.
    pub base_time: LogTime,
    /// The wall clock when the frame was closed.
    pub wall_time: LogTime,
    /// What was durable at the source when the frame was closed.
    pub durable_lsn: Lsn,
    /// The chain hash before the first entry.
    pub hash_before: ChainHash,
    /// The chain hash after the last entry.
    pub hash_after: ChainHash,
    /// The digest of the tree after the last entry.
    pub digest_after: Digest,
    /// The size of the tree after the last entry.
    pub usage: Usage,
    /// The length of the stored body, in bytes.
    pub body_len: u32,
    /// The length of the body before it was sealed, in bytes; the same if the volume is not encrypted.
    pub raw_len: u32,
    /// The checksum of header and stored body.
    pub checksum: [u8; CHECKSUM_BYTES],
}

impl FrameHeader {
    /// Reads a header and checks every limit; the checksum needs the body too.
    pub fn parse(bytes: &[u8]) -> Result<FrameHeader, FrameError> {
        let Some(bytes) = bytes.first_chunk::<FRAME_HEADER_BYTES>() else {
            return Err(FrameError::Truncated { needed: FRAME_HEADER_BYTES, have: bytes.len() });
        };
        if bytes[..4] != FRAME_MAGIC {
            return Err(FrameError::NotAFrame);
        }
        let header = FrameHeader {
            feature_level: u16::from_le_bytes(field(bytes, 4)),
            first: Lsn::new(u64::from_le_bytes(field(bytes, 8))),
            count: u32::from_le_bytes(field(bytes, 16)),
            epoch: Epoch {
                number: u32::from_le_bytes(field(bytes, 20)),
                id: EpochId::from_bytes(field(bytes, 24)),
            },
            base_time: LogTime::from_nanos(u64::from_le_bytes(field(bytes, 40))),
            wall_time: LogTime::from_nanos(u64::from_le_bytes(field(bytes, 48))),
            durable_lsn: Lsn::new(u64::from_le_bytes(field(bytes, 56))),
            hash_before: ChainHash::from_bytes(field(bytes, 64)),
            hash_after: ChainHash::from_bytes(field(bytes, 96)),
            digest_after: Digest(u128::from_le_bytes(field(bytes, 128))),
            usage: Usage {
                inodes: u64::from_le_bytes(field(bytes, 144)),
                bytes: u64::from_le_bytes(field(bytes, 152)),
            },
            body_len: u32::from_le_bytes(field(bytes, BODY_LEN_AT)),
            raw_len: u32::from_le_bytes(field(bytes, 164)),
            checksum: field(bytes, CHECKSUM_AT),
        };
        if bytes[6..8] != [0, 0] {
            let what = "reserved bytes that are not zero";
            return Err(FrameError::Header { lsn: header.first, at: 6, what });
        }
        header.check_limits()?;
        Ok(header)
    }

    /// The stored form.
    pub fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        bytes[..4].copy_from_slice(&FRAME_MAGIC);
        bytes[4..6].copy_from_slice(&self.feature_level.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.first.get().to_le_bytes());
        bytes[16..20].copy_from_slice(&self.count.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.epoch.number.to_le_bytes());
        bytes[24..40].copy_from_slice(self.epoch.id.as_bytes());
        bytes[40..48].copy_from_slice(&self.base_time.as_nanos().to_le_bytes());
        bytes[48..56].copy_from_slice(&self.wall_time.as_nanos().to_le_bytes());
        bytes[56..64].copy_from_slice(&self.durable_lsn.get().to_le_bytes());
        bytes[64..96].copy_from_slice(self.hash_before.as_bytes());
        bytes[96..128].copy_from_slice(self.hash_after.as_bytes());
        bytes[128..144].copy_from_slice(&self.digest_after.0.to_le_bytes());
        bytes[144..152].copy_from_slice(&self.usage.inodes.to_le_bytes());
        bytes[152..160].copy_from_slice(&self.usage.bytes.to_le_bytes());
        bytes[160..164].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[164..168].copy_from_slice(&self.raw_len.to_le_bytes());
        bytes[CHECKSUM_AT..].copy_from_slice(&self.checksum);
        bytes
    }

    /// The LSN of the last entry.
    pub fn last(&self) -> Lsn {
        self.first.advanced(u64::from(self.count) - 1)
    }

    /// The length of the stored frame, header included, in bytes.
    pub fn frame_len(&self) -> usize {
        FRAME_HEADER_BYTES + self.body_len as usize
    }

    /// Whether a later version wrote it, with entries that this one cannot read.
    pub fn is_foreign(&self) -> bool {
        self.feature_level > FEATURE_LEVEL
    }

    /// Checks that the frame may come after `previous`.
    pub fn follows(&self, previous: &Position) -> Result<(), FrameError> {
        let (lsn, expected) = (self.first, previous.lsn.next());
        if lsn != expected {
            return Err(FrameError::Gap { expected, found: lsn });
        }
        if self.hash_before != previous.hash {
            return Err(FrameError::Fork { lsn });
        }
        let (found, current) = (self.epoch, previous.epoch);
        if found.number < current.number || (found.number == current.number && found.id != current.id) {
            return Err(FrameError::Epoch { lsn, found, current });
        }
        Ok(())
    }

    /// Computes the checksum over the header and `body`.
    pub(crate) fn checksum_with(&self, body: &[u8]) -> [u8; CHECKSUM_BYTES] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.encode()[..CHECKSUM_AT]).update(body);
        let mut sum = [0; CHECKSUM_BYTES];
        sum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
        sum
    }

    pub(super) fn check_sum(&self, body: &[u8]) -> Result<(), FrameError> {
        if self.checksum_with(body) == self.checksum {
            Ok(())
        } else {
            Err(FrameError::Checksum { lsn: self.first })
        }
    }

    fn check_limits(&self) -> Result<(), FrameError> {
        let refused = |at, what| Err(FrameError::Header { lsn: self.first, at, what });
        if self.frame_len() > MAX_FRAME_BYTES || self.raw_len as usize > MAX_FRAME_BYTES {
            return refused(BODY_LEN_AT, "a length beyond the limit");
        }
        if self.count == 0 || self.count as usize > MAX_FRAME_BYTES {
            return refused(16, "an impossible number of entries");
        }
        if self.first < Lsn::FIRST || self.first.get() > LSN_LIMIT {
            return refused(8, "an impossible lsn");
        }
        if self.durable_lsn >= self.first {
            return refused(56, "a durable lsn that is not below its own");
        }
        if !self.is_foreign() && self.raw_len as usize > self.count as usize * (MAX_ENTRY_BYTES + 4) {
            return refused(BODY_LEN_AT, "a body longer than its entries");
        }
        Ok(())
    }
}

/// `N` bytes of the header.
fn field<const N: usize>(bytes: &[u8; FRAME_HEADER_BYTES], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

/// The first bytes of every frame.
pub const FRAME_MAGIC: [u8; 4] = *b"MfrX";
/// The length of a frame header, in bytes.
pub const FRAME_HEADER_BYTES: usize = 184;
/// The highest feature level whose entries this version can read; it writes this one.
pub const FEATURE_LEVEL: u16 = 0;
const CHECKSUM_BYTES: usize = 16;
/// Where the length of the body stands.
pub(super) const BODY_LEN_AT: usize = 160;
pub(super) const CHECKSUM_AT: usize = FRAME_HEADER_BYTES - CHECKSUM_BYTES;
/// Far beyond what can be reached, and far enough from the end of 64 bits that LSNs can be added to.
const LSN_LIMIT: u64 = 1 << 62;
const _: () = assert!(CHECKSUM_AT == 168);
