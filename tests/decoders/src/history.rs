//! The decoders of the log: entries, frames, segments.

use bytes::Bytes;
use murphy_log::{
    Appender, DiskLog, DiskOptions, Drive, Entry, Files, FrameHeader, Log, LogSecret, LogTime, Lsn,
    MAX_CHANGES, MAX_NAMES, Position, Scrub, SegmentHeader, UnverifiedFrame, VolumeKeys,
    conformance::{BRANCH, History, VOLUME, epoch},
    decode_entry, encode_entry,
    faulty::FaultyDisk,
};
use std::{io, path::Path, sync::Arc};

use crate::{PLACES, SMALL, Target, golden, seal};

pub(crate) fn targets() -> Vec<Target> {
    vec![
        Target {
            name: "entry",
            run: entry,
            seeds: entry_seeds,
            hostile: hostile_entries,
            places: PLACES,
            reseal: |_| (),
            allowance: SMALL,
        },
        Target {
            name: "frame",
            run: frame,
            seeds: frame_seeds,
            hostile: Vec::new,
            places: PLACES,
            reseal: |bytes| seal::frames(bytes),
            allowance: SMALL,
        },
        Target {
            name: "segment",
            run: segment,
            seeds: segment_seeds,
            hostile: Vec::new,
            places: PLACES,
            reseal: |bytes| seal::segment(bytes),
            // The window that a scan reads through, three times: two scans and what is compared.
            allowance: 4 << 20,
        },
    ]
}

/// The entry of the golden file.
const ENTRY_LSN: Lsn = Lsn::new(70_000);
const ENTRY_BASE: LogTime = LogTime::from_nanos(1_800_000_000_123_000_000);

fn entry(bytes: &[u8]) -> Result<(), String> {
    let entry = decode_entry(bytes, ENTRY_LSN, ENTRY_BASE).map_err(|error| {
        let text = error.to_string();
        assert!(text.contains(" at byte "), "an entry's refusal names the byte: {text}");
        text
    })?;
    assert!(entry.changes.len() <= MAX_CHANGES && entry.names.len() <= MAX_NAMES);
    let mut again = Vec::new();
    encode_entry(&entry, ENTRY_BASE, &mut again).expect("what was decoded is within the limits");
    let second = decode_entry(&again, ENTRY_LSN, ENTRY_BASE).expect("what was encoded decodes");
    assert_eq!(entry, second, "an entry that comes back as another");
    Ok(())
}

/// Entries of every shape: the golden one, a tick, many names, a name that stands in a row.
fn entries() -> Vec<Entry> {
    let full = decode_entry(&golden("entry.hex"), ENTRY_LSN, ENTRY_BASE).expect("the golden entry decodes");
    let tick = Entry::tick(ENTRY_LSN, full.time);
    let removed = Entry { request: None, names: Vec::new(), ..full.clone() };
    let names = (0..9).map(|n| Bytes::from(format!("name number {n}"))).collect();
    let many = Entry {
        caller: None,
        names,
        changes: full.changes.iter().cycle().take(24).cloned().collect(),
        ..full.clone()
    };
    vec![full, tick, removed, many]
}

fn entry_seeds() -> Vec<Vec<u8>> {
    let encoded = |entry: Entry| {
        let mut bytes = Vec::new();
        encode_entry(&entry, ENTRY_BASE, &mut bytes).expect("it is within the limits");
        bytes
    };
    entries().into_iter().map(encoded).collect()
}

/// Lengths and counts far beyond what follows them.
fn hostile_entries() -> Vec<Vec<u8>> {
    let huge = [0xff, 0xff, 0xff, 0xff, 0x0f];
    let lengths = [&huge[..], &[0; 8]].concat();
    // 4,096 changes in an entry of 20 bytes; 16 names of a mebibyte that all stand in one value.
    let changes = [&[20, 0xe0, 0x80, 0x20][..], &[0; 17]].concat();
    vec![lengths, changes, vec![0xff; 64]]
}

fn frame(bytes: &[u8]) -> Result<(), String> {
    let shared = Bytes::copy_from_slice(bytes);
    if let Ok(header) = FrameHeader::parse(bytes) {
        assert_eq!(FrameHeader::parse(&header.encode()), Ok(header));
        assert!(header.last() >= header.first);
    }
    let (frame, end) = UnverifiedFrame::parse(&shared, 0).map_err(|error| error.to_string())?;
    assert_eq!(frame.bytes()[..], bytes[..end]);
    let header = *frame.header();
    let previous = Position { epoch: header.epoch, lsn: header.first.previous(), hash: header.hash_before };
    let frame = frame.verify(&VolumeKeys::derive(VOLUME), &previous).map_err(|error| error.to_string())?;
    let entries = frame.entries().map_err(|error| error.to_string())?;
    assert_eq!(entries.len() as u64, frame.last().since(frame.first()) + 1);
    Ok(())
}

