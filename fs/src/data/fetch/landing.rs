//! What rounds of asking bring in: each answer verified before it is believed, and kept.
//!
//! Invariants:
//! - An origin whose bytes do not verify is asked once more (the disk cache is not: it forgets them), then the next one is.
//! - Damage is logged where it was found, with pack, cell and origin, even if another origin makes up for it; that a store does not answer once.
//! - Only verified bytes enter the disk cache.

use std::{borrow::Cow, ops::Range, sync::Arc};

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::{
    ReadError,
    origin::{Origin, Origins},
    round::{Answer, Failures, Question, Round},
};
use crate::data::{
    buffers::Buffers,
    pack::{PackDamage, PackError, PackFooter, PackMeta, Stretch},
};

/// Reads that are verified.
#[derive(Debug)]
pub(super) struct Landing {
    pub(super) origins: Origins,
    disk_writes: Arc<Semaphore>,
    buffers: Arc<Buffers>,
}

impl Landing {
    pub(super) fn new(origins: Origins) -> Landing {
        Landing { origins, disk_writes: Arc::new(Semaphore::new(DISK_WRITES_MAX)), buffers: Arc::default() }
    }

    /// The stored bytes `range` from the first origin whose bytes pass `check`, and what `check` made of them.
    pub(super) async fn first_intact<T>(
        &self,
        meta: &PackMeta,
        range: Range<u64>,
        check: impl Fn(&Bytes) -> Result<T, PackError>,
    ) -> Result<(T, Bytes), ReadError> {
        let question = Question { cells: 0..0, stored: range };
        let mut round = Round::new(&self.origins, meta);
        while let Some(Answer { origin, question, bytes }) = round.next(&question).await {
            match check(&bytes) {
                Ok(made) => {
                    round.won();
                    self.keep(&origin, meta, question.stored.start, &bytes);
                    return Ok((made, bytes));
                }
                Err(error) => round.found_damage(origin, &question.stored, error),
            }
        }
        Err(self.conclude(meta, round.failures))
    }

    /// The cells `run`, each from the first origin that has it intact; if they are wanted together and the first answer has all of them
    /// intact, in one buffer.
    pub(super) async fn cells(
        &self,
        meta: &PackMeta,
        footer: &Arc<PackFooter>,
        run: Range<usize>,
        together: bool,
    ) -> Vec<Landed> {
        let mut cells: Vec<Option<Bytes>> = vec![None; run.len()];
        let mut round = Round::new(&self.origins, meta);
        while let Some(first) = cells.iter().position(Option::is_none) {
            let last = cells.iter().rposition(Option::is_none).unwrap_or(first);
            let wanted = run.start + first..run.start + last + 1;
            let question = Question { stored: footer.stored_range(wanted.clone()), cells: wanted };
            // It may be the answer to a question of before, about more cells.
            let Some(Answer { origin, question, bytes }) = round.next(&question).await else { break };
            let (wanted, start) = (question.cells, question.stored.start);
            if together && wanted == run {
                let (of, cells, stored) = (Arc::clone(footer), run.clone(), bytes.clone());
                let buffers = Arc::clone(&self.buffers);
                let open = move || of.open_stretch(cells, &stored, &buffers);
                // If one is damaged, the others are taken one by one.
                if let Ok(stretch) = verifying(run.len(), open).await {
                    round.won();
                    self.keep(&origin, meta, start, &bytes);
                    return vec![Landed::Intact(stretch)];
                }
            }
            let opened = self.open_cells(footer, wanted.clone(), bytes.clone()).await;
            let damaged = opened.iter().find_map(|cell| cell.as_ref().err().copied());
            for (slot, cell) in cells[wanted.start - run.start..].iter_mut().zip(opened) {
                if slot.is_none() {
                    *slot = cell.ok();
                }
            }
            match damaged {
                Some(error) => round.found_damage(origin, &question.stored, error),
                None => self.keep(&origin, meta, start, &bytes),
            }
        }
        round.won();
        self.all_or_error(meta, run.start, cells, round.failures)
    }

