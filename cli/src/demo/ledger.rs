//! The ledger: what was acknowledged, written down outside of the mount, after the fact.
//!
//! Invariants:
//! - A line is added after fsync of the file and of its directory has returned; its LSN was read afterwards, so that everything the
//!   operation has logged is at or below it, and everything that comes after the line is above it.
//! - What a file holds is known from the bytes that were handed over, not from the file system under test.

use std::{collections::BTreeMap, fs::File, io::Write, path::PathBuf, time::SystemTime};

use serde_json::json;

use super::{
    operations::{self, Operation},
    script::Milestone,
};
use crate::error::{CliError, at, failed};

/// What was acknowledged, line by line.
pub(super) struct Ledger {
    lines: Vec<Line>,
    noted: Vec<Noted>,
    /// What was begun and is not acknowledged.
    in_flight: Option<Change>,
    /// What its file holds then.
    hashed: Option<Hashed>,
    /// Every file that is there now.
    hashers: BTreeMap<PathBuf, Hashed>,
    file: File,
    path: PathBuf,
}

/// One acknowledged change.
pub(super) struct Line {
    pub(super) change: Change,
    pub(super) durable_lsn: u64,
    pub(super) acknowledged: SystemTime,
}

/// An operation, and what its path holds afterwards.
pub(super) struct Change {
    pub(super) operation: Operation,
    /// `None` if it is gone.
    pub(super) contents: Option<Contents>,
    pub(super) begun: SystemTime,
}

/// What a file holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Contents {
    pub(super) hash: blake3::Hash,
    pub(super) length: u64,
    /// The line that wrote the last of it. A rename moves what others have written.
    pub(super) written_by: usize,
}

/// The same while it can grow.
#[derive(Clone)]
struct Hashed {
    hasher: blake3::Hasher,
    written_by: usize,
}

/// A moment between two operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Noted {
    pub(super) milestone: Milestone,
    pub(super) at: SystemTime,
}

/// Every file and what it holds.
pub(super) type Files = BTreeMap<PathBuf, Contents>;

impl Ledger {
    /// An empty one, whose lines are in the file at `path` too.
    pub(super) fn new(path: PathBuf) -> Result<Ledger, CliError> {
        let file = File::create_new(&path).map_err(at(&path))?;
        let (lines, noted, in_flight, hashed, hashers) = Default::default();
        Ok(Ledger { lines, noted, in_flight, hashed, hashers, file, path })
    }

    /// What will be done now.
    pub(super) fn begin(&mut self, operation: Operation, begun: SystemTime) {
        self.hashed = self.hashed_after(&operation);
        let contents = self.hashed.as_ref().map(Hashed::contents);
        self.in_flight = Some(Change { operation, contents, begun });
    }

    fn hashed_after(&self, operation: &Operation) -> Option<Hashed> {
        let (mut hasher, (seed, length)) = match operation {
            Operation::Write { seed, length, .. } => (blake3::Hasher::new(), (*seed, *length)),
            Operation::Append { path, seed, length } => {
                (self.hashers.get(path)?.hasher.clone(), (*seed, *length))
            }
            Operation::Rename { from, .. } => return self.hashers.get(from).cloned(),
            Operation::Remove { .. } => return None,
        };
        hasher.update(&operations::contents(seed, length));
        Some(Hashed { hasher, written_by: self.lines.len() })
    }

    /// What was begun is durable, at or below `durable_lsn`.
    pub(super) fn acknowledge(&mut self, durable_lsn: u64, acknowledged: SystemTime) -> Result<(), CliError> {
        let change = self.in_flight.take().ok_or_else(|| CliError::new("nothing was begun"))?;
        for path in change.operation.freed().into_iter().chain([change.operation.path()]) {
            self.hashers.remove(path);
        }
        if let Some(hashed) = self.hashed.take() {
            self.hashers.insert(change.operation.path().to_owned(), hashed);
        }
        let line = Line { change, durable_lsn, acknowledged };
        let written = format!("{}\n", line.text());
        self.file.write_all(written.as_bytes()).map_err(at(&self.path))?;
        self.lines.push(line);
        Ok(())
    }

    /// Nothing is under way now.
    pub(super) fn note(&mut self, milestone: Milestone, at: SystemTime) {
        self.noted.push(Noted { milestone, at });
    }

    pub(super) fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub(super) fn noted(&self) -> &[Noted] {
        &self.noted
    }

    /// Every change in order: the lines, and what was never acknowledged.
    pub(super) fn changes(&self) -> impl Iterator<Item = &Change> {
        self.lines.iter().map(|line| &line.change).chain(&self.in_flight)
    }

    /// Every file after the first `count` changes.
    pub(super) fn files_after(&self, count: usize) -> Files {
        let mut files = Files::new();
        self.changes().take(count).for_each(|change| change.apply(&mut files));
        files
    }

    /// How many lines are at or below `lsn`: their operations are in whatever holds everything up to there.
    pub(super) fn lines_up_to(&self, lsn: u64) -> usize {
        self.lines.partition_point(|line| line.durable_lsn <= lsn)
    }

    /// How many changes something may hold that holds everything up to `lsn` and nothing else: the lines up to there, and the next one, of
    /// which something was logged before the LSN of its line was read.
    pub(super) fn changes_possible_at(&self, lsn: u64) -> usize {
        let sure = self.lines_up_to(lsn);
        let is_exact = sure.checked_sub(1).is_some_and(|last| self.lines[last].durable_lsn == lsn);
        let all = self.lines.len() + usize::from(self.in_flight.is_some());
        if is_exact { sure } else { all.min(sure + 1) }
    }

