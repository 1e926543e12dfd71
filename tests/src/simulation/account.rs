//! An account of object storage: everything in it, and everything that it does wrong.
//!
//! Invariants:
//! - Puts are put-if-absent and a get sees every put that has happened: what a store must do, this one does. All else may go wrong.
//! - A request that has left a node may happen whenever it likes, also after the node is gone.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream::BoxStream};
use murphy_fs::{LayeredStore, StoreLayer};
use object_store::{
    Error as ObjectError, GetOptions, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutOptions,
    PutPayload, PutResult, Result as ObjectResult, memory::InMemory, path::Path,
};
use parking_lot::Mutex;

use super::{gate::Gate, stage::Stage};

/// What is done with every object that comes into being.
pub(super) type Witness = Arc<dyn Fn(&Path, &Bytes) + Send + Sync>;

/// An account, as the world sees it.
pub(super) struct Account {
    pub(super) name: String,
    stage: Arc<Stage>,
    objects: Arc<InMemory>,
    weather: Mutex<Weather>,
    witness: Witness,
    /// When each of the newest objects came into being, for listings that lag.
    newest: Mutex<Vec<(Path, Duration)>>,
    /// How many objects were lost or changed by disasters.
    damaged: AtomicU64,
}

/// How an account behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    /// Of a thousand requests so many go wrong.
    pub(super) per_mille: u64,
    /// Of a thousand requests so many take very long, or for ever.
    pub(super) slow_per_mille: u64,
    /// Listings lag by so much.
    pub(super) list_lag: Duration,
    /// The account is gone for ever.
    pub(super) gone: bool,
}

impl Weather {
    pub(super) const FAIR: Weather =
        Weather { per_mille: 0, slow_per_mille: 0, list_lag: Duration::ZERO, gone: false };
}

impl Account {
    pub(super) fn new(stage: &Arc<Stage>, name: &str, witness: Witness) -> Arc<Account> {
        Arc::new(Account {
            name: name.to_owned(),
            stage: Arc::clone(stage),
            objects: Arc::new(InMemory::new()),
            weather: Mutex::new(Weather::FAIR),
            witness,
            newest: Mutex::default(),
            damaged: AtomicU64::new(0),
        })
    }

    /// The account as the node behind `gate` reaches it.
    pub(super) fn through(self: &Arc<Self>, gate: &Arc<Gate>) -> Arc<dyn ObjectStore> {
        Arc::new(LayeredStore(Way { account: Arc::clone(self), gate: Arc::clone(gate) }))
    }

