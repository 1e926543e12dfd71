//! One change of a stored entry: a row that is written out, or said by a row that the frame has written before.
//!
//! Invariants:
//! - What is read here is remembered here, so that reading a change twice, or not at all, is no mistake that can be made.

use bytes::BufMut;

use super::{
    Cursor, DecodeError, KEY_NUMBER_BYTES, TAG_BITS, TAG_DISTANCE, TAG_REST, TAG_VALUE,
    encode::push_varint,
    patch::{Guess, Patched},
    recent::{MAX_REMEMBERED_REST, Recent, Row},
    token::{Marks, Tokens, be_u64},
};
use crate::entry::MAX_ENTRY_BYTES;

/// A change as it was read.
pub(super) struct StoredChange<'a> {
    pub(super) table: u8,
    /// The first eight bytes of the key.
    pub(super) number: u64,
    rest: Rest<'a>,
    pub(super) value: Option<StoredValue<'a>>,
}

/// The rest of a key.
enum Rest<'a> {
    Stored(&'a [u8]),
    Remembered([u8; MAX_REMEMBERED_REST], usize),
}

impl<'a> StoredChange<'a> {
    /// Reads the next change, and remembers its row.
    pub(super) fn read(
        cursor: &mut Cursor<'a>,
        tokens: &Tokens,
        recent: &mut Recent,
    ) -> Result<StoredChange<'a>, DecodeError> {
        let tag = cursor.varint()?;
        let change = if tag & SAID_BY_ANOTHER == 0 {
            let mut change = StoredChange::read_key(cursor, tag >> SHIFT_WRITTEN, tokens)?;
            if tag >> SHIFT_WRITTEN & TAG_VALUE != 0 {
                change.value = Some(StoredValue::read(cursor)?);
            }
            change
        } else {
            let before = usize::try_from(tag >> SHIFT_BACK).ok().and_then(|back| recent.get(back));
            let before = before.ok_or_else(|| cursor.malformed("a row that is not remembered"))?;
            let mut change = if tag & OTHER_KEY == 0 {
                StoredChange::of_key(before)
            } else {
                let tag = cursor.varint()?;
                if tag >> TAG_BITS != u64::from(before.table) || tag & TAG_VALUE == 0 {
                    return Err(cursor.malformed("a row that is said by one of another table"));
                }
                StoredChange::read_key(cursor, tag, tokens)?
            };
            change.value = Some(StoredValue::read_patched(cursor, before.value())?);
            change
        };
        if let Some(value) = &change.value {
            value.remember(&change, tokens, recent);
        }
        Ok(change)
    }

    /// A change of the same row as `before`, without its value.
    fn of_key(before: &Row) -> StoredChange<'a> {
        let (number, rest) = before.key().split_at(KEY_NUMBER_BYTES);
        let mut kept = [0; MAX_REMEMBERED_REST];
        kept[..rest.len()].copy_from_slice(rest);
        let rest = Rest::Remembered(kept, rest.len());
        StoredChange { table: before.table, number: be_u64(number), rest, value: None }
    }

    fn read_key(cursor: &mut Cursor<'a>, tag: u64, tokens: &Tokens) -> Result<StoredChange<'a>, DecodeError> {
        let table = u8::try_from(tag >> TAG_BITS).map_err(|_| cursor.malformed("a table beyond 255"))?;
        let mut number = cursor.varint()?;
        if tag & TAG_DISTANCE != 0 {
            let absolute = tokens.at_distance(number);
            number = absolute.ok_or_else(|| cursor.malformed("a key below zero"))?;
        }
        let mut rest: &[u8] = &[];
        if tag & TAG_REST != 0 {
            let length = cursor.count(MAX_ENTRY_BYTES, "a key longer than the limit")?;
            rest = cursor.take(length)?;
        }
        Ok(StoredChange { table, number, rest: Rest::Stored(rest), value: None })
    }

    /// The key behind its number.
    pub(super) fn rest(&self) -> &[u8] {
        match &self.rest {
            Rest::Stored(rest) => rest,
            Rest::Remembered(rest, length) => &rest[..*length],
        }
    }

    /// How long key and value are.
    pub(super) fn plain_length(&self) -> usize {
        KEY_NUMBER_BYTES + self.rest().len() + self.value.as_ref().map_or(0, StoredValue::plain_length)
    }

    /// Appends the change as a body has it.
    pub(super) fn push_body(&self, tokens: &Tokens, out: &mut Vec<u8>) {
        let tag = Tag::of(self.table, self.number, self.rest(), self.value.is_some(), tokens);
        push_varint(out, tag.bits());
        tag.push_key(out, self.rest());
        if let Some(value) = &self.value {
            out.extend_from_slice(value.head);
            out.extend_from_slice(value.left.bytes());
        }
    }
}

