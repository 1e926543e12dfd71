//! Renames, creates, readers and the eviction of the overlay, in thousands of interleavings that a seed decides.
//!
//! Invariants:
//! - Whatever the interleaving, a view shows every rename as one of the two names, the counter of a directory as the number of its
//!   names, exactly what the log has made up to its LSN, and nobody's answer is older than what had been answered before.
//! - A reader that takes a new view for each row is found out: the canary.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64 as Counter, Ordering},
    },
    time::Duration,
};

use murphy_log::{Epoch, EpochId, Log, LogTime, Lsn, ManualClock, MemoryLog, State, VolumeId, VolumeKeys};
use shuttle::thread;

use super::{Limits, Sequencer, SubmitError};
use crate::{
    Caller, DentryRow, DirectoryRow, Ino, Kind, MemoryIndex, Name, NameHasher, NewNode, RenameMode, RowKey,
    applier::Applier,
    check_digest, check_tree,
    decide::{Genesis, MakeNode, Operation, PlacedName, Rename, find},
    index::Index,
    sync::interleave,
    table::Table,
    view::{View, ViewError},
};

/// A volume's core, with generations of one entry and a cache of hardly any rows.
struct World {
    sequencer: Arc<Sequencer>,
    index: Arc<dyn Index>,
    hasher: NameHasher,
    keys: VolumeKeys,
    /// How many names have been added and answered.
    added: Counter,
    /// What listings have shown, and at which LSN.
    listed: parking_lot::Mutex<Vec<(Lsn, BTreeSet<Name>)>>,
}

impl World {
    fn new() -> Arc<World> {
        let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
        let epoch = Epoch { number: 1, id: EpochId::from_bytes([7; 16]) };
        let origin = State::origin(epoch);
        let log = Arc::new(MemoryLog::new(origin));
        log.claim(epoch).unwrap();
        let index: Arc<dyn Index> = Arc::new(MemoryIndex::new());
        let clock = Arc::new(ManualClock::new(LogTime::from_nanos(1_700_000_000_000_000_000)));
        let limits = Limits { generation_bytes: 1, overlay_bytes: 1 << 20, cached_rows: 4 };
        let snapshot = index.snapshot();
        let sequencer =
            Sequencer::new(log, keys.clone(), clock, snapshot, origin, LogTime::default(), limits);
        sequencer.lead(epoch);
        let world = World {
            sequencer: Arc::new(sequencer),
            index,
            hasher: NameHasher::of(&keys),
            keys,
            added: Counter::new(0),
            listed: parking_lot::Mutex::default(),
        };
        world.submit(&Genesis { settings: Vec::new() });
        world.create("a");
        Arc::new(world)
    }

    fn submit<O: Operation>(&self, operation: &O) -> O::Reply {
        loop {
            match self.sequencer.submit(Some(&Caller::default()), operation) {
                Ok(reply) => return reply,
                Err(SubmitError::Stale) => {}
                Err(refused) => panic!("{refused:?}"),
            }
        }
    }

    fn placed(&self, name: &str) -> PlacedName {
        PlacedName::new(&self.hasher, &Name::new(name.as_bytes().to_vec()).unwrap())
    }

    fn create(&self, name: &str) {
        let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
        self.submit(&MakeNode { parent: Ino::ROOT, name: self.placed(name), node });
        self.added.fetch_add(1, Ordering::SeqCst);
    }

    fn rename(&self, from: &str, to: &str) {
        let (from, to) = ((Ino::ROOT, self.placed(from)), (Ino::ROOT, self.placed(to)));
        self.submit(&Rename {
            from,
            to,
            mode: RenameMode::Replace,
            source: None,
            target: None,
            victim: None,
        });
    }

    /// Moves what has grown into the index, and drops it from the overlay.
    fn evict(&self) {
        self.sequencer.seal_now();
        let applier = Applier::new(Arc::clone(&self.sequencer), Arc::clone(&self.index));
        while applier.step(Duration::ZERO).unwrap() {}
    }

    /// The moved file has exactly one of its two names; `row` is asked for each row.
    fn check_moved(&self, row: impl Fn(&RowKey) -> Result<Option<DentryRow>, ViewError>) {
        let found = ["a", "b"].map(|name| find(Ino::ROOT, &self.placed(name), &row).unwrap().is_some());
        assert_ne!(found[0], found[1], "a rename is seen as {found:?}");
    }

    /// A listing has as many names as the directory counts, and one of the two.
    fn check_listing(&self, view: &View) {
        let names = RowKey::dentry(Ino::ROOT, 0)..RowKey::dentry(Ino::new(Ino::ROOT.get() + 1), 0);
        let rows = view.rows(names).map(|row| DentryRow::decode(&row.unwrap().1).unwrap());
        let names: BTreeSet<Name> = rows.filter_map(|row| Some(row.named?.0)).collect();
        let moved = names.iter().filter(|name| matches!(name.as_bytes(), b"a" | b"b")).count();
        assert_eq!(moved, 1, "{names:?}");
        let counted = view.directory(Ino::ROOT).unwrap().unwrap().children;
        assert_eq!(counted, names.len() as u64, "{names:?}");
        self.listed.lock().push((view.lsn(), names));
    }

