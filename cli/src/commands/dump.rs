//! `murphy dump`: the tree as one file.
//!
//! Invariants:
//! - A dump has its name only when it is complete and durable; nothing that is there is replaced.
//! - With `-` stdout has the dump and nothing else; a reader that goes away before the end is an error.

mod archive;
mod index;

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::source::{archive_of, node_of};
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
                  bytes are; the bytes stay in the block store. Writes go on meanwhile.\n\nOf an archive, by its URL and without any node: the tree \
                  of any moment that it holds. Exits with 3 if anything was damaged on the way.\n\nOf a node whose log is damaged, if nobody has what is missing: the tree as \
                  its index has it, once that was compared with what the log had said; exits with 3.",
    after_help = "Examples:\n  murphy dump /srv/home /backup/home.murphy\n  murphy dump s3://other-account/home yesterday.murphy --at '1d ago'"
)]
pub(crate) struct DumpArgs {
    /// The directory of a node, served or not, a mount point, or the URL of an archive
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// A new file, or - for stdout
    #[arg(value_name = "FILE|-")]
    file: PathBuf,
    /// Of an archive, this moment: RFC 3339, a local time, @unix, or an age like '10m ago'
    #[arg(long, value_name = "TIME", conflicts_with = "lsn")]
    at: Option<String>,
    /// Of an archive, as it was after this entry
    #[arg(long, value_name = "LSN")]
    lsn: Option<u64>,
}

pub(crate) fn run(args: &DumpArgs, output: &Output) -> Result<Code, CliError> {
    let path = match args.is_to_stdout() {
        true => None,
        false => Some(std::path::absolute(&args.file).map_err(at(&args.file))?),
    };
    if let Some(url) = archive_of(&args.source)? {
        return archive::run(&url, args, path.as_deref(), output);
    }
    if args.at.is_some() || args.lsn.is_some() {
        return Err(CliError::usage("a node is dumped as it is now").hint(
            "of a moment before: murphy dump URL FILE --at TIME, with the URL of an archive, which murphy archive list shows",
        ));
    }
    let directory = node_of(&args.source)?;
    let done = match &path {
        None => to_stdout(&directory, output),
        Some(_) => serve::ask(&directory, &Request::Dump { path: path.clone() }, output, |_| Ok(())),
    };
    match done {
        Ok(done) => told(args, &done, output).map(|()| Code::Done),
        Err(refused) if refused.is_damage() => index::run(&directory, args, path.as_deref(), refused, output),
        Err(refused) => Err(refused),
    }
}

impl DumpArgs {
    fn is_to_stdout(&self) -> bool {
        self.file.as_os_str() == "-"
    }
}

/// Asks the process that serves the node, or a node at rest, for the bytes.
fn to_stdout(directory: &Path, output: &Output) -> Result<Value, CliError> {
    let mut out = stdout()?;
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(unwritten);
    serve::ask_for_bytes(directory, &Request::Dump { path: None }, output, &mut write)
}

/// Stdout as this process was given it, at the place where it is: nobody else opens it anew.
fn stdout() -> Result<File, CliError> {
    Ok(File::from(io::stdout().as_fd().try_clone_to_owned().map_err(unwritten)?))
}

fn unwritten(error: io::Error) -> CliError {
    CliError::new(format!("cannot write to stdout: {error}"))
}

/// Says what was dumped; stdout may have the dump itself.
fn told(args: &DumpArgs, done: &Value, output: &Output) -> Result<(), CliError> {
    if args.is_to_stdout() {
        output.note(&done.to_string());
        return Ok(());
    }
    output.data(done, |done| format!("{} inodes at lsn {}", done["inodes"], done["lsn"]))
}
