//! Up to where a mirror has heard of its source, noted for a promotion after a restart: what lies beyond is known to be lost.
//!
//! Invariants:
//! - A note is of one epoch, and never goes back in it: a process that has heard nothing takes nothing back.
//! - It informs, and is no reason not to take over: one that cannot be read counts as if nothing had been heard, and is said.

use std::path::Path;

use murphy_log::{Epoch, Lsn};
use serde::{Deserialize, Serialize};

use crate::{attempts::StoredEpoch, error::CliError, summed};

#[derive(Serialize, Deserialize)]
struct Heard {
    epoch: StoredEpoch,
    lsn: u64,
}

/// The last entry that a source of `epoch` was heard to hold, as far as that was noted.
pub(super) fn load(directory: &Path, epoch: Epoch) -> Option<Lsn> {
    let noted = summed::read::<Heard>(&directory.join(HEARD), "").unwrap_or_else(|error| {
        tracing::warn!("{error}; what the source had is not known from before");
        None
    })?;
    (noted.epoch.epoch().ok()? == epoch).then(|| Lsn::new(noted.lsn))
}

/// Notes it, if it goes further; durable when it returns.
pub(super) fn save(directory: &Path, epoch: Epoch, lsn: Lsn) -> Result<(), CliError> {
    if load(directory, epoch).unwrap_or(Lsn::new(0)) >= lsn {
        return Ok(());
    }
    summed::write(&directory.join(HEARD), &Heard { epoch: StoredEpoch::from(&epoch), lsn: lsn.get() })
}

/// In the node's directory.
const HEARD: &str = "heard.json";

#[cfg(test)]
mod tests {
    use murphy_log::EpochId;

    use super::*;

    /// The fear: a mirror that was started again while its source was gone says that nothing is known to be lost.
    #[test]
    fn up_to_where_the_source_was_heard_of_outlives_the_process() {
        let directory = tempfile::tempdir().unwrap();
        let epoch = |number| Epoch { number, id: EpochId::from_bytes([7; 16]) };
        let known = || load(directory.path(), epoch(1));
        assert_eq!(known(), None);
        for (said, noted) in [(37, 37), (0, 37), (36, 37), (38, 38)] {
            save(directory.path(), epoch(1), Lsn::new(said)).unwrap();
            assert_eq!(known(), Some(Lsn::new(noted)), "after {said}");
        }
        // What a source before had, and the one that took over did not, is no loss of that one.
        assert_eq!(load(directory.path(), epoch(2)), None);
        save(directory.path(), epoch(2), Lsn::new(5)).unwrap();
        assert_eq!((known(), load(directory.path(), epoch(2))), (None, Some(Lsn::new(5))));
        std::fs::write(directory.path().join(HEARD), "x").unwrap();
        assert_eq!(load(directory.path(), epoch(2)), None);
    }
}
