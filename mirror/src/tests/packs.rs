//! Packs over real QUIC on the loopback interface: who lends one verifies it, and takes it from whichever of its stores has it intact.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use murphy_fs::{
    BlockStore, BlockStores, CellCache, ObjectBlockStore, PackBuilder, PackFetcher, PackName, ReadError,
    SealedPack, WriterId,
};
use murphy_log::MemoryLog;

use super::{
    base_state, log_of, ms,
    quic::{Mirror, Node, follow},
    test_frames,
};
use crate::{PackFetchError, PackSource, RemotePacks, SourceStore, copier::copy_verified};

/// A pack of 2 MB that do not compress, in cells of 64 KiB.
pub(super) fn pack(number: u64) -> SealedPack {
    let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(7), number));
    builder.add(&plain(number)).unwrap();
    builder.finish().unwrap()
}

fn plain(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; 2_000_000];
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn flipped(pack: &SealedPack, at: usize) -> Bytes {
    let mut bytes = pack.bytes.to_vec();
    bytes[at] ^= 4;
    bytes.into()
}

async fn store(pack: &SealedPack, bytes: Option<Bytes>) -> Arc<dyn BlockStore> {
    let store = ObjectBlockStore::in_memory();
    if let Some(bytes) = bytes {
        store.put(pack.name, bytes).await.unwrap();
    }
    Arc::new(store)
}

/// A source with these stores, one behind the other, and a mirror that follows it.
async fn connected(
    own: Arc<dyn BlockStore>,
    others: Vec<Arc<dyn BlockStore>>,
) -> (Node, Mirror, RemotePacks) {
    let source = Node::start(Arc::default(), Some(Arc::new(BlockStores::new(own, others)))).await;
    let log: Arc<MemoryLog> = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 3, 3)));
    source.lead(&log, 1000);
    let mirror = follow(&source, Some(base_state()));
    let state = murphy_log::Log::tail(&*log);
    mirror.reach(state).await;
    let packs = mirror.packs();
    (source, mirror, packs)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_fetches_packs_from_its_source() {
    let pack = pack(1);
    let (source, mirror, packs) = connected(store(&pack, Some(pack.bytes.clone())).await, Vec::new()).await;
    assert_eq!(packs.read(pack.name, 0..0).await.unwrap(), pack.bytes);
    assert_eq!(packs.read(pack.name, 1000..1_001_000).await.unwrap(), pack.bytes.slice(1000..1_001_000));
    let missing = PackName::new(WriterId::from_u64(8), 1);
    assert_eq!(packs.read(missing, 0..0).await, Err(PackFetchError::Missing(missing)));
    mirror.stop().await;
    source.stop().await;
    assert_eq!(packs.read(pack.name, 0..0).await, Err(PackFetchError::NotConnected));
}

/// The fear: the first of the source's stores has rotten bytes, its mirrors get these for ever, and stay behind although the next store has
/// the good ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_gets_a_pack_that_the_first_store_of_its_source_has_damaged() {
    let (pack, other) = (pack(1), pack(2));
    let last = pack.bytes.len() - 1;
    for bad in [flipped(&pack, 1_000_000), flipped(&pack, last), pack.bytes.slice(..last), other.bytes] {
        let (first, next) = (store(&pack, Some(bad)).await, store(&pack, Some(pack.bytes.clone())).await);
        let (source, mirror, packs) = connected(first, vec![next]).await;
        let own = store(&pack, None).await;
        copy_verified(&pack.meta(), &packs as &dyn PackSource, &*own).await.unwrap();
        assert_eq!(own.get(pack.name).await.unwrap(), pack.bytes);
        mirror.stop().await;
        source.stop().await;
    }
}

