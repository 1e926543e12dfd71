//! A store in a directory whose folders are durable before anything in them is acknowledged.
//!
//! `LocalFileSystem` (object_store 0.14.2, with fsync) syncs the folders that it creates, after it has created them. Who finds a folder
//! there relies on that: another put that is a little faster, or the next process after a kill. A power cut then takes the folder, and
//! with it an object whose put has returned. Likewise an object that was linked to its name can be seen before its folder is synced.
//!
//! Invariants:
//! - A put begins after every folder above its object, up to the root of the store, has been synced with the folder above it, by this
//!   process.
//! - Who asks what an object is hears of one whose name is durable: whoever finds it there counts on it and does not put it again.

use std::{collections::BTreeSet, fmt, io, path::PathBuf, sync::Arc};

use futures::{FutureExt, future::BoxFuture};
use murphy_log::Files;
use object_store::{
    Error as ObjectError, GetOptions, GetResult, ObjectStore, Result as ObjectResult, path::Path,
};
use parking_lot::Mutex;

use super::layer::StoreLayer;

/// The layer of a store in a directory of `files`, which makes its folders.
#[derive(Clone)]
pub struct DurableFolders {
    below: Arc<dyn ObjectStore>,
    folders: Arc<Folders>,
}

struct Folders {
    files: Arc<dyn Files>,
    root: PathBuf,
    /// Those that are certain.
    known: Mutex<BTreeSet<PathBuf>>,
}

impl DurableFolders {
    /// Makes the folders in `root`, which is durable, of the objects that `below` keeps there.
    pub fn new(below: Arc<dyn ObjectStore>, files: Arc<dyn Files>, root: PathBuf) -> DurableFolders {
        let known = Mutex::new(BTreeSet::from([root.clone()]));
        DurableFolders { below, folders: Arc::new(Folders { files, root, known }) }
    }

    async fn ensure(&self, object: &Path) -> ObjectResult<()> {
        let folder = self.folder(object);
        if self.folders.known.lock().contains(&folder) {
            return Ok(());
        }
        self.aside(move |folders| folders.ensure(folder)).await
    }

    /// Makes the name of an object that is there durable.
    async fn sync(&self, object: &Path) -> ObjectResult<()> {
        self.ensure(object).await?;
        let folder = self.folder(object);
        self.aside(move |folders| folders.files.sync_dir(&folder)).await
    }

    /// The folder in which an object lies.
    fn folder(&self, object: &Path) -> PathBuf {
        let mut folder = self.folders.root.clone();
        folder.extend(object.parts().map(|part| part.as_ref().to_owned()));
        folder.pop();
        folder
    }

    async fn aside(
        &self,
        work: impl FnOnce(&Folders) -> io::Result<()> + Send + 'static,
    ) -> ObjectResult<()> {
        let folders = Arc::clone(&self.folders);
        let done = match tokio::runtime::Handle::try_current() {
            Ok(runtime) => runtime.spawn_blocking(move || work(&folders)).await.map_err(io::Error::other),
            Err(_) => Ok(work(&folders)),
        };
        done.flatten().map_err(|source| ObjectError::Generic { store: "directory", source: Box::new(source) })
    }
}

impl Folders {
    /// Under one lock: who waits for it finds the folder certain.
    fn ensure(&self, folder: PathBuf) -> io::Result<()> {
        let mut known = self.known.lock();
        let unknown = folder.ancestors().take_while(|above| !known.contains(*above));
        let mut unknown: Vec<PathBuf> = unknown.map(PathBuf::from).collect();
        while let Some(next) = unknown.pop() {
            self.files.create_dir(&next)?;
            known.insert(next);
        }
        Ok(())
    }
}

impl fmt::Display for DurableFolders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.below.fmt(f)
    }
}

impl fmt::Debug for DurableFolders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DurableFolders({})", self.folders.root.display())
    }
}

impl StoreLayer for DurableFolders {
    fn below(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.below)
    }

    fn before_write<'a>(&'a self, at: &'a Path) -> BoxFuture<'a, ObjectResult<()>> {
        self.ensure(at).boxed()
    }

    fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
        let is_asked_for = options.head;
        let get = async move {
            let found = self.below.get_opts(at, options).await?;
            if is_asked_for {
                self.sync(at).await?;
            }
            Ok(found)
        };
        get.boxed()
    }
}
