//! Plans against archives in every state.

use std::sync::Arc;

use murphy_log::{Epoch, EpochId, Frame, ManualClock, NodeId};

use super::*;
use crate::{
    fence::ArchiveFence,
    layout,
    registry::{Record, Registry},
    testing::{Fault, FaultyStore, Source, archive, put, scene, snapshot},
};

async fn plan(archives: &[Archive], target: Target) -> Result<RestorePlan, PlanError> {
    plan_restore(archives, target, &BTreeSet::new(), &TimeZone::UTC).await
}

fn time_of(frame: &Frame) -> LogTime {
    crate::slot::end_time(frame)
}

#[tokio::test]
async fn every_target_leads_to_the_last_frame_end_that_is_not_after_it() {
    let (store, archive, mut source) = scene().await;
    let frames = source.frames(12, 3);
    for slot in frames.chunks(4) {
        put(&store, slot).await;
    }
    let archives = [archive];
    for (at, frame) in frames.iter().enumerate() {
        let plan_at = |target| plan(&archives, target);
        let exact = plan_at(Target::Lsn(frame.last())).await.unwrap();
        assert_eq!(exact.route.end, frame.position());
        let inside = plan_at(Target::Lsn(frame.first())).await.unwrap();
        let before = if at == 0 { source.base().position } else { frames[at - 1].position() };
        assert_eq!(inside.route.end, before, "the middle of a frame is no place to stop");
        let timed = plan_at(Target::At(time_of(frame))).await.unwrap();
        assert_eq!(timed.route.end, frame.position());
        let steps: u64 = timed.slots.iter().map(|slot| slot.entries).sum();
        assert_eq!((steps, timed.entries), (frame.last().since(Lsn::ROOT), frame.last().since(Lsn::ROOT)));
    }
    assert_eq!(plan(&archives, Target::Latest).await.unwrap().route.end, source.state().position);
}

#[tokio::test]
async fn a_target_in_an_idle_second_works() {
    let (store, archive, mut source) = scene().await;
    let before = source.frames(2, 2);
    put(&store, &before).await;
    source.wait(3_600_000_000_000);
    let after = source.frames(1, 1);
    put(&store, &after).await;
    let idle = LogTime::from_nanos(time_of(&before[1]).as_nanos() + 1_800_000_000_000);
    let planned = plan(&[archive], Target::At(idle)).await.unwrap();
    assert_eq!(planned.route.end, before[1].position());
}

#[tokio::test]
async fn a_target_outside_the_window_is_an_error_that_names_it() {
    let (store, archive, mut source) = scene().await;
    let frames = source.frames(2, 2);
    put(&store, &frames).await;
    let archives = [archive];
    let late = LogTime::from_nanos(time_of(&frames[1]).as_nanos() + 1);
    let beyond = plan(&archives, Target::At(late)).await.unwrap_err();
    assert!(
        matches!(beyond, PlanError::TimeBeyond { .. }) && beyond.to_string().contains("(lsn 5)"),
        "{beyond}"
    );
    let early = plan(&archives, Target::At(LogTime::from_nanos(5))).await.unwrap_err();
    assert!(
        matches!(early, PlanError::TimeBefore { .. }) && early.to_string().contains("(lsn 2)"),
        "{early}"
    );
    let beyond = plan(&archives, Target::Lsn(Lsn::new(6))).await.unwrap_err();
    assert!(matches!(beyond, PlanError::LsnBeyond { .. }), "{beyond}");
}

