//! Shipping against stores that fail, lag and lie.

mod packs;
mod seals;

use std::sync::Arc;

use murphy_fs::{AcknowledgeError, Acknowledger, Fence, ObjectBlockStore, PackRow, PackState, SealedPack};
use murphy_log::{EpochId, MemoryLog, Position, State};

use super::*;
use crate::{
    acknowledge::ArchiveAcknowledger,
    descriptor::ArchiveKind,
    fence::ArchiveFence,
    layout,
    registry::Record,
    slot::{SLOT_BYTES_MAX, Slot},
    testing::{self, Fault, FaultyStore, Source, TestClock, append, archive, archive_of, put, scene},
};

/// More than anything here takes.
const LONG: Duration = Duration::from_secs(60);

fn parts(archive: &Archive, source: &Source, log: &Arc<MemoryLog>) -> ShipperParts {
    ShipperParts {
        archive: archive.clone(),
        log: Arc::clone(log) as Arc<dyn Log>,
        packs: Arc::new(ObjectBlockStore::in_memory()),
        node: NodeId::from_bytes([7; 16]),
        epoch: source.base().position.epoch,
        known: None,
        cursor: Arc::new(NoCursor),
        clock: Arc::new(TestClock::new()),
        limits: ShipLimits { slot_bytes: 2000, slot_age: Duration::from_millis(20), in_flight: 4 },
        lost: None,
    }
}

/// A source, its log, and an archive that nothing was shipped to.
struct Scene {
    store: FaultyStore,
    archive: Archive,
    source: Source,
    log: Arc<MemoryLog>,
}

impl Scene {
    async fn new() -> Scene {
        let (store, archive, source) = scene().await;
        let log = claimed_log(source.base());
        Scene { store, archive, source, log }
    }
}

fn claimed_log(base: State) -> Arc<MemoryLog> {
    let log = MemoryLog::new(base);
    log.claim(base.position.epoch).unwrap();
    Arc::new(log)
}

/// Everything that the slots of `archive` hold, read as a restore would.
async fn held(archive: &Archive) -> Vec<Frame> {
    let walked = walk(archive, None).await.unwrap();
    let (mut previous, mut frames) = (walked.start.position, Vec::new());
    for slot in walked.slots {
        let bytes =
            archive.store().get(&layout::slot(slot.epoch.number, slot.first), SLOT_BYTES_MAX).await.unwrap();
        let slot = Slot::decode(&bytes).unwrap().verify(archive.keys(), &previous).unwrap();
        previous = slot.last().unwrap().position();
        frames.extend(slot);
    }
    frames
}

async fn ship_all(parts: ShipperParts) -> ShipEnd {
    let last = parts.log.tail().position.lsn;
    Shipper::new(parts).0.run_to(last).await
}

fn assert_same(held: &[Frame], shipped: &[Frame]) {
    assert_eq!(held.len(), shipped.len());
    assert!(held.iter().zip(shipped).all(|(held, shipped)| held.bytes() == shipped.bytes()));
}

fn pack(number: u64) -> (SealedPack, PackRow) {
    testing::pack(number, format!("the bytes of pack {number}").as_bytes())
}

#[tokio::test(start_paused = true)]
async fn what_is_durable_is_archived_and_read_back() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let (shipper, handle) = Shipper::new(parts(&archive, &source, &log));
    let running = tokio::spawn(shipper.run());
    let mut all = Vec::new();
    for _ in 0..10 {
        let frames = source.frames(10, 3);
        append(&log, &frames);
        all.extend(frames);
        let last = all.last().unwrap().last();
        assert!(handle.archived(last).await.unwrap().position.lsn >= last);
    }
    assert_same(&held(&archive).await, &all);
    let status = handle.status();
    assert_eq!((status.error, status.end, status.as_of), (None, None, Some(source.now())));
    running.abort();
}

