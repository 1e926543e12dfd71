//! A region is lost with everything in it, and its mirror goes on.
//!
//! Invariants:
//! - What a lost region held is removed before anything is asked of the one that is left.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::Signal;

use super::{
    Place, compare,
    ledger::{LEDGER, Ledger},
    nodes::{Served, clock, number, run, run_with_input, wait_for},
    operations::{Operation, Script},
    report::{Report, Round},
    restores,
    tree::Sources,
};
use crate::{
    error::{CliError, at, failed},
    output::Output,
};

/// Two regions, one volume, and what the world outside knows of it.
pub(super) struct Regions {
    pub(super) name: &'static str,
    pub(super) a: Option<Served>,
    pub(super) b: Served,
    pub(super) ledger: Ledger,
    store_a: PathBuf,
}

impl Regions {
    /// Formats A, lets B join it, serves both.
    fn build(place: &Place, name: &'static str, format: &[&str]) -> Result<Regions, CliError> {
        let region = |region: &str, part: &str| place.join(&format!("{name}-{region}")).join(part);
        for side in ["a", "b"] {
            place.directory(&format!("{name}-{side}"))?;
        }
        let (node_a, node_b) = (region("a", "node"), region("b", "node"));
        let blocks_a = format!("file://{}", region("a", "store").display());
        let blocks_b = format!("file://{}", region("b", "store").display());
        let mut arguments: Vec<&Path> =
            vec![Path::new("format"), &node_a, Path::new("--blocks"), Path::new(&blocks_a)];
        arguments.extend(["--name", name].map(Path::new));
        arguments.extend(format.iter().map(Path::new));
        run(&arguments)?;
        let a = Served::start(place.way, &node_a, &region("a", "mount"), &["--listen", "127.0.0.1:0"])?;
        let token = run(&[Path::new("invite"), &node_a])?;
        let token_file = region("b", "token");
        std::fs::write(&token_file, token).map_err(at(&token_file))?;
        let token = File::open(&token_file).map_err(at(&token_file))?;
        let join =
            ["join".as_ref(), node_b.as_path(), "--token-file".as_ref(), "-".as_ref(), "--blocks".as_ref()];
        let join: Vec<&Path> = join.into_iter().chain([Path::new(&blocks_b)]).collect();
        run_with_input(&join, Stdio::from(token))?;
        let b = Served::start(place.way, &node_b, &region("b", "mount"), &["--listen", "127.0.0.1:0"])?;
        let ledger = Ledger::new(place.directory(&format!("{name}-shadow"))?)?;
        let store_a = region("a", "store");
        Ok(Regions { name, a: Some(a), b, ledger, store_a })
    }

    fn source(&self) -> Result<&Served, CliError> {
        self.a.as_ref().ok_or_else(|| CliError::new("region A is gone"))
    }

    /// Copies the sources in, and waits until B has every byte.
    fn fill(&self, sources: &Sources) -> Result<(), CliError> {
        let a = self.source()?;
        a.fill(sources, Path::new(LEDGER))?;
        a.flush()?;
        let goal = a.durable_lsn()?;
        wait_for("region B to have every byte", Duration::from_secs(120), || {
            Ok(number(&self.b.status()?, "data_lsn")? >= goal)
        })
    }

    /// Performs operations on A, each durable before its line is written.
    fn perform(&mut self, operations: Vec<Operation>) -> Result<(), CliError> {
        let a = self.a.as_ref().ok_or_else(|| CliError::new("region A is gone"))?;
        self.ledger.perform(a, operations)
    }

    /// Kills A and deletes its node and its store.
    fn lose_a(&mut self) -> Result<(), CliError> {
        let Some(a) = self.a.take() else { return Ok(()) };
        let directory = a.directory.clone();
        a.kill()?;
        std::fs::remove_dir_all(&directory).map_err(at(&directory))?;
        std::fs::remove_dir_all(&self.store_a).map_err(at(&self.store_a))
    }

    /// Promotes B, and holds its tree against the ledger and the sources.
    fn take_over(&self, sources: &Sources, output: &Output) -> Result<Round, CliError> {
        let start = clock();
        let node: &Path = &self.b.directory;
        // Entries whose bytes it lacks may be lost; a source does not say any more which those were.
        let data_lsn = number(&self.b.status()?, "data_lsn")?;
        output.note(run(&[Path::new("promote"), node, Path::new("--dry-run")])?.trim_end());
        let confirm = [Path::new("promote"), node, Path::new("--confirm"), Path::new(self.name)];
        output.note(run(&confirm)?.trim_end());
        let status = self.b.status()?;
        self.b.write(Path::new("back-again"), b"written in region B", false)?;
        let took = start.elapsed();
        let tree = self.b.look()?;
        let verdict = self.ledger.check(&tree.join(LEDGER), data_lsn);
        let copied = compare::copy_differences(sources, &tree).map_err(failed)?;
        Ok(Round::new(self.name, &self.ledger, &verdict, copied, number(&status, "durable_lsn")?, took))
    }
}

/// Round one: `--ack local`. What B had not heard of is lost, and nothing else.
pub(super) fn lose_a_region(
    place: &Place,
    sources: &Sources,
    report: &mut Report,
    output: &Output,
) -> Result<(), CliError> {
    output.note("Round one: regions A and B, --ack local.");
    let mut regions = Regions::build(place, "round-one", &["--ack", "local"])?;
    regions.fill(sources)?;
    let mut script = Script::new(1);
    regions.perform(script.work(LINES_BEFORE))?;
    output.note("Region B stops hearing of A; A goes on for a moment, then dies: node, store and all.");
    regions.b.signal(Signal::STOP)?;
    regions.perform(script.work(LINES_UNHEARD))?;
    regions.lose_a()?;
    regions.b.signal(Signal::CONT)?;
    report.add(regions.take_over(sources, output)?.that_may_lose());
    Ok(())
}

/// Round two: `--ack mirror=1` and an archive. Nothing is lost; and any moment can be had back from the archive.
pub(super) fn lose_a_region_with_mirror_ack(
    place: &Place,
    sources: &Sources,
    report: &mut Report,
    output: &Output,
) -> Result<(), CliError> {
    output.note("Round two: regions A, B and C (an archive), --ack mirror=1.");
    let archive =
        format!("file://{}?domain=region-c", place.directory("round-two-c")?.join("archive").display());
    let mut regions = Regions::build(place, "round-two", &["--ack", "mirror=1", "--archive", &archive])?;
    regions.fill(sources)?;
    let mut script = Script::new(2);
    regions.perform(script.work(LINES_BEFORE))?;
    let deletion = regions.ledger.lines.len();
    regions.perform(script.mass_deletion())?;
    regions.perform(script.work(LINES_UNHEARD))?;
    restores::wait_archived(regions.source()?)?;
    output.note("Region A dies: node, store and all.");
    regions.lose_a()?;
    report.add(regions.take_over(sources, output)?);
    output.note("The archive in region C gives two moments back.");
    restores::around_the_deletion(place, &archive, &regions.ledger, deletion, report)
}

/// Lines that B hears of.
const LINES_BEFORE: usize = 300;
/// Lines that B does not hear of in round one.
const LINES_UNHEARD: usize = 20;
