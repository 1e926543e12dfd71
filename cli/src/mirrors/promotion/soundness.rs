//! Whether the tree of a mirror is what its log says, before it becomes the volume.
//!
//! Invariants:
//! - A tree that is known to differ is not promoted: the next start makes it anew from the log.
//! - A disaster is no time to wait for hours: what is compared takes a bounded time, and what was not compared is said.

use std::time::Duration;

use murphy_log::{Clock, SystemClock};

use super::Mirroring;
use crate::{
    check::compare_index,
    error::CliError,
    scrub_notes::{self, ScrubNote},
    units::span_text,
};

impl Mirroring {
    /// Compares the tree with the log, as far as the time reaches, and says what is known. Refuses a tree that differs.
    /// With `noted` the next start of the node knows of it.
    pub(super) fn check_tree(&self, noted: bool) -> Result<String, CliError> {
        let clock = SystemClock::new();
        let snapshot = self.volume.index_snapshot();
        let compared = compare_index(&*snapshot, &self.keys, &mut || clock.monotonic() < COMPARE_MAX)?;
        let note = scrub_notes::load(&self.directory);
        let (differs, said) = match (compared, note) {
            (Some(compared), _) => {
                (compared.differs, format!("its tree is what its log says: {} rows compared", compared.rows))
            }
            (None, Some(note)) => {
                let (lsn, age) = (note.lsn, span_text(note.age()));
                (note.index, format!("{NOT_NOW}; {age} ago it was what the log said at lsn {lsn}"))
            }
            (None, None) => (None, format!("{NOT_NOW}, and never was: murphy fsck does it")),
        };
        let Some(differs) = differs else { return Ok(said) };
        if noted {
            let lsn = snapshot.state().map_or(0, |state| state.position.lsn.get());
            let (ended, index) = (clock.wall().as_nanos(), Some(differs.clone()));
            let took_ms = u64::try_from(clock.monotonic().as_millis()).unwrap_or(u64::MAX);
            scrub_notes::save(&self.directory, &ScrubNote { lsn, ended, took_ms, index, log: None })?;
        }
        Err(CliError::new(format!("the tree of this mirror is damaged: {differs}")).hint(MADE_ANEW))
    }
}

const COMPARE_MAX: Duration = Duration::from_secs(10);
const NOT_NOW: &str = "its tree is too large to be compared with its log within 10 s";
/// Nobody is told to delete the index: its log may be damaged too, and is to be mended before.
const MADE_ANEW: &str = "stop this node if it is served, and run it again without --dry-run: what a promotion or a scrub has found is known to the next start, which reads all of the log, mends it from whoever has it, and makes the index anew";
