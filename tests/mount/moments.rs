//! Any moment of a live volume comes back from its archive: moments are drawn after the run, and what is restored is held against a plain
//! directory that is led through the same changes.
//!
//! `MURPHY_SEED` chooses the changes and the moments. When each change is made depends on the machine.

use std::{
    fs,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use murphy_tests::{
    History, PATIENCE, Random, Scratch, TreeRules, can_mount, compare_directories, number_from_env, pause,
    wait_until,
};

/// What the writer did, burst by burst, with rests between.
struct Run {
    history: History,
    bursts: Vec<Range<usize>>,
}

/// A moment that was drawn, and how many changes it can show if only one number is right.
struct Moment {
    name: String,
    nanos: u64,
    exactly: Option<usize>,
}

/// The promise of an archive: whatever somebody does at some moment, the moment before comes back, byte for byte.
#[test]
fn moments_drawn_after_the_run_come_back_as_they_were() {
    const TEST: &str = "moments_drawn_after_the_run_come_back_as_they_were";
    if !can_mount(TEST) {
        return;
    }
    let seed = number_from_env("MURPHY_SEED", 1);
    eprintln!("MURPHY_SEED={seed}");
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    let archive = format!("{}?domain=elsewhere", scratch.url("archive"));
    let format = ["format", "node", "--blocks", &scratch.url("blocks"), "--archive", &archive];
    scratch.run(format).expect_code(0);
    let run = write(&scratch, seed);
    wait_archived(&scratch);
    let moments = draw(&run, &mut Random::new(seed ^ 0x5EED));
    // The volume lives on while it is restored.
    let over = AtomicBool::new(false);
    let later = scratch.path("mnt/later");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0_u64.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                fs::write(&later, format!("{number}").repeat(1000)).unwrap();
                pause(Duration::from_millis(20));
            }
        });
        let _over = SetOnDrop(&over);
        for (number, moment) in moments.iter().enumerate() {
            let found = restore(&scratch, &archive, &run.history, number, moment, seed);
            eprintln!("{}: {found} of {} changes", moment.name, run.history.made().len());
        }
    });
    scratch.run(["verify", &archive, "--data", "100"]).expect_code(0);
    scratch.umount("mnt");
}

/// A failed check must not leave the writer at work.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Bursts of changes with rests, two of them longer than any idle second; a snapshot is taken on the way.
fn write(scratch: &Scratch, seed: u64) -> Run {
    let mount = scratch.mount("node", "mnt");
    let work = mount.join("work");
    fs::create_dir(&work).unwrap();
    scratch.run(["flush", "mnt"]).expect_code(0);
    let (mut history, mut random, mut bursts) = (History::new(seed), Random::new(seed), Vec::new());
    for burst in 0..BURSTS {
        bursts.push(history.burst(&work, 30 + random.index(60)).unwrap());
        // Its last frame is closed behind its last change, and not dated by the next sign of life.
        fs::File::open(&work).and_then(|work| work.sync_all()).unwrap();
        if burst == BURSTS / 2 {
            scratch.run(["archive", "snapshot", "mnt"]).expect_code(0);
        }
        pause(if burst % 3 == 1 { REST } else { Duration::from_millis(random.below(200)) });
    }
    Run { history, bursts }
}

fn wait_archived(scratch: &Scratch) {
    scratch.run(["flush", "mnt"]).expect_code(0);
    let status = || scratch.run(["status", "mnt", "--json"]).json();
    let durable = status()["durable_lsn"].as_u64();
    wait_until("the archive", PATIENCE, || status()["archives"][0]["lsn"].as_u64() >= durable);
}

