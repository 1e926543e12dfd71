//! The epochs that a node has made up its mind to begin, remembered before the first seal names one: a process that was killed while it took
//! over finds its own seals again.
//!
//! Invariants:
//! - An epoch is on the disk before any archive hears of it.

use std::path::Path;

use murphy_log::{Epoch, ParseIdError};
use serde::{Deserialize, Serialize};

use crate::{error::CliError, summed};

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
    let attempts: Vec<StoredEpoch> = summed::read(path, WAY_OUT)?.unwrap_or_default();
    let damaged =
        |error: ParseIdError| CliError::new(format!("{} is damaged: {error}", path.display())).hint(WAY_OUT);
    attempts.iter().map(|attempt| attempt.epoch().map_err(damaged)).collect()
}

/// Remembers `epochs` in the file at `path`; durable when it returns.
pub(crate) fn remember(path: &Path, epochs: &[Epoch]) -> Result<(), CliError> {
    summed::write(path, &epochs.iter().map(StoredEpoch::from).collect::<Vec<_>>())
}

const WAY_OUT: &str =
    "it names the epochs that this node may have sealed archives for; restore it from a copy";

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
        for value in [serde_json::json!([{"number": 2}]), serde_json::json!([{"number": 2, "id": "x"}])] {
            summed::write(&path, &value).unwrap();
            assert!(load(&path).unwrap_err().to_string().contains("promoting.json is damaged"), "{value}");
        }
    }
}
