//! Twenty `kill -9` at random moments within one history of 3,000 files.
//!
//! `MURPHY_SEED` chooses the history and the moments, `MURPHY_KILLS` how many. How far the writers are when a kill comes depends on the machine
//! too: a seed brings back the operations and the moments in terms of operations, not of instructions.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use murphy_tests::{Found, Ledger, PATIENCE, Random, Scratch, can_mount, number_from_env, pause, wait_until};
use rustix::process::Signal;

/// What fsync acknowledged is there, whenever the process dies; and nothing is there that nobody wrote.
#[test]
fn twenty_kills_lose_nothing_acknowledged_and_show_no_foreign_bytes() {
    if !can_mount("twenty_kills_lose_nothing_acknowledged_and_show_no_foreign_bytes") {
        return;
    }
    let seed = number_from_env("MURPHY_SEED", 1);
    let kills = number_from_env("MURPHY_KILLS", KILLS);
    eprintln!("MURPHY_SEED={seed} MURPHY_KILLS={kills}");
    let mut random = Random::new(seed);
    let scratch = Scratch::new(env!("CARGO_BIN_EXE_murphy-program"));
    scratch.format("node", "blocks");
    let mount = scratch.mount("node", "mnt");
    let mut writers: Vec<Writer> = (0..WRITERS).map(|number| Writer::new(number, seed)).collect();
    writers.iter().for_each(|writer| writer.begin(&mount).unwrap());
    scratch.run(["flush", "mnt"]).expect_code(0);

    let mut cut_short = 0;
    for kill in 1..=kills {
        let held = File::create(mount.join("held")).unwrap();
        (&held).write_all(b"written before the kill, synced after it").unwrap();
        let files: usize = writers.iter().map(|writer| writer.made).sum();
        let share = (FILES - files) / (kills - kill + 2) as usize;
        // At 1 it is in the first operation; beyond the last one it would kill nobody at work.
        let moment = 1 + random.index(share * 3 / 2);
        let pause = Duration::from_micros(random.below(4_000));
        let wrecked = work_until_killed(&mut writers, &mount, &scratch, moment, pause);
        cut_short += wrecked;
        held.sync_all().expect_err("a handle from before the crash must never report success");
        drop(held);
        scratch.mount("node", "mnt");
        for writer in &mut writers {
            let wrong = writer.ledger.check(&mount).unwrap();
            assert!(
                wrong.is_empty(),
                "MURPHY_SEED={seed}, kill {kill} in operation {moment} after {pause:?}:\n{}",
                wrong.join("\n")
            );
        }
        assert_no_foreign_names(&writers, &mount);
    }
    let nowhere = AtomicUsize::new(0);
    writers.iter_mut().try_for_each(|writer| writer.work(&mount, &nowhere, usize::MAX)).unwrap();
    let lines: usize = writers.iter().map(|writer| writer.ledger.lines()).sum();
    let files: usize = writers.iter().map(|writer| writer.made).sum();
    eprintln!("{files} files, {lines} lines, {kills} kills, {cut_short} operations cut short");
    assert!(files >= FILES && lines >= LINES_MIN, "{files} files, {lines} lines");
    // Every writer was at work when most of the kills came.
    assert!(cut_short as u64 >= kills, "{cut_short} operations cut short");

    scratch.umount("mnt");
    let sound = scratch.run(["fsck", "node", "--data", "--json"]).expect_code(0).json();
    assert_eq!(sound["findings"], 0, "{sound}");
    scratch.mount("node", "mnt");
    for writer in &writers {
        assert_eq!(writer.ledger.check_live(&mount).unwrap(), Vec::<String>::new(), "MURPHY_SEED={seed}");
    }
    assert_no_foreign_names(&writers, &mount);
}

/// Lets the writers work, and kills the process `after` operation `moment` has begun; returns how many operations were cut short.
fn work_until_killed(
    writers: &mut [Writer],
    mount: &Path,
    scratch: &Scratch,
    moment: usize,
    after: Duration,
) -> usize {
    let (begun, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let threads: Vec<_> = writers
            .iter_mut()
            .map(|writer| {
                let (begun, ended) = (&begun, &ended);
                scope.spawn(move || {
                    let worked = writer.work(mount, begun, FILES / WRITERS);
                    ended.store(worked.is_ok(), Ordering::Relaxed);
                    worked
                })
            })
            .collect();
        wait_until("the writers to get there", PATIENCE, || {
            begun.load(Ordering::Relaxed) >= moment || ended.load(Ordering::Relaxed)
        });
        pause(after);
        assert_eq!(scratch.signal_all(Signal::KILL), 1, "nobody was killed");
        threads
            .into_iter()
            .filter_map(|thread| thread.join().unwrap().err())
            .map(|error| assert_is_end(&error))
            .count()
    })
}

