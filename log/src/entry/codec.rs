//! The stored form of an entry; `docs/formats/entry.md` is its description.
//!
//! An entry is a varint length, a packed body, and an rkyv archive of the head (kind and time) at the end, where rkyv
//! expects the root. The LSN is implied by the frame. The two things that every row repeats, the entry's own LSN and its
//! own time, are cut out of the values and leave a mark.
//!
//! Invariants:
//! - `decode(encode(e)) == e` for every entry within the limits, whatever bytes its keys, values and names hold.
//! - The body depends on the entry alone, not on the frame: the chain hash is over LSN, time, kind and body.
//! - Decoding never allocates more than the limits of an entry, whatever it is given.

use bytes::Bytes;
use rkyv::rancor;

use super::{Change, Entry, ForwardedRequest, MAX_CHANGES, MAX_ENTRY_BYTES, MAX_NAMES, Requester};
use crate::{LogTime, Lsn};

/// Appends the stored form of `entry` to `out`, as a frame with this base time would hold it; on error `out` is as it was.
pub fn encode_entry(entry: &Entry, base: LogTime, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let delta = time_delta(entry, base)?;
    let mut body = Vec::with_capacity(TYPICAL_BODY_BYTES);
    encode_body(entry, &mut body)?;
    push_varint(out, (body.len() + HEAD_BYTES) as u64);
    out.extend_from_slice(&body);
    push_head(out, delta, entry.kind);
    Ok(())
}

/// Reads the stored form of exactly one entry.
pub fn decode_entry(bytes: &[u8], lsn: Lsn, base: LogTime) -> Result<Entry, DecodeError> {
    let mut cursor = Cursor::new(bytes, lsn);
    let stored = StoredEntry::read(&mut cursor, lsn, base)?;
    if !cursor.is_empty() {
        return Err(cursor.malformed("bytes after the entry"));
    }
    stored.decode()
}

/// How far the entry's time lies after the frame's, if the head can hold it.
fn time_delta(entry: &Entry, base: LogTime) -> Result<u32, EncodeError> {
    let (time, base) = (entry.time.as_nanos(), base.as_nanos());
    let delta = time.checked_sub(base).and_then(|delta| u32::try_from(delta).ok());
    delta.ok_or(EncodeError::TimeOutOfFrame { lsn: entry.lsn })
}

/// Appends the body of `entry` to `out`; on error `out` is as it was.
pub(crate) fn encode_body(entry: &Entry, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    check_limits(entry)?;
    let start = out.len();
    let flags =
        u8::from(entry.caller.is_some()) * FLAG_CALLER + u8::from(entry.request.is_some()) * FLAG_REQUEST;
    out.push(flags);
    if let Some(caller) = entry.caller {
        push_varint(out, u64::from(caller.uid));
        push_varint(out, u64::from(caller.gid));
        push_varint(out, u64::from(caller.pid));
    }
    if let Some(request) = entry.request {
        out.extend_from_slice(&request.session.to_le_bytes());
        push_varint(out, request.sequence);
    }
    push_varint(out, entry.changes.len() as u64);
    let tokens = Tokens::of(entry.lsn, entry.time);
    for change in &entry.changes {
        push_change(out, change, &tokens);
    }
    push_varint(out, entry.names.len() as u64);
    for name in &entry.names {
        push_name(out, name, &entry.changes);
    }
    let length = out.len() - start + HEAD_BYTES;
    if length > MAX_ENTRY_BYTES {
        out.truncate(start);
        return Err(EncodeError::TooLarge { lsn: entry.lsn, length });
    }
    Ok(())
}

fn check_limits(entry: &Entry) -> Result<(), EncodeError> {
    let lsn = entry.lsn;
    if entry.changes.len() > MAX_CHANGES {
        return Err(EncodeError::TooManyChanges { lsn, count: entry.changes.len() });
    }
    if entry.names.len() > MAX_NAMES {
        return Err(EncodeError::TooManyNames { lsn, count: entry.names.len() });
    }
    let mut length: usize = entry.names.iter().map(Bytes::len).sum();
    for change in &entry.changes {
        if change.key.len() < KEY_NUMBER_BYTES {
            return Err(EncodeError::ShortKey { lsn, table: change.table });
        }
        length += change.key.len() + change.value.as_ref().map_or(0, Bytes::len);
    }
    if length > MAX_ENTRY_BYTES {
        return Err(EncodeError::TooLarge { lsn, length });
    }
    Ok(())
}

