//! Tests of the stored form of entries.
//!
//! Invariants:
//! - Every entry within the limits comes back as it was, whatever its bytes.

mod said;

use bytes::Bytes;
use proptest::{collection::vec, option, prelude::*};

use rkyv::rancor;

use super::{
    encode::{push_head, push_varint},
    *,
};
use crate::{
    chain::start_link,
    entry::{Change, ForwardedRequest, Requester},
};

fn lsn() -> Lsn {
    Lsn::new(0x0102_0304_0506_0708)
}

fn time() -> LogTime {
    LogTime::from_nanos(1_800_000_000_123_456_789)
}

/// Bytes in which the tokens of [`lsn`] and [`time`] occur often, whole, cut short and overlapping.
fn tricky_bytes() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(lsn().get().to_be_bytes().to_vec()),
        Just(time().row_bytes().to_vec()),
        (0..9usize).prop_map(|length| time().row_bytes()[..length].to_vec()),
        (0..8usize).prop_map(|length| lsn().get().to_be_bytes()[length..].to_vec()),
        vec(any::<u8>(), 0..12),
        Just(b"name".to_vec()),
    ];
    vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

fn change() -> impl Strategy<Value = Change> {
    let number =
        prop_oneof![Just(lsn().get()), Just(lsn().get() - 3), Just(lsn().get() + 1), any::<u64>(), 0..9u64];
    (any::<u8>(), number, vec(any::<u8>(), 0..20), option::of(tricky_bytes())).prop_map(
        |(table, number, rest, value)| {
            let key = [number.to_be_bytes().to_vec(), rest].concat();
            Change { table, key: key.into(), value: value.map(Bytes::from) }
        },
    )
}

fn entry() -> impl Strategy<Value = Entry> {
    let caller =
        (any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(uid, gid, pid)| Requester { uid, gid, pid });
    let request = (any::<u64>(), any::<u64>());
    let request = request.prop_map(|(session, sequence)| ForwardedRequest { session, sequence });
    let names = vec(prop_oneof![Just(b"name".to_vec()), tricky_bytes()], 0..4);
    (any::<u8>(), option::of(caller), option::of(request), names, vec(change(), 0..6)).prop_map(
        |(kind, caller, request, names, changes)| {
            let names = names.into_iter().map(Bytes::from).collect();
            Entry { lsn: lsn(), time: time(), kind, caller, request, names, changes }
        },
    )
}

fn encoded(entry: &Entry) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_entry(entry, time(), &mut bytes).unwrap();
    bytes
}

fn decoded(bytes: &[u8]) -> Result<Entry, DecodeError> {
    decode_entry(bytes, lsn(), time())
}

proptest! {
    #[test]
    fn an_entry_comes_back_as_it_was(entry in entry()) {
        prop_assert_eq!(decoded(&encoded(&entry)).unwrap(), entry);
    }

    #[test]
    fn damaged_bytes_never_panic(entry in entry(), at in any::<prop::sample::Index>(), with in any::<u8>()) {
        let mut bytes = encoded(&entry);
        let at = at.index(bytes.len());
        bytes[at] ^= with;
        // The frame's checksum catches the damage; here it only must not do harm.
        let _ = decoded(&bytes);
        prop_assert!(decoded(&encoded(&entry)[..at]).is_err());
    }

    #[test]
    fn foreign_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
        let _ = decoded(&bytes);
    }
}

/// A create, as the rows of a file system would have it: 4 of its 5 times and its number are its own.
fn typical() -> Entry {
    let (number, time_bytes) = (lsn().get().to_be_bytes(), time().row_bytes());
    let key = |number: u64, rest: &[u8]| Bytes::from([&number.to_be_bytes()[..], rest].concat());
    let inode = [&[1u8, 2, 3, 4, 5, 6][..], &time_bytes, &time_bytes, &time_bytes, &[1, 0, 0, 9]].concat();
    let dentry = [&b"\x00file.txt"[..], &number].concat();
    let parent = [&[1u8, 0, 0, 77][..], &time_bytes, &time_bytes].concat();
    let change = |table, key, value: Vec<u8>| Change { table, key, value: Some(value.into()) };
    Entry {
        kind: 3,
        caller: Some(Requester { uid: 1000, gid: 1000, pid: 4242 }),
        names: vec![Bytes::from_static(b"file.txt")],
        changes: vec![
            change(1, key(lsn().get(), b""), inode),
            change(3, key(lsn().get() - 9, &[5; 8]), dentry),
            change(2, key(lsn().get() - 9, b""), parent),
        ],
        ..Entry::tick(lsn(), time())
    }
}

