//! The entry: one metadata mutation, as it was decided.
//!
//! An entry carries the operation for people and audit (kind, names, caller) and the after-image of every row that it
//! writes. Applying it reads nothing and cannot fail.
//!
//! Invariants:
//! - At most [`MAX_CHANGES`] changes, [`MAX_NAMES`] names and [`MAX_ENTRY_BYTES`] bytes, encoded as well as plain.
//! - Every key begins with a big-endian `u64` (an inode number, a pack number, a session); the encoding relies on it.
//! - This crate never looks into a row: tables, kinds and values are the vocabulary of the crate above.

mod codec;

use bytes::Bytes;

use crate::{LogTime, Lsn};

pub use codec::{DecodeError, EncodeError, decode_entry, encode_entry};
pub(crate) use codec::{EncodedBody, Said, StoredEntries};

/// One metadata mutation. `R` is what its changes are held in; whoever writes entries may use a type of their own ([`WrittenRow`]).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry<R = Change> {
    /// Its place in the history.
    pub lsn: Lsn,
    /// When it was decided.
    pub time: LogTime,
    /// Which operation it was; the numbers belong to the crate above. [`KIND_TICK`] is the idle tick.
    pub kind: u8,
    /// Who asked; `None` for what the system did on its own.
    pub caller: Option<Requester>,
    /// The request of a session at a mirror that this entry answers, if it was forwarded.
    pub request: Option<ForwardedRequest>,
    /// The names that the operation spoke of, for people: not needed to apply it.
    pub names: Vec<Bytes>,
    /// The rows that it writes, in the order in which they are applied.
    pub changes: Vec<R>,
}

impl Entry {
    /// The idle tick: it changes nothing and shows that the source was alive at `time`.
    pub fn tick(lsn: Lsn, time: LogTime) -> Entry {
        Entry {
            lsn,
            time,
            kind: KIND_TICK,
            caller: None,
            request: None,
            names: Vec::new(),
            changes: Vec::new(),
        }
    }
}

/// What an entry needs to know of a row that it writes.
pub trait WrittenRow {
    /// The table; the numbers belong to the crate above.
    fn table(&self) -> u8;

    /// The key of the row within its table; at least eight bytes.
    fn key(&self) -> &[u8];

    /// The row after the change, or `None` for a tombstone.
    fn value(&self) -> Option<&[u8]>;
}

impl WrittenRow for Change {
    fn table(&self) -> u8 {
        self.table
    }

    fn key(&self) -> &[u8] {
        &self.key
    }

    fn value(&self) -> Option<&[u8]> {
        self.value.as_deref()
    }
}

/// One row that an entry writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The table; the numbers belong to the crate above.
    pub table: u8,
    /// The key of the row within its table; at least eight bytes.
    pub key: Bytes,
    /// The row after the change, or `None` for a tombstone.
    pub value: Option<Bytes>,
}

/// The process that asked for an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Requester {
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// Its process id on the node where it ran; 0 if unknown.
    pub pid: u32,
}

/// A request that a mirror forwarded: a retry of the same pair is answered, not executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ForwardedRequest {
    /// The session that asked.
    pub session: u64,
    /// Its running number of the request.
    pub sequence: u64,
}

/// The kind of the idle tick: an entry without changes that shows that the source is alive.
pub const KIND_TICK: u8 = 0;
/// More changes than this make an entry invalid; larger operations are cut into several entries.
pub const MAX_CHANGES: usize = 4096;
/// More names than this make an entry invalid.
pub const MAX_NAMES: usize = 16;
/// More bytes than this, encoded or plain, make an entry invalid.
pub const MAX_ENTRY_BYTES: usize = 1 << 20;
