//! Slots and the packs that they name: which come first, which are not waited for, and what is damaged on either side.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_slot_waits_for_every_pack_that_it_names() {
    let (store, blocks) = (FaultyStore::new(), FaultyStore::new());
    let archive = archive(&store).await;
    let mut source = Source::new();
    let log = claimed_log(source.base());
    let (sealed, row) = pack(1);
    let frame = source.frame_with_pack(&row);
    append(&log, std::slice::from_ref(&frame));
    let packs = blocks.block_store();
    let parts = ShipperParts { packs: Arc::new(packs.clone()), ..parts(&archive, &source, &log) };
    let (shipper, handle) = Shipper::new(parts);
    let running = tokio::spawn(shipper.run());
    let mut watching = handle.clone();
    while handle.status().error.is_none() {
        watching.changed().await;
    }
    assert!(!store.names().await.iter().any(|name| name.starts_with("log/")), "a slot without its pack");
    BlockStore::put(&packs, sealed.name, sealed.bytes.clone()).await.unwrap();
    handle.archived(frame.last()).await.unwrap();
    let puts: Vec<String> = store.log().into_iter().filter(|line| line.starts_with("put")).collect();
    let place = |part: &str| puts.iter().position(|line| line.contains(part)).unwrap();
    assert!(place("packs/") < place("log/"));
    let copied = BlockStore::get(&archive.packs(), sealed.name).await.unwrap();
    assert_eq!(copied, sealed.bytes);
    running.abort();
}

/// The fear: a region is lost with the last packs, and no archive can be sealed or continued ever again.
#[tokio::test(start_paused = true)]
async fn a_slot_goes_without_a_pack_that_was_lost_with_the_source_and_waits_for_any_other() {
    let (store, blocks) = (FaultyStore::new(), FaultyStore::new());
    let archive = archive(&store).await;
    let mut source = Source::new();
    let log = claimed_log(source.base());
    source.frames(1, 1).iter().for_each(|frame| append(&log, std::slice::from_ref(frame)));
    let frame = source.frame_with_pack(&pack(1).1);
    append(&log, std::slice::from_ref(&frame));
    let packs = blocks.block_store();
    let with = |after: u64, upto: u64| {
        let lost = LostPacks { after: Lsn::new(after), upto: Lsn::new(upto) };
        let lost = Some(Arc::new(lost) as Arc<dyn Losses>);
        let packs = Arc::new(packs.clone());
        let limits = ShipLimits { slot_bytes: 1, ..ShipLimits::default() };
        ship_all(ShipperParts { packs, lost, limits, ..parts(&archive, &source, &log) })
    };
    let (named, patience) = (frame.last().get(), Duration::from_millis(300));
    assert!(tokio::time::timeout(patience, with(named, named + 5)).await.is_err(), "it is named before");
    assert!(tokio::time::timeout(patience, with(0, named - 1)).await.is_err(), "it is named after");
    blocks.fail("", Fault::GetFails, usize::MAX);
    assert!(tokio::time::timeout(patience, with(0, named)).await.is_err(), "the store does not answer");
    blocks.heal();
    // What the source's stores have of it is rotten: that is no more than nothing.
    let sealed = pack(1).0;
    BlockStore::put(&packs, sealed.name, sealed.bytes.slice(1..)).await.unwrap();
    assert!(tokio::time::timeout(patience, with(0, named - 1)).await.is_err(), "it is named after");
    assert_eq!(with(0, named).await, ShipEnd::Reached);
    assert_eq!(walk(&archive, None).await.unwrap().end.position, frame.position());
}

