//! Decoding entries.
//!
//! A frame is read from its beginning: what an entry leaves out because an entry before it has said it is put back here.
//!
//! Invariants:
//! - Everything is checked: limits, marks and references within what they refer to, nothing left over.
//! - Every change of a frame passes [`StoredChange::read`] once and in order, so that what is remembered is what the writer
//!   remembered.

use std::ops::Range;

use bytes::Bytes;
use rkyv::rancor;

use super::{
    ArchivedHead, CHANGES_SHIFT, Cursor, DecodeError, FEW_CHANGES, FEW_NAMES, FLAG_CALLER, FLAG_REQUEST,
    FLAG_SAME_CALLER, HEAD_BYTES, MAX_STORED_BYTES, NAMES_SHIFT, change::StoredChange, recent::Recent,
    token::Tokens,
};
use crate::{
    ChainHash, LogTime, Lsn,
    chain::start_link,
    entry::{Change, Entry, MAX_CHANGES, MAX_ENTRY_BYTES, MAX_NAMES, Requester},
};

/// The entries of a frame's body, taken apart one by one.
#[derive(Clone, Debug)]
pub(crate) struct StoredEntries<'a> {
    cursor: Cursor<'a>,
    next: Lsn,
    base: LogTime,
    /// The last caller named in the frame, and how it was written.
    caller: Option<(Requester, &'a [u8])>,
    recent: Recent,
}

impl<'a> StoredEntries<'a> {
    /// The entries in the body of a frame with this first LSN and base time.
    pub(crate) fn new(body: &'a [u8], first: Lsn, base: LogTime) -> StoredEntries<'a> {
        let cursor = Cursor::new(body, 0, first);
        StoredEntries { cursor, next: first, base, caller: None, recent: Recent::default() }
    }

    /// The next entry.
    pub(crate) fn next_entry(&mut self) -> Result<Entry, DecodeError> {
        self.next_stored()?.decode(&mut self.recent)
    }

    /// The input of the chain hash after the next entry, which is put in the place of what `link` holds.
    pub(crate) fn next_link(&mut self, before: &ChainHash, link: &mut Vec<u8>) -> Result<(), DecodeError> {
        let entry = self.next_stored()?;
        start_link(link, before, entry.lsn, entry.time, entry.kind);
        entry.push_body(&mut self.recent, link)
    }

    /// Checks that nothing is left.
    pub(crate) fn finish(&self) -> Result<(), DecodeError> {
        if self.cursor.is_empty() { Ok(()) } else { Err(self.cursor.malformed("bytes after the last entry")) }
    }

    fn next_stored(&mut self) -> Result<StoredEntry<'a>, DecodeError> {
        let lsn = self.next;
        self.cursor.lsn = lsn;
        let length = self.cursor.count(MAX_STORED_BYTES, "an entry longer than the limit")?;
        let offset = self.cursor.offset;
        let stored = self.cursor.take(length)?;
        let Some(split) = length.checked_sub(HEAD_BYTES) else {
            return Err(self.cursor.malformed("an entry shorter than its head"));
        };
        let head = rkyv::access::<ArchivedHead, rancor::Error>(stored)
            .map_err(|_| self.cursor.malformed("a head that rkyv does not accept"))?;
        let time = self.base.as_nanos().checked_add(u64::from(head.time_delta.to_native()));
        let time = time.ok_or_else(|| self.cursor.malformed("a time beyond the last"))?;

        let mut body = Cursor::new(&stored[..split], offset, lsn);
        let flags = body.byte()?;
        let caller = self.read_caller(flags, &mut body)?;
        self.caller = caller.or(self.caller);
        self.next = lsn.next();
        let flags = flags & !FLAG_SAME_CALLER;
        Ok(StoredEntry { lsn, time: LogTime::from_nanos(time), kind: head.kind, flags, caller, rest: body })
    }

    fn read_caller(
        &self,
        flags: u8,
        body: &mut Cursor<'a>,
    ) -> Result<Option<(Requester, &'a [u8])>, DecodeError> {
        match (flags & FLAG_CALLER != 0, flags & FLAG_SAME_CALLER != 0) {
            (false, false) => Ok(None),
            (true, false) => {
                let start = body.offset;
                let caller = body.requester()?;
                Ok(Some((caller, body.since(start))))
            }
            (true, true) if self.caller.is_some() => Ok(self.caller),
            (_, true) => Err(body.malformed("the same caller as nobody's")),
        }
    }
}

/// One entry of a frame body, taken apart but not decoded.
struct StoredEntry<'a> {
    lsn: Lsn,
    time: LogTime,
    kind: u8,
    flags: u8,
    caller: Option<(Requester, &'a [u8])>,
    /// The body behind the caller.
    rest: Cursor<'a>,
}

