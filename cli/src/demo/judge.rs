//! Holds a tree that came back against the ledger.
//!
//! A tree that holds the log up to a metadata position is what the first so many changes of the ledger have made, and no other: all lines up to
//! the position, and of the next change nothing, all, or a beginning. Bytes may be missing only of what was written above the data position.
//!
//! Invariants:
//! - Every file that there is is read: names and bytes count, never what the program says of itself.
//! - A line above the data position that is not there is lost; everything else that is not as it should be is broken.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    ledger::{Change, Contents, Files, LEDGER, Ledger},
    look::{Found, Look},
    operations::{self, Operation},
};
use crate::error::{CliError, at};

/// Up to where a tree has the log, and up to where it has every byte too.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Position {
    pub(super) metadata_lsn: u64,
    pub(super) data_lsn: u64,
}

/// How a tree answers to a ledger.
#[derive(Default)]
pub(super) struct Verdict {
    /// How many files are there, and their bytes as far as they can be read.
    pub(super) files: usize,
    pub(super) bytes: u64,
    /// Lines that are not there, in order, and why.
    pub(super) lost: BTreeMap<usize, Why>,
    /// What is not as it should be.
    pub(super) broken: Vec<String>,
}

/// Why a line is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Why {
    /// No entry of it had left the region.
    NeverArrived,
    /// Only some of its entries had.
    ArrivedInPart,
    /// Its entries had, the bytes of the file had not.
    BytesMissing,
}

/// Holds what is seen against `ledger`.
pub(super) fn judge(ledger: &Ledger, look: &Look, position: Position) -> Result<Verdict, CliError> {
    let seen = Seen::of(look)?;
    let sure = ledger.lines_up_to(position.metadata_lsn);
    let files = ledger.files_after(sure);
    let next = match ledger.changes_possible_at(position.metadata_lsn) > sure {
        true => ledger.changes().nth(sure),
        false => None,
    };
    let arrived = next.map_or(Arrived::Nothing, |next| seen.arrived(&files, next));
    let mut bench = Bench { ledger, position, verdict: Verdict::default() };
    bench.compare(&seen, files, next, arrived);
    let there = sure + usize::from(arrived == Arrived::All);
    for line in there..ledger.lines().len() {
        let is_part = line == sure && arrived == Arrived::Part;
        bench.lose(line, if is_part { Why::ArrivedInPart } else { Why::NeverArrived });
    }
    Ok(bench.verdict)
}

/// What is there below the ledger's directory.
struct Seen(BTreeMap<PathBuf, Found>);

/// How much of a change is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Arrived {
    Nothing,
    Part,
    All,
}

impl Seen {
    fn of(look: &Look) -> Result<Seen, CliError> {
        let directory = Path::new(LEDGER);
        let paths = look.files_below(directory).map_err(at(look.root()))?;
        let found = paths.into_iter().map(|path| {
            let whole = directory.join(&path);
            let found = look.read(&whole).map_err(at(&whole))?;
            Ok((path, found))
        });
        Ok(Seen(found.collect::<Result<_, CliError>>()?))
    }

    fn at(&self, path: &Path) -> &Found {
        self.0.get(path).unwrap_or(&Found::Nothing)
    }

    /// How much of `next` is there on top of `before`. A name comes and goes in one entry; bytes may have come in part.
    fn arrived(&self, before: &Files, next: &Change) -> Arrived {
        let (path, was) = (next.operation.path(), before.get(next.operation.path()));
        let found = self.at(path);
        let is = |contents: Option<&Contents>| match (found, contents) {
            (Found::Nothing, None) => true,
            (Found::Bytes(bytes), Some(contents)) => contents.is(bytes),
            _ => false,
        };
        match &next.operation {
            Operation::Rename { .. } | Operation::Remove { .. } => {
                if (*found == Found::Nothing) == next.contents.is_none() {
                    Arrived::All
                } else {
                    Arrived::Nothing
                }
            }
            _ if is(next.contents.as_ref()) => Arrived::All,
            _ if is(was) => Arrived::Nothing,
            Operation::Write { .. } | Operation::Append { .. } => Arrived::Part,
        }
    }
}

impl Contents {
    fn is(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 == self.length && blake3::hash(bytes) == self.hash
    }
}

/// Where a tree is judged.
struct Bench<'a> {
    ledger: &'a Ledger,
    position: Position,
    verdict: Verdict,
}