fn push_change(out: &mut Vec<u8>, change: &Change, tokens: &Tokens) {
    let (number, rest) = change.key.split_at(KEY_NUMBER_BYTES);
    let number = be_u64(number);
    let distance = tokens.lsn.checked_sub(number).filter(|distance| *distance < number);
    let mut tag = u64::from(change.table) << TAG_BITS;
    tag |= u64::from(distance.is_some()) * TAG_DISTANCE;
    tag |= u64::from(change.value.is_some()) * TAG_VALUE;
    push_varint(out, tag);
    push_varint(out, distance.unwrap_or(number));
    push_varint(out, rest.len() as u64);
    out.extend_from_slice(rest);
    if let Some(value) = &change.value {
        push_value(out, value, tokens);
    }
}

/// Appends a value: its length without what is cut out, the marks, and what is left.
fn push_value(out: &mut Vec<u8>, value: &[u8], tokens: &Tokens) {
    let mut marks = [Mark { offset: 0, what: Token::Lsn }; MAX_MARKS];
    let count = tokens.find(value, &mut marks);
    let marks = &marks[..count];
    let cut: usize = marks.iter().map(|mark| mark.what.length()).sum();
    push_varint(out, ((value.len() - cut) as u64) << 1 | u64::from(count > 0));
    if count > 0 {
        push_varint(out, count as u64);
        let mut end = 0;
        for mark in marks {
            push_varint(out, ((mark.offset - end) as u64) << 1 | u64::from(mark.what == Token::Time));
            end = mark.offset + mark.what.length();
        }
    }
    let mut end = 0;
    for mark in marks {
        out.extend_from_slice(&value[end..mark.offset]);
        end = mark.offset + mark.what.length();
    }
    out.extend_from_slice(&value[end..]);
}

/// Appends a name: where it stands in a value, if it does, else its bytes.
fn push_name(out: &mut Vec<u8>, name: &[u8], changes: &[Change]) {
    let found = changes.iter().take(NAME_SEARCH_CHANGES).enumerate().find_map(|(index, change)| {
        let value = change.value.as_ref()?;
        let offset = find(&value[..value.len().min(SEARCHED_BYTES)], name)?;
        Some((index, offset))
    });
    push_varint(out, (name.len() as u64) << 1 | u64::from(found.is_some()));
    match found {
        Some((index, offset)) => {
            push_varint(out, index as u64);
            push_varint(out, offset as u64);
        }
        None => out.extend_from_slice(name),
    }
}

/// Where `needle` begins in `haystack`; `None` for needles that are too short to be worth a reference.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.len() < SHORTEST_NAME_REFERENCE || needle.len() > haystack.len() {
        return None;
    }
    let (first, rest) = needle.split_first()?;
    let last_start = haystack.len() - needle.len();
    let mut from = 0;
    while from <= last_start {
        let at = from + haystack[from..=last_start].iter().position(|byte| byte == first)?;
        if haystack[at + 1..].starts_with(rest) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}

/// Appends the archived head.
pub(crate) fn push_head(out: &mut Vec<u8>, time_delta: u32, kind: u8) {
    // The head holds no pointer, so its archive is its fields, packed: the test of the golden bytes and `access` in the
    // decoder keep this equal to what rkyv writes.
    out.extend_from_slice(&time_delta.to_le_bytes());
    out.push(kind);
}

