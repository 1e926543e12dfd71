//! The fence: an archive as the place that decides who is the source.
//!
//! Invariants:
//! - It is shipped to as a source ships, and sealed as [`crate::sealing`] says.
//! - Whoever looks again begins where the look before ended, if everything up to there is still listed: a long history is walked once.

use std::{sync::Arc, time::Duration};

use murphy_fs::{BlockStore, Fence, FenceError, FenceFuture, Held};
use murphy_log::{Clock, Digest, Epoch, Frame, Log, Lsn, MemoryLog, NodeId, Position, State, Usage};
use parking_lot::Mutex;

use crate::{
    descriptor::Archive,
    seal::Seal,
    sealing::{Sealing, refused, unavailable},
    ship::{Losses, NoCursor, ShipEnd, ShipLimits, Shipper, ShipperParts},
    slot::SlotHeader,
    survey::read_slot,
    walk::{Boundary, Walk, WalkError, walk, walk_on},
};

/// An archive that is asked who the source is.
#[derive(Clone, Debug)]
pub struct ArchiveFence {
    archive: Archive,
    node: NodeId,
    clock: Arc<dyn Clock>,
    known: Option<Boundary>,
    supplies: Option<Supplies>,
    /// What the last look found.
    seen: Arc<Mutex<Option<Arc<Walk>>>>,
}

/// What an archive is brought up from.
#[derive(Clone, Debug)]
pub struct Supplies {
    /// The log.
    pub log: Arc<dyn Log>,
    /// Where the packs are that it names.
    pub packs: Arc<dyn BlockStore>,
    /// Packs that a slot does not wait for if no store has them.
    pub lost: Option<Arc<dyn Losses>>,
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
        ArchiveFence { archive, node, clock, known, supplies: None, seen: Arc::default() }
    }

    /// The same fence, which can also be brought up to what a log holds.
    #[must_use]
    pub fn with_supplies(self, supplies: Supplies) -> ArchiveFence {
        ArchiveFence { supplies: Some(supplies), ..self }
    }

    /// The same fence, which walks from `end` on: the archive was seen to hold everything up to there.
    #[must_use]
    pub(crate) fn known_up_to(self, end: Position) -> ArchiveFence {
        ArchiveFence { known: Some(Boundary::after(end)), seen: Arc::default(), ..self }
    }

    /// The archive.
    pub fn archive(&self) -> &Archive {
        &self.archive
    }

    /// Walks to the end.
    pub async fn walk(&self) -> Result<Arc<Walk>, WalkError> {
        // Whoever looks at the same time walks all of it.
        let seen = self.seen.lock().take();
        let walked = match seen {
            Some(seen) if seen.start == self.start() => {
                walk_on(&self.archive, Arc::unwrap_or_clone(seen)).await?
            }
            Some(_) | None => None,
        };
        let walked = match walked {
            Some(walked) => walked,
            None => walk(&self.archive, self.known).await?,
        };
        let walked = Arc::new(walked);
        *self.seen.lock() = Some(Arc::clone(&walked));
        Ok(walked)
    }

    /// Where a walk begins that knows of none before.
    fn start(&self) -> Boundary {
        self.known.unwrap_or(Boundary::after(self.archive.descriptor().base))
    }

    /// The last slot that the last look found.
    pub(crate) fn last_slot(&self) -> Option<SlotHeader> {
        self.seen.lock().as_ref().and_then(|seen| seen.slots.last().copied())
    }

    /// The first slot with an entry behind `lsn` that the last look found, and its name.
    pub(crate) fn slot_behind(&self, lsn: Lsn) -> Option<(SlotHeader, String)> {
        let seen = self.seen.lock();
        let seen = seen.as_ref()?;
        let at = seen.slots.partition_point(|slot| slot.last <= lsn);
        seen.slots.get(at).copied().zip(seen.names.get(at).cloned())
    }

    async fn adopt_end(&self) -> Result<Held, FenceError> {
        let walk = self.walk().await.map_err(|error| self.refused(error))?;
        let seals = walk.seals.iter().map(Seal::sealed).collect();
        Ok(Held { end: walk.end.position, epoch: walk.end.epoch, seals })
    }

    async fn read_entries(&self, after: Position) -> Result<Vec<Frame>, FenceError> {
        let next = after.lsn.next();
        let find = || {
            let seen = self.seen.lock();
            let seen = seen.as_ref()?;
            let at = seen.slots.partition_point(|slot| slot.last < next);
            seen.slots.get(at).filter(|slot| slot.first <= next)?;
            seen.names.get(at).cloned()
        };
        let found = match find() {
            Some(name) => Some(name),
            None => {
                self.adopt_end().await?;
                find()
            }
        };
        let Some(name) = found else { return Ok(Vec::new()) };
        let read = read_slot(&self.archive, &name).await;
        let slot = read.map_err(|error| self.unavailable(error.to_string()))?;
        let keys = self.archive.keys().clone();
        let frames = murphy_log::aside(move || slot.verify_alone(&keys)).await;
        let frames = frames.map_err(|error| self.unavailable(format!("{name} is damaged: {error}")))?;
        let behind: Vec<Frame> = frames.into_iter().filter(|frame| frame.last() > after.lsn).collect();
        match behind.first() {
            Some(first) if first.first() != next || first.previous_hash() != after.hash => {
                Err(FenceError::Forked { place: self.archive.url().to_owned(), lsn: next })
            }
            _ => Ok(behind),
        }
    }

    /// Ships with the usual shipper, which waits for nothing that does not come: it is given up when it makes no headway.
    async fn bring_up(&self, to: Lsn) -> Result<(), FenceError> {
        let supplies = self.supplies.clone();
        let supplies =
            supplies.ok_or_else(|| self.unavailable("there is nothing to ship from".to_owned()))?;
        let parts = ShipperParts {
            archive: self.archive.clone(),
            epoch: supplies.log.tail().position.epoch,
            log: supplies.log,
            packs: supplies.packs,
            node: self.node,
            known: self.known.or_else(|| self.seen.lock().as_ref().map(|seen| seen.end)),
            // Whoever ships only to seal remembers nothing: the seal is what is looked for next time.
            cursor: Arc::new(NoCursor),
            clock: Arc::clone(&self.clock),
            limits: ShipLimits { slot_age: Duration::ZERO, ..ShipLimits::default() },
            lost: supplies.lost,
        };
        let (shipper, mut handle) = Shipper::new(parts);
        let stuck = async {
            let mut at = None;
            loop {
                let looked = tokio::time::timeout(HEADWAY, async {
                    while handle.changed().await {
                        let archived = handle.status().archived.map(|held| held.position.lsn);
                        if archived != at {
                            return archived;
                        }
                    }
                    std::future::pending().await
                });
                match looked.await {
                    Ok(archived) => at = archived,
                    Err(_) => return handle.status().error,
                }
            }
        };
        let refused = tokio::select! {
            end = shipper.past_strays().run_to(to) => match end {
                ShipEnd::Reached => return Ok(()),
                ShipEnd::Fenced(sealed) => FenceError::Sealed(sealed),
                ShipEnd::Forked { url, lsn } => FenceError::Forked { place: url, lsn },
                end => self.unavailable(end.to_string()),
            },
            error = stuck => {
                let why = error.unwrap_or_else(|| "it does not answer".to_owned());
                self.unavailable(format!("it cannot be brought up to lsn {to}: {why}"))
            }
        };
        Err(refused)
    }

    async fn take_from(&self, from: Position, to: Lsn, other: &dyn Fence) -> Result<Position, FenceError> {
        let mut frames = other.entries(from).await?;
        frames.retain(|frame| frame.last() <= to);
        let Some(end) = frames.last().map(Frame::position) else { return Ok(from) };
        let supplies = self.supplies.clone();
        let supplies =
            supplies.ok_or_else(|| self.unavailable("nobody knows where packs come from".to_owned()))?;
        let begins = State { position: from, digest: Digest::default(), usage: Usage::default() };
        let log = MemoryLog::new(begins);
        for frame in frames {
            let tail = log.tail().position;
            if frame.epoch() != tail.epoch || tail == from {
                log.claim(frame.epoch()).map_err(|error| self.unavailable(error.to_string()))?;
            }
            log.append(&tail, frame).map_err(|error| self.unavailable(error.to_string()))?;
        }
        self.clone().with_supplies(Supplies { log: Arc::new(log), ..supplies }).bring_up(end.lsn).await?;
        Ok(end)
    }

    fn refused(&self, error: WalkError) -> FenceError {
        refused(&self.archive, error)
    }

    fn unavailable(&self, reason: String) -> FenceError {
        unavailable(&self.archive, reason)
    }
}

