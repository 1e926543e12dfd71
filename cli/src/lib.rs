//! The program `murphy`: arguments, commands, printing, and the process that serves a node.
//!
//! [`main_with`] is the whole program. A command is a file in `commands`; what serves a node is `serve`, what a running node answers is
//! `control`, and a node's directory is `node`.

pub mod allocator;
mod archive_notes;
mod archive_packs;
mod archive_reads;
mod archives;
mod args;
mod attempts;
mod background;
mod check;
mod commands;
mod config;
mod control;
mod demo;
mod dump_file;
mod error;
mod givers;
mod mirror_notes;
mod mirrors;
mod node;
mod output;
mod places;
mod progress;
mod promise;
mod replaced;
mod scrub_notes;
mod serve;
mod settings;
mod status;
mod summed;
mod take_over;
mod tree;
mod units;

use std::{ffi::OsString, io::IsTerminal, process::ExitCode};

use clap::Parser;
use rustix::fs::Mode;
use tracing_subscriber::{EnvFilter, fmt};

use args::Cli;
use output::Output;

/// Runs the program with these arguments, its own name first. Data goes to stdout, everything else to stderr.
pub fn main_with(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    allocator::keep_freed_memory();
    // Logs, packs and dumps hold what files hold that others may not read.
    rustix::process::umask(Mode::from_raw_mode(NOT_FOR_OTHERS));
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done about a terminal that is gone.
            let _unprinted = error.print();
            return ExitCode::from(if error.use_stderr() { error::USAGE } else { 0 });
        }
    };
    start_logging(&cli);
    // Clouds need it; a second call in the same process finds it installed.
    let _installed_already = rustls::crypto::ring::default_provider().install_default();
    let output = Output::new(cli.json);
    match commands::run(cli, &output) {
        Ok(code) => code.into(),
        Err(error) => {
            output.error(&error);
            error.code().into()
        }
    }
}

/// Log lines go to stderr; `MURPHY_LOG` chooses which.
fn start_logging(cli: &Cli) {
    let usual = match (cli.verbose, cli.command.serves()) {
        (true, _) => "info,murphy_cli=debug,murphy_fs=debug,murphy_log=debug",
        (false, true) => "info",
        (false, false) => "warn",
    };
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new(usual));
    let subscriber = fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_target(false)
        .compact()
        .finish();
    // A test that runs several programs in one process has one already.
    let _set_already = tracing::subscriber::set_global_default(subscriber);
}

/// Files are made for their owner alone, directories too.
const NOT_FOR_OTHERS: u32 = 0o077;
const LOG_VARIABLE: &str = "MURPHY_LOG";
