//! Bringing one slot into the archive: its packs, itself, and the look at the registry behind it.
//!
//! Invariants:
//! - Every step may be repeated, and may be broken off anywhere.
//! - `AlreadyExists` is answered by what is there: my slot, a slot of my history, a seal, or a fork.
//! - A seal fences unless the source leads a later epoch than it names: then somebody sealed who never led what this log holds. It is passed
//!   where the log has nothing of the sealed epoch behind it; otherwise shipping ends there, and people go on with another archive.

use std::collections::HashSet;

use futures::{StreamExt, TryStreamExt};
use murphy_fs::{BlockStoreError, HeldPack, PackName, Refusal, look_for_pack};
use murphy_log::{Epoch, Frame, Lsn, Position};
use tokio::sync::{Mutex, Semaphore};

use crate::{
    descriptor::ArchiveKind,
    pack::{CopyPackError, NamedPack, copy_pack, has_pack, named_packs},
    registry::Registry,
    seal::{Occupant, Seal},
    sealing::Sealing,
    slot::{SlotHeader, encode_slot},
    store::{Creation, StoreError},
    walk::{Boundary, Head, TURNS_MAX, read_head, walk},
};

use super::{
    ShipperParts,
    core::{Job, Outcome, ShipEnd, Work},
};

/// What the jobs of one shipper share.
pub(super) struct SlotTask {
    pub(super) parts: ShipperParts,
    pub(super) registry: Mutex<Registry>,
    /// Limits the packs in memory.
    pub(super) copies: Semaphore,
    /// Packs that are known to be in the archive, and since which entry they are needed: one that was found is brought again.
    pub(super) seen: parking_lot::Mutex<HashSet<(PackName, Lsn)>>,
}

impl SlotTask {
    pub(super) async fn run(&self, job: &Job) -> Outcome {
        let done = match &job.work {
            Work::Ship(frames) => self.ship(&job.at, frames).await,
            Work::Seal(next) => self.seal(&job.at, *next).await,
        };
        done.unwrap_or_else(|outcome| outcome)
    }

    /// Checks that this log has `position`. The error is an outcome that is not done.
    pub(super) async fn check_on_chain(&self, position: Position) -> Result<(), Outcome> {
        let log = std::sync::Arc::clone(&self.parts.log);
        let (lsn, url) = (position.lsn, self.url());
        if lsn < log.first() {
            // Trimmed, or the base of everything: the frame behind it tells what its hash must be.
            let next = murphy_log::aside(move || log.read(lsn.next()).map(|mut frames| frames.next()));
            return match next.await {
                Ok(Some(Ok(frame))) if frame.previous_hash() == position.hash => Ok(()),
                Ok(None) if self.parts.log.durable().state().position.hash == position.hash => Ok(()),
                Ok(Some(Ok(_)) | None) => Err(Outcome::Ended(ShipEnd::Forked { url, lsn: lsn.next() })),
                Ok(Some(Err(error))) | Err(error) => {
                    Err(Outcome::Ended(ShipEnd::Gap { url, lsn: lsn.next(), reason: error.to_string() }))
                }
            };
        }
        let found = murphy_log::aside(move || log.read(lsn).map(|mut frames| frames.next()));
        match found.await {
            Ok(Some(Ok(frame))) if (frame.last(), frame.position().hash) == (lsn, position.hash) => Ok(()),
            Ok(Some(Ok(_))) => Err(Outcome::Ended(ShipEnd::Forked { url, lsn })),
            Ok(None) => Err(Outcome::Failed(format!("lsn {lsn} is not durable in this log"))),
            Ok(Some(Err(error))) | Err(error) => Err(Outcome::Failed(error.to_string())),
        }
    }

    async fn ship(&self, at: &Boundary, frames: &[Frame]) -> Result<Outcome, Outcome> {
        let archive = &self.parts.archive;
        if archive.descriptor().kind == ArchiveKind::Full {
            self.copy_packs(frames).await?;
        }
        let (lineage, node, owned) = (archive.lineage(), self.parts.node, frames.to_vec());
        let encoded = murphy_log::aside(move || encode_slot(lineage, node, &owned)).await;
        let bytes = encoded.map_err(|error| Outcome::Failed(error.to_string()))?;
        match archive.store().create(&at.slot_name(), bytes).await.map_err(failed)? {
            Creation::Created | Creation::SameContent => self.check_counts(at).await,
            Creation::Other(bytes) => self.judge(at, &bytes).await,
        }
    }

