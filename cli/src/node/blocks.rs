//! A block store above others: new packs go to the first, packs that it lacks are read from the rest.
//!
//! Invariants:
//! - The others are never written to, and nothing is deleted there.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures::{future::BoxFuture, stream::BoxStream};
use murphy_fs::{BlockStore, BlockStoreError, PackName, StoredPack, WriterId};

/// The store of a copy that was made without copying the packs.
#[derive(Debug)]
pub(super) struct Layered {
    own: Arc<dyn BlockStore>,
    others: Vec<Arc<dyn BlockStore>>,
}

impl Layered {
    pub(super) fn new(own: Arc<dyn BlockStore>, others: Vec<Arc<dyn BlockStore>>) -> Layered {
        Layered { own, others }
    }

    /// Asks one store after the other. The error is that of the first that did not say that it has no such pack.
    async fn first<'a, T, F>(&'a self, ask: F) -> Result<T, BlockStoreError>
    where
        F: Fn(&'a dyn BlockStore) -> BoxFuture<'a, Result<T, BlockStoreError>>,
    {
        let mut failed = match ask(&*self.own).await {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        for other in &self.others {
            match ask(&**other).await {
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
        Box::pin(self.first(move |store| store.get_range(name, range.clone())))
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(self.first(move |store| store.get(name)))
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        Box::pin(self.first(move |store| store.size(name)))
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.own.list(writer)
    }
}
