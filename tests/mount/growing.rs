//! Files that grow while others read them: whoever follows one reads what was written, and never what nobody wrote.
//!
//! Invariants:
//! - Every byte of a file tells its place: a zero, a byte of another place and a byte that is missing in the middle are seen alike.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use murphy_fs::{
    BlockStore, BlockStoreError, FileSystem, Mount, MountOptions, ObjectBlockStore, PackName, VolumeOptions,
};
use murphy_tests::{BlockLayer, Layered, PATIENCE, Pair, can_mount, pause_task, wait_until};

use super::mirror_cache::{Readers, World};

/// A store that answers most reads at once and some after a moment: pages are locked meanwhile, and whoever wants to change them waits.
#[derive(Debug)]
struct Unsteady {
    below: ObjectBlockStore,
    reads: AtomicU64,
}

impl Unsteady {
    async fn moment(&self) {
        let turn = self.reads.fetch_add(1, Ordering::Relaxed);
        pause_task(Duration::from_millis(turn * 7 % 5)).await;
    }
}

impl BlockLayer for Unsteady {
    fn below(&self) -> &dyn BlockStore {
        &self.below
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(async move {
            self.moment().await;
            self.below.get_range(name, range).await
        })
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(async move {
            self.moment().await;
            self.below.get(name).await
        })
    }
}

/// What is at this place of every file.
fn byte(place: u64) -> u8 {
    (place * 31 % 255) as u8 + 1
}

/// Lets a file grow to `end`.
fn grow(path: &Path, end: u64) {
    let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
    let bytes: Vec<u8> = (file.metadata().unwrap().len()..end).map(byte).collect();
    file.write_all(&bytes).unwrap();
}

/// Ends that a file grows to, one after the other: within pages, up to their ends, over them.
fn ends(begin: u64) -> impl Iterator<Item = u64> {
    (1..=rounds()).scan(begin, |end, round| {
        *end += match round % 16 {
            0 => PAGE - *end % PAGE,
            1 => PAGE,
            2 => 2 * PAGE + 808,
            _ => 1 + round * 7 % 300,
        };
        Some(*end)
    })
}

