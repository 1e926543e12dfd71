//! `murphy status`.

use std::path::PathBuf;

use tokio::runtime::Runtime;

use super::source::node_of;
use crate::{
    control::{Control, Request},
    error::{CliError, Code, failed},
    node::{Node, NodeOptions},
    output::Output,
    status::{self, Status},
};

/// Show what would be lost, and how everything is
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Show what would be lost, and how everything is\n\nExits with 3 while there is no copy outside the \
                  node's failure domain.",
    after_help = "Example:\n  murphy status /srv/home"
)]
pub(crate) struct StatusArgs {
    /// The directory of a node, served or not, or a mount point
    #[arg(value_name = "SRC")]
    source: PathBuf,
}

pub(crate) fn run(args: &StatusArgs, output: &Output) -> Result<Code, CliError> {
    let directory = node_of(&args.source)?;
    let status = match Control::connect(&directory)? {
        Some(mut control) => {
            let value = control.ask(&Request::Status, output, |_| Ok(()))?;
            serde_json::from_value::<Status>(value).map_err(failed)?
        }
        None => {
            let runtime = Runtime::new().map_err(failed)?;
            let node = Node::open(&directory, &NodeOptions::default(), runtime.handle())?;
            status::of(&node, None)?
        }
    };
    output.data(&status, Status::text)?;
    Ok(if status.danger { Code::Found } else { Code::Done })
}
