//! A source that has forgotten what its archive holds, and copies of a source that lost.

use std::time::Duration;

use murphy_fs::{AcknowledgeError, Acknowledger, Fence, FenceError, ObjectBlockStore};
use murphy_log::{EpochId, Frame, LogTime, MemoryLog, NodeId};

use super::*;
use crate::{
    acknowledge::ArchiveAcknowledger,
    descriptor::ArchiveKind,
    fence::ArchiveFence,
    registry::Record,
    ship::{NoCursor, ShipEnd, ShipHandle, ShipLimits, Shipper, ShipperParts},
    testing::{FaultyStore, Loss, Source, TestClock, append, archive, archive_of, put},
};

const NODE: NodeId = NodeId::from_bytes([7; 16]);

/// A log of the source's first epoch that holds these frames.
fn logged(frames: &[Frame]) -> Arc<MemoryLog> {
    let base = Source::new().base();
    let log = MemoryLog::new(base);
    log.claim(base.position.epoch).unwrap();
    append(&log, frames);
    Arc::new(log)
}

fn shipper(archive: &Archive, log: &Arc<MemoryLog>) -> (Shipper, ShipHandle) {
    Shipper::new(parts(archive, log))
}

fn parts(archive: &Archive, log: &Arc<MemoryLog>) -> ShipperParts {
    ShipperParts {
        archive: archive.clone(),
        log: Arc::clone(log) as Arc<dyn Log>,
        packs: Arc::new(ObjectBlockStore::in_memory()),
        node: NODE,
        epoch: log.tail().position.epoch,
        known: None,
        cursor: Arc::new(NoCursor),
        clock: Arc::new(TestClock::new()),
        limits: ShipLimits { slot_age: Duration::ZERO, ..ShipLimits::default() },
        lost: None,
    }
}

async fn ship(archive: &Archive, log: &Arc<MemoryLog>) -> ShipEnd {
    shipper(archive, log).0.run_to(log.tail().position.lsn).await
}

async fn abandon(archive: &Archive, slot: &Frame, turn: u32) {
    let record = Record::Abandoned { epoch: slot.epoch().number, first: slot.first().get(), turn };
    Registry::new(archive.clone()).append(NODE, LogTime::default(), record).await.unwrap();
}

fn is_stray(end: &ShipEnd, frame: &Frame) -> bool {
    let name = layout::slot(frame.epoch().number, frame.first());
    matches!(end, ShipEnd::Stray { stray, .. } if stray.object.contains(&name) && end.to_string().contains(&name))
}

/// Eight frames of two entries, and an archive that has got each as a slot of its own.
struct Scene {
    store: FaultyStore,
    archive: Archive,
    source: Source,
    frames: Vec<Frame>,
}

impl Scene {
    async fn new() -> Scene {
        let (store, mut source) = (FaultyStore::new(), Source::new());
        let archive = archive(&store).await;
        let frames = source.frames(8, 2);
        for frame in &frames {
            put(&store, std::slice::from_ref(frame)).await;
        }
        Scene { store, archive, source, frames }
    }

    /// The archive loses the slot of frame `at`.
    async fn lose(&self, at: usize) {
        self.store.remove(&layout::slot(1, self.frames[at].first())).await;
    }
}

/// What the directory holds that was put back, and what it has decided since.
fn gone_on_from(kept: &[Frame], count: usize) -> Vec<Frame> {
    let mut source = Source::new();
    let again = source.frames(kept.len(), 2);
    assert_eq!(again.last().map(Frame::position), kept.last().map(Frame::position));
    source.wait(7);
    again.into_iter().chain(source.frames(count, 2)).collect()
}

