//! `murphy fsck`: whether a node holds what it should.
//!
//! Invariants:
//! - Damage ends with exit code 3, also where it keeps the log or the index from being opened.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::runtime::Runtime;

use super::source::node_of;
use crate::{
    check::{Finding, Summary, check},
    control::{Control, Request},
    error::{CliError, Code, failed},
    node::Looked,
    output::Output,
    progress::{Progress, ProgressLine},
};

/// Check a node: index against log, the tree, and its packs
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Check a node: index against log, the tree, and its packs\n\nNothing is repaired, and no file of a node that \
                  is not served is changed: a torn end of its log is passed over, an index that is behind the log is brought \
                  to its end in a copy. Exits with 3 if anything is wrong.",
    after_help = "Example:\n  murphy fsck /srv/home --data"
)]
pub(crate) struct FsckArgs {
    /// The directory of a node, served or not, or a mount point
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Read and verify every pack too
    #[arg(long)]
    data: bool,
}

pub(crate) fn run(args: &FsckArgs, output: &Output) -> Result<Code, CliError> {
    let directory = node_of(&args.directory)?;
    let show = |finding: Finding| output.data(&finding, Finding::text);
    let summary = match Control::connect(&directory)? {
        Some(mut control) => served(&mut control, args.data, output, show),
        None => at_rest(&directory, args.data, output, show),
    };
    let summary = summary.map_err(CliError::found)?;
    output.data(&summary, Summary::text)?;
    Ok(if summary.findings == 0 { Code::Done } else { Code::Found })
}

/// Asks the process that serves the node.
fn served(
    control: &mut Control,
    data: bool,
    output: &Output,
    mut show: impl FnMut(Finding) -> Result<(), CliError>,
) -> Result<Summary, CliError> {
    let mut item = |value| show(serde_json::from_value(value).map_err(failed)?);
    let value = control.ask(&Request::Fsck { data }, output, &mut item)?;
    serde_json::from_value(value).map_err(failed)
}

/// Looks at a node that nobody serves.
fn at_rest(
    directory: &Path,
    data: bool,
    output: &Output,
    mut show: impl FnMut(Finding) -> Result<(), CliError>,
) -> Result<Summary, CliError> {
    let runtime = Runtime::new().map_err(failed)?;
    let looked = Looked::open(directory, runtime.handle())?;
    let line = ProgressLine::new(output);
    line.show(&Progress::new("checking", 0, 0));
    let mut unprinted = None;
    let summary = check(&looked.node, data, runtime.handle(), &mut |finding| {
        if unprinted.is_none() {
            unprinted = show(finding).err();
        }
    });
    drop(line);
    drop(looked);
    runtime.shutdown_timeout(SHUTDOWN);
    unprinted.map_or(summary, Err)
}

/// What a look leaves under way is given up after so long.
const SHUTDOWN: Duration = Duration::from_secs(10);