impl Bench<'_> {
    /// Compares what is seen with `files`, and with what `next` has changed of them as far as it has `arrived`.
    fn compare(&mut self, seen: &Seen, mut files: Files, next: Option<&Change>, arrived: Arrived) {
        let mut half_done = None;
        match (arrived, next) {
            (Arrived::All, Some(next)) => next.apply(&mut files),
            (Arrived::Part, Some(next)) => {
                let before = files.remove(next.operation.path());
                self.compare_part(next, before, seen.at(next.operation.path()));
                half_done = Some(next.operation.path());
            }
            (Arrived::Nothing | Arrived::All | Arrived::Part, _) => {}
        }
        for (path, contents) in &files {
            self.compare_file(path, contents, seen.at(path));
        }
        for (path, found) in &seen.0 {
            if !files.contains_key(path) && half_done != Some(path) {
                self.broken(path, "is there and should not be");
            }
            self.verdict.files += 1;
            if let Found::Bytes(bytes) = found {
                self.verdict.bytes += bytes.len() as u64;
            }
        }
    }

    fn compare_file(&mut self, path: &Path, contents: &Contents, found: &Found) {
        let line = self.ledger.lines().get(contents.written_by);
        let may_lack_bytes = line.is_some_and(|line| line.durable_lsn > self.position.data_lsn);
        match found {
            Found::Bytes(bytes) if contents.is(bytes) => {}
            Found::Bytes(_) => self.broken(path, "holds other bytes than were acknowledged"),
            Found::Nothing => self.broken(path, "is not there"),
            Found::Unreadable if may_lack_bytes => self.lose(contents.written_by, Why::BytesMissing),
            Found::Unreadable => self.broken(path, "cannot be read, though every byte of it should be there"),
        }
    }

    /// What a write has left that had begun: the beginning of what it was to write, behind what was there if it appends.
    fn compare_part(&mut self, next: &Change, before: Option<Contents>, found: &Found) {
        let (kept, seed, length) = match &next.operation {
            Operation::Write { seed, length, .. } => (None, *seed, *length),
            Operation::Append { seed, length, .. } => (before, *seed, *length),
            Operation::Rename { .. } | Operation::Remove { .. } => return,
        };
        let is_beginning = match found {
            Found::Nothing => false,
            Found::Unreadable => self.position.data_lsn < self.position.metadata_lsn,
            Found::Bytes(bytes) => {
                let kept_length = kept.map_or(0, |kept| kept.length as usize);
                bytes.split_at_checked(kept_length).is_some_and(|(old, new)| {
                    kept.is_none_or(|kept| kept.is(old))
                        && operations::contents(seed, length).starts_with(new)
                })
            }
        };
        if !is_beginning {
            self.broken(next.operation.path(), "is neither as it was nor what was being written");
        }
    }

    /// A line is not there. Below the data position that must not be.
    fn lose(&mut self, line: usize, why: Why) {
        let lost = &self.ledger.lines()[line];
        if lost.durable_lsn <= self.position.data_lsn {
            let path = lost.change.operation.path().to_owned();
            self.broken(
                &path,
                &format!("was acknowledged in line {line}, at or below the data position, and is lost"),
            );
        }
        self.verdict.lost.insert(line, why);
    }

    fn broken(&mut self, path: &Path, how: &str) {
        self.verdict.broken.push(format!("{}: {how}", Path::new(LEDGER).join(path).display()));
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use super::{
        super::{
            ledger::tests::{append, ledger_of, remove, rename, second, write},
            operations::Sync,
        },
        *,
    };

    /// A tree as the first `count` operations make it, which can be spoilt.
    struct Tree {
        root: tempfile::TempDir,
        unreadable: BTreeSet<PathBuf>,
    }

    impl Tree {
        fn after(count: usize, lines: &[(Operation, u64)]) -> Tree {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join(LEDGER)).unwrap();
            for (operation, _) in &lines[..count] {
                operation.apply(&root.path().join(LEDGER), Sync::Never).unwrap();
            }
            Tree { root, unreadable: BTreeSet::new() }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.root.path().join(LEDGER).join(name)
        }

        fn lacking_the_bytes_of(mut self, name: &str) -> Tree {
            fs::remove_file(self.path(name)).unwrap();
            self.unreadable.insert(Path::new(LEDGER).join(name));
            self
        }

        fn judged(&self, ledger: &Ledger, metadata_lsn: u64, data_lsn: u64) -> Verdict {
            let look = Look::at_copy(self.root.path().to_owned(), self.unreadable.clone());
            judge(ledger, &look, Position { metadata_lsn, data_lsn }).unwrap()
        }
    }

    fn lost(verdict: &Verdict) -> Vec<(usize, Why)> {
        verdict.lost.iter().map(|(line, why)| (*line, *why)).collect()
    }

    fn sound(verdict: &Verdict) {
        assert_eq!((&verdict.lost, &verdict.broken), (&BTreeMap::new(), &Vec::new()));
    }

    fn lines() -> Vec<(Operation, u64)> {
        vec![
            (write("a", 1), 10),
            (write("b", 2), 20),
            (append("a", 3), 30),
            (rename("b", "c"), 40),
            (write("a", 4), 50),
            (remove("a"), 60),
        ]
    }

    #[test]
    fn a_tree_is_what_the_lines_up_to_its_position_made_and_later_ones_are_lost() {
        let (lines, never) = (lines(), Why::NeverArrived);
        let ledger = ledger_of(&lines);
        for count in 0..=lines.len() {
            let lsn = count as u64 * 10;
            let verdict = Tree::after(count, &lines).judged(&ledger, lsn, lsn);
            assert_eq!(verdict.broken, Vec::<String>::new(), "{count}");
            assert_eq!(lost(&verdict), (count..lines.len()).map(|line| (line, never)).collect::<Vec<_>>());
        }
    }

    /// The fear: a path that was changed later is not looked at, and what was acknowledged of it before is gone unnoticed.
    #[test]
    fn a_path_with_later_lines_is_held_against_its_newest_line_up_to_the_position() {
        let lines = lines();
        let ledger = ledger_of(&lines);
        for (there, lsn) in [(0, 10), (1, 20), (2, 30), (3, 40), (4, 50), (5, 60), (6, 50)] {
            let verdict = Tree::after(there, &lines).judged(&ledger, lsn, lsn);
            assert!(!verdict.broken.is_empty(), "{there} operations pass for those up to lsn {lsn}");
        }
        let tree = Tree::after(4, &lines);
        fs::write(tree.path("a"), b"neither the one nor the other").unwrap();
        let verdict = tree.judged(&ledger, 40, 40);
        assert!(verdict.broken[0].starts_with("ledger/a: holds other bytes"), "{:?}", verdict.broken);
    }

    #[test]
    fn what_was_removed_or_moved_away_must_not_be_there_nor_anything_else() {
        let lines = lines();
        let ledger = ledger_of(&lines);
        for name in ["a", "b", "never-written"] {
            let tree = Tree::after(6, &lines);
            fs::write(tree.path(name), b"").unwrap();
            let verdict = tree.judged(&ledger, 60, 60);
            assert_eq!(verdict.broken, [format!("ledger/{name}: is there and should not be")]);
        }
    }

    #[test]
    fn bytes_may_be_missing_above_the_data_position_and_nowhere_else() {
        let lines = lines();
        let ledger = ledger_of(&lines);
        let verdict = Tree::after(3, &lines).lacking_the_bytes_of("a").judged(&ledger, 30, 20);
        assert_eq!(verdict.broken, Vec::<String>::new());
        assert_eq!(lost(&verdict)[0], (2, Why::BytesMissing));
        let verdict = Tree::after(3, &lines).lacking_the_bytes_of("a").judged(&ledger, 30, 30);
        assert_eq!(verdict.broken.len(), 1, "{:?}", verdict.broken);
        // Line 3 moved it, line 1 wrote it, and that is below the data position.
        let verdict = Tree::after(4, &lines).lacking_the_bytes_of("c").judged(&ledger, 40, 30);
        assert!(verdict.broken[0].starts_with("ledger/c: cannot be read"), "{:?}", verdict.broken);
    }

    #[test]
    fn the_operation_that_the_disaster_met_has_left_a_beginning_of_itself_or_nothing_else() {
        let mut lines = lines();
        lines.truncate(2);
        let mut ledger = ledger_of(&lines);
        let bytes = |seed, length: usize| operations::contents(seed, length);
        for (in_flight, whole) in [
            (write("a", 7), bytes(7, 5000)),
            (write("new", 7), bytes(7, 5000)),
            (append("a", 7), [bytes(1, 5000), bytes(7, 700)].concat()),
        ] {
            ledger.begin(in_flight.clone(), second(100));
            let path = in_flight.path().to_str().unwrap();
            let tree = Tree::after(2, &lines);
            sound(&tree.judged(&ledger, 25, 25));
            let least = if matches!(in_flight, Operation::Append { .. }) { 5000 } else { 0 };
            for length in [least, least + 1, whole.len() - 1, whole.len()] {
                fs::write(tree.path(path), &whole[..length]).unwrap();
                sound(&tree.judged(&ledger, 25, 25));
                let verdict = tree.judged(&ledger, 20, 20);
                let is_as_before = path == "a" && fs::read(tree.path(path)).unwrap() == bytes(1, 5000);
                assert_eq!(
                    verdict.broken.is_empty(),
                    is_as_before,
                    "it had not begun: {length} {in_flight:?}"
                );
            }
            for other in [[&whole[..], b"x"].concat(), [&whole[..least], b"other"].concat()] {
                fs::write(tree.path(path), other).unwrap();
                assert!(!tree.judged(&ledger, 25, 25).broken.is_empty(), "{in_flight:?}");
            }
            let tree = Tree::after(2, &lines);
            fs::write(tree.path(path), b"").unwrap();
            let unreadable = tree.lacking_the_bytes_of(path);
            sound(&unreadable.judged(&ledger, 25, 20));
            assert!(
                !unreadable.judged(&ledger, 25, 25).broken.is_empty(),
                "its bytes are durable: {in_flight:?}"
            );
        }
    }

    #[test]
    fn a_line_that_came_over_in_part_is_lost_and_its_file_is_judged() {
        let lines = lines();
        let ledger = ledger_of(&lines);
        let tree = Tree::after(4, &lines);
        fs::write(tree.path("a"), &operations::contents(4, 5000)[..100]).unwrap();
        let verdict = tree.judged(&ledger, 45, 40);
        assert_eq!(verdict.broken, Vec::<String>::new());
        assert_eq!(lost(&verdict), [(4, Why::ArrivedInPart), (5, Why::NeverArrived)]);
    }
}