#[tokio::test]
async fn the_replay_begins_with_the_newest_snapshot_before_the_target() {
    let (store, archive, mut source) = scene().await;
    let mut marks = Vec::new();
    for _ in 0..3 {
        // The snapshot lies inside a slot: slots are not cut where snapshots are taken.
        let mut frames = source.frames(3, 2);
        let position = source.state().position;
        snapshot(&archive, &source).await;
        marks.push((position, source.now()));
        frames.extend(source.frames(3, 2));
        put(&store, &frames).await;
    }
    let archives = [archive];
    for (position, time) in marks {
        for target in [Target::Lsn(position.lsn), Target::At(time)] {
            let planned = plan(&archives, target).await.unwrap();
            assert_eq!((planned.route.end, planned.entries), (position, 0));
            assert_eq!(planned.route.snapshot.unwrap().1.state.position, position);
        }
        let next = plan(&archives, Target::Lsn(Lsn::new(position.lsn.get() + 2))).await.unwrap();
        assert_eq!(next.route.start.position, position);
        assert_eq!(next.entries, 2);
        assert_eq!(next.slots.len(), 1);
    }
}

/// A list that lags must not make a restore end early.
#[tokio::test]
async fn slots_that_no_list_shows_are_found() {
    let (store, archive, mut source) = scene().await;
    for _ in 0..5 {
        put(&store, &source.frames(2, 2)).await;
    }
    for hidden in ["log/0000000001/00000000000000000018", "log/0000000001/00000000000000000010"] {
        store.fail(hidden, Fault::ListLags, usize::MAX);
    }
    let planned = plan(&[archive], Target::Latest).await.unwrap();
    assert_eq!(planned.route.end, source.state().position);
    assert_eq!(planned.slots.len(), 5);
}

/// One archive has the tail that lost a take-over, the other the seal: the winner's history counts, in any order.
#[tokio::test]
async fn a_tail_that_lost_a_take_over_is_not_restored() {
    let (sealed, stale) = (FaultyStore::new(), FaultyStore::new());
    let archives = [archive(&stale).await, archive(&sealed).await];
    let mut source = Source::new();
    let shared = source.frames(2, 2);
    let end = put(&sealed, &shared).await;
    let clock = Arc::new(ManualClock::default());
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let fence = ArchiveFence::new(archives[1].clone(), NodeId::default(), clock, None);
    murphy_fs::Fence::seal(&fence, end, next).await.unwrap();
    let mut successor = source.taken_over(next);
    successor.wait(1_000);
    let won = put(&sealed, &successor.frames(2, 2)).await;
    // The old source did not know, and shipped on to the archive that it still reached.
    let mut whole = shared.clone();
    whole.extend(source.frames(3, 2));
    put(&stale, &whole).await;
    let reversed = [archives[1].clone(), archives[0].clone()];
    for archives in [&archives, &reversed] {
        let latest = plan(archives, Target::Latest).await.unwrap();
        assert_eq!(latest.route.end, won);
        let between = plan(archives, Target::At(LogTime::from_nanos(successor.base_time()))).await.unwrap();
        assert_eq!(between.route.end, end, "nothing beyond the seal, however early it was");
    }
}

/// A restored copy, or a volume with a past, gets an archive: what is shipped there is worth nothing without the snapshot.
#[tokio::test]
async fn an_archive_that_was_added_late_needs_its_snapshot() {
    let store = FaultyStore::new();
    let mut source = Source::new();
    source.frames(4, 2);
    let base = source.state().position;
    let descriptor = crate::descriptor::Descriptor { base, ..crate::testing::descriptor() };
    let archive = Archive::create(store.archive_store(), descriptor).await.unwrap();
    let archives = [archive.clone()];
    let refused = plan(&archives, Target::Latest).await.unwrap_err();
    assert!(matches!(refused, PlanError::NoSnapshot { .. }), "{refused}");
    let findings = crate::verify::verify(&archive, 0, 1).await.findings;
    assert!(findings[0].object.contains("snapshots/"), "{findings:?}");
    snapshot(&archive, &source).await;
    let end = put(&store, &source.frames(2, 2)).await;
    let planned = plan(&archives, Target::Latest).await.unwrap();
    assert_eq!((planned.route.start.position, planned.route.end), (base, end));
    assert_eq!(crate::verify::verify(&archive, 0, 1).await.findings, []);
}

