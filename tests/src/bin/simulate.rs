//! Simulated disasters: `cargo run -p murphy-tests --bin simulate -- --seeds N [--first-seed S] [--keep-going] [--canary NAME] [--stats]`.
//!
//! Each seed is simulated in a process of its own, so that one seed is one exact schedule, and so that one that hangs or aborts is no more
//! than a finding.

use std::{
    collections::BTreeMap,
    io::Write,
    process::{Command, ExitCode, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use murphy_log::{Clock, SystemClock};
use murphy_tests::{Canary, Outcome, simulate};
use parking_lot::Mutex;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match Order::parse(&arguments) {
        Ok(order) => order.run(),
        Err(error) => {
            say(&format!("Error: {error}\n{USAGE}"));
            ExitCode::from(2)
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
struct Order {
    seeds: u64,
    first: u64,
    canary: Option<Canary>,
    jobs: u64,
    /// Simulates the other seeds too when one has failed.
    keep_going: bool,
    /// Prints every line of the only seed.
    print: bool,
    /// Says what the disasters were.
    stats: bool,
    /// Simulates the first seed here, and prints what came of it for the process that asked.
    here: bool,
}

impl Default for Order {
    fn default() -> Order {
        Order {
            seeds: 1,
            first: 0,
            canary: None,
            jobs: 1,
            keep_going: false,
            print: false,
            stats: false,
            here: false,
        }
    }
}

impl Order {
    fn parse(arguments: &[String]) -> Result<Order, String> {
        let mut order = Order::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let mut value = || rest.next().ok_or_else(|| format!("{argument} needs a value"));
            let number = |text: &String| text.parse::<u64>().map_err(|_| format!("{text} is no number"));
            match argument.as_str() {
                "--seeds" => order.seeds = number(value()?)?,
                "--first-seed" => order.first = number(value()?)?,
                "--jobs" => order.jobs = number(value()?)?.max(1),
                "--canary" => order.canary = Some(value()?.parse()?),
                "--keep-going" => order.keep_going = true,
                "--trace" => order.print = true,
                "--stats" => order.stats = true,
                "--here" => order.here = true,
                other => return Err(format!("unknown argument {other}")),
            }
        }
        Ok(order)
    }

    fn run(&self) -> ExitCode {
        if self.here {
            thread::spawn(|| {
                thread::sleep(LONGEST);
                print("violation livelock: the world's time does not pass\n");
                std::process::exit(1);
            });
            let outcome = simulate(self.first, self.canary, self.print);
            print(&report(&outcome));
            return if outcome.violation.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        let clock = SystemClock::new();
        let next = AtomicU64::new(0);
        let sums = Mutex::new(Sums::default());
        thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| self.work(&next, &sums));
            }
        });
        let (sums, took) = (sums.into_inner(), clock.monotonic());
        print(&format!(
            "{} seeds, {} disasters, {} operations, {} fsyncs acknowledged, {} s simulated in {:.1} s\n",
            sums.seeds,
            sums.of(STRUCK).map(|(_, count)| count).sum::<u64>(),
            sums.count("operations"),
            sums.count("acknowledged"),
            sums.count("virtual_ms") / 1000,
            took.as_secs_f64()
        ));
        for (kind, title) in [(STRUCK, "disasters"), (HAPPENED, "what else happened")] {
            if self.stats {
                let lines = sums.of(kind).map(|(what, count)| format!("{count:>12}  {what}\n"));
                print(&format!("{title}:\n{}", lines.collect::<String>()));
            }
        }
        if sums.failed.is_empty() {
            return ExitCode::SUCCESS;
        }
        print(&format!("{} seeds have failed:\n", sums.failed.len()));
        for (seed, why) in &sums.failed {
            print(&format!("{seed:>12}  {why}\n"));
        }
        ExitCode::FAILURE
    }

    /// Takes seeds until there are none, or one has failed and nothing is to be done after that.
    fn work(&self, next: &AtomicU64, sums: &Mutex<Sums>) {
        while self.keep_going || sums.lock().failed.is_empty() {
            let number = next.fetch_add(1, Ordering::SeqCst);
            if number >= self.seeds {
                return;
            }
            let seed = self.first + number;
            match self.simulate_apart(seed) {
                Ok(said) => {
                    let mut sums = sums.lock();
                    sums.add(&said);
                    if sums.seeds.is_multiple_of(PROGRESS_EVERY) {
                        say(&format!("{} seeds, up to {seed}", sums.seeds));
                    }
                }
                Err(what) => {
                    let violation = what.lines().find_map(|line| line.strip_prefix("violation "));
                    let why = violation.unwrap_or("it has ended without a verdict").to_owned();
                    if self.is_aftermath(&why) {
                        say(&format!("seed {seed}, which goes on from the bug: {why}"));
                        continue;
                    }
                    sums.lock().failed.insert(seed, why);
                    print(&format!("{what}\nseed {seed} has failed; again: {}\n", self.again(seed)));
                }
            }
        }
    }

    /// Whether the bug that is looked for leads to this, and shows itself as something else: another seed is to show it.
    fn is_aftermath(&self, violation: &str) -> bool {
        let follows = |canary: Canary| canary.aftermath().iter().any(|start| violation.starts_with(start));
        self.canary.is_some_and(|canary| !violation.starts_with(canary.finding()) && follows(canary))
    }

    /// Simulates a seed in a process of its own.
    fn simulate_apart(&self, seed: u64) -> Result<String, String> {
        let own = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
        let mut command = Command::new(own);
        command.args(["--here", "--first-seed", &seed.to_string()]);
        if let Some(canary) = self.canary {
            command.args(["--canary", canary.name()]);
        }
        if self.print {
            command.arg("--trace");
        }
        let errors = if self.print { Stdio::inherit() } else { Stdio::piped() };
        let ran = command.stdin(Stdio::null()).stderr(errors).output();
        let ran = ran.map_err(|error| format!("cannot start a simulation: {error}"))?;
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        if ran.status.success() {
            return Ok(said);
        }
        Err(format!("{said}{}", String::from_utf8_lossy(&ran.stderr)))
    }

    fn again(&self, seed: u64) -> String {
        let canary = self.canary.map_or_else(String::new, |canary| format!(" --canary {canary}"));
        format!("cargo run -p murphy-tests --bin simulate -- --first-seed {seed} --seeds 1 --trace{canary}")
    }
}

