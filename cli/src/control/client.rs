//! The asking side.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{LINE_BYTES_MAX, Line, Request, at_socket};
use crate::{
    error::CliError,
    output::Output,
    progress::{Progress, ProgressLine},
};

/// A connection to the process that serves a node.
pub(crate) struct Control {
    directory: PathBuf,
    stream: BufReader<UnixStream>,
    /// Whether it has said anything.
    answered: bool,
    /// Whether the connection has ended unasked.
    lost: bool,
}

impl Control {
    /// Connects to the process that serves the node in `directory`; `None` if there is none.
    pub(crate) fn connect(directory: &Path) -> Result<Option<Control>, CliError> {
        match at_socket(directory, |socket| UnixStream::connect(socket)) {
            Ok(stream) => Ok(Some(Control {
                directory: directory.to_owned(),
                stream: BufReader::new(stream),
                answered: false,
                lost: false,
            })),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(None)
            }
            Err(error) => {
                Err(CliError::new(format!("cannot ask the process of node {}: {error}", directory.display())))
            }
        }
    }

    /// Asks, shows progress, hands out items, and returns the answer.
    pub(crate) fn ask(
        &mut self,
        request: &Request,
        output: &Output,
        mut item: impl FnMut(Value) -> Result<(), CliError>,
    ) -> Result<Value, CliError> {
        let mut line = serde_json::to_string(request).map_err(CliError::new)?;
        line.push('\n');
        if let Err(error) = self.stream.get_mut().write_all(line.as_bytes()) {
            return Err(self.broken(&error));
        }
        let shown = ProgressLine::new(output);
        loop {
            match self.next_line()? {
                Line::Progress(Progress { what, done, total }) => {
                    shown.show(&Progress { what, done, total });
                }
                Line::Item(value) => item(value)?,
                Line::Done(value) => return Ok(value),
                Line::Failed(error) => return Err(error),
            }
        }
    }

    fn next_line(&mut self) -> Result<Line, CliError> {
        let mut line = String::new();
        let read = self.stream.by_ref().take(LINE_BYTES_MAX).read_line(&mut line);
        match read {
            Err(error) => Err(self.broken(&error)),
            Ok(0) => Err(self.broken(&io::Error::other("it ended before it answered"))),
            Ok(_) => {
                self.answered = true;
                serde_json::from_str(&line).map_err(|error| self.broken(&io::Error::other(error)))
            }
        }
    }

    /// Whether the process was gone before it said anything: a socket still takes connections while the kernel clears a killed process away.
    pub(crate) fn was_abandoned(&self) -> bool {
        self.lost && !self.answered
    }

    fn broken(&mut self, error: &io::Error) -> CliError {
        self.lost = true;
        CliError::new(format!("the process that serves node {}: {error}", self.directory.display()))
            .hint("its own messages are on its stderr, or in murphy.log in that directory")
    }
}