    pub(super) fn change_weather(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.weather.lock());
    }

    pub(super) fn is_gone(&self) -> bool {
        self.weather.lock().gone
    }

    /// Whether a disaster has lost or changed objects in it.
    pub(super) fn is_damaged(&self) -> bool {
        self.damaged.load(Ordering::Relaxed) > 0
    }

    /// What is in it now, for somebody who looks without asking the account.
    pub(super) fn objects(&self) -> Arc<InMemory> {
        Arc::clone(&self.objects)
    }

    /// The names of all objects, sorted.
    pub(super) async fn names(&self) -> Vec<Path> {
        let listed = self.objects.list(None).filter_map(async |meta| Some(meta.ok()?.location));
        let mut names: Vec<Path> = listed.collect().await;
        names.sort();
        names
    }

    /// Loses an object, or changes it; returns what became of it. The judge is told that the account is damaged unless this is the bug.
    pub(super) async fn damage(&self, at: &Path, how: Damage, counts: bool) -> Result<(), ObjectError> {
        let bytes = self.objects.get(at).await?.bytes().await?;
        if counts {
            self.damaged.fetch_add(1, Ordering::Relaxed);
        }
        match how {
            Damage::Lost => self.objects.delete(at).await?,
            Damage::Truncated => {
                let half = bytes.slice(..bytes.len() / 2);
                self.objects.put(at, half.into()).await?;
            }
            Damage::Flipped(bit) => {
                let mut bytes = bytes.to_vec();
                if let Some(length) = Some(bytes.len() as u64).filter(|length| *length > 0) {
                    bytes[(bit / 8 % length) as usize] ^= 1 << (bit % 8);
                }
                self.objects.put(at, bytes.into()).await?;
            }
        }
        Ok(())
    }

    async fn put(
        self: &Arc<Self>,
        at: &Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> ObjectResult<PutResult> {
        let bytes = Bytes::from(bytes);
        self.travel().await?;
        let fate = self.fate();
        fate.as_put().into_iter().for_each(|event| self.stage.count(event));
        match fate {
            Fate::Fails => return Err(broken()),
            Fate::Answerless { happens } => {
                if happens {
                    self.land_later(at, bytes, options);
                }
                futures::future::pending::<()>().await;
            }
            Fate::HappensAndFails => {
                self.land(at, bytes, options).await?;
                return Err(broken());
            }
            Fate::FailsAndHappens => {
                self.land_later(at, bytes, options);
                return Err(broken());
            }
            Fate::Fine | Fate::Wrong => {
                let put = self.land(at, bytes, options).await;
                self.travel().await?;
                return put;
            }
        }
        Err(broken())
    }

    /// The put happens when everybody has given up on it.
    fn land_later(self: &Arc<Self>, at: &Path, bytes: Bytes, options: PutOptions) {
        let (account, at) = (Arc::clone(self), at.clone());
        let delay = self.stage.ms(50, 90_000);
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let landed = account.land(&at, bytes, options).await.is_ok();
            account.stage.note(format!("{}: a late put of {at} {}", account.name, outcome(landed)));
        });
    }

    async fn land(&self, at: &Path, bytes: Bytes, options: PutOptions) -> ObjectResult<PutResult> {
        if self.is_gone() {
            return Err(gone(at));
        }
        let put = self.objects.put_opts(at, bytes.clone().into(), options).await?;
        self.stage.note(format!("{}: {at}, {} bytes", self.name, bytes.len()));
        let now = self.stage.now();
        let mut newest = self.newest.lock();
        newest.retain(|(_, at)| now.saturating_sub(*at) < LIST_LAG_MAX);
        newest.push((at.clone(), now));
        drop(newest);
        (self.witness)(at, &bytes);
        Ok(put)
    }

    async fn get(&self, at: &Path, options: GetOptions) -> ObjectResult<GetResult> {
        self.travel().await?;
        let fate = self.fate();
        fate.as_get().into_iter().for_each(|event| self.stage.count(event));
        match fate {
            Fate::Fails | Fate::HappensAndFails | Fate::FailsAndHappens => return Err(broken()),
            Fate::Answerless { .. } => futures::future::pending::<()>().await,
            Fate::Wrong if !options.head => {
                let mut bytes = self.objects.get(at).await?.bytes().await?.to_vec();
                let place = self.stage.below(bytes.len().max(1) as u64) as usize;
                if let Some(byte) = bytes.get_mut(place) {
                    *byte ^= 0x40;
                }
                let wrong = InMemory::new();
                wrong.put(at, bytes.into()).await?;
                return wrong.get_opts(at, options).await;
            }
            Fate::Fine | Fate::Wrong => {}
        }
        if self.is_gone() {
            return Err(gone(at));
        }
        let got = self.objects.get_opts(at, options).await;
        self.travel().await?;
        got
    }

    /// The way to the account or back.
    async fn travel(&self) -> ObjectResult<()> {
        let weather = *self.weather.lock();
        if self.stage.below(1000) < weather.slow_per_mille {
            self.stage.pause(500, 70_000).await;
        }
        self.stage.pause(0, 12).await;
        if self.is_gone() { Err(broken()) } else { Ok(()) }
    }

    fn fate(&self) -> Fate {
        if self.stage.below(1000) >= self.weather.lock().per_mille {
            return Fate::Fine;
        }
        match self.stage.below(6) {
            0 => Fate::Answerless { happens: self.stage.once_in(2) },
            1 => Fate::HappensAndFails,
            2 => Fate::FailsAndHappens,
            3 => Fate::Wrong,
            _ => Fate::Fails,
        }
    }

    fn is_listed(&self, at: &Path) -> bool {
        let lag = self.weather.lock().list_lag;
        let now = self.stage.now();
        let newest = self.newest.lock();
        !newest.iter().any(|(path, since)| path == at && now.saturating_sub(*since) < lag)
    }
}

