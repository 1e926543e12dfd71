//! A store in a directory whose folders are durable before anything in them is acknowledged.
//!
//! `LocalFileSystem` (object_store 0.14.2, with fsync) syncs the folders that it creates, after it has created them. Who finds a folder
//! there relies on that: another put that is a little faster, or the next process after a kill. A power cut then takes the folder, and
//! with it an object whose put has returned. Likewise an object that was linked to its name can be seen before its folder is synced.
//!
//! Invariants:
//! - A put begins after every folder above its object, up to the root of the store, has been synced with the folder above it, by this
//!   process.
//! - What a sync has failed for is not there for whoever asks what it is, until it was written anew: an error is said once, and the next
//!   sync says yes.
//! - Nothing but threads that may block waits for a directory.
//! - Who asks what an object is hears of one whose name is durable: whoever finds it there counts on it and does not put it again.

use std::{collections::BTreeSet, fmt, io, path::PathBuf, sync::Arc};

use futures::{FutureExt, future::BoxFuture};
use murphy_log::Files;
use object_store::{
    Error as ObjectError, GetOptions, GetResult, ObjectStore, ObjectStoreExt, PutOptions, PutPayload,
    PutResult, Result as ObjectResult, path::Path,
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
    /// Held while folders are made, and locked only by threads that may block: a directory that hangs is no reason to wait for `known`.
    making: Mutex<()>,
    /// Objects that can be seen, and whose names may not be durable although a sync says so.
    doubtful: Mutex<BTreeSet<Path>>,
}

