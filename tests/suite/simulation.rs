//! Some hundreds of simulated worlds, and the proof that the judge of them can find what it looks for.
//!
//! Each seed runs in a process of its own, by the program that people run: `simulate`.

use std::{
    process::{Command, Output},
    time::Duration,
};

use murphy_tests::{Canary, RUN_MAX, number_from_env, output_within};

fn simulate(arguments: &[&str]) -> (Output, String) {
    simulate_within(arguments, RUN_MAX)
}

fn simulate_within(arguments: &[&str], limit: Duration) -> (Output, String) {
    let output = output_within(Command::new(env!("CARGO_BIN_EXE_simulate")).args(arguments), limit);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output, said)
}

/// The fear: an interleaving of crashes, lying stores and late answers that loses what was acknowledged. `MURPHY_SEED` and
/// `MURPHY_CASES` choose others.
#[test]
fn no_simulated_world_breaks_a_promise() {
    let (first, seeds) = (number_from_env("MURPHY_SEED", 0), number_from_env("MURPHY_CASES", SEEDS));
    let limit = WORLD_MAX.saturating_mul(u32::try_from(seeds).unwrap_or(u32::MAX));
    let (first, seeds) = (first.to_string(), seeds.to_string());
    let (output, said) = simulate_within(&["--first-seed", &first, "--seeds", &seeds, "--jobs", "2"], limit);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

/// The fear: a failing seed that passes when somebody looks.
#[test]
fn a_seed_is_the_same_world_twice() {
    for seed in ["3", "4", "5", "6"] {
        let trace = || {
            let (_, said) = simulate(&["--here", "--first-seed", seed]);
            said.lines().find(|line| line.starts_with("trace ")).map(str::to_owned).unwrap()
        };
        assert_eq!(trace(), trace(), "seed {seed}");
    }
}

/// What each of them has shown, when it was found:
///
/// - 7299: an archive that lost a slot in the middle of a promotion was sealed below the base of the new epoch;
/// - 4051: a new source met what an archive held that was given up, and acknowledged nothing for ever;
/// - 3637, 4160, 5499, 6747, 9217: people who waited for nodes that nobody starts again, for a mirror that nobody lets take over, or kept to one
///   that was gone;
/// - 10284: a verdict in the middle of a promotion;
/// - 11878: a promotion that went on after its process had died;
/// - 12958: a moment behind the end of one archive and before the beginning of the other;
/// - 229: a source that was promoted and started again, and never told the one before it;
/// - 4110: people who kept to a mirror whose archive somebody else had sealed before it;
/// - 5067: a member that was admitted and never had a directory;
/// - 7042: the loss of a source beside which only one was left that had been replaced;
/// - 5960: an archive that was sealed by a mirror which was lost before it led, below what the other mirror holds;
/// - 301: a promotion that asked archives for as long as a source that lived went on writing;
/// - 4212: a mirror that asked for ever for a pack whose archive was gone, although its source had called it missing;
/// - 876, 4226: an archive that ended before the logs of all mirrors that were left began;
/// - 10681: a mirror that had gone over to a new source, and was refused by an archive that had been sealed below what was carried over;
/// - 17939: a mirror that had joined a source which was replaced and did not know it yet;
/// - 3469: an archive that was sealed by one who never led, and was asked for ever by the source that had been promoted without it;
/// - 1779: a restore that took over and called a pack lost that its own store had, when it brought up an archive;
/// - 66, 862: a source that was promoted, and ended by the promise of a promotion that had come to nothing before;
/// - 7593: a source that was replaced by one that is lost, and goes on beside the next one;
/// - 5554, 8585: people who wanted to add an archive where an fsync waited for one whose account was gone;
/// - 16520: the same, where it waited for one that nobody can open;
/// - 964: an archive that was begun and never finished, and with which a restore was to run again for ever;
/// - 2040: people who gave up no archive that nobody can bring up;
/// - 14326: a mirror that promised an epoch before it asked the archives, which knew of another source, and ended that one.
#[test]
fn a_world_that_broke_a_promise_once_keeps_it() {
    let seeds = [
        7299, 4051, 3637, 4160, 5499, 6747, 9217, 10284, 11878, 12958, 229, 4110, 5067, 7042, 5960, 301,
        4212, 876, 4226, 10681, 17939, 3469, 1779, 66, 862, 7593, 5554, 8585, 16520, 964, 2040, 14326,
    ];
    for seed in seeds.map(|seed: u64| seed.to_string()) {
        let (output, said) = simulate(&["--first-seed", &seed, "--seeds", "1"]);
        assert!(output.status.success(), "{said}");
    }
}

/// The fear: a long run that stops at the first of many faults, or says of a range that it is well when one seed of it failed.
#[test]
fn a_run_that_keeps_going_tells_of_every_seed_that_failed() {
    let failed = |keep_going: &[&str]| {
        let arguments = ["--seeds", "12", "--canary", "lying-disk"];
        let (output, said) = simulate(&[&arguments, keep_going].concat());
        assert_eq!(output.status.code(), Some(1), "{said}");
        said.lines().filter(|line| line.contains(" has failed; again: ")).count()
    };
    let (first, all) = (failed(&[]), failed(&["--keep-going"]));
    assert!(first == 1 && all > 1, "{first}, then {all}");
}

/// The fear: a judge that never objects. Every deliberate bug is found, as a violation of the invariant that it breaks; worlds in which it only
/// leads to something else ([`Canary::aftermath`]) do not count.
#[test]
fn every_canary_is_found() {
    for canary in Canary::ALL {
        let (output, said) = simulate(&["--seeds", "60", "--canary", canary.name()]);
        assert_eq!(output.status.code(), Some(1), "{canary} was not found: {said}");
        let violation = said.lines().find_map(|line| line.strip_prefix("violation "));
        let violation = violation.unwrap_or_else(|| panic!("{canary}: no violation in {said}"));
        assert!(violation.starts_with(canary.finding()), "{canary} was found as: {violation}");
        assert!(said.contains("--first-seed"), "the command that repeats it is printed: {said}");
    }
}

/// So many worlds take a minute and a half of one core in a debug build.
const SEEDS: u64 = 300;
/// A world that takes longer is busy with itself; the program says so.
const WORLD_MAX: Duration = Duration::from_secs(120);