/// A lender that has nothing intact says which pack, and sends no other bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_is_intact_nowhere_is_named_and_not_sent() {
    let pack = pack(1);
    let (first, next) =
        (store(&pack, Some(flipped(&pack, 5))).await, store(&pack, Some(flipped(&pack, 1_900_000))).await);
    let (source, mirror, packs) = connected(first, vec![next, store(&pack, None).await]).await;
    let Err(PackFetchError::Failed(why)) = packs.read(pack.name, 0..0).await else { panic!("it was lent") };
    assert!(why.contains(&format!("pack {}: cell 0", pack.name)), "{why}");
    mirror.stop().await;
    source.stop().await;
}

/// The fear: what is rotten in a mirror's own store, or in the first of its source's, is EIO at the mirror although another store has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_reads_what_its_own_store_and_the_first_of_its_source_have_damaged() {
    let (pack, plain) = (pack(1), plain(1));
    let footer = pack.bytes.len() - 100;
    for (own, first) in [
        (Some(5), None),
        (None, Some(5)),
        (Some(5), Some(70_000)),
        (Some(5), Some(footer)),
        (Some(footer), Some(5)),
    ] {
        let bad = |at: Option<usize>| Some(at.map_or_else(|| pack.bytes.clone(), |at| flipped(&pack, at)));
        let own_store = store(&pack, own.and_then(|at| bad(Some(at)))).await;
        let intact = store(&pack, Some(pack.bytes.clone())).await;
        let (source, mirror, packs) = connected(store(&pack, bad(first)).await, vec![intact]).await;
        let stores = [own_store].into_iter().chain(SourceStore::ways(&packs)).collect();
        let fetcher = PackFetcher::new(stores, CellCache::new(16 << 20), None);
        let read = fetcher.read(&pack.meta(), 0..plain.len() as u64).await;
        assert!(read.unwrap() == plain, "{own:?}, {first:?}");
        mirror.stop().await;
        source.stop().await;
        let fetcher = PackFetcher::new(SourceStore::ways(&packs).into(), CellCache::new(16 << 20), None);
        let refused = fetcher.read(&pack.meta(), 0..10).await;
        assert!(matches!(refused, Err(ReadError::Store { .. })), "it may still have it: {refused:?}");
    }
}

/// A mirror changes nothing at its source, whoever takes the way to it for a store of the mirror's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_is_only_read() {
    let (pack, other) = (pack(1), pack(2));
    let first = store(&pack, Some(pack.bytes.clone())).await;
    let (source, mirror, packs) = connected(Arc::clone(&first), Vec::new()).await;
    for way in SourceStore::ways(&packs) {
        assert!(way.put(other.name, other.bytes.clone()).await.is_err());
        assert!(way.delete(pack.name).await.is_err());
        assert!(way.list(None).next().await.is_none());
        assert_eq!(way.size(pack.name).await.unwrap(), pack.stored_len);
        assert_eq!(way.get(pack.name).await.unwrap(), pack.bytes);
        let beyond = way.get_range(pack.name, pack.stored_len - 1..pack.stored_len + 1).await;
        assert!(beyond.is_err(), "{beyond:?}");
    }
    assert_eq!(first.get(pack.name).await.unwrap(), pack.bytes);
    assert!(first.get(other.name).await.is_err());
    mirror.stop().await;
    source.stop().await;
}

/// The fear: more is asked for at once than may be in memory, and what waits is forgotten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_packs_that_are_asked_for_at_once_all_come() {
    let all: Vec<SealedPack> = (0..40).map(pack).collect();
    let first = store(&all[0], None).await;
    for pack in &all {
        first.put(pack.name, pack.bytes.clone()).await.unwrap();
    }
    let (source, mirror, packs) = connected(first, Vec::new()).await;
    let reads = all.iter().map(|pack| packs.read(pack.name, 0..0));
    let come = tokio::time::timeout(ms(60_000), futures::future::join_all(reads)).await.unwrap();
    for (pack, read) in all.iter().zip(come) {
        assert_eq!(read.unwrap(), pack.bytes, "{}", pack.name);
    }
    mirror.stop().await;
    source.stop().await;
}
