//! `murphy mount`: serving a node through the kernel.
//!
//! Invariants:
//! - A mount point where nothing can be mounted is refused before the node is opened.
//! - With `-d` it returns when the mount answers, or says why it does not.
//! - Nothing is mounted by a process that is about to end: its end is waited for.
//! - An option that the process which serves the node already does not take from here is refused, never ignored.

use std::path::PathBuf;

use murphy_fs::{Mount, MountOptions};

use super::serve::{ServeOptions, parse_listen};
use crate::{
    background,
    config::NodeConfig,
    control::{MountRequest, Request, ask_lasting, connect_lasting},
    error::{CliError, Code, at, failed},
    output::Output,
    serve::{self, Plan},
};

/// Serve a node and mount its volume
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Serve a node and mount its volume\n\nA node that is served already mounts it itself, with the \
                  options that it is served with: others are refused. It has one mount point at a time. A process that began with the mount ends with it.",
    after_help = "Example:\n  murphy mount /srv/home /home -d"
)]
pub(crate) struct MountArgs {
    /// The directory of the node
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Where to mount: an empty directory
    #[arg(value_name = "MNT")]
    mount_point: PathBuf,
    /// Go on in the background once it is mounted; messages go to DIR/murphy.log
    #[arg(short = 'd', long)]
    detach: bool,
    /// Let the kernel refuse every change
    #[arg(long)]
    read_only: bool,
    /// Let other users in, as permissions allow
    #[arg(long)]
    allow_other: bool,
    /// Listen for other nodes there, as in 10.0.0.7:7000; port 0 takes any. Others do not find a mirror on 0.0.0.0
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    #[command(flatten)]
    options: ServeOptions,
}

pub(crate) fn run(args: &MountArgs, output: &Output) -> Result<Code, CliError> {
    let directory = std::path::absolute(&args.directory).map_err(at(&args.directory))?;
    let path = std::path::absolute(&args.mount_point).map_err(at(&args.mount_point))?;
    let request = MountRequest { path, read_only: args.read_only, allow_other: args.allow_other };
    let listen = args.listen.as_deref().map(parse_listen).transpose()?;
    if connect_lasting(&directory, output)?.is_some() {
        let listens = listen.is_some().then_some("--listen");
        let given: Vec<&str> = listens.into_iter().chain(args.options.given()).collect();
        if !given.is_empty() {
            let (given, node) = (given.join(" and "), directory.display());
            return Err(CliError::usage(format!("node {node} is served already, without the {given} given here"))
                .hint("mount without, or end the process that serves it (murphy umount, or SIGTERM to the one that murphy status names) and mount again"));
        }
        let asked = Request::Mount(request.clone());
        if let Some(done) = ask_lasting(&directory, &asked, output, &mut |_| Ok(()))? {
            output.data(&done, |_| String::new())?;
            output.note("Mounted by the process that serves the node already");
            return Ok(Code::Done);
        }
    }
    // Before the node is opened: that begins a session in its log.
    let volume = NodeConfig::read(&directory)?.volume.to_string();
    Mount::check(&request.path, &MountOptions::new(volume)).map_err(failed)?;
    if args.detach && !background::is_child() {
        let pid = background::start(&directory)?;
        output.data(&serde_json::json!({ "mounted": request.path, "pid": pid }), |_| String::new())?;
        return Ok(Code::Done);
    }
    serve::run(
        &Plan { directory, options: args.options.node_options()?, mount: Some(request), listen },
        output,
    )
}
