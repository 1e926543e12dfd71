//! When slots are cut, started and taken back, in time that a test makes pass.

use super::*;
use crate::testing::Source;

const SECOND: Duration = Duration::from_secs(1);

fn core(source: &Source) -> Core {
    let mut core = Core::new(ShipLimits::default(), Boundary::after(source.base().position), Lsn::ROOT);
    core.is_proven = true;
    core
}

/// Gives `frames` to `core` at `now`, as if they had just been closed, and returns the jobs it starts.
fn give(core: &mut Core, frames: &[Frame], now: Duration) -> Vec<Job> {
    let last = frames.last().unwrap();
    core.durable(last.last());
    core.step(now);
    core.frames(frames.to_vec(), now, last.header().wall_time);
    jobs(core, now)
}

fn jobs(core: &mut Core, now: Duration) -> Vec<Job> {
    let started = core.step(now).into_iter().filter_map(|action| match action {
        Action::Start(job) => Some(job),
        Action::Read { .. } | Action::Archived { .. } => None,
    });
    started.collect()
}

#[test]
fn a_slot_is_cut_within_a_second_of_its_first_entry() {
    let mut source = Source::new();
    let mut core = core(&source);
    assert!(give(&mut core, &source.frames(1, 1), SECOND).is_empty());
    assert!(core.wake_at().unwrap() < 2 * SECOND);
    let due = core.wake_at().unwrap();
    let started = jobs(&mut core, due);
    assert_eq!(started.len(), 1);
    assert_eq!(core.lag(3 * SECOND), 2 * SECOND);
}

#[test]
fn somebody_who_waits_gets_a_slot_at_once() {
    let mut source = Source::new();
    let mut core = core(&source);
    assert!(give(&mut core, &source.frames(1, 1), SECOND).is_empty());
    core.wanted(Lsn::FIRST);
    assert_eq!(jobs(&mut core, SECOND).len(), 1);
    assert!(give(&mut core, &source.frames(1, 1), SECOND).is_empty(), "nobody waits for this one");
}

/// The fear: too many open files for a moment, and an archive is never shipped to again.
#[test]
fn a_log_that_cannot_be_read_for_a_moment_is_read_again_and_that_is_told() {
    let mut source = Source::new();
    let mut core = core(&source);
    let frames = source.frames(1, 1);
    let reads = |core: &mut Core, now| {
        core.step(now).iter().filter(|action| matches!(action, Action::Read { .. })).count()
    };
    core.durable(frames[0].last());
    assert_eq!(reads(&mut core, SECOND), 1);
    core.read_failed("too many open files".to_owned(), SECOND);
    assert_eq!((core.error(), core.end()), (Some("too many open files"), None));
    assert_eq!(reads(&mut core, SECOND), 0, "not at once");
    let again = core.wake_at().unwrap();
    assert!(again > SECOND && reads(&mut core, again) == 1);
    assert!(give(&mut core, &frames, again).is_empty());
    assert_eq!(core.error(), None);
    core.wanted(Lsn::FIRST);
    assert_eq!(jobs(&mut core, again).len(), 1);
}

#[test]
fn slots_are_acknowledged_in_the_order_of_their_names() {
    let mut source = Source::new();
    let mut core = core(&source);
    let mut ids = Vec::new();
    for _ in 0..3 {
        core.wanted(source.state().position.lsn.next());
        ids.extend(give(&mut core, &source.frames(1, 2), SECOND).iter().map(|job| job.id));
    }
    core.outcome(ids[2], Outcome::Done, SECOND);
    core.outcome(ids[1], Outcome::Done, SECOND);
    core.step(SECOND);
    assert_eq!(core.archived(), Boundary::after(source.base().position));
    core.outcome(ids[0], Outcome::Done, SECOND);
    let archived = core.step(SECOND).len();
    assert_eq!((archived, core.archived().position), (3, source.state().position));
    assert_eq!(core.lag(9 * SECOND), Duration::ZERO);
}

