//! Taking over, with a successor that dies at every request, and a source that does not know that it was given up.

use std::time::Duration;

use murphy_fs::ObjectBlockStore;
use murphy_log::{Clock, EpochId, LogTime, ManualClock, MemoryLog};

use super::*;
use crate::fence::{ArchiveFence, Supplies};
use crate::{
    descriptor::{Archive, Descriptor},
    plan::plan_restore,
    seal::Seal,
    ship::{NoCursor, ShipEnd, ShipLimits, Shipper, ShipperParts},
    target::Target,
    testing::{FaultyStore, Life, Loss, Source, TestClock, append, descriptor, put, scene},
};

mod races;

const MIRROR: u8 = 5;

fn node(byte: u8) -> NodeId {
    NodeId::from_bytes([byte; 16])
}

fn fence(archive: &Archive, by: u8) -> ArchiveFence {
    ArchiveFence::new(archive.clone(), node(by), Arc::new(ManualClock::new(LogTime::from_nanos(7))), None)
}

/// A minute passes in which nothing comes into any of the places.
pub(super) async fn seen_silent(fences: &[ArchiveFence]) -> Result<Silence, TakeOverError> {
    let mut held = Vec::new();
    for fence in fences {
        held.push(fence.adopt().await.map_err(|error| at(fence, error))?);
    }
    let clock = Arc::new(ManualClock::new(LogTime::from_nanos(7)));
    let watch = Watch::of(fences.iter().zip(&held), Arc::clone(&clock) as Arc<dyn Clock>);
    clock.advance(2 * SILENCE);
    watch.until_silent(&|_| {}).await
}

fn successor(by: u8, attempts: &[Epoch], given_up: &[u8]) -> Successor {
    let given_up = given_up.iter().map(|byte| node(*byte)).collect();
    Successor { node: node(by), attempts: attempts.to_vec(), given_up }
}

fn epoch(number: u32, byte: u8) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([byte; 16]) }
}

fn parts(archive: &Archive, log: &Arc<MemoryLog>, by: u8) -> ShipperParts {
    ShipperParts {
        archive: archive.clone(),
        log: Arc::clone(log) as Arc<dyn Log>,
        packs: Arc::new(ObjectBlockStore::in_memory()),
        node: node(by),
        epoch: log.tail().position.epoch,
        known: None,
        cursor: Arc::new(NoCursor),
        clock: Arc::new(TestClock::new()),
        limits: ShipLimits { slot_bytes: 900, slot_age: Duration::ZERO, in_flight: 2 },
        lost: None,
    }
}

async fn ship(archive: &Archive, log: &Arc<MemoryLog>, by: u8) -> ShipEnd {
    let last = log.tail().position.lsn;
    Shipper::new(parts(archive, log, by)).0.run_to(last).await
}

/// A source, its archives, and a mirror; everything that a promotion meets.
struct World {
    stores: Vec<FaultyStore>,
    archives: Vec<Archive>,
    source: Source,
    /// Of the source.
    log: Arc<MemoryLog>,
    /// Of the mirror, which is killed and comes back.
    mirror: Arc<MemoryLog>,
    /// What the mirror has remembered on its disk.
    attempts: Vec<Epoch>,
}

impl World {
    /// `shipped[i]` of twelve frames are in archive `i`; the mirror holds `mirrored`.
    async fn new(shipped: &[usize], mirrored: usize) -> World {
        let mut source = Source::new();
        let frames = source.frames(12, 3);
        let claimed = |frames: &[Frame]| {
            let log = MemoryLog::new(Source::new().base());
            log.claim(Source::new().base().position.epoch).unwrap();
            append(&log, frames);
            Arc::new(log)
        };
        let (mut stores, mut archives) = (Vec::new(), Vec::new());
        for (number, count) in shipped.iter().enumerate() {
            let store = FaultyStore::new();
            // What tells archives apart is when they were made.
            let made = Descriptor { created: LogTime::from_nanos(number as u64), ..descriptor() };
            archives.push(Archive::create(store.archive_store(), made).await.unwrap());
            for slot in frames[..*count].chunks(3) {
                put(&store, slot).await;
            }
            stores.push(store);
        }
        let (log, mirror) = (claimed(&frames), claimed(&frames[..mirrored]));
        World { stores, archives, source, log, mirror, attempts: Vec::new() }
    }

