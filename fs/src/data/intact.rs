//! Whole packs, for those who pass them on: from the first store that has them intact.
//!
//! Invariants:
//! - No byte is handed out before the footer and every cell were verified, once for each object that was read, on a thread of its own.
//! - Damage in one store does not hide what another one has intact. Only if none has, that is said, with the pack and the stores.
//! - One object is in memory at a time.
//! - What is replaced was read twice and is no whole pack of its name, and the bytes that replace it are.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    name::PackName,
    pack::{PackDamage, PackError, PackMeta, PackReader},
    store::{BlockStore, BlockStoreError, Refusal},
};

/// The object of the pack that the log knows as `meta`, from the first store behind `from` that has it intact. Must run on a tokio runtime.
pub async fn read_intact(from: &dyn BlockStore, meta: &PackMeta) -> Result<Bytes, IntactError> {
    let meta = *meta;
    let check = move |bytes| PackReader::open(&meta, bytes)?.verify();
    first_intact(from, meta.name, check).await
}

/// The same for somebody else, who will compare the pack with the log: here it is known by its name only, and taken at its own word.
pub async fn lend_intact(from: &dyn BlockStore, name: PackName) -> Result<Bytes, IntactError> {
    let check = move |bytes| PackReader::open_by_name(name, bytes)?.verify();
    first_intact(from, name, check).await
}

/// Looks for the pack that the log knows as `meta` in a store that answers itself: whoever hears that it is intact there need not put it
/// again. The object is read whole. Must run on a tokio runtime.
pub async fn look_for_pack(store: &dyn BlockStore, meta: &PackMeta) -> Result<HeldPack, BlockStoreError> {
    let held = match store.size(meta.name).await {
        // What can be read need not be durable; what has been asked for its size is.
        Ok(_) => read_intact(store, meta).await,
        Err(error) => Err(error.into()),
    };
    match held {
        Ok(_) => Ok(HeldPack::Intact),
        Err(IntactError::Damaged { source, .. }) => Ok(HeldPack::Damaged(source)),
        Err(IntactError::Store(BlockStoreError::NotFound { .. })) => Ok(HeldPack::Nothing),
        Err(IntactError::Store(error)) => Err(error),
    }
}

/// What a store has under the name of a pack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HeldPack {
    /// The pack, durably: its footer and every cell were read.
    Intact,
    /// Something that is not that pack, and why.
    Damaged(PackError),
    /// Nothing.
    Nothing,
}

/// Puts a pack that was verified into a store that answers itself. What is damaged there under its name is replaced; another whole pack
/// is not, and the put refused as [`BlockStore::put`] does. Must run on a tokio runtime.
pub async fn put_intact(to: &dyn BlockStore, name: PackName, bytes: Bytes) -> Result<(), BlockStoreError> {
    let refused = match to.put(name, bytes.clone()).await {
        Err(error @ BlockStoreError::Refused { refusal: Refusal::OtherContent, .. }) => error,
        put => return put,
    };
    let check = move |bytes| PackReader::open_by_name(name, bytes)?.verify();
    let mut damage = None;
    for _ in 0..ATTEMPTS {
        match read(to, name, check).await {
            // Somebody else has mended it meanwhile: putting the same again makes sure of it.
            Ok(found) if found == bytes => return to.put(name, bytes).await,
            Ok(_) => return Err(refused),
            Err(IntactError::Damaged { source, .. }) if may_be_whole(source.damage) => return Err(refused),
            Err(IntactError::Damaged { source, .. }) => damage = Some(source),
            Err(IntactError::Store(BlockStoreError::NotFound { .. })) => return to.put(name, bytes).await,
            Err(IntactError::Store(error)) => return Err(error),
        }
    }
    if let Some(error) = damage {
        tracing::warn!(store = %to.label(), %error, "a damaged pack is replaced by an intact one");
    }
    to.mend(name, bytes).await
}

/// Whether what does not verify may be of use to somebody: it has the whole footer of another pack, or a later version may read it.
fn may_be_whole(damage: PackDamage) -> bool {
    matches!(
        damage,
        PackDamage::Version { .. } | PackDamage::Cipher { .. } | PackDamage::FooterField { field: "name" }
    )
}

