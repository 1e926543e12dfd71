//! Snapshots in an archive: parts, manifests, damage.

use murphy_fs::{Index, MemoryIndex, ObjectBlockStore, SnapshotReader, verify_snapshot};

use super::*;
use crate::descriptor::Descriptor;
use crate::testing::{Fault, FaultyStore, Source, descriptor, new_base, pack, scene};

async fn load(archive: &Archive, manifest: &BaseManifest) -> Result<(State, MemoryIndex), String> {
    let reader = read_base(archive, manifest);
    let loaded = murphy_log::spawn_blocking(move || {
        let index = MemoryIndex::new();
        let reader = SnapshotReader::open(reader).map_err(|error| error.to_string())?;
        let state = reader.load_into(&index, &|_| {}).map_err(|error| error.to_string())?;
        Ok((state, index))
    });
    loaded.await.unwrap()
}

#[tokio::test]
async fn a_snapshot_comes_back_from_its_parts() {
    let (_, archive, mut source) = scene().await;
    source.frames(50, 20);
    let manifest = write_base(&archive, new_base(&source)).await.unwrap();
    assert!(manifest.parts.len() > 1, "{manifest:?}");
    let (state, index) = load(&archive, &manifest).await.unwrap();
    assert_eq!(state, source.state());
    for (key, value) in source.rows() {
        assert_eq!(index.snapshot().get(key).unwrap().as_ref(), Some(value));
    }
    let reader = read_base(&archive, &manifest);
    let verified =
        murphy_log::spawn_blocking(move || verify_snapshot(reader, &|_| {}).unwrap()).await.unwrap();
    assert_eq!(verified.rows, manifest.rows);
}

/// A source that does not know yet that it was replaced must not leave a snapshot of its lost tail.
#[tokio::test]
async fn a_snapshot_beyond_what_is_archived_is_refused() {
    let (store, archive, mut source) = scene().await;
    let archived = Boundary::after(source.frames(2, 2)[1].position());
    source.frames(1, 2);
    let refused = write_base(&archive, NewBase { archived, ..new_base(&source) }).await;
    assert!(matches!(refused, Err(WriteBaseError::NotArchived { .. })), "{refused:?}");
    assert!(!store.names().await.iter().any(|name| name.starts_with("snapshots/")));
}

#[tokio::test]
async fn a_wrong_cut_or_missing_part_is_named() {
    let (store, archive, mut source) = scene().await;
    source.frames(50, 20);
    let manifest = write_base(&archive, new_base(&source)).await.unwrap();
    let part = &manifest.parts[1].name;
    for fault in [Fault::WrongBytes, Fault::NoBytes, Fault::Lost] {
        store.heal();
        store.fail(part, fault, usize::MAX);
        let refused = load(&archive, &manifest).await.err().unwrap();
        assert!(refused.contains(part.as_str()), "{fault:?}: {refused}");
    }
}

/// The first attempt dies between two parts: its leftovers must not get into the second.
#[tokio::test]
async fn an_upload_that_was_broken_off_is_begun_anew() {
    let (store, archive, mut source) = scene().await;
    source.frames(50, 20);
    store.fail("part-0001", Fault::PutFails, usize::MAX);
    write_base(&archive, new_base(&source)).await.unwrap_err();
    assert!(bases(&archive).await.unwrap().is_empty(), "no manifest, no snapshot");
    store.heal();
    let manifest = write_base(&archive, new_base(&source)).await.unwrap();
    load(&archive, &manifest).await.unwrap();
    let again = write_base(&archive, new_base(&source)).await.unwrap();
    assert_eq!(again, manifest, "the one that is there stands");
}

#[tokio::test]
async fn a_snapshot_that_no_list_shows_is_found() {
    let (store, archive, mut source) = scene().await;
    source.frames(1, 2);
    let manifest = write_base(&archive, new_base(&source)).await.unwrap();
    store.fail("snapshots/", Fault::ListLags, usize::MAX);
    let found: Vec<BaseManifest> = bases(&archive).await.unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(found, [manifest]);
}

#[test]
fn a_snapshot_is_due_by_the_length_of_a_replay_not_by_the_clock() {
    assert!(!snapshot_due(1000, 1 << 20));
    assert!(snapshot_due(REPLAY_ENTRIES_MAX, 0) && snapshot_due(0, REPLAY_BYTES_MAX));
}

/// The fear: an archive that begins with a snapshot takes whatever lies under the names of its packs for them, and every moment behind it restores
/// without those bytes. Later snapshots do not read everything again.
#[tokio::test]
async fn the_first_snapshot_reads_the_packs_that_it_finds_and_later_ones_do_not() {
    let store = FaultyStore::new();
    let mut source = Source::new();
    let packs = [pack(1, b"what has rotted"), pack(2, b"what is whole"), pack(3, b"what is not there")];
    for (_, row) in &packs {
        source.frame_with_pack(row);
    }
    let base = source.state().position;
    let archive = Archive::create(store.archive_store(), Descriptor { base, ..descriptor() }).await.unwrap();
    let own = ObjectBlockStore::in_memory();
    for (sealed, _) in &packs {
        BlockStore::put(&own, sealed.name, sealed.bytes.clone()).await.unwrap();
    }
    let mut rotten = packs[0].0.bytes.to_vec();
    rotten[2] ^= 4;
    BlockStore::put(&archive.packs(), packs[0].0.name, rotten.into()).await.unwrap();
    BlockStore::put(&archive.packs(), packs[1].0.name, packs[1].0.bytes.clone()).await.unwrap();
    let from: Arc<dyn BlockStore> = Arc::new(own);
    let snapshot = async |source: &Source| {
        write_base(&archive, NewBase { packs: Some(Arc::clone(&from)), ..new_base(source) }).await.unwrap()
    };
    snapshot(&source).await;
    for (sealed, _) in &packs {
        assert_eq!(BlockStore::get(&archive.packs(), sealed.name).await.unwrap(), sealed.bytes);
    }
    source.frames(1, 1);
    let before = store.log().len();
    snapshot(&source).await;
    let asked = store.log();
    let asked = asked[before..].iter().filter(|line| line.contains("packs/")).count();
    assert_eq!(asked, packs.len(), "each is asked for its length");
}
