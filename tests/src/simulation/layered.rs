//! A node's own store, and behind it those of the archives, as a promoted node reads packs.
//!
//! Invariants:
//! - Only what the own store says not to have is asked for elsewhere; only the own store is written.

use std::{fmt, ops::Range, sync::Arc};

use bytes::Bytes;
use futures::{future::BoxFuture, stream::BoxStream};
use murphy_fs::{BlockStore, BlockStoreError, PackName, StoredPack, WriterId};

/// Stores, one behind the other.
pub(super) struct Layered {
    pub(super) own: Arc<dyn BlockStore>,
    pub(super) others: Vec<Arc<dyn BlockStore>>,
}

impl fmt::Debug for Layered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} and others", self.own)
    }
}

impl Layered {
    async fn first<'a, T>(
        &'a self,
        ask: impl Fn(&'a dyn BlockStore) -> BoxFuture<'a, Result<T, BlockStoreError>>,
    ) -> Result<T, BlockStoreError> {
        let mut answer = ask(&*self.own).await;
        for other in &self.others {
            if !matches!(answer, Err(BlockStoreError::NotFound { .. })) {
                break;
            }
            let further = ask(&**other).await;
            answer = further.or(answer);
        }
        answer
    }
}

impl BlockStore for Layered {
    fn label(&self) -> std::borrow::Cow<'_, str> {
        self.own.label()
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.put(name, bytes)
    }

    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.mend(name, bytes)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(async move { self.first(|store| store.get_range(name, range.clone())).await })
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(async move { self.first(|store| store.get(name)).await })
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        Box::pin(async move { self.first(|store| store.size(name)).await })
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.own.list(writer)
    }
}
