//! Restores: to moments of the past, from what the archives hold at the end, compared with what was there.
//!
//! Invariants:
//! - A restore is done outside of the world's time, by the product's own code, from the objects as they are.

use std::{
    collections::BTreeSet,
    ops::RangeInclusive,
    sync::{Arc, atomic::Ordering},
};

use jiff::tz::TimeZone;
use murphy_backup::{
    Archive, ArchiveStore, RestoreError, Target, bases, plan_restore, restore_packs, restore_tree, walk,
};
use murphy_fs::{
    BlockStore, CellCache, Index, MemoryIndex, ObjectBlockStore, PackFetcher, Volume, VolumeOptions,
    VolumeParts,
};
use murphy_log::{Digest, InPlace, Log, LogTime, Lsn, MemoryLog, Position, State, SystemClock, VolumeKeys};
use object_store::{memory::InMemory, path::Path};

use super::{account::Account, client::compare, judge::Certain, world::World};

/// Restores moments of the history that ends at `tip` and compares them.
pub(super) async fn judge(world: &Arc<World>, tip: Position) {
    let stage = world.stage();
    let known = world.known_archives();
    let alive: Vec<_> = known.iter().filter(|account| !account.is_gone()).cloned().collect();
    let intact: Vec<_> = alive.iter().filter(|account| !account.is_damaged()).cloned().collect();
    if intact.is_empty() {
        return stage.note("no archive is left intact");
    }
    let objects: Vec<_> = alive.iter().map(|account| (account.name.clone(), account.objects())).collect();
    let held = in_own_time({
        let intact: Vec<_> = intact.iter().map(|account| (account.name.clone(), account.objects())).collect();
        move || async move { furthest(&intact).await }
    });
    let held = match held {
        Ok(held) => held,
        // Slots of both copies may lie in it, one behind the other: then neither goes on there, and both have said so.
        Err(error) if world.was_cloned() => return stage.note(format!("both copies shipped to it: {error}")),
        Err(error) => return stage.violated(&format!("an intact archive cannot be walked: {error}")),
    };
    let held_by = stage.judge(|judge, _| Ok(judge.is_on(&held, &tip)));
    if held_by != Some(true) {
        return stage.note("the archives end on another history");
    }
    let spans = match spans(&intact) {
        Ok(spans) => spans,
        Err(error) => return stage.violated(&format!("it is not known what intact archives hold: {error}")),
    };
    let (ends, files) = stage.judge(|judge, _| Ok((judge.ends(&held), judge.files()))).unwrap_or_default();
    let files: Vec<_> = files
        .into_iter()
        .filter(|(_, certain)| {
            stage.judge(|judge, _| Ok(judge.is_on(&certain.position, &held))) == Some(true)
        })
        .collect();
    // One that was given up may end before another one begins: nobody has what was decided in between.
    let is_retained =
        |(position, _): &(Position, Digest)| spans.iter().any(|span| span.contains(&position.lsn));
    let ends: Vec<_> = ends.into_iter().filter(is_retained).collect();
    let mut moments: Vec<(Position, Digest)> = ends.first().into_iter().copied().collect();
    for _ in 0..MOMENTS {
        moments.extend(ends.get(stage.below(ends.len().max(1) as u64) as usize).copied());
    }
    for (at, (position, digest)) in moments.into_iter().enumerate() {
        let (objects, keys) = (objects.clone(), world.ground.keys.clone());
        // Nothing was done to a certain file since it became certain: the newest moment has it.
        let files = if at == 0 && held == tip { files.clone() } else { Vec::new() };
        let bytes = !world.bytes_lost.load(Ordering::Relaxed);
        let moment = Moment { position, digest, files, bytes };
        let restored = in_own_time(move || async move { restore(objects, keys, moment).await });
        match restored {
            Ok(Began::WithTheLog) => stage.note(format!("restored lsn {}", position.lsn)),
            Ok(Began::WithSnapshot) => {
                stage.count("restores that began with a snapshot");
                stage.note(format!("restored lsn {}, from a snapshot on", position.lsn));
            }
            Err(error) => return stage.violated(&told_of(position.lsn, &error)),
        }
    }
}

/// What is wrong with a restore, behind the name of the invariant if it is one that has a name.
fn told_of(lsn: Lsn, error: &str) -> String {
    let named = ["deleted", "digest", "lost", "foreign"].into_iter().find(|name| error.starts_with(name));
    match named.and_then(|name| Some((name, error.strip_prefix(name)?.strip_prefix(": ")?))) {
        Some((name, what)) => format!("{name}: a restore of lsn {lsn}: {what}"),
        None => format!("a restore of lsn {lsn}: {error}"),
    }
}

/// The moments that each archive has alone.
fn spans(intact: &[Arc<Account>]) -> Result<Vec<RangeInclusive<Lsn>>, String> {
    let objects: Vec<_> = intact.iter().map(|account| (account.name.clone(), account.objects())).collect();
    in_own_time(move || async move {
        let mut spans = Vec::new();
        for archive in open(&objects).await? {
            let walked = walk(&archive, None).await.map_err(|error| error.to_string())?;
            spans.push(begin_of(&archive).await..=walked.end.position.lsn);
        }
        Ok(spans)
    })
}

