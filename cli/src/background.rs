//! `-d`: the same program again, in the background, watched until it serves.
//!
//! The child is told by a variable that it is one. It says on its stdout, which is a pipe to the parent, that it serves or why it does not; its
//! stderr is `DIR/murphy.log`.
//!
//! Invariants:
//! - The parent returns when the child serves or has ended, and says which; it never leaves behind a child that does not serve.

use std::{
    fs::OpenOptions,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use serde::{Deserialize, Serialize};

use crate::{
    config::NodeConfig,
    error::{CliError, at},
};

/// What a child says.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Ready,
    Failed(CliError),
}

/// Whether this process was started to go on in the background.
pub(crate) fn is_child() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Starts this program again with its own arguments, and returns its process id when it serves, or why it does not.
pub(crate) fn start(directory: &Path) -> Result<u32, CliError> {
    // Where no node is nothing is made, not even a file for messages.
    NodeConfig::read(directory)?;
    let log_path = directory.join(LOG);
    let log = OpenOptions::new().create(true).append(true).open(&log_path).map_err(at(&log_path))?;
    let program = std::env::current_exe().map_err(CliError::new)?;
    let mut child = Command::new(&program)
        .args(std::env::args_os().skip(1))
        .env(VARIABLE, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(at(&program))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout.take(WORD_BYTES_MAX)).read_line(&mut line).map_err(CliError::new)?;
    }
    match serde_json::from_str(&line) {
        Ok(Word::Ready) => Ok(child.id()),
        Ok(Word::Failed(error)) => {
            // What it holds (the node's lock) is free when this returns.
            child.wait().map_err(CliError::new)?;
            Err(error)
        }
        Err(_) => {
            let status = child.wait().map_err(CliError::new)?;
            Err(CliError::new(format!("the process in the background ended before it served: {status}"))
                .hint(format!("its messages are in {}", log_path.display())))
        }
    }
}

/// Leaves the terminal and the working directory of whoever started this process.
pub(crate) fn detach() -> Result<(), CliError> {
    match rustix::process::setsid() {
        // A process that begins anew leads its session already. Asking for the session first would not do: in a process namespace it may
        // be one that has no number there.
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(error) => return Err(CliError::new(error)),
    }
    std::env::set_current_dir("/").map_err(CliError::new)
}

/// Tells the parent that this process serves.
pub(crate) fn report_ready() {
    report(&Word::Ready);
}

/// Tells the parent why this process does not serve, if it has not been told that it does.
pub(crate) fn report_failure(error: &CliError) {
    report(&Word::Failed(error.clone()));
}

fn report(word: &Word) {
    if !is_child() || REPORTED.swap(true, Ordering::SeqCst) {
        return;
    }
    let said = serde_json::to_string(word).map_err(std::io::Error::other);
    let mut stdout = std::io::stdout().lock();
    let said = said.and_then(|line| writeln!(stdout, "{line}")).and_then(|()| stdout.flush());
    if let Err(error) = said {
        tracing::warn!(%error, "whoever started this process is gone");
    }
}

static REPORTED: AtomicBool = AtomicBool::new(false);
const VARIABLE: &str = "MURPHY_BACKGROUND";
const LOG: &str = "murphy.log";
const WORD_BYTES_MAX: u64 = 64 << 10;
