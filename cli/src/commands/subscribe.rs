//! `murphy subscribe`: every entry as a line of JSON.
//!
//! Invariants:
//! - It ends with whoever reads, quietly; one who only pauses is waited for, and holds up nobody.
//! - Entries come in order, each once, from the first that was asked for; a lost connection is resumed where it ended, on the same history.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use murphy_log::{Lsn, VolumeKeys};
use murphy_mirror::{Dialer, EntryLine, Identity, NetworkOptions, ObserveError, Observer, UdpSockets};
use tokio::{runtime::Runtime, sync::oneshot};

use super::{join::read_token, source::node_of};
use crate::{
    control::{Control, Request},
    error::{CliError, Code, failed},
    output::{Output, Reader, reader_is_gone},
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
    // The first that is there is asked for as 0, which is the LSN of no entry.
    let from = args.from.map(|from| from.max(Lsn::FIRST.get()));
    let output = *output;
    match (&args.directory, &args.token_file) {
        (Some(directory), _) => {
            let directory = node_of(directory)?;
            until_nobody_reads(move || of_node(&directory, from, &mut |line| output.line_for(line)))
        }
        (None, Some(token)) => {
            let token = token.clone();
            until_nobody_reads(move || of_source(&token, from, &output))
        }
        (None, None) => Err(CliError::usage("name a node's directory, or a token with --token-file")),
    }
}

/// Goes on with `telling` until it ends, or whoever reads stdout is gone: that is its end too, whether there is something to tell or not.
fn until_nobody_reads(
    telling: impl FnOnce() -> Result<(), CliError> + Send + 'static,
) -> Result<Code, CliError> {
    let runtime = Runtime::new().map_err(failed)?;
    let (ended, end) = oneshot::channel();
    let telling = move || {
        // Nobody waits for it any more if the reader went first.
        let _too_late = ended.send(telling());
    };
    std::thread::Builder::new().name("murphy-subscribe".to_owned()).spawn(telling).map_err(failed)?;
    runtime.block_on(async {
        tokio::select! {
            told = end => told.map_err(|_| CliError::new("the subscription broke off"))?,
            () = reader_is_gone() => Ok(()),
        }
    })?;
    Ok(Code::Done)
}

/// Prints the entries of a node. What is printed was heard whole before: whoever serves the node does not wait for whoever reads.
fn of_node(
    directory: &Path,
    from: Option<u64>,
    line: &mut dyn FnMut(&str) -> Result<Reader, CliError>,
) -> Result<(), CliError> {
    let quiet = Output::new(true);
    let (mut next, mut is_served) = (from, false);
    loop {
        let request = Request::Entries { from: next };
        // Anew each time: one that is not asked for long is let go.
        let done = match Control::connect(directory)? {
            Some(mut control) => {
                is_served = true;
                let mut heard = Vec::new();
                let done = control.ask(&request, &quiet, |value| {
                    heard.push(value.to_string());
                    Ok(())
                })?;
                for heard in heard {
                    if line(&heard)? == Reader::Gone {
                        return Ok(());
                    }
                }
                done
            }
            None if is_served => {
                let node = directory.display();
                return Err(CliError::new(format!("node {node} is not running any more"))
                    .hint(format!("go on with --from {} once it is", next.unwrap_or_default())));
            }
            None => serve::ask(directory, &request, &quiet, |value| line(&value.to_string()).map(|_| ()))?,
        };
        let after = done["next"].as_u64();
        let after = after.ok_or_else(|| CliError::new("the node does not say where to go on"))?;
        if !is_served && (done["end"] == true || next == Some(after)) {
            return Ok(());
        }
        next = Some(after);
    }
}

fn of_source(token: &Path, from: Option<u64>, output: &Output) -> Result<(), CliError> {
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
                                if line.lsn >= begin.get()
                                    && output.line_for(&line.to_json().map_err(failed)?)? == Reader::Gone
                                {
                                    return Ok(());
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use serde_json::{Value, json};

    use super::*;
    use crate::control::{ControlServer, Handler, Replies};

    /// A node with entries that are too large for any socket, which is asked only so often.
    struct Large(AtomicU64);

    impl Handler for Large {
        fn handle(&self, request: Request, replies: &mut dyn Replies) -> Result<Value, CliError> {
            let Request::Entries { from } = request else { return Err(CliError::new("not asked for")) };
            let from = from.unwrap_or(7);
            if from >= 10 {
                return Err(CliError::new("it is the end"));
            }
            for _ in 0..64 {
                replies.item(json!({ "lsn": from, "text": "x".repeat(64 << 10) }));
            }
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(json!({ "next": from + 1 }))
        }
    }

    /// The fear: a pager that is left alone for a minute is told that the node is not running, and the rest is missing.
    #[test]
    fn a_reader_that_pauses_holds_up_nobody_and_misses_nothing() {
        let root = tempfile::tempdir().unwrap();
        let node = Arc::new(Large(AtomicU64::new(0)));
        let handler: Arc<dyn Handler> = Arc::<Large>::clone(&node);
        let _server = ControlServer::start(root.path(), &handler).unwrap();
        let mut lines = Vec::new();
        let end = of_node(root.path(), None, &mut |line: &str| {
            // The pause ends when the node has been through with this answer, however long the reader takes.
            while node.0.load(Ordering::SeqCst) as usize <= lines.len() / 64 {
                std::thread::yield_now();
            }
            let line: Value = serde_json::from_str(line).unwrap();
            lines.push(line["lsn"].as_u64().unwrap());
            Ok(Reader::There)
        });
        assert_eq!(end, Err(CliError::new("it is the end")));
        let told: Vec<u64> = (7..10).flat_map(|lsn| [lsn; 64]).collect();
        assert_eq!(lines, told);
    }

    /// The fear: a subscriber whose reader is gone goes on for ever.
    #[test]
    fn a_reader_that_is_gone_ends_it() {
        let root = tempfile::tempdir().unwrap();
        let handler: Arc<dyn Handler> = Arc::new(Large(AtomicU64::new(0)));
        let _server = ControlServer::start(root.path(), &handler).unwrap();
        let mut told = 0;
        let end = of_node(root.path(), None, &mut |_: &str| {
            told += 1;
            Ok(Reader::Gone)
        });
        assert_eq!((end, told), (Ok(()), 1));
    }
}
