//! What the demo found: a short table, the loss line by line, and a verdict.
//!
//! Invariants:
//! - What was measured is printed as it is; the demo is proven only if nothing differs that may not.
//! - Nothing is left out of `--json`; a person is shown the beginning of a long list, and how long it is.

use std::path::PathBuf;

use serde::Serialize;

use super::{
    judge::{Position, Verdict, Why},
    ledger::{LEDGER, Ledger},
    nodes::Way,
    recovery::Recovered,
    script::Milestone,
    tree::Sources,
};
use crate::{error::CliError, output::Output, units::bytes_text};

/// Everything that was found.
#[derive(Serialize)]
pub(super) struct Report {
    /// The tree that was copied in.
    files: usize,
    bytes: u64,
    /// How files were read and written.
    through: Way,
    pub(super) rounds: Vec<Round>,
    pub(super) moments: Vec<Moment>,
}

/// What a round promises of the lines in its ledger.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Promise {
    /// Every line is there.
    Everything,
    /// Every line up to the data position is there: `--ack local`, and the region gone.
    UpToTheDataPosition,
}

/// Something that happened to a volume, and what became of it.
#[derive(Serialize)]
pub(super) struct Round {
    name: &'static str,
    promise: Promise,
    /// What is there afterwards: files and their bytes as far as they can be read, and entries in the log.
    files: usize,
    bytes: u64,
    entries: u64,
    /// Lines of the ledger.
    lines: usize,
    /// Of those, how many are at or below the data position.
    lines_up_to_data: usize,
    position: Position,
    source_lsn: u64,
    lost: Loss,
    recovery_ms: u64,
    /// What should not have been possible.
    broken: Vec<String>,
}

/// What was acknowledged and is not there.
#[derive(Serialize)]
struct Loss {
    /// Entries that the lost lines stand for.
    entries: u64,
    /// Files that they were about.
    files: usize,
    /// From the beginning of the first lost line to the acknowledgement of the last.
    ms: u64,
    lines: Vec<LostLine>,
}

/// A line of the ledger that is not there.
#[derive(Serialize)]
struct LostLine {
    lsn: u64,
    done: &'static str,
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<PathBuf>,
    /// What the path held then.
    blake3: Option<String>,
    why: Why,
}

