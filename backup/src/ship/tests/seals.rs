//! Seals that a source meets: of its successor, and of those who never led what it holds.

use super::*;

const PROMOTER: NodeId = NodeId::from_bytes([9; 16]);

fn later(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
}

async fn seal(archive: &Archive, base: Position, next: Epoch) {
    let fence = ArchiveFence::new(archive.clone(), PROMOTER, Arc::new(TestClock::new()), None);
    fence.seal(base, next).await.unwrap();
}

fn assert_shut(end: &ShipEnd, base: Position) {
    let ShipEnd::Gap { lsn, reason, .. } = end else { panic!("{end}") };
    assert_eq!(*lsn, base.lsn.next());
    assert!(reason.contains("sealed") && reason.contains("epoch 2"), "{reason}");
}

/// The fear: one who never led has sealed an archive that was given up, and the source that holds more asks it for ever, without a word of what
/// people can do; or takes the seal for one that ends its own epoch.
#[tokio::test(start_paused = true)]
async fn what_comes_behind_the_seal_of_one_who_never_led_ends_shipping_and_no_acknowledging() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let other = testing::archive(&FaultyStore::new()).await;
    append(&log, &source.frames(5, 3));
    let own = later(3);
    let parts = |archive: &Archive| ShipperParts { epoch: own, ..parts(archive, &source, &log) };
    let parts = [parts(&archive), parts(&other)];
    let (shipper, handle) = Shipper::new(parts[0].clone());
    let running = tokio::spawn(shipper.run());
    let base = handle.archived(source.state().position.lsn).await.unwrap().position;
    seal(&archive, base, later(2)).await;
    append(&log, &source.frames(5, 3));
    // It comes to the seal while it ships.
    let met = tokio::time::timeout(LONG, running).await.unwrap().unwrap();
    assert_shut(&met, base);
    let mut successor = source.taken_over(own);
    log.claim(own).unwrap();
    append(&log, &successor.frames(5, 3));
    // It finds the seal when it starts.
    let found = tokio::time::timeout(LONG, ship_all(parts[0].clone())).await.unwrap();
    assert_shut(&found, base);
    let mut handles = vec![handle];
    let (shipper, handle) = Shipper::new(parts[1].clone());
    tokio::spawn(shipper.run());
    handles.push(handle);
    let lsn = successor.state().position.lsn;
    ArchiveAcknowledger::new(handles).acknowledged(lsn, LONG).await.unwrap();
}

/// The fear: the seal of an attempt that came to nothing, in an archive that did not answer then, ends the source that leads a later epoch.
#[tokio::test(start_paused = true)]
async fn a_seal_of_one_who_never_led_is_passed_where_the_source_has_nothing_behind_it() {
    for is_there_before in [false, true] {
        let Scene { archive, mut source, log, .. } = Scene::new().await;
        append(&log, &source.frames(5, 3));
        let own = later(3);
        let parts = ShipperParts { epoch: own, ..parts(&archive, &source, &log) };
        let (shipper, handle) = Shipper::new(parts.clone());
        let running = tokio::spawn(shipper.run());
        let base = handle.archived(source.state().position.lsn).await.unwrap().position;
        seal(&archive, base, later(2)).await;
        if is_there_before {
            running.abort();
        }
        let mut successor = source.taken_over(own);
        log.claim(own).unwrap();
        append(&log, &successor.frames(5, 3));
        let lsn = successor.state().position.lsn;
        match is_there_before {
            true => assert_eq!(ship_all(parts).await, ShipEnd::Reached),
            false => drop(handle.archived(lsn).await.unwrap()),
        }
        let walked = walk(&archive, None).await.unwrap();
        assert_eq!(walked.seals.iter().map(|seal| seal.next).collect::<Vec<_>>(), [later(2), own]);
        assert_eq!(walked.end, Boundary::after(successor.state().position));
    }
}

