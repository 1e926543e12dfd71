//! Who is the source: adopting, sealing, races for a slot.

use std::{collections::BTreeSet, sync::Arc};

use jiff::tz::TimeZone;
use murphy_fs::{Fence, FenceError, ObjectBlockStore};
use murphy_log::{Epoch, EpochId, LogTime, Lsn, ManualClock, MemoryLog, NodeId, Position};

use super::*;
use crate::{
    layout,
    plan::{RestorePlan, plan_restore},
    registry::{Record, Registry},
    target::Target,
    testing::{Fault, FaultyStore, Source, TestClock, append, archive, put, scene},
    verify::verify,
    walk::{Objection, walk},
};

async fn ship(archive: &Archive, log: &Arc<MemoryLog>) -> ShipEnd {
    let tail = log.tail().position;
    let parts = ShipperParts {
        archive: archive.clone(),
        log: Arc::clone(log) as Arc<dyn Log>,
        packs: Arc::new(ObjectBlockStore::in_memory()),
        node: NodeId::default(),
        epoch: tail.epoch,
        known: None,
        cursor: Arc::new(NoCursor),
        clock: Arc::new(TestClock::new()),
        limits: ShipLimits { slot_age: Duration::ZERO, ..ShipLimits::default() },
        lost: None,
    };
    Shipper::new(parts).0.run_to(tail.lsn).await
}

async fn plan_latest(archive: &Archive) -> RestorePlan {
    let (archives, none) = ([archive.clone()], BTreeSet::new());
    plan_restore(&archives, Target::Latest, &none, &TimeZone::UTC).await.unwrap()
}

fn fence(archive: &Archive, node: u8) -> ArchiveFence {
    let clock = Arc::new(ManualClock::new(LogTime::from_nanos(7)));
    ArchiveFence::new(archive.clone(), NodeId::from_bytes([node; 16]), clock, None)
}

fn epoch(number: u32, byte: u8) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([byte; 16]) }
}

#[tokio::test(start_paused = true)]
async fn a_walk_crosses_seals_and_ends_at_the_first_free_name() {
    let (store, archive, mut source) = scene().await;
    let base = source.base().position;
    let nothing = Held { end: base, epoch: base.epoch, seals: Vec::new() };
    assert_eq!(fence(&archive, 1).adopt().await.unwrap(), nothing);
    // More slots than are asked for one by one.
    let mut end = source.base().position;
    for _ in 0..40 {
        end = put(&store, &source.frames(2, 3)).await;
    }
    fence(&archive, 1).seal(end, epoch(2, 20)).await.unwrap();
    let held = fence(&archive, 1).adopt().await.unwrap();
    assert_eq!((held.end, held.epoch, held.seals[0].next), (end, epoch(2, 20), epoch(2, 20)));
    let mut next = source.taken_over(epoch(2, 20));
    let end = put(&store, &next.frames(1, 1)).await;
    // A list that shows nothing costs time, not truth.
    store.fail("log/", Fault::ListLags, usize::MAX);
    let held = fence(&archive, 1).adopt().await.unwrap();
    assert_eq!((held.end, held.seals[0].by), (end, NodeId::from_bytes([1; 16])));
}

/// The fear: a take-over walks a month of slots once for each of its steps; or it trusts what it has seen, and does not see what was lost since.
#[tokio::test(start_paused = true)]
async fn a_long_history_is_walked_once_and_what_is_lost_meanwhile_is_seen() {
    let (store, archive, mut source) = scene().await;
    let mut ends = Vec::new();
    for _ in 0..40 {
        ends.push(put(&store, &source.frames(1, 3)).await);
    }
    let fence = fence(&archive, 1);
    let held = fence.adopt().await.unwrap();
    assert_eq!(held.end, ends[39]);
    // Nobody asks for those once more, and what comes is found, seals too.
    let names: Vec<String> =
        ends.windows(2).map(|pair| layout::slot(pair[1].epoch.number, pair[0].lsn.next())).collect();
    names[..38].iter().for_each(|name| store.fail(name, Fault::GetFails, usize::MAX));
    ends.push(put(&store, &source.frames(1, 3)).await);
    assert_eq!(fence.adopt().await.unwrap().end, ends[40]);
    assert_eq!(fence.entries(ends[39]).await.unwrap().last().map(Frame::position), Some(ends[40]));
    fence.seal(ends[40], epoch(2, 20)).await.unwrap();
    fence.seal(ends[40], epoch(2, 20)).await.unwrap();
    assert_eq!(fence.adopt().await.unwrap().seals.len(), 1);
    store.heal();
    // A list that lags is no loss: everything is walked.
    store.fail("log/", Fault::ListLags, usize::MAX);
    assert_eq!(fence.adopt().await.unwrap().end, ends[40]);
    store.heal();
    store.remove(&names[19]).await;
    assert_eq!(fence.adopt().await.unwrap().end, ends[19]);
}

