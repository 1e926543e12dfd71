//! Asking whoever serves a node and goes on doing so.
//!
//! Invariants:
//! - What a process that is about to end would take with it is never asked of it: its end is waited for, within a limit, and said.

use std::{path::Path, time::Duration};

use serde_json::Value;

use super::{Control, Request, interrupted::Asked};
use crate::{error::CliError, output::Output};

/// Connects to the process that serves the node in `directory` and takes orders; `None` if there is none. Waits for one that is just beginning
/// or about to end.
pub(crate) fn connect_lasting(directory: &Path, output: &Output) -> Result<Option<Control>, CliError> {
    Waiting::new(directory, output).connect()
}

/// Asks the process that serves the node in `directory` and goes on doing so; `None` if there is none.
pub(crate) fn ask_lasting(
    directory: &Path,
    request: &Request,
    output: &Output,
    item: &mut dyn FnMut(Value) -> Result<(), CliError>,
) -> Result<Option<Value>, CliError> {
    let mut waiting = Waiting::new(directory, output);
    loop {
        let Some(mut control) = waiting.connect()? else { return Ok(None) };
        let _asked = (!request.only_looks()).then(Asked::begin);
        match control.ask(request, output, &mut *item) {
            // It has come to its end between its greeting and the request.
            Err(error) if error.is_passing() => waiting.pause()?,
            answer => return answer.map(Some),
        }
    }
}

/// How long it has been waited for.
struct Waiting<'a> {
    directory: &'a Path,
    output: &'a Output,
    steps: u32,
}

impl Waiting<'_> {
    fn new<'a>(directory: &'a Path, output: &'a Output) -> Waiting<'a> {
        Waiting { directory, output, steps: 0 }
    }

    fn connect(&mut self) -> Result<Option<Control>, CliError> {
        loop {
            match Control::connect(self.directory)? {
                Some(control) if control.is_passing() => self.pause()?,
                found => return Ok(found),
            }
        }
    }

    fn pause(&mut self) -> Result<(), CliError> {
        let node = self.directory.display();
        if self.steps == PATIENCE_STEPS {
            let text = format!(
                "the process that serves node {node} is about to end, and has not ended for two minutes"
            );
            return Err(CliError::new(text).hint(
                "its own messages are on its stderr, or in murphy.log in that directory; murphy status shows its number",
            ));
        }
        if self.steps == SAID_STEPS {
            self.output.note(&format!("Waiting for the end of the process that served node {node}"));
        }
        self.steps += 1;
        std::thread::sleep(PAUSE);
        Ok(())
    }
}

/// Two minutes: as long as making everything durable may take, and more.
const PATIENCE_STEPS: u32 = 2400;
/// Half a second.
const SAID_STEPS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(50);
