//! A mirror mounted with lifetimes of a year: whatever happens at the source, the kernel shows it, because it is told, and answers from
//! its cache otherwise.
//!
//! Invariants:
//! - The source is changed and read through a mount of its own whose kernel caches nothing; the mirror is read through the mount that is
//!   judged, and never changed.
//! - Nothing is waited for longer than [`PATIENCE`].

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStringExt,
        fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use murphy_fs::{
    BlockStore, FileSystem, Lifetimes, Mount, MountOptions, ObjectBlockStore, RequestKind, VolumeOptions,
};
use murphy_tests::{PATIENCE, Pair, TreeRules, can_mount, compare_directories, wait_for_ok};
use rustix::fs::{CWD, RenameFlags, XattrFlags};
use tempfile::TempDir;

/// A source and a mirror of it, both mounted.
pub(super) struct World {
    source_mount: Mount,
    pub(super) mirror_mount: Mount,
    pub(super) pair: Pair,
    source: TempDir,
    mirror: TempDir,
}

impl World {
    /// `None` where this machine cannot mount, which is said.
    fn new(test: &str) -> Option<World> {
        World::after(test, Arc::new(ObjectBlockStore::in_memory()), |_| {})
    }

    /// The same over this block store, with what `before` does at the source before the mirror is mounted.
    pub(super) fn after(
        test: &str,
        blocks: Arc<dyn BlockStore>,
        before: impl FnOnce(&Path),
    ) -> Option<World> {
        if !can_mount(test) {
            return None;
        }
        let options = VolumeOptions { generation_bytes: 64 << 10, ..VolumeOptions::default() };
        let pair = Pair::over(options, blocks);
        let (source, mirror) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let runtime = pair.driver().handle().clone();
        let options = |name, lifetimes| MountOptions { lifetimes, ..MountOptions::new(name) };
        let fs: Arc<dyn FileSystem> = Arc::new(pair.source.clone());
        let uncached = options("source", Lifetimes::NONE);
        let source_mount = Mount::new(fs, source.path(), &uncached, runtime.clone()).unwrap();
        before(source.path());
        pair.wait_shown(pair.copy(), PATIENCE).unwrap();
        let cached = options("mirror", Lifetimes { entry: YEAR, attr: YEAR, missing: YEAR });
        let mirror_mount = Mount::following(&pair.follower, mirror.path(), &cached, runtime).unwrap();
        let world = World { source_mount, mirror_mount, pair, source, mirror };
        world.arrive();
        Some(world)
    }

    pub(super) fn at_source(&self, name: impl AsRef<Path>) -> PathBuf {
        self.source.path().join(name)
    }

    pub(super) fn at_mirror(&self, name: impl AsRef<Path>) -> PathBuf {
        self.mirror.path().join(name)
    }

    /// Everything that the source has done is visible at the mirror, and its kernel has been told.
    pub(super) fn arrive(&self) {
        let lsn = self.pair.copy();
        self.pair.wait_shown(lsn, PATIENCE).unwrap();
        let invalidator = self.mirror_mount.invalidator().unwrap();
        assert!(invalidator.wait_for(lsn, PATIENCE), "{:?} of {lsn}", invalidator.stats());
        assert!(!invalidator.stats().lost);
    }

    fn differences(&self) -> Vec<String> {
        match compare_directories(self.source.path(), self.mirror.path(), TreeRules::COPY) {
            Ok(found) => found.iter().map(ToString::to_string).collect(),
            Err(error) => vec![error.to_string()],
        }
    }

    /// Nothing at the mirror was looked up while the change arrived: the kernel is right at once.
    #[track_caller]
    fn same(&self, step: &str) {
        self.arrive();
        assert_eq!(self.differences(), Vec::<String>::new(), "after {step}");
    }

    /// Others look at the mirror meanwhile: what they were told may have crossed the change, and is right when it was told again.
    #[track_caller]
    fn soon_same(&self, step: &str) {
        self.arrive();
        wait_for_ok(&format!("one tree after {step}"), PATIENCE, || match self.differences() {
            differences if differences.is_empty() => Ok(()),
            differences => Err(differences),
        });
    }

    pub(super) fn end(self) {
        self.mirror_mount.unmount().unwrap();
        self.source_mount.unmount().unwrap();
    }
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8 ^ seed | 1).collect()
}

