//! What an index on disk is after a kill, a rollback of single files, and damage.
//!
//! Invariants:
//! - Whatever happened to the files, an index that opens can be brought to the right rows from the state that it gives, or its digest
//!   is wrong. It never panics.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    conformance::{Reference, everything, open, some_generations},
    *,
};

/// A file without the zeros at its end: the journal is 64 MiB of them. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Content {
    bytes: Bytes,
    length: u64,
}

impl Content {
    fn read(path: &Path) -> io::Result<Content> {
        let bytes = fs::read(path)?;
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        Ok(Content { bytes: Bytes::copy_from_slice(&bytes[..used]), length: bytes.len() as u64 })
    }
}

/// All files below `dir`, by their path within it.
fn files(dir: &Path) -> BTreeMap<PathBuf, Content> {
    fn visit(root: &Path, dir: &Path, found: &mut BTreeMap<PathBuf, Content>) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                visit(root, &path, found)?;
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned(), Content::read(&path)?);
            }
        }
        Ok(())
    }
    // Compaction deletes files while they are read; what two readings agree on existed at one moment.
    let read = || {
        let mut found = BTreeMap::new();
        visit(dir, dir, &mut found).map(|()| found)
    };
    for _ in 0..100 {
        if let (Ok(first), Ok(second)) = (read(), read())
            && first == second
        {
            return first;
        }
    }
    panic!("the files never rest");
}

fn write(dir: &Path, files: &BTreeMap<PathBuf, Content>) {
    for (path, content) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &content.bytes).unwrap();
        fs::File::options().write(true).open(&path).unwrap().set_len(content.length).unwrap();
    }
}

/// Opens what `files` are; brings it to the last generation and says whether it could be opened.
fn recovers(reference: &Reference, files: &BTreeMap<PathBuf, Content>) -> bool {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), files);
    let index = match FjallIndex::open(dir.path(), FjallOptions::default()) {
        Ok(index) => index,
        Err(OpenIndexError::Unusable { .. }) => return false,
        Err(other) => panic!("{other}"),
    };
    let last = reference.states.len() - 1;
    let from = index.snapshot().state().map_or(0, |state| reference.generation_of(&state) + 1);
    reference.ingest(&index, from..last + 1);
    index.sync().unwrap();
    reference.check(&*index.snapshot(), last);
    true
}

#[test]
fn a_killed_index_goes_on_at_its_synced_state() {
    let reference = Reference::new(some_generations(12, 60));
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    for at in 0..12 {
        reference.ingest(&index, at..at + 1);
        if at % 4 == 1 {
            index.sync().unwrap();
        }
        let killed = files(dir.path());
        assert_eq!(recovers(&reference, &killed), at > 0, "killed after generation {at}");
    }
}

#[test]
fn files_rolled_back_one_by_one_are_noticed_or_harmless() {
    let reference = Reference::new(some_generations(12, 60));
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    let mut older = Vec::new();
    for at in 0..9 {
        reference.ingest(&index, at..at + 1);
        if at % 4 == 0 {
            index.sync().unwrap();
            older.push(files(dir.path()));
        }
    }
    index.sync().unwrap();
    let newest = files(dir.path());
    assert!(recovers(&reference, &newest));
    let mut opened = 0;
    for older in &older {
        for path in newest.keys().chain(older.keys()) {
            if older.get(path) == newest.get(path) {
                continue;
            }
            let mut mixed = newest.clone();
            match older.get(path) {
                Some(old) => mixed.insert(path.clone(), old.clone()),
                None => mixed.remove(path),
            };
            opened += usize::from(recovers(&reference, &mixed));
        }
    }
    assert!(opened > 0, "an older record alone, for one, is harmless");
}

#[test]
fn a_keyspace_that_is_older_than_the_record_is_noticed() {
    let reference = Reference::new(some_generations(6, 40));
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    reference.ingest(&index, 0..3);
    index.sync().unwrap();
    let old = files(dir.path());
    reference.ingest(&index, 3..5);
    index.sync().unwrap();
    let new = files(dir.path());
    for keyspace in ["tables/keyspaces/1", "tables/keyspaces/2"] {
        let mut mixed: BTreeMap<_, _> = new.clone();
        mixed.retain(|path, _| !path.starts_with(keyspace));
        mixed.extend(old.clone().into_iter().filter(|(path, _)| path.starts_with(keyspace)));
        assert_ne!(mixed, new, "{keyspace}");
        assert!(!recovers(&reference, &mixed), "{keyspace}");
    }
}

