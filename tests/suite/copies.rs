//! Copies judged by the reference model: a mirror at the same position, a dump that was loaded, a restore to a moment of the run.
//!
//! Invariants:
//! - Every copy is taken from a volume in the middle of a random program, with files open, unlinked and half written, and must be the
//!   reference as it was at that step: names, attributes, times, contents, extended attributes.
//! - A mirror follows over real QUIC; a dump and a restore go through the bytes that a file and an archive would hold.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use jiff::tz::TimeZone;
use murphy_backup::{
    Archive, ArchiveKind, ArchiveStore, Descriptor, Lineage, NoCursor, ShipEnd, ShipLimits, Shipper,
    ShipperParts, Target, plan_restore, restore_packs, restore_tree,
};
use murphy_fs::{
    BlockStore, FileSystem, Index, MemberRole, MemberRow, MemberState, MemoryIndex, ObjectBlockStore,
    SnapshotOrigin, SnapshotReader, Volume, VolumeOptions, VolumeParts, write_snapshot,
};
use murphy_log::{BranchId, Clock, Log, LogTime, Lsn, MemoryLog, NodeId, State, SystemClock};
use murphy_mirror::{
    Dialer, Durability, FollowSetup, Following, Identity, Listener, MemoryBook, MemoryReplica,
    MemorySnapshots, NetworkOptions, Part, Services, SourcePart, UdpSockets,
};
use murphy_tests::{
    Driver, Judge, PATIENCE, Random, Search, Subject, TreeImage, VOLUME, check_sound, epoch, judge_subjects,
    lead_new, new_log, search_subjects, volume_keys, volume_parts, wait_until,
};
use object_store::memory::InMemory;
use tokio::sync::watch;

const BRANCH: BranchId = BranchId::from_bytes([2; 16]);

/// A volume that runs programs, and what its copies are taken from.
struct Source {
    volume: Volume,
    log: Arc<MemoryLog>,
    blocks: Arc<dyn BlockStore>,
    clock: Arc<dyn Clock>,
    random: Random,
}

impl Source {
    fn new(clock: Arc<dyn Clock>) -> Source {
        let (log, blocks) = (new_log(), Arc::new(ObjectBlockStore::in_memory()));
        let options = VolumeOptions { generation_bytes: 4096, cached_rows: 64, ..VolumeOptions::default() };
        let parts = volume_parts(log.clone(), Arc::new(MemoryIndex::new()), blocks.clone(), clock.clone());
        let volume = lead_new(VolumeParts { options, ..parts });
        Source { volume, log, blocks, clock, random: Random::new(9) }
    }

    /// Whether to take a copy now: at one step of `every`.
    fn is_chosen(&mut self, every: u64) -> bool {
        self.random.below(every) == 0
    }

    /// Makes everything durable and says up to where.
    fn sync(&self, driver: &Driver) -> Result<State, String> {
        driver.wait(self.volume.sync_all()).map_err(|errno| format!("sync_all: {errno}"))?;
        Ok(self.log.durable().state())
    }

    /// The tree that stands in `index`, with bytes from `blocks`, as a volume that only shows it.
    fn shown(&self, index: Arc<dyn Index>, state: State, blocks: &Arc<dyn BlockStore>) -> Volume {
        let log = Arc::new(MemoryLog::new(state));
        Volume::open(volume_parts(log, index, Arc::clone(blocks), Arc::clone(&self.clock))).unwrap()
    }
}

/// Lets a volume go, whose threads take a moment to stop.
fn let_go(volume: Volume) {
    std::thread::spawn(move || drop(volume));
}

/// A volume and the dumps of it.
struct Dumped(Source);

impl Dumped {
    fn check(&self, judge: &Judge<'_>) -> Result<(), String> {
        let loaded = self.load(judge.driver)?;
        judge.compare("the loaded dump", &judge.expected()?, &loaded)?;
        check_sound(&loaded).map_err(|error| format!("the loaded dump: {error}"))?;
        let_go(loaded);
        Ok(())
    }

    /// The volume, dumped and loaded.
    fn load(&self, driver: &Driver) -> Result<Volume, String> {
        let source = &self.0;
        source.sync(driver)?;
        let (view, mut file) = (source.volume.view_with_state(), Vec::new());
        let origin = SnapshotOrigin { branch: BRANCH, created: source.clock.wall() };
        write_snapshot(&view, &volume_keys(), origin, &mut file, &|_| ())
            .map_err(|error| format!("the dump: {error}"))?;
        let index = Arc::new(MemoryIndex::new());
        let reader = SnapshotReader::open(&file[..]).map_err(|error| format!("the dump: {error}"))?;
        let state = reader.load_into(&*index, &|_| ()).map_err(|error| format!("the load: {error}"))?;
        Ok(source.shown(index, state, &source.blocks))
    }
}

impl Subject for Dumped {
    fn file_system(&self) -> Arc<dyn FileSystem> {
        Arc::new(self.0.volume.clone())
    }