#[tokio::test]
async fn archives_of_two_histories_are_not_mixed() {
    let (one, two) = (FaultyStore::new(), FaultyStore::new());
    let mut other = crate::testing::descriptor();
    other.lineage.branch = murphy_log::BranchId::from_bytes([8; 16]);
    let archives = [archive(&one).await, Archive::create(two.archive_store(), other).await.unwrap()];
    assert!(matches!(plan(&archives, Target::Latest).await, Err(PlanError::Different { .. })));
}

/// A writer that had been replaced left a snapshot of entries that nobody else has: no restore may begin with it.
#[tokio::test]
async fn a_snapshot_of_a_tail_that_lost_is_not_used() {
    let (store, archive, mut source) = scene().await;
    let end = put(&store, &source.frames(4, 2)).await;
    snapshot(&archive, &source).await;
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let fence = ArchiveFence::new(archive.clone(), NodeId::default(), Arc::new(ManualClock::default()), None);
    murphy_fs::Fence::seal(&fence, end, next).await.unwrap();
    let mut successor = source.taken_over(next);
    let mut won = end;
    for _ in 0..20 {
        won = put(&store, &successor.frames(1, 2)).await;
    }
    source.frames(30, 2);
    snapshot(&archive, &source).await;
    let planned = plan(&[archive], Target::Latest).await.unwrap();
    assert_eq!((planned.route.start.position, planned.route.end), (end, won));
}

/// The fear: a restore is promised whose bytes were deleted an hour ago, or whose slots are being deleted.
#[tokio::test]
async fn what_may_be_gone_is_not_planned_with() {
    let (one, two) = (FaultyStore::new(), FaultyStore::new());
    let archives = [archive(&one).await, archive(&two).await];
    let mut source = Source::new();
    for number in 0..6 {
        let frames = source.frames(4, 2);
        for store in [&one, &two] {
            put(store, &frames).await;
        }
        if number == 2 {
            snapshot(&archives[0], &source).await;
        }
    }
    let (node, time) = (NodeId::default(), LogTime::default());
    let branch = archives[0].lineage().branch.to_string();
    let horizon = Record::Horizon { branch, lsn: 30 };
    Registry::new(archives[0].clone()).append(node, time, horizon).await.unwrap();
    let refused = plan(&archives[..1], Target::Lsn(Lsn::new(29))).await.unwrap_err();
    assert!(
        matches!(refused, PlanError::BelowHorizon { horizon, .. } if horizon == Lsn::new(30)),
        "{refused}"
    );
    plan(&archives[..1], Target::Lsn(Lsn::new(31))).await.unwrap();
    let both = plan(&archives, Target::Lsn(Lsn::new(29))).await.unwrap();
    assert!(both.notes.iter().any(|note| note.contains("may be gone")), "{:?}", both.notes);
    assert_eq!(both.problems, Vec::<String>::new(), "nothing is wrong with it");
    // Slots below a floor are there and are not read: somebody deletes them.
    let floor = Record::Floor { epoch: 1, first: 26 };
    Registry::new(archives[0].clone()).append(node, time, floor).await.unwrap();
    let planned = plan(&archives[..1], Target::Latest).await.unwrap();
    assert_eq!(planned.route.end, source.state().position);
    assert!(
        planned.snapshot.is_some()
            && planned.slots.iter().all(|slot| slot.name > layout::slot(1, Lsn::new(25)))
    );
    let refused = plan(&archives[..1], Target::Lsn(Lsn::new(9))).await.unwrap_err();
    assert!(matches!(refused, PlanError::NoSnapshot { .. }), "{refused}");
    assert_eq!(plan(&archives[1..], Target::Lsn(Lsn::new(9))).await.unwrap().route.end.lsn, Lsn::new(9));
}

