//! `murphy invite`: a token for one new node.
//!
//! Invariants:
//! - The token is on stdout, and in no log line or error.

use std::{path::PathBuf, time::Duration};

use murphy_fs::MemberRole;
use serde_json::Value;

use super::source::node_of;
use crate::{
    control::{Control, Request},
    error::{CliError, Code},
    output::Output,
    units::parse_duration,
};

/// Make a token that lets one new node join
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Make a token that lets one new node join\n\nThe token is printed on stdout and nothing else is. Whoever has it can \
                  join once, until it expires: hand it on as you would a password.",
    after_help = "Example:\n  murphy invite /srv/home | ssh mirror murphy join /srv/home --token-file - --blocks s3://other/home"
)]
pub(crate) struct InviteArgs {
    /// The directory of the source, which is served with --listen
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// What the new node may do: mirror, writer (so far the same) or observer (subscribes, holds nothing)
    #[arg(long, value_name = "ROLE", default_value_t = MemberRole::Mirror)]
    role: MemberRole,
    /// Where the new node reaches the source, as HOST:PORT; by default where the source listens
    #[arg(long = "address", value_name = "ADDR")]
    addresses: Vec<String>,
    /// For how long it can be used
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_duration)]
    expires: Duration,
}

pub(crate) fn run(args: &InviteArgs, output: &Output) -> Result<Code, CliError> {
    let directory = node_of(&args.directory)?;
    let Some(mut control) = Control::connect(&directory)? else {
        return Err(CliError::new(format!("nobody serves {}, so nobody could join", directory.display()))
            .hint("serve or mount it with --listen ADDR, as in --listen 0.0.0.0:7000"));
    };
    let request = Request::Invite {
        role: args.role.to_string(),
        addresses: args.addresses.clone(),
        expires_secs: args.expires.as_secs(),
    };
    let done = control.ask(&request, output, |_| Ok(()))?;
    output.data(&done, |done| {
        done["token"].as_str().map(str::to_owned).unwrap_or_else(|| Value::to_string(done))
    })?;
    Ok(Code::Done)
}
