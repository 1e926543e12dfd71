//! How a source ships: one shipper for each archive, snapshots in between, archives that are added, and whether what stands still says so.
//!
//! Invariants:
//! - Shippers and snapshots are the product's; in what order they are begun is the program's.
//! - An archive is named in the log before anything is shipped to it.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Weak},
    time::Duration,
};

use murphy_backup::{
    Archive, ArchiveAcknowledger, ArchiveKind, Boundary, Descriptor, KnownLosses, LostPacks, NewBase,
    ShipEnd, ShipHandle, ShipLimits, Shipper, ShipperParts, bases, check_continued_by, write_base,
};
use murphy_fs::{AcknowledgeError, Acknowledgement, Acknowledger, FileSystem, IndexSnapshot, View, Volume};
use murphy_log::{Clock, Epoch, Log, LogTime, Lsn, NodeId, Position};
use parking_lot::Mutex;

use super::{
    Canary, Level,
    account::Account,
    disk::{Disk, DiskCursor, NodeLog},
    gate::Gate,
    node::{ARCHIVES, Ground, Process, Tasks},
    stage::NodeClock,
};

/// Everything that a source ships, and to where.
pub(super) struct Shipping {
    ground: Arc<Ground>,
    host: usize,
    gate: Arc<Gate>,
    volume: Volume,
    /// What is shipped.
    log: Arc<dyn Log>,
    own: Arc<NodeLog>,
    clock: Arc<NodeClock>,
    node: NodeId,
    epoch: Epoch,
    cursors: Arc<Mutex<HashMap<String, Boundary>>>,
    lost: Option<LostPacks>,
    archives: Mutex<Vec<Arc<Shipped>>>,
}

/// An archive that is shipped to.
pub(super) struct Shipped {
    pub(super) account: Arc<Account>,
    pub(super) handle: Mutex<Option<ShipHandle>>,
    /// Why it cannot be opened, if so.
    pub(super) error: Mutex<Option<String>>,
}

impl Shipped {
    /// Whether shipping has ended because somebody else ships there.
    pub(super) fn shows_another_source(&self) -> bool {
        let end = self.handle.lock().as_ref().and_then(|handle| handle.status().end);
        end.is_some_and(|end| end.shows_another_source())
    }

    /// Whether it cannot be continued with the log of this source: what comes next is gone, or somebody has sealed it who never led.
    pub(super) fn is_stranded(&self) -> bool {
        let end = self.handle.lock().as_ref().and_then(|handle| handle.status().end);
        matches!(end, Some(ShipEnd::Gap { .. }))
    }
}

impl Shipping {
    /// How `process` ships what it decides in `epoch`; nothing is shipped yet.
    pub(super) fn new(
        ground: &Arc<Ground>,
        host: usize,
        process: &Process,
        disk: &Disk,
        epoch: Epoch,
    ) -> Arc<Shipping> {
        Arc::new(Shipping {
            ground: Arc::clone(ground),
            host,
            gate: Arc::clone(&process.gate),
            volume: process.volume.clone(),
            log: process.log.shipped(),
            own: Arc::clone(&process.log),
            clock: Arc::clone(&process.clock),
            node: process.identity.node(),
            epoch,
            cursors: Arc::clone(&disk.cursors),
            lost: *disk.lost.lock(),
            archives: Mutex::default(),
        })
    }

    /// The archives that are shipped to.
    pub(super) fn archives(&self) -> Vec<Arc<Shipped>> {
        self.archives.lock().clone()
    }

    /// Begins to ship to an archive.
    pub(super) fn begin(self: &Arc<Self>, account: &Arc<Account>, tasks: &Tasks) {
        let (handle, error) = (Mutex::default(), Mutex::default());
        let shipped = Arc::new(Shipped { account: Arc::clone(account), handle, error });
        self.archives.lock().push(Arc::clone(&shipped));
        let task = tasks.run(Arc::clone(self).ship(shipped));
        if self.ground.stage.has(Canary::SilentShipper) {
            tasks.run(async move {
                tokio::time::sleep(Duration::from_secs(4)).await;
                task.abort();
            });
        }
    }

