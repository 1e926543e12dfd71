//! Views: the tree at one LSN, while entries go on being added.
//!
//! ```text
//!   index (fjall) at A     generation   generation   growing generation
//! |----------------------|------------|------------|-----------------
//!                        A                              R
//! ```
//!
//! A view is (R, the generations since A, the index at A). It is taken by loading the visible LSN and then the basis: a basis that was
//! published later than the LSN holds every generation with entries up to it. If the index is already beyond R, the view is at A.
//!
//! Invariants:
//! - A view sees all rows of every entry up to its LSN and none of any later one.
//! - The basis that a view holds keeps its generations and its index snapshot alive; dropping the view frees them.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use bytes::{BufMut, Bytes, BytesMut};
use murphy_log::{Lsn, State};

use crate::{
    IndexError, IndexSnapshot, Ino, RowIterator, RowKey,
    overlay::Generation,
    rows::{DirectoryRow, Extent, ExtentRow, InodeRow, RowError, SLOT_BYTES},
    table::Table,
};

/// What views are made of: an index snapshot and every generation that it lacks, oldest first. The last one grows.
pub(crate) struct Basis {
    pub(crate) index: Arc<dyn IndexSnapshot>,
    /// The last LSN in the index.
    pub(crate) indexed: Lsn,
    pub(crate) generations: Vec<Arc<Generation>>,
}

impl Basis {
    pub(crate) fn new(index: Arc<dyn IndexSnapshot>, indexed: Lsn) -> Basis {
        Basis { index, indexed, generations: vec![Arc::default()] }
    }

    /// The generation that grows.
    pub(crate) fn growing(&self) -> &Arc<Generation> {
        self.generations.last().expect("a basis has a growing generation from the start")
    }

    /// The same with the growing generation sealed at `state` and a new one behind it.
    pub(crate) fn sealed(&self, state: State) -> Basis {
        self.growing().seal(state);
        let mut generations = self.generations.clone();
        generations.push(Arc::default());
        Basis { index: Arc::clone(&self.index), indexed: self.indexed, generations }
    }

    /// The same without its oldest generation, which `index` has ingested up to `indexed`.
    pub(crate) fn indexed(&self, index: Arc<dyn IndexSnapshot>, indexed: Lsn) -> Basis {
        Basis { index, indexed, generations: self.generations[1..].to_vec() }
    }

    /// The row at `key` as of `lsn` in the overlay; `None` if the overlay has none.
    #[expect(clippy::option_option, reason = "not here and removed are different answers")]
    pub(crate) fn overlaid(&self, key: &RowKey, lsn: Lsn) -> Option<Option<Bytes>> {
        self.generations.iter().rev().find_map(|generation| generation.at(key, lsn))
    }

    /// About how much memory the overlay takes, in bytes.
    pub(crate) fn weight(&self) -> usize {
        self.generations.iter().map(|generation| generation.weight()).sum()
    }
}

/// The tree at one LSN.
#[derive(Clone)]
pub struct View {
    basis: Arc<Basis>,
    lsn: Lsn,
    state: Option<State>,
}

/// A row that could not be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ViewError {
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A row is not what its table holds.
    #[error("row {key:?}: {reason}")]
    Row {
        /// Which row.
        key: RowKey,
        /// What is wrong with it.
        reason: RowError,
    },
}

impl View {
    /// The view of `basis` at `visible`, or at the index's own LSN if that is later.
    pub(crate) fn new(basis: Arc<Basis>, visible: Lsn) -> View {
        let lsn = visible.max(basis.indexed);
        View { basis, lsn, state: None }
    }

    /// The same view, with the state that is known to hold at its LSN.
    pub(crate) fn with_state(self, state: State) -> View {
        View { state: Some(state), ..self }
    }

    /// Up to which entry it sees.
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// The LSN of the index below it: what [`View::get`] found outside the overlay is from there.
    pub(crate) fn indexed(&self) -> Lsn {
        self.basis.indexed
    }

    /// One row.
    pub fn row(&self, key: &RowKey) -> Result<Option<Bytes>, IndexError> {
        match self.basis.overlaid(key, self.lsn) {
            Some(row) => Ok(row),
            None => self.basis.index.get(key),
        }
    }

    /// One row, decoded.
    pub fn decoded<T>(
        &self,
        key: &RowKey,
        decode: impl FnOnce(&Bytes) -> Result<T, RowError>,
    ) -> Result<Option<T>, ViewError> {
        decode_row(key, self.row(key)?, decode)
    }

    /// The rows of a range of keys, in order, without the removed ones.
    pub fn rows(&self, range: Range<RowKey>) -> RowIterator {
        let index = self.basis.index.scan(range.clone());
        Box::new(Merge {
            view: self.clone(),
            end: range.end,
            start: Some(range.start),
            overlay: None,
            index,
            ahead: None,
        })
    }