#[test]
fn the_tokens_of_a_typical_entry_cost_one_byte_each() {
    let entry = typical();
    let plain: usize =
        entry.changes.iter().map(|c| c.key.len() + c.value.as_ref().map_or(0, Bytes::len)).sum();
    let stored = encoded(&entry);
    assert!(stored.len() <= 75, "{plain} bytes of rows took {}", stored.len());
    assert_eq!(decoded(&stored).unwrap(), entry);
}

#[test]
fn the_head_is_what_rkyv_writes() {
    let archived = rkyv::to_bytes::<rancor::Error>(&Head { time_delta: 0x0102_0304, kind: 7 }).unwrap();
    let mut written = Vec::new();
    push_head(&mut written, 0x0102_0304, 7);
    assert_eq!(archived.as_slice(), written);
}

#[test]
fn limits_are_kept_and_named() {
    let mut out = vec![1];
    let row =
        |length| Change { table: 0, key: Bytes::from_static(&[0; 8]), value: Some(vec![1; length].into()) };
    let mut entry = Entry { changes: vec![row(MAX_ENTRY_BYTES - 100)], ..Entry::tick(lsn(), time()) };
    assert_eq!(decoded(&encoded(&entry)).unwrap(), entry);

    entry.changes = vec![row(MAX_ENTRY_BYTES)];
    let refused = encode_entry(&entry, time(), &mut out);
    assert_eq!(refused, Err(EncodeError::TooLarge { lsn: lsn(), length: MAX_ENTRY_BYTES + 8 }));
    entry.changes = vec![row(0); MAX_CHANGES + 1];
    let refused = encode_entry(&entry, time(), &mut out);
    assert_eq!(refused, Err(EncodeError::TooManyChanges { lsn: lsn(), count: MAX_CHANGES + 1 }));
    entry.changes = vec![Change { table: 9, key: Bytes::from_static(b"short"), value: None }];
    let refused = encode_entry(&entry, time(), &mut out);
    assert_eq!(refused, Err(EncodeError::ShortKey { lsn: lsn(), table: 9 }));
    entry.changes.clear();
    entry.names = vec![Bytes::new(); MAX_NAMES + 1];
    let refused = encode_entry(&entry, time(), &mut out);
    assert_eq!(refused, Err(EncodeError::TooManyNames { lsn: lsn(), count: MAX_NAMES + 1 }));
    let refused =
        encode_entry(&Entry::tick(lsn(), time()), time().after(std::time::Duration::from_nanos(1)), &mut out);
    assert_eq!(refused, Err(EncodeError::TimeOutOfFrame { lsn: lsn() }));
    assert_eq!(out, [1], "a refused entry leaves nothing behind");
}

/// A value of marks alone is nine times as long as its stored form; the plain limit holds all the same.
#[test]
fn marks_cannot_blow_up_an_entry() {
    // Sixty-four marks, each of four times, and nothing left of the value.
    let marked = [&[1u8][..], &[15; 63], &[7]].concat();
    let change = [&[1u8 << 1, 1][..], &marked].concat();
    let mut body = vec![FEW_CHANGES << CHANGES_SHIFT];
    push_varint(&mut body, MAX_CHANGES as u64);
    (0..MAX_CHANGES).for_each(|_| body.extend_from_slice(&change));
    let mut stored = Vec::new();
    push_varint(&mut stored, (body.len() + HEAD_BYTES) as u64);
    stored.extend_from_slice(&body);
    push_head(&mut stored, 0, 1);
    let refused = decoded(&stored).unwrap_err();
    assert!(refused.to_string().contains("more plain bytes than the limit"), "{refused}");
}
