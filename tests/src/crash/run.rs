//! One recorded run of a program on a node, and what its moments are judged by.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use murphy_fs::{Errno, FileSystem, Ino, Name};
use murphy_log::{
    Clock, LogTime, Lsn, ManualClock,
    faulty::{DiskMoment, FaultyDisk},
};
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use super::{CrashNode, NodeRules, seen::Seen};
use crate::{Contest, Driver, Length, Operation, Program, Random, Reference, RunRules, Step, strategy};

/// A run, from its first step on.
pub struct CrashRun {
    driver: Arc<Driver>,
    rules: NodeRules,
    /// What the tree was after each step; the first is before all.
    after: Vec<After>,
    moments: Vec<DiskMoment>,
    operations: usize,
}

/// How a run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// All steps were done.
    Whole,
    /// A step failed in this way.
    Failed(String),
}

/// What became of a damaged node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Damaged {
    /// It was not opened, and said why.
    Refused,
    /// The end of the log was cut, and said so.
    Cut,
    /// It was opened, and some file cannot be read.
    Unreadable,
    /// It was opened and is whole.
    Harmless,
}

/// The moment after a step.
struct After {
    seen: Seen,
    /// The last entry: of the step, or of a purge that it has caused and that nobody has waited for. A step that failed has not come to
    /// its last entry.
    lsn: Lsn,
    /// The last entry that was acknowledged with it, at least.
    certain: Lsn,
    /// How many moments of the disk had been recorded before the step, ...
    begun: usize,
    /// ... and when everything up to it had been acknowledged, if that was asked for; names, and the bytes of which files.
    acknowledged: Option<(usize, Acknowledged)>,
}

/// Whose bytes were acknowledged.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Acknowledged {
    Everything,
    File(Ino),
}

/// How crashed nodes were judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verdicts {
    /// Nodes that were crashed, opened and compared with the reference.
    pub judged: usize,
    /// Of these, how many had come back between two steps, where the reference has no state.
    pub between: usize,
    /// Of these, how many were crashed and opened a second time.
    pub twice: usize,
    /// Nodes that were crashed a second time while they were opened.
    pub recovering: usize,
}

impl CrashRun {
    /// Runs a program of up to `steps` steps, drawn from `seed`; with `sync` every step waits until it is durable, without it only some
    /// are followed by an fsync. `prepare` may tell the disk to fail.
    ///
    /// # Panics
    /// If a step is not what the reference does while the disk works.
    pub fn record(
        seed: u64,
        steps: usize,
        sync: bool,
        prepare: impl FnOnce(&FaultyDisk),
    ) -> (CrashRun, Ending) {
        let mut prepare = Some(prepare);
        let watch = &mut |disk: &FaultyDisk| {
            if let Some(prepare) = prepare.take() {
                prepare(disk);
            }
        };
        CrashRun::record_watched(seed, steps, &NodeRules::new(sync), watch)
    }

    /// As [`CrashRun::record`]; `watch` is called before the first step and after each.
    ///
    /// # Panics
    /// As [`CrashRun::record`] does.
    pub fn record_watched(
        seed: u64,
        steps: usize,
        rules: &NodeRules,
        watch: &mut dyn FnMut(&FaultyDisk),
    ) -> (CrashRun, Ending) {
        let sync = rules.sync;
        let driver = Arc::new(Driver::new());
        let disk = FaultyDisk::new();
        let manual = Arc::new(ManualClock::new(LogTime::from_nanos(START_NANOS)));
        let clock: Arc<dyn Clock> = manual.clone();
        let node = CrashNode::format(&driver, &disk, &clock, rules);
        let reference = Reference::new(clock);
        let mut run = CrashRun {
            driver: Arc::clone(&driver),
            rules: rules.clone(),
            after: Vec::new(),
            moments: Vec::new(),
            operations: 0,
        };
        let mut contest =
            Contest::new(&driver, &reference, &node.volume, Some(&manual), RunRules { times: true });
        contest.begin().expect("nothing has been broken yet");
        driver.wait(node.volume.sync_all()).expect("nothing has been broken yet");
        disk.record();
        let mut random = Random::new(seed);
        let certain = node.volume.state().position.lsn;
        run.note(&node, &reference, 0, Some((1, Acknowledged::Everything)), Some(certain));
        watch(&disk);
        let mut ending = Ending::Whole;
        for (number, step) in program(seed, steps).steps.iter().enumerate() {
            let begun = disk.recorded();
            let mut failed = contest.step(number, step).err().map(|mismatch| mismatch.to_string());
            let mut acknowledged = sync.then_some(Acknowledged::Everything);
            let mut certain = None;
            if !sync && failed.is_none() && random.below(4) == 0 {
                certain = Some(node.volume.state().position.lsn);
                let asked = run.sync_something(&node, &reference, &mut random);
                failed = asked.as_ref().err().map(Errno::to_string);
                acknowledged = asked.ok();
            }
            let acknowledged = acknowledged.filter(|_| failed.is_none()).map(|what| (disk.recorded(), what));
            run.note(&node, &reference, begun, acknowledged, certain);
            if let (Some(failed), Some(after)) = (failed, run.after.last_mut()) {
                after.lsn = Lsn::MAX;
                ending = Ending::Failed(failed);
                break;
            }
            watch(&disk);
        }
        drop(contest);
        drop(node);
        run.moments = disk.take_recorded();
        run.operations = disk.operations();
        (run, ending)
    }

