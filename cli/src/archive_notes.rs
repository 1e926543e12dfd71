//! What a node has noted about its archives: how far each of them is, and who has taken over.
//!
//! Invariants:
//! - A cursor vouches: what it says was archived, and durable in this node's log, when it was saved.
//! - A node that has once been found replaced stays so, also while no archive answers.

use std::{
    fs,
    path::{Path, PathBuf},
};

use murphy_backup::CursorFile;
use murphy_log::{OsFiles, Position, replace_file};

use crate::{
    error::{CliError, at},
    mirror_notes, scrub_notes,
    settings::SharedArchive,
};

/// The furthest position that any saved cursor in a node's directory, or the note about its mirrors, vouches for.
pub(crate) fn known_durable(directory: &Path) -> Result<Option<Position>, CliError> {
    let folder = cursors(directory);
    let mut furthest = mirror_notes::load(directory).map(|note| note.position);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(furthest),
        Err(error) => return Err(at(&folder)(error)),
    };
    for entry in entries {
        let path = entry.map_err(at(&folder))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        match CursorFile::new(path).load() {
            Ok(held) => {
                let held = held.map(|held| held.position);
                furthest = furthest.into_iter().chain(held).max_by_key(|position| position.lsn);
            }
            // The archive itself is asked when it is shipped to.
            Err(error) => tracing::warn!(%error, "a cursor cannot be read; the archive is walked"),
        }
    }
    Ok(furthest)
}

/// Forgets what vouches for a log that was put aside: the one that takes its place never had that.
pub(crate) fn forget_durable(directory: &Path) -> Result<(), CliError> {
    mirror_notes::forget(directory)?;
    scrub_notes::forget(directory)?;
    let folder = cursors(directory);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(at(&folder)(error)),
        _ => Ok(()),
    }
}

/// Where a node remembers how far an archive is.
pub(crate) fn cursor(directory: &Path, shared: &SharedArchive) -> CursorFile {
    let name = blake3::hash(shared.url.as_bytes()).to_hex();
    CursorFile::new(cursors(directory).join(format!("{}.json", &name[..CURSOR_NAME_CHARS])))
}

/// The folder of the cursors.
pub(crate) fn cursors(directory: &Path) -> PathBuf {
    directory.join(CURSORS)
}

/// Why this node is not the source any more, if that has been found out before.
pub(crate) fn fenced_before(directory: &Path) -> Result<Option<String>, CliError> {
    let path = directory.join(FENCED);
    match fs::read_to_string(&path) {
        Ok(reason) => Ok(Some(reason.trim().to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(&path)(error)),
    }
}

/// Notes why this node is not the source any more. Without the note the archive says so again.
pub(crate) fn remember_fence(directory: &Path, reason: &str) {
    let text = format!("{reason}\n");
    if let Err(error) = replace_file(&OsFiles, &directory.join(FENCED), text.as_bytes()) {
        tracing::warn!(%error, "that another source has taken over is not noted down");
    }
}

const CURSORS: &str = "archives";
const CURSOR_NAME_CHARS: usize = 16;
/// In a node's directory: why it is not the source any more.
const FENCED: &str = "fenced";
