//! The extent row: where the bytes of a part of a file are.
//!
//! A part of a file without an extent is a hole and reads as zeros.
//!
//! Invariants:
//! - Extents of one inode do not overlap, and none crosses a multiple of [`SLOT_BYTES`]: the extent that covers an offset begins at or
//!   after the start of its slot.

use bytes::Bytes;
use murphy_log::Lsn;

use super::{
    codec::{RowError, RowReader, RowWriter},
    other::PackNumber,
};

/// Where the bytes of an extent are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtentTarget {
    /// In a pack, from this offset of its plain bytes.
    Pack {
        /// The pack.
        pack: PackNumber,
        /// Offset in its plain bytes.
        offset: u32,
    },
    /// In the log, in the entry at this LSN, from this offset of its bytes. No writer of this version makes one.
    Log {
        /// The entry.
        lsn: Lsn,
        /// Offset in the entry's data.
        offset: u32,
    },
}

impl ExtentTarget {
    /// The pack that holds the bytes, if one does.
    pub const fn pack(self) -> Option<PackNumber> {
        match self {
            ExtentTarget::Pack { pack, .. } => Some(pack),
            ExtentTarget::Log { .. } => None,
        }
    }

    /// The target `bytes` further on.
    #[must_use]
    pub const fn advanced(self, bytes: u32) -> ExtentTarget {
        match self {
            ExtentTarget::Pack { pack, offset } => ExtentTarget::Pack { pack, offset: offset + bytes },
            ExtentTarget::Log { lsn, offset } => ExtentTarget::Log { lsn, offset: offset + bytes },
        }
    }
}

/// The value of an extent: the key has inode and file offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExtentRow {
    /// How many bytes, 1 to [`SLOT_BYTES`].
    pub length: u32,
    /// Where they are.
    pub target: ExtentTarget,
}

/// An extent together with its place in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Byte offset in the file.
    pub offset: u64,
    /// The rest of it.
    pub row: ExtentRow,
}

impl Extent {
    /// The offset after its last byte.
    pub const fn end(&self) -> u64 {
        self.offset + self.row.length as u64
    }

    /// The part of the extent inside `from..to`, or `None`.
    pub fn clipped(&self, from: u64, to: u64) -> Option<Extent> {
        let (start, end) = (self.offset.max(from), self.end().min(to));
        if start >= end {
            return None;
        }
        let skipped = (start - self.offset) as u32;
        let row = ExtentRow { length: (end - start) as u32, target: self.row.target.advanced(skipped) };
        Some(Extent { offset: start, row })
    }
}

impl ExtentRow {
    /// The bytes of the row.
    pub fn encode(&self) -> Bytes {
        let mut row = RowWriter::new(VERSION);
        row.varint(u64::from(self.length));
        match self.target {
            ExtentTarget::Pack { pack, offset } => {
                row.byte(IN_PACK).varint(u64::from(offset)).fixed(pack.0);
            }
            ExtentTarget::Log { lsn, offset } => {
                row.byte(IN_LOG).varint(u64::from(offset)).fixed(lsn.get());
            }
        }
        row.finish()
    }

    /// The row that `value` is.
    pub fn decode(value: &[u8]) -> Result<ExtentRow, RowError> {
        let mut row = RowReader::new(value, VERSION)?;
        let length = row.varint32("length")?;
        if length == 0 || u64::from(length) > SLOT_BYTES {
            return Err(RowError::Field("length"));
        }
        let target = row.byte()?;
        let offset = row.varint32("offset")?;
        let number = row.fixed()?;
        row.finish()?;
        let target = match target {
            IN_PACK => ExtentTarget::Pack { pack: PackNumber(number), offset },
            IN_LOG => ExtentTarget::Log { lsn: Lsn::new(number), offset },
            _ => return Err(RowError::Field("target")),
        };
        Ok(ExtentRow { length, target })
    }
}

/// No extent crosses a multiple of this many bytes of its file.
pub const SLOT_BYTES: u64 = 4 << 20;
const VERSION: u8 = 0;
const IN_PACK: u8 = 1;
const IN_LOG: u8 = 2;
