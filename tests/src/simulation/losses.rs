//! What is lost for ever: the disk of a node, or its whole region, disk and store. And the restore that takes over, if no mirror does.
//!
//! Invariants:
//! - What no copy can survive together does not happen together: a disk is lost only while another place has everything that the level of
//!   the volume promises.
//! - A restore that takes over does what the program does, in the same order: silence, tree, bytes, seals; one that was cut short is run again
//!   by the same node.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use murphy_backup::{
    ArchiveFence, PackReport, Silence, Successor, Target, Watch, restore_packs, take_over_at, walk,
};
use murphy_fs::{BlockStore, Fence, Index, ObjectBlockStore, SnapshotOrigin, write_snapshot};
use murphy_log::{Clock, Epoch, Log, LogTime, NodeId};
use object_store::{memory::InMemory, path::Path};

use super::{
    Level,
    account::Account,
    disk::{Base, Disk, NodeName},
    gate::Gate,
    restores::{in_own_time, open, restore_around},
    stage::NodeClock,
    world::{World, epoch_of},
};

/// What is lost of a host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Loss {
    Disk,
    /// The disk, and the store beside it.
    Region,
}

impl World {
    /// Loses the disk of `host`, or more, if that is survivable; then people do what is to be done.
    pub(super) fn lose(self: &Arc<Self>, host: usize, loss: Loss) {
        if !self.may_lose(host) {
            return;
        }
        let was_source = self.hosts[host].lock().leads().is_some();
        let (role, what) = (
            if was_source { "source" } else { "mirror" },
            match loss {
                Loss::Disk => "disk",
                Loss::Region => "region",
            },
        );
        let kind = match (was_source, loss) {
            (true, Loss::Disk) => "a lost disk of a source",
            (true, Loss::Region) => "a lost region of a source",
            (false, Loss::Disk) => "a lost disk of a mirror",
            (false, Loss::Region) => "a lost region of a mirror",
        };
        self.stage().disaster(kind, format!("host {host}, a {role}, loses its {what} for ever"));
        self.crash(host);
        let node = {
            let mut home = self.hosts[host].lock();
            let node = home.disk.node;
            home.disk = Disk::outside(node, "its disk is lost");
            node
        };
        self.give_up_node(host);
        if loss == Loss::Region {
            let name = format!("store-{host}-{}", node.life + 1);
            *self.ground.stores[host].lock() = Account::new(self.stage(), &name, Arc::new(|_, _| {}));
        }
        if self.network.is_some() {
            self.rejoin_later(host);
        } else {
            self.restore_later(host);
        }
        if was_source {
            let world = Arc::clone(self);
            tokio::spawn(async move { world.promote_somebody().await });
        }
    }

    /// Whether everything that is promised, and somebody who can go on, is left without `host`.
    fn may_lose(&self, host: usize) -> bool {
        let (leads, own) = {
            let home = self.hosts[host].lock();
            let Some(process) = &home.process else { return false };
            (home.leads().is_some(), process.log.durable().state().position)
        };
        // Of two disasters that a volume survives each, a mirror that is removed may be the one and a lost disk the other.
        if self.was_cloned() || *self.promoting.lock() || self.is_removing() {
            return false;
        }
        // What it has sealed so far ends the source before, and only it goes on from there without anybody's decision.
        if *self.candidate.lock() == Some(host) {
            return false;
        }
        if self.network.is_none() {
            let is_intact = |account: &Arc<Account>| !account.is_gone() && !account.is_damaged();
            return leads && self.known_archives().iter().any(is_intact);
        }
        let leader = self.leader();
        let suffices = |other: usize| {
            let home = self.hosts[other].lock();
            let Some(process) = &home.process else { return false };
            if home.disk.leads.is_some() {
                // One that was replaced and does not know it yet goes on for nobody.
                return !leads && leader == Some(other) && self.ground.level != Level::Mirror;
            }
            let Some(followed) = process.among.as_ref().and_then(|among| among.followed.as_ref()) else {
                return false;
            };
            let (tip, data) = (process.log.durable().state().position, *followed.replica.data.borrow());
            if !self.has_caught_up(&tip) {
                return false;
            }
            // With W = 1 what only this mirror has acknowledged is with the source and here: losing both is more than was promised.
            let holds_all = self.stage().judge(|judge, _| {
                let reaches_own = leads || judge.is_on(&own, &tip);
                Ok(judge.all_held("", &tip).is_ok() && reaches_own && data >= judge.acknowledged_lsn())
            });
            let has_bytes = leads || data >= own.lsn;
            self.ground.level != Level::Mirror || (holds_all == Some(true) && has_bytes)
        };
        (0..self.hosts.len()).filter(|other| *other != host).any(suffices)
    }

