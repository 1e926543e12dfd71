//! Tests of frames, and the golden bytes of the log's formats.
//!
//! Invariants:
//! - The golden files change only when the format's version does.

use super::*;
use crate::{
    Change, Digest, ForwardedRequest, LogSecret, LogTime, Requester, SegmentHeader, Usage, WaitError,
    conformance::{BRANCH, History, VOLUME, epoch, golden},
    decode_entry, encode_entry,
};

fn keys() -> VolumeKeys {
    VolumeKeys::derive(VOLUME)
}

fn parsed(bytes: &[u8]) -> Result<UnverifiedFrame, FrameError> {
    UnverifiedFrame::parse(&Bytes::copy_from_slice(bytes), 0).map(|(frame, _)| frame)
}

/// A frame with these header fields instead of its own, and a checksum that fits.
fn forged(frame: &Frame, change: impl FnOnce(&mut FrameHeader)) -> Result<UnverifiedFrame, FrameError> {
    let mut header = *frame.header();
    change(&mut header);
    header.checksum = header.checksum_with(&frame.body());
    Frame::from_parts(&header, &frame.body())
}

#[test]
fn every_flipped_bit_of_a_frame_is_noticed() {
    let frame = History::new(epoch(1), History::origin()).frame(3);
    for bit in 0..frame.bytes().len() * 8 {
        let mut bytes = frame.bytes().to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(parsed(&bytes).is_err(), "bit {bit}");
    }
}

#[test]
fn every_shortened_frame_is_noticed() {
    let frame = History::new(epoch(1), History::origin()).frame(3);
    for length in 0..frame.bytes().len() {
        let refused = parsed(&frame.bytes()[..length]).unwrap_err();
        assert!(matches!(refused, FrameError::Truncated { .. }), "{length}: {refused}");
    }
    assert!(parsed(&[]).is_err());
    assert!(UnverifiedFrame::parse(frame.bytes(), frame.bytes().len() + 1).is_err());
}

#[test]
fn a_frame_put_together_from_its_parts_is_the_same() {
    let frame = History::new(epoch(1), History::origin()).frame(3);
    let again = Frame::from_parts(frame.header(), &frame.body()).unwrap();
    assert_eq!(again.bytes(), frame.bytes());
    let again = again.verify(&keys(), &History::origin().position).unwrap();
    assert_eq!(again.entries().unwrap(), frame.entries().unwrap());
    assert!(Frame::from_parts(frame.header(), &frame.body()[1..]).is_err());
    let mut body = frame.body().to_vec();
    body[5] ^= 1;
    assert_eq!(
        Frame::from_parts(frame.header(), &body).unwrap_err(),
        FrameError::Checksum { lsn: frame.first() }
    );
}

#[test]
fn frames_of_other_histories_do_not_verify() {
    let origin = History::origin().position;
    let mut history = History::new(epoch(2), History::origin());
    let (first, second) = (history.frame(2), history.frame(2));
    let verify =
        |frame: &Frame, previous: Position| parsed(frame.bytes()).unwrap().verify(&keys(), &previous);

    let gap = FrameError::Gap { expected: Lsn::FIRST, found: second.first() };
    assert_eq!(verify(&second, origin).unwrap_err(), gap);
    let other = Position { hash: ChainHash::default(), ..origin };
    assert_eq!(verify(&first, other).unwrap_err(), FrameError::Fork { lsn: first.first() });
    let current = epoch(3);
    let ended = FrameError::Epoch { lsn: first.first(), found: epoch(2), current };
    assert_eq!(verify(&first, Position { epoch: current, ..origin }).unwrap_err(), ended);
    let stranger = VolumeKeys::derive(crate::VolumeId::from_bytes([1; 16]));
    let refused = parsed(first.bytes()).unwrap().verify(&stranger, &origin).unwrap_err();
    assert_eq!(refused, FrameError::Chain { lsn: first.first() });
}

