//! A disk cache of parts of packs, for stores that are far away. A `file://` store has none above it.
//!
//! Each file holds one run of stored bytes: `<aa>/<pack name>.<start>-<end>`. Nothing is synced: a file that a power cut left
//! damaged is found out by the reader, who verifies, and is then discarded.
//!
//! Invariants:
//! - A file appears by rename, so that its length is that of its name or the file system lost bytes.
//! - The cache takes at most its limit of file contents; the runs used longest ago go first.
//! - A failure of the cache's disk is logged once and makes the cache useless, never a read wrong.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use murphy_log::{Files, OsFiles};
use parking_lot::Mutex;

use crate::data::name::PackName;

/// Runs of stored bytes of packs in a directory of their own. Its methods block on the disk.
#[derive(Debug)]
pub struct DiskCache {
    files: Arc<dyn Files>,
    root: PathBuf,
    limit: u64,
    runs: Mutex<Runs>,
    next_temporary: AtomicU64,
    complained: AtomicBool,
}

/// The directory of a disk cache cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the cache directory {}: {source}", path.display())]
pub struct DiskCacheError {
    /// The directory or file.
    pub path: PathBuf,
    /// What happened.
    pub source: io::Error,
}

impl DiskCache {
    /// The cache in `root`, which is created if it is missing, with at most `limit` bytes of runs. Only one process may have
    /// it open. What an interrupted process left half-written is removed.
    pub fn open(root: PathBuf, limit: u64) -> Result<DiskCache, DiskCacheError> {
        DiskCache::open_on(Arc::new(OsFiles), root, limit)
    }

    /// The same on a disk that is given.
    pub fn open_on(files: Arc<dyn Files>, root: PathBuf, limit: u64) -> Result<DiskCache, DiskCacheError> {
        let mut found = Vec::new();
        scan(&*files, &root, &mut found).map_err(|source| DiskCacheError { path: root.clone(), source })?;
        // The order of last use is not kept; that of writing is the best guess.
        found.sort_by_key(|(written, _, _)| *written);
        let cache = DiskCache {
            files,
            root,
            limit,
            runs: Mutex::default(),
            next_temporary: AtomicU64::new(0),
            complained: AtomicBool::new(false),
        };
        for (_, pack, run) in found {
            let evicted = cache.runs.lock().insert(pack, run, limit);
            cache.remove_files(evicted);
        }
        Ok(cache)
    }

    /// How many bytes of runs the cache holds.
    pub fn bytes(&self) -> u64 {
        self.runs.lock().bytes
    }

    /// The stored bytes `range` of `pack`, not verified; `None` if no run covers them.
    pub(in crate::data) fn get(&self, pack: PackName, range: &Range<u64>) -> Option<Vec<u8>> {
        let run = self.runs.lock().touch(pack, range)?;
        let mut bytes = vec![0; usize::try_from(range.end - range.start).ok()?];
        let path = self.path(pack, &run);
        match self.read(&path, range.start - run.start, &mut bytes) {
            Ok(()) => Some(bytes),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a cache file cannot be read; discarded");
                self.discard(pack, range);
                None
            }
        }
    }

    /// Whether some run covers `range`.
    pub(in crate::data) fn covers(&self, pack: PackName, range: &Range<u64>) -> bool {
        self.runs.lock().covering(pack, range).is_some()
    }

    /// Keeps `bytes`, which begin at `start` in the stored form of `pack`.
    pub(in crate::data) fn put(&self, pack: PackName, start: u64, bytes: &[u8]) {
        let run = start..start + bytes.len() as u64;
        if bytes.is_empty() || bytes.len() as u64 > self.limit || self.covers(pack, &run) {
            return;
        }
        if let Err(error) = self.write(pack, &run, bytes) {
            if !self.complained.swap(true, Ordering::Relaxed) {
                tracing::warn!(cache = %self.root.display(), %error, "the cache directory takes no more files");
            }
            return;
        }
        let evicted = self.runs.lock().insert(pack, run, self.limit);
        self.remove_files(evicted);
    }

    /// Forgets every run of `pack` that has a byte of `range`: they were found damaged.
    pub(in crate::data) fn discard(&self, pack: PackName, range: &Range<u64>) {
        let damaged = self.runs.lock().remove_overlapping(pack, range);
        self.remove_files(damaged);
    }

    fn read(&self, path: &Path, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let read = self.files.open(path)?.read_at(offset, bytes)?;
        if read < bytes.len() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn write(&self, pack: PackName, run: &Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(format!("{TEMPORARY}{temporary}"));
        let path = self.path(pack, run);
        let written = self.files.create(&temporary).and_then(|file| file.write_at(0, bytes));
        let renamed = written.and_then(|()| self.files.rename(&temporary, &path)).or_else(|error| {
            let folder = path.parent().filter(|_| error.kind() == io::ErrorKind::NotFound).ok_or(error)?;
            self.files.create_dir(folder)?;
            self.files.rename(&temporary, &path)
        });
        if renamed.is_err() {
            // The next open removes what cannot be removed now.
            self.files.remove(&temporary).or_else(ignore_missing)?;
        }
        renamed
    }

    fn remove_files(&self, runs: Vec<(PackName, Range<u64>)>) {
        for (pack, run) in runs {
            let path = self.path(pack, &run);
            if let Err(error) = self.files.remove(&path).or_else(ignore_missing) {
                tracing::warn!(path = %path.display(), %error, "a cache file cannot be removed");
            }
        }
    }

    fn path(&self, pack: PackName, run: &Range<u64>) -> PathBuf {
        self.root.join(format!("{:02x}/{pack}.{}-{}", pack.shard(), run.start, run.end))
    }
}

