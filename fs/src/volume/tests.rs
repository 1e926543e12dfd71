//! Files of very many extents: what their changes cost is counted, not timed.

mod listing;
mod long;
mod mirrors;
mod overwrites;

use std::{ops::Range, sync::atomic::AtomicU64};

use bytes::Bytes;
use murphy_log::{EpochId, MemoryLog, SystemClock, VolumeId};
use parking_lot::Mutex;

use super::*;
use crate::{
    AcknowledgeError, CellCache, FileSystem, Handle, IndexError, IndexSnapshot, Ino, Kind, MemoryIndex, Name,
    NewNode, ObjectBlockStore, OpenFlags, PackNumber, PackRow, PackState, RowIterator, SLOT_BYTES, SetAttr,
    check_tree,
    decide::{PURGE_BATCH, PackUse, Piece, Purge, Store},
};

/// A node that can be reopened with nothing in memory.
struct Node {
    log: Arc<MemoryLog>,
    index: Arc<CountingIndex>,
    blocks: Arc<dyn BlockStore>,
    epoch: u32,
    sync: bool,
}

impl Node {
    fn new() -> (Node, Volume) {
        let origin = State::origin(epoch(1));
        let mut node = Node {
            log: Arc::new(MemoryLog::new(origin)),
            index: Arc::default(),
            blocks: Arc::new(ObjectBlockStore::in_memory()),
            epoch: 0,
            sync: false,
        };
        let volume = node.open(Some(&[]));
        (node, volume)
    }

    fn open(&mut self, genesis: Option<&[(String, String)]>) -> Volume {
        self.epoch += 1;
        let state = self.log.claim(epoch(self.epoch)).unwrap();
        let volume = Volume::open(self.parts(&self.index, state)).unwrap();
        volume.lead(epoch(self.epoch), genesis).unwrap();
        volume
    }

    /// A volume over the same log and the same store, with an index of its own.
    fn parts(&self, index: &Arc<CountingIndex>, state: State) -> VolumeParts {
        let clock = Arc::new(SystemClock::new());
        VolumeParts {
            log: self.log.clone(),
            index: Arc::clone(index) as Arc<dyn Index>,
            state,
            last_time: clock.wall(),
            keys: VolumeKeys::derive(VolumeId::from_bytes([1; 16])),
            clock,
            fetcher: PackFetcher::new(vec![Arc::clone(&self.blocks)], CellCache::new(1 << 20), None),
            blocks: Arc::clone(&self.blocks),
            runtime: Runtime::current(),
            options: VolumeOptions { cached_rows: 512, sync: self.sync, ..VolumeOptions::default() },
        }
    }

    async fn reopen(&mut self, volume: Volume) -> Volume {
        volume.close().await.unwrap();
        drop(volume);
        self.open(None)
    }
}

fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([7; 16]) }
}

/// An index that counts the rows that are read from it.
#[derive(Default)]
struct CountingIndex {
    index: MemoryIndex,
    read: Arc<AtomicU64>,
    /// Happens when the next scan begins.
    at_scan: Arc<Mutex<Option<Happening>>>,
    /// Happens when this row has been read, before whoever reads it has it.
    at_get: Arc<Mutex<Option<(RowKey, Happening)>>>,
}

type Happening = Box<dyn FnOnce() + Send>;

struct CountingSnapshot {
    snapshot: Arc<dyn IndexSnapshot>,
    read: Arc<AtomicU64>,
    at_scan: Arc<Mutex<Option<Happening>>>,
    at_get: Arc<Mutex<Option<(RowKey, Happening)>>>,
}

impl CountingIndex {
    fn rows_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

impl Index for CountingIndex {
    fn snapshot(&self) -> Arc<dyn IndexSnapshot> {
        let (at_scan, at_get) = (Arc::clone(&self.at_scan), Arc::clone(&self.at_get));
        let (snapshot, read) = (self.index.snapshot(), Arc::clone(&self.read));
        Arc::new(CountingSnapshot { snapshot, read, at_scan, at_get })
    }

