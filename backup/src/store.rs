//! The archive's view of an object store: put-if-absent that knows what happened, and gets that know what is missing.
//!
//! Invariants:
//! - [`Creation::Created`] and [`Creation::SameContent`] mean: the object is durable under its name with exactly these bytes.
//! - `AlreadyExists`, time-outs and broken connections prove nothing: they are settled by reading back; in a directory, where what can be read
//!   need not be durable, by writing the same bytes once more.
//! - No answer larger than the caller's limit is read into memory, and no request waits longer than [`REQUEST_TIMEOUT`].
//! - A listing is a hint: that an object is missing in it proves nothing.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use murphy_fs::ObjectBlockStore;
use object_store::{
    Error as ObjectError, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    path::Path,
};

/// The objects below one prefix of a store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ArchiveStore {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    label: Arc<str>,
    kind: StoreKind,
    /// How many requests have been answered: what [`ArchiveStore::while_answering`] goes by.
    answered: Arc<AtomicU64>,
}

/// What an object that can be read is worth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum StoreKind {
    /// A service that shows an object keeps it.
    Service,
    /// A file system shows names whose folder could not be synced, or was not.
    Directory,
}

/// An object in a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// Its name below the prefix.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// What a put-if-absent came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Creation {
    /// The object was not there and is now.
    Created,
    /// The object was there with the same bytes: an earlier attempt, perhaps this one's own.
    SameContent,
    /// The name is taken by these bytes; nothing was changed.
    Other(Bytes),
}

