//! The copier against stores that fail, lag and lie.

use std::{
    borrow::Cow,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use futures::stream::BoxStream;
use murphy_fs::{
    ObjectBlockStore, PackBuilder, PackName, PackState, RowKey, SealedPack, StoredPack, Table, WriterId,
};
use murphy_log::{Appender, Change, Digest, Entry, LogTime, MemoryLog, SystemClock, Usage};

use super::*;
use crate::tests::{PATIENCE, base_state, extend, keys, ms, stays, until};

fn pack(sequence: u64) -> SealedPack {
    let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(3), sequence));
    builder.add(format!("content of {sequence} ").repeat(5000).as_bytes()).unwrap();
    builder.finish().unwrap()
}

/// A log in which every entry names one new pack, and a store that has them.
async fn source(count: u64) -> (Arc<MemoryLog>, Arc<dyn BlockStore>) {
    let (log, store) = (Arc::new(MemoryLog::new(base_state())), Arc::new(ObjectBlockStore::in_memory()));
    for sequence in 0..count {
        let pack = pack(sequence);
        store.put(pack.meta().name, pack.bytes.clone()).await.unwrap();
        name_pack(&log, &pack);
    }
    (log, store)
}

fn name_pack(log: &MemoryLog, pack: &SealedPack) {
    let from = log.tail();
    let mut appender = Appender::new(keys(), from.position.epoch, from);
    let mut entry = Entry::tick(from.position.lsn.next(), LogTime::from_nanos(from.position.lsn.get()));
    let key = RowKey::pack(entry.lsn.get()).key_bytes();
    entry.changes =
        vec![Change { table: Table::Pack.number(), key, value: Some(PackRow::of(pack).encode()) }];
    appender.push(&entry, Digest(1), Usage::default()).unwrap();
    extend(log, &[appender.close(LogTime::from_nanos(1), Lsn::ROOT).unwrap()]);
}

struct Test {
    copier: Arc<Copier>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<Result<(), CopyError>>,
    data: watch::Receiver<Lsn>,
}

fn start(
    log: &Arc<MemoryLog>,
    source: &Arc<dyn BlockStore>,
    own: &Arc<dyn BlockStore>,
    folder: &tempfile::TempDir,
) -> Test {
    let sender = watch::Sender::new(Lsn::new(0));
    let data = sender.subscribe();
    let copier = Arc::new(Copier {
        log: log.clone(),
        source: Arc::new(Arc::clone(source)),
        store: Arc::clone(own),
        cursor: CursorFile::new(folder.path().join("copier.cursor")),
        data: sender,
        clock: Arc::new(SystemClock::new()),
        helpers: 4,
    });
    let (stop, stopped) = watch::channel(false);
    let running = Arc::clone(&copier);
    let task = tokio::spawn(async move { running.run(stopped).await });
    Test { copier, stop, task, data }
}

impl Test {
    async fn reach(&mut self, lsn: Lsn) {
        let reached = self.data.wait_for(|data| *data >= lsn);
        let reached = tokio::time::timeout(PATIENCE, reached).await.is_ok();
        assert!(reached, "data position {}", *self.data.borrow());
    }

