//! The fence: an archive as the place that decides who is the source.
//!
//! Invariants:
//! - Of several promoters, and the source itself, exactly one creates the next slot name. Whoever lost finds out by reading it.
//! - A seal counts only if the registry, read after it was created, has no floor above it.

use std::sync::Arc;

use murphy_fs::{Fence, FenceError, FenceFuture, Held};
use murphy_log::{Clock, Epoch, NodeId, Position};

use crate::{
    descriptor::Archive,
    registry::Registry,
    seal::{Occupant, Seal},
    store::Creation,
    walk::{Boundary, Walk, WalkError, walk},
};

/// An archive that is asked who the source is.
#[derive(Clone, Debug)]
pub struct ArchiveFence {
    archive: Archive,
    node: NodeId,
    clock: Arc<dyn Clock>,
    known: Option<Boundary>,
}

impl ArchiveFence {
    /// The fence at `archive`, used by `node`. `known` is an end that was found before (a saved cursor); without it the archive is
    /// walked from its beginning.
    pub fn new(
        archive: Archive,
        node: NodeId,
        clock: Arc<dyn Clock>,
        known: Option<Boundary>,
    ) -> ArchiveFence {
        ArchiveFence { archive, node, clock, known }
    }

    /// The archive.
    pub fn archive(&self) -> &Archive {
        &self.archive
    }

    /// Walks to the end.
    pub async fn walk(&self) -> Result<Walk, WalkError> {
        walk(&self.archive, self.known).await
    }

    async fn adopt_end(&self) -> Result<Held, FenceError> {
        let walk = self.walk().await.map_err(|error| self.refused(error))?;
        let is_empty = walk.end == Boundary::after(self.archive.descriptor().base);
        Ok(Held { last: (!is_empty).then_some(walk.end.position), seal: walk.seals.last().map(Seal::sealed) })
    }

    async fn create_seal(&self, base: Position, next: Epoch) -> Result<(), FenceError> {
        let walk = self.walk().await.map_err(|error| self.refused(error))?;
        let lineage = self.archive.lineage();
        if let Some(sealed) = walk.seals.last().filter(|seal| seal.next.number >= next.number) {
            let mine = Seal { next, base, node: self.node, ..*sealed };
            return if sealed.is_same_decision(&mine) {
                Ok(())
            } else {
                Err(FenceError::Sealed(sealed.sealed()))
            };
        }
        let end = walk.end;
        if (end.position.lsn, end.position.hash) != (base.lsn, base.hash) {
            let reason =
                format!("it ends at {}, not at {base}: adopt what it has, ship what it lacks", end.position);
            return Err(self.unavailable(reason));
        }
        if next.number <= end.epoch.number {
            return Err(self.unavailable(format!("epoch {next} does not come after epoch {}", end.epoch)));
        }
        let time = self.clock.wall();
        let seal = Seal { lineage, epoch: end.epoch, base: end.position, next, node: self.node, time };
        let created = self.archive.store().create(&end.slot_name(), seal.encode()).await;
        match created.map_err(|error| self.unavailable(error.to_string()))? {
            Creation::Created | Creation::SameContent => self.check_floor(&end).await,
            Creation::Other(bytes) => match Occupant::decode(&bytes) {
                Ok(Occupant::Seal(other)) if other.is_same_decision(&seal) => self.check_floor(&end).await,
                Ok(Occupant::Seal(other)) => Err(FenceError::Sealed(other.sealed())),
                Ok(Occupant::Slot(slot)) => {
                    let (first, last) = (slot.header.first, slot.header.last);
                    Err(self.unavailable(format!(
                        "lsn {first} to {last} were shipped meanwhile: adopt them first"
                    )))
                }
                Err(error) => Err(self.unavailable(format!("{} is damaged: {error}", end.slot_name()))),
            },
        }
    }

    /// A stale promoter can win a name whose slot was deleted; the floor tells.
    async fn check_floor(&self, end: &Boundary) -> Result<(), FenceError> {
        let mut registry = Registry::new(self.archive.clone());
        let view = registry.refresh().await.map_err(|error| self.unavailable(error.to_string()))?;
        if view.is_below_floor(end.next()) {
            return Err(self.unavailable(format!("lsn {} is below its floor", end.next())));
        }
        Ok(())
    }

    fn refused(&self, error: WalkError) -> FenceError {
        match error {
            WalkError::Fork { lsn, .. } => FenceError::Forked { place: self.archive.url().to_owned(), lsn },
            error => self.unavailable(error.to_string()),
        }
    }

    fn unavailable(&self, reason: String) -> FenceError {
        FenceError::Unavailable { place: self.archive.url().to_owned(), reason }
    }
}

impl Fence for ArchiveFence {
    fn adopt(&self) -> FenceFuture<'_, Held> {
        Box::pin(self.adopt_end())
    }

    fn seal(&self, base: Position, next: Epoch) -> FenceFuture<'_, ()> {
        Box::pin(self.create_seal(base, next))
    }
}

#[cfg(test)]
mod tests;