/// A writer may only ever meet the end of the process behind its mount.
fn assert_is_end(error: &io::Error) {
    use rustix::io::Errno;
    let ends = [Errno::NOTCONN, Errno::CONNABORTED, Errno::IO].map(|errno| Some(errno.raw_os_error()));
    assert!(ends.contains(&error.raw_os_error()), "a writer met {error}");
}

/// Names that nobody made are foreign too.
fn assert_no_foreign_names(writers: &[Writer], mount: &Path) {
    for writer in writers {
        for entry in fs::read_dir(mount.join(&writer.home)).unwrap() {
            let below = writer.home.join(entry.unwrap().file_name());
            for entry in fs::read_dir(mount.join(&below)).unwrap() {
                let path = below.join(entry.unwrap().file_name());
                assert!(writer.ledger.paths().any(|known| known == path), "{}", path.display());
            }
        }
    }
}

/// One writer in its own directories, and its ledger.
struct Writer {
    home: PathBuf,
    random: Random,
    ledger: Ledger,
    /// Files created so far.
    made: usize,
    /// Files that are there, as far as the writer knows.
    files: Vec<PathBuf>,
}

impl Writer {
    fn new(number: usize, seed: u64) -> Writer {
        let random = Random::new(seed.wrapping_mul(1_000).wrapping_add(number as u64));
        let home = PathBuf::from(format!("writer{number}"));
        Writer { home, random, ledger: Ledger::default(), made: 0, files: Vec::new() }
    }

    fn begin(&self, mount: &Path) -> io::Result<()> {
        (0..DIRECTORIES)
            .try_for_each(|number| fs::create_dir_all(mount.join(self.home.join(format!("d{number}")))))
    }

    /// Works until it has made `files` files, at least its share, or the first error.
    fn work(&mut self, mount: &Path, begun: &AtomicUsize, files: usize) -> io::Result<()> {
        self.files =
            self.ledger.paths().filter(|path| self.ledger.live(path).is_some()).map(Path::to_owned).collect();
        while self.made < files.min(FILES.div_ceil(WRITERS)) {
            begun.fetch_add(1, Ordering::Relaxed);
            let (made, home) = (self.made, self.home.display().to_string());
            self.step(mount).inspect_err(|error| eprintln!("{home}, file {made}: {error}"))?;
        }
        Ok(())
    }

    fn step(&mut self, root: &Path) -> io::Result<()> {
        let choice = self.random.below(40);
        if choice < 30 || self.files.is_empty() {
            return self.create(root, choice < 9);
        }
        let place = self.random.index(self.files.len());
        let path = self.files[place].clone();
        match choice {
            30 | 31 => self.append(root, &path),
            32 | 33 => self.overwrite(root, &path),
            34 => self.rename(root, &path, place),
            35 => {
                self.files.swap_remove(place);
                self.remove(root, &path)
            }
            36 => self.replace(root, &path, true),
            _ => self.replace(root, &path, false),
        }
    }

    fn fresh(&mut self) -> PathBuf {
        self.made += 1;
        let directory = self.random.below(DIRECTORIES);
        self.home.join(format!("d{directory}/f{:05}", self.made))
    }

    fn contents(&mut self) -> Vec<u8> {
        let length = match self.random.below(60) {
            0 => 1 + self.random.index(2 << 20),
            1..=4 => 100_000 + self.random.index(100_000),
            _ => 1 + self.random.index(8_000),
        };
        self.random.bytes(length)
    }

    /// A new file; without fsync it may be absent or short after a crash.
    fn create(&mut self, root: &Path, synced: bool) -> io::Result<()> {
        let (path, bytes) = (self.fresh(), self.contents());
        let partly = Found::Grown { least: 0, bytes: bytes.clone() };
        self.ledger.begin(&path, [partly.clone()]);
        let mut file = File::create(root.join(&path))?;
        for chunk in bytes.chunks(bytes.len().div_ceil(3)) {
            file.write_all(chunk)?;
        }
        self.ledger.done(&path, Some(bytes), vec![partly]);
        if synced {
            self.sync(root, &file, &[&path])?;
        }
        self.files.push(path);
        Ok(())
    }

