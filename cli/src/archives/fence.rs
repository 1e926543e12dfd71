//! Whether another source has taken over, asked before this one decides anything; and what this one has lost, and archives have.
//!
//! Invariants:
//! - A node that has once been found fenced stays so, also while no archive answers: its directory remembers.
//! - An archive that was given up when this node took over, and was sealed for an epoch that does not come behind this node's, is lost to it: that
//!   is said, and is no fence.
//! - What an archive holds in this source's epoch and nothing leads to is this log's, was given up by people, or keeps the source from deciding.
//! - A seal tells where the history of the others begins: what this node has beyond it is listed as a branch before the node says that it was
//!   replaced.
//! - An archive that does not answer in time does not keep a source from starting; its shipper asks on.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use murphy_backup::{
    Archive, Boundary, Objection, Reach, ShipEnd, Walk, WalkError, strays, strays_behind, walk,
};
use murphy_fs::Sealed;
use murphy_log::Log;
use tokio::runtime::Handle;

use crate::{
    archive_notes::{cursor, fenced_before, remember_fence},
    config::NodeConfig,
    error::{CliError, failed},
    givers::ArchiveGiver,
    node::Node,
    places::{local_url, open_archive},
    replaced::{list_behind, way_on},
    settings::SharedArchive,
};

/// An archive that answered.
struct Asked<'a> {
    shared: &'a SharedArchive,
    archive: Archive,
    known: Option<Boundary>,
    walked: Result<Walk, WalkError>,
}

/// Refuses to go on as the source if an archive says that another one does, or holds what this one does not know. Entries that this node has
/// lost are fetched. Returns the URLs of those that have said all of it.
pub(crate) fn check_fences(
    node: &Node,
    archives: &[SharedArchive],
    runtime: &Handle,
) -> Result<BTreeSet<String>, CliError> {
    refuse_fenced(&node.directory)?;
    let looks = archives.iter().map(|shared| async move {
        let asked = tokio::time::timeout(ANSWER_MAX, Asked::ask(node, shared)).await;
        (shared, asked.unwrap_or_else(|_| Err(CliError::new("it does not answer in time"))))
    });
    let mut answered = Vec::new();
    for (shared, asked) in runtime.block_on(futures::future::join_all(looks)) {
        match asked {
            Ok(asked) => {
                asked.judge(node, runtime)?;
                answered.push(asked);
            }
            Err(error) => {
                tracing::warn!(url = shared.url, %error, "an archive cannot be asked who is the source");
            }
        }
    }
    // What one of them has lost another one has given back by now.
    let looks = answered.iter().map(|asked| async move {
        let reach = tokio::time::timeout(ANSWER_MAX, asked.reach(node)).await;
        (asked, reach.unwrap_or_else(|_| Err(CliError::new("it does not answer in time"))))
    });
    let mut reached = BTreeSet::new();
    for (asked, reach) in runtime.block_on(futures::future::join_all(looks)) {
        match reach {
            Ok(reach) => {
                asked.judge_strays(node, &reach)?;
                if asked.walked.is_ok() {
                    reached.insert(asked.shared.url.clone());
                }
            }
            Err(error) => {
                tracing::warn!(url = asked.shared.url, %error, "what an archive holds besides is not known");
            }
        }
    }
    Ok(reached)
}

/// Refuses a node whose directory remembers that another source has taken over.
pub(crate) fn refuse_fenced(directory: &Path) -> Result<(), CliError> {
    fenced_before(directory)?.map_or(Ok(()), |reason| Err(refused(directory, &reason)))
}

