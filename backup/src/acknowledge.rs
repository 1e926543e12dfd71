//! `--ack archive`: an fsync waits until one of the archives holds the entries and every byte that they refer to.
//!
//! Invariants:
//! - Only full archives acknowledge: a log archive holds no bytes. Every archive is a witness of who the source is.
//! - One archive is enough (W is 1 for archives), while nothing at any of them says that another source exists: a seal, another history, or
//!   entries that this log lacks. Then nothing is acknowledged any more: the other one may acknowledge through the archives that it won.
//!   An archive that was given up and is another one's since ([`ShipEnd::Lost`]) says nothing about this source.
//! - Before the first entry of this process is acknowledged every archive of any kind that answers has taken one. A copy of the node's directory that
//!   runs as well needs the same names: of the two at most one ever acknowledges. An archive that does not answer is waited for once.

use std::time::Duration;

use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use murphy_fs::{AcknowledgeError, Acknowledgement, Acknowledger};
use murphy_log::Lsn;

use crate::ship::{ShipEnd, ShipHandle};

/// The archives that may acknowledge, and those that only know who ships to them.
#[derive(Clone, Debug)]
pub struct ArchiveAcknowledger {
    archives: Vec<ShipHandle>,
    witnesses: Vec<ShipHandle>,
}

impl ArchiveAcknowledger {
    /// An acknowledger of these full archives.
    pub fn new(archives: Vec<ShipHandle>) -> ArchiveAcknowledger {
        ArchiveAcknowledger { archives, witnesses: Vec::new() }
    }

    /// The same, with archives that acknowledge nothing. A copy of the node that reaches other full archives may still need a name in one of
    /// these.
    #[must_use]
    pub fn with_witnesses(self, witnesses: Vec<ShipHandle>) -> ArchiveAcknowledger {
        ArchiveAcknowledger { witnesses, ..self }
    }

    /// Whether there is none of them.
    pub fn is_empty(&self) -> bool {
        self.archives.is_empty()
    }

    fn all(&self) -> impl Iterator<Item = &ShipHandle> {
        self.archives.iter().chain(&self.witnesses)
    }

    async fn one_holds(&self, lsn: Lsn) -> Result<(), AcknowledgeError> {
        let mut waits: FuturesUnordered<_> =
            self.archives.iter().map(|archive| archive.archived(lsn)).collect();
        while let Some(answer) = waits.next().await {
            if let Some(rival) = self.rival() {
                return Err(AcknowledgeError::Fenced(rival));
            }
            if answer.is_ok() {
                return Ok(());
            }
        }
        Err(self.too_few(lsn))
    }

    /// Returns when every archive has taken an entry that this process was the first to write, or has been waited for once.
    async fn none_shows_another(&self, lsn: Lsn, at_most: Duration) -> Result<(), AcknowledgeError> {
        let unproven = || self.all().filter(|archive| lsn > archive.began() && archive.is_awaited());
        let proofs = unproven().map(|archive| archive.archived(archive.began().next()));
        if tokio::time::timeout(PROOF_WAIT.min(at_most), join_all(proofs)).await.is_err() {
            for archive in unproven() {
                let url = archive.status().url;
                tracing::warn!(
                    url,
                    "the archive takes nothing yet; fsync goes on without knowing whether a copy of this node ships to it"
                );
                archive.wait_no_more();
            }
        }
        self.rival().map_or(Ok(()), |rival| Err(AcknowledgeError::Fenced(rival)))
    }

    /// What an archive says of another source.
    fn rival(&self) -> Option<String> {
        let ends = self.all().filter_map(|archive| archive.status().end);
        ends.filter(ShipEnd::shows_another_source).map(|end| end.to_string()).next()
    }

    /// That none of them has `lsn`, and how each does.
    pub fn too_few(&self, lsn: Lsn) -> AcknowledgeError {
        let missing = self.archives.iter().map(|archive| {
            let status = archive.status();
            let end = status.end.map(|end| end.to_string());
            let held = status.archived.map_or(Lsn::default(), |held| held.position.lsn);
            let reason = end.or(status.error).unwrap_or_else(|| format!("it is at lsn {held}"));
            format!("{} ({reason})", status.url)
        });
        let missing = missing.collect::<Vec<_>>().join(", ");
        AcknowledgeError::TooFew { lsn, held: 0, wanted: 1, missing }
    }
}

impl Acknowledger for ArchiveAcknowledger {
    fn acknowledged(&self, lsn: Lsn, deadline: Duration) -> Acknowledgement<'_> {
        Box::pin(async move {
            let held = async {
                self.one_holds(lsn).await?;
                self.none_shows_another(lsn, deadline / 2).await
            };
            match tokio::time::timeout(deadline, held).await {
                Ok(answer) => answer,
                Err(_) => Err(self.too_few(lsn)),
            }
        })
    }
}

/// So long the first acknowledgement waits for an archive that takes nothing.
const PROOF_WAIT: Duration = Duration::from_secs(5);