/// How often the files of a test grow.
fn rounds() -> u64 {
    std::env::var("MURPHY_GROWTHS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(300)
}

/// Reads from a moment before the end of a file that was seen last, and checks it; says how far it goes.
fn read_end(file: &File, seen: u64, who: &str) -> u64 {
    let mut bytes = [0; 16 * PAGE as usize];
    let begin = seen.saturating_sub(3000);
    let count = file.read_at(&mut bytes, begin).unwrap() as u64;
    let wrong = (0..count).find(|at| bytes[*at as usize] != byte(begin + at));
    let wrong = wrong.map(|at| (begin + at, bytes[at as usize]));
    assert_eq!(wrong, None, "{who}: a wrong byte before {}", begin + count);
    begin + count
}

/// Somebody who reads the end of a file again and again.
struct Follower {
    readers: Readers,
    /// How far the file went when it was read last.
    seen: Arc<AtomicU64>,
}

impl Follower {
    fn start(read: impl Fn(u64) -> u64 + Clone + Send + 'static) -> Follower {
        let seen = Arc::new(AtomicU64::new(0));
        let noted = Arc::clone(&seen);
        let readers = Readers::start(1, move || {
            let now = read(noted.load(Ordering::Relaxed));
            noted.store(now, Ordering::Relaxed);
        });
        Follower { readers, seen }
    }
}

/// Four of them: two read by a handle that they have, one looks at the file and lists its directory besides, one opens it each time.
fn follow(path: &Path) -> Vec<Follower> {
    let held = Arc::new(File::open(path).unwrap());
    let by_handle = move |seen| {
        let now = read_end(&held, seen, "an old handle");
        assert!(now >= seen, "{seen} bytes were there, now {now}");
        now
    };
    let (also, anew, parent) = (path.to_owned(), path.to_owned(), path.parent().unwrap().to_owned());
    let looking = {
        let by_handle = by_handle.clone();
        move |seen| {
            fs::metadata(&also).unwrap();
            if seen % 64 == 0 {
                assert!(fs::read_dir(&parent).unwrap().flatten().all(|entry| entry.metadata().is_ok()));
            }
            by_handle(seen)
        }
    };
    let opening = move |seen| read_end(&File::open(&anew).unwrap(), seen, "a new handle");
    vec![
        Follower::start(by_handle.clone()),
        Follower::start(by_handle),
        Follower::start(looking),
        Follower::start(opening),
    ]
}

/// Everybody sees the end of the file, and nobody has seen anything wrong.
fn end_well(followers: Vec<Follower>, end: u64) {
    wait_until("everybody to read to the end", PATIENCE, || {
        followers.iter().all(|one| one.readers.have_ended() || one.seen.load(Ordering::Relaxed) == end)
    });
    for follower in followers {
        follower.readers.end();
    }
}

/// At the source a file of one byte has been at rest since before the mirror was mounted, or grows already when it is opened there.
fn grow_under_readers(grows_already: bool) {
    if !can_mount("a file that grows at the source") {
        return;
    }
    let blocks =
        Arc::new(Layered(Unsteady { below: ObjectBlockStore::in_memory(), reads: AtomicU64::new(0) }));
    let Some(world) = World::after("rounds", blocks, |source| grow(&source.join("log"), 1)) else { return };
    let (path, mut end) = (world.at_source("log"), 1);
    if grows_already {
        end = 100;
        grow(&path, end);
        world.arrive();
    }
    let followers = follow(&world.at_mirror("log"));
    for (round, end) in ends(end).enumerate() {
        grow(&path, end);
        let lsn = world.pair.copy();
        if round % 20 == 0 {
            world.pair.wait_shown(lsn, PATIENCE).unwrap();
        }
    }
    world.arrive();
    let end = fs::metadata(&path).unwrap().len();
    assert_eq!(fs::metadata(world.at_mirror("log")).unwrap().len(), end, "at once");
    end_well(followers, end);
    world.end();
}

/// Like a log that is looked at while it is written: it is read past the kernel's page cache.
#[test]
fn a_file_that_is_opened_while_it_grows_shows_no_zeros() {
    grow_under_readers(true);
}

/// Like `tail -f` of a log that was quiet: its pages are in the kernel's cache when it begins to grow.
#[test]
fn a_file_that_begins_to_grow_while_it_is_open_shows_no_zeros() {
    grow_under_readers(false);
}

/// A file at rest is read through the kernel's page cache: the second time costs no request.
#[test]
fn a_file_at_rest_is_kept_in_the_page_cache() {
    let blocks = Arc::new(ObjectBlockStore::in_memory());
    let Some(world) = World::after("a_file_at_rest_is_kept_in_the_page_cache", blocks, |source| {
        grow(&source.join("big"), 1 << 20);
    }) else {
        return;
    };
    let file = File::open(world.at_mirror("big")).unwrap();
    let read = || (0..256).for_each(|page| read_page(&file, page * PAGE));
    read();
    let before = world.mirror_mount.requests();
    read();
    let since = world.mirror_mount.requests().since(&before);
    assert_eq!(since.total(), 0, "{since}");
    drop(file);
    world.end();
}

fn read_page(file: &File, begin: u64) {
    let mut bytes = [0; PAGE as usize];
    file.read_exact_at(&mut bytes, begin).unwrap();
    assert!((begin..).zip(bytes).all(|(place, found)| found == byte(place)));
}

/// The kernel knows what its own writers append.
#[test]
fn a_file_that_grows_on_its_own_mount_shows_no_zeros() {
    if !can_mount("a file that grows on its own mount") {
        return;
    }
    let pair = Pair::new(VolumeOptions::default());
    let directory = tempfile::tempdir().unwrap();
    let fs: Arc<dyn FileSystem> = Arc::new(pair.source.clone());
    let options = MountOptions::new("source");
    let mount = Mount::new(fs, directory.path(), &options, pair.driver().handle().clone()).unwrap();
    let path = directory.path().join("log");
    grow(&path, 1);
    let followers = follow(&path);
    for (round, end) in ends(1).enumerate() {
        grow(&path, end);
        if round % 50 == 0 {
            // What was written moves from memory to packs meanwhile.
            pair.driver().wait(pair.source.sync_all()).unwrap();
        }
    }
    let end = fs::metadata(&path).unwrap().len();
    end_well(followers, end);
    mount.unmount().unwrap();
}

const PAGE: u64 = 4096;
