//! A store in a directory that may hang without taking every thread with it.
//!
//! A put into a directory is done on a thread of the runtime, which goes on when the put is given up. A directory that hangs would keep one
//! more with every try, until there is none for anything else that blocks: other stores, the log. The same goes for
//! what is opened to be read.
//!
//! Invariants:
//! - What writes or syncs, and what opens, has one of few places until it has really ended, whoever still waits for it.

use std::{fmt, sync::Arc};

use futures::{FutureExt, future::BoxFuture};
use object_store::{
    Error as ObjectError, GetOptions, GetResult, ObjectStore, PutOptions, PutPayload, PutResult,
    Result as ObjectResult, path::Path,
};
use tokio::{runtime::Handle, sync::Semaphore};

use super::layer::StoreLayer;

/// The layer that lets only so many write, and open, at once.
pub(super) struct Bounded {
    below: Arc<dyn ObjectStore>,
    places: Arc<Semaphore>,
    reading: Arc<Semaphore>,
}

impl Bounded {
    /// Goes to `below`.
    pub(super) fn new(below: Arc<dyn ObjectStore>) -> Bounded {
        let [places, reading] = [PLACES, READ_PLACES].map(|places| Arc::new(Semaphore::new(places)));
        Bounded { below, places, reading }
    }

    /// The answer of what is done in one of the places, to its end.
    async fn placed<T: Send + 'static>(
        &self,
        places: &Arc<Semaphore>,
        work: impl Future<Output = ObjectResult<T>> + Send + 'static,
    ) -> ObjectResult<T> {
        let lost = |source: Box<dyn std::error::Error + Send + Sync>| ObjectError::Generic {
            store: "directory",
            source,
        };
        let place = Arc::clone(places).acquire_owned().await.map_err(|closed| lost(closed.into()))?;
        let Ok(runtime) = Handle::try_current() else { return work.await };
        let work = async move {
            let done = work.await;
            drop(place);
            done
        };
        runtime.spawn(work).await.map_err(|error| lost(error.into()))?
    }
}

impl fmt::Display for Bounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.below.fmt(f)
    }
}

impl fmt::Debug for Bounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bounded({})", self.below)
    }
}

impl StoreLayer for Bounded {
    fn below(&self) -> Arc<dyn ObjectStore> {
        Arc::clone(&self.below)
    }

    fn put<'a>(
        &'a self,
        at: &'a Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'a, ObjectResult<PutResult>> {
        let (below, at) = (self.below(), at.clone());
        self.placed(&self.places, async move { below.put_opts(&at, bytes, options).await }).boxed()
    }

    fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
        let (below, path) = (self.below(), at.clone());
        // Who asks only what an object is syncs its folder.
        let places = if options.head { &self.places } else { &self.reading };
        self.placed(places, async move { below.get_opts(&path, options).await }).boxed()
    }
}

/// Of the 512 threads that a runtime has for what blocks.
const PLACES: usize = 64;
/// The same for what is opened to be read.
const READ_PLACES: usize = 128;

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use object_store::{ObjectStoreExt, memory::InMemory};
    use parking_lot::{Condvar, Mutex};

    use super::{super::LayeredStore, *};

    /// A directory that hangs until it is let go.
    #[derive(Debug, Default)]
    struct Hanging {
        below: Arc<InMemory>,
        begun: Arc<AtomicUsize>,
        goes: Arc<(Mutex<bool>, Condvar)>,
    }

    impl fmt::Display for Hanging {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("hanging")
        }
    }

    impl StoreLayer for Hanging {
        fn below(&self) -> Arc<dyn ObjectStore> {
            Arc::<InMemory>::clone(&self.below)
        }

        fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
            let get = async move {
                self.before_write(at).await?;
                self.below.get_opts(at, options).await
            };
            get.boxed()
        }

        fn before_write<'a>(&'a self, _: &'a Path) -> BoxFuture<'a, ObjectResult<()>> {
            let (begun, goes) = (Arc::clone(&self.begun), Arc::clone(&self.goes));
            let hangs = move || {
                begun.fetch_add(1, Ordering::SeqCst);
                goes.1.wait_while(&mut goes.0.lock(), |goes| !*goes);
            };
            let hangs = async move {
                tokio::task::spawn_blocking(hangs).await.unwrap();
                Ok(())
            };
            hangs.boxed()
        }
    }

    /// The fear: what is put into a directory that hangs, or read from it, is given up and tried again until no thread is left, and
    /// everything stands still.
    #[test]
    fn a_directory_that_hangs_leaves_threads_for_everything_else() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(PLACES + READ_PLACES + 4)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let hanging = Hanging::default();
            let (begun, goes) = (Arc::clone(&hanging.begun), Arc::clone(&hanging.goes));
            let store = LayeredStore(Bounded::new(Arc::new(LayeredStore(hanging))));
            for number in 0..READ_PLACES + 8 {
                let at = Path::from(number.to_string());
                let mut put = Box::pin(store.put(&at, "bytes".into()));
                let mut get = Box::pin(store.get(&at));
                assert!(futures::poll!(&mut put).is_pending() && futures::poll!(&mut get).is_pending());
            }
            // On one thread all have begun by then that may.
            for _ in 0..READ_PLACES {
                tokio::task::yield_now().await;
            }
            let free = tokio::task::spawn_blocking(|| ());
            let free = tokio::time::timeout(Duration::from_secs(20), free).await;
            let hung = begun.load(Ordering::SeqCst);
            // Before anything is judged: the runtime ends with its threads.
            *goes.0.lock() = true;
            goes.1.notify_all();
            free.expect("no thread is left").unwrap();
            assert!(hung <= PLACES + READ_PLACES);
            // What was given up goes on, and its place is free again.
            store.put(&Path::from("last"), "bytes".into()).await.unwrap();
            assert_eq!(store.head(&Path::from("last")).await.unwrap().size, 5);
            let ended = async {
                while store.head(&Path::from("0")).await.is_err() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), ended).await.expect("it goes on");
        });
    }
}
