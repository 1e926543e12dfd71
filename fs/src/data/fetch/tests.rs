//! What a reader must get, from stores and caches that lie, fail and dawdle.

mod silence;
mod spans;

use std::{borrow::Cow, sync::atomic::AtomicBool};

use futures::{StreamExt, stream::BoxStream};

use super::*;
use crate::data::{
    cache::CellCache,
    name::WriterId,
    pack::{PackBuilder, SealedPack},
    store::{ObjectBlockStore, StoredPack},
    stores::BlockStores,
};

/// How a store lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lie {
    /// It does not.
    Honest,
    /// Everything is zeros.
    Zeros,
    /// One byte of the object is flipped.
    Flip(u64),
    /// The answer is one byte short, and says it is whole.
    Short,
    /// The answer is empty, and says it is whole.
    Empty,
    /// No answer.
    Down,
}

/// A store in memory that lies in the first `lies` answers.
#[derive(Debug)]
struct Liar {
    inner: ObjectBlockStore,
    lie: Lie,
    lies: AtomicU64,
    gets: AtomicU64,
    /// Answers wait until this is set.
    open: AtomicBool,
    label: &'static str,
}

impl Liar {
    fn new(lie: Lie, lies: u64) -> Arc<Liar> {
        Arc::new(Liar {
            inner: ObjectBlockStore::in_memory(),
            lie,
            lies: lies.into(),
            gets: 0.into(),
            open: true.into(),
            label: "liar",
        })
    }

    /// One that is called `label`, and answers only once it is opened.
    async fn hanging(label: &'static str, pack: &SealedPack) -> Arc<Liar> {
        let store = Liar { label, open: false.into(), ..Arc::into_inner(Liar::new(Lie::Honest, 0)).unwrap() };
        store.inner.put(pack.name, pack.bytes.clone()).await.unwrap();
        Arc::new(store)
    }

    async fn with(lie: Lie, lies: u64, pack: &SealedPack) -> Arc<Liar> {
        let store = Liar::new(lie, lies);
        store.inner.put(pack.name, pack.bytes.clone()).await.unwrap();
        store
    }

    fn gets(&self) -> u64 {
        self.gets.load(Ordering::SeqCst)
    }

    /// Waits in virtual time where that is.
    async fn opened(&self) {
        while !self.open.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn answer(&self, name: PackName, range: Range<u64>) -> Result<Bytes, BlockStoreError> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        self.opened().await;
        let truth = self.inner.get_range(name, range.clone()).await;
        if self.lies.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_err() {
            return truth;
        }
        match self.lie {
            Lie::Honest => truth,
            Lie::Zeros => Ok(vec![0; truth?.len()].into()),
            Lie::Flip(at) if range.contains(&at) => {
                let mut bytes = truth?.to_vec();
                bytes[(at - range.start) as usize] ^= 0x40;
                Ok(bytes.into())
            }
            Lie::Flip(_) => truth,
            Lie::Short => truth.map(|bytes| bytes.slice(..bytes.len() - 1)),
            Lie::Empty => Ok(Bytes::new()),
            Lie::Down => {
                let source = Arc::new(std::io::Error::other("no route"));
                Err(BlockStoreError::Unavailable { object: name.to_string(), retryable: true, source })
            }
        }
    }
}

impl BlockStore for Liar {
    fn label(&self) -> Cow<'_, str> {
        self.label.into()
    }

    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.inner.put(name, bytes)
    }

    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.inner.mend(name, bytes)
    }

    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.answer(name, range).boxed()
    }

    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        async move { self.answer(name, 0..self.inner.size(name).await?).await }.boxed()
    }

    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        async move {
            self.opened().await;
            self.inner.size(name).await
        }
        .boxed()
    }

    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.inner.delete(name)
    }

    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.inner.list(writer).boxed()
    }
}

const CELL: usize = 64 << 10;

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// A pack of one large piece that does not compress: cell n lies at n * 64 KiB, plain and stored.
fn large(cells: usize) -> (SealedPack, Vec<u8>) {
    let plain = noise(cells * CELL);
    let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(9), 1));
    builder.add(&plain).unwrap();
    (builder.finish().unwrap(), plain)
}

fn fetcher(sources: &[&Arc<Liar>], disk: Option<&Arc<DiskCache>>) -> PackFetcher {
    let sources = sources.iter().map(|&store| Arc::clone(store) as Arc<dyn BlockStore>).collect();
    PackFetcher::new(sources, CellCache::new(16 << 20), disk.map(Arc::clone))
}

