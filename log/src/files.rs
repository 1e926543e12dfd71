//! The file layer: the few operations that a log, and whatever else must survive a power cut, needs from an operating system;
//! injectable.
//!
//! Invariants:
//! - What is not synced may be lost in a power cut, in any order and in parts; the log relies on nothing more.
//! - An implementation never retries a failed sync.

use std::{
    fmt, fs, io,
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use rustix::fs::{FallocateFlags, FlockOperation};

/// A file system, as far as a node needs one for what must survive.
pub trait Files: Send + Sync + fmt::Debug {
    /// Creates a directory and those above it; it may exist, left there by a process that was killed before it could sync. Durable
    /// when it returns.
    fn create_dir(&self, directory: &Path) -> io::Result<()>;
    /// Locks a directory against other processes and other logs of this one, until the guard is dropped; `None` if it is
    /// locked already.
    fn lock(&self, directory: &Path) -> io::Result<Option<DirectoryLock>>;
    /// The names in a directory; names that are not UTF-8 are left out.
    fn list(&self, directory: &Path) -> io::Result<Vec<String>>;
    /// Creates an empty file, or empties the one that is there.
    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>>;
    /// The same for a file that only its owner may read.
    fn create_private(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>>;
    /// Opens a file for reading.
    fn open(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>>;
    /// Renames a file, replacing the one that has the name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file that is never written again a second name, which must not be there; where that cannot be done it is copied, durably.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes creations, renames and removals in a directory durable.
    fn sync_dir(&self, directory: &Path) -> io::Result<()>;
}

/// An open file.
pub trait SegmentFile: Send + Sync + fmt::Debug {
    /// Makes the file at least `length` bytes long, new bytes zero, with space reserved for all of them.
    fn preallocate(&self, length: u64) -> io::Result<()>;
    /// Cuts the file to `length` bytes.
    fn truncate(&self, length: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Reads at `offset` until `bytes` is full or the file ends; says how many were read.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize>;
    /// Makes everything written durable, with the length that is needed to read it.
    fn sync_data(&self) -> io::Result<()>;
    /// The length of the file, in bytes.
    fn length(&self) -> io::Result<u64>;
    /// When it was written last.
    fn modified(&self) -> io::Result<SystemTime>;
}

/// Replaces a file as a whole: after a crash at any moment it is the old one or the new one. Durable when it returns.
///
/// What it writes first has the same name and [`UNFINISHED`] behind it; one that a crash left there is overwritten by the next call.
pub fn replace_file(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    finish_replacement(files, path, &*files.create(&unfinished(path))?, bytes)
}

/// The same for a file that only its owner may read.
pub fn replace_private_file(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    finish_replacement(files, path, &*files.create_private(&unfinished(path))?, bytes)
}

fn finish_replacement(
    files: &dyn Files,
    path: &Path,
    file: &dyn SegmentFile,
    bytes: &[u8],
) -> io::Result<()> {
    file.write_at(0, bytes)?;
    file.sync_data()?;
    rename_durably(files, &unfinished(path), path)
}

/// Renames a file, or a directory, whose contents are durable. Durable when it returns.
pub fn rename_durably(files: &dyn Files, from: &Path, to: &Path) -> io::Result<()> {
    files.rename(from, to)?;
    let (from, to) = (folder(from), folder(to));
    files.sync_dir(to)?;
    if from == to { Ok(()) } else { files.sync_dir(from) }
}

/// Creates a directory and those above it, from the top down: one that is there was synced with the one above it, except the last.
pub(crate) fn create_directories(
    directory: &Path,
    exists: impl Fn(&Path) -> bool,
    create: impl Fn(&Path) -> io::Result<()>,
    sync: impl Fn(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let mut missing: Vec<&Path> = directory.ancestors().take_while(|above| !exists(above)).collect();
    if missing.is_empty() {
        // Where nobody may list names, nobody can sync them, and we have made none.
        return sync(folder(directory)).or_else(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => Ok(()),
            _ => Err(error),
        });
    }
    missing.reverse();
    for made in missing {
        match create(made) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => sync(folder(made))?,
        }
    }
    Ok(())
}

/// Where a file is written before it gets the name `path`.
pub fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    PathBuf::from(name)
}

/// Writes a file from its beginning, as [`io::Write`].
#[derive(Debug)]
pub struct FileWriter {
    file: Box<dyn SegmentFile>,
    written: u64,
}

impl FileWriter {
    /// Writes to `file`, which is empty.
    pub fn new(file: Box<dyn SegmentFile>) -> FileWriter {
        FileWriter { file, written: 0 }
    }

    /// Makes everything written durable.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl io::Write for FileWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(self.written, bytes)?;
        self.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a file from its beginning, as [`io::Read`].
#[derive(Debug)]
pub struct FileReader {
    file: Box<dyn SegmentFile>,
    read: u64,
}

impl FileReader {
    /// Reads `file`.
    pub fn new(file: Box<dyn SegmentFile>) -> FileReader {
        FileReader { file, read: 0 }
    }
}

impl io::Read for FileReader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(self.read, bytes)?;
        self.read += count as u64;
        Ok(count)
    }
}

/// Holds a directory's lock until it is dropped.
pub struct DirectoryLock(Box<dyn Send + Sync>);

impl DirectoryLock {
    /// A lock that is held as long as `guard` lives.
    pub fn new(guard: impl Send + Sync + 'static) -> DirectoryLock {
        DirectoryLock(Box::new(guard))
    }
}

impl fmt::Debug for DirectoryLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DirectoryLock(_guard) = self;
        f.write_str("DirectoryLock")
    }
}

