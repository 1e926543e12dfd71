//! The seal: the object in a slot that ends an epoch and names the next.
//!
//! Invariants:
//! - A seal lies under the name that the next slot of the sealed epoch would have; put-if-absent makes it the only one.
//! - Two seals by the same node for the same next epoch at the same base are the same decision, whenever they were made.
//! - Seals are never deleted.

use bytes::Bytes;
use murphy_fs::Sealed;
use murphy_log::{BranchId, ChainHash, Epoch, EpochId, LogTime, Lsn, NodeId, Position, VolumeId};

use crate::{
    fields::{FieldReader, short_hash},
    slot::{Lineage, SLOT_MAGIC, Slot, SlotError},
};

/// The end of an epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seal {
    /// Whose history it ends.
    pub lineage: Lineage,
    /// The epoch that it ends.
    pub epoch: Epoch,
    /// The last entry before it; of an earlier epoch if the sealed one has none.
    pub base: Position,
    /// The epoch that follows.
    pub next: Epoch,
    /// The node that sealed.
    pub node: NodeId,
    /// Its wall clock then.
    pub time: LogTime,
}

impl Seal {
    /// The stored form.
    pub fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(SEAL_BYTES);
        out.extend_from_slice(&SEAL_MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.epoch.number.to_le_bytes());
        out.extend_from_slice(self.lineage.volume.as_bytes());
        out.extend_from_slice(self.lineage.branch.as_bytes());
        out.extend_from_slice(self.epoch.id.as_bytes());
        out.extend_from_slice(&self.base.epoch.number.to_le_bytes());
        out.extend_from_slice(&self.next.number.to_le_bytes());
        out.extend_from_slice(self.base.epoch.id.as_bytes());
        out.extend_from_slice(self.next.id.as_bytes());
        out.extend_from_slice(&self.base.lsn.get().to_le_bytes());
        out.extend_from_slice(self.base.hash.as_bytes());
        out.extend_from_slice(self.node.as_bytes());
        out.extend_from_slice(&self.time.as_nanos().to_le_bytes());
        let sum = short_hash(&out);
        out.extend_from_slice(&sum);
        debug_assert_eq!(out.len(), SEAL_BYTES);
        out.into()
    }

    /// Reads a seal.
    pub fn decode(bytes: &[u8]) -> Result<Seal, SealError> {
        if !bytes.starts_with(&SEAL_MAGIC) {
            return Err(SealError::NotASeal);
        }
        let bytes: &[u8; SEAL_BYTES] =
            bytes.try_into().map_err(|_| SealError::Length { found: bytes.len(), expected: SEAL_BYTES })?;
        let mut fields = FieldReader::new(&bytes[8..]);
        let version = fields.u16();
        if version != VERSION {
            return Err(SealError::Version { found: version, known: VERSION });
        }
        if short_hash(&bytes[..SUM_AT]) != bytes[SUM_AT..] {
            return Err(SealError::Checksum);
        }
        let reserved = fields.u16();
        let number = fields.u32();
        let lineage = Lineage {
            volume: VolumeId::from_bytes(fields.bytes()),
            branch: BranchId::from_bytes(fields.bytes()),
        };
        let epoch = Epoch { number, id: EpochId::from_bytes(fields.bytes()) };
        let (base_number, next_number) = (fields.u32(), fields.u32());
        let base_epoch = Epoch { number: base_number, id: EpochId::from_bytes(fields.bytes()) };
        let next = Epoch { number: next_number, id: EpochId::from_bytes(fields.bytes()) };
        let base = Position {
            epoch: base_epoch,
            lsn: Lsn::new(fields.u64()),
            hash: ChainHash::from_bytes(fields.bytes()),
        };
        let node = NodeId::from_bytes(fields.bytes());
        let seal = Seal { lineage, epoch, base, next, node, time: LogTime::from_nanos(fields.u64()) };
        if reserved != 0 {
            return Err(SealError::Field("reserved bytes"));
        }
        if base.lsn < Lsn::ROOT || base.lsn.get() > LSN_LIMIT || base_epoch.number > number {
            return Err(SealError::Field("base"));
        }
        if next.number <= number { Err(SealError::Field("next epoch")) } else { Ok(seal) }
    }

    /// What the rest of the program calls a seal.
    pub fn sealed(&self) -> Sealed {
        Sealed { base: self.base, next: self.next, by: self.node }
    }

    /// Whether `other` is the same decision.
    pub fn is_same_decision(&self, other: &Seal) -> bool {
        *self == Seal { time: self.time, ..*other }
    }
}

