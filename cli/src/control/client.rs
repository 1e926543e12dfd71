//! The asking side of the control socket.
//!
//! Invariants:
//! - Whoever does not answer is given up after a while before a request is sent, and waited for after: what it does may take long.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use super::{BYTES_MAX, Greeting, LINE_BYTES_MAX, Line, Request, VERSION, at_socket};
use crate::{
    error::CliError,
    output::Output,
    progress::{Progress, ProgressLine},
};

/// A connection to the process that serves a node.
pub(crate) struct Control {
    directory: PathBuf,
    stream: BufReader<UnixStream>,
    is_passing: bool,
}

impl Control {
    /// Connects to the process that serves the node in `directory`; `None` if there is none.
    pub(crate) fn connect(directory: &Path) -> Result<Option<Control>, CliError> {
        for _ in 0..CONNECT_ATTEMPTS {
            let stream = match at_socket(directory, |socket| UnixStream::connect(socket)) {
                Ok(stream) => stream,
                Err(error) if is_nobody(&error) => return Ok(None),
                Err(error) => return Err(unreachable(directory, &error)),
            };
            let stream = BufReader::new(stream);
            let mut control = Control { directory: directory.to_owned(), stream, is_passing: false };
            match control.greeted() {
                Ok(Greeting { murphy: VERSION, passing }) => {
                    control.is_passing = passing;
                    return Ok(Some(control));
                }
                Ok(Greeting { murphy, .. }) => {
                    let text = format!("it speaks version {murphy} of its protocol, this program {VERSION}");
                    return Err(unreachable(directory, &io::Error::other(text)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(unreachable(directory, &io::Error::other("it does not answer")));
                }
                // It is just ending: the socket goes with it.
                Err(_) => std::thread::sleep(CONNECT_PAUSE),
            }
        }
        Err(unreachable(directory, &io::Error::other("it hangs up")))
    }

    /// Whether it said that it is just beginning, or about to end.
    pub(crate) fn is_passing(&self) -> bool {
        self.is_passing
    }

    fn greeted(&mut self) -> io::Result<Greeting> {
        self.stream.get_ref().set_read_timeout(Some(GREETING_MAX))?;
        let mut line = String::new();
        self.stream.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)?;
        self.stream.get_ref().set_read_timeout(None)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Asks, shows progress, hands out items, and returns the answer.
    pub(crate) fn ask(
        &mut self,
        request: &Request,
        output: &Output,
        mut item: impl FnMut(Value) -> Result<(), CliError>,
    ) -> Result<Value, CliError> {
        self.ask_for(request, output, &mut item, &mut |_| {
            Err(CliError::new("the node sends bytes that nobody wants"))
        })
    }

    /// The same for an answer that is bytes.
    pub(crate) fn ask_for_bytes(
        &mut self,
        request: &Request,
        output: &Output,
        bytes: &mut dyn FnMut(&[u8]) -> Result<(), CliError>,
    ) -> Result<Value, CliError> {
        self.ask_for(request, output, &mut |_| Ok(()), bytes)
    }

    fn ask_for(
        &mut self,
        request: &Request,
        output: &Output,
        item: &mut dyn FnMut(Value) -> Result<(), CliError>,
        bytes: &mut dyn FnMut(&[u8]) -> Result<(), CliError>,
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
                Line::Bytes(count) => bytes(&self.next_bytes(count)?)?,
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
            Ok(0) => Err(self.broken(&io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => serde_json::from_str(&line).map_err(|error| self.broken(&io::Error::other(error))),
        }
    }

    fn next_bytes(&mut self, count: u64) -> Result<Vec<u8>, CliError> {
        let count = usize::try_from(count).ok().filter(|count| *count <= BYTES_MAX);
        let too_many = || self.broken(&io::Error::other("it sends more bytes than it may"));
        let mut bytes = vec![0; count.ok_or_else(too_many)?];
        match self.stream.read_exact(&mut bytes) {
            Ok(()) => Ok(bytes),
            Err(error) => Err(self.broken(&error)),
        }
    }

    fn broken(&self, error: &io::Error) -> CliError {
        let node = self.directory.display();
        if has_ended(error) && matches!(Control::connect(&self.directory), Ok(Some(_))) {
            return CliError::new(format!("the process that serves node {node} has hung up on this command"))
                .hint("it waits only so long for a command that takes no answer; its own messages are on its stderr, or in murphy.log in that directory");
        }
        if has_ended(error) {
            return CliError::new(format!("node {node} is not running: its process ended before it answered"))
                .hint("what it acknowledged is in its log; its last messages are on its stderr, or in murphy.log in that directory");
        }
        CliError::new(format!("the process that serves node {}: {error}", self.directory.display()))
            .hint("its own messages are on its stderr, or in murphy.log in that directory")
    }
}

/// The other end is gone: how that shows depends on what this one was doing.
fn has_ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
    )
}

/// Nobody listens there.
fn is_nobody(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory
    )
}

fn unreachable(directory: &Path, error: &io::Error) -> CliError {
    CliError::new(format!("cannot ask the process of node {}: {error}", directory.display()))
}

/// Five seconds in all.
const CONNECT_ATTEMPTS: u32 = 100;
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
const GREETING_MAX: Duration = Duration::from_secs(10);
