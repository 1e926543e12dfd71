//! Moments from the archive in region C, held against a plain directory that was led through the same operations.
//!
//! Invariants:
//! - After how many operations the two have to be the same follows from what the restore says (its last entry, and of when that is), from the
//!   moment that was asked for, and from the ledger. They are compared after those, and after no others.

use std::{
    ops::RangeInclusive,
    path::Path,
    time::{Duration, SystemTime},
};

use serde_json::Value;

use super::{
    Stage, compare,
    ledger::{LEDGER, Ledger, Noted, moment_text},
    nodes::{Node, Served, clock, number, wait_for},
    operations::{self, Sync},
    place::murphy,
    report::{Moment, Report},
};
use crate::error::{CliError, at, failed};

/// Restores every moment that was noted from `archive`, which the node of region B has brought up.
pub(super) fn every_noted_moment(
    stage: &Stage,
    archive: &str,
    b: &Node,
    ledger: &Ledger,
    report: &mut Report,
) -> Result<(), CliError> {
    stage.note("Region C: the archive gives the noted moments back.");
    let goal = ledger.lines().last().map_or(0, |line| line.durable_lsn);
    wait_for("the archive", ARCHIVE_MAX, || {
        let status = b.status()?;
        Ok(status["archives"][0]["lsn"].as_u64().is_some_and(|lsn| lsn >= goal))
    })?;
    for noted in ledger.noted() {
        report.moments.push(restore(stage, archive, ledger, *noted)?);
    }
    Ok(())
}

fn restore(stage: &Stage, archive: &str, ledger: &Ledger, noted: Noted) -> Result<Moment, CliError> {
    let name = serde_json::to_value(noted.milestone).map_err(failed)?;
    let region = stage.place.directory(name.as_str().unwrap_or("moment"))?;
    let (directory, at) = (region.join("node"), moment_text(noted.at)?);
    let blocks = format!("file://{}", region.join("store").display());
    let start = clock();
    let command = |options: &[&str]| -> Result<Value, CliError> {
        let mut restore = murphy("restore")?;
        restore.arg(archive).arg(&directory).args(["--at", &at, "--blocks", &blocks, "--json"]).args(options);
        serde_json::from_str(&stage.place.run(&mut restore)?).map_err(failed)
    };
    let (plan, restored) = (command(&["--dry-run"])?, command(&[])?);
    let node = Node::new(stage.way, directory, region.join("mount"));
    let served = Served::start(&stage.place, node, &[])?;
    let took_ms = start.elapsed().as_millis() as u64;
    let (lsn, as_of) = (number(&restored, "lsn")?, plan["as_of"].as_str().unwrap_or_default().to_owned());
    let allowed = possible(ledger, noted.at, lsn, parse(&as_of)?);
    let look = served.node.look()?;
    let (matching, mut differences) =
        matching_shadow(&region.join("shadow"), ledger, &look.root().join(LEDGER), &allowed)?;
    differences.extend(compare::copy_differences(&stage.sources, look.root()));
    served.end()?;
    let (operations, possible) = (ledger.lines().len(), [*allowed.start(), *allowed.end()]);
    Ok(Moment {
        milestone: noted.milestone,
        at,
        lsn,
        as_of,
        operations,
        possible,
        matching,
        differences,
        took_ms,
    })
}

/// How many operations a copy may have that holds everything up to `lsn`, decided at `as_of`, for a moment at which no operation was under
/// way: all that were acknowledged before the moment and all that the LSN tells of, none that began after what is in it was decided.
fn possible(ledger: &Ledger, moment: SystemTime, lsn: u64, as_of: SystemTime) -> RangeInclusive<usize> {
    let done = ledger.lines().partition_point(|line| line.acknowledged <= moment);
    let begun = ledger.changes().take_while(|change| change.begun <= as_of).count();
    ledger.lines_up_to(lsn).max(done)..=ledger.changes_possible_at(lsn).min(begun)
}

