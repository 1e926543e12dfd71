//! `murphy fsck`: whether a node holds what it should.
//!
//! Invariants:
//! - Damage ends with exit code 3, also where it keeps the log or the index from being opened.

use std::path::PathBuf;

use super::source::node_of;
use crate::{
    check::{Finding, Summary},
    control::Request,
    error::{CliError, Code, failed},
    output::Output,
    serve,
};

/// Check a node: index against log, the tree, and its packs
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Check a node: index against log, the tree, and its packs\n\nNothing is repaired. A node that \
                  is not served is opened for it, which recovers its log as any start does. Exits with 3 if anything is \
                  wrong.",
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
    let show = |value| {
        let finding: Finding = serde_json::from_value(value).map_err(failed)?;
        output.data(&finding, Finding::text)
    };
    let value = serve::ask(&directory, &Request::Fsck { data: args.data }, output, show);
    let value = value.map_err(CliError::found)?;
    let summary: Summary = serde_json::from_value(value).map_err(failed)?;
    output.data(&summary, Summary::text)?;
    Ok(if summary.findings == 0 { Code::Done } else { Code::Found })
}
