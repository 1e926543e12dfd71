//! A whole node, cut off at every write and sync point of random programs, on disks that lose, tear, fill up and fail.
//!
//! Invariants:
//! - Every moment of a run is judged, not a sample. `MURPHY_CRASHES` sets how many programs are run, `MURPHY_SEED` the first of them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use murphy_log::faulty::Fault;
use murphy_tests::{CrashRun, Ending, Verdicts, number_from_env, report};

/// The seeds of the programs.
fn seeds() -> std::ops::Range<u64> {
    let first = number_from_env("MURPHY_SEED", 1);
    first..first + number_from_env("MURPHY_CRASHES", 1)
}

/// Judges every moment of a run: after a kill, and after power cuts that lose everything, nothing, and this and that.
fn judge_everywhere(what: &str, sync: bool, steps: usize) {
    let mut verdicts = Verdicts::default();
    let mut moments = 0;
    for seed in seeds() {
        let (run, ending) = CrashRun::record(seed, steps, sync, |_| {});
        assert_eq!(ending, Ending::Whole, "seed {seed}");
        assert!(run.moments() > steps / 4, "seed {seed}: {} moments of {steps} steps", run.moments());
        moments += run.moments();
        for at in 0..run.moments() {
            let twice = at % TWICE == 0;
            let killed = run.moment(at).after_kill();
            run.judge(at, &killed, &format!("seed {seed}, killed at moment {at}"), twice, &mut verdicts);
            for cut in 0..POWER_CUTS {
                // Those that lose everything and nothing are always among them.
                let chance = if cut < 2 { cut } else { cut + seed * 1000 + at as u64 };
                let what = format!("seed {seed}, power cut {chance} at moment {at}");
                run.judge(at, &run.moment(at).after_power_cut(chance), &what, twice, &mut verdicts);
                if at % RECOVERING == 0 && cut == at as u64 / RECOVERING as u64 % POWER_CUTS {
                    run.judge_recovery(at, &run.moment(at).after_power_cut(chance), &what, &mut verdicts);
                    run.judge_recovery(at, &run.moment(at).after_kill(), &what, &mut verdicts);
                }
            }
        }
    }
    assert!(verdicts.between * 4 < verdicts.judged, "most crashes are between steps: {verdicts:?}");
    report(&format!(
        "crash, {what}: {moments} moments, {} crashed nodes judged ({} of them twice), {} between two entries of a step, \
         {} crashed again while they were opened",
        verdicts.judged, verdicts.twice, verdicts.between, verdicts.recovering
    ));
}

/// With `--sync` every step that has returned is there, whatever happens then.
#[test]
fn every_step_that_was_acknowledged_survives_every_crash() {
    judge_everywhere("every step durable", true, 180);
}

/// Without it everything before an fsync is there, and what came after it is there up to one entry.
#[test]
fn every_fsync_survives_every_crash_and_nothing_is_half_there() {
    judge_everywhere("fsyncs now and then", false, 250);
}

/// A disk that fails once, at any operation: the step says so, or nobody needs to know; nothing acknowledged is lost either way.
#[test]
fn a_disk_that_fails_or_is_full_at_any_operation_loses_nothing_acknowledged() {
    for fault in [Fault::Broken, Fault::Full] {
        let mut verdicts = Verdicts::default();
        let (mut runs, mut failed) = (0, 0);
        for seed in seeds() {
            for at in 0.. {
                let mut operation = 0;
                let (run, ending) = CrashRun::record(seed, FAULT_STEPS, true, |disk| {
                    operation = disk.operations() + at;
                    disk.fail_at(operation, fault);
                });
                if run.operations() <= operation {
                    assert!(at > 20, "seed {seed}: a program has operations, not {at}");
                    assert_eq!(ending, Ending::Whole);
                    break;
                }
                let what = format!("seed {seed}, {fault:?} at operation {at}");
                if let Ending::Failed(text) = &ending {
                    assert!(text.contains("EIO") || text.contains("ENOSPC"), "{what}: {text}");
                    failed += 1;
                }
                runs += 1;
                let end = run.moments() - 1;
                run.judge(end, &run.moment(end).after_kill(), &what, true, &mut verdicts);
                for cut in [0, 1, at as u64 + 2] {
                    let what = format!("{what}, power cut {cut}");
                    run.judge(end, &run.moment(end).after_power_cut(cut), &what, false, &mut verdicts);
                }
            }
        }
        assert!(failed > 0);
        report(&format!(
            "crash, {fault:?} at every operation: {runs} runs, {failed} of them refused a step, {} crashed nodes judged",
            verdicts.judged
        ));
    }
}

/// The canaries: a disk that forgets what was synced, and one that changes it, must be noticed, or these tests prove nothing.
#[test]
fn a_disk_that_lies_is_noticed() {
    let (run, _) = CrashRun::record(1, 120, true, |_| {});
    let end = run.moments() - 1;
    let judged = |disk| {
        let mut verdicts = Verdicts::default();
        let judge = || run.judge(end, &disk, "a disk that lies", false, &mut verdicts);
        catch_unwind(AssertUnwindSafe(judge)).map_err(|panic| *panic.downcast::<String>().unwrap())
    };
    judged(run.moment(end).after_power_cut(0)).unwrap();
    let told = judged(run.moment(end / 2).after_kill()).unwrap_err();
    assert!(told.contains("what was acknowledged is missing"), "{told}");

    let disk = run.moment(end).after_kill();
    let pack = disk.names().into_iter().rfind(|name| name.starts_with("/blocks/packs")).unwrap();
    disk.damage(&pack, |bytes| bytes[10] ^= 1);
    let told = judged(disk).unwrap_err();
    assert!(told.contains("EIO"), "{told}");
}

/// Crashed a second time after having gone on: every so many moments.
const TWICE: usize = 7;
/// Crashed a second time while they are opened: every so many moments.
const RECOVERING: usize = 100;
/// For each moment, beside the kill.
const POWER_CUTS: u64 = 4;
const FAULT_STEPS: usize = 80;
