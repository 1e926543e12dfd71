//! `murphy status`: what would be lost; of an archive, what it holds.
//!
//! Invariants:
//! - It answers for any node whose log can be opened, served or not; danger is exit code 3.

mod archive;

use std::path::PathBuf;

use super::source::{archive_of, node_of};
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
                  counts wherever it runs; of a mirror itself it exits with 0.\n\nOf an archive, by its URL and without any node: whose it is, from \
                  when to when everything in it can be restored, how its source dated what it wrote last or who sealed it, its snapshots, when it was verified. It \
                  exits with 3 if nothing can be restored, or something on the way is damaged.",
    after_help = "Examples:\n  murphy status /srv/home\n  murphy status 's3://other-account/home?credentials=env:B_'"
)]
pub(crate) struct StatusArgs {
    /// The directory of a node, served or not, a mount point, or the URL of an archive
    #[arg(value_name = "SRC")]
    source: PathBuf,
}

pub(crate) fn run(args: &StatusArgs, output: &Output) -> Result<Code, CliError> {
    if let Some(url) = archive_of(&args.source)? {
        return archive::run(&url, output);
    }
    let directory = node_of(&args.source)?;
    let value = serve::ask(&directory, &Request::Status, output, |_| Ok(()))?;
    let status: Status = serde_json::from_value(value).map_err(failed)?;
    output.data(&status, Status::text)?;
    Ok(if status.danger { Code::Found } else { Code::Done })
}
