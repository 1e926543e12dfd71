//! The header of a segment.
//!
//! Invariants:
//! - Little-endian, fixed size, reserved bytes zero, checksum over everything before it.
//! - It holds the whole state before its first entry: a log that begins with this segment needs nothing older.
//! - All segments of a log have the same secret: whoever makes a header anew takes it from another one.

use super::{LOG_SECRET_BYTES, LogSecret, Marks};
use crate::{BranchId, ChainHash, Digest, Epoch, EpochId, Lsn, Position, State, Usage, VolumeId};

/// What the first bytes of a segment say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// How bodies are sealed; 0 is not at all.
    pub cipher: u8,
    /// The key that they are sealed with; 0 if they are not.
    pub key_id: u32,
    /// The volume.
    pub volume: VolumeId,
    /// The branch.
    pub branch: BranchId,
    /// The epoch of the frames.
    pub epoch: Epoch,
    /// The state before the first entry.
    pub base: State,
    /// The first entry of the segment before it; `None` if there was none, or if that is not known.
    pub previous: Option<Lsn>,
    /// What the marks of the log are made of.
    pub secret: LogSecret,
}

impl SegmentHeader {
    /// The header of a segment that is not sealed and has no known segment before it.
    pub fn plain(
        volume: VolumeId,
        branch: BranchId,
        epoch: Epoch,
        base: State,
        secret: LogSecret,
    ) -> SegmentHeader {
        SegmentHeader { cipher: 0, key_id: 0, volume, branch, epoch, base, previous: None, secret }
    }

    /// Reads a header; the checksum first, then what it says.
    pub fn parse(bytes: &[u8]) -> Result<SegmentHeader, HeaderError> {
        let Some(bytes) = bytes.first_chunk::<SEGMENT_HEADER_BYTES>() else {
            return Err(HeaderError::Truncated { have: bytes.len() });
        };
        if bytes[..8] != SEGMENT_MAGIC {
            return Err(HeaderError::NotASegment);
        }
        // The version comes before the checksum: another version may have its checksum elsewhere.
        let version = u16::from_le_bytes(field(bytes, VERSION_AT));
        if version != SEGMENT_VERSION {
            return Err(HeaderError::Version { found: version, known: SEGMENT_VERSION });
        }
        if checksum(bytes) != field(bytes, CHECKSUM_AT) {
            return Err(HeaderError::Checksum);
        }
        if let Some(at) = [11].into_iter().chain(RESERVED_AT..CHECKSUM_AT).find(|at| bytes[*at] != 0) {
            return Err(HeaderError::Reserved { at });
        }
        let first = Lsn::new(u64::from_le_bytes(field(bytes, FIRST_AT)));
        if first < Lsn::FIRST || first == Lsn::MAX {
            return Err(HeaderError::FirstLsn { first, at: FIRST_AT });
        }
        let previous = match u64::from_le_bytes(field(bytes, PREVIOUS_AT)) {
            0 => None,
            previous => Some(Lsn::new(previous)),
        };
        if let Some(previous) = previous.filter(|previous| !(Lsn::FIRST..first).contains(previous)) {
            return Err(HeaderError::FirstLsn { first: previous, at: PREVIOUS_AT });
        }
        let epoch_at = |at| Epoch {
            number: u32::from_le_bytes(field(bytes, at)),
            id: EpochId::from_bytes(field(bytes, at + 4)),
        };
        let hash = ChainHash::from_bytes(field(bytes, 96));
        Ok(SegmentHeader {
            cipher: bytes[10],
            key_id: u32::from_le_bytes(field(bytes, 12)),
            volume: VolumeId::from_bytes(field(bytes, VOLUME_AT)),
            branch: BranchId::from_bytes(field(bytes, BRANCH_AT)),
            epoch: epoch_at(48),
            base: State {
                position: Position { epoch: epoch_at(68), lsn: first.previous(), hash },
                digest: Digest(u128::from_le_bytes(field(bytes, 128))),
                usage: Usage {
                    inodes: u64::from_le_bytes(field(bytes, 144)),
                    bytes: u64::from_le_bytes(field(bytes, 152)),
                },
            },
            previous,
            secret: LogSecret::from_bytes(field(bytes, SECRET_AT)),
        })
    }