impl<'a> Asked<'a> {
    async fn ask(node: &Node, shared: &'a SharedArchive) -> Result<Asked<'a>, CliError> {
        let archive = open_archive(&node.config, &local_url(&node.config, shared)?).await.map_err(failed)?;
        let known: Option<Boundary> = cursor(&node.directory, shared).load().unwrap_or_default();
        let walked = walk(&archive, known).await;
        match walked {
            Err(error) if !error.is_of_content() => Err(failed(error)),
            walked => Ok(Asked { shared, archive, known, walked }),
        }
    }

    fn judge(&self, node: &Node, runtime: &Handle) -> Result<(), CliError> {
        let shared = self.shared;
        let walked = match &self.walked {
            Ok(walked) => walked,
            Err(error) => {
                tracing::warn!(url = shared.url, %error, "an archive cannot be asked who is the source");
                return Ok(());
            }
        };
        let (own, tail) = (node.log.recovery().epoch, node.log.durable().state().position);
        match walked.objection(own, tail.lsn) {
            None => {}
            Some(Objection::Replaced) if self.is_lost(node) => {
                let (url, ended) = (&shared.url, walked.end.epoch);
                tracing::warn!(url, %ended, %own, "an archive that was given up when this node took over was sealed by somebody else: nothing is shipped there");
            }
            Some(Objection::Replaced) => {
                // Several may have taken over since: the first of them has ended this epoch.
                let ended = walked.seals.iter().find(|seal| seal.epoch == own);
                let Some(seal) = ended.or(walked.seals.last()) else {
                    let reason =
                        format!("{} is in epoch {}, this node in {own}", shared.url, walked.end.epoch);
                    remember_fence(&node.directory, &reason);
                    return Err(refused(&node.directory, &reason));
                };
                return Err(self.replaced(node, seal));
            }
            Some(Objection::Lost { held }) => {
                let giver =
                    ArchiveGiver::new(&node.config, shared.clone(), node.identity.public_key().node());
                node.fetch_lost(&[Box::new(giver)], held, runtime).map_err(|error| {
                    CliError::new(format!(
                        "{} holds entries up to lsn {held}, this log ends at {}: {error}",
                        shared.url, tail.lsn
                    ))
                    .hint("this node has lost acknowledged entries: restore from that archive, with --take-over")
                })?;
            }
        }
        Ok(())
    }

    /// Notes who has taken over, and what only this node holds; says that it is no source any more.
    fn replaced(&self, node: &Node, seal: &murphy_backup::Seal) -> CliError {
        let by = seal.sealed();
        let listed = NodeConfig::read(&node.directory).and_then(|mut config| {
            list_behind(&mut config, &node.log, &by)?;
            config.write(&node.directory)
        });
        if let Err(error) = listed {
            tracing::warn!(%error, "what only this node holds is not listed");
        }
        let reason = sealed(self.shared, &by);
        remember_fence(&node.directory, &reason);
        refused(&node.directory, &reason)
    }

    async fn reach(&self, node: &Node) -> Result<Reach, CliError> {
        let (own, log) = (node.log.recovery().epoch, Arc::clone(&node.log) as Arc<dyn Log>);
        let reach = match &self.walked {
            Ok(walked) => strays(&self.archive, walked, own, &log).await,
            Err(_) => {
                let from = self.known.unwrap_or(Boundary::after(self.archive.descriptor().base));
                strays_behind(&self.archive, from, own, &log).await
            }
        };
        reach.map_err(failed)
    }

    /// Whether it was given up when `node` took over, and somebody else has sealed it since, for an epoch that does not come behind the node's own.
    fn is_lost(&self, node: &Node) -> bool {
        let own = node.log.recovery().epoch;
        let ended = self.walked.as_ref().ok().map(|walked| walked.end.epoch);
        node.config.archives_given_up.contains(&self.shared.url)
            && ended.is_some_and(|ended| ended.number <= own.number && ended != own)
    }

    fn judge_strays(&self, node: &Node, reach: &Reach) -> Result<(), CliError> {
        if self.is_lost(node) {
            return Ok(());
        }
        if let Some(seal) = reach.seal() {
            return Err(self.replaced(node, seal));
        }
        if let Some((object, reason)) = reach.broken_seal() {
            return Err(failed(ShipEnd::BrokenSeal { object, reason }).hint(format!(
                "put back the object as it was, if the store keeps versions; or look at the mirrors and other archives who leads the volume (murphy status, \
                 murphy verify). If somebody does, go on with that node. Only if nobody has taken over: take {url} out of reach, start again, murphy archive remove \
                 {dir} {url} --assume-lost, and add another one",
                url = self.shared.url,
                dir = node.directory.display(),
            )));
        }
        let own = node.log.recovery().epoch;
        if let Some(stray) = reach.strays.iter().find(|stray| stray.key.0 > own.number) {
            let reason = format!("{stray}, and the seal that began it is lost");
            return Err(refused(&node.directory, &reason));
        }
        if !reach.is_continued {
            let (url, lsn) = (&self.shared.url, reach.end.position.lsn);
            return Err(CliError::new(format!(
                "{url} ends at lsn {lsn} with an entry of this node's epoch that its log has not: this node has lost it and gone on without it, or \
                 a copy of it has shipped there"
            ))
            .hint(format!(
                "what is right is what was acknowledged: restore {url} with --take-over, or murphy promote at a mirror; the log here is kept as it is"
            )));
        }
        let Some(stray) = reach.furthest().cloned() else { return Ok(()) };
        let (archived, log) = (reach.end.position.lsn, node.log.tail().position.lsn);
        Err(failed(ShipEnd::Stray { stray, archived, log }).hint(format!(
            "bring a mirror or another archive that has these entries within reach and start again; without one: murphy promote at a mirror, or \
             murphy restore {url} DIR --take-over. If a copy of this directory ran and lost, or nobody has them any more: murphy archive abandon {dir} {url}",
            url = self.shared.url,
            dir = node.directory.display(),
        )))
    }
}

/// Who has taken over, for people.
pub(super) fn sealed(shared: &SharedArchive, sealed: &Sealed) -> String {
    let Sealed { base, by, next } = sealed;
    format!("{} was sealed at {base} by node {by}, which began epoch {next}", shared.url)
}

fn refused(directory: &Path, reason: &str) -> CliError {
    CliError::new(format!("another source has taken over: {reason}")).hint(way_on(directory))
}

const ANSWER_MAX: Duration = Duration::from_secs(10);