impl Round {
    pub(super) fn new(
        (name, promise): (&'static str, Promise),
        sources: &Sources,
        ledger: &Ledger,
        verdict: Verdict,
        recovered: &Recovered,
    ) -> Round {
        Round {
            name,
            promise,
            files: sources.files.len() + verdict.files,
            bytes: sources.bytes + verdict.bytes,
            entries: recovered.entries,
            lines: ledger.lines().len(),
            lines_up_to_data: ledger.lines_up_to(recovered.position.data_lsn),
            position: recovered.position,
            source_lsn: recovered.source_lsn,
            lost: Loss::of(ledger, &verdict),
            recovery_ms: recovered.took_ms,
            broken: verdict.broken,
        }
    }

    fn is_proven(&self) -> bool {
        self.broken.is_empty() && (self.promise == Promise::UpToTheDataPosition || self.lost.lines.is_empty())
    }

    fn row(&self) -> String {
        format!(
            "{:<11}{:>7}{:>12}{:>9}{:>7}{:>14}{:>7}{:>7} ms{:>13} ms",
            self.name,
            self.files,
            bytes_text(self.bytes),
            self.entries,
            self.lines,
            self.lost.entries,
            self.lost.files,
            self.lost.ms,
            self.recovery_ms
        )
    }

    /// The loss and what is broken, as far as there is any.
    fn details(&self) -> Vec<String> {
        let (name, lost) = (self.name, &self.lost.lines);
        let mut lines = Vec::new();
        if !lost.is_empty() {
            let of = match self.promise {
                Promise::Everything => "NOTHING OF WHICH MAY BE",
                Promise::UpToTheDataPosition => "all of it above the data position",
            };
            let data = self.position.data_lsn;
            lines.push(format!("Lost in {name}, {of} (lsn {data}):"));
            lines.extend(lost.iter().take(SHOWN).map(|line| format!("  {}", line.text())));
            if lost.len() > SHOWN {
                lines.push(format!("  and {} more (--json lists them all)", lost.len() - SHOWN));
            }
        }
        lines.extend(shown(&self.broken, &format!("BROKEN in {name}:")));
        lines
    }
}

impl Loss {
    fn of(ledger: &Ledger, verdict: &Verdict) -> Loss {
        let line = |number: &usize| &ledger.lines()[*number];
        let lost = |(number, why): (&usize, &Why)| {
            let (line, below) = (line(number), |path: &_| PathBuf::from(LEDGER).join(path));
            let operation = &line.change.operation;
            LostLine {
                lsn: line.durable_lsn,
                done: operation.done(),
                path: below(operation.path()),
                from: operation.freed().map(below),
                blake3: line.change.contents.map(|contents| contents.hash.to_hex().to_string()),
                why: *why,
            }
        };
        let lines: Vec<LostLine> = verdict.lost.iter().map(lost).collect();
        let mut files: Vec<_> = lines.iter().map(|line| &line.path).collect();
        files.sort();
        files.dedup();
        let (first, last) = (verdict.lost.keys().next().map(line), verdict.lost.keys().next_back().map(line));
        let span = first.zip(last).map(|(first, last)| {
            last.acknowledged.duration_since(first.change.begun).map_or(0, |span| span.as_millis() as u64)
        });
        Loss {
            entries: verdict.lost.keys().map(|line| ledger.entries_of(*line)).sum(),
            files: files.len(),
            ms: span.unwrap_or_default(),
            lines,
        }
    }
}

impl LostLine {
    fn text(&self) -> String {
        let LostLine { lsn, done, path, from, why, .. } = self;
        let what = match from {
            Some(from) => format!("{} -> {}", from.display(), path.display()),
            None => path.display().to_string(),
        };
        let why = match why {
            Why::NeverArrived => "region B never heard of it",
            Why::ArrivedInPart => "region B heard of a part of it",
            Why::BytesMissing => "its bytes were in region A only",
        };
        format!("lsn {lsn:<6} {done:<9} {what} ({why})")
    }
}

/// A moment that was restored.
#[derive(Serialize)]
pub(super) struct Moment {
    pub(super) milestone: Milestone,
    /// What was asked for.
    pub(super) at: String,
    /// Where that led to, and of when that is.
    pub(super) lsn: u64,
    pub(super) as_of: String,
    /// How many operations were acknowledged in all.
    pub(super) operations: usize,
    /// From how many to how many of them the copy may have.
    pub(super) possible: [usize; 2],
    /// After how many the plain directory is the same.
    pub(super) matching: Option<usize>,
    /// What is not as in the plain directory and in the sources.
    pub(super) differences: Vec<String>,
    pub(super) took_ms: u64,
}

impl Moment {
    fn is_proven(&self) -> bool {
        self.matching.is_some() && self.differences.is_empty()
    }

    fn lines(&self) -> Vec<String> {
        let Moment { at, lsn, as_of, operations, possible: [least, most], took_ms, .. } = self;
        let name = match self.milestone {
            Milestone::MiddleOfTheBurst => "the middle of the burst",
            Milestone::BeforeTheDeletion => "before the mass deletion",
        };
        let found = match self.matching {
            Some(count) => {
                format!("equal to the plain directory after its first {count} of {operations} operations")
            }
            None => "DIFFERENT from the plain directory".to_owned(),
        };
        let mut lines = vec![
            format!("{name}, --at {at}: {took_ms} ms"),
            format!("  lsn {lsn}, as of {as_of}: {least} to {most} operations are possible"),
            format!("  {found}"),
        ];
        lines.extend(shown(&self.differences, "  BROKEN:"));
        lines
    }
}

impl Report {
    pub(super) fn new(sources: &Sources, through: Way) -> Report {
        let (files, bytes) = (sources.files.len(), sources.bytes);
        Report { files, bytes, through, rounds: Vec::new(), moments: Vec::new() }
    }

    /// Whether every byte was where it had to be.
    pub(super) fn is_proven(&self) -> bool {
        self.rounds.iter().all(Round::is_proven) && self.moments.iter().all(Moment::is_proven)
    }

    pub(super) fn print(&self, output: &Output) -> Result<(), CliError> {
        output.data(self, Report::text)
    }