    fn ingest(
        &self,
        rows: &mut dyn Iterator<Item = (RowKey, Option<Bytes>)>,
        state: &State,
    ) -> Result<(), IndexError> {
        self.index.ingest(rows, state)
    }

    fn sync(&self) -> Result<(), IndexError> {
        self.index.sync()
    }

    fn reached(&self) -> Option<State> {
        self.index.reached()
    }
}

impl IndexSnapshot for CountingSnapshot {
    fn state(&self) -> Option<State> {
        self.snapshot.state()
    }

    fn get(&self, key: &RowKey) -> Result<Option<Bytes>, IndexError> {
        self.read.fetch_add(1, Ordering::Relaxed);
        let row = self.snapshot.get(key);
        let happening = self.at_get.lock().take_if(|(at, _)| at == key);
        happening.into_iter().for_each(|(_, happening)| happening());
        row
    }

    fn scan(&self, range: Range<RowKey>) -> RowIterator {
        let happening = self.at_scan.lock().take();
        happening.into_iter().for_each(|happening| happening());
        let read = Arc::clone(&self.read);
        Box::new(self.snapshot.scan(range).inspect(move |_| {
            read.fetch_add(1, Ordering::Relaxed);
        }))
    }

    fn last(&self, range: Range<RowKey>) -> Result<Option<(RowKey, Bytes)>, IndexError> {
        self.read.fetch_add(1, Ordering::Relaxed);
        self.snapshot.last(range)
    }
}

/// Makes a file of `count` extents of [`EXTENT`] bytes, of several packs in turn.
async fn fragmented(volume: &Volume, name: &str, count: u64) -> Ino {
    let name = Name::new(name.to_owned()).unwrap();
    let node = NewNode { kind: Kind::File, mode: 0o644, rdev: 0 };
    let ino = volume.mknod(&Caller::default(), Ino::ROOT, &name, node).wait().await.unwrap().ino;
    let mut packs: Vec<PackNumber> = Vec::new();
    let extents: Vec<u64> = (0..count).collect();
    for (turn, part) in extents.chunks(PART).enumerate() {
        let pack = match packs.get(turn % PACKS) {
            Some(number) => PackUse::Known(*number),
            None => PackUse::New(pack_row(turn as u64)),
        };
        let pieces =
            part.iter().map(|at| Piece { offset: at * EXTENT, length: EXTENT as u32, pack_offset: 0 });
        let store = Store {
            ino,
            pack,
            pieces: pieces.collect(),
            overlapped: Vec::new(),
            mtime: None,
            ctime: crate::Timespec::default(),
        };
        let number = loop {
            match volume.shared.sequencer.submit(None, &store) {
                Ok(number) => break number,
                Err(SubmitError::Full) => volume.shared.sequencer.room().await,
                Err(error) => panic!("{error:?}"),
            }
        };
        if packs.len() < PACKS {
            packs.push(number);
        }
    }
    ino
}

fn pack_row(sequence: u64) -> PackRow {
    PackRow {
        writer: 1,
        sequence,
        footer_digest: [0; 32],
        plain_bytes: 4 << 20,
        stored_bytes: 4 << 20,
        live_bytes: 1 << 40,
        state: PackState::Here,
    }
}

/// Entries and decisions so far.
fn counted(volume: &Volume) -> (u64, u64) {
    let sequencer = &volume.shared.sequencer;
    (sequencer.state().position.lsn.get(), sequencer.decisions.load(Ordering::Relaxed))
}

/// The fear: for every row that is not in memory a decision begins anew, inside the critical section; and every part of a purge passes
/// once more what the parts before it have removed.
#[tokio::test(flavor = "multi_thread")]
async fn cutting_and_purging_a_cold_file_costs_what_its_entries_cost() {
    const EXTENTS: u64 = 100_000;
    let (mut node, volume) = Node::new();
    let ino = fragmented(&volume, "cut", EXTENTS).await;
    let volume = node.reopen(volume).await;
    let ((lsn, decisions), read) = (counted(&volume), node.index.rows_read());
    let half = SetAttr { size: Some(EXTENTS / 2 * EXTENT), ..SetAttr::default() };
    volume.setattr(&Caller::default(), ino, None, half).wait().await.unwrap();
    let (lsn, decisions) = (counted(&volume).0 - lsn, counted(&volume).1 - decisions);
    assert!((EXTENTS / 512..EXTENTS / 256).contains(&lsn), "{lsn} entries");
    assert!(decisions <= 4 * lsn, "{decisions} decisions for {lsn} entries");
    let read = node.index.rows_read() - read;
    assert!(read <= 2 * EXTENTS, "{read} rows read");

    let volume = node.reopen(volume).await;
    let ((lsn, decisions), read) = (counted(&volume), node.index.rows_read());
    volume.unlink(&Caller::default(), Ino::ROOT, &Name::new("cut").unwrap()).wait().await.unwrap();
    while volume.view().inode(ino).unwrap().is_some() {
        tokio::task::yield_now().await;
    }
    let (lsn, decisions) = (counted(&volume).0 - lsn, counted(&volume).1 - decisions);
    assert!((EXTENTS / 512..EXTENTS / 256).contains(&lsn), "{lsn} entries");
    assert!(decisions <= 4 * lsn, "{decisions} decisions for {lsn} entries");
    let read = node.index.rows_read() - read;
    assert!(read <= 2 * EXTENTS, "{read} rows read");
    assert_eq!(volume.state().usage.bytes, 0);
}

/// The fear: a source dies between two parts of a purge, and what is left is never removed, or somebody gets at it.
#[tokio::test(flavor = "multi_thread")]
async fn a_purge_that_was_cut_short_is_gone_on_with_at_the_next_start() {
    let (mut node, volume) = Node::new();
    let ino = fragmented(&volume, "f", 2 * PURGE_BATCH as u64 + 1).await;
    // While it is open the source does not purge it by itself.
    let handle = open(&volume, ino).await;
    volume.unlink(&Caller::default(), Ino::ROOT, &Name::new("f").unwrap()).wait().await.unwrap();
    let extents = volume.extent_offsets(ino, 0).unwrap()[..PURGE_BATCH].to_vec();
    let part = Purge { ino, extents, xattrs: Vec::new(), last: false };
    volume.shared.sequencer.submit(None, &part).unwrap();
    assert_eq!(volume.read(ino, handle, 0, 10).wait().await, Err(Errno::ESTALE));
    let bytes = Bytes::from_static(b"bytes");
    assert_eq!(volume.write(&Caller::default(), ino, handle, 0, bytes).wait().await, Err(Errno::ESTALE));
    let volume = node.reopen(volume).await;
    while volume.view().inode(ino).unwrap().is_some() {
        assert_eq!(volume.getattr(ino).wait().await, Err(Errno::ESTALE));
        tokio::task::yield_now().await;
    }
    assert_eq!(check_tree(&volume.view()).unwrap(), Vec::new());
    assert_eq!(volume.state().usage.bytes, 0);
}

/// The fear: an overwrite costs more the more extents a file has, whether it touches them or not.
#[tokio::test(flavor = "multi_thread")]
async fn an_overwrite_looks_at_the_extents_that_it_touches() {
    const EXTENTS: u64 = 20_000;
    const WRITES: u64 = 300;
    let (mut node, volume) = Node::new();
    let ino = fragmented(&volume, "data", EXTENTS).await;
    let volume = node.reopen(volume).await;
    let ((lsn, decisions), read) = (counted(&volume), node.index.rows_read());
    let handle = open(&volume, ino).await;
    for number in 0..WRITES {
        // Two extents each, across the file, some across two slots.
        let at = (number * 7919 % (EXTENTS - 2)) * EXTENT + EXTENT / 2;
        let data = Bytes::from(vec![7; EXTENT as usize]);
        volume.write(&Caller::default(), ino, handle, at, data).wait().await.unwrap();
    }
    volume.fsync(ino, Some(handle)).wait().await.unwrap();
    let (lsn, decisions) = (counted(&volume).0 - lsn, counted(&volume).1 - decisions);
    assert!(lsn < 10, "{lsn} entries");
    assert!(decisions <= 5 * lsn, "{decisions} decisions for {lsn} entries");
    let read = node.index.rows_read() - read;
    assert!(read <= 12 * WRITES, "{read} rows read");
    volume.release(ino, handle);
}

async fn open(volume: &Volume, ino: Ino) -> Handle {
    let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
    volume.open(&Caller::default(), ino, flags).wait().await.unwrap().handle
}

/// The bytes of each extent: 1024 of them share a slot.
const EXTENT: u64 = SLOT_BYTES / 1024;
/// Extents made by one entry.
const PART: usize = 512;
const PACKS: usize = 8;

/// Copies that are gone for good.
struct Gone;

impl Acknowledger for Gone {
    fn acknowledged(&self, _: murphy_log::Lsn, _: Duration) -> crate::Acknowledgement<'_> {
        Box::pin(std::future::pending())
    }
}

