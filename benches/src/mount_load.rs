//! Loads for a mounted file system, run on several of them in turns, so that a noisy machine is noisy for all.
//!
//! Invariants:
//! - Every run begins with a fresh mount, and the order of the mounts changes from run to run.
//! - Only calls of the load are timed; making data, mounting and dropping caches are not.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use murphy_fs::{RequestCounts, RequestKind};
use murphy_log::{Clock, SystemClock};

use crate::cpu::process_cpu_nanos;

/// A mounted file system that can be measured.
pub trait Target: Send + Sync {
    /// Requests since the mount.
    fn requests(&self) -> RequestCounts;
    /// Makes the kernel forget a directory of the root and all below it.
    fn forget(&self, name: &str) -> io::Result<()>;
    /// Unmounts and waits for the end.
    fn unmount(self: Box<Self>) -> io::Result<()>;
}

/// Mounts a fresh file system: the first path is an empty directory for its state, the second the mount point.
pub type MountFn<'a> = &'a dyn Fn(&Path, &Path) -> io::Result<Box<dyn Target>>;

/// One of the file systems that are compared.
pub struct Side<'a> {
    /// Its name in the table.
    pub name: &'a str,
    /// How it is mounted.
    pub mount: MountFn<'a>,
}

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Files that are created, looked up and removed.
    pub files: usize,
    /// Size of the large file in MiB; 0 leaves it out.
    pub mebibytes: usize,
    /// Threads that create, look up and remove, each in directories of its own.
    pub clients: usize,
    /// Runs of each side; the table shows the median.
    pub runs: usize,
    /// How often the large file is read in each run.
    pub reads: usize,
    /// What is in the large file.
    pub data: Data,
}

/// What the bytes of a large file look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Data {
    /// Seeded noise.
    Incompressible,
    /// A short text over and over.
    Compressible,
}

/// What is measured, in the order in which it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Create and close.
    Create,
    /// Stat of what the kernel has forgotten.
    StatCold,
    /// Stat of what the kernel has.
    StatAgain,
    /// List the directories with all attributes, forgotten before.
    List,
    /// Unlink.
    Unlink,
    /// Sequential writes of 1 MiB, up to close.
    Write,
    /// The same, with an fsync before close.
    WriteFsync,
    /// Sequential reads of 1 MiB, not from the page cache.
    Read,
}

impl Step {
    /// All steps.
    pub const ALL: [Step; 8] = [
        Step::Create,
        Step::StatCold,
        Step::StatAgain,
        Step::List,
        Step::Unlink,
        Step::Write,
        Step::WriteFsync,
        Step::Read,
    ];

    fn name(self) -> &'static str {
        match self {
            Step::Create => "create+close /s",
            Step::StatCold => "stat, cold /s",
            Step::StatAgain => "stat, again /s",
            Step::List => "list+stat /s",
            Step::Unlink => "unlink /s",
            Step::Write => "write MiB/s",
            Step::WriteFsync => "write+fsync MiB/s",
            Step::Read => "read MiB/s",
        }
    }
}

/// One measured step.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What was done.
    pub step: Step,
    /// How often: files, or MiB.
    pub operations: usize,
    /// How long it took in all.
    pub elapsed: Duration,
    /// What all threads of this process, which is client and server, worked meanwhile, also in the kernel.
    pub worked: Duration,
    /// What the kernel asked for meanwhile.
    pub requests: RequestCounts,
}

impl Figure {
    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Microseconds of work for one operation.
    pub fn worked_us(&self) -> f64 {
        self.worked.as_secs_f64() * 1e6 / self.operations as f64
    }
}

/// Operations per second over several runs. Whether the client and the thread that answers it share a processor is luck of the
/// scheduler and makes a factor of two, so that the extremes belong to the median.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// The slowest run.
    pub worst: f64,
    /// The run in the middle.
    pub median: f64,
    /// The fastest run.
    pub best: f64,
    /// Microseconds of work for one operation, in the median: what a busy machine changes least.
    pub worked_us: f64,
}

/// All figures of all runs.
#[derive(Debug)]
pub struct Report {
    sides: Vec<String>,
    /// Per side, the figures of all runs.
    figures: Vec<Vec<Figure>>,
}