    fn text(&self) -> String {
        let through = match self.through {
            Way::Mount => "FUSE mounts",
            Way::Library => "the library, without FUSE",
        };
        let tree = format!("{} files, {}, through {through}", self.files, bytes_text(self.bytes));
        let head = format!(
            "{:<11}{:>7}{:>12}{:>9}{:>7}{:>14}{:>7}{:>10}{:>16}",
            "", "files", "bytes", "entries", "lines", "lost: entries", "files", "time", "back after"
        );
        let mut lines = vec![tree, String::new(), head];
        lines.extend(self.rounds.iter().map(Round::row));
        for details in self.rounds.iter().map(Round::details).chain([self.moment_lines()]) {
            if !details.is_empty() {
                lines.push(String::new());
                lines.extend(details);
            }
        }
        let verdict =
            if self.is_proven() { "Every byte is where it has to be." } else { "FAILED: see above." };
        lines.extend([String::new(), verdict.to_owned()]);
        lines.join("\n")
    }

    fn moment_lines(&self) -> Vec<String> {
        let title = (!self.moments.is_empty()).then(|| "Back from the archive in region C:".to_owned());
        title.into_iter().chain(self.moments.iter().flat_map(Moment::lines)).collect()
    }
}

/// The beginning of a list, below its title.
fn shown(list: &[String], title: &str) -> Vec<String> {
    if list.is_empty() {
        return Vec::new();
    }
    let more = list.len().saturating_sub(SHOWN);
    let more = (more > 0).then(|| format!("  and {more} more"));
    let first = list.iter().take(SHOWN).map(|one| format!("  {one}"));
    [title.to_owned()].into_iter().chain(first).chain(more).collect()
}

/// So much of a list is shown to people.
const SHOWN: usize = 8;

#[cfg(test)]
mod tests {
    use super::{
        super::ledger::tests::{ledger_of, rename, write},
        *,
    };

    fn report(promise: Promise, lost: impl Iterator<Item = usize>, broken: &[&str]) -> Report {
        let mut lines: Vec<_> =
            (0..30).map(|number| (write(&format!("f{number}"), number), 10 + 2 * number)).collect();
        lines.push((rename("f3", "moved"), 75));
        let ledger = ledger_of(&lines);
        let verdict = Verdict {
            lost: lost.map(|line| (line, Why::NeverArrived)).collect(),
            broken: broken.iter().map(ToString::to_string).collect(),
            ..Verdict::default()
        };
        let position = Position { metadata_lsn: 30, data_lsn: 30 };
        let recovered = Recovered { position, source_lsn: 40, entries: 31, took_ms: 5 };
        let sources = Sources { files: Vec::new(), bytes: 0 };
        let mut report = Report::new(&sources, Way::Library);
        report.rounds.push(Round::new(("round", promise), &sources, &ledger, verdict, &recovered));
        report
    }

    /// The fear: a loss that is only counted, so that nobody knows what to look for.
    #[test]
    fn a_loss_is_listed_line_by_line_with_a_bound_for_people_and_none_for_programs() {
        let report = report(Promise::UpToTheDataPosition, 11..31, &[]);
        assert!(report.is_proven());
        let text = report.text();
        assert!(text.contains("lsn 32     written   ledger/f11 (region B never heard of it)"), "{text}");
        assert!(text.contains("and 12 more") && !text.contains("moved"), "{text}");
        let json = serde_json::to_value(&report).unwrap();
        let lost = &json["rounds"][0]["lost"];
        assert_eq!(lost["lines"].as_array().unwrap().len(), 20);
        assert_eq!(lost["lines"][19]["path"], "ledger/moved");
        assert_eq!(lost["lines"][19]["from"], "ledger/f3");
        assert_eq!(lost["lines"][0]["blake3"].as_str().map(str::len), Some(64));
        // From the LSN of line 10 to that of line 30, and from the beginning of line 11 to the end of line 30.
        assert_eq!(
            (&lost["entries"], &lost["files"], &lost["ms"]),
            (&45.into(), &20.into(), &198_000.into())
        );
    }

    #[test]
    fn what_is_broken_or_was_promised_and_is_lost_fails_the_demo() {
        assert!(report(Promise::Everything, 0..0, &[]).is_proven());
        assert!(!report(Promise::Everything, 30..31, &[]).is_proven());
        assert!(!report(Promise::UpToTheDataPosition, 0..0, &["ledger/f1: is not there"]).is_proven());
        let text = report(Promise::Everything, 0..0, &["ledger/f1: is not there"; 100]).text();
        assert!(text.contains("ledger/f1: is not there") && text.contains("and 92 more"), "{text}");
        assert!(text.ends_with("FAILED: see above."), "{text}");
    }
}