/// The fear: people give up a copy that is gone, and what waits for it goes on waiting until it fails.
#[tokio::test(flavor = "multi_thread")]
async fn an_fsync_that_waits_for_copies_that_are_given_up_goes_on_with_what_is_left() {
    let (_node, volume) = Node::new();
    volume.acknowledge_with(Arc::new(Gone));
    let waiting = tokio::spawn({
        let volume = volume.clone();
        async move { volume.make_durable().await }
    });
    while volume.shared.acknowledger.receiver_count() == 0 {
        tokio::task::yield_now().await;
    }
    assert!(!waiting.is_finished());
    volume.acknowledge_alone();
    assert_eq!(waiting.await.unwrap(), Ok(volume.state().position.lsn));
}

/// Copies that do not answer, and note how long they are given.
struct Asked(Arc<std::sync::Mutex<Vec<Duration>>>);

impl Acknowledger for Asked {
    fn acknowledged(&self, _: murphy_log::Lsn, deadline: Duration) -> crate::Acknowledgement<'_> {
        self.0.lock().unwrap().push(deadline);
        Box::pin(std::future::pending())
    }
}

/// The fear: each change of what is waited for gives the wait its whole deadline again, and a process hangs for as long as people try.
#[tokio::test(flavor = "multi_thread")]
async fn an_fsync_has_one_deadline_whatever_it_waits_for_in_between() {
    let (_node, volume) = Node::new();
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    volume.acknowledge_with(Arc::new(Asked(Arc::clone(&asked))));
    let waiting = tokio::spawn({
        let volume = volume.clone();
        async move { volume.make_durable().await }
    });
    for count in 1..=3 {
        while asked.lock().unwrap().len() < count {
            tokio::task::yield_now().await;
        }
        volume.acknowledge_with(Arc::new(Asked(Arc::clone(&asked))));
    }
    volume.acknowledge_alone();
    waiting.await.unwrap().unwrap();
    let asked = asked.lock().unwrap();
    assert!(asked[0] <= volume.shared.options.io_timeout, "{asked:?}");
    assert!(asked.is_sorted_by(|before, after| after < before), "{asked:?}");
}

