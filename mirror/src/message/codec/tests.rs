//! Messages on the wire: golden bytes, damage, hostile lengths.

use murphy_fs::MemberRole;
use murphy_log::{ChainHash, Digest, Epoch, EpochId, Frame, FrameError, Lsn, Position, State, Usage};
use proptest::prelude::*;

use super::*;
use crate::{
    history::Point,
    identity::PublicKey,
    message::Message,
    tests::{base_state, test_frames},
    vouch::{Proof, Voucher},
};

fn epoch() -> Epoch {
    Epoch { number: 3, id: EpochId::from_bytes([0xe1; 16]) }
}

fn state() -> State {
    let position =
        Position { epoch: epoch(), lsn: Lsn::new(0x0102), hash: ChainHash::from_bytes([0xcc; 32]) };
    State { position, digest: Digest(0x0d), usage: Usage { inodes: 5, bytes: 6 } }
}

fn point(lsn: u64) -> Point {
    Point { lsn: Lsn::new(lsn), hash: ChainHash::from_bytes([0xcd; 32]) }
}

fn run(count: usize, size: usize) -> Vec<Frame> {
    test_frames(base_state(), 1, count, size)
}

fn proof() -> Proof {
    let key = |byte| PublicKey::from_bytes([byte; 32]);
    let (role, lsn, signature) = (MemberRole::Writer, Lsn::new(0x99), [6; 64]);
    Proof::new(vec![Voucher { by: key(4), member: key(5), role, epoch: epoch(), lsn, signature }])
}

/// One of every kind, and every variant of each.
fn messages() -> Vec<Message> {
    let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
    let node = NodeId::from_bytes([3; 16]);
    let hello = |resume, promised| {
        Message::Hello(Hello { volume, branch, node, resume, data_lsn: Lsn::new(9), promised })
    };
    let welcome = |verdict| {
        let (state, epoch, first) = (state(), Epoch { number: 4, ..epoch() }, Lsn::new(4));
        Message::Welcome(Welcome { volume, branch, node, state, epoch, first, verdict })
    };
    let probed = |found| Message::Probed { lsn: Lsn::new(7), found };
    let pack = PackName::new(WriterId::from_u64(0x11), 0x22);
    let proof = proof();
    vec![
        hello(Resume::Fresh, None),
        hello(Resume::After(state().position), Some(epoch())),
        hello(Resume::From(Lsn::new(77)), None),
        welcome(Verdict::Tail),
        welcome(Verdict::Seed(SeedReason::Fresh)),
        welcome(Verdict::Seed(SeedReason::Trimmed)),
        welcome(Verdict::Diverged),
        Message::Frames(Frames::of(Lsn::new(8), &run(3, 2)).unwrap()),
        Message::Frames(Frames::of(Lsn::new(8), &run(40, 20)).unwrap()),
        Message::Ack(Ack { position: state().position, data_lsn: Lsn::new(1) }),
        Message::Heartbeat(Heartbeat { state: state(), time: LogTime::from_nanos(0x55) }),
        Message::Probe { lsn: Lsn::new(0x66) },
        probed(Lookup::End(point(7))),
        probed(Lookup::Inside { before: point(5), end: point(9) }),
        probed(Lookup::Trimmed { first: Lsn::new(70) }),
        probed(Lookup::Beyond { durable: Lsn::new(6) }),
        Message::SeedOffer { state: state() },
        Message::SeedPart(SeedPart { index: 2, length: 4096 }),
        Message::SeedDone { parts: 3, bytes: 0x0a0b },
        Message::PackRequest(PackRequest { pack, offset: 0x33, length: 0x44 }),
        Message::PackReply(PackReply::Found(Bytes::from_static(b"pack bytes"))),
        Message::PackReply(PackReply::Missing),
        Message::PackReply(PackReply::Failed("down".to_owned())),
        Message::Refused(Refused { reason: Refusal::UsedInvitation, detail: "no".to_owned() }),
        Message::Redeem(Redeem {
            secret: Secret::from_bytes([0x77; 32]),
            name: "n".to_owned(),
            addresses: vec!["h:1".to_owned(), "i:2".to_owned()],
            promised: Some(epoch()),
        }),
        Message::Admitted(Admitted { volume, branch, role: MemberRole::Observer, proof: Proof::default() }),
        Message::Admitted(Admitted { volume, branch, role: MemberRole::Mirror, proof: proof.clone() }),
        Message::Seal(Seal { volume, branch, epoch: epoch(), proof: Proof::default(), leads: Vec::new() }),
        Message::Seal(Seal { volume, branch, epoch: epoch(), proof, leads: vec!["h:1".to_owned()] }),
        Message::Sealed(Sealed {
            epoch: epoch(),
            state: Some(state()),
            data_lsn: Lsn::new(1),
            heard_lsn: Lsn::new(2),
        }),
        Message::Sealed(Sealed { epoch: epoch(), state: None, data_lsn: Lsn::ROOT, heard_lsn: Lsn::ROOT }),
        Message::Announce(Announce { addresses: vec!["h:1".to_owned()], domains: vec!["d".to_owned()] }),
        Message::Ask(Ask { volume, branch, epoch: Some(epoch()) }),
        Message::Ask(Ask { volume, branch, epoch: None }),
        Message::Stands(Stands {
            state: Some(state()),
            data_lsn: Lsn::new(1),
            heard_lsn: Lsn::new(2),
            promised: Some(epoch()),
        }),
        Message::Stands(Stands { state: None, data_lsn: Lsn::ROOT, heard_lsn: Lsn::ROOT, promised: None }),
        Message::LendRequest(LendRequest { after: point(7), to: Lsn::new(0x88) }),
    ]
}

