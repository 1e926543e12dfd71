//! Trees below directories, copied and compared by the programs that everybody has.
//!
//! Invariants:
//! - What fails says what the program said.

use std::{path::Path, process::Command};

use crate::output_of;

/// Copies a tree, or a file, with everything that `cp -a` keeps: into `to` if it is a directory, else as `to`.
///
/// # Panics
/// If `cp` fails.
#[track_caller]
pub fn copy_tree(from: &Path, to: &Path) {
    let copied = output_of(Command::new("cp").arg("-a").arg(from).arg(to));
    assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
}

/// Checks that two trees have the same names with the same bytes; a symbolic link is what it leads to.
///
/// # Panics
/// If they differ.
#[track_caller]
pub fn assert_same_tree(a: &Path, b: &Path) {
    let compared = output_of(Command::new("diff").arg("-r").arg(a).arg(b));
    let said = [compared.stdout, compared.stderr].concat();
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&said));
}
