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
//! - With an archive that is given up goes its word: whom not everybody knows is joining again. That everybody knows an archive is written into
//!   the log once it is seen, and stays so: whoever joins later gets all of it. A mirror that is away says nothing about those then.
//! - It is waited for until it is so, also by a node that was started anew.

use std::{
    collections::BTreeSet,
    pin::pin,
    sync::{Arc, Weak},
    time::Duration,
};

use futures::future::{Either, select};
use murphy_log::Lsn;
use tokio::runtime::Handle;

use super::host::{Host, outside};
use crate::{
    archives::{Archives, by_archives},
    error::CliError,
    mirrors::Mirroring,
    places::local_url,
    settings::{Ack, Settings, SharedArchive},
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

/// An archive that waits before it acknowledges, and for whom.
pub(super) struct Waiting {
    pub(super) url: String,
    /// Mirrors and archives that are not known to have the entry that names it.
    pub(super) unheard: Vec<String>,
}

/// Once `gone` is given up, and perhaps acknowledges elsewhere or not at all, those that are `left` acknowledge only if everybody who may take
/// over knows them. Says which of them have to wait for that. One that is not on the list any more may have acknowledged.
pub(super) fn wait_again(
    host: &Host,
    gone: Option<&SharedArchive>,
    left: &mut [SharedArchive],
) -> Result<Vec<Waiting>, CliError> {
    let vouched = match gone {
        Some(gone) => any_acknowledges(host, std::slice::from_ref(gone))?,
        None => true,
    };
    let mut waiting = Vec::new();
    if !vouched || !host.waits_for_archives()? {
        return Ok(waiting);
    }
    let all = left.to_vec();
    for archive in left.iter_mut().filter(|archive| archive.may_acknowledge() && !archive.known) {
        match host.archives.named(&archive.url) {
            Some(lsn) => {
                let unheard = unheard(&host.archives, &host.mirroring, &all, lsn);
                archive.known = unheard.is_empty();
                archive.joining = !archive.known;
                if archive.joining {
                    waiting.push(Waiting { url: archive.url.clone(), unheard });
                }
            }
            None => {
                archive.joining = true;
                waiting.push(Waiting { url: archive.url.clone(), unheard: Vec::new() });
            }
        }
    }
    Ok(waiting)
}

/// With an archive that was given up when this node took over goes its word for those that were added through it: they wait again, before
/// any of them is shipped to.
pub(super) fn wait_after_taking_over(
    archives: &Archives,
    given_up: &BTreeSet<String>,
    runtime: &Handle,
) -> Result<(), CliError> {
    let listed = Settings::of(archives.volume())?;
    if listed.ack != Ack::Archive || !listed.archives.iter().any(|archive| given_up.contains(&archive.url)) {
        return Ok(());
    }
    runtime.block_on(archives.change(|list| {
        let vouched = list.iter_mut().filter(|archive| archive.may_acknowledge() && !archive.known);
        vouched.for_each(|archive| archive.joining = true);
        Ok(())
    }))
}

/// The mirrors, and those of the archives `all`, that are not known to have the entries up to `lsn`.
fn unheard(archives: &Archives, mirroring: &Mirroring, all: &[SharedArchive], lsn: Lsn) -> Vec<String> {
    let lacking = archives.lacking(lsn, all).into_iter().map(|(url, _)| url);
    mirroring.unheard(lsn).into_iter().chain(lacking).collect()
}

/// Lets those that are joining acknowledge as soon as they may. `domains` is what dies together with the source.
pub(super) fn join_later(archives: &Arc<Archives>, mirroring: &Arc<Mirroring>, domains: Vec<String>) {
    let joining =
        Joining { archives: Arc::downgrade(archives), mirroring: Arc::downgrade(mirroring), domains };
    archives.runtime().spawn(joining.run());
}

impl Joining {
    async fn run(self) {
        while let Some((archives, mirroring)) = self.archives.upgrade().zip(self.mirroring.upgrade()) {
            if archives.volume().ended().is_some() {
                return;
            }
            match self.step(&archives, &mirroring).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "an archive that was added acknowledges nothing yet"),
            }
            drop((archives, mirroring));
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Whether none is joining any more, and everybody knows every archive.
    async fn step(&self, archives: &Arc<Archives>, mirroring: &Mirroring) -> Result<bool, CliError> {
        let removals = archives.removals();
        // Those that are named meanwhile are not in what is waited for.
        if let Some((joining, lsn)) = archives.joining() {
            are_known(archives, mirroring, &self.domains, lsn).await?;
            archives.let_acknowledge(&joining, removals).await?;
        }
        let all = Settings::of(archives.volume())?.archives;
        let is_known = |archive: &&SharedArchive| {
            let named = archives.named(&archive.url).filter(|_| !archive.known);
            named.is_some_and(|lsn| unheard(archives, mirroring, &all, lsn).is_empty())
        };
        let known: Vec<String> = all.iter().filter(is_known).map(|archive| archive.url.clone()).collect();
        if !known.is_empty() {
            archives.note_known(&known).await?;
        }
        let is_done = |archive: &SharedArchive| !archive.joining && archive.known;
        Ok(Settings::of(archives.volume())?.archives.iter().all(is_done))
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