fn append(path: &Path, bytes: &[u8]) {
    OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

/// Each step is one kind of change, seen by a kernel that has everything before it in its caches for a year.
#[test]
fn every_kind_of_change_is_seen_at_once_through_year_long_lifetimes() {
    let Some(world) = World::new("every_kind_of_change_is_seen_at_once_through_year_long_lifetimes") else {
        return;
    };
    let at = |name: &str| world.at_source(name);
    fs::create_dir(at("d")).unwrap();
    fs::write(at("d/f"), pattern(10_000, 1)).unwrap();
    fs::write(at("g"), b"g").unwrap();
    world.same("making files");
    for missing in ["new", "d/new", "e", "link", "s"] {
        assert!(fs::metadata(world.at_mirror(missing)).is_err(), "the kernel remembers that it is missing");
    }
    fs::write(at("new"), b"new").unwrap();
    world.same("creating a name that was known as missing");
    fs::create_dir(at("e")).unwrap();
    world.same("mkdir");
    File::options().write(true).open(at("d/f")).unwrap().write_all_at(b"overwritten", 5000).unwrap();
    world.same("overwriting within the length");
    append(&at("d/f"), &pattern(3000, 9));
    world.same("appending within a page");
    append(&at("d/f"), &pattern(300_000, 4));
    world.same("appending many pages");
    File::options().write(true).open(at("d/f")).unwrap().set_len(123).unwrap();
    world.same("truncating");
    File::options().write(true).open(at("d/f")).unwrap().set_len(9000).unwrap();
    world.same("growing with a hole");
    File::create(at("d/f")).unwrap();
    world.same("O_TRUNC");
    fs::remove_file(at("g")).unwrap();
    world.same("unlink");
    fs::write(at("g"), b"another file of this name").unwrap();
    world.same("the same name again");
    fs::set_permissions(at("g"), Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(at("e"), Permissions::from_mode(0o711)).unwrap();
    world.same("chmod");
    rustix::fs::chown(at("g"), Some(rustix::fs::Uid::from_raw(12)), Some(rustix::fs::Gid::from_raw(34)))
        .unwrap();
    world.same("chown");
    symlink("g", at("s")).unwrap();
    world.same("symlink");
    fs::remove_file(at("s")).unwrap();
    symlink("another target", at("s")).unwrap();
    world.same("another symlink of this name");
    fs::hard_link(at("g"), at("link")).unwrap();
    world.same("a further name");
    fs::remove_file(at("g")).unwrap();
    world.same("removing one of two names");
    rustix::fs::setxattr(at("link"), "user.a", b"v", XattrFlags::empty()).unwrap();
    world.same("an extended attribute");
    fs::rename(at("d"), at("e/moved")).unwrap();
    world.same("moving a directory");
    fs::rename(at("new"), at("e/moved/f")).unwrap();
    world.same("replacing a file");
    rustix::fs::renameat_with(CWD, at("e/moved"), CWD, at("link"), RenameFlags::EXCHANGE).unwrap();
    world.same("exchanging a directory and a file");
    fs::rename(at("link"), at("d")).unwrap();
    fs::remove_dir_all(at("d")).unwrap();
    world.same("removing a tree");
    fs::remove_file(at("e/moved")).unwrap();
    fs::remove_dir(at("e")).unwrap();
    fs::write(at("e"), b"a file where a directory was").unwrap();
    world.same("another kind under the same name");
    assert_eq!(world.mirror_mount.invalidator().unwrap().stats().suspensions, 0);
    world.end();
}

/// Otherwise these tests would pass without any cache.
#[test]
fn what_does_not_change_costs_no_request_meanwhile() {
    let Some(world) = World::new("what_does_not_change_costs_no_request_meanwhile") else { return };
    for file in 0..20 {
        fs::write(world.at_source(format!("quiet-{file}")), pattern(5000, file)).unwrap();
    }
    fs::create_dir(world.at_source("busy")).unwrap();
    let read = || {
        for file in 0..20_u8 {
            let path = world.at_mirror(format!("quiet-{file}"));
            assert_eq!(fs::metadata(&path).unwrap().len(), 5000);
            assert!(fs::metadata(world.at_mirror("none")).is_err());
        }
    };
    world.same("making files");
    read();
    // What was looked up a moment ago is told again about a second later, and then looked up again.
    wait_for_ok("twenty changes beside it that cost nothing", PATIENCE, || {
        read();
        let before = world.mirror_mount.requests();
        for round in 0..20 {
            fs::write(world.at_source(format!("busy/{round}")), b"x").unwrap();
            world.arrive();
            read();
        }
        let since = world.mirror_mount.requests().since(&before);
        let asked = since.get(RequestKind::Lookup) + since.get(RequestKind::Getattr);
        if asked == 0 { Ok(()) } else { Err(since.to_string()) }
    });
    world.end();
}

#[test]
fn the_mirror_refuses_changes_and_is_mounted_for_writing() {
    let Some(world) = World::new("the_mirror_refuses_changes_and_is_mounted_for_writing") else { return };
    fs::write(world.at_source("f"), b"source").unwrap();
    world.same("making a file");
    let path = world.at_mirror("f");
    let refusals = [
        fs::write(&path, b"x"),
        fs::write(world.at_mirror("new"), b"x"),
        fs::create_dir(world.at_mirror("new")),
        fs::remove_file(&path),
        fs::rename(&path, world.at_mirror("new")),
        fs::set_permissions(&path, Permissions::from_mode(0o600)),
        symlink("f", world.at_mirror("new")),
        OpenOptions::new().append(true).open(&path).map(drop),
        rustix::fs::setxattr(&path, "user.a", b"v", XattrFlags::empty()).map_err(io::Error::from),
    ];
    for refusal in refusals {
        assert_eq!(refusal.unwrap_err().raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()));
    }
    world.same("nothing");
    world.end();
}

/// Runs beside a test until it is ended.
pub(super) struct Readers {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Readers {
    pub(super) fn start(count: usize, work: impl Fn() + Clone + Send + 'static) -> Readers {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let reader = |_| {
            let (work, stop, rounds) = (work.clone(), Arc::clone(&stop), Arc::clone(&rounds));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    work();
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads = (0..count).map(reader).collect();
        Readers { stop, rounds, threads }
    }

    /// Whether one of them has failed.
    pub(super) fn have_ended(&self) -> bool {
        self.threads.iter().any(thread::JoinHandle::is_finished)
    }

    /// Says how often they got through.
    pub(super) fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
        self.rounds.load(Ordering::Relaxed)
    }
}

/// Walks a tree that changes under it: names may go meanwhile, and that is all that may happen.
fn walk(directory: &Path, depth: usize) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() && depth > 0 => walk(&entry.path(), depth - 1),
            Ok(metadata) if metadata.is_file() => drop(fs::read(entry.path())),
            _ => {}
        }
    }
}

