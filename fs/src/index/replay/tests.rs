//! Replay of frames that an appender made, in all the ways in which it can go wrong.
//!
//! Invariants:
//! - What a replay leaves behind is compared with the reference, never with another replay.

use std::io;

use murphy_log::{Appender, Change, Entry, FRAME_HEADER_BYTES, LogTime, UnverifiedFrame};

use super::*;
use crate::index::{
    FjallIndex, FjallOptions, MemoryIndex,
    conformance::{Reference, key, some_generations},
};

type Frames = Vec<Frame>;

/// A frame for each generation, the first of which is ingested as the base; the entries have four changes each.
fn frames(reference: &Reference) -> (State, Frames) {
    let base = reference.states[0].1;
    let mut appender = Appender::new(reference.keys.clone(), base.position.epoch, base);
    let mut frames = Vec::new();
    for (rows, (_, state)) in reference.generations.iter().zip(&reference.states).skip(1) {
        let changes: Vec<_> = rows
            .iter()
            .map(|(key, value)| Change { table: key.table(), key: key.key_bytes(), value: value.clone() })
            .collect();
        for changes in changes.chunks(4) {
            let lsn = appender.state().position.lsn.next();
            let time = LogTime::from_nanos(lsn.get() * 1000);
            let (kind, caller, request, names) = (1, None, None, Vec::new());
            let entry = Entry { lsn, time, kind, caller, request, names, changes: changes.to_vec() };
            appender.push(&entry, state.digest, state.usage).unwrap();
        }
        frames.extend(std::iter::from_fn(|| appender.close(LogTime::default(), Lsn::ROOT)));
    }
    (base, frames)
}

/// A reference of which one generation is one frame, with the states of the frames.
fn made(count: usize) -> (Reference, State, Frames) {
    let mut reference = Reference::new(some_generations(count, 30));
    let (base, frames) = frames(&reference);
    assert_eq!(frames.len(), count - 1);
    for ((_, state), frame) in reference.states.iter_mut().skip(1).zip(&frames) {
        *state = frame.state();
    }
    (reference, base, frames)
}

fn good(frames: &[Frame]) -> impl Iterator<Item = Result<Frame, io::Error>> {
    frames.iter().cloned().map(Ok)
}

fn small() -> ReplayBudget {
    ReplayBudget { rows: 50, bytes: 1 << 20 }
}

#[test]
fn a_replay_leaves_what_the_entries_say() {
    let (reference, base, frames) = made(30);
    let dir = tempfile::tempdir().unwrap();
    let on_disk = FjallIndex::open(dir.path(), FjallOptions::default()).unwrap();
    for index in [&MemoryIndex::new() as &dyn Index, &on_disk] {
        reference.ingest(index, 0..1);
        assert_eq!(replay(index, base, good(&frames[..11]), small()).unwrap(), reference.states[11].1);
        reference.check(&*index.snapshot(), 11);
        let from = reference.states[11].1;
        assert_eq!(replay(index, from, good(&[]), small()).unwrap(), from);
        replay(index, from, good(&frames[11..]), ReplayBudget::default()).unwrap();
        reference.check(&*index.snapshot(), 29);
    }
    drop(on_disk);
    let reopened = FjallIndex::open(dir.path(), FjallOptions::default()).unwrap();
    reference.check(&*reopened.snapshot(), 29);
}

/// The tables are ahead of the record: applying the frames again must not matter.
#[test]
fn a_replay_after_a_crash_goes_over_the_same_frames_again() {
    let (reference, base, frames) = made(20);
    let index = MemoryIndex::new();
    reference.ingest(&index, 0..1);
    replay(&index, base, good(&frames[..5]), small()).unwrap();
    reference.ingest(&index, 6..15);
    let index = index.reopened();
    assert_eq!(index.reached(), Some(reference.states[14].1));
    replay(&index, reference.states[5].1, good(&frames[5..]), small()).unwrap();
    reference.check(&*index.snapshot(), 19);
}

#[test]
fn an_index_that_is_ahead_of_its_log_is_refused() {
    let (reference, base, frames) = made(10);
    let index = MemoryIndex::new();
    reference.ingest(&index, 0..1);
    index.sync().unwrap();
    reference.ingest(&index, 1..8);
    let reached = reference.states[7].1.position.lsn;
    let short = replay(&index.reopened(), base, good(&frames[..6]), small());
    assert!(
        matches!(short, Err(ReplayError::Behind { reached: found, .. }) if found == reached),
        "{short:?}"
    );

    // The log goes as far, but it is another one.
    let mut forged = reference.states[7].1;
    forged.position.hash = base.position.hash;
    let index = MemoryIndex::new();
    reference.ingest(&index, 0..1);
    index.sync().unwrap();
    index.ingest(&mut std::iter::empty(), &forged).unwrap();
    let other = replay(&index.reopened(), base, good(&frames), small());
    assert!(matches!(other, Err(ReplayError::OtherHistory { .. })), "{other:?}");
}

