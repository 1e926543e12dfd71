//! Progress: a bar on a terminal, silence in a pipe.
//!
//! Invariants:
//! - It goes to stderr, and only if a person looks at it.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::output::Output;

/// How far something long has come.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// What is being done.
    pub(crate) what: String,
    /// How much is done, in whatever it is counted in.
    pub(crate) done: u64,
    /// How much there is; 0 if that is not known.
    pub(crate) total: u64,
}

impl Progress {
    pub(crate) fn new(what: impl Into<String>, done: u64, total: u64) -> Progress {
        Progress { what: what.into(), done, total }
    }
}

/// Shows progress until it is dropped.
pub(crate) struct ProgressLine {
    bar: ProgressBar,
}

impl ProgressLine {
    pub(crate) fn new(output: &Output) -> ProgressLine {
        let target =
            if output.is_watched() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(ProgressStyle::default_spinner());
        bar.enable_steady_tick(TICK);
        ProgressLine { bar }
    }

    pub(crate) fn show(&self, progress: &Progress) {
        let amount = match (progress.done, progress.total) {
            (0, 0) => String::new(),
            (done, 0) => format!(" {done}"),
            (done, total) => format!(" {done} of {total}"),
        };
        self.bar.set_message(format!("{}{amount}", progress.what));
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

const TICK: Duration = Duration::from_millis(120);
