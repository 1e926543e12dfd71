//! An object store that does what stores were seen to do: lie about puts, lag in lists, lose objects, answer wrong bytes.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};
use murphy_fs::{LayeredStore, ObjectBlockStore, StoreLayer};
use object_store::{
    Error as ObjectError, GetOptions, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutOptions, PutPayload, PutResult, Result as ObjectResult, memory::InMemory, path::Path,
};
use parking_lot::Mutex;

use crate::store::ArchiveStore;

/// What happens to requests about objects whose path contains a given text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// The put happens, the answer is an error.
    PutAnswersError,
    /// The put does not happen, the answer is an error.
    PutFails,
    /// The put does not happen, the answer is `AlreadyExists`.
    PutConflict,
    /// The answer is an error, and the put happens when [`FaultyStore::land`] is called.
    PutLands,
    /// A put overwrites, whatever its mode.
    PutOverwrites,
    /// A get answers 200 with a byte changed.
    WrongBytes,
    /// A get answers 200 without any bytes.
    NoBytes,
    /// A get finds nothing.
    Lost,
    /// A get answers an error.
    GetFails,
    /// A list does not have it.
    ListLags,
}

/// A store in memory with faults.
#[derive(Clone)]
pub(crate) struct FaultyStore {
    inner: Arc<InMemory>,
    state: Arc<Mutex<State>>,
}

/// The life of a process that uses stores: after so many requests it is dead, and nothing of it reaches any store.
#[derive(Clone)]
pub(crate) struct Life {
    left: Arc<std::sync::atomic::AtomicIsize>,
    /// Whether its last put still lands.
    last_put_lands: bool,
}

impl Life {
    pub(crate) fn of(requests: isize, last_put_lands: bool) -> Life {
        Life { left: Arc::new(requests.into()), last_put_lands }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.left.load(std::sync::atomic::Ordering::SeqCst) <= 0
    }

    /// Spends one request; says how many were left before it.
    fn spend(&self) -> isize {
        self.left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst)
    }
}

/// An object that its account loses for good, or that somebody else puts, right before a request: the one that comes after so many to any
/// store that knows of it.
#[derive(Clone)]
pub(crate) struct Loss {
    left: Arc<std::sync::atomic::AtomicIsize>,
    account: Arc<InMemory>,
    path: Path,
    /// What somebody else puts.
    arrives: Option<Bytes>,
}

impl Loss {
    pub(crate) fn before_request(requests: isize, account: &FaultyStore, name: &str) -> Loss {
        let path = Path::from(format!("bucket/prefix/{name}"));
        Loss { left: Arc::new(requests.into()), account: Arc::clone(&account.inner), path, arrives: None }
    }

    /// Of nothing: the object comes instead.
    pub(crate) fn arrival(requests: isize, account: &FaultyStore, name: &str, bytes: Bytes) -> Loss {
        Loss { arrives: Some(bytes), ..Loss::before_request(requests, account, name) }
    }

    pub(crate) fn has_come(&self) -> bool {
        self.left.load(std::sync::atomic::Ordering::SeqCst) <= 0
    }