impl Report {
    /// The rates of a step, and the requests of its first run.
    pub fn rates(&self, side: usize, step: Step) -> Option<(Rates, &Figure)> {
        let of_step = || self.figures.get(side).into_iter().flatten().filter(|figure| figure.step == step);
        let sorted = |of: fn(&Figure) -> f64| {
            let mut values: Vec<f64> = of_step().map(of).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let (rates, work) = (sorted(Figure::rate), sorted(Figure::worked_us));
        let (worst, median, best) = (*rates.first()?, rates[rates.len() / 2], *rates.last()?);
        Some((Rates { worst, median, best, worked_us: work[work.len() / 2] }, of_step().next()?))
    }
}

impl fmt::Display for Report {
    /// A row per step and side: median rate, its ratio to the first side's, worst and best, work, requests of one run.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["median", "ratio", "worst", "best", "CPU us"];
        let [median, ratio, worst, best, work] = head;
        writeln!(f, "{:<27} {median:>10} {ratio:>6} {worst:>10} {best:>10} {work:>7}  requests", "")?;
        for step in Step::ALL {
            let Some((first, _)) = self.rates(0, step) else { continue };
            for (side, name) in self.sides.iter().enumerate() {
                let Some((rates, figure)) = self.rates(side, step) else { continue };
                let Rates { worst, median, best, worked_us } = rates;
                let (ratio, requests) = (median / first.median, &figure.requests);
                let each = requests.total() as f64 / figure.operations as f64;
                write!(
                    f,
                    "{:<18} {name:<8} {median:>10.0} {ratio:>6.2} {worst:>10.0} {best:>10.0} {worked_us:>7.0}",
                    step.name()
                )?;
                writeln!(f, "  {each:.2} each: {requests}")?;
            }
        }
        Ok(())
    }
}

/// Runs the load on each side in turns. `scratch` is an existing directory; what is made in it is removed.
pub fn compare(load: &Load, sides: &[Side<'_>], scratch: &Path) -> io::Result<Report> {
    let mut figures: Vec<Vec<Figure>> = sides.iter().map(|_| Vec::new()).collect();
    let pool = data_pool(load.data);
    for run in 0..load.runs {
        for turn in 0..sides.len() {
            let side = if run % 2 == 0 { turn } else { sides.len() - 1 - turn };
            let (state, mount_point) = (scratch.join("state"), scratch.join("mnt"));
            fs::create_dir(&state)?;
            fs::create_dir(&mount_point)?;
            let target = (sides[side].mount)(&state, &mount_point)?;
            figures[side].extend(run_all(load, &*target, &mount_point, &pool)?);
            target.unmount()?;
            fs::remove_dir(&mount_point)?;
            fs::remove_dir_all(&state)?;
        }
    }
    Ok(Report { sides: sides.iter().map(|side| side.name.to_owned()).collect(), figures })
}

fn run_all(load: &Load, target: &dyn Target, root: &Path, pool: &[u8]) -> io::Result<Vec<Figure>> {
    let clock = SystemClock::new();
    let stopwatch = Stopwatch { clock: &clock, target };
    let mut figures = Vec::new();
    if load.files > 0 {
        let tree = Tree::new(load, root);
        for step in [Step::Create, Step::StatCold, Step::StatAgain, Step::List, Step::Unlink] {
            if matches!(step, Step::StatCold | Step::List) {
                tree.forget(target)?;
            }
            figures.push(stopwatch.measure(step, load.files, || tree.each_client(step))?);
        }
        tree.remove_directories()?;
    }
    if load.mebibytes > 0 {
        let path = root.join("large");
        figures.push(
            stopwatch
                .measure(Step::Write, load.mebibytes, || write_large(&path, load, pool, Finish::Close))?,
        );
        fs::remove_file(&path)?;
        let durable = || write_large(&path, load, pool, Finish::Fsync);
        figures.push(stopwatch.measure(Step::WriteFsync, load.mebibytes, durable)?);
        for _ in 0..load.reads {
            drop_pages(&path)?;
            figures.push(stopwatch.measure(Step::Read, load.mebibytes, || read_large(&path))?);
        }
        fs::remove_file(&path)?;
    }
    Ok(figures)
}

struct Stopwatch<'a> {
    clock: &'a SystemClock,
    target: &'a dyn Target,
}

impl Stopwatch<'_> {
    fn measure(
        &self,
        step: Step,
        operations: usize,
        work: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Figure> {
        let (before, start, worked) = (self.target.requests(), self.clock.monotonic(), process_cpu_nanos());
        work()?;
        let elapsed = self.clock.monotonic().saturating_sub(start);
        let worked = Duration::from_nanos((process_cpu_nanos() - worked) as u64);
        let requests = self.target.requests().since(&before);
        Ok(Figure { step, operations, elapsed, worked, requests })
    }
}

