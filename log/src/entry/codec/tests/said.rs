//! Tests of what an entry leaves out because an entry before it in its frame has said it.
//!
//! Invariants:
//! - Whatever rows follow each other, a frame gives back the entries that it was made of, and the same chain as frames of one
//!   entry each.

use proptest::{collection::vec, prelude::*, sample::Index};

use super::*;
use crate::{ChainHash, VolumeKeys, conformance::VOLUME};

/// How a value comes about from that of the row before it.
#[derive(Clone, Debug)]
enum Step {
    Same,
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Cut(Index, usize),
    Tokens,
    New(Vec<u8>),
    Gone,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Same),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Step::Set(at, byte)),
        (any::<Index>(), vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Step::Insert(at, bytes)),
        (any::<Index>(), 1..30usize).prop_map(|(at, length)| Step::Cut(at, length)),
        Just(Step::Tokens),
        vec(0..3u8, 0..160).prop_map(Step::New),
        Just(Step::Gone),
    ]
}

impl Step {
    fn apply(self, value: &mut Vec<u8>, lsn: Lsn, time: LogTime) -> Option<Bytes> {
        match self {
            Step::Same => {}
            Step::Set(at, byte) if !value.is_empty() => {
                let at = at.index(value.len());
                value[at] = byte;
            }
            Step::Set(..) => {}
            Step::Insert(at, bytes) => {
                let at = at.index(value.len() + 1);
                value.splice(at..at, bytes);
            }
            Step::Cut(at, length) => {
                let at = at.index(value.len() + 1);
                value.drain(at..value.len().min(at + length));
            }
            Step::Tokens => {
                let at = value.len() / 2;
                value.splice(at..at, [&time.row_bytes()[..], &lsn.get().to_be_bytes()].concat());
            }
            Step::New(bytes) => *value = bytes,
            Step::Gone => return None,
        }
        value.truncate(200);
        Some(Bytes::from(value.clone()))
    }
}

/// Entries whose rows come from each other: some of the same key, some of the same table, some of neither.
fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let change = (prop_oneof![1..4u8, Just(200)], 0..4u64, prop_oneof![0..1usize, 0..40usize], step());
    vec(vec(change, 0..5), 1..30).prop_map(|entries| {
        let mut values = std::collections::HashMap::<u8, Vec<u8>>::new();
        let first = lsn();
        let entry = |(index, changes): (usize, Vec<(u8, u64, usize, Step)>)| {
            let (lsn, time) =
                (first.advanced(index as u64), LogTime::from_nanos(time().as_nanos() + index as u64));
            let change = |(table, number, rest, step): (u8, u64, usize, Step)| {
                let key = [&number.to_be_bytes()[..], &vec![7; rest]].concat();
                let value = step.apply(values.entry(table).or_default(), lsn, time);
                Change { table, key: key.into(), value }
            };
            let changes = changes.into_iter().map(change).collect();
            Entry { kind: 3, changes, ..Entry::tick(lsn, time) }
        };
        entries.into_iter().enumerate().map(entry).collect()
    })
}

/// What a frame stores of these entries.
fn body(entries: &[Entry]) -> Vec<u8> {
    let (mut said, mut encoded, mut out) = (Said::default(), EncodedBody::default(), Vec::new());
    for entry in entries {
        let mut body = Vec::new();
        encoded.encode(entry, &mut body).unwrap();
        let delta = (entry.time.as_nanos() - time().as_nanos()) as u32;
        let before = out.len();
        encoded.push_stored(entry, &body, delta, &mut said, &mut out);
        assert!(out.len() - before <= body.len() + HEAD_BYTES + 3 + entry.changes.len());
    }
    out
}

fn read(body: &[u8], count: usize) -> Result<Vec<Entry>, DecodeError> {
    let mut stored = StoredEntries::new(body, lsn(), time());
    let entries = (0..count).map(|_| stored.next_entry()).collect::<Result<_, _>>()?;
    stored.finish()?;
    Ok(entries)
}

/// The chain hashes after each entry.
fn chain(body: &[u8], count: usize) -> Result<Vec<ChainHash>, DecodeError> {
    let (keys, mut hash, mut link) = (VolumeKeys::derive(VOLUME), ChainHash::default(), Vec::new());
    let mut stored = StoredEntries::new(body, lsn(), time());
    let mut next = || {
        stored.next_link(&hash, &mut link)?;
        hash = keys.chained(&link);
        Ok(hash)
    };
    (0..count).map(|_| next()).collect()
}

