//! What a block store must make of the answers of an object store.

use std::sync::atomic::{AtomicU32, Ordering};

use futures::{FutureExt, TryStreamExt, future::BoxFuture};
use object_store::{GetResult, PutPayload, PutResult, Result as ObjectResult};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::data::{LayeredStore, StoreLayer};

fn name(number: u64) -> PackName {
    PackName::new(WriterId::from_u64(0xaa), number)
}

/// What goes wrong with the first `times` puts.
#[derive(Clone, Copy, Debug)]
enum PutFault {
    /// The object is written, the answer is lost.
    AnswerLost,
    /// Nothing is written, the answer is lost.
    RequestLost,
    /// S3 answers 409 while another request is under way, and nothing is written.
    FalseExists,
    /// The store has no conditional put.
    Unsupported,
    /// The store takes conditional puts and overwrites.
    Overwrites,
    /// Nobody ever answers, gets neither.
    NoAnswer,
    /// The object is written, the answer is lost, and what is read first has a bit flipped on the way.
    AnswerFlipped,
}

#[derive(Debug)]
struct FaultyPuts {
    inner: Arc<InMemory>,
    fault: PutFault,
    times: AtomicU32,
    puts: AtomicU32,
    gets: AtomicU32,
}

/// A store that does not honour put-if-absent.
pub(in crate::data) fn overwriting() -> Arc<dyn ObjectStore> {
    faulty(PutFault::Overwrites, u32::MAX).0
}

fn faulty(fault: PutFault, times: u32) -> (Arc<LayeredStore<FaultyPuts>>, ObjectBlockStore) {
    let objects =
        FaultyPuts { inner: Arc::default(), fault, times: times.into(), puts: 0.into(), gets: 0.into() };
    let objects = Arc::new(LayeredStore(objects));
    (Arc::clone(&objects), ObjectBlockStore::new(objects, Path::from("v"), "test".to_owned()))
}

impl fmt::Display for FaultyPuts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyPuts")
    }
}

impl StoreLayer for FaultyPuts {
    fn below(&self) -> Arc<dyn ObjectStore> {
        self.inner.clone()
    }

    fn put<'a>(
        &'a self,
        at: &'a Path,
        bytes: PutPayload,
        options: PutOptions,
    ) -> BoxFuture<'a, ObjectResult<PutResult>> {
        let put = async move {
            self.puts.fetch_add(1, Ordering::SeqCst);
            let left = self.times.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
            if left.is_err() {
                return self.inner.put_opts(at, bytes, options).await;
            }
            let path = at.to_string();
            Err(match self.fault {
                PutFault::NoAnswer => std::future::pending().await,
                PutFault::AnswerLost | PutFault::AnswerFlipped => {
                    self.inner.put_opts(at, bytes, options).await?;
                    ObjectError::Generic { store: "test", source: "time-out".into() }
                }
                PutFault::RequestLost => ObjectError::Generic { store: "test", source: "time-out".into() },
                PutFault::FalseExists => ObjectError::AlreadyExists { path, source: "409".into() },
                PutFault::Overwrites => {
                    return self.inner.put_opts(at, bytes, PutOptions::from(PutMode::Overwrite)).await;
                }
                PutFault::Unsupported => {
                    ObjectError::NotImplemented { operation: "create".into(), implementer: "test".into() }
                }
            })
        };
        put.boxed()
    }

    fn get<'a>(&'a self, at: &'a Path, options: GetOptions) -> BoxFuture<'a, ObjectResult<GetResult>> {
        match self.fault {
            PutFault::NoAnswer => {
                self.gets.fetch_add(1, Ordering::SeqCst);
                std::future::pending().boxed()
            }
            PutFault::AnswerFlipped if self.gets.fetch_add(1, Ordering::SeqCst) == 0 => async move {
                let mut bytes = self.inner.get(at).await?.bytes().await?.to_vec();
                bytes[0] ^= 1;
                let flipped = InMemory::new();
                flipped.put(at, bytes.into()).await?;
                flipped.get_opts(at, options).await
            }
            .boxed(),
            _ => self.inner.get_opts(at, options),
        }
    }
}

#[tokio::test]
async fn a_put_whose_answer_was_lost_is_settled_by_reading_back() {
    let (objects, store) = faulty(PutFault::AnswerLost, 1);
    store.put(name(1), Bytes::from_static(b"mine")).await.unwrap();
    assert_eq!(objects.0.puts.load(Ordering::SeqCst), 1);
    assert_eq!(store.get(name(1)).await.unwrap(), "mine");
}

#[tokio::test]
async fn a_put_that_did_not_arrive_is_repeated_whatever_the_answer_says() {
    for fault in [PutFault::RequestLost, PutFault::FalseExists] {
        let (objects, store) = faulty(fault, PUT_ATTEMPTS - 1);
        store.put(name(1), Bytes::from_static(b"mine")).await.unwrap();
        assert_eq!(objects.0.puts.load(Ordering::SeqCst), PUT_ATTEMPTS);
        assert_eq!(store.get(name(1)).await.unwrap(), "mine");
    }
}

