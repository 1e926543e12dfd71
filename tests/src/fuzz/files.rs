//! Files in memory, for a log whose segments are the input.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use murphy_log::{DirectoryLock, Files, SegmentFile};
use parking_lot::Mutex;

type Contents = Arc<Mutex<Vec<u8>>>;

/// Files by their paths. Cheap to clone.
#[derive(Clone, Default, Debug)]
pub(super) struct MemoryFiles(Arc<Mutex<BTreeMap<PathBuf, Contents>>>);

impl MemoryFiles {
    pub(super) fn put(&self, path: impl Into<PathBuf>, bytes: &[u8]) {
        self.0.lock().insert(path.into(), Arc::new(Mutex::new(bytes.to_vec())));
    }

    /// Every file and what it holds.
    pub(super) fn all(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        self.0.lock().iter().map(|(path, contents)| (path.clone(), contents.lock().clone())).collect()
    }
}

impl Files for MemoryFiles {
    fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn lock(&self, _: &Path) -> io::Result<Option<DirectoryLock>> {
        Ok(Some(DirectoryLock::new(())))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let files = self.0.lock();
        let inside = files.keys().filter_map(|path| path.strip_prefix(directory).ok());
        Ok(inside.map(|name| name.to_string_lossy().into_owned()).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        self.put(path, &[]);
        self.open(path)
    }

    fn create_private(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        self.create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        let contents = self.0.lock().get(path).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(MemoryFile(contents)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut files = self.0.lock();
        let contents = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), contents);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.lock().remove(path).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct MemoryFile(Contents);

impl SegmentFile for MemoryFile {
    fn preallocate(&self, length: u64) -> io::Result<()> {
        let mut bytes = self.0.lock();
        let length = bytes.len().max(length as usize);
        bytes.resize(length, 0);
        Ok(())
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.0.lock().truncate(length as usize);
        Ok(())
    }

    fn write_at(&self, offset: u64, written: &[u8]) -> io::Result<()> {
        let mut bytes = self.0.lock();
        let end = offset as usize + written.len();
        let length = bytes.len().max(end);
        bytes.resize(length, 0);
        bytes[offset as usize..end].copy_from_slice(written);
        Ok(())
    }

    fn read_at(&self, offset: u64, read: &mut [u8]) -> io::Result<usize> {
        let bytes = self.0.lock();
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let count = rest.len().min(read.len());
        read[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.0.lock().len() as u64)
    }

    fn modified(&self) -> io::Result<SystemTime> {
        Ok(SystemTime::UNIX_EPOCH)
    }
}