/// The fear: one archive says who leads now, and the source goes on acknowledging through another one.
#[tokio::test(start_paused = true)]
async fn the_seal_of_a_successor_at_one_archive_ends_acknowledging_through_every_other() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let other = testing::archive(&FaultyStore::new()).await;
    append(&log, &source.frames(5, 3));
    let mut handles = Vec::new();
    for archive in [&archive, &other] {
        let (shipper, handle) = Shipper::new(parts(archive, &source, &log));
        tokio::spawn(shipper.run());
        handle.archived(source.state().position.lsn).await.unwrap();
        handles.push(handle);
    }
    let acknowledger = ArchiveAcknowledger::new(handles.clone());
    acknowledger.acknowledged(source.state().position.lsn, LONG).await.unwrap();
    seal(&archive, source.state().position, later(2)).await;
    append(&log, &source.frames(5, 3));
    let lsn = source.state().position.lsn;
    let fenced = handles[0].archived(lsn).await;
    assert!(matches!(fenced, Err(Some(ShipEnd::Fenced(_)))), "{fenced:?}");
    handles[1].archived(lsn).await.unwrap();
    let refused = acknowledger.acknowledged(lsn, LONG).await;
    assert!(matches!(refused, Err(AcknowledgeError::Fenced(_))), "{refused:?}");
}

/// The fear: an archive that was given up comes back as another one's while an fsync waits for the others, and the fsync fails.
#[tokio::test(start_paused = true)]
async fn an_archive_that_turns_out_to_be_lost_does_not_end_the_wait_for_another_one() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    let store = FaultyStore::new();
    let other = testing::archive(&store).await;
    append(&log, &source.frames(5, 3));
    let own = Epoch { number: 2, id: EpochId::from_bytes([7; 16]) };
    let base = source.state().position;
    let (shipper, given_up) = Shipper::new(ShipperParts { epoch: own, ..parts(&archive, &source, &log) });
    tokio::spawn(shipper.to_given_up().run());
    let (shipper, kept) = Shipper::new(ShipperParts { epoch: own, ..parts(&other, &source, &log) });
    tokio::spawn(shipper.run());
    given_up.archived(base.lsn).await.unwrap();
    kept.archived(base.lsn).await.unwrap();
    seal(&archive, base, later(2)).await;
    store.fail("log/", Fault::PutFails, usize::MAX);
    let mut successor = source.taken_over(own);
    log.claim(own).unwrap();
    append(&log, &successor.frames(5, 3));
    let lsn = successor.state().position.lsn;
    let acknowledger = ArchiveAcknowledger::new(vec![given_up.clone(), kept]);
    let acknowledged = tokio::spawn(async move { acknowledger.acknowledged(lsn, LONG).await });
    // Whoever looks at any moment is told of no fence: a node that is fenced remembers that for ever.
    let lost = given_up.archived(lsn).await;
    let Err(Some(end)) = lost else { panic!("{lost:?}") };
    assert!(matches!(end, ShipEnd::Lost(_)) && !end.shows_another_source(), "{end}");
    store.heal();
    acknowledged.await.unwrap().unwrap();
}

/// What `led`, which leads `epoch`, has written besides, in the archive.
async fn ship_besides(archive: &Archive, led: &mut Source, epoch: Epoch) {
    let log = Arc::new(MemoryLog::new(led.base()));
    log.claim(epoch).unwrap();
    append(&log, &[led.large_frame(100)]);
    assert_eq!(ship_all(ShipperParts { epoch, ..parts(archive, led, &log) }).await, ShipEnd::Reached);
}