#[tokio::test]
async fn a_put_that_never_arrives_ends_as_unavailable() {
    for fault in [PutFault::RequestLost, PutFault::FalseExists] {
        let (objects, store) = faulty(fault, u32::MAX);
        let error = store.put(name(1), Bytes::from_static(b"mine")).await.unwrap_err();
        assert!(matches!(error, BlockStoreError::Unavailable { retryable: true, .. }), "{error}");
        assert_eq!(objects.0.puts.load(Ordering::SeqCst), PUT_ATTEMPTS);
    }
    let (_, store) = faulty(PutFault::Unsupported, 1);
    let error = store.put(name(1), Bytes::from_static(b"mine")).await.unwrap_err();
    assert!(matches!(error, BlockStoreError::Refused { refusal: Refusal::Unsupported(_), .. }), "{error}");
}

#[tokio::test]
async fn the_same_name_with_other_content_is_refused_and_with_the_same_accepted() {
    let store = ObjectBlockStore::in_memory();
    store.put(name(1), Bytes::from_static(b"mine")).await.unwrap();
    store.put(name(1), Bytes::from_static(b"mine")).await.unwrap();
    let error = store.put(name(1), Bytes::from_static(b"hers")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "pack 00000000000000aa-1 in memory: an object of this name exists already and has other content"
    );
    assert_eq!(store.get(name(1)).await.unwrap(), "mine");
}

/// What can be read back from a file system may be in the page cache only, after a sync that failed.
#[tokio::test]
async fn on_a_file_system_reading_back_is_not_taken_for_durable() {
    for (fault, puts) in [(PutFault::AnswerLost, 2), (PutFault::FalseExists, 2), (PutFault::RequestLost, 2)] {
        let (objects, store) = faulty(fault, 1);
        let store = ObjectBlockStore { settle: Settle::Rewrite, ..store };
        store.put(name(1), Bytes::from_static(b"mine")).await.unwrap();
        assert_eq!(objects.0.puts.load(Ordering::SeqCst), puts, "{fault:?}");
        assert_eq!(store.get(name(1)).await.unwrap(), "mine");
        let error = store.put(name(1), Bytes::from_static(b"hers")).await.unwrap_err();
        assert!(matches!(error, BlockStoreError::Refused { refusal: Refusal::OtherContent, .. }), "{error}");
    }
}

#[tokio::test]
async fn a_file_store_keeps_packs_over_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let url = StoreUrl::from_directory(&folder.path().join("blocks")).unwrap();
    let store = ObjectBlockStore::open(&url).unwrap();
    assert_eq!(store.list(None).try_collect::<Vec<_>>().await.unwrap(), []);
    for _ in 0..2 {
        store.put(name(1), Bytes::from_static(b"mine")).await.unwrap();
    }
    drop(store);
    let store = ObjectBlockStore::open(&url).unwrap();
    assert_eq!(store.get(name(1)).await.unwrap(), "mine");
    assert_eq!(
        store.list(None).try_collect::<Vec<_>>().await.unwrap(),
        [StoredPack { name: name(1), stored_len: 4 }]
    );
    assert!(folder.path().join("blocks").join(name(1).object_path()).is_file());
    for range in [2..5, 4..5, 9..10] {
        let error = store.get_range(name(1), range.clone()).await.unwrap_err();
        assert!(matches!(error, BlockStoreError::Damaged { .. }), "{range:?}: {error}");
    }
}

