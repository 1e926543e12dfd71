//! Snapshots in an archive: parts, manifests, damage.

use murphy_fs::{Index, MemoryIndex, SnapshotReader, verify_snapshot};

use super::*;
use crate::testing::{Fault, new_base, scene};

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