/// What a body says of a change before its key.
#[derive(Clone, Copy)]
pub(super) struct Tag {
    bits: u64,
    /// The number of the key, or its distance.
    number: u64,
}

impl Tag {
    pub(super) fn of(table: u8, number: u64, rest: &[u8], has_value: bool, tokens: &Tokens) -> Tag {
        let distance = tokens.distance(number);
        let mut bits = u64::from(table) << TAG_BITS;
        bits |= u64::from(!rest.is_empty()) * TAG_REST;
        bits |= u64::from(distance.is_some()) * TAG_DISTANCE;
        bits |= u64::from(has_value) * TAG_VALUE;
        Tag { bits, number: distance.unwrap_or(number) }
    }

    pub(super) fn bits(self) -> u64 {
        self.bits
    }

    /// Appends the key that it stands before, with this rest.
    pub(super) fn push_key(self, out: &mut Vec<u8>, rest: &[u8]) {
        push_varint(out, self.number);
        if !rest.is_empty() {
            push_varint(out, rest.len() as u64);
            out.extend_from_slice(rest);
        }
    }
}

/// A value as it was read: its tokens are still cut out.
pub(super) struct StoredValue<'a> {
    /// The length of what is left, and the marks, as they are stored.
    head: &'a [u8],
    marks: Marks<'a>,
    left: Left<'a>,
}

/// What is left of a value when its tokens are cut out.
enum Left<'a> {
    Stored(&'a [u8]),
    Patched(Patched),
}

impl Left<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Left::Stored(left) => left,
            Left::Patched(left) => left.bytes(),
        }
    }
}

impl<'a> StoredValue<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<StoredValue<'a>, DecodeError> {
        let (head, marks, left) = read_head(cursor)?;
        Ok(StoredValue { head, marks, left: Left::Stored(cursor.take(left)?) })
    }

    fn read_patched(cursor: &mut Cursor<'a>, before: &[u8]) -> Result<StoredValue<'a>, DecodeError> {
        let (head, marks, left) = read_head(cursor)?;
        let guess = Guess::of(before, marks.clone(), left);
        let guess = guess.ok_or_else(|| cursor.malformed("a patch of a value that is too long"))?;
        Ok(StoredValue { head, marks, left: Left::Patched(guess.patched(cursor)?) })
    }

    fn plain_length(&self) -> usize {
        self.left.bytes().len() + self.marks.cut()
    }

    /// Appends the value itself.
    pub(super) fn push_plain(&self, tokens: &Tokens, out: &mut impl BufMut) {
        let mut left = self.left.bytes();
        for mark in self.marks.clone() {
            let (piece, rest) = left.split_at(mark.gap);
            out.put_slice(piece);
            (0..mark.run).for_each(|_| out.put_slice(tokens.bytes(mark.what)));
            left = rest;
        }
        out.put_slice(left);
    }

    fn remember(&self, change: &StoredChange<'_>, tokens: &Tokens, recent: &mut Recent) {
        let slot = recent.remember(change.table, change.number, change.rest(), self.plain_length());
        if let Some(mut slot) = slot {
            self.push_plain(tokens, &mut slot);
        }
    }
}

/// Reads what stands before the bytes that are left of a value: how it is stored, the marks, and how many are left.
pub(super) fn read_head<'a>(cursor: &mut Cursor<'a>) -> Result<(&'a [u8], Marks<'a>, usize), DecodeError> {
    let start = cursor.offset;
    let length_and_marked = cursor.count(MAX_ENTRY_BYTES * 2 + 1, "a value longer than the limit")?;
    let left = length_and_marked >> 1;
    let marks = if length_and_marked & 1 == 0 { Marks::none(cursor) } else { Marks::read(cursor, left)? };
    Ok((cursor.since(start), marks, left))
}

/// A stored tag says whether the change is said by a row before; if not, the tag of the body stands above this bit.
pub(super) const SAID_BY_ANOTHER: u64 = 1;
pub(super) const SHIFT_WRITTEN: u32 = 1;
/// The row before has another key, and the tag and the key of this one follow.
pub(super) const OTHER_KEY: u64 = 2;
/// How many rows were remembered after the row before.
pub(super) const SHIFT_BACK: u32 = 2;
