//! The record of what an index on disk holds for certain: one small file beside its tables, replaced as a whole.
//!
//! ```text
//!    0   8  magic "murphyix"
//!    8   4  version of this layout, 1
//!   12  92  the synced state: epoch number 4, epoch id 16, lsn 8, chain hash 32, digest 16, inodes 8, bytes 8
//!  104   8  lsn of the newest generation with rows in the keyspace of names; 0 if there is none
//!  112   8  the same for the keyspace of the other rows
//!  120  32  BLAKE3 of everything before
//! ```
//!
//! Numbers are little-endian. Each keyspace holds a marker, the state of its newest generation in the same 92 bytes: a keyspace whose
//! marker is older than the record says has lost something.
//!
//! Invariants:
//! - The record is written only after everything that it speaks of is on disk, and is either the old or the new one after a crash.

use std::{fs, io, path::Path};

use murphy_log::{
    ChainHash, Digest, Epoch, EpochId, Files, Lsn, OsFiles, Position, State, Usage, replace_file,
};

/// What is known to be on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SyncedRecord {
    pub(super) state: State,
    /// The newest generations with rows in each keyspace; [`Lsn`] 0 for none.
    pub(super) names: Lsn,
    pub(super) rows: Lsn,
}

impl SyncedRecord {
    /// Reads the record in `dir`; `None` if there is none, `InvalidData` if it is damaged.
    pub(super) fn read(dir: &Path) -> io::Result<Option<SyncedRecord>> {
        match fs::read(dir.join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
            Ok(bytes) => match SyncedRecord::decode(&bytes) {
                Some(record) => Ok(Some(record)),
                None => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the record of the synced state is damaged",
                )),
            },
        }
    }

    /// Replaces the record in `dir`; durable when it returns.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        replace_file(&OsFiles, &dir.join(FILE), &self.encode())
    }

    /// Removes the record in `dir`, if there is one; durable when it returns.
    pub(super) fn remove(dir: &Path) -> io::Result<()> {
        match fs::remove_file(dir.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync_directory(dir),
        }
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..104].copy_from_slice(&encode_state(&self.state));
        bytes[104..112].copy_from_slice(&self.names.get().to_le_bytes());
        bytes[112..CHECKED_BYTES].copy_from_slice(&self.rows.get().to_le_bytes());
        let sum = blake3::hash(&bytes[..CHECKED_BYTES]);
        bytes[CHECKED_BYTES..].copy_from_slice(sum.as_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<SyncedRecord> {
        let bytes: &[u8; RECORD_BYTES] = bytes.try_into().ok()?;
        if blake3::hash(&bytes[..CHECKED_BYTES]).as_bytes() != &bytes[CHECKED_BYTES..] {
            return None;
        }
        if &bytes[..8] != MAGIC || bytes[8..12] != VERSION.to_le_bytes() {
            return None;
        }
        Some(SyncedRecord {
            state: decode_state(&bytes[12..104])?,
            names: Lsn::new(u64::from_le_bytes(field(bytes, 104))),
            rows: Lsn::new(u64::from_le_bytes(field(bytes, 112))),
        })
    }
}

/// A state in the form of the record and of the markers.
pub(super) fn encode_state(state: &State) -> [u8; STATE_BYTES] {
    let State { position, digest, usage } = state;
    let mut bytes = [0; STATE_BYTES];
    bytes[..4].copy_from_slice(&position.epoch.number.to_le_bytes());
    bytes[4..20].copy_from_slice(position.epoch.id.as_bytes());
    bytes[20..28].copy_from_slice(&position.lsn.get().to_le_bytes());
    bytes[28..60].copy_from_slice(position.hash.as_bytes());
    bytes[60..76].copy_from_slice(&digest.0.to_le_bytes());
    bytes[76..84].copy_from_slice(&usage.inodes.to_le_bytes());
    bytes[84..92].copy_from_slice(&usage.bytes.to_le_bytes());
    bytes
}

/// The state that `bytes` are; `None` if they have another length.
pub(super) fn decode_state(bytes: &[u8]) -> Option<State> {
    let bytes: &[u8; STATE_BYTES] = bytes.try_into().ok()?;
    let epoch =
        Epoch { number: u32::from_le_bytes(field(bytes, 0)), id: EpochId::from_bytes(field(bytes, 4)) };
    let position = Position {
        epoch,
        lsn: Lsn::new(u64::from_le_bytes(field(bytes, 20))),
        hash: ChainHash::from_bytes(field(bytes, 28)),
    };
    let usage =
        Usage { inodes: u64::from_le_bytes(field(bytes, 76)), bytes: u64::from_le_bytes(field(bytes, 84)) };
    Some(State { position, digest: Digest(u128::from_le_bytes(field(bytes, 60))), usage })
}

/// Makes the names in `dir` durable.
pub(super) fn sync_directory(dir: &Path) -> io::Result<()> {
    OsFiles.sync_dir(dir)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}

const FILE: &str = "synced";
const MAGIC: &[u8; 8] = b"murphyix";
const VERSION: u32 = 1;
const STATE_BYTES: usize = 92;
const CHECKED_BYTES: usize = 120;
const RECORD_BYTES: usize = CHECKED_BYTES + blake3::OUT_LEN;

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> SyncedRecord {
        let epoch = Epoch { number: 3, id: EpochId::from_bytes([4; 16]) };
        let position = Position { epoch, lsn: Lsn::new(5), hash: ChainHash::from_bytes([6; 32]) };
        let state = State { position, digest: Digest(7 << 100), usage: Usage { inodes: 8, bytes: 9 } };
        SyncedRecord { state, names: Lsn::new(4), rows: Lsn::new(5) }
    }

    #[test]
    fn a_record_survives_and_is_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(SyncedRecord::read(dir.path()).unwrap(), None);
        record().write(dir.path()).unwrap();
        let newer = SyncedRecord { names: Lsn::new(11), ..record() };
        newer.write(dir.path()).unwrap();
        assert_eq!(SyncedRecord::read(dir.path()).unwrap(), Some(newer));
        SyncedRecord::remove(dir.path()).unwrap();
        SyncedRecord::remove(dir.path()).unwrap();
        assert_eq!(SyncedRecord::read(dir.path()).unwrap(), None);
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_noticed() {
        let bytes = record().encode();
        assert_eq!(SyncedRecord::decode(&bytes), Some(record()));
        for at in 0..bytes.len() {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert_eq!(SyncedRecord::decode(&damaged), None, "byte {at}");
            assert_eq!(SyncedRecord::decode(&bytes[..at]), None, "cut at {at}");
        }
    }
}
