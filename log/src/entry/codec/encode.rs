//! Encoding entries.
//!
//! An entry becomes a body, which depends on nothing but the entry and which the chain is computed over, and then what a frame
//! stores of it, which leaves out what entries before it in the frame have said.
//!
//! Invariants:
//! - A refused entry leaves nothing behind in the output.
//! - What is stored is at most a byte a change longer than the body.

use bytes::Bytes;

use super::{
    CHANGES_SHIFT, Cursor, EncodeError, FEW_CHANGES, FEW_NAMES, FLAG_CALLER, FLAG_REQUEST, FLAG_SAME_CALLER,
    HEAD_BYTES, KEY_NUMBER_BYTES, MAX_MARKS, NAME_SEARCH_CHANGES, NAMES_SHIFT, SEARCHED_BYTES,
    SHORTEST_NAME_REFERENCE,
    change::{OTHER_KEY, SAID_BY_ANOTHER, SHIFT_BACK, SHIFT_WRITTEN, Tag, read_head},
    patch::Guess,
    recent::{Found, Recent},
    token::{Mark, Tokens, be_u64},
};
use crate::{
    Lsn,
    entry::{Entry, MAX_CHANGES, MAX_ENTRY_BYTES, MAX_NAMES, Requester, WrittenRow},
};

/// What the entries of a frame so far leave to be left out by the next one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// The last caller.
    caller: Option<Requester>,
    recent: Recent,
}

impl Said {
    /// Begins a new frame.
    pub(crate) fn clear(&mut self) {
        self.caller = None;
        self.recent.clear();
    }
}

/// What has been learned of an entry while its body was encoded.
#[derive(Clone, Debug, Default)]
pub(crate) struct EncodedBody {
    /// How many bytes behind the flags name the caller.
    caller_bytes: usize,
    /// The changes, as places in the body.
    changes: Vec<EncodedChange>,
}

/// Where a change stands in its body.
#[derive(Clone, Copy, Debug)]
struct EncodedChange {
    tag: u64,
    /// Where its tag begins.
    start: usize,
    /// Where its key begins, behind the tag.
    key: usize,
    /// Where its key ends.
    value: usize,
    /// Where the length and the marks of its value end.
    left: usize,
    end: usize,
}

impl EncodedBody {
    /// Appends the body of `entry` to `out`; on error `out` is as it was.
    pub(crate) fn encode<R: WrittenRow>(
        &mut self,
        entry: &Entry<R>,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        check_limits(entry)?;
        let start = out.len();
        let (names, changes) = (few(entry.names.len(), FEW_NAMES), few(entry.changes.len(), FEW_CHANGES));
        let mut flags = names << NAMES_SHIFT | changes << CHANGES_SHIFT;
        flags |=
            u8::from(entry.caller.is_some()) * FLAG_CALLER + u8::from(entry.request.is_some()) * FLAG_REQUEST;
        out.push(flags);
        if let Some(caller) = entry.caller {
            push_varint(out, u64::from(caller.uid));
            push_varint(out, u64::from(caller.gid));
            push_varint(out, u64::from(caller.pid));
        }
        self.caller_bytes = out.len() - start - 1;
        if let Some(request) = entry.request {
            out.extend_from_slice(&request.session.to_le_bytes());
            push_varint(out, request.sequence);
        }
        if changes == FEW_CHANGES {
            push_varint(out, entry.changes.len() as u64);
        }
        let tokens = Tokens::of(entry.lsn, entry.time);
        self.changes.clear();
        for change in &entry.changes {
            self.changes.push(push_change(out, start, change, &tokens));
        }
        if names == FEW_NAMES {
            push_varint(out, entry.names.len() as u64);
        }
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

    /// Appends what a frame stores of `entry`, of which this is the `body`.
    pub(crate) fn push_stored<R: WrittenRow>(
        &self,
        entry: &Entry<R>,
        body: &[u8],
        time_delta: u32,
        said: &mut Said,
        out: &mut Vec<u8>,
    ) {
        let start = out.len();
        let same = entry.caller.is_some() && entry.caller == said.caller;
        said.caller = entry.caller.or(said.caller);
        let left_out = if same { self.caller_bytes } else { 0 };
        out.push(body[0] | if same { FLAG_SAME_CALLER } else { 0 });
        let mut end = self.changes.first().map_or(body.len(), |change| change.start);
        out.extend_from_slice(&body[1 + left_out..end]);
        for (change, encoded) in entry.changes.iter().zip(&self.changes) {
            encoded.push_stored(change, body, &mut said.recent, out);
            end = encoded.end;
        }
        out.extend_from_slice(&body[end..]);
        push_head(out, time_delta, entry.kind);

        let length = out.len() - start;
        insert_varint(out, start, length as u64);
    }
}

impl EncodedChange {
    /// Appends what a frame stores of `change`: the shorter one of the change itself and what differs from a row before.
    fn push_stored(&self, change: &impl WrittenRow, body: &[u8], recent: &mut Recent, out: &mut Vec<u8>) {
        let start = out.len();
        if let Some(value) = change.value() {
            let before = recent.find(change.table(), change.key());
            if !before.is_some_and(|before| self.push_patched(&before, body, out)) {
                out.truncate(start);
                self.push_written(body, out);
            }
            let (number, rest) = change.key().split_at(KEY_NUMBER_BYTES);
            if let Some(slot) = recent.remember(change.table(), be_u64(number), rest, value.len()) {
                slot.copy_from_slice(value);
            }
        } else {
            self.push_written(body, out);
        }
    }