    /// What is answered now is not older than what had been answered before.
    fn check_fresh(&self) {
        let before = self.added.load(Ordering::SeqCst);
        let key = RowKey::directory(Ino::ROOT);
        let row = self.sequencer.newest(&key, |row| DirectoryRow::decode(row)).unwrap().unwrap();
        assert!(row.children >= before, "{} names, {before} were there", row.children);
        let view = self.sequencer.view().directory(Ino::ROOT).unwrap().unwrap();
        assert!(view.children >= row.children, "{} names, {} were there", view.children, row.children);
    }

    /// Every listing had the names that the log had made up to its LSN, and no other.
    fn check_listed(&self) {
        let mut rows = BTreeMap::new();
        let mut names_at = BTreeMap::new();
        for frame in self.sequencer.log().read(Lsn::FIRST).unwrap() {
            for entry in frame.unwrap().entries().unwrap() {
                for change in entry.changes.iter().filter(|change| change.table == Table::Dentry.number()) {
                    let row = change.value.as_ref().map(|row| DentryRow::decode(row).unwrap());
                    rows.insert(change.key.clone(), row.and_then(|row| Some(row.named?.0)));
                }
                let names: BTreeSet<Name> = rows.values().flatten().cloned().collect();
                names_at.insert(entry.lsn, names);
            }
        }
        for (lsn, names) in self.listed.lock().iter() {
            assert_eq!(names_at.get(lsn), Some(names), "a listing at lsn {lsn}");
        }
    }

    /// Nothing was lost, and the digest that was kept up is that of the rows.
    fn check_end(&self, names: u64) {
        self.evict();
        self.check_listed();
        let view = self.sequencer.view_with_state();
        assert_eq!(view.directory(Ino::ROOT).unwrap().unwrap().children, names);
        assert_eq!(check_tree(&view).unwrap(), Vec::new());
        let digest = check_digest(&view, &self.keys).unwrap().digest;
        assert_eq!(digest, self.sequencer.state().digest);
        assert_eq!(view.indexed(), view.lsn(), "everything was evicted");
    }
}

/// Starts a thread that does this so many times.
fn again(
    world: &Arc<World>,
    times: usize,
    act: impl Fn(&World, usize) + Send + 'static,
) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || (0..times).for_each(|time| act(&world, time)))
}

/// Renames, creates, listings and eviction; `reader` looks up both names of what is moved.
fn scenario(reader: impl Fn(&World) + Send + Copy + 'static) {
    let world = World::new();
    let threads = [
        again(&world, 2, |world, _| {
            world.rename("a", "b");
            world.rename("b", "a");
        }),
        again(&world, 2, |world, time| world.create(["c", "d"][time])),
        again(&world, 2, |world, time| world.create(["e", "f"][time])),
        again(&world, 4, |world, _| world.evict()),
        again(&world, 3, move |world, _| reader(world)),
        again(&world, 4, |world, _| world.check_listing(&world.sequencer.view())),
        again(&world, 3, |world, _| world.check_fresh()),
    ];
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    world.check_end(5);
}

/// As many as `MURPHY_INTERLEAVINGS` says.
fn interleavings() -> usize {
    let told = std::env::var("MURPHY_INTERLEAVINGS").ok();
    told.map_or(USUAL, |told| told.parse().expect("MURPHY_INTERLEAVINGS is a number"))
}

fn seed() -> u64 {
    std::env::var("MURPHY_SEED").map_or(1, |told| told.parse().expect("MURPHY_SEED is a number"))
}

#[test]
fn a_rename_is_one_of_its_names_in_every_interleaving_with_eviction() {
    interleave(seed(), interleavings(), || {
        scenario(|world| {
            let (sequencer, view) = (&world.sequencer, world.sequencer.view());
            // Through the cache, then without it.
            world.check_moved(|key| sequencer.in_view(&view, key, DentryRow::decode));
            world.check_moved(|key| view.decoded(key, DentryRow::decode));
        });
    });
    let line = format!("shuttle: {} interleavings from seed {}\n", interleavings(), seed());
    // Past the capture of the test harness, as all counts.
    let _unsaid = std::io::Write::write_all(&mut std::io::stderr().lock(), line.as_bytes());
}

/// The canary: without a pinned view a rename between two rows is seen as neither name, or as both, and that must be found.
#[test]
fn a_reader_that_pins_no_view_is_found_out() {
    let unpinned = || {
        interleave(1, 1000, || {
            scenario(|world| {
                world.check_moved(|key| world.sequencer.view().decoded(key, DentryRow::decode));
            });
        });
    };
    let newest = || {
        interleave(1, 1000, || {
            scenario(|world| world.check_moved(|key| world.sequencer.newest(key, DentryRow::decode)));
        });
    };
    for told in [catch_unwind(AssertUnwindSafe(unpinned)), catch_unwind(AssertUnwindSafe(newest))] {
        let told = told.unwrap_err().downcast::<String>().map_or_else(|_| String::new(), |told| *told);
        assert!(told.contains("a rename is seen as"), "{told}");
    }
}

const USUAL: usize = 1000;
