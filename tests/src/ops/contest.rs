//! Two file systems run one program, and must not be told apart.
//!
//! Invariants:
//! - Inodes are compared through a one-to-one mapping that only grows: a number used twice, or two numbers for one file, is found.
//! - After every step the attributes of every live inode are compared, not only of those that the step named.
//! - The first side is the judge: an inode is dead when it says ESTALE.

use std::{collections::BTreeMap, fmt, time::Duration};

use murphy_fs::{
    Answer, Attr, Caller, DirEntryPlus, Errno, FileSystem, Handle, Ino, Kind, Name, SetAttr, SetTime,
    Timespec,
};
use murphy_log::ManualClock;

use super::{NamePick, Pick, Place, Program, Step, perform::name, scan::Scan};
use crate::{Driver, TreeRules, attr_difference, compare::hash_contents, compare_trees};

/// What a contest compares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RunRules {
    /// Times, exactly: both sides must live under the clock that the contest is given.
    pub times: bool,
}

/// The step at which two file systems could be told apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mismatch {
    /// Which step, from 0; the number of steps if it was found at the end.
    pub step: usize,
    /// What it did.
    pub operation: String,
    /// What was not the same, the judge's side first.
    pub what: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} ({}): {}", self.step, self.operation, self.what)
    }
}

impl std::error::Error for Mismatch {}

/// Two file systems with the same tree.
pub struct Contest<'a> {
    pub(super) driver: &'a Driver,
    reference: &'a dyn FileSystem,
    candidate: &'a dyn FileSystem,
    clock: Option<&'a ManualClock>,
    rules: RunRules,
    /// What is alive; the root first.
    pub(super) nodes: Vec<Node>,
    candidates: BTreeMap<Ino, Ino>,
    references: BTreeMap<Ino, Ino>,
    pub(super) open: Vec<Open>,
    pub(super) scans: Vec<Scan>,
    pub(super) removed_directories: Vec<Twin>,
    /// Inodes that died: the candidate may still be purging them.
    removed: u64,
}