/// The paths of the small files, per client and directory.
struct Tree {
    root: PathBuf,
    clients: Vec<Vec<(String, Vec<PathBuf>)>>,
}

impl Tree {
    fn new(load: &Load, root: &Path) -> Tree {
        let mut clients: Vec<Vec<(String, Vec<PathBuf>)>> =
            (0..load.clients.max(1)).map(|_| Vec::new()).collect();
        let count = clients.len();
        for (number, first) in (0..load.files).step_by(DIRECTORY_FILES).enumerate() {
            let (name, last) = (format!("d{number}"), load.files.min(first + DIRECTORY_FILES));
            let directory = root.join(&name);
            let paths = (first..last).map(|file| directory.join(format!("file-{file}"))).collect();
            clients[number % count].push((name, paths));
        }
        Tree { root: root.to_owned(), clients }
    }

    fn names(&self) -> impl Iterator<Item = &String> {
        self.clients.iter().flatten().map(|(name, _)| name)
    }

    /// Waits until the kernel asks for each directory again, and has sent all FORGETs: while it drops inodes it trusts no attributes
    /// that come meanwhile.
    fn forget(&self, target: &dyn Target) -> io::Result<()> {
        let lookups = || target.requests().get(RequestKind::Lookup);
        for name in self.names() {
            let before = lookups();
            target.forget(name)?;
            for _ in 0..FORGET_TRIES {
                fs::metadata(self.root.join(name))?;
                if lookups() > before {
                    break;
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
        for _ in 0..FORGET_TRIES {
            let before = target.requests();
            thread::sleep(SETTLED);
            if target.requests() == before {
                return Ok(());
            }
        }
        Err(io::Error::other("the kernel does not come to rest"))
    }

    fn each_client(&self, step: Step) -> io::Result<()> {
        thread::scope(|scope| {
            let clients: Vec<_> = self
                .clients
                .iter()
                .map(|directories| scope.spawn(move || run_client(step, &self.root, directories)))
                .collect();
            for client in clients {
                client.join().map_err(|_| io::Error::other("a client panicked"))??;
            }
            Ok(())
        })
    }

    fn remove_directories(&self) -> io::Result<()> {
        self.names().try_for_each(|name| fs::remove_dir(self.root.join(name)))
    }
}

fn run_client(step: Step, root: &Path, directories: &[(String, Vec<PathBuf>)]) -> io::Result<()> {
    for (name, paths) in directories {
        match step {
            Step::Create => {
                fs::create_dir(root.join(name))?;
                for path in paths {
                    drop(OpenOptions::new().write(true).create_new(true).open(path)?);
                }
            }
            Step::List => {
                for entry in fs::read_dir(root.join(name))? {
                    entry?.metadata()?;
                }
            }
            Step::Unlink => paths.iter().try_for_each(fs::remove_file)?,
            _ => {
                for path in paths {
                    fs::symlink_metadata(path)?;
                }
            }
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Finish {
    Close,
    Fsync,
}

fn write_large(path: &Path, load: &Load, pool: &[u8], finish: Finish) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    for piece in pool.chunks_exact(MEBIBYTE).cycle().take(load.mebibytes) {
        file.write_all(piece)?;
    }
    if finish == Finish::Fsync { file.sync_all() } else { Ok(()) }
}

fn read_large(path: &Path) -> io::Result<()> {
    let (mut file, mut piece) = (File::open(path)?, vec![0; MEBIBYTE]);
    while file.read(&mut piece)? > 0 {}
    Ok(())
}

/// Takes a file out of the page cache.
fn drop_pages(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open, and the call only gives advice.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Bytes to write, more than any compression unit.
fn data_pool(data: Data) -> Vec<u8> {
    let mut pool = Vec::with_capacity(POOL_BYTES);
    let mut state = SEED;
    while pool.len() < POOL_BYTES {
        match data {
            Data::Incompressible => {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                pool.extend_from_slice(&state.to_le_bytes());
            }
            Data::Compressible => pool.extend_from_slice(b"anything that can go wrong will "),
        }
    }
    pool
}

/// Files in one directory.
const DIRECTORY_FILES: usize = 1000;

/// How long nothing must come from the kernel before a step begins.
const SETTLED: Duration = Duration::from_millis(20);

/// Tries, each of a millisecond and more, until a directory must be forgotten.
const FORGET_TRIES: usize = 1000;

const MEBIBYTE: usize = 1 << 20;

/// A whole number of MiB.
const POOL_BYTES: usize = 16 * MEBIBYTE;

/// The seed of the noise; any but 0.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
