//! What this crate's tests share: a source of frames, snapshots and packs, and stores that misbehave.

mod faulty;
mod source;

pub(crate) use faulty::{Fault, FaultyStore, Life, Loss};
pub(crate) use source::{Source, append};

use std::time::Duration;

use murphy_fs::{PackBuilder, PackName, PackRow, SealedPack, WriterId};
use murphy_log::{Clock, Frame, LogTime, NodeId, Position, SystemClock};

use crate::{
    base::{BaseManifest, NewBase, write_base},
    descriptor::{Archive, ArchiveKind, Descriptor},
    layout,
    slot::encode_slot,
    walk::Boundary,
};

/// A source, and an archive of its branch in which nothing is yet.
pub(crate) async fn scene() -> (FaultyStore, Archive, Source) {
    let (store, source) = (FaultyStore::new(), Source::new());
    let archive = archive(&store).await;
    (store, archive, source)
}

/// An archive of the [`Source`]'s branch in `store`.
pub(crate) async fn archive(store: &FaultyStore) -> Archive {
    archive_of(store, ArchiveKind::Full).await
}

pub(crate) async fn archive_of(store: &FaultyStore, kind: ArchiveKind) -> Archive {
    let descriptor = Descriptor { kind, ..descriptor() };
    Archive::create(store.archive_store(), descriptor).await.unwrap()
}

/// What the archives of tests say of themselves.
pub(crate) fn descriptor() -> Descriptor {
    let source = Source::new();
    Descriptor {
        lineage: source.lineage(),
        name: "test".to_owned(),
        kind: ArchiveKind::Full,
        failure_domain: "elsewhere".to_owned(),
        created: source.now(),
        base: source.base().position,
    }
}

/// Puts the slot of `frames` where it belongs, whatever is there, and returns its end.
pub(crate) async fn put(store: &FaultyStore, frames: &[Frame]) -> Position {
    let bytes = encode_slot(Source::new().lineage(), NodeId::default(), frames).unwrap();
    store.overwrite(&layout::slot(frames[0].epoch().number, frames[0].first()), bytes).await;
    frames.last().unwrap().position()
}

/// A snapshot of what `source` holds, which ends where `archive` does; packs are not looked at.
pub(crate) fn new_base(source: &Source) -> NewBase {
    NewBase {
        source: source.tree(),
        archived: Boundary::after(source.state().position),
        as_of: source.now(),
        now: source.now(),
        node: NodeId::default(),
        packs: None,
    }
}

/// Writes that snapshot.
pub(crate) async fn snapshot(archive: &Archive, source: &Source) -> BaseManifest {
    write_base(archive, new_base(source)).await.unwrap()
}

/// A pack with these bytes, and its row.
pub(crate) fn pack(number: u64, bytes: &[u8]) -> (SealedPack, PackRow) {
    let mut builder = PackBuilder::new(PackName::new(WriterId::from_u64(77), number));
    builder.add(bytes).unwrap();
    let sealed = builder.finish().unwrap();
    let row = PackRow::of(&sealed);
    (sealed, row)
}

/// A clock whose time tokio keeps: in a test that was started paused it stands while there is something to do, and waiting costs nothing.
#[derive(Debug)]
pub(crate) struct TestClock {
    start: tokio::time::Instant,
    wall: LogTime,
}

impl TestClock {
    pub(crate) fn new() -> TestClock {
        TestClock { start: tokio::time::Instant::now(), wall: SystemClock::new().wall() }
    }
}

impl Clock for TestClock {
    fn wall(&self) -> LogTime {
        self.wall.after(self.monotonic())
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}