#[tokio::test]
async fn a_read_fetches_the_footer_once_and_each_cell_once() {
    let (pack, plain) = large(10);
    let (store, meta) = (Liar::with(Lie::Honest, 0, &pack).await, pack.meta());
    let fetcher = fetcher(&[&store], None);
    assert_eq!(fetcher.try_cached(&meta, 0..10), None);
    assert_eq!(fetcher.read(&meta, 70_000..200_000).await.unwrap(), plain[70_000..200_000]);
    assert_eq!(store.gets(), 2, "the footer, and cells 1 to 3 at once");
    assert_eq!(fetcher.try_cached(&meta, 70_000..200_000).unwrap(), plain[70_000..200_000]);
    assert_eq!(fetcher.read(&meta, 65_536..65_537).await.unwrap(), plain[65_536..65_537]);
    assert_eq!(store.gets(), 2);
    assert_eq!(fetcher.read(&meta, 0..plain.len() as u64).await.unwrap(), plain);
    assert_eq!(store.gets(), 4, "cell 0, and cells 4 to 9");
    assert_eq!(fetcher.stats().cell_misses, 10);
    assert_eq!(fetcher.read(&meta, 5..5).await.unwrap(), "");
}

#[tokio::test]
async fn a_small_pack_is_fetched_whole() {
    let (pack, plain) = large(3);
    let (store, meta) = (Liar::with(Lie::Honest, 0, &pack).await, pack.meta());
    let fetcher = fetcher(&[&store], None);
    assert_eq!(fetcher.read(&meta, 0..1).await.unwrap(), plain[..1]);
    assert_eq!(fetcher.read(&meta, 0..3 * CELL as u64).await.unwrap(), plain);
    assert_eq!(store.gets(), 1);
}