/// The checksum of a frame is not keyed, so anybody can compute one: the chain has to notice what it covers.
#[test]
fn a_forged_header_with_a_right_checksum_does_not_verify() {
    let frame = History::new(epoch(1), History::origin()).frame(3);
    let origin = History::origin().position;
    let later = frame.header().base_time.after(std::time::Duration::from_nanos(1));
    let moved = forged(&frame, |header| header.base_time = later).unwrap();
    assert!(moved.verify(&keys(), &origin).is_err());
    let short = forged(&frame, |header| header.count = 2).unwrap();
    assert!(short.verify(&keys(), &origin).is_err());
    let long = forged(&frame, |header| header.count = 4).unwrap();
    assert!(long.verify(&keys(), &origin).is_err());
    assert!(forged(&frame, |header| header.count = 0).is_err());
    assert!(forged(&frame, |header| header.first = Lsn::MAX).is_err());
    assert!(forged(&frame, |header| header.durable_lsn = header.first).is_err());
}

/// A node that is not upgraded yet stores and forwards what it cannot apply.
#[test]
fn a_frame_of_a_later_level_is_linked_and_forwarded_but_not_opened() {
    let frame = History::new(epoch(1), History::origin()).frame(3);
    let later = forged(&frame, |header| header.feature_level = FEATURE_LEVEL + 1).unwrap();
    let later = later.verify(&keys(), &History::origin().position).unwrap();
    assert_eq!(later.position(), frame.position());
    let refused =
        DecodeError::FeatureLevel { lsn: frame.first(), level: FEATURE_LEVEL + 1, known: FEATURE_LEVEL };
    assert_eq!(later.entries().unwrap_err(), refused);
    let mut entries = later.iter();
    assert!(entries.next().is_some_and(|entry| entry.is_err()));
    assert!(entries.next().is_none());
}

#[test]
fn waiting_errors_name_what_was_waited_for() {
    assert_eq!(WaitError::TimedOut { lsn: Lsn::new(9) }.to_string(), "lsn 9 did not become durable in time");
}

/// An entry with everything that an entry can have.
fn full_entry() -> Entry {
    let (lsn, time) = (Lsn::new(70_000), LogTime::from_nanos(1_800_000_000_123_456_789));
    let value = [&b"\x01name of a file"[..], &lsn.get().to_be_bytes(), &time.row_bytes(), &[0xee]].concat();
    let change = |table, key: &[u8], value| Change { table, key: Bytes::copy_from_slice(key), value };
    Entry {
        lsn,
        time,
        kind: 5,
        caller: Some(Requester { uid: 1000, gid: 100, pid: 70_000 }),
        request: Some(ForwardedRequest { session: 0x1122_3344_5566_7788, sequence: 300 }),
        names: vec![Bytes::from_static(b"name of a file"), Bytes::from_static(b"elsewhere")],
        changes: vec![
            change(1, &70_000u64.to_be_bytes(), Some(Bytes::from(value))),
            change(3, &[&1u64.to_be_bytes()[..], &[0xaa; 8]].concat(), None),
            change(200, &69_000u64.to_be_bytes(), Some(Bytes::new())),
        ],
    }
}

#[test]
fn golden_entry() {
    let (entry, base) = (full_entry(), LogTime::from_nanos(1_800_000_000_123_000_000));
    let mut bytes = Vec::new();
    encode_entry(&entry, base, &mut bytes).unwrap();
    golden("entry.hex", &bytes);
    assert_eq!(decode_entry(&bytes, entry.lsn, base).unwrap(), entry);
}

#[test]
fn golden_frame() {
    golden("frame.hex", History::new(epoch(3), History::origin()).frame(2).bytes());
}

#[test]
fn golden_segment_header_and_mark() {
    let base = State { digest: Digest(9), usage: Usage { inodes: 4, bytes: 5 }, ..History::origin() };
    let secret = LogSecret::from_bytes([0xab; 32]);
    let header = SegmentHeader::plain(VOLUME, BRANCH, epoch(3), base, secret);
    golden("segment_header.hex", &header.encode());
    golden("mark.hex", &header.marks().encode(4096, Lsn::new(70)));
    assert_eq!(SegmentHeader::parse(&header.encode()).unwrap(), header);
}

#[test]
fn golden_row_digest() {
    golden("row_digest.hex", &keys().row_digest(3, b"a key", b"a value").0.to_le_bytes());
}
