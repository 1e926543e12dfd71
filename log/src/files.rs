//! The file layer: the few operations that a log needs from an operating system, injectable.
//!
//! Invariants:
//! - What is not synced may be lost in a power cut, in any order and in parts; the log relies on nothing more.
//! - An implementation never retries a failed sync.

use std::{
    fmt, fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, FlockOperation};

/// A file system, as far as a log needs one.
pub trait Files: Send + Sync + fmt::Debug {
    /// Creates a directory and those above it; it may exist.
    fn create_dir(&self, directory: &Path) -> io::Result<()>;
    /// Locks a directory against other processes and other logs of this one, until the guard is dropped; `None` if it is
    /// locked already.
    fn lock(&self, directory: &Path) -> io::Result<Option<DirectoryLock>>;
    /// The names of the files in a directory; names that are not UTF-8 are left out.
    fn list(&self, directory: &Path) -> io::Result<Vec<String>>;
    /// Creates an empty file, or empties the one that is there.
    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>>;
    /// Opens a file for reading.
    fn open(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>>;
    /// Renames a file, replacing the one that has the name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
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
        fs::create_dir_all(directory)
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

    fn open(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        Ok(Box::new(OsFile(fs::File::open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
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

/// The file that is locked; it is never removed.
pub(crate) const LOCK_NAME: &str = "lock";