/// How an object is damaged.
#[derive(Clone, Copy, Debug)]
pub(super) enum Damage {
    Lost,
    Truncated,
    Flipped(u64),
}

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Fine,
    /// It does not happen, and the answer says so.
    Fails,
    /// It happens, the answer is an error.
    HappensAndFails,
    /// The answer is an error, and it happens later.
    FailsAndHappens,
    /// There is no answer; a put happens later or not.
    Answerless {
        happens: bool,
    },
    /// A get answers with a byte changed on the way.
    Wrong,
}

impl Fate {
    /// What is counted when it befalls a put.
    fn as_put(self) -> Option<&'static str> {
        match self {
            Fate::Fine | Fate::Wrong => None,
            Fate::Fails => Some("puts that failed"),
            Fate::HappensAndFails => Some("puts that happened and answered an error"),
            Fate::FailsAndHappens => Some("puts that answered an error and happened later"),
            Fate::Answerless { happens: true } => Some("puts without an answer that happened later"),
            Fate::Answerless { happens: false } => Some("puts without an answer that never happened"),
        }
    }

    /// What is counted when it befalls a get.
    fn as_get(self) -> Option<&'static str> {
        match self {
            Fate::Fine => None,
            Fate::Fails | Fate::HappensAndFails | Fate::FailsAndHappens => Some("gets that failed"),
            Fate::Answerless { .. } => Some("gets without an answer"),
            Fate::Wrong => Some("gets with a byte changed on the way"),
        }
    }
}

fn outcome(done: bool) -> &'static str {
    if done { "has happened" } else { "was refused" }
}

fn broken() -> ObjectError {
    ObjectError::Generic { store: "simulated", source: "503, or the connection was reset".into() }
}

fn gone(at: &Path) -> ObjectError {
    ObjectError::PermissionDenied { path: at.to_string(), source: "the account is suspended".into() }
}

/// An account as one node reaches it.
struct Way {
    account: Arc<Account>,
    gate: Arc<Gate>,
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.account.name)
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.account.name)
    }
}

impl StoreLayer for Way {
    fn below(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.account.objects) as Arc<dyn ObjectStore>
    }

    fn put<'a>(
        &'a self,
        at: &'a Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'a, ObjectResult<PutResult>> {
        Box::pin(async move {
            self.gate.pass().await;
            let put = self.account.put(at, bytes, options).await;
            self.gate.pass().await;
            put
        })
    }

    fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
        Box::pin(async move {
            self.gate.pass().await;
            let got = self.account.get(at, options).await;
            self.gate.pass().await;
            got
        })
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, ObjectResult<ObjectMeta>> {
        let (account, gate) = (Arc::clone(&self.account), Arc::clone(&self.gate));
        let listed = self.account.objects.list(prefix);
        let began = async move {
            gate.pass().await;
            match account.travel().await {
                Ok(()) if !account.is_gone() && account.fate() == Fate::Fine => {
                    let is_shown = move |meta: &ObjectResult<ObjectMeta>| {
                        let listed = meta.as_ref().is_ok_and(|meta| account.is_listed(&meta.location));
                        if !listed {
                            account.stage.count("objects that a listing did not show yet");
                        }
                        futures::future::ready(listed)
                    };
                    listed.filter(is_shown).boxed()
                }
                _ => futures::stream::once(async { Err(broken()) }).boxed(),
            }
        };
        futures::stream::once(began).flatten().boxed()
    }
}

/// Listings lag no longer.
const LIST_LAG_MAX: Duration = Duration::from_secs(60);
