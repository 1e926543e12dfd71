//! A store in a directory that stays the directory that was opened.
//!
//! A directory is moved away, or the file system below it is unmounted, while a process uses it as a store: the store below would make it
//! anew, on whatever is there now, and go on as if nothing were missing.
//!
//! Invariants:
//! - Nothing is written, listed or found missing in another directory than the one that was opened.
//! - As long as the store lives the directory is held open: its number is given to no other, and its file system is busy.

use std::{
    fmt,
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use futures::{FutureExt, StreamExt, TryStreamExt, future::BoxFuture, stream, stream::BoxStream};
use object_store::{
    Error as ObjectError, GetOptions, GetResult, ObjectMeta, ObjectStore, Result as ObjectResult, path::Path,
};

use super::layer::StoreLayer;

/// The layer that looks whether the directory is still there.
#[derive(Clone)]
pub(super) struct SameDirectory {
    below: Arc<dyn ObjectStore>,
    directory: Arc<Directory>,
}

struct Directory {
    path: PathBuf,
    opened: File,
}

impl SameDirectory {
    /// Goes to `below`, which keeps its objects in the directory at `path`, as long as that is the directory of this moment.
    pub(super) fn new(below: Arc<dyn ObjectStore>, path: &FilePath) -> io::Result<SameDirectory> {
        let directory = Directory { path: path.to_owned(), opened: File::open(path)? };
        Ok(SameDirectory { below, directory: Arc::new(directory) })
    }

    async fn check(&self) -> ObjectResult<()> {
        let directory = Arc::clone(&self.directory);
        let checked = match tokio::runtime::Handle::try_current() {
            Ok(_) => murphy_log::aside(move || directory.check()).await,
            Err(_) => directory.check(),
        };
        checked.map_err(|source| ObjectError::Generic { store: "directory", source: Box::new(source) })
    }
}

impl Directory {
    fn check(&self) -> io::Result<()> {
        let opened = self.opened.metadata()?;
        match std::fs::metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == (opened.dev(), opened.ino()) => Ok(()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Err(io::Error::other(format!(
                "{} is not the directory that was opened: it was moved, or its file system was unmounted; put it back, or start the node \
                 again",
                self.path.display()
            ))),
        }
    }
}

impl fmt::Display for SameDirectory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.below.fmt(f)
    }
}

impl fmt::Debug for SameDirectory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SameDirectory({})", self.directory.path.display())
    }
}

impl StoreLayer for SameDirectory {
    fn below(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.below)
    }

    fn before_write<'a>(&'a self, _: &'a Path) -> BoxFuture<'a, ObjectResult<()>> {
        self.check().boxed()
    }

    fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
        let got = async move {
            match self.below.get_opts(at, options).await {
                Err(missing @ ObjectError::NotFound { .. }) => {
                    self.check().await?;
                    Err(missing)
                }
                got => got,
            }
        };
        got.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, ObjectResult<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        let listed = async move { this.check().await.map(|()| this.below.list(prefix.as_ref())) };
        stream::once(listed).try_flatten().boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use object_store::{ObjectStoreExt, PutPayload};

    use crate::StoreUrl;

    /// The fear: the file system of an archive is unmounted, the archive goes on in the empty directory below it, and says that it is up to
    /// date.
    #[tokio::test]
    async fn a_directory_that_was_moved_away_is_not_made_anew_nor_found_empty() {
        let scratch = tempfile::tempdir().unwrap();
        let (path, away) = (scratch.path().join("store"), scratch.path().join("away"));
        let url = StoreUrl::from_directory(&path).unwrap();
        let opened = url.open().unwrap();
        let (old, new) = ("a/old".into(), "a/new".into());
        opened.store.put(&old, PutPayload::from_static(b"1")).await.unwrap();
        fs::rename(&path, &away).unwrap();
        for _ in 0..2 {
            let refused = opened.store.put(&new, PutPayload::from_static(b"2")).await.unwrap_err();
            assert!(refused.to_string().contains("is not the directory that was opened"), "{refused}");
            let unknown = opened.store.get(&old).await.unwrap_err();
            assert!(unknown.to_string().contains("is not the directory that was opened"), "{unknown}");
            let listed: Result<Vec<_>, _> = futures::TryStreamExt::try_collect(opened.store.list(None)).await;
            assert!(listed.is_err());
            assert!(!path.exists() || fs::read_dir(&path).unwrap().next().is_none());
            // The second time there is another directory.
            fs::create_dir_all(&path).unwrap();
        }
        fs::remove_dir(&path).unwrap();
        fs::rename(&away, &path).unwrap();
        opened.store.put(&new, PutPayload::from_static(b"2")).await.unwrap();
        assert_eq!(opened.store.get(&old).await.unwrap().bytes().await.unwrap(), "1");
    }
}
