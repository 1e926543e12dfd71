//! The stored form of an entry; `docs/formats/entry.md` is its description.
//!
//! An entry is a varint length, a packed body, and an rkyv archive of the head (kind and time) at the end, where rkyv
//! expects the root. The LSN is implied by the frame. The two things that every row repeats, the entry's own LSN and its
//! own time, are cut out of the values and leave a mark. What entries before it in the frame have said is not said again: the
//! caller, and of a row what is as in a row that was written a little earlier.
//!
//! Invariants:
//! - `decode(encode(e)) == e` for every entry within the limits, whatever bytes its keys, values and names hold.
//! - The body depends on the entry alone, not on the frame: the chain hash is over LSN, time, kind and body.
//! - Decoding never allocates more than the limits of an entry, whatever it is given.

mod change;
mod cursor;
mod decode;
mod encode;
mod patch;
mod recent;
mod token;

use super::{Entry, MAX_CHANGES, MAX_ENTRY_BYTES, MAX_NAMES, WrittenRow};
use crate::{LogTime, Lsn};

use cursor::Cursor;
pub(crate) use decode::StoredEntries;
pub(crate) use encode::{EncodedBody, Said};

/// Appends the stored form of `entry` to `out`, as the first entry of a frame with this base time; on error `out` is as it
/// was.
pub fn encode_entry<R: WrittenRow>(
    entry: &Entry<R>,
    base: LogTime,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    let delta =
        entry.time.as_nanos().checked_sub(base.as_nanos()).and_then(|delta| u32::try_from(delta).ok());
    let delta = delta.ok_or(EncodeError::TimeOutOfFrame { lsn: entry.lsn })?;
    let mut body = Vec::with_capacity(TYPICAL_BODY_BYTES);
    let mut encoded = EncodedBody::default();
    encoded.encode(entry, &mut body)?;
    encoded.push_stored(entry, &body, delta, &mut Said::default(), out);
    Ok(())
}

/// Reads the stored form of exactly one entry, the first of a frame with this base time.
pub fn decode_entry(bytes: &[u8], lsn: Lsn, base: LogTime) -> Result<Entry, DecodeError> {
    let mut entries = StoredEntries::new(bytes, lsn, base);
    let entry = entries.next_entry()?;
    entries.finish()?;
    Ok(entry)
}

/// The head of a stored entry.
#[derive(rkyv::Archive, rkyv::Serialize)]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "only its archived form is used; tests write it through rkyv")
)]
struct Head {
    /// Nanoseconds after the frame's base time.
    time_delta: u32,
    kind: u8,
}

/// Why an entry cannot be stored.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EncodeError {
    /// It has more than [`MAX_CHANGES`] changes.
    #[error("entry {lsn} has {count} changes, the limit is {MAX_CHANGES}")]
    TooManyChanges {
        /// The entry.
        lsn: Lsn,
        /// How many it has.
        count: usize,
    },
    /// It has more than [`MAX_NAMES`] names.
    #[error("entry {lsn} has {count} names, the limit is {MAX_NAMES}")]
    TooManyNames {
        /// The entry.
        lsn: Lsn,
        /// How many it has.
        count: usize,
    },
    /// It has more than [`MAX_ENTRY_BYTES`] bytes.
    #[error("entry {lsn} has {length} bytes, the limit is {MAX_ENTRY_BYTES}")]
    TooLarge {
        /// The entry.
        lsn: Lsn,
        /// How long it is, in bytes.
        length: usize,
    },
    /// One of its keys does not begin with a number.
    #[error("entry {lsn} has a key shorter than 8 bytes in table {table}")]
    ShortKey {
        /// The entry.
        lsn: Lsn,
        /// The table of the key.
        table: u8,
    },
    /// Its time is before the frame's base time, or more than four seconds after it.
    #[error("the time of entry {lsn} does not fit its frame")]
    TimeOutOfFrame {
        /// The entry.
        lsn: Lsn,
    },
}

/// Why stored bytes are not an entry.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// The frame was written by a later version, with entries that this one does not know.
    #[error("frame at lsn {lsn} has feature level {level}, this version reads up to {known}")]
    FeatureLevel {
        /// The first entry of the frame.
        lsn: Lsn,
        /// Its level.
        level: u16,
        /// The highest level that can be read.
        known: u16,
    },
    /// The bytes do not follow the format.
    #[error("entry {lsn} is malformed at byte {offset} of its frame's body: {what}")]
    Malformed {
        /// The entry.
        lsn: Lsn,
        /// Where in the body of the frame, in bytes.
        offset: usize,
        /// What was found.
        what: &'static str,
    },
}

const FLAG_CALLER: u8 = 1;
const FLAG_REQUEST: u8 = 2;
/// The caller is that of the last entry of the frame that had one. Only in the stored form, never in a body.
const FLAG_SAME_CALLER: u8 = 4;
/// Two bits: the number of names, or [`FEW_NAMES`] if it follows.
const NAMES_SHIFT: u32 = 3;
const FEW_NAMES: u8 = 3;
/// Three bits: the number of changes, or [`FEW_CHANGES`] if it follows.
const CHANGES_SHIFT: u32 = 5;
const FEW_CHANGES: u8 = 7;
/// A tag is the table, shifted, and these flags.
const TAG_BITS: u32 = 3;
const TAG_REST: u64 = 4;
const TAG_DISTANCE: u64 = 2;
const TAG_VALUE: u64 = 1;
/// Every key begins with a number of this length.
const KEY_NUMBER_BYTES: usize = 8;
/// The archived head.
const HEAD_BYTES: usize = size_of::<ArchivedHead>();
const _: () = assert!(HEAD_BYTES == 5);
/// What a frame stores of an entry is at most this long: each change of a high table takes a byte more than in the body.
const MAX_STORED_BYTES: usize = MAX_ENTRY_BYTES + MAX_CHANGES;
/// At most this many runs of tokens are cut out of one value.
const MAX_MARKS: usize = 64;
/// At most this many equal tokens, one after the other, share a mark.
const MAX_RUN: usize = 4;
/// Tokens and names are looked for in so many bytes of a value: rows are small, and inline data has none.
const SEARCHED_BYTES: usize = 4096;
/// Names are looked for in so many changes.
const NAME_SEARCH_CHANGES: usize = 8;
/// A shorter name is not worth a reference.
const SHORTEST_NAME_REFERENCE: usize = 4;
const TYPICAL_BODY_BYTES: usize = 256;

#[cfg(test)]
mod tests;
