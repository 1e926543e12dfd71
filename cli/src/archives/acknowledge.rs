//! Who acknowledges an fsync, as the shared setting `ack` says.
//!
//! Invariants:
//! - An archive that dies with the source, or holds no packs, acknowledges nothing; what it says of another source counts.
//! - Who acknowledges is what the list says when it does, not when the fsync began: one that comes helps an fsync that waits, one that was taken out
//!   does not.
//! - One that was given up and sealed by somebody who did not replace this source is asked for nothing.

use std::{
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use murphy_backup::{ArchiveAcknowledger, ShipHandle};
use murphy_fs::{AcknowledgeError, Acknowledgement, Acknowledger, FailureDomain, StoreUrl, Volume};
use murphy_log::Lsn;
use tokio::sync::watch;

use super::Archives;
use crate::{error::CliError, settings::Ack};

/// Lets the volume's fsync wait for what `ack` names.
pub(crate) fn acknowledge_as_set(volume: &Volume, ack: Ack, archives: &Arc<Archives>, outside: Vec<String>) {
    match ack {
        Ack::Local => {}
        Ack::Archive => volume.acknowledge_with(by_archives(archives, outside)),
        // The part of the node among other nodes sees to it.
        Ack::Mirrors(_) => {}
    }
}

/// Whom an fsync waits for with `--ack archive`; `outside` is what dies together with the source.
pub(crate) fn by_archives(archives: &Arc<Archives>, outside: Vec<String>) -> Arc<dyn Acknowledger> {
    let archives = Arc::downgrade(archives);
    Arc::new(ByArchives { archives, domains: outside, unopened_awaited: AtomicBool::new(true) })
}

/// Refuses `--ack archive` without a full archive that survives the loss of `own`, the failure domains of the source.
pub(crate) fn check_outlives<'a>(
    own: &[FailureDomain],
    mut full: impl Iterator<Item = &'a StoreUrl> + Clone,
) -> Result<(), CliError> {
    if full.clone().next().is_none() {
        return Err(CliError::usage("--ack archive needs an --archive: a log archive holds no bytes"));
    }
    if full.all(|url| own.contains(&url.failure_domain())) {
        return Err(CliError::usage(
            "--ack archive needs an archive that does not die together with the source",
        )
        .hint(
            "give one in another account, or say with ?domain=LABEL that it is in another failure domain",
        ));
    }
    Ok(())
}

/// One of the full archives outside `domains` must hold it.
struct ByArchives {
    archives: Weak<Archives>,
    /// What dies together with the source.
    domains: Vec<String>,
    /// Whether one that could not be opened is still waited for: a copy of this node may ship to it.
    unopened_awaited: AtomicBool,
}

/// Archives that may acknowledge, and others that are only witnesses. One that was not opened yet is `None`.
type Handles = (Vec<Option<ShipHandle>>, Vec<Option<ShipHandle>>);

impl Archives {
    /// Whether any archive may acknowledge now; `outside` is what dies together with the source.
    pub(crate) fn any_acknowledges(&self, outside: &[String]) -> bool {
        !self.handles(outside).0.is_empty()
    }

    /// Follows who may acknowledge; the value means nothing.
    fn changes(&self) -> watch::Receiver<u64> {
        self.context.changes.subscribe()
    }

    fn handles(&self, outside: &[String]) -> Handles {
        let (mut holders, mut witnesses) = Handles::default();
        for shipped in self.shipped().iter() {
            let domain = shipped.url.failure_domain().to_string();
            let is_listed = !shipped.is_removed && shipped.leaving.load(Ordering::SeqCst) == 0;
            let may = is_listed && shipped.shared.may_acknowledge() && !outside.contains(&domain);
            let part = if may { &mut holders } else { &mut witnesses };
            part.push(shipped.state().handle.clone());
        }
        (holders, witnesses)
    }
}

impl ByArchives {
    fn handles(&self) -> Handles {
        self.archives.upgrade().map_or_else(Handles::default, |archives| archives.handles(&self.domains))
    }

    /// Returns when one that may acknowledge does, whoever that is by then.
    async fn one_acknowledges(&self, lsn: Lsn, deadline: Duration) -> Result<(), AcknowledgeError> {
        let Some(mut changes) = self.archives.upgrade().map(|archives| archives.changes()) else {
            return Err(self.too_few(lsn));
        };
        let mut unopened_wait = pin!(tokio::time::sleep(UNOPENED_WAIT.min(deadline / 2)));
        loop {
            changes.borrow_and_update();
            let (holders, witnesses) = self.handles();
            let is_unopened = holders.iter().chain(&witnesses).any(Option::is_none);
            let is_awaited = is_unopened && self.unopened_awaited.load(Ordering::Relaxed);
            let by = acknowledger((holders, witnesses));
            let answer = async {
                match is_awaited || by.is_empty() {
                    true => std::future::pending().await,
                    false => by.acknowledged(lsn, deadline).await,
                }
            };
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return Err(self.too_few(lsn));
                    }
                }
                () = &mut unopened_wait, if is_awaited => self.unopened_awaited.store(false, Ordering::Relaxed),
                answer = answer => match answer {
                    // Nobody acknowledges who may not any more.
                    Ok(()) if changes.has_changed().is_ok_and(|has_changed| has_changed) => {}
                    Err(AcknowledgeError::TooFew { .. }) => {
                        // As they are none of them will; another one may come.
                        if changes.changed().await.is_err() {
                            return Err(self.too_few(lsn));
                        }
                    }
                    answer => return answer,
                },
            }
        }
    }

    fn too_few(&self, lsn: Lsn) -> AcknowledgeError {
        let by = acknowledger(self.handles());
        if by.is_empty() {
            let missing = "no full archive outside the source's failure domain answers".to_owned();
            return AcknowledgeError::TooFew { lsn, held: 0, wanted: 1, missing };
        }
        by.too_few(lsn)
    }
}

/// Those that were opened.
fn acknowledger((holders, witnesses): Handles) -> ArchiveAcknowledger {
    let open = |some: Vec<Option<ShipHandle>>| some.into_iter().flatten().collect();
    ArchiveAcknowledger::new(open(holders)).with_witnesses(open(witnesses))
}

impl Acknowledger for ByArchives {
    fn acknowledged(&self, lsn: Lsn, deadline: Duration) -> Acknowledgement<'_> {
        Box::pin(async move {
            let answer = tokio::time::timeout(deadline, self.one_acknowledges(lsn, deadline)).await;
            answer.unwrap_or_else(|_| Err(self.too_few(lsn)))
        })
    }
}

/// So long the first acknowledgement waits for an archive that cannot be opened.
const UNOPENED_WAIT: Duration = Duration::from_secs(5);
