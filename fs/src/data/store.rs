//! Block stores: where packs live. The trait, and its implementation over any object store.
//!
//! Invariants:
//! - A put that returned is durable, and the object under that name has exactly those bytes.
//! - A name never changes its content: the same bytes again are accepted, other bytes are refused, loudly. Only what is damaged is replaced,
//!   by the pack that belongs there.
//! - `AlreadyExists`, time-outs and broken connections prove nothing: they are settled by reading back.
//! - No answer larger than a pack is read into memory, and no request waits longer than [`REQUEST_TIMEOUT`].

use std::{borrow::Cow, fmt, fs::File, io, ops::Range, os::unix::fs::FileExt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{
    StreamExt,
    future::{self, BoxFuture},
    stream::BoxStream,
};
use object_store::{
    Error as ObjectError, GetOptions, GetRange, GetResult, GetResultPayload, ObjectStore, ObjectStoreExt,
    PutMode, PutOptions, PutPayload, PutResult,
    client::{HttpError, HttpErrorKind},
    memory::InMemory,
    path::Path,
};
use tokio::time::error::Elapsed;

use super::{
    buffers::Buffers,
    location::{LayeredStore, OpenStoreError, OpenedStore, StoreLayer, StoreUrl},
    name::{PACKS_FOLDER, PackName, WriterId},
    pack::MAX_PACK_STORED,
};

/// Where packs live.
///
/// Only put-if-absent and a strongly consistent get are required of a store; listings are hints. Every method may be
/// dropped at any time: a put that was dropped has happened or has not, and may be repeated. Who gives bytes counts them until
/// nobody keeps them: a store that keeps what it was given in memory for good keeps a copy.
pub trait BlockStore: Send + Sync + fmt::Debug {
    /// What the store is called in messages: its URL, or those of all of which any may answer; never with a secret.
    fn label(&self) -> Cow<'_, str>;

    /// The stores behind this one, in the order in which they are asked, each of which answers itself; none if this one does. Whoever verifies
    /// what it reads asks each of them, so that damage in one does not hide what another has intact.
    fn stores(&self) -> Vec<Arc<dyn BlockStore>> {
        Vec::new()
    }

    /// Stores a pack. When it returns, the pack is durable under its name; repeating it is harmless.
    ///
    /// [`BlockStoreError::Refused`] with [`Refusal::OtherContent`] means that the name was used twice. Nothing was
    /// overwritten, and nothing may be overwritten.
    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>>;

    /// Puts an intact pack in the place of an object that is none, in one step: there is always one of them. Only for whoever has looked at
    /// both: see [`put_intact`](super::put_intact).
    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>>;

    /// The bytes `range` of a pack's object: all of them, or an error. The range has at least one byte. The answer keeps no more memory
    /// than it shows, but for what the store itself keeps.
    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>>;

    /// A pack's object, from the first store that gives one. What it holds is not verified, and another store behind this one may have it
    /// intact: see [`read_intact`](super::read_intact).
    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>>;

    /// The length of a pack's object, which is durable: whoever finds it there need not put it again.
    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>>;

    /// The same of the object that a put has left, or has not: of the store to which packs are put, whatever others behind this one have.
    fn size_where_put(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        self.size(name)
    }

    /// Deletes a pack. A pack that is not there counts as deleted.
    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>>;

    /// The packs in the store, in no order; with `writer` only those of one process. Objects that are not named like
    /// packs are passed over. A listing may lag behind: that a pack is missing in it proves nothing.
    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>>;
}

/// A pack in a listing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoredPack {
    /// What it is called.
    pub name: PackName,
    /// The length of its object.
    pub stored_len: u64,
}

/// Packs in an object store, under `<prefix>/packs`.
#[derive(Clone, Debug)]
pub struct ObjectBlockStore {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    label: String,
    settle: Settle,
    /// No request waits longer.
    patience: Duration,
    /// For what is read from files.
    buffers: Arc<Buffers>,
}

/// What proves that an object which could be read back is durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Settle {
    /// A service that shows an object keeps it.
    Read,
    /// A file system shows what is in the page cache, also after a sync that failed or never came. Writing the same bytes
    /// once more, with a sync that succeeds, is the proof.
    Rewrite,
}

impl ObjectBlockStore {
    /// The packs in the store at `url`. Makes no request.
    pub fn open(url: &StoreUrl) -> Result<ObjectBlockStore, OpenStoreError> {
        let OpenedStore { store, prefix, .. } = url.open()?;
        let settle = if url.is_file() { Settle::Rewrite } else { Settle::Read };
        Ok(ObjectBlockStore { settle, ..ObjectBlockStore::new(store, prefix, url.to_string()) })
    }