    fn places(&self) -> TakeOverLog {
        let supplies = Supplies {
            log: Arc::clone(&self.mirror) as Arc<dyn Log>,
            packs: Arc::new(ObjectBlockStore::in_memory()),
            lost: None,
        };
        let places = self.archives.iter().map(|archive| {
            Arc::new(fence(archive, MIRROR).with_supplies(supplies.clone())) as Arc<dyn Fence>
        });
        let (places, keys) = (places.collect(), self.source.keys().clone());
        TakeOverLog { log: Arc::clone(&self.mirror) as Arc<dyn Log>, keys, places }
    }

    /// A promoter that may die once, and runs again then.
    async fn promote_again_after(&mut self, life: &Life) -> Result<State, TakeOverError> {
        self.live(Some(life));
        let state = self.promote(&[]).await;
        self.live(None);
        if !life.is_over() {
            return state;
        }
        self.restart();
        self.promote(&[]).await
    }

    /// One life of the promoter.
    async fn promote(&mut self, given_up: &[u8]) -> Result<State, TakeOverError> {
        let places = self.places();
        let mut known = vec![self.mirror.tail().position.epoch];
        for place in &places.places {
            known.push(place.adopt().await.map_err(|error| at(&**place, error))?.epoch);
        }
        let fresh = EpochId::from_bytes([40 + self.attempts.len() as u8; 16]);
        let next = Successor::next_epoch(&self.attempts, &known, fresh);
        if self.attempts.last() != Some(&next) {
            self.attempts.push(next);
        }
        let successor = successor(MIRROR, &self.attempts, given_up);
        places.fetch(&successor).await?;
        places.seal(&successor).await?;
        places.begin(&successor).await
    }

    /// The mirror's log begins after frame `count`, as that of a mirror does that was seeded with a snapshot.
    fn begin_mirror_after(&mut self, count: usize) {
        let frames: Vec<Frame> = self.mirror.read(Lsn::FIRST).unwrap().map(Result::unwrap).collect();
        let base = frames[count - 1].state();
        let log = MemoryLog::new(base);
        log.claim(base.position.epoch).unwrap();
        append(&log, &frames[count..]);
        self.mirror = Arc::new(log);
    }

    fn restart(&mut self) {
        self.mirror = Arc::new(self.mirror.reopened());
    }

    fn live(&self, life: Option<&Life>) {
        for store in &self.stores {
            store.live(life.cloned());
        }
    }

    fn lose(&self, loss: Option<&Loss>) {
        for store in &self.stores {
            store.lose(loss.cloned());
        }
    }

    /// Every slot and seal, with the number of its archive.
    async fn logged(&self) -> Vec<(usize, String)> {
        let mut logged = Vec::new();
        for (number, store) in self.stores.iter().enumerate() {
            let names = store.names().await.into_iter().filter(|name| name.starts_with("log/"));
            logged.extend(names.map(|name| (number, name)));
        }
        logged
    }

    /// The bases of all seals, reached by a walk or not.
    async fn sealed_at(&self) -> Vec<Lsn> {
        let mut bases = Vec::new();
        for (number, name) in self.logged().await {
            let bytes = self.archives[number].store().get(&name, 1 << 20).await.unwrap();
            bases.extend(Seal::decode(&bytes).ok().map(|seal| seal.base.lsn));
        }
        bases
    }

    /// How a successor with a restored tree and no log takes over: what it takes over with, twelve frames.
    async fn restored(&self) -> (Vec<ArchiveFence>, Position) {
        let fences = self.archives.iter().map(|archive| fence(archive, 8)).collect();
        (fences, self.log.tail().position)
    }

