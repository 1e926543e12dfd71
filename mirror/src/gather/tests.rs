//! A promoted source whose own store lacks packs, and places that have them, have them damaged, lack them, or do not answer.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    future::ready,
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture, stream::BoxStream};
use murphy_fs::{
    BlockStoreError, Caller, CellCache, FileSystem, Ino, MemoryIndex, Name, ObjectBlockStore, OpenFlags,
    PackFetcher, PackName, PackState, StoredPack, VolumeOptions, VolumeParts, WriterId,
};
use murphy_log::{Log, MemoryLog, SystemClock};
use parking_lot::Mutex;

use super::*;
use crate::tests::{base_state, keys, ms};

/// A place that does what it is told.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Place>>);

#[derive(Default)]
struct Place {
    packs: BTreeMap<PackName, Bytes>,
    is_down: bool,
    asked: usize,
}

impl PackSource for Told {
    fn fetch(&self, pack: PackName) -> BoxFuture<'_, Result<Bytes, PackFetchError>> {
        let mut place = self.0.lock();
        place.asked += 1;
        let answer = match place.packs.get(&pack) {
            _ if place.is_down => Err(PackFetchError::NotConnected),
            Some(bytes) => Ok(bytes.clone()),
            None => Err(PackFetchError::Missing(pack)),
        };
        async move { answer }.boxed()
    }
}

struct Places {
    places: Vec<Told>,
    /// Of the last so many nobody expects anything.
    given_up: usize,
    changes: watch::Receiver<()>,
}

impl PackPlaces for Places {
    fn places(&self) -> Vec<PackPlace> {
        let awaited = self.places.len() - self.given_up;
        let place = |(at, told): (usize, &Told)| PackPlace {
            name: format!("place {at}"),
            source: Arc::new(told.clone()),
            is_awaited: at < awaited,
        };
        self.places.iter().enumerate().map(place).collect()
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        let mut changes = self.changes.clone();
        async move { changes.changed().await.unwrap() }.boxed()
    }
}

/// A volume with one file in each of `count` packs, none of them in the own store.
struct World {
    volume: Volume,
    own: Arc<dyn BlockStore>,
    packs: Vec<(PackNumber, PackName, Bytes)>,
    gap: Gap,
    changes: watch::Sender<()>,
}

impl World {
    async fn new(count: usize) -> World {
        let (log, index) = (Arc::new(MemoryLog::new(base_state())), Arc::new(MemoryIndex::new()));
        let state = log.claim(base_state().position.epoch).unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let first: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
        let volume = Volume::open(VolumeParts {
            log,
            index,
            state,
            last_time: clock.wall(),
            keys: keys(),
            clock,
            fetcher: PackFetcher::new(vec![Arc::clone(&first)], CellCache::new(1 << 20), None),
            blocks: Arc::clone(&first),
            runtime: tokio::runtime::Handle::current(),
            options: VolumeOptions::default(),
        });
        let volume = volume.unwrap();
        volume.lead(state.position.epoch, Some(&[])).unwrap();
        for number in 0..count {
            write(&volume, &format!("file {number}")).await;
        }
        let upto = volume.durable_here().await.unwrap();
        let mut packs = Vec::new();
        for row in volume.packs() {
            let (number, row) = row.unwrap();
            let name = row.meta().name;
            packs.push((number, name, first.get(name).await.unwrap()));
        }
        assert_eq!(packs.len(), count);
        let own = Arc::new(ObjectBlockStore::in_memory());
        let gap = Gap { after: state.position.lsn, upto };
        World { volume, own, packs, gap, changes: watch::Sender::new(()) }
    }

    fn gatherer(&self, places: &[&Told], asking: Duration) -> Gatherer {
        self.gatherer_among(places, 0, asking)
    }

    /// The last `given_up` of `places` were given up.
    fn gatherer_among(&self, places: &[&Told], given_up: usize, asking: Duration) -> Gatherer {
        let places = places.iter().map(|place| (*place).clone()).collect();
        Gatherer {
            volume: self.volume.clone(),
            store: Arc::clone(&self.own),
            places: Arc::new(Places { places, given_up, changes: self.changes.subscribe() }),
            gap: Some(self.gap),
            clock: Arc::new(SystemClock::new()),
            helpers: 3,
            asking,
            status: watch::Sender::new(GatherStatus::default()),
        }
    }

    fn place(&self, packs: &[usize]) -> Told {
        let told = Told::default();
        told.0.lock().packs = packs.iter().map(|at| (self.packs[*at].1, self.packs[*at].2.clone())).collect();
        told
    }

