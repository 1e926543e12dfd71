//! Encoding entries.
//!
//! Invariants:
//! - A refused entry leaves nothing behind in the output.

use bytes::Bytes;

use super::{
    CHANGES_SHIFT, EncodeError, FEW_CHANGES, FEW_NAMES, FLAG_CALLER, FLAG_REQUEST, FLAG_SAME_CALLER,
    HEAD_BYTES, KEY_NUMBER_BYTES, MAX_MARKS, NAME_SEARCH_CHANGES, NAMES_SHIFT, SEARCHED_BYTES,
    SHORTEST_NAME_REFERENCE, TAG_BITS, TAG_DISTANCE, TAG_REST, TAG_VALUE,
    token::{Mark, Tokens, be_u64},
};
use crate::entry::{Entry, MAX_CHANGES, MAX_ENTRY_BYTES, MAX_NAMES, Requester, WrittenRow};

/// What has been learned of an entry while its body was encoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EncodedBody {
    kind: u8,
    caller: Option<Requester>,
    /// How many bytes behind the flags name the caller.
    caller_bytes: usize,
}

impl EncodedBody {
    /// Appends the stored form of the entry with this body; `before` is the last caller named in the frame.
    pub(crate) fn push_stored(
        &self,
        body: &[u8],
        time_delta: u32,
        before: Option<Requester>,
        out: &mut Vec<u8>,
    ) {
        let same = self.caller.is_some() && self.caller == before;
        let left_out = if same { self.caller_bytes } else { 0 };
        push_varint(out, (body.len() - left_out + HEAD_BYTES) as u64);
        out.push(body[0] | if same { FLAG_SAME_CALLER } else { 0 });
        out.extend_from_slice(&body[1 + left_out..]);
        push_head(out, time_delta, self.kind);
    }
}

/// Appends the body of `entry` to `out`; on error `out` is as it was.
pub(crate) fn encode_body<R: WrittenRow>(
    entry: &Entry<R>,
    out: &mut Vec<u8>,
) -> Result<EncodedBody, EncodeError> {
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
    let caller_bytes = out.len() - start - 1;
    if let Some(request) = entry.request {
        out.extend_from_slice(&request.session.to_le_bytes());
        push_varint(out, request.sequence);
    }
    if changes == FEW_CHANGES {
        push_varint(out, entry.changes.len() as u64);
    }
    let tokens = Tokens::of(entry.lsn, entry.time);
    for change in &entry.changes {
        push_change(out, change, &tokens);
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
    Ok(EncodedBody { kind: entry.kind, caller: entry.caller, caller_bytes })
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

fn push_change(out: &mut Vec<u8>, change: &impl WrittenRow, tokens: &Tokens) {
    let (number, rest) = change.key().split_at(KEY_NUMBER_BYTES);
    let number = be_u64(number);
    let distance = tokens.distance(number);
    let mut tag = u64::from(change.table()) << TAG_BITS;
    tag |= u64::from(!rest.is_empty()) * TAG_REST;
    tag |= u64::from(distance.is_some()) * TAG_DISTANCE;
    tag |= u64::from(change.value().is_some()) * TAG_VALUE;
    push_varint(out, tag);
    push_varint(out, distance.unwrap_or(number));
    if !rest.is_empty() {
        push_varint(out, rest.len() as u64);
        out.extend_from_slice(rest);
    }
    if let Some(value) = change.value() {
        push_value(out, value, tokens);
    }
}

/// Appends a value: its length without what is cut out, the marks, and what is left.
fn push_value(out: &mut Vec<u8>, value: &[u8], tokens: &Tokens) {
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
    end = 0;
    for mark in marks {
        out.extend_from_slice(&value[end..mark.offset]);
        end = mark.offset + mark.length();
    }
    out.extend_from_slice(&value[end..]);
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