/// Every way in which a store was seen to answer a put: nothing is lost, doubled or reordered.
#[tokio::test(start_paused = true)]
async fn a_store_that_lies_about_puts_loses_nothing() {
    let Scene { store, archive, mut source, log } = Scene::new().await;
    let frames = source.frames(120, 3);
    append(&log, &frames);
    for fault in
        [Fault::PutAnswersError, Fault::PutFails, Fault::PutConflict, Fault::PutLands, Fault::GetFails]
    {
        store.fail("log/", fault, 3);
    }
    assert_eq!(ship_all(parts(&archive, &source, &log)).await, ShipEnd::Reached);
    store.heal();
    store.land().await;
    assert_same(&held(&archive).await, &frames);
}

#[tokio::test(start_paused = true)]
async fn a_shipper_that_starts_again_goes_on_where_the_archive_ends() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let mut all = Vec::new();
    for round in 0..4 {
        let frames = source.frames(7, 3);
        append(&log, &frames);
        all.extend(frames);
        let mut parts = parts(&archive, &source, &log);
        parts.limits.slot_bytes = 500 * (round + 1);
        assert_eq!(ship_all(parts).await, ShipEnd::Reached);
    }
    assert_same(&held(&archive).await, &all);
}

/// The process died with two slots under way, of which only the second arrived; its successor cuts otherwise.
#[tokio::test(start_paused = true)]
async fn slots_that_an_earlier_process_left_behind_are_adopted_or_passed_over() {
    let Scene { store, archive, mut source, log } = Scene::new().await;
    let frames = source.frames(40, 3);
    append(&log, &frames);
    put(&store, &frames[10..25]).await;
    put(&store, &frames[17..31]).await;
    assert_eq!(ship_all(parts(&archive, &source, &log)).await, ShipEnd::Reached);
    assert_same(&held(&archive).await, &frames);
}

#[tokio::test(start_paused = true)]
async fn a_second_source_on_one_archive_is_refused() {
    let Scene { store, archive, mut source, log } = Scene::new().await;
    append(&log, &source.frames(5, 3));
    assert_eq!(ship_all(parts(&archive, &source, &log)).await, ShipEnd::Reached);
    // A copy of the directory from before, running as well: same branch, same epoch, other entries.
    let mut copy = Source::new();
    copy.wait(5);
    let other = claimed_log(copy.base());
    append(&other, &copy.frames(9, 3));
    let before = store.names().await;
    let end = ship_all(parts(&archive, &copy, &other)).await;
    assert!(matches!(end, ShipEnd::Forked { .. }), "{end}");
    assert_eq!(store.names().await, before, "the second source wrote nothing");
}

/// Both run at once: whoever comes second to a name stops.
#[tokio::test(start_paused = true)]
async fn two_sources_that_race_do_not_both_win() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let (mut one, mut two) = (Source::new(), Source::new());
    two.wait(5);
    let logs = [claimed_log(one.base()), claimed_log(two.base())];
    append(&logs[0], &one.frames(30, 3));
    append(&logs[1], &two.frames(30, 3));
    let (a, b) =
        tokio::join!(ship_all(parts(&archive, &one, &logs[0])), ship_all(parts(&archive, &two, &logs[1])));
    let winners = [&a, &b].iter().filter(|end| ***end == ShipEnd::Reached).count();
    assert_eq!(winners, 1, "{a}, {b}");
    assert!(matches!(a, ShipEnd::Forked { .. }) || matches!(b, ShipEnd::Forked { .. }));
    assert_eq!(held(&archive).await.len(), 30);
}