    async fn take_over_restored(
        &self,
        fences: &[ArchiveFence],
        base: Position,
    ) -> Result<Lsn, TakeOverError> {
        let silence = seen_silent(fences).await;
        take_over_at(fences, (&successor(8, &[epoch(2, 80)], &[]), None), base, silence.ok().as_ref()).await
    }

    /// The new source goes on, ships, and its archives restore to one history, which has everything up to `kept` of the old one.
    async fn assert_good(&mut self, state: State, kept: Position, context: &str) {
        assert!(state.position.lsn >= kept.lsn, "{context}: {} is lost, it ends at {}", kept, state.position);
        let next = *self.attempts.last().unwrap();
        let mut appender = Appender::new(self.source.keys().clone(), next, self.mirror.tail());
        let time = self.source.now();
        for _ in 0..4 {
            let entry = murphy_log::Entry::tick(appender.state().position.lsn.next(), time);
            appender.push(&entry, state.digest, state.usage).unwrap();
            append(&self.mirror, &[appender.close(time, state.position.lsn).unwrap()]);
        }
        let frames: Vec<Frame> = self.mirror.read(Lsn::FIRST).unwrap().map(Result::unwrap).collect();
        let of_kept = frames.iter().find(|frame| frame.last() == kept.lsn).map(|frame| frame.position().hash);
        assert_eq!(of_kept, Some(kept.hash), "{context}");
        for archive in &self.archives {
            assert_eq!(ship(archive, &self.mirror, MIRROR).await, ShipEnd::Reached, "{context}");
        }
        let end = self.mirror.tail().position;
        let none = BTreeSet::new();
        let zone = jiff::tz::TimeZone::UTC;
        let alone = self.archives.iter().map(|archive| vec![archive.clone()]);
        for archives in alone.chain([self.archives.clone()]) {
            let plan = plan_restore(&archives, Target::Latest, &none, &zone).await.unwrap();
            assert_eq!(plan.route.end, end, "{context}: {:?}", plan.problems);
        }
        // The source that was given up hears of it wherever it ships to.
        let more = self.source.frames(2, 1);
        append(&self.log, &more);
        for archive in &self.archives {
            let end = ship(archive, &self.log, 1).await;
            assert!(
                matches!(end, ShipEnd::Fenced(_) | ShipEnd::Ahead { .. } | ShipEnd::Forked { .. }),
                "{end}"
            );
        }
    }
}

/// The fear: a promoter dies between two requests, and nobody can take over any more, or two have.
#[tokio::test(start_paused = true)]
async fn a_promoter_that_dies_at_any_request_ends_well_when_it_runs_again() {
    let cases = [(vec![6, 9], 12), (vec![12, 3], 6), (vec![9], 9), (vec![3, 12, 6], 9)];
    for (shipped, mirrored) in cases {
        let tries = (1..).map(|requests| (requests, requests % 2 == 0));
        for (requests, last_put_lands) in tries {
            let context = format!("{shipped:?} {mirrored}, dead at request {requests}");
            let mut world = World::new(&shipped, mirrored).await;
            let kept = world.log.read(Lsn::FIRST).unwrap().map(Result::unwrap).map(|frame| frame.position());
            let kept: Vec<Position> = kept.collect();
            let kept = kept[mirrored.max(*shipped.iter().max().unwrap()) - 1];
            let life = Life::of(requests, last_put_lands);
            world.live(Some(&life));
            let first = world.promote(&[]).await;
            world.live(None);
            if !life.is_over() {
                world.assert_good(first.unwrap(), kept, &context).await;
                break;
            }
            world.restart();
            let state = world.promote(&[]).await.unwrap_or_else(|error| panic!("{context}: {error}"));
            assert_eq!(world.attempts.len(), 1, "{context}: what was remembered is used");
            world.assert_good(state, kept, &context).await;
        }
    }
}