#[tokio::test]
async fn ranges_are_whole_or_an_error() {
    let store = ObjectBlockStore::in_memory();
    store.put(name(1), Bytes::from_static(b"0123456789")).await.unwrap();
    assert_eq!(store.get_range(name(1), 2..5).await.unwrap(), "234");
    assert_eq!(store.size(name(1)).await.unwrap(), 10);
    for range in [5..11, 10..12, 100..101] {
        let error = store.get_range(name(1), range.clone()).await.unwrap_err();
        assert!(matches!(error, BlockStoreError::Damaged { .. }), "{range:?}: {error}");
    }
    let error = store.get_range(name(2), 0..1).await.unwrap_err();
    assert!(matches!(error, BlockStoreError::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn an_object_larger_than_any_pack_is_not_read_into_memory() {
    let objects = Arc::new(InMemory::new());
    let store = ObjectBlockStore::new(Arc::clone(&objects) as _, Path::default(), "test".to_owned());
    let path = Path::from(name(1).object_path());
    objects.put(&path, vec![0; MAX_PACK_STORED + 1].into()).await.unwrap();
    let error = store.get(name(1)).await.unwrap_err();
    assert!(matches!(error, BlockStoreError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn deleting_twice_is_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let local = object_store::local::LocalFileSystem::new_with_prefix(folder.path()).unwrap();
    for objects in [Arc::new(InMemory::new()) as Arc<dyn ObjectStore>, Arc::new(local)] {
        let store = ObjectBlockStore::new(objects, Path::from("a/b"), "test".to_owned());
        store.put(name(1), Bytes::from_static(b"mine")).await.unwrap();
        store.delete(name(1)).await.unwrap();
        store.delete(name(1)).await.unwrap();
        assert!(matches!(store.size(name(1)).await, Err(BlockStoreError::NotFound { .. })));
    }
}

#[tokio::test]
async fn a_listing_has_the_packs_of_the_prefix_and_nothing_else() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = ObjectBlockStore::new(Arc::clone(&objects), Path::from("v"), "test".to_owned());
    let other = PackName::new(WriterId::from_u64(0xbb), 3);
    for name in [name(1), name(2), other] {
        store.put(name, Bytes::from_static(b"mine")).await.unwrap();
    }
    for stray in ["v/packs/zz/readme", "v/packs/00/00000000000000aa-x", "w/packs/00/00000000000000aa-9"] {
        objects.put(&Path::from(stray), "stray".into()).await.unwrap();
    }
    let list =
        |writer| store.list(writer).map_ok(|pack| (pack.name, pack.stored_len)).try_collect::<Vec<_>>();
    let mut all = list(None).await.unwrap();
    all.sort();
    assert_eq!(all, [(name(1), 4), (name(2), 4), (other, 4)]);
    assert_eq!(list(Some(other.writer)).await.unwrap(), [(other, 4)]);
}

/// The fear: a store that never answers holds up a shipper, a copier or a reader for ever, and everything behind it.
#[tokio::test]
async fn a_store_that_never_answers_is_given_up() {
    let (_, store) = faulty(PutFault::NoAnswer, u32::MAX);
    let store = ObjectBlockStore { patience: Duration::from_millis(20), ..store };
    let unanswered =
        |error: BlockStoreError| matches!(error, BlockStoreError::Unavailable { .. }) && error.is_late();
    assert!(unanswered(store.put(name(1), Bytes::from_static(b"pack")).await.unwrap_err()));
    assert!(unanswered(store.get(name(1)).await.unwrap_err()));
    assert!(unanswered(store.get_range(name(1), 0..1).await.unwrap_err()));
    assert!(unanswered(store.size(name(1)).await.unwrap_err()));
}

/// The fear: a store that hangs is asked a second time, for a length, and the reader's time is over before the store behind it is asked.
#[tokio::test]
async fn a_store_that_did_not_answer_is_not_asked_why() {
    let (objects, store) = faulty(PutFault::NoAnswer, u32::MAX);
    let store = ObjectBlockStore { patience: Duration::from_millis(20), ..store };
    assert!(store.get_range(name(1), 0..1).await.is_err());
    assert_eq!(objects.0.gets.load(Ordering::SeqCst), 1);
    let broken = HttpError::new(HttpErrorKind::Connect, io::Error::other("no route"));
    let broken = ObjectError::Generic { store: "test", source: Box::new(broken) };
    assert!(is_no_answer(&broken));
    let said = |text: &str| ObjectError::Generic { store: "test", source: text.into() };
    assert!(!is_no_answer(&said("Server returned non-2xx status code: 416 Range Not Satisfiable: ")));
}

/// The fear: one bit flipped on the way back makes a pack that is there count as somebody else's, for good.
#[tokio::test]
async fn a_put_is_not_taken_for_a_clash_because_of_a_bit_flipped_on_the_way() {
    let (_, store) = faulty(PutFault::AnswerFlipped, 1);
    store.put(name(1), Bytes::from_static(b"pack")).await.unwrap();
    let (_, store) = faulty(PutFault::AnswerFlipped, 2);
    store.put(name(1), Bytes::from_static(b"pack")).await.unwrap();
    let clash = store.put(name(1), Bytes::from_static(b"other")).await.unwrap_err();
    assert!(matches!(clash, BlockStoreError::Refused { refusal: Refusal::OtherContent, .. }), "{clash}");
}

/// The fear: a store behind a gateway that is out of order is asked twice for each cell, each time with all repetitions, before the next one is.
#[tokio::test]
async fn a_store_that_is_out_of_order_is_not_asked_why() {
    // Another test may have done it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&requests);
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 4096];
            let length = stream.read(&mut buffer).await.unwrap();
            let verb =
                String::from_utf8_lossy(&buffer[..length]).split(' ').next().unwrap_or_default().to_owned();
            heard.lock().push(verb);
            let answer =
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            stream.write_all(answer).await.unwrap();
        }
    });
    let retries = object_store::RetryConfig { max_retries: 1, ..object_store::RetryConfig::default() };
    let store = object_store::aws::AmazonS3Builder::new()
        .with_endpoint(format!("http://{address}"))
        .with_bucket_name("bucket")
        .with_access_key_id("key")
        .with_secret_access_key("secret")
        .with_allow_http(true)
        .with_retry(retries)
        .build()
        .unwrap();
    let store = ObjectBlockStore::new(Arc::new(store), Path::default(), "test".to_owned());
    let error = store.get_range(name(1), 0..1).await.unwrap_err();
    assert!(matches!(error, BlockStoreError::Unavailable { .. }) && !error.is_late(), "{error}");
    assert_eq!(*requests.lock(), ["GET", "GET"], "and not whether it has it");
    serving.abort();
}