/// The fear: a directory is put back to an earlier state, the archive has lost a slot, and the source acknowledges on: what was acknowledged
/// before lies behind the lost slot and is forgotten.
#[tokio::test(start_paused = true)]
async fn a_source_that_went_back_does_not_ship_while_its_archive_holds_more_behind_a_lost_slot() {
    for lost in [2, 3] {
        let scene = Scene::new().await;
        scene.lose(lost).await;
        let before = scene.store.names().await;
        // It has decided nothing since, or the same number of entries again, or more than it had then.
        for more in [0, 1, 9] {
            let log = logged(&gone_on_from(&scene.frames[..4], more));
            let end = ship(&scene.archive, &log).await;
            assert!(is_stray(&end, &scene.frames[7]), "{lost}, {more}: {end}");
            let (running, handle) = shipper(&scene.archive, &log);
            let running = tokio::spawn(running.run());
            let acknowledger = ArchiveAcknowledger::new(vec![handle]);
            let lsn = log.tail().position.lsn.next();
            let refused = acknowledger.acknowledged(lsn, Duration::from_secs(5)).await;
            assert!(matches!(refused, Err(AcknowledgeError::Fenced(_))), "{lost}, {more}: {refused:?}");
            assert!(is_stray(&running.await.unwrap(), &scene.frames[7]));
        }
        assert_eq!(scene.store.names().await, before, "something was shipped");
    }
}

/// The same when the slot is there and cannot be read.
#[tokio::test(start_paused = true)]
async fn a_source_that_went_back_does_not_ship_past_a_damaged_slot() {
    let scene = Scene::new().await;
    let name = layout::slot(1, scene.frames[3].first());
    scene.store.overwrite(&name, bytes::Bytes::from_static(b"MurSlot\0 that has rotted")).await;
    let end = ship(&scene.archive, &logged(&gone_on_from(&scene.frames[..4], 0))).await;
    assert!(is_stray(&end, &scene.frames[7]), "{end}");
    // A source that has everything waits for somebody to see to the slot; no archive keeps it from serving.
    let whole: Arc<dyn Log> = logged(&scene.frames);
    let reached = reach(&scene.archive, None, whole.tail().position.epoch, &whole).await.unwrap();
    assert_eq!(reached.strays, []);
}

/// What nobody can read behind the log may be anything.
#[tokio::test(start_paused = true)]
async fn a_damaged_slot_behind_the_log_is_a_stray_and_one_within_it_is_not() {
    let scene = Scene::new().await;
    scene.lose(3).await;
    for at in 4..8 {
        let name = layout::slot(1, scene.frames[at].first());
        scene.store.overwrite(&name, bytes::Bytes::from_static(b"MurSlot\0rotten")).await;
    }
    let end = ship(&scene.archive, &logged(&scene.frames[..4])).await;
    assert!(is_stray(&end, &scene.frames[7]), "{end}");
    let whole: Arc<dyn Log> = logged(&scene.frames);
    let walked = walk(&scene.archive, None).await.unwrap();
    let reached = strays(&scene.archive, &walked, whole.tail().position.epoch, &whole).await.unwrap();
    assert_eq!((reached.end, reached.is_continued, reached.strays), (walked.end, true, Vec::new()));
}

/// The archive did not answer while the source that was put back wrote more than it had lost: it is not ahead any more, and not continued.
#[tokio::test(start_paused = true)]
async fn a_log_that_has_gone_on_past_the_end_of_its_archive_without_it_is_found_out() {
    let scene = Scene::new().await;
    let epoch = scene.source.base().position.epoch;
    for (more, is_continued) in [(0, false), (9, false)] {
        let log: Arc<dyn Log> = logged(&gone_on_from(&scene.frames[..4], more));
        let found = reach(&scene.archive, None, epoch, &log).await.unwrap();
        assert_eq!((found.is_continued, found.strays.len()), (is_continued, 0), "{more}");
    }
    let log: Arc<dyn Log> = logged(&scene.frames);
    assert!(reach(&scene.archive, None, epoch, &log).await.unwrap().is_continued);
    // In an epoch that is over it is another one's matter.
    let later = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let log: Arc<dyn Log> = logged(&gone_on_from(&scene.frames[..4], 9));
    assert!(reach(&scene.archive, None, later, &log).await.unwrap().is_continued);
}