    /// Everything, or one file.
    fn sync_something(
        &self,
        node: &CrashNode,
        reference: &Reference,
        random: &mut Random,
    ) -> Result<Acknowledged, Errno> {
        let seen = Seen::of(&self.driver, reference).expect("the reference can be read");
        let files: Vec<_> = seen.files().collect();
        if files.is_empty() || random.below(3) == 0 {
            return self.driver.wait(node.volume.sync_all()).map(|()| Acknowledged::Everything);
        }
        let (path, file) = files[random.index(files.len())];
        let mut ino = Ino::ROOT;
        for name in path.split(|byte| *byte == b'/').skip(1) {
            let name = Name::new(name.to_vec()).expect("a name that is there");
            ino = self.driver.wait(node.volume.lookup(&Default::default(), ino, &name))?.ino;
        }
        self.driver.wait(node.volume.fsync(ino, None)).map(|()| Acknowledged::File(file.ino))
    }

    fn note(
        &mut self,
        node: &CrashNode,
        reference: &Reference,
        begun: usize,
        acknowledged: Option<(usize, Acknowledged)>,
        certain: Option<Lsn>,
    ) {
        let seen = Seen::of(&self.driver, reference).expect("the reference can be read");
        let lsn = node.volume.state().position.lsn;
        let certain = certain.or_else(|| {
            // A step that has changed something made an entry, and what came before that is as certain.
            let before = self.after.last()?;
            Some(if before.seen == seen { before.certain } else { before.lsn.next() })
        });
        self.after.push(After { seen, lsn, certain: certain.unwrap_or(lsn), begun, acknowledged });
    }

    /// How many moments there are.
    pub fn moments(&self) -> usize {
        self.moments.len()
    }

    /// How many operations the disk had done at the end, from its beginning.
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// What is on the disk at a moment.
    pub fn moment(&self, at: usize) -> &DiskMoment {
        &self.moments[at]
    }

    /// Opens what a crash at the moment `at` has left on `disk`, judges it, lets it work on, and with `twice` cuts its power after that.
    ///
    /// # Panics
    /// If anything that was acknowledged is missing, or anything is there that never was.
    pub fn judge(&self, at: usize, disk: &FaultyDisk, what: &str, twice: bool, verdicts: &mut Verdicts) {
        self.judge_under(&self.memory_rules(), at, disk, what, verdicts);
        if twice {
            verdicts.twice += 1;
            let cut = disk.after_power_cut(0);
            let node = CrashNode::open(&self.driver, &cut, &later(), &self.memory_rules())
                .unwrap_or_else(|error| panic!("{what}, and again: {error}"));
            node.fsck().unwrap_or_else(|error| panic!("{what}, and again: {error}"));
            let read = node.read_file(&self.driver, KEPT);
            assert_eq!(read.as_deref(), Ok(KEPT_BYTES), "{what}: an fsync after the crash was lost");
        }
    }

    /// The same with the index that the crash has left in `directory`.
    ///
    /// # Panics
    /// As [`CrashRun::judge`] does, or if the index knows of what the log does not have.
    pub fn judge_with_index(
        &self,
        at: usize,
        disk: &FaultyDisk,
        directory: &Path,
        what: &str,
        verdicts: &mut Verdicts,
    ) {
        let rules = NodeRules { index: Some(directory.to_owned()), ..self.rules.clone() };
        self.judge_under(&rules, at, disk, what, verdicts);
    }

    fn memory_rules(&self) -> NodeRules {
        NodeRules { index: None, ..self.rules.clone() }
    }

