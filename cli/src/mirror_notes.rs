//! What a source has noted about its mirrors: the furthest position that one of them is known to hold.
//!
//! Invariants:
//! - The note vouches: what it says was durable in this node's log, since nothing leaves a node before it is durable there. A log that ends
//!   before it has lost entries. It goes with the log when that is put aside.
//! - The file is replaced as a whole, and only by a note that goes further. One that is damaged counts as none, and is said.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use murphy_log::{ChainHash, Epoch, EpochId, Lsn, NodeId, ParseIdError, Position};
use serde::{Deserialize, Serialize};

use crate::{
    error::{CliError, at},
    summed,
};

/// What a mirror is known to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MirrorNote {
    /// The mirror.
    pub(crate) node: NodeId,
    /// Up to where it holds the log.
    pub(crate) position: Position,
}

impl MirrorNote {
    /// The same as a reason not to go on without it.
    pub(crate) fn told(&self) -> CliError {
        let MirrorNote { node, position } = self;
        CliError::new(format!(
            "mirror {node} is known to hold lsn {} (murphy member remove DIR {node} --assume-lost gives that up)",
            position.lsn
        ))
    }
}

/// The note in a node's directory, if there is one.
pub(crate) fn load(directory: &Path) -> Option<MirrorNote> {
    let path = path(directory);
    let said =
        summed::read::<NoteText>(&path, "").and_then(|text| text.map(|text| text.note(&path)).transpose());
    said.unwrap_or_else(|error| {
        tracing::warn!("{error}; what mirrors hold is not known until they are asked");
        None
    })
}

/// Replaces the note by one that goes further; durable when it returns.
pub(crate) fn save(directory: &Path, note: &MirrorNote) -> Result<(), CliError> {
    if load(directory).is_some_and(|held| held.position.lsn >= note.position.lsn) {
        return Ok(());
    }
    let MirrorNote { node, position } = note;
    let text = NoteText {
        node: node.to_string(),
        epoch: position.epoch.number,
        epoch_id: position.epoch.id.to_string(),
        lsn: position.lsn.get(),
        hash: position.hash.to_string(),
    };
    summed::write(&path(directory), &text)
}

/// Removes the note, for a log that was put aside. Durable when the directory is synced.
pub(crate) fn forget(directory: &Path) -> Result<(), CliError> {
    let path = path(directory);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&path)(error)),
        _ => Ok(()),
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NoteText {
    node: String,
    epoch: u32,
    epoch_id: String,
    lsn: u64,
    hash: String,
}

impl NoteText {
    fn note(&self, path: &Path) -> Result<MirrorNote, CliError> {
        let damaged = |error: ParseIdError| CliError::new(format!("{} is damaged: {error}", path.display()));
        let id: EpochId = self.epoch_id.parse().map_err(damaged)?;
        let hash: ChainHash = self.hash.parse().map_err(damaged)?;
        let epoch = Epoch { number: self.epoch, id };
        Ok(MirrorNote {
            node: self.node.parse().map_err(damaged)?,
            position: Position { epoch, lsn: Lsn::new(self.lsn), hash },
        })
    }
}

fn path(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

const FILE: &str = "mirrored";

#[cfg(test)]
mod tests {
    use super::*;

    fn note(lsn: u64) -> MirrorNote {
        let epoch = Epoch { number: 3, id: EpochId::from_bytes([4; 16]) };
        let position = Position { epoch, lsn: Lsn::new(lsn), hash: ChainHash::from_bytes([5; 32]) };
        MirrorNote { node: NodeId::from_bytes([6; 16]), position }
    }

    /// A mirror that lags behind connects first after a restart: what another one was known to hold is not forgotten.
    #[test]
    fn a_note_is_replaced_only_by_one_that_goes_further() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(load(directory.path()), None);
        for (saved, known) in [(7, 7), (5, 7), (9, 9)] {
            save(directory.path(), &note(saved)).unwrap();
            assert_eq!(load(directory.path()), Some(note(known)));
        }
    }

    /// A flipped digit would be a position that nobody ever had, and the node would never start again.
    #[test]
    fn a_damaged_note_vouches_for_nothing() {
        let directory = tempfile::tempdir().unwrap();
        save(directory.path(), &note(120)).unwrap();
        let path = path(directory.path());
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert_eq!(load(directory.path()), None, "byte {at}");
        }
        save(directory.path(), &note(100)).unwrap();
        assert_eq!(load(directory.path()), Some(note(100)), "the next one takes its place");
    }
}