/// The fear: one archive is sealed, the source gets a slot into the other one and acknowledges it, and the promotion forgets it.
#[tokio::test(start_paused = true)]
async fn what_was_archived_between_two_seals_goes_on_in_the_new_epoch() {
    for requests in 1.. {
        let mut world = World::new(&[6, 6], 6).await;
        let all = world.log.tail().position;
        let places = world.places();
        world.attempts.push(epoch(2, 40));
        let promoter = successor(MIRROR, &world.attempts, &[]);
        places.fetch(&promoter).await.unwrap();
        let first = TakeOverLog { places: places.places[..1].to_vec(), ..places.clone() };
        first.seal(&promoter).await.unwrap();
        assert_eq!(ship(&world.archives[1], &world.log, 1).await, ShipEnd::Reached);
        let life = Life::of(requests, requests % 2 == 0);
        let state = world.promote_again_after(&life).await.unwrap();
        assert_eq!((state.position.lsn, state.position.hash), (all.lsn, all.hash));
        assert_eq!(state.position.epoch, epoch(2, 40), "the same entries, in the epoch of the successor");
        world.assert_good(state, all, &format!("raced, dead at request {requests}")).await;
        if !life.is_over() {
            break;
        }
    }
}

/// A mirror that was seeded with a snapshot has no entries from before it, and an archive may lack them: another one has them.
#[tokio::test(start_paused = true)]
async fn an_archive_that_ends_before_a_seeded_log_begins_is_brought_up_from_another_one() {
    for requests in 1.. {
        let context = format!("dead at request {requests}");
        let mut world = World::new(&[3, 12, 6], 12).await;
        world.begin_mirror_after(9);
        let life = Life::of(requests, requests % 2 == 0);
        let state = world.promote_again_after(&life).await;
        let end = state.unwrap_or_else(|error| panic!("{context}: {error}")).position;
        let (none, zone) = (BTreeSet::new(), jiff::tz::TimeZone::UTC);
        for archive in &world.archives {
            let held = fence(archive, MIRROR).adopt().await.unwrap();
            assert_eq!((held.end.lsn, held.end.hash), (end.lsn, end.hash), "{context}");
            assert_eq!(held.epoch, *world.attempts.last().unwrap(), "{context}: sealed");
            let plan = plan_restore(std::slice::from_ref(archive), Target::Latest, &none, &zone).await;
            assert_eq!(plan.unwrap().route.end.lsn, end.lsn, "{context}");
        }
        if !life.is_over() {
            break;
        }
    }
}

