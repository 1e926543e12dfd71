//! The reference model judged: two of them cannot be told apart, and one that is wrong in a single rule can.
//!
//! Invariants:
//! - Each fault here is a mistake that a real file system has made; a harness that misses one of them is broken.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use murphy_fs::{
    Answer, Attr, Caller, DirEntry, DirEntryPlus, Errno, FileSystem, Handle, Ino, Name, NewNode, OpenFlags,
    Opened, RenameMode, SetAttr, StatFs, Timespec, XattrMode, XattrName,
};
use murphy_log::{Clock, ManualClock};
use murphy_tests::{Contest, Driver, Reference, RunRules, Search, TreeImage, judge, search, strategy};
use parking_lot::Mutex;
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};

/// A harness that finds differences where there are none would be switched off.
#[test]
fn two_references_cannot_be_told_apart() {
    judge(|clock| Arc::new(Reference::new(clock)), 100);
}

/// After a restart the tests go on with what is there.
#[test]
fn a_contest_goes_on_over_trees_that_exist() {
    let driver = Driver::new();
    let clock = Arc::new(ManualClock::default());
    let (reference, candidate) = (Reference::new(clock.clone()), Reference::new(clock.clone()));
    let mut runner = TestRunner::deterministic();
    for _ in 0..5 {
        let mut contest =
            Contest::new(&driver, &reference, &candidate, Some(&clock), RunRules { times: true });
        for _ in 0..3 {
            let program = strategy(100).new_tree(&mut runner).expect("nothing is filtered").current();
            contest.run(&program).expect("equal file systems");
        }
    }
    assert!(TreeImage::of(&driver, &candidate).expect("a sound tree").inodes() > 20);
}

/// The canary: a harness that finds nothing in a wrong file system finds nothing in Murphy either.
#[test]
fn each_fault_is_found() {
    for fault in FAULTS {
        let quick = Search { shrinks_max: 0, ..Search::of(300) };
        let found = search(quick, |clock| Arc::new(Faulty::new(clock, fault)));
        assert!(found.is_err(), "{fault:?} was not found");
    }
}

/// What a person reads must be short enough to be read.
#[test]
fn a_counterexample_is_shrunk() {
    let found = search(Search::of(300), |clock| Arc::new(Faulty::new(clock, Fault::TruncateIsLost)));
    let counterexample = found.expect_err("a lost truncate is found");
    assert!(counterexample.program.steps.len() <= 4, "{counterexample}");
    assert!(counterexample.to_string().contains("MURPHY_SEED="), "{counterexample}");
}

/// One mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    TruncateIsLost,
    ChmodForgetsCtime,
    WriteKeepsSetuid,
    LastByteOfAWriteIsLost,
    AppendUsesTheOffset,
    ScanSkipsAnEntry,
    StickyIsIgnored,
    NoReplaceReplaces,
    OrphanIsEmptied,
    XattrCreateReplaces,
    DataIsCalledUnchanged,
    HardLinkIsACopy,
}

const FAULTS: [Fault; 12] = [
    Fault::TruncateIsLost,
    Fault::ChmodForgetsCtime,
    Fault::WriteKeepsSetuid,
    Fault::LastByteOfAWriteIsLost,
    Fault::AppendUsesTheOffset,
    Fault::ScanSkipsAnEntry,
    Fault::StickyIsIgnored,
    Fault::NoReplaceReplaces,
    Fault::OrphanIsEmptied,
    Fault::XattrCreateReplaces,
    Fault::DataIsCalledUnchanged,
    Fault::HardLinkIsACopy,
];

/// A reference with one mistake.
struct Faulty {
    inner: Reference,
    fault: Fault,
    /// What is shown instead of a real change time.
    stale: Mutex<BTreeMap<(Ino, Timespec), Timespec>>,
}

impl Faulty {
    fn new(clock: Arc<dyn Clock>, fault: Fault) -> Faulty {
        Faulty { inner: Reference::new(clock), fault, stale: Mutex::default() }
    }

