//! The dentry row: a name in a directory.
//!
//! A directory's names are found by a keyed hash of the name. The key is also the readdir cookie: it says where in the directory the
//! name stands, it does not move while the name lives, and it needs no state.
//!
//! Names with equal hashes take the slots of that hash from 0 upwards. A slot's row says whether a higher slot is in use, so that a
//! missing slot 0 means that no name has this hash; a name that is removed below a used slot leaves a vacant row.
//!
//! Invariants:
//! - The highest slot in use holds a name, not a vacancy, and its `more` is false; every slot below it has a row with `more` true.

use bytes::Bytes;
use murphy_log::VolumeKeys;

use super::codec::{RowError, RowReader, RowWriter};
use crate::{Ino, Kind, Name};

/// The place of a name in its directory: 59 bits of hash, 4 bits of slot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Cookie(u64);

impl Cookie {
    /// The cookie with this number.
    pub const fn new(number: u64) -> Cookie {
        Cookie(number)
    }

    /// The number: never 0 to 15, never above `i64::MAX`.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Which slot of its hash this is.
    pub const fn slot(self) -> u8 {
        (self.0 % SLOTS as u64) as u8
    }

    /// The place of the same hash in another slot.
    #[must_use]
    pub const fn in_slot(self, slot: u8) -> Cookie {
        Cookie(self.0 - self.0 % SLOTS as u64 + slot as u64)
    }
}

/// The keyed hash that places names.
#[derive(Clone, Debug)]
pub struct NameHasher {
    key: [u8; 32],
    bits: u32,
}

impl NameHasher {
    /// A hasher with the volume's key for names.
    pub const fn new(key: [u8; 32]) -> NameHasher {
        NameHasher { key, bits: HASH_BITS }
    }

    /// The hasher of a volume: every place that looks for its names, or writes them, uses this one.
    pub fn of(keys: &VolumeKeys) -> NameHasher {
        NameHasher::new(keys.derived(PURPOSE))
    }

    /// A hasher that keeps only `bits` bits, so that tests meet collisions.
    #[cfg(test)]
    pub(crate) const fn weak(key: [u8; 32], bits: u32) -> NameHasher {
        NameHasher { key, bits }
    }

    /// Slot 0 of the hash of `name`.
    pub fn place(&self, name: &Name) -> Cookie {
        let hash = blake3::keyed_hash(&self.key, name.as_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&hash.as_bytes()[..8]);
        let hash = (u64::from_be_bytes(first) >> (64 - self.bits)).max(1);
        Cookie(hash * SLOTS as u64)
    }
}

/// A name in a directory, or the vacancy that one left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DentryRow {
    /// The name and what it stands for; `None` in a vacant slot.
    pub named: Option<(Name, Ino, Kind)>,
    /// Whether a higher slot of the same hash is in use.
    pub more: bool,
}

impl DentryRow {
    /// The bytes of the row.
    pub fn encode(&self) -> Bytes {
        let more = if self.more { MORE } else { 0 };
        let mut row = RowWriter::new(VERSION);
        match &self.named {
            None => row.byte(more),
            Some((name, ino, kind)) => row.byte(*kind as u8 | more).fixed(ino.get()).bytes(name.as_bytes()),
        }
        .finish()
    }

    /// The row that `value` is.
    pub fn decode(value: &Bytes) -> Result<DentryRow, RowError> {
        let mut row = RowReader::new(value, VERSION)?;
        let first = row.byte()?;
        let (number, more) = (first & !MORE, first & MORE != 0);
        let named = if number == 0 {
            None
        } else {
            let kind = Kind::from_number(number).ok_or(RowError::Field("kind"))?;
            let ino = Ino::new(row.fixed()?);
            let name = value.slice_ref(row.rest());
            Some((Name::new(name).map_err(|_| RowError::Field("name"))?, ino, kind))
        };
        row.finish()?;
        Ok(DentryRow { named, more })
    }
}

/// How many names of one directory may share a hash; the next one is refused with ENOSPC.
pub const SLOTS: u8 = 16;
/// Separates the hash of names from the volume's other keyed hashes.
const PURPOSE: &str = "murphy v0 name hash";
const HASH_BITS: u32 = 59;
const VERSION: u8 = 0;
const MORE: u8 = 0x80;
