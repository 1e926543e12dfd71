//! An object store in a directory of a faulty disk, step by step what `LocalFileSystem` of object_store 0.14.2 does with fsync.
//!
//! ```text
//!   put, create      write <object>#1, sync it, link it to <object>, sync the folder, remove <object>#1
//!   put, overwrite   write <object>#1, sync it, rename it to <object>, sync the folder
//!   no folder        create what is missing, then sync from the lowest folder up to the first that was there
//!   delete           remove, without a sync
//! ```
//!
//! Seen with strace, and read in its `local.rs` (`new_staged_upload`, `finish_staged_hard_link`, `create_parent_dirs`).

use std::{
    fmt,
    future::Future,
    io,
    path::{Path as FilePath, PathBuf},
    pin::Pin,
};

use bytes::Bytes;
use futures::{StreamExt, stream, stream::BoxStream};
use murphy_log::{Files, faulty::FaultyDisk};
use object_store::{
    CopyOptions, Error as ObjectError, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result as ObjectResult, path::Path,
};

/// Objects in files of a faulty disk.
#[derive(Clone, Debug)]
pub struct DiskObjects {
    disk: FaultyDisk,
    root: PathBuf,
}

impl DiskObjects {
    /// The store in the directory `root`, which must exist.
    pub fn new(disk: FaultyDisk, root: impl Into<PathBuf>) -> DiskObjects {
        DiskObjects { disk, root: root.into() }
    }

    fn path(&self, at: &Path) -> PathBuf {
        let mut path = self.root.clone();
        path.extend(at.parts().map(|part| part.as_ref().to_owned()));
        path
    }

    fn put(&self, path: &FilePath, bytes: &[u8], mode: &PutMode) -> io::Result<()> {
        let folder = path.parent().ok_or(io::ErrorKind::NotFound)?;
        let staging = self.stage(path, folder)?;
        let put = self.publish(&staging, path, folder, bytes, mode);
        if put.is_err() {
            // As the model does, whether it works or not.
            let _left = self.disk.remove(&staging);
        }
        put
    }

    fn stage(&self, path: &FilePath, folder: &FilePath) -> io::Result<PathBuf> {
        if !self.disk.exists(folder) {
            let mut missing: Vec<_> =
                folder.ancestors().take_while(|above| !self.disk.exists(above)).collect();
            let first_existing =
                missing.last().and_then(|last| last.parent()).ok_or(io::ErrorKind::NotFound)?;
            missing.reverse();
            missing.iter().try_for_each(|made| self.disk.make_dir(made))?;
            for synced in folder.ancestors() {
                self.disk.sync_dir(synced)?;
                if synced == first_existing {
                    break;
                }
            }
        }
        let names = (1..).map(|number| PathBuf::from(format!("{}#{number}", path.display())));
        let mut free = names.skip_while(|name| self.disk.exists(name));
        let staging = free.next().ok_or(io::ErrorKind::AlreadyExists)?;
        self.disk.create(&staging).map(|_| staging)
    }

    fn publish(
        &self,
        staging: &FilePath,
        path: &FilePath,
        folder: &FilePath,
        bytes: &[u8],
        mode: &PutMode,
    ) -> io::Result<()> {
        let file = self.disk.open(staging)?;
        file.write_at(0, bytes)?;
        file.sync_data()?;
        match mode {
            PutMode::Create => {
                self.disk.link(staging, path)?;
                self.disk.sync_dir(folder)?;
                // As the model does, whether it works or not.
                let _left = self.disk.remove(staging);
                Ok(())
            }
            _ => {
                self.disk.rename(staging, path)?;
                self.disk.sync_dir(folder)
            }
        }
    }