    /// The packs below `prefix` of `store`, which is not a file system: see [`ObjectBlockStore::open`]. `label` stands in
    /// messages.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: Path, label: String) -> ObjectBlockStore {
        let (settle, patience, buffers) = (Settle::Read, REQUEST_TIMEOUT, Arc::default());
        ObjectBlockStore { store, prefix, label, settle, patience, buffers }
    }

    /// The same for a store in a directory: an object that can be read there may still be lost.
    pub fn in_directory(store: Arc<dyn ObjectStore>, prefix: Path, label: String) -> ObjectBlockStore {
        ObjectBlockStore { settle: Settle::Rewrite, ..ObjectBlockStore::new(store, prefix, label) }
    }

    /// A store that dies with the process.
    pub fn in_memory() -> ObjectBlockStore {
        let store = LayeredStore(Copies(Arc::new(InMemory::new())));
        ObjectBlockStore::new(Arc::new(store), Path::default(), "memory".to_owned())
    }

    fn path(&self, name: PackName) -> Path {
        self.prefix.parts().chain(Path::from(name.object_path()).parts()).collect()
    }

    fn object(&self, name: PackName) -> String {
        format!("pack {name} in {}", self.label)
    }

    async fn put_once(&self, name: PackName, bytes: Bytes) -> Result<(), BlockStoreError> {
        let path = self.path(name);
        let mut attempt = 1;
        loop {
            let options = PutOptions::from(PutMode::Create);
            let put = self.timed(name, self.store.put_opts(&path, bytes.clone().into(), options)).await;
            let Err(error) = put else { return Ok(()) };
            match error {
                // Ambiguous: our own first attempt may have arrived, or none, or the bytes of somebody else.
                BlockStoreError::Unavailable { .. } => {}
                BlockStoreError::Refused { refusal: Refusal::Exists, .. } => {}
                settled => return Err(settled),
            }
            match self.read_back(name, &bytes).await {
                Ok(found) if found == bytes => return self.settle(name, bytes).await,
                Ok(_) | Err(BlockStoreError::Damaged { .. }) => {
                    let object = self.object(name);
                    tracing::error!(object, "the name is taken by other bytes; nothing was overwritten");
                    return Err(BlockStoreError::Refused { object, refusal: Refusal::OtherContent });
                }
                Err(BlockStoreError::NotFound { .. }) if attempt < PUT_ATTEMPTS => {}
                Err(BlockStoreError::NotFound { .. }) => return Err(error.or_unavailable()),
                Err(unreadable) => return Err(unreadable),
            }
            tokio::time::sleep(PUT_PAUSE * attempt).await;
            attempt += 1;
        }
    }

    /// What lies under a name; read once more if it is not `bytes`, because a flipped bit may have come from the way.
    async fn read_back(&self, name: PackName, bytes: &Bytes) -> Result<Bytes, BlockStoreError> {
        match self.get(name).await {
            Ok(found) if found != *bytes => self.get(name).await,
            Err(BlockStoreError::Damaged { .. }) => self.get(name).await,
            answer => answer,
        }
    }

    /// Makes sure that the object, which has exactly `bytes`, is durable.
    async fn settle(&self, name: PackName, bytes: Bytes) -> Result<(), BlockStoreError> {
        match self.settle {
            Settle::Read => Ok(()),
            Settle::Rewrite => self.rewrite(name, bytes).await,
        }
    }

    async fn rewrite(&self, name: PackName, bytes: Bytes) -> Result<(), BlockStoreError> {
        let path = self.path(name);
        let rewriting = self.store.put_opts(&path, bytes.into(), PutMode::Overwrite.into());
        self.timed(name, rewriting).await.map(drop)
    }

    async fn read(&self, name: PackName, range: Option<Range<u64>>) -> Result<Bytes, BlockStoreError> {
        let options = GetOptions { range: range.clone().map(GetRange::Bounded), ..GetOptions::default() };
        let result = match self.timed(name, self.store.get_opts(&self.path(name), options)).await {
            Ok(result) => result,
            Err(error) => return Err(self.explain(name, range, error).await),
        };
        let found = result.range.end.saturating_sub(result.range.start);
        let expected = range.map_or(result.meta.size, |range| range.end - range.start);
        if found != expected || found > MAX_PACK_STORED as u64 {
            return Err(self.damaged(name, expected.min(MAX_PACK_STORED as u64), found));
        }
        let bytes = self.timed(name, self.body(result)).await?;
        if bytes.len() as u64 != expected {
            return Err(self.damaged(name, expected, bytes.len() as u64));
        }
        Ok(bytes)
    }

    /// The bytes of an answer, which are not too many.
    async fn body(&self, answer: GetResult) -> Result<Bytes, ObjectError> {
        match answer {
            GetResult { payload: GetResultPayload::File(file, _), range, .. } => {
                let buffers = Arc::clone(&self.buffers);
                let read = murphy_log::aside(move || read_file(&file, range, &buffers)).await;
                read.map_err(|source| ObjectError::Generic { store: "directory", source: Box::new(source) })
            }
            answer => answer.bytes().await,
        }
    }

    /// Stores answer a range beyond the end of an object with an error of any kind; the object's length tells it from a fault of
    /// the store. One that has not answered, or says that it is out of order, is not asked again: whoever waits has others to ask.
    async fn explain(
        &self,
        name: PackName,
        range: Option<Range<u64>>,
        error: BlockStoreError,
    ) -> BlockStoreError {
        match (&error, range) {
            (BlockStoreError::Unavailable { source, .. }, Some(range)) if !is_no_answer(&**source) => {
                match self.size(name).await {
                    Ok(size) if size < range.end => self.damaged(name, range.end, size),
                    Ok(_) | Err(_) => error,
                }
            }
            _ => error,
        }
    }

    fn damaged(&self, name: PackName, expected: u64, found: u64) -> BlockStoreError {
        BlockStoreError::Damaged { object: self.object(name), expected, found }
    }

    /// The answer, or that there is none: whoever waits for a store has something else to do.
    async fn timed<T>(
        &self,
        name: PackName,
        request: impl Future<Output = Result<T, ObjectError>>,
    ) -> Result<T, BlockStoreError> {
        match tokio::time::timeout(self.patience, request).await {
            Ok(answer) => {
                answer.map_err(|error| BlockStoreError::from_object_store(self.object(name), error))
            }
            Err(late) => Err(BlockStoreError::Unavailable {
                object: self.object(name),
                retryable: true,
                source: Arc::new(late),
            }),
        }
    }
}

