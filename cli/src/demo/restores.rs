//! Moments from the archive, held against the plain directory as it was after the same operations.
//!
//! Invariants:
//! - A moment is compared with the plain directory after every operation that it allows, and with no other.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    Place, compare,
    ledger::{LEDGER, Ledger},
    nodes::{Served, clock, run, wait_for},
    operations::{self, Sync},
    report::{Moment, Report},
};
use crate::error::{CliError, failed};

/// Waits until the archive has everything that is durable.
pub(super) fn wait_archived(a: &Served) -> Result<(), CliError> {
    let goal = a.durable_lsn()?;
    wait_for("the archive", Duration::from_secs(60), || {
        let status = a.status()?;
        Ok(status["archives"][0]["lsn"].as_u64().is_some_and(|lsn| lsn >= goal))
    })
}

/// The last moment before the mass deletion began at line `deletion`, and one in the middle of the work before it.
pub(super) fn around_the_deletion(
    place: &Place,
    archive: &str,
    ledger: &Ledger,
    deletion: usize,
    report: &mut Report,
) -> Result<(), CliError> {
    let lines = &ledger.lines;
    restore(place, archive, ledger, "before-the-deletion", lines[deletion].begun, report)?;
    restore(place, archive, ledger, "in-the-middle", lines[deletion / 2].acknowledged, report)
}

fn restore(
    place: &Place,
    archive: &str,
    ledger: &Ledger,
    name: &'static str,
    moment: SystemTime,
    report: &mut Report,
) -> Result<(), CliError> {
    let region = place.directory(name)?;
    let (node, at) = (region.join("node"), moment_argument(moment)?);
    let blocks = format!("file://{}", region.join("store").display());
    let start = clock();
    let arguments = ["restore", archive].map(Path::new).into_iter().chain([node.as_path()]);
    let options = ["--at", &at, "--blocks", &blocks].map(Path::new);
    let said = run(&arguments.chain(options).collect::<Vec<_>>())?;
    let served = Served::start(place.way, &node, &region.join("mount"), &[])?;
    let took_ms = start.elapsed().as_millis() as u64;
    let matching = matching_shadow(&region.join("shadow"), ledger, &served.look()?.join(LEDGER), moment)?;
    served.end()?;
    report.restored(Moment { name, at, said, matching, took_ms });
    Ok(())
}

/// After how many operations a plain directory is what was restored, among those that `moment` allows; or what differs.
fn matching_shadow(
    shadow: &Path,
    ledger: &Ledger,
    restored: &Path,
    moment: SystemTime,
) -> Result<Result<usize, Vec<String>>, CliError> {
    operations::prepare(shadow).map_err(failed)?;
    let done = ledger.lines.iter().take_while(|line| line.acknowledged < moment).count();
    let begun = ledger.lines.iter().take_while(|line| line.begun <= moment).count();
    let mut differing = Vec::new();
    for (number, line) in ledger.lines.iter().enumerate().take(begun + 1) {
        if number >= done.saturating_sub(1) {
            differing = compare::differences(shadow, restored).map_err(failed)?;
            if differing.is_empty() {
                return Ok(Ok(number));
            }
        }
        line.operation.apply(shadow, Sync::Never).map_err(failed)?;
    }
    Ok(Err(differing))
}

/// A moment as `--at` takes it, to the nanosecond.
fn moment_argument(moment: SystemTime) -> Result<String, CliError> {
    let since = moment.duration_since(UNIX_EPOCH).map_err(failed)?;
    let nanos = i128::try_from(since.as_nanos()).map_err(failed)?;
    Ok(jiff::Timestamp::from_nanosecond(nanos).map_err(failed)?.to_string())
}
