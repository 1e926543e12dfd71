//! Random programs of file system calls, and the contest in which two file systems run the same one.
//!
//! Invariants:
//! - An operation names what it works on by numbers, taken modulo what is there when it runs: every program is valid, whatever
//!   a shrinker has cut out of it.
//! - One seed reruns everything: no ambient randomness, no ambient time.

mod choose;
mod contest;
mod judge;
mod perform;
mod scan;

use std::time::Duration;

use murphy_fs::{Caller, Kind, OpenFlags, RenameMode, Timespec, XattrMode};

pub use self::{
    choose::strategy,
    contest::{Contest, Mismatch, RunRules},
    judge::{
        Counterexample, Judge, Search, Subject, judge, judge_inside, judge_subjects, search, search_inside,
        search_subjects,
    },
};

/// A sequence of calls.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// In order.
    pub steps: Vec<Step>,
}

/// One call by somebody.
#[derive(Clone, Debug)]
pub struct Step {
    /// Who asks.
    pub who: Who,
    /// What for.
    pub operation: Operation,
}

/// The callers of a program: two of them share a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names are the people")]
pub enum Who {
    Root,
    Alice,
    Bob,
    Carol,
}

impl Who {
    /// As the file system sees them.
    pub fn caller(self) -> Caller {
        let (uid, gid) = match self {
            Who::Root => (0, 0),
            Who::Alice => (1000, 1000),
            Who::Bob => (1001, 1000),
            Who::Carol => (1002, 1002),
        };
        Caller { uid, gid, pid: 1 }
    }
}

/// An inode: the one with this number among those alive (of the wanted kind, if there is one), modulo their count.
#[derive(Clone, Copy, Debug)]
pub struct Pick {
    /// The number.
    pub number: u16,
    /// The kind that is preferred.
    pub kind: Option<Kind>,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Which directory, modulo the directories alive.
    pub directory: u16,
    /// Which name in it.
    pub name: NamePick,
}

/// Which name.
#[derive(Clone, Copy, Debug)]
pub enum NamePick {
    /// One of the small pool, whether it is there or not.
    Pool(u8),
    /// One that is there, of the preferred kind if there is one; one of the pool if the directory is empty.
    Existing(u16, Option<Kind>),
}

/// How long a truncated file shall be.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// So many bytes.
    Bytes(u64),
    /// So many bytes from where it ends now.
    Relative(i32),
}

/// A time to set, as for `utimensat`.
#[expect(missing_docs, reason = "the names are those of `utimensat`")]
#[derive(Clone, Copy, Debug)]
pub enum TimePick {
    Omit,
    Now,
    At(Timespec),
}

/// Attributes to set in one call.
#[expect(missing_docs, reason = "the fields are those of `SetAttr`")]
#[derive(Clone, Copy, Debug)]
pub struct AttributePick {
    pub mode: Option<u16>,
    pub uid: Option<Who>,
    pub gid: Option<Who>,
    pub size: Option<Length>,
    pub atime: TimePick,
    pub mtime: TimePick,
}

/// One call. Handles and scans are numbered like inodes, modulo those open.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the variants are the calls of `FileSystem`, the fields their arguments")]
pub enum Operation {
    Lookup {
        place: Place,
    },
    Getattr {
        node: Pick,
    },
    Setattr {
        node: Pick,
        change: AttributePick,
    },
    SetattrByHandle {
        handle: u16,
        change: AttributePick,
    },
    Readlink {
        node: Pick,
    },
    Mkdir {
        place: Place,
        mode: u16,
    },
    Mknod {
        place: Place,
        kind: Kind,
        mode: u16,
        rdev: u32,
    },
    Create {
        place: Place,
        mode: u16,
        flags: OpenFlags,
    },
    Symlink {
        place: Place,
        target: Vec<u8>,
    },
    Link {
        node: Pick,
        place: Place,
    },
    LinkOpen {
        handle: u16,
        place: Place,
    },
    Unlink {
        place: Place,
    },
    Rmdir {
        place: Place,
    },
    Rename {
        from: Place,
        to: Place,
        mode: RenameMode,
    },
    /// A call that should have a directory as its parent, with something else.
    MkdirIn {
        node: Pick,
        name: u8,
    },
    /// Names in a directory that was removed.
    InRemoved {
        removed: u16,
        name: u8,
    },
    List {
        node: Pick,
        page: u8,
    },
    BeginScan {
        directory: u16,
    },
    GoOnScanning {
        scan: u16,
        page: u8,
    },
    Open {
        node: Pick,
        flags: OpenFlags,
    },
    Read {
        handle: u16,
        offset: u64,
        length: u32,
    },
    /// Reads the whole file.
    ReadAll {
        handle: u16,
    },
    Write {
        handle: u16,
        offset: u64,
        length: u32,
        seed: u8,
    },
    Flush {
        handle: u16,
    },
    Fsync {
        node: Pick,
    },
    FsyncOpen {
        handle: u16,
    },
    Release {
        handle: u16,
    },
    /// A handle with an inode that it does not belong to.
    ReadWrongFile {
        handle: u16,
        node: Pick,
    },
    Setxattr {
        node: Pick,
        name: u8,
        length: u32,
        seed: u8,
        mode: XattrMode,
    },
    Getxattr {
        node: Pick,
        name: u8,
    },
    Listxattr {
        node: Pick,
    },
    Removexattr {
        node: Pick,
        name: u8,
    },
    Statfs,
    SyncAll,
    /// Nothing happens for a while, in which dirty data may be flushed.
    Wait {
        duration: Duration,
    },
}