/// The fear: bytes that a promoted source gets from another mirror never reach the archives, whose slots went without them.
#[tokio::test(start_paused = true)]
async fn a_pack_that_is_found_after_its_slot_went_without_is_brought_before_the_slot_that_says_so() {
    let (store, archive, mut source) = scene().await;
    let log = claimed_log(source.base());
    let (sealed, row) = pack(1);
    let frame = source.frame_with_pack(&row);
    append(&log, std::slice::from_ref(&frame));
    let packs = Arc::new(ObjectBlockStore::in_memory());
    let lost: Arc<dyn Losses> = Arc::new(LostPacks { after: Lsn::new(0), upto: frame.last() });
    let limits = ShipLimits { slot_bytes: 1, ..ShipLimits::default() };
    let own = Arc::clone(&packs) as Arc<dyn BlockStore>;
    let parts = ShipperParts { packs: own, lost: Some(lost), limits, ..parts(&archive, &source, &log) };
    let (shipper, handle) = Shipper::new(parts);
    let running = tokio::spawn(shipper.run());
    handle.archived(frame.last()).await.unwrap();
    let missing = PackRow { state: PackState::Missing, ..row };
    let said = source.frame_releasing_pack(frame.last(), &missing);
    append(&log, std::slice::from_ref(&said));
    handle.archived(said.last()).await.unwrap();
    assert!(!store.names().await.iter().any(|name| name.starts_with("packs/")));
    BlockStore::put(&*packs, sealed.name, sealed.bytes.clone()).await.unwrap();
    let found = PackRow { state: PackState::Found { at: said.last().next() }, ..row };
    let said = source.frame_releasing_pack(frame.last(), &found);
    append(&log, std::slice::from_ref(&said));
    handle.archived(said.last()).await.unwrap();
    assert_eq!(BlockStore::get(&archive.packs(), sealed.name).await.unwrap(), sealed.bytes);
    running.abort();
}

/// The fear: the archive's own copy of a pack has rotted, nobody else has it, its slot counts as one that has its bytes; and when somebody else
/// turns out to have it, the archive keeps the rotten one.
#[tokio::test(start_paused = true)]
async fn what_an_archive_has_rotten_of_a_pack_that_was_lost_is_replaced_once_it_is_found() {
    let (_, archive, mut source) = scene().await;
    let log = claimed_log(source.base());
    let (sealed, row) = pack(1);
    let mut rotten = sealed.bytes.to_vec();
    rotten[3] ^= 1;
    BlockStore::put(&archive.packs(), sealed.name, rotten.into()).await.unwrap();
    let frame = source.frame_with_pack(&row);
    append(&log, std::slice::from_ref(&frame));
    let packs = Arc::new(ObjectBlockStore::in_memory());
    let lost: Arc<dyn Losses> = Arc::new(LostPacks { after: Lsn::new(0), upto: frame.last() });
    let limits = ShipLimits { slot_bytes: 1, ..ShipLimits::default() };
    let own = Arc::clone(&packs) as Arc<dyn BlockStore>;
    let parts = ShipperParts { packs: own, lost: Some(lost), limits, ..parts(&archive, &source, &log) };
    for restarts in [false, true] {
        let (shipper, handle) = Shipper::new(parts.clone());
        let running = tokio::spawn(shipper.run());
        handle.archived(log.tail().position.lsn).await.unwrap();
        if restarts {
            BlockStore::put(&*packs, sealed.name, sealed.bytes.clone()).await.unwrap();
        }
        let lsn = source.state().position.lsn.next();
        let state = if restarts { PackState::Found { at: lsn } } else { PackState::Missing };
        let said = source.frame_releasing_pack(frame.last(), &PackRow { state, ..row });
        append(&log, std::slice::from_ref(&said));
        handle.archived(said.last()).await.unwrap();
        running.abort();
    }
    assert_eq!(BlockStore::get(&archive.packs(), sealed.name).await.unwrap(), sealed.bytes);
}

/// The same for a shipper that has asked before whether the pack is there, by its length: what it remembers is not the pack that was found.
#[tokio::test(start_paused = true)]
async fn a_pack_that_was_asked_for_by_its_length_is_brought_once_it_is_found() {
    let (_, archive, mut source) = scene().await;
    let log = claimed_log(source.base());
    let (sealed, row) = pack(1);
    let frame = source.frame_with_pack(&row);
    append(&log, std::slice::from_ref(&frame));
    let packs = Arc::new(ObjectBlockStore::in_memory());
    BlockStore::put(&*packs, sealed.name, sealed.bytes.clone()).await.unwrap();
    let limits = ShipLimits { slot_bytes: 1, ..ShipLimits::default() };
    let own = Arc::clone(&packs) as Arc<dyn BlockStore>;
    let parts = ShipperParts { packs: own, limits, ..parts(&archive, &source, &log) };
    assert_eq!(ship_all(parts.clone()).await, ShipEnd::Reached);
    let mut rotten = sealed.bytes.to_vec();
    rotten[3] ^= 1;
    BlockStore::mend(&archive.packs(), sealed.name, rotten.into()).await.unwrap();
    let (shipper, handle) = Shipper::new(parts);
    let running = tokio::spawn(shipper.run());
    // It is counted, called missing, and found.
    for state in 0..3 {
        let at = source.state().position.lsn.next();
        let state = [PackState::Here, PackState::Missing, PackState::Found { at }][state];
        let said = source.frame_releasing_pack(frame.last(), &PackRow { state, ..row });
        append(&log, std::slice::from_ref(&said));
        handle.archived(said.last()).await.unwrap();
    }
    running.abort();
    assert_eq!(BlockStore::get(&archive.packs(), sealed.name).await.unwrap(), sealed.bytes);
}