/// The fear: a source that has lost nothing is kept from starting by what an earlier process of it left behind.
#[tokio::test(start_paused = true)]
async fn a_source_that_has_everything_fills_the_hole_and_goes_on() {
    let mut scene = Scene::new().await;
    scene.lose(3).await;
    // Cut otherwise by an earlier process, and landed late.
    put(&scene.store, &scene.frames[4..7]).await;
    let mut all = scene.frames.clone();
    all.extend(scene.source.frames(2, 2));
    assert_eq!(ship(&scene.archive, &logged(&all)).await, ShipEnd::Reached);
    let end = walk(&scene.archive, None).await.unwrap().end;
    assert_eq!(end.position, scene.source.state().position);
}

/// The fear: the successor's seal is lost, or what led to it, and the source that was replaced goes on.
#[tokio::test(start_paused = true)]
async fn a_seal_that_nothing_leads_to_fences_and_so_does_a_later_epoch() {
    let scene = Scene::new().await;
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let fence = ArchiveFence::new(scene.archive.clone(), NODE, Arc::new(TestClock::new()), None);
    fence.seal(scene.source.state().position, next).await.unwrap();
    let mut successor = scene.source.taken_over(next);
    let shipped = successor.frames(1, 2);
    put(&scene.store, &shipped).await;
    scene.lose(6).await;
    for held in [6, 8] {
        let end = ship(&scene.archive, &logged(&scene.frames[..held])).await;
        assert!(matches!(&end, ShipEnd::Fenced(sealed) if sealed.next == next), "{held}: {end}");
    }
    // Nobody else seals in front of it, and its own seal that was lost is made good.
    let before = walk(&scene.archive, None).await.unwrap().end.position;
    let other = Epoch { number: 2, id: EpochId::from_bytes([8; 16]) };
    let refused = fence.seal(before, other).await;
    assert!(matches!(&refused, Err(FenceError::Sealed(sealed)) if sealed.next == next), "{refused:?}");
    scene.store.remove(&layout::slot(1, scene.source.state().position.lsn.next())).await;
    let end = ship(&scene.archive, &logged(&scene.frames)).await;
    assert!(is_stray(&end, &shipped[0]), "{end}");
    put(&scene.store, &scene.frames[6..7]).await;
    let refused = fence.seal(scene.source.state().position, other).await;
    assert!(matches!(&refused, Err(FenceError::Unavailable { .. })), "{refused:?}");
    fence.seal(scene.source.state().position, next).await.unwrap();
    let end = walk(&scene.archive, None).await.unwrap().end;
    assert_eq!((end.position, end.epoch), (successor.state().position, next));
}

/// The fear: the seal of a successor has rotted, or what leads to it is gone as well, it lies within what the source before has decided meanwhile
/// and is taken for a slot of its own: the source goes on and acknowledges what nobody will ever read.
#[tokio::test(start_paused = true)]
async fn a_seal_that_cannot_be_read_lets_nobody_ship_or_acknowledge() {
    for lost in [Some(6), None] {
        for rot in [Rot::Bit(100), Rot::Bit(2), Rot::Cut(100), Rot::Cut(5), Rot::Cut(0)] {
            let scene = Scene::new().await;
            let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
            let fence = ArchiveFence::new(scene.archive.clone(), NODE, Arc::new(TestClock::new()), None);
            fence.seal(scene.source.state().position, next).await.unwrap();
            let name = layout::slot(1, scene.source.state().position.lsn.next());
            let mut seal = scene.archive.store().get(&name, 1000).await.unwrap().to_vec();
            match rot {
                Rot::Bit(at) => seal[at] ^= 1,
                Rot::Cut(at) => seal.truncate(at),
            }
            scene.store.overwrite(&name, seal.into()).await;
            if let Some(at) = lost {
                scene.lose(at).await;
            }
            let before = scene.store.names().await;
            // The source has gone on past the seal.
            let log = logged(&gone_on_from(&scene.frames, 3));
            let end = tokio::time::timeout(Duration::from_secs(60), ship(&scene.archive, &log)).await;
            let end = end.expect("shipping to such an archive ends");
            let is_told = matches!(&end, ShipEnd::BrokenSeal { object, .. } if object.contains(&name));
            assert!(is_told && end.to_string().contains(&name), "{lost:?}, {rot:?}: {end}");
            let (running, handle) = shipper(&scene.archive, &log);
            let running = tokio::spawn(running.run());
            let lsn = log.tail().position.lsn;
            let refused =
                ArchiveAcknowledger::new(vec![handle]).acknowledged(lsn, Duration::from_secs(5)).await;
            assert!(matches!(refused, Err(AcknowledgeError::Fenced(_))), "{lost:?}, {rot:?}: {refused:?}");
            running.await.unwrap();
            assert_eq!(scene.store.names().await, before, "something was shipped");
        }
    }
}