    /// The life of one shipper.
    async fn ship(self: Arc<Self>, shipped: Arc<Shipped>) {
        let account = &shipped.account;
        let archive = loop {
            match self.ground.archive(account, &self.gate).await {
                Ok(archive) => break archive,
                Err(error) => *shipped.error.lock() = Some(error),
            }
            tokio::time::sleep(OPEN_AGAIN).await;
        };
        *shipped.error.lock() = None;
        let known = self.cursors.lock().get(&account.name).copied();
        let cursor = DiskCursor { cursors: Arc::clone(&self.cursors), archive: account.name.clone() };
        let (shipper, handle) = Shipper::new(ShipperParts {
            archive: archive.clone(),
            log: Arc::clone(&self.log),
            packs: self.ground.layered(self.host, &self.gate),
            node: self.node,
            epoch: self.epoch,
            known,
            cursor: Arc::new(cursor),
            clock: Arc::clone(&self.clock) as Arc<dyn Clock>,
            lost: Some(Arc::new(KnownLosses::new(self.volume.clone(), self.lost))),
            limits: ShipLimits::default(),
        });
        *shipped.handle.lock() = Some(handle.clone());
        let end = tokio::select! {
            end = shipper.run() => end,
            never = self.take_first_snapshot(&archive, &handle) => match never {},
        };
        if matches!(end, ShipEnd::Stray { .. }) {
            self.ground.stage.count("archives with slots that nothing leads to");
        }
        self.ground.stage.note(format!("host {}: shipping to {} has ended: {end}", self.host, account.name));
    }

    /// Sees to it that an archive that began late has a snapshot to begin with.
    async fn take_first_snapshot(&self, archive: &Archive, shipped: &ShipHandle) -> Infallible {
        let mut is_missing = archive.descriptor().base.lsn > Lsn::ROOT;
        while is_missing {
            match bases(archive).await {
                Ok(found) if found.iter().any(Result::is_ok) => is_missing = false,
                Ok(_) => self.note_snapshot(archive, self.write_base_now(archive, shipped).await),
                Err(error) => self.note_snapshot(archive, Err(error.to_string())),
            }
            tokio::time::sleep(SNAPSHOT_LOOK).await;
        }
        futures::future::pending().await
    }

    fn note_snapshot(&self, archive: &Archive, written: Result<Position, String>) {
        let stage = &self.ground.stage;
        match written {
            Ok(position) => {
                stage.count("snapshots in archives");
                stage.note(format!("{}: a snapshot of lsn {}", archive.url(), position.lsn));
            }
            Err(error) => stage.note(format!("{}: no snapshot was taken: {error}", archive.url())),
        }
    }

    /// `murphy archive snapshot`: one of now in every archive that is shipped to.
    pub(super) async fn snapshot_all(self: Arc<Self>) {
        if let Err(errno) = self.volume.sync_all().wait().await {
            return self.ground.stage.note(format!("host {}: no snapshots: {errno:?}", self.host));
        }
        for shipped in self.archives() {
            let Some(handle) = shipped.handle.lock().clone() else { continue };
            let Ok(archive) = self.ground.archive(&shipped.account, &self.gate).await else { continue };
            let written = self.write_base_now(&archive, &handle).await;
            self.note_snapshot(&archive, written);
        }
    }