/// The runs that the directory holds, by pack and by last use.
#[derive(Debug, Default)]
struct Runs {
    by_pack: HashMap<PackName, Vec<Run>>,
    by_use: BTreeMap<u64, (PackName, u64, u64)>,
    bytes: u64,
    next_use: u64,
}

#[derive(Debug)]
struct Run {
    range: Range<u64>,
    used: u64,
}

impl Runs {
    fn covering(&self, pack: PackName, range: &Range<u64>) -> Option<usize> {
        let covers = |run: &Run| run.range.start <= range.start && range.end <= run.range.end;
        self.by_pack.get(&pack)?.iter().position(covers)
    }

    /// The run that covers `range`, which is now the last used.
    fn touch(&mut self, pack: PackName, range: &Range<u64>) -> Option<Range<u64>> {
        let at = self.covering(pack, range)?;
        let now = self.next_use;
        self.next_use += 1;
        let run = self.by_pack.get_mut(&pack)?.get_mut(at)?;
        self.by_use.remove(&run.used);
        run.used = now;
        self.by_use.insert(now, (pack, run.range.start, run.range.end));
        Some(run.range.clone())
    }

    /// Adds a run. Returns those that went for it: those within it, and those used longest ago.
    fn insert(&mut self, pack: PackName, range: Range<u64>, limit: u64) -> Vec<(PackName, Range<u64>)> {
        let mut gone = self.remove_where(pack, |run| range.start <= run.start && run.end <= range.end);
        // The file of an equal run is the one just written.
        gone.retain(|(_, old)| *old != range);
        let used = self.next_use;
        self.next_use += 1;
        self.bytes += range.end - range.start;
        self.by_use.insert(used, (pack, range.start, range.end));
        self.by_pack.entry(pack).or_default().push(Run { range, used });
        while self.bytes > limit {
            let Some((_, &(pack, start, end))) = self.by_use.first_key_value() else { break };
            gone.extend(self.remove_where(pack, |run| *run == (start..end)));
        }
        gone
    }

    fn remove_overlapping(&mut self, pack: PackName, range: &Range<u64>) -> Vec<(PackName, Range<u64>)> {
        self.remove_where(pack, |run| run.start < range.end && range.start < run.end)
    }

    fn remove_where(
        &mut self,
        pack: PackName,
        gone: impl Fn(&Range<u64>) -> bool,
    ) -> Vec<(PackName, Range<u64>)> {
        let Some(runs) = self.by_pack.get_mut(&pack) else { return Vec::new() };
        let removed: Vec<Run> = runs.extract_if(.., |run| gone(&run.range)).collect();
        if runs.is_empty() {
            self.by_pack.remove(&pack);
        }
        for run in &removed {
            self.by_use.remove(&run.used);
            self.bytes -= run.range.end - run.range.start;
        }
        removed.into_iter().map(|run| (pack, run.range)).collect()
    }
}

/// When a file was written, and the run that it holds.
type Found = (Option<std::time::SystemTime>, PackName, Range<u64>);