/// The files of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsFiles;

impl Files for OsFiles {
    fn create_dir(&self, directory: &Path) -> io::Result<()> {
        create_directories(directory, exists, |missing| fs::create_dir(missing), |above| self.sync_dir(above))
    }

    fn lock(&self, directory: &Path) -> io::Result<Option<DirectoryLock>> {
        let path: PathBuf = directory.join(LOCK_NAME);
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(DirectoryLock::new(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory)? {
            names.extend(entry?.file_name().into_string());
        }
        Ok(names)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        let file = fs::OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path)?;
        Ok(Box::new(OsFile(file)))
    }

    fn create_private(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        let mut options = fs::OpenOptions::new();
        let file = options.create(true).truncate(true).read(true).write(true).mode(PRIVATE).open(path)?;
        // The mode of an open counts only for a file that it creates.
        file.set_permissions(fs::Permissions::from_mode(PRIVATE))?;
        Ok(Box::new(OsFile(file)))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        Ok(Box::new(OsFile(fs::File::open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        match fs::hard_link(from, to) {
            // There are file systems without, and limits on how many names a file may have.
            Err(error) if !matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {
                fs::copy(from, unfinished(to))?;
                fs::File::open(unfinished(to))?.sync_all()?;
                fs::rename(unfinished(to), to)
            }
            linked => linked,
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        fs::File::open(directory)?.sync_all()
    }
}

#[derive(Debug)]
struct OsFile(fs::File);

impl SegmentFile for OsFile {
    fn preallocate(&self, length: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.0, FallocateFlags::empty(), 0, length) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => self.write_zeros(length),
            Err(error) => Err(error.into()),
        }
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.0.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn modified(&self) -> io::Result<SystemTime> {
        self.0.metadata()?.modified()
    }
}

impl OsFile {
    /// Reserves space where the file system cannot do it without writing.
    fn write_zeros(&self, length: u64) -> io::Result<()> {
        let zeros = [0; 64 << 10];
        let mut offset = 0;
        while offset < length {
            let count = (length - offset).min(zeros.len() as u64);
            self.0.write_all_at(&zeros[..count as usize], offset)?;
            offset += count;
        }
        Ok(())
    }
}

/// The folder that a name is in.
fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

fn exists(path: &Path) -> bool {
    path.as_os_str().is_empty() || path.exists()
}

/// Behind the name of a file that is being written, until it gets its own.
pub const UNFINISHED: &str = ".new";
/// Read and written by its owner alone.
const PRIVATE: u32 = 0o600;
/// The file that is locked; it is never removed.
pub(crate) const LOCK_NAME: &str = "lock";
