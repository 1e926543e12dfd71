//! What happened, line by line: the same seed gives the same lines, and their hash says so.
//!
//! Invariants:
//! - Every line is part of the hash; the last ones are kept for people.

use std::{collections::VecDeque, time::Duration};

/// The lines of one run.
#[derive(Debug)]
pub(super) struct Trace {
    hasher: blake3::Hasher,
    tail: VecDeque<String>,
    print: bool,
}

impl Trace {
    /// Without a line; with `print` each is written to standard error as well.
    pub(super) fn new(print: bool) -> Trace {
        Trace { hasher: blake3::Hasher::new(), tail: VecDeque::new(), print }
    }

    /// Adds a line of the moment `now`.
    pub(super) fn note(&mut self, now: Duration, what: &str) {
        let line = format!("{:>10.3}  {what}", now.as_secs_f64());
        self.hasher.update(line.as_bytes());
        self.hasher.update(b"\n");
        if self.print {
            eprintln!("{line}");
        }
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
    }

    /// The hash of every line so far.
    pub(super) fn hash(&self) -> String {
        self.hasher.finalize().to_hex()[..HASH_CHARS].to_owned()
    }

    /// The last lines.
    pub(super) fn tail(&self) -> Vec<String> {
        self.tail.iter().cloned().collect()
    }
}

/// So many lines are kept.
const TAIL_LINES: usize = 120;
const HASH_CHARS: usize = 32;
