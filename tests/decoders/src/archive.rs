//! The decoders of archives: slots, seals, and the documents that people can read.

use bytes::Bytes;
use murphy_backup::{
    BaseManifest, Descriptor, Lineage, Occupant, Proof, SEAL_BYTES, SLOT_HEADER_BYTES, Seal, Slot,
    SlotHeader, StoredRecord, encode_slot,
};
use murphy_log::{
    FRAME_HEADER_BYTES, FrameHeader, MAX_FRAME_BYTES, NodeId, VolumeKeys,
    conformance::{BRANCH, History, VOLUME, epoch},
};

use crate::{PLACES, SMALL, Target, golden, seal};

pub(crate) fn targets() -> Vec<Target> {
    let document = |name, run, seeds, reseal| Target {
        name,
        run,
        seeds,
        hostile: hostile_records,
        places: PLACES,
        reseal,
        allowance: SMALL,
    };
    vec![
        Target {
            name: "slot",
            run: slot,
            seeds: slot_seeds,
            hostile: hostile_slots,
            places: PLACES,
            reseal: |bytes| reseal_slot(bytes),
            // The bodies of a slot, expanded, and once more as frames.
            allowance: 2 * (murphy_backup::SLOT_BODY_BYTES_MAX as usize) + (8 << 20),
        },
        Target {
            name: "seal",
            run: epoch_seal,
            seeds: || vec![golden("archive_seal.hex")],
            hostile: Vec::new,
            places: PLACES,
            reseal: |bytes| seal::sum(bytes, 0..SEAL_BYTES - 16, SEAL_BYTES - 16),
            allowance: SMALL,
        },
        document(
            "record",
            |bytes| StoredRecord::parse(bytes).map(drop).map_err(|error| error.to_string()),
            record_seeds,
            |bytes| seal::document("registry", bytes),
        ),
        document(
            "descriptor",
            |bytes| Descriptor::parse(bytes).map(drop).map_err(|error| error.to_string()),
            || vec![golden("archive_descriptor.json")],
            |bytes| seal::document("archive", bytes),
        ),
        document(
            "manifest",
            manifest,
            || vec![golden("archive_manifest.json")],
            |bytes| {
                seal::document("snapshot", bytes);
            },
        ),
        document(
            "proof",
            |bytes| Proof::parse(bytes).map(drop).map_err(|error| error.to_string()),
            || vec![golden("archive_proof.json")],
            |bytes| seal::document("proof", bytes),
        ),
    ]
}

fn slot(bytes: &[u8]) -> Result<(), String> {
    let bytes = Bytes::copy_from_slice(bytes);
    if let Ok(header) = SlotHeader::parse(&bytes) {
        assert!(
            header.first <= header.last && u64::from(header.frames) <= header.last.since(header.first) + 1
        );
    }
    let occupant = Occupant::decode(&bytes).map_err(|error| error.to_string())?;
    let Occupant::Slot(slot) = occupant else { return Err("a seal, as byte 0 says".to_owned()) };
    let header = slot.header;
    assert_eq!(slot.frame_headers().count() as u64, u64::from(header.frames));
    let frames =
        slot.verify_alone(&VolumeKeys::derive(header.lineage.volume)).map_err(|error| error.to_string())?;
    let again =
        encode_slot(header.lineage, header.node, &frames).expect("what was decoded is within the limits");
    let again = Slot::decode(&again).expect("what was encoded decodes");
    assert_eq!(again.header.end(), header.end());
    Ok(())
}

fn slot_seeds() -> Vec<Vec<u8>> {
    let lineage = Lineage { volume: VOLUME, branch: BRANCH };
    let made = |frames: usize| {
        let mut history = History::new(epoch(3), History::origin());
        let frames: Vec<_> = (0..frames).map(|_| history.frame(3)).collect();
        encode_slot(lineage, NodeId::default(), &frames).expect("it is within the limits").to_vec()
    };
    vec![golden("archive_slot.hex"), made(1), made(30)]
}