/// Appends `number`, seven bits a byte, the lowest first.
pub(crate) fn push_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn be_u64(bytes: &[u8]) -> u64 {
    let mut number = [0; KEY_NUMBER_BYTES];
    number.copy_from_slice(&bytes[..KEY_NUMBER_BYTES]);
    u64::from_be_bytes(number)
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

/// What is cut out of values.
struct Tokens {
    lsn: u64,
    lsn_bytes: [u8; 8],
    time_bytes: [u8; 9],
}

impl Tokens {
    fn of(lsn: Lsn, time: LogTime) -> Tokens {
        Tokens { lsn: lsn.get(), lsn_bytes: lsn.get().to_be_bytes(), time_bytes: time.row_bytes() }
    }

    fn bytes(&self, what: Token) -> &[u8] {
        match what {
            Token::Lsn => &self.lsn_bytes,
            Token::Time => &self.time_bytes,
        }
    }

    /// Finds the tokens in the beginning of `value`, from left to right, without overlap; says how many.
    fn find(&self, value: &[u8], marks: &mut [Mark; MAX_MARKS]) -> usize {
        let value = &value[..value.len().min(SEARCHED_BYTES)];
        let time_start = be_u64(&self.time_bytes);
        let (mut count, mut offset) = (0, 0);
        while count < MAX_MARKS && offset + KEY_NUMBER_BYTES <= value.len() {
            let window = be_u64(&value[offset..]);
            let what = if window == self.lsn {
                Token::Lsn
            } else if window == time_start && value.get(offset + 8) == Some(&self.time_bytes[8]) {
                Token::Time
            } else {
                offset += 1;
                continue;
            };
            marks[count] = Mark { offset, what };
            count += 1;
            offset += what.length();
        }
        count
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Token {
    Lsn,
    Time,
}

impl Token {
    fn length(self) -> usize {
        match self {
            Token::Lsn => 8,
            Token::Time => 9,
        }
    }
}

#[derive(Clone, Copy)]
struct Mark {
    offset: usize,
    what: Token,
}

/// One entry of a frame body, taken apart but not decoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredEntry<'a> {
    pub(crate) lsn: Lsn,
    pub(crate) time: LogTime,
    pub(crate) kind: u8,
    pub(crate) body: &'a [u8],
    /// Where the body begins in its frame's body.
    offset: usize,
}

impl<'a> StoredEntry<'a> {
    /// Takes the next entry off the cursor.
    pub(crate) fn read(
        cursor: &mut Cursor<'a>,
        lsn: Lsn,
        base: LogTime,
    ) -> Result<StoredEntry<'a>, DecodeError> {
        cursor.lsn = lsn;
        let length = cursor.count(MAX_ENTRY_BYTES, "an entry longer than the limit")?;
        let offset = cursor.offset;
        let stored = cursor.take(length)?;
        let Some(split) = length.checked_sub(HEAD_BYTES) else {
            return Err(cursor.malformed("an entry shorter than its head"));
        };
        let head = rkyv::access::<ArchivedHead, rancor::Error>(stored)
            .map_err(|_| cursor.malformed("a head that rkyv does not accept"))?;
        let time = base.as_nanos().checked_add(u64::from(head.time_delta.to_native()));
        let time = time.ok_or_else(|| cursor.malformed("a time beyond the last"))?;
        Ok(StoredEntry {
            lsn,
            time: LogTime::from_nanos(time),
            kind: head.kind,
            body: &stored[..split],
            offset,
        })
    }

    /// The entry itself.
    pub(crate) fn decode(&self) -> Result<Entry, DecodeError> {
        let mut cursor = Cursor { bytes: self.body, offset: 0, base: self.offset, lsn: self.lsn };
        let flags = cursor.byte()?;
        if flags & !(FLAG_CALLER | FLAG_REQUEST) != 0 {
            return Err(cursor.malformed("unknown flags"));
        }
        let caller = (flags & FLAG_CALLER != 0).then(|| cursor.requester()).transpose()?;
        let request = (flags & FLAG_REQUEST != 0).then(|| cursor.request()).transpose()?;
        let mut plain = Plain { bytes: Vec::with_capacity(self.body.len() * 2), rows: Vec::new() };
        let count = cursor.count(MAX_CHANGES, "more changes than the limit")?;
        plain.rows.reserve_exact(count.min(self.body.len()));
        let tokens = Tokens::of(self.lsn, self.time);
        for _ in 0..count {
            plain.read_change(&mut cursor, &tokens)?;
        }
        let names = plain.read_names(&mut cursor)?;
        if !cursor.is_empty() {
            return Err(cursor.malformed("bytes after the last name"));
        }
        let bytes = Bytes::from(plain.bytes);
        let changes = plain.rows.into_iter().map(|row| Change {
            table: row.table,
            key: bytes.slice(row.start..row.key_end),
            value: row.has_value.then(|| bytes.slice(row.key_end..row.end)),
        });
        let changes = changes.collect();
        let names = names.into_iter().map(|range| bytes.slice(range)).collect();
        Ok(Entry { lsn: self.lsn, time: self.time, kind: self.kind, caller, request, names, changes })
    }
}

/// The plain bytes of an entry that is being decoded: one allocation for all its rows and names.
struct Plain {
    bytes: Vec<u8>,
    rows: Vec<RowRange>,
}

struct RowRange {
    table: u8,
    start: usize,
    key_end: usize,
    end: usize,
    has_value: bool,
}

impl Plain {
    fn read_change(&mut self, cursor: &mut Cursor<'_>, tokens: &Tokens) -> Result<(), DecodeError> {
        let start = self.bytes.len();
        let tag = cursor.varint()?;
        let table = u8::try_from(tag >> TAG_BITS).map_err(|_| cursor.malformed("a table beyond 255"))?;
        let mut number = cursor.varint()?;
        if tag & TAG_DISTANCE != 0 {
            let absolute = tokens.lsn.checked_sub(number);
            number = absolute.ok_or_else(|| cursor.malformed("a key below zero"))?;
        }
        let rest = cursor.count(MAX_ENTRY_BYTES, "a key longer than the limit")?;
        let rest = cursor.take(rest)?;
        self.push(cursor, &number.to_be_bytes())?;
        self.push(cursor, rest)?;
        let key_end = self.bytes.len();
        let has_value = tag & TAG_VALUE != 0;
        if has_value {
            self.read_value(cursor, tokens)?;
        }
        self.rows.push(RowRange { table, start, key_end, end: self.bytes.len(), has_value });
        Ok(())
    }

    fn read_value(&mut self, cursor: &mut Cursor<'_>, tokens: &Tokens) -> Result<(), DecodeError> {
        let length_and_marked = cursor.count(MAX_ENTRY_BYTES * 2 + 1, "a value longer than the limit")?;
        let mut left = length_and_marked >> 1;
        if length_and_marked & 1 == 0 {
            let value = cursor.take(left)?;
            return self.push(cursor, value);
        }
        let count = cursor.count(MAX_MARKS, "more marks than the limit")?;
        let mut marks = [(0, Token::Lsn); MAX_MARKS];
        for mark in &mut marks[..count] {
            let gap = cursor.count(SEARCHED_BYTES * 2 + 1, "a mark beyond its value")?;
            *mark = (gap >> 1, if gap & 1 == 0 { Token::Lsn } else { Token::Time });
        }
        for (gap, what) in &marks[..count] {
            left = left.checked_sub(*gap).ok_or_else(|| cursor.malformed("a mark beyond its value"))?;
            let piece = cursor.take(*gap)?;
            self.push(cursor, piece)?;
            self.push(cursor, tokens.bytes(*what))?;
        }
        let piece = cursor.take(left)?;
        self.push(cursor, piece)
    }

    fn read_names(&mut self, cursor: &mut Cursor<'_>) -> Result<Vec<std::ops::Range<usize>>, DecodeError> {
        let count = cursor.count(MAX_NAMES, "more names than the limit")?;
        let mut names = Vec::with_capacity(count);
        let mut total: usize = self.bytes.len();
        for _ in 0..count {
            let length_and_reference =
                cursor.count(MAX_ENTRY_BYTES * 2 + 1, "a name longer than the limit")?;
            let length = length_and_reference >> 1;
            total += length;
            if total > MAX_ENTRY_BYTES {
                return Err(cursor.malformed("more plain bytes than the limit"));
            }
            let start = if length_and_reference & 1 == 0 {
                let start = self.bytes.len();
                let name = cursor.take(length)?;
                self.bytes.extend_from_slice(name);
                start
            } else {
                self.referred(cursor, length)?
            };
            names.push(start..start + length);
        }
        Ok(names)
    }

    /// Where the name that stands in a value begins.
    fn referred(&self, cursor: &mut Cursor<'_>, length: usize) -> Result<usize, DecodeError> {
        let row = cursor.count(MAX_CHANGES, "a name in a change that is not there")?;
        let offset = cursor.count(MAX_ENTRY_BYTES, "a name beyond its value")?;
        let row =
            self.rows.get(row).ok_or_else(|| cursor.malformed("a name in a change that is not there"))?;
        let start = row.key_end + offset;
        if start + length > row.end {
            return Err(cursor.malformed("a name beyond its value"));
        }
        Ok(start)
    }

    fn push(&mut self, cursor: &Cursor<'_>, bytes: &[u8]) -> Result<(), DecodeError> {
        if self.bytes.len() + bytes.len() > MAX_ENTRY_BYTES {
            return Err(cursor.malformed("more plain bytes than the limit"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

/// A place in stored bytes.
#[derive(Clone, Debug)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    offset: usize,
    /// Where `bytes` begin in the frame's body; for messages.
    base: usize,
    lsn: Lsn,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8], lsn: Lsn) -> Cursor<'a> {
        Cursor { bytes, offset: 0, base: 0, lsn }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.offset == self.bytes.len()
    }

    pub(crate) fn malformed(&self, what: &'static str) -> DecodeError {
        DecodeError::Malformed { lsn: self.lsn, offset: self.base + self.offset, what }
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        let byte =
            self.bytes.get(self.offset).copied().ok_or_else(|| self.malformed("the end, too early"))?;
        self.offset += 1;
        Ok(byte)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let rest = &self.bytes[self.offset..];
        let taken = rest.get(..length).ok_or_else(|| self.malformed("the end, too early"))?;
        self.offset += length;
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64, DecodeError> {
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(self.malformed("a number beyond 64 bits"))
    }

    /// A number that must not be above `limit`.
    fn count(&mut self, limit: usize, what: &'static str) -> Result<usize, DecodeError> {
        let number = self.varint()?;
        usize::try_from(number).ok().filter(|number| *number <= limit).ok_or_else(|| self.malformed(what))
    }

    fn small(&mut self) -> Result<u32, DecodeError> {
        let number = self.varint()?;
        u32::try_from(number).map_err(|_| self.malformed("a number beyond 32 bits"))
    }

    fn requester(&mut self) -> Result<Requester, DecodeError> {
        Ok(Requester { uid: self.small()?, gid: self.small()?, pid: self.small()? })
    }

    fn request(&mut self) -> Result<ForwardedRequest, DecodeError> {
        let mut session = [0; 8];
        session.copy_from_slice(self.take(8)?);
        Ok(ForwardedRequest { session: u64::from_le_bytes(session), sequence: self.varint()? })
    }
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
/// A tag is the table, shifted, and these flags.
const TAG_BITS: u32 = 2;
const TAG_DISTANCE: u64 = 2;
const TAG_VALUE: u64 = 1;
/// Every key begins with a number of this length.
const KEY_NUMBER_BYTES: usize = 8;
/// The archived head.
pub(crate) const HEAD_BYTES: usize = size_of::<ArchivedHead>();
const _: () = assert!(HEAD_BYTES == 5);
/// At most this many tokens are cut out of one value.
const MAX_MARKS: usize = 64;
/// Tokens and names are looked for in so many bytes of a value: rows are small, and inline data has none.
const SEARCHED_BYTES: usize = 4096;
/// Names are looked for in so many changes.
const NAME_SEARCH_CHANGES: usize = 8;
/// A shorter name is not worth a reference.
const SHORTEST_NAME_REFERENCE: usize = 4;
const TYPICAL_BODY_BYTES: usize = 256;

#[cfg(test)]
mod tests;