    fn after_step(&mut self, _: usize, judge: &Judge<'_>) -> Result<(), String> {
        if self.0.is_chosen(40) { self.check(judge) } else { Ok(()) }
    }

    fn after_program(&mut self, judge: &Judge<'_>) -> Result<(), String> {
        self.check(judge)
    }
}

/// The fear: a dump of a volume in use says "done" and lacks what was open, unlinked, sparse or linked twice.
#[test]
fn a_loaded_dump_is_the_reference_at_any_step() {
    judge_subjects(|clock, _| Dumped(Source::new(clock)), 30);
}

/// The canary: a dump that was taken too early.
struct Late(Dumped, Option<Volume>);

impl Subject for Late {
    fn file_system(&self) -> Arc<dyn FileSystem> {
        self.0.file_system()
    }

    fn after_step(&mut self, step: usize, judge: &Judge<'_>) -> Result<(), String> {
        if step == 30 {
            self.1 = Some(self.0.load(judge.driver)?);
        }
        Ok(())
    }

    fn after_program(&mut self, judge: &Judge<'_>) -> Result<(), String> {
        self.1.as_ref().map_or(Ok(()), |early| judge.compare("the early dump", &judge.expected()?, early))
    }
}

/// A judge of copies that finds nothing in a copy that misses the end of the program finds nothing at all.
#[test]
fn a_copy_that_is_too_old_is_found() {
    let quick = Search { shrinks_max: 0, ..Search::of(5) };
    let found = search_subjects(quick, |clock, _| Late(Dumped(Source::new(clock)), None));
    assert!(found.is_err_and(|found| found.what.contains("the early dump")));
}

/// A volume and its mirror.
struct Mirrored {
    source: Source,
    mirror: Volume,
    stop: watch::Sender<bool>,
}

impl Mirrored {
    fn new(clock: Arc<dyn Clock>) -> Mirrored {
        let source = Source::new(Arc::clone(&clock));
        let (identity, joiner) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let book = Arc::new(MemoryBook::default());
        let joined = MemberState::Joined { public_key: *joiner.public_key().as_bytes() };
        let row = MemberRow {
            role: MemberRole::Mirror,
            state: joined,
            name: "m".to_owned(),
            addresses: Vec::new(),
        };
        book.put(joiner.node(), row);
        let services =
            Services::new(volume_keys(), BRANCH, identity.node(), Arc::new(SystemClock::new()), book);
        let snapshots = Arc::new(MemorySnapshots { log: source.log.clone(), bytes: 1000 });
        let part = SourcePart {
            log: source.log.clone(),
            epoch: epoch(1),
            snapshots,
            heartbeat: Duration::from_millis(100),
        };
        services.become_part(Part::Source(part));
        let (options, local) = (NetworkOptions::default(), SocketAddr::from(([127, 0, 0, 1], 0)));
        let listener = Listener::bind(&identity, &UdpSockets, local, &options, Arc::new(services)).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(listener.run(stopped.clone()));
        let replica =
            Arc::new(MemoryReplica::new(volume_keys(), Some(State::origin(epoch(1))), Durability::Immediate));
        let (following, _) = Following::new(FollowSetup {
            addresses: vec![address.to_string()],
            source_key: identity.public_key(),
            branch: BRANCH,
            replica: replica.clone(),
            dialer: Dialer { identity: Arc::new(joiner), sockets: Arc::new(UdpSockets), options },
            clock: Arc::new(SystemClock::new()),
            random: Arc::new(|| 7),
            silence: Duration::from_secs(10),
            heard: Lsn::new(0),
        });
        tokio::spawn(following.run(stopped));
        let (log, index) = (replica.log().unwrap(), Arc::new(MemoryIndex::new()));
        let options = VolumeOptions { generation_bytes: 4096, ..VolumeOptions::default() };
        let parts = volume_parts(log, index, source.blocks.clone(), clock);
        let state = State::origin(epoch(1));
        let mirror = Volume::open(VolumeParts { state, options, ..parts }).unwrap();
        mirror.follow().unwrap();
        Mirrored { source, mirror, stop }
    }

    fn check(&self, judge: &Judge<'_>) -> Result<(), String> {
        let state = self.source.sync(judge.driver)?;
        // A purge may go on at the source; what matters is that the mirror has come as far.
        wait_until("the mirror to come as far", PATIENCE, || {
            self.mirror.state().position.lsn >= state.position.lsn
        });
        judge.compare("the mirror", &judge.expected()?, &self.mirror)?;
        let shown = self.mirror.state();
        if shown.position == state.position && shown != state {
            return Err(format!("the mirror is at {shown:?}, the source at {state:?}"));
        }
        Ok(())
    }
}

impl Subject for Mirrored {
    fn file_system(&self) -> Arc<dyn FileSystem> {
        Arc::new(self.source.volume.clone())
    }

    fn after_step(&mut self, _: usize, judge: &Judge<'_>) -> Result<(), String> {
        if self.source.is_chosen(25) { self.check(judge) } else { Ok(()) }
    }

    fn after_program(&mut self, judge: &Judge<'_>) -> Result<(), String> {
        self.check(judge)?;
        check_sound(&self.mirror).map_err(|error| format!("the mirror: {error}"))
    }
}