fn frame_seeds() -> Vec<Vec<u8>> {
    let mut history = History::new(epoch(3), History::origin());
    let mut seeds =
        vec![golden("frame.hex"), history.frame(1).bytes().to_vec(), history.frame(5).bytes().to_vec()];
    let mut appender = Appender::new(VolumeKeys::derive(VOLUME), epoch(3), History::origin());
    // The same caller twice, and another in between.
    for entry in entries().into_iter().cycle().take(9) {
        let state = appender.state();
        let entry = Entry { lsn: state.position.lsn.next(), ..entry };
        appender.push(&entry, state.digest, state.usage).expect("the entries are dense");
    }
    let frame = appender.close(ENTRY_BASE, Lsn::ROOT).expect("it has entries");
    seeds.push(frame.bytes().to_vec());
    seeds
}

fn segment(bytes: &[u8]) -> Result<(), String> {
    let directory = Path::new("/log");
    let first = SegmentHeader::parse(bytes).map_or(Lsn::FIRST, |header| header.first());
    let name = directory.join(format!("{:020}.seg", first.get()));
    let disk = disk_with(&name, bytes).expect("this disk does not fail");
    let options = || DiskOptions {
        segment_bytes: 4096,
        recent_bytes: 0,
        scrub: Scrub::Everything,
        drive: Drive::Steps,
        files: Arc::new(disk.clone()),
        ..DiskOptions::new(directory, VOLUME, BRANCH)
    };
    let before = disk.contents();
    let log = DiskLog::open(options()).map_err(|error| {
        assert_eq!(before, disk.contents(), "a refused log was changed");
        error.to_string()
    })?;
    let tail = log.tail();
    let mut read = log.recovery().segments.first().copied();
    for frame in log.read(log.first()).expect("a log reads from its first entry") {
        let frame = frame.expect("what was recovered reads");
        assert_eq!(read, Some(frame.first()), "a log without gaps");
        read = Some(frame.last().next());
        if frame.last() == tail.position.lsn {
            break;
        }
    }
    assert_eq!(read, Some(tail.position.lsn.next()), "everything up to the tail is there");
    drop(log);
    let again = DiskLog::open(options()).expect("a recovered log opens");
    assert_eq!(again.tail(), tail, "recovering twice gives the same");
    // A segment in which nothing was ever durable is left as it is, for the next claim to replace.
    assert!(again.recovery().cut.is_none() || tail.position.lsn < first, "what was cut stays cut");
    Ok(())
}

/// A disk that holds this one file.
fn disk_with(path: &Path, bytes: &[u8]) -> io::Result<FaultyDisk> {
    let disk = FaultyDisk::new();
    if let Some(directory) = path.parent() {
        disk.create_dir(directory)?;
    }
    disk.create(path)?.write_at(0, bytes)?;
    Ok(disk)
}

fn segment_seeds() -> Vec<Vec<u8>> {
    let base = History::origin();
    let header = SegmentHeader::plain(VOLUME, BRANCH, epoch(3), base, LogSecret::from_bytes([5; 32]));
    let mut history = History::new(epoch(3), base);
    let mut bytes = header.encode().to_vec();
    let mut last = base.position.lsn;
    for group in [1, 2, 1] {
        let durable = last;
        for _ in 0..group {
            push_mark(&mut bytes, durable);
            let frame = history.frame(2);
            bytes.extend_from_slice(frame.bytes());
            last = frame.last();
        }
    }
    let mut torn = bytes[..bytes.len() - 60].to_vec();
    torn.resize(bytes.len() + 100, 0);
    let mut zeros = bytes.clone();
    zeros.resize(bytes.len() + 500, 0);
    let mut with_golden = golden("segment_header.hex");
    push_mark(&mut with_golden, Lsn::ROOT);
    with_golden.extend_from_slice(&golden("frame.hex"));
    vec![bytes, torn, zeros, header.encode().to_vec(), with_golden]
}

/// Ends the segment so far with a mark: everything up to `durable` had been synced.
fn push_mark(segment: &mut Vec<u8>, durable: Lsn) {
    let at = segment.len();
    segment.extend_from_slice(seal::MARK_MAGIC);
    segment.extend_from_slice(&[0; 4]);
    segment.extend_from_slice(&durable.get().to_le_bytes());
    segment.resize(at + seal::MARK_BYTES, 0);
    seal::mark(segment, at);
}
