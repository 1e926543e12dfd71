//! The program as a user runs it: a scratch directory, commands, what they printed and how they ended.
//!
//! Invariants:
//! - Whatever a test leaves running or mounted is ended and detached when its scratch directory goes.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt, fs, io,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use rustix::{fs::SeekFrom, process::Signal};

use crate::{PATIENCE, output_of, wait_until};

/// A scratch directory, and the program that works in it.
pub struct Scratch {
    program: PathBuf,
    directory: tempfile::TempDir,
}

impl Scratch {
    /// A new one for the program at `program`.
    pub fn new(program: impl Into<PathBuf>) -> Scratch {
        let directory = tempfile::Builder::new().prefix("murphy-test").tempdir();
        Scratch { program: program.into(), directory: directory.expect("a scratch directory") }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The URL of a file store in it.
    pub fn url(&self, name: &str) -> String {
        format!("file://{}", self.path(name).display())
    }

    /// A new empty directory in it.
    pub fn make_dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("a directory in the scratch directory");
        path
    }

    /// Runs the program with these arguments.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Ran {
        let arguments: Vec<_> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
        let mut command = Command::new(&self.program);
        command.args(&arguments).current_dir(self.directory.path()).stdin(Stdio::null());
        let output = output_of(&mut command);
        Ran { what: format!("{arguments:?}"), output }
    }

    /// Makes a volume with node `node` and block store `blocks`.
    pub fn format(&self, node: &str, blocks: &str) -> Ran {
        self.run(["format", node, "--blocks", &self.url(blocks)]).expect_code(0)
    }

    /// Mounts node `node` at `mount`, in the background.
    pub fn mount(&self, node: &str, mount: &str) -> PathBuf {
        let path = self.make_dir_unless_dead(mount);
        self.run(["mount", node, mount, "-d"]).expect_code(0);
        path
    }

    /// A mount point whose process was killed is there and cannot be looked at.
    fn make_dir_unless_dead(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        match fs::create_dir_all(&path) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => panic!("{}: {error}", path.display()),
        }
        path
    }

    /// Makes everything durable, unmounts `mount`, and waits until its process has ended.
    pub fn umount(&self, mount: &str) {
        self.run(["umount", mount]).expect_code(0);
        self.wait_for_the_end();
    }

    /// The processes that serve nodes below this directory.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // A program that was built anew meanwhile has " (deleted)" behind its name.
            let program = fs::read_link(entry.path().join("exe"))
                .is_ok_and(|exe| exe.as_os_str().as_bytes().starts_with(self.program.as_os_str().as_bytes()));
            let own = || {
                let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let directory = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
                let opened = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
                let mut opened = opened.filter_map(|fd| fs::read_link(fd.path()).ok());
                let root = self.directory.path();
                directory.starts_with(root)
                    || opened.any(|path| path.starts_with(root))
                    || arguments
                        .windows(root.as_os_str().len())
                        .any(|part| part == root.as_os_str().as_encoded_bytes())
            };
            if program && own() {
                found.push(pid);
            }
        }
        found
    }

    /// Sends a signal to every process that serves a node here, and waits until they are gone; returns how many there were.
    pub fn signal_all(&self, signal: Signal) -> usize {
        let processes = self.processes();
        for pid in &processes {
            let Some(pid) = rustix::process::Pid::from_raw(*pid) else { continue };
            // One that has just ended needs no signal.
            let _gone = rustix::process::kill_process(pid, signal);
        }
        self.wait_for_the_end();
        processes.len()
    }

    /// Waits until no process serves a node here.
    pub fn wait_for_the_end(&self) {
        wait_until("the processes to end", PATIENCE, || self.processes().is_empty());
    }

    /// Every file below `name` with its bytes, every directory with none, apart from sockets.
    pub fn bytes_of(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        self.below(name, |_| Vec::new(), |path| fs::read(path))
    }

    /// Every file and directory below `name` with a print of what is in it, apart from sockets: for seeing that nothing has changed.
    pub fn prints_of(&self, name: &str) -> BTreeMap<PathBuf, Print> {
        self.below(name, |_| Print::Directory, Print::of_file)
    }

    fn below<T>(
        &self,
        name: &str,
        directory: impl Fn(&Path) -> T,
        file: impl Fn(&Path) -> io::Result<T>,
    ) -> BTreeMap<PathBuf, T> {
        let mut found = BTreeMap::new();
        let mut left = vec![self.path(name)];
        while let Some(path) = left.pop() {
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if metadata.is_dir() {
                let entries = fs::read_dir(&path).expect("a readable directory");
                left.extend(entries.flatten().map(|entry| entry.path()));
                found.insert(path.clone(), directory(&path));
            } else if metadata.is_file() && !is_being_put(&path) {
                match file(&path) {
                    Ok(read) => drop(found.insert(path, read)),
                    // A program that runs may remove what it has made.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => panic!("{}: {error}", path.display()),
                }
            }
        }
        found
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for pid in self.processes() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _gone = rustix::process::kill_process(pid, Signal::KILL);
            }
        }
        // What stays mounted keeps the directory from being removed, which is all that can be done about it here.
        let _detached = self.directory.path().canonicalize().and_then(|path| murphy_fs::detach_below(&path));
    }
}

/// Whether it is an object on its way into a store in a directory: it has another name until it is whole.
fn is_being_put(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().contains(&b'#'))
}

