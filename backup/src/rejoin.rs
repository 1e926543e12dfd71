//! Going on with an archive that was made before: whether it is one of the history that is to be shipped to it.
//!
//! Invariants:
//! - Nothing is changed, and nothing is believed but the archive's own chain and the log.

use std::sync::Arc;

use murphy_log::{Log, Lsn, ReadError};

use crate::{
    descriptor::Archive,
    strays::log_has,
    walk::{WalkError, walk},
};

/// Checks that what `archive` holds ends at an entry of `log`, so that it can be shipped to from there on.
///
/// The same branch is not enough: a source that lost a take-over may have begun it with a tail that lost.
pub async fn check_continued_by(archive: &Archive, log: &Arc<dyn Log>) -> Result<(), NotContinued> {
    let end = walk(archive, None).await?.end.position;
    match log_has(log, end).await? {
        true => Ok(()),
        false => Err(NotContinued::Other { url: archive.url().to_owned(), lsn: end.lsn }),
    }
}

/// Why an archive cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum NotContinued {
    /// It cannot be walked.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] ReadError),
    /// Its end is not in the log.
    #[error("{url} ends at lsn {lsn} with an entry that this log does not have")]
    Other {
        /// The archive.
        url: String,
        /// Its end.
        lsn: Lsn,
    },
}

#[cfg(test)]
mod tests {
    use murphy_log::MemoryLog;

    use super::*;
    use crate::testing::{FaultyStore, Source, append, archive, put};

    /// The fear: an archive that a replaced source began with its lost tail is added by its successor, and nobody can be promoted any more.
    #[tokio::test]
    async fn an_archive_of_a_tail_that_lost_is_not_gone_on_with() {
        let store = FaultyStore::new();
        let made = archive(&store).await;
        let mut source = Source::new();
        let frames = source.frames(6, 3);
        for slot in frames.chunks(3) {
            put(&store, slot).await;
        }
        let logged = |frames: &[murphy_log::Frame]| {
            let log = MemoryLog::new(Source::new().base());
            log.claim(Source::new().base().position.epoch).unwrap();
            append(&log, frames);
            Arc::new(log) as Arc<dyn Log>
        };
        check_continued_by(&made, &logged(&frames)).await.unwrap();
        let mut longer = frames.clone();
        longer.extend(source.frames(2, 1));
        check_continued_by(&made, &logged(&longer)).await.unwrap();
        let mut other = Source::new();
        other.wait(7);
        for log in [logged(&frames[..4]), logged(&other.frames(9, 3))] {
            let refused = check_continued_by(&made, &log).await;
            assert!(matches!(refused, Err(NotContinued::Other { .. })), "{refused:?}");
        }
    }
}