impl DurableFolders {
    /// Makes the folders in `root`, which is durable, of the objects that `below` keeps there.
    pub fn new(below: Arc<dyn ObjectStore>, files: Arc<dyn Files>, root: PathBuf) -> DurableFolders {
        let known = Mutex::new(BTreeSet::from([root.clone()]));
        DurableFolders {
            below,
            folders: Arc::new(Folders {
                files,
                root,
                known,
                making: Mutex::default(),
                doubtful: Mutex::default(),
            }),
        }
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

    /// What of an object was written, or made durable, has failed.
    fn doubt(&self, object: &Path) {
        let mut doubtful = self.folders.doubtful.lock();
        // One too many says that there are more.
        if doubtful.len() <= DOUBTFUL_MAX {
            doubtful.insert(object.clone());
        }
    }

    /// Refuses to say of an object that it is there if that is in doubt.
    fn check(&self, object: &Path) -> ObjectResult<()> {
        let doubtful = self.folders.doubtful.lock();
        if doubtful.contains(object) {
            let source = "a sync of its name has failed".into();
            return Err(ObjectError::NotFound { path: object.to_string(), source });
        }
        match doubtful.len() > DOUBTFUL_MAX {
            true => {
                Err(ObjectError::Generic { store: "directory", source: "too many syncs have failed".into() })
            }
            false => Ok(()),
        }
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
    /// One after the other: who waits for his turn finds the folder certain.
    fn ensure(&self, folder: PathBuf) -> io::Result<()> {
        let _making = self.making.lock();
        for next in self.unknown(folder).into_iter().rev() {
            self.files.create_dir(&next)?;
            self.known.lock().insert(next);
        }
        Ok(())
    }

    /// What of a folder and those above it is not certain, from the lowest up.
    fn unknown(&self, folder: PathBuf) -> Vec<PathBuf> {
        let known = self.known.lock();
        folder.ancestors().take_while(|above| !known.contains(*above)).map(PathBuf::from).collect()
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

    fn put<'a>(
        &'a self,
        at: &'a Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'a, ObjectResult<PutResult>> {
        let put = async move {
            let put = self.below.put_opts(at, bytes, options).await;
            match &put {
                Ok(_) => {
                    self.folders.doubtful.lock().remove(at);
                }
                Err(ObjectError::AlreadyExists { .. } | ObjectError::Precondition { .. }) => {}
                // It had its name before its folder was synced.
                Err(_) => match self.below.head(at).await {
                    Err(ObjectError::NotFound { .. }) => {}
                    Ok(_) | Err(_) => self.doubt(at),
                },
            }
            put
        };
        put.boxed()
    }

    fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
        let is_asked_for = options.head;
        let get = async move {
            let found = self.below.get_opts(at, options).await?;
            if is_asked_for {
                self.sync(at).await.inspect_err(|_| self.doubt(at))?;
                self.check(at)?;
            }
            Ok(found)
        };
        get.boxed()
    }
}

/// So many objects are remembered whose names may not be durable; of more of them nothing is said any more.
const DOUBTFUL_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use std::{path, sync::mpsc, time::Duration};

    use murphy_log::{DirectoryLock, SegmentFile};
    use object_store::memory::InMemory;
    use parking_lot::Condvar;

    use super::{super::LayeredStore, *};

    /// Folders cannot be made until they are let go.
    #[derive(Debug, Default)]
    struct Hanging {
        begun: Mutex<bool>,
        goes: (Mutex<bool>, Condvar),
    }

    impl Files for Hanging {
        fn create_dir(&self, _: &path::Path) -> io::Result<()> {
            *self.begun.lock() = true;
            self.goes.1.wait_while(&mut self.goes.0.lock(), |goes| !*goes);
            Ok(())
        }

        fn sync_dir(&self, _: &path::Path) -> io::Result<()> {
            Ok(())
        }

        fn lock(&self, _: &path::Path) -> io::Result<Option<DirectoryLock>> {
            unreachable!("only folders are made")
        }

        fn list(&self, _: &path::Path) -> io::Result<Vec<String>> {
            unreachable!("only folders are made")
        }

        fn create(&self, _: &path::Path) -> io::Result<Box<dyn SegmentFile>> {
            unreachable!("only folders are made")
        }

        fn create_private(&self, _: &path::Path) -> io::Result<Box<dyn SegmentFile>> {
            unreachable!("only folders are made")
        }

        fn open(&self, _: &path::Path) -> io::Result<Box<dyn SegmentFile>> {
            unreachable!("only folders are made")
        }

        fn rename(&self, _: &path::Path, _: &path::Path) -> io::Result<()> {
            unreachable!("only folders are made")
        }

        fn link(&self, _: &path::Path, _: &path::Path) -> io::Result<()> {
            unreachable!("only folders are made")
        }

        fn remove(&self, _: &path::Path) -> io::Result<()> {
            unreachable!("only folders are made")
        }
    }

    /// The fear: a folder is made in a directory that hangs, and whoever wants to put something else waits for it on a thread that drives
    /// everything: no timeout fires any more.
    #[test]
    fn a_directory_that_hangs_stops_no_thread_that_drives_others() {
        let files = Arc::new(Hanging::default());
        let (hanging, (tell, told)) = (Arc::clone(&files), mpsc::channel());
        let driven = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let folders = DurableFolders::new(
                    Arc::new(InMemory::new()),
                    Arc::clone(&hanging) as _,
                    "/store".into(),
                );
                let store = LayeredStore(folders);
                let [first, second] = ["a/1", "b/2"].map(Path::from);
                let mut first = Box::pin(store.put(&first, "bytes".into()));
                while !*hanging.begun.lock() {
                    assert!(futures::poll!(&mut first).is_pending());
                    tokio::task::yield_now().await;
                }
                let second = store.put(&second, "bytes".into());
                tell.send(tokio::time::timeout(Duration::from_millis(100), second).await.is_err()).unwrap();
                first.await.unwrap();
                store.head(&Path::from("a/1")).await.unwrap();
            });
        });
        let fired = told.recv_timeout(Duration::from_secs(20));
        // Before anything is judged: the thread is to end.
        *files.goes.0.lock() = true;
        files.goes.1.notify_all();
        driven.join().unwrap();
        assert_eq!(fired, Ok(true), "everything stands still");
    }

    /// A store that shows the first of its objects, and says that they could not be stored.
    #[derive(Debug)]
    struct Failing(Arc<InMemory>, Mutex<usize>);

    impl fmt::Display for Failing {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("failing")
        }
    }

    impl StoreLayer for Failing {
        fn below(&self) -> Arc<dyn ObjectStore> {
            Arc::<InMemory>::clone(&self.0)
        }

        fn put<'a>(
            &'a self,
            at: &'a Path,
            bytes: PutPayload,
            options: PutOptions,
        ) -> BoxFuture<'a, ObjectResult<PutResult>> {
            let put = async move {
                let put = self.0.put_opts(at, bytes, options).await?;
                let mut fails = self.1.lock();
                if *fails == 0 {
                    return Ok(put);
                }
                *fails -= 1;
                Err(ObjectError::Generic { store: "failing", source: "no sync".into() })
            };
            put.boxed()
        }
    }

    /// The fear: a put fails when the folder is synced, the object can be seen, the next sync says yes, and whoever asks counts on it.
    #[tokio::test]
    async fn what_a_sync_has_failed_for_is_not_there_until_it_is_written_anew() {
        let files = Arc::new(Hanging::default());
        *files.goes.0.lock() = true;
        let fails = DOUBTFUL_MAX + 1;
        let below = LayeredStore(Failing(Arc::new(InMemory::new()), Mutex::new(fails)));
        let store = LayeredStore(DurableFolders::new(Arc::new(below), files, "/store".into()));
        let name = |number: usize| Path::from(number.to_string());
        assert!(store.put(&name(0), "bytes".into()).await.is_err());
        assert!(matches!(store.head(&name(0)).await, Err(ObjectError::NotFound { .. })));
        // Which may be tried as often as one likes.
        assert!(matches!(store.head(&name(0)).await, Err(ObjectError::NotFound { .. })));
        for number in 1..fails {
            assert!(store.put(&name(number), "bytes".into()).await.is_err());
        }
        store.put(&name(fails), "bytes".into()).await.unwrap();
        assert!(matches!(store.head(&name(fails)).await, Err(ObjectError::Generic { .. })));
        store.put(&name(0), "bytes".into()).await.unwrap();
        for number in [0, fails] {
            assert_eq!(store.head(&name(number)).await.unwrap().size, 5);
        }
    }
}
