//! `murphy fsck`.

use std::path::PathBuf;

use tokio::runtime::Runtime;

use super::source::node_of;
use crate::{
    check::{self, Finding, Summary},
    control::{Control, Request},
    error::{CliError, Code, failed},
    node::{Node, NodeOptions},
    output::Output,
};

/// Check a node: index against log, the tree, and its packs
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Check a node: index against log, the tree, and its packs\n\nNothing is changed. Exits with 3 if anything is wrong.",
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
    let summary: Summary = match Control::connect(&directory)? {
        Some(mut control) => {
            let show = |value| {
                let finding: Finding = serde_json::from_value(value).map_err(failed)?;
                output.data(&finding, Finding::text)
            };
            let value = control.ask(&Request::Fsck { data: args.data }, output, show)?;
            serde_json::from_value(value).map_err(failed)?
        }
        None => {
            let runtime = Runtime::new().map_err(failed)?;
            let node = Node::open(&directory, &NodeOptions::default(), runtime.handle())?;
            let mut unprinted = None;
            let mut show = |finding: Finding| {
                let printed = output.data(&finding, Finding::text);
                unprinted = unprinted.take().or(printed.err());
            };
            let summary = check::check(&node, args.data, runtime.handle(), &mut show)?;
            if let Some(error) = unprinted {
                return Err(error);
            }
            summary
        }
    };
    output.data(&summary, Summary::text)?;
    Ok(if summary.findings == 0 { Code::Done } else { Code::Found })
}