    async fn stop(self) {
        self.stop.send_replace(true);
        self.task.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn every_pack_that_the_log_names_arrives_and_a_restart_goes_on() {
    let (log, source) = source(40).await;
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    let mut test = start(&log, &source, &own, &folder);
    test.reach(Lsn::new(41)).await;
    for sequence in 0..40 {
        let pack = pack(sequence);
        assert_eq!(own.get(pack.meta().name).await.unwrap(), pack.bytes);
    }
    test.stop().await;
    let more = pack(100);
    source.put(more.meta().name, more.bytes.clone()).await.unwrap();
    name_pack(&log, &more);
    let mut test = start(&log, &source, &own, &folder);
    test.reach(Lsn::new(42)).await;
    assert_eq!(test.copier.cursor.load().unwrap().unwrap().lsn, Lsn::new(41), "it went on from the cursor");
    test.stop().await;
}

/// The fear: a promotion waits for ever for packs that nobody has, or goes on before those have come that somebody has.
#[tokio::test]
async fn what_comes_is_waited_for_and_what_does_not_come_is_not() {
    let (log, source) = source(5).await;
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    let copier = Copier {
        log: log.clone(),
        source: Arc::new(Arc::clone(&source)),
        store: own.clone(),
        cursor: CursorFile::new(folder.path().join("copier.cursor")),
        data: watch::Sender::new(Lsn::new(0)),
        clock: Arc::new(SystemClock::new()),
        helpers: 4,
    };
    assert!(copier.reach(Lsn::new(6), Duration::from_secs(30)).await.unwrap());
    own.get(pack(4).meta().name).await.unwrap();
    let nowhere = pack(50);
    name_pack(&log, &nowhere);
    assert!(!copier.reach(Lsn::new(7), ms(300)).await.unwrap());
    assert_eq!(
        (*copier.data.borrow(), copier.cursor.load().unwrap().unwrap().lsn),
        (Lsn::new(6), Lsn::new(6))
    );
    source.put(nowhere.meta().name, nowhere.bytes.clone()).await.unwrap();
    assert!(copier.reach(Lsn::new(7), Duration::from_secs(30)).await.unwrap());
}

/// The copy is worth its data position: it must not claim what is not there, nor what is damaged.
#[tokio::test]
async fn a_missing_or_damaged_pack_holds_the_data_position_until_it_comes() {
    let (log, source) = source(5).await;
    let late = pack(50);
    name_pack(&log, &late);
    let (bad, mut damaged) = (pack(51), pack(51).bytes.to_vec());
    damaged[10] ^= 1;
    source.put(bad.meta().name, damaged.into()).await.unwrap();
    name_pack(&log, &bad);
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    let mut test = start(&log, &source, &own, &folder);
    test.reach(Lsn::new(6)).await;
    stays("what is before the late pack", PAST_A_RETRY, || *test.data.borrow() == Lsn::new(6)).await;
    source.put(late.meta().name, late.bytes.clone()).await.unwrap();
    test.reach(Lsn::new(7)).await;
    stays("what is before the damaged pack", PAST_A_RETRY, || *test.data.borrow() == Lsn::new(7)).await;
    assert!(own.size(bad.meta().name).await.is_err(), "a damaged pack was stored");
    source.delete(bad.meta().name).await.unwrap();
    source.put(bad.meta().name, bad.bytes.clone()).await.unwrap();
    test.reach(Lsn::new(8)).await;
    test.stop().await;
}

/// The fear: one object that is cut short in the mirror's own store ends the copying of all packs, although the source has it whole.
#[tokio::test]
async fn a_pack_that_the_own_store_has_cut_short_is_replaced_and_holds_up_nothing() {
    let (log, source) = source(5).await;
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    let cut = pack(2);
    own.put(cut.name, cut.bytes.slice(..cut.bytes.len() - 5)).await.unwrap();
    let mut test = start(&log, &source, &own, &folder);
    test.reach(Lsn::new(6)).await;
    assert_eq!(own.get(cut.name).await.unwrap(), cut.bytes);
    test.stop().await;
}

#[tokio::test]
async fn a_cursor_of_another_history_is_not_believed() {
    let (log, source) = source(5).await;
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    let cursor = CursorFile::new(folder.path().join("copier.cursor"));
    cursor.save(Point { lsn: Lsn::new(4), hash: ChainHash::from_bytes([9; 32]) }).unwrap();
    let mut test = start(&log, &source, &own, &folder);
    test.reach(Lsn::new(6)).await;
    assert!(own.size(pack(0).meta().name).await.is_ok());
    test.stop().await;
    let path = folder.path().join("copier.cursor");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[9] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(matches!(cursor.load(), Err(CursorError::Damaged { .. })));
}

#[tokio::test]
async fn the_packs_of_a_base_are_copied_before_the_log_goes_on() {
    let (log, source) = source(10).await;
    log.trim(Lsn::new(6)).unwrap();
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    let test = start(&log, &source, &own, &folder);
    assert!(matches!(test.task.await.unwrap(), Err(CopyError::NoBase { .. })));
    let Lookup::End(base) = look_up(&*log, Lsn::new(7)).unwrap() else { panic!("no frame end") };
    let rows = (0..6).map(|sequence| Ok((PackNumber(sequence + 2), PackRow::of(&pack(sequence)))));
    test.copier.copy_base(rows, base).await.unwrap();
    assert_eq!(*test.data.borrow(), Lsn::new(7));
    let mut test = start(&log, &source, &own, &folder);
    test.reach(Lsn::new(11)).await;
    test.stop().await;
}

/// The fear: a mirror that joins after a promotion waits for ever for what nobody has, or says that it has it.
#[tokio::test]
async fn a_base_with_packs_that_nobody_has_is_copied_once_its_tree_says_so() {
    let (log, source) = source(4).await;
    let lost = pack(2);
    source.delete(lost.meta().name).await.unwrap();
    log.trim(Lsn::new(5)).unwrap();
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    let test = start(&log, &source, &own, &folder);
    let Lookup::End(base) = look_up(&*log, Lsn::new(5)).unwrap() else { panic!("no frame end") };
    let rows = |state| {
        (0..4).map(move |sequence| {
            let row = PackRow::of(&pack(sequence));
            let row = if sequence == 2 { PackRow { state, ..row } } else { row };
            Ok((PackNumber(sequence + 2), row))
        })
    };
    let lacks = test.copier.copy_base(rows(PackState::Here), base).await;
    assert_eq!(lacks, Err(CopyError::Lacks { packs: 1 }));
    assert_eq!(*test.data.borrow(), Lsn::new(0));
    for sequence in [0, 1, 3] {
        assert!(own.size(pack(sequence).meta().name).await.is_ok(), "the others are copied meanwhile");
    }
    test.copier.copy_base(rows(PackState::Missing), base).await.unwrap();
    assert_eq!(*test.data.borrow(), Lsn::new(5));
}

/// A source one of whose packs is where nobody answers.
struct Silent {
    store: Arc<dyn BlockStore>,
    pack: PackName,
}

impl PackSource for Silent {
    fn fetch(&self, pack: PackName) -> BoxFuture<'_, Result<Bytes, PackFetchError>> {
        if pack == self.pack {
            return async { Err(PackFetchError::Failed("an archive does not answer".to_owned())) }.boxed();
        }
        self.store.fetch(pack)
    }
}

/// The fear: the one archive that had a pack is gone for ever, its source calls the pack missing, and a mirror that began before that asks for
/// it for ever: it never has a data position, and never acknowledges.
#[tokio::test]
async fn a_base_with_a_pack_of_which_nobody_answers_is_copied_once_its_tree_says_so() {
    let (log, store) = source(3).await;
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    let copier = Copier {
        log: log.clone(),
        source: Arc::new(Silent { store, pack: pack(1).meta().name }),
        store: own.clone(),
        cursor: CursorFile::new(folder.path().join("copier.cursor")),
        data: watch::Sender::new(Lsn::new(0)),
        clock: Arc::new(SystemClock::new()),
        helpers: 4,
    };
    let position = log.tail().position;
    let base = Point { lsn: position.lsn, hash: position.hash };
    let rows = |state| {
        (0..3).map(move |sequence| {
            let row = PackRow::of(&pack(sequence));
            let row = if sequence == 1 { PackRow { state, ..row } } else { row };
            Ok((PackNumber(sequence + 2), row))
        })
    };
    let lacks = copier.copy_base(rows(PackState::Here), base).await;
    assert_eq!(lacks, Err(CopyError::Lacks { packs: 1 }));
    copier.copy_base(rows(PackState::Missing), base).await.unwrap();
    assert_eq!(*copier.data.borrow(), position.lsn);
}

/// The fear: another whole pack under a pack's name is overwritten, or taken for the pack; it never comes right by itself.
#[tokio::test]
async fn another_pack_under_the_name_of_a_pack_ends_copying_and_is_named() {
    let (log, source) = source(3).await;
    let name = pack(1).meta().name;
    let mut other = PackBuilder::new(name);
    other.add(b"longer than what the log means").unwrap();
    let other = other.finish().unwrap().bytes;
    let (own, folder): (Arc<dyn BlockStore>, _) =
        (Arc::new(ObjectBlockStore::in_memory()), tempfile::tempdir().unwrap());
    own.put(name, other.clone()).await.unwrap();
    let test = start(&log, &source, &own, &folder);
    let ended = test.task.await.unwrap().unwrap_err();
    assert_eq!(ended, CopyError::Pack { pack: name, error: PackCopyError::OtherContent });
    assert_eq!(own.get(name).await.unwrap(), other, "it is not touched");
}

/// A cursor that cannot be read or written ends the copier by name: without one, a restart would claim what it does not know.
#[tokio::test]
async fn a_cursor_that_cannot_be_read_or_saved_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copier.cursor");
    std::fs::create_dir(&path).unwrap();
    let cursor = CursorFile::new(path.clone());
    let error = cursor.load().unwrap_err();
    assert!(matches!(&error, CursorError::Io { path: named, .. } if *named == path), "{error}");
    let point = Point { lsn: Lsn::new(4), hash: ChainHash::from_bytes([9; 32]) };
    assert!(matches!(cursor.save(point), Err(CursorError::Io { .. })));
    let (log, source) = source(2).await;
    let test = start(&log, &source, &source, &folder);
    let ended = test.task.await.unwrap().unwrap_err().to_string();
    assert!(ended.contains("copier.cursor"), "{ended}");
}