impl Fence for ArchiveFence {
    fn place(&self) -> &str {
        self.archive.url()
    }

    fn rank(&self) -> String {
        let descriptor = self.archive.descriptor();
        format!("{:020} {} {}", descriptor.created.as_nanos(), descriptor.failure_domain, self.archive.url())
    }

    fn adopt(&self) -> FenceFuture<'_, Held> {
        Box::pin(self.adopt_end())
    }

    fn entries(&self, after: Position) -> FenceFuture<'_, Vec<Frame>> {
        Box::pin(self.read_entries(after))
    }

    fn ship(&self, to: Lsn) -> FenceFuture<'_, ()> {
        Box::pin(self.bring_up(to))
    }

    fn relay<'a>(&'a self, from: Position, to: Lsn, other: &'a dyn Fence) -> FenceFuture<'a, Position> {
        Box::pin(self.take_from(from, to, other))
    }

    fn seal(&self, base: Position, next: Epoch) -> FenceFuture<'_, ()> {
        Box::pin(async move {
            let walk = self.walk().await.map_err(|error| self.refused(error))?;
            let sealing = Sealing { archive: &self.archive, node: self.node, clock: &*self.clock };
            sealing.seal_behind(&walk, base, next).await
        })
    }
}

/// An archive that holds nothing more after so long is given up.
const HEADWAY: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
