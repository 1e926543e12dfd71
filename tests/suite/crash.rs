//! A whole node, cut off at every write and sync point of random programs, on disks that lose, tear, fill up and fail.
//!
//! Invariants:
//! - Every moment of a run is judged, not a sample. `MURPHY_CRASHES` sets how many programs are run, `MURPHY_SEED` the first of them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use murphy_log::faulty::Fault;
use murphy_tests::{
    CrashRun, Ending, IndexCopy, NodeRules, Shortage, ShortageRun, Verdicts, number_from_env, report,
};

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

/// The fear: a disk that was full for a while costs what was acknowledged, or a restart; or an fsync is told yes for bytes that had no room.
#[test]
fn a_node_goes_on_in_the_same_process_once_a_full_disk_has_room_again() {
    let (mut refused, mut judged, mut closed) = (0, 0, 0);
    for room in (0..ROOM_STEPS).map(|step| step * ROOM_STEP_BYTES) {
        let what = format!("room for {room} bytes");
        let run = ShortageRun::record(Shortage::Room(room));
        assert_eq!(
            run.ended, None,
            "{what}: a log that reserves its space is never poisoned by a lack of it"
        );
        refused += run.refused;
        let end = run.moments() - 1;
        for at in (0..end).step_by(end / 8 + 1).chain([end]) {
            for cut in [0, 1, at as u64 + 2] {
                let what = format!("{what}, power cut {cut} at moment {at}");
                run.judge(at, &run.moment(at).after_power_cut(cut), &what);
                closed += usize::from(run.judge_full(at, cut, &what));
                judged += 2;
            }
            run.judge(at, &run.moment(at).after_kill(), &format!("{what}, killed at moment {at}"));
            judged += 1;
        }
    }
    assert!(refused > 0 && closed > 0, "{refused} calls refused, {closed} openings");
    report(&format!(
        "shortage, room: {ROOM_STEPS} runs, {refused} calls refused, {judged} crashed nodes judged, {closed} not opened while it lasted"
    ));
}

/// The fear: one EIO or ENOSPC somewhere, and the same process goes on as if nothing had been: a poisoned log acknowledges, a retried fsync
/// is told yes by pages that were dropped.
#[test]
fn a_node_that_goes_on_after_an_error_acknowledges_only_what_is_there() {
    for fault in [Fault::Broken, Fault::Full] {
        let (mut runs, mut ended, mut acknowledged) = (0, 0, 0);
        for at in (0..).step_by(FAULT_STRIDE) {
            let run = ShortageRun::record(Shortage::Operation(at, fault));
            if run.operations <= at {
                break;
            }
            runs += 1;
            ended += usize::from(run.ended.is_some());
            acknowledged += run.acknowledged();
            let end = run.moments() - 1;
            for cut in [0, 1, at as u64 + 2] {
                let what = format!("{fault:?} at operation {at}, power cut {cut}");
                run.judge(end, &run.moment(end).after_power_cut(cut), &what);
            }
        }
        assert!(ended > 0 && ended < runs, "{ended} of {runs} runs poisoned the log");
        report(&format!(
            "shortage, {fault:?}: {runs} runs, {ended} poisoned the log, {acknowledged} files acknowledged, all there"
        ));
    }
}

/// The fear: the index on a real disk, left by a crash as it was beside a log that lost its end, shows what was never decided, or is taken
/// for more than the log.
#[test]
fn a_crashed_index_on_disk_is_brought_to_what_the_log_has() {
    let (scratch, steps) = (tempfile::tempdir().unwrap(), 90);
    let rules = NodeRules { index: Some(scratch.path().join("index")), ..NodeRules::new(true) };
    let mut copies = Vec::new();
    let mut step = 0;
    let (run, ending) = CrashRun::record_watched(1, steps, &rules, &mut |disk| {
        if step % COPIED == 0 {
            copies.push(IndexCopy::of(&scratch.path().join("index"), disk));
        }
        step += 1;
    });
    assert_eq!(ending, Ending::Whole);
    let mut verdicts = Verdicts::default();
    for (number, copy) in copies.iter().enumerate() {
        for (crash, disk) in [
            ("killed", run.moment(copy.moment).after_kill()),
            ("power cut", run.moment(copy.moment).after_power_cut(number as u64)),
        ] {
            let place = tempfile::tempdir().unwrap();
            copy.put(place.path()).unwrap();
            let what = format!("index copy {number}, {crash} at moment {}", copy.moment);
            run.judge_with_index(copy.moment, &disk, place.path(), &what, &mut verdicts);
        }
        // An index that lagged behind: the copy before, under the log of now.
        if let Some(older) = number.checked_sub(1).map(|older| &copies[older]) {
            let place = tempfile::tempdir().unwrap();
            older.put(place.path()).unwrap();
            let disk = run.moment(copy.moment).after_kill();
            let what = format!("the index copy before {number} at moment {}", copy.moment);
            run.judge_with_index(copy.moment, &disk, place.path(), &what, &mut verdicts);
        }
    }
    assert!(verdicts.judged > 20, "{verdicts:?}");
    report(&format!(
        "crash, index on disk: {} copies, {} crashed nodes judged",
        copies.len(),
        verdicts.judged
    ));
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

    let run_through = ShortageRun::record(Shortage::Room(0));
    let end_of_shortage = run_through.moments() - 1;
    let forgetful = run_through.moment(end_of_shortage / 2).after_kill();
    let judge = || run_through.judge(end_of_shortage, &forgetful, "a disk that forgets");
    let told = catch_unwind(AssertUnwindSafe(judge)).unwrap_err();
    assert!(
        told.downcast_ref::<String>()
            .is_some_and(|told| told.contains("lost bytes") || told.contains("certain: true"))
    );

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
/// Every so many operations of a shortage is one that fails.
const FAULT_STRIDE: usize = 3;
/// The room that a full disk still has: nothing, and so many steps of this.
const ROOM_STEPS: u64 = 8;
const ROOM_STEP_BYTES: u64 = 24 << 10;
/// The index is copied after every so many steps.
const COPIED: usize = 12;