/// What tells a file or a directory from what it was before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Print {
    /// A directory.
    Directory,
    /// A file of so many bytes, and the BLAKE3 of those that are not zero and of where they are.
    File(u64, blake3::Hash),
}

impl Print {
    /// The print of a file, of which only what has been written is read: a preallocated segment is mostly room.
    fn of_file(path: &Path) -> io::Result<Print> {
        let file = fs::File::open(path)?;
        let (mut hasher, mut block, mut at) = (blake3::Hasher::new(), vec![0; PRINT_BLOCK], 0);
        loop {
            let data = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
                Ok(data) => data / PRINT_BLOCK as u64 * PRINT_BLOCK as u64,
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let read = read_block(&file, data, &mut block)?;
            if block[..read].iter().any(|byte| *byte != 0) {
                hasher.update(&data.to_le_bytes()).update(&block[..read]);
            }
            at = data + PRINT_BLOCK as u64;
        }
        Ok(Print::File(file.metadata()?.len(), hasher.finalize()))
    }
}

/// Reads a block of a file; fewer bytes than the block has only at the end.
fn read_block(file: &fs::File, at: u64, block: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < block.len() {
        match file.read_at(&mut block[read..], at + read as u64)? {
            0 => break,
            some => read += some,
        }
    }
    Ok(read)
}

/// What a run printed, and how it ended.
pub struct Ran {
    what: String,
    output: Output,
}

impl Ran {
    /// Checks the exit code.
    pub fn expect_code(self, code: i32) -> Ran {
        assert_eq!(self.output.status.code(), Some(code), "{self}");
        self
    }

    /// Checks that it failed with one clear error that has `part` in it.
    pub fn expect_error(self, code: i32, part: &str) -> Ran {
        let ran = self.expect_code(code);
        let errors = ran.stderr().lines().filter(|line| line.starts_with("Error: ")).count();
        assert!(errors == 1 && ran.stderr().contains(part), "no single error with {part:?}: {ran}");
        assert!(ran.stdout().is_empty(), "{ran}");
        ran
    }

    /// The exit code; `None` if a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.output.status.code()
    }

    /// Standard output.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    /// Standard error.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// The one JSON document on standard output.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout()).unwrap_or_else(|error| panic!("{error}: {self}"))
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ran { what, output } = self;
        write!(f, "{what} ended with {}\nstdout: {}\nstderr: {}", output.status, self.stdout(), self.stderr())
    }
}

/// Whether this process can mount, as the program itself finds out. Says so when it cannot: a test that is skipped has proven nothing.
pub fn can_mount(test: &str) -> bool {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    let tried = TRIED.get_or_init(|| {
        let directory = tempfile::Builder::new().prefix("murphy-test").tempdir();
        let directory = directory.expect("a scratch directory");
        murphy_fs::try_mount(directory.path()).map_err(|error| error.to_string())
    });
    if let Err(why) = tried {
        skip(test, why);
    }
    tried.is_ok()
}

/// Says that a test is skipped, and why.
///
/// # Panics
/// With `MURPHY_REQUIRE_FUSE=1`: there nothing may be skipped.
pub fn skip(test: &str, why: &str) {
    static SKIPPED: AtomicU32 = AtomicU32::new(0);
    assert!(std::env::var_os("MURPHY_REQUIRE_FUSE").is_none(), "{test} must not be skipped: {why}");
    let count = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let line = format!("SKIPPED: {test}: {why} ({count} skipped so far)\n");
    // Past the capture of the test harness: nobody may take a skipped test for a passed one.
    let _unsaid = io::Write::write_all(&mut io::stderr().lock(), line.as_bytes());
}

/// Says what a test has counted, past the capture of the test harness.
pub fn report(line: &str) {
    let _unsaid = io::Write::write_all(&mut io::stderr().lock(), format!("{line}\n").as_bytes());
}

/// Whether the process behind a mount is gone. Asks for a name that nobody has asked for: everything else, listings too, the kernel may
/// remember and answer without the process.
pub fn is_dead(mount: &Path) -> bool {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    let name = format!("is anybody there {}", ASKED.fetch_add(1, Ordering::Relaxed));
    let asked = fs::symlink_metadata(mount.join(name));
    asked.is_err_and(|error| error.raw_os_error() == Some(rustix::io::Errno::NOTCONN.raw_os_error()))
}

const PRINT_BLOCK: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: a comparison that skips what was not written also skips what was.
    #[test]
    fn a_print_tells_every_change_and_only_changes() {
        let scratch = Scratch::new("no program");
        let path = scratch.make_dir("d").join("f");
        let print = || scratch.prints_of("d");
        let mut seen = vec![print()];
        let file = fs::File::create(&path).unwrap();
        seen.push(print());
        for length in [1, PRINT_BLOCK as u64 * 3, PRINT_BLOCK as u64 * 3 + 5] {
            file.set_len(length).unwrap();
            seen.push(print());
        }
        for at in [0, PRINT_BLOCK as u64 - 1, PRINT_BLOCK as u64, PRINT_BLOCK as u64 * 3 + 4] {
            file.write_all_at(b"x", at).unwrap();
            seen.push(print());
        }
        for (number, one) in seen.iter().enumerate() {
            assert!(seen[number + 1..].iter().all(|other| other != one), "{number}");
        }
        // Zeros that are written are the zeros that were there.
        let before = print();
        file.write_all_at(&[0; 100], PRINT_BLOCK as u64 * 2).unwrap();
        assert_eq!(print(), before);
        file.sync_all().unwrap();
        assert_eq!(print(), before);
    }
}
