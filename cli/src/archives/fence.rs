//! Whether another source has taken over, asked before this one decides anything; and what this one has lost, and archives have.
//!
//! Invariants:
//! - A node that has once been found fenced stays so, also while no archive answers: its directory remembers.
//! - An archive that does not answer in time does not keep a source from starting; its shipper asks on.

use std::time::Duration;

use murphy_backup::{Boundary, Objection, Walk, walk};
use murphy_log::Log;
use tokio::runtime::Handle;

use crate::{
    archive_notes::{cursor, fenced_before, remember_fence},
    error::{CliError, failed},
    givers::ArchiveGiver,
    node::Node,
    places::{local_url, open_archive},
    settings::SharedArchive,
};

/// Refuses to go on as the source if an archive says that another one does. Entries that this node has lost are fetched.
pub(crate) fn check_fences(
    node: &Node,
    archives: &[SharedArchive],
    runtime: &Handle,
) -> Result<(), CliError> {
    if let Some(reason) = fenced_before(&node.directory)? {
        return Err(refused(&reason));
    }
    let walks = archives.iter().map(|shared| async move {
        let asked = tokio::time::timeout(ANSWER_MAX, look(node, shared)).await;
        (shared, asked.unwrap_or_else(|_| Err(CliError::new("it does not answer in time"))))
    });
    for (shared, walked) in runtime.block_on(futures::future::join_all(walks)) {
        match walked {
            Ok(walked) => judge(node, shared, &walked, runtime)?,
            Err(error) => {
                tracing::warn!(url = shared.url, %error, "an archive cannot be asked who is the source");
            }
        }
    }
    Ok(())
}

async fn look(node: &Node, shared: &SharedArchive) -> Result<Walk, CliError> {
    let archive = open_archive(&node.config, &local_url(&node.config, shared)?).await.map_err(failed)?;
    let known: Option<Boundary> = cursor(&node.directory, shared).load().unwrap_or_default();
    walk(&archive, known).await.map_err(failed)
}

fn judge(node: &Node, shared: &SharedArchive, walked: &Walk, runtime: &Handle) -> Result<(), CliError> {
    let (own, tail) = (node.log.recovery().epoch, node.log.durable().state().position);
    match walked.objection(own, tail.lsn) {
        None => {}
        Some(Objection::Replaced) => {
            let reason = match walked.seals.last() {
                Some(seal) => format!(
                    "{} was sealed at {} by node {}, which began epoch {}",
                    shared.url, seal.base, seal.node, seal.next
                ),
                None => format!("{} is in epoch {}, this node in {own}", shared.url, walked.end.epoch),
            };
            remember_fence(&node.directory, &reason);
            return Err(refused(&reason));
        }
        Some(Objection::Lost { held }) => {
            let giver = ArchiveGiver::new(&node.config, shared.clone(), node.identity.public_key().node());
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

fn refused(reason: &str) -> CliError {
    CliError::new(format!("another source has taken over: {reason}"))
        .hint("what this node has beyond that point is kept; make a new node of the successor's archive")
}

const ANSWER_MAX: Duration = Duration::from_secs(10);