#[tokio::test]
async fn a_pack_of_many_small_files_comes_with_the_first_of_them() {
    let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(9), 1));
    let bytes = noise(500_000);
    let files: Vec<_> = bytes.chunks(5000).map(|file| (builder.add(file).unwrap().as_u64(), file)).collect();
    let pack = builder.finish().unwrap();
    let store = Liar::with(Lie::Honest, 0, &pack).await;
    let fetcher = fetcher(&[&store], None);
    for (at, file) in files {
        assert_eq!(fetcher.read(&pack.meta(), at..at + 5000).await.unwrap(), file);
    }
    assert_eq!(store.gets(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_reads_of_the_same_cells_cost_one_get() {
    let (pack, plain) = large(10);
    let (store, meta) = (Liar::with(Lie::Honest, 0, &pack).await, pack.meta());
    store.open.store(false, Ordering::SeqCst);
    let fetcher = fetcher(&[&store], None);
    let start = |range: Range<u64>| {
        let fetcher = fetcher.clone();
        tokio::spawn(async move { fetcher.read(&meta, range).await })
    };
    let first = start(0..4 * CELL as u64);
    while store.gets() == 0 {
        tokio::task::yield_now().await;
    }
    let readers: Vec<_> = (0..50).map(|n| start(n * 1000..3 * CELL as u64)).collect();
    first.abort();
    store.open.store(true, Ordering::SeqCst);
    for (n, reader) in readers.into_iter().enumerate() {
        assert_eq!(reader.await.unwrap().unwrap(), plain[n * 1000..3 * CELL]);
    }
    // The first reader was sent away in the middle, so it may or may not have begun to fetch its cells.
    assert!((2..=3).contains(&store.gets()), "{}", store.gets());
    assert!(fetcher.shared.cells.is_empty() && fetcher.shared.footers.is_empty());
}

#[tokio::test]
async fn bytes_that_are_not_in_the_pack_are_refused_without_asking_the_store() {
    let (pack, plain) = large(1);
    let (store, meta) = (Liar::with(Lie::Honest, 0, &pack).await, pack.meta());
    let fetcher = fetcher(&[&store], None);
    let len = plain.len() as u64;
    #[expect(clippy::reversed_empty_ranges, reason = "a damaged extent can say so")]
    for range in [0..len + 1, len + 1..len + 2, 2..1, 0..u64::MAX] {
        let error = fetcher.read(&meta, range.clone()).await.unwrap_err();
        assert!(matches!(error, ReadError::OutOfRange { .. }), "{error}");
        assert_eq!(fetcher.try_cached(&meta, range), None);
    }
    let hostile = PackMeta { plain_len: u64::MAX, stored_len: u64::MAX, ..meta };
    assert!(matches!(fetcher.read(&hostile, 0..u64::MAX).await, Err(ReadError::OutOfRange { .. })));
    assert_eq!(store.gets(), 0);
}

/// A store that answers 200 with something else must never reach an application.
#[tokio::test]
async fn a_store_that_lies_is_refused_and_the_pack_named() {
    for cells in [1, 10] {
        let (pack, _) = large(cells);
        for lie in [Lie::Zeros, Lie::Short, Lie::Empty] {
            let store = Liar::with(lie, u64::MAX, &pack).await;
            let error = fetcher(&[&store], None).read(&pack.meta(), 0..100).await.unwrap_err();
            assert!(
                matches!(error, ReadError::Damaged(error) if error.pack == pack.name),
                "{lie:?}: {error}"
            );
            assert_eq!(store.gets(), 2, "{lie:?}: asked once more");
        }
        // The footer is intact, the cell is not.
        let store = Liar::with(Lie::Flip(17), u64::MAX, &pack).await;
        let error = fetcher(&[&store], None).read(&pack.meta(), 0..100).await.unwrap_err();
        assert_eq!(error.to_string(), "pack 0000000000000009-1: cell 0: its stored bytes have another hash");
        assert_eq!(store.gets(), 3);
    }
}

#[tokio::test]
async fn a_lie_told_once_is_made_good_by_asking_again() {
    let (pack, plain) = large(10);
    for lie in [Lie::Zeros, Lie::Short, Lie::Empty] {
        for lies_from in 0..2 {
            let store = Liar::with(lie, 1, &pack).await;
            let fetcher = fetcher(&[&store], None);
            if lies_from == 1 {
                store.lies.store(0, Ordering::SeqCst);
                fetcher.read(&pack.meta(), 0..1).await.unwrap();
                store.lies.store(1, Ordering::SeqCst);
            }
            assert_eq!(fetcher.read(&pack.meta(), 70_000..300_000).await.unwrap(), plain[70_000..300_000]);
            assert_eq!(fetcher.stats().damaged, 1);
        }
    }
}

#[tokio::test]
async fn a_damaged_cell_does_not_hide_its_neighbours() {
    let (pack, plain) = large(10);
    let store = Liar::with(Lie::Flip(5 * CELL as u64), u64::MAX, &pack).await;
    let fetcher = fetcher(&[&store], None);
    let error = fetcher.read(&pack.meta(), 0..plain.len() as u64).await.unwrap_err();
    let fault = PackDamage::Cell { cell: 5, fault: crate::data::CellFault::StoredHash };
    assert!(matches!(error, ReadError::Damaged(error) if error.damage == fault), "{error}");
    let gets = store.gets();
    assert_eq!(fetcher.read(&pack.meta(), 0..5 * CELL as u64).await.unwrap(), plain[..5 * CELL]);
    assert_eq!(
        fetcher.read(&pack.meta(), 6 * CELL as u64..plain.len() as u64).await.unwrap(),
        plain[6 * CELL..]
    );
    assert_eq!(store.gets(), gets, "the good cells of the failed read were kept");
}

#[tokio::test]
async fn each_cell_comes_from_the_first_source_that_has_it_intact() {
    let (pack, plain) = large(10);
    let all = 0..plain.len() as u64;
    let meta = pack.meta();
    let one = Liar::with(Lie::Flip(1), u64::MAX, &pack).await;
    let other = Liar::with(Lie::Flip(8 * CELL as u64), u64::MAX, &pack).await;
    let reader = fetcher(&[&one, &other], None);
    assert_eq!(reader.read(&meta, all.clone()).await.unwrap(), plain);

    let (empty, down, honest) = (Liar::new(Lie::Honest, 0), Liar::new(Lie::Down, u64::MAX), &one);
    honest.lies.store(0, Ordering::SeqCst);
    let reader = fetcher(&[&empty, &down, honest], None);
    assert_eq!(reader.read(&meta, all.clone()).await.unwrap(), plain);
    assert_eq!((empty.gets(), down.gets()), (2, 2), "asked once for the footer and once for the cells");

    let error = fetcher(&[&empty], None).read(&meta, all.clone()).await.unwrap_err();
    assert_eq!(error.to_string(), "pack 0000000000000009-1 is in none of: liar");
    // A source may stand for several stores.
    let honest = Liar::with(Lie::Honest, 0, &pack).await;
    let stores = Arc::new(BlockStores::new(other.clone(), vec![down.clone(), honest.clone()]));
    let reader = PackFetcher::new(vec![stores], CellCache::new(16 << 20), None);
    assert_eq!(
        reader.read(&meta, all.clone()).await.unwrap(),
        plain,
        "one store's damage hides another's pack"
    );
    assert_eq!(honest.gets(), 1, "only the damaged cell is asked for");
    // As long as one source could not be asked, nobody knows that the pack is lost.
    let error = fetcher(&[&down, &empty], None).read(&meta, all.clone()).await.unwrap_err();
    assert!(matches!(error, ReadError::Store { .. }), "{error}");
    let error = fetcher(&[], None).read(&meta, all).await.unwrap_err();
    assert!(matches!(error, ReadError::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn an_error_is_not_remembered() {
    let (pack, plain) = large(10);
    let store = Liar::with(Lie::Down, 1, &pack).await;
    let fetcher = fetcher(&[&store], None);
    assert!(fetcher.read(&pack.meta(), 0..10).await.is_err());
    assert_eq!(fetcher.read(&pack.meta(), 0..10).await.unwrap(), plain[..10]);
}

#[tokio::test]
async fn a_footer_of_another_description_of_the_pack_is_not_used() {
    let (pack, _) = large(2);
    let store = Liar::with(Lie::Honest, 0, &pack).await;
    let fetcher = fetcher(&[&store], None);
    fetcher.read(&pack.meta(), 0..10).await.unwrap();
    let wrong = PackMeta { footer_digest: crate::data::FooterDigest::from_bytes([1; 32]), ..pack.meta() };
    assert_eq!(fetcher.try_cached(&wrong, 0..10), None);
    assert!(matches!(fetcher.read(&wrong, 0..10).await, Err(ReadError::Damaged(_))));
}

/// Waits for what is written in the background.
async fn settled(cache: &DiskCache, bytes: u64) {
    for _ in 0..PATIENCE.as_millis() {
        if cache.bytes() >= bytes {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{} of {bytes} bytes were cached within {PATIENCE:?}", cache.bytes());
}

#[tokio::test]
async fn the_disk_cache_answers_when_memory_is_cold_and_the_store_is_gone() {
    let (pack, plain) = large(10);
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(DiskCache::open(folder.path().to_owned(), 10 << 20).unwrap());
    let store = Liar::with(Lie::Honest, 0, &pack).await;
    fetcher(&[&store], Some(&disk)).read(&pack.meta(), 0..4 * CELL as u64).await.unwrap();
    settled(&disk, 4 * CELL as u64 + 1).await;
    let cold = fetcher(&[], Some(&disk));
    assert_eq!(cold.read(&pack.meta(), 70_000..200_000).await.unwrap(), plain[70_000..200_000]);
    assert_eq!(cold.stats().disk_hits, 2);
}

#[tokio::test]
async fn a_damaged_cache_file_is_discarded_and_fetched_again() {
    let (pack, plain) = large(10);
    let folder = tempfile::tempdir().unwrap();
    let open = || Arc::new(DiskCache::open(folder.path().to_owned(), 10 << 20).unwrap());
    let disk = open();
    let store = Liar::with(Lie::Honest, 0, &pack).await;
    fetcher(&[&store], Some(&disk)).read(&pack.meta(), 0..4 * CELL as u64).await.unwrap();
    settled(&disk, 4 * CELL as u64 + 1).await;
    let files = std::fs::read_dir(folder.path())
        .unwrap()
        .flat_map(|entry| std::fs::read_dir(entry.unwrap().path()).unwrap());
    for file in files {
        let path = file.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() - 20;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let gets = store.gets();
    let again = fetcher(&[&store], Some(&disk));
    assert_eq!(again.read(&pack.meta(), 0..4 * CELL as u64).await.unwrap(), plain[..4 * CELL]);
    assert_eq!((store.gets(), again.stats().damaged), (gets + 2, 2));
    // The damage was in cell 3; the others of the run were good and were not asked for again.
    settled(&disk, CELL as u64 + 1).await;
    let healed = fetcher(&[], Some(&open()));
    let cell = 3 * CELL..4 * CELL;
    assert_eq!(healed.read(&pack.meta(), cell.start as u64..cell.end as u64).await.unwrap(), plain[cell]);
}

#[tokio::test]
async fn reading_ahead_fills_the_cache_and_knows_its_limit() {
    let (pack, plain) = large(10);
    let (store, meta) = (Liar::with(Lie::Honest, 0, &pack).await, pack.meta());
    let fetcher = fetcher(&[&store], None);
    store.open.store(false, Ordering::SeqCst);
    let started =
        (0..100).filter(|_| fetcher.prefetch(&Handle::current(), &meta, 0..100_000, 100_000)).count();
    assert_eq!(started, PREFETCHES_MAX);
    store.open.store(true, Ordering::SeqCst);
    while fetcher.try_cached(&meta, 0..100_000).is_none() {
        tokio::task::yield_now().await;
    }
    assert_eq!(fetcher.try_cached(&meta, 0..100_000).unwrap(), plain[..100_000]);
    assert_eq!(store.gets(), 2);
    assert!(!fetcher.prefetch(&Handle::current(), &meta, 0..u64::MAX, u64::MAX));
}

#[test]
fn consecutive_cells_are_one_run() {
    assert_eq!(runs(&[]), []);
    assert_eq!(runs(&[3, 5]), [3..4, 5..6]);
    assert_eq!(runs(&[0, 1, 2, 5, 6, 9]), [0..3, 5..7, 9..10]);
}

/// How long anything that happens within moments may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