/// What happened in all seeds.
#[derive(Default)]
struct Sums {
    seeds: u64,
    /// The seeds that have failed, and why; they are not counted otherwise.
    failed: BTreeMap<u64, String>,
    /// By the kind of line, and what is counted.
    counts: BTreeMap<(String, String), u64>,
}

impl Sums {
    /// Adds what the simulation of a seed has said: lines of a kind, a number, and what it counts.
    fn add(&mut self, said: &str) {
        self.seeds += 1;
        for line in said.lines() {
            let mut words = line.splitn(3, ' ');
            if let (Some(kind @ (COUNT | STRUCK | HAPPENED)), Some(count), Some(what)) =
                (words.next(), words.next(), words.next())
                && let Ok(count) = count.parse::<u64>()
            {
                *self.counts.entry((kind.to_owned(), what.to_owned())).or_default() += count;
            }
        }
    }

    fn of(&self, kind: &str) -> impl Iterator<Item = (&str, u64)> {
        let of_kind = self.counts.iter().filter(move |((found, _), _)| found == kind);
        of_kind.map(|((_, what), count)| (what.as_str(), *count))
    }

    fn count(&self, what: &str) -> u64 {
        self.of(COUNT).find(|(found, _)| *found == what).map_or(0, |(_, count)| count)
    }
}

fn report(outcome: &Outcome) -> String {
    let mut text = String::new();
    if let Some(violation) = &outcome.violation {
        for line in &outcome.tail {
            text.push_str(line);
            text.push('\n');
        }
        text.push_str(&format!("violation {violation}\n"));
    }
    let Outcome { operations, acknowledged, virtual_ms, .. } = outcome;
    for (what, count) in
        [("operations", operations), ("acknowledged", acknowledged), ("virtual_ms", virtual_ms)]
    {
        text.push_str(&format!("{COUNT} {count} {what}\n"));
    }
    for (kind, tally) in [(STRUCK, &outcome.disasters), (HAPPENED, &outcome.events)] {
        for (what, count) in tally {
            text.push_str(&format!("{kind} {count} {what}\n"));
        }
    }
    text.push_str(&format!("trace {}\n", outcome.trace));
    text
}

/// To standard output; a reader that has gone away does not matter.
fn print(text: &str) {
    let _gone = std::io::stdout().write_all(text.as_bytes());
}

fn say(text: &str) {
    let _gone = writeln!(std::io::stderr(), "{text}");
}

const USAGE: &str = "usage: simulate [--seeds N] [--first-seed S] [--jobs N] [--keep-going] [--canary NAME] [--stats] [--trace]";
/// How lines begin that a simulation counts in.
const COUNT: &str = "count";
const STRUCK: &str = "struck";
const HAPPENED: &str = "happened";
/// A seed takes a fraction of a second; one that takes so long never ends.
const LONGEST: Duration = Duration::from_secs(120);
/// Progress is told after so many seeds.
const PROGRESS_EVERY: u64 = 500;