    /// The inode row of `ino`.
    pub fn inode(&self, ino: Ino) -> Result<Option<InodeRow>, ViewError> {
        self.decoded(&RowKey::inode(ino), |row| InodeRow::decode(row))
    }

    /// The directory row of `ino`.
    pub fn directory(&self, ino: Ino) -> Result<Option<DirectoryRow>, ViewError> {
        self.decoded(&RowKey::directory(ino), |row| DirectoryRow::decode(row))
    }

    /// The last row of a range of keys.
    pub fn last_row(&self, range: Range<RowKey>) -> Result<Option<(RowKey, Bytes)>, IndexError> {
        let Range { start, mut end } = range;
        loop {
            let overlaid = self.basis.generations.iter().filter_map(|one| one.last(&start, &end, self.lsn));
            // Of equal keys the one of the latest generation counts, which comes last.
            let overlaid = overlaid.max_by(|(one, _), (other, _)| one.cmp(other));
            let indexed = self.basis.index.last(start.clone()..end)?;
            match (overlaid, indexed) {
                (Some((key, _)), Some(indexed)) if indexed.0 > key => return Ok(Some(indexed)),
                (Some((key, Some(value))), _) => return Ok(Some((key, value))),
                (Some((removed, None)), _) => end = removed,
                (None, indexed) => return Ok(indexed),
            }
        }
    }

    /// The extents of `ino` that touch `from..to`, in order. No others are looked at, except the one before them.
    pub fn extents(
        &self,
        ino: Ino,
        from: u64,
        to: u64,
    ) -> impl Iterator<Item = Result<Extent, ViewError>> + use<> {
        let before = self.extent_before(ino, from).filter(|before| match before {
            Ok(extent) => extent.end() > from,
            Err(_) => true,
        });
        let is_all = matches!(before, Some(Ok(extent)) if extent.end() >= to) || from >= to;
        let rest = (!is_all).then(|| self.rows(RowKey::extent(ino, from)..RowKey::extent(ino, to)));
        before.into_iter().chain(rest.into_iter().flatten().map(decode_extent))
    }

    /// The last extent of `ino` that begins before `offset` in the same slot.
    fn extent_before(&self, ino: Ino, offset: u64) -> Option<Result<Extent, ViewError>> {
        let slot = offset - offset % SLOT_BYTES;
        if slot == offset {
            return None;
        }
        let last = self.last_row(RowKey::extent(ino, slot)..RowKey::extent(ino, offset));
        last.transpose().map(decode_extent)
    }

    /// The rows of `table` whose key begins with `number`.
    pub fn rows_of(&self, table: Table, number: u64) -> RowIterator {
        self.rows(RowKey::range_start(table, number)..RowKey::range_start(table, number.saturating_add(1)))
    }
}

/// The decoded form of a row that was read.
pub(crate) fn decode_row<T>(
    key: &RowKey,
    row: Option<Bytes>,
    decode: impl FnOnce(&Bytes) -> Result<T, RowError>,
) -> Result<Option<T>, ViewError> {
    row.map(|row| decode(&row).map_err(|reason| ViewError::Row { key: key.clone(), reason })).transpose()
}

fn decode_extent(row: Result<(RowKey, Bytes), IndexError>) -> Result<Extent, ViewError> {
    let (key, value) = row?;
    let offset = key.second().ok_or(RowError::Field("key"));
    let extent = offset.and_then(|offset| Ok(Extent { offset, row: ExtentRow::decode(&value)? }));
    extent.map_err(|reason| ViewError::Row { key, reason })
}

impl IndexSnapshot for View {
    fn state(&self) -> Option<State> {
        self.state
    }

    fn get(&self, key: &RowKey) -> Result<Option<Bytes>, IndexError> {
        self.row(key)
    }

    fn scan(&self, range: Range<RowKey>) -> RowIterator {
        self.rows(range)
    }

    fn last(&self, range: Range<RowKey>) -> Result<Option<(RowKey, Bytes)>, IndexError> {
        self.last_row(range)
    }
}

/// The overlay's rows, a chunk at a time, merged with the index's.
struct Merge {
    view: View,
    end: RowKey,
    /// Where the next chunk of the overlay begins; `None` when it is exhausted.
    start: Option<RowKey>,
    overlay: Option<std::collections::btree_map::IntoIter<RowKey, Option<Bytes>>>,
    index: RowIterator,
    /// Rows already taken from the two sources and not yet given out.
    ahead: Option<Ahead>,
}

#[derive(Default)]
struct Ahead {
    overlay: Option<(RowKey, Option<Bytes>)>,
    index: Option<(RowKey, Bytes)>,
}