/// The fear: what an archive that was given up holds of an epoch before is taken for a loss of the source's own, and keeps it from starting; or
/// the source's own loss is not seen.
#[tokio::test(start_paused = true)]
async fn an_archive_objects_to_a_source_that_was_replaced_or_has_lost_entries_and_to_nobody_else() {
    let (store, archive, mut source) = scene().await;
    let end = put(&store, &source.frames(2, 3)).await;
    let walked = walk(&archive, None).await.unwrap();
    assert_eq!(walked.objection(end.epoch, end.lsn), None);
    assert_eq!(walked.objection(end.epoch, end.lsn.previous()), Some(Objection::Lost { held: end.lsn }));
    let same_number = Epoch { id: EpochId::from_bytes([99; 16]), ..end.epoch };
    assert_eq!(walked.objection(same_number, end.lsn), Some(Objection::Replaced));
    let later = epoch(end.epoch.number + 1, 20);
    assert_eq!(walked.objection(later, end.lsn.previous()), None, "it was given up");
    fence(&archive, 1).seal(end, later).await.unwrap();
    let walked = walk(&archive, None).await.unwrap();
    assert_eq!(walked.objection(end.epoch, end.lsn), Some(Objection::Replaced));
    assert_eq!(walked.objection(later, end.lsn), None);
    assert_eq!(walked.objection(later, end.lsn.previous()), Some(Objection::Lost { held: end.lsn }));
}

#[tokio::test(start_paused = true)]
async fn of_two_promoters_one_wins_and_the_other_learns_who() {
    let (store, archive, mut source) = scene().await;
    let end = put(&store, &source.frames(1, 4)).await;
    let (one, two) = (fence(&archive, 1), fence(&archive, 2));
    let (one, two) = tokio::join!(one.seal(end, epoch(2, 10)), two.seal(end, epoch(2, 20)));
    let sealed = match (one, two) {
        (Ok(()), Err(FenceError::Sealed(sealed))) | (Err(FenceError::Sealed(sealed)), Ok(())) => sealed,
        other => panic!("{other:?}"),
    };
    assert_eq!(sealed.base, end);
}