    /// What it means that the name is taken by `bytes`.
    async fn judge(&self, at: &Boundary, bytes: &bytes::Bytes) -> Result<Outcome, Outcome> {
        let archive = &self.parts.archive;
        let name = archive.store().object(&at.slot_name());
        let occupant = Occupant::decode(bytes)
            .map_err(|error| Outcome::Failed(format!("{name} is taken and damaged: {error}")))?;
        let forked = || Outcome::Ended(ShipEnd::Forked { url: self.url(), lsn: at.next() });
        match occupant {
            Occupant::Seal(seal) if seal.lineage == archive.lineage() => Err(self.sealed(at, &seal)),
            Occupant::Seal(_) => Err(forked()),
            Occupant::Slot(slot) => {
                let header = slot.header;
                if !continues(&header, at) || header.lineage != archive.lineage() {
                    return if self.is_abandoned(at).await? { Ok(Outcome::Abandoned) } else { Err(forked()) };
                }
                if header.last > self.parts.log.durable().state().position.lsn {
                    let (held, log) =
                        (Boundary::after(header.end()), self.parts.log.durable().state().position);
                    return Err(Outcome::Ended(ShipEnd::Ahead { url: self.url(), held, log }));
                }
                self.check_on_chain(header.end()).await?;
                self.check_counts(at).await?;
                Ok(Outcome::Adopted(header.end(), header.last_time))
            }
        }
    }

    /// Whether what is under the name counts. A name below the floor was taken, and its slot deleted: whoever wins it now has won nothing. Nor
    /// does a name with something under the next one of its place: a dead slot was there and is lost, and others have gone on behind it.
    async fn check_counts(&self, at: &Boundary) -> Result<Outcome, Outcome> {
        let archive = &self.parts.archive;
        let below_floor = async {
            let mut registry = self.registry.lock().await;
            let view = registry.refresh().await.map_err(|error| Outcome::Failed(error.to_string()))?;
            Ok::<_, Outcome>(view.is_below_floor(at.next()))
        };
        let behind = Boundary { turn: at.turn + 1, ..*at }.slot_name();
        let head = async {
            let head = read_head(archive, &behind).await;
            head.map_err(|error| Outcome::Failed(error.to_string()))
        };
        match futures::try_join!(below_floor, head)? {
            (true, _) => {
                let reason =
                    "the archive went on without this node, and has expired what came next".to_owned();
                Err(Outcome::Ended(ShipEnd::Gap { url: self.url(), lsn: at.next(), reason }))
            }
            (false, Some(Head::Seal(seal))) if seal.lineage == archive.lineage() => {
                Err(self.sealed(at, &seal))
            }
            (false, Some(_)) => Err(Outcome::Ended(ShipEnd::Forked { url: self.url(), lsn: at.next() })),
            (false, None) => Ok(Outcome::Done),
        }
    }

    /// Whether people have given up the slot under the name. One that was given up while this shipper runs counts too.
    async fn is_abandoned(&self, at: &Boundary) -> Result<bool, Outcome> {
        let mut registry = self.registry.lock().await;
        let view = registry.refresh().await.map_err(|error| Outcome::Failed(error.to_string()))?;
        Ok(at.turn < TURNS_MAX && view.abandoned.contains(&(at.epoch.number, at.next(), at.turn)))
    }

    async fn seal(&self, at: &Boundary, next: Epoch) -> Result<Outcome, Outcome> {
        if at.epoch.number >= next.number {
            return Err(self.shut(at, at.epoch));
        }
        let parts = &self.parts;
        let known = Some(*at);
        let walk = walk(&parts.archive, known).await.map_err(|error| Outcome::Failed(error.to_string()))?;
        // A promoter on another node, which this log was copied from, may have sealed for the same epoch; others before it, who never led.
        let here = || walk.seals.iter().take_while(|seal| seal.base.lsn == at.position.lsn);
        if here().any(|seal| seal.next == next) {
            return Ok(Outcome::Done);
        }
        match here().last() {
            Some(seal) if seal.next.number >= next.number => return Err(self.sealed(at, seal)),
            _ if walk.slots.is_empty() => {}
            // It went on here with entries that this log does not have.
            _ => return Err(Outcome::Ended(ShipEnd::Forked { url: self.url(), lsn: at.next() })),
        }
        let sealing = Sealing { archive: &parts.archive, node: parts.node, clock: &*parts.clock };
        match sealing.seal(known, at.position, next).await {
            Ok(()) => Ok(Outcome::Done),
            Err(murphy_fs::FenceError::Sealed(sealed)) if sealed.next == next => Ok(Outcome::Done),
            // The next try finds it.
            Err(murphy_fs::FenceError::Sealed(sealed)) if sealed.next.number < parts.epoch.number => {
                Err(Outcome::Failed(format!("it is sealed for epoch {}", sealed.next)))
            }
            Err(murphy_fs::FenceError::Sealed(sealed)) => Err(Outcome::Ended(ShipEnd::Fenced(sealed))),
            Err(error) => Err(Outcome::Failed(error.to_string())),
        }
    }

