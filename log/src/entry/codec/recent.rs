//! The small rows that a frame has written last. The stored form of a change may refer to one of them ([`super::patch`]).
//!
//! Invariants:
//! - It begins empty with each frame and depends on nothing but the changes of the frame so far: a writer and a reader that
//!   have come to the same change remember the same rows in the same order.
//! - It holds a bounded number of rows of bounded length, whatever it is given.

use super::KEY_NUMBER_BYTES;

/// The last small rows of a frame.
#[derive(Clone, Debug, Default)]
pub(super) struct Recent {
    /// Grows to [`REMEMBERED`] rows and is a ring from then on.
    rows: Vec<Row>,
    /// Which row of a full ring is the oldest.
    oldest: usize,
}

impl Recent {
    /// Begins a new frame.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.oldest = 0;
    }

    /// The rows, the last one first.
    fn latest(&self) -> impl Iterator<Item = &Row> {
        let (newer, older) = self.rows.split_at(self.oldest);
        newer.iter().rev().chain(older.iter().rev())
    }

    /// The row that was remembered `back` rows before the last one.
    pub(super) fn get(&self, back: usize) -> Option<&Row> {
        self.latest().nth(back)
    }

    /// The row that a change of this row is best said by: the last one of the same key, else the last one of the same table.
    pub(super) fn find(&self, table: u8, key: &[u8]) -> Option<Found<'_>> {
        let mut found = None;
        for (back, row) in self.latest().enumerate() {
            if row.table != table {
                continue;
            }
            if row.key() == key {
                return Some(Found { back, row, same_key: true });
            }
            found = found.or(Some(Found { back, row, same_key: false }));
        }
        found
    }

    /// Remembers a row, if it is small: its value is what is then written to the bytes that this returns.
    pub(super) fn remember(
        &mut self,
        table: u8,
        number: u64,
        rest: &[u8],
        value_length: usize,
    ) -> Option<&mut [u8]> {
        if rest.len() > MAX_REMEMBERED_REST || value_length > MAX_REMEMBERED_VALUE {
            return None;
        }
        let row = if self.rows.len() < REMEMBERED {
            self.rows.push(Row::EMPTY);
            self.rows.last_mut()?
        } else {
            let oldest = self.oldest;
            self.oldest = (oldest + 1) % REMEMBERED;
            &mut self.rows[oldest]
        };
        row.table = table;
        row.key[..KEY_NUMBER_BYTES].copy_from_slice(&number.to_be_bytes());
        row.key[KEY_NUMBER_BYTES..][..rest.len()].copy_from_slice(rest);
        (row.key_length, row.value_length) = ((KEY_NUMBER_BYTES + rest.len()) as u8, value_length as u8);
        Some(&mut row.value[..value_length])
    }
}

/// A row to say another one by.
pub(super) struct Found<'a> {
    /// How many rows were remembered after it.
    pub(super) back: usize,
    pub(super) row: &'a Row,
    pub(super) same_key: bool,
}

/// A remembered row.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) table: u8,
    key_length: u8,
    value_length: u8,
    key: [u8; KEY_NUMBER_BYTES + MAX_REMEMBERED_REST],
    value: [u8; MAX_REMEMBERED_VALUE],
}

impl Row {
    const EMPTY: Row = Row {
        table: 0,
        key_length: 0,
        value_length: 0,
        key: [0; KEY_NUMBER_BYTES + MAX_REMEMBERED_REST],
        value: [0; MAX_REMEMBERED_VALUE],
    };

    pub(super) fn key(&self) -> &[u8] {
        &self.key[..usize::from(self.key_length)]
    }

    pub(super) fn value(&self) -> &[u8] {
        &self.value[..usize::from(self.value_length)]
    }
}

/// So many rows are remembered: the entries of one file come close together, and a reader of hostile bytes must not hold more.
const REMEMBERED: usize = 16;
/// A row with more bytes behind the number of its key is not remembered.
pub(super) const MAX_REMEMBERED_REST: usize = 24;
/// A row with a longer value is not remembered, and a longer value is not said by another.
pub(super) const MAX_REMEMBERED_VALUE: usize = 128;
