//! `murphy status`: what would be lost.
//!
//! Invariants:
//! - It answers for any node whose log can be opened, served or not; danger is exit code 3.

use std::path::PathBuf;

use super::source::node_of;
use crate::{
    control::Request,
    error::{CliError, Code, failed},
    output::Output,
    serve,
    status::Status,
};

/// Show what would be lost, and how everything is
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Show what would be lost, and how everything is\n\nExits with 3 while there is no copy outside the \
                  failure domains of the node and of its block store, and once another source has taken over. A connected mirror \
                  counts wherever it runs; of a mirror itself it exits with 0.",
    after_help = "Example:\n  murphy status /srv/home"
)]
pub(crate) struct StatusArgs {
    /// The directory of a node, served or not, or a mount point
    #[arg(value_name = "SRC")]
    source: PathBuf,
}

pub(crate) fn run(args: &StatusArgs, output: &Output) -> Result<Code, CliError> {
    let directory = node_of(&args.source)?;
    let value = serve::ask(&directory, &Request::Status, output, |_| Ok(()))?;
    let status: Status = serde_json::from_value(value).map_err(failed)?;
    output.data(&status, Status::text)?;
    Ok(if status.danger { Code::Found } else { Code::Done })
}