impl ArchiveStore {
    /// The objects below `prefix` of `store`, which is not a directory; `label` is the URL that messages name, without any secret.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: Path, label: &str) -> ArchiveStore {
        ArchiveStore {
            store,
            prefix,
            label: label.into(),
            kind: StoreKind::Service,
            answered: Arc::default(),
        }
    }

    /// The same for a store in a directory, which syncs the folder of an object when it is asked for its length: what can be read there may
    /// still be lost.
    pub fn in_directory(store: Arc<dyn ObjectStore>, prefix: Path, label: &str) -> ArchiveStore {
        ArchiveStore { kind: StoreKind::Directory, ..ArchiveStore::new(store, prefix, label) }
    }

    /// Waits for `work` at this store, or a clone of it, however long it takes while requests are answered: an archive with a long history takes
    /// its time. `None` once none has been for `silence`.
    pub async fn while_answering<T>(&self, silence: Duration, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            let before = self.answered.load(Ordering::Relaxed);
            match tokio::time::timeout(silence, &mut work).await {
                Ok(done) => return Some(done),
                Err(_) if self.answered.load(Ordering::Relaxed) == before => return None,
                Err(_) => {}
            }
        }
    }

    /// What messages call the store.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The packs below the prefix.
    pub fn packs(&self) -> ObjectBlockStore {
        let (store, prefix, label) = (Arc::clone(&self.store), self.prefix.clone(), self.label.to_string());
        match self.kind {
            StoreKind::Service => ObjectBlockStore::new(store, prefix, label),
            StoreKind::Directory => ObjectBlockStore::in_directory(store, prefix, label),
        }
    }

    /// Creates `name` with `bytes` unless it exists, and finds out which of the two happened.
    ///
    /// [`StoreError::Unavailable`] means that it is not known: the object may appear at any time. Repeating is harmless.
    pub async fn create(&self, name: &str, bytes: Bytes) -> Result<Creation, StoreError> {
        let path = self.path(name);
        let mut attempt = 1;
        loop {
            let options = PutOptions::from(PutMode::Create);
            let put = self.timed(name, self.store.put_opts(&path, bytes.clone().into(), options)).await;
            let error = match put {
                Ok(_) => return Ok(Creation::Created),
                Err(error) if error.is_settled() => return Err(error),
                Err(error) => error,
            };
            // Ambiguous: an earlier attempt of ours, nothing at all, or the bytes of somebody else.
            match self.get(name, bytes.len().max(COMPARE_BYTES_MAX) as u64).await {
                Ok(found) if found == bytes => {
                    self.settle(name, bytes).await?;
                    return Ok(Creation::SameContent);
                }
                Ok(found) => {
                    self.make_durable(name).await?;
                    return Ok(Creation::Other(found));
                }
                Err(StoreError::NotFound { .. }) if attempt < CREATE_ATTEMPTS => {}
                Err(StoreError::NotFound { .. }) => return Err(error.unsettled()),
                Err(unreadable) => return Err(unreadable),
            }
            tokio::time::sleep(CREATE_PAUSE * attempt).await;
            attempt += 1;
        }
    }

    /// Makes sure that the object, which has exactly `bytes`, is durable. No service replaces anything.
    async fn settle(&self, name: &str, bytes: Bytes) -> Result<(), StoreError> {
        match self.kind {
            StoreKind::Service => Ok(()),
            StoreKind::Directory => self.replace(name, bytes).await,
        }
    }

    /// Puts `bytes` in the place of whatever has the name, in one step.
    pub(crate) async fn replace(&self, name: &str, bytes: Bytes) -> Result<(), StoreError> {
        let path = self.path(name);
        self.timed(name, self.store.put_opts(&path, bytes.into(), PutMode::Overwrite.into())).await.map(drop)
    }

    /// Makes an object that could be read durable: before somebody counts on what another process has put.
    pub async fn make_durable(&self, name: &str) -> Result<(), StoreError> {
        if self.kind == StoreKind::Directory {
            self.size(name).await?;
        }
        Ok(())
    }

    /// The whole object; refused if it is longer than `limit` bytes.
    pub async fn get(&self, name: &str, limit: u64) -> Result<Bytes, StoreError> {
        self.read(name, None, limit).await
    }

    /// The bytes `range` of an object, fewer where it ends before.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let limit = range.end.saturating_sub(range.start);
        match self.read(name, Some(range.clone()), limit).await {
            // Stores answer a range beyond the end with an error of any kind; the length tells it from one that does not answer.
            Err(error @ StoreError::Unavailable { .. }) => match self.size(name).await {
                Ok(Some(size)) if size <= range.start => Ok(Bytes::new()),
                _ => Err(error),
            },
            answer => answer,
        }
    }

    /// The length of an object; `None` if it is not there.
    pub async fn size(&self, name: &str) -> Result<Option<u64>, StoreError> {
        match self.timed(name, self.store.head(&self.path(name))).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The objects in `folder` (everything if it is empty), in no order. After an error nothing follows.
    pub fn list(&self, folder: &str) -> BoxStream<'_, Result<Listed, StoreError>> {
        self.listed(folder, self.store.list(Some(&self.path(folder))))
    }

    /// The objects in `folder` whose names come after `name`, in no order. After an error nothing follows.
    pub fn list_behind(&self, folder: &str, name: &str) -> BoxStream<'_, Result<Listed, StoreError>> {
        self.listed(folder, self.store.list_with_offset(Some(&self.path(folder)), &self.path(name)))
    }

    fn listed<'a>(
        &'a self,
        folder: &str,
        items: BoxStream<'static, Result<ObjectMeta, ObjectError>>,
    ) -> BoxStream<'a, Result<Listed, StoreError>> {
        let object = self.object(if folder.is_empty() { "the list of objects" } else { folder });
        let listed = items.map(move |item| match item {
            Ok(meta) => Ok(meta.location.prefix_match(&self.prefix).map(|below| {
                let parts: Vec<_> = below.map(|part| part.as_ref().to_owned()).collect();
                Listed { name: parts.join("/"), bytes: meta.size }
            })),
            Err(error) => Err(StoreError::from_object_store(object.clone(), error)),
        });
        let listed = listed.inspect_ok(|_| self.count_answer());
        listed.try_filter_map(async |item| Ok(item)).boxed()
    }

    async fn read(&self, name: &str, range: Option<Range<u64>>, limit: u64) -> Result<Bytes, StoreError> {
        let options = GetOptions { range: range.clone().map(GetRange::Bounded), ..GetOptions::default() };
        let path = self.path(name);
        let reading = async {
            let result = self.store.get_opts(&path, options).await?;
            let length = result.range.end.saturating_sub(result.range.start);
            if length > limit {
                return Ok(Err(length));
            }
            let bytes = result.bytes().await?;
            Ok(if bytes.len() as u64 == length { Ok(bytes) } else { Err(bytes.len() as u64) })
        };
        match self.timed(name, reading).await? {
            Ok(bytes) => Ok(bytes),
            Err(found) => Err(StoreError::Length { object: self.object(name), found, limit }),
        }
    }

    fn count_answer(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    async fn timed<T>(
        &self,
        name: &str,
        request: impl Future<Output = Result<T, ObjectError>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(REQUEST_TIMEOUT, request).await {
            Ok(Ok(answer)) => {
                self.count_answer();
                Ok(answer)
            }
            Ok(Err(error)) => {
                let error = StoreError::from_object_store(self.object(name), error);
                if matches!(error, StoreError::NotFound { .. }) {
                    self.count_answer();
                }
                Err(error)
            }
            Err(_) => Err(StoreError::Unavailable {
                object: self.object(name),
                reason: format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()),
            }),
        }
    }

    fn path(&self, name: &str) -> Path {
        self.prefix.parts().chain(Path::from(name).parts()).collect()
    }

    /// What messages call an object.
    pub(crate) fn object(&self, name: &str) -> String {
        format!("{name} in {}", self.label)
    }
}

