//! Restores against a shadow, and from damaged archives.

use jiff::tz::TimeZone;
use murphy_fs::{Fence, Index, MemoryIndex, ObjectBlockStore, PackNumber};
use murphy_log::{Epoch, EpochId, ManualClock, NodeId};
use object_store::{
    memory::InMemory,
    throttle::{ThrottleConfig, ThrottledStore},
};

use super::*;
use crate::{
    fence::ArchiveFence,
    layout,
    plan::plan_restore,
    take_over::{SILENCE, Successor, Watch, take_over_at},
    target::Target,
    testing::{Fault, FaultyStore, Source, append, archive, pack, put, scene, snapshot},
};

fn quiet() -> OnProgress {
    Arc::new(|_| {})
}

async fn restore(
    archives: &[Archive],
    target: Target,
) -> Result<(State, Arc<dyn IndexSnapshot>), RestoreError> {
    let plan = plan_restore(archives, target, &BTreeSet::new(), &TimeZone::UTC).await.unwrap();
    let index = Arc::new(MemoryIndex::new());
    let state = restore_tree(archives, &plan, Arc::clone(&index) as Arc<dyn Index>, quiet()).await?;
    Ok((state, index.snapshot()))
}

fn assert_rows(snapshot: &Arc<dyn IndexSnapshot>, source: &Source) {
    for (key, value) in source.rows() {
        assert_eq!(snapshot.get(key).unwrap().as_ref(), Some(value), "{key:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_restore_gives_back_every_row_of_the_moment() {
    let (store, archive, mut source) = scene().await;
    put(&store, &source.frames(5, 3)).await;
    snapshot(&archive, &source).await;
    put(&store, &source.frames(5, 3)).await;
    let middle = source.state();
    put(&store, &source.frames(5, 3)).await;
    let archives = [archive];
    let (state, tree) = restore(&archives, Target::Latest).await.unwrap();
    assert_eq!(state, source.state());
    assert_rows(&tree, &source);
    let (state, _) = restore(&archives, Target::Lsn(middle.position.lsn)).await.unwrap();
    assert_eq!(state, middle);
    let before = store.names().await;
    restore(&archives, Target::Latest).await.unwrap();
    assert_eq!(store.names().await, before, "a restore changes nothing");
}

/// Each object of each archive is lost or damaged in turn; the other archive, cut otherwise, has it.
#[tokio::test(start_paused = true)]
async fn the_first_archive_lies_and_the_next_one_serves_object_by_object() {
    let (one, two) = (FaultyStore::new(), FaultyStore::new());
    let archives = [archive(&one).await, archive(&two).await];
    let mut source = Source::new();
    let frames = source.frames(30, 3);
    for slot in frames.chunks(4) {
        put(&one, slot).await;
    }
    for slot in frames.chunks(7) {
        put(&two, slot).await;
    }
    let names: Vec<String> = one.names().await.into_iter().filter(|name| name.starts_with("log/")).collect();
    for name in &names {
        for fault in [Fault::WrongBytes, Fault::NoBytes, Fault::Lost, Fault::GetFails] {
            one.heal();
            one.fail(name, fault, usize::MAX);
            let (state, tree) = restore(&archives, Target::Latest).await.unwrap();
            assert_eq!(state, source.state(), "{name} {fault:?}");
            assert_rows(&tree, &source);
        }
    }
    one.heal();
    one.fail("", Fault::GetFails, usize::MAX);
    let (state, _) = restore(&archives, Target::Latest).await.unwrap();
    assert_eq!(state, source.state(), "a whole archive that does not answer");
    // Slots that go bad after the plan was made.
    one.heal();
    let plan = plan_restore(&archives, Target::Latest, &BTreeSet::new(), &TimeZone::UTC).await.unwrap();
    one.fail("log/", Fault::WrongBytes, usize::MAX);
    let state = restore_tree(&archives, &plan, Arc::new(MemoryIndex::new()), quiet()).await.unwrap();
    assert_eq!(state, source.state());
}

#[tokio::test(start_paused = true)]
async fn what_no_archive_has_is_named_and_nothing_is_passed_over() {
    let (store, archive, mut source) = scene().await;
    let frames = source.frames(9, 3);
    for slot in frames.chunks(3) {
        put(&store, slot).await;
    }
    let archives = [archive];
    let plan = plan_restore(&archives, Target::Latest, &BTreeSet::new(), &TimeZone::UTC).await.unwrap();
    let name = layout::slot(1, frames[3].first());
    for fault in [Fault::WrongBytes, Fault::Lost] {
        store.heal();
        store.fail(&name, fault, usize::MAX);
        let refused =
            restore_tree(&archives, &plan, Arc::new(MemoryIndex::new()), quiet()).await.unwrap_err();
        assert!(refused.to_string().contains(&name), "{refused}");
    }
    store.remove(&name).await;
    let short = plan_restore(&archives, Target::Latest, &BTreeSet::new(), &TimeZone::UTC).await.unwrap();
    assert_eq!(short.route.end, frames[2].position(), "what lies behind the hole cannot be reached");
}

#[tokio::test(start_paused = true)]
async fn a_damaged_snapshot_is_gone_around_with_an_older_one() {
    let (store, archive, mut source) = scene().await;
    put(&store, &source.frames(5, 3)).await;
    snapshot(&archive, &source).await;
    put(&store, &source.frames(5, 3)).await;
    snapshot(&archive, &source).await;
    put(&store, &source.frames(5, 3)).await;
    let archives = [archive];
    let mut excluded = BTreeSet::new();
    let newest = plan_restore(&archives, Target::Latest, &excluded, &TimeZone::UTC).await.unwrap();
    let part = newest.route.snapshot.as_ref().unwrap().1.parts[0].name.clone();
    store.fail(&part, Fault::WrongBytes, usize::MAX);
    let refused = restore_tree(&archives, &newest, Arc::new(MemoryIndex::new()), quiet()).await.unwrap_err();
    let RestoreError::Snapshot { folder, .. } = &refused else { panic!("{refused}") };
    assert!(refused.to_string().contains(&part), "{refused}");
    excluded.insert(folder.clone());
    let older = plan_restore(&archives, Target::Latest, &excluded, &TimeZone::UTC).await.unwrap();
    assert!(older.entries > newest.entries);
    let state = restore_tree(&archives, &older, Arc::new(MemoryIndex::new()), quiet()).await.unwrap();
    assert_eq!(state, source.state());
}

#[tokio::test(start_paused = true)]
async fn packs_come_from_the_first_archive_that_has_them_intact_and_a_copy_goes_on() {
    let (one, two) = (FaultyStore::new(), FaultyStore::new());
    let archives = [archive(&one).await, archive(&two).await];
    let mut source = Source::new();
    let packs: Vec<_> = (0..6).map(|number| pack(number, &vec![number as u8; 5000])).collect();
    let frames: Vec<_> = packs.iter().map(|(_, row)| source.frame_with_pack(row)).collect();
    put(&one, &frames).await;
    for (sealed, _) in &packs {
        for archive in &archives {
            archive.packs().put(sealed.name, sealed.bytes.clone()).await.unwrap();
        }
    }
    let (_, tree) = restore(&archives, Target::Latest).await.unwrap();
    let target: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
    target.put(packs[0].0.name, packs[0].0.bytes.clone()).await.unwrap();
    one.fail(&packs[1].0.name.object_path(), Fault::WrongBytes, usize::MAX);
    one.fail(&packs[2].0.name.object_path(), Fault::Lost, usize::MAX);
    let both = [&archives[0], &archives[1]].map(|archive| Arc::new(archive.packs()) as Arc<dyn BlockStore>);
    let report = restore_packs(&both[..1], &tree, Arc::clone(&target), quiet()).await.unwrap();
    assert_eq!((report.copied, report.present, report.missing), (3, 1, 2), "{report:?}");
    assert!(!report.is_complete() && report.examples.len() == 2);
    // Nobody has to look once more for what was not found.
    let mut lacking = report.uncalled;
    lacking.sort();
    assert_eq!(lacking, [1, 2].map(|at: usize| PackNumber(frames[at].last().get())));
    let report = restore_packs(&both, &tree, Arc::clone(&target), quiet()).await.unwrap();
    assert_eq!((report.copied, report.present, report.missing), (2, 4, 0), "{report:?}");
    assert!(report.uncalled.is_empty());
    for (sealed, _) in &packs {
        assert_eq!(target.get(sealed.name).await.unwrap(), sealed.bytes);
    }
}

/// The fear: a store that has been used before holds a rotten pack, it is counted as there, and the intact one of the archive is left behind.
#[tokio::test(start_paused = true)]
async fn a_rotten_pack_in_the_target_is_replaced_and_never_counts_as_there() {
    let (store, archive, mut source) = scene().await;
    let packs: Vec<_> = (0..4).map(|number| pack(number, &vec![number as u8; 5000])).collect();
    let frames: Vec<_> = packs.iter().map(|(_, row)| source.frame_with_pack(row)).collect();
    put(&store, &frames).await;
    let archives = [archive];
    let (_, tree) = restore(&archives, Target::Latest).await.unwrap();
    let target: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
    let rotten = |at: usize| {
        let mut bytes = packs[at].0.bytes.to_vec();
        bytes[at] ^= 0x40;
        bytes
    };
    for at in [1, 2] {
        target.put(packs[at].0.name, rotten(at).into()).await.unwrap();
    }
    target.put(packs[0].0.name, packs[0].0.bytes.clone()).await.unwrap();
    for at in [0, 1, 3] {
        archives[0].packs().put(packs[at].0.name, packs[at].0.bytes.clone()).await.unwrap();
    }
    let sources = [Arc::new(archives[0].packs()) as Arc<dyn BlockStore>];
    let report = restore_packs(&sources, &tree, Arc::clone(&target), quiet()).await.unwrap();
    let PackReport { present, copied, replaced, missing, .. } = report;
    assert_eq!((present, copied, replaced, missing), (1, 2, 1, 1), "{report:?}");
    assert!(report.examples[0].contains("cell 0") && report.examples[0].contains("in memory"), "{report:?}");
    for at in [0, 1, 3] {
        assert_eq!(target.get(packs[at].0.name).await.unwrap(), packs[at].0.bytes);
    }
    assert_eq!(target.get(packs[2].0.name).await.unwrap(), rotten(2), "it may be better than nothing");
}

/// The fear: a successor that reads its packs in the archives is begun, and nobody hears that some of them are in none.
#[tokio::test(start_paused = true)]
async fn packs_that_no_archive_shows_are_counted_without_copying_any() {
    let (one, two) = (FaultyStore::new(), FaultyStore::new());
    let archives = [archive(&one).await, archive(&two).await];
    let mut source = Source::new();
    let packs: Vec<_> = (0..4).map(|number| pack(number, &vec![number as u8; 5000])).collect();
    let frames: Vec<_> = packs.iter().map(|(_, row)| source.frame_with_pack(row)).collect();
    put(&one, &frames).await;
    for (archive, held) in archives.iter().zip([[0, 1], [1, 2]]) {
        for at in held {
            archive.packs().put(packs[at].0.name, packs[at].0.bytes.clone()).await.unwrap();
        }
    }
    let (_, tree) = restore(&archives, Target::Latest).await.unwrap();
    let sources = archives.each_ref().map(|archive| Arc::new(archive.packs()) as Arc<dyn BlockStore>);
    let soon = Duration::from_secs(600);
    let report = count_packs(&sources, &tree, soon, quiet()).await.unwrap();
    assert_eq!((report.present, report.copied, report.missing), (3, 0, 1), "{report:?}");
    assert!(report.examples[0].contains(&packs[3].0.name.to_string()), "{report:?}");
    assert_eq!(report.uncalled, [PackNumber(frames[3].last().get())]);
    two.fail("packs/", Fault::GetFails, usize::MAX);
    let report = count_packs(&sources, &tree, soon, quiet()).await.unwrap();
    assert_eq!((report.present, report.missing, report.unanswered), (2, 0, 2), "{report:?}");
    assert!(!report.is_complete() && !report.is_cut_short, "{report:?}");
    let hangs = ThrottleConfig { wait_get_per_call: soon, ..ThrottleConfig::default() };
    let hangs = Arc::new(ThrottledStore::new(InMemory::new(), hangs));
    let hangs = Arc::new(ObjectBlockStore::new(hangs, Default::default(), "hangs".to_owned()));
    let sources = [hangs as Arc<dyn BlockStore>];
    let report = count_packs(&sources, &tree, Duration::from_millis(20), quiet()).await.unwrap();
    assert!(report.is_cut_short && !report.is_complete() && report.missing == 0, "{report:?}");
}

fn is_send<T: Send>(future: T) -> T {
    future
}

/// The same over real files: ship, snapshot, ship on, seal, plan, restore, verify.
#[tokio::test(start_paused = true)]
async fn an_archive_in_a_directory_is_shipped_sealed_and_restored() {
    use crate::testing::TestClock;
    use murphy_log::{Log, MemoryLog};
    let folder = tempfile::tempdir().unwrap();
    let files =
        object_store::local::LocalFileSystem::new_with_prefix(folder.path()).unwrap().with_fsync(true);
    let store = crate::store::ArchiveStore::new(Arc::new(files), "archive".into(), "file:///archive");
    let archive = is_send(Archive::create(store, crate::testing::descriptor())).await.unwrap();
    let mut source = Source::new();
    let log = Arc::new(MemoryLog::new(source.base()));
    let clock = Arc::new(TestClock::new());
    log.claim(source.base().position.epoch).unwrap();
    let ship = async |known: Option<Boundary>| {
        let parts = crate::ship::ShipperParts {
            archive: archive.clone(),
            log: Arc::clone(&log) as Arc<dyn Log>,
            packs: Arc::new(ObjectBlockStore::in_memory()),
            node: NodeId::default(),
            epoch: log.tail().position.epoch,
            known,
            cursor: Arc::new(crate::ship::NoCursor),
            clock: Arc::clone(&clock) as Arc<dyn murphy_log::Clock>,
            limits: crate::ship::ShipLimits { slot_bytes: 3000, ..Default::default() },
            lost: None,
        };
        let (shipper, handle) = crate::ship::Shipper::new(parts);
        let end = is_send(shipper.run_to(log.tail().position.lsn)).await;
        assert_eq!(end, crate::ship::ShipEnd::Reached);
        handle.status().archived.unwrap()
    };
    append(&log, &source.frames(30, 3));
    let archived = ship(None).await;
    snapshot(&archive, &source).await;
    append(&log, &source.frames(30, 3));
    ship(Some(archived)).await;
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let fence = ArchiveFence::new(archive.clone(), NodeId::default(), Arc::clone(&clock) as Arc<_>, None);
    let held = fence.adopt().await.unwrap();
    let minutes = Arc::new(ManualClock::default());
    let watch = Watch::of([(&fence, &held)], Arc::clone(&minutes) as Arc<_>);
    minutes.advance(SILENCE);
    let silence = is_send(watch.until_silent(&|_| {})).await.unwrap();
    let successor = Successor { node: NodeId::default(), attempts: vec![next], given_up: BTreeSet::new() };
    let base = source.state().position;
    is_send(take_over_at(&[fence], (&successor, None), base, Some(&silence))).await.unwrap();
    let mut successor = source.taken_over(next);
    log.claim(next).unwrap();
    append(&log, &successor.frames(30, 3));
    ship(None).await;

    let archives = [archive.clone()];
    let none = BTreeSet::new();
    let plan = is_send(plan_restore(&archives, Target::Latest, &none, &TimeZone::UTC)).await.unwrap();
    assert!(plan.snapshot.is_some() && plan.problems.is_empty(), "{plan:?}");
    let index: Arc<dyn Index> = Arc::new(MemoryIndex::new());
    let state = is_send(restore_tree(&archives, &plan, Arc::clone(&index), quiet())).await.unwrap();
    assert_eq!(state, successor.state());
    assert_rows(&index.snapshot(), &successor);
    let report = is_send(crate::verify::verify(&archive, 100, 7)).await;
    assert_eq!((report.findings.as_slice(), report.seals), (&[][..], 1));
    let tree = index.snapshot();
    let target: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
    let packs = is_send(restore_packs(&[], &tree, target, quiet())).await.unwrap();
    assert!(packs.is_complete());
}