/// The fear: one error that passes ends copying for good, and the node says nothing of it while fsync waits for its bytes.
#[tokio::test]
async fn copying_that_fails_is_told_and_goes_on_once_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("copier.cursor");
    std::fs::create_dir(&path).unwrap();
    let (log, source) = source(2).await;
    let own: Arc<dyn BlockStore> = Arc::new(ObjectBlockStore::in_memory());
    let Test { copier, mut data, task, .. } = start(&log, &source, &own, &folder);
    assert!(task.await.unwrap().is_err());
    let ((stop, stopped), (trouble, mut told)) = (watch::channel(false), watch::channel(None::<String>));
    let going = tokio::spawn(async move {
        copier.persist(|| copier.run(stopped.clone()).boxed(), stopped.clone(), &trouble).await;
    });
    let said = told.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert!(said.contains("copier.cursor"), "{said}");
    std::fs::remove_dir(&path).unwrap();
    data.wait_for(|data| *data == log.tail().position.lsn).await.unwrap();
    told.wait_for(Option::is_none).await.unwrap();
    stop.send_replace(true);
    going.await.unwrap();
}

/// A store that counts the packs that were read in it.
#[derive(Debug)]
struct Counted {
    below: ObjectBlockStore,
    reads: AtomicU64,
}

