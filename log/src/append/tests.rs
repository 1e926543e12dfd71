//! Tests of the appender.
//!
//! Invariants:
//! - What it closes can be verified by anybody who has the keys and the position before it.

use super::*;
use crate::{
    Change, MAX_ENTRY_BYTES, Requester, UnverifiedFrame,
    conformance::{History, VOLUME, epoch},
};

fn appender() -> Appender {
    Appender::new(VolumeKeys::derive(VOLUME), epoch(1), History::origin())
}

fn at(nanos: u64) -> LogTime {
    LogTime::from_nanos(1_800_000_000_000_000_000 + nanos)
}

fn push(appender: &mut Appender, time: LogTime) -> Position {
    let lsn = appender.state().position.lsn.next();
    appender.push(&Entry::tick(lsn, time), Digest(7), Usage::default()).unwrap()
}

fn push_large(appender: &mut Appender, bytes: usize) {
    let lsn = appender.state().position.lsn.next();
    let change = Change { table: 1, key: Bytes::from_static(&[3; 8]), value: Some(vec![9; bytes].into()) };
    let entry = Entry { changes: vec![change], ..Entry::tick(lsn, at(0)) };
    appender.push(&entry, Digest(7), Usage::default()).unwrap();
}

fn verified(appender: &mut Appender, mut previous: Position) -> Vec<Frame> {
    let frames: Vec<Frame> = std::iter::from_fn(|| appender.close(at(0), Lsn::ROOT)).collect();
    for frame in &frames {
        let (unverified, end) = UnverifiedFrame::parse(frame.bytes(), 0).unwrap();
        assert_eq!(end, frame.bytes().len());
        let again = unverified.verify(&VolumeKeys::derive(VOLUME), &previous).unwrap();
        assert_eq!(again.state(), frame.state());
        previous = again.position();
    }
    assert_eq!(previous, appender.state().position);
    frames
}

#[test]
fn frames_of_many_sizes_verify_and_link() {
    let mut appender = appender();
    let origin = appender.state().position;
    push(&mut appender, at(0));
    push_large(&mut appender, MAX_ENTRY_BYTES - 64);
    push_large(&mut appender, 10);
    let frames = verified(&mut appender, origin);
    assert_eq!(frames.iter().map(|frame| frame.header().count).collect::<Vec<u32>>(), [2, 1]);
    assert_eq!(frames[0].entries().unwrap().len(), 2);
}

/// Nobody may be there to close frames for a while.
#[test]
fn frames_stay_below_their_limit_when_nobody_closes_them() {
    let mut appender = appender();
    let origin = appender.state().position;
    (0..40).for_each(|_| push_large(&mut appender, 300_000));
    let frames = verified(&mut appender, origin);
    assert_eq!(frames.len(), 40);
    assert!(appender.is_empty());
}

#[test]
fn a_pause_longer_than_a_frame_can_tell_begins_another_frame() {
    let mut appender = appender();
    let origin = appender.state().position;
    push(&mut appender, at(0));
    push(&mut appender, at(u64::from(u32::MAX)));
    push(&mut appender, at(u64::from(u32::MAX) + 1));
    let frames = verified(&mut appender, origin);
    assert_eq!(frames.iter().map(|frame| frame.header().count).collect::<Vec<u32>>(), [2, 1]);
    assert_eq!(frames[1].entries().unwrap()[0].time, at(u64::from(u32::MAX) + 1));
}

#[test]
fn a_frame_closes_when_wanted_old_or_large() {
    let mut appender = appender();
    assert!(!appender.should_close(at(u64::MAX / 4)), "nothing to close");
    push(&mut appender, at(0));
    assert!(!appender.should_close(at(4_999_999)));
    assert!(appender.should_close(at(5_000_000)));
    assert_eq!(appender.close_due(), Some(at(5_000_000)));
    appender.request_close();
    assert!(appender.should_close(at(0)));
    assert!(appender.close(at(0), Lsn::ROOT).is_some());
    assert!(appender.close(at(0), Lsn::ROOT).is_none());
    push(&mut appender, at(0));
    assert!(!appender.should_close(at(1)), "the wish was fulfilled");
    push_large(&mut appender, FRAME_BYTES);
    assert!(appender.should_close(at(1)));
}

#[test]
fn a_refused_entry_changes_nothing() {
    let mut appender = appender();
    push(&mut appender, at(5));
    let before = appender.state();
    let mut push = |lsn, time| appender.push(&Entry::tick(lsn, time), Digest(8), Usage::default());
    let (next, beyond) = (before.position.lsn.next(), before.position.lsn.advanced(2));
    assert_eq!(push(beyond, at(5)), Err(PushError::Gap { expected: next, found: beyond }));
    assert_eq!(push(next, at(4)), Err(PushError::TimeBackwards { lsn: next }));
    let short = Change { table: 1, key: Bytes::new(), value: None };
    let entry = Entry { changes: vec![short], ..Entry::tick(next, at(6)) };
    assert!(matches!(appender.push(&entry, Digest(8), Usage::default()), Err(PushError::Encode(_))));
    assert_eq!(appender.state(), before);
}

/// A caller is named once in a frame; the hash must not depend on where frames begin.
#[test]
fn the_chain_does_not_depend_on_how_entries_are_grouped() {
    let caller = |uid| Some(Requester { uid, gid: 0, pid: 0 });
    let callers = [caller(1), caller(1), None, caller(1), caller(2), caller(2), caller(1), None, caller(0)];
    let (mut one, mut many) = (appender(), appender());
    let mut entries = Vec::new();
    for (index, caller) in callers.into_iter().enumerate() {
        let lsn = one.state().position.lsn.next();
        let entry = Entry { caller, ..Entry::tick(lsn, at(index as u64)) };
        one.push(&entry, Digest(1), Usage::default()).unwrap();
        many.push(&entry, Digest(1), Usage::default()).unwrap();
        many.close(at(0), Lsn::ROOT).unwrap();
        entries.push(entry);
    }
    assert_eq!(one.state(), many.state());
    let frames = verified(&mut one, History::origin().position);
    assert_eq!(frames[0].entries().unwrap(), entries);
}