/// Keeps copies of what it is given.
#[derive(Debug)]
struct Copies(Arc<InMemory>);

impl fmt::Display for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StoreLayer for Copies {
    fn below(&self) -> Arc<dyn ObjectStore> {
        Arc::<InMemory>::clone(&self.0)
    }

    fn put<'a>(
        &'a self,
        at: &'a Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'a, Result<PutResult, ObjectError>> {
        let copy: PutPayload = bytes.iter().map(|part| Bytes::copy_from_slice(part)).collect();
        self.0.put_opts(at, copy, options)
    }
}

/// Whether the error is that no answer came, or none that has to do with what was asked (a status of 500 and above), after all repetitions.
fn is_no_answer(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| {
        cause.is::<Elapsed>() || cause.is::<HttpError>() || cause.to_string().starts_with(SERVER_ERROR)
    })
}

/// As many bytes of the range, which is no longer than a pack, as the file has.
fn read_file(file: &File, range: Range<u64>, buffers: &Arc<Buffers>) -> io::Result<Bytes> {
    let mut buffer = buffers.take((range.end - range.start) as usize);
    let mut filled = 0;
    while let rest @ [_, ..] = &mut buffer.bytes_mut()[filled..] {
        match file.read_at(rest, range.start + filled as u64) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(buffer.freeze(filled))
}

impl BlockStore for ObjectBlockStore {
    fn label(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.label)
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        Box::pin(self.put_once(name, bytes))
    }

    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        Box::pin(self.rewrite(name, bytes))
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(self.read(name, Some(range)))
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        Box::pin(self.read(name, None))
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        Box::pin(async move {
            let path = self.path(name);
            self.timed(name, self.store.head(&path)).await.map(|meta| meta.size)
        })
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        Box::pin(async move {
            let path = self.path(name);
            match self.timed(name, self.store.delete(&path)).await {
                Ok(()) | Err(BlockStoreError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        let folder: Path = self.prefix.clone().join(PACKS_FOLDER);
        let listed = self.store.list(Some(&folder)).filter_map(move |item| async move {
            let meta = match item {
                Ok(meta) => meta,
                Err(error) => {
                    let object = format!("the list of packs in {}", self.label);
                    return Some(Err(BlockStoreError::from_object_store(object, error)));
                }
            };
            let below = meta.location.prefix_match(&self.prefix)?;
            let path: Vec<_> = below.map(|part| part.as_ref().to_owned()).collect();
            let name = PackName::from_object_path(&path.join("/"))?;
            let wanted = writer.is_none_or(|writer| writer == name.writer);
            wanted.then_some(Ok(StoredPack { name, stored_len: meta.size }))
        });
        // After an error the rest of the listing is worth nothing.
        let until_error = listed.scan(false, |failed, item| {
            let end = std::mem::replace(failed, item.is_err());
            future::ready((!end).then_some(item))
        });
        Box::pin(until_error)
    }
}

/// Why a store did not do what it was asked; the text names the object.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BlockStoreError {
    /// The store says that the object is not there.
    #[error("{object} does not exist")]
    NotFound {
        /// What was asked for, and of which store.
        object: String,
    },
    /// The object, or the answer, has another length than it must have.
    #[error("{object} is damaged: {found} bytes where {expected} were expected")]
    Damaged {
        /// What was asked for, and of which store.
        object: String,
        /// How many bytes there should be.
        expected: u64,
        /// How many there are.
        found: u64,
    },
    /// The store could not be asked. Whether a put has happened is then unknown; it may be repeated.
    #[error("{object}: the store does not answer: {source}")]
    Unavailable {
        /// What was asked for, and of which store.
        object: String,
        /// The same request may succeed later.
        retryable: bool,
        /// What happened, after the store's own retries.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The store will not do it, however often it is asked.
    #[error("{object}: {refusal}")]
    Refused {
        /// What was asked for, and of which store.
        object: String,
        /// Why.
        refusal: Refusal,
    },
}

impl BlockStoreError {
    /// The meaning of an error of an object store about `object`.
    pub fn from_object_store(object: String, error: ObjectError) -> BlockStoreError {
        let refused = |refusal| BlockStoreError::Refused { object: object.clone(), refusal };
        match error {
            ObjectError::NotFound { .. } => BlockStoreError::NotFound { object },
            ObjectError::AlreadyExists { .. } | ObjectError::Precondition { .. } => refused(Refusal::Exists),
            ObjectError::PermissionDenied { source, .. } => refused(Refusal::Denied(source.to_string())),
            ObjectError::Unauthenticated { source, .. } => {
                refused(Refusal::Unauthenticated(source.to_string()))
            }
            error @ (ObjectError::NotSupported { .. }
            | ObjectError::NotImplemented { .. }
            | ObjectError::InvalidPath { .. }
            | ObjectError::UnknownConfigurationKey { .. }) => {
                refused(Refusal::Unsupported(error.to_string()))
            }
            error => BlockStoreError::Unavailable { object, retryable: true, source: Arc::new(error) },
        }
    }

    /// Whether the store was given up because it took too long, and not because it refused or could not be reached.
    pub(crate) fn is_late(&self) -> bool {
        let BlockStoreError::Unavailable { source, .. } = self else { return false };
        let first: &(dyn std::error::Error + 'static) = &**source;
        let mut causes = std::iter::successors(Some(first), |error| error.source());
        causes.any(|cause| {
            let http = cause.downcast_ref::<HttpError>().map(HttpError::kind);
            cause.is::<Elapsed>() || matches!(http, Some(HttpErrorKind::Timeout))
        })
    }

    /// `Exists` of an object that cannot be read is no answer at all.
    fn or_unavailable(self) -> BlockStoreError {
        match self {
            BlockStoreError::Refused { object, refusal: Refusal::Exists } => {
                let source = Arc::new(Refusal::Exists);
                BlockStoreError::Unavailable { object, retryable: true, source }
            }
            error => error,
        }
    }
}

/// Why a store will not do what it was asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// The name is taken, by unknown content.
    #[error("an object of this name exists already")]
    Exists,
    /// The name is taken by other bytes. Two writers used one name, or the store mixes objects up.
    #[error("an object of this name exists already and has other content")]
    OtherContent,
    /// The credentials do not allow it.
    #[error("the credentials do not allow it: {0}")]
    Denied(String),
    /// There are no credentials, or the store does not know them.
    #[error("the store does not accept the credentials: {0}")]
    Unauthenticated(String),
    /// The store cannot do it.
    #[error("the store cannot do it: {0}")]
    Unsupported(String),
}

/// No request waits longer; the clients of clouds have made their own retries by then.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// What the clients of clouds say of a server that is out of order, whose type they do not show.
const SERVER_ERROR: &str = "Server returned non-2xx status code: 5";

/// How often a put is tried whose object turns out not to be there.
const PUT_ATTEMPTS: u32 = 3;

/// The pause after the first such attempt; it grows with each.
const PUT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(super) use tests::overwriting;
