//! What a mirror reads while its source changes and removes it.

use std::future::Future;

use murphy_log::Lsn;

use super::*;
use crate::Attr;

/// A source, and a mirror that follows its log.
struct Pair {
    node: Node,
    source: Volume,
    mirror: Volume,
    /// The index of the mirror.
    index: Arc<CountingIndex>,
}

impl Pair {
    /// A mirror that has followed what `prepare` did at the source; all that is in its index and nothing in its memory.
    async fn after<F: Future<Output = ()>>(prepare: impl FnOnce(Volume) -> F) -> Pair {
        let (node, source) = Node::new();
        prepare(source.clone()).await;
        let index = Arc::new(CountingIndex::default());
        let open = |state| {
            let parts = node.parts(&index, state);
            Volume::open(VolumeParts { options: VolumeOptions { cached_rows: 0, ..parts.options }, ..parts })
        };
        let first = open(State::origin(epoch(1))).unwrap();
        first.follow().unwrap();
        follow_up(&source, &first).await;
        let settling = first.clone();
        tokio::task::spawn_blocking(move || settling.settle_index()).await.unwrap().unwrap();
        drop(first);
        let mirror = open(index.reached().unwrap()).unwrap();
        mirror.follow().unwrap();
        Pair { node, source, mirror, index }
    }

    /// Lets `change` happen at the source, and the mirror follow it, while the mirror reads the row at `key`.
    fn while_read(&self, key: RowKey, change: impl FnOnce(&Volume) + Send + 'static) {
        *self.index.at_get.lock() = Some((key, self.followed(change)));
    }

    /// The same while it reads the rows of a range.
    fn while_scanned(&self, change: impl FnOnce(&Volume) + Send + 'static) {
        *self.index.at_scan.lock() = Some(self.followed(change));
    }

    fn followed(&self, change: impl FnOnce(&Volume) + Send + 'static) -> Happening {
        let (source, mirror) = (self.source.clone(), self.mirror.clone());
        Box::new(move || {
            change(&source);
            let lsn = source.shared.sequencer.close_open_frame();
            while shown(&mirror) < lsn {
                std::thread::yield_now();
            }
        })
    }

    fn has_happened(&self) -> bool {
        self.index.at_get.lock().is_none() && self.index.at_scan.lock().is_none()
    }
}

fn shown(volume: &Volume) -> Lsn {
    volume.view().lsn()
}

async fn follow_up(source: &Volume, mirror: &Volume) {
    let lsn = source.durable_here().await.unwrap();
    while shown(mirror) < lsn {
        tokio::task::yield_now().await;
    }
}

fn named(name: &str) -> Name {
    Name::new(name.to_owned()).unwrap()
}

async fn create(volume: &Volume, name: &str) -> (Ino, Handle) {
    let caller = Caller::default();
    let (attr, opened) =
        volume.create(&caller, Ino::ROOT, &named(name), 0o644, READ_WRITE).wait().await.unwrap();
    (attr.ino, opened.handle)
}

/// A stored file of `bytes` that nobody has open.
async fn store(volume: &Volume, name: &str, bytes: Bytes) {
    let (ino, handle) = create(volume, name).await;
    volume.write(&Caller::default(), ino, handle, 0, bytes).wait().await.unwrap();
    volume.fsync(ino, Some(handle)).wait().await.unwrap();
    volume.release(ino, handle);
}

async fn found(volume: &Volume, name: &str) -> Attr {
    volume.lookup(&Caller::default(), Ino::ROOT, &named(name)).wait().await.unwrap()
}

/// Opens for reading only: a mirror takes nothing else.
async fn open_to_read(volume: &Volume, ino: Ino) -> Handle {
    let flags = OpenFlags { write: false, ..READ_WRITE };
    volume.open(&Caller::default(), ino, flags).wait().await.unwrap().handle
}

/// The fear: the rows of an orphan go in many entries, and whoever has it open at a mirror takes what is gone for holes: zeros that nobody
/// wrote, for as long as the source rests between two entries, and for ever if it is lost there and the mirror promoted.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_source_has_begun_to_purge_is_gone_at_a_mirror_and_has_no_zeros() {
    let Pair { node, source, mirror, .. } = Pair::after(|source| async move {
        let (ino, handle) = create(&source, "f").await;
        for at in 0..EXTENTS {
            // A hole before each, so that each is an extent.
            let byte = Bytes::from_static(b"x");
            source.write(&Caller::default(), ino, handle, 2 * at + 1, byte).wait().await.unwrap();
        }
        source.fsync(ino, Some(handle)).wait().await.unwrap();
        source.release(ino, handle);
    })
    .await;
    let ino = found(&source, "f").await.ino;
    // It keeps the source from purging it by itself.
    let _held_at_source = open_to_read(&source, ino).await;
    let held = open_to_read(&mirror, ino).await;
    let read = async || mirror.read(ino, held, 0, 2 * EXTENTS as u32).wait().await;
    let whole = Bytes::from(b"\0x".repeat(EXTENTS as usize));
    source.unlink(&Caller::default(), Ino::ROOT, &named("f")).wait().await.unwrap();
    follow_up(&source, &mirror).await;
    assert_eq!(read().await, Ok(whole), "an orphan is a file");
    let extents = source.extent_offsets(ino, 0).unwrap()[..PURGE_BATCH].to_vec();
    let purge = Purge { ino, extents, xattrs: Vec::new(), last: false };
    source.shared.sequencer.submit(None, &purge).unwrap();
    follow_up(&source, &mirror).await;
    assert_eq!(check_tree(&mirror.view()).unwrap(), Vec::new());
    assert_eq!(read().await, Err(Errno::ESTALE));
    assert_eq!(mirror.getattr(ino).wait().await, Err(Errno::ESTALE));
    drop(source);
    node.log.claim(epoch(2)).unwrap();
    mirror.lead(epoch(2), None).unwrap();
    assert_eq!(read().await, Err(Errno::ESTALE));
    while mirror.view().inode(ino).unwrap().is_some() {
        assert_eq!(read().await, Err(Errno::ESTALE));
        tokio::task::yield_now().await;
    }
    mirror.release(ino, held);
    assert_eq!(check_tree(&mirror.view()).unwrap(), Vec::new());
    assert_eq!(mirror.state().usage.bytes, 0);
}

