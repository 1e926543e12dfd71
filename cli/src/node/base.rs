//! `DIR/base/`: the snapshot that a log begins after, when it does not begin with the volume.
//!
//! Invariants:
//! - A base is complete and verified before it has its name; it is never changed.

use std::{
    fs::{self, File},
    io::{BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use murphy_fs::{FjallIndex, IndexSnapshot, SnapshotOrigin, SnapshotReader, write_snapshot};
use murphy_log::{Lsn, State, VolumeKeys};

use crate::error::{CliError, at, failed};

/// Writes the tree in `source` as the base of the node in `node`.
pub(crate) fn write_base_file(
    node: &Path,
    source: &dyn IndexSnapshot,
    keys: &VolumeKeys,
    origin: SnapshotOrigin,
) -> Result<(), CliError> {
    let folder = node.join(BASE);
    fs::create_dir_all(&folder).map_err(at(&folder))?;
    let (path, partial) = (folder.join(FILE), folder.join(PARTIAL));
    let mut out = BufWriter::new(File::create(&partial).map_err(at(&partial))?);
    write_snapshot(source, keys, origin, &mut out, &|_| {}).map_err(failed)?;
    let written = (|| {
        out.flush()?;
        out.get_ref().sync_all()?;
        fs::rename(&partial, &path)?;
        File::open(&folder)?.sync_all()
    })();
    written.map_err(at(&path))
}

/// Loads the base of a node, if it has one, into an index that holds nothing; the log must go on where it ends.
pub(super) fn load_base_file(
    node: &Path,
    index: &FjallIndex,
    log_begins: Lsn,
) -> Result<Option<State>, CliError> {
    let path = base_file(node);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(at(&path)(error)),
    };
    let bad = |error: &dyn std::fmt::Display| {
        CliError::new(format!("{}: {error}", path.display()))
            .hint("restore the node from an archive, or seed it from a mirror")
    };
    let reader = SnapshotReader::open(BufReader::new(file)).map_err(|error| bad(&error))?;
    let base = reader.header().state.position;
    if base.lsn.next() < log_begins {
        return Err(bad(&format!("it ends at lsn {}, the log begins at {log_begins}", base.lsn)));
    }
    reader.load_into(index, &|_| {}).map(Some).map_err(|error| bad(&error))
}

/// Where the base of a node is.
pub(crate) fn base_file(node: &Path) -> PathBuf {
    node.join(BASE).join(FILE)
}

const BASE: &str = "base";
const FILE: &str = "base.snapshot";
const PARTIAL: &str = "base.snapshot.new";
