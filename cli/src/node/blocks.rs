//! A block store above others: new packs go to the first, packs that it lacks are read from the rest.
//!
//! Invariants:
//! - The others are never written to, and nothing is deleted there.

use std::{
    ops::Range,
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;
use futures::{future::BoxFuture, stream::BoxStream};
use murphy_fs::{BlockStore, BlockStoreError, PackName, StoredPack, WriterId};

/// The store of a node, and others that may have what it lacks: archives, for a copy that was made without copying the packs, and for a
/// mirror that became the source before it had every pack.
#[derive(Debug)]
pub(crate) struct Layered {
    own: Arc<dyn BlockStore>,
    others: RwLock<Vec<Arc<dyn BlockStore>>>,
}

impl Layered {
    pub(crate) fn new(own: Arc<dyn BlockStore>, others: Vec<Arc<dyn BlockStore>>) -> Layered {
        Layered { own, others: RwLock::new(others) }
    }

    /// Reads from these too, from now on.
    pub(crate) fn also(&self, others: Vec<Arc<dyn BlockStore>>) {
        // A list is whole after every operation on it.
        self.others.write().unwrap_or_else(PoisonError::into_inner).extend(others);
    }

    /// Asks one store after the other. The error is that of the first that did not say that it has no such pack.
    async fn first<T, F, A>(&self, ask: F) -> Result<T, BlockStoreError>
    where
        F: Fn(Arc<dyn BlockStore>) -> A + Send,
        A: Future<Output = Result<T, BlockStoreError>> + Send,
    {
        let mut failed = match ask(Arc::clone(&self.own)).await {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let others = self.others.read().unwrap_or_else(PoisonError::into_inner).clone();
        for other in others {
            match ask(other).await {
                Ok(found) => return Ok(found),
                Err(error) if matches!(failed, BlockStoreError::NotFound { .. }) => failed = error,
                Err(_) => {}
            }
        }
        Err(failed)
    }
}

impl BlockStore for Layered {
    fn label(&self) -> &str {
        self.own.label()
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.put(name, bytes)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(self.first(move |store| {
            let range = range.clone();
            async move { store.get_range(name, range).await }
        }))
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(self.first(move |store| async move { store.get(name).await }))
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        Box::pin(self.first(move |store| async move { store.size(name).await }))
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.own.list(writer)
    }
}
