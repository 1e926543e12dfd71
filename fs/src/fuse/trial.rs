//! Whether this process can mount: found out by doing it.
//!
//! Invariants:
//! - What is tried is what a volume does, by the same code: nothing is concluded from who somebody is or which files are there.
//! - What was mounted for it is unmounted when the answer is given.

use std::{io, path::Path};

use super::{
    mount_table::MountError,
    options::MountOptions,
    session::{Session, UnmountError},
};

/// Mounts a file system without anything in it at `directory`, which must be empty, and unmounts it again. The error says in one line why
/// volumes cannot be mounted there.
pub fn try_mount(directory: &Path) -> Result<(), MountError> {
    let session = Session::start(Nothing, directory, &MountOptions::new(TRIAL))?;
    session.unmount().map_err(|error| MountError::Io {
        path: directory.to_owned(),
        step: "unmounting again",
        source: match error {
            UnmountError::Io { source, .. } => source,
            error => io::Error::other(error),
        },
    })
}

/// Answers every request with ENOSYS.
struct Nothing;

impl fuser::Filesystem for Nothing {}

/// What the mount table shows for that moment.
const TRIAL: &str = "trial";
