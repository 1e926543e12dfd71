//! Tests of the log on disk: what it promises in order, and what becomes of it in every crash.
//!
//! Invariants:
//! - Whatever was published as durable is there after every kill, power cut and failed sync, or the open is refused.

mod crash;
mod damage;
mod forged;
mod fork;
mod mend;
mod stalls;

use std::path::Path;

use super::*;
use crate::{
    OpenError, Terminal,
    conformance::{BRANCH, History, Subject, VOLUME, conforms, epoch},
    faulty::FaultyDisk,
};

/// A faulty disk with the directory of the log.
fn disk() -> FaultyDisk {
    let disk = FaultyDisk::new();
    disk.create_dir(Path::new("/log")).unwrap();
    disk
}

/// Options for a log that fits the tests: small segments, stepped by hand, on a faulty disk.
fn options(files: &FaultyDisk) -> DiskOptions {
    DiskOptions {
        segment_bytes: 8192,
        drive: Drive::Steps,
        files: Arc::new(files.clone()),
        recent_bytes: 0,
        ..DiskOptions::new("/log", VOLUME, BRANCH)
    }
}

fn append(log: &DiskLog, history: &mut History, entries: usize) -> Result<Frame, AppendError> {
    let frame = history.frame(entries);
    log.append(&log.tail().position, frame.clone())?;
    Ok(frame)
}

fn read_all(log: &DiskLog) -> Vec<Frame> {
    log.read(log.first()).unwrap().map(Result::unwrap).collect()
}

fn assert_same(read: &[Frame], expected: &[Frame]) {
    let bytes =
        |frames: &[Frame]| frames.iter().map(|frame| frame.bytes().clone()).collect::<Vec<bytes::Bytes>>();
    assert!(bytes(read) == bytes(expected));
}

/// A log on the faulty disk with its own thread, for the conformance suite.
struct OnFaultyDisk {
    log: Arc<DiskLog>,
    files: FaultyDisk,
    recent_bytes: usize,
}

impl OnFaultyDisk {
    fn options(files: &FaultyDisk, recent_bytes: usize) -> DiskOptions {
        DiskOptions { segment_bytes: 48 << 10, drive: Drive::Thread, recent_bytes, ..options(files) }
    }
}

impl Subject for OnFaultyDisk {
    fn log(&self) -> Arc<dyn Log> {
        Arc::<DiskLog>::clone(&self.log)
    }

    fn reopened(self: Box<Self>) -> Box<dyn Subject> {
        let OnFaultyDisk { log, files, recent_bytes } = *self;
        drop(Arc::into_inner(log).unwrap());
        let log = Arc::new(DiskLog::open(OnFaultyDisk::options(&files, recent_bytes)).unwrap());
        Box::new(OnFaultyDisk { log, files, recent_bytes })
    }

    fn break_medium(&self) {
        self.files.break_from_now();
    }
}

#[test]
fn the_log_on_disk_conforms() {
    for recent_bytes in [0, 8 << 20] {
        conforms(&|base| {
            let files = disk();
            let log = DiskLog::create(OnFaultyDisk::options(&files, recent_bytes), base).unwrap();
            Box::new(OnFaultyDisk { log: Arc::new(log), files, recent_bytes })
        });
    }
}

/// The same on the file system of the machine, without the test of a medium that breaks.
#[test]
fn a_log_of_real_files_survives_restarts_and_rolls() {
    let directory = tempfile::tempdir().unwrap();
    let options = || DiskOptions {
        segment_bytes: 16 << 10,
        recent_bytes: 0,
        ..DiskOptions::new(directory.path().join("log"), VOLUME, BRANCH)
    };
    drop(DiskLog::create(options(), History::origin()).unwrap());
    let mut frames: Vec<Frame> = Vec::new();
    for number in 1..5 {
        let log = DiskLog::open(options()).unwrap();
        let mut history = History::new(epoch(number), log.claim(epoch(number)).unwrap());
        for _ in 0..20 {
            frames.push(append(&log, &mut history, 100).unwrap());
        }
        let last = frames.last().unwrap().last();
        log.durable().wait_blocking(last, Duration::from_secs(30)).unwrap();
        assert_same(&read_all(&log), &frames);
        assert_eq!(log.recovery().cut, None);
    }
    let log = DiskLog::open(DiskOptions { scrub: Scrub::Everything, ..options() }).unwrap();
    assert!(log.recovery().segments.len() > 8);
    assert_same(&read_all(&log), &frames);
    let refused = DiskLog::open(options()).unwrap_err();
    assert!(matches!(refused, OpenError::Locked { .. }), "{refused}");
}

#[test]
fn a_new_log_is_not_made_where_one_is_and_none_is_opened_where_none_is() {
    let files = disk();
    let refused = DiskLog::open(options(&files)).unwrap_err();
    assert!(matches!(refused, OpenError::Empty { .. }), "{refused}");
    drop(DiskLog::create(options(&files), History::origin()).unwrap());
    let refused = DiskLog::create(options(&files), History::origin()).unwrap_err();
    assert!(matches!(refused, OpenError::NotEmpty { .. }), "{refused}");
    let small = DiskOptions { segment_bytes: 100, ..options(&files) };
    assert!(matches!(DiskLog::open(small).unwrap_err(), OpenError::SegmentTooSmall { bytes: 100, .. }));
}

#[test]
fn a_group_is_one_write_and_one_sync() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    append(&log, &mut history, 1).unwrap();
    assert!(log.step(), "the first step also reserves the next segment");
    for _ in 0..10 {
        append(&log, &mut history, 1).unwrap();
    }
    let before = files.operations();
    assert!(log.step());
    assert_eq!(files.operations() - before, 2);
    assert!(!log.step());
    assert_eq!(log.durable().state(), log.tail());
}

