//! Rows as they are: everything that has no form of its own, and whatever that form could not give back exactly.
//!
//! Keys share what they have in common with the key before; values are stored one after the other and left to the compressor.
//!
//! Invariants:
//! - Any key and any value come back with their exact bytes, in the order in which they were put in.

use bytes::Bytes;

use super::{
    block::{BLOCK_ROWS, BlockFault},
    streams::{BLOCK_PLAIN_MAX, StreamReader, StreamWriter, take},
};
use crate::RowKey;

/// Rows gathered for one block.
#[derive(Default, PartialEq, Eq, Debug)]
pub(super) struct PlainRows {
    /// Key (table number first) and value of each row, one after the other.
    bytes: Vec<u8>,
    /// Length of each key and of each value.
    lengths: Vec<(u32, u32)>,
}

impl PlainRows {
    pub(super) fn push(&mut self, key: &RowKey, value: &[u8]) {
        self.bytes.extend_from_slice(key.as_bytes());
        self.bytes.extend_from_slice(value);
        self.lengths.push((key.as_bytes().len() as u32, value.len() as u32));
    }

    pub(super) fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Whether another row belongs into the next block.
    pub(super) fn is_full(&self) -> bool {
        self.lengths.len() >= BLOCK_ROWS || self.bytes.len() >= BLOCK_BYTES
    }

    pub(super) fn encode(&self) -> StreamWriter {
        let (mut shared, mut key_lengths, mut value_lengths) = (Vec::new(), Vec::new(), Vec::new());
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut last: &[u8] = &[];
        let mut rest = &self.bytes[..];
        for (key_length, value_length) in &self.lengths {
            let (key, after) = rest.split_at(*key_length as usize);
            let (value, after) = after.split_at(*value_length as usize);
            let common = last.iter().zip(key).take_while(|(a, b)| a == b).count();
            shared.push(common as u64);
            key_lengths.push((key.len() - common) as u64);
            keys.extend_from_slice(&key[common..]);
            value_lengths.push(value.len() as u64);
            values.extend_from_slice(value);
            (last, rest) = (key, after);
        }
        let mut streams = StreamWriter::default();
        streams.numbers(SHARED, &shared);
        streams.numbers(KEY_LENGTHS, &key_lengths);
        streams.bytes(KEYS, keys);
        streams.numbers(VALUE_LENGTHS, &value_lengths);
        streams.bytes(VALUES, values);
        streams
    }

    pub(super) fn decode(streams: &mut StreamReader, count: usize) -> Result<PlainRows, BlockFault> {
        let mut shared = streams.numbers(SHARED, count)?;
        let mut key_lengths = streams.numbers(KEY_LENGTHS, count)?;
        let mut value_lengths = streams.numbers(VALUE_LENGTHS, count)?;
        let (keys, values) = (streams.bytes(KEYS), streams.bytes(VALUES));
        let (mut keys, mut values) = (&keys[..], &values[..]);
        let mut rows = PlainRows::default();
        let mut last = Vec::new();
        for _ in 0..count {
            let common = shared.next_len()?;
            if common > last.len() {
                return Err(BlockFault("a key shares more than there is"));
            }
            last.truncate(common);
            last.extend_from_slice(take(&mut keys, key_lengths.next_len()?)?);
            let value = take(&mut values, value_lengths.next_len()?)?;
            if last.is_empty() || rows.bytes.len() + last.len() + value.len() > EXPANDED_MAX {
                return Err(BlockFault("keys are empty or too long"));
            }
            rows.bytes.extend_from_slice(&last);
            rows.bytes.extend_from_slice(value);
            rows.lengths.push((last.len() as u32, value.len() as u32));
        }
        if !keys.is_empty() || !values.is_empty() {
            return Err(BlockFault("bytes follow the last row"));
        }
        Ok(rows)
    }

    /// Hands out every row.
    pub(super) fn emit(&self, mut sink: impl FnMut(u8, &[u8], Bytes)) {
        let mut rest = &self.bytes[..];
        for (key_length, value_length) in &self.lengths {
            let (key, after) = rest.split_at(*key_length as usize);
            let (value, after) = after.split_at(*value_length as usize);
            rest = after;
            sink(key[0], &key[1..], Bytes::copy_from_slice(value));
        }
    }
}

/// The largest key and value, together, of a row that a snapshot takes.
pub(super) const ROW_MAX: usize = 16 << 20;
/// Where a block of rows is closed.
const BLOCK_BYTES: usize = 1 << 20;
/// Front-coded keys expand; a block that a writer makes does not expand beyond this.
const EXPANDED_MAX: usize = BLOCK_BYTES + ROW_MAX;
const _: () = assert!(EXPANDED_MAX + 3 * 8 * BLOCK_ROWS < BLOCK_PLAIN_MAX);

const SHARED: u8 = 1;
const KEY_LENGTHS: u8 = 2;
const KEYS: u8 = 3;
const VALUE_LENGTHS: u8 = 4;
const VALUES: u8 = 5;
