//! Decoding entries.
//!
//! Invariants:
//! - Everything is checked: limits, marks and references within what they refer to, nothing left over.

use std::ops::Range;

use bytes::Bytes;
use rkyv::rancor;

use super::{
    ArchivedHead, CHANGES_SHIFT, Cursor, DecodeError, FEW_CHANGES, FEW_NAMES, FLAG_CALLER, FLAG_REQUEST,
    FLAG_SAME_CALLER, HEAD_BYTES, MAX_MARKS, NAMES_SHIFT, SEARCHED_BYTES, TAG_BITS, TAG_DISTANCE, TAG_REST,
    TAG_VALUE,
    token::{StoredMark, Tokens},
};
use crate::{
    LogTime, Lsn,
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
}

impl<'a> StoredEntries<'a> {
    /// The entries in the body of a frame with this first LSN and base time.
    pub(crate) fn new(body: &'a [u8], first: Lsn, base: LogTime) -> StoredEntries<'a> {
        StoredEntries { cursor: Cursor::new(body, 0, first), next: first, base, caller: None }
    }

    /// The next entry.
    pub(crate) fn next_entry(&mut self) -> Result<StoredEntry<'a>, DecodeError> {
        let lsn = self.next;
        self.cursor.lsn = lsn;
        let length = self.cursor.count(MAX_ENTRY_BYTES, "an entry longer than the limit")?;
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

    /// Checks that nothing is left.
    pub(crate) fn finish(&self) -> Result<(), DecodeError> {
        if self.cursor.is_empty() { Ok(()) } else { Err(self.cursor.malformed("bytes after the last entry")) }
    }

    fn read_caller(
        &self,
        flags: u8,
        body: &mut Cursor<'a>,
    ) -> Result<Option<(Requester, &'a [u8])>, DecodeError> {
        match (flags & FLAG_CALLER != 0, flags & FLAG_SAME_CALLER != 0) {
            (false, false) => Ok(None),
            (true, false) => {
                let written = body.rest();
                let start = body.offset;
                let caller = body.requester()?;
                Ok(Some((caller, &written[..body.offset - start])))
            }
            (true, true) if self.caller.is_some() => Ok(self.caller),
            (_, true) => Err(body.malformed("the same caller as nobody's")),
        }
    }
}

/// One entry of a frame body, taken apart but not decoded.
#[derive(Clone, Debug)]
pub(crate) struct StoredEntry<'a> {
    pub(crate) lsn: Lsn,
    pub(crate) time: LogTime,
    pub(crate) kind: u8,
    flags: u8,
    caller: Option<(Requester, &'a [u8])>,
    /// The body behind the caller.
    rest: Cursor<'a>,
}

impl StoredEntry<'_> {
    /// Appends the body to `out`, with the caller that the stored form may have left out.
    pub(crate) fn push_body(&self, out: &mut Vec<u8>) {
        out.push(self.flags);
        out.extend_from_slice(self.caller.map_or(&[], |(_, written)| written));
        out.extend_from_slice(self.rest.rest());
    }

    /// The entry itself.
    pub(crate) fn decode(self) -> Result<Entry, DecodeError> {
        let mut cursor = self.rest;
        let request = (self.flags & FLAG_REQUEST != 0).then(|| cursor.request()).transpose()?;
        let mut plain = Plain { bytes: Vec::with_capacity(cursor.rest().len() * 2), rows: Vec::new() };
        let count = match self.flags >> CHANGES_SHIFT & FEW_CHANGES {
            FEW_CHANGES => cursor.count(MAX_CHANGES, "more changes than the limit")?,
            few => usize::from(few),
        };
        plain.rows.reserve_exact(count.min(cursor.rest().len()));
        let tokens = Tokens::of(self.lsn, self.time);
        for _ in 0..count {
            plain.read_change(&mut cursor, &tokens)?;
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
            let absolute = tokens.at_distance(number);
            number = absolute.ok_or_else(|| cursor.malformed("a key below zero"))?;
        }
        self.push(cursor, &number.to_be_bytes())?;
        if tag & TAG_REST != 0 {
            let rest = cursor.count(MAX_ENTRY_BYTES, "a key longer than the limit")?;
            let rest = cursor.take(rest)?;
            self.push(cursor, rest)?;
        }
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
        let mut marks = [StoredMark::default(); MAX_MARKS];
        let mut count = 0;
        loop {
            let number = cursor.count(SEARCHED_BYTES << 4 | 15, "a mark beyond its value")?;
            let mark = marks.get_mut(count).ok_or_else(|| cursor.malformed("more marks than the limit"))?;
            *mark = StoredMark::parse(number);
            count += 1;
            if !mark.more {
                break;
            }
        }
        for mark in &marks[..count] {
            left = left.checked_sub(mark.gap).ok_or_else(|| cursor.malformed("a mark beyond its value"))?;
            let piece = cursor.take(mark.gap)?;
            self.push(cursor, piece)?;
            for _ in 0..mark.run {
                self.push(cursor, tokens.bytes(mark.what))?;
            }
        }
        let piece = cursor.take(left)?;
        self.push(cursor, piece)
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