/// A node that is told that it was replaced.
#[derive(Default)]
struct Replaced(std::sync::atomic::AtomicBool);

impl Mandate for Replaced {
    fn stands(&self) -> Result<(), AcknowledgeError> {
        match self.0.load(Ordering::SeqCst) {
            true => Err(AcknowledgeError::Fenced("epoch 2 has taken over".to_owned())),
            false => Ok(()),
        }
    }
}

/// The fear: an order that waits for nobody any more lets a source that was replaced acknowledge for itself.
#[tokio::test(flavor = "multi_thread")]
async fn an_fsync_of_a_source_that_was_replaced_fails_whoever_is_waited_for() {
    let (_node, volume) = Node::new();
    let replaced = Arc::new(Replaced::default());
    volume.acknowledge_under(Arc::clone(&replaced) as Arc<dyn Mandate>);
    volume.make_durable().await.unwrap();
    volume.acknowledge_with(Arc::new(Gone));
    let waiting = tokio::spawn({
        let volume = volume.clone();
        async move { volume.make_durable().await }
    });
    while volume.shared.acknowledger.receiver_count() == 0 {
        tokio::task::yield_now().await;
    }
    replaced.0.store(true, Ordering::SeqCst);
    volume.acknowledge_alone();
    assert_eq!(waiting.await.unwrap(), Err(Errno::EIO));
    assert_eq!(volume.make_durable().await, Err(Errno::EIO));
    volume.durable_here().await.unwrap();
}

