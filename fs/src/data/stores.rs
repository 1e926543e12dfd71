//! A block store and others behind it: new packs go to the first, packs that it lacks are read from the rest.
//!
//! Invariants:
//! - The others are never written to, and nothing is deleted there.
//! - An error names the store that gave it; that a pack is not there is said of all of them.
//! - What the first store that has a pack answers may be damaged while another one has it intact: whoever passes packs on asks each
//!   ([`read_intact`](super::read_intact)).

use std::{borrow::Cow, ops::Range, sync::Arc};

use bytes::Bytes;
use futures::{future::BoxFuture, stream::BoxStream};
use parking_lot::RwLock;

use super::{
    intact::flattened,
    name::{PackName, WriterId},
    store::{BlockStore, BlockStoreError, StoredPack},
};

/// The store of a node, and others that may have what it lacks: archives, for a copy that was made without copying the packs, and for a
/// mirror that became the source before it had every pack.
#[derive(Debug)]
pub struct BlockStores {
    own: Arc<dyn BlockStore>,
    others: RwLock<Vec<Arc<dyn BlockStore>>>,
}

impl BlockStores {
    /// `own`, and behind it `others` in this order.
    pub fn new(own: Arc<dyn BlockStore>, others: Vec<Arc<dyn BlockStore>>) -> BlockStores {
        BlockStores { own, others: RwLock::new(others) }
    }

    /// The first store alone.
    pub fn own(&self) -> Arc<dyn BlockStore> {
        Arc::clone(&self.own)
    }

    /// The others, in the order in which they are asked.
    pub fn others(&self) -> Vec<Arc<dyn BlockStore>> {
        self.others.read().clone()
    }

    /// Reads from these too, from now on.
    pub fn also(&self, others: Vec<Arc<dyn BlockStore>>) {
        self.others.write().extend(others);
    }

    fn all(&self) -> Vec<Arc<dyn BlockStore>> {
        [&self.own].into_iter().chain(&*self.others.read()).map(Arc::clone).collect()
    }

    /// Asks one store after the other. The error is that of the first that did not say that it has no such pack.
    async fn first<T, F, A>(&self, name: PackName, ask: F) -> Result<T, BlockStoreError>
    where
        F: Fn(Arc<dyn BlockStore>) -> A + Send,
        A: Future<Output = Result<T, BlockStoreError>> + Send,
    {
        let mut failed = None;
        for store in self.all() {
            match ask(store).await {
                Ok(found) => return Ok(found),
                Err(BlockStoreError::NotFound { .. }) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let object = || format!("pack {name} in {}", self.label());
        Err(failed.unwrap_or_else(|| BlockStoreError::NotFound { object: object() }))
    }
}

impl BlockStore for BlockStores {
    fn label(&self) -> Cow<'_, str> {
        let others = self.others.read();
        if others.is_empty() {
            return self.own.label();
        }
        let labels: Vec<Cow<'_, str>> =
            [&self.own].into_iter().chain(&*others).map(|store| store.label()).collect();
        labels.join(" or ").into()
    }

    fn stores(&self) -> Vec<Arc<dyn BlockStore>> {
        flattened(&self.all())
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.put(name, bytes)
    }

    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.mend(name, bytes)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(self.first(name, move |store| {
            let range = range.clone();
            async move { store.get_range(name, range).await }
        }))
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(self.first(name, move |store| async move { store.get(name).await }))
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        Box::pin(self.first(name, move |store| async move { store.size(name).await }))
    }

    fn size_where_put(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        self.own.size_where_put(name)
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.own.delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.own.list(writer)
    }
}

#[cfg(test)]
mod tests {
    use object_store::{memory::InMemory, path::Path};

    use super::*;
    use crate::ObjectBlockStore;

    fn store(label: &str) -> Arc<dyn BlockStore> {
        Arc::new(ObjectBlockStore::new(Arc::new(InMemory::new()), Path::default(), label.to_owned()))
    }

    /// The fear: somebody looks for a lost pack in the one store that a message names, while it lies damaged in another.
    #[tokio::test]
    async fn what_no_store_has_is_said_of_all_of_them() {
        let (name, bytes) = (PackName::new(WriterId::from_u64(9), 1), Bytes::from_static(b"a pack"));
        let archives = [store("s3://one"), store("s3://two")];
        let stores = BlockStores::new(store("file:///own"), vec![Arc::clone(&archives[0])]);
        let refused = stores.get(name).await.unwrap_err();
        assert_eq!(refused.to_string(), format!("pack {name} in file:///own or s3://one does not exist"));
        archives[1].put(name, bytes.clone()).await.unwrap();
        stores.also(vec![Arc::clone(&archives[1])]);
        assert_eq!(stores.label(), "file:///own or s3://one or s3://two");
        assert_eq!(stores.get(name).await.unwrap(), bytes);
        assert_eq!(stores.size(name).await.unwrap(), 6);
        assert_eq!(stores.get_range(name, 2..6).await.unwrap(), &bytes[2..]);
        assert!(matches!(archives[0].get(name).await, Err(BlockStoreError::NotFound { .. })));
    }

    /// The fear: a put is settled by what another store says, or cannot be settled because another store does not answer.
    #[tokio::test]
    async fn what_a_put_has_left_is_asked_of_the_own_store() {
        let (name, bytes) = (PackName::new(WriterId::from_u64(9), 1), Bytes::from_static(b"a pack"));
        let archive = store("s3://one");
        archive.put(name, bytes.clone()).await.unwrap();
        let inner: Arc<dyn BlockStore> = Arc::new(BlockStores::new(store("file:///own"), vec![archive]));
        let stores = BlockStores::new(inner, Vec::new());
        assert_eq!(stores.size(name).await.unwrap(), 6);
        let found = stores.size_where_put(name).await;
        assert!(matches!(found, Err(BlockStoreError::NotFound { .. })), "{found:?}");
        stores.put(name, bytes).await.unwrap();
        assert_eq!(stores.size_where_put(name).await.unwrap(), 6);
    }

    #[tokio::test]
    async fn only_the_own_store_is_changed() {
        let (name, bytes) = (PackName::new(WriterId::from_u64(9), 1), Bytes::from_static(b"a pack"));
        let archive = store("s3://one");
        let stores = BlockStores::new(store("file:///own"), vec![Arc::clone(&archive)]);
        stores.put(name, bytes.clone()).await.unwrap();
        assert!(matches!(archive.get(name).await, Err(BlockStoreError::NotFound { .. })));
        archive.put(name, bytes.clone()).await.unwrap();
        stores.delete(name).await.unwrap();
        assert_eq!(stores.get(name).await.unwrap(), bytes, "the archive keeps it");
    }
}
