//! The archives of a volume as the last place where its source reads packs: its own store may lose one that they have.
//!
//! Invariants:
//! - Only reads look here, after everything else. Whoever checks, ships or copies packs looks into the own store, and finds that one is missing.
//! - Which archives there are says the tree of the moment.
//! - A mirror reads here only once it is the source: until then it has the source to ask.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use futures::{
    StreamExt,
    future::{self, BoxFuture},
    stream::{self, BoxStream},
};
use murphy_fs::{
    BlockStore, BlockStoreError, FjallIndex, Index, PackName, Refusal, StoreUrl, StoredPack, WriterId,
};

use crate::{
    archive_packs::{ArchivePacks, Told},
    config::{NodeConfig, Role},
    error::CliError,
    places::local_url,
    settings::{Settings, shared_form},
};

/// Stands for the archives that hold packs.
pub(crate) struct ArchiveReads {
    index: Arc<FjallIndex>,
    config: NodeConfig,
    leads: AtomicBool,
    /// By URL: an archive that was opened stays so.
    known: Mutex<BTreeMap<String, Arc<ArchivePacks>>>,
    told: Arc<Told>,
}

impl ArchiveReads {
    /// Those that the tree in `index` names. Makes no request.
    pub(crate) fn new(index: Arc<FjallIndex>, config: NodeConfig) -> ArchiveReads {
        let leads = AtomicBool::new(config.role == Role::Source);
        ArchiveReads { index, config, leads, known: Mutex::default(), told: Arc::default() }
    }

    /// From now on the node is the source.
    pub(crate) fn lead(&self) {
        self.leads.store(true, Ordering::Relaxed);
    }

    /// How many packs had to be read there since the start.
    pub(crate) fn count(&self) -> u64 {
        self.told.count()
    }

    /// The archives that hold packs and are not among those that are read before.
    fn archives(&self) -> Result<Vec<Arc<ArchivePacks>>, CliError> {
        let settings = Settings::in_tree(&*self.index.snapshot())?;
        let full = settings.archives.iter().filter(|archive| !archive.log_only);
        let urls = full.map(|archive| local_url(&self.config, archive)).collect::<Result<Vec<_>, _>>()?;
        let is_read =
            |url: &StoreUrl| self.config.packs_from.iter().any(|read| shared_form(read) == shared_form(url));
        // A map is whole after every operation on it.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = urls.into_iter().filter(|url| !is_read(url)).map(|url| {
            let packs = || {
                Arc::new(ArchivePacks::new(url.clone(), self.config.volume).telling(Arc::clone(&self.told)))
            };
            Arc::clone(known.entry(url.to_string()).or_insert_with(packs))
        });
        Ok(opened.collect())
    }

    fn none<T: Send + 'static>(name: PackName) -> BoxFuture<'static, Result<T, BlockStoreError>> {
        let object = format!("pack {name} in the archives");
        Box::pin(future::ready(Err(BlockStoreError::NotFound { object })))
    }

    fn refuse(name: PackName) -> BoxFuture<'static, Result<(), BlockStoreError>> {
        let refusal = Refusal::Unsupported("a node only reads there".to_owned());
        let object = format!("pack {name} in the archives");
        Box::pin(future::ready(Err(BlockStoreError::Refused { object, refusal })))
    }
}

impl fmt::Debug for ArchiveReads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArchiveReads").field("leads", &self.leads).finish_non_exhaustive()
    }
}

impl BlockStore for ArchiveReads {
    fn label(&self) -> Cow<'_, str> {
        "the archives".into()
    }

    fn stores(&self) -> Vec<Arc<dyn BlockStore>> {
        if !self.leads.load(Ordering::Relaxed) {
            return Vec::new();
        }
        match self.archives() {
            Ok(archives) => archives.into_iter().map(|packs| packs as Arc<dyn BlockStore>).collect(),
            Err(error) => {
                tracing::warn!(%error, "the archives of the volume are not asked for a pack");
                Vec::new()
            }
        }
    }

    fn put(&self, name: PackName, _: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        ArchiveReads::refuse(name)
    }

    fn mend(&self, name: PackName, _: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        ArchiveReads::refuse(name)
    }

    fn get_range(&self, name: PackName, _: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        ArchiveReads::none(name)
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        ArchiveReads::none(name)
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        ArchiveReads::none(name)
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        ArchiveReads::refuse(name)
    }

    /// Empty: nobody asks, and a listing proves nothing.
    fn list(&self, _: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        stream::empty().boxed()
    }
}
