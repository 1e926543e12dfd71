//! `murphy subscribe`: every entry as a line of JSON.
//!
//! Invariants:
//! - Entries come in order, each once, from the first that was asked for; a lost connection is resumed where it ended, on the same history.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use murphy_log::{Lsn, VolumeKeys};
use murphy_mirror::{Dialer, EntryLine, Identity, NetworkOptions, ObserveError, Observer, UdpSockets};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::{join::read_token, source::node_of};
use crate::{
    control::{Control, Request},
    error::{CliError, Code, failed},
    output::Output,
    serve,
};

/// Print every entry as it happens, one JSON object per line
#[derive(clap::Args, Debug)]
#[command(
    long_about = "Print every entry as it happens, one JSON object per line\n\nOf a node that is served it goes on until it is stopped; of one \
                  that is not, it prints what is there.",
    after_help = "Example:\n  murphy subscribe /srv/home --from 1000 | jq -r .kind"
)]
#[command(group(clap::ArgGroup::new("of").required(true)))]
pub(crate) struct SubscribeArgs {
    /// The directory of a node, served or not
    #[arg(value_name = "DIR", group = "of")]
    directory: Option<PathBuf>,
    /// The file that holds an observer's token, or - for stdin
    #[arg(long, value_name = "FILE|-", group = "of")]
    token_file: Option<PathBuf>,
    /// Begin with this entry; by default with the first that is there
    #[arg(long, value_name = "LSN")]
    from: Option<u64>,
}

pub(crate) fn run(args: &SubscribeArgs, output: &Output) -> Result<Code, CliError> {
    match (&args.directory, &args.token_file) {
        (Some(directory), _) => of_node(&node_of(directory)?, args.from, output),
        (None, Some(token)) => of_source(token, args.from, output),
        (None, None) => Err(CliError::usage("name a node's directory, or a token with --token-file")),
    }
}

fn of_node(directory: &Path, from: Option<u64>, output: &Output) -> Result<Code, CliError> {
    let line = |value: Value| output.line(&value.to_string());
    let quiet = Output::new(true);
    let mut next = from.unwrap_or(0);
    let Some(mut control) = Control::connect(directory)? else {
        loop {
            let done = serve::ask(directory, &Request::Entries { from: next }, &quiet, line)?;
            let after = done["next"].as_u64().unwrap_or(next);
            if after == next || done["end"] == true {
                return Ok(Code::Done);
            }
            next = after;
        }
    };
    loop {
        let done = control.ask(&Request::Entries { from: next }, &quiet, line)?;
        next = done["next"].as_u64().ok_or_else(|| CliError::new("the node does not say where to go on"))?;
    }
}

fn of_source(token: &Path, from: Option<u64>, output: &Output) -> Result<Code, CliError> {
    let token = read_token(token)?;
    let runtime = Runtime::new().map_err(failed)?;
    let identity = Arc::new(Identity::generate().map_err(failed)?);
    let dialer = Dialer { identity, sockets: Arc::new(UdpSockets), options: NetworkOptions::default() };
    runtime.block_on(async {
        let joined = dialer.join(&token, "subscriber".to_owned(), Vec::new()).await;
        joined.map_err(|error| failed(error).hint("ask for a new token: murphy invite --role observer"))?;
        let keys = VolumeKeys::derive(token.volume);
        let (mut begin, mut after) = (Lsn::new(from.unwrap_or(0)), None);
        loop {
            let of = (keys.clone(), token.branch);
            let connected =
                Observer::connect(&dialer, &token.addresses, token.source_key, of, begin, after).await;
            let error = match connected {
                Ok(mut observer) => loop {
                    match observer.next().await {
                        Ok(frame) => {
                            for line in EntryLine::of_frame(&frame).map_err(failed)? {
                                if line.lsn >= begin.get() {
                                    output.line(&line.to_json().map_err(failed)?)?;
                                }
                            }
                            (begin, after) = (frame.last().next(), Some(frame.position()));
                        }
                        Err(error) => break error,
                    }
                },
                Err(error) => error,
            };
            match error {
                ObserveError::Exchange(_) | ObserveError::Ended | ObserveError::Silent => {
                    tracing::warn!(%error, "the source is not reached; trying again");
                    tokio::time::sleep(AGAIN).await;
                }
                error => return Err(failed(error)),
            }
        }
    })
}

const AGAIN: Duration = Duration::from_secs(1);