impl Merge {
    fn next_overlaid(&mut self) -> Option<(RowKey, Option<Bytes>)> {
        loop {
            if let Some(row) = self.overlay.as_mut().and_then(Iterator::next) {
                return Some(row);
            }
            let start = self.start.take()?;
            self.overlay = Some(self.chunk(&start).into_iter());
        }
    }

    /// The overlay's rows from `start` on, as far as every generation was read.
    fn chunk(&mut self, start: &RowKey) -> BTreeMap<RowKey, Option<Bytes>> {
        let (view, end) = (&self.view, &self.end);
        let parts: Vec<_> =
            view.basis.generations.iter().map(|one| one.range(start, end, view.lsn, CHUNK)).collect();
        let bound = parts.iter().filter_map(|part| part.last.clone()).min();
        self.start = bound.as_ref().map(after);
        let rows = parts.into_iter().flat_map(|part| part.rows);
        // Later generations come later and replace the rows of earlier ones.
        rows.filter(|(key, _)| bound.as_ref().is_none_or(|bound| key <= bound)).collect()
    }
}

impl Iterator for Merge {
    type Item = Result<(RowKey, Bytes), IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut ahead = self.ahead.take().unwrap_or_default();
            if ahead.overlay.is_none() {
                ahead.overlay = self.next_overlaid();
            }
            if ahead.index.is_none() {
                match self.index.next().transpose() {
                    Ok(row) => ahead.index = row,
                    Err(error) => return Some(Err(error)),
                }
            }
            let order = match (&ahead.overlay, &ahead.index) {
                (None, None) => return None,
                (Some((overlaid, _)), Some((indexed, _))) => overlaid.cmp(indexed),
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
            };
            if order.is_gt() {
                let row = ahead.index.take();
                self.ahead = Some(ahead);
                return row.map(Ok);
            }
            if order.is_eq() {
                ahead.index = None;
            }
            let row = ahead.overlay.take();
            self.ahead = Some(ahead);
            if let Some((key, Some(value))) = row {
                return Some(Ok((key, value)));
            }
        }
    }
}

/// The smallest key after `key`.
fn after(key: &RowKey) -> RowKey {
    let mut bytes = BytesMut::with_capacity(key.as_bytes().len() + 1);
    bytes.put_slice(key.as_bytes());
    bytes.put_u8(0);
    RowKey::from_bytes(bytes.freeze()).expect("a key with one byte more is not empty")
}

/// How many rows of each generation a scan takes at a time.
const CHUNK: usize = 256;

#[cfg(test)]
mod tests {
    use murphy_log::{ChainHash, Digest, Epoch, EpochId, Position, Usage};
    use proptest::prelude::*;

    use super::*;
    use crate::{Index, MemoryIndex};

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, bool),
        Seal,
        Ingest,
        Look,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (0..40u64, any::<bool>()).prop_map(|(number, there)| Step::Write(number, there)),
            1 => Just(Step::Seal),
            1 => Just(Step::Ingest),
            1 => Just(Step::Look),
        ]
    }

    fn state(lsn: Lsn) -> State {
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([1; 16]) };
        let position = Position { epoch, lsn, hash: ChainHash::default() };
        State { position, digest: Digest::default(), usage: Usage::default() }
    }

    proptest! {
        /// The fear: a row that was removed, in whichever layer, hides the one before it, or comes back.
        #[test]
        fn the_last_row_of_a_range_is_the_last_that_a_scan_gives(
            steps in proptest::collection::vec(step(), 1..150)
        ) {
            let index = MemoryIndex::new();
            let mut basis = Arc::new(Basis::new(index.snapshot(), Lsn::ROOT));
            let (mut lsn, mut views) = (Lsn::ROOT, Vec::new());
            for step in steps {
                match step {
                    Step::Write(number, there) => {
                        lsn = lsn.next();
                        let value = there.then(|| Bytes::copy_from_slice(&lsn.get().to_be_bytes()));
                        basis.growing().add(lsn, std::iter::once((RowKey::inode(Ino::new(number)), value)));
                    }
                    Step::Seal => basis = Arc::new(basis.sealed(state(lsn))),
                    Step::Ingest if basis.generations.len() > 1 => {
                        let oldest = &basis.generations[0];
                        let end = oldest.end().unwrap();
                        oldest.folded(|mut rows| index.ingest(&mut rows, &end).unwrap());
                        basis = Arc::new(basis.indexed(index.snapshot(), end.position.lsn));
                    }
                    Step::Ingest => {}
                    Step::Look => views.push(View::new(Arc::clone(&basis), lsn)),
                }
            }
            for view in &views {
                for (start, end) in (0..40).flat_map(|start| [(start, start), (0, start), (start, 40)]) {
                    let range = RowKey::inode(Ino::new(start))..RowKey::inode(Ino::new(end));
                    let last = view.rows(range.clone()).last().transpose().unwrap();
                    prop_assert_eq!(view.last_row(range).unwrap(), last);
                }
            }
        }
    }
}