    /// What it means that `seal` stands where this log goes on in the epoch before it.
    fn sealed(&self, at: &Boundary, seal: &Seal) -> Outcome {
        match seal.next.number < self.parts.epoch.number {
            true => self.shut(at, seal.next),
            false => Outcome::Ended(ShipEnd::Fenced(seal.sealed())),
        }
    }

    /// The archive was sealed for `next`, which this log never had, below entries of an earlier epoch that it has: they cannot get in any more.
    fn shut(&self, at: &Boundary, next: Epoch) -> Outcome {
        let reason = format!(
            "it was sealed for epoch {} by a node that never led what comes next here, and was given up when this one took over",
            next.number
        );
        Outcome::Ended(ShipEnd::Gap { url: self.url(), lsn: at.next(), reason })
    }

    /// Returns when every pack that `frames` name is in the archive.
    async fn copy_packs(&self, frames: &[Frame]) -> Result<(), Outcome> {
        let named = named_packs(frames).map_err(|error| Outcome::Failed(error.to_string()))?;
        let is_open =
            |pack: &NamedPack| !pack.is_missing && !self.seen.lock().contains(&(pack.meta.name, pack.needed));
        let unknown: Vec<NamedPack> = named.into_iter().filter(is_open).collect();
        let copies = futures::stream::iter(unknown).map(|pack| self.copy_pack(pack));
        copies.buffer_unordered(PACKS_AT_ONCE).try_collect::<()>().await
    }

    async fn copy_pack(&self, pack: NamedPack) -> Result<(), Outcome> {
        let _permit = self.copies.acquire().await.map_err(|error| Outcome::Failed(error.to_string()))?;
        let target = self.parts.archive.packs();
        let failed = |error: BlockStoreError| Outcome::Failed(error.to_string());
        // A pack that older entries named was brought by their slot, or by the first snapshot. What is new is put, whatever is there: a put is
        // compared with what has the name.
        if pack.is_new || !has_pack(&pack.meta, &target).await.map_err(failed)? {
            match copy_pack(&pack.meta, &*self.parts.packs, &target).await {
                Ok(_) => {}
                Err(
                    CopyPackError::Store(BlockStoreError::NotFound { .. }) | CopyPackError::Damaged { .. },
                ) if self.may_be_lost(&pack) => {
                    if look_for_pack(&target, &pack.meta).await.map_err(failed)? != HeldPack::Intact {
                        let (url, name) = (self.parts.archive.url(), pack.meta.name);
                        tracing::warn!(url, %name, "a pack was lost with the source before; its slot goes without");
                        // Should it be found, the entry that says so brings it.
                        return Ok(());
                    }
                }
                Err(CopyPackError::Store(BlockStoreError::Refused {
                    object,
                    refusal: Refusal::OtherContent,
                })) => {
                    return Err(Outcome::Failed(format!("{object} has other content than the source's")));
                }
                Err(error) => return Err(Outcome::Failed(error.to_string())),
            }
        }
        let mut seen = self.seen.lock();
        if seen.len() >= SEEN_MAX {
            seen.clear();
        }
        seen.insert((pack.meta.name, pack.needed));
        Ok(())
    }

    fn may_be_lost(&self, pack: &NamedPack) -> bool {
        self.parts.lost.as_ref().is_some_and(|lost| lost.may_have(pack.since))
    }

    fn url(&self) -> String {
        self.parts.archive.url().to_owned()
    }
}

fn continues(header: &SlotHeader, at: &Boundary) -> bool {
    (header.first, header.hash_before, header.epoch) == (at.next(), at.position.hash, at.epoch)
}

#[expect(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn failed(error: StoreError) -> Outcome {
    Outcome::Failed(error.to_string())
}

/// So many packs of one slot wait at once for their turn to be copied.
const PACKS_AT_ONCE: usize = 64;
/// So many names of packs are remembered, 24 bytes each, before all are forgotten.
const SEEN_MAX: usize = 1 << 18;