    /// Restores the node of `host`, which is gone, and lets it take over; again until it succeeds, or nothing is left to restore from.
    fn restore_later(self: &Arc<Self>, host: usize) {
        if std::mem::replace(&mut self.hosts[host].lock().starting, true) {
            return;
        }
        let world = Arc::clone(self);
        tokio::spawn(async move {
            let node = world.hosts[host].lock().disk.node.reborn();
            world.hosts[host].lock().disk.node = node;
            let (mut left_out, mut interruptions) = (BTreeSet::new(), 0);
            while world.is_anything_left().await {
                world.stage().pause(1000, 9000).await;
                // People, too, are interrupted.
                let is_interrupted = interruptions < INTERRUPTIONS_MAX && world.stage().once_in(4);
                interruptions += u32::from(is_interrupted);
                let at_most = if is_interrupted { world.stage().ms(0, 400) } else { RESTORE_MAX };
                let seen = tokio::time::timeout(RESTORE_MAX, world.watch_source(host, node, &left_out)).await;
                let restored = match seen.unwrap_or_else(|_| Err("it watches for ever".to_owned())) {
                    Ok(silence) => {
                        let restoring = world.restore(host, node, &left_out, silence);
                        let restored = tokio::time::timeout(at_most, restoring).await;
                        restored.unwrap_or_else(|_| Err("it is killed".to_owned()))
                    }
                    Err(why) => Err(why),
                };
                match restored {
                    Ok(()) => return world.start(host).await,
                    Err(why) => {
                        world.stage().note(format!("host {host}: is not restored: {why}"));
                        left_out.extend(world.left_out_after(&why));
                    }
                }
            }
            world.stage().count("nodes of which nothing is left");
            world.hosts[host].lock().starting = false;
        });
    }

    /// Whether an archive is there from which all that it got can be restored.
    async fn is_anything_left(&self) -> bool {
        for account in self.ground.every_archive() {
            let is_harmed = account.is_gone() || account.is_damaged();
            if !is_harmed && (!self.is_late(&account) || has_snapshot(&account).await) {
                return true;
            }
        }
        false
    }

    /// What the next order does not name, after a refusal that names it: nobody has what it lacks, or what it had.
    fn left_out_after(&self, why: &str) -> Option<String> {
        let says =
            ["cannot be brought up", "no other archive has", "nobody has", "is damaged", "cannot be used"];
        let every = self.ground.every_archive();
        let named = every.into_iter().find(|account| why.contains(&account.name))?;
        says.iter().any(|said| why.contains(said)).then(|| named.name.clone())
    }

    /// `murphy restore --take-over` with every archive that is not gone or left out.
    async fn restore(
        self: &Arc<Self>,
        host: usize,
        node: NodeName,
        left_out: &BTreeSet<String>,
        silence: Option<Silence>,
    ) -> Result<(), String> {
        let ground = &self.ground;
        let left = self.archives_left(left_out);
        let objects: Vec<_> = left.iter().map(|account| (account.name.clone(), account.objects())).collect();
        let (target, lineage) = (ground.store(host).objects(), ground.lineage);
        let restored =
            in_own_time(move || async move { restore_newest(&objects, target, lineage.branch).await })?;
        let position = restored.base.state.position;
        self.stage().note(format!("host {host}: lsn {} is restored", position.lsn));
        let identity = ground.identity(node)?.node();
        let fences = self.fences(host, identity, &left).await?;
        let mut known = vec![position.epoch];
        for fence in &fences {
            known.push(fence.adopt().await.map_err(|error| error.to_string())?.epoch);
        }
        let attempts = self.remember(host, node, &known);
        let next = *attempts.last().ok_or("no epoch was remembered")?;
        let successor = Successor { node: identity, attempts, given_up: BTreeSet::new() };
        let own = blocks_in(ground.store(host).objects());
        let taken = take_over_at(&fences, (&successor, Some(own)), position, silence.as_ref()).await;
        let reached = taken.map_err(|error| error.to_string())?;
        if reached > position.lsn {
            return Err(format!(
                "entries up to lsn {reached} came between two seals: they are restored next time"
            ));
        }
        self.restored(host, node, restored, next);
        Ok(())
    }

    /// The archives that an order names.
    fn archives_left(&self, left_out: &BTreeSet<String>) -> Vec<Arc<Account>> {
        let mut left = self.ground.every_archive();
        left.retain(|account| !account.is_gone() && !left_out.contains(&account.name));
        left
    }

