//! Programs of system calls: the same ones through the kernel into a mount, into a directory of another file system, and into the
//! reference model.
//!
//! Invariants:
//! - A call names what it works on by a path of a small pool, and open files by numbers modulo those open: every program is valid,
//!   whatever a shrinker has cut out of it.
//! - All sides get the same calls in the same order, and must answer each alike: the same bytes and attributes, or the same errno.
//! - Times that nobody set, sizes of directories and inode numbers are each file system's own affair.

mod directory;
mod modelled;

use std::fmt;

use murphy_fs::{Kind, RenameMode, XattrMode};
use proptest::{collection::vec, prelude::*, sample::select};

pub use directory::{RealDirectory, own_umask};
pub use modelled::Modelled;

use crate::Who;

/// One call by somebody.
#[derive(Clone, Debug)]
pub struct CallStep {
    /// Who asks.
    pub who: Who,
    /// What for.
    pub call: Call,
}

/// A name in a directory, both of small pools.
#[derive(Clone, Copy, Debug)]
pub struct Spot {
    directory: u8,
    name: u8,
}

impl Spot {
    /// The names from the root of the tree to the directory.
    fn directory(&self) -> &'static [&'static [u8]] {
        DIRECTORIES[usize::from(self.directory) % DIRECTORIES.len()]
    }

    fn name(&self) -> Vec<u8> {
        match usize::from(self.name) % (NAMES.len() + 2) {
            number if number < NAMES.len() => NAMES[number].to_vec(),
            number => vec![b'l'; 255 + number - NAMES.len()],
        }
    }
}

/// How a file is opened.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the fields are the flags of `open`")]
pub struct How {
    pub read: bool,
    pub write: bool,
    pub append: bool,
    pub truncate: bool,
    pub create: bool,
    pub exclusive: bool,
}

/// A system call.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the variants are the calls, the fields their arguments")]
pub enum Call {
    Mkdir { at: Spot, mode: u16 },
    Socket { at: Spot, mode: u16 },
    Open { at: Spot, how: How, mode: u16 },
    Close { file: u8 },
    Read { file: u8, offset: u64, length: u16 },
    Write { file: u8, offset: u64, length: u16, seed: u8 },
    Truncate { at: Spot, size: u64 },
    TruncateOpen { file: u8, size: u64 },
    Fsync { file: u8 },
    StatOpen { file: u8 },
    Rename { from: Spot, to: Spot, mode: RenameMode },
    Link { from: Spot, to: Spot },
    Symlink { at: Spot },
    Unlink { at: Spot },
    Rmdir { at: Spot },
    Chmod { at: Spot, mode: u16 },
    Chown { at: Spot, uid: Option<Who>, gid: Option<Who> },
    Utimens { at: Spot, seconds: i64, nanos: u32 },
    Stat { at: Spot },
    Readlink { at: Spot },
    List { at: Spot },
    Setxattr { at: Spot, name: u8, length: u16, mode: XattrMode },
    Getxattr { at: Spot, name: u8 },
    Listxattr { at: Spot },
    Removexattr { at: Spot, name: u8 },
}

/// What a call answered.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Reply {
    Done,
    Count(u64),
    Bytes(Vec<u8>),
    /// Sorted.
    Names(Vec<Vec<u8>>),
    /// The size is 0 for a directory.
    Stat {
        kind: Kind,
        mode: u16,
        uid: u32,
        gid: u32,
        nlink: u32,
        size: u64,
    },
    Time {
        seconds: i64,
        nanos: u32,
    },
}

/// A number of an errno.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Failed(pub i32);

impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        f.write_str(&text)
    }
}

/// Something that runs system calls.
pub trait Calls {
    /// What people know it as.
    fn name(&self) -> &'static str;
    /// Runs one call.
    fn call(&mut self, who: Who, call: &Call) -> Result<Reply, Failed>;
}