    fn get(&self, at: &Path, options: &GetOptions) -> ObjectResult<GetResult> {
        let failed = |error: io::Error| failed(at, error);
        let file = self.disk.open(&self.path(at)).map_err(failed)?;
        let mut bytes = vec![0; file.length().map_err(failed)? as usize];
        let length = file.read_at(0, &mut bytes).map_err(failed)?;
        bytes.truncate(length);
        let meta = meta(at, bytes.len());
        let range = match &options.range {
            Some(range) => range.as_range(meta.size).map_err(|error| failed(io::Error::other(error)))?,
            None => 0..meta.size,
        };
        let part = Bytes::from(bytes).slice(range.start as usize..range.end as usize);
        let payload = GetResultPayload::Stream(stream::iter([Ok(part)]).boxed());
        Ok(GetResult { payload, meta, range, attributes: Default::default(), extensions: Default::default() })
    }
}

fn meta(at: &Path, length: usize) -> ObjectMeta {
    ObjectMeta {
        location: at.clone(),
        last_modified: Default::default(),
        size: length as u64,
        e_tag: None,
        version: None,
    }
}

fn failed(at: &Path, error: io::Error) -> ObjectError {
    let path = at.to_string();
    match error.kind() {
        io::ErrorKind::NotFound => ObjectError::NotFound { path, source: Box::new(error) },
        io::ErrorKind::AlreadyExists => ObjectError::AlreadyExists { path, source: Box::new(error) },
        _ => ObjectError::Generic { store: "faulty disk", source: Box::new(error) },
    }
}

fn unused<T>(operation: &str) -> ObjectResult<T> {
    Err(ObjectError::NotImplemented {
        operation: operation.to_owned(),
        implementer: "DiskObjects".to_owned(),
    })
}

impl fmt::Display for DiskObjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskObjects({})", self.root.display())
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = ObjectResult<T>> + Send + 'a>>;

impl ObjectStore for DiskObjects {
    fn put_opts<'s, 'l, 'a>(
        &'s self,
        at: &'l Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> Answer<'a, PutResult>
    where
        's: 'a,
        'l: 'a,
        Self: 'a,
    {
        Box::pin(async move {
            let put = self.put(&self.path(at), &Bytes::from(bytes), &options.mode);
            put.map_err(|error| failed(at, error))?;
            Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
        })
    }