/// A few kilobytes whose runs expand to more than all bodies of a slot may have.
fn hostile_slots() -> Vec<Vec<u8>> {
    let mut history = History::new(epoch(3), History::origin());
    let header = *history.frame(2).header();
    let zeros = vec![0; MAX_FRAME_BYTES - FRAME_HEADER_BYTES];
    let packed = zstd::bulk::compress(&zeros, 3).expect("zeros compress");
    let (mut headers, mut runs, mut bodies) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..BOMBS {
        let length = zeros.len() as u32;
        let first = header.first.advanced(2 * u64::from(number));
        let header = FrameHeader { first, body_len: length, raw_len: length, ..header };
        let mut frame = [&header.encode()[..], &zeros].concat();
        seal::frame(&mut frame).expect("it is a frame");
        headers.extend_from_slice(&frame[..FRAME_HEADER_BYTES]);
        let run = [1, length, packed.len() as u32, 1].map(u32::to_le_bytes);
        runs.extend_from_slice(&run.concat());
        bodies.extend_from_slice(&packed);
    }
    let mut slot = golden("archive_slot.hex")[..SLOT_HEADER_BYTES].to_vec();
    for (at, number) in [(12, u64::from(BOMBS)), (52, u64::from(BOMBS))] {
        slot[at..at + 4].copy_from_slice(&number.to_le_bytes()[..4]);
    }
    for (at, number) in [(72, 2), (80, 2 * u64::from(BOMBS) + 1), (OBJECT_BYTES_AT - 8, bodies.len() as u64)]
    {
        slot[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    slot.extend([headers, runs, bodies].concat());
    reseal_slot(&mut slot);
    vec![slot]
}

/// The hash of what follows the header, the frames in clear, then the header's own.
fn reseal_slot(bytes: &mut [u8]) {
    if bytes.len() < SLOT_HEADER_BYTES {
        return;
    }
    let length = (bytes.len() as u64).to_le_bytes();
    bytes[OBJECT_BYTES_AT..OBJECT_BYTES_AT + 8].copy_from_slice(&length);
    let rest: [u8; 32] = seal::short(&[&bytes[SLOT_HEADER_BYTES..]]);
    bytes[SLOT_HEADER_BYTES - 48..SLOT_HEADER_BYTES - 16].copy_from_slice(&rest);
    seal::sum(bytes, 0..SLOT_HEADER_BYTES - 16, SLOT_HEADER_BYTES - 16);
}

fn epoch_seal(bytes: &[u8]) -> Result<(), String> {
    let seal = Seal::decode(bytes).map_err(|error| error.to_string())?;
    assert_eq!(seal.encode(), bytes, "a seal with two forms");
    Ok(())
}

fn record_seeds() -> Vec<Vec<u8>> {
    records(&[
        r#"{"floor":{"epoch":1,"first":40}}"#,
        r#"{"pin":{"id":"00ff","lsn":7,"holder":"restore"}}"#,
        r#"{"unpin":{"id":"00ff"}}"#,
        r#"{"owner":{"branch":"ab"}}"#,
        r#"{"leave":{"branch":"ab"}}"#,
        r#"{"horizon":{"branch":"ab","lsn":9}}"#,
        r#"{"snapshot":{"epoch":1,"lsn":9}}"#,
    ])
}

/// Positions after which nothing can come, and nesting without end.
fn hostile_records() -> Vec<Vec<u8>> {
    let mut all = records(&[
        r#"{"floor":{"epoch":1,"first":18446744073709551615}}"#,
        r#"{"horizon":{"branch":"ab","lsn":18446744073709551615}}"#,
        r#"{"snapshot":{"epoch":1,"lsn":18446744073709551615}}"#,
    ]);
    all.push(b"[".repeat(20_000));
    all.push(br#"{"murphy":"#.repeat(5_000));
    all
}

/// The golden record, saying these things instead.
fn records(contents: &[&str]) -> Vec<Vec<u8>> {
    let text = String::from_utf8(golden("archive_record.json")).expect("a record is text");
    let (before, after) = text.split_once("\"record\":").expect("a record says something");
    let rest = &after[after.rfind("\"blake3\"").expect("a document has its sum")..];
    let mut seeds = Vec::new();
    for other in contents {
        let mut bytes = format!("{before}\"record\":{other}}},{rest}").into_bytes();
        seal::document("registry", &mut bytes);
        seeds.push(bytes);
    }
    seeds
}

fn manifest(bytes: &[u8]) -> Result<(), String> {
    let manifest = BaseManifest::parse(MANIFEST_FOLDER, bytes).map_err(|error| error.to_string())?;
    assert!(manifest.bytes() > 0 || manifest.parts.iter().all(|part| part.bytes == 0));
    assert!(manifest.state.position.lsn.next() > manifest.state.position.lsn);
    Ok(())
}

/// So many frames of the largest size are more than a slot may hold.
const BOMBS: u32 = 60;
/// The folder of the golden manifest.
const MANIFEST_FOLDER: &str = "snapshots/0000000001-00000000000000000007";
/// Where a slot's header has the length of the object.
const OBJECT_BYTES_AT: usize = SLOT_HEADER_BYTES - 16 - 32 - 8;
