//! `murphy flush`: what `sync(2)` cannot do here.
//!
//! Invariants:
//! - It returns with 0 only if everything written before is durable at the volume's level.

use std::path::PathBuf;

use super::source::{MountPoint, control_of_mount, mount_point, node_of};
use crate::{
    control::Request,
    error::{CliError, Code},
    output::Output,
};

/// Make everything written so far durable
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Make everything written so far durable\n\nsync(2) and syncfs(2) do not reach a FUSE file system; this does.",
    after_help = "Example:\n  murphy flush /home"
)]
pub(crate) struct FlushArgs {
    /// The mount point, or the directory of a node that is served
    #[arg(value_name = "MNT")]
    mount_point: PathBuf,
}

pub(crate) fn run(args: &FlushArgs, output: &Output) -> Result<Code, CliError> {
    let node = match node_of(&args.mount_point)? {
        node if node.join("murphy.toml").is_file() => node,
        _ => match mount_point(&args.mount_point)? {
            MountPoint::Served { node, .. } => node,
            MountPoint::Dead { path } => {
                return Err(CliError::new(format!(
                    "the process behind the mount at {} is gone; what it had not made durable is lost",
                    path.display()
                )));
            }
        },
    };
    let done = control_of_mount(&node)?.ask(&Request::Flush, output, |_| Ok(()))?;
    output.data(&done, |_| String::new())?;
    Ok(Code::Done)
}