async fn first_intact<C>(from: &dyn BlockStore, name: PackName, check: C) -> Result<Bytes, IntactError>
where
    C: Fn(Bytes) -> Result<(), PackError> + Copy + Send + 'static,
{
    let behind = from.stores();
    let mut stores: Vec<&dyn BlockStore> = behind.iter().map(|store| &**store).collect();
    if stores.is_empty() {
        stores.push(from);
    }
    let mut failures = Failures::default();
    for store in stores {
        for _ in 0..ATTEMPTS {
            match read(store, name, check).await {
                Ok(bytes) => return Ok(bytes),
                // A flipped bit may have come from the way, not from the store.
                Err(IntactError::Damaged { source, .. }) => failures.damaged(store, source),
                Err(IntactError::Store(error)) => {
                    failures.failed(error);
                    break;
                }
            }
        }
    }
    Err(failures.conclude(from, name))
}

async fn read<C>(store: &dyn BlockStore, name: PackName, check: C) -> Result<Bytes, IntactError>
where
    C: Fn(Bytes) -> Result<(), PackError> + Send + 'static,
{
    let damaged = |source| IntactError::Damaged { stores: store.label().into_owned(), source };
    let bytes = match store.get(name).await {
        Ok(bytes) => bytes,
        Err(BlockStoreError::Damaged { expected, found, .. }) => {
            let damage = PackDamage::Length { expected, found };
            return Err(damaged(PackError { pack: name, damage }));
        }
        Err(error) => return Err(error.into()),
    };
    let checked = bytes.clone();
    murphy_log::aside(move || check(checked)).await.map_err(damaged)?;
    Ok(bytes)
}

/// What went wrong so far.
#[derive(Default)]
struct Failures {
    /// The stores that have it damaged, and what is wrong in the first.
    damage: Option<(Vec<String>, PackError)>,
    /// The first that may have it and did not give it.
    failed: Option<BlockStoreError>,
}

impl Failures {
    fn damaged(&mut self, store: &dyn BlockStore, source: PackError) {
        let label = store.label();
        let (stores, _) = self.damage.get_or_insert_with(|| (Vec::new(), source));
        if stores.iter().all(|known| *known != label) {
            tracing::warn!(store = %label, error = %source, "a store has a damaged pack");
            stores.push(label.into_owned());
        }
    }

    fn failed(&mut self, error: BlockStoreError) {
        if !matches!(error, BlockStoreError::NotFound { .. }) {
            self.failed.get_or_insert(error);
        }
    }

    /// The failure that leaves most hope.
    fn conclude(self, from: &dyn BlockStore, name: PackName) -> IntactError {
        match (self.failed, self.damage) {
            (Some(error), _) => error.into(),
            (None, Some((stores, source))) => IntactError::Damaged { stores: stores.join(" and "), source },
            (None, None) => {
                let object = format!("pack {name} in {}", from.label());
                BlockStoreError::NotFound { object }.into()
            }
        }
    }
}

/// Why no intact pack was read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IntactError {
    /// All stores were asked; some have it, none intact.
    #[error("{source}, in {stores}")]
    Damaged {
        /// The labels of those that have it.
        stores: String,
        /// What is wrong in the first of them.
        source: PackError,
    },
    /// No store has it, or one that may have it did not give it.
    #[error(transparent)]
    Store(#[from] BlockStoreError),
}

/// The stores behind each of `stores`, or itself, in order.
pub(super) fn flattened<'a>(
    stores: impl IntoIterator<Item = &'a Arc<dyn BlockStore>>,
) -> Vec<Arc<dyn BlockStore>> {
    let behind = |store: &'a Arc<dyn BlockStore>| match store.stores() {
        stores if stores.is_empty() => vec![Arc::clone(store)],
        stores => stores,
    };
    stores.into_iter().flat_map(behind).collect()
}

/// Each store is asked so often for a pack that it has and that turns out to be damaged.
const ATTEMPTS: usize = 2;

#[cfg(test)]
mod tests {
    use std::{borrow::Cow, sync::Mutex, task::Poll};

    use object_store::{memory::InMemory, path::Path};

    use super::*;
    use crate::{
        BlockStores, ObjectBlockStore, SealedPack,
        data::{name::WriterId, pack::PackBuilder},
    };

