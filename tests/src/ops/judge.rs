//! Searches for a program by which a candidate can be told from the reference, and shrinks it.
//!
//! Invariants:
//! - The seed decides everything; it is told with every counterexample, and `MURPHY_SEED` and `MURPHY_CASES` set seed and number
//!   of programs.

use std::{env, fmt, str::FromStr, sync::Arc};

use murphy_fs::FileSystem;
use murphy_log::{Clock, LogTime, ManualClock};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::{Contest, Program, RunRules, strategy};
use crate::{Driver, Reference, TreeImage, TreeRules};

/// How to search.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Search {
    /// Programs to try.
    pub cases: u32,
    /// Operations in the longest program.
    pub steps_max: usize,
    /// What the programs are drawn from.
    pub seed: u64,
    /// Runs that may be spent on making a counterexample smaller.
    pub shrinks_max: u32,
}

impl Search {
    /// A search over so many programs, unless the environment says otherwise.
    pub fn of(cases: u32) -> Search {
        Search {
            cases: from_environment("MURPHY_CASES").unwrap_or(cases),
            steps_max: STEPS_MAX,
            seed: from_environment("MURPHY_SEED").unwrap_or(SEED),
            shrinks_max: SHRINKS_MAX,
        }
    }
}

/// A program that tells a candidate from the reference.
#[derive(Clone, Debug)]
pub struct Counterexample {
    /// The search that found it.
    pub search: Search,
    /// The program, as small as the search could make it.
    pub program: Program,
    /// What happens at which step.
    pub what: String,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Search { seed, cases, .. } = self.search;
        writeln!(f, "the candidate is not the reference (MURPHY_SEED={seed} MURPHY_CASES={cases})")?;
        for (number, step) in self.program.steps.iter().enumerate() {
            writeln!(f, "  {number:3} {:?}: {:?}", step.who, step.operation)?;
        }
        write!(f, "{}", self.what)
    }
}

impl std::error::Error for Counterexample {}

/// Runs random programs against a new reference and a new candidate each, under one clock that moves only between operations.
/// `make` is called within a tokio runtime.
///
/// # Errors
/// The smallest counterexample found.
pub fn search(
    search: Search,
    make: impl Fn(Arc<dyn Clock>) -> Arc<dyn FileSystem>,
) -> Result<(), Box<Counterexample>> {
    search_inside(search, |clock| (make(clock), || Ok(())))
}

/// As [`search`]; `make` gives with each candidate what looks into it after the program, and says what is wrong there.
///
/// # Errors
/// The smallest counterexample found.
pub fn search_inside<C: FnOnce() -> Result<(), String>>(
    search: Search,
    make: impl Fn(Arc<dyn Clock>) -> (Arc<dyn FileSystem>, C),
) -> Result<(), Box<Counterexample>> {
    search_subjects(search, |clock, _| {
        let (candidate, look) = make(clock);
        Looked { candidate, look: Some(look) }
    })
}

/// What else must agree with the reference, besides the file system that runs the program: its mirror, a copy of it, a restore.
pub trait Subject {
    /// What runs the program.
    fn file_system(&self) -> Arc<dyn FileSystem>;

    /// Called after the step `step`, when both sides have agreed on it. Says what is wrong.
    fn after_step(&mut self, step: usize, judge: &Judge<'_>) -> Result<(), String>;

    /// Called after the program, when everything has been closed. Says what is wrong.
    fn after_program(&mut self, judge: &Judge<'_>) -> Result<(), String>;
}

/// What a subject judges itself by.
pub struct Judge<'a> {
    /// Waits for answers.
    pub driver: &'a Driver,
    /// The reference, at the same point of the program.
    pub reference: &'a dyn FileSystem,
}

impl Judge<'_> {
    /// The tree as it must be.
    ///
    /// # Errors
    /// If the reference contradicts itself.
    pub fn expected(&self) -> Result<TreeImage, String> {
        TreeImage::of(self.driver, self.reference).map_err(|error| format!("the reference: {error}"))
    }

    /// Compares `found`, which people know as `who`, with `expected`.
    ///
    /// # Errors
    /// Everything that is not the same.
    pub fn compare(&self, who: &str, expected: &TreeImage, found: &dyn FileSystem) -> Result<(), String> {
        let found = TreeImage::of(self.driver, found).map_err(|error| format!("{who}: {error}"))?;
        let told: Vec<String> =
            expected.differences(&found, TreeRules::SAME_HISTORY).iter().map(ToString::to_string).collect();
        if told.is_empty() { Ok(()) } else { Err(format!("{who}: {}", told.join("; "))) }
    }
}