/// The fear: somebody took over through an archive that was given up and wrote a little, in an epoch that came to nothing; that archive answers again, and
/// the source takes it for one of a successor: no fsync succeeds any more.
#[tokio::test]
async fn what_another_one_wrote_into_an_archive_that_was_given_up_ends_shipping_and_no_acknowledging() {
    for (is_given_up, has_led) in [(true, false), (false, false), (true, true)] {
        let Scene { archive, mut source, log, .. } = Scene::new().await;
        append(&log, &source.frames(5, 3));
        assert_eq!(ship_all(parts(&archive, &source, &log)).await, ShipEnd::Reached);
        let base = source.state().position;
        seal(&archive, base, later(2)).await;
        let mut before = source.taken_over(later(2));
        let mut other = source.taken_over(later(2));
        let (mut successor, own) = match has_led {
            // What comes behind the seal here is of the source before this one, which went on.
            true => {
                log.claim(later(2)).unwrap();
                append(&log, &before.frames(1, 3));
                (before.taken_over(later(3)), later(3))
            }
            false => (source.taken_over(later(3)), later(3)),
        };
        ship_besides(&archive, &mut other, later(2)).await;
        log.claim(own).unwrap();
        append(&log, &successor.frames(5, 3));
        let (shipper, handle) = Shipper::new(ShipperParts { epoch: own, ..parts(&archive, &source, &log) });
        let shipper = if is_given_up { shipper.to_given_up() } else { shipper };
        tokio::spawn(shipper.run());
        let ended = handle.archived(successor.state().position.lsn).await;
        let Err(Some(end)) = ended else { panic!("{is_given_up} {has_led}: {ended:?}") };
        let is_lost = matches!(&end, ShipEnd::Lost(sealed) if sealed.next == later(2));
        assert_eq!(is_lost, is_given_up && !has_led, "{end}");
        assert_eq!(end.shows_another_source(), !is_lost, "{end}");
    }
}

/// The fear: the store answers once with an error while it is found out whose the end is, and no fsync succeeds before the source starts again.
#[tokio::test]
async fn whose_the_end_of_an_archive_is_that_was_given_up_is_asked_again() {
    let Scene { store, archive, mut source, log } = Scene::new().await;
    append(&log, &source.frames(5, 3));
    assert_eq!(ship_all(parts(&archive, &source, &log)).await, ShipEnd::Reached);
    seal(&archive, source.state().position, later(2)).await;
    let mut other = source.taken_over(later(2));
    let mut successor = source.taken_over(later(3));
    ship_besides(&archive, &mut other, later(2)).await;
    log.claim(later(3)).unwrap();
    append(&log, &successor.frames(5, 3));
    let (shipper, handle) = Shipper::new(ShipperParts { epoch: later(3), ..parts(&archive, &source, &log) });
    let shipper = shipper.to_given_up();
    store.fail("", Fault::GetFails, usize::MAX);
    let forked = ShipEnd::Forked { url: archive.url().to_owned(), lsn: successor.state().position.lsn };
    let asked = forked.clone();
    let ended = tokio::spawn(async move { shipper.end_of_given_up(asked).await });
    // Until that is known nothing is acknowledged.
    let Err(Some(end)) = handle.archived(successor.state().position.lsn).await else { panic!("it ends") };
    assert_eq!(end, forked);
    store.heal();
    let end = ended.await.unwrap();
    assert!(matches!(&end, ShipEnd::Lost(sealed) if sealed.next == later(2)), "{end}");
}

/// The same where all that it has besides is of the source before: that one may have acknowledged it, and may go on.
#[tokio::test]
async fn what_the_source_before_wrote_into_an_archive_that_was_given_up_is_not_passed_over() {
    let Scene { archive, mut source, log, .. } = Scene::new().await;
    append(&log, &source.frames(5, 3));
    let mut successor = source.taken_over(later(2));
    let more = Arc::new(MemoryLog::new(source.base()));
    more.claim(source.base().position.epoch).unwrap();
    for frame in log.read(log.first()).unwrap().map(Result::unwrap).chain(source.frames(40, 3)) {
        append(&more, &[frame]);
    }
    assert_eq!(ship_all(parts(&archive, &source, &more)).await, ShipEnd::Reached);
    log.claim(later(2)).unwrap();
    append(&log, &successor.frames(5, 3));
    let parts = ShipperParts { epoch: later(2), ..parts(&archive, &source, &log) };
    let (shipper, handle) = Shipper::new(parts);
    tokio::spawn(shipper.to_given_up().run());
    let Err(Some(end)) = handle.archived(successor.state().position.lsn).await else { panic!("it ends") };
    assert!(matches!(end, ShipEnd::Ahead { .. }) && end.shows_another_source(), "{end}");
}
