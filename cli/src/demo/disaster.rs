//! The disaster: while the writer writes, region B stops hearing of region A, and then A is gone, with its node and its store.
//!
//! Invariants:
//! - The writer is at work, or waits in an fsync, until A's process is killed: nothing is brought to an orderly end before.
//! - What A held is removed before anything is asked of B.

use rustix::process::Signal;

use super::{
    Stage,
    regions::{Region, Regions},
    writer::{Stopped, Writer},
};
use crate::error::CliError;

/// How long A lives on after B has heard its last.
#[derive(Clone, Copy)]
pub(super) enum Alone {
    /// Until the writer has written so many more lines.
    ForLines(usize),
    /// Until the writer waits for an fsync that nobody answers: nothing is acknowledged that A alone has.
    UntilFsyncWaits,
}

/// Loses region A under the writer's hands; region B is left.
pub(super) fn strike(
    stage: &Stage,
    regions: Regions,
    writer: Writer,
    alone: Alone,
) -> Result<(Region, Stopped), CliError> {
    let Regions { a, b } = regions;
    b.served.signal(Signal::STOP)?;
    let before = writer.lines();
    match alone {
        Alone::ForLines(lines) => {
            stage.note(&format!(
                "Line {before}: region B stops hearing of A (SIGSTOP), A goes on for {lines} lines."
            ));
            writer.wait_for_lines(before + lines)?;
        }
        Alone::UntilFsyncWaits => {
            stage.note(&format!(
                "Line {before}: region B stops hearing of A (SIGSTOP): the writer has to wait in fsync."
            ));
            writer.wait_until_it_waits()?;
        }
    }
    writer.check()?;
    a.destroy()?;
    let stopped = writer.wait_for_the_end()?;
    stage.note(&format!(
        "Region A is gone, node, store and all (SIGKILL). The writer has {} lines, and then: {}.",
        stopped.ledger.lines().len(),
        stopped.noticed
    ));
    b.served.signal(Signal::CONT)?;
    Ok((b, stopped))
}