    /// The fences of those that are not given up.
    async fn fences(
        &self,
        host: usize,
        node: NodeId,
        left: &[Arc<Account>],
    ) -> Result<Vec<ArchiveFence>, String> {
        let gate = Arc::new(Gate::new());
        let clock = Arc::new(NodeClock::new(self.stage())) as Arc<dyn Clock>;
        let mut fences = Vec::new();
        for account in left {
            match self.ground.archive(account, &gate).await {
                Ok(archive) => fences.push(ArchiveFence::new(archive, node, Arc::clone(&clock), None)),
                // Its URL is not given (any more).
                Err(error) if account.is_damaged() || self.is_late(account) => {
                    self.stage().note(format!("host {host}: gives up {}: {error}", account.name));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(fences)
    }

    /// Returns once the source has been silent in all archives that are left, or has been shut out of one by an earlier attempt.
    async fn watch_source(
        &self,
        host: usize,
        node: NodeName,
        left_out: &BTreeSet<String>,
    ) -> Result<Option<Silence>, String> {
        let identity = self.ground.identity(node)?.node();
        let fences = self.fences(host, identity, &self.archives_left(left_out)).await?;
        let attempts = self.hosts[host].lock().disk.attempts.clone();
        let successor = Successor { node: identity, attempts, given_up: BTreeSet::new() };
        let mut held = Vec::new();
        for fence in &fences {
            held.push(fence.adopt().await.map_err(|error| error.to_string())?);
        }
        if held.iter().any(|held| successor.has_sealed(held)) {
            return Ok(None);
        }
        let watch = Watch::of(fences.iter().zip(&held), Arc::new(NodeClock::new(self.stage())));
        watch.until_silent(&|_| {}).await.map(Some).map_err(|error| error.to_string())
    }

    /// The epochs that the restore has made up its mind to begin; they stay with what it leaves behind.
    fn remember(&self, host: usize, node: NodeName, known: &[Epoch]) -> Vec<Epoch> {
        let mut home = self.hosts[host].lock();
        let attempts = &mut home.disk.attempts;
        let number = known.iter().chain(&*attempts).map(|epoch| epoch.number).max();
        let next = Successor::next_epoch(attempts, known, epoch_of(number.unwrap_or_default() + 1, node).id);
        if attempts.last() != Some(&next) {
            attempts.push(next);
        }
        attempts.clone()
    }

    /// The successor is published.
    fn restored(self: &Arc<Self>, host: usize, node: NodeName, restored: Restored, epoch: Epoch) {
        let stage = self.stage();
        let base = restored.base.state.position;
        let harmed = |account: &Arc<Account>| account.is_gone() || account.is_damaged();
        let complete = !self.ground.every_archive().iter().any(harmed);
        stage.count("restores that took over");
        stage.note(format!(
            "host {host}: epoch {} begins after lsn {}, {} packs copied, {} missing",
            epoch.number, base.lsn, restored.packs.copied, restored.packs.missing
        ));
        if complete && !restored.packs.is_complete() {
            stage
                .violated(&format!("deleted: a restore that takes over lacks {:?}", restored.packs.examples));
        }
        if !restored.packs.is_complete() {
            self.bytes_lost.store(true, Ordering::Relaxed);
            self.restore_lacks.store(true, Ordering::Relaxed);
        }
        let keeps = self.ground.level == Level::Archive && complete;
        stage.judge(|judge, _| {
            judge.begins(epoch, base);
            if keeps {
                return judge.all_held(&format!("host {host}, restored,"), &base);
            }
            judge.forgive(&base);
            judge.forget_files();
            Ok(())
        });
        let disk = Disk::beginning_after(node, Some(restored.base), self.ground.origin);
        self.hosts[host].lock().disk = Disk { leads: Some(epoch), ..disk };
    }
}

/// A tree that was restored, with its bytes.
struct Restored {
    base: Base,
    packs: PackReport,
}

/// Whether an archive that was added has what it begins with.
pub(super) async fn has_snapshot(account: &Account) -> bool {
    account
        .names()
        .await
        .iter()
        .any(|name| name.as_ref().contains("/snapshots/") && name.as_ref().ends_with("manifest.json"))
}

/// The own store of a node that is restored.
fn blocks_in(objects: Arc<InMemory>) -> Arc<dyn BlockStore> {
    Arc::new(ObjectBlockStore::new(objects as _, Path::from("blocks"), "the new store".to_owned()))
}

/// Restores the newest state that `accounts` hold, around snapshots that turn out to be damaged; its packs go to `target`.
async fn restore_newest(
    accounts: &[(String, Arc<InMemory>)],
    target: Arc<InMemory>,
    branch: murphy_log::BranchId,
) -> Result<Restored, String> {
    let archives = open(accounts).await?;
    let (index, state, _) = restore_around(&archives, Target::Latest).await?;
    let tree = index.snapshot();
    let stores: Vec<Arc<dyn BlockStore>> =
        archives.iter().map(|archive| Arc::new(archive.packs()) as Arc<dyn BlockStore>).collect();
    let packs = restore_packs(&stores, &tree, blocks_in(target), Arc::new(|_| {})).await;
    let packs = packs.map_err(|error| error.to_string())?;
    let mut as_of = LogTime::default();
    for archive in &archives {
        // A damaged one says nothing.
        let walked = walk(archive, None).await.ok();
        as_of = as_of.max(walked.and_then(|walked| walked.as_of()).unwrap_or_default());
    }
    let origin = SnapshotOrigin { branch, created: as_of };
    let mut snapshot = Vec::new();
    let keys = archives.first().ok_or("no archive is left")?.keys();
    write_snapshot(&*tree, keys, origin, &mut snapshot, &|_| {}).map_err(|error| error.to_string())?;
    Ok(Restored { base: Base { state, snapshot: Bytes::from(snapshot), as_of }, packs })
}

/// So often people try, with pauses of some seconds.
const INTERRUPTIONS_MAX: u32 = 3;
const RESTORE_MAX: Duration = Duration::from_secs(120);