/// What lies under the name of a slot.
#[derive(Clone, Debug)]
pub enum Occupant {
    /// Frames.
    Slot(Slot),
    /// The end of the epoch.
    Seal(Seal),
}

impl Occupant {
    /// Reads a whole object.
    pub fn decode(bytes: &Bytes) -> Result<Occupant, OccupantError> {
        if bytes.starts_with(&SLOT_MAGIC) {
            return Ok(Occupant::Slot(Slot::decode(bytes)?));
        }
        if bytes.starts_with(&SEAL_MAGIC) {
            return Ok(Occupant::Seal(Seal::decode(bytes)?));
        }
        Err(OccupantError::Neither)
    }
}

/// Why bytes are neither a slot nor a seal.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OccupantError {
    /// They begin like neither.
    #[error("it is neither a slot nor a seal: it begins otherwise at byte 0")]
    Neither,
    /// A slot that cannot be read.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A seal that cannot be read.
    #[error(transparent)]
    Seal(#[from] SealError),
}

/// Why bytes are not a seal.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SealError {
    /// They do not begin as a seal does.
    #[error("it is not a seal: it begins otherwise at byte 0")]
    NotASeal,
    /// They are too few or too many.
    #[error("the seal ends at byte {found} and not at byte {expected}")]
    Length {
        /// How many there are.
        found: usize,
        /// How many there should be.
        expected: usize,
    },
    /// A later version wrote them.
    #[error("the seal has format version {found} at byte 8, this version knows {known}")]
    Version {
        /// The version.
        found: u16,
        /// The version that can be read.
        known: u16,
    },
    /// They are damaged.
    #[error("the seal does not match its checksum at byte {SUM_AT}")]
    Checksum,
    /// It contradicts itself.
    #[error("the seal has an impossible value in the field {0}")]
    Field(&'static str),
}

/// The first bytes of every seal.
pub const SEAL_MAGIC: [u8; 8] = *b"MurSeal\0";
/// The length of a seal, in bytes.
pub const SEAL_BYTES: usize = 184;
const VERSION: u16 = 0;
const SUM_AT: usize = SEAL_BYTES - 16;
const LSN_LIMIT: u64 = 1 << 62;

#[cfg(test)]
mod tests {
    use murphy_log::conformance::golden;

    use super::*;

    fn seal() -> Seal {
        let epoch = |number, byte| Epoch { number, id: EpochId::from_bytes([byte; 16]) };
        Seal {
            lineage: Lineage { volume: VolumeId::from_bytes([1; 16]), branch: BranchId::from_bytes([2; 16]) },
            epoch: epoch(1, 3),
            base: Position { epoch: epoch(1, 3), lsn: Lsn::new(41), hash: ChainHash::from_bytes([4; 32]) },
            next: epoch(2, 5),
            node: NodeId::from_bytes([6; 16]),
            time: LogTime::from_nanos(1_700_000_000_000_000_007),
        }
    }

    #[test]
    fn a_seal_has_golden_bytes() {
        let bytes = seal().encode();
        golden("archive_seal.hex", &bytes);
        assert_eq!(Seal::decode(&bytes), Ok(seal()));
    }

    #[test]
    fn every_flipped_bit_of_a_seal_is_found() {
        let bytes = seal().encode();
        for bit in 0..8 * bytes.len() {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Seal::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    /// A promoter that died after its put and tries again must find that it has won.
    #[test]
    fn the_same_decision_at_another_time_is_the_same() {
        let again = Seal { time: LogTime::from_nanos(5), ..seal() };
        assert!(seal().is_same_decision(&again));
        assert!(!seal().is_same_decision(&Seal { node: NodeId::from_bytes([7; 16]), ..seal() }));
    }

    #[test]
    fn an_epoch_that_does_not_grow_is_refused() {
        let back = Seal { next: seal().epoch, ..seal() };
        assert_eq!(Seal::decode(&back.encode()), Err(SealError::Field("next epoch")));
    }
}
