//! What peers send and people write: wire messages, tokens, moments, URLs of stores.

use bytes::Bytes;
use jiff::tz::TimeZone;
use murphy_backup::{Target as Moment, show_time};
use murphy_fs::{MemberRole, PackName, ParseStoreUrlError, StoreUrl, WriterId};
use murphy_log::{
    BranchId, Epoch, EpochId, Frame, LogTime, Lsn, NodeId, State, VolumeId,
    conformance::{History, epoch},
};
use murphy_mirror::{
    Ack, Admitted, Ask, Frames, HEADER_BYTES, Heartbeat, Hello, LendRequest, Lookup, Message, PackReply,
    PackRequest, Point, Proof, PublicKey, Redeem, Refusal, Refused, Resume, Seal, Sealed, Secret, SeedPart,
    SeedReason, Stands, TOKEN_PREFIX, Token, Verdict, Voucher, Welcome,
};

use crate::{PLACES, SMALL, Target, seal};

pub(crate) fn targets() -> Vec<Target> {
    vec![
        Target {
            name: "message",
            run: message,
            seeds: message_seeds,
            hostile: Vec::new,
            places: PLACES,
            reseal: |bytes| reseal_message(bytes),
            // The bodies of a run, expanded, and once more as frames.
            allowance: 2 * murphy_mirror::MAX_RUN_BYTES + (8 << 20),
        },
        Target {
            name: "token",
            run: token,
            seeds: token_seeds,
            hostile: Vec::new,
            places: PLACES,
            reseal: reseal_token,
            allowance: SMALL,
        },
        Target {
            name: "time",
            run: time,
            seeds: time_seeds,
            hostile: Vec::new,
            // A moment that cannot be meant is wrong as a whole, and shown.
            places: &["byte #", "give an offset", "give #", "in the future", "with ago"],
            reseal: |_| (),
            allowance: 1 << 20,
        },
        Target {
            name: "url",
            run: url,
            seeds: url_seeds,
            hostile: Vec::new,
            // What is wrong is named as the part of the URL that it is; a text with a secret in it is not quoted.
            places: URL_PARTS,
            reseal: |_| (),
            allowance: SMALL,
        },
    ]
}

fn message(bytes: &[u8]) -> Result<(), String> {
    let shared = Bytes::copy_from_slice(bytes);
    let message = Message::decode(&shared).map_err(|error| {
        let text = error.to_string();
        assert!(text.contains("offset "), "a message's refusal names the offset: {text}");
        text
    })?;
    let again = Bytes::from(message.encode());
    match (&message, Message::decode(&again).expect("what was encoded decodes")) {
        // Runs may be compressed on the way.
        (Message::Frames(one), Message::Frames(two)) => {
            assert_eq!(one.durable_lsn, two.durable_lsn);
            let same = one.run.iter().zip(&two.run).all(|(one, two)| one.bytes() == two.bytes());
            assert!(same && one.run.len() == two.run.len(), "frames that change on the way");
        }
        _ => assert_eq!(again, shared, "a message with two forms"),
    }
    Ok(())
}

