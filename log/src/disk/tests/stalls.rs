//! A disk that takes nothing for a while: who appends is told so, and nothing is lost when it goes on.

use std::{
    io,
    path::PathBuf,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use super::*;
use crate::SegmentFile;

/// A disk whose writes and syncs of files wait while it is held.
#[derive(Debug)]
struct HeldDisk {
    below: FaultyDisk,
    held: Arc<Mutex<()>>,
}

#[derive(Debug)]
struct HeldFile {
    below: Box<dyn SegmentFile>,
    held: Arc<Mutex<()>>,
}

impl HeldDisk {
    fn file(&self, below: Box<dyn SegmentFile>) -> Box<dyn SegmentFile> {
        Box::new(HeldFile { below, held: Arc::clone(&self.held) })
    }
}

impl Files for HeldDisk {
    fn create_dir(&self, directory: &Path) -> io::Result<()> {
        self.below.create_dir(directory)
    }

    fn lock(&self, directory: &Path) -> io::Result<Option<DirectoryLock>> {
        self.below.lock(directory)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        self.below.list(directory)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        Ok(self.file(self.below.create(path)?))
    }

    fn create_private(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        Ok(self.file(self.below.create_private(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        Ok(self.file(self.below.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.below.rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.below.link(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.below.remove(path)
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        self.below.sync_dir(directory)
    }
}

impl SegmentFile for HeldFile {
    fn preallocate(&self, length: u64) -> io::Result<()> {
        drop(self.held.lock());
        self.below.preallocate(length)
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.below.truncate(length)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        drop(self.held.lock());
        self.below.write_at(offset, bytes)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        self.below.read_at(offset, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        drop(self.held.lock());
        self.below.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        self.below.length()
    }

    fn modified(&self) -> io::Result<std::time::SystemTime> {
        self.below.modified()
    }
}

/// A log with a thread, whose disk waits while the lock is held.
fn held(files: &FaultyDisk, patience: Duration) -> (DiskLog, Arc<Mutex<()>>) {
    let held = Arc::new(Mutex::new(()));
    let disk = HeldDisk { below: files.clone(), held: Arc::clone(&held) };
    let slow = DiskOptions {
        directory: PathBuf::from("/log"),
        drive: Drive::Thread,
        files: Arc::new(disk),
        stall_max: patience,
        ..options(files)
    };
    (DiskLog::create(slow, History::origin()).unwrap(), held)
}

/// Appends until the log takes no more.
fn fill(log: &DiskLog, history: &mut History, frames: &mut Vec<Frame>) -> (Frame, AppendError) {
    loop {
        let frame = history.frame(20);
        match log.append(&log.tail().position, frame.clone()) {
            Ok(()) => frames.push(frame),
            Err(error) => return (frame, error),
        }
    }
}

/// The fear: a sync hangs, somebody appends inside the critical section and waits for it, and every request waits behind him, without a
/// deadline and without a word.
#[test]
fn an_append_does_not_wait_for_ever_for_a_disk_that_hangs() {
    let (log, held) = held(&disk(), Duration::from_millis(20));
    let log = Arc::new(log);
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    let hangs = held.lock();
    let (sender, answer) = mpsc::channel();
    let appending = Arc::clone(&log);
    thread::spawn(move || {
        let mut frames = Vec::new();
        let refused = fill(&appending, &mut history, &mut frames);
        // While the disk hangs nobody waits a second time, and what refuses says why.
        let again = appending.append(&appending.tail().position, refused.0.clone());
        sender.send((frames, refused, again)).unwrap();
    });
    let (mut frames, (frame, error), again) = answer.recv_timeout(PATIENCE).expect("the append ends");
    assert!(matches!(&error, AppendError::NoSpace { message } if message.contains("nothing")), "{error}");
    assert_eq!(again, Err(error));
    drop(hangs);
    let durable = log.durable();
    durable.wait_blocking(frames.last().unwrap().last(), PATIENCE).unwrap();
    log.append(&log.tail().position, frame.clone()).unwrap();
    durable.wait_blocking(frame.last(), PATIENCE).unwrap();
    frames.push(frame);
    assert_same(&read_all(&log), &frames);
}

/// The fear: a disk that is only slow refuses changes, because somebody waited longer than for one that hangs.
#[test]
fn an_append_waits_for_a_disk_that_gets_on() {
    let (log, held) = held(&disk(), PATIENCE);
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    let mut frames = Vec::new();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _hangs = held.lock();
                thread::yield_now();
            }
        });
        for _ in 0..200 {
            frames.push(append(&log, &mut history, 20).unwrap());
        }
        is_over.store(true, Ordering::Relaxed);
    });
    log.durable().wait_blocking(frames.last().unwrap().last(), PATIENCE).unwrap();
    assert_same(&read_all(&log), &frames);
}

/// A disk that was full is asked again by the writer, whoever finds out.
#[test]
fn a_log_with_a_thread_goes_on_once_a_full_disk_has_room() {
    let files = disk();
    let (log, _held) = held(&files, PATIENCE);
    let mut history = History::new(epoch(1), log.claim(epoch(1)).unwrap());
    files.set_capacity(Some(2 * 8192));
    let mut frames = Vec::new();
    let (frame, error) = fill(&log, &mut history, &mut frames);
    assert!(matches!(error, AppendError::NoSpace { .. }), "{error}");
    files.set_capacity(None);
    log.append(&log.tail().position, frame.clone()).unwrap();
    frames.push(frame);
    log.durable().wait_blocking(frames.last().unwrap().last(), PATIENCE).unwrap();
    assert_same(&read_all(&log), &frames);
}

/// Nothing is waited for longer.
const PATIENCE: Duration = Duration::from_secs(60);