/// After how many operations a plain directory is what was restored, among those `allowed`; or what differs after the last of them.
fn matching_shadow(
    shadow: &Path,
    ledger: &Ledger,
    restored: &Path,
    allowed: &RangeInclusive<usize>,
) -> Result<(Option<usize>, Vec<String>), CliError> {
    operations::prepare(shadow).map_err(at(shadow))?;
    let mut differences = vec!["no number of operations is consistent with what the restore says".to_owned()];
    let mut changes = ledger.changes();
    let mut step = || changes.next().map_or(Ok(()), |change| change.operation.apply(shadow, Sync::Never));
    for done in 0..=*allowed.end() {
        if allowed.contains(&done) {
            differences = compare::differences(shadow, restored);
            if differences.is_empty() {
                return Ok((Some(done), differences));
            }
        }
        step().map_err(at(shadow))?;
    }
    Ok((None, differences))
}

/// A moment as plans show it: local, with its offset, and the zone in brackets.
fn parse(text: &str) -> Result<SystemTime, CliError> {
    let moment = text.split('[').next().unwrap_or_default();
    let moment: jiff::Timestamp =
        moment.parse().map_err(|error| CliError::new(format!("{text:?} is no moment: {error}")))?;
    Ok(SystemTime::from(moment))
}

const ARCHIVE_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::{
        super::ledger::tests::{ledger_of, remove, second, write},
        *,
    };

    /// The fear: a restore that is one operation off is taken for one that is right.
    #[test]
    fn how_many_operations_are_possible_follows_from_moment_lsn_and_time() {
        // Line n is begun in second 10n + 1 and acknowledged in second 10n + 9.
        let ledger =
            ledger_of(&[(write("a", 1), 5), (write("b", 2), 8), (write("c", 3), 9), (remove("c"), 12)]);
        let possible = |moment, lsn, as_of| possible(&ledger, second(moment), lsn, second(as_of));
        assert_eq!(possible(20, 8, 19), 2..=2);
        // Nothing of the next one had begun when the last entry was decided.
        assert_eq!(possible(20, 7, 15), 2..=2);
        // In the middle of an operation.
        assert_eq!(possible(25, 8, 25), 2..=2);
        assert_eq!(possible(38, 11, 36), 3..=4);
        // What was acknowledged before the moment has to be there, and what says more than it has contradicts itself.
        assert!(possible(30, 5, 29).is_empty());
        assert!(possible(20, 9, 15).is_empty());
    }

    #[test]
    fn a_restore_is_compared_after_what_is_possible_and_nothing_else() {
        let ledger = ledger_of(&[(write("d0/a", 1), 5), (write("d1/b", 2), 8), (remove("d0/a"), 9)]);
        let root = tempfile::tempdir().unwrap();
        let restored = root.path().join("restored");
        operations::prepare(&restored).unwrap();
        for change in ledger.changes().take(2) {
            change.operation.apply(&restored, Sync::Never).unwrap();
        }
        let matching = |name: &str, allowed| {
            matching_shadow(&root.path().join(name), &ledger, &restored, &allowed).unwrap()
        };
        assert_eq!(matching("equal", 1..=2), (Some(2), Vec::new()));
        for (name, allowed) in [("earlier", 0..=1), ("later", 3..=3)] {
            let (matching, differences) = matching(name, allowed);
            assert!(matching.is_none() && !differences.is_empty(), "{name}");
        }
        #[expect(clippy::reversed_empty_ranges, reason = "what contradicts itself")]
        let (none, why) = matching("none", 2..=1);
        assert!(none.is_none() && why[0].contains("no number of operations"), "{why:?}");
    }

    #[test]
    fn moments_are_read_as_they_are_printed() {
        let moment = second(1_780_000_000) + Duration::from_nanos(123_456_789);
        let printed = format!("{}+00:00[Etc/UTC]", moment_text(moment).unwrap().trim_end_matches('Z'));
        assert_eq!(parse(&printed), Ok(moment));
        assert!(parse("before the first entry").is_err());
    }
}