/// A copied directory, both running, each first at one of two archives: each would acknowledge what the other does not know.
#[tokio::test(start_paused = true)]
async fn an_archive_with_another_history_ends_acknowledging_through_the_others() {
    let stores = [FaultyStore::new(), FaultyStore::new()];
    let (mut one, mut two) = (Source::new(), Source::new());
    two.wait(5);
    let logs = [claimed_log(one.base()), claimed_log(two.base())];
    append(&logs[0], &one.frames(5, 3));
    append(&logs[1], &two.frames(5, 3));
    let archives = [archive(&stores[0]).await, archive(&stores[1]).await];
    assert_eq!(ship_all(parts(&archives[1], &two, &logs[1])).await, ShipEnd::Reached);
    let mut handles = Vec::new();
    for archive in &archives {
        let (shipper, handle) = Shipper::new(parts(archive, &one, &logs[0]));
        tokio::spawn(shipper.run());
        handles.push(handle);
    }
    let lsn = one.state().position.lsn;
    handles[0].archived(lsn).await.unwrap();
    let forked = handles[1].archived(lsn).await;
    assert!(matches!(forked, Err(Some(ShipEnd::Forked { .. }))), "{forked:?}");
    let refused = ArchiveAcknowledger::new(handles).acknowledged(lsn, Duration::from_secs(5)).await;
    let Err(AcknowledgeError::Fenced(why)) = refused else { panic!("{refused:?}") };
    assert!(why.contains("another source ships to it"), "{why}");
}

/// The fear: a copy of the node's directory runs as well; each is first at one of two archives, is acknowledged there at once, and learns
/// of the other afterwards.
#[tokio::test(start_paused = true)]
async fn of_two_copies_that_are_each_first_at_one_archive_none_is_acknowledged() {
    let stores = [FaultyStore::new(), FaultyStore::new()];
    let views = [stores.clone(), [stores[0].seen_by_another(), stores[1].seen_by_another()]];
    for store in &stores {
        archive(store).await;
    }
    let mut common = Source::new();
    let frames = common.frames(5, 3);
    let (shared, mut opened) = (common.state().position.lsn, Vec::new());
    // Both look before either goes on: whoever came later would see that the archive is ahead of it.
    for (copy, view) in views.iter().enumerate() {
        let mut source = common.taken_over(common.base().position.epoch);
        source.wait(5 * copy as u64);
        let log = claimed_log(common.base());
        append(&log, &frames);
        let mut handles = Vec::new();
        for store in view {
            let archive = Archive::open(store.archive_store()).await.unwrap();
            let (shipper, handle) = Shipper::new(parts(&archive, &common, &log));
            tokio::spawn(shipper.run());
            // What both have is no proof of which of them it is.
            handle.archived(shared).await.unwrap();
            handles.push(handle);
        }
        opened.push((source, log, handles));
    }
    let mut copies = Vec::new();
    for (copy, (mut source, log, handles)) in opened.into_iter().enumerate() {
        views[copy][1 - copy].fail("log/", Fault::PutFails, usize::MAX);
        ArchiveAcknowledger::new(handles.clone()).acknowledged(shared, LONG).await.unwrap();
        append(&log, &source.frames(5, 3));
        copies.push((handles, source.state().position.lsn));
    }
    assert_none_is_acknowledged(&views, copies).await;
}

/// Each of two copies is first at one archive, and learns of the other there only afterwards.
async fn assert_none_is_acknowledged(views: &[[FaultyStore; 2]; 2], copies: Vec<(Vec<ShipHandle>, Lsn)>) {
    for (copy, (handles, lsn)) in copies.iter().enumerate() {
        handles[copy].archived(*lsn).await.unwrap();
    }
    views.iter().flatten().for_each(FaultyStore::heal);
    for (copy, (handles, lsn)) in copies.into_iter().enumerate() {
        let refused = ArchiveAcknowledger::new(handles).acknowledged(lsn, LONG).await;
        assert!(matches!(refused, Err(AcknowledgeError::Fenced(_))), "copy {copy}: {refused:?}");
    }
}

