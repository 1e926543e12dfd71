//! A log that goes on from an earlier point, beside the one that keeps the rest.

use super::{damage::many_segments, *};
use crate::{ChainHash, Digest, ForkError};

const PLACE: &str = "/fork";

fn forked(files: &FaultyDisk) -> DiskOptions {
    DiskOptions { directory: PLACE.into(), scrub: Scrub::Everything, ..options(files) }
}

/// The fear: a mirror goes on from a common ancestor with other entries than it had, in an epoch that it gave up, or the tail is not kept.
#[test]
fn a_fork_holds_what_was_held_up_to_any_frame_end_and_goes_on_from_there() {
    let (files, frames) = many_segments();
    let base = History::origin().position;
    let ends = std::iter::once(base).chain(frames.iter().map(Frame::position));
    for (kept, end) in ends.enumerate() {
        let disk = files.after_power_cut(0);
        let log = DiskLog::open(options(&disk)).unwrap();
        let before = disk.contents();
        let state = log.fork(Path::new(PLACE), end.lsn, end.hash).unwrap();
        assert_eq!(state.position, end);
        let same = disk.contents().into_iter().filter(|(path, _)| !path.starts_with(PLACE));
        assert!(same.eq(before), "the log was changed at {end}");
        let disk = disk.after_power_cut(0);
        let fork = DiskLog::open(forked(&disk)).unwrap();
        assert_same(&read_all(&fork), &frames[..kept]);
        assert_eq!((fork.tail(), fork.recovery().epoch), (state, end.epoch));
        let mut history = History::new(epoch(9), fork.claim(epoch(9)).unwrap());
        let next = append(&fork, &mut history, 2).unwrap();
        while fork.step() {}
        drop(fork);
        let log = DiskLog::open(DiskOptions { scrub: Scrub::Everything, ..options(&disk) }).unwrap();
        assert_same(&read_all(&log), &frames);
        drop(log);
        let fork = DiskLog::open(forked(&disk)).unwrap();
        assert_same(&read_all(&fork), &[&frames[..kept], &[next]].concat());
    }
}

#[test]
fn a_fork_ends_at_a_frame_end_with_the_hash_that_was_given() {
    let (files, frames) = many_segments();
    let log = DiskLog::open(options(&files)).unwrap();
    let (end, last) = (frames[7].position(), frames.last().unwrap().last());
    for (lsn, hash) in
        [(end.lsn, ChainHash::default()), (end.lsn.previous(), end.hash), (Lsn::ROOT, end.hash)]
    {
        let refused = log.fork(Path::new(PLACE), lsn, hash);
        assert_eq!(refused, Err(ForkError::NoEnd { lsn }));
    }
    let refused = log.fork(Path::new(PLACE), last.next(), end.hash).map(|state| state.digest);
    assert!(matches!(refused, Err::<Digest, _>(ForkError::Files(_))), "{refused:?}");
}

/// The fear: a crash, or a full disk, while the fork is made takes something of the log that is all there is.
#[test]
fn a_fork_that_is_cut_short_takes_nothing_of_the_log() {
    let (files, frames) = many_segments();
    let files = files.after_power_cut(0);
    let end = frames[50].position();
    let log = DiskLog::open(options(&files)).unwrap();
    files.record();
    log.fork(Path::new(PLACE), end.lsn, end.hash).unwrap();
    drop(log);
    for moment in files.take_recorded() {
        for crashed in (0..4).map(|seed| moment.after_power_cut(seed)).chain([moment.after_kill()]) {
            let log = DiskLog::open(DiskOptions { scrub: Scrub::Everything, ..options(&crashed) }).unwrap();
            assert_same(&read_all(&log), &frames);
        }
    }
}