/// Why a store did not do what it was asked; the text names the object.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// The store says that the object is not there.
    #[error("{object} does not exist")]
    NotFound {
        /// The object and its store.
        object: String,
    },
    /// The object is too long, or the answer was cut.
    #[error("{object} has an impossible length: {found} bytes, at most {limit} are expected")]
    Length {
        /// The object and its store.
        object: String,
        /// How many bytes there are.
        found: u64,
        /// How many there may be.
        limit: u64,
    },
    /// The store could not be asked, or its answer settles nothing. The same request may succeed later.
    #[error("{object}: the store does not answer: {reason}")]
    Unavailable {
        /// The object and its store.
        object: String,
        /// What happened, after the store's own retries.
        reason: String,
    },
    /// The name is taken; what holds it is not known yet.
    #[error("{object} exists already")]
    Exists {
        /// The object and its store.
        object: String,
    },
    /// The store will not do it, however often it is asked.
    #[error("{object} is refused: {reason}")]
    Refused {
        /// The object and its store.
        object: String,
        /// What the store says.
        reason: String,
    },
}

impl StoreError {
    fn from_object_store(object: String, error: ObjectError) -> StoreError {
        match error {
            ObjectError::NotFound { .. } => StoreError::NotFound { object },
            ObjectError::AlreadyExists { .. } | ObjectError::Precondition { .. } => {
                StoreError::Exists { object }
            }
            error @ (ObjectError::PermissionDenied { .. }
            | ObjectError::Unauthenticated { .. }
            | ObjectError::NotSupported { .. }
            | ObjectError::NotImplemented { .. }
            | ObjectError::InvalidPath { .. }
            | ObjectError::UnknownConfigurationKey { .. }) => {
                StoreError::Refused { object, reason: error.to_string() }
            }
            error => StoreError::Unavailable { object, reason: error.to_string() },
        }
    }

    /// Whether a put that ended so has certainly not happened.
    fn is_settled(&self) -> bool {
        matches!(self, StoreError::Refused { .. } | StoreError::NotFound { .. } | StoreError::Length { .. })
    }

    /// `Exists` of an object that cannot be read is no answer at all.
    fn unsettled(self) -> StoreError {
        match self {
            StoreError::Exists { object } => {
                StoreError::Unavailable { object, reason: "it exists and cannot be read".to_owned() }
            }
            error => error,
        }
    }
}

/// No request waits longer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a put is tried whose object turns out not to be there.
const CREATE_ATTEMPTS: u32 = 3;
/// The pause after the first such attempt; it grows with each.
const CREATE_PAUSE: Duration = Duration::from_millis(50);
/// Whatever is found under a name is read up to this length, in bytes, to see what it is.
const COMPARE_BYTES_MAX: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fault, FaultyStore};

    /// The fear: an archive that is years old takes longer to look at than one is given that does not answer, and is called gone.
    #[tokio::test]
    async fn what_takes_long_is_waited_for_as_long_as_requests_are_answered() {
        let store = FaultyStore::new().archive_store();
        let silence = Duration::from_millis(400);
        let mut requests = tokio::time::interval(silence / 40);
        let busy = async {
            for _ in 0..120 {
                assert_eq!(store.size("x").await, Ok(None));
                requests.tick().await;
            }
        };
        assert_eq!(store.while_answering(silence, busy).await, Some(()));
        assert_eq!(store.while_answering(silence, std::future::pending::<()>()).await, None);
    }

    /// The fear: in a directory a slot got its name and the folder was not synced, it is read back and counts, and a power cut takes it with what
    /// was acknowledged.
    #[tokio::test]
    async fn what_is_read_back_in_a_directory_is_written_once_more_before_it_counts() {
        let bytes = Bytes::from_static(b"a slot");
        for fault in [Fault::PutAnswersError, Fault::PutConflict] {
            let faulty = FaultyStore::new();
            let store = faulty.directory_store();
            if fault == Fault::PutConflict {
                faulty.overwrite("log/1/2.seg", bytes.clone()).await;
            }
            faulty.fail("2.seg", fault, 1);
            assert_eq!(store.create("log/1/2.seg", bytes.clone()).await, Ok(Creation::SameContent));
            let verbs: Vec<String> = faulty.log().iter().map(|line| line[..3].to_owned()).collect();
            assert_eq!(verbs, ["put", "get", "put"]);
            faulty.fail("2.seg", Fault::PutConflict, 1);
            faulty.fail("2.seg", Fault::PutFails, 1);
            let unknown = store.create("log/1/2.seg", bytes.clone()).await;
            assert!(matches!(unknown, Err(StoreError::Unavailable { .. })), "{unknown:?}");
        }
    }

    /// No service is asked to replace anything: what it shows it keeps.
    #[tokio::test]
    async fn what_a_service_shows_is_not_written_again() {
        let faulty = FaultyStore::new();
        faulty.fail("2.seg", Fault::PutAnswersError, 1);
        let created = faulty.archive_store().create("log/1/2.seg", Bytes::from_static(b"a slot")).await;
        assert_eq!((created, faulty.log().len()), (Ok(Creation::SameContent), 2));
    }
}
