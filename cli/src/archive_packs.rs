//! The packs of an archive that a node only reads, and that need not be there.
//!
//! Invariants:
//! - Nothing is made, put or deleted there: a directory whose disk is not mounted stays as it is.
//! - What is read there because nobody nearer has it is named in the log, each pack once.
//! - That it does not have a pack an archive says only while it shows that it is an archive of the volume; otherwise it does not answer.
//! - A directory that hangs holds one thread, not one for each reader, and no reader for longer than [`PATIENCE`].

use std::{
    borrow::Cow,
    collections::BTreeSet,
    ops::Range,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::{
    StreamExt,
    future::{self, BoxFuture},
    stream::{self, BoxStream},
};
use murphy_backup::Archive;
use murphy_fs::{
    BlockStore, BlockStoreError, ObjectBlockStore, PackName, Refusal, StoreUrl, StoredPack, WriterId,
};
use murphy_log::VolumeId;
use tokio::sync::Semaphore;

use crate::{
    error::{CliError, failed},
    places::{check_there, open_store},
};

/// Reads packs from an archive, as soon as it is there.
#[derive(Debug)]
pub(crate) struct ArchivePacks {
    url: StoreUrl,
    label: String,
    volume: VolumeId,
    opened: OnceLock<ObjectBlockStore>,
    told: Option<Arc<Told>>,
    /// Held by whoever looks at the directory, until the file system has answered.
    looks: Arc<Semaphore>,
    /// How long a reader waits to hear whether the archive is there.
    patience: Duration,
}

impl ArchivePacks {
    /// The packs of the archive of `volume` at `url`. Makes no request.
    pub(crate) fn new(url: StoreUrl, volume: VolumeId) -> ArchivePacks {
        let (opened, looks) = (OnceLock::new(), Arc::new(Semaphore::new(1)));
        ArchivePacks { label: url.to_string(), url, volume, opened, told: None, looks, patience: PATIENCE }
    }

    /// The same for what should not have to be read there: `told` says of each pack that it was.
    pub(crate) fn telling(self, told: Arc<Told>) -> ArchivePacks {
        ArchivePacks { told: Some(told), ..self }
    }

    /// The store, if it is there; opening one in a directory would make that.
    async fn store(&self) -> Result<&ObjectBlockStore, CliError> {
        let (url, is_open) = (self.url.clone(), self.opened.get().is_some());
        let there = self.look(move || {
            check_there(&url)?;
            if is_open { Ok(None) } else { ObjectBlockStore::open(&url).map(Some).map_err(failed) }
        });
        match (self.opened.get(), there.await?) {
            (Some(store), _) => Ok(store),
            (None, Some(store)) => Ok(self.opened.get_or_init(|| store)),
            (None, None) => Err(CliError::new("it is not open")),
        }
    }

    /// Does `work`, which may hang with the file system, once nobody else is at such work; it goes on if nobody waits for it any more.
    async fn look<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, CliError> + Send + 'static,
    ) -> Result<T, CliError> {
        let alone = Arc::clone(&self.looks).acquire_owned().await.map_err(failed)?;
        let looking = murphy_log::aside(move || {
            let _alone = alone;
            work()
        });
        looking.await
    }

    /// What becomes of `looking` if that is soon; otherwise the archive does not answer.
    async fn in_time<T>(
        &self,
        name: PackName,
        looking: impl Future<Output = Result<T, CliError>>,
    ) -> Result<T, BlockStoreError> {
        let looked = tokio::time::timeout(self.patience, looking).await;
        let looked = looked.unwrap_or_else(|_| Err(CliError::new("whether it is there is not said in time")));
        looked.map_err(|error| self.unavailable(name, error))
    }

    async fn ask<T, F, A>(&self, name: PackName, ask: F) -> Result<T, BlockStoreError>
    where
        F: FnOnce(ObjectBlockStore) -> A + Send,
        A: Future<Output = Result<T, BlockStoreError>> + Send,
    {
        let store = self.in_time(name, self.store()).await?.clone();
        match ask(store).await {
            Err(missing @ BlockStoreError::NotFound { .. }) => {
                self.in_time(name, self.check()).await?;
                Err(missing)
            }
            answer => answer,
        }
    }

    /// Whether what is there is an archive of the volume, and not what a disk left behind that is gone.
    async fn check(&self) -> Result<(), CliError> {
        let url = self.url.clone();
        let store = self.look(move || check_there(&url).and_then(|()| open_store(&url))).await?;
        let found = Archive::open(store).await.map_err(failed)?.lineage().volume;
        if found != self.volume {
            return Err(CliError::new(format!("{} is an archive of volume {found}", self.label)));
        }
        Ok(())
    }

    fn unavailable(&self, name: PackName, error: CliError) -> BlockStoreError {
        let source = Arc::new(std::io::Error::other(error.to_string()));
        BlockStoreError::Unavailable { object: self.object(name), retryable: true, source }
    }

    fn object(&self, name: PackName) -> String {
        format!("pack {name} in {}", self.label)
    }

    fn refuse(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        let refusal = Refusal::Unsupported("this node only reads there".to_owned());
        Box::pin(future::ready(Err(BlockStoreError::Refused { object: self.object(name), refusal })))
    }
}