fn message_seeds() -> Vec<Vec<u8>> {
    let origin = History::origin();
    let mut history = History::new(epoch(3), origin);
    let mut frames =
        |count: usize, entries| -> Vec<Frame> { (0..count).map(|_| history.frame(entries)).collect() };
    let run = |frames: &[Frame]| Frames::of(Lsn::new(2), frames).expect("frames of one history");
    let point = Point { lsn: Lsn::new(7), hash: origin.position.hash };
    let (volume, branch, node) =
        (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]), NodeId::from_bytes([3; 16]));
    let hello = |resume, promised| {
        Message::Hello(Hello { volume, branch, node, resume, data_lsn: Lsn::ROOT, promised })
    };
    let welcome = |verdict| {
        let (state, epoch, first) = (origin, epoch(3), Lsn::FIRST);
        Message::Welcome(Welcome { volume, branch, node, state, epoch, first, verdict })
    };
    let next = Epoch { number: 4, id: EpochId::from_bytes([9; 16]) };
    let mut messages = vec![
        hello(Resume::Fresh, None),
        hello(Resume::After(origin.position), Some(next)),
        hello(Resume::From(Lsn::new(4)), None),
        welcome(Verdict::Tail),
        welcome(Verdict::Seed(SeedReason::Trimmed)),
        Message::Frames(run(&frames(2, 3))),
        Message::Frames(run(&frames(40, 12))),
        Message::Ack(Ack { position: origin.position, data_lsn: Lsn::ROOT }),
        Message::Heartbeat(Heartbeat { state: origin, time: LogTime::from_nanos(5) }),
        Message::Probe { lsn: Lsn::new(9) },
        Message::Probed { lsn: Lsn::new(9), found: Lookup::End(point) },
        Message::Probed { lsn: Lsn::new(9), found: Lookup::Inside { before: point, end: point } },
        Message::Probed { lsn: Lsn::new(9), found: Lookup::Trimmed { first: Lsn::new(20) } },
        Message::SeedOffer { state: origin },
        Message::SeedPart(SeedPart { index: 3, length: 100 }),
        Message::SeedDone { parts: 4, bytes: 1 << 20 },
        Message::PackRequest(PackRequest {
            pack: PackName::new(WriterId::from_u64(7), 1),
            offset: 5,
            length: 10,
        }),
        Message::PackReply(PackReply::Found(Bytes::from_static(b"bytes"))),
        Message::PackReply(PackReply::Missing),
        Message::PackReply(PackReply::Failed("gone".to_owned())),
        Message::Refused(Refused { reason: Refusal::BadFrame, detail: "at lsn 5".to_owned() }),
    ];
    messages.extend(member_messages((volume, branch), next, origin));
    messages.push(Message::LendRequest(LendRequest { after: point, to: Lsn::new(9) }));
    let mut seeds: Vec<Vec<u8>> = messages.iter().map(Message::encode).collect();
    // An announcement: where a member listens, and what its copy dies with.
    let body = [&[1, 3, 0][..], b"h:1", &[1, 2, 0], b"m7"].concat();
    seeds.push([&(body.len() as u32).to_le_bytes()[..], &[0, 18, 0, 0], &body].concat());
    seeds
}

/// What is said of who belongs to a volume, and who may lead it.
fn member_messages((volume, branch): (VolumeId, BranchId), next: Epoch, origin: State) -> Vec<Message> {
    let addresses = vec!["10.0.0.1:7000".to_owned(), "h:1".to_owned()];
    let (by, member) = (PublicKey::from_bytes([7; 32]), PublicKey::from_bytes([8; 32]));
    let (role, lsn, signature) = (MemberRole::Mirror, Lsn::new(70), [9; 64]);
    let proof = Proof::new(vec![Voucher { by, member, role, epoch: epoch(3), lsn, signature }; 2]);
    let sealed = |state: Option<State>| {
        Message::Sealed(Sealed { epoch: next, state, data_lsn: Lsn::ROOT, heard_lsn: Lsn::new(9) })
    };
    vec![
        Message::Redeem(Redeem {
            secret: Secret::from_bytes([5; 32]),
            name: "berlin".to_owned(),
            addresses,
            promised: Some(next),
        }),
        Message::Admitted(Admitted { volume, branch, role: MemberRole::Writer, proof: proof.clone() }),
        Message::Seal(Seal { volume, branch, epoch: next, proof, leads: vec!["host:7000".to_owned()] }),
        sealed(None),
        sealed(Some(origin)),
        Message::Ask(Ask { volume, branch, epoch: None }),
        Message::Ask(Ask { volume, branch, epoch: Some(next) }),
        Message::Stands(Stands { state: None, data_lsn: Lsn::ROOT, heard_lsn: Lsn::ROOT, promised: None }),
        Message::Stands(Stands {
            state: Some(origin),
            data_lsn: Lsn::ROOT,
            heard_lsn: Lsn::new(9),
            promised: Some(next),
        }),
    ]
}

/// The length of the body, and the checksums of frames that travel as they are.
fn reseal_message(bytes: &mut [u8]) {
    let Some(body) = bytes.len().checked_sub(HEADER_BYTES) else { return };
    bytes[..4].copy_from_slice(&(body as u32).to_le_bytes());
    seal::frames(&mut bytes[HEADER_BYTES..]);
}

fn token(bytes: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(bytes);
    let token = Token::parse(&text).map_err(|error| error.to_string())?;
    let again = token.to_text().expect("what was parsed is a token");
    let written: String = text.split_whitespace().collect();
    assert_eq!(again, written, "a token with two forms");
    assert!(!format!("{token:?}").contains("secret: "), "a secret is shown");
    Ok(())
}

fn token_seeds() -> Vec<Vec<u8>> {
    let token = |addresses: &[&str], role| {
        let token = Token {
            addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
            volume: VolumeId::from_bytes([1; 16]),
            branch: BranchId::from_bytes([2; 16]),
            source_key: PublicKey::from_bytes([3; 32]),
            secret: Secret::from_bytes([0x5a; 32]),
            role,
            expires: LogTime::from_nanos(1 << 60),
        };
        token.to_text().expect("it is within the limits").into_bytes()
    };
    vec![
        token(&["10.0.0.1:7000"], MemberRole::Mirror),
        token(&["10.0.0.1:7000", "source.example:7000", "[::1]:9"], MemberRole::Observer),
    ]
}