impl<'a> Contest<'a> {
    /// `reference` judges `candidate`. Their trees must be equal. `clock` is the clock of both, to be moved by the contest.
    pub fn new(
        driver: &'a Driver,
        reference: &'a dyn FileSystem,
        candidate: &'a dyn FileSystem,
        clock: Option<&'a ManualClock>,
        rules: RunRules,
    ) -> Contest<'a> {
        Contest {
            driver,
            reference,
            candidate,
            clock,
            rules,
            nodes: Vec::new(),
            candidates: BTreeMap::new(),
            references: BTreeMap::new(),
            open: Vec::new(),
            scans: Vec::new(),
            removed_directories: Vec::new(),
            removed: 0,
        }
    }

    /// Runs the program on both sides, compares after each step, and everything at the end; closes what it opened. May be called
    /// again, to go on. After a restart of the candidate a new contest goes on: it learns the trees as they are.
    ///
    /// # Errors
    /// The first step after which the two can be told apart.
    pub fn run(&mut self, program: &Program) -> Result<(), Mismatch> {
        self.run_watched(program, &mut |_| Ok(()))
    }

    /// As [`Contest::run`]; `after` is called after each step, with its number, and may find something wrong too.
    ///
    /// # Errors
    /// As those of [`Contest::run`].
    pub fn run_watched(
        &mut self,
        program: &Program,
        after: &mut dyn FnMut(usize) -> Result<(), String>,
    ) -> Result<(), Mismatch> {
        self.begin()?;
        for (number, step) in program.steps.iter().enumerate() {
            self.step(number, step)?;
            after(number).map_err(|what| mismatch(number, step, what))?;
        }
        let step = program.steps.len();
        self.finish().map_err(|what| Mismatch { step, operation: "the end".to_owned(), what })
    }

    /// Makes the roots alike and learns what is there, unless that has been done.
    ///
    /// # Errors
    /// The two can be told apart before anything has happened.
    pub fn begin(&mut self) -> Result<(), Mismatch> {
        if self.nodes.is_empty() {
            self.prepare().map_err(|what| Mismatch { step: 0, operation: "prepare".to_owned(), what })?;
        }
        Ok(())
    }

    /// Does one step on both sides, after [`Contest::begin`], and compares.
    ///
    /// # Errors
    /// The two can be told apart; `number` says where.
    pub fn step(&mut self, number: usize, step: &Step) -> Result<(), Mismatch> {
        self.pass(STEP);
        self.perform(step).and_then(|()| self.check()).map_err(|what| mismatch(number, step, what))
    }

    pub(super) fn pass(&self, duration: Duration) {
        if let Some(clock) = self.clock {
            clock.advance(duration);
        }
    }

    pub(super) fn side(&self, side: Side) -> &'a dyn FileSystem {
        match side {
            Side::Reference => self.reference,
            Side::Candidate => self.candidate,
        }
    }

    /// Asks both sides. `None` if both fail alike.
    pub(super) fn agree<T>(
        &self,
        call: impl Fn(&dyn FileSystem, Side) -> Answer<T>,
    ) -> Verdict<Option<(T, T)>> {
        let [first, second] = Side::BOTH.map(|side| self.driver.wait(call(self.side(side), side)));
        match (first, second) {
            (Ok(first), Ok(second)) => Ok(Some((first, second))),
            (Err(first), Err(second)) if first == second => Ok(None),
            (first, second) => Err(format!("{}, not {}", outcome(&first), outcome(&second))),
        }
    }

    /// Asks both sides for something that must be equal.
    pub(super) fn equal<T: PartialEq + fmt::Debug>(
        &self,
        call: impl Fn(&dyn FileSystem, Side) -> Answer<T>,
    ) -> Verdict {
        match self.agree(call)? {
            Some((first, second)) if first != second => Err(format!("{first:?}, not {second:?}")),
            _ => Ok(()),
        }
    }

    /// The attributes must be equal, and of twins.
    pub(super) fn same(&self, first: &Attr, second: &Attr) -> Verdict {
        if self.candidates.get(&first.ino) != Some(&second.ino) {
            return Err(format!(
                "inode {} of the reference is {:?}, not {}",
                first.ino,
                self.candidates.get(&first.ino),
                second.ino
            ));
        }
        match attr_difference(first, second, self.rules.times) {
            Some(difference) => Err(format!("inode {} (candidate {}): {difference}", first.ino, second.ino)),
            None => Ok(()),
        }
    }

    /// A new inode on both sides.
    pub(super) fn born(&mut self, first: &Attr, second: &Attr) -> Verdict {
        if self.candidates.contains_key(&first.ino) || self.references.contains_key(&second.ino) {
            return Err(format!("a new inode has a used number: {}, {}", first.ino, second.ino));
        }
        self.candidates.insert(first.ino, second.ino);
        self.references.insert(second.ino, first.ino);
        self.nodes
            .push(Node { twin: Twin { reference: first.ino, candidate: second.ino }, kind: first.kind });
        self.same(first, second)
    }

    pub(super) fn candidate_of(&self, reference: Ino) -> Option<Ino> {
        self.candidates.get(&reference).copied()
    }

    pub(super) fn pick(&self, pick: Pick) -> Twin {
        let wanted: Vec<&Node> = self.nodes.iter().filter(|node| Some(node.kind) == pick.kind).collect();
        match wanted.len() {
            0 => self.nodes[usize::from(pick.number) % self.nodes.len()].twin,
            count => wanted[usize::from(pick.number) % count].twin,
        }
    }

    pub(super) fn directory(&self, number: u16) -> Twin {
        self.pick(Pick { number, kind: Some(Kind::Directory) })
    }

    pub(super) fn place(&self, place: Place) -> Verdict<(Twin, Name)> {
        let directory = self.directory(place.directory);
        let name = match place.name {
            NamePick::Pool(number) => name(number),
            NamePick::Existing(number, kind) => {
                let entries = self.list(Side::Reference, directory, LIST_ENTRIES)?;
                let wanted =
                    entries.values().filter(|entry| Some(entry.entry.kind) == kind).collect::<Vec<_>>();
                let wanted = if wanted.is_empty() { entries.values().collect() } else { wanted };
                match usize::from(number).checked_rem(wanted.len()) {
                    Some(index) => wanted[index].entry.name.clone(),
                    None => name((number % 256) as u8),
                }
            }
        };
        Ok((directory, name))
    }

    /// A whole directory, read in pages; what the pages alone can refute is refuted.
    pub(super) fn list(
        &self,
        side: Side,
        directory: Twin,
        page: usize,
    ) -> Verdict<BTreeMap<Name, DirEntryPlus>> {
        let mut entries = BTreeMap::new();
        let mut cookie = 0;
        loop {
            let call = self.side(side).readdir_plus(directory.on(side), cookie, page);
            let read =
                self.driver.wait(call).map_err(|errno| format!("{side:?}: readdir fails with {errno}"))?;
            if read.is_empty() {
                return Ok(entries);
            }
            if read.len() > page {
                return Err(format!("{side:?}: readdir gives {} entries of {page}", read.len()));
            }
            for entry in read {
                if entry.entry.cookie <= cookie
                    || entry.entry.cookie < COOKIE_MIN
                    || entry.entry.cookie >> 63 != 0
                {
                    return Err(format!("{side:?}: cookie {} after {cookie}", entry.entry.cookie));
                }
                cookie = entry.entry.cookie;
                if entry.entry.ino != entry.attr.ino || entry.entry.kind != entry.attr.kind {
                    return Err(format!("{side:?}: entry and attributes of {:?} disagree", entry.entry.name));
                }
                let name = entry.entry.name.clone();
                if entries.insert(name.clone(), entry).is_some() {
                    return Err(format!("{side:?}: readdir gives {name:?} twice"));
                }
            }
        }
    }

    /// The roots are made alike, and what is there already is learned.
    fn prepare(&mut self) -> Verdict {
        let epoch = Some(SetTime::At(Timespec::default()));
        let all =
            SetAttr { mode: Some(0o777), uid: Some(0), gid: Some(0), size: None, atime: epoch, mtime: epoch };
        let roots = self.agree(|fs, _| fs.setattr(&Caller::default(), Ino::ROOT, None, all))?;
        let (first, second) = roots.ok_or("the root cannot be changed")?;
        self.meet(&first, &second)?;
        let mut next = 0;
        while let Some(node) = self.nodes.get(next) {
            let twin = node.twin;
            if node.kind == Kind::Directory {
                self.compare_lists(twin, LIST_ENTRIES)?;
            }
            next += 1;
        }
        Ok(())
    }

    /// Both directories hold the same, in whatever order.
    pub(super) fn compare_lists(&mut self, directory: Twin, page: usize) -> Verdict {
        let [first, second] = [Side::Reference, Side::Candidate].map(|side| self.list(side, directory, page));
        let (first, second) = (first?, second?);
        if !first.keys().eq(second.keys()) {
            return Err(format!("names {:?}, not {:?}", first.keys(), second.keys()));
        }
        first
            .values()
            .zip(second.values())
            .try_for_each(|(first, second)| self.meet(&first.attr, &second.attr))
    }

    /// Twins that may be seen for the first time.
    fn meet(&mut self, first: &Attr, second: &Attr) -> Verdict {
        let is_alive = self.nodes.iter().any(|node| node.twin.reference == first.ino);
        if is_alive { self.same(first, second) } else { self.born(first, second) }
    }

    /// After each step: all live inodes, all scans.
    fn check(&mut self) -> Verdict {
        let mut dead = Vec::new();
        for node in &self.nodes {
            match self.driver.wait(self.reference.getattr(node.twin.reference)) {
                Ok(first) => {
                    let second =
                        self.driver.wait(self.candidate.getattr(node.twin.candidate)).map_err(|errno| {
                            format!("live inode {} (candidate {}): {errno}", first.ino, node.twin.candidate)
                        })?;
                    self.same(&first, &second)?;
                }
                Err(Errno::ESTALE) => dead.push(node.twin),
                Err(errno) => return Err(format!("the reference's getattr fails with {errno}")),
            }
        }
        for twin in dead {
            self.bury(twin);
        }
        self.watch_scans()
    }

    fn bury(&mut self, twin: Twin) {
        self.removed += 1;
        if self.nodes.iter().any(|node| node.twin == twin && node.kind == Kind::Directory) {
            self.removed_directories.push(twin);
        }
        self.nodes.retain(|node| node.twin != twin);
        self.scans.retain(|scan| scan.directory != twin);
    }

    fn finish(&mut self) -> Verdict {
        while !self.scans.is_empty() {
            self.go_on_scanning(0, 1)?;
        }
        let rules = if self.rules.times { TreeRules::SAME_HISTORY } else { TreeRules::UNTIMED };
        let differences = compare_trees(self.driver, self.reference, self.candidate, rules);
        if !differences.is_empty() {
            let told: Vec<String> = differences.iter().map(ToString::to_string).collect();
            return Err(told.join("; "));
        }
        for number in 0..self.open.len() {
            self.compare_contents(self.open[number])?;
        }
        for open in std::mem::take(&mut self.open) {
            self.release(open);
        }
        self.check()?;
        self.compare_usage()
    }

    pub(super) fn release(&self, open: Open) {
        for side in Side::BOTH {
            self.side(side).release(open.twin.on(side), open.on(side));
        }
    }

    /// Whole contents through open handles; a handle that cannot read must fail alike.
    pub(super) fn compare_contents(&self, open: Open) -> Verdict {
        let attr = self.driver.wait(self.reference.getattr(open.twin.reference));
        let size = attr.map_err(|errno| format!("the reference lost an open file: {errno}"))?.size;
        let [first, second] = Side::BOTH.map(|side| {
            hash_contents(self.driver, self.side(side), (open.twin.on(side), open.on(side)), size)
        });
        if first != second {
            return Err(format!(
                "contents of inode {} differ ({}, not {})",
                open.twin.reference,
                outcome(&first),
                outcome(&second)
            ));
        }
        Ok(())
    }

    /// Inodes in use: those alive, and at most those besides that a purge may not have reached.
    pub(super) fn compare_usage(&self) -> Verdict {
        let alive = self.nodes.len() as u64;
        for side in Side::BOTH {
            let usage =
                self.driver.wait(self.side(side).statfs()).map_err(|errno| format!("{side:?}: {errno}"))?;
            if usage.inodes < alive || usage.inodes > alive + self.removed {
                return Err(format!("{side:?}: {} inodes in use, {alive} alive", usage.inodes));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Contest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contest")
            .field("nodes", &self.nodes)
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

/// What could not be told apart, or a text that says what could.
pub(super) type Verdict<T = ()> = Result<T, String>;

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Side {
    Reference,
    Candidate,
}

impl Side {
    pub(super) const BOTH: [Side; 2] = [Side::Reference, Side::Candidate];
}

/// One inode on both sides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Twin {
    reference: Ino,
    candidate: Ino,
}

impl Twin {
    pub(super) fn on(self, side: Side) -> Ino {
        match side {
            Side::Reference => self.reference,
            Side::Candidate => self.candidate,
        }
    }
}

/// A live inode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    pub(super) twin: Twin,
    pub(super) kind: Kind,
}

/// An open file on both sides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Open {
    pub(super) twin: Twin,
    pub(super) reference: Handle,
    pub(super) candidate: Handle,
}

impl Open {
    pub(super) fn on(self, side: Side) -> Handle {
        match side {
            Side::Reference => self.reference,
            Side::Candidate => self.candidate,
        }
    }
}

fn mismatch(number: usize, step: &Step, what: String) -> Mismatch {
    Mismatch { step: number, operation: format!("{:?}: {:?}", step.who, step.operation), what }
}

fn outcome<T>(result: &Result<T, Errno>) -> String {
    match result {
        Ok(_) => "success".to_owned(),
        Err(errno) => errno.to_string(),
    }
}

/// What each step takes: no two share a time.
const STEP: Duration = Duration::from_nanos(1_000_003);
/// Entries read in one call where paging is not the question.
const LIST_ENTRIES: usize = 1000;
/// The smallest cookie of an entry.
const COOKIE_MIN: u64 = 3;