/// The packs that archives have given because the own store does not.
#[derive(Debug, Default)]
pub(crate) struct Told(Mutex<BTreeSet<PackName>>);

impl Told {
    /// How many packs they were; no more are counted than a limit.
    pub(crate) fn count(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn read(&self, name: PackName, archive: &str) {
        // A set is whole after every operation on it.
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < TOLD_MAX && told.insert(name) {
            tracing::warn!(pack = %name, archive, "the block store does not give a pack intact, or not in time; it is read from an archive");
        }
    }
}

impl BlockStore for ArchivePacks {
    fn label(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.label)
    }

    fn put(&self, name: PackName, _: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.refuse(name)
    }

    fn mend(&self, name: PackName, _: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.refuse(name)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(async move {
            let bytes =
                self.ask(name, move |store| async move { store.get_range(name, range).await }).await?;
            if let Some(told) = &self.told {
                told.read(name, &self.label);
            }
            Ok(bytes)
        })
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(self.ask(name, move |store| async move { store.get(name).await }))
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        Box::pin(self.ask(name, move |store| async move { store.size(name).await }))
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.refuse(name)
    }

    /// Empty: nobody asks, and a listing proves nothing.
    fn list(&self, _: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        stream::empty().boxed()
    }
}

/// So many packs are named and counted, 16 bytes each.
const TOLD_MAX: usize = 1 << 16;

/// A disk that sleeps has spun up by then; whoever reads has time left to ask somebody else.
const PATIENCE: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use std::fs;

    use murphy_fs::PackBuilder;
    use murphy_log::{BranchId, Epoch, EpochId, LogTime, State};

    use super::*;
    use crate::{config::NodeConfig, places::create_archive};

    /// The fear: an archive whose disk is not mounted is taken for one that has said no, and what only it has is called missing; or an empty
    /// store is made in its place.
    #[tokio::test]
    async fn an_archive_that_is_not_there_does_not_say_what_it_lacks() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("archive");
        let url = StoreUrl::from_directory(&place).unwrap();
        let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
        let packs = ArchivePacks::new(url.clone(), volume);
        let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(5), 1));
        builder.add(b"some bytes").unwrap();
        let pack = builder.finish().unwrap();
        let is_unknown = |asked: Result<Bytes, BlockStoreError>| {
            assert!(matches!(asked, Err(BlockStoreError::Unavailable { .. })), "{asked:?}");
        };
        is_unknown(packs.get(pack.name).await);
        assert!(!place.exists());
        fs::create_dir(&place).unwrap();
        is_unknown(packs.get(pack.name).await);
        let config = NodeConfig::new(volume, branch, "vol".to_owned(), url.clone());
        let base = State::origin(Epoch { number: 1, id: EpochId::from_bytes([3; 16]) }).position;
        let archive = create_archive(&config, &url, false, base, LogTime::default()).await.unwrap();
        let missing = packs.get(pack.name).await;
        assert!(matches!(missing, Err(BlockStoreError::NotFound { .. })), "{missing:?}");
        assert!(packs.put(pack.name, pack.bytes.clone()).await.is_err());
        assert!(packs.mend(pack.name, pack.bytes.clone()).await.is_err());
        archive.packs().put(pack.name, pack.bytes.clone()).await.unwrap();
        assert!(packs.delete(pack.name).await.is_err());
        assert_eq!(packs.get(pack.name).await.unwrap(), pack.bytes);
        assert_eq!(packs.get_range(pack.name, 3..9).await.unwrap(), pack.bytes[3..9]);
        assert_eq!(packs.size(pack.name).await.unwrap(), pack.stored_len);
        let other = ArchivePacks::new(url, VolumeId::from_bytes([9; 16]));
        is_unknown(other.get(PackName::new(WriterId::from_u64(5), 2)).await);
        fs::rename(&place, folder.path().join("away")).unwrap();
        is_unknown(packs.get(pack.name).await);
        assert!(!place.exists());
    }

    /// The fear: the server of an archive's directory hangs, and each read of a pack holds one more thread for ever, until none is left for
    /// anything else.
    #[tokio::test]
    async fn an_archive_that_hangs_is_asked_by_one_and_given_up_by_all() {
        let folder = tempfile::tempdir().unwrap();
        let url = StoreUrl::from_directory(folder.path()).unwrap();
        let packs = ArchivePacks {
            patience: Duration::from_millis(20),
            ..ArchivePacks::new(url, VolumeId::from_bytes([1; 16]))
        };
        let (answer, hangs) = std::sync::mpsc::channel::<()>();
        let hanging = packs.look(move || hangs.recv().map_err(failed));
        let name = PackName::new(WriterId::from_u64(5), 1);
        assert!(packs.in_time(name, hanging).await.is_err());
        for _ in 0..3 {
            let asked = packs.get(name).await;
            assert!(matches!(asked, Err(BlockStoreError::Unavailable { .. })), "{asked:?}");
            assert!(packs.opened.get().is_none(), "nobody looks while somebody does");
        }
        answer.send(()).unwrap();
        packs.look(|| Ok(())).await.unwrap();
        let opened = packs.store().await;
        assert!(opened.is_ok(), "{opened:?}");
    }
}