/// The checksum in the last four bytes of a token.
fn reseal_token(bytes: &mut Vec<u8>) {
    let Some(digits) = bytes.strip_prefix(TOKEN_PREFIX.as_bytes()) else { return };
    let value = |digit: &u8| ALPHABET.iter().position(|known| known == digit);
    let Some(values) = digits.iter().map(value).collect::<Option<Vec<usize>>>() else { return };
    let bits = values.iter().flat_map(|value| (0..6).rev().map(move |bit| value >> bit & 1));
    let bits: Vec<usize> = bits.collect();
    let mut plain: Vec<u8> =
        bits.chunks_exact(8).map(|bits| bits.iter().fold(0, |byte, bit| byte << 1 | *bit as u8)).collect();
    let Some(at) = plain.len().checked_sub(4) else { return };
    let sum: [u8; 4] = seal::short(&[&plain[..at]]);
    plain[at..].copy_from_slice(&sum);
    let bits: Vec<u8> = plain.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    let digit = |bits: &[u8]| {
        let value = bits.iter().fold(0, |value, bit| value << 1 | bit) << (6 - bits.len());
        ALPHABET[usize::from(value)]
    };
    *bytes = TOKEN_PREFIX.bytes().chain(bits.chunks(6).map(digit)).collect();
}

/// 2026-11-01T12:00:00Z, the day on which clocks are set back in the zone below.
const NOW: LogTime = LogTime::from_nanos(1_793_534_400_000_000_000);

fn time(bytes: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(bytes);
    let zone = TimeZone::posix("EST5EDT,M3.2.0,M11.1.0").expect("a zone");
    let utc = Moment::parse_at(&text, NOW, &TimeZone::UTC);
    let here = Moment::parse_at(&text, NOW, &zone);
    if let Ok(Moment::At(time)) = here {
        assert!(time <= NOW, "{text:?} is in the future");
        let shown = show_time(time, &zone);
        assert_eq!(Moment::parse_at(&shown, NOW, &TimeZone::UTC), here, "{text:?} is shown as {shown}");
    }
    utc.and(here).map(drop).map_err(|error| {
        let shown = error.to_string();
        assert!(shown.len() <= 8 * text.len() + 200);
        // The text that was given may look like anything.
        shown.rsplit('"').next().unwrap_or(&shown).to_owned()
    })
}

fn time_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "2026-10-31T12:00:00Z",
        "2026-10-31T14:00:00.123456789+02:00",
        "2026-10-31 08:00",
        "2026-10-31T08:00:00",
        "2026-10-31T08:00:00[America/New_York]",
        "2026-10-31T08:00:00-04:00[-04:00]",
        "@1793448000",
        "@1793448000.5",
        "24h ago",
        "10m ago",
        "2 days 3h ago",
        "-PT5M",
        "1 year 2 months 3 weeks ago",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

fn url(bytes: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(bytes);
    let url: StoreUrl = text.parse().map_err(|error: ParseStoreUrlError| error.to_string())?;
    let shown = url.to_string();
    let again: StoreUrl =
        shown.parse().unwrap_or_else(|error| panic!("{text:?} prints as {shown:?}: {error}"));
    assert_eq!(again, url, "{text:?} prints as {shown:?}");
    Ok(())
}

fn url_seeds() -> Vec<Vec<u8>> {
    let texts = [
        "file:///srv/blocks",
        "file:///srv/with%20space/%3F?domain=rack-7",
        "s3://bucket/prefix?region=eu-central-1&credentials=env:B_",
        "s3://bucket?endpoint=http://127.0.0.1:9000/&region=x",
        "s3://bucket/a/b?endpoint=https://s3.example.com&allow_http=true&credentials=file:/etc/murphy/b",
        "gs://bucket/prefix",
        "az://container/prefix?account=acct",
    ];
    texts.map(|text| text.as_bytes().to_vec()).to_vec()
}

/// What a refused URL is told by.
const URL_PARTS: &[&str] = &[
    "option ",
    "host",
    "port number",
    " address)",
    "domain",
    "without a base",
    "reached by",
    "names a bucket",
    "absolute path",
    "the prefix of",
    "no part after",
    "before the @",
    "http endpoint",
];
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