    fn judge_under(
        &self,
        rules: &NodeRules,
        at: usize,
        disk: &FaultyDisk,
        what: &str,
        verdicts: &mut Verdicts,
    ) {
        let node = CrashNode::open(&self.driver, disk, &later(), rules)
            .unwrap_or_else(|error| panic!("{what}: the node does not open: {error}"));
        node.fsck().unwrap_or_else(|error| panic!("{what}: {error}"));
        let seen = Seen::of(&self.driver, &node.volume).unwrap_or_else(|error| panic!("{what}: {error}"));
        let lsn = node.recovered.position.lsn;
        match self.compare(at, &seen, lsn) {
            Ok(Come::To) => {}
            Ok(Come::Between) => verdicts.between += 1,
            Err(error) => panic!("{what}, back at lsn {lsn}: {error}"),
        }
        verdicts.judged += 1;
        self.goes_on(&node, what);
    }

    /// Opens what a crash at the moment `at` has left on `disk`, and crashes it again at moments of that opening.
    ///
    /// # Panics
    /// If anything that was acknowledged before the first crash is missing after the second.
    pub fn judge_recovery(&self, at: usize, disk: &FaultyDisk, what: &str, verdicts: &mut Verdicts) {
        let open = |disk: &FaultyDisk, what: &str| {
            CrashNode::open(&self.driver, disk, &later(), &self.memory_rules())
                .unwrap_or_else(|error| panic!("{what}: the node does not open: {error}"))
        };
        disk.record();
        let first = open(disk, what).recovered.position.lsn;
        for (number, moment) in disk.take_recorded().iter().enumerate() {
            for crashed in [moment.after_kill(), moment.after_power_cut(number as u64)] {
                let what = format!("{what}, and again at moment {number} of opening");
                let node = open(&crashed, &what);
                node.fsck().unwrap_or_else(|error| panic!("{what}: {error}"));
                let seen =
                    Seen::of(&self.driver, &node.volume).unwrap_or_else(|error| panic!("{what}: {error}"));
                // What the opening has appended changes nothing that can be seen.
                let lsn = node.recovered.position.lsn.min(first);
                if let Err(error) = self.compare(at, &seen, lsn) {
                    panic!("{what}, back at lsn {lsn}: {error}");
                }
                verdicts.recovering += 1;
            }
        }
    }

    /// Opens a node whose disk has been damaged after the run, and judges it: refused, or right up to reads that fail.
    ///
    /// # Panics
    /// If anything is shown that the reference has never had, or something is missing and nobody says so.
    pub fn judge_damaged(&self, disk: &FaultyDisk, what: &str) -> Damaged {
        let node = match CrashNode::open(&self.driver, disk, &later(), &self.memory_rules()) {
            Ok(node) => node,
            Err(error) => {
                assert!(!error.is_empty(), "{what}");
                return Damaged::Refused;
            }
        };
        node.fsck().unwrap_or_else(|error| panic!("{what}: {error}"));
        let last = self.after.last().expect("a run has a beginning");
        if let Some(cut) = &node.cut {
            assert!(node.recovered.position.lsn < last.lsn, "{what}: {cut}");
            let seen = Seen::of(&self.driver, &node.volume).unwrap_or_else(|error| panic!("{what}: {error}"));
            let is_known = self.after.iter().any(|after| after.seen.difference(&seen, true).is_none());
            assert!(is_known, "{what}: what is left after the cut has never been");
            return Damaged::Cut;
        }
        assert!(node.recovered.position.lsn >= last.certain, "{what}: entries are gone, and nobody says so");
        match Seen::of(&self.driver, &node.volume) {
            Ok(seen) => {
                let difference = last.seen.difference(&seen, true);
                assert_eq!(difference, None, "{what}");
                Damaged::Harmless
            }
            Err(error) => {
                assert!(error.contains("EIO"), "{what}: {error}");
                Damaged::Unreadable
            }
        }
    }

    /// Appends idle ticks to the node on `disk`: what is before them is proven to have been durable.
    ///
    /// # Panics
    /// If the node does not open.
    pub fn tick(&self, disk: &FaultyDisk) {
        let node = CrashNode::open(&self.driver, disk, &later(), &self.memory_rules())
            .expect("an intact node opens");
        self.driver.wait(node.volume.sync_all()).expect("an intact node syncs");
    }

    fn goes_on(&self, node: &CrashNode, what: &str) {
        let goes_on = || -> Result<(), Errno> {
            node.write_file(&self.driver, "after the crash", &[3; 5000])?;
            node.remove_file(&self.driver, "after the crash")?;
            node.write_file(&self.driver, KEPT, KEPT_BYTES)
        };
        goes_on().unwrap_or_else(|errno| panic!("{what}: the node does not go on: {errno}"));
        node.fsck().unwrap_or_else(|error| panic!("{what}, having gone on: {error}"));
    }

