//! Murphy's judges: what the suites are made of.
//!
//! [`Reference`] says what a file system must answer, [`Program`] is a random sequence of calls, [`judge`] runs such programs
//! against the reference and a candidate, [`compare_trees`] and [`compare_directories`] compare what is left.

mod address;
pub mod calls;
mod compare;
mod crash;
mod demos;
mod disk_objects;
mod driver;
mod dump_file;
mod history;
mod layers;
mod ledger;
mod limited;
mod ops;
mod pair;
mod parts;
mod program;
mod reference;
mod s3;
mod simulation;
mod sound;
mod summed;
mod trees;
mod wait;

pub use address::free_address;
pub use compare::{Difference, TreeImage, TreeRules, attr_difference, compare_directories, compare_trees};
pub use crash::{
    CrashNode, CrashRun, Damaged, Ending, IndexCopy, NodeRules, Shortage, ShortageRun, Verdicts,
};
pub use demos::{Demo, expect_proven};
pub use disk_objects::DiskObjects;
pub use driver::{ANSWER_SECONDS_MAX, Driver};
pub use dump_file::{DumpBlock, DumpFile, DumpFooter};
pub use history::{Change, History, Made};
pub use layers::{BlockLayer, Layered, LogLayer};
pub use ledger::{Found, Ledger};
pub use limited::{RUN_MAX, finish, output_of, output_within};
pub use murphy_decoders::{self as fuzz, Random, number_from_env};
pub use ops::{
    AttributePick, Contest, Counterexample, Judge, Length, Mismatch, NamePick, Operation, Pick, Place,
    Program, RunRules, Search, Step, Subject, TimePick, Who, judge, judge_inside, judge_subjects, search,
    search_inside, search_subjects, strategy,
};
pub use pair::Pair;
pub use parts::{VOLUME, epoch, lead_new, memory_volume, new_log, new_volume, volume_keys, volume_parts};
pub use program::{Print, Ran, Scratch, can_mount, is_dead, report, skip};
pub use reference::Reference;
pub use s3::{Misdeed, S3Endpoint};
pub use simulation::{Canary, Outcome, simulate};
pub use sound::check_sound;
pub use summed::{read_summed, write_summed};
pub use trees::{assert_same_tree, copy_tree};
pub use wait::{PATIENCE, pause, pause_task, stays, until, wait_for, wait_for_ok, wait_until};
