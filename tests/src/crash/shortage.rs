//! A node whose disk is full or fails for a while, and that is not restarted: it says so to whoever asks, keeps what it has said yes to, and
//! goes on as soon as there is room, unless its log has been poisoned.
//!
//! Invariants:
//! - What was acknowledged, before, while and after, is there after every later crash, with its bytes.
//! - A file whose fsync failed holds a beginning of what was written; nobody else's bytes.
//! - After the log was poisoned nothing is acknowledged any more.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_fs::{Caller, Errno, FileSystem, Handle, Ino, Name, OpenFlags, XattrMode, XattrName};
use murphy_log::{
    Clock, LogTime, ManualClock,
    faulty::{DiskMoment, Fault, FaultyDisk},
};

use super::{CrashNode, NodeRules};
use crate::{Driver, PATIENCE, Random, wait_for_ok};

/// What the disk lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shortage {
    /// Room: so many bytes more fit, until the shortage is over.
    Room(u64),
    /// One operation fails, counted from the beginning of the shortage.
    Operation(usize, Fault),
}

/// A run through a shortage.
pub struct ShortageRun {
    driver: Driver,
    moments: Vec<DiskMoment>,
    promises: Vec<Promise>,
    /// Why the log takes nothing more, if it was poisoned.
    pub ended: Option<String>,
    /// How many calls were refused.
    pub refused: usize,
    /// How many operations the disk did from the beginning of the shortage on.
    pub operations: usize,
}

/// A file whose bytes were acknowledged.
#[derive(Clone, Debug)]
struct Promise {
    /// How many moments had been recorded by then.
    by: usize,
    number: u64,
}

/// A file that is open.
struct Open {
    number: u64,
    ino: Ino,
    handle: Handle,
}

/// The run while it goes on.
struct Work<'a> {
    driver: &'a Driver,
    disk: &'a FaultyDisk,
    node: &'a CrashNode,
    clock: &'a ManualClock,
    promises: Vec<Promise>,
    /// Files whose bytes were not acknowledged yet.
    open: Vec<Open>,
    refused: usize,
}

impl ShortageRun {
    /// Runs a node into the shortage, through it and out of it.
    ///
    /// # Panics
    /// If the node does not go on afterwards though its log was not poisoned, or acknowledges anything though it was.
    pub fn record(shortage: Shortage) -> ShortageRun {
        let driver = Driver::new();
        let disk = FaultyDisk::new();
        let manual = Arc::new(ManualClock::new(LogTime::from_nanos(START_NANOS)));
        let clock: Arc<dyn Clock> = manual.clone();
        let node = CrashNode::format(&driver, &disk, &clock, &rules());
        let mut work = Work {
            driver: &driver,
            disk: &disk,
            node: &node,
            clock: &manual,
            promises: Vec::new(),
            open: Vec::new(),
            refused: 0,
        };
        driver.wait(node.volume.sync_all()).expect("nothing has been broken yet");
        disk.record();
        work.go_on(0..BEFORE, "before the shortage");
        work.refused = 0;
        let begun = disk.operations();
        match shortage {
            Shortage::Room(bytes) => disk.set_capacity(Some(disk.allocated() + bytes)),
            Shortage::Operation(number, fault) => disk.fail_at(begun + number, fault),
        }
        work.files(BEFORE..BEFORE + DURING);
        disk.set_capacity(None);
        let operations = disk.operations() - begun;
        work.after(&format!("{shortage:?}"));
        let Work { promises, refused, .. } = work;
        let ended = node.ended();
        drop(node);
        ShortageRun { moments: disk.take_recorded(), promises, ended, refused, operations, driver }
    }

    /// How many moments there are.
    pub fn moments(&self) -> usize {
        self.moments.len()
    }

    /// What is on the disk at a moment.
    pub fn moment(&self, at: usize) -> &DiskMoment {
        &self.moments[at]
    }

    /// How many files were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.promises.len()
    }

    /// Opens what a crash at the moment `at` has left on `disk`, and compares it with what was acknowledged until then.
    ///
    /// # Panics
    /// If anything of that is missing, or a file holds what was not written to it.
    pub fn judge(&self, at: usize, disk: &FaultyDisk, what: &str) {
        let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(LogTime::from_nanos(START_NANOS + HOUR_NANOS)));
        let node = CrashNode::open(&self.driver, disk, &clock, &NodeRules::new(false))
            .unwrap_or_else(|error| panic!("{what}: the node does not open: {error}"));
        node.fsck().unwrap_or_else(|error| panic!("{what}: {error}"));
        let promised: BTreeMap<u64, usize> =
            self.promises.iter().map(|promise| (promise.number, promise.by)).collect();
        for number in 0..BEFORE + DURING + AFTER {
            let written = contents(number);
            let is_certain = promised.get(&number).is_some_and(|by| by - 1 <= at);
            match node.read_file(&self.driver, &name(number)) {
                Ok(read) if is_certain => assert!(read == written, "{what}: file {number} lost bytes"),
                Ok(read) => assert!(written.starts_with(&read), "{what}: file {number} has other bytes"),
                Err(Errno::ENOENT) if !is_certain => {}
                Err(errno) => panic!("{what}: file {number}, certain: {is_certain}: {errno}"),
            }
        }
        let written = node.write_file(&self.driver, "after the crash", &[3; 5000]);
        written.unwrap_or_else(|errno| panic!("{what}: the node does not go on: {errno}"));
    }

    /// Opens what a power cut at the moment `at` has left while the disk is still full; then when there is room.
    ///
    /// # Panics
    /// If the refusal does not say that there is no space, or costs anything.
    pub fn judge_full(&self, at: usize, seed: u64, what: &str) -> bool {
        let disk = self.moment(at).after_power_cut(seed);
        disk.set_capacity(Some(disk.allocated()));
        let clock: Arc<dyn Clock> = Arc::new(ManualClock::new(LogTime::from_nanos(START_NANOS + HOUR_NANOS)));
        let refused = CrashNode::open(&self.driver, &disk, &clock, &NodeRules::new(false)).err();
        if let Some(error) = &refused {
            assert!(error.contains("no storage space") || error.contains("no space"), "{what}: {error}");
        }
        self.judge(at, &disk.after_kill(), &format!("{what}, opened while it was full"));
        refused.is_some()
    }
}