/// The same where each copy has written, and waits for an acknowledgement, before any archive could be opened.
#[tokio::test(start_paused = true)]
async fn what_was_written_before_an_archive_was_open_is_not_acknowledged_by_two_copies() {
    let stores = [FaultyStore::new(), FaultyStore::new()];
    let views = [stores.clone(), [stores[0].seen_by_another(), stores[1].seen_by_another()]];
    let mut common = Source::new();
    let frames = common.frames(5, 3);
    let (shared, log) = (common.state().position.lsn, claimed_log(common.base()));
    append(&log, &frames);
    for store in &stores {
        assert_eq!(ship_all(parts(&archive(store).await, &common, &log)).await, ShipEnd::Reached);
    }
    let mut copies = Vec::new();
    for (copy, view) in views.iter().enumerate() {
        let mut source = common.taken_over(common.base().position.epoch);
        source.wait(5 * copy as u64);
        let log = claimed_log(common.base());
        append(&log, &frames);
        append(&log, &source.frames(5, 3));
        view[1 - copy].fail("log/", Fault::PutFails, usize::MAX);
        let mut handles = Vec::new();
        for store in view {
            let opened = Archive::open(store.archive_store()).await.unwrap();
            let (shipper, handle) = Shipper::new(parts(&opened, &common, &log));
            tokio::spawn(shipper.run());
            handles.push(handle.for_entries_behind(shared));
        }
        copies.push((handles, source.state().position.lsn));
    }
    assert_none_is_acknowledged(&views, copies).await;
}

/// One archive is enough while another takes nothing; it costs the first acknowledgement a while and no more.
#[tokio::test(start_paused = true)]
async fn an_archive_that_takes_nothing_does_not_keep_the_other_from_acknowledging() {
    let stores = [FaultyStore::new(), FaultyStore::new()];
    let mut source = Source::new();
    let log = claimed_log(source.base());
    let mut handles = Vec::new();
    for store in &stores {
        let (shipper, handle) = Shipper::new(parts(&archive(store).await, &source, &log));
        tokio::spawn(shipper.run());
        handles.push(handle);
    }
    stores[1].fail("log/", Fault::PutFails, usize::MAX);
    append(&log, &source.frames(5, 3));
    let acknowledger = ArchiveAcknowledger::new(handles.clone());
    // Half of the time is for the one that takes nothing.
    acknowledger.acknowledged(source.state().position.lsn, Duration::from_secs(1)).await.unwrap();
    assert!(!handles[1].is_awaited() && handles[1].status().archived.unwrap().position.lsn == Lsn::ROOT);
    append(&log, &source.frames(5, 3));
    acknowledger.acknowledged(source.state().position.lsn, LONG).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_fenced_source_learns_who_sealed_and_acknowledges_nothing_more() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    append(&log, &source.frames(5, 3));
    let (shipper, handle) = Shipper::new(parts(&archive, &source, &log));
    let running = tokio::spawn(shipper.run());
    let end = handle.archived(source.state().position.lsn).await.unwrap();
    let (promoter, next) =
        (NodeId::from_bytes([9; 16]), Epoch { number: 2, id: EpochId::from_bytes([9; 16]) });
    let clock = Arc::new(TestClock::new());
    ArchiveFence::new(archive.clone(), promoter, clock, None).seal(end.position, next).await.unwrap();
    append(&log, &source.frames(5, 3));
    let ended = running.await.unwrap();
    assert!(
        matches!(&ended, ShipEnd::Fenced(sealed) if sealed.by == promoter && sealed.next == next),
        "{ended}"
    );
    let acknowledger = ArchiveAcknowledger::new(vec![handle]);
    let refused = acknowledger.acknowledged(source.state().position.lsn, Duration::from_secs(5)).await;
    assert!(matches!(refused, Err(AcknowledgeError::Fenced(_))), "{refused:?}");
    let again = ship_all(parts(&archive, &source, &log)).await;
    assert!(matches!(again, ShipEnd::Fenced(_)), "{again}");
}

