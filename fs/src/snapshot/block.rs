//! Blocks: the checksummed parts that a snapshot file is made of between its header and its trailer.
//!
//! ```text
//!   0      1         2      4         8        12        16         32
//!   | kind | streams | zero | length  | rows   | ordinal | checksum | payload, `length` bytes
//! ```
//!
//! Invariants:
//! - The checksum covers everything else of the block, its place in the file included.
//! - Nothing of a block is looked at before its checksum agrees.

use std::io::{self, Read};

/// What a block holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum BlockKind {
    /// Dentries, sorted by name within a directory.
    Names = 1,
    /// Inodes with directory rows and extents.
    Inodes = 2,
    /// Rows as they are.
    Rows = 3,
    /// Counts and the list of blocks; the last one.
    Footer = 255,
}

/// The head of a block, checksum apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct BlockHead {
    pub(super) kind: BlockKind,
    pub(super) streams: u8,
    /// Length of the payload.
    pub(super) length: u32,
    /// Elements in it: dentries, inodes, rows; 0 in a footer.
    pub(super) rows: u32,
    /// How many blocks come before it.
    pub(super) ordinal: u32,
}

impl BlockHead {
    /// The complete block around `payload`, for which the first [`BLOCK_HEAD_BYTES`] of `block` are kept free.
    pub(super) fn seal(&self, block: &mut [u8]) {
        let (head, payload) = block.split_at_mut(BLOCK_HEAD_BYTES);
        head[0] = self.kind as u8;
        head[1] = self.streams;
        head[2..4].copy_from_slice(&[0; 2]);
        head[4..8].copy_from_slice(&self.length.to_le_bytes());
        head[8..12].copy_from_slice(&self.rows.to_le_bytes());
        head[12..16].copy_from_slice(&self.ordinal.to_le_bytes());
        let checksum = checksum(&head[..FIELD_BYTES], payload);
        head[FIELD_BYTES..].copy_from_slice(&checksum);
    }

    fn parse(head: &[u8; BLOCK_HEAD_BYTES]) -> Result<BlockHead, BlockFault> {
        let kind = match head[0] {
            1 => BlockKind::Names,
            2 => BlockKind::Inodes,
            3 => BlockKind::Rows,
            255 => BlockKind::Footer,
            _ => return Err(BlockFault("a block is of an unknown kind")),
        };
        let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let parsed =
            BlockHead { kind, streams: head[1], length: number(4), rows: number(8), ordinal: number(12) };
        if head[2..4] != [0; 2] {
            return Err(BlockFault("a block has an unknown flag"));
        }
        if parsed.length as usize > PAYLOAD_MAX || parsed.rows as usize > BLOCK_ROWS {
            return Err(BlockFault("a block is too large"));
        }
        Ok(parsed)
    }
}

/// A block as it was read, not yet checked.
pub(super) struct StoredBlock {
    pub(super) head: BlockHead,
    bytes: Vec<u8>,
}

impl StoredBlock {
    /// Reads one block. A length beyond the limits is refused before anything is allocated for it.
    pub(super) fn read(input: &mut dyn Read) -> Result<StoredBlock, ReadBlockError> {
        let mut bytes = vec![0; BLOCK_HEAD_BYTES];
        input.read_exact(&mut bytes)?;
        let head = bytes.first_chunk().expect("the head was just read");
        let head = BlockHead::parse(head)?;
        let wanted = u64::from(head.length);
        if input.take(wanted).read_to_end(&mut bytes)? as u64 != wanted {
            return Err(ReadBlockError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(StoredBlock { head, bytes })
    }

    /// A block that was just made.
    pub(super) fn new(head: BlockHead, bytes: Vec<u8>) -> StoredBlock {
        StoredBlock { head, bytes }
    }

    /// The payload, once the checksum agrees and the block is the one at `ordinal`.
    pub(super) fn verified(&self, ordinal: u32) -> Result<&[u8], BlockFault> {
        let (head, payload) = self.bytes.split_at(BLOCK_HEAD_BYTES);
        if checksum(&head[..FIELD_BYTES], payload) != head[FIELD_BYTES..] {
            return Err(BlockFault("its checksum does not match"));
        }
        if self.head.ordinal != ordinal {
            return Err(BlockFault("a block is at another's place"));
        }
        Ok(payload)
    }

    /// Everything of the block as it is in the file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Bytes that cannot be a block of a snapshot, though their checksum may agree.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct BlockFault(pub(super) &'static str);

/// Why a block could not be read.
#[derive(Debug)]
pub(super) enum ReadBlockError {
    Io(io::Error),
    Fault(BlockFault),
}

impl From<io::Error> for ReadBlockError {
    fn from(error: io::Error) -> ReadBlockError {
        ReadBlockError::Io(error)
    }
}

impl From<BlockFault> for ReadBlockError {
    fn from(fault: BlockFault) -> ReadBlockError {
        ReadBlockError::Fault(fault)
    }
}

fn checksum(fields: &[u8], payload: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(fields).update(payload);
    let mut checksum = [0; CHECKSUM_BYTES];
    checksum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
    checksum
}

/// The most elements of one block.
pub(super) const BLOCK_ROWS: usize = 32 << 10;
/// Length of a block's head.
pub(super) const BLOCK_HEAD_BYTES: usize = FIELD_BYTES + CHECKSUM_BYTES;
const FIELD_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 16;
/// The longest payload: what no compressor can make longer than its plain bytes and their headers.
const PAYLOAD_MAX: usize = 32 << 20;