#[test]
fn the_first_slot_goes_alone() {
    let mut source = Source::new();
    let mut core = core(&source);
    core.is_proven = false;
    core.wanted(Lsn::new(100));
    let first = give(&mut core, &source.frames(1, 2), SECOND).remove(0);
    assert!(give(&mut core, &source.frames(1, 2), SECOND).is_empty());
    core.outcome(first.id, Outcome::Done, SECOND);
    assert_eq!(jobs(&mut core, SECOND).len(), 1);
}

/// A process before this one cut the same entries otherwise: its slot stands, and the rest is cut anew.
#[test]
fn behind_an_adopted_slot_everything_is_cut_anew() {
    let mut source = Source::new();
    let mut core = core(&source);
    let (first, second) = (source.frames(1, 2), source.frames(1, 2));
    core.wanted(Lsn::FIRST);
    let one = give(&mut core, &first, SECOND);
    core.wanted(second[0].first());
    let two = give(&mut core, &second, SECOND);
    let mut adopted = first.clone();
    adopted.extend(second.clone());
    core.outcome(one[0].id, Outcome::Adopted(second[0].position(), source.now()), SECOND);
    let actions = core.step(SECOND);
    assert!(matches!(actions[..], [Action::Archived { .. }]), "{actions:?}");
    assert_eq!(core.archived().position, second[0].position());
    core.outcome(two[0].id, Outcome::Ended(ShipEnd::LogEnded), SECOND);
    assert_eq!(core.end(), None, "the void flight has no say");
}

#[test]
fn a_failure_is_shown_and_tried_again_ever_later() {
    let mut source = Source::new();
    let mut core = core(&source);
    core.wanted(Lsn::FIRST);
    let job = give(&mut core, &source.frames(1, 2), SECOND).remove(0);
    let mut now = SECOND;
    let mut pauses = Vec::new();
    for _ in 0..12 {
        core.outcome(job.id, Outcome::Failed("no route".to_owned()), now);
        assert!(jobs(&mut core, now).is_empty());
        assert_eq!(core.error(), Some("no route"));
        pauses.push(core.wake_at().unwrap() - now);
        now = core.wake_at().unwrap();
        assert_eq!(jobs(&mut core, now)[0].id, job.id);
    }
    assert!(pauses.is_sorted() && pauses.last() == Some(&BACKOFF_MAX), "{pauses:?}");
    core.outcome(job.id, Outcome::Done, now);
    core.step(now);
    assert_eq!(core.error(), None);
}

#[test]
fn the_epoch_of_the_archive_is_ended_before_frames_of_the_next() {
    let mut source = Source::new();
    let mut core = core(&source);
    core.wanted(Lsn::new(100));
    let old = give(&mut core, &source.frames(1, 2), SECOND).remove(0);
    let epoch = Epoch { number: 2, ..source.base().position.epoch };
    let mut next = source.taken_over(epoch);
    assert!(give(&mut core, &next.frames(1, 2), SECOND).is_empty(), "the old epoch is not there yet");
    core.outcome(old.id, Outcome::Done, SECOND);
    let seal = jobs(&mut core, SECOND);
    assert!(matches!(seal[..], [Job { work: Work::Seal(next), .. }, ..] if next == epoch), "{seal:?}");
    assert_eq!(seal[0].at, Boundary::after(source.state().position));
    let slot = seal.get(1).cloned().unwrap();
    assert_eq!(slot.at, Boundary::before(source.state().position, epoch));
}

#[test]
fn memory_is_bounded_while_the_archive_does_not_answer() {
    let mut source = Source::new();
    let mut core = core(&source);
    core.limits.slot_bytes = 1000;
    let mut given = 0;
    let mut now = SECOND;
    core.durable(Lsn::new(1 << 40));
    loop {
        let reads = core.step(now).iter().any(|action| matches!(action, Action::Read { .. }));
        if !reads {
            break;
        }
        let frames = source.frames(3, 2);
        given += frames.iter().map(|frame| frame.bytes().len()).sum::<usize>();
        core.frames(frames, now, source.now());
        now += SECOND;
    }
    assert!(given < 20_000, "{given} bytes in memory");
    assert!(core.lag(now) > SECOND);
}
