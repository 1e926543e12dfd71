//! A source that was replaced while it was away: how it hears of it, and what it does then.
//!
//! Invariants:
//! - Before a source decides, it asks every member whose address it knows whether that one has promised, leads or holds a later epoch. One that
//!   does not answer does not stop it, and is asked again for as long as it does not follow (`succession.rs`).
//! - Once it knows, its directory says so: it is never served as a source again, and what only it holds is listed as a branch.

use std::{path::Path, sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use murphy_fs::MemberState;
use murphy_log::{ChainHash, Epoch, Log, Lsn};
use murphy_mirror::{Comparison, ExchangeError, Lookup, MemberBook, Point, PublicKey, compare, look_up};

use super::Mirroring;
use crate::{
    config::{Fenced, NodeConfig, Promoted, Upstream},
    error::{CliError, failed},
    replaced::{list_tail, way_on},
};

/// Refuses a source that is known to have been replaced.
pub(super) fn refuse(directory: &Path, config: &NodeConfig) -> Result<(), CliError> {
    let Some(fenced) = &config.fenced else { return Ok(()) };
    let refused = format!("{} is no longer the source: {}", directory.display(), fenced.text());
    Err(CliError::new(refused).hint(way_on(directory)))
}

/// Notes that a member knows of `later`, which ends this source's epoch, and refuses to go on.
pub(super) fn replaced(mirroring: &Mirroring, later: Epoch) -> Result<(), CliError> {
    match successor(mirroring) {
        Some(found) => note(mirroring, found.epoch, Some(found.node.to_string()), Some(common(&found)))?,
        // It is promised, and whoever was to begin it is not reached.
        None => note(mirroring, later, None, None)?,
    }
    refuse(&mirroring.directory, &mirroring.config())
}

/// Finds out what only this source holds, after it has heard that it was replaced.
pub(super) fn find_branch(mirroring: &Mirroring) -> Result<(), CliError> {
    let told = mirroring.services.board.fenced_by().zip(mirroring.services.board.successor_base());
    if let Some((epoch, base)) = told
        && look_up(&*mirroring.log, base.lsn).map_err(failed)? == Lookup::End(base)
    {
        return note(mirroring, epoch, None, Some(base.lsn));
    }
    match successor(mirroring) {
        None => Ok(()),
        Some(comparison) => {
            let by = Some(comparison.node.to_string());
            note(mirroring, comparison.epoch, by, Some(common(&comparison)))
        }
    }
}

/// The member that leads a later epoch, if one says so.
fn successor(mirroring: &Mirroring) -> Option<Comparison> {
    let own = mirroring.identity.node();
    let members = mirroring.book.members();
    let asked = members.into_iter().filter(|(node, row)| *node != own && !row.addresses.is_empty());
    let keys = asked.filter_map(|(_, row)| match row.state {
        MemberState::Joined { public_key } => Some((row.addresses, PublicKey::from_bytes(public_key))),
        _ => None,
    });
    let log = Arc::clone(&mirroring.log) as Arc<dyn Log>;
    let branch = mirroring.config().branch;
    let mut answers: FuturesUnordered<_> = keys
        .map(|(addresses, key)| {
            let (dialer, keys, log) = (&mirroring.dialer, &mirroring.keys, &log);
            async move { compare(dialer, &addresses, key, (keys, branch), log).await }
        })
        .collect();
    mirroring.runtime.block_on(async {
        let first = async {
            while let Some(answer) = answers.next().await {
                match answer {
                    Ok(Some(comparison)) => return Some(comparison),
                    Ok(None) => {}
                    Err(error) => tracing::info!(%error, "a member was not asked who leads"),
                }
            }
            None
        };
        tokio::time::timeout(ASK_MAX, first).await.unwrap_or(None)
    })
}

/// Notes that `epoch` has replaced this source, which is running; says why it ends.
pub(super) fn fence(mirroring: &Mirroring, epoch: Epoch) -> String {
    if let Err(error) = note(mirroring, epoch, None, None) {
        tracing::error!(%error, "that this source was replaced could not be noted");
    }
    format!("node has been replaced: epoch {} has taken over", epoch.number)
}

/// Writes down who took over and, once it is known after which entry, what is only here.
fn note(
    mirroring: &Mirroring,
    epoch: Epoch,
    by: Option<String>,
    common: Option<Lsn>,
) -> Result<(), CliError> {
    let tail = mirroring.log.durable().state().position;
    mirroring.change_config(|config| {
        config.fenced = Some(Fenced { epoch: epoch.number, by });
        if let Some(common) = common {
            list_tail(config, tail, common);
        }
    })
}

/// The last common entry, as an answer says; 0 if the logs do not reach back to one.
fn common(comparison: &Comparison) -> Lsn {
    comparison.common.map_or(Lsn::new(0), |point| point.lsn)
}

impl Mirroring {
    /// Tells the source that this one has replaced, until it has heard it.
    pub(super) fn tell_predecessor(self: &Arc<Mirroring>) {
        let Some(promoted) = self.config().promoted.clone() else { return };
        let this = Arc::downgrade(self);
        let mut stopped = self.stop.subscribe();
        self.runtime.spawn(async move {
            loop {
                let Some(mirroring) = this.upgrade() else { return };
                let said = mirroring.tell(&promoted).await;
                drop(mirroring);
                match said {
                    Ok(()) => return,
                    Err(error) => tracing::debug!(%error, "the source before has not heard of this one"),
                }
                tokio::select! {
                    () = tokio::time::sleep(TELL_AGAIN) => {}
                    _ = stopped.wait_for(|stop| *stop) => return,
                }
            }
        });
    }

    async fn tell(&self, promoted: &Promoted) -> Result<(), ExchangeError> {
        let epoch = self.known_epoch();
        let branch = self.config().branch;
        let hash = promoted.hash.parse::<ChainHash>().ok();
        let base = hash.map(|hash| Point { lsn: Lsn::new(promoted.metadata_lsn), hash });
        let Upstream { addresses, key } = &promoted.from;
        self.dialer.tell_fenced(addresses, *key, (&self.keys, branch), epoch, base).await
    }
}

const ASK_MAX: Duration = Duration::from_secs(3);
const TELL_AGAIN: Duration = Duration::from_secs(2);