    fn state(&self, at: usize) -> PackState {
        self.volume.pack(self.packs[at].0).unwrap().unwrap().state
    }

    fn is_found(&self, at: usize) -> bool {
        matches!(self.state(at), PackState::Found { at } if at > self.gap.upto)
    }

    async fn has(&self, at: usize) -> bool {
        self.own.get(self.packs[at].1).await.is_ok_and(|bytes| bytes == self.packs[at].2)
    }
}

async fn write(volume: &Volume, name: &str) {
    let (user, flags) = (
        Caller::default(),
        OpenFlags { read: true, write: true, append: false, truncate: false, sync: false },
    );
    let name = Name::new(name.to_owned()).unwrap();
    let (attr, opened) = volume.create(&user, Ino::ROOT, &name, 0o644, flags).wait().await.unwrap();
    let data = Bytes::from(vec![attr.ino.get() as u8; 1000]);
    volume.write(&user, attr.ino, opened.handle, 0, data).wait().await.unwrap();
    volume.fsync(attr.ino, Some(opened.handle)).wait().await.unwrap();
}

/// The fear: bytes that only another mirror or an archive has never come into the own store, and go with that one.
#[tokio::test(flavor = "multi_thread")]
async fn what_several_places_have_between_them_comes_into_the_own_store_and_is_told() {
    let world = World::new(6).await;
    let (one, two) = (world.place(&[0, 1]), world.place(&[1, 2, 3, 4, 5]));
    // A bit of what the first place has is flipped.
    let mut flipped = world.packs[1].2.to_vec();
    flipped[9] ^= 1;
    one.0.lock().packs.insert(world.packs[1].1, flipped.into());
    let (_, name, bytes) = &world.packs[5];
    world.own.put(*name, bytes.clone()).await.unwrap();
    // So are bits of what the own store has, and the end of it is cut off.
    let (_, name, bytes) = &world.packs[4];
    let mut flipped = bytes.to_vec();
    flipped[9] ^= 1;
    world.own.put(*name, flipped.into()).await.unwrap();
    let (_, name, bytes) = &world.packs[3];
    world.own.put(*name, bytes.slice(..bytes.len() - 1)).await.unwrap();
    let gatherer = world.gatherer(&[&one, &two], Duration::from_secs(3600));
    gatherer.settle().await.unwrap();
    for at in 0..6 {
        assert!(world.has(at).await && world.is_found(at), "pack {at}: {:?}", world.state(at));
    }
    assert_eq!(*gatherer.status.borrow(), GatherStatus { found: 6, wanted: 0, missing: 0 });
    let (asked, told) = (two.0.lock().asked, world.state(5));
    world.gatherer(&[&one, &two], Duration::ZERO).settle().await.unwrap();
    assert_eq!((two.0.lock().asked, world.state(5)), (asked, told), "it is done, and nothing is told twice");
}

/// The fear: a place that is out of reach for a moment makes a pack missing, or one that is gone for ever leaves it open for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_is_missing_once_everybody_has_said_so_and_is_found_when_somebody_gets_it() {
    let world = World::new(3).await;
    let (lacks, slow) = (world.place(&[0]), world.place(&[1]));
    slow.0.lock().is_down = true;
    let gatherer = Arc::new(world.gatherer(&[&lacks, &slow], Duration::from_secs(3600)));
    let settling = Arc::clone(&gatherer);
    let settled = tokio::spawn(async move { settling.settle().await });
    let mut status = gatherer.status.subscribe();
    status.wait_for(|status| status.wanted == 2).await.unwrap();
    assert_eq!((world.state(1), world.state(2)), (PackState::Here, PackState::Here), "somebody has not said");
    slow.0.lock().is_down = false;
    settled.await.unwrap().unwrap();
    assert!(world.is_found(0) && world.is_found(1) && world.has(1).await);
    assert_eq!(world.state(2), PackState::Missing);
    assert_eq!(gatherer.status.borrow().missing, 1);
    let looking = Arc::clone(&gatherer);
    let found = tokio::spawn(async move { looking.look_again().await });
    let (_, name, bytes) = world.packs[2].clone();
    lacks.0.lock().packs.insert(name, bytes);
    world.changes.send_replace(());
    found.await.unwrap().unwrap();
    assert!(world.is_found(2) && world.has(2).await);
    assert_eq!(gatherer.status.borrow().missing, 0);
}

/// A store in a folder that shows what is there and, until it is told otherwise, fails to make the name of it durable.
#[derive(Debug)]
struct Unsynced {
    store: Arc<dyn BlockStore>,
    fails: AtomicBool,
}

