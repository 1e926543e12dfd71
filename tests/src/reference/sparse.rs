//! The bytes of a file in the model: a map of small pages, so that a hole of many terabytes costs nothing.
//!
//! Invariants:
//! - A byte that no page holds is zero; no page lies wholly behind the end, and behind the end every byte of a page is zero.

use std::collections::BTreeMap;

/// Contents of a regular file.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    size: u64,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Sparse {
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Units of 512 bytes that hold data.
    pub(super) fn blocks(&self) -> u64 {
        self.pages.len() as u64 * (PAGE / 512)
    }

    /// Up to `length` bytes from `offset`, cut at the end of the file.
    pub(super) fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let length = length.min(self.size.saturating_sub(offset));
        let mut bytes = vec![0; usize::try_from(length).expect("a read has at most 4 GiB")];
        for (page, from, at) in pieces(offset, bytes.len()) {
            if let Some(held) = self.pages.get(&page) {
                let end = (at.start + held.len() - from).min(at.end);
                bytes[at.start..end].copy_from_slice(&held[from..from + (end - at.start)]);
            }
        }
        bytes
    }

    /// Puts `data` at `offset`, which with its length is within the largest file.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        for (page, from, at) in pieces(offset, data.len()) {
            let held = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into_boxed_slice());
            held[from..from + at.len()].copy_from_slice(&data[at]);
        }
        self.size = self.size.max(offset + data.len() as u64);
    }

    /// Cuts off or extends with a hole.
    pub(super) fn resize(&mut self, size: u64) {
        self.size = size;
        self.pages.split_off(&size.div_ceil(PAGE));
        if let Some(last) = self.pages.get_mut(&(size / PAGE)) {
            last[(size % PAGE) as usize..].fill(0);
        }
    }
}

/// The pages that `length` bytes at `offset` fall into: page number, place in the page, range of the bytes.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let position = offset + done as u64;
        let from = (position % PAGE) as usize;
        let end = length.min(done + PAGE as usize - from);
        let at = done..end;
        done = end;
        Some((position / PAGE, from, at))
    })
}

/// Bytes of a page.
const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// The model is the judge: its own bytes are judged by a plain vector.
    #[test]
    fn bytes_behind_a_cut_come_back_as_zeros() {
        let mut sparse = Sparse::default();
        sparse.write(4090, &[7; 20]);
        sparse.resize(4095);
        sparse.resize(9000);
        let mut expected = vec![0; 9000];
        expected[4090..4095].fill(7);
        assert_eq!(sparse.read(0, 10_000), expected);
        assert_eq!(sparse.read(8999, 5), [0]);
        assert!(sparse.read(9000, 5).is_empty());
        sparse.resize(1 << 62);
        assert_eq!(sparse.read((1 << 62) - 1, 5), [0]);
        assert_eq!(sparse.blocks(), 8);
    }
}
