//! `murphy dump`: the tree as one file.
//!
//! Invariants:
//! - A dump has its name only when it is complete and durable; nothing that is there is replaced.
//! - With `-` stdout has the dump and nothing else.

use std::path::PathBuf;

use super::source::node_of;
use crate::{
    control::Request,
    error::{CliError, Code, at},
    output::Output,
    serve,
};

/// Write the whole tree into one compact, portable file
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Write the whole tree into one compact, portable file\n\nIt holds names, attributes and where the \
                  bytes are; the bytes stay in the block store. Writes go on meanwhile.",
    after_help = "Example:\n  murphy dump /srv/home /backup/home.murphy"
)]
pub(crate) struct DumpArgs {
    /// The directory of a node, served or not, or a mount point
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// A new file, or - for stdout
    #[arg(value_name = "FILE|-")]
    file: PathBuf,
}

pub(crate) fn run(args: &DumpArgs, output: &Output) -> Result<Code, CliError> {
    let directory = node_of(&args.source)?;
    let to_stdout = args.file.as_os_str() == "-";
    let path = if to_stdout {
        // The process that serves the node writes into it: it runs as the same user, and sees the same /proc.
        PathBuf::from(format!("/proc/{}/fd/1", std::process::id()))
    } else {
        std::path::absolute(&args.file).map_err(at(&args.file))?
    };
    let done = serve::ask(&directory, &Request::Dump { path }, output, |_| Ok(()))?;
    if to_stdout {
        output.note(&done.to_string());
    } else {
        output.data(&done, |done| format!("{} inodes at lsn {}", done["inodes"], done["lsn"]))?;
    }
    Ok(Code::Done)
}
