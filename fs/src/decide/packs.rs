//! What became known of packs: lost with a source, or found again.
//!
//! Invariants:
//! - Nothing but the state of the rows changes, and no row is made. Packs of which nothing is live any more are spoken of too: states of the
//!   past refer to them, and an archive gives those back.

use murphy_log::MAX_CHANGES;

use super::{Draft, EntryKind, Operation, Refusal};
use crate::{PackNumber, PackRow, PackState, RowKey};

/// What became known of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PackNews {
    /// Nobody has it.
    Missing,
    /// It is in the source's own store, and every copy needs it from now on.
    Found,
}

/// Writes down what became known of some packs.
#[derive(Clone, Debug)]
pub(crate) struct RecordPacks {
    /// At most [`PACKS_PER_ENTRY`].
    pub(crate) packs: Vec<PackNumber>,
    pub(crate) news: PackNews,
}

impl Operation for RecordPacks {
    /// Of how many it was news.
    type Reply = u64;
    const KIND: EntryKind = EntryKind::Packs;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<u64, Refusal> {
        draft.need(self.packs.iter().map(|pack| RowKey::pack(pack.0)))?;
        let state = match self.news {
            PackNews::Missing => PackState::Missing,
            PackNews::Found => PackState::Found { at: draft.lsn() },
        };
        let mut changed = 0;
        for pack in &self.packs {
            let key = RowKey::pack(pack.0);
            let Some(row) = draft.decoded(&key, |row| PackRow::decode(row))? else { continue };
            if row.state != state {
                draft.put(key, Some(PackRow { state, ..row }.encode()))?;
                changed += 1;
            }
        }
        Ok(changed)
    }
}

/// How many packs one entry speaks of: decided in about 100 us of the critical section.
pub const PACKS_PER_ENTRY: usize = 256;
const _: () = assert!(PACKS_PER_ENTRY <= MAX_CHANGES);