#[test]
fn every_message_survives_encoding() {
    for message in messages() {
        let bytes = Bytes::from(message.encode());
        let again = Message::decode(&bytes).unwrap();
        assert_eq!(again.encode(), bytes, "{}", message.name());
        // Secrets and frames do not compare; their bytes do.
        assert_eq!(format!("{again:?}").len(), format!("{message:?}").len());
    }
}

#[test]
fn a_long_run_is_compressed_and_a_short_one_is_not() {
    let encoded = |count, size| {
        let frames = run(count, size);
        let stored: usize = frames.iter().map(|frame| frame.bytes().len()).sum();
        (Message::Frames(Frames::of(Lsn::new(8), &frames).unwrap()).encode(), stored)
    };
    let (short, stored) = encoded(3, 2);
    assert_eq!((short[16], short.len()), (0, 21 + stored));
    let (long, stored) = encoded(40, 20);
    assert_eq!(long[16], 1);
    assert!(long.len() < stored / 2, "{} of {stored}", long.len());
}

/// The layouts of `docs/formats/wire.md`. Whoever changes one of these changes the protocol.
#[test]
fn the_bytes_of_the_messages_do_not_change() {
    let position = [&[3, 0, 0, 0][..], &[0xe1; 16], &[2, 1, 0, 0, 0, 0, 0, 0], &[0xcc; 32]].concat();
    let numbers = |list: &[u64]| list.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
    let state = [&position[..], &[0x0d], &[0; 15], &numbers(&[5, 6])].concat();
    let ids = [[1; 16], [2; 16], [3; 16]].concat();
    let framed =
        |kind: u8, body: Vec<u8>| [&(body.len() as u32).to_le_bytes()[..], &[0, kind, 0, 0], &body].concat();
    let epoch = &position[..20];
    let leads = [&[4, 0, 0, 0][..], &[0xe1; 16]].concat();
    let proof = [&[1][..], &[4; 32], &[5; 32], &[1], epoch, &[0x99, 0, 0, 0, 0, 0, 0, 0], &[6; 64]].concat();
    let mut messages = messages();
    messages.retain(|message| !matches!(message, Message::Frames(_)));
    let point = |lsn| [numbers(&[lsn]), vec![0xcd; 32]].concat();
    let golden = [
        framed(1, [&ids[..], &[0], &numbers(&[9]), &[0]].concat()),
        framed(1, [&ids[..], &[1], &position, &numbers(&[9]), &[1], epoch].concat()),
        framed(1, [&ids[..], &[2], &numbers(&[77, 9]), &[0]].concat()),
        framed(2, [&ids[..], &state, &leads, &numbers(&[4]), &[0]].concat()),
        framed(2, [&ids[..], &state, &leads, &numbers(&[4]), &[1]].concat()),
        framed(2, [&ids[..], &state, &leads, &numbers(&[4]), &[2]].concat()),
        framed(2, [&ids[..], &state, &leads, &numbers(&[4]), &[3]].concat()),
        framed(4, [&position[..], &numbers(&[1])].concat()),
        framed(5, [&state[..], &numbers(&[0x55])].concat()),
        framed(6, numbers(&[0x66])),
        framed(7, [&numbers(&[7])[..], &[0], &point(7)].concat()),
        framed(7, [&numbers(&[7])[..], &[1], &point(5), &point(9)].concat()),
        framed(7, [&numbers(&[7])[..], &[2], &numbers(&[70])].concat()),
        framed(7, [&numbers(&[7])[..], &[3], &numbers(&[6])].concat()),
        framed(8, state.clone()),
        framed(9, vec![2, 0, 0, 0, 0, 16, 0, 0]),
        framed(10, [&[3, 0, 0, 0][..], &numbers(&[0x0a0b])].concat()),
        framed(11, [&numbers(&[0x11, 0x22, 0x33])[..], &[0x44, 0, 0, 0]].concat()),
        framed(12, b"\0pack bytes".to_vec()),
        framed(12, vec![1]),
        framed(12, b"\x02\x04\0down".to_vec()),
        framed(13, b"\x09\x02\0no".to_vec()),
        framed(14, [&[0x77; 32][..], b"\x01\0n\x02\x03\0h:1\x03\0i:2", &[1], epoch].concat()),
        framed(15, [&ids[..32], &[2, 0]].concat()),
        framed(15, [&ids[..32], &[0], &proof].concat()),
        framed(16, [&ids[..32], epoch, &[0, 0]].concat()),
        framed(16, [&ids[..32], epoch, &proof, b"\x01\x03\0h:1"].concat()),
        framed(17, [epoch, &[1], &state, &numbers(&[1, 2])].concat()),
        framed(17, [epoch, &[0], &numbers(&[1, 1])].concat()),
        framed(18, b"\x01\x03\0h:1\x01\x01\0d".to_vec()),
        framed(19, [&ids[..32], &[1], epoch].concat()),
        framed(19, [&ids[..32], &[0]].concat()),
        framed(20, [&[1], &state[..], &numbers(&[1, 2]), &[1], epoch].concat()),
        framed(20, [&[0], &numbers(&[1, 1])[..], &[0]].concat()),
        framed(21, [&point(7)[..], &numbers(&[0x88])].concat()),
    ];
    assert_eq!(messages.len(), golden.len());
    for (message, golden) in messages.iter().zip(golden) {
        assert_eq!(message.encode(), golden, "{message:?}");
    }
    let frames = run(2, 1);
    let run = [&frames[0].bytes()[..], frames[1].bytes()].concat();
    let golden = framed(3, [&numbers(&[8])[..], &[0, 2, 0, 0, 0], &run].concat());
    assert_eq!(Message::Frames(Frames::of(Lsn::new(8), &frames).unwrap()).encode(), golden);
}