#[tokio::test(start_paused = true)]
async fn the_successor_ships_its_epoch_and_seals_where_nobody_did() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let mut all = source.frames(5, 3);
    append(&log, &all);
    let epoch = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let mut next = source.taken_over(epoch);
    log.claim(epoch).unwrap();
    let frames = next.frames(5, 3);
    append(&log, &frames);
    all.extend(frames);
    let parts = ShipperParts { epoch, ..parts(&archive, &source, &log) };
    assert_eq!(ship_all(parts).await, ShipEnd::Reached);
    assert_same(&held(&archive).await, &all);
    let walked = walk(&archive, None).await.unwrap();
    assert_eq!(walked.seals.len(), 1);
    assert_eq!(walked.end, Boundary::after(next.state().position));
}

/// The node lost its disk's last minute, the archive has it: going on would fork the history.
#[tokio::test(start_paused = true)]
async fn an_archive_that_is_ahead_of_the_log_stops_the_source() {
    let (store, archive, mut source) = scene().await;
    let frames = source.frames(10, 3);
    put(&store, &frames).await;
    let log = claimed_log(source.base());
    append(&log, &frames[..4]);
    let end = ship_all(parts(&archive, &source, &log)).await;
    assert!(matches!(end, ShipEnd::Ahead { held, .. } if held.position == source.state().position), "{end}");
}

#[tokio::test(start_paused = true)]
async fn a_log_that_was_trimmed_too_far_is_said_at_once() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    append(&log, &source.frames(10, 3));
    log.trim(Lsn::new(15)).unwrap();
    let end = ship_all(parts(&archive, &source, &log)).await;
    assert!(matches!(&end, ShipEnd::Gap { lsn, .. } if *lsn == Lsn::FIRST), "{end}");
}

#[tokio::test(start_paused = true)]
async fn a_stale_writer_that_wakes_after_its_slot_was_expired_is_refused() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    append(&log, &source.frames(10, 3));
    let mut registry = Registry::new(archive.clone());
    let shipper = Shipper::new(parts(&archive, &source, &log)).0;
    let job = core::Job {
        id: 0,
        at: Boundary::after(source.base().position),
        work: core::Work::Ship(source.frames(1, 1)),
    };
    let floor = Record::Floor { epoch: 1, first: 20 };
    registry.append(NodeId::default(), LogTime::default(), floor).await.unwrap();
    let outcome = shipper.task.run(&job).await;
    assert!(matches!(outcome, Outcome::Ended(ShipEnd::Gap { .. })), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn an_acknowledgement_that_does_not_come_names_the_archive_and_its_error() {
    let Scene { store, archive, mut source, log } = Scene::new().await;
    store.fail("log/", Fault::PutFails, usize::MAX);
    append(&log, &source.frames(1, 1));
    let (shipper, handle) = Shipper::new(parts(&archive, &source, &log));
    let running = tokio::spawn(shipper.run());
    let acknowledger = ArchiveAcknowledger::new(vec![handle.clone()]);
    let refused =
        acknowledger.acknowledged(Lsn::FIRST, Duration::from_millis(400)).await.unwrap_err().to_string();
    assert!(refused.contains("test://store") && refused.contains("connection reset"), "{refused}");
    assert!(handle.status().lag_ms > 0);
    store.heal();
    acknowledger.acknowledged(Lsn::FIRST, Duration::from_secs(60)).await.unwrap();
    running.abort();
}

/// A tick every 20 s is all that an idle source writes: the lag is that of the last tick, and 0 when it has arrived.
#[tokio::test(start_paused = true)]
async fn the_lag_is_true_on_an_idle_source() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let (shipper, handle) = Shipper::new(parts(&archive, &source, &log));
    let running = tokio::spawn(shipper.run());
    append(&log, &source.frames(1, 1));
    handle.archived(Lsn::FIRST).await.unwrap();
    let mut watching = handle.clone();
    while handle.status().lag_ms != 0 {
        watching.changed().await;
    }
    let tick: Position = source.state().position;
    assert_eq!(handle.status().archived, Some(Boundary::after(tick)));
    running.abort();
}
