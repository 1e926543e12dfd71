//! `murphy demo`: builds regions, loses one for good, comes back, proves every byte.
//!
//! Everything is real: the program's own binary in processes of their own, FUSE mounts, SIGKILL. What was written is known from outside:
//! a ledger beside the mounts says what was acknowledged, and a plain directory is led through the same operations. Where nothing can be mounted,
//! or `MURPHY_DEMO_WITHOUT_FUSE` is set, the same processes read and write through the library, and the demo says so.
//!
//! ```text
//!   tree -> regions -> writer -> disaster -> recovery -> judge -> report
//!                        |                                 ^
//!                        +-- ledger -----------------------+
//! ```
//!
//! `rounds` leads from one to the next; `restores` takes moments out of the archive; `place` knows what has to be taken away in the end.
//!
//! Invariants:
//! - What the demo made it removes, also when it fails or is interrupted; with `--keep` it leaves the directory and says where.
//! - A difference in any byte makes it fail.

mod compare;
mod disaster;
mod interrupt;
mod judge;
mod ledger;
mod look;
mod nodes;
mod operations;
mod place;
mod recovery;
mod regions;
mod report;
mod restores;
mod rounds;
mod script;
mod tree;
mod writer;

use std::{path::PathBuf, sync::Arc};

use crate::{
    error::{CliError, Code},
    output::Output,
    units::bytes_text,
};
use nodes::Way;
use place::Place;
use report::Report;
use tree::Sources;

/// What the demo is asked to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct DemoOptions {
    /// The tree to copy in; without it, sources found on this machine.
    pub(crate) tree: Option<PathBuf>,
    /// Where to leave everything.
    pub(crate) keep: Option<PathBuf>,
}

/// Where the demo is shown: what every part of it needs.
struct Stage {
    place: Arc<Place>,
    way: Way,
    sources: Sources,
    output: Output,
}

impl Stage {
    /// Tells people what happens.
    fn note(&self, line: &str) {
        self.output.note(line);
    }
}

/// Runs the demo.
pub(crate) fn run(options: &DemoOptions, output: &Output) -> Result<Code, CliError> {
    let place = Arc::new(Place::new(options.keep.as_deref())?);
    let _cleared = ClearAtTheEnd(&place, output);
    interrupt::clear_when_told(&place, output)?;
    let sources = Sources::choose(options.tree.as_deref())?;
    let (way, why) = Way::choose(&place)?;
    let stage = Stage { place: Arc::clone(&place), way, sources, output: *output };
    stage.note(&format!(
        "Murphy's demo: {} files, {} of real sources; everything happens in {}.",
        stage.sources.files.len(),
        bytes_text(stage.sources.bytes),
        place.path().display()
    ));
    if let Some(why) = why {
        stage.note(&format!(
            "Nothing is mounted here: {why}. Files are read and written through the library."
        ));
    }
    let mut report = Report::new(&stage.sources, way);
    rounds::survive_a_crash(&stage, &mut report)?;
    rounds::lose_a_region(&stage, &mut report)?;
    rounds::lose_a_region_with_mirror_ack(&stage, &mut report)?;
    report.print(output)?;
    Ok(if report.is_proven() { Code::Done } else { Code::Failed })
}

/// Clears the place when the demo is over, however it went. Who is interrupted waits here until the process ends.
struct ClearAtTheEnd<'a>(&'a Place, &'a Output);

impl Drop for ClearAtTheEnd<'_> {
    fn drop(&mut self) {
        let ClearAtTheEnd(place, output) = self;
        let (_ending, cleared) = place.end();
        if cleared.is_incomplete() {
            output.note(&format!("At the end: {cleared}."));
        }
    }
}