    fn put_multipart_opts<'s, 'l, 'a>(
        &'s self,
        _: &'l Path,
        _: PutMultipartOptions,
    ) -> Answer<'a, Box<dyn MultipartUpload>>
    where
        's: 'a,
        'l: 'a,
        Self: 'a,
    {
        Box::pin(async { unused("put_multipart") })
    }

    fn get_opts<'s, 'l, 'a>(&'s self, at: &'l Path, options: GetOptions) -> Answer<'a, GetResult>
    where
        's: 'a,
        'l: 'a,
        Self: 'a,
    {
        Box::pin(async move { self.get(at, &options) })
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, ObjectResult<Path>>,
    ) -> BoxStream<'static, ObjectResult<Path>> {
        let store = self.clone();
        let delete = move |path: ObjectResult<Path>| {
            let path = path?;
            store.disk.remove(&store.path(&path)).map_err(|error| failed(&path, error)).map(|()| path)
        };
        paths.map(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, ObjectResult<ObjectMeta>> {
        let below = prefix.map_or_else(|| self.root.clone(), |prefix| self.path(prefix));
        let listed = self.disk.contents().into_iter().filter(|(path, _)| path.starts_with(&below));
        let objects =
            listed.filter(|(path, _)| !path.to_string_lossy().contains('#')).filter_map(|(path, bytes)| {
                let name = path.strip_prefix(&self.root).ok()?.to_str()?.to_owned();
                Some(Ok(meta(&Path::from(name), bytes.len())))
            });
        stream::iter(objects.collect::<Vec<_>>()).boxed()
    }

    fn list_with_delimiter<'s, 'l, 'a>(&'s self, _: Option<&'l Path>) -> Answer<'a, ListResult>
    where
        's: 'a,
        'l: 'a,
        Self: 'a,
    {
        Box::pin(async { unused("list_with_delimiter") })
    }

    fn copy_opts<'s, 'f, 't, 'a>(&'s self, _: &'f Path, _: &'t Path, _: CopyOptions) -> Answer<'a, ()>
    where
        's: 'a,
        'f: 'a,
        't: 'a,
        Self: 'a,
    {
        Box::pin(async { unused("copy") })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use murphy_fs::{BlockStore, DurableFolders, LayeredStore, ObjectBlockStore, PackName, WriterId};

    use super::*;

    fn packs(disk: &FaultyDisk) -> ObjectBlockStore {
        let store = Arc::new(DiskObjects::new(disk.clone(), "/packs"));
        let store = DurableFolders::new(store, Arc::new(disk.clone()), "/packs".into());
        ObjectBlockStore::in_directory(Arc::new(LayeredStore(store)), Path::default(), "disk".to_owned())
    }

    fn name(number: u64) -> PackName {
        PackName::new(WriterId::from_u64(7), number)
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    fn put(packs: &ObjectBlockStore, name: PackName) -> bool {
        block_on(packs.put(name, Bytes::from(vec![1; 1500]))).is_ok()
    }

    fn empty() -> FaultyDisk {
        let disk = FaultyDisk::new();
        disk.create_dir(FilePath::new("/packs")).unwrap();
        disk
    }

    /// A folder that a killed process has made and not synced takes with it what the next one puts there.
    #[test]
    fn a_pack_is_durable_in_a_folder_that_a_kill_has_left_behind() {
        let disk = empty();
        disk.record();
        assert!(put(&packs(&disk), name(1)));
        let mut checked = 0;
        for (at, moment) in disk.take_recorded().iter().enumerate() {
            let after = moment.after_kill();
            assert!(put(&packs(&after), name(1)), "moment {at}");
            for seed in 0..20 {
                let cut = packs(&after.after_power_cut(seed));
                assert_eq!(block_on(cut.get(name(1))).unwrap(), vec![1; 1500], "moment {at}, seed {seed}");
                checked += 1;
            }
        }
        assert!(checked > 100);
    }

    /// The fear: a copier that is started anew finds a pack there, counts on it and says so, and a power cut takes it: whoever put it was
    /// killed before it had synced the folder.
    #[test]
    fn a_pack_that_was_seen_to_be_there_survives_a_power_cut() {
        let disk = empty();
        disk.record();
        assert!(put(&packs(&disk), name(1)));
        let (mut seen, mut unseen) = (0, 0);
        for (at, moment) in disk.take_recorded().iter().enumerate() {
            let after = moment.after_kill();
            if block_on(packs(&after).size(name(1))).is_err() {
                unseen += 1;
                continue;
            }
            seen += 1;
            for seed in 0..20 {
                let cut = packs(&after.after_power_cut(seed));
                assert_eq!(block_on(cut.get(name(1))).unwrap(), vec![1; 1500], "moment {at}, seed {seed}");
            }
        }
        assert!(seen > 1 && unseen > 1, "{seen} and {unseen} moments");
    }

    /// What a put could not promise is not promised by one that finds its bytes there.
    #[test]
    fn a_put_that_failed_at_any_operation_is_durable_once_it_is_repeated() {
        use murphy_log::faulty::Fault;
        for fault in [Fault::Broken, Fault::Full] {
            for at in 0.. {
                let disk = empty();
                let store = packs(&disk);
                let first = disk.operations() + at;
                disk.fail_at(first, fault);
                let failed = !put(&store, name(1));
                if disk.operations() <= first {
                    assert!(at > 6, "a put has steps");
                    break;
                }
                assert!(!failed || put(&store, name(1)), "{fault:?} at {at}");
                for seed in 0..20 {
                    let cut = packs(&disk.after_power_cut(seed));
                    let found = block_on(cut.get(name(1)));
                    assert_eq!(found.unwrap(), vec![1; 1500], "{fault:?} at operation {at}, seed {seed}");
                }
            }
        }
    }
}