/// The fear: a mirror takes the length of a file from before an entry and its bytes from behind it, and reads zeros that were never there.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_at_a_mirror_is_of_one_moment() {
    type Change = fn(&Volume, Ino);
    let changes: [Change; 2] = [
        |source, ino| {
            let empty = SetAttr { size: Some(0), ..SetAttr::default() };
            let Answer::Now(Ok(_)) = source.setattr(&Caller::default(), ino, None, empty) else {
                panic!("a short file is cut at once")
            };
        },
        |source, _| {
            let unlinked = source.unlink(&Caller::default(), Ino::ROOT, &named("f"));
            assert!(matches!(unlinked, Answer::Now(Ok(()))));
        },
    ];
    let bytes = Bytes::from(vec![b'A'; 4096]);
    for change in changes {
        let written = bytes.clone();
        let pair = Pair::after(|source| async move { store(&source, "f", written).await }).await;
        let ino = found(&pair.source, "f").await.ino;
        let held = open_to_read(&pair.mirror, ino).await;
        pair.while_read(RowKey::inode(ino), move |source| change(source, ino));
        assert_eq!(pair.mirror.read(ino, held, 0, 4096).wait().await, Ok(bytes.clone()));
        assert!(pair.has_happened());
        let later = pair.mirror.read(ino, held, 0, 4096).wait().await;
        assert!(later == Ok(Bytes::new()) || later == Err(Errno::ESTALE), "{later:?}");
    }
}

/// The fear: a directory that is removed meanwhile is shown with what its counters would be if it had none: one name, no length, no times.
#[tokio::test(flavor = "multi_thread")]
async fn the_attributes_of_a_directory_are_of_one_moment() {
    let pair = Pair::after(|source| async move {
        source.mkdir(&Caller::default(), Ino::ROOT, &named("d"), 0o755).wait().await.unwrap();
    })
    .await;
    let attr = found(&pair.mirror, "d").await;
    pair.while_read(RowKey::inode(attr.ino), |source| {
        let removed = source.rmdir(&Caller::default(), Ino::ROOT, &named("d"));
        assert!(matches!(removed, Answer::Now(Ok(()))));
    });
    assert_eq!(pair.mirror.getattr(attr.ino).wait().await, Ok(attr));
    assert!(pair.has_happened());
    assert_eq!(pair.mirror.getattr(attr.ino).wait().await, Err(Errno::ESTALE));
}

/// The fear: a name is found, its inode loses it, and the kernel is told of a file without a name by that name.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_does_not_lead_to_what_has_lost_it() {
    let pair = Pair::after(|source| async move {
        for name in ["f", "g", "h"] {
            store(&source, name, Bytes::from_static(b"bytes")).await;
        }
    })
    .await;
    let unlink = |name: &'static str| {
        move |source: &Volume| {
            let unlinked = source.unlink(&Caller::default(), Ino::ROOT, &named(name));
            assert!(matches!(unlinked, Answer::Now(Ok(()))));
        }
    };
    for name in ["f", "g"] {
        // It stays as an orphan.
        open_to_read(&pair.source, found(&pair.source, name).await.ino).await;
    }
    let at = pair.mirror.placed(&named("f")).first_key(Ino::ROOT);
    pair.while_read(at, unlink("f"));
    let looked_up = pair.mirror.lookup(&Caller::default(), Ino::ROOT, &named("f")).wait().await;
    assert_eq!(looked_up, Err(Errno::ENOENT));
    assert!(pair.has_happened());
    pair.while_scanned(unlink("g"));
    let listed = pair.mirror.readdir_plus(Ino::ROOT, 0, 10).wait().await.unwrap();
    let names: Vec<_> = listed.into_iter().map(|plus| plus.entry.name).collect();
    assert_eq!(names, [named("h")]);
    assert!(pair.has_happened());
}

const READ_WRITE: OpenFlags =
    OpenFlags { read: true, write: true, append: false, truncate: false, sync: false };
/// So many that a purge takes more than one entry.
const EXTENTS: u64 = 600;
