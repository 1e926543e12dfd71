//! Slots: golden bytes, damage, foreign frames.

use bytes::Bytes;
use murphy_log::{ChainHash, FrameError, Lsn, NodeId, Position, conformance::golden};

use super::*;
use crate::testing::Source;

fn slot() -> (Source, Bytes) {
    let mut source = Source::new();
    let frames = source.frames(5, 3);
    let bytes = encode_slot(source.lineage(), NodeId::from_bytes([9; 16]), &frames).unwrap();
    (source, bytes)
}

#[test]
fn a_slot_gives_back_the_frames_it_was_given() {
    let mut source = Source::new();
    let base = source.base().position;
    let frames = source.frames(20, 7);
    let bytes = encode_slot(source.lineage(), NodeId::default(), &frames).unwrap();
    let slot = Slot::decode(&bytes).unwrap();
    assert_eq!(slot.header.end(), frames.last().unwrap().position());
    let back = slot.verify(source.keys(), &base).unwrap();
    assert!(back.iter().zip(&frames).all(|(back, frame)| back.bytes() == frame.bytes()));
    assert_eq!(back.len(), frames.len());
}

/// A restore must not take a bit that rotted, wherever it is.
#[test]
fn every_flipped_bit_of_a_slot_is_found() {
    let (_, bytes) = slot();
    for at in 0..bytes.len() {
        let mut damaged = bytes.to_vec();
        damaged[at] ^= 1 << (at % 8);
        assert!(Slot::decode(&damaged.into()).is_err(), "byte {at}");
    }
}

#[test]
fn a_slot_that_is_cut_anywhere_is_refused() {
    let (_, bytes) = slot();
    for length in 0..bytes.len() {
        assert!(Slot::decode(&bytes.slice(..length)).is_err(), "{length} bytes");
    }
}

/// Whoever can write to the store can make the checksums fit; lengths must still not make us allocate or panic.
#[test]
fn a_hostile_header_with_right_checksums_is_refused() {
    let (_, bytes) = slot();
    for at in (8..HEADER_SUM_AT).step_by(4) {
        for value in [0, 1, 0x7fff_ffff, u32::MAX] {
            let mut hostile = bytes.to_vec();
            hostile[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
            let rest = *blake3::hash(&hostile[SLOT_HEADER_BYTES..]).as_bytes();
            hostile[208..240].copy_from_slice(&rest);
            let sum = short_hash(&hostile[..HEADER_SUM_AT]);
            hostile[HEADER_SUM_AT..SLOT_HEADER_BYTES].copy_from_slice(&sum);
            // The fields that only a history can judge may pass: ids, times, the writer.
            let _ = Slot::decode(&Bytes::from(hostile));
        }
    }
}

#[test]
fn frames_of_another_history_do_not_verify() {
    let (source, bytes) = slot();
    let mut other = source.base().position;
    other.hash = ChainHash::from_bytes([1; 32]);
    let refused = Slot::decode(&bytes).unwrap().verify(source.keys(), &other);
    assert!(matches!(refused, Err(FrameError::Fork { .. })), "{refused:?}");
    let gap = Position { lsn: Lsn::new(9), ..source.base().position };
    let refused = Slot::decode(&bytes).unwrap().verify(source.keys(), &gap);
    assert!(matches!(refused, Err(FrameError::Gap { .. })), "{refused:?}");
}

#[test]
fn a_slot_has_golden_bytes() {
    let (_, bytes) = slot();
    golden("archive_slot.hex", &bytes);
    assert_eq!(Slot::decode(&bytes).unwrap().header.first, Lsn::FIRST);
}

#[test]
fn a_later_format_is_told_from_damage() {
    let (_, bytes) = slot();
    let mut later = bytes.to_vec();
    later[8] = 1;
    assert_eq!(Slot::decode(&later.into()).err(), Some(SlotError::Version { found: 1, known: 0 }));
}

/// One oversized entry must not wedge the stream.
#[test]
fn an_entry_of_the_largest_size_fits_a_slot() {
    let mut source = Source::new();
    let mut frames = source.frames(2, 2);
    frames.push(source.large_frame(murphy_log::MAX_ENTRY_BYTES - 200));
    frames.extend(source.frames(2, 2));
    let bytes = encode_slot(source.lineage(), NodeId::default(), &frames).unwrap();
    let back = Slot::decode(&bytes).unwrap().verify(source.keys(), &source.base().position).unwrap();
    assert!(back.iter().zip(&frames).all(|(back, frame)| back.bytes() == frame.bytes()));
}

proptest::proptest! {
    /// Whatever lies under a slot's name: an error or a slot, never a panic and never more memory than the limits say.
    #[test]
    fn arbitrary_bytes_are_judged_and_not_believed(
        kind in 0..3,
        mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600),
    ) {
        let magic = [SLOT_MAGIC, crate::seal::SEAL_MAGIC, *b"whatever"][kind as usize];
        let length = bytes.len().min(magic.len());
        bytes[..length].copy_from_slice(&magic[..length]);
        proptest::prop_assert!(crate::seal::Occupant::decode(&bytes.clone().into()).is_err());
        proptest::prop_assert!(crate::document::decode::<crate::registry::StoredRecord>("registry", &bytes).is_err());
    }
}
