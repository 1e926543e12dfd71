//! Whether this node may still answer for the volume: asked before every fsync returns, and before what an fsync waits for is changed.
//!
//! Invariants:
//! - Whatever mirrors and archives have said so far counts at that moment, whether or not the process has got round to ending.
//! - No order of people passes it: what is waited for is no part of it.

use std::sync::{Arc, Weak};

use murphy_fs::{AcknowledgeError, Mandate};

use super::Mirroring;
use crate::{archives::Archives, error::CliError};

impl Mirroring {
    /// Tells which archives the node ships to: a restore from any of them must know whom to ask, and each of them may know of a successor.
    pub(crate) fn ships_with(self: &Arc<Mirroring>, archives: &Arc<Archives>) {
        if self.archives.set(Arc::downgrade(archives)).is_err() {
            tracing::error!("a node has its archives already");
        }
        self.volume.acknowledge_under(Arc::new(Leading(Arc::downgrade(self))));
    }

    /// Refuses at a source that was replaced, or has lost what others hold.
    pub(crate) fn check_mandate(&self) -> Result<(), CliError> {
        self.may_acknowledge().map_err(|error| {
            CliError::new(format!("nothing is acknowledged here any more: {error}"))
                .hint("this process ends, and says why; murphy status lists then what only this node holds")
        })
    }

    /// Fails once mirrors or archives have said that somebody else leads, or that this node has lost entries.
    fn may_acknowledge(&self) -> Result<(), AcknowledgeError> {
        match self.said_against() {
            // What was said of an epoch before does not bind a mirror. Asked last: the configuration may be on its way to the disk.
            Some(error) if !self.is_mirror() => Err(error),
            Some(_) | None => Ok(()),
        }
    }

    fn said_against(&self) -> Option<AcknowledgeError> {
        let board = &self.services.board;
        if let Some(epoch) = board.fenced_by() {
            return Some(AcknowledgeError::Fenced(format!("a mirror has promised epoch {epoch}")));
        }
        if let Some((node, position)) = board.lost() {
            let held = format!("mirror {node} holds lsn {}, this source does not", position.lsn);
            return Some(AcknowledgeError::Lost(held));
        }
        let archives = self.archives.get().and_then(Weak::upgrade)?;
        let fenced = archives.fenced().map(|(_, why)| AcknowledgeError::Fenced(why));
        fenced.or_else(|| archives.lost().map(AcknowledgeError::Lost))
    }
}

/// The node as long as it leads, for its volume.
struct Leading(Weak<Mirroring>);

impl Mandate for Leading {
    fn stands(&self) -> Result<(), AcknowledgeError> {
        // Without it nobody listens: the process ends, and nothing can be heard any more.
        self.0.upgrade().map_or(Ok(()), |mirroring| mirroring.may_acknowledge())
    }
}