#[test]
fn a_gap_or_a_repetition_stops_at_the_last_good_frame() {
    let (reference, base, frames) = made(10);
    for wrong in [&frames[6], &frames[4], &frames[0]] {
        let index = MemoryIndex::new();
        reference.ingest(&index, 0..1);
        let mut run = frames[..5].to_vec();
        run.push(wrong.clone());
        let stopped = replay(&index, base, good(&run), ReplayBudget::default());
        assert!(matches!(stopped, Err(ReplayError::Order(FrameError::Gap { .. }))), "{stopped:?}");
        reference.check(&*index.reopened().snapshot(), 5);
    }
}

#[test]
fn an_index_that_is_elsewhere_is_not_touched() {
    let (reference, base, frames) = made(4);
    let index = MemoryIndex::new();
    let empty = replay(&index, base, good(&frames), small());
    assert!(matches!(empty, Err(ReplayError::From { index: None, .. })), "{empty:?}");
    reference.ingest(&index, 0..1);
    let ahead = replay(&index, frames[0].state(), good(&frames[1..]), small());
    assert!(matches!(ahead, Err(ReplayError::From { .. })), "{ahead:?}");
    reference.check(&*index.snapshot(), 0);
}

#[test]
fn an_error_of_the_source_is_passed_on_and_what_came_before_is_kept() {
    let (reference, base, frames) = made(8);
    let index = MemoryIndex::new();
    reference.ingest(&index, 0..1);
    let broken = good(&frames[..3]).chain([Err(io::Error::other("unplugged"))]).chain(good(&frames[3..]));
    let stopped = replay(&index, base, broken, ReplayBudget::default());
    assert!(matches!(stopped, Err(ReplayError::Frames(ref error)) if error.to_string() == "unplugged"));
    reference.check(&*index.reopened().snapshot(), 3);
}

/// A node stores and forwards frames of a later version; its index stops before them, and says so.
#[test]
fn a_frame_of_a_later_version_is_refused_by_level() {
    let (reference, base, frames) = made(8);
    let index = MemoryIndex::new();
    reference.ingest(&index, 0..1);
    let header = *frames[4].header();
    let later = murphy_log::FrameHeader { feature_level: FEATURE_LEVEL + 1, ..header };
    let later = resealed(later, &frames[4].body()).verify(&reference.keys, &frames[3].position()).unwrap();
    let mut run = frames[..4].to_vec();
    run.push(later);
    let stopped = replay(&index, base, good(&run), ReplayBudget::default());
    let known = FEATURE_LEVEL;
    assert!(
        matches!(stopped, Err(ReplayError::FeatureLevel { level, .. }) if level == known + 1),
        "{stopped:?}"
    );
    reference.check(&*index.reopened().snapshot(), 4);
}

/// The frame with the checksum that its header should have.
fn resealed(mut header: murphy_log::FrameHeader, body: &[u8]) -> UnverifiedFrame {
    let bytes = header.encode();
    let mut hasher = blake3::Hasher::new();
    let length = header.checksum.len();
    hasher.update(&bytes[..FRAME_HEADER_BYTES - length]).update(body);
    header.checksum.copy_from_slice(&hasher.finalize().as_bytes()[..length]);
    Frame::from_parts(&header, body).unwrap()
}

#[test]
fn a_row_that_cannot_be_stored_ends_the_replay_before_its_entry() {
    let (reference, base, _) = made(2);
    let index = MemoryIndex::new();
    reference.ingest(&index, 0..1);
    let mut appender = Appender::new(reference.keys.clone(), base.position.epoch, base);
    let value = Some(bytes::Bytes::from_static(b"new"));
    let row = |key: crate::RowKey| Change { table: key.table(), key: key.key_bytes(), value: value.clone() };
    let entry = Entry {
        lsn: base.position.lsn.next(),
        time: LogTime::default(),
        kind: 1,
        caller: None,
        request: None,
        names: Vec::new(),
        changes: vec![row(key(1, 100)), row(crate::RowKey::from_parts(1, &[1; 5000]))],
    };
    appender.push(&entry, base.digest, base.usage).unwrap();
    let frame = appender.close(LogTime::default(), Lsn::ROOT).unwrap();
    let stopped = replay(&index, base, good(&[frame]), small());
    assert!(matches!(stopped, Err(ReplayError::Entry { .. })), "{stopped:?}");
    reference.check(&*index.snapshot(), 0);
}