    /// The stored form.
    pub fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let base = &self.base;
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        bytes[..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..10].copy_from_slice(&SEGMENT_VERSION.to_le_bytes());
        bytes[10] = self.cipher;
        bytes[12..16].copy_from_slice(&self.key_id.to_le_bytes());
        bytes[16..32].copy_from_slice(self.volume.as_bytes());
        bytes[32..48].copy_from_slice(self.branch.as_bytes());
        bytes[48..52].copy_from_slice(&self.epoch.number.to_le_bytes());
        bytes[52..68].copy_from_slice(self.epoch.id.as_bytes());
        bytes[68..72].copy_from_slice(&base.position.epoch.number.to_le_bytes());
        bytes[72..88].copy_from_slice(base.position.epoch.id.as_bytes());
        bytes[88..96].copy_from_slice(&self.first().get().to_le_bytes());
        bytes[96..128].copy_from_slice(base.position.hash.as_bytes());
        bytes[128..144].copy_from_slice(&base.digest.0.to_le_bytes());
        bytes[144..152].copy_from_slice(&base.usage.inodes.to_le_bytes());
        bytes[152..160].copy_from_slice(&base.usage.bytes.to_le_bytes());
        bytes[160..168].copy_from_slice(&self.previous.map_or(0, Lsn::get).to_le_bytes());
        bytes[SECRET_AT..RESERVED_AT].copy_from_slice(self.secret.as_bytes());
        let sum = checksum(&bytes);
        bytes[CHECKSUM_AT..].copy_from_slice(&sum);
        bytes
    }

    /// The LSN of the first entry.
    pub fn first(&self) -> Lsn {
        self.base.position.lsn.next()
    }

    /// The marks of the segment.
    pub(crate) fn marks(&self) -> Marks {
        Marks::new(&self.secret, self.first())
    }
}

fn checksum(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> [u8; 16] {
    let mut sum = [0; 16];
    sum.copy_from_slice(&blake3::hash(&bytes[..CHECKSUM_AT]).as_bytes()[..16]);
    sum
}

fn field<const N: usize>(bytes: &[u8; SEGMENT_HEADER_BYTES], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

/// Why bytes are not the header of a segment that this version can use.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HeaderError {
    /// There are too few.
    #[error("a segment header of {SEGMENT_HEADER_BYTES} bytes ends at byte {have}")]
    Truncated {
        /// How many there are.
        have: usize,
    },
    /// They begin otherwise.
    #[error("not a segment: it begins otherwise at byte 0")]
    NotASegment,
    /// Another version wrote it.
    #[error("a segment of format version {found} at byte {VERSION_AT}, this program reads version {known}")]
    Version {
        /// Its version.
        found: u16,
        /// The version that can be read.
        known: u16,
    },
    /// They are damaged.
    #[error("a damaged segment header: the checksum at byte {CHECKSUM_AT} is of other bytes")]
    Checksum,
    /// Bytes that this version keeps zero are not.
    #[error("a segment header with reserved bytes that are not zero, at byte {at}")]
    Reserved {
        /// The first of them.
        at: usize,
    },
    /// The first LSN, or that of the segment before, cannot be.
    #[error("a segment header with the impossible lsn {first} at byte {at}")]
    FirstLsn {
        /// What it says.
        first: Lsn,
        /// Where.
        at: usize,
    },
    /// The name of the file says another first LSN.
    #[error("a segment that begins at lsn {first}, as byte {FIRST_AT} says, under another name")]
    Name {
        /// What the header says.
        first: Lsn,
    },
    /// It belongs to another volume.
    #[error("a segment of volume {found}, as byte {VOLUME_AT} says")]
    Volume {
        /// The volume that it belongs to.
        found: VolumeId,
    },
    /// It belongs to another branch.
    #[error("a segment of branch {found}, as byte {BRANCH_AT} says")]
    Branch {
        /// The branch that it belongs to.
        found: BranchId,
    },
}

/// The first bytes of every segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"MurphySg";
/// The version of the format that is written and read.
pub const SEGMENT_VERSION: u16 = 0;
/// The length of a segment header, in bytes.
pub const SEGMENT_HEADER_BYTES: usize = 224;
const VERSION_AT: usize = 8;
const VOLUME_AT: usize = 16;
const BRANCH_AT: usize = 32;
const FIRST_AT: usize = 88;
const PREVIOUS_AT: usize = 160;
const SECRET_AT: usize = 168;
const RESERVED_AT: usize = SECRET_AT + LOG_SECRET_BYTES;
const CHECKSUM_AT: usize = SEGMENT_HEADER_BYTES - 16;