/// The fear: with `--sync` the order that gives up a copy that is gone waits for that copy.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_about_the_volume_itself_waits_for_no_copy() {
    let (mut node, volume) = Node::new();
    drop(volume);
    node.sync = true;
    let volume = node.open(None);
    volume.acknowledge_with(Arc::new(Gone));
    let setting = vec![("ack".to_owned(), Some("local".to_owned()))];
    volume.change_settings(setting).wait().await.unwrap();
    assert_eq!(volume.setting("ack").unwrap().as_deref(), Some("local"));
    volume.durable_here().await.unwrap();
    let change = |_: Option<&crate::MemberRow>, _: LogTime| Ok::<_, std::convert::Infallible>(Vec::new());
    volume.change_members(murphy_log::NodeId::from_bytes([3; 16]), change).wait().await.unwrap().unwrap();
    volume.acknowledge_alone();
}

/// The fear: one that was removed meanwhile is admitted because only the invitation was looked at.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_members_is_given_every_row_that_it_depends_on() {
    let (_node, volume) = Node::new();
    let [invited, member] = [3, 4].map(|byte| murphy_log::NodeId::from_bytes([byte; 16]));
    let state = crate::MemberState::Revoked { public_key: [4; 32] };
    let row = crate::MemberRow {
        role: crate::MemberRole::Mirror,
        state,
        name: "m".to_owned(),
        addresses: Vec::new(),
    };
    let written = row.clone();
    let put =
        move |_: Option<&crate::MemberRow>, _: LogTime| Ok::<_, ()>(vec![(member, Some(written.clone()))]);
    volume.change_members(invited, put).wait().await.unwrap().unwrap();
    let look = |rows: [Option<&crate::MemberRow>; 2], _: LogTime| Err(rows.map(Option::<&_>::cloned));
    let seen = volume.change_members_given([invited, member], look).wait().await.unwrap();
    assert_eq!(seen, Err([None, Some(row)]));
}

/// The fear: with `--sync` a call that is not answered in time leaves a handle that nobody knows, and its file takes room until the restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_handle_that_reaches_nobody_is_closed() {
    let (mut node, volume) = Node::new();
    node.sync = true;
    let volume = node.reopen(volume).await;
    let caller = Caller::default();
    let name = |text: &'static str| Name::new(text.as_bytes()).unwrap();
    let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
    let (attr, opened) =
        volume.create(&caller, Ino::ROOT, &name("first"), 0o600, flags).wait().await.unwrap();
    volume.release(attr.ino, opened.handle);
    volume.acknowledge_with(Arc::new(Gone));
    let late = Duration::from_millis(50);
    let created = volume.create(&caller, Ino::ROOT, &name("second"), 0o600, flags).wait();
    tokio::time::timeout(late, created).await.expect_err("nobody acknowledges it");
    let emptied = volume.open(&caller, attr.ino, OpenFlags { truncate: true, ..flags }).wait();
    tokio::time::timeout(late, emptied).await.expect_err("nobody acknowledges it");
    assert!((1..10).all(|number| volume.shared.handles.find(Handle(number)).is_err()));
    assert!(volume.shared.files.all().iter().all(|file| file.lock().opens == 0));
}
