//! What names a history: volume, branch, epoch, chain hash, and the position made of them; and the digest that names a tree.
//!
//! Invariants:
//! - Two equal positions have the same entries before them, in every node, archive and branch of a volume.
//! - Two equal digests at the same LSN have the same rows in the tree tables. The chain hash says nothing about rows, and the
//!   digest nothing about history: copies compare both.

use std::{fmt, str::FromStr};

use crate::Lsn;

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id with these bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> $name {
                $name(bytes)
            }

            /// The bytes of the id.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<$name, ParseIdError> {
                parse_hex(text).map($name)
            }
        }
    };
}

random_id!(
    /// The identity of a volume; every keyed hash of the volume is derived from it.
    VolumeId
);
random_id!(
    /// The identity of one line of a volume's history.
    BranchId
);
random_id!(
    /// The random half of an epoch: two sources that claim the same number still differ.
    EpochId
);
random_id!(
    /// The identity of a node; the public key that belongs to it is recorded in its member row.
    NodeId
);

/// The term of one source in a branch: a number that grows, and a random id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Epoch {
    /// Grows by one with every take-over, from 1.
    pub number: u32,
    /// Drawn by the source that begins the epoch.
    pub id: EpochId,
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.number, self.id)
    }
}

/// The keyed hash over every entry of a branch up to one LSN.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ChainHash([u8; 32]);

impl ChainHash {
    /// The hash with these bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> ChainHash {
        ChainHash(bytes)
    }

    /// The bytes of the hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChainHash(")?;
        write_hex(f, &self.0[..8])?;
        write!(f, "..)")
    }
}

impl FromStr for ChainHash {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<ChainHash, ParseIdError> {
        parse_hex(text).map(ChainHash)
    }
}

/// The sum, modulo 2^128, of a keyed hash of every row of the tree tables: it identifies a tree completely.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Digest(pub u128);

impl Digest {
    /// The digest with one more row.
    #[must_use]
    pub const fn plus(self, row: Digest) -> Digest {
        Digest(self.0.wrapping_add(row.0))
    }

    /// The digest with one row fewer.
    #[must_use]
    pub const fn minus(self, row: Digest) -> Digest {
        Digest(self.0.wrapping_sub(row.0))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// A point of a branch's history, which it identifies completely.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Position {
    /// The epoch that the entry at `lsn` belongs to.
    pub epoch: Epoch,
    /// The last entry of the history.
    pub lsn: Lsn,
    /// The chain hash after that entry.
    pub hash: ChainHash,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {} lsn {} hash {}", self.epoch.number, self.lsn, self.hash)
    }
}

/// The absolute size of the tree, as `statfs` and every frame report it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Inodes, the root included, orphans included.
    pub inodes: u64,
    /// Bytes allocated to file data, holes excluded.
    pub bytes: u64,
}

/// Everything that is known about a state: where in history, which tree, how large.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct State {
    /// The history before it.
    pub position: Position,
    /// The tree.
    pub digest: Digest,
    /// Its size.
    pub usage: Usage,
}

impl State {
    /// The state of a new branch before its first entry, which is of `epoch`.
    pub fn origin(epoch: Epoch) -> State {
        let position = Position { epoch, lsn: Lsn::ROOT, hash: ChainHash::default() };
        State { position, digest: Digest::default(), usage: Usage::default() }
    }
}

/// A text that is not the hexadecimal form of an id or hash of the expected length.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("expected {expected} hexadecimal digits")]
pub struct ParseIdError {
    /// How many digits the form has.
    pub expected: usize,
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], ParseIdError> {
    let refused = ParseIdError { expected: 2 * N };
    if text.len() != 2 * N || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(refused);
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digits = str::from_utf8(digits).map_err(|_| refused)?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| refused)?;
    }
    Ok(bytes)
}