    async fn request(&self) -> ObjectResult<()> {
        if self.left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) != 1 {
            return Ok(());
        }
        if let Some(bytes) = &self.arrives {
            return self.account.put(&self.path, bytes.clone().into()).await.map(drop);
        }
        match self.account.delete(&self.path).await {
            Ok(()) | Err(ObjectError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[derive(Default)]
struct State {
    life: Option<Life>,
    loss: Option<Loss>,
    faults: Vec<(String, Fault, usize)>,
    late: Vec<(Path, Bytes)>,
    log: Vec<String>,
}

impl FaultyStore {
    pub(crate) fn new() -> FaultyStore {
        FaultyStore { inner: Arc::new(InMemory::new()), state: Arc::default() }
    }

    /// The same objects as another process sees them, with faults of its own.
    pub(crate) fn seen_by_another(&self) -> FaultyStore {
        FaultyStore { inner: Arc::clone(&self.inner), state: Arc::default() }
    }

    pub(crate) fn archive_store(&self) -> ArchiveStore {
        ArchiveStore::new(Arc::new(LayeredStore(self.clone())), Path::from("bucket/prefix"), "test://store")
    }

    /// The same as if it were a directory.
    pub(crate) fn directory_store(&self) -> ArchiveStore {
        let prefix = Path::from("bucket/prefix");
        ArchiveStore::in_directory(Arc::new(LayeredStore(self.clone())), prefix, "test://directory")
    }

    /// The same store for packs.
    pub(crate) fn block_store(&self) -> ObjectBlockStore {
        ObjectBlockStore::new(
            Arc::new(LayeredStore(self.clone())),
            Path::default(),
            "test://blocks".to_owned(),
        )
    }

    /// The next `times` requests of its kind about a path that contains `part` have this fault.
    pub(crate) fn fail(&self, part: &str, fault: Fault, times: usize) {
        self.state.lock().faults.push((part.to_owned(), fault, times));
    }

    pub(crate) fn heal(&self) {
        self.state.lock().faults.clear();
    }

    /// Requests come from a process with this life; `None`: from one that does not die.
    pub(crate) fn live(&self, life: Option<Life>) {
        self.state.lock().life = life;
    }

    /// Requests from now on count for this loss; `None`: for none.
    pub(crate) fn lose(&self, loss: Option<Loss>) {
        self.state.lock().loss = loss;
    }

    async fn count_for_loss(&self) -> ObjectResult<()> {
        let loss = self.state.lock().loss.clone();
        match loss {
            Some(loss) => loss.request().await,
            None => Ok(()),
        }
    }

    /// Whether a request of the process reaches the store, and whether its answer reaches the process.
    fn reaches(&self, is_put: bool) -> (bool, bool) {
        let life = self.state.lock().life.clone();
        let Some(life) = life else { return (true, true) };
        match life.spend() {
            2.. => (true, true),
            1 => (is_put && life.last_put_lands, false),
            _ => (false, false),
        }
    }

    /// The puts that were held back happen now, as puts of their mode.
    pub(crate) async fn land(&self) {
        let late = std::mem::take(&mut self.state.lock().late);
        for (path, bytes) in late {
            let _ = self.inner.put_opts(&path, bytes.into(), PutOptions::from(PutMode::Create)).await;
        }
    }

    /// Changes what is stored, as rot or somebody else would.
    pub(crate) async fn overwrite(&self, name: &str, bytes: Bytes) {
        self.inner.put(&Path::from(format!("bucket/prefix/{name}")), bytes.into()).await.unwrap();
    }

    pub(crate) async fn remove(&self, name: &str) {
        self.inner.delete(&Path::from(format!("bucket/prefix/{name}"))).await.unwrap();
    }

    /// The names of everything stored, sorted.
    pub(crate) async fn names(&self) -> Vec<String> {
        let listed = self.inner.list(None).map(|meta| meta.unwrap().location.to_string());
        let mut names: Vec<String> = listed.collect().await;
        names.sort();
        names.iter().map(|name| name.strip_prefix("bucket/prefix/").unwrap_or(name).to_owned()).collect()
    }

    /// The requests so far, as `put PATH` and `get PATH`.
    pub(crate) fn log(&self) -> Vec<String> {
        self.state.lock().log.clone()
    }

    fn record(&self, verb: &str, path: &Path) {
        self.state.lock().log.push(format!("{verb} {path}"));
    }

    fn fault(&self, path: &Path, of: &[Fault]) -> Option<Fault> {
        let mut state = self.state.lock();
        let hit = |(part, fault, times): &&mut (String, Fault, usize)| {
            *times > 0 && of.contains(fault) && path.as_ref().contains(part.as_str())
        };
        let (_, fault, times) = state.faults.iter_mut().find(hit)?;
        *times -= 1;
        Some(*fault)
    }

    async fn put_faulty(&self, at: &Path, bytes: PutPayload, options: PutOptions) -> ObjectResult<PutResult> {
        self.record("put", at);
        self.count_for_loss().await?;
        match self.reaches(true) {
            (true, true) => {}
            (true, false) => {
                self.inner.put_opts(at, bytes, options).await?;
                return Err(broken());
            }
            (false, _) => return Err(broken()),
        }
        let faults = [
            Fault::PutAnswersError,
            Fault::PutFails,
            Fault::PutConflict,
            Fault::PutLands,
            Fault::PutOverwrites,
        ];
        match self.fault(at, &faults) {
            Some(Fault::PutAnswersError) => {
                self.inner.put_opts(at, bytes, options).await?;
                Err(broken())
            }
            Some(Fault::PutConflict) => {
                Err(ObjectError::AlreadyExists { path: at.to_string(), source: "conflict".into() })
            }
            Some(Fault::PutLands) => {
                let bytes = bytes.iter().flat_map(|part| part.to_vec()).collect::<Vec<u8>>();
                self.state.lock().late.push((at.clone(), bytes.into()));
                Err(broken())
            }
            Some(Fault::PutOverwrites) => self.inner.put(at, bytes).await,
            Some(_) => Err(broken()),
            None => self.inner.put_opts(at, bytes, options).await,
        }
    }

    async fn get_faulty(&self, at: &Path, options: GetOptions) -> ObjectResult<GetResult> {
        self.record("get", at);
        self.count_for_loss().await?;
        if self.reaches(false) != (true, true) {
            return Err(broken());
        }
        let fault = self.fault(at, &[Fault::WrongBytes, Fault::NoBytes, Fault::Lost, Fault::GetFails]);
        match fault {
            Some(Fault::Lost) => Err(ObjectError::NotFound { path: at.to_string(), source: "lost".into() }),
            Some(Fault::GetFails) => Err(broken()),
            Some(Fault::WrongBytes | Fault::NoBytes) if !options.head => {
                let mut bytes = self.inner.get(at).await?.bytes().await?.to_vec();
                if fault == Some(Fault::NoBytes) {
                    bytes.clear();
                } else if let Some(middle) = bytes.len().checked_sub(1).map(|last| last / 2) {
                    bytes[middle] ^= 0x40;
                }
                let wrong = InMemory::new();
                wrong.put(at, bytes.into()).await?;
                wrong.get_opts(at, options).await
            }
            _ => self.inner.get_opts(at, options).await,
        }
    }
}

fn broken() -> ObjectError {
    ObjectError::Generic { store: "faulty", source: "connection reset".into() }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultyStore")
    }
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FaultyStore")
    }
}

impl StoreLayer for FaultyStore {
    fn below(&self) -> Arc<dyn ObjectStore> {
        self.inner.clone()
    }

    fn put<'a>(
        &'a self,
        at: &'a Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'a, ObjectResult<PutResult>> {
        self.put_faulty(at, bytes, options).boxed()
    }

    fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
        self.get_faulty(at, options).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, ObjectResult<ObjectMeta>> {
        let this = self.clone();
        let listed = self.inner.list(prefix);
        let shown = listed.filter(move |meta| {
            let hidden =
                meta.as_ref().is_ok_and(|meta| this.fault(&meta.location, &[Fault::ListLags]).is_some());
            futures::future::ready(!hidden)
        });
        shown.boxed()
    }
}
