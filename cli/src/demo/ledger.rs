//! The ledger: what was acknowledged, written down outside of the mount, after the fact.
//!
//! Invariants:
//! - A line is added after fsync of the file and of its directory has returned; its LSN was read afterwards, so the operation is at or
//!   below it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    nodes::Served,
    operations::{self, Operation, Sync},
};
use crate::error::{CliError, at};

/// What was acknowledged, line by line.
pub(super) struct Ledger {
    pub(super) lines: Vec<Line>,
    /// The operation that was under way when the writer was stopped.
    in_flight: Option<Operation>,
    /// A plain directory that goes through the same operations.
    shadow: PathBuf,
}

/// One acknowledged operation.
pub(super) struct Line {
    pub(super) operation: Operation,
    /// What the paths held afterwards; `None` for one that was gone.
    pub(super) states: Vec<(PathBuf, Option<blake3::Hash>)>,
    pub(super) durable_lsn: u64,
    pub(super) begun: SystemTime,
    pub(super) acknowledged: SystemTime,
}

/// How a tree answers to a ledger.
#[derive(Default)]
pub(super) struct Verdict {
    /// Lines at or below the position that are there and equal, or were rightly replaced by later lines.
    pub(super) kept: usize,
    /// Lines above the position that are not there.
    pub(super) lost: Vec<usize>,
    /// Paths at or below the position that are not as they should be.
    pub(super) broken: Vec<String>,
}

impl Ledger {
    /// An empty ledger whose plain directory is `shadow`.
    pub(super) fn new(shadow: PathBuf) -> Result<Ledger, CliError> {
        operations::prepare(&shadow).map_err(at(&shadow))?;
        Ok(Ledger { lines: Vec::new(), in_flight: None, shadow })
    }

    /// Performs operations in a volume, each durable before its line is written.
    pub(super) fn perform(&mut self, node: &Served, operations: Vec<Operation>) -> Result<(), CliError> {
        for operation in operations {
            let begun = now();
            self.in_flight = Some(operation.clone());
            node.apply(&operation, Path::new(LEDGER))?;
            let acknowledged = now();
            let durable_lsn = node.durable_lsn()?;
            self.in_flight = None;
            // What the paths hold now is known from the plain directory, not from the file system under test.
            operation.apply(&self.shadow, Sync::Never).map_err(at(&self.shadow))?;
            let paths = operation.paths().into_iter();
            let states = paths.map(|path| Ok((path.to_owned(), state_of(&self.shadow.join(path))?)));
            let states = states.collect::<io::Result<_>>().map_err(at(&self.shadow))?;
            self.lines.push(Line { operation, states, durable_lsn, begun, acknowledged });
        }
        Ok(())
    }

    /// Holds the tree below `root`, which is a copy at `position`, against the lines.
    pub(super) fn check(&self, root: &Path, position: u64) -> Verdict {
        let mut verdict = Verdict::default();
        let mut last: BTreeMap<&Path, usize> = BTreeMap::new();
        let mut later: BTreeSet<&Path> = BTreeSet::new();
        for (number, line) in self.lines.iter().enumerate() {
            for (path, _) in &line.states {
                if line.durable_lsn <= position {
                    last.insert(path, number);
                } else {
                    later.insert(path);
                }
            }
        }
        for path in self.in_flight.iter().flat_map(Operation::paths) {
            later.insert(path);
        }
        for (path, number) in &last {
            let line = &self.lines[*number];
            let expected = line.states.iter().find(|(known, _)| known == path).and_then(|(_, state)| *state);
            // Entries above the position may be there too; what they touched is theirs.
            if !later.contains(path) && state_of(&root.join(path)).ok() != Some(expected) {
                verdict
                    .broken
                    .push(format!("{}: line {number} was acknowledged and is not there", path.display()));
            }
        }
        verdict.kept = self.lines.iter().filter(|line| line.durable_lsn <= position).count();
        for (number, line) in self.lines.iter().enumerate().skip(verdict.kept) {
            for (path, state) in &line.states {
                // A file whose bytes were only in the lost region cannot be read: it is lost too.
                if state_of(&root.join(path)).ok() != Some(*state) && verdict.lost.last() != Some(&number) {
                    verdict.lost.push(number);
                }
            }
        }
        verdict
    }
}

/// The hash of a file's contents; `None` if it is not there.
pub(super) fn state_of(path: &Path) -> io::Result<Option<blake3::Hash>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(blake3::hash(&bytes))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
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
