//! `murphy demo`: its arguments.
//!
//! Invariants:
//! - What it does is in `demo`; here are its arguments.

use std::path::PathBuf;

use crate::{
    demo::{self, DemoOptions},
    error::{CliError, Code},
    output::Output,
};

/// See it work in a minute: writes, kills, comes back, and proves every byte
#[derive(clap::Args, Debug)]
#[command(
    long_about = "See it work in a minute: writes, kills, comes back, and proves every byte\n\nExits with 1 if any byte differs. \
                  Where nothing can be mounted, or MURPHY_DEMO_WITHOUT_FUSE is set, files are read and written through the \
                  library instead of mounts. Ctrl-C ends it and takes everything away.",
    after_help = "Example:\n  murphy demo --tree /usr/share/doc"
)]
pub(crate) struct DemoArgs {
    /// The tree to copy in; by default sources found on this machine, at most 5,000 files and 200 MB
    #[arg(long, value_name = "PATH")]
    tree: Option<PathBuf>,
    /// Do everything in this new directory and leave it there
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

pub(crate) fn run(args: &DemoArgs, output: &Output) -> Result<Code, CliError> {
    demo::run(&DemoOptions { tree: args.tree.clone(), keep: args.keep.clone() }, output)
}