/// Without its journal fjall begins its sequence numbers anew, below those of its tables: new rows would be hidden by old ones.
#[test]
fn an_index_without_its_journal_is_refused_or_right() {
    let reference = Reference::new(some_generations(8, 40));
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    reference.ingest(&index, 0..6);
    index.sync().unwrap();
    drop(index);
    let mut lost = files(dir.path());
    lost.retain(|path, _| path.extension().is_none_or(|extension| extension != "jnl"));
    assert_ne!(lost, files(dir.path()));
    assert!(!recovers(&reference, &lost));
}

#[test]
fn a_flipped_byte_never_passes_the_digest_with_wrong_rows() {
    let reference = Reference::new(some_generations(6, 300));
    let last = reference.states.len() - 1;
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    reference.ingest(&index, 0..last + 1);
    index.sync().unwrap();
    drop(index);
    let good = files(dir.path());
    let (mut refused, mut found, mut harmless) = (0, 0, 0);
    let damaged: Vec<_> = good.iter().filter(|(_, content)| content.length > 0).collect();
    for (path, content) in damaged {
        let used = content.bytes.len().max(1);
        for step in 0..FLIPS_PER_FILE {
            let mut flipped = good.clone();
            let at = (step * used / FLIPS_PER_FILE + step) % used;
            let mut bytes = content.bytes.to_vec();
            bytes.resize(used, 0);
            bytes[at] ^= 1 << (step % 8);
            flipped.insert(path.clone(), Content { bytes: bytes.into(), length: content.length });
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), &flipped);
            let Ok(index) = FjallIndex::open(dir.path(), FjallOptions::default()) else {
                refused += 1;
                let index = FjallIndex::open_or_reset(dir.path(), FjallOptions::default()).unwrap();
                assert_eq!((index.snapshot().state(), index.reached()), (None, None));
                continue;
            };
            let snapshot = index.snapshot();
            let expected = reference.states[last].1.digest;
            if check_digest(&*snapshot, &reference.keys).map(|check| check.digest).ok() == Some(expected) {
                let rows: BTreeMap<_, _> = snapshot.scan(everything()).map(Result::unwrap).collect();
                let counted = |rows: &BTreeMap<RowKey, Bytes>| -> BTreeMap<_, _> {
                    rows.clone().into_iter().filter(|(key, _)| crate::Table::in_digest(key.table())).collect()
                };
                assert!(counted(&rows) == counted(&reference.states[last].0), "{path:?} at byte {at}");
                harmless += 1;
            } else {
                found += 1;
            }
        }
    }
    assert!(
        refused > 0 && found > 0 && harmless > 0,
        "{refused} refused, {found} found, {harmless} harmless"
    );
}

#[test]
fn a_second_open_is_told_that_the_index_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let reference = Reference::new(some_generations(2, 10));
    let index = open(dir.path());
    reference.ingest(&index, 0..2);
    index.sync().unwrap();
    let locked = |opened| matches!(opened, Err(OpenIndexError::Locked { .. }));
    assert!(locked(FjallIndex::open(dir.path(), FjallOptions::default())));
    assert!(locked(FjallIndex::open_or_reset(dir.path(), FjallOptions::default())));
    assert!(FjallIndex::reset(dir.path()).is_err());
    drop(index);
    reference.check(&*open(dir.path()).snapshot(), 1);
}

#[test]
fn rows_without_a_record_are_not_taken_for_an_empty_index() {
    let dir = tempfile::tempdir().unwrap();
    let index = open(dir.path());
    Reference::new(some_generations(1, 10)).ingest(&index, 0..1);
    drop(index);
    let opened = FjallIndex::open(dir.path(), FjallOptions::default());
    assert!(matches!(opened, Err(OpenIndexError::Unusable { .. })));
    drop(opened);
    let index = FjallIndex::open_or_reset(dir.path(), FjallOptions::default()).unwrap();
    assert!(index.snapshot().scan(everything()).next().is_none());
}

#[test]
fn a_directory_that_cannot_be_written_is_no_reason_to_begin_anew() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"not a directory").unwrap();
    let opened = FjallIndex::open_or_reset(&file.join("index"), FjallOptions::default());
    assert!(matches!(opened, Err(OpenIndexError::Io { .. })));
    let opened = FjallIndex::open_or_reset(&file, FjallOptions::default());
    assert!(matches!(opened, Err(OpenIndexError::NotADirectory { .. })));
    assert_eq!(fs::read(&file).unwrap(), b"not a directory");
}

const FLIPS_PER_FILE: usize = 9;
