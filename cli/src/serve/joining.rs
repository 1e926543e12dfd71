//! When an archive that was added begins to acknowledge, while an fsync waits for archives.
//!
//! ```text
//!   one that acknowledges has the entry that names it          whoever takes over reads that one, and is led to the new one
//!   every other archive, and every mirror, has that entry      whoever takes over knows the new one
//! ```
//!
//! Invariants:
//! - What is waited for is that entry, not how far the log has come meanwhile: whoever lags behind under load has it once and for all.
//! - Either is enough. The second is the only way once the archives that acknowledged before were given up: one of them may answer again, and
//!   knows nothing of what was added since.
//! - With an archive that is given up goes its word: whom not everybody knows is joining again.
//! - It is waited for until it is so, also by a node that was started anew.

use std::{
    pin::pin,
    sync::{Arc, Weak},
    time::Duration,
};

use futures::future::{Either, select};
use murphy_log::Lsn;

use super::host::{Host, outside};
use crate::{
    archives::{Archives, by_archives},
    error::CliError,
    mirrors::Mirroring,
    places::local_url,
    settings::SharedArchive,
};

/// The archives of the volume, and who else would take over.
struct Joining {
    archives: Weak<Archives>,
    mirroring: Weak<Mirroring>,
    /// What dies together with the source.
    domains: Vec<String>,
}

/// Returns when the archives that are joining by now may acknowledge.
pub(super) async fn may_acknowledge(host: &Host) -> Result<(), CliError> {
    let Some((_, lsn)) = host.archives.joining() else { return Ok(()) };
    are_known(&host.archives, &host.mirroring, &outside(&host.node)?, lsn).await
}

/// Whether any of `archives` may acknowledge an fsync here: it holds packs, is not joining itself, and does not die with the source.
pub(super) fn any_acknowledges(host: &Host, archives: &[SharedArchive]) -> Result<bool, CliError> {
    let domains = outside(&host.node)?;
    let config = &host.node.config;
    let mut full = archives.iter().filter(|archive| archive.may_acknowledge());
    full.try_fold(false, |any, shared| {
        let domain = local_url(config, shared)?.failure_domain().to_string();
        Ok(any || !domains.contains(&domain))
    })
}

/// Whether an archive that is added to `archives` has to wait before it acknowledges: there is somebody who would take over without it.
pub(super) fn must_wait(host: &Host, archives: &[SharedArchive]) -> Result<bool, CliError> {
    Ok(host.waits_for_archives()? && !(archives.is_empty() && host.mirroring.is_alone()))
}

/// Once `gone` is given up, and perhaps acknowledges elsewhere or not at all, those that are `left` acknowledge only if everybody who may take
/// over knows them. Says whether any of them has to wait for that. One that is not on the list any more may have acknowledged.
pub(super) fn wait_again(
    host: &Host,
    gone: Option<&SharedArchive>,
    left: &mut [SharedArchive],
) -> Result<bool, CliError> {
    let vouched = match gone {
        Some(gone) => any_acknowledges(host, std::slice::from_ref(gone))?,
        None => true,
    };
    if !vouched || !host.waits_for_archives()? {
        return Ok(false);
    }
    let all = left.to_vec();
    let is_known = |archive: &SharedArchive| {
        let named = host.archives.named(&archive.url);
        named.is_some_and(|lsn| {
            host.archives.lacking(lsn, &all).is_empty() && host.mirroring.unheard(lsn).is_empty()
        })
    };
    let mut waits = false;
    for archive in left.iter_mut().filter(|archive| archive.may_acknowledge()) {
        archive.joining = !is_known(archive);
        waits |= archive.joining;
    }
    Ok(waits)
}

/// Lets those that are joining acknowledge as soon as they may. `domains` is what dies together with the source.
pub(super) fn join_later(archives: &Arc<Archives>, mirroring: &Arc<Mirroring>, domains: Vec<String>) {
    let joining =
        Joining { archives: Arc::downgrade(archives), mirroring: Arc::downgrade(mirroring), domains };
    archives.runtime().spawn(joining.run());
}

impl Joining {
    async fn run(self) {
        loop {
            let Some((archives, mirroring)) = self.archives.upgrade().zip(self.mirroring.upgrade()) else {
                return;
            };
            let removals = archives.removals();
            // Those that are named meanwhile are not in what is waited for.
            let Some((joining, lsn)) = archives.joining() else { return };
            if archives.volume().ended().is_some() {
                return;
            }
            let joined = match are_known(&archives, &mirroring, &self.domains, lsn).await {
                Ok(()) => archives.let_acknowledge(&joining, removals).await,
                Err(error) => Err(error),
            };
            if let Err(error) = joined {
                tracing::warn!(%error, "an archive that was added acknowledges nothing yet");
                drop((archives, mirroring));
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Returns when one that acknowledges has the entry `lsn`, or everybody has it. If none does, that cannot come about by waiting for one.
async fn are_known(
    archives: &Arc<Archives>,
    mirroring: &Mirroring,
    domains: &[String],
    lsn: Lsn,
) -> Result<(), CliError> {
    let everybody = everybody_knows(archives, mirroring, lsn, HEARD_MAX);
    if !archives.any_acknowledges(domains) {
        return everybody.await;
    }
    let by = by_archives(archives, domains.to_vec());
    let vouched = by.acknowledged(lsn, VOUCHED_MAX);
    match select(pin!(vouched), pin!(everybody)).await {
        Either::Left((Ok(()), _)) | Either::Right((Ok(()), _)) => Ok(()),
        Either::Left((Err(_), everybody)) => everybody.await,
        Either::Right((Err(unheard), vouched)) => vouched.await.map_err(|_| unheard),
    }
}

/// Returns when every archive, and every mirror, has the entries up to `lsn`.
async fn everybody_knows(
    archives: &Archives,
    mirroring: &Mirroring,
    lsn: Lsn,
    at_most: Duration,
) -> Result<(), CliError> {
    tokio::try_join!(archives.all_hold(lsn, at_most), mirroring.heard_by_all(lsn)).map(|_| ())
}

/// So long everybody gets to hear of an archive that was added, before it is said who has not.
const HEARD_MAX: Duration = Duration::from_secs(20);
/// So long one that acknowledges gets to have that entry.
const VOUCHED_MAX: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(5);