    /// Verifies and unpacks the cells `run`, whose stored bytes begin `bytes`; on another thread if they are many.
    pub(super) async fn open_cells(
        &self,
        footer: &Arc<PackFooter>,
        run: Range<usize>,
        bytes: Bytes,
    ) -> Vec<Result<Bytes, PackError>> {
        let (footer, count) = (Arc::clone(footer), run.len());
        let open = move || {
            let start = footer.stored_range(run.clone()).start;
            let open = |cell| {
                let at = footer.stored_range(cell..cell + 1);
                footer.open_cell(cell, &bytes[(at.start - start) as usize..(at.end - start) as usize])
            };
            run.map(open).collect()
        };
        verifying(count, open).await
    }

    /// Keeps verified bytes of a store on the cache's disk, in the background; not at all if the disk cannot keep up.
    fn keep(&self, origin: &Origin, meta: &PackMeta, start: u64, bytes: &Bytes) {
        let (Origin::Store { .. }, Some(disk)) = (origin, &self.origins.disk) else { return };
        let Ok(permit) = Arc::clone(&self.disk_writes).try_acquire_owned() else { return };
        let (disk, name, bytes) = (Arc::clone(disk), meta.name, bytes.clone());
        murphy_log::spawn_blocking(move || {
            disk.put(name, start, &bytes);
            drop(permit);
        });
    }

    /// The error of a read that no origin could answer: the one that leaves most hope.
    fn conclude(&self, meta: &PackMeta, failures: Failures) -> ReadError {
        match failures {
            Failures { store: Some(source), .. } => ReadError::Store { pack: meta.name, source },
            Failures { damage: Some(error), .. } => ReadError::Damaged(error),
            Failures { .. } => {
                let sources: Vec<Cow<'_, str>> =
                    self.origins.sources.iter().map(|store| store.label()).collect();
                ReadError::NotFound { pack: meta.name, sources: sources.join(", ") }
            }
        }
    }

    fn all_or_error(
        &self,
        meta: &PackMeta,
        first: usize,
        cells: Vec<Option<Bytes>>,
        failures: Failures,
    ) -> Vec<Landed> {
        let intact = |(plain, cell)| Landed::Intact(Stretch::of_cell(cell, plain));
        if cells.iter().all(Option::is_some) {
            return cells.into_iter().flatten().zip(first..).map(intact).collect();
        }
        let error = self.conclude(meta, failures);
        let named = |cell: usize| match &error {
            // The damage found last may be that of another cell of the run.
            ReadError::Damaged(PackError { pack, damage: PackDamage::Cell { fault, .. } }) => {
                ReadError::Damaged(PackError {
                    pack: *pack,
                    damage: PackDamage::Cell { cell, fault: *fault },
                })
            }
            error => error.clone(),
        };
        let landed = |(plain, cell)| match plain {
            Some(plain) => intact((plain, cell)),
            None => Landed::Lost(cell, named(cell)),
        };
        cells.into_iter().zip(first..).map(landed).collect()
    }
}

/// What became of a cell, or of several that were wanted together.
#[derive(Clone, Debug)]
pub(super) enum Landed {
    Intact(Stretch),
    /// No origin has the cell.
    Lost(usize, ReadError),
}

impl Landed {
    pub(super) fn error(&self) -> Option<&ReadError> {
        match self {
            Landed::Intact(_) => None,
            Landed::Lost(_, error) => Some(error),
        }
    }

    /// Whether it is about a cell of `cells`.
    pub(super) fn is_within(&self, cells: &Range<usize>) -> bool {
        match self {
            Landed::Intact(stretch) => stretch.cells.start < cells.end && cells.start < stretch.cells.end,
            Landed::Lost(cell, _) => cells.contains(cell),
        }
    }
}

/// Does the work of verifying so many cells: on another thread if they are many.
async fn verifying<T: Send + 'static>(cells: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    if cells > CELLS_INLINE { murphy_log::aside(work).await } else { work() }
}

/// So many cells (0.2 ms of work, 1 ms if they are compressed) are verified on the async worker itself.
const CELLS_INLINE: usize = 16;

/// How many runs may be waiting to be written to the disk cache.
const DISK_WRITES_MAX: usize = 16;
