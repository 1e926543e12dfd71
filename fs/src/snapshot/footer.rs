//! The footer, which says what the file must have held, and the trailer, which says that it is whole.
//!
//! Invariants:
//! - A reader builds the footer that it expects from what it read and compares: nothing in a footer is used unchecked.
//! - A file without footer and trailer, or with bytes after them, is not a snapshot.

use murphy_log::Digest;

use super::block::{BLOCK_HEAD_BYTES, BlockFault, BlockHead, BlockKind, StoredBlock};

/// What is known of the blocks before the footer.
#[derive(Default)]
pub(super) struct BlockList {
    entries: Vec<u8>,
    count: u32,
    hasher: blake3::Hasher,
}

impl BlockList {
    /// How many blocks there are.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Adds the next block.
    pub(super) fn push(&mut self, block: &StoredBlock) {
        self.entries.push(block.head.kind as u8);
        self.entries.extend_from_slice(&block.head.length.to_le_bytes());
        self.entries.extend_from_slice(&block.head.rows.to_le_bytes());
        self.hasher.update(&block.bytes()[..BLOCK_HEAD_BYTES]);
        self.count += 1;
    }

    /// The footer block after these blocks, with `rows` per table and their `digest`.
    pub(super) fn footer(&self, rows: &[(u8, u64)], digest: Digest) -> Result<StoredBlock, BlockFault> {
        let mut bytes = vec![0; BLOCK_HEAD_BYTES];
        bytes.extend_from_slice(&digest.0.to_le_bytes());
        bytes.extend_from_slice(self.hasher.finalize().as_bytes());
        bytes.push(rows.len() as u8);
        for (table, count) in rows {
            bytes.push(*table);
            bytes.extend_from_slice(&count.to_le_bytes());
        }
        bytes.extend_from_slice(&self.count.to_le_bytes());
        bytes.extend_from_slice(&self.entries);
        let length = u32::try_from(bytes.len() - BLOCK_HEAD_BYTES).ok();
        let length = length.filter(|length| *length <= FOOTER_MAX).ok_or(BlockFault("too many blocks"))?;
        let head = BlockHead { kind: BlockKind::Footer, streams: 0, length, rows: 0, ordinal: self.count };
        head.seal(&mut bytes);
        Ok(StoredBlock::new(head, bytes))
    }
}

/// The trailer after `footer`.
pub(super) fn trailer(footer: &StoredBlock) -> [u8; TRAILER_BYTES] {
    let mut bytes = [0; TRAILER_BYTES];
    bytes[..8].copy_from_slice(&(footer.bytes().len() as u64).to_le_bytes());
    bytes[8..].copy_from_slice(&TRAILER_MAGIC);
    bytes
}

/// Length of the trailer.
pub(super) const TRAILER_BYTES: usize = 16;
const TRAILER_MAGIC: [u8; 8] = *b"MURPHYSE";
/// The longest footer: room for 3,700,000 blocks, more than 10^10 files.
const FOOTER_MAX: u32 = 32 << 20;