/// A number that looks random, from a seed.
fn mix(seed: &mut u64) -> usize {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as usize
}

/// Files and directories change places while others walk the mirror, and every name that the kernel keeps must be a true one.
#[test]
fn rename_storms_leave_no_stale_name() {
    let Some(world) = World::new("rename_storms_leave_no_stale_name") else { return };
    for directory in 0..4 {
        fs::create_dir(world.at_source(format!("{directory}"))).unwrap();
        for file in 0..6 {
            fs::write(world.at_source(format!("{directory}/{file}")), pattern(100 * file + 1, directory))
                .unwrap();
        }
    }
    world.same("making files");
    let root = world.mirror.path().to_owned();
    let readers = Readers::start(3, move || walk(&root, 3));
    let mut seed = 42;
    for round in 0..60 {
        for _ in 0..12 {
            let mut pick = || {
                let (directory, file) = (mix(&mut seed) % 4, mix(&mut seed) % 8);
                world.at_source(format!("{directory}/{file}"))
            };
            let (from, to) = (pick(), pick());
            // Half of the names are not there, or are of the wrong kind; what can be moved is.
            let moved = match mix(&mut seed) % 6 {
                0 => rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::EXCHANGE)
                    .map_err(io::Error::from),
                1 => fs::create_dir(&from).and_then(|()| fs::rename(&from, &to)),
                2 => fs::write(&from, pattern(mix(&mut seed) % 9000, round)),
                3 => fs::remove_file(&from).or_else(|_| fs::remove_dir(&to)),
                _ => fs::rename(&from, &to),
            };
            drop(moved);
        }
        let (one, other) = (mix(&mut seed) % 4, mix(&mut seed) % 4);
        if one != other {
            let (one, other) = (world.at_source(one.to_string()), world.at_source(other.to_string()));
            rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
        }
        if round % 10 == 9 {
            world.soon_same("a storm");
        } else {
            world.arrive();
        }
    }
    world.soon_same("the storms");
    assert!(readers.end() > 10);
    // What the readers were told last may have to be told again.
    world.soon_same("the end");
    world.end();
}