/// Nobody has what lies between: that is said, and nothing is sealed there.
#[tokio::test(start_paused = true)]
async fn an_archive_that_nobody_can_bring_up_is_named() {
    let mut world = World::new(&[12, 3], 12).await;
    world.begin_mirror_after(9);
    world.stores[0].remove(&crate::layout::slot(1, Lsn::new(11))).await;
    let refused = world.promote(&[]).await.unwrap_err().to_string();
    assert!(refused.contains("ends at lsn 10") && refused.contains("up to lsn 28"), "{refused}");
    for archive in &world.archives {
        assert!(fence(archive, MIRROR).adopt().await.unwrap().seals.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_seal_of_somebody_else_stops_everything_and_is_named() {
    let mut world = World::new(&[12, 12], 12).await;
    let base = world.log.tail().position;
    fence(&world.archives[1], 9).seal(base, epoch(2, 90)).await.unwrap();
    let names = world.stores[0].names().await;
    let refused = world.promote(&[]).await.unwrap_err().to_string();
    assert!(refused.contains(&node(9).to_string()) && refused.contains("test://store"), "{refused}");
    assert_eq!(world.stores[0].names().await, names, "nothing was sealed");
    // It has sealed and died for good.
    let state = world.promote(&[9]).await.unwrap();
    assert_eq!(state.position.epoch.number, 1, "nothing was appended yet");
    assert_eq!(world.attempts.last().unwrap().number, 3);
    world.assert_good(state, base, "given up").await;
}

/// What a node holds beyond somebody's seal has lost, even if that somebody is given up.
#[tokio::test(start_paused = true)]
async fn a_lost_tail_does_not_become_history_again() {
    let mut world = World::new(&[6], 12).await;
    let held = fence(&world.archives[0], 9).adopt().await.unwrap();
    fence(&world.archives[0], 9).seal(held.end, epoch(2, 90)).await.unwrap();
    for given_up in [&[][..], &[9]] {
        let refused = world.promote(given_up).await.unwrap_err();
        assert!(matches!(&refused, TakeOverError::Fence { error: FenceError::Sealed(_), .. }), "{refused}");
    }
}

/// The successor of a successor that was given up has what that one archived.
#[tokio::test(start_paused = true)]
async fn what_a_given_up_successor_archived_is_kept() {
    let mut world = World::new(&[12], 12).await;
    let base = world.log.tail().position;
    fence(&world.archives[0], 9).seal(base, epoch(2, 90)).await.unwrap();
    let mut other = world.source.taken_over(epoch(2, 90));
    let end = put(&world.stores[0], &other.frames(3, 2)).await;
    let state = world.promote(&[9]).await.unwrap();
    assert_eq!((state.position.lsn, state.position.hash), (end.lsn, end.hash));
    world.assert_good(state, end, "of a successor").await;
}

#[tokio::test(start_paused = true)]
async fn an_archive_that_does_not_answer_stops_everything() {
    let mut world = World::new(&[12, 12], 12).await;
    world.stores[1].live(Some(Life::of(0, false)));
    world.promote(&[]).await.unwrap_err();
    let untouched = world.stores[0].names().await.iter().all(|name| !name.contains("log/2"));
    assert!(untouched && world.places().places[0].adopt().await.unwrap().seals.is_empty());
}

/// The fear: the source wakes after the minute in which it was watched, and is replaced all the same.
#[tokio::test(start_paused = true)]
async fn a_source_that_gave_a_sign_of_life_is_not_replaced() {
    let (store, archive, mut source) = scene().await;
    let base = put(&store, &source.frames(2, 2)).await;
    let next = epoch(2, 9);
    let (fences, who) = ([fence(&archive, 0)], successor(0, &[next], &[]));
    let refused = take_over_at(&fences, (&who, None), base, None).await.unwrap_err();
    assert!(matches!(refused, TakeOverError::NotWatched { .. }), "{refused}");
    let nowhere = seen_silent(&[]).await.unwrap();
    let refused = take_over_at(&fences, (&who, None), base, Some(&nowhere)).await.unwrap_err();
    assert!(matches!(refused, TakeOverError::NotWatched { .. }), "{refused}");
    let silence = seen_silent(&fences).await.unwrap();
    // It came after the watch; also if it was read by the restore, which takes longer.
    let end = put(&store, &source.frames(1, 1)).await;
    for base in [base, end] {
        let refused = take_over_at(&fences, (&who, None), base, Some(&silence)).await.unwrap_err();
        assert!(
            matches!(&refused, TakeOverError::Alive { last, slot, .. } if *last == end.lsn && slot.ends_with(".seg")),
            "{refused}"
        );
    }
    assert!(fences[0].adopt().await.unwrap().seals.is_empty());
    let silence = seen_silent(&fences).await.unwrap();
    let refused = take_over_at(&fences, (&who, None), base, Some(&silence)).await.unwrap_err();
    assert!(matches!(refused, TakeOverError::Behind { .. }), "{refused}");
    take_over_at(&fences, (&who, None), end, Some(&silence)).await.unwrap();
    // Sealed it is shut out: nobody watches for it any more.
    take_over_at(&fences, (&who, None), end, None).await.unwrap();
    assert_eq!(fences[0].adopt().await.unwrap().seals[0].next, next);
}

/// The fear: one of two archives was a second behind when the region was lost, and no take-over of both is possible.
#[tokio::test(start_paused = true)]
async fn a_lagging_archive_is_brought_up_from_the_other_before_it_is_sealed() {
    let mut requests = 1;
    loop {
        let world = World::new(&[12, 6], 0).await;
        let base = world.log.tail().position;
        let fences: Vec<ArchiveFence> = world.archives.iter().map(|archive| fence(archive, 8)).collect();
        let silence = seen_silent(&fences).await.unwrap();
        let who = successor(8, &[epoch(2, 80)], &[]);
        let life = Life::of(requests, requests % 2 == 0);
        world.live(Some(&life));
        let first = take_over_at(&fences, (&who, None), base, Some(&silence)).await;
        world.live(None);
        if life.is_over() {
            // What the first one has shipped was no sign of life.
            let silence = seen_silent(&fences).await.ok();
            take_over_at(&fences, (&who, None), base, silence.as_ref()).await.unwrap();
        }
        for fence in &fences {
            let held = fence.adopt().await.unwrap();
            assert_eq!((held.end, held.epoch, held.seals.len()), (base, epoch(2, 80), 1), "at {requests}");
        }
        if !life.is_over() {
            assert_eq!(first, Ok(base.lsn));
            return;
        }
        requests += 1;
    }
}

/// The fear: an account loses a slot while its archive is sealed: the old epoch ends before entries that were restored, or the archive
/// does not lead to the seal, and nobody can mend that later.
#[tokio::test(start_paused = true)]
async fn an_archive_that_loses_a_slot_during_a_take_over_is_not_sealed_below_what_was_restored() {
    let whole = World::new(&[12, 6], 0).await;
    let (fences, base) = whole.restored().await;
    whole.take_over_restored(&fences, base).await.unwrap();
    for (account, name) in whole.logged().await {
        for requests in 1.. {
            let context = format!("archive {account} loses {name} before request {requests}");
            let world = World::new(&[12, 6], 0).await;
            let (fences, base) = world.restored().await;
            let loss = Loss::before_request(requests, &world.stores[account], &name);
            world.lose(Some(&loss));
            let first = world.take_over_restored(&fences, base).await;
            world.lose(None);
            // The first archive has everything: what the other one loses it gets back at once.
            assert!(account == 0 || first.is_ok(), "{context}: {first:?}");
            let sealed = world.sealed_at().await;
            assert!(sealed.iter().all(|lsn| *lsn == base.lsn), "{context}: sealed at {sealed:?}");
            match world.take_over_restored(&fences, base).await {
                Ok(_) => {
                    for fence in &fences {
                        let held = fence.adopt().await.unwrap();
                        assert_eq!((held.end, held.epoch), (base, epoch(2, 80)), "{context}");
                    }
                }
                Err(error) => {
                    let is_gone = account == 0 && matches!(error, TakeOverError::Lags { .. });
                    assert!(is_gone, "{context}: {error}");
                }
            }
            if !loss.has_come() {
                break;
            }
        }
    }
}

/// The fear: an account dies during a take-over, and what it was sealed for stands in the way of going on without it.
#[tokio::test(start_paused = true)]
async fn a_take_over_goes_on_without_the_archive_whose_account_died_at_any_request() {
    for dying in [0, 1] {
        for requests in 1.. {
            let world = World::new(&[12, 12], 0).await;
            let (fences, base) = world.restored().await;
            let life = Life::of(requests, requests % 2 == 0);
            world.stores[dying].live(Some(life.clone()));
            let taken = world.take_over_restored(&fences, base).await;
            if !life.is_over() {
                taken.unwrap();
                break;
            }
            let left = &fences[1 - dying..2 - dying];
            world.take_over_restored(left, base).await.unwrap();
            let held = left[0].adopt().await.unwrap();
            assert_eq!((held.end, held.epoch, held.seals.len()), (base, epoch(2, 80), 1), "at {requests}");
            world.live(None);
            assert!(world.sealed_at().await.iter().all(|lsn| *lsn == base.lsn), "at {requests}");
        }
    }
}

/// The fear: a slot is lost while a mirror is promoted, and what the mirror or another archive has of it is left behind.
#[tokio::test(start_paused = true)]
async fn an_archive_that_loses_a_slot_during_a_promotion_gets_it_back_or_nothing_below_is_sealed() {
    for (shipped, mirrored) in [(vec![6, 9], 12), (vec![12, 3], 6)] {
        let mut whole = World::new(&shipped, mirrored).await;
        whole.promote(&[]).await.unwrap();
        for (account, name) in whole.logged().await {
            for requests in 1.. {
                let context =
                    format!("{shipped:?} {mirrored}: {account} loses {name} before request {requests}");
                let mut world = World::new(&shipped, mirrored).await;
                let all: Vec<Position> =
                    world.log.read(Lsn::FIRST).unwrap().map(|frame| frame.unwrap().position()).collect();
                let elsewhere =
                    (0..shipped.len()).filter(|other| *other != account).map(|other| shipped[other]);
                let kept = all[elsewhere.fold(mirrored, usize::max) - 1];
                let loss = Loss::before_request(requests, &world.stores[account], &name);
                world.lose(Some(&loss));
                let mut state = world.promote(&[]).await;
                world.lose(None);
                if state.is_err() {
                    world.restart();
                    state = world.promote(&[]).await;
                }
                let state = state.unwrap_or_else(|error| panic!("{context}: {error}"));
                world.assert_good(state, kept, &context).await;
                if !loss.has_come() {
                    break;
                }
            }
        }
    }
}

/// The disk of a source has lost its newest entries, and its archives have them.
#[tokio::test(start_paused = true)]
async fn a_source_gets_back_what_only_its_archives_have() {
    let world = World::new(&[9, 12, 3], 6).await;
    let whole = world.log.tail();
    let own = whole.position.epoch;
    assert_eq!(world.places().recover(own).await.unwrap(), whole);
    assert_eq!(world.mirror.tail(), whole);
    // Another source has taken over: what it wrote is not this one's.
    let replaced = World::new(&[12], 6).await;
    fence(&replaced.archives[0], 9).seal(whole.position, epoch(2, 90)).await.unwrap();
    let refused = replaced.places().recover(own).await.unwrap_err();
    assert!(matches!(&refused, TakeOverError::Fence { error: FenceError::Sealed(_), .. }), "{refused}");
    // An archive of another history is not appended.
    let other = World::new(&[12], 6).await;
    let forked = MemoryLog::new(Source::new().base());
    forked.claim(own).unwrap();
    let mut source = Source::new();
    source.wait(77);
    append(&forked, &source.frames(2, 3));
    let log = TakeOverLog { log: Arc::new(forked), ..other.places() };
    let refused = log.recover(own).await.unwrap_err();
    assert!(matches!(&refused, TakeOverError::Fence { error: FenceError::Forked { .. }, .. }), "{refused}");
}

/// The fear: the source before added an archive while it was being replaced, and goes on acknowledging through it: only entries that another
/// archive holds beyond the base name it.
#[tokio::test(start_paused = true)]
async fn an_archive_that_only_entries_beyond_the_base_name_is_found() {
    let world = World::new(&[6, 9], 3).await;
    let places = world.places();
    let row = |lsn: u64| RowKey::from_parts(murphy_fs::Table::Symlink.number(), &(lsn % 50).to_be_bytes());
    for (lsn, is_beyond) in [(5, false), (15, true), (26, true), (30, false)] {
        let found = places.row_beyond(&row(lsn)).await.unwrap();
        let begins = format!("row of {lsn},");
        let is_found = found.is_some_and(|value| value.starts_with(begins.as_bytes()));
        assert_eq!(is_found, is_beyond, "lsn {lsn}");
    }
}
