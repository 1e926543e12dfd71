//! The epochs that a node has made up its mind to begin, remembered before the first seal names one: a process that was killed while it took
//! over finds its own seals again.
//!
//! Invariants:
//! - An epoch is on the disk before any archive hears of it.

use std::{fs, io, path::Path};

use murphy_log::{Epoch, OsFiles, ParseIdError, replace_file};
use serde::{Deserialize, Serialize};

use crate::error::{CliError, at, failed};

/// An epoch in a file of a node.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredEpoch {
    number: u32,
    id: String,
}

impl StoredEpoch {
    /// The epoch, if its id is one.
    pub(crate) fn epoch(&self) -> Result<Epoch, ParseIdError> {
        Ok(Epoch { number: self.number, id: self.id.parse()? })
    }
}

impl From<&Epoch> for StoredEpoch {
    fn from(epoch: &Epoch) -> StoredEpoch {
        StoredEpoch { number: epoch.number, id: epoch.id.to_string() }
    }
}

/// The epochs in the file at `path`, oldest first; none if there is no file.
pub(crate) fn load(path: &Path) -> Result<Vec<Epoch>, CliError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(path)(error)),
    };
    let damaged = |error: &dyn std::fmt::Display| {
        CliError::new(format!("{} is damaged: {error}", path.display()))
            .hint("it names the epochs that this node may have sealed archives for; restore it from a copy")
    };
    let attempts: Vec<StoredEpoch> = serde_json::from_slice(&text).map_err(|error| damaged(&error))?;
    attempts.iter().map(|attempt| attempt.epoch().map_err(|error| damaged(&error))).collect()
}

/// Remembers `epochs` in the file at `path`; durable when it returns.
pub(crate) fn remember(path: &Path, epochs: &[Epoch]) -> Result<(), CliError> {
    let attempts: Vec<StoredEpoch> = epochs.iter().map(StoredEpoch::from).collect();
    replace_file(&OsFiles, path, &serde_json::to_vec(&attempts).map_err(failed)?).map_err(at(path))
}

#[cfg(test)]
mod tests {
    use murphy_log::EpochId;

    use super::*;

    #[test]
    fn what_was_remembered_is_known_and_damage_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("promoting.json");
        assert_eq!(load(&path), Ok(Vec::new()));
        let epochs: Vec<Epoch> =
            (2..4).map(|number| Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }).collect();
        remember(&path, &epochs).unwrap();
        assert_eq!(load(&path), Ok(epochs));
        for text in ["", "[{\"number\":2}]", "[{\"number\":2,\"id\":\"x\"}]"] {
            fs::write(&path, text).unwrap();
            assert!(load(&path).unwrap_err().to_string().contains("promoting.json is damaged"), "{text}");
        }
    }
}
