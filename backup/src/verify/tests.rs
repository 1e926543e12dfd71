//! What verification finds, and that it changes nothing.

use std::sync::Arc;

use murphy_fs::{Fence, PackState};
use murphy_log::{Epoch, EpochId, LogTime, ManualClock};

use super::*;
use crate::{
    fence::ArchiveFence,
    registry::Record,
    testing::{Fault, FaultyStore, Source, pack, put, scene, snapshot},
};

/// An archive with slots, packs, a snapshot, a seal and a second epoch, and the names of everything in it.
async fn whole() -> (FaultyStore, Archive) {
    let (store, archive, mut source) = scene().await;
    for number in 0..4 {
        let (sealed, row) = pack(number, &[number as u8; 300]);
        archive.packs().put(sealed.name, sealed.bytes).await.unwrap();
        let mut frames = vec![source.frame_with_pack(&row)];
        frames.extend(source.frames(3, 2));
        put(&store, &frames).await;
    }
    snapshot(&archive, &source).await;
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let clock = Arc::new(ManualClock::new(LogTime::from_nanos(1)));
    let fence = ArchiveFence::new(archive.clone(), NodeId::default(), clock, None);
    fence.seal(source.state().position, next).await.unwrap();
    let mut successor = source.taken_over(next);
    put(&store, &successor.frames(2, 2)).await;
    put(&store, &successor.frames(2, 2)).await;
    (store, archive)
}

#[tokio::test]
async fn an_intact_archive_has_no_findings_and_is_left_as_it_is() {
    let (store, archive) = whole().await;
    let before = store.names().await;
    let report = verify(&archive, 100, 1).await;
    assert_eq!(report.findings, []);
    assert_eq!(
        (report.slots, report.seals, report.snapshots, report.packs, report.packs_read),
        (6, 1, 1, 4, 4)
    );
    assert_eq!((report.entries, report.strays, report.records), (36, 0, 1));
    assert_eq!(store.names().await, before);
    let proof = report.proof(NodeId::default(), 100, 5, 6);
    let name = proof.keep(&archive).await.unwrap();
    assert_eq!(Proof::read(&archive, &name).await.unwrap(), proof);
    let later = Proof { began: 7, ended: 1 << 60, ..proof.clone() };
    later.keep(&archive).await.unwrap();
    assert_eq!(Proof::newest(&archive).await.unwrap(), Some(later));
    assert_eq!(verify(&archive, 0, 1).await.packs_read, 0);
}

/// Whatever is lost or rots, the verification must say so, name it, and tell the two apart.
#[tokio::test]
async fn every_object_that_is_lost_or_damaged_is_found_and_named() {
    let (store, archive) = whole().await;
    let names = store.names().await;
    let last_slot = names.iter().filter(|name| name.starts_with("log/")).max().unwrap().clone();
    for name in names.iter().filter(|name| !name.starts_with("probe/") && *name != layout::DESCRIPTOR) {
        store.heal();
        store.fail(name, Fault::WrongBytes, usize::MAX);
        let damaged = verify(&archive, 100, 1).await.findings;
        let is_named = |finding: &&Finding| finding.to_string().contains(name.as_str());
        let found = damaged.iter().find(is_named);
        let kind = found.map(|finding| finding.kind);
        assert_eq!(kind, Some(FindingKind::Damaged), "{name}: {damaged:?}");
        store.heal();
        store.fail(name, Fault::Lost, usize::MAX);
        let lost = verify(&archive, 100, 1).await.findings;
        // The end of the log cannot be told from one that came less far, nor that of the registry.
        if *name != last_slot && !name.starts_with("registry/") {
            let found = lost.iter().find(is_named);
            assert_eq!(found.map(|finding| finding.kind), Some(FindingKind::Missing), "{name}: {lost:?}");
        }
        store.heal();
        store.fail(name, Fault::GetFails, usize::MAX);
        let silent = verify(&archive, 100, 1).await.findings;
        let found = silent.iter().find(is_named);
        assert_eq!(found.map(|finding| finding.kind), Some(FindingKind::Unknown), "{name}: {silent:?}");
    }
}

/// The next record is found with a get: behind a hole nobody looks, and what is there is forgotten.
#[tokio::test]
async fn a_hole_in_the_registry_is_found() {
    let (store, archive) = whole().await;
    let mut registry = Registry::new(archive.clone());
    for number in 0..2 {
        let record = Record::Owner { branch: format!("{number:032x}") };
        registry.append(NodeId::default(), LogTime::default(), record).await.unwrap();
    }
    assert_eq!(verify(&archive, 0, 1).await.findings, []);
    store.remove(&layout::registry(2)).await;
    let found = verify(&archive, 0, 1).await.findings;
    let [finding] = &found[..] else { panic!("{found:?}") };
    assert_eq!(finding.kind, FindingKind::Missing);
    let text = finding.to_string();
    assert!(text.contains(&layout::registry(2)) && text.contains(&layout::registry(3)), "{text}");
}

#[tokio::test]
async fn a_put_that_landed_after_the_seal_is_counted_and_no_finding() {
    let (store, archive) = whole().await;
    let mut source = Source::new();
    source.frames(100, 2);
    put(&store, &source.frames(1, 1)).await;
    let report = verify(&archive, 0, 1).await;
    assert_eq!((report.findings.len(), report.strays), (0, 1), "{:?}", report.findings);
}

#[tokio::test]
async fn an_archive_that_was_expired_up_to_its_floor_is_whole() {
    let (store, archive) = whole().await;
    let slots: Vec<String> =
        store.names().await.into_iter().filter(|name| name.starts_with("log/")).collect();
    let (epoch, floor, _) = layout::parse_slot(&slots[2]).unwrap();
    let mut registry = Registry::new(archive.clone());
    let record = Record::Floor { epoch, first: floor.get() };
    registry.append(NodeId::default(), LogTime::default(), record).await.unwrap();
    store.remove(&slots[0]).await;
    store.remove(&slots[1]).await;
    let report = verify(&archive, 100, 1).await;
    assert_eq!((report.findings.as_slice(), report.slots), (&[][..], 4));
}

/// What was deleted below a horizon is no damage, and is said.
#[tokio::test]
async fn packs_that_only_states_below_the_horizon_refer_to_are_passed_over() {
    let (store, archive, mut source) = scene().await;
    let row = |number: u64, live_bytes: u64| PackRow {
        writer: 3,
        sequence: number,
        footer_digest: [0; 32],
        plain_bytes: 10,
        stored_bytes: 10,
        live_bytes,
        state: PackState::Here,
    };
    let named = [source.frame_with_pack(&row(1, 10)), source.frame_with_pack(&row(2, 10))];
    put(&store, &named).await;
    let released = [source.frame_releasing_pack(named[0].last(), &row(1, 0))];
    let end = put(&store, &released).await;
    let missing = verify(&archive, 0, 1).await;
    assert_eq!((missing.packs, missing.findings.len()), (2, 2), "{:?}", missing.findings);
    let branch = archive.lineage().branch.to_string();
    for (lsn, passed_over) in [(end.lsn.previous(), 0), (end.lsn, 1)] {
        let horizon = Record::Horizon { branch: branch.clone(), lsn: lsn.get() };
        let mut registry = Registry::new(archive.clone());
        registry.append(NodeId::default(), LogTime::default(), horizon).await.unwrap();
        let report = verify(&archive, 0, 1).await;
        assert_eq!((report.horizon, report.packs_below_horizon), (lsn.get(), passed_over));
        assert_eq!(report.findings.len() as u64, 2 - passed_over, "{:?}", report.findings);
    }
}