/// An archive that is added later gets the whole log; what nobody has must not hold it for ever.
#[tokio::test(start_paused = true)]
async fn a_slot_does_not_wait_for_a_pack_that_its_own_entries_call_missing() {
    let (store, archive, mut source) = scene().await;
    let log = claimed_log(source.base());
    let (_, row) = pack(1);
    let frame = source.frame_with_pack(&row);
    let said = source.frame_releasing_pack(frame.last(), &PackRow { state: PackState::Missing, ..row });
    append(&log, &[frame, said]);
    assert_eq!(ship_all(parts(&archive, &source, &log)).await, ShipEnd::Reached);
    assert!(!store.names().await.iter().any(|name| name.starts_with("packs/")));
}

#[tokio::test(start_paused = true)]
async fn a_damaged_pack_is_not_archived() {
    let Scene { store, archive, mut source, log } = Scene::new().await;
    let (sealed, row) = pack(1);
    append(&log, &[source.frame_with_pack(&row)]);
    let mut wrong = sealed.bytes.to_vec();
    wrong[3] ^= 1;
    let packs = ObjectBlockStore::in_memory();
    BlockStore::put(&packs, sealed.name, wrong.into()).await.unwrap();
    let parts = ShipperParts { packs: Arc::new(packs), ..parts(&archive, &source, &log) };
    let (shipper, handle) = Shipper::new(parts);
    let outcome = tokio::time::timeout(Duration::from_millis(300), shipper.run()).await;
    assert!(outcome.is_err(), "{outcome:?}");
    assert!(handle.status().error.is_some());
    assert!(!store.names().await.iter().any(|name| name.starts_with("log/") || name.starts_with("packs/")));
}

/// The fear: what rots in an archive, or was cut off there, is never put right, and the archive stands still.
#[tokio::test(start_paused = true)]
async fn a_pack_that_the_archive_has_damaged_is_replaced() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let (sealed, row) = pack(1);
    append(&log, &[source.frame_with_pack(&row)]);
    let packs = ObjectBlockStore::in_memory();
    BlockStore::put(&packs, sealed.name, sealed.bytes.clone()).await.unwrap();
    BlockStore::put(&archive.packs(), sealed.name, sealed.bytes.slice(3..)).await.unwrap();
    let parts = ShipperParts { packs: Arc::new(packs), ..parts(&archive, &source, &log) };
    assert_eq!(ship_all(parts).await, ShipEnd::Reached);
    assert_eq!(BlockStore::get(&archive.packs(), sealed.name).await.unwrap(), sealed.bytes);
}

#[tokio::test(start_paused = true)]
async fn the_same_pack_name_with_other_content_is_refused() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let (sealed, row) = pack(1);
    append(&log, &[source.frame_with_pack(&row)]);
    let packs = ObjectBlockStore::in_memory();
    BlockStore::put(&packs, sealed.name, sealed.bytes).await.unwrap();
    BlockStore::put(&archive.packs(), sealed.name, pack(2).0.bytes).await.unwrap();
    let parts = ShipperParts { packs: Arc::new(packs), ..parts(&archive, &source, &log) };
    let (shipper, handle) = Shipper::new(parts);
    assert!(tokio::time::timeout(Duration::from_millis(300), shipper.run()).await.is_err());
    let error = handle.status().error.unwrap();
    assert!(error.contains("other content"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_log_archive_does_not_wait_for_packs() {
    let store = FaultyStore::new();
    let archive = archive_of(&store, ArchiveKind::Log).await;
    let mut source = Source::new();
    let log = claimed_log(source.base());
    append(&log, &[source.frame_with_pack(&pack(1).1)]);
    assert_eq!(ship_all(parts(&archive, &source, &log)).await, ShipEnd::Reached);
    assert!(!store.names().await.iter().any(|name| name.starts_with("packs/")));
}
