//! The mark at the head of every group commit in a segment file.
//!
//! Invariants:
//! - It is written only after everything before it in the log has been synced, in the same write as the frames that follow it.
//! - So a valid mark anywhere in the log proves that everything up to the LSN that it names was durable.

use crate::Lsn;

/// Proof that everything up to an LSN was durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mark {
    /// The last entry before the group commit.
    pub(crate) after: Lsn,
}

impl Mark {
    pub(crate) fn encode(self) -> [u8; MARK_BYTES] {
        let mut bytes = [0; MARK_BYTES];
        bytes[..4].copy_from_slice(&MARK_MAGIC);
        bytes[8..16].copy_from_slice(&self.after.get().to_le_bytes());
        let sum = blake3::hash(&bytes[..16]);
        bytes[16..].copy_from_slice(&sum.as_bytes()[..16]);
        bytes
    }

    /// The mark at the beginning of `bytes`, if there is an undamaged one.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Mark> {
        let bytes = bytes.get(..MARK_BYTES)?;
        let mut after = [0; 8];
        after.copy_from_slice(&bytes[8..16]);
        let mark = Mark { after: Lsn::new(u64::from_le_bytes(after)) };
        (mark.encode() == bytes && mark.after < Lsn::MAX).then_some(mark)
    }
}

/// The first bytes of every mark.
pub(crate) const MARK_MAGIC: [u8; 4] = *b"MsyX";
/// The length of a mark.
pub(crate) const MARK_BYTES: usize = 32;