    fn has(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn shown(&self, answer: Answer<Attr>) -> Answer<Attr> {
        let Answer::Now(result) = answer else { return answer };
        Answer::Now(result.map(|attr| self.stale(attr)))
    }

    fn stale(&self, attr: Attr) -> Attr {
        let stale = self.stale.lock().get(&(attr.ino, attr.ctime)).copied();
        Attr { ctime: stale.unwrap_or(attr.ctime), ..attr }
    }

    fn attr(&self, ino: Ino) -> Option<Attr> {
        now(self.inner.getattr(ino)).ok()
    }
}

fn now<T>(answer: Answer<T>) -> Result<T, Errno> {
    match answer {
        Answer::Now(result) => result,
        Answer::Later(_) => panic!("the reference answers at once"),
    }
}

impl FileSystem for Faulty {
    fn lookup(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<Attr> {
        self.shown(self.inner.lookup(caller, parent, name))
    }

    fn parent(&self, directory: Ino) -> Answer<Ino> {
        self.inner.parent(directory)
    }

    fn getattr(&self, ino: Ino) -> Answer<Attr> {
        self.shown(self.inner.getattr(ino))
    }

    fn setattr(
        &self,
        caller: &Caller,
        ino: Ino,
        handle: Option<Handle>,
        mut change: SetAttr,
    ) -> Answer<Attr> {
        if self.has(Fault::TruncateIsLost) {
            change.size = None;
        }
        let before = self.attr(ino);
        let answer = self.inner.setattr(caller, ino, handle, change);
        if let (Fault::ChmodForgetsCtime, Some(_), Some(before), Some(after)) =
            (self.fault, change.mode, before, self.attr(ino))
        {
            self.stale.lock().insert((ino, after.ctime), before.ctime);
        }
        self.shown(answer)
    }

    fn readlink(&self, ino: Ino) -> Answer<Bytes> {
        self.inner.readlink(ino)
    }

    fn mkdir(&self, caller: &Caller, parent: Ino, name: &Name, mode: u16) -> Answer<Attr> {
        self.inner.mkdir(caller, parent, name, mode)
    }

    fn mknod(&self, caller: &Caller, parent: Ino, name: &Name, node: NewNode) -> Answer<Attr> {
        self.inner.mknod(caller, parent, name, node)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: Ino,
        name: &Name,
        mode: u16,
        flags: OpenFlags,
    ) -> Answer<(Attr, Opened)> {
        self.inner.create(caller, parent, name, mode, flags)
    }

    fn symlink(&self, caller: &Caller, parent: Ino, name: &Name, target: &[u8]) -> Answer<Attr> {
        self.inner.symlink(caller, parent, name, target)
    }

    fn link(&self, caller: &Caller, ino: Ino, parent: Ino, name: &Name) -> Answer<Attr> {
        if self.has(Fault::HardLinkIsACopy) && self.attr(ino).is_some_and(|attr| attr.size == 0) {
            let mode = self.attr(ino).map_or(0, |attr| attr.mode);
            return match self.inner.create(caller, parent, name, mode, OpenFlags::default()) {
                Answer::Now(result) => Answer::Now(result.map(|(attr, _)| attr)),
                Answer::Later(_) => Answer::Now(Err(Errno::EIO)),
            };
        }
        self.shown(self.inner.link(caller, ino, parent, name))
    }

    fn unlink(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<()> {
        let caller = if self.has(Fault::StickyIsIgnored) { &Caller::default() } else { caller };
        let gone = now(self.inner.lookup(caller, parent, name)).ok();
        let answer = self.inner.unlink(caller, parent, name);
        if let (Fault::OrphanIsEmptied, Some(gone)) = (self.fault, gone)
            && self.attr(gone.ino).is_some_and(|attr| attr.nlink == 0)
        {
            let size = Some(0);
            let _ = self.inner.setattr(caller, gone.ino, None, SetAttr { size, ..SetAttr::default() });
        }
        answer
    }

    fn rmdir(&self, caller: &Caller, parent: Ino, name: &Name) -> Answer<()> {
        self.inner.rmdir(caller, parent, name)
    }

    fn rename(&self, caller: &Caller, from: (Ino, &Name), to: (Ino, &Name), mode: RenameMode) -> Answer<()> {
        let is_ignored = self.has(Fault::NoReplaceReplaces) && mode == RenameMode::NoReplace;
        self.inner.rename(caller, from, to, if is_ignored { RenameMode::Replace } else { mode })
    }

    fn readdir(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntry>> {
        let skipped = u64::from(self.has(Fault::ScanSkipsAnEntry) && cookie == 4);
        self.inner.readdir(directory, cookie + skipped, limit)
    }

    fn readdir_plus(&self, directory: Ino, cookie: u64, limit: usize) -> Answer<Vec<DirEntryPlus>> {
        let Answer::Now(result) = self.inner.readdir_plus(directory, cookie, limit) else {
            return Answer::Now(Err(Errno::EIO));
        };
        let shown = |plus: DirEntryPlus| DirEntryPlus { attr: self.stale(plus.attr), entry: plus.entry };
        Answer::Now(result.map(|entries| entries.into_iter().map(shown).collect()))
    }

    fn open(&self, caller: &Caller, ino: Ino, flags: OpenFlags) -> Answer<Opened> {
        let Answer::Now(result) = self.inner.open(caller, ino, flags) else {
            return Answer::Now(Err(Errno::EIO));
        };
        let is_wrong = self.has(Fault::DataIsCalledUnchanged);
        Answer::Now(result.map(|opened| Opened { unchanged: opened.unchanged || is_wrong, ..opened }))
    }

    fn read(&self, ino: Ino, handle: Handle, offset: u64, length: u32) -> Answer<Bytes> {
        self.inner.read(ino, handle, offset, length)
    }

    fn write(&self, caller: &Caller, ino: Ino, handle: Handle, offset: u64, data: Bytes) -> Answer<u32> {
        let caller = if self.has(Fault::WriteKeepsSetuid) { &Caller::default() } else { caller };
        if self.has(Fault::LastByteOfAWriteIsLost) && data.len() > 1000 {
            let torn = [&data[..data.len() - 1], &[0]].concat();
            return self.inner.write(caller, ino, handle, offset, torn.into());
        }
        if self.has(Fault::AppendUsesTheOffset) {
            let flags = OpenFlags { write: true, ..OpenFlags::default() };
            if let (Ok(_), Ok(opened)) =
                (now(self.inner.flush(ino, handle)), now(self.inner.open(caller, ino, flags)))
            {
                let answer = self.inner.write(caller, ino, opened.handle, offset, data);
                self.inner.release(ino, opened.handle);
                return answer;
            }
        }
        self.inner.write(caller, ino, handle, offset, data)
    }

    fn flush(&self, ino: Ino, handle: Handle) -> Answer<()> {
        self.inner.flush(ino, handle)
    }

    fn fsync(&self, ino: Ino, handle: Option<Handle>) -> Answer<()> {
        self.inner.fsync(ino, handle)
    }

    fn release(&self, ino: Ino, handle: Handle) {
        self.inner.release(ino, handle);
    }

    fn setxattr(
        &self,
        caller: &Caller,
        ino: Ino,
        name: &XattrName,
        value: Bytes,
        mode: XattrMode,
    ) -> Answer<()> {
        let is_ignored = self.has(Fault::XattrCreateReplaces) && mode == XattrMode::Create;
        self.inner.setxattr(caller, ino, name, value, if is_ignored { XattrMode::Set } else { mode })
    }

    fn getxattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Answer<Bytes> {
        self.inner.getxattr(caller, ino, name)
    }

    fn listxattr(&self, caller: &Caller, ino: Ino) -> Answer<Vec<XattrName>> {
        self.inner.listxattr(caller, ino)
    }

    fn removexattr(&self, caller: &Caller, ino: Ino, name: &XattrName) -> Answer<()> {
        self.inner.removexattr(caller, ino, name)
    }

    fn statfs(&self) -> Answer<StatFs> {
        self.inner.statfs()
    }

    fn sync_all(&self) -> Answer<()> {
        self.inner.sync_all()
    }
}