    fn pack(number: u64) -> SealedPack {
        let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(9), number));
        builder.add(&vec![number as u8; 100_000]).unwrap();
        builder.add(b"and a little more").unwrap();
        builder.finish().unwrap()
    }

    /// A store that has `bytes` under the name of `pack`.
    async fn store(label: &str, pack: &SealedPack, bytes: Option<Bytes>) -> Arc<dyn BlockStore> {
        let store = ObjectBlockStore::new(Arc::new(InMemory::new()), Path::default(), label.to_owned());
        if let Some(bytes) = bytes {
            store.put(pack.name, bytes).await.unwrap();
        }
        Arc::new(store)
    }

    fn flipped(pack: &SealedPack, at: usize) -> Option<Bytes> {
        let mut bytes = pack.bytes.to_vec();
        bytes[at] ^= 0x10;
        Some(bytes.into())
    }

    async fn both(from: &dyn BlockStore, pack: &SealedPack) -> [Result<Bytes, IntactError>; 2] {
        [read_intact(from, &pack.meta()).await, lend_intact(from, pack.name).await]
    }

    /// The fear: of several stores the first has rotten bytes, those who ask get them for ever, and the good ones in the next store are of no use.
    #[tokio::test]
    async fn whatever_is_damaged_in_one_store_is_taken_from_the_next_that_has_it_intact() {
        let (wanted, other) = (pack(1), pack(2));
        let last = wanted.bytes.len() - 1;
        let cut = wanted.bytes.slice(..last);
        let longer: Bytes = [&wanted.bytes[..], b"x"].concat().into();
        let copies = (0..=last).step_by(7).map(|at| flipped(&wanted, at)).chain([
            None,
            Some(cut),
            Some(longer),
            Some(Bytes::new()),
            Some(other.bytes.clone()),
            Some(vec![0; crate::MAX_PACK_STORED + 1].into()),
        ]);
        let intact = store("file:///good", &wanted, Some(wanted.bytes.clone())).await;
        for copy in copies {
            let bad = store("file:///bad", &wanted, copy.clone()).await;
            // Also through stores that stand for others themselves.
            let inner = Arc::new(BlockStores::new(bad.clone(), vec![bad, Arc::clone(&intact)]));
            let from = BlockStores::new(inner, Vec::new());
            for read in both(&from, &wanted).await {
                assert_eq!(read.unwrap(), wanted.bytes, "{copy:?}");
            }
        }
    }

    #[tokio::test]
    async fn that_nobody_has_it_intact_names_the_pack_and_the_stores() {
        let wanted = pack(1);
        let last = wanted.bytes.len() - 1;
        let (one, two) = (
            store("s3://one", &wanted, flipped(&wanted, 5)).await,
            store("s3://two", &wanted, flipped(&wanted, last)).await,
        );
        let empty = store("s3://three", &wanted, None).await;
        let from = BlockStores::new(Arc::clone(&one), vec![two, Arc::clone(&empty)]);
        for refused in both(&from, &wanted).await {
            let text = refused.unwrap_err().to_string();
            assert!(text.starts_with(&format!("pack {}: cell 0", wanted.name)), "{text}");
            assert!(text.ends_with("in s3://one and s3://two"), "{text}");
        }
        for refused in both(&*empty, &wanted).await {
            assert!(
                matches!(refused, Err(IntactError::Store(BlockStoreError::NotFound { .. }))),
                "{refused:?}"
            );
        }
        // As long as one could not be asked nobody knows that it is lost.
        let from = BlockStores::new(one, vec![Arc::new(Down)]);
        for refused in both(&from, &wanted).await {
            assert!(
                matches!(refused, Err(IntactError::Store(BlockStoreError::Unavailable { .. }))),
                "{refused:?}"
            );
        }
    }

    /// The fear: rotten bytes under a name keep the good ones from ever getting there, or whole ones are overwritten.
    #[tokio::test]
    async fn what_is_damaged_is_replaced_and_another_whole_pack_is_not() {
        let (wanted, last) = (pack(1), pack(1).bytes.len() - 1);
        let damaged = [flipped(&wanted, 9), flipped(&wanted, last), Some(wanted.bytes.slice(..last)), None];
        for copy in damaged.into_iter().chain([Some(wanted.bytes.clone())]) {
            let store = store("file:///bad", &wanted, copy).await;
            put_intact(&*store, wanted.name, wanted.bytes.clone()).await.unwrap();
            assert_eq!(store.get(wanted.name).await.unwrap(), wanted.bytes);
        }
        let mut builder = PackBuilder::new(wanted.name);
        builder.add(b"written by another process under the same name").unwrap();
        let other = builder.finish().unwrap();
        let mut later = wanted.bytes.to_vec();
        let version = later.len() - 24;
        later[version] = 1;
        // Of two objects that a store has mixed up each may be the only one.
        for whole in [other.bytes, later.into(), pack(2).bytes] {
            let store = store("file:///other", &wanted, Some(whole.clone())).await;
            let refused = put_intact(&*store, wanted.name, wanted.bytes.clone()).await;
            let is_refused =
                matches!(refused, Err(BlockStoreError::Refused { refusal: Refusal::OtherContent, .. }));
            assert!(is_refused, "{refused:?}");
            assert_eq!(store.get(wanted.name).await.unwrap(), whole);
        }
    }

    /// The fear: of two who mend one object at once the second takes the right bytes of the first for another pack, and stops for good; or one of
    /// them puts back what the other one has put right. Here each of their requests comes at any place among those of the other one.
    #[tokio::test]
    async fn two_that_mend_the_same_object_at_once_both_succeed_in_every_order() {
        let (wanted, last) = (pack(1), pack(1).bytes.len() - 1);
        for damage in [flipped(&wanted, 9), Some(wanted.bytes.slice(..last))] {
            // Each makes at most four: a put that is refused, two gets, and the replacing.
            for order in (0..1_u32 << 8).filter(|order| order.count_ones() == 4) {
                let below = store("file:///bad", &wanted, damage.clone()).await;
                let turns =
                    Arc::new(Turns { order: (0..8).map(|at| order >> at & 1).collect(), ..Turns::default() });
                let mend = async |own| {
                    let store = Contended { below: Arc::clone(&below), turns: Arc::clone(&turns), own };
                    let put = put_intact(&store, wanted.name, wanted.bytes.clone()).await;
                    turns.end(own);
                    put
                };
                let (one, other) = tokio::join!(mend(0), mend(1));
                assert!(one.is_ok() && other.is_ok(), "{order:08b}: {one:?}, {other:?}");
                assert_eq!(below.get(wanted.name).await.unwrap(), wanted.bytes, "{order:08b}");
            }
        }
    }

    /// The fear: while somebody looks at a damaged object, a whole one of other content comes under its name, and is overwritten.
    #[tokio::test]
    async fn another_whole_pack_that_comes_while_somebody_mends_is_kept() {
        let wanted = pack(1);
        let mut builder = PackBuilder::new(wanted.name);
        builder.add(b"written by another process under the same name").unwrap();
        let other = builder.finish().unwrap();
        // Before any request but the last one, which replaces.
        for requests in 0..=ATTEMPTS {
            let below = store("file:///bad", &wanted, flipped(&wanted, 9)).await;
            let order = [vec![0; requests], vec![1]].concat();
            let turns = Arc::new(Turns { order, ..Turns::default() });
            let contended = |own| Contended { below: Arc::clone(&below), turns: Arc::clone(&turns), own };
            let (one, two) = (contended(0), contended(1));
            let comes = async {
                let came = two.mend(wanted.name, other.bytes.clone()).await;
                turns.end(1);
                came
            };
            let (refused, came) = tokio::join!(put_intact(&one, wanted.name, wanted.bytes.clone()), comes);
            came.unwrap();
            let is_refused =
                matches!(refused, Err(BlockStoreError::Refused { refusal: Refusal::OtherContent, .. }));
            assert!(is_refused, "{requests}: {refused:?}");
            assert_eq!(below.get(wanted.name).await.unwrap(), other.bytes, "{requests}");
        }
    }

    /// Whose request is next, of two.
    #[derive(Debug, Default)]
    struct Turns {
        order: Vec<u32>,
        /// The next place in the order, and who makes no more requests.
        progress: Mutex<(usize, [bool; 2])>,
    }

    impl Turns {
        /// Returns when the next request is `own`'s. Behind the end of the order everybody's is.
        async fn take(&self, own: u32) {
            std::future::poll_fn(|context| {
                let (at, ended) = &mut *self.progress.lock().unwrap();
                while let Some(next) = self.order.get(*at).filter(|next| ended[**next as usize]) {
                    assert_ne!(*next, own, "it has ended");
                    *at += 1;
                }
                if self.order.get(*at).is_none_or(|next| *next == own) {
                    *at += 1;
                    return Poll::Ready(());
                }
                context.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
        }

        fn end(&self, own: u32) {
            self.progress.lock().unwrap().1[own as usize] = true;
        }
    }

    /// A store in which the requests of two come in a given order, each at one moment.
    #[derive(Debug)]
    struct Contended {
        below: Arc<dyn BlockStore>,
        turns: Arc<Turns>,
        own: u32,
    }

    impl Contended {
        fn at_its_turn<'a, T: Send + 'a>(
            &'a self,
            request: futures::future::BoxFuture<'a, Result<T, BlockStoreError>>,
        ) -> futures::future::BoxFuture<'a, Result<T, BlockStoreError>> {
            Box::pin(async move {
                self.turns.take(self.own).await;
                request.await
            })
        }
    }

    impl BlockStore for Contended {
        fn label(&self) -> Cow<'_, str> {
            self.below.label()
        }

        fn put(
            &self,
            name: PackName,
            bytes: Bytes,
        ) -> futures::future::BoxFuture<'_, Result<(), BlockStoreError>> {
            self.at_its_turn(self.below.put(name, bytes))
        }

        fn mend(
            &self,
            name: PackName,
            bytes: Bytes,
        ) -> futures::future::BoxFuture<'_, Result<(), BlockStoreError>> {
            self.at_its_turn(self.below.mend(name, bytes))
        }

        fn get_range(
            &self,
            name: PackName,
            range: std::ops::Range<u64>,
        ) -> futures::future::BoxFuture<'_, Result<Bytes, BlockStoreError>> {
            self.at_its_turn(self.below.get_range(name, range))
        }

        fn get(&self, name: PackName) -> futures::future::BoxFuture<'_, Result<Bytes, BlockStoreError>> {
            self.at_its_turn(self.below.get(name))
        }

        fn size(&self, name: PackName) -> futures::future::BoxFuture<'_, Result<u64, BlockStoreError>> {
            self.at_its_turn(self.below.size(name))
        }

        fn delete(&self, name: PackName) -> futures::future::BoxFuture<'_, Result<(), BlockStoreError>> {
            self.at_its_turn(self.below.delete(name))
        }

        fn list(
            &self,
            writer: Option<WriterId>,
        ) -> futures::stream::BoxStream<'_, Result<super::super::store::StoredPack, BlockStoreError>>
        {
            self.below.list(writer)
        }
    }

    /// A store that cannot be reached.
    #[derive(Debug)]
    struct Down;

    impl Down {
        fn refuse<T: Send + 'static>() -> futures::future::BoxFuture<'static, Result<T, BlockStoreError>> {
            let source = Arc::new(std::io::Error::other("no route"));
            let error = BlockStoreError::Unavailable { object: "all".to_owned(), retryable: true, source };
            Box::pin(std::future::ready(Err(error)))
        }
    }

    impl BlockStore for Down {
        fn label(&self) -> Cow<'_, str> {
            "down".into()
        }

        fn put(&self, _: PackName, _: Bytes) -> futures::future::BoxFuture<'_, Result<(), BlockStoreError>> {
            Down::refuse()
        }

        fn mend(&self, _: PackName, _: Bytes) -> futures::future::BoxFuture<'_, Result<(), BlockStoreError>> {
            Down::refuse()
        }

        fn get_range(
            &self,
            _: PackName,
            _: std::ops::Range<u64>,
        ) -> futures::future::BoxFuture<'_, Result<Bytes, BlockStoreError>> {
            Down::refuse()
        }

        fn get(&self, _: PackName) -> futures::future::BoxFuture<'_, Result<Bytes, BlockStoreError>> {
            Down::refuse()
        }

        fn size(&self, _: PackName) -> futures::future::BoxFuture<'_, Result<u64, BlockStoreError>> {
            Down::refuse()
        }

        fn delete(&self, _: PackName) -> futures::future::BoxFuture<'_, Result<(), BlockStoreError>> {
            Down::refuse()
        }

        fn list(
            &self,
            _: Option<WriterId>,
        ) -> futures::stream::BoxStream<'_, Result<super::super::store::StoredPack, BlockStoreError>>
        {
            Box::pin(futures::stream::empty())
        }
    }
}