    /// How many entries a line stands for: those that were logged since the line before it.
    pub(super) fn entries_of(&self, line: usize) -> u64 {
        let before = line.checked_sub(1).map_or(0, |before| self.lines[before].durable_lsn);
        self.lines[line].durable_lsn.saturating_sub(before)
    }
}

impl Hashed {
    fn contents(&self) -> Contents {
        let Hashed { hasher, written_by } = self;
        Contents { hash: hasher.finalize(), length: hasher.count(), written_by: *written_by }
    }
}

impl Change {
    /// What it does to the files.
    pub(super) fn apply(&self, files: &mut Files) {
        for path in self.operation.freed().into_iter().chain([self.operation.path()]) {
            files.remove(path);
        }
        if let Some(contents) = self.contents {
            files.insert(self.operation.path().to_owned(), contents);
        }
    }
}

impl Line {
    /// As it stands in the file.
    fn text(&self) -> String {
        let operation = &self.change.operation;
        let blake3 = self.change.contents.map(|contents| contents.hash.to_hex().to_string());
        let mut text = json!({
            "lsn": self.durable_lsn,
            "done": operation.done(),
            "path": operation.path(),
            "blake3": blake3,
        });
        if let Some(from) = operation.freed() {
            text["from"] = json!(from);
        }
        text.to_string()
    }
}

/// A moment as `--at` takes it, to the nanosecond.
pub(super) fn moment_text(moment: SystemTime) -> Result<String, CliError> {
    Ok(jiff::Timestamp::try_from(moment).map_err(failed)?.to_string())
}

/// The wall clock, as the writer sees it.
#[expect(
    clippy::disallowed_methods,
    reason = "the demo compares moments of the world outside with the log's"
)]
pub(super) fn now() -> SystemTime {
    SystemTime::now()
}

/// Where the writer works in a volume.
pub(super) const LEDGER: &str = "ledger";

#[cfg(test)]
pub(super) mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    /// Bytes that differ from file to file.
    pub(in crate::demo) fn write(path: &str, seed: u64) -> Operation {
        Operation::Write { path: path.into(), seed, length: 5000 }
    }

    pub(in crate::demo) fn append(path: &str, seed: u64) -> Operation {
        Operation::Append { path: path.into(), seed, length: 700 }
    }

    pub(in crate::demo) fn rename(from: &str, to: &str) -> Operation {
        Operation::Rename { from: from.into(), to: to.into() }
    }

    pub(in crate::demo) fn remove(path: &str) -> Operation {
        Operation::Remove { path: path.into() }
    }

    /// So many seconds after the beginning.
    pub(in crate::demo) fn second(number: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(number)
    }

    /// A line for each operation with its LSN: line n is begun in second 10n + 1 and acknowledged in second 10n + 9.
    pub(in crate::demo) fn ledger_of(operations: &[(Operation, u64)]) -> Ledger {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::new(directory.path().join("ledger")).unwrap();
        for (number, (operation, lsn)) in operations.iter().enumerate() {
            ledger.begin(operation.clone(), second(number as u64 * 10 + 1));
            ledger.acknowledge(*lsn, second(number as u64 * 10 + 9)).unwrap();
        }
        ledger
    }

    #[test]
    fn the_files_after_so_many_lines_are_those_of_the_operations() {
        let ledger = ledger_of(&[
            (write("a", 1), 5),
            (append("a", 2), 6),
            (rename("a", "b"), 7),
            (write("a", 3), 9),
            (remove("b"), 10),
        ]);
        let names = |count: usize| ledger.files_after(count).into_keys().collect::<Vec<_>>();
        assert_eq!([1, 2, 3, 4, 5].map(|count| names(count).len()), [1, 1, 1, 2, 1]);
        let moved = ledger.files_after(3)[&PathBuf::from("b")];
        let bytes = [operations::contents(1, 5000), operations::contents(2, 700)].concat();
        assert_eq!(moved, Contents { hash: blake3::hash(&bytes), length: 5700, written_by: 1 });
    }

    /// The fear: an operation is expected where it cannot be, or is not where it must be.
    #[test]
    fn an_lsn_allows_the_lines_up_to_it_and_one_more_that_has_begun() {
        let mut ledger = ledger_of(&[(write("a", 1), 5), (write("b", 2), 8), (write("c", 3), 9)]);
        let possible = |ledger: &Ledger, lsn| (ledger.lines_up_to(lsn), ledger.changes_possible_at(lsn));
        assert_eq!(
            [4, 5, 7, 8, 9, 10].map(|lsn| possible(&ledger, lsn)),
            [(0, 1), (1, 1), (1, 2), (2, 2), (3, 3), (3, 3)]
        );
        ledger.begin(write("d", 4), second(100));
        assert_eq!([9, 10].map(|lsn| possible(&ledger, lsn)), [(3, 3), (3, 4)]);
        assert_eq!([0, 1, 2].map(|line| ledger.entries_of(line)), [5, 3, 1]);
    }

    #[test]
    fn a_line_in_the_file_says_what_where_which_bytes_and_when() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        let mut ledger = Ledger::new(path.clone()).unwrap();
        for (operation, lsn) in [(write("a", 1), 5), (rename("a", "b"), 6), (remove("b"), 7)] {
            ledger.begin(operation, second(1));
            ledger.acknowledge(lsn, second(2)).unwrap();
        }
        ledger.begin(write("c", 2), second(3));
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let hash = blake3::hash(&operations::contents(1, 5000)).to_hex().to_string();
        assert_eq!(
            lines,
            [
                json!({ "lsn": 5, "done": "written", "path": "a", "blake3": hash }),
                json!({ "lsn": 6, "done": "renamed", "path": "b", "from": "a", "blake3": hash }),
                json!({ "lsn": 7, "done": "removed", "path": "b", "blake3": null }),
            ]
        );
    }
}
