//! Bits that flip in what is at rest: segments, the last acknowledged frame, packs, cache files.
//!
//! Invariants:
//! - A node shows what it was given, refuses, or says what is missing; no reader gets other bytes.
//! - `MURPHY_FLIPS` sets how many bits are flipped in each kind of file.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use bytes::Bytes;
use murphy_fs::{
    BlockStore, CellCache, DiskCache, ObjectBlockStore, PackBuilder, PackFetcher, PackName, WriterId,
};
use murphy_log::{Files, faulty::FaultyDisk};
use murphy_tests::{CrashRun, Damaged, Driver, Random, number_from_env, report};

fn flips() -> u64 {
    number_from_env("MURPHY_FLIPS", 120)
}

/// Counts what became of flipped bits.
#[derive(Default)]
struct Tally(BTreeMap<&'static str, usize>);

impl Tally {
    fn count(&mut self, became: Damaged) {
        let name = match became {
            Damaged::Refused => "refused",
            Damaged::Cut => "cut and said so",
            Damaged::Unreadable => "unreadable with EIO",
            Damaged::Harmless => "harmless",
        };
        *self.0.entry(name).or_default() += 1;
    }

    fn report(&self, kind: &str) {
        let told: Vec<String> = self.0.iter().map(|(name, count)| format!("{count} {name}")).collect();
        report(&format!("flips, {kind}: {}, none wrong", told.join(", ")));
    }
}

fn run() -> (CrashRun, FaultyDisk) {
    let (run, _) = CrashRun::record(1, 250, true, |_| {});
    let disk = run.moment(run.moments() - 1).after_power_cut(0);
    (run, disk)
}

/// Files below `folder` whose name ends like this.
fn files(disk: &FaultyDisk, folder: &str, ending: &str) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let matches = |path: &Path| path.starts_with(folder) && path.to_string_lossy().ends_with(ending);
    disk.contents().into_iter().filter(|(path, _)| matches(path)).collect()
}

fn used(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// Nothing is after the last frame, so that a flip there looks like a torn write: it may be cut off, loudly, and nothing before it.
#[test]
fn a_flipped_bit_in_a_segment_is_refused_or_cuts_the_last_frame_and_says_so() {
    let (run, disk) = run();
    let (mut tally, mut random) = (Tally::default(), Random::new(1));
    let segments = files(&disk, "/node/log", ".seg");
    for (path, bytes) in &segments {
        let used = used(bytes);
        for number in 0..flips() {
            // Every third in the last frames.
            let from = if number % 3 == 0 { used.saturating_sub(200) } else { 0 };
            let at = from + random.index(used - from);
            let damaged = disk.after_kill();
            damaged.damage(path, |bytes| bytes[at] ^= 1 << (number % 8));
            let became = run.judge_damaged(&damaged, &format!("{} at byte {at}", path.display()));
            // A mark is made anew before a whole frame.
            let in_mark = (at.saturating_sub(31)..=at).any(|start| bytes[start..].starts_with(b"MsyX"));
            assert_eq!(became == Damaged::Harmless, in_mark, "{} at byte {at}", path.display());
            tally.count(became);
        }
    }
    assert!(tally.0.contains_key("refused") && tally.0.contains_key("cut and said so"));
    tally.report("segments");
}

/// One entry later the same flip is damage in what was durable, and refused.
#[test]
fn a_flipped_bit_in_the_last_acknowledged_frame_is_refused_once_anything_follows_it() {
    let (run, disk) = run();
    let (path, before) = files(&disk, "/node/log", ".seg").pop().unwrap();
    let end = used(&before);
    let ticked = disk.after_kill();
    run.tick(&ticked);
    let (mut tally, mut random) = (Tally::default(), Random::new(2));
    for number in 0..flips() {
        let at = end - 1 - random.index(150);
        let damaged = ticked.after_kill();
        damaged.damage(&path, |bytes| bytes[at] ^= 1 << (number % 8));
        let became = run.judge_damaged(&damaged, &format!("the last frame, byte {at}"));
        assert_eq!(became, Damaged::Refused, "byte {at}");
        tally.count(became);
    }
    tally.report("the last acknowledged frame");
}

#[test]
fn a_flipped_bit_in_a_pack_is_an_error_and_never_other_bytes() {
    let (run, disk) = run();
    let (mut tally, mut random) = (Tally::default(), Random::new(3));
    let packs = files(&disk, "/blocks/packs", "");
    assert!(packs.len() > 3);
    for number in 0..flips() {
        let (path, bytes) = &packs[random.index(packs.len())];
        let at = random.index(bytes.len());
        let damaged = disk.after_kill();
        damaged.damage(path, |bytes| bytes[at] ^= 1 << (number % 8));
        tally.count(run.judge_damaged(&damaged, &format!("{} at byte {at}", path.display())));
    }
    assert!(tally.0.contains_key("unreadable with EIO"));
    tally.report("packs");
}

/// A store, a cache on a faulty disk, and the packs that were read through both.
struct Cached {
    driver: Driver,
    store: Arc<dyn BlockStore>,
    packs: Vec<(murphy_fs::PackMeta, Bytes)>,
}

impl Cached {
    fn new() -> Cached {
        let driver = Driver::new();
        let store: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
        let packs = (0..4).map(|number| {
            // Noise, so that it is not compressed.
            let mut plain = vec![0; 50_000 + 70_000 * number as usize];
            blake3::Hasher::new().update(&[number as u8]).finalize_xof().fill(&mut plain);
            let plain = Bytes::from(plain);
            let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(9), number));
            builder.add(&plain).unwrap();
            let sealed = builder.finish().unwrap();
            driver.handle().block_on(store.put(sealed.name, sealed.bytes.clone())).unwrap();
            (sealed.meta(), plain)
        });
        let packs = packs.collect();
        Cached { driver, store, packs }
    }

    /// Reads everything through a cache on `disk`; waits until the cache holds it.
    fn read_all(&self, disk: &FaultyDisk, what: &str) {
        let _runtime = self.driver.enter();
        let cache = DiskCache::open_on(Arc::new(disk.clone()), CACHE.into(), 1 << 24);
        let cache = Arc::new(cache.unwrap_or_else(|error| panic!("{what}: {error}")));
        let fetcher = PackFetcher::new(
            vec![Arc::clone(&self.store)],
            CellCache::new(1 << 20),
            Some(Arc::clone(&cache)),
        );
        for (pack, plain) in &self.packs {
            let read = self.driver.handle().block_on(fetcher.read(pack, 0..plain.len() as u64));
            assert!(read.unwrap_or_else(|error| panic!("{what}: {error}")) == *plain, "{what}: other bytes");
        }
    }
}