impl BlockStore for Unsynced {
    fn label(&self) -> Cow<'_, str> {
        self.store.label()
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.store.put(name, bytes)
    }

    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.store.mend(name, bytes)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.store.get_range(name, range)
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.store.get(name)
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        if self.fails.load(Ordering::Relaxed) {
            let source = Arc::new(std::io::Error::other("the folder cannot be synced"));
            let object = name.to_string();
            return ready(Err(BlockStoreError::Unavailable { object, retryable: true, source })).boxed();
        }
        self.store.size(name)
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.store.delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.store.list(writer)
    }
}

/// The fear: whoever put a pack into a folder was killed before the folder was synced, the pack is called found, and a power cut takes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_whose_name_is_not_durable_yet_is_not_called_found() {
    let world = World::new(1).await;
    let (_, name, bytes) = &world.packs[0];
    world.own.put(*name, bytes.clone()).await.unwrap();
    let own = Arc::new(Unsynced { store: Arc::clone(&world.own), fails: AtomicBool::new(true) });
    let store = Arc::clone(&own) as Arc<dyn BlockStore>;
    let gatherer = Gatherer { store, ..world.gatherer(&[], Duration::from_secs(3600)) };
    let round = gatherer.round(gatherer.gap, false).await.unwrap();
    assert_eq!((round.wanted, world.state(0)), (1, PackState::Here));
    own.fails.store(false, Ordering::Relaxed);
    gatherer.settle().await.unwrap();
    assert!(world.is_found(0));
}

/// The fear: a pack that is rotten in the own store is called found, and archives and mirrors wait for it for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_only_the_own_store_has_and_has_damaged_is_missing() {
    let world = World::new(2).await;
    for (_, name, bytes) in &world.packs {
        world.own.put(*name, bytes.slice(1..)).await.unwrap();
    }
    let gatherer = world.gatherer(&[&world.place(&[0])], Duration::from_secs(3600));
    gatherer.settle().await.unwrap();
    assert!(world.is_found(0) && world.has(0).await);
    assert_eq!(world.state(1), PackState::Missing);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_never_answers_is_waited_for_so_long_and_no_longer() {
    let world = World::new(300).await;
    let gone = Told::default();
    gone.0.lock().is_down = true;
    let asking = ms(200);
    let gatherer = world.gatherer(&[&gone], asking);
    let began = gatherer.clock.monotonic();
    gatherer.settle().await.unwrap();
    assert!(gatherer.clock.monotonic().saturating_sub(began) >= asking);
    assert!((0..300).all(|at| world.state(at) == PackState::Missing), "more than one entry's worth");
    assert!(gone.0.lock().asked < 100, "who cannot be reached is asked once a round");
}

/// What was written after the promotion was put before it was named: it is nobody's concern here.
#[tokio::test(flavor = "multi_thread")]
async fn packs_outside_of_the_gap_are_not_looked_for() {
    let world = World::new(3).await;
    let place = world.place(&[0, 1, 2]);
    let gap = Gap { after: Lsn::new(world.packs[0].0.0), upto: Lsn::new(world.packs[1].0.0) };
    let gatherer = Gatherer { gap: Some(gap), ..world.gatherer(&[&place], Duration::ZERO) };
    gatherer.settle().await.unwrap();
    assert_eq!([world.has(0).await, world.has(1).await, world.has(2).await], [false, true, false]);
    assert_eq!((world.state(0), world.state(2)), (PackState::Here, PackState::Here));
}

/// The fear: a member that was given up comes back, is the only one that has the bytes, and nobody asks it any more.
#[tokio::test(flavor = "multi_thread")]
async fn who_was_given_up_is_not_waited_for_and_is_asked_when_it_is_back() {
    let world = World::new(3).await;
    let (known, given_up) = (world.place(&[0]), world.place(&[1]));
    given_up.0.lock().is_down = true;
    let gatherer = Arc::new(world.gatherer_among(&[&known, &given_up], 1, Duration::from_secs(3600)));
    gatherer.settle().await.unwrap();
    assert!(world.is_found(0) && world.has(0).await);
    assert_eq!((world.state(1), world.state(2)), (PackState::Missing, PackState::Missing));
    let mut status = gatherer.status.subscribe();
    let looking = Arc::clone(&gatherer);
    let looks = tokio::spawn(async move { looking.look_again().await });
    given_up.0.lock().is_down = false;
    world.changes.send_replace(());
    status.wait_for(|status| status.missing == 1).await.unwrap();
    assert!(world.is_found(1) && world.has(1).await);
    assert_eq!(world.state(2), PackState::Missing);
    looks.abort();
}
