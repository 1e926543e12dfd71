//! Stores that do not answer, in virtual time.

use tokio::time::Instant;

use super::*;

/// Gives up as a request does, and counts.
#[derive(Debug)]
struct Patient(Arc<Liar>);

impl BlockStore for Patient {
    fn label(&self) -> Cow<'_, str> {
        self.0.label()
    }
    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.0.put(name, bytes)
    }
    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.0.mend(name, bytes)
    }
    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        in_time(self.0.get_range(name, range)).boxed()
    }
    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        in_time(self.0.get(name)).boxed()
    }
    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        self.0.gets.fetch_add(1, Ordering::SeqCst);
        in_time(self.0.size(name)).boxed()
    }
    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.0.delete(name)
    }
    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.0.list(writer)
    }
}

const REQUEST: Duration = Duration::from_secs(60);

async fn in_time<T>(
    asked: impl Future<Output = Result<T, BlockStoreError>> + Send,
) -> Result<T, BlockStoreError> {
    let answer = tokio::time::timeout(REQUEST, asked).await;
    answer.unwrap_or_else(|late| {
        let source = Arc::new(std::io::Error::other(late));
        Err(BlockStoreError::Unavailable { object: "pack".to_owned(), retryable: true, source })
    })
}

/// A reader of which nothing is kept, so that each read asks stores.
fn forgetful(sources: Vec<Arc<dyn BlockStore>>) -> PackFetcher {
    PackFetcher::new(sources, CellCache::new(0), None)
}

/// How long a read of a few bytes takes, and that they are the right ones.
async fn read(fetcher: &PackFetcher, pack: &SealedPack, plain: &[u8]) -> Duration {
    let began = Instant::now();
    assert_eq!(fetcher.read(&pack.meta(), 70_000..70_100).await.unwrap(), plain[70_000..70_100]);
    began.elapsed()
}

/// The fear: a silent store in front of a good one costs every read half a minute, again and again.
#[tokio::test(start_paused = true)]
async fn a_silent_store_costs_one_read_a_little_and_is_asked_last_until_it_answers() {
    let (pack, plain) = large(3);
    let silent = Liar::hanging("s3://silent", &pack).await;
    let good = Liar::hanging("s3://good", &pack).await;
    good.open.store(true, Ordering::SeqCst);
    let fetcher = forgetful(vec![Arc::new(Patient(silent.clone())), good.clone()]);
    assert!(read(&fetcher, &pack, &plain).await < Duration::from_secs(10), "the next one is asked meanwhile");
    let said: Vec<String> = fetcher.silent_stores().into_iter().map(|store| store.label).collect();
    assert_eq!(said, ["s3://silent"]);
    let asked = silent.gets();
    for _ in 0..100 {
        assert_eq!(read(&fetcher, &pack, &plain).await, Duration::ZERO);
    }
    assert_eq!(silent.gets(), asked, "nobody waits for it");
    // Whether it answers again is asked by one at a time, and less and less often.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3600) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(read(&fetcher, &pack, &plain).await, Duration::ZERO);
    }
    let probes = silent.gets() - asked;
    assert!((8..25).contains(&probes), "{probes}");
    silent.open.store(true, Ordering::SeqCst);
    while !fetcher.silent_stores().is_empty() {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(read(&fetcher, &pack, &plain).await, Duration::ZERO);
        assert!(began.elapsed() < Duration::from_secs(7200), "it has answered");
    }
    let gets = (silent.gets(), good.gets());
    read(&fetcher, &pack, &plain).await;
    assert!(silent.gets() > gets.0 && good.gets() == gets.1, "it is the first again");
}

/// The fear: a silent store is left out, and what only it has is EIO; or it hides that all others said no.
#[tokio::test(start_paused = true)]
async fn a_silent_store_is_asked_when_nobody_else_has_the_bytes() {
    let (pack, plain) = large(3);
    let slow = Liar::hanging("s3://slow", &pack).await;
    let empty = Liar::new(Lie::Honest, 0);
    let fetcher = forgetful(vec![Arc::new(Patient(slow.clone())), empty.clone()]);
    let error = fetcher.read(&pack.meta(), 0..10).await.unwrap_err();
    assert!(matches!(error, ReadError::Store { .. }), "{error}");
    assert_eq!((slow.gets(), empty.gets(), fetcher.silent_stores().len()), (1, 1, 1));
    let opening = tokio::spawn({
        let slow = slow.clone();
        async move {
            tokio::time::sleep(Duration::from_secs(20)).await;
            slow.open.store(true, Ordering::SeqCst);
        }
    });
    assert!(read(&fetcher, &pack, &plain).await >= Duration::from_secs(20));
    assert_eq!(fetcher.silent_stores(), [], "it has answered a reader");
    opening.await.unwrap();
}

/// The fear: an answer that comes late, to a question that was asked before somebody else gave a part, is taken for other cells.
#[tokio::test(start_paused = true)]
async fn a_late_answer_is_taken_for_what_was_asked() {
    let (pack, plain) = large(10);
    for damaged in [0, 5, 9] {
        let late = Liar::hanging("s3://late", &pack).await;
        let bad = Liar::with(Lie::Flip(damaged * CELL as u64 + 3), u64::MAX, &pack).await;
        let fetcher = forgetful(vec![late.clone(), bad.clone()]);
        let opening = tokio::spawn({
            let late = late.clone();
            async move {
                tokio::time::sleep(Duration::from_secs(9)).await;
                late.open.store(true, Ordering::SeqCst);
            }
        });
        let all = 0..plain.len() as u64;
        assert_eq!(fetcher.read(&pack.meta(), all).await.unwrap(), plain);
        opening.await.unwrap();
    }
}