impl StoredEntry<'_> {
    /// Appends the body to `out`, with what the stored form has left out.
    fn push_body(self, recent: &mut Recent, out: &mut Vec<u8>) -> Result<(), DecodeError> {
        let (start, mut cursor) = (out.len(), self.rest);
        out.push(self.flags);
        out.extend_from_slice(self.caller.map_or(&[], |(_, written)| written));
        let before = cursor.offset;
        if self.flags & FLAG_REQUEST != 0 {
            cursor.request()?;
        }
        let count = changes(self.flags, &mut cursor)?;
        out.extend_from_slice(cursor.since(before));
        let tokens = Tokens::of(self.lsn, self.time);
        for _ in 0..count {
            StoredChange::read(&mut cursor, &tokens, recent)?.push_body(&tokens, out);
            if out.len() - start > MAX_ENTRY_BYTES {
                return Err(cursor.malformed("an entry longer than the limit"));
            }
        }
        out.extend_from_slice(cursor.rest());
        Ok(())
    }

    /// The entry itself.
    fn decode(self, recent: &mut Recent) -> Result<Entry, DecodeError> {
        let mut cursor = self.rest;
        let request = (self.flags & FLAG_REQUEST != 0).then(|| cursor.request()).transpose()?;
        let mut plain = Plain { bytes: Vec::with_capacity(cursor.rest().len() * 2), rows: Vec::new() };
        let count = changes(self.flags, &mut cursor)?;
        plain.rows.reserve_exact(count.min(cursor.rest().len()));
        let tokens = Tokens::of(self.lsn, self.time);
        for _ in 0..count {
            let change = StoredChange::read(&mut cursor, &tokens, recent)?;
            plain.push_change(&change, &tokens).ok_or_else(|| cursor.malformed(TOO_LARGE))?;
        }
        let count = match self.flags >> NAMES_SHIFT & FEW_NAMES {
            FEW_NAMES => cursor.count(MAX_NAMES, "more names than the limit")?,
            few => usize::from(few),
        };
        let names = plain.read_names(&mut cursor, count)?;
        if !cursor.is_empty() {
            return Err(cursor.malformed("bytes after the last name"));
        }
        let bytes = Bytes::from(plain.bytes);
        let changes = plain.rows.into_iter().map(|row| Change {
            table: row.table,
            key: bytes.slice(row.start..row.key_end),
            value: row.has_value.then(|| bytes.slice(row.key_end..row.end)),
        });
        Ok(Entry {
            lsn: self.lsn,
            time: self.time,
            kind: self.kind,
            caller: self.caller.map(|(caller, _)| caller),
            request,
            changes: changes.collect(),
            names: names.into_iter().map(|range| bytes.slice(range)).collect(),
        })
    }
}

/// How many changes follow.
fn changes(flags: u8, cursor: &mut Cursor<'_>) -> Result<usize, DecodeError> {
    match flags >> CHANGES_SHIFT & FEW_CHANGES {
        FEW_CHANGES => cursor.count(MAX_CHANGES, "more changes than the limit"),
        few => Ok(usize::from(few)),
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
    /// Adds a row; `None` if that is more than the limit.
    fn push_change(&mut self, change: &StoredChange<'_>, tokens: &Tokens) -> Option<()> {
        let start = self.bytes.len();
        if start + change.plain_length() > MAX_ENTRY_BYTES {
            return None;
        }
        self.bytes.extend_from_slice(&change.number.to_be_bytes());
        self.bytes.extend_from_slice(change.rest());
        let key_end = self.bytes.len();
        if let Some(value) = &change.value {
            value.push_plain(tokens, &mut self.bytes);
        }
        let (table, end, has_value) = (change.table, self.bytes.len(), change.value.is_some());
        self.rows.push(RowRange { table, start, key_end, end, has_value });
        Some(())
    }

    fn read_names(
        &mut self,
        cursor: &mut Cursor<'_>,
        count: usize,
    ) -> Result<Vec<Range<usize>>, DecodeError> {
        let mut names = Vec::with_capacity(count);
        let mut total: usize = self.bytes.len();
        for _ in 0..count {
            let length_and_reference =
                cursor.count(MAX_ENTRY_BYTES * 2 + 1, "a name longer than the limit")?;
            let length = length_and_reference >> 1;
            total += length;
            if total > MAX_ENTRY_BYTES {
                return Err(cursor.malformed(TOO_LARGE));
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
}

const TOO_LARGE: &str = "more plain bytes than the limit";
