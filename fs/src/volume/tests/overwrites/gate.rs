//! A store whose puts go as the test says.

use std::sync::atomic::AtomicU64;

use futures::{future::BoxFuture, stream::BoxStream};
use tokio::sync::watch;

use super::*;
use crate::{BlockStoreError, PackName, StoredPack, WriterId};

/// What becomes of puts; one that is held goes by what is said next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Puts {
    Succeed,
    Hold,
    /// Those that were held fail, the others succeed.
    FailHeld,
    /// Those of more than [`LARGE`] bytes hold, the others succeed.
    HoldLarge,
    /// They take a while, each another, and one in so many fails.
    Vary(u64),
    /// They get no answer, and what does them keeps their bytes when they are given up, until something else is said.
    Detach,
    /// Those that begin while this is said get no answer, ever.
    Lose,
    /// They are stored, and nobody hears of it; nor of what else is asked.
    StoreAndHang,
    /// They take a while; one in so many fails, another is stored and gets no answer, another is lost.
    Waver(u64),
    /// All that are under way share so many bytes per millisecond.
    Share(u64),
}

#[derive(Debug)]
pub(super) struct Gate {
    below: ObjectBlockStore,
    pub(super) puts: watch::Sender<Puts>,
    pub(super) begun: AtomicU64,
    pub(super) failed: AtomicU64,
    /// Bytes that are kept for puts that may have been given up.
    pub(super) kept: Arc<AtomicU64>,
    sharing: AtomicU64,
    /// How often it was asked what a put has left, ...
    pub(super) asked: AtomicU64,
    asking: AtomicU64,
    /// ... and by how many at once at most.
    pub(super) asking_most: AtomicU64,
    /// The last put that has begun.
    last: Mutex<Option<PackName>>,
    random: Mutex<Random>,
}

/// One of those that are counted for as long as they last.
struct Counted<'a>(&'a AtomicU64);

impl Counted<'_> {
    fn begin(count: &AtomicU64) -> Counted<'_> {
        count.fetch_add(1, Ordering::SeqCst);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Gate {
    pub(super) fn new(seed: u64) -> Gate {
        Gate {
            below: ObjectBlockStore::in_memory(),
            puts: watch::Sender::new(Puts::Succeed),
            begun: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            kept: Arc::default(),
            sharing: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            asking: AtomicU64::new(0),
            asking_most: AtomicU64::new(0),
            last: Mutex::default(),
            random: Mutex::new(Random(seed)),
        }
    }

    fn holds(puts: Puts, bytes: &Bytes) -> bool {
        puts == Puts::Hold || puts == Puts::HoldLarge && bytes.len() > LARGE
    }

    /// Keeps the bytes of a put, whoever waits for it.
    fn keep(&self, bytes: Bytes) {
        let (mut puts, kept) = (self.puts.subscribe(), Arc::clone(&self.kept));
        kept.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        tokio::spawn(async move {
            puts.wait_for(|puts| *puts != Puts::Detach).await.unwrap();
            kept.fetch_sub(bytes.len() as u64, Ordering::SeqCst);
        });
    }

    /// What the last put was to store is there, and is something else.
    pub(super) async fn damage_last(&self) {
        let name = self.last.lock().unwrap();
        self.below.put(name, Bytes::from_static(b"half")).await.unwrap();
    }

    /// Takes as long as so many bytes take.
    async fn share(&self, rate: u64, bytes: u64) {
        let _sharing = Counted::begin(&self.sharing);
        let (mut left, mut before) = (bytes as f64, tokio::time::Instant::now());
        while left > 0.0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let elapsed = before.elapsed();
            before += elapsed;
            left -= elapsed.as_secs_f64() * 1000.0 * rate as f64 / self.sharing.load(Ordering::SeqCst) as f64;
        }
    }

    async fn size_as_told(&self, name: PackName) -> Result<u64, BlockStoreError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let _asking = Counted::begin(&self.asking);
        self.asking_most.fetch_max(self.asking.load(Ordering::SeqCst), Ordering::SeqCst);
        if *self.puts.borrow() == Puts::StoreAndHang {
            return std::future::pending().await;
        }
        self.below.size(name).await
    }

    async fn put_as_told(&self, name: PackName, bytes: Bytes) -> Result<(), BlockStoreError> {
        *self.last.lock() = Some(name);
        self.begun.fetch_add(1, Ordering::SeqCst);
        let is_held = Gate::holds(*self.puts.borrow(), &bytes);
        let told = *self.puts.subscribe().wait_for(|puts| !Gate::holds(*puts, &bytes)).await.unwrap();
        match told {
            Puts::Vary(failing) => {
                let (held, fails) = {
                    let mut random = self.random.lock();
                    (Duration::from_millis(random.below(6)), failing > 0 && random.below(failing) == 0)
                };
                tokio::time::sleep(held).await;
                if fails {
                    self.failed.fetch_add(1, Ordering::SeqCst);
                    let object = name.to_string();
                    return Err(BlockStoreError::Refused { object, refusal: crate::Refusal::Exists });
                }
            }
            Puts::FailHeld if is_held => {
                let object = name.to_string();
                return Err(BlockStoreError::Refused { object, refusal: crate::Refusal::Exists });
            }
            Puts::Detach => {
                self.keep(bytes);
                return std::future::pending().await;
            }
            Puts::Lose => return std::future::pending().await,
            Puts::StoreAndHang => {
                self.below.put(name, bytes).await?;
                return std::future::pending().await;
            }
            Puts::Waver(seldom) => {
                let (held, fate) = {
                    let mut random = self.random.lock();
                    (Duration::from_millis(random.below(6)), random.below(3 * seldom))
                };
                tokio::time::sleep(held).await;
                match fate {
                    0 => {
                        let object = name.to_string();
                        return Err(BlockStoreError::Refused { object, refusal: crate::Refusal::Exists });
                    }
                    1 => self.below.put(name, bytes).await?,
                    2 => {}
                    _ => return self.below.put(name, bytes).await,
                }
                return std::future::pending().await;
            }
            Puts::Share(rate) => self.share(rate, bytes.len() as u64).await,
            Puts::Succeed | Puts::Hold | Puts::FailHeld | Puts::HoldLarge => {}
        }
        self.below.put(name, bytes).await
    }
}

impl BlockStore for Gate {
    fn label(&self) -> std::borrow::Cow<'_, str> {
        self.below.label()
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        Box::pin(self.put_as_told(name, bytes))
    }

    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.mend(name, bytes)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.below.get_range(name, range)
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.below.get(name)
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        Box::pin(self.size_as_told(name))
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.below.list(writer)
    }
}