    /// `murphy archive add`: an archive that begins now, with a snapshot.
    pub(super) async fn add(self: &Arc<Self>, account: &Arc<Account>) -> Result<(), String> {
        let flush = || async {
            let flushed = self.volume.sync_all().wait().await;
            flushed.map_err(|errno| format!("not everything is durable: {errno:?}"))
        };
        // Without another one an fsync waits for this one.
        let others = !self.ground.archives_of(&self.volume)?.is_empty();
        if others || self.ground.level != Level::Archive {
            flush().await?;
        }
        let view = self.volume.view_with_state();
        let position = view.state().ok_or("the volume has no state yet")?.position;
        let descriptor = self.ground.descriptor(account, self.clock.wall(), position);
        let store = self.ground.archive_store(account, &self.gate);
        let archive = Archive::create(store, descriptor).await.map_err(|error| error.to_string())?;
        // One that was begun before and is added again goes on where it ended.
        if archive.descriptor().base == position {
            let written = self.write_base_of(&archive, view, Boundary::after(position)).await;
            self.note_snapshot(&archive, written.clone());
            written?;
        } else {
            check_continued_by(&archive, &self.log).await.map_err(|error| error.to_string())?;
        }
        let mut names: Vec<String> =
            self.ground.archives_of(&self.volume)?.iter().map(|known| known.name.clone()).collect();
        if !names.contains(&account.name) {
            names.push(account.name.clone());
        }
        let changed = self.volume.change_settings(vec![(ARCHIVES.to_owned(), Some(names.join(",")))]);
        changed.wait().await.map_err(|errno| format!("the setting cannot be changed: {errno:?}"))?;
        if others {
            return flush().await;
        }
        let durable = self.volume.durable_here().await;
        durable.map(drop).map_err(|errno| format!("the setting is not durable: {errno:?}"))
    }

    /// `murphy archive remove --assume-lost`: of an archive to which nothing is shipped any more.
    pub(super) async fn remove(&self, account: &Account) -> Result<(), String> {
        let known = self.ground.archives_of(&self.volume)?;
        let names = known.iter().map(|known| known.name.as_str()).filter(|name| *name != account.name);
        let names = names.collect::<Vec<_>>().join(",");
        let changed = self.volume.change_settings(vec![(ARCHIVES.to_owned(), Some(names))]);
        changed.wait().await.map_err(|errno| format!("the setting cannot be changed: {errno:?}"))?;
        let durable = self.volume.durable_here().await;
        durable.map_err(|errno| format!("the setting is not durable: {errno:?}"))?;
        self.archives.lock().retain(|one| one.account.name != account.name);
        Ok(())
    }

    /// Writes a snapshot of now, once the archive holds the log up to there.
    async fn write_base_now(&self, archive: &Archive, shipped: &ShipHandle) -> Result<Position, String> {
        let view = self.volume.view_with_state();
        let position = view.state().ok_or("the volume has no state yet")?.position;
        let archived = shipped.archived(position.lsn).await.map_err(|end| match end {
            Some(end) => end.to_string(),
            None => "the archive is not shipped to any more".to_owned(),
        })?;
        self.write_base_of(archive, view, archived).await
    }

    async fn write_base_of(
        &self,
        archive: &Archive,
        view: View,
        archived: Boundary,
    ) -> Result<Position, String> {
        let state = view.state().ok_or("the volume has no state yet")?;
        let durable = self.own.durable();
        durable.wait_for(state.position.lsn).await.map_err(|error| error.to_string())?;
        let url = archive.url();
        self.ground.stage.judge(|judge, _| judge.has_state(&format!("a snapshot for {url}"), &state));
        let base = NewBase {
            source: Arc::new(view),
            archived,
            as_of: entry_time(&*self.own, state.position.lsn).unwrap_or_else(|| self.clock.wall()),
            now: self.clock.wall(),
            node: self.node,
            packs: Some(self.ground.layered(self.host, &self.gate)),
        };
        let manifest = write_base(archive, base).await.map_err(|error| error.to_string())?;
        Ok(manifest.state.position)
    }

    /// Whether an archive has turned this node away, because another copy of it ships there.
    pub(super) fn is_forked(&self) -> bool {
        self.ends().any(|end| {
            matches!(
                end,
                ShipEnd::Forked { .. }
                    | ShipEnd::Ahead { .. }
                    | ShipEnd::Stray { .. }
                    | ShipEnd::BrokenSeal { .. }
            )
        })
    }

    /// Who has taken over, if an archive says that somebody has.
    pub(super) fn fenced(&self) -> Option<String> {
        self.ends().find_map(|end| match end {
            ShipEnd::Fenced(sealed) => Some(format!("fenced: epoch {}", sealed.next.number)),
            _ => None,
        })
    }

