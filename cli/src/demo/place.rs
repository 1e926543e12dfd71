//! Where the demo happens, and what it has running there: the one that knows everything that has to be taken away again.
//!
//! Invariants:
//! - A process is known here before anybody can use it, so that none is forgotten at whatever moment the end comes.
//! - After [`Place::clear`] no process of the demo runs, nothing is mounted, and nothing new can be started.
//! - The directory is removed only once nothing is mounted in it: what a volume holds is never taken for rubbish.

use std::{
    fmt,
    io::{self, Read},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{CliError, at};

/// The demo's directory and processes.
pub(super) struct Place {
    path: PathBuf,
    keep: bool,
    running: Mutex<Running>,
    /// Held by whoever ends the demo: the one who came to its last line, or the one who was told to stop.
    ending: Mutex<()>,
}

#[derive(Default)]
struct Running {
    processes: Vec<Arc<Process>>,
    is_closed: bool,
}

impl Place {
    /// The directory to `keep`, which must be new or empty, or one of a name that nobody has used yet.
    pub(super) fn new(keep: Option<&Path>) -> Result<Place, CliError> {
        let path = match keep {
            Some(path) => Place::kept(path)?,
            None => Place::temporary(&std::env::temp_dir())?,
        };
        let path = path.canonicalize().map_err(at(&path))?;
        Ok(Place { path, keep: keep.is_some(), running: Mutex::default(), ending: Mutex::default() })
    }

    fn kept(path: &Path) -> Result<PathBuf, CliError> {
        std::fs::create_dir_all(path).map_err(at(path))?;
        match std::fs::read_dir(path).map_err(at(path))?.next() {
            None => Ok(path.to_owned()),
            Some(_) => {
                Err(CliError::new(format!("{} is not empty", path.display()))
                    .hint("give --keep a new directory"))
            }
        }
    }

    /// What an earlier demo has left behind is not in the way, whoever it belongs to: process numbers come again, random ones do not.
    fn temporary(folder: &Path) -> Result<PathBuf, CliError> {
        for _ in 0..NAMES_MAX {
            let number = getrandom::u32().map_err(CliError::new)?;
            let path = folder.join(format!("murphy-demo-{number:08x}"));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let hint = "TMPDIR or --keep names a directory that can be written to";
                    return Err(at(&path)(error).hint(hint));
                }
            }
        }
        Err(CliError::new(format!("every name in {} is taken", folder.display())))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it.
    pub(super) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// A directory in it, made if it is not there.
    pub(super) fn directory(&self, name: impl AsRef<Path>) -> Result<PathBuf, CliError> {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path).map_err(at(&path))?;
        Ok(path)
    }

    /// Starts a process, which a signal from a terminal does not reach: who presses Ctrl-C means the demo, and that ends them in order.
    pub(super) fn start(&self, command: &mut Command) -> Result<Arc<Process>, CliError> {
        let mut running = lock(&self.running);
        if running.is_closed {
            return Err(CliError::new("the demo is ending"));
        }
        let child = command.stdin(Stdio::null()).process_group(0).spawn().map_err(CliError::new)?;
        let process = Arc::new(Process(Mutex::new(child)));
        running.processes.push(Arc::clone(&process));
        Ok(process)
    }

    /// Runs one command of this program to its end; its stdout, or its error.
    pub(super) fn run(&self, command: &mut Command) -> Result<String, CliError> {
        let process = self.start(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        let (stdout, stderr) = process.pipes();
        let (said, complaints) = thread::scope(|scope| {
            let complaints = scope.spawn(|| read_all(stderr));
            (read_all(stdout), complaints.join())
        });
        let complaints = complaints.map_err(|_| CliError::new("a reader of a pipe has panicked"))?;
        let status = process.wait().map_err(CliError::new)?;
        lock(&self.running).processes.retain(|other| !Arc::ptr_eq(other, &process));
        if status.success() {
            return said.map_err(CliError::new);
        }
        let name = command.get_args().next().unwrap_or_default().display().to_string();
        let complaints = complaints.map_err(CliError::new)?;
        Err(CliError::new(format!("murphy {name} failed with {status}: {}", complaints.trim())))
    }

    /// Ends the demo: returns what had to be taken away, and a guard under which nobody else ends it.
    pub(super) fn end(&self) -> (MutexGuard<'_, ()>, Cleared) {
        let ending = lock(&self.ending);
        (ending, self.clear())
    }

    /// Kills what runs, detaches what is mounted, and removes the directory unless it is to be kept.
    fn clear(&self) -> Cleared {
        let processes = {
            let mut running = lock(&self.running);
            running.is_closed = true;
            std::mem::take(&mut running.processes)
        };
        let killed = processes.iter().filter(|process| matches!(process.kill(), Ok(true))).count();
        let detached = murphy_fs::detach_below(&self.path);
        let fate = match &detached {
            _ if self.keep => Fate::Kept,
            Err(error) => Fate::Left(format!("something stays mounted there: {error}")),
            Ok(_) => {
                remove(&self.path).map_or_else(|error| Fate::Left(error.to_string()), |()| Fate::Removed)
            }
        };
        Cleared { directory: self.path.clone(), killed, detached: detached.unwrap_or_default(), fate }
    }
}

/// Removes a directory into which those who do not know yet that the demo is over may still write.
fn remove(path: &Path) -> io::Result<()> {
    let mut attempts = 0;
    loop {
        match std::fs::remove_dir_all(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => return Ok(()),
            Err(error) if attempts == REMOVALS => return Err(error),
            Err(_) => thread::sleep(REMOVAL_PAUSE),
        }
        attempts += 1;
    }
}

