//! The packs of a volume, as its tree knows them.

use std::collections::VecDeque;

use super::Volume;
use crate::{
    Answer, Caller, Errno, PackNumber, PackRow, RowKey, ViewError,
    decide::{PACKS_PER_ENTRY, PackNews, RecordPacks},
};

impl Volume {
    /// The packs that the tree refers to, by number, as [`Volume::known_packs`].
    pub fn packs(&self) -> impl Iterator<Item = Result<(PackNumber, PackRow), ViewError>> + Send + 'static {
        // The rest may be in no store any more.
        self.known_packs().filter(|row| row.as_ref().map_or(true, |(_, row)| row.live_bytes > 0))
    }

    /// The packs that the tree knows, by number, also those that only its past refers to. Whoever takes long over them sees later ones as
    /// they are by then: a view that is held for long would hold up the index. Reads the index where it is polled.
    pub fn known_packs(
        &self,
    ) -> impl Iterator<Item = Result<(PackNumber, PackRow), ViewError>> + Send + 'static {
        PackPages { volume: self.clone(), next: Some(0), page: VecDeque::new() }
    }

    /// The row of a pack, if the tree knows it.
    pub fn pack(&self, number: PackNumber) -> Result<Option<PackRow>, ViewError> {
        self.shared.sequencer.newest(&RowKey::pack(number.0), |row| PackRow::decode(row))
    }

    /// Writes down what became known of at most [`PACKS_PER_ENTRY`] packs, in one entry; says of how many it was news. EINVAL for
    /// more packs.
    pub fn record_packs(&self, packs: Vec<PackNumber>, news: PackNews) -> Answer<u64> {
        if packs.len() > PACKS_PER_ENTRY {
            return Answer::Now(Err(Errno::EINVAL));
        }
        self.mutate(Caller::default(), RecordPacks { packs, news })
    }
}

/// Rows of packs, a page at a time.
struct PackPages {
    volume: Volume,
    /// The number from which to read on, if there may be more.
    next: Option<u64>,
    page: VecDeque<(PackNumber, PackRow)>,
}

impl PackPages {
    fn read_page(&mut self, from: u64) -> Result<(), ViewError> {
        self.next = None;
        let rows = self.volume.view().rows(RowKey::pack(from)..RowKey::pack(u64::MAX));
        for (place, row) in rows.enumerate() {
            let (key, value) = row?;
            let number = key.number().unwrap_or_default();
            if place >= PAGE_ROWS {
                self.next = Some(number);
                break;
            }
            let row = PackRow::decode(&value).map_err(|reason| ViewError::Row { key, reason })?;
            self.page.push_back((PackNumber(number), row));
        }
        Ok(())
    }
}

impl Iterator for PackPages {
    type Item = Result<(PackNumber, PackRow), ViewError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.page.pop_front() {
                return Some(Ok(row));
            }
            let from = self.next?;
            if let Err(error) = self.read_page(from) {
                return Some(Err(error));
            }
        }
    }
}

const PAGE_ROWS: usize = if cfg!(test) { 3 } else { 4096 };