    fn ends(&self) -> impl Iterator<Item = ShipEnd> {
        let ended =
            |shipped: Arc<Shipped>| shipped.handle.lock().as_ref().and_then(|handle| handle.status().end);
        self.archives().into_iter().filter_map(ended)
    }
}

impl Ground {
    /// What an archive in `account` says of itself that begins after `base`.
    pub(super) fn descriptor(&self, account: &Account, created: LogTime, base: Position) -> Descriptor {
        Descriptor {
            lineage: self.lineage,
            name: "simulated".to_owned(),
            kind: ArchiveKind::Full,
            failure_domain: account.name.clone(),
            created,
            base,
        }
    }
}

/// When the durable entry `lsn` was decided; `None` if the log does not hold it.
fn entry_time(log: &dyn Log, lsn: Lsn) -> Option<LogTime> {
    let frame = log.read(lsn).ok()?.next()?.ok()?;
    let found = frame.iter().filter_map(Result::ok).find(|entry| entry.lsn == lsn)?;
    Some(found.time)
}

/// An archive that does not go on has to say so.
pub(super) async fn watch_shipping(shipping: Arc<Shipping>) {
    let stage = &shipping.ground.stage;
    let mut marks: Vec<(Duration, Lsn)> = Vec::new();
    // How often in a row each archive was behind, stood still and said nothing.
    let mut silent: Vec<(Lsn, u32)> = Vec::new();
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = stage.now();
        marks.push((now, shipping.own.durable().state().position.lsn));
        let old = marks.partition_point(|(at, _)| now.saturating_sub(*at) > UNREPORTED_MAX);
        let Some((_, goal)) = old.checked_sub(1).map(|last| marks[last]) else { continue };
        marks.drain(..old - 1);
        let archives = shipping.archives();
        silent.resize(archives.len(), (Lsn::default(), 0));
        for (one, (last, looks)) in archives.iter().zip(&mut silent) {
            let Some(handle) = one.handle.lock().clone() else { continue };
            let status = handle.status();
            let held = status.archived.map_or(Lsn::default(), |held| held.position.lsn);
            // Until the archive has been walked the status says that nothing is known of it.
            let is_unknown = status.archived.is_none();
            let says = is_unknown || status.error.is_some() || status.end.is_some() || status.lag_ms > 0;
            let stands = held < goal && held == *last && !says && one.error.lock().is_none();
            (*last, *looks) = (held, if stands { *looks + 1 } else { 0 });
            if *looks > SILENT_LOOKS_MAX {
                stage.violated(&format!(
                    "silent stall: {} holds lsn {held}, lsn {goal} has been durable for {UNREPORTED_MAX:?}, \
                     and its status says nothing of it",
                    one.account.name
                ));
            }
        }
    }
}

/// `--ack archive`.
pub(super) struct ByArchives(pub(super) Weak<Shipping>);

impl Acknowledger for ByArchives {
    fn acknowledged(&self, lsn: Lsn, deadline: Duration) -> Acknowledgement<'_> {
        Box::pin(async move {
            let mut waited = Duration::ZERO;
            loop {
                let archives = self.0.upgrade().map(|shipping| shipping.archives()).unwrap_or_default();
                let handles: Vec<_> = archives.iter().filter_map(|one| one.handle.lock().clone()).collect();
                if !handles.is_empty() {
                    let left = deadline.saturating_sub(waited);
                    return ArchiveAcknowledger::new(handles).acknowledged(lsn, left).await;
                }
                if waited >= deadline {
                    let missing = "no archive answers".to_owned();
                    return Err(AcknowledgeError::TooFew { lsn, held: 0, wanted: 1, missing });
                }
                tokio::time::sleep(OPEN_AGAIN).await;
                waited += OPEN_AGAIN;
            }
        })
    }
}

const OPEN_AGAIN: Duration = Duration::from_millis(500);
/// Whether an archive that began late has its snapshot is looked at so often.
const SNAPSHOT_LOOK: Duration = Duration::from_secs(30);
/// What says nothing at so many looks in a row says nothing.
const SILENT_LOOKS_MAX: u32 = 3;
/// What is behind for longer says so.
const UNREPORTED_MAX: Duration = Duration::from_secs(5);