/// Whoever follows a growing file must never read what nobody wrote.
#[test]
fn a_reader_of_a_growing_file_reads_no_zeros() {
    let Some(world) = World::new("a_reader_of_a_growing_file_reads_no_zeros") else { return };
    fs::write(world.at_source("log"), b"first").unwrap();
    world.same("making the file");
    let path = world.at_mirror("log");
    let held = Arc::new(File::open(&path).unwrap());
    let readers = Readers::start(2, move || {
        for bytes in [fs::read(&path).unwrap(), read_all(&held)] {
            assert!(
                !bytes.contains(&0),
                "{} bytes, zero at {:?}",
                bytes.len(),
                bytes.iter().position(|b| *b == 0)
            );
        }
        fs::metadata(&path).unwrap();
    });
    for round in 0..400_usize {
        append(&world.at_source("log"), &pattern(1 + round * 7 % 300, 3));
        let lsn = world.pair.copy();
        if round % 20 == 0 {
            world.pair.wait_shown(lsn, PATIENCE).unwrap();
        }
    }
    world.soon_same("appending");
    assert!(readers.end() > 10);
    world.end();
}

fn read_all(file: &File) -> Vec<u8> {
    let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let count = file.read_at(&mut chunk, bytes.len() as u64).unwrap();
        if count == 0 {
            return bytes;
        }
        bytes.extend_from_slice(&chunk[..count]);
    }
}

/// Invalidation waits for locks of the kernel. Open files, open directories, mappings and readers must neither stop it nor be stopped.
#[test]
fn open_files_and_directories_hold_up_nobody() {
    let Some(world) = World::new("open_files_and_directories_hold_up_nobody") else { return };
    fs::create_dir_all(world.at_source("a/b/c")).unwrap();
    fs::write(world.at_source("a/b/c/f"), pattern(200_000, 1)).unwrap();
    fs::write(world.at_source("a/gone"), pattern(5000, 2)).unwrap();
    world.same("making files");
    let mut file = File::open(world.at_mirror("a/b/c/f")).unwrap();
    let gone = File::open(world.at_mirror("a/gone")).unwrap();
    assert_eq!(read_all(&gone), pattern(5000, 2));
    let directory = File::open(world.at_mirror("a/b/c")).unwrap();
    let mut child = std::process::Command::new("sh")
        .args(["-c", "while read line; do ls -l > /dev/null; echo done; done"])
        .current_dir(world.at_mirror("a/b"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ask = || {
        child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        let mut answer = [0; 5];
        child.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
    };
    ask();
    for round in 0..20 {
        File::options()
            .write(true)
            .open(world.at_source("a/b/c/f"))
            .unwrap()
            .write_all_at(&[round; 9], 77)
            .unwrap();
        fs::rename(world.at_source("a"), world.at_source("x")).unwrap();
        world.same("moving an open directory");
        ask();
        let mut some = [0; 100];
        file.read_exact(&mut some).unwrap();
        assert_eq!(directory.metadata().unwrap().nlink(), 2);
        let mut seen = [0; 9];
        file.read_exact_at(&mut seen, 77).unwrap();
        assert_eq!(seen, [round; 9]);
        fs::rename(world.at_source("x"), world.at_source("a")).unwrap();
        world.same("moving it back");
    }
    fs::remove_file(world.at_source("a/gone")).unwrap();
    world.same("removing an open file");
    fs::remove_dir_all(world.at_source("a")).unwrap();
    world.same("removing all that is open");
    ask();
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    drop((file, gone, directory));
    world.end();
}

/// Names of any bytes come back from the log as they are.
#[test]
fn names_that_are_no_text_are_told_too() {
    let Some(world) = World::new("names_that_are_no_text_are_told_too") else { return };
    let names: Vec<OsString> = (1..=255_u8)
        .filter(|byte| *byte != b'/')
        .map(|byte| OsString::from_vec(vec![b'n', byte, 0xff]))
        .collect();
    for name in &names {
        assert!(fs::metadata(world.at_mirror(name)).is_err());
        File::create(world.at_source(name)).unwrap();
    }
    world.same("making names");
    for name in &names {
        fs::remove_file(world.at_source(name)).unwrap();
    }
    world.same("removing names");
    assert!(names.iter().all(|name| fs::metadata(world.at_mirror(name)).is_err()));
    world.end();
}

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