proptest! {
    #[test]
    fn a_frame_gives_back_its_entries(entries in entries()) {
        prop_assert_eq!(read(&body(&entries), entries.len()).unwrap(), entries);
    }

    #[test]
    fn what_is_left_out_changes_no_hash(entries in entries()) {
        let (keys, mut hash, mut link) = (VolumeKeys::derive(VOLUME), ChainHash::default(), Vec::new());
        let mut expected = Vec::new();
        for entry in &entries {
            start_link(&mut link, &hash, entry.lsn, entry.time, entry.kind);
            EncodedBody::default().encode(entry, &mut link).unwrap();
            hash = keys.chained(&link);
            expected.push(hash);
        }
        prop_assert_eq!(chain(&body(&entries), entries.len()).unwrap(), expected);
    }

    #[test]
    fn a_damaged_frame_never_panics(
        entries in entries(),
        flips in vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        let mut body = body(&entries);
        for (at, with) in flips {
            let at = at.index(body.len());
            body[at] ^= with;
        }
        // The checksum of the frame finds the damage; whoever forges that too gets entries, or an error, and no more.
        let _ = chain(&body, entries.len());
        if let Ok(entries) = read(&body, entries.len()) {
            prop_assert!(entries.iter().all(|entry| entry.changes.len() <= MAX_CHANGES));
        }
    }
}

/// What a row of an inode takes that differs in its mode and one time from what the frame has said of it.
#[test]
fn a_row_that_was_written_a_moment_ago_costs_what_differs() {
    let created = typical();
    let mut changed =
        Entry { names: Vec::new(), changes: vec![created.changes[0].clone()], ..created.clone() };
    (changed.lsn, changed.time) = (lsn().next(), LogTime::from_nanos(time().as_nanos() + 1_000));
    let mut value = created.changes[0].value.as_ref().unwrap().to_vec();
    value[2] = 9;
    value[15..24].copy_from_slice(&changed.time.row_bytes());
    changed.changes[0].value = Some(value.into());
    let (one, both) = (body(std::slice::from_ref(&created)), body(&[created.clone(), changed.clone()]));
    assert!(both.len() - one.len() <= 18, "{} bytes", both.len() - one.len());
    assert_eq!(read(&both, 2).unwrap(), [created, changed]);
}

/// Bytes of an entry with one change that is said by another.
fn stored_change(change: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    push_varint(&mut out, (1 + change.len() + HEAD_BYTES) as u64);
    out.push(1 << CHANGES_SHIFT);
    out.extend_from_slice(change);
    push_head(&mut out, 0, 3);
    out
}

#[test]
fn a_reference_to_nothing_and_a_patch_beyond_its_value_are_refused_with_their_place() {
    // Table 1, key 5, a value of four bytes; then the same row by it: 'take 2, write 1' fits, 'take 4, write 1' does not.
    let written = stored_change(&[9 << 1, 5, 4 << 1, 1, 2, 3, 4]);
    let frame = |change: &[u8]| [written.clone(), stored_change(change)].concat();
    let said = read(&frame(&[1, 4 << 1, 0x21, 9, 0]), 2).unwrap();
    assert_eq!(said[1].changes[0].value.as_deref(), Some(&[1, 2, 9, 4][..]));
    assert_eq!(said[1].changes[0].key, said[0].changes[0].key);

    let refused = |change: &[u8], what: &str| {
        let (entries, chain) = (read(&frame(change), 2).unwrap_err(), chain(&frame(change), 2).unwrap_err());
        assert_eq!(entries, chain);
        assert!(entries.to_string().contains(what) && entries.to_string().contains("at byte"), "{entries}");
    };
    refused(&[1, 4 << 1, 0x41, 9], "a patch beyond its value");
    refused(&[1 | 1 << 2, 4 << 1, 0], "a row that is not remembered");
    refused(&[3, 2 << 3 | 1, 6, 4 << 1, 0], "said by one of another table");
    refused(&[1, 0x82, 0x02, 0], "a patch of a value that is too long");
}
