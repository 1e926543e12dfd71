//! The rounds, each a volume of its own that something happens to: from the regions to the verdict.
//!
//! Invariants:
//! - What is there afterwards is judged by the ledger and the sources, not by what the program says.

use std::path::Path;

use super::{
    Stage, compare,
    disaster::{Alone, strike},
    judge::judge,
    ledger::{LEDGER, Ledger},
    nodes::Node,
    place::murphy,
    recovery::{self, Recovered},
    regions::{self, Region, Regions},
    report::{Promise, Report, Round},
    restores,
    script::Script,
    writer::Writer,
};
use crate::error::CliError;

/// A process dies in the middle of its work, and the node comes back by itself.
pub(super) fn survive_a_crash(stage: &Stage, report: &mut Report) -> Result<(), CliError> {
    stage.note("Crash: one region, and a writer that waits for every fsync.");
    let region = Region::format(stage, "crash", &[])?;
    region.served.node.fill(&stage.sources, Path::new(LEDGER))?;
    let writer = start_writer(stage, "crash", &region.served.node, 1)?;
    writer.wait_until_after_the_deletion()?;
    writer.check()?;
    let node = region.kill()?;
    let stopped = writer.wait_for_the_end()?;
    stage.note(&format!(
        "SIGKILL. The writer has {} lines, and then: {}.",
        stopped.ledger.lines().len(),
        stopped.noticed
    ));
    let (served, recovered) = recovery::restart(stage, node)?;
    add_round(stage, report, ("crash", Promise::Everything), (&stopped.ledger, &served.node, &recovered))?;
    let node = served.node.directory.clone();
    served.end()?;
    let said = stage.place.run(murphy("fsck")?.arg(&node).arg("--data"))?;
    stage.note(said.trim_end());
    Ok(())
}

/// Round one: `--ack local`. What B does not have is lost, and nothing else.
pub(super) fn lose_a_region(stage: &Stage, report: &mut Report) -> Result<(), CliError> {
    stage.note("Round one: regions A and B, --ack local.");
    let name = "round-one";
    let regions = Regions::build(stage, name, &["--ack", "local"])?;
    let writer = start_writer(stage, name, &regions.a.served.node, 2)?;
    writer.wait_until_after_the_deletion()?;
    let (b, stopped) = strike(stage, regions, writer, Alone::ForLines(LINES_UNHEARD))?;
    let recovered = recovery::promote(stage, &b.served.node, name)?;
    add_round(
        stage,
        report,
        (name, Promise::UpToTheDataPosition),
        (&stopped.ledger, &b.served.node, &recovered),
    )
}

/// Round two: `--ack mirror=1` and an archive. Nothing is lost; and any moment can be had back from the archive.
pub(super) fn lose_a_region_with_mirror_ack(stage: &Stage, report: &mut Report) -> Result<(), CliError> {
    stage.note("Round two: regions A, B and C (an archive), --ack mirror=1.");
    let name = "round-two";
    let archive = regions::archive(stage, name)?;
    let regions = Regions::build(stage, name, &["--ack", "mirror=1", "--archive", &archive])?;
    let writer = start_writer(stage, name, &regions.a.served.node, 3)?;
    writer.wait_until_after_the_deletion()?;
    let (b, stopped) = strike(stage, regions, writer, Alone::UntilFsyncWaits)?;
    let recovered = recovery::promote(stage, &b.served.node, name)?;
    add_round(stage, report, (name, Promise::Everything), (&stopped.ledger, &b.served.node, &recovered))?;
    restores::every_noted_moment(stage, &archive, &b.served.node, &stopped.ledger, report)
}

fn start_writer(stage: &Stage, round: &str, node: &Node, seed: u64) -> Result<Writer, CliError> {
    let ledger = Ledger::new(stage.place.join(format!("{round}-ledger")))?;
    Writer::start(node, ledger, Script::new(seed))
}

/// Holds what came back against the ledger and the sources.
fn add_round(
    stage: &Stage,
    report: &mut Report,
    (name, promise): (&'static str, Promise),
    (ledger, node, recovered): (&Ledger, &Node, &Recovered),
) -> Result<(), CliError> {
    let look = node.look()?;
    let mut verdict = judge(ledger, &look, recovered.position)?;
    verdict.broken.extend(compare::copy_differences(&stage.sources, look.root()));
    report.rounds.push(Round::new((name, promise), &stage.sources, ledger, verdict, recovered));
    Ok(())
}

/// Lines that B does not hear of in round one.
const LINES_UNHEARD: usize = 20;
