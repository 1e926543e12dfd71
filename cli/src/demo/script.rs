//! What the writer does: everyday work, a mass deletion in its midst, and work without end.
//!
//! Invariants:
//! - One seed is one list, on every machine.
//! - Operations fit each other: what is changed, moved or removed is there.

use std::{
    collections::{BTreeSet, VecDeque},
    path::PathBuf,
};

use serde::Serialize;

use super::operations::{Operation, Random, directory};

/// A step of the writer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Something to do.
    Do(Operation),
    /// The time is to be noted.
    Note(Milestone),
}

/// A moment that is to be had back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Milestone {
    /// The middle of the work.
    MiddleOfTheBurst,
    /// Just before most of what is there is removed.
    BeforeTheDeletion,
}

/// The steps, without an end.
pub(super) struct Script {
    random: Random,
    live: BTreeSet<PathBuf>,
    made: u64,
    /// What was drawn already.
    drawn: VecDeque<Step>,
}

impl Script {
    pub(super) fn new(seed: u64) -> Script {
        let mut script =
            Script { random: Random::new(seed), live: BTreeSet::new(), made: 0, drawn: VecDeque::new() };
        script.draw_work(HALF);
        script.drawn.push_back(Step::Note(Milestone::MiddleOfTheBurst));
        script.draw_work(HALF);
        script.drawn.push_back(Step::Note(Milestone::BeforeTheDeletion));
        script.draw_mass_deletion();
        script
    }

    /// After how many operations everything has happened that is drawn beforehand.
    pub(super) fn operations_until_after_the_deletion(&self) -> usize {
        self.drawn.iter().filter(|step| matches!(step, Step::Do(_))).count()
    }

    fn draw_work(&mut self, count: usize) {
        for _ in 0..count {
            let operation = self.work();
            self.drawn.push_back(Step::Do(operation));
        }
    }

    /// Three of four files go.
    fn draw_mass_deletion(&mut self) {
        let doomed: Vec<PathBuf> = self.live.iter().filter(|_| self.random.below(4) > 0).cloned().collect();
        for path in doomed {
            self.live.remove(&path);
            self.drawn.push_back(Step::Do(Operation::Remove { path }));
        }
    }

    /// Everyday work: new files, edits, renames, a few deletions.
    fn work(&mut self) -> Operation {
        self.made += 1;
        let seed = self.random.next();
        let length = 1 + self.random.below(if self.made.is_multiple_of(LONG_EACH) { LONG } else { SHORT });
        let victim = self.random.below(self.live.len().max(1));
        let path = self.live.iter().nth(victim).cloned();
        match (self.random.below(10), path) {
            (4 | 5, Some(path)) => Operation::Write { path, seed, length },
            (6 | 7, Some(path)) => Operation::Append { path, seed, length },
            (8, Some(from)) => {
                let to = self.fresh();
                self.live.remove(&from);
                self.live.insert(to.clone());
                Operation::Rename { from, to }
            }
            (9, Some(path)) => {
                self.live.remove(&path);
                Operation::Remove { path }
            }
            _ => {
                let path = self.fresh();
                self.live.insert(path.clone());
                Operation::Write { path, seed, length }
            }
        }
    }

    fn fresh(&self) -> PathBuf {
        directory(self.made).join(format!("file-{:05}", self.made))
    }
}

impl Iterator for Script {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        Some(self.drawn.pop_front().unwrap_or_else(|| Step::Do(self.work())))
    }
}

/// Operations before and after the middle of the burst.
const HALF: usize = 100;
/// One of so many files is a long one.
const LONG_EACH: u64 = 37;
const LONG: usize = 3 << 20;
const SHORT: usize = 24 << 10;
