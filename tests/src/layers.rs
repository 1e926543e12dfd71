//! Layers over block stores and logs: a layer does some calls in its own way and passes on the others.
//!
//! Invariants:
//! - What a layer does not say goes to what is below, unchanged.

use std::{
    borrow::Cow,
    fmt,
    ops::{Deref, Range},
};

use bytes::Bytes;
use futures::{future::BoxFuture, stream::BoxStream};
use murphy_fs::{BlockStore, BlockStoreError, PackName, StoredPack, WriterId};
use murphy_log::{
    AppendError, ClaimError, DurableWatch, Epoch, Frame, FrameReader, Log, Lsn, Position, ReadError, State,
    TrimError,
};

/// Something with a layer.
#[derive(Debug)]
pub struct Layered<L>(pub L);

impl<L> Deref for Layered<L> {
    type Target = L;

    fn deref(&self) -> &L {
        &self.0
    }
}

/// What a layer over a block store may do in its own way.
pub trait BlockLayer: fmt::Debug + Send + Sync + 'static {
    /// The store that everything else is passed on to.
    fn below(&self) -> &dyn BlockStore;

    /// Stores a pack.
    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below().put(name, bytes)
    }

    /// Reads a range of a pack.
    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.below().get_range(name, range)
    }

    /// Reads a pack.
    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.below().get(name)
    }
}

impl<L: BlockLayer> BlockStore for Layered<L> {
    fn label(&self) -> Cow<'_, str> {
        self.0.below().label()
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.0.put(name, bytes)
    }

    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.0.below().mend(name, bytes)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.0.get_range(name, range)
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.0.get(name)
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        self.0.below().size(name)
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.0.below().delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.0.below().list(writer)
    }
}

/// What a layer over a log may do in its own way.
pub trait LogLayer: fmt::Debug + Send + Sync + 'static {
    /// The log that everything else is passed on to.
    fn below(&self) -> &dyn Log;

    /// Begins an epoch.
    fn claim(&self, epoch: Epoch) -> Result<State, ClaimError> {
        self.below().claim(epoch)
    }

    /// Queues a frame.
    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError> {
        self.below().append(previous, frame)
    }

    /// Reads durable frames.
    fn read(&self, from: Lsn) -> Result<FrameReader, ReadError> {
        self.below().read(from)
    }

    /// The oldest entry.
    fn first(&self) -> Lsn {
        self.below().first()
    }
}

impl<L: LogLayer> Log for Layered<L> {
    fn claim(&self, epoch: Epoch) -> Result<State, ClaimError> {
        self.0.claim(epoch)
    }

    fn append(&self, previous: &Position, frame: Frame) -> Result<(), AppendError> {
        self.0.append(previous, frame)
    }

    fn durable(&self) -> DurableWatch {
        self.0.below().durable()
    }

    fn read(&self, from: Lsn) -> Result<FrameReader, ReadError> {
        self.0.read(from)
    }

    fn tail(&self) -> State {
        self.0.below().tail()
    }

    fn first(&self) -> Lsn {
        self.0.first()
    }

    fn trim(&self, below: Lsn) -> Result<Lsn, TrimError> {
        self.0.below().trim(below)
    }

    fn max_frame(&self) -> usize {
        self.0.below().max_frame()
    }
}