/// What had to be taken away at the end.
pub(super) struct Cleared {
    directory: PathBuf,
    killed: usize,
    detached: usize,
    fate: Fate,
}

/// What became of the directory.
enum Fate {
    Removed,
    Kept,
    /// Why it is still there.
    Left(String),
}

impl Cleared {
    /// Whether something is left that should not be.
    pub(super) fn is_incomplete(&self) -> bool {
        matches!(self.fate, Fate::Left(_))
    }
}

impl fmt::Display for Cleared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cleared { directory, killed, detached, fate } = self;
        write!(f, "{killed} processes ended, {detached} mounts detached, {} ", directory.display())?;
        match fate {
            Fate::Removed => f.write_str("removed"),
            Fate::Kept => f.write_str("kept"),
            Fate::Left(why) => write!(f, "NOT removed: {why}"),
        }
    }
}

/// A process that was started here, whoever holds it.
pub(super) struct Process(Mutex<Child>);

impl Process {
    fn pipes(&self) -> (Option<impl Read + Send>, Option<impl Read + Send>) {
        let mut child = lock(&self.0);
        (child.stdout.take(), child.stderr.take())
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> io::Result<Option<ExitStatus>> {
        lock(&self.0).try_wait()
    }

    /// Sends a signal; one that has ended is an error.
    pub(super) fn signal(&self, signal: Signal) -> Result<(), CliError> {
        let mut child = lock(&self.0);
        let pid = Pid::from_child(&child);
        if let Some(status) = child.try_wait().map_err(CliError::new)? {
            return Err(CliError::new(format!("process {pid:?} has ended already, with {status}")));
        }
        kill_process(pid, signal)
            .map_err(|error| CliError::new(format!("cannot signal process {pid:?}: {error}")))
    }

    /// Kills it as a power cut would, and waits until it is gone; returns whether it was there.
    pub(super) fn kill(&self) -> io::Result<bool> {
        let mut child = lock(&self.0);
        if child.try_wait()?.is_some() {
            return Ok(false);
        }
        child.kill()?;
        child.wait().map(|_| true)
    }

    fn wait(&self) -> io::Result<ExitStatus> {
        // Without the lock, so that it can be killed meanwhile.
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            thread::sleep(WAIT_PAUSE);
        }
    }
}

/// One command of this program.
pub(super) fn murphy(command: &str) -> Result<Command, CliError> {
    let program = std::env::current_exe();
    let program = program.map_err(|error| CliError::new(format!("cannot find this program: {error}")))?;
    let mut murphy = Command::new(program);
    murphy.arg(command);
    Ok(murphy)
}

fn read_all(pipe: Option<impl Read>) -> io::Result<String> {
    let mut said = Vec::new();
    pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut said))?;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// Who panicked with it has left nothing half done that matters at the end.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const NAMES_MAX: u32 = 16;
const REMOVALS: u32 = 100;
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);
const WAIT_PAUSE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> Command {
        let mut command = Command::new("sleep");
        command.arg("1000");
        command
    }

    /// The fear: what an earlier demo left, or the same process number in a new container, keeps the next demo from working.
    #[test]
    fn leftovers_of_earlier_demos_are_not_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let first = Place::temporary(folder.path()).unwrap();
        std::fs::write(first.join("left"), b"").unwrap();
        std::fs::create_dir(folder.path().join(format!("murphy-demo-{}", std::process::id()))).unwrap();
        let second = Place::temporary(folder.path()).unwrap();
        assert!(first != second && second.read_dir().unwrap().next().is_none());
    }

    #[test]
    fn the_end_kills_what_runs_and_stands_still_and_nothing_is_started_after_it() {
        let place = Place::new(None).unwrap();
        let (running, stopped) = (place.start(&mut sleeper()).unwrap(), place.start(&mut sleeper()).unwrap());
        stopped.signal(Signal::STOP).unwrap();
        std::fs::write(place.directory("below").unwrap().join("file"), b"x").unwrap();
        let (_ending, cleared) = place.end();
        assert!(!cleared.is_incomplete());
        assert!(cleared.to_string().starts_with("2 processes ended, 0 mounts detached"), "{cleared}");
        assert!(running.ended().unwrap().is_some() && stopped.ended().unwrap().is_some());
        assert!(!place.path().exists());
        assert!(place.start(&mut sleeper()).is_err());
        assert!(running.signal(Signal::CONT).is_err());
    }

    #[test]
    fn a_place_to_keep_is_new_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), b"x").unwrap();
        assert!(Place::new(Some(folder.path())).is_err());
        let path = folder.path().join("new/one");
        let place = Place::new(Some(&path)).unwrap();
        let (_ending, cleared) = place.end();
        assert!(path.is_dir() && cleared.to_string().ends_with("kept"), "{cleared}");
    }

    #[test]
    fn a_command_that_fails_is_an_error_with_what_it_said() {
        let place = Place::new(None).unwrap();
        let shell = |script: &str| -> Command {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        assert_eq!(place.run(&mut shell("echo done; echo told >&2")).unwrap(), "done\n");
        let error = place.run(&mut shell("echo why >&2; exit 3")).unwrap_err().to_string();
        assert!(error.contains("why") && error.contains('3'), "{error}");
        assert!(lock(&place.running).processes.is_empty());
        assert!(!place.end().1.is_incomplete());
    }
}