/// Ten moments: one in an idle second, one in the middle of a burst, eight more.
fn draw(run: &Run, random: &mut Random) -> Vec<Moment> {
    let made = run.history.made();
    let mut moments = Vec::new();
    let rests: Vec<(usize, u64)> = run
        .bursts
        .iter()
        .filter_map(|burst| {
            let (last, next) = (made.get(burst.end - 1)?, made.get(burst.end)?);
            let second = (last.done / SECOND + 1) * SECOND;
            (second + SECOND < next.begun).then_some((burst.end, second))
        })
        .collect();
    assert!(!rests.is_empty(), "there was no second without a change");
    let (count, second) = rests[random.index(rests.len())];
    let nanos = second + random.below(SECOND);
    moments.push(Moment { name: "in an idle second".to_owned(), nanos, exactly: Some(count) });
    let burst = &run.bursts[random.index(run.bursts.len())];
    let quarter = burst.len() / 4;
    let (from, to) = (made[burst.start + quarter].begun, made[burst.end - quarter].done);
    let nanos = from + random.below(to - from);
    moments.push(Moment { name: "in the middle of a burst".to_owned(), nanos, exactly: None });
    let (from, to) = (made[0].begun, made[made.len() - 1].done);
    while moments.len() < MOMENTS {
        // Most of the time is rest: half of the moments are drawn from the work.
        let (name, from, to) = if moments.len() % 2 == 0 {
            ("anywhere", from, to)
        } else {
            let change = random.index(made.len() - 1);
            ("at work", made[change].begun, made[change + 1].begun)
        };
        let nanos = from + random.below(to - from);
        moments.push(Moment { name: format!("{name}, {}", moments.len()), nanos, exactly: None });
    }
    moments
}

/// Restores one moment, mounts it, and returns after how many changes the plain directory is the same.
fn restore(
    scratch: &Scratch,
    archive: &str,
    history: &History,
    number: usize,
    moment: &Moment,
    seed: u64,
) -> usize {
    let (node, mount) = (format!("node-{number}"), format!("mnt-{number}"));
    let at = jiff::Timestamp::from_nanosecond(i128::from(moment.nanos)).unwrap().to_string();
    let blocks = scratch.url(&format!("blocks-{number}"));
    let mut arguments = vec!["restore", archive, &node, "--at", &at];
    if number.is_multiple_of(2) {
        arguments.extend(["--blocks", &blocks]);
    }
    let restored = scratch.run(arguments).expect_code(0);
    let what = format!("{}, {at}, MURPHY_SEED={seed}: {restored}", moment.name);
    let as_of = printed_moment(&restored.stderr()).unwrap_or_else(|| panic!("no moment is printed: {what}"));
    assert!(as_of <= moment.nanos, "{what}");
    let possible = history.possible(moment.nanos, as_of);
    if let Some(count) = moment.exactly {
        assert_eq!(possible, count..=count, "{what}");
    }
    let root = scratch.mount(&node, &mount).join("work");
    let shadow = scratch.make_dir(&format!("shadow-{number}"));
    for made in &history.made()[..*possible.start()] {
        made.change.apply(&shadow).unwrap();
    }
    let mut differences = Vec::new();
    for count in possible.clone() {
        differences = compare_directories(&shadow, &root, TreeRules::UNTIMED).unwrap();
        if differences.is_empty() {
            scratch.run(["umount", &mount]).expect_code(0);
            if number.is_multiple_of(2) {
                scratch.run(["fsck", &node]).expect_code(0);
            }
            fs::remove_dir_all(shadow).unwrap();
            return count;
        }
        if let Some(made) = history.made().get(count) {
            made.change.apply(&shadow).unwrap();
        }
    }
    panic!("after none of {possible:?} changes the tree is the same: {differences:?}; {what}");
}

/// `to lsn 7 of epoch 1, as of 2026-03-01T12:00:00.5+00:00[UTC]`, in nanoseconds since 1970.
fn printed_moment(said: &str) -> Option<u64> {
    let line = said.lines().find(|line| line.starts_with("to lsn "))?;
    let moment: jiff::Zoned = line.split_once("as of ")?.1.parse().ok()?;
    u64::try_from(moment.timestamp().as_nanosecond()).ok()
}

const SECOND: u64 = 1_000_000_000;
const BURSTS: usize = 6;
const MOMENTS: usize = 10;
/// Holds one whole second of the clock, whenever it begins.
const REST: Duration = Duration::from_millis(2300);