/// A peer may send anything: it gets an error that names message and offset, and nothing else happens.
#[test]
fn cut_and_damaged_messages_are_refused_without_harm() {
    for message in messages() {
        let bytes = message.encode();
        for end in 0..bytes.len().min(700) {
            let mut cut = bytes[..end].to_vec();
            let error = Message::decode(&Bytes::from(cut.clone()));
            if matches!(message, Message::PackReply(PackReply::Found(_))) && end > 8 {
                continue;
            }
            assert!(error.is_err(), "{} cut at {end}", message.name());
            // Also with a header that agrees with the cut.
            if end >= 8 {
                let length = (end - 8) as u32;
                cut[..4].copy_from_slice(&length.to_le_bytes());
                assert!(Message::decode(&Bytes::from(cut)).is_err(), "{} cut to {end}", message.name());
            }
        }
        for at in 0..bytes.len().min(700) {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                // Either it is refused, or it is another message; it never panics.
                if let Ok(other) = Message::decode(&Bytes::from(damaged)) {
                    assert!(
                        !matches!(other, Message::Frames(_)) || (8..16).contains(&at),
                        "frames, byte {at}"
                    );
                }
            }
        }
    }
}

#[test]
fn lengths_are_refused_before_anything_is_allocated() {
    let header = |length: u32, kind| {
        let [a, b, c, d] = length.to_le_bytes();
        MessageHeader::parse(&[a, b, c, d, 0, kind, 0, 0])
    };
    assert!(
        header(u32::MAX, 3).is_err_and(|error| error.to_string().starts_with("frames message, offset 0"))
    );
    assert!(header(513, 1).is_err());
    assert!(header(512, 1).is_ok());
    assert_eq!(header(0, 99).unwrap_err().what, MessageFault::Kind(99));
    let version = MessageHeader::parse(&[0, 0, 0, 0, 1, 1, 0, 0]).unwrap_err();
    assert_eq!(version.what, MessageFault::Version(1));
}

#[test]
fn an_error_names_the_message_and_the_offset() {
    let mut bytes = messages()[1].encode();
    bytes[8 + 48] = 9;
    let error = Message::decode(&Bytes::from(bytes)).unwrap_err();
    assert_eq!(error.to_string(), "hello message, offset 48: impossible resume");
    let mut frames = Message::Frames(Frames::of(Lsn::new(8), &run(2, 1)).unwrap()).encode();
    *frames.last_mut().unwrap() ^= 1;
    let error = Message::decode(&Bytes::from(frames)).unwrap_err();
    assert!(matches!(error.what, MessageFault::Frame(FrameError::Checksum { .. })), "{error}");
}

/// Compressed bodies that claim to be longer than a run may be are never unpacked.
#[test]
fn a_decompression_bomb_is_refused() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let frame = &run(1, 1)[0];
    let mut body = Lsn::new(8).get().to_le_bytes().to_vec();
    body.extend([1, 1, 0, 0, 0]);
    body.extend_from_slice(&frame.header().encode());
    body.extend_from_slice(&bomb);
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend([0, 3, 0, 0]);
    bytes.extend(body);
    let error = Message::decode(&Bytes::from(bytes)).unwrap_err();
    assert_eq!(error.what, MessageFault::Field("compressed bodies"));
}

proptest! {
    #[test]
    fn no_bytes_panic(kind in 0u8..23, body in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend([0, kind, 0, 0]);
        bytes.extend(body);
        let bytes = Bytes::from(bytes);
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert_eq!(Bytes::from(message.encode()), bytes);
        }
    }
}