impl Counted {
    fn new() -> Arc<Counted> {
        Arc::new(Counted { below: ObjectBlockStore::in_memory(), reads: AtomicU64::new(0) })
    }

    fn reads(&self) -> u64 {
        self.reads.swap(0, Ordering::SeqCst)
    }
}

impl BlockStore for Counted {
    fn label(&self) -> Cow<'_, str> {
        self.below.label()
    }
    fn put(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.put(name, bytes)
    }
    fn mend(&self, name: PackName, bytes: Bytes) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.mend(name, bytes)
    }
    fn get_range(&self, name: PackName, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.below.get_range(name, range)
    }
    fn get(&self, name: PackName) -> BoxFuture<'_, Result<Bytes, BlockStoreError>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.below.get(name)
    }
    fn size(&self, name: PackName) -> BoxFuture<'_, Result<u64, BlockStoreError>> {
        self.below.size(name)
    }
    fn delete(&self, name: PackName) -> BoxFuture<'_, Result<(), BlockStoreError>> {
        self.below.delete(name)
    }
    fn list(&self, writer: Option<WriterId>) -> BoxStream<'_, Result<StoredPack, BlockStoreError>> {
        self.below.list(writer)
    }
}

fn rotten(pack: &SealedPack) -> Bytes {
    let mut bytes = pack.bytes.to_vec();
    bytes[7] ^= 0x20;
    bytes.into()
}

/// The fear: a mirror that joins over a store that was used before says that it holds bytes which have rotted there, and acknowledges them; the
/// source is lost, and nobody has them.
#[tokio::test]
async fn a_pack_that_somebody_else_put_is_read_before_it_counts() {
    let (log, source) = source(6).await;
    let (own, folder): (Arc<dyn BlockStore>, _) = (Counted::new(), tempfile::tempdir().unwrap());
    for sequence in 0..6 {
        own.put(pack(sequence).name, pack(sequence).bytes).await.unwrap();
    }
    let (mended, only) = (pack(1), pack(4));
    for bad in [&mended, &only] {
        own.mend(bad.name, rotten(bad)).await.unwrap();
    }
    source.delete(only.name).await.unwrap();
    let mut test = start(&log, &source, &own, &folder);
    test.reach(Lsn::new(5)).await;
    assert_eq!(own.get(mended.name).await.unwrap(), mended.bytes);
    stays("nobody has the next pack intact", PAST_A_RETRY, || *test.data.borrow() == Lsn::new(5)).await;
    source.put(only.name, only.bytes.clone()).await.unwrap();
    test.reach(Lsn::new(7)).await;
    assert_eq!(own.get(only.name).await.unwrap(), only.bytes);
    test.stop().await;
}