impl Work<'_> {
    /// Makes files and has them acknowledged, whatever fails; asks once more for those that were not.
    fn files(&mut self, numbers: std::ops::Range<u64>) {
        for number in numbers {
            self.clock.advance(Duration::from_millis(7));
            match self.make(number) {
                Ok(open) => self.sync(open),
                Err(_) => self.refused += 1,
            }
        }
        self.sync_open();
    }

    /// A file with its bytes and an attribute, which fills the log faster than bytes do.
    fn make(&self, number: u64) -> Result<Open, Errno> {
        let (root, flags) =
            (Caller::default(), OpenFlags { read: true, write: true, ..OpenFlags::default() });
        let name = Name::new(name(number)).map_err(|_| Errno::EINVAL)?;
        let volume = &self.node.volume;
        let (attr, opened) = match self.driver.wait(volume.create(&root, Ino::ROOT, &name, 0o644, flags)) {
            // An earlier attempt came as far as the name.
            Err(Errno::EEXIST) => {
                let attr = self.driver.wait(volume.lookup(&root, Ino::ROOT, &name))?;
                (attr, self.driver.wait(volume.open(&root, attr.ino, flags))?)
            }
            made => made?,
        };
        let open = Open { number, ino: attr.ino, handle: opened.handle };
        let bytes = Bytes::from(contents(number));
        let written = self.driver.wait(volume.write(&root, open.ino, open.handle, 0, bytes));
        let name = XattrName::new("user.filler").map_err(|_| Errno::EINVAL)?;
        let filler = Bytes::from(vec![number as u8; FILLER_BYTES]);
        let named = self.driver.wait(volume.setxattr(&root, open.ino, &name, filler, XattrMode::Set));
        if let Err(errno) = written.map(drop).and(named) {
            volume.release(open.ino, open.handle);
            return Err(errno);
        }
        Ok(open)
    }

    /// Asks once for every file that is open and not acknowledged.
    fn sync_open(&mut self) {
        for open in std::mem::take(&mut self.open) {
            self.sync(open);
        }
    }

    fn sync(&mut self, open: Open) {
        let ended_before = self.node.ended();
        match self.driver.wait(self.node.volume.fsync(open.ino, Some(open.handle))) {
            Ok(()) => {
                assert_eq!(ended_before, None, "file {} was acknowledged by a poisoned log", open.number);
                self.promises.push(Promise { by: self.disk.recorded(), number: open.number });
                self.node.volume.release(open.ino, open.handle);
            }
            Err(_) => {
                self.refused += 1;
                self.open.push(open);
            }
        }
    }

    /// The shortage is over: the node goes on, or its log was poisoned and it does not.
    fn after(&mut self, what: &str) {
        if self.node.ended().is_some() {
            let promised = self.promises.len();
            self.files(BEFORE + DURING..BEFORE + DURING + AFTER);
            assert_eq!(self.promises.len(), promised, "{what}: a poisoned log acknowledges");
            return;
        }
        let promised = self.promises.len() + self.open.len();
        self.go_on(BEFORE + DURING..BEFORE + DURING + AFTER, what);
        assert_eq!(self.promises.len(), promised + AFTER as usize, "{what}: the node does not go on");
    }

    /// Makes files until they, and what was refused before, are acknowledged.
    fn go_on(&mut self, numbers: std::ops::Range<u64>, what: &str) {
        for number in numbers {
            let open = wait_for_ok(&format!("{what}: a new file"), PATIENCE, || self.make(number));
            self.open.push(open);
        }
        wait_for_ok(&format!("{what}: what was refused is taken"), PATIENCE, || {
            self.sync_open();
            if self.open.is_empty() { Ok(()) } else { Err(self.node.ended()) }
        });
    }
}

fn rules() -> NodeRules {
    // A log without room makes whoever waits for it wait that long.
    NodeRules { io_timeout: Duration::from_millis(100), ..NodeRules::new(false) }
}

fn name(number: u64) -> String {
    format!("file {number}")
}

fn contents(number: u64) -> Vec<u8> {
    let length = [50, 3000, 20_000, 70_000][(number % 4) as usize];
    Random::new(number).bytes(length)
}

/// How many files are made before the shortage, in it, and after it.
const BEFORE: u64 = 3;
const DURING: u64 = 9;
const AFTER: u64 = 3;
const FILLER_BYTES: usize = 6000;
const START_NANOS: u64 = 1_700_000_000_000_000_000;
const HOUR_NANOS: u64 = 3_600_000_000_000;