#[test]
fn a_full_disk_is_met_before_anything_is_queued_and_not_for_ever() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    files.set_capacity(Some(2 * 8192));
    let mut frames = Vec::new();
    let refused = loop {
        let frame = history.frame(20);
        match log.append(&log.tail().position, frame.clone()) {
            Ok(()) => frames.push(frame),
            Err(error) => break (frame, error),
        }
        assert!(frames.len() < 100, "the disk is small");
        if frames.len() % 3 == 0 {
            log.step();
        }
    };
    assert!(matches!(refused.1, AppendError::NoSpace { .. }), "{}", refused.1);
    assert!(!log.has_room(refused.0.bytes().len()));
    while log.step() {}
    assert_eq!(log.durable().current().terminal, None, "the writer never met it");
    assert_same(&read_all(&log), &frames);

    files.set_capacity(None);
    assert!(log.has_room(refused.0.bytes().len()));
    log.append(&log.tail().position, refused.0.clone()).unwrap();
    frames.push(refused.0);
    assert!(log.step());
    assert_same(&read_all(&log), &frames);
}

#[test]
fn a_frame_larger_than_a_segment_is_refused() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    let refused = append(&log, &mut history, 1000).unwrap_err();
    assert!(matches!(refused, AppendError::TooLarge { limit, .. } if limit == log.max_frame()), "{refused}");
}

#[test]
fn a_segment_of_another_volume_branch_or_version_is_named() {
    let files = disk();
    drop(DiskLog::create(options(&files), History::origin()).unwrap());
    let before = files.contents();
    let other = DiskOptions { volume: VolumeId::from_bytes([1; 16]), ..options(&files) };
    let refused = DiskLog::open(other).unwrap_err().to_string();
    assert!(refused.contains("00000000000000000002.seg: a segment of volume 5656"), "{refused}");
    let other = DiskOptions { branch: BranchId::from_bytes([1; 16]), ..options(&files) };
    let refused = DiskLog::open(other).unwrap_err().to_string();
    assert!(refused.contains("00000000000000000002.seg: a segment of branch 4242"), "{refused}");
    assert_eq!(files.contents(), before);

    let path = Path::new("/log/00000000000000000002.seg");
    files.damage(path, |bytes| bytes[8] = 9);
    let refused = DiskLog::open(options(&files)).unwrap_err().to_string();
    assert!(refused.contains("00000000000000000002.seg: a segment of format version 9"), "{refused}");
}

#[test]
fn a_poisoned_log_says_why() {
    let files = disk();
    let log = DiskLog::create(options(&files), History::origin()).unwrap();
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    append(&log, &mut history, 1).unwrap();
    files.break_from_now();
    assert!(!log.step());
    let Some(Terminal::Poisoned { message }) = log.durable().current().terminal else {
        panic!("not poisoned")
    };
    assert_eq!(&*message, "/log: the disk is broken");
}

#[test]
fn an_entry_of_the_largest_size_goes_through() {
    let files = disk();
    let options = || DiskOptions { segment_bytes: 4 << 20, ..options(&files) };
    let log = DiskLog::create(options(), History::origin()).unwrap();
    let state = log.claim(epoch(1)).unwrap();
    let value = vec![7; crate::MAX_ENTRY_BYTES - 100];
    let change = crate::Change { table: 4, key: vec![0; 8].into(), value: Some(value.into()) };
    let mut appender = crate::Appender::new(crate::VolumeKeys::derive(VOLUME), epoch(1), state);
    let mut frames = Vec::new();
    for _ in 0..8 {
        let lsn = appender.state().position.lsn.next();
        let entry =
            crate::Entry { changes: vec![change.clone()], ..crate::Entry::tick(lsn, Default::default()) };
        appender.push(&entry, state.digest, state.usage).unwrap();
        let frame = appender.close(Default::default(), Lsn::ROOT).unwrap();
        log.append(&log.tail().position, frame.clone()).unwrap();
        frames.push(frame);
    }
    while log.step() {}
    assert_same(&read_all(&log), &frames);
    drop(log);
    let log = DiskLog::open(options()).unwrap();
    assert_same(&read_all(&log), &frames);
}

/// Readers on other threads, far behind and close to the tail, while the log rolls and is claimed.
#[test]
fn readers_and_waiters_keep_up_with_a_busy_writer() {
    let files = disk();
    let busy =
        DiskOptions { drive: Drive::Thread, recent_bytes: 2000, segment_bytes: 16 << 10, ..options(&files) };
    let log = DiskLog::create(busy, History::origin()).unwrap();
    let last = Lsn::new(1 + 600 * 5);
    let patience = Duration::from_secs(60);
    let follow = || {
        let (mut reader, mut next) = (log.read(Lsn::FIRST).unwrap(), Lsn::FIRST);
        while next <= last {
            log.durable().wait_blocking(next, patience).unwrap();
            while let Some(frame) = reader.next().map(Result::unwrap) {
                assert_eq!(frame.first(), next);
                assert!(frame.last() <= log.durable().state().position.lsn);
                next = frame.last().next();
            }
        }
    };
    thread::scope(|scope| {
        let readers = [scope.spawn(follow), scope.spawn(follow)];
        for number in 1..4 {
            let mut history = History::new(epoch(number), log.claim(epoch(number)).unwrap());
            (0..200).for_each(|_| drop(append(&log, &mut history, 5).unwrap()));
        }
        log.durable().wait_blocking(last, patience).unwrap();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        log.trim(last).unwrap();
    });
    assert!(log.first() > Lsn::FIRST);
}