    fn push_written(&self, body: &[u8], out: &mut Vec<u8>) {
        push_varint(out, self.tag << SHIFT_WRITTEN);
        out.extend_from_slice(&body[self.key..self.end]);
    }

    /// Whether the change was appended as what differs from `before`, and is shorter so.
    fn push_patched(&self, before: &Found<'_>, body: &[u8], out: &mut Vec<u8>) -> bool {
        let start = out.len();
        let left = &body[self.left..self.end];
        let mut head = Cursor::new(&body[self.value..self.left], 0, Lsn::FIRST);
        let Ok((head, marks, _)) = read_head(&mut head) else {
            return false;
        };
        let Some(guess) = Guess::of(before.row.value(), marks, left.len()) else {
            return false;
        };
        let other = if before.same_key { 0 } else { OTHER_KEY };
        push_varint(out, (before.back as u64) << SHIFT_BACK | other | SAID_BY_ANOTHER);
        if !before.same_key {
            push_varint(out, self.tag);
            out.extend_from_slice(&body[self.key..self.value]);
        }
        out.extend_from_slice(head);
        guess.push_patch(left, out);
        out.len() - start < self.end - self.key + 1
    }
}

/// A count as the flags hold it.
fn few(count: usize, many: u8) -> u8 {
    u8::try_from(count).map_or(many, |count| count.min(many))
}

fn check_limits<R: WrittenRow>(entry: &Entry<R>) -> Result<(), EncodeError> {
    let lsn = entry.lsn;
    if entry.changes.len() > MAX_CHANGES {
        return Err(EncodeError::TooManyChanges { lsn, count: entry.changes.len() });
    }
    if entry.names.len() > MAX_NAMES {
        return Err(EncodeError::TooManyNames { lsn, count: entry.names.len() });
    }
    let mut length: usize = entry.names.iter().map(Bytes::len).sum();
    for change in &entry.changes {
        if change.key().len() < KEY_NUMBER_BYTES {
            return Err(EncodeError::ShortKey { lsn, table: change.table() });
        }
        length += change.key().len() + change.value().map_or(0, <[u8]>::len);
    }
    if length > MAX_ENTRY_BYTES {
        return Err(EncodeError::TooLarge { lsn, length });
    }
    Ok(())
}

/// Appends a change to the body that begins at `body`, and says where it is.
fn push_change(out: &mut Vec<u8>, body: usize, change: &impl WrittenRow, tokens: &Tokens) -> EncodedChange {
    let start = out.len() - body;
    let (number, rest) = change.key().split_at(KEY_NUMBER_BYTES);
    let tag = Tag::of(change.table(), be_u64(number), rest, change.value().is_some(), tokens);
    push_varint(out, tag.bits());
    let key = out.len() - body;
    tag.push_key(out, rest);
    let value = out.len() - body;
    let left = change.value().map_or(value, |value| push_value(out, value, tokens) - body);
    EncodedChange { tag: tag.bits(), start, key, value, left, end: out.len() - body }
}

/// Appends a value: its length without what is cut out, the marks, and what is left, of which it says the beginning.
fn push_value(out: &mut Vec<u8>, value: &[u8], tokens: &Tokens) -> usize {
    let mut marks = [Mark::default(); MAX_MARKS];
    let count = tokens.find(value, &mut marks);
    let marks = &marks[..count];
    let cut: usize = marks.iter().map(Mark::length).sum();
    push_varint(out, ((value.len() - cut) as u64) << 1 | u64::from(count > 0));
    let mut end = 0;
    for (index, mark) in marks.iter().enumerate() {
        push_varint(out, mark.stored(end, index + 1 < count));
        end = mark.offset + mark.length();
    }
    let left = out.len();
    end = 0;
    for mark in marks {
        out.extend_from_slice(&value[end..mark.offset]);
        end = mark.offset + mark.length();
    }
    out.extend_from_slice(&value[end..]);
    left
}

/// Appends a name: where it stands in a value, if it does, else its bytes.
fn push_name(out: &mut Vec<u8>, name: &[u8], changes: &[impl WrittenRow]) {
    let found = changes.iter().take(NAME_SEARCH_CHANGES).enumerate().find_map(|(index, change)| {
        let value = change.value()?;
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
pub(super) fn push_head(out: &mut Vec<u8>, time_delta: u32, kind: u8) {
    // The head holds no pointer, so its archive is its fields, packed: the test of the golden bytes and `access` in the
    // decoder keep this equal to what rkyv writes.
    out.extend_from_slice(&time_delta.to_le_bytes());
    out.push(kind);
}

/// Appends `number`, seven bits a byte, the lowest first.
pub(super) fn push_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Puts `number` before the bytes of `out` that begin at `at`.
fn insert_varint(out: &mut Vec<u8>, at: usize, number: u64) {
    let end = out.len();
    push_varint(out, number);
    let length = out.len() - end;
    out[at..].rotate_right(length);
}