/// Collects the runs in `root` and removes half-written files. Files of other names are left alone.
fn scan(files: &dyn Files, root: &Path, found: &mut Vec<Found>) -> io::Result<()> {
    files.create_dir(root)?;
    for name in files.list(root)? {
        let path = root.join(&name);
        if name.starts_with(TEMPORARY) {
            files.remove(&path)?;
        } else if name.len() == 2 {
            let inside = match files.list(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => continue,
                inside => inside?,
            };
            for name in inside {
                let Some((pack, run)) = parse_run(&name) else { continue };
                let file = files.open(&path.join(&name))?;
                if file.length()? == run.end - run.start {
                    found.push((file.modified().ok(), pack, run));
                } else {
                    files.remove(&path.join(&name))?;
                }
            }
        }
    }
    Ok(())
}

fn parse_run(file_name: &str) -> Option<(PackName, Range<u64>)> {
    let (pack, run) = file_name.split_once('.')?;
    let (start, end) = run.split_once('-')?;
    let run: Range<u64> = start.parse().ok()?..end.parse().ok()?;
    (run.start < run.end).then_some((pack.parse().ok()?, run))
}

fn ignore_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// How the names of half-written files begin.
const TEMPORARY: &str = "tmp-";

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::name::WriterId;

    fn pack(number: u64) -> PackName {
        PackName::new(WriterId::from_u64(5), number)
    }

    #[test]
    fn what_was_put_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path().join("new"), 1000).unwrap();
        cache.put(pack(1), 10, b"0123456789");
        drop(cache);
        let cache = DiskCache::open(folder.path().join("new"), 1000).unwrap();
        assert_eq!(cache.get(pack(1), &(12..15)).unwrap(), b"234");
        for uncovered in [9..11, 15..21, 30..31] {
            assert_eq!(cache.get(pack(1), &uncovered), None);
        }
        assert_eq!(cache.get(pack(2), &(12..15)), None);
    }

    #[test]
    fn the_limit_holds_and_the_run_used_longest_ago_goes_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path().to_owned(), 30).unwrap();
        for number in 1..=3 {
            cache.put(pack(number), 0, &[0; 10]);
        }
        assert!(cache.get(pack(1), &(0..10)).is_some());
        cache.put(pack(4), 0, &[0; 10]);
        assert_eq!(cache.get(pack(2), &(0..10)), None);
        assert!(cache.get(pack(1), &(0..10)).is_some());
        assert_eq!(cache.bytes(), 30);
        cache.put(pack(5), 0, &[0; 31]);
        assert_eq!(cache.bytes(), 30);
        drop(cache);
        let smaller = DiskCache::open(folder.path().to_owned(), 15).unwrap();
        assert_eq!(smaller.bytes(), 10);
        drop(smaller);
        assert_eq!(DiskCache::open(folder.path().to_owned(), 1000).unwrap().bytes(), 10);
    }

    #[test]
    fn a_larger_run_replaces_those_within_it() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path().to_owned(), 1000).unwrap();
        cache.put(pack(1), 10, &[1; 10]);
        cache.put(pack(1), 0, &[2; 100]);
        cache.put(pack(1), 50, &[3; 10]);
        assert_eq!(cache.bytes(), 100);
        assert_eq!(cache.get(pack(1), &(10..12)).unwrap(), [2, 2]);
    }

    #[test]
    fn leftovers_truncated_files_and_strangers_do_no_harm() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path().to_owned(), 1000).unwrap();
        cache.put(pack(1), 0, &[1; 10]);
        cache.put(pack(2), 0, &[1; 10]);
        let path = cache.path(pack(1), &(0..10));
        drop(cache);
        fs::write(&path, [1; 4]).unwrap();
        fs::write(folder.path().join("tmp-7"), "half").unwrap();
        fs::write(folder.path().join("README"), "not ours").unwrap();
        fs::write(path.with_extension("5-2"), "strange").unwrap();
        let cache = DiskCache::open(folder.path().to_owned(), 1000).unwrap();
        assert_eq!(cache.bytes(), 10);
        assert!(!folder.path().join("tmp-7").exists());
        assert!(folder.path().join("README").exists());
    }

    #[test]
    fn a_file_that_vanished_or_shrank_is_a_miss() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::open(folder.path().to_owned(), 1000).unwrap();
        cache.put(pack(1), 0, &[1; 10]);
        fs::write(cache.path(pack(1), &(0..10)), [1; 4]).unwrap();
        assert_eq!(cache.get(pack(1), &(0..10)), None);
        assert!(!cache.covers(pack(1), &(0..10)));
        assert_eq!(cache.bytes(), 0);
    }
}