/// Runs a program on all sides. The first one is the judge.
///
/// # Errors
/// The first call that they answer differently.
pub fn agree(sides: &mut [&mut dyn Calls], program: &[CallStep]) -> Result<(), String> {
    for (number, step) in program.iter().enumerate() {
        let mut first = None;
        for side in sides.iter_mut() {
            let answer = side.call(step.who, &step.call);
            let (judge, expected) = first.get_or_insert_with(|| (side.name(), answer.clone()));
            if answer != *expected {
                let CallStep { who, call } = step;
                return Err(format!(
                    "step {number}: {who:?}: {call:?}: {} says {answer:?}, {judge} {expected:?}",
                    side.name()
                ));
            }
        }
    }
    Ok(())
}

/// Random programs of at most so many calls.
pub fn programs(steps_max: usize) -> impl Strategy<Value = Vec<CallStep>> {
    let who =
        prop_oneof![3 => Just(Who::Root), 2 => Just(Who::Alice), 2 => Just(Who::Bob), 1 => Just(Who::Carol)];
    let step = (who, call()).prop_map(|(who, call)| {
        // Kernels differ in whether others may link what they cannot write (`fs.protected_hardlinks`).
        let who = if matches!(call, Call::Link { .. }) { Who::Root } else { who };
        CallStep { who, call }
    });
    vec(step, 1..steps_max)
}

fn call() -> impl Strategy<Value = Call> {
    let spot = || (any::<u8>(), any::<u8>()).prop_map(|(directory, name)| Spot { directory, name });
    let size = || select(vec![0, 1, 100, 4095, 4096, 70_000, 5 << 20]);
    let offset = || select(vec![0, 1, 50, 4000, 4096, 65_535, 70_000, 4 << 20]);
    let mode = || select(vec![0o755, 0o644, 0o600, 0o777, 0o700, 0, 0o070, 0o007, 0o311, 0o544]);
    let changed =
        || select(vec![0o755, 0o644, 0o777, 0o4755, 0o2777, 0o2755, 0o6711, 0o1777, 0o1755, 0o500, 0]);
    let person = || select(vec![None, Some(Who::Root), Some(Who::Alice), Some(Who::Bob), Some(Who::Carol)]);
    let renaming =
        select(vec![RenameMode::Replace, RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange]);
    let setting = select(vec![XattrMode::Set, XattrMode::Create, XattrMode::Replace]);
    let how = any::<[bool; 6]>().prop_map(|[read, write, append, truncate, create, exclusive]| How {
        read: read || !write,
        write,
        append: append && write,
        truncate: truncate && write,
        create,
        exclusive: exclusive && create,
    });
    let names = prop_oneof![
        4 => (spot(), mode()).prop_map(|(at, mode)| Call::Mkdir { at, mode }),
        1 => (spot(), mode()).prop_map(|(at, mode)| Call::Socket { at, mode }),
        5 => (spot(), spot(), renaming).prop_map(|(from, to, mode)| Call::Rename { from, to, mode }),
        2 => (spot(), spot()).prop_map(|(from, to)| Call::Link { from, to }),
        1 => spot().prop_map(|at| Call::Symlink { at }),
        2 => spot().prop_map(|at| Call::Unlink { at }),
        1 => spot().prop_map(|at| Call::Rmdir { at }),
        2 => spot().prop_map(|at| Call::List { at }),
        1 => spot().prop_map(|at| Call::Readlink { at }),
    ];
    let attributes = prop_oneof![
        3 => (spot(), changed()).prop_map(|(at, mode)| Call::Chmod { at, mode }),
        2 => (spot(), person(), person()).prop_map(|(at, uid, gid)| Call::Chown { at, uid, gid }),
        1 => (spot(), -5i64..5_000_000_000, 0u32..1_000_000_000)
            .prop_map(|(at, seconds, nanos)| Call::Utimens { at, seconds, nanos }),
        3 => spot().prop_map(|at| Call::Stat { at }),
        2 => (spot(), any::<u8>(), select(vec![0, 1, 100, 4000]), setting)
            .prop_map(|(at, name, length, mode)| Call::Setxattr { at, name, length, mode }),
        1 => (spot(), any::<u8>()).prop_map(|(at, name)| Call::Getxattr { at, name }),
        1 => spot().prop_map(|at| Call::Listxattr { at }),
        1 => (spot(), any::<u8>()).prop_map(|(at, name)| Call::Removexattr { at, name }),
    ];
    let bytes = prop_oneof![
        6 => (spot(), how, mode()).prop_map(|(at, how, mode)| Call::Open { at, how, mode }),
        2 => any::<u8>().prop_map(|file| Call::Close { file }),
        3 => (any::<u8>(), offset(), 0u16..9000).prop_map(|(file, offset, length)| Call::Read { file, offset, length }),
        5 => (any::<u8>(), offset(), 0u16..9000, any::<u8>())
            .prop_map(|(file, offset, length, seed)| Call::Write { file, offset, length, seed }),
        1 => (spot(), size()).prop_map(|(at, size)| Call::Truncate { at, size }),
        1 => (any::<u8>(), size()).prop_map(|(file, size)| Call::TruncateOpen { file, size }),
        1 => any::<u8>().prop_map(|file| Call::Fsync { file }),
        2 => any::<u8>().prop_map(|file| Call::StatOpen { file }),
    ];
    prop_oneof![5 => names, 4 => attributes, 5 => bytes]
}

