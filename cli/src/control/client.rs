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
}

impl Control {
    /// Connects to the process that serves the node in `directory`; `None` if there is none.
    pub(crate) fn connect(directory: &Path) -> Result<Option<Control>, CliError> {
        match at_socket(directory, |socket| UnixStream::connect(socket)) {
            Ok(stream) => {
                Ok(Some(Control { directory: directory.to_owned(), stream: BufReader::new(stream) }))
            }
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
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|error| self.broken(&error))?;
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
            Ok(_) => serde_json::from_str(&line).map_err(|error| self.broken(&io::Error::other(error))),
        }
    }

    fn broken(&self, error: &io::Error) -> CliError {
        CliError::new(format!("the process that serves node {}: {error}", self.directory.display()))
            .hint("its own messages are on its stderr, or in murphy.log in that directory")
    }
}