/// A candidate that is looked into once, at the end.
struct Looked<C> {
    candidate: Arc<dyn FileSystem>,
    look: Option<C>,
}

impl<C: FnOnce() -> Result<(), String>> Subject for Looked<C> {
    fn file_system(&self) -> Arc<dyn FileSystem> {
        Arc::clone(&self.candidate)
    }

    fn after_step(&mut self, _: usize, _: &Judge<'_>) -> Result<(), String> {
        Ok(())
    }

    fn after_program(&mut self, _: &Judge<'_>) -> Result<(), String> {
        self.look.take().map_or(Ok(()), |look| look())
    }
}

/// As [`search`], for subjects that are more than one file system. `make` is called within a tokio runtime, that of the driver.
///
/// # Errors
/// The smallest counterexample found.
pub fn search_subjects<S: Subject>(
    search: Search,
    make: impl Fn(Arc<dyn Clock>, &Driver) -> S,
) -> Result<(), Box<Counterexample>> {
    let config = Config {
        cases: search.cases,
        failure_persistence: None,
        max_shrink_iters: search.shrinks_max,
        ..Config::default()
    };
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&search.seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    let driver = Driver::new();
    let run = |program: &Program| {
        let _runtime = driver.enter();
        let clock = Arc::new(ManualClock::new(LogTime::from_nanos(START_NANOS)));
        let reference = Reference::new(clock.clone());
        let mut subject = make(clock.clone(), &driver);
        let candidate = subject.file_system();
        let judge = Judge { driver: &driver, reference: &reference };
        let mut contest =
            Contest::new(&driver, &reference, &*candidate, Some(&clock), RunRules { times: true });
        let outcome = contest.run_watched(program, &mut |step| subject.after_step(step, &judge));
        outcome.map_err(|mismatch| mismatch.to_string())?;
        subject.after_program(&judge)
    };
    let result =
        runner.run(&strategy(search.steps_max), |program| run(&program).map_err(TestCaseError::fail));
    match result {
        Ok(()) => Ok(()),
        Err(TestError::Fail(reason, program)) => {
            Err(Box::new(Counterexample { search, program, what: reason.message().to_owned() }))
        }
        Err(TestError::Abort(reason)) => {
            let what = format!("the search itself failed: {reason}");
            Err(Box::new(Counterexample { search, program: Program::default(), what }))
        }
    }
}

/// As [`search`], for a test: the default search over so many programs.
///
/// # Panics
/// With the smallest counterexample found.
pub fn judge(make: impl Fn(Arc<dyn Clock>) -> Arc<dyn FileSystem>, cases: u32) {
    if let Err(counterexample) = search(Search::of(cases), make) {
        panic!("{counterexample}");
    }
}

/// As [`search_inside`], for a test.
///
/// # Panics
/// With the smallest counterexample found.
pub fn judge_inside<C: FnOnce() -> Result<(), String>>(
    make: impl Fn(Arc<dyn Clock>) -> (Arc<dyn FileSystem>, C),
    cases: u32,
) {
    if let Err(counterexample) = search_inside(Search::of(cases), make) {
        panic!("{counterexample}");
    }
}

/// As [`search_subjects`], for a test.
///
/// # Panics
/// With the smallest counterexample found.
pub fn judge_subjects<S: Subject>(make: impl Fn(Arc<dyn Clock>, &Driver) -> S, cases: u32) {
    if let Err(counterexample) = search_subjects(Search::of(cases), make) {
        panic!("{counterexample}");
    }
}

fn from_environment<T: FromStr>(name: &str) -> Option<T> {
    let text = env::var(name).ok()?;
    match text.parse() {
        Ok(value) => Some(value),
        Err(_) => panic!("{name} is {text:?}, which is not a number"),
    }
}

/// The seed of a search that is given none.
const SEED: u64 = 1;
/// Operations in the longest program.
const STEPS_MAX: usize = 250;
/// Runs spent on making a counterexample smaller.
const SHRINKS_MAX: u32 = 3000;
/// When programs begin: 2023-11-14T22:13:20Z.
const START_NANOS: u64 = 1_700_000_000_000_000_000;
