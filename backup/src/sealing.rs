//! Sealing an archive: who is the source from the next epoch on.
//!
//! Invariants:
//! - Of several promoters, and the source itself, exactly one creates the next slot name. Whoever lost finds out by reading it.
//! - A seal counts only if the registry, read after it was created, has no floor above it.

use murphy_fs::FenceError;
use murphy_log::{Clock, Epoch, NodeId, Position};

use crate::{
    descriptor::Archive,
    registry::Registry,
    seal::{Occupant, Seal},
    store::Creation,
    strays::{Stray, StrayKind, successor_behind},
    walk::{Boundary, Walk, WalkError, walk},
};

/// A node that seals an archive.
pub(crate) struct Sealing<'a> {
    /// The archive.
    pub(crate) archive: &'a Archive,
    /// Who seals.
    pub(crate) node: NodeId,
    /// When it is sealed.
    pub(crate) clock: &'a dyn Clock,
}

impl Sealing<'_> {
    /// Seals: `next` begins after `base`, which must be where the archive ends. Says who was first if somebody else was. `known` is an end that was
    /// found before; without it the archive is walked from its beginning.
    pub(crate) async fn seal(
        self,
        known: Option<Boundary>,
        base: Position,
        next: Epoch,
    ) -> Result<(), FenceError> {
        let walk = walk(self.archive, known).await.map_err(|error| refused(self.archive, error))?;
        self.seal_behind(&walk, base, next).await
    }

    /// The same behind a walk of right now.
    pub(crate) async fn seal_behind(
        self,
        walk: &Walk,
        base: Position,
        next: Epoch,
    ) -> Result<(), FenceError> {
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
            return Err(unavailable(self.archive, reason));
        }
        if next.number <= end.epoch.number {
            return Err(unavailable(
                self.archive,
                format!("epoch {next} does not come after epoch {}", end.epoch),
            ));
        }
        let successor = successor_behind(self.archive, walk, next).await;
        match successor.map_err(|error| refused(self.archive, error))? {
            None => {}
            Some(Stray { kind: StrayKind::Seal(seal), .. }) => return Err(FenceError::Sealed(seal.sealed())),
            Some(stray) => {
                return Err(unavailable(
                    self.archive,
                    format!("{stray}: somebody has taken over, and the seal is lost"),
                ));
            }
        }
        let time = self.clock.wall();
        let seal = Seal { lineage, epoch: end.epoch, base: end.position, next, node: self.node, time };
        let created = self.archive.store().create(&end.slot_name(), seal.encode()).await;
        match created.map_err(|error| unavailable(self.archive, error.to_string()))? {
            Creation::Created | Creation::SameContent => self.check_counts(&end).await,
            Creation::Other(bytes) => match Occupant::decode(&bytes) {
                Ok(Occupant::Seal(other)) if other.is_same_decision(&seal) => self.check_counts(&end).await,
                Ok(Occupant::Seal(other)) => Err(FenceError::Sealed(other.sealed())),
                Ok(Occupant::Slot(slot)) => {
                    let (first, last) = (slot.header.first, slot.header.last);
                    Err(unavailable(
                        self.archive,
                        format!("lsn {first} to {last} were shipped meanwhile: adopt them first"),
                    ))
                }
                Err(error) => {
                    Err(unavailable(self.archive, format!("{} is damaged: {error}", end.slot_name())))
                }
            },
        }
    }

    /// Whether the seal counts. A stale promoter can win a name whose slot was deleted; the floor tells. And a name is not won while something
    /// lies under the next one of its place: a dead slot was there and is lost.
    async fn check_counts(&self, end: &Boundary) -> Result<(), FenceError> {
        let behind = Boundary { turn: end.turn + 1, ..*end }.slot_name();
        let taken = self.archive.store().size(&behind).await;
        if taken.map_err(|error| unavailable(self.archive, error.to_string()))?.is_some() {
            return Err(FenceError::Forked { place: self.archive.url().to_owned(), lsn: end.next() });
        }
        let mut registry = Registry::new(self.archive.clone());
        let view = registry.refresh().await.map_err(|error| unavailable(self.archive, error.to_string()))?;
        if view.is_below_floor(end.next()) {
            return Err(unavailable(self.archive, format!("lsn {} is below its floor", end.next())));
        }
        Ok(())
    }
}

/// The answer of a fence to a walk that failed.
pub(crate) fn refused(archive: &Archive, error: WalkError) -> FenceError {
    match error {
        WalkError::Fork { lsn, .. } => FenceError::Forked { place: archive.url().to_owned(), lsn },
        error => unavailable(archive, error.to_string()),
    }
}

/// The answer of a fence that cannot be asked, or does not do what was asked.
pub(crate) fn unavailable(archive: &Archive, reason: String) -> FenceError {
    FenceError::Unavailable { place: archive.url().to_owned(), reason }
}