/// The promoter dies after its put was sent, or the answer is lost, and it tries again.
#[tokio::test(start_paused = true)]
async fn a_promoter_that_tries_again_finds_its_own_seal() {
    let (store, archive, mut source) = scene().await;
    let end = put(&store, &source.frames(1, 4)).await;
    store.fail("log/", Fault::PutAnswersError, 1);
    fence(&archive, 1).seal(end, epoch(2, 10)).await.unwrap();
    fence(&archive, 1).seal(end, epoch(2, 10)).await.unwrap();
    let refused = fence(&archive, 1).seal(end, epoch(2, 11)).await;
    assert!(matches!(refused, Err(FenceError::Sealed(_))), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn a_seal_above_or_below_the_end_is_not_made() {
    let (store, archive, mut source) = scene().await;
    let end = put(&store, &source.frames(1, 4)).await;
    let unshipped = source.frames(1, 4)[0].position();
    for base in [unshipped, source.base().position, Position { hash: unshipped.hash, ..end }] {
        let refused = fence(&archive, 1).seal(base, epoch(2, 10)).await;
        assert!(matches!(refused, Err(FenceError::Unavailable { .. })), "{refused:?}");
    }
    assert!(fence(&archive, 1).adopt().await.unwrap().seals.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_put_that_landed_after_the_seal_is_ignored() {
    let (store, archive, mut source) = scene().await;
    let end = put(&store, &source.frames(1, 4)).await;
    // Two slots of the old source are under way: the first fails, the second lands when the seal is already there.
    let (_, late) = (source.frames(1, 5), source.frames(1, 5));
    fence(&archive, 1).seal(end, epoch(2, 10)).await.unwrap();
    put(&store, &late).await;
    let held = fence(&archive, 1).adopt().await.unwrap();
    assert_eq!((held.end, held.seals[0].base), (end, end));
}

/// slatedb lost flushed writes so: the name that a stale writer wins was taken, and its object deleted.
#[tokio::test(start_paused = true)]
async fn a_stale_writer_does_not_win_a_name_below_the_floor() {
    let (store, archive, mut source) = scene().await;
    let (first, second, third) = (source.frames(1, 4), source.frames(1, 4), source.frames(1, 4));
    let stale = put(&store, &first).await;
    put(&store, &second).await;
    let end = put(&store, &third).await;
    let mut registry = Registry::new(archive.clone());
    let floor = Record::Floor { epoch: 1, first: third[0].first().get() };
    registry.append(NodeId::default(), LogTime::default(), floor).await.unwrap();
    for gone in [&first, &second] {
        store.remove(&layout::slot(1, gone[0].first())).await;
    }
    let refused = fence(&archive, 1).seal(stale, epoch(2, 9)).await;
    assert!(matches!(refused, Err(FenceError::Unavailable { .. })), "{refused:?}");
    let known = Some(Boundary::after(stale));
    let clock = Arc::new(ManualClock::new(LogTime::default()));
    let woken = ArchiveFence::new(archive.clone(), NodeId::default(), clock, known);
    assert_eq!(woken.adopt().await.unwrap().end, end);
    assert!(!store.names().await.contains(&layout::slot(1, second[0].first())));
}

#[tokio::test(start_paused = true)]
async fn a_damaged_or_lost_slot_is_named() {
    let (store, archive, mut source) = scene().await;
    put(&store, &source.frames(1, 4)).await;
    put(&store, &source.frames(1, 4)).await;
    let name = layout::slot(1, Lsn::new(6));
    for fault in [Fault::WrongBytes, Fault::NoBytes] {
        store.heal();
        store.fail(&name, fault, usize::MAX);
        let refused = fence(&archive, 1).walk().await.map(|walk| walk.end);
        // A changed byte in the body is for those who read the body.
        if fault == Fault::NoBytes {
            assert!(refused.unwrap_err().to_string().contains(&name));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_belongs_under_another_name_is_a_fork() {
    let (store, archive, mut source) = scene().await;
    put(&store, &source.frames(1, 4)).await;
    source.frames(1, 2);
    let end = put(&store, &source.frames(1, 1)).await;
    let bytes = archive.store().get(&layout::slot(1, end.lsn), 1 << 20).await.unwrap();
    store.overwrite(&layout::slot(1, Lsn::new(6)), bytes).await;
    let refused = fence(&archive, 1).adopt().await;
    assert!(matches!(refused, Err(FenceError::Forked { lsn, .. }) if lsn == Lsn::new(6)), "{refused:?}");
}

/// The fear: a copy of the node's directory runs as well, and a slot of it that was under way stands behind the winner's last one: the
/// archive can neither be continued nor sealed, and a restore takes what lost.
#[tokio::test(start_paused = true)]
async fn a_slot_of_a_copy_that_lost_is_passed_over_by_everybody() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut common = Source::new();
    put(&store, &common.frames(2, 2)).await;
    let (mut winner, mut loser) =
        (common.taken_over(common.base().position.epoch), common.taken_over(common.base().position.epoch));
    loser.wait(5);
    let (won, lost) = (winner.frames(8, 2), loser.frames(12, 2));
    // One within what the winner has, one right behind it, one further on.
    for slot in [&lost[1..3], &lost[4..6], &lost[6..9]] {
        put(&store, slot).await;
    }
    put(&store, &won[..2]).await;
    let end = put(&store, &won[2..4]).await;
    let dead = layout::slot(1, lost[4].first());
    let walked = walk(&archive, None).await.unwrap();
    assert_eq!((walked.end.position, &walked.dead[..]), (end, std::slice::from_ref(&dead)));
    let planned = plan_latest(&archive).await;
    assert_eq!(planned.route.end, end);
    assert!(planned.problems.iter().any(|problem| problem.contains(&dead)), "{:?}", planned.problems);
    let found = verify(&archive, 0, 1).await;
    assert!(found.findings.iter().any(|finding| finding.object.contains(&dead)), "{:?}", found.findings);
    // The winner goes on behind it when it starts again, the loser does not.
    let log = |frames: &[Frame]| {
        let log = MemoryLog::new(common.base());
        log.claim(common.base().position.epoch).unwrap();
        let mut source = Source::new();
        append(&log, &source.frames(2, 2));
        append(&log, frames);
        Arc::new(log)
    };
    let shipped = ship(&archive, &log(&lost)).await;
    assert!(matches!(shipped, ShipEnd::Forked { .. }), "{shipped}");
    let shipped = ship(&archive, &log(&won)).await;
    assert!(matches!(shipped, ShipEnd::Stray { .. }), "nobody has said that it lost: {shipped}");
    for first in [lost[4].first(), lost[6].first()] {
        let record = Record::Abandoned { epoch: 1, first: first.get(), turn: 0 };
        Registry::new(archive.clone()).append(NodeId::default(), LogTime::default(), record).await.unwrap();
    }
    assert_eq!(ship(&archive, &log(&won)).await, ShipEnd::Reached);
    let end = winner.state().position;
    assert_eq!(walk(&archive, None).await.unwrap().end, Boundary::after(end));
    let planned = plan_latest(&archive).await;
    assert_eq!((planned.route.end, planned.problems), (end, Vec::new()));
    let report = verify(&archive, 100, 1).await;
    assert_eq!((report.findings, report.dead), (Vec::new(), 1));
    // A cursor that is off the chain is not believed.
    let known = Boundary::after(lost[1].position());
    let refused = walk(&archive, Some(known)).await;
    assert!(matches!(refused, Err(WalkError::Fork { .. })), "{refused:?}");
}

/// The same, and nobody is left who could go on: whoever takes over seals behind it.
#[tokio::test(start_paused = true)]
async fn an_archive_is_sealed_behind_a_slot_of_a_copy_that_lost() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut common = Source::new();
    let base = put(&store, &common.frames(2, 2)).await;
    let mut loser = common.taken_over(common.base().position.epoch);
    let lost = loser.frames(2, 2);
    // Its own first slot was lost on the way: what is there continues nothing.
    put(&store, &lost[1..]).await;
    let mut winner = common.taken_over(common.base().position.epoch);
    winner.wait(5);
    let end = put(&store, &winner.frames(1, 2)).await;
    assert!(end.lsn > base.lsn && end.lsn == lost[0].last());
    let (promoter, next) =
        (NodeId::from_bytes([9; 16]), Epoch { number: 2, id: EpochId::from_bytes([9; 16]) });
    let fence = ArchiveFence::new(archive.clone(), promoter, Arc::new(ManualClock::default()), None);
    fence.seal(end, next).await.unwrap();
    fence.seal(end, next).await.unwrap();
    let mut successor = winner.taken_over(next);
    let last = put(&store, &successor.frames(2, 2)).await;
    let held = fence.adopt().await.unwrap();
    assert_eq!((held.end, held.epoch, held.seals.len()), (last, next, 1));
    let planned = plan_latest(&archive).await;
    assert_eq!((planned.route.end, planned.problems), (last, Vec::new()));
    assert_eq!(verify(&archive, 100, 1).await.findings, []);
}

/// The fear: the dead slot is lost, its name looks free, and the source that was replaced ships there and is acknowledged.
#[tokio::test(start_paused = true)]
async fn a_seal_behind_a_dead_slot_is_not_forgotten_when_that_slot_is_lost() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut common = Source::new();
    put(&store, &common.frames(2, 2)).await;
    let mut loser = common.taken_over(common.base().position.epoch);
    put(&store, &loser.frames(2, 2)[1..]).await;
    let mut winner = common.taken_over(common.base().position.epoch);
    winner.wait(5);
    let end = put(&store, &winner.frames(1, 2)).await;
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    fence(&archive, 9).seal(end, next).await.unwrap();
    assert_eq!(fence(&archive, 9).walk().await.unwrap().seals.len(), 1);

    let dead = layout::slot(1, end.lsn.next());
    store.remove(&dead).await;
    for known in [None, Some(Boundary::after(end))] {
        let refused = walk(&archive, known).await;
        assert!(
            matches!(&refused, Err(WalkError::Missing { object }) if object.starts_with(&dead)),
            "{refused:?}"
        );
    }
    let late = Epoch { number: 2, id: EpochId::from_bytes([8; 16]) };
    assert!(fence(&archive, 8).seal(end, late).await.is_err());
    assert_eq!(plan_latest(&archive).await.route.end, end);
}