/// What the node has noted as archived was its own slot, whatever is left of it: nobody gives up an archive because of that. Behind the note an object
/// that is short, or empty, may be the seal of a successor. Slots behind it tell nothing: several are under way at a time, and the seal goes where
/// the first one is not there yet.
#[tokio::test(start_paused = true)]
async fn an_object_that_was_torn_is_told_from_a_seal_by_the_saved_cursor_and_by_nothing_else() {
    for left in [0, 5, 184] {
        let mut scene = Scene::new().await;
        let torn = layout::slot(1, scene.frames[3].first());
        scene.store.overwrite(&torn, vec![0; left].into()).await;
        let mut frames = scene.frames.clone();
        frames.extend(scene.source.frames(1, 2));
        let log = logged(&frames);
        let from = async |noted: Option<usize>| {
            let known = noted.map(|at| Boundary::after(frames[at].position()));
            let (shipper, _handle) = Shipper::new(ShipperParts { known, ..parts(&scene.archive, &log) });
            shipper.run_to(log.tail().position.lsn).await
        };
        for noted in [None, Some(0), Some(2)] {
            let end = from(noted).await;
            let is_told = matches!(&end, ShipEnd::BrokenSeal { object, .. } if object.contains(&torn));
            assert!(is_told, "{left}, {noted:?}: {end}");
        }
        assert_eq!(from(Some(3)).await, ShipEnd::Reached, "{left}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Rot {
    Bit(usize),
    Cut(usize),
}

/// The fear: the seal of the successor is lost, what it has shipped cannot be read, and the source that was replaced takes that for objects of
/// its own that have rotted, because its log reaches further: it goes on.
#[tokio::test(start_paused = true)]
async fn a_damaged_slot_of_a_later_epoch_is_not_explained_by_the_own_log() {
    let scene = Scene::new().await;
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let shipped = scene.source.taken_over(next).frames(1, 2);
    let log: Arc<dyn Log> = logged(&scene.frames);
    let own = log.tail().position.epoch;
    // The successor began behind everything, or in the middle of what the old source has gone on to.
    let firsts = [&scene.frames[0], &scene.frames[5], &shipped[0]].map(Frame::first);
    for (first, damaged) in firsts.iter().flat_map(|first| [(first, true), (first, false)]) {
        let name = layout::slot(next.number, *first);
        let bytes = match damaged {
            true => bytes::Bytes::from_static(b"MurSlot\0 that has rotted"),
            false => bytes::Bytes::new(),
        };
        scene.store.overwrite(&name, bytes).await;
        let found = reach(&scene.archive, None, own, &log).await.unwrap();
        let [stray] = &found.strays[..] else { panic!("{first}: {:?}", found.strays) };
        assert!(matches!(stray.kind, StrayKind::Damaged(_)) && stray.object.contains(&name), "{stray}");
        let end = ship(&scene.archive, &logged(&scene.frames)).await;
        assert!(
            matches!(&end, ShipEnd::Stray { stray, .. } if stray.object.contains(&name)),
            "{first}: {end}"
        );
        scene.store.remove(&name).await;
    }
    assert_eq!(ship(&scene.archive, &logged(&scene.frames)).await, ShipEnd::Reached);
}

/// The same of a slot to which its seal leads: the walk does not end before it as if nothing followed.
#[tokio::test(start_paused = true)]
async fn a_walk_does_not_end_well_before_a_damaged_slot_of_a_later_epoch() {
    let scene = Scene::new().await;
    let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
    let fence = ArchiveFence::new(scene.archive.clone(), NODE, Arc::new(TestClock::new()), None);
    fence.seal(scene.source.state().position, next).await.unwrap();
    let mut successor = scene.source.taken_over(next);
    let shipped = successor.frames(2, 2);
    put(&scene.store, &shipped[..1]).await;
    put(&scene.store, &shipped[1..]).await;
    let name = layout::slot(next.number, shipped[0].first());
    scene.store.overwrite(&name, bytes::Bytes::from_static(b"MurSlot\0 that has rotted")).await;
    let walked = walk(&scene.archive, None).await;
    assert!(matches!(&walked, Err(WalkError::Damaged { .. })), "{walked:?}");
    // Neither the one that was replaced nor the successor goes on past it; the first hears of the seal.
    let replaced = ship(&scene.archive, &logged(&scene.frames)).await;
    assert!(matches!(&replaced, ShipEnd::Fenced(sealed) if sealed.next == next), "{replaced}");
    let own: Arc<dyn Log> = logged(&scene.frames);
    let found = reach(&scene.archive, None, own.tail().position.epoch, &own).await.unwrap();
    assert!(found.seal().is_some_and(|seal| seal.next == next), "{:?}", found.strays);
}

/// The fear: a copy of the directory ran, and its slots are taken for what this source has forgotten for ever. People say what they are.
#[tokio::test(start_paused = true)]
async fn what_people_have_given_up_is_passed_over_also_by_a_shipper_that_runs() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut common = Source::new();
    let shared = common.frames(2, 2);
    put(&store, &shared).await;
    let epoch = common.base().position.epoch;
    let (mut winner, mut copy) = (common.taken_over(epoch), common.taken_over(epoch));
    copy.wait(5);
    let lost = copy.frames(4, 2);
    // Right behind what the winner has, and further on, where the winner will come to; its own first one never arrived.
    put(&store, &lost[1..2]).await;
    put(&store, &lost[2..3]).await;
    let won = winner.frames(1, 2);
    put(&store, &won).await;
    let all = |more: &[Frame]| [&shared[..], &won[..], more].concat();
    let more = winner.frames(3, 2);
    let refused = ship(&archive, &logged(&all(&more))).await;
    assert!(is_stray(&refused, &lost[2]), "{refused}");
    abandon(&archive, &lost[1], 0).await;
    let refused = ship(&archive, &logged(&all(&more))).await;
    assert!(is_stray(&refused, &lost[2]), "one is left: {refused}");
    abandon(&archive, &lost[2], 0).await;
    let log = logged(&all(&more[..1]));
    let (running, handle) = shipper(&archive, &log);
    let running = tokio::spawn(running.run());
    handle.archived(more[0].last()).await.unwrap();
    append(&log, &more[1..]);
    handle.archived(more[2].last()).await.unwrap();
    running.abort();
    let walked = walk(&archive, None).await.unwrap();
    assert_eq!((walked.end.position, walked.dead.len()), (winner.state().position, 2));
    // The next start believes its own chain, and the copy's log is still turned away.
    assert_eq!(ship(&archive, &logged(&all(&more))).await, ShipEnd::Reached);
    let refused = ship(&archive, &logged(&[&shared[..], &lost[..]].concat())).await;
    assert!(matches!(refused, ShipEnd::Forked { .. }), "{refused}");
}

/// The fear: right after a slot was given up the source ships behind it, and whoever walks meanwhile from where it has been before takes what
/// came for another history: a shipper ends for good, a promotion is refused.
#[tokio::test(start_paused = true)]
async fn who_walks_past_a_dead_slot_while_somebody_ships_sees_no_fork() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut source = Source::new();
    put(&store, &source.frames(2, 2)).await;
    let mut copy = source.taken_over(source.base().position.epoch);
    copy.wait(5);
    put(&store, &source.frames(1, 2)).await;
    let cursor = Boundary::after(source.state().position);
    let lost = copy.frames(2, 2);
    store.overwrite(&cursor.slot_name(), encoded(&lost[1..], &cursor)).await;
    let shipped = source.frames(1, 2);
    let behind = Boundary { turn: 1, ..cursor };
    store.overwrite(&behind.slot_name(), encoded(&shipped, &cursor)).await;
    let before = Boundary::after(source.state().position);
    let arriving = source.frames(1, 2);
    let (after, bytes) = (Boundary::after(source.state().position), encoded(&arriving, &before));
    let mut ends = [0, 0];
    for requests in 1.. {
        store.remove(&before.slot_name()).await;
        let arrival = Loss::arrival(requests, &store, &before.slot_name(), bytes.clone());
        store.lose(Some(arrival.clone()));
        let walked = walk(&archive, Some(cursor)).await;
        store.lose(None);
        let walked = walked.unwrap_or_else(|error| panic!("request {requests}: {error}"));
        assert_eq!((walked.start, walked.dead.len()), (cursor, 1), "request {requests}");
        assert!([before, after].contains(&walked.end), "request {requests}: {:?}", walked.end);
        ends[usize::from(walked.end == after)] += 1;
        if !arrival.has_come() {
            break;
        }
    }
    assert!(ends[0] > 0 && ends[1] > 2, "{ends:?}");
    // From where the copy has been it is one.
    store.overwrite(&before.slot_name(), bytes).await;
    let refused = walk(&archive, Some(Boundary::after(lost[1].position()))).await;
    assert!(matches!(refused, Err(WalkError::Fork { .. })), "{refused:?}");
}

