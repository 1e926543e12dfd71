//! Sources with clocks of all kinds, and watchers who believe none of them.

use murphy_fs::Fence;
use murphy_log::{Epoch, EpochId, NodeId};
use tokio::time::{Instant, sleep};

use super::*;
use crate::{
    take_over::{Successor, take_over_at},
    testing::{FaultyStore, Life, Source, put, scene},
};

/// Goes with the runtime's clock, which is paused and goes on by itself while everybody sleeps.
#[derive(Debug)]
struct VirtualClock {
    start: Instant,
    wall: LogTime,
}

impl VirtualClock {
    fn at(wall: LogTime) -> Arc<VirtualClock> {
        Arc::new(VirtualClock { start: Instant::now(), wall })
    }
}

impl Clock for VirtualClock {
    fn wall(&self) -> LogTime {
        self.wall.after(self.monotonic())
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

/// What an operator meets: an archive with some entries, and a watch over it that has just begun.
struct Scene {
    store: FaultyStore,
    source: Source,
    fences: [ArchiveFence; 1],
    clock: Arc<VirtualClock>,
    watch: Watch,
}

impl Scene {
    /// The operator's wall clock shows `wall` when the source, which believes that it is later by `ahead`, ends.
    async fn new(wall: impl Fn(LogTime) -> LogTime, ahead: Duration) -> Scene {
        let (store, archive, mut source) = scene().await;
        source.wait(u64::try_from(ahead.as_nanos()).unwrap());
        put(&store, &source.frames(2, 2)).await;
        let clock = VirtualClock::at(wall(source.now()));
        let fences = [ArchiveFence::new(archive, NodeId::default(), Arc::clone(&clock) as _, None)];
        let watch = begin(&fences, &clock).await;
        Scene { store, source, fences, clock, watch }
    }

    /// Nothing has been sealed.
    async fn assert_untouched(&self) {
        assert_eq!(self.fences[0].adopt().await.unwrap().seals, []);
    }

    /// A successor at the end of the archive.
    async fn take_over(&self, silence: &Silence) -> Result<Lsn, TakeOverError> {
        let next = Epoch { number: 2, id: EpochId::from_bytes([9; 16]) };
        let attempts = vec![next];
        let successor = Successor { node: NodeId::default(), attempts, given_up: Default::default() };
        take_over_at(&self.fences, (&successor, None), self.source.state().position, Some(silence)).await
    }
}

async fn begin(fences: &[ArchiveFence], clock: &Arc<VirtualClock>) -> Watch {
    let mut held = Vec::new();
    for fence in fences {
        held.push(fence.adopt().await.unwrap());
    }
    Watch::of(fences.iter().zip(&held), Arc::clone(clock) as _)
}

const HOUR: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(31_536_000);

fn earlier(time: LogTime, by: Duration) -> LogTime {
    LogTime::from_nanos(time.as_nanos() - u64::try_from(by.as_nanos()).unwrap())
}

/// The fear: a source that was once started with a clock a year ahead is gone, and cannot be replaced for a year.
#[tokio::test(start_paused = true)]
async fn a_source_with_a_clock_a_year_ahead_is_replaced_once_it_is_silent() {
    let scene = Scene::new(|end| earlier(end, YEAR), YEAR).await;
    let newest = scene.watch.newest().unwrap();
    assert_eq!(newest.lsn, scene.source.state().position.lsn);
    assert!(newest.log_time.since(scene.clock.wall()) >= YEAR - HOUR, "{newest:?}");
    let began = scene.clock.monotonic();
    let silence = scene.watch.until_silent(&|_| {}).await.unwrap();
    assert!(scene.clock.monotonic() - began >= SILENCE);
    scene.take_over(&silence).await.unwrap();
    assert_eq!(scene.fences[0].adopt().await.unwrap().seals.len(), 1);
}

/// The fear: a source whose clock is behind, or that was suspended, looks dead by its own times and ships right now: it is shut out, with whatever
/// it acknowledges.
#[tokio::test(start_paused = true)]
async fn a_source_whose_clock_is_behind_and_that_ships_is_not_replaced() {
    // Its next slot may come right before the end; a tick every 20 s is far more often.
    for comes_after in [1, 19, 41, 59] {
        let mut scene = Scene::new(|end| end.after(HOUR), Duration::ZERO).await;
        let frames = scene.source.frames(1, 1);
        let ships = async {
            sleep(Duration::from_secs(comes_after)).await;
            put(&scene.store, &frames).await
        };
        let (end, refused) = tokio::join!(ships, scene.watch.until_silent(&|_| {}));
        let refused = refused.unwrap_err();
        assert!(matches!(&refused, TakeOverError::Alive { last, .. } if *last == end.lsn), "{refused}");
        let (text, place) = (refused.to_string(), scene.fences[0].place());
        assert!(text.contains("sign of life") && text.contains(place) && text.contains(".seg"), "{text}");
        scene.assert_untouched().await;
    }
}

/// The fear: between the plan and the answer of the operator a slot comes, and is taken for what was there when the watch began.
#[tokio::test(start_paused = true)]
async fn what_came_before_the_operator_answered_is_a_sign_of_life() {
    let mut scene = Scene::new(|end| end.after(HOUR), Duration::ZERO).await;
    put(&scene.store, &scene.source.frames(1, 1)).await;
    sleep(10 * SILENCE).await;
    let refused = scene.watch.until_silent(&|_| {}).await.unwrap_err();
    assert!(matches!(refused, TakeOverError::Alive { .. }), "{refused}");
    // Once it is silent, a watch from then on says so; the time that the answer takes counts.
    let watch = begin(&scene.fences, &scene.clock).await;
    sleep(SILENCE).await;
    let began = scene.clock.monotonic();
    let silence = watch.until_silent(&|_| {}).await.unwrap();
    assert_eq!(scene.clock.monotonic(), began);
    scene.take_over(&silence).await.unwrap();
}

/// The fear: the restore takes hours, the source wakes meanwhile, and what it ships is restored too and sealed behind.
#[tokio::test(start_paused = true)]
async fn a_source_that_wakes_after_it_was_watched_is_not_replaced() {
    let mut scene = Scene::new(|end| end.after(HOUR), Duration::ZERO).await;
    let silence = scene.watch.until_silent(&|_| {}).await.unwrap();
    put(&scene.store, &scene.source.frames(1, 1)).await;
    let refused = scene.take_over(&silence).await.unwrap_err();
    assert!(matches!(refused, TakeOverError::Alive { .. }), "{refused}");
    scene.assert_untouched().await;
}

/// The fear: a store that does not answer for a moment makes a source look silent, or stops everything.
#[tokio::test(start_paused = true)]
async fn a_place_that_does_not_answer_is_not_called_silent() {
    let scene = Scene::new(|end| end, Duration::ZERO).await;
    let recovers = async {
        scene.store.live(Some(Life::of(0, false)));
        sleep(SILENCE + Duration::from_secs(10)).await;
        scene.store.live(None);
    };
    let (silence, ()) = tokio::join!(scene.watch.until_silent(&|_| {}), recovers);
    assert!(scene.clock.monotonic() >= SILENCE + Duration::from_secs(10));
    silence.unwrap();
    scene.store.live(Some(Life::of(0, false)));
    let refused = scene.watch.until_silent(&|_| {}).await.unwrap_err();
    assert!(
        matches!(refused, TakeOverError::Fence { error: FenceError::Unavailable { .. }, .. }),
        "{refused}"
    );
    scene.store.live(None);
    scene.assert_untouched().await;
}

/// The fear: one of two archives does not answer, and hides that the other one goes on.
#[tokio::test(start_paused = true)]
async fn a_sign_of_life_in_one_place_is_seen_while_another_one_does_not_answer() {
    let mut scene = Scene::new(|end| end, Duration::ZERO).await;
    let (away, other, _) = crate::testing::scene().await;
    let other = ArchiveFence::new(other, NodeId::default(), Arc::clone(&scene.clock) as _, None);
    for order in [[0, 1], [1, 0]] {
        let both = [scene.fences[0].clone(), other.clone()];
        let watch = begin(&order.map(|at| both[at].clone()), &scene.clock).await;
        away.live(Some(Life::of(0, false)));
        put(&scene.store, &scene.source.frames(1, 1)).await;
        let refused = watch.until_silent(&|_| {}).await.unwrap_err();
        assert!(matches!(refused, TakeOverError::Alive { .. }), "{refused}");
        away.live(None);
    }
}

/// The fear: two operators take over at once, and one is told that the source lives.
#[tokio::test(start_paused = true)]
async fn a_seal_that_comes_while_it_is_watched_names_who_sealed() {
    let scene = Scene::new(|end| end, Duration::ZERO).await;
    let by = NodeId::from_bytes([3; 16]);
    let other = ArchiveFence::new(scene.fences[0].archive().clone(), by, Arc::clone(&scene.clock) as _, None);
    let next = Epoch { number: 2, id: EpochId::from_bytes([4; 16]) };
    other.seal(scene.source.state().position, next).await.unwrap();
    let refused = scene.watch.until_silent(&|_| {}).await.unwrap_err();
    assert!(
        matches!(&refused, TakeOverError::Fence { error: FenceError::Sealed(seal), .. } if seal.by == by),
        "{refused}"
    );
}

/// The fear: the watcher itself was suspended, or stood still, and took that for the silence of the source.
#[tokio::test(start_paused = true)]
async fn what_came_while_the_watcher_stood_still_is_seen() {
    let mut scene = Scene::new(|end| end, Duration::ZERO).await;
    let frames = scene.source.frames(1, 1);
    let ships = async {
        sleep(Duration::from_secs(2)).await;
        put(&scene.store, &frames).await;
        // Nobody gets a turn: this is the moment in which the machine sleeps.
        tokio::time::advance(HOUR).await;
    };
    let (refused, ()) = tokio::join!(scene.watch.until_silent(&|_| {}), ships);
    assert!(matches!(refused, Err(TakeOverError::Alive { .. })), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_told_for_how_long() {
    let scene = Scene::new(|end| end, Duration::ZERO).await;
    let told = parking_lot::Mutex::new(Vec::new());
    scene.watch.until_silent(&|rest| told.lock().push(rest)).await.unwrap();
    let told = told.into_inner();
    assert_eq!(told.first(), Some(&SILENCE));
    assert!(told.is_sorted_by(|a, b| a > b) && told.len() == 12, "{told:?}");
}
