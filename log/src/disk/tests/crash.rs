//! Crashes at every operation, power cuts, and syncs that fail.
//!
//! Invariants:
//! - What was published as durable before a crash is there after it, with the same bytes.

use super::*;

/// What a process has done before it died.
struct Life {
    /// Every frame that was queued, in order.
    queued: Vec<Frame>,
    /// What was published as durable.
    durable: State,
}

/// Runs a process on `files`, until its end or until the disk stops it.
fn live(files: &FaultyDisk, number: u32, mut queued: Vec<Frame>, durable: State) -> Life {
    let opened = DiskLog::open(options(files));
    let opened = match opened {
        Err(OpenError::Empty { .. }) if queued.is_empty() => {
            DiskLog::create(options(files), History::origin())
        }
        opened => opened,
    };
    let Ok(log) = opened else { return Life { queued, durable } };
    // What the log holds may be more than what was published, and never less.
    let durable = log.durable().state();
    queued.retain(|frame| frame.last() <= durable.position.lsn);
    if let Ok(state) = log.claim(epoch(number)) {
        let mut history = History::new(epoch(number), state);
        for round in 0..12 {
            for entries in [1, 60, 3] {
                if let Ok(frame) = append(&log, &mut history, entries) {
                    queued.push(frame);
                }
            }
            if round % 2 == 1 {
                log.step();
            }
        }
        while log.step() {}
    }
    Life { queued, durable: log.durable().state() }
}

/// Opens the log after a crash and checks that it keeps its promises.
fn check(files: &FaultyDisk, life: &Life, what: &str) -> Vec<Frame> {
    let log = match DiskLog::open(options(files)) {
        Ok(log) => log,
        Err(OpenError::Empty { .. }) if life.durable == History::origin() => return Vec::new(),
        Err(error) => panic!("{what}: {error}"),
    };
    let tail = log.tail().position.lsn;
    assert!(
        tail >= life.durable.position.lsn,
        "{what}: {tail} is less than was durable, {}",
        life.durable.position
    );
    let kept: Vec<Frame> = life.queued.iter().filter(|frame| frame.last() <= tail).cloned().collect();
    assert_same(&read_all(&log), &kept);
    assert_eq!(log.tail(), kept.last().map_or(History::origin(), Frame::state), "{what}");
    kept
}

#[test]
fn a_kill_at_any_operation_loses_nothing_durable() {
    let whole = disk();
    live(&whole, 1, Vec::new(), History::origin());
    let operations = whole.operations();
    assert!(operations > 40, "the workload has many steps, not {operations}");
    for stop_at in 0..operations {
        let files = disk();
        files.stop_at(stop_at);
        let life = live(&files, 1, Vec::new(), History::origin());
        check(&files.after_kill(), &life, &format!("killed at operation {stop_at}"));
        for seed in 0..12 {
            let what = format!("power cut at operation {stop_at}, seed {seed}");
            check(&files.after_power_cut(seed), &life, &what);
        }
    }
}

/// The second crash hits the recovery from the first, or the life after it.
#[test]
fn a_crash_during_recovery_loses_nothing_durable() {
    let operations = 60;
    for stop_at in (0..operations).step_by(3) {
        for seed in 0..4 {
            let files = disk();
            files.stop_at(stop_at);
            let first = live(&files, 1, Vec::new(), History::origin());
            let files = files.after_power_cut(seed);
            for again in 0..14 {
                let files = files.after_kill();
                let kept = check(&files.after_kill(), &first, "between the crashes");
                files.stop_at(again);
                let second = live(&files, 2, kept.clone(), first.durable);
                let what = format!("operation {stop_at}, seed {seed}, then operation {again}");
                check(&files.after_kill(), &second, &what);
                check(&files.after_power_cut(seed + 7), &second, &what);
            }
        }
    }
}

/// A failed sync leaves pages that can be read and are not on the disk. A restart must not take them for durable before it has
/// written them anew, or a mirror would have them and the next power cut would not.
#[test]
fn what_survived_a_failed_sync_in_memory_is_written_anew_before_it_counts() {
    let whole = disk();
    live(&whole, 1, Vec::new(), History::origin());
    for break_at in 0..whole.operations() {
        let files = disk();
        files.break_at(break_at);
        let life = live(&files, 1, Vec::new(), History::origin());
        let files = files.after_kill();
        let Ok(log) = DiskLog::open(options(&files)) else {
            assert_eq!(life.durable, History::origin());
            continue;
        };
        let shown = log.durable().state();
        assert!(shown.position.lsn >= life.durable.position.lsn);
        drop(log);
        for seed in 0..6 {
            let shown = Life { queued: life.queued.clone(), durable: shown };
            check(&files.after_power_cut(seed), &shown, &format!("sync failed at {break_at}, seed {seed}"));
        }
    }
}

/// The canary: a disk that loses synced data must be noticed, or these tests prove nothing.
#[test]
#[should_panic(expected = "less than was durable")]
fn a_disk_that_forgets_what_was_synced_is_noticed() {
    let files = disk();
    let life = live(&files, 1, Vec::new(), History::origin());
    let newest =
        files.names().into_iter().rfind(|name| name.extension().is_some_and(|end| end == "seg")).unwrap();
    files.damage(&newest, |bytes| bytes.truncate(SEGMENT_HEADER_BYTES));
    check(&files, &life, "a lying disk");
}