/// The fear: a dead slot with a seal under the next name of its place is lost while the source runs. Its put under the free name succeeds,
/// and it acknowledges what its successor never sees.
#[tokio::test(start_paused = true)]
async fn a_name_is_not_won_while_something_lies_under_the_next_one_of_its_place() {
    for is_sealed in [true, false] {
        let store = FaultyStore::new();
        let archive = archive(&store).await;
        let mut source = Source::new();
        let frames = source.frames(2, 2);
        let log = logged(&frames);
        let (running, handle) = shipper(&archive, &log);
        let running = tokio::spawn(running.run());
        handle.archived(frames[1].last()).await.unwrap();
        // A copy's slot, and behind it what somebody else has made of it; then the copy's slot is gone.
        let mut copy = source.taken_over(source.base().position.epoch);
        copy.wait(5);
        let lost = copy.frames(2, 2);
        let place = Boundary::after(source.state().position);
        let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
        if is_sealed {
            let dead = encoded(&lost[1..], &place);
            store.overwrite(&place.slot_name(), dead).await;
            let fence = ArchiveFence::new(archive.clone(), NODE, Arc::new(TestClock::new()), None);
            fence.seal(place.position, next).await.unwrap();
            store.remove(&place.slot_name()).await;
        } else {
            let behind = Boundary { turn: 1, ..place };
            store.overwrite(&behind.slot_name(), encoded(&lost[..1], &place)).await;
        }
        let mine = source.frames(1, 2);
        append(&log, &mine);
        let end = running.await.unwrap();
        match is_sealed {
            true => assert!(matches!(&end, ShipEnd::Fenced(sealed) if sealed.next == next), "{end}"),
            false => assert!(matches!(&end, ShipEnd::Forked { .. }), "{end}"),
        }
        let acknowledger = ArchiveAcknowledger::new(vec![handle]);
        let refused = acknowledger.acknowledged(mine[0].last(), Duration::from_secs(5)).await;
        assert!(matches!(refused, Err(AcknowledgeError::Fenced(_))), "{refused:?}");
        // What its put has covered up is seen at the next start.
        let again = ship(&archive, &log).await;
        assert!(again.shows_another_source(), "{again}");
    }
}