    fn append(&mut self, root: &Path, path: &Path) -> io::Result<()> {
        let mut bytes = self.live(path);
        let least = bytes.len();
        bytes.extend(self.contents());
        // A file that was never synced may still be short when this comes.
        let least = if self.is_whole(path) { least } else { 0 };
        let grown = Found::Grown { least, bytes: bytes.clone() };
        self.ledger.begin(path, [grown.clone()]);
        let mut file = File::options().append(true).open(root.join(path))?;
        let from = self.live(path).len();
        file.write_all(&bytes[from..])?;
        self.ledger.done(path, Some(bytes), vec![grown]);
        self.sync(root, &file, &[path])
    }

    fn overwrite(&mut self, root: &Path, path: &Path) -> io::Result<()> {
        let file = File::options().write(true).open(root.join(path))?;
        if !self.is_whole(path) {
            self.sync(root, &file, &[path])?;
        }
        let old = self.live(path);
        let mut new = old.clone();
        let (from, length) = (self.random.index(old.len().max(1)), 1 + self.random.index(20_000));
        let patch = self.random.bytes(length.min(old.len() - from));
        new[from..from + patch.len()].copy_from_slice(&patch);
        let mixed = Found::Mixed { old, new: new.clone() };
        self.ledger.begin(path, [mixed.clone()]);
        file.write_all_at(&patch, from as u64)?;
        self.ledger.done(path, Some(new), vec![mixed]);
        self.sync(root, &file, &[path])
    }

    fn rename(&mut self, root: &Path, path: &Path, place: usize) -> io::Result<()> {
        let file = File::open(root.join(path))?;
        if !self.is_whole(path) {
            self.sync(root, &file, &[path])?;
        }
        let directory = self.random.below(DIRECTORIES);
        let to = self.home.join(format!("d{directory}/moved-{}", self.random.next_u64()));
        self.ledger.begin_move(path, &to);
        fs::rename(root.join(path), root.join(&to))?;
        let bytes = self.live(path);
        self.ledger.done(path, None, vec![Found::Absent]);
        self.ledger.done(&to, Some(bytes.clone()), vec![Found::whole(bytes)]);
        self.files[place].clone_from(&to);
        self.sync(root, &file, &[path, &to])
    }

    fn remove(&mut self, root: &Path, path: &Path) -> io::Result<()> {
        self.ledger.begin(path, [Found::Absent]);
        fs::remove_file(root.join(path))?;
        self.ledger.done(path, None, vec![Found::Absent]);
        let directory = File::open(root.join(path.parent().unwrap_or(path)))?;
        directory.sync_all()?;
        self.ledger.acknowledge(&[path]);
        Ok(())
    }

    /// What editors do: a new file beside it, renamed over it. Without fsync it is the old or the new one, never empty and never a mix.
    fn replace(&mut self, root: &Path, path: &Path, synced: bool) -> io::Result<()> {
        let (beside, bytes) = (path.with_extension("tmp"), self.contents());
        let partly = Found::Grown { least: 0, bytes: bytes.clone() };
        self.ledger.begin(&beside, [partly]);
        let mut file = File::create(root.join(&beside))?;
        file.write_all(&bytes)?;
        if synced {
            file.sync_all()?;
        }
        let whole = Found::whole(bytes.clone());
        self.ledger.begin(path, [whole.clone()]);
        fs::rename(root.join(&beside), root.join(path))?;
        self.ledger.done(&beside, None, vec![Found::Absent]);
        self.ledger.done(path, Some(bytes), vec![whole]);
        if synced {
            self.sync(root, &file, &[path, &beside])?;
        }
        Ok(())
    }

    /// fsync of the file and of the directories, then a line.
    fn sync(&mut self, root: &Path, file: &File, paths: &[&Path]) -> io::Result<()> {
        file.sync_all()?;
        for parent in paths.iter().filter_map(|path| path.parent()) {
            File::open(root.join(parent))?.sync_all()?;
        }
        self.ledger.acknowledge(paths);
        Ok(())
    }

    fn live(&self, path: &Path) -> Vec<u8> {
        self.ledger.live(path).unwrap_or_default().to_vec()
    }

    fn is_whole(&self, path: &Path) -> bool {
        self.ledger.is_certain(path)
    }
}

const FILES: usize = 3_000;
const KILLS: u64 = 20;
const WRITERS: usize = 3;
const DIRECTORIES: u64 = 4;
const LINES_MIN: usize = 1_000;