/// The same for the tree of a snapshot: what the saved cursor covers was counted before, and only that it is there is asked.
#[tokio::test]
async fn the_packs_of_a_base_that_somebody_else_put_are_read_before_they_count() {
    let (log, source) = source(6).await;
    let (watched, folder) = (Counted::new(), tempfile::tempdir().unwrap());
    let own: Arc<dyn BlockStore> = watched.clone();
    let mut test = start(&log, &source, &own, &folder);
    test.reach(Lsn::new(7)).await;
    let copier = Arc::clone(&test.copier);
    test.stop().await;
    let rows = |packs: Range<u64>| {
        packs.map(|sequence| Ok((PackNumber(sequence + 2), PackRow::of(&pack(sequence)))))
    };
    let position = log.tail().position;
    let base = Point { lsn: position.lsn, hash: position.hash };
    assert_eq!(watched.reads(), 0);
    copier.copy_base(rows(0..6), base).await.unwrap();
    assert_eq!(watched.reads(), 0, "the cursor covers them");
    let later = pack(6);
    own.put(later.name, rotten(&later)).await.unwrap();
    name_pack(&log, &later);
    let position = log.tail().position;
    let behind = Point { lsn: position.lsn, hash: position.hash };
    assert_eq!(copier.copy_base(rows(0..7), behind).await, Err(CopyError::Lacks { packs: 1 }));
    assert_eq!(*copier.data.borrow(), base.lsn);
    source.put(later.name, later.bytes.clone()).await.unwrap();
    copier.copy_base(rows(0..7), behind).await.unwrap();
    assert_eq!((*copier.data.borrow(), own.get(later.name).await.unwrap()), (behind.lsn, later.bytes));
}

/// The fear: a mirror that is started anew while one pack holds its data position reads everything that it has copied behind it once more, and
/// has no data position for hours.
#[tokio::test]
async fn what_was_copied_ahead_of_the_data_position_is_not_read_again_after_a_restart() {
    let (log, source) = source(20).await;
    let late = pack(0);
    source.delete(late.name).await.unwrap();
    let (watched, folder) = (Counted::new(), tempfile::tempdir().unwrap());
    let own: Arc<dyn BlockStore> = watched.clone();
    // One of them was there before, and is read once.
    own.put(pack(7).name, pack(7).bytes).await.unwrap();
    let others: Vec<PackName> = (1..20).map(|sequence| pack(sequence).name).collect();
    let has = |name: &PackName| own.size(*name).now_or_never().is_some_and(|size| size.is_ok());
    let test = start(&log, &source, &own, &folder);
    until("the other packs", || others.iter().all(has)).await;
    // Some rounds of the loop: what came was taken note of.
    stays("the late pack is waited for", PAST_A_RETRY, || *test.data.borrow() == Lsn::ROOT).await;
    assert_eq!((*test.data.borrow(), watched.reads()), (Lsn::ROOT, 1));
    test.stop().await;
    let remembered = folder.path().join("copier.cursor.ahead");
    let mut bytes = std::fs::read(&remembered).unwrap();
    assert_eq!(bytes.len(), 19 * 16);
    // A power cut has taken the end of the last record, and another one was changed.
    bytes.truncate(bytes.len() - 3);
    bytes[20] ^= 1;
    std::fs::write(&remembered, bytes).unwrap();
    let mut test = start(&log, &source, &own, &folder);
    until("the two that were forgotten to be read", || watched.reads.load(Ordering::SeqCst) == 2).await;
    stays("the late pack is waited for", PAST_A_RETRY, || *test.data.borrow() == Lsn::ROOT).await;
    assert_eq!(watched.reads(), 2);
    source.put(late.name, late.bytes.clone()).await.unwrap();
    test.reach(Lsn::new(21)).await;
    test.stop().await;
    assert_eq!(std::fs::metadata(&remembered).unwrap().len(), 0, "the cursor covers them");
}

/// Within it the copier asks once more for a pack that has not come.
const PAST_A_RETRY: Duration = ms(300);