/// The first moment that an archive has alone: of one that was added late the first snapshot, which may have been taken after its base when
/// adding it was cut short.
async fn begin_of(archive: &Archive) -> Lsn {
    let base = archive.descriptor().base.lsn;
    if base <= Lsn::ROOT {
        return base;
    }
    let found = bases(archive).await.unwrap_or_default();
    let first = found.into_iter().flatten().map(|manifest| manifest.state.position.lsn).min();
    first.unwrap_or(Lsn::MAX)
}

/// How far the furthest archive goes.
async fn furthest(accounts: &[(String, Arc<InMemory>)]) -> Result<Position, String> {
    let mut furthest: Option<Position> = None;
    for archive in open(accounts).await? {
        let walked = walk(&archive, None).await.map_err(|error| error.to_string())?;
        furthest = furthest.into_iter().chain([walked.end.position]).max_by_key(|position| position.lsn);
    }
    furthest.ok_or_else(|| "there is none".to_owned())
}

/// The archives in these accounts that can be opened.
pub(super) async fn open(accounts: &[(String, Arc<InMemory>)]) -> Result<Vec<Archive>, String> {
    let mut archives = Vec::new();
    for (name, objects) in accounts {
        let store = ArchiveStore::new(Arc::clone(objects) as _, Path::from("archive"), name);
        // A damaged descriptor is a dead archive.
        archives.extend(Archive::open(store).await.ok());
    }
    if archives.is_empty() { Err("no archive can be opened".to_owned()) } else { Ok(archives) }
}

/// A moment, and what must be there.
struct Moment {
    position: Position,
    digest: Digest,
    files: Vec<(String, Certain)>,
    /// Whether all bytes must be.
    bytes: bool,
}

/// Restores one moment with its bytes, and looks at it.
async fn restore(
    accounts: Vec<(String, Arc<InMemory>)>,
    keys: VolumeKeys,
    Moment { position, digest, files, bytes }: Moment,
) -> Result<Began, String> {
    let archives = open(&accounts).await?;
    let (index, state, began) = restore_around(&archives, Target::Lsn(position.lsn)).await?;
    // The epoch may be the one in which a successor has taken the same entries over.
    let found = (state.position.lsn, state.position.hash, state.digest);
    if found != (position.lsn, position.hash, digest) {
        return Err(format!("digest: it ends at {} with {}, it was {digest}", state.position, state.digest));
    }
    let sources: Vec<Arc<dyn BlockStore>> = accounts
        .iter()
        .map(|(name, objects)| {
            let store = ObjectBlockStore::new(Arc::clone(objects) as _, Path::from("archive"), name.clone());
            Arc::new(store) as Arc<dyn BlockStore>
        })
        .collect();
    let blocks: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
    let packs = restore_packs(&sources, &index.snapshot(), Arc::clone(&blocks), Arc::new(|_| {})).await;
    let packs = packs.map_err(|error| format!("packs: {error}"))?;
    if bytes && !packs.is_complete() {
        return Err(format!("deleted: {} packs are missing: {:?}", packs.missing, packs.examples));
    }
    // A volume's threads would have to be waited for at its end.
    let _in_place = InPlace::begin();
    let log = Arc::new(MemoryLog::new(state));
    let parts = VolumeParts {
        log: log as Arc<dyn Log>,
        index,
        state,
        last_time: LogTime::default(),
        keys,
        clock: Arc::new(SystemClock::new()),
        fetcher: PackFetcher::new(vec![Arc::clone(&blocks)], CellCache::new(1 << 20), None),
        blocks,
        runtime: tokio::runtime::Handle::current(),
        options: VolumeOptions::default(),
    };
    let volume = Volume::open(parts).map_err(|error| error.to_string())?;
    for (name, certain) in &files {
        compare(&volume, name, certain).await?;
    }
    Ok(began)
}

/// Restores the tree of `target`, as the program does: a snapshot that turns out to be damaged is left out of the next plan.
pub(super) async fn restore_around(
    archives: &[Archive],
    target: Target,
) -> Result<(Arc<MemoryIndex>, State, Began), String> {
    let mut excluded = BTreeSet::new();
    loop {
        let plan = plan_restore(archives, target, &excluded, &TimeZone::UTC).await;
        let plan = plan.map_err(|error| format!("is not planned: {error}"))?;
        let began = if plan.route.snapshot.is_some() { Began::WithSnapshot } else { Began::WithTheLog };
        let index = Arc::new(MemoryIndex::new());
        let into = Arc::clone(&index) as Arc<dyn Index>;
        match restore_tree(archives, &plan, into, Arc::new(|_| {})).await {
            Ok(state) => return Ok((index, state, began)),
            Err(RestoreError::Snapshot { folder, .. } | RestoreError::OtherSnapshot { folder, .. }) => {
                excluded.insert(folder);
            }
            Err(error) => return Err(format!("fails: {error}")),
        }
    }
}

/// What a restore began with.
pub(super) enum Began {
    WithTheLog,
    WithSnapshot,
}

/// Runs `work` on a thread with a runtime and time of its own, while the world stands still.
pub(super) fn in_own_time<T, F>(work: impl FnOnce() -> F + Send + 'static) -> Result<T, String>
where
    T: Send + 'static,
    F: Future<Output = Result<T, String>>,
{
    let running = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.map_err(|error| error.to_string())?.block_on(work())
    });
    running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// So many moments beside the newest are restored.
const MOMENTS: u64 = 2;
