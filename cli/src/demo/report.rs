//! What the demo found: a short table.
//!
//! Invariants:
//! - What was measured is printed as it is; the demo is proven only if nothing differs that may not.

use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::{
    ledger::{Ledger, Verdict},
    nodes::Way,
    tree::Sources,
};
use crate::{error::CliError, output::Output, units::bytes_text};

/// Everything that was found.
#[derive(Serialize)]
pub(super) struct Report {
    files: usize,
    bytes: u64,
    /// How files were read and written.
    through: Way,
    rounds: Vec<Round>,
    moments: Vec<Moment>,
}

/// A region lost, and what became of it.
#[derive(Serialize)]
pub(super) struct Round {
    name: String,
    /// Entries in the log of the region that went on.
    entries: u64,
    lines: usize,
    lines_kept: usize,
    lines_lost: usize,
    files_lost: usize,
    /// From the first lost acknowledgement to the last.
    lost_ms: u64,
    recovery_ms: u64,
    /// Whether acknowledged lines above the position may be lost: `--ack local`, and the region gone.
    may_lose: bool,
    /// What should not have been possible.
    broken: Vec<String>,
}

impl Round {
    pub(super) fn new(
        name: &str,
        ledger: &Ledger,
        verdict: &Verdict,
        copied: Vec<String>,
        entries: u64,
        took: Duration,
    ) -> Round {
        let lost: Vec<_> = verdict.lost.iter().map(|number| &ledger.lines[*number]).collect();
        let mut paths: Vec<_> =
            lost.iter().flat_map(|line| line.states.iter().map(|(path, _)| path)).collect();
        paths.sort();
        paths.dedup();
        let span = lost.first().zip(lost.last()).map(|(first, last)| between(first.begun, last.acknowledged));
        let mut broken = verdict.broken.clone();
        broken.extend(copied);
        Round {
            name: name.to_owned(),
            entries,
            lines: ledger.lines.len(),
            lines_kept: verdict.kept,
            lines_lost: lost.len(),
            files_lost: paths.len(),
            lost_ms: span.unwrap_or_default(),
            recovery_ms: took.as_millis() as u64,
            may_lose: false,
            broken,
        }
    }
}

impl Round {
    /// The same for a volume that promised nothing against the loss of a region.
    pub(super) fn that_may_lose(self) -> Round {
        Round { may_lose: true, ..self }
    }
}

/// A moment that was restored.
#[derive(Serialize)]
pub(super) struct Moment {
    pub(super) name: &'static str,
    pub(super) at: String,
    /// What `restore` said.
    pub(super) said: String,
    /// After how many operations the plain directory is the same; or the differences.
    pub(super) matching: Result<usize, Vec<String>>,
    pub(super) took_ms: u64,
}

impl Report {
    pub(super) fn new(sources: &Sources, through: Way) -> Report {
        let (files, bytes) = (sources.files.len(), sources.bytes);
        Report { files, bytes, through, rounds: Vec::new(), moments: Vec::new() }
    }

    pub(super) fn add(&mut self, round: Round) {
        self.rounds.push(round);
    }

    pub(super) fn restored(&mut self, moment: Moment) {
        self.moments.push(moment);
    }

    /// Whether every byte was where it had to be.
    pub(super) fn is_proven(&self) -> bool {
        let promised = |round: &Round| round.may_lose || round.lines_lost == 0;
        self.rounds.iter().all(|round| round.broken.is_empty() && promised(round))
            && self.moments.iter().all(|moment| moment.matching.is_ok())
    }

    pub(super) fn print(&self, output: &Output) -> Result<(), CliError> {
        output.data(self, Report::text)
    }

    fn text(&self) -> String {
        let through = match self.through {
            Way::Mount => "FUSE mounts",
            Way::Library => "the library, without FUSE",
        };
        let copied = format!("{} files, {}, through {through}", self.files, bytes_text(self.bytes));
        let mut lines = vec![copied, String::new()];
        lines.push(format!(
            "{:<22}{:>10}{:>8}{:>8}{:>18}{:>12}",
            "", "entries", "lines", "lost", "files, ms lost", "recovery"
        ));
        for round in &self.rounds {
            let lost = format!("{}, {} ms", round.files_lost, round.lost_ms);
            let took = format!("{} ms", round.recovery_ms);
            lines.push(format!(
                "{:<22}{:>10}{:>8}{:>8}{lost:>18}{took:>12}",
                round.name, round.entries, round.lines, round.lines_lost
            ));
            lines.extend(round.broken.iter().map(|broken| format!("  BROKEN {broken}")));
        }
        for moment in &self.moments {
            let found = match &moment.matching {
                Ok(count) => format!("equal to the plain directory after {count} operations"),
                Err(differences) => format!("DIFFERENT: {}", differences.join("; ")),
            };
            lines.push(format!("{:<22}{} ({} ms): {found}", moment.name, moment.at, moment.took_ms));
        }
        lines.push(String::new());
        let verdict =
            if self.is_proven() { "Every byte is where it has to be." } else { "FAILED: see above." };
        lines.push(verdict.to_owned());
        lines.join("\n")
    }
}

fn between(first: SystemTime, last: SystemTime) -> u64 {
    last.duration_since(first).map_or(0, |span| span.as_millis() as u64)
}