/// The bytes that a write writes.
fn pattern(length: u16, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

fn attribute(name: u8) -> String {
    format!("user.{}", ["a", "b", "long name"][usize::from(name) % 3])
}

/// Who is asked for, as numbers.
fn owner(who: Option<Who>, of: impl Fn(Who) -> u32) -> Option<u32> {
    who.map(of)
}

const DIRECTORIES: [&[&[u8]]; 6] = [&[], &[], &[b"a"], &[b"b"], &[b"a", b"b"], &[b"b", b"a"]];
const NAMES: [&[u8]; 6] = [b"a", b"b", b"a", b"b", b"x", b"y \xff"];
/// Symbolic links lead nowhere: what is judged is the link.
const NOWHERE: &[u8] = b"nowhere";

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use murphy_log::ManualClock;
    use proptest::{
        strategy::{Strategy, ValueTree},
        test_runner::TestRunner,
    };

    use super::*;
    use crate::{Driver, Reference};

    /// A kernel that forgets one kind of call.
    struct Forgetful<'a> {
        inner: Modelled<'a>,
        forgotten: fn(&Call) -> bool,
    }

    impl Calls for Forgetful<'_> {
        fn name(&self) -> &'static str {
            "the forgetful one"
        }

        fn call(&mut self, who: Who, call: &Call) -> Result<Reply, Failed> {
            if (self.forgotten)(call) { Ok(Reply::Done) } else { self.inner.call(who, call) }
        }
    }

    fn found(forgotten: fn(&Call) -> bool) -> bool {
        let driver = Driver::new();
        let mut runner = TestRunner::deterministic();
        (0..50).any(|_| {
            let program = programs(150).new_tree(&mut runner).expect("nothing is filtered").current();
            let references = [(); 2].map(|()| Reference::new(Arc::new(ManualClock::default())));
            let mut judge = Modelled::new(&driver, &references[0]);
            let mut other = Forgetful { inner: Modelled::new(&driver, &references[1]), forgotten };
            agree(&mut [&mut judge, &mut other], &program).is_err()
        })
    }

    /// Programs that never come to where two file systems differ would call any two the same.
    #[test]
    fn a_side_that_forgets_one_kind_of_call_is_found() {
        assert!(!found(|_| false), "two of the same");
        assert!(found(|call| matches!(call, Call::Chmod { .. })));
        assert!(found(|call| matches!(call, Call::Truncate { .. })));
        assert!(found(|call| matches!(call, Call::Link { .. })));
        assert!(found(|call| matches!(call, Call::Setxattr { .. })));
    }
}