    /// Finds the step that `seen`, which the log says is at `lsn`, shows, and compares with what the reference had then.
    fn compare(&self, at: usize, seen: &Seen, lsn: Lsn) -> Result<Come, String> {
        // A moment is recorded after its operation: what was acknowledged with n moments recorded is in the nth, whose number is n - 1.
        let acknowledged = |after: &After| after.acknowledged.as_ref().is_some_and(|(by, _)| by - 1 <= at);
        let least = self.after.iter().rposition(acknowledged).ok_or("nothing was acknowledged")?;
        // Steps that touch no disk are acknowledged at the moment before they began.
        let most = self.after.iter().rposition(|after| after.begun <= at).unwrap_or_default().max(least);
        if lsn < self.after[least].certain {
            let at_least = self.after[least].certain;
            return Err(format!("what was acknowledged is missing: step {least} was at lsn {at_least}"));
        }
        let reached = self.after[..=most].iter().rposition(|after| after.lsn <= lsn).unwrap_or_default();
        let first = reached.max(least);
        let mut told = Vec::new();
        for step in first..=(first + 1).min(most) {
            match self.after[step].seen.difference(seen, self.rules.sync) {
                None => return self.compare_bytes(at, step, most, seen).map(|()| Come::To),
                Some(difference) => told.push(format!("step {step}: {difference}")),
            }
        }
        if self.after[first].lsn < lsn
            && first < most
            && seen.is_between(&self.after[first].seen, &self.after[first + 1].seen)
        {
            return Ok(Come::Between);
        }
        Err(told.join("\n  or "))
    }

    /// Every file has the bytes that it had at some step since they were acknowledged.
    fn compare_bytes(&self, at: usize, step: usize, most: usize, seen: &Seen) -> Result<(), String> {
        for (path, file) in seen.files() {
            let ino = self.after[step].seen.nodes[path].ino;
            let is_certain = |after: &After| match &after.acknowledged {
                Some((by, what)) => {
                    by - 1 <= at && (*what == Acknowledged::Everything || *what == Acknowledged::File(ino))
                }
                None => false,
            };
            let least = self.after[..=step].iter().rposition(is_certain).unwrap_or_default();
            let versions: BTreeMap<usize, _> = (least..=most)
                .filter_map(|step| {
                    let nodes = &self.after[step].seen.nodes;
                    let node = nodes.values().find(|node| node.ino == ino && node.is_file())?;
                    Some((step, node.data.bytes()))
                })
                .collect();
            if !versions.values().any(|version| *version == file.data.bytes()) {
                return Err(format!(
                    "{}: {:?} is none of {versions:?}",
                    String::from_utf8_lossy(path),
                    file.data.bytes()
                ));
            }
        }
        Ok(())
    }
}

/// Where a node has come back to.
enum Come {
    /// The end of this step.
    To,
    /// Between the entries of one step: a write to a setuid file, for one, drops the bit first.
    Between,
}

/// The clock of a node that is opened after a crash.
fn later() -> Arc<dyn Clock> {
    Arc::new(ManualClock::new(LogTime::from_nanos(LATER_NANOS)))
}

/// A program whose files stay small enough to be read whole at every moment.
fn program(seed: u64, steps: usize) -> Program {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), random);
    let mut made: Vec<Step> = Vec::new();
    while made.len() < steps {
        let tree = strategy(steps.max(30)).new_tree(&mut runner).expect("programs are never rejected");
        made.extend(tree.current().steps.into_iter().filter_map(small));
    }
    made.truncate(steps);
    Program { steps: made }
}

fn small(mut step: Step) -> Option<Step> {
    match &mut step.operation {
        Operation::Write { offset, length, .. } => {
            *offset %= MAX_OFFSET;
            *length %= MAX_LENGTH;
        }
        Operation::Setattr { change, .. } | Operation::SetattrByHandle { change, .. } => {
            if let Some(Length::Bytes(bytes)) = &mut change.size {
                *bytes %= MAX_OFFSET;
            }
        }
        Operation::Setxattr { length, .. } => *length %= 2000,
        // Time that passes makes ticks, at moments that the program does not decide.
        Operation::Wait { .. } => return None,
        _ => {}
    }
    Some(step)
}

const KEPT: &str = "kept after the crash";
const KEPT_BYTES: &[u8] = b"what an fsync after a crash has acknowledged";
const MAX_OFFSET: u64 = 150_000;
const MAX_LENGTH: u32 = 70_000;
const START_NANOS: u64 = 1_700_000_000_000_000_000;
const LATER_NANOS: u64 = START_NANOS + 3_600_000_000_000;
