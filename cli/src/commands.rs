//! The commands, one file each.
//!
//! Invariants:
//! - A command that fails tells whoever started it in the background.

pub(crate) mod ack;
pub(crate) mod archive;
pub(crate) mod demo;
pub(crate) mod dump;
pub(crate) mod flush;
pub(crate) mod format;
pub(crate) mod fsck;
pub(crate) mod invite;
pub(crate) mod join;
pub(crate) mod load;
pub(crate) mod member;
pub(crate) mod mount;
pub(crate) mod promote;
mod removal;
pub(crate) mod restore;
pub(crate) mod serve;
mod source;
pub(crate) mod status;
pub(crate) mod subscribe;
pub(crate) mod umount;
pub(crate) mod verify;

use crate::{
    args::{Cli, Command},
    background,
    error::{CliError, Code},
    output::Output,
};

/// Runs the command.
pub(crate) fn run(cli: Cli, output: &Output) -> Result<Code, CliError> {
    let done = match cli.command {
        Command::Demo(args) => demo::run(&args, output),
        Command::Format(args) => format::run(&args, output),
        Command::Mount(args) => mount::run(&args, output),
        Command::Umount(args) => umount::run(&args, output),
        Command::Flush(args) => flush::run(&args, output),
        Command::Serve(args) => serve::run(&args, output),
        Command::Status(args) => status::run(&args, output),
        Command::Invite(args) => invite::run(&args, output),
        Command::Join(args) => join::run(&args, output),
        Command::Promote(args) => promote::run(&args, output),
        Command::Member(args) => member::run(&args, output),
        Command::Subscribe(args) => subscribe::run(&args, output),
        Command::Ack(args) => ack::run(&args, output),
        Command::Archive(args) => archive::run(&args, output),
        Command::Restore(args) => restore::run(&args, output),
        Command::Dump(args) => dump::run(&args, output),
        Command::Load(args) => load::run(&args, output),
        Command::Verify(args) => verify::run(&args, output),
        Command::Fsck(args) => fsck::run(&args, output),
    };
    done.inspect_err(background::report_failure)
}