/// The frames as a slot that claims to lie at `place`.
fn encoded(frames: &[Frame], place: &Boundary) -> bytes::Bytes {
    let bytes = crate::slot::encode_slot(Source::new().lineage(), NODE, frames).unwrap();
    if frames[0].first() == place.next() {
        return bytes;
    }
    // Another history that has come to the same place.
    let mut other = Source::new();
    other.wait(9);
    let count = place.position.lsn.get() as usize - 1;
    other.frames(1, count);
    crate::slot::encode_slot(Source::new().lineage(), NODE, &other.frames(1, 2)).unwrap()
}

/// The fear: what was deleted below a floor is walked to through a dead slot, whose word is another history's.
#[tokio::test(start_paused = true)]
async fn a_walk_from_the_floor_begins_behind_the_dead_slots_of_its_place() {
    let store = FaultyStore::new();
    let archive = archive(&store).await;
    let mut common = Source::new();
    let shared = common.frames(2, 2);
    let epoch = common.base().position.epoch;
    let (mut winner, mut copy) = (common.taken_over(epoch), common.taken_over(epoch));
    copy.wait(5);
    let (won, lost) = (winner.frames(3, 2), copy.frames(3, 2));
    put(&store, &[&shared[..], &won[..1]].concat()).await;
    put(&store, &lost[1..2]).await;
    let place = Boundary { turn: 1, ..Boundary::after(won[0].position()) };
    let kept = crate::slot::encode_slot(Source::new().lineage(), NODE, &won[1..2]).unwrap();
    store.overwrite(&place.slot_name(), kept).await;
    put(&store, &won[2..]).await;
    let end = Boundary::after(winner.state().position);
    assert_eq!(walk(&archive, None).await.unwrap().end, end);
    let floor = Record::Floor { epoch: 1, first: won[1].first().get() };
    Registry::new(archive.clone()).append(NODE, LogTime::default(), floor).await.unwrap();
    store.remove(&layout::slot(1, Lsn::FIRST)).await;
    let walked = walk(&archive, None).await.unwrap();
    assert_eq!((walked.start, walked.end), (place, end));
    // The dead one is lost: nobody can tell what came before, and nobody goes on.
    store.remove(&layout::slot(1, won[1].first())).await;
    assert!(matches!(walk(&archive, None).await, Err(WalkError::Missing { .. })));
}

/// The fear: two copies in networks that are apart have a full archive each, and a log archive that both reach is not asked.
#[tokio::test(start_paused = true)]
async fn a_log_archive_that_two_copies_reach_lets_only_one_of_them_acknowledge() {
    let witness = FaultyStore::new();
    archive_of(&witness, ArchiveKind::Log).await;
    let mut acknowledged = Vec::new();
    for copy in 0..2 {
        let (store, mut source) = (FaultyStore::new(), Source::new());
        source.wait(5 * copy);
        let log = logged(&[]);
        let archives = [archive(&store).await, Archive::open(witness.archive_store()).await.unwrap()];
        let [holder, other] = archives.map(|archive| {
            let (shipper, handle) = shipper(&archive, &log);
            tokio::spawn(shipper.run());
            handle
        });
        append(&log, &source.frames(5, 3));
        let by = ArchiveAcknowledger::new(vec![holder]).with_witnesses(vec![other]);
        acknowledged.push(by.acknowledged(source.state().position.lsn, Duration::from_secs(60)).await);
    }
    let [first, second] = &acknowledged[..] else { panic!("{acknowledged:?}") };
    assert!(first.is_ok() && matches!(second, Err(AcknowledgeError::Fenced(_))), "{acknowledged:?}");
}