/// A restore to the latest entry that ends before a hole, and says nothing, is a loss that nobody hears of.
#[tokio::test]
async fn what_lies_behind_a_missing_slot_is_told() {
    let (store, archive, mut source) = scene().await;
    let frames = source.frames(3, 2);
    for frame in frames.chunks(1) {
        put(&store, frame).await;
    }
    let archives = [archive];
    let whole = plan(&archives, Target::Latest).await.unwrap();
    assert_eq!(whole.problems, Vec::<String>::new());
    store.remove(&layout::slot(1, frames[1].first())).await;
    let cut = plan(&archives, Target::Latest).await.unwrap();
    assert_eq!(cut.route.end, frames[0].position());
    let [problem] = &cut.problems[..] else { panic!("{:?}", cut.problems) };
    for slot in [&frames[1], &frames[2]] {
        assert!(problem.contains(&layout::slot(1, slot.first())), "{problem}");
    }
    let before = plan(&archives, Target::Lsn(frames[0].last())).await.unwrap();
    assert_eq!(before.problems, Vec::<String>::new(), "what was asked for is whole");
}

/// The last slot before a seal was lost: no later slot tells of it, the seal does.
#[tokio::test]
async fn what_lies_before_a_seal_and_is_missing_is_told() {
    let (store, archive, mut source) = scene().await;
    let frames = source.frames(2, 2);
    for frame in frames.chunks(1) {
        put(&store, frame).await;
    }
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let fence = ArchiveFence::new(archive.clone(), NodeId::default(), Arc::new(ManualClock::default()), None);
    murphy_fs::Fence::seal(&fence, source.state().position, next).await.unwrap();
    store.remove(&layout::slot(1, frames[1].first())).await;
    let cut = plan(&[archive], Target::Latest).await.unwrap();
    assert_eq!(cut.route.end, frames[0].position());
    let [problem] = &cut.problems[..] else { panic!("{:?}", cut.problems) };
    assert!(problem.contains(&layout::slot(1, frames[1].first())), "{problem}");
}

/// The fear: a source that ships on has a later slot there before an earlier one for a moment, and a restore says that something is missing.
#[tokio::test]
async fn a_slot_that_is_still_on_its_way_is_no_problem() {
    let (store, archive, mut source) = scene().await;
    let frames = source.frames(3, 2);
    for frame in frames.chunks(1) {
        put(&store, frame).await;
    }
    let late = layout::slot(1, frames[1].first());
    for looks in 1..=2 {
        store.fail(&late, Fault::ListLags, looks);
        store.fail(&late, Fault::Lost, looks);
        let planned = plan(std::slice::from_ref(&archive), Target::Latest).await.unwrap();
        assert_eq!((planned.route.end, planned.problems), (source.state().position, Vec::new()));
    }
}

/// Two copies of one node shipped to one archive each: a restore of both has to choose, and must not be silent about it.
#[tokio::test]
async fn archives_that_disagree_are_told() {
    let stores = [FaultyStore::new(), FaultyStore::new()];
    let mut archives = Vec::new();
    let mut common = Source::new();
    let shared = common.frames(2, 2);
    let mut ends = Vec::new();
    for (copy, store) in stores.iter().enumerate() {
        archives.push(archive(store).await);
        put(store, &shared).await;
        let mut source = common.taken_over(common.base().position.epoch);
        source.wait(5 * copy as u64);
        ends.push(put(store, &source.frames(2 + copy, 2)).await);
    }
    for (archive, end) in archives.iter().zip(&ends) {
        let alone = plan(std::slice::from_ref(archive), Target::Latest).await.unwrap();
        assert_eq!((alone.route.end, alone.problems), (*end, Vec::new()));
    }
    let both = plan(&archives, Target::Latest).await.unwrap();
    assert!(both.problems.iter().any(|problem| problem.contains("another history")), "{:?}", both.problems);
    let before = plan(&archives, Target::Lsn(shared[1].last())).await.unwrap();
    assert_eq!(before.problems, Vec::<String>::new(), "they agree so far");
}
