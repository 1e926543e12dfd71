//! The packs of the source, as a mirror reads those that its own stores lack or have damaged.
//!
//! Invariants:
//! - Nothing is put or deleted there.
//! - A part comes as the first of the source's stores has it. If that is damaged the pack is asked for as a whole, which the source takes from
//!   the first store that has it intact.

use std::{borrow::Cow, ops::Range, sync::Arc};

use bytes::Bytes;
use futures::{
    FutureExt, StreamExt,
    future::{self, BoxFuture},
    stream::{self, BoxStream},
};
use murphy_fs::{BlockStore, BlockStoreError, PackName, Refusal, StoredPack, WriterId};

use crate::dial::{PackFetchError, RemotePacks};

/// The source's stores, by one of the ways in which they can be asked.
#[derive(Debug)]
pub struct SourceStore {
    source: RemotePacks,
    way: Way,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// What is wanted, unverified.
    Parts,
    /// The whole pack, verified there, for whatever is wanted of it.
    Whole,
}

impl SourceStore {
    /// The ways to the packs of `source`, the cheap one first. Whoever verifies what it reads asks one after the other.
    pub fn ways(source: &RemotePacks) -> [Arc<dyn BlockStore>; 2] {
        [Way::Parts, Way::Whole].map(|way| {
            let store: Arc<dyn BlockStore> = Arc::new(SourceStore { source: source.clone(), way });
            store
        })
    }

    async fn read(&self, name: PackName, range: Range<u64>) -> Result<Bytes, BlockStoreError> {
        self.source.read(name, range).await.map_err(|error| {
            let object = self.object(name);
            match error {
                PackFetchError::Missing(_) => BlockStoreError::NotFound { object },
                error => BlockStoreError::Unavailable { object, retryable: true, source: Arc::new(error) },
            }
        })
    }

    async fn cut(&self, name: PackName, range: Range<u64>) -> Result<Bytes, BlockStoreError> {
        let whole = self.read(name, WHOLE).await?;
        let found = whole.len() as u64;
        if range.end > found || range.start > range.end {
            return Err(BlockStoreError::Damaged { object: self.object(name), expected: range.end, found });
        }
        // A part that is kept must not keep the whole.
        Ok(Bytes::copy_from_slice(&whole[range.start as usize..range.end as usize]))
    }

    fn object(&self, name: PackName) -> String {
        format!("pack {name} in {}", self.label())
    }

    fn refuse(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        let refusal = Refusal::Unsupported("a mirror changes nothing at its source".to_owned());
        future::ready(Err(BlockStoreError::Refused { object: self.object(name), refusal })).boxed()
    }
}

impl BlockStore for SourceStore {
    fn label(&self) -> Cow<'_, str> {
        match self.way {
            Way::Parts => "the source's store".into(),
            Way::Whole => "any store of the source".into(),
        }
    }

    fn put(&self, name: PackName, _: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.refuse(name)
    }

    fn mend(&self, name: PackName, _: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.refuse(name)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        match self.way {
            Way::Parts => self.read(name, range).boxed(),
            Way::Whole => self.cut(name, range).boxed(),
        }
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.read(name, WHOLE).boxed()
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        async move { self.read(name, WHOLE).await.map(|bytes| bytes.len() as u64) }.boxed()
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.refuse(name)
    }

    /// Empty: the source is not asked what it has, and a listing proves nothing.
    fn list(&self, _: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        stream::empty().boxed()
    }
}

/// Asks for all of a pack.
const WHOLE: Range<u64> = 0..0;
