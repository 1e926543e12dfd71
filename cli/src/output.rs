//! Where text goes: data to stdout, everything else to stderr.
//!
//! Invariants:
//! - With `--json` stdout has JSON only: one document, or one line per item.
//! - A reader that has gone away (`murphy ... | head`) ends the output quietly; it is no error. What a command does, and how it ends, does not
//!   depend on a reader; one that does nothing but tell ends with it.

use std::{
    io::{IsTerminal, Write},
    os::fd::AsFd,
};

use serde::Serialize;
use serde_json::Value;
use tokio::io::{Interest, unix::AsyncFd};

use crate::error::CliError;

/// Whether anybody reads what is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reader {
    /// As far as can be seen.
    There,
    /// The other end of the pipe is closed.
    Gone,
}

/// Returns when whoever reads stdout has gone, also while nothing is printed; never where stdout is a file.
pub(crate) async fn reader_is_gone() {
    let Ok(stdout) = std::io::stdout().as_fd().try_clone_to_owned() else {
        return std::future::pending().await;
    };
    // SAFETY: the descriptor is a valid one of its own, which the registration owns until it is dropped.
    let Ok(stdout) = (unsafe { AsyncFd::register_with_interest(stdout, Interest::WRITABLE) }) else {
        return std::future::pending().await;
    };
    loop {
        match stdout.ready(Interest::WRITABLE).await {
            Ok(ready) if ready.ready().is_write_closed() => return,
            Ok(mut ready) => ready.clear_ready(),
            // It is seen when something is printed.
            Err(_) => return std::future::pending().await,
        }
    }
}

/// The output of one command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Output {
        Output { json }
    }

    /// Whether data is printed as JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints data: `text` for people, `value` for programs.
    pub(crate) fn data<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        let printed = if self.json {
            serde_json::to_string(value).map_err(CliError::new)?
        } else {
            text(value).trim_end_matches('\n').to_owned()
        };
        if printed.is_empty() { Ok(()) } else { self.line(&printed) }
    }

    /// Prints a line of data as it is.
    pub(crate) fn line(&self, line: &str) -> Result<(), CliError> {
        self.line_for(line).map(|_| ())
    }

    /// The same for a command that goes on until nobody reads any more.
    pub(crate) fn line_for(&self, line: &str) -> Result<Reader, CliError> {
        let mut stdout = std::io::stdout().lock();
        match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
            Ok(()) => Ok(Reader::There),
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
            Err(error) => Err(CliError::new(format!("cannot write to stdout: {error}"))),
        }
    }

    /// Tells people something, on stderr.
    pub(crate) fn note(&self, line: &str) {
        // Without a stderr there is nobody to tell.
        let _untold = writeln!(std::io::stderr().lock(), "{line}");
    }

    /// Says on stderr why nothing more will happen.
    pub(crate) fn error(&self, error: &CliError) {
        if self.json {
            self.note(&serde_json::json!({ "error": error }).to_string());
            return;
        }
        self.note(&format!("Error: {}", error.message));
        if let Some(hint) = &error.hint {
            self.note(&format!("Hint: {hint}"));
        }
    }

    /// Asks for the name of the volume that an irreversible step is about. Scripts give it with `--confirm`.
    pub(crate) fn confirm(&self, given: Option<&str>, name: &str, effect: &str) -> Result<(), CliError> {
        let answer = match given {
            Some(given) => given.to_owned(),
            None if std::io::stdin().is_terminal() => {
                self.note(&format!("{effect}. Type the name of the volume to go on:"));
                let mut line = String::new();
                std::io::stdin().read_line(&mut line).map_err(CliError::new)?;
                line.trim().to_owned()
            }
            None => {
                return Err(CliError::usage(format!("{effect}: that has to be confirmed")).hint(format!(
                    "give --confirm {name} if that is what you want, or --dry-run to see the plan"
                )));
            }
        };
        if answer == name {
            return Ok(());
        }
        Err(CliError::usage(format!("the volume is called {name:?}, not {answer:?}"))
            .hint("nothing was changed"))
    }

    /// Shows a plan, and asks for the name in it if it gives something up; says whether it did, and people agreed.
    pub(crate) fn agree(&self, plan: &Value, given: Option<&str>, effect: &str) -> Result<bool, CliError> {
        let text = |field: &str| plan[field].as_str().unwrap_or_default().to_owned();
        if !self.json {
            self.note(&text("text"));
        }
        if plan["gives_up"] != true {
            return Ok(false);
        }
        self.confirm(given, &text("name"), effect).map(|()| true)
    }

    /// Whether a person looks at stderr.
    pub(crate) fn is_watched(&self) -> bool {
        !self.json && std::io::stderr().is_terminal()
    }
}