/// What a cache holds is never trusted: not after a flip, not after a crash at any moment, not on a disk that fails.
#[test]
fn a_damaged_or_crashed_cache_is_repaired_and_never_gives_other_bytes() {
    let cached = Cached::new();
    let disk = FaultyDisk::new();
    disk.create_dir(Path::new(CACHE)).unwrap();
    disk.record();
    cached.read_all(&disk, "a new cache");
    let whole = || files(&disk, CACHE, "").iter().map(|(_, bytes)| bytes.len()).sum::<usize>() > 600_000;
    murphy_tests::wait_until("the cache is written", murphy_tests::PATIENCE, whole);
    let moments = disk.take_recorded();
    for (at, moment) in moments.iter().enumerate() {
        for seed in 0..3 {
            cached.read_all(&moment.after_power_cut(seed), &format!("power cut {seed} at moment {at}"));
        }
        cached.read_all(&moment.after_kill(), &format!("killed at moment {at}"));
    }
    let held = files(&disk, CACHE, "");
    let mut random = Random::new(5);
    for number in 0..flips() {
        let (path, bytes) = &held[random.index(held.len())];
        let at = random.index(bytes.len());
        let damaged = disk.after_kill();
        damaged.damage(path, |bytes| bytes[at] ^= 1 << (number % 8));
        cached.read_all(&damaged, &format!("{} at byte {at}", path.display()));
    }
    for operation in 0..moments.len() {
        let failing = disk.after_kill();
        held.iter().take(1).for_each(|(path, _)| failing.damage(path, |bytes| bytes[9] ^= 1));
        // The first operation is that of opening it.
        failing.fail_at(1 + operation, murphy_log::faulty::Fault::Full);
        cached.read_all(&failing, &format!("no room at operation {operation}"));
    }
    let crashes = moments.len() * 4;
    report(&format!(
        "flips, cache files: {} repaired from the store; {crashes} crashed caches, none wrong",
        flips()
    ));
}

const CACHE: &str = "/cache";
