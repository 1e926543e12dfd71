//! Who is the source: adopting, sealing, races for a slot.

use std::sync::Arc;

use murphy_fs::{Fence, FenceError};
use murphy_log::{Epoch, EpochId, LogTime, Lsn, ManualClock, NodeId, Position};

use super::*;
use crate::{
    layout,
    registry::Record,
    testing::{Fault, FaultyStore, Source, archive, put},
};

fn fence(archive: &Archive, node: u8) -> ArchiveFence {
    let clock = Arc::new(ManualClock::new(LogTime::from_nanos(7)));
    ArchiveFence::new(archive.clone(), NodeId::from_bytes([node; 16]), clock, None)
}

fn epoch(number: u32, byte: u8) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([byte; 16]) }
}

#[tokio::test]
async fn a_walk_crosses_seals_and_ends_at_the_first_free_name() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
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

#[tokio::test]
async fn of_two_promoters_one_wins_and_the_other_learns_who() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
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
#[tokio::test]
async fn a_promoter_that_tries_again_finds_its_own_seal() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
    let end = put(&store, &source.frames(1, 4)).await;
    store.fail("log/", Fault::PutAnswersError, 1);
    fence(&archive, 1).seal(end, epoch(2, 10)).await.unwrap();
    fence(&archive, 1).seal(end, epoch(2, 10)).await.unwrap();
    let refused = fence(&archive, 1).seal(end, epoch(2, 11)).await;
    assert!(matches!(refused, Err(FenceError::Sealed(_))), "{refused:?}");
}

#[tokio::test]
async fn a_seal_above_or_below_the_end_is_not_made() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
    let end = put(&store, &source.frames(1, 4)).await;
    let unshipped = source.frames(1, 4)[0].position();
    for base in [unshipped, source.base().position, Position { hash: unshipped.hash, ..end }] {
        let refused = fence(&archive, 1).seal(base, epoch(2, 10)).await;
        assert!(matches!(refused, Err(FenceError::Unavailable { .. })), "{refused:?}");
    }
    assert!(fence(&archive, 1).adopt().await.unwrap().seals.is_empty());
}

#[tokio::test]
async fn a_put_that_landed_after_the_seal_is_ignored() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
    let end = put(&store, &source.frames(1, 4)).await;
    // Two slots of the old source are under way: the first fails, the second lands when the seal is already there.
    let (_, late) = (source.frames(1, 5), source.frames(1, 5));
    fence(&archive, 1).seal(end, epoch(2, 10)).await.unwrap();
    put(&store, &late).await;
    let held = fence(&archive, 1).adopt().await.unwrap();
    assert_eq!((held.end, held.seals[0].base), (end, end));
}

/// slatedb lost flushed writes so: the name that a stale writer wins was taken, and its object deleted.
#[tokio::test]
async fn a_stale_writer_does_not_win_a_name_below_the_floor() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
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

#[tokio::test]
async fn a_damaged_or_lost_slot_is_named() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
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

#[tokio::test]
async fn a_slot_of_another_history_is_a_fork() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
    put(&store, &source.frames(1, 4)).await;
    let mut other = Source::new();
    other.frames(1, 2);
    other.wait(1_000_000);
    other.frames(1, 2);
    put(&store, &other.frames(1, 1)).await;
    let refused = fence(&archive, 1).adopt().await;
    assert!(matches!(refused, Err(FenceError::Forked { lsn, .. }) if lsn == Lsn::new(6)), "{refused:?}");
}