impl Drop for Mirrored {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// The fear: a mirror diverges, in one attribute of one file, and nobody looks until it has been promoted.
#[test]
fn a_mirror_at_the_same_position_is_the_reference() {
    judge_subjects(|clock, _| Mirrored::new(clock), 20);
}

/// A volume, and what it was at some steps of its program.
struct Archived {
    source: Source,
    moments: Vec<(State, LogTime, TreeImage)>,
}

impl Archived {
    fn remember(&mut self, judge: &Judge<'_>) -> Result<(), String> {
        let state = self.source.sync(judge.driver)?;
        self.moments.push((state, self.source.clock.wall(), judge.expected()?));
        Ok(())
    }

    /// An archive of everything so far, shipped in small slots.
    async fn ship(&self) -> Result<Archive, String> {
        let store = ArchiveStore::new(
            Arc::new(InMemory::new()),
            object_store::path::Path::default(),
            "test://archive",
        );
        let descriptor = Descriptor {
            lineage: Lineage { volume: VOLUME, branch: BRANCH },
            name: "judged".to_owned(),
            kind: ArchiveKind::Full,
            failure_domain: "elsewhere".to_owned(),
            created: LogTime::default(),
            base: State::origin(epoch(1)).position,
        };
        let archive = Archive::create(store, descriptor).await.map_err(|error| error.to_string())?;
        let (shipper, _) = Shipper::new(ShipperParts {
            archive: archive.clone(),
            log: self.source.log.clone(),
            packs: Arc::clone(&self.source.blocks),
            node: NodeId::default(),
            epoch: epoch(1),
            known: None,
            cursor: Arc::new(NoCursor),
            clock: Arc::new(SystemClock::new()),
            lost: None,
            limits: ShipLimits { slot_bytes: 2000, slot_age: Duration::from_millis(1), in_flight: 2 },
        });
        let last = self.source.log.durable().state().position.lsn;
        match shipper.run_to(last).await {
            ShipEnd::Reached => Ok(archive),
            end => Err(format!("shipping ends: {end}")),
        }
    }

    /// The restored tree and its bytes, from the archive alone.
    async fn restore(&self, archive: &Archive, target: Target) -> Result<Volume, String> {
        let archives = [archive.clone()];
        let plan = plan_restore(&archives, target, &BTreeSet::new(), &TimeZone::UTC).await;
        let plan = plan.map_err(|error| format!("{target:?}: {error}"))?;
        let index: Arc<dyn Index> = Arc::new(MemoryIndex::new());
        let state = restore_tree(&archives, &plan, Arc::clone(&index), Arc::new(|_| ())).await;
        let state = state.map_err(|error| format!("{target:?}: {error}"))?;
        let blocks: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
        let sources: [Arc<dyn BlockStore>; 1] = [Arc::new(archive.packs())];
        let packs = restore_packs(&sources, &index.snapshot(), Arc::clone(&blocks), Arc::new(|_| ())).await;
        let packs = packs.map_err(|error| format!("{target:?}: {error}"))?;
        if !packs.is_complete() {
            return Err(format!("{target:?}: packs are missing: {packs:?}"));
        }
        Ok(self.source.shown(index, state, &blocks))
    }
}

impl Subject for Archived {
    fn file_system(&self) -> Arc<dyn FileSystem> {
        Arc::new(self.source.volume.clone())
    }

    fn after_step(&mut self, _: usize, judge: &Judge<'_>) -> Result<(), String> {
        if self.source.is_chosen(25) { self.remember(judge) } else { Ok(()) }
    }

    fn after_program(&mut self, judge: &Judge<'_>) -> Result<(), String> {
        self.remember(judge)?;
        let handle = judge.driver.handle();
        let archive = handle.block_on(self.ship())?;
        let last = self.moments.len() - 1;
        let chosen: BTreeSet<usize> = [0, last, self.source.random.index(last + 1)].into();
        let end = self.moments[last].0.position;
        for (state, time, expected) in chosen.into_iter().map(|moment| &self.moments[moment]) {
            // After the last entry nothing is known of any moment, which a restore says.
            let moment = (state.position != end).then_some(Target::At(*time));
            for target in [Target::Lsn(state.position.lsn)].into_iter().chain(moment) {
                let restored = handle.block_on(self.restore(&archive, target))?;
                if matches!(target, Target::Lsn(_)) && restored.state() != *state {
                    return Err(format!("restored to {:?}, not to {state:?}", restored.state()));
                }
                judge.compare(&format!("the restore to {target:?}"), expected, &restored)?;
                check_sound(&restored).map_err(|error| format!("the restored tree: {error}"))?;
                let_go(restored);
            }
        }
        Ok(())
    }
}

/// The fear: a restore that ends without an error, at the wrong moment or without the bytes of that moment.
#[test]
fn a_restore_is_the_reference_as_it_was_then() {
    judge_subjects(|clock, _| Archived { source: Source::new(clock), moments: Vec::new() }, 20);
}
