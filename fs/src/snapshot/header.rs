//! The header of a snapshot file: which tree, at which position.
//!
//! Invariants:
//! - Its last 16 bytes are the BLAKE3 of the bytes before them.

use murphy_log::{
    BranchId, ChainHash, Digest, Epoch, EpochId, LogTime, Lsn, Position, State, Usage, VolumeId,
};

/// What a snapshot is of, and when it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnapshotHeader {
    /// The volume, whose keys the digest and the cookies are made with.
    pub volume: VolumeId,
    /// The branch that the position belongs to.
    pub branch: BranchId,
    /// Position, digest and usage of the tree.
    pub state: State,
    /// The wall clock when it was written.
    pub created: LogTime,
}

impl SnapshotHeader {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let State { position, digest, usage } = &self.state;
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = &mut bytes[..];
        let mut put = |field: &[u8]| {
            let (place, after) = std::mem::take(&mut rest).split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = after;
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&[0; 2]);
        put(&position.epoch.number.to_le_bytes());
        put(position.epoch.id.as_bytes());
        put(self.volume.as_bytes());
        put(self.branch.as_bytes());
        put(&position.lsn.get().to_le_bytes());
        put(position.hash.as_bytes());
        put(&digest.0.to_le_bytes());
        put(&usage.inodes.to_le_bytes());
        put(&usage.bytes.to_le_bytes());
        put(&self.created.as_nanos().to_le_bytes());
        let checksum = blake3::hash(&bytes[..HEADER_BYTES - CHECKSUM_BYTES]);
        bytes[HEADER_BYTES - CHECKSUM_BYTES..].copy_from_slice(&checksum.as_bytes()[..CHECKSUM_BYTES]);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<SnapshotHeader, HeaderFault> {
        if bytes[..8] != MAGIC {
            return Err(HeaderFault::Magic);
        }
        let (fields, checksum) = bytes.split_at(HEADER_BYTES - CHECKSUM_BYTES);
        let mut rest = &fields[8..];
        // The version comes before the checksum: another version may have its checksum elsewhere.
        let version = u16::from_le_bytes(taken(&mut rest));
        if version != VERSION {
            return Err(HeaderFault::Version(version));
        }
        if blake3::hash(fields).as_bytes()[..CHECKSUM_BYTES] != *checksum {
            return Err(HeaderFault::Checksum);
        }
        let reserved: [u8; 2] = taken(&mut rest);
        if reserved != [0; 2] {
            return Err(HeaderFault::Reserved);
        }
        let number = u32::from_le_bytes(taken(&mut rest));
        let epoch = Epoch { number, id: EpochId::from_bytes(taken(&mut rest)) };
        let volume = VolumeId::from_bytes(taken(&mut rest));
        let branch = BranchId::from_bytes(taken(&mut rest));
        let lsn = Lsn::new(u64::from_le_bytes(taken(&mut rest)));
        let hash = ChainHash::from_bytes(taken(&mut rest));
        let digest = Digest(u128::from_le_bytes(taken(&mut rest)));
        let inodes = u64::from_le_bytes(taken(&mut rest));
        let usage = Usage { inodes, bytes: u64::from_le_bytes(taken(&mut rest)) };
        let created = LogTime::from_nanos(u64::from_le_bytes(taken(&mut rest)));
        if lsn.get() > LSN_LIMIT {
            return Err(HeaderFault::Position);
        }
        let state = State { position: Position { epoch, lsn, hash }, digest, usage };
        Ok(SnapshotHeader { volume, branch, state, created })
    }
}

/// Why bytes are not the header of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum HeaderFault {
    Magic,
    Version(u16),
    Checksum,
    Reserved,
    Position,
}

fn taken<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (field, after) = rest.split_first_chunk().expect("the fields fill the header exactly");
    *rest = after;
    *field
}

/// Length of the header in the file.
pub(super) const HEADER_BYTES: usize = 160;
const CHECKSUM_BYTES: usize = 16;
/// Far beyond what can be reached, and far enough from the end of 64 bits that LSNs can be added to.
const LSN_LIMIT: u64 = 1 << 62;
const MAGIC: [u8; 8] = *b"MURPHYSN";
const VERSION: u16 = 0;
const _: () =
    assert!(HEADER_BYTES == 8 + 2 + 2 + 4 + 16 + 16 + 16 + 8 + 32 + 16 + 8 + 8 + 8 + CHECKSUM_BYTES);
