//! The writer: a thread that changes a volume until the volume dies under it, and keeps the ledger.
//!
//! Invariants:
//! - It waits for every fsync, and writes a line only after that.
//! - It ends when something fails, and in no other way. What it was about then has no line.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use super::{
    ledger::{LEDGER, Ledger, now},
    nodes::{Node, clock, wait_for},
    place::lock,
    script::{Script, Step},
};
use crate::error::{CliError, failed};

/// A writer at work.
pub(super) struct Writer {
    shared: Arc<Mutex<Shared>>,
    prepared: usize,
}

struct Shared {
    ledger: Option<Ledger>,
    lines: usize,
    /// Why it has ended.
    ended: Option<CliError>,
}

/// A writer whose volume has died.
pub(super) struct Stopped {
    pub(super) ledger: Ledger,
    /// How it noticed.
    pub(super) noticed: CliError,
}

impl Writer {
    /// Sets it to work in the volume of `node`.
    pub(super) fn start(node: &Node, ledger: Ledger, script: Script) -> Result<Writer, CliError> {
        let prepared = script.operations_until_after_the_deletion();
        let shared = Shared { ledger: None, lines: 0, ended: None };
        let shared = Arc::new(Mutex::new(shared));
        let (node, theirs) = (node.clone(), Arc::clone(&shared));
        let work = move || {
            let mut ledger = ledger;
            let ended = write(&node, &mut ledger, script, &theirs);
            let mut shared = lock(&theirs);
            shared.ended = Some(ended);
            shared.ledger = Some(ledger);
        };
        thread::Builder::new().name("writer".into()).spawn(work).map_err(failed)?;
        Ok(Writer { shared, prepared })
    }

    /// How many lines it has written.
    pub(super) fn lines(&self) -> usize {
        lock(&self.shared).lines
    }

    /// Waits until it has written so many lines.
    pub(super) fn wait_for_lines(&self, lines: usize) -> Result<(), CliError> {
        wait_for("the writer", LINES_MAX, || {
            self.check()?;
            Ok(self.lines() >= lines)
        })
    }

    /// Waits until it has done everything up to the mass deletion, and a little more.
    pub(super) fn wait_until_after_the_deletion(&self) -> Result<(), CliError> {
        self.wait_for_lines(self.prepared + LINES_AFTER)
    }

    /// Waits until it waits for something that does not come.
    pub(super) fn wait_until_it_waits(&self) -> Result<(), CliError> {
        let (mut lines, mut since) = (self.lines(), clock());
        wait_for("the writer to wait", LINES_MAX, || {
            self.check()?;
            if self.lines() != lines {
                (lines, since) = (self.lines(), clock());
            }
            Ok(since.elapsed() >= STANDSTILL)
        })
    }

    /// Refuses if it has ended by itself.
    pub(super) fn check(&self) -> Result<(), CliError> {
        match &lock(&self.shared).ended {
            None => Ok(()),
            Some(error) => {
                Err(CliError::new(format!("the writer ended before anything happened to it: {error}")))
            }
        }
    }

    /// Waits until it has noticed that its volume is dead.
    pub(super) fn wait_for_the_end(self) -> Result<Stopped, CliError> {
        let mut stopped = None;
        wait_for("the writer to notice", NOTICE_MAX, || {
            let mut shared = lock(&self.shared);
            if let Some(ledger) = shared.ledger.take() {
                let noticed = shared.ended.take().unwrap_or_else(|| CliError::new("it ended"));
                stopped = Some(Stopped { ledger, noticed });
            }
            Ok(stopped.is_some())
        })?;
        stopped.ok_or_else(|| CliError::new("the writer has left no ledger"))
    }
}

/// Goes on until something fails.
fn write(node: &Node, ledger: &mut Ledger, script: Script, shared: &Mutex<Shared>) -> CliError {
    for step in script {
        let operation = match step {
            Step::Do(operation) => operation,
            Step::Note(milestone) => {
                ledger.note(milestone, now());
                continue;
            }
        };
        ledger.begin(operation.clone(), now());
        let acknowledged = node.apply(&operation, Path::new(LEDGER)).map(|()| now());
        let line = acknowledged.and_then(|acknowledged| {
            let durable_lsn = node.durable_lsn()?;
            ledger.acknowledge(durable_lsn, acknowledged)
        });
        match line {
            Ok(()) => lock(shared).lines += 1,
            Err(error) => return error,
        }
    }
    CliError::new("there is nothing more to write")
}

/// Lines after the mass deletion, so that a disaster never comes into it.
const LINES_AFTER: usize = 10;
/// As long as that no fsync takes that is answered.
const STANDSTILL: Duration = Duration::from_millis(700);
/// How long a writer may take for everything that is waited for.
const LINES_MAX: Duration = Duration::from_secs(120);
/// The kernel answers for a file system whose process is gone.
const NOTICE_MAX: Duration = Duration::from_secs(60);
