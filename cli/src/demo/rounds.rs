//! The first disaster: one region, and a process that dies in the middle of its work.
//!
//! Invariants:
//! - What is there afterwards is judged by the ledger and the sources, not by what the program says.

use std::path::{Path, PathBuf};

use super::{
    Place, compare,
    ledger::{LEDGER, Ledger},
    nodes::{Served, clock, number, run},
    operations::Script,
    report::{Report, Round},
    tree::Sources,
};
use crate::{
    error::{CliError, failed},
    output::Output,
};

/// One region with one node, and what the world outside knows of it.
struct Region {
    name: &'static str,
    node: PathBuf,
    mount: PathBuf,
    a: Served,
    ledger: Ledger,
}

impl Region {
    fn build(place: &Place, name: &'static str) -> Result<Region, CliError> {
        let home = place.directory(name)?;
        let (node, mount) = (home.join("node"), home.join("mount"));
        let blocks = format!("file://{}", home.join("store").display());
        run(&[
            "format".as_ref(),
            node.as_path(),
            "--blocks".as_ref(),
            blocks.as_ref(),
            "--name".as_ref(),
            name.as_ref(),
        ])?;
        let a = Served::start(place.way, &node, &mount, &[])?;
        let ledger = Ledger::new(place.directory(&format!("{name}-shadow"))?)?;
        Ok(Region { name, node, mount, a, ledger })
    }

    /// Copies the sources in.
    fn fill(&self, sources: &Sources) -> Result<(), CliError> {
        self.a.fill(sources, Path::new(LEDGER))?;
        self.a.flush()
    }
}

/// The process dies in the middle of its work; the node comes back by itself.
pub(super) fn survive_a_kill(
    place: &Place,
    sources: &Sources,
    report: &mut Report,
    output: &Output,
) -> Result<(), CliError> {
    output.note("A source, its store, and a writer that waits for every fsync.");
    let mut region = Region::build(place, "kill")?;
    region.fill(sources)?;
    let mut script = Script::new(1);
    region.ledger.perform(&region.a, script.work(LINES))?;
    output.note("SIGKILL.");
    let Region { name, node, mount, a, ledger } = region;
    a.kill()?;
    let start = clock();
    let back = Served::start(place.way, &node, &mount, &[])?;
    let took = start.elapsed();
    let status = back.status()?;
    let durable = number(&status, "durable_lsn")?;
    let tree = back.look()?;
    let verdict = ledger.check(&tree.join(LEDGER), durable);
    let copied = compare::copy_differences(sources, &tree).map_err(failed)?;
    report.add(Round::new(name, &ledger, &verdict, copied, durable, took));
    back.end()?;
    run(&[Path::new("fsck"), &node, Path::new("--data")]).map(|said| output.note(said.trim_end()))
}

/// Operations of the writer.
const LINES: usize = 300;
