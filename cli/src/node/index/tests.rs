//! Every way in which an index can differ from its log: it is caught up, made anew, or proves a loss.

use std::fs;

use bytes::Bytes;
use murphy_fs::{IndexSnapshot, Kind, Name};
use murphy_log::{
    Appender, BranchId, Change, Digest, DiskOptions, Entry, Epoch, EpochId, Frame, LogTime, Usage, VolumeId,
};

use super::*;

/// A history: runs of entries, each in an epoch.
type History<'a> = &'a [(u32, std::ops::RangeInclusive<u64>)];

/// A node's directory whose log holds a history. Entries differ by `salt`.
struct Scene {
    directory: tempfile::TempDir,
    volume: u8,
    log: DiskLog,
}

impl Scene {
    fn new(volume: u8, history: History<'_>, salt: u8) -> Scene {
        let directory = tempfile::tempdir().unwrap();
        let options =
            DiskOptions::new(directory.path().join("log"), id(volume), BranchId::from_bytes([2; 16]));
        let log = DiskLog::create(options, State::origin(epoch(volume, history[0].0))).unwrap();
        let mut claimed = None;
        for frame in frames(volume, history, salt) {
            if claimed != Some(frame.epoch()) {
                log.claim(frame.epoch()).unwrap();
                claimed = Some(frame.epoch());
            }
            let state = log.durable().state();
            log.append(&state.position, frame.clone()).unwrap();
            log.durable().wait_blocking(frame.last(), std::time::Duration::from_secs(60)).unwrap();
        }
        Scene { directory, volume, log }
    }

    fn open(&self) -> Result<(Arc<FjallIndex>, State), CliError> {
        open_index(self.directory.path(), &self.log, &VolumeKeys::derive(id(self.volume)))
    }

    /// The index holds what the log says.
    fn assert_opens(&self, what: &str) {
        let (index, state) = self.open().unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(state, self.log.durable().state(), "{what}");
        assert_eq!(rows(&*index.snapshot()), expected(&self.log), "{what}");
        index.sync().unwrap();
    }

    /// The node is not opened, for what is missing from its log, until somebody deletes the index.
    fn assert_refused(&self, what: &str) {
        for _ in 0..2 {
            let error = self.open().err().unwrap_or_else(|| panic!("{what}: it opened"));
            assert!(error.to_string().contains("missing from the log"), "{what}: {error}");
        }
        fs::remove_dir_all(self.index()).unwrap();
        self.assert_opens(what);
    }

    fn index(&self) -> std::path::PathBuf {
        index_directory(self.directory.path())
    }

    /// Puts the index of `other` in the place of this one's.
    fn take_index(&self, other: &Scene) {
        fs::rename(other.index(), self.index()).unwrap();
    }
}

fn id(volume: u8) -> VolumeId {
    VolumeId::from_bytes([volume; 16])
}

fn epoch(volume: u8, number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([volume.wrapping_mul(16) + number as u8; 16]) }
}

/// One frame an entry; each entry makes a name and changes a row.
fn frames(volume: u8, history: History<'_>, salt: u8) -> Vec<Frame> {
    let keys = VolumeKeys::derive(id(volume));
    let hasher = NameHasher::of(&keys);
    let (mut state, mut frames) = (State::origin(epoch(volume, history[0].0)), Vec::new());
    for (number, lsns) in history {
        let mut appender = Appender::new(keys.clone(), epoch(volume, *number), state);
        for lsn in lsns.clone() {
            let name = Name::new(format!("name {salt} {lsn}")).unwrap();
            let dentry = RowKey::dentry(Ino::ROOT, hasher.place(&name).get());
            let row = DentryRow { named: Some((name, Ino::new(lsn), Kind::File)), more: false };
            let change = |key: RowKey, value: Bytes| Change {
                table: key.table(),
                key: key.key_bytes(),
                value: Some(value),
            };
            let entry = Entry {
                kind: 3,
                changes: vec![
                    change(dentry, row.encode()),
                    change(RowKey::inode(Ino::ROOT), Bytes::copy_from_slice(&[salt, lsn as u8])),
                ],
                ..Entry::tick(Lsn::new(lsn), LogTime::from_nanos(lsn))
            };
            appender.push(&entry, Digest::default(), Usage::default()).unwrap();
            frames.extend(appender.close(entry.time, Lsn::ROOT));
        }
        state = appender.state();
    }
    frames
}

fn rows(snapshot: &dyn IndexSnapshot) -> Vec<(RowKey, Bytes)> {
    let all = RowKey::from_parts(1, &[])..RowKey::from_parts(u8::MAX, &[]);
    snapshot.scan(all).map(Result::unwrap).collect()
}

fn expected(log: &DiskLog) -> Vec<(RowKey, Bytes)> {
    let mut rows = std::collections::BTreeMap::new();
    for frame in log.read(Lsn::FIRST).unwrap() {
        for change in frame.unwrap().entries().unwrap().into_iter().flat_map(|entry| entry.changes) {
            rows.insert(RowKey::from_parts(change.table, &change.key), change.value.unwrap());
        }
    }
    rows.into_iter().collect()
}

/// The fear: a mirror that is started while its source sends makes its index anew for nothing, and does not start if a frame comes once more.
#[test]
fn a_log_that_grows_while_the_index_catches_up_is_no_reason_to_make_it_anew() {
    let scene = Scene::new(1, &[(1, 2..=9)], 0);
    let earlier = frames(1, &[(1, 2..=9)], 0)[4].state();
    let index = FjallIndex::open(&scene.index(), FjallOptions::default()).unwrap();
    let reached = catch_up_to(scene.directory.path(), &index, &scene.log, earlier);
    assert!(matches!(reached, Ok(state) if state == earlier));
    drop(index);
    scene.assert_opens("the rest comes with the next start");
}

#[test]
fn a_missing_a_damaged_and_an_older_index_are_brought_to_the_end_of_the_log() {
    let scene = Scene::new(1, &[(1, 2..=20)], 0);
    scene.assert_opens("missing");
    scene.assert_opens("as it was");
    let record = scene.index().join("synced");
    let mut bytes = fs::read(&record).unwrap();
    bytes[60] ^= 1;
    fs::write(&record, bytes).unwrap();
    scene.assert_opens("a damaged record");
    fs::remove_file(&record).unwrap();
    scene.assert_opens("no record");
    fs::remove_dir_all(scene.index()).unwrap();
    let older = Scene::new(1, &[(1, 2..=10)], 0);
    older.assert_opens("made");
    scene.take_index(&older);
    scene.assert_opens("older");
}

/// The fear: the log has lost what an fsync promised, and making the index anew hides it.
#[test]
fn an_index_that_knows_more_than_its_log_proves_a_loss() {
    let newer = Scene::new(1, &[(1, 2..=20)], 0);
    newer.assert_opens("made");
    let scene = Scene::new(1, &[(1, 2..=12)], 0);
    scene.take_index(&newer);
    scene.assert_refused("newer");

    // The whole of the last epoch is gone, and with it the log's own knowledge of that epoch.
    let newer = Scene::new(1, &[(1, 2..=12), (2, 13..=20)], 0);
    newer.assert_opens("made");
    let scene = Scene::new(1, &[(1, 2..=12)], 0);
    scene.take_index(&newer);
    scene.assert_refused("newer, of a later epoch");
}

/// After a power cut rows can be newer than the record of the index. They were durable in the log before they were in a table.
#[test]
fn rows_from_beyond_the_log_prove_a_loss_though_the_record_is_older() {
    let scene = Scene::new(1, &[(1, 2..=12)], 0);
    scene.assert_opens("made");
    let index = FjallIndex::open(&scene.index(), FjallOptions::default()).unwrap();
    let more = frames(1, &[(1, 2..=20)], 0);
    let rows =
        more.iter().skip(11).flat_map(|frame| frame.entries().unwrap()).flat_map(|entry| entry.changes);
    let rows: std::collections::BTreeMap<_, _> =
        rows.map(|change| (RowKey::from_parts(change.table, &change.key), change.value)).collect();
    index.ingest(&mut rows.into_iter(), &more.last().unwrap().state()).unwrap();
    drop(index);
    let state = FjallIndex::open(&scene.index(), FjallOptions::default()).unwrap().snapshot().state();
    assert_eq!(state.map(|state| state.position.lsn), Some(Lsn::new(12)), "the record is the older one");
    scene.assert_refused("rows beyond the record");
}

/// What the log, or whoever took over, has decided otherwise is no loss.
#[test]
fn an_index_of_another_history_is_made_anew() {
    for (what, index, salt) in [
        ("other entries, less far", &[(1, 2..=9)][..], 1),
        ("other entries, as far", &[(1, 2..=9), (2, 10..=16)], 1),
        ("the tail of an earlier epoch", &[(1, 2..=20)], 0),
        ("the tail of an earlier epoch, as far", &[(1, 2..=16)], 0),
    ] {
        let scene = Scene::new(1, &[(1, 2..=9), (2, 10..=16)], 0);
        let other = Scene::new(1, index, salt);
        other.assert_opens("made");
        scene.take_index(&other);
        scene.assert_opens(what);
    }
}

#[test]
fn an_index_of_another_volume_is_made_anew_however_far_it_is() {
    for history in [&[(1, 2..=20)][..], &[(1, 2..=5), (7, 6..=20)], &[(1, 2..=5)]] {
        let scene = Scene::new(1, &[(1, 2..=12)], 0);
        let other = Scene::new(3, history, 0);
        other.assert_opens("made");
        scene.take_index(&other);
        scene.assert_opens("foreign");
    }
}

#[test]
fn a_file_in_the_place_of_the_index_is_named_and_kept() {
    let scene = Scene::new(1, &[(1, 2..=5)], 0);
    fs::write(scene.index(), b"mine").unwrap();
    let error = scene.open().err().unwrap();
    assert!(error.to_string().contains("is not a directory"), "{error}");
    assert_eq!(fs::read(scene.index()).unwrap(), b"mine");
}

/// The fear: an index that does not fit is thrown away, and only then the log turns out to be damaged; nothing reads all of it at the next start,
/// and nothing is ever mended.
#[test]
fn an_index_is_not_thrown_away_for_a_log_that_cannot_be_read() {
    let scene = Scene::new(1, &[(1, 2..=9), (2, 10..=12), (3, 13..=16)], 0);
    let other = Scene::new(1, &[(1, 2..=9)], 1);
    other.assert_opens("made");
    assert_eq!(still_to_read(scene.directory.path()), Scrub::Everything, "there is none");
    scene.take_index(&other);
    assert_eq!(still_to_read(scene.directory.path()), Scrub::From(Lsn::new(10)));
    let Scene { directory, volume, log } = scene;
    drop(log);
    let options = DiskOptions::new(directory.path().join("log"), id(volume), BranchId::from_bytes([2; 16]));
    let oldest = options.directory.join("00000000000000000002.seg");
    let whole = fs::read(&oldest).unwrap();
    let mut damaged = whole.clone();
    damaged[300] ^= 1;
    fs::write(&oldest, damaged).unwrap();
    let scene = Scene { log: DiskLog::open(options.clone()).unwrap(), directory, volume };
    let held = || rows(&*FjallIndex::open(&scene.index(), FjallOptions::default()).unwrap().snapshot());
    let before = held();
    for _ in 0..2 {
        let refused = scene.open().err().unwrap().to_string();
        assert!(refused.contains("damaged") && refused.contains("lsn 2"), "{refused}");
        assert_eq!(held(), before, "the index is as it was");
        let note = scrub_notes::load(scene.directory.path()).unwrap();
        assert!(note.log.is_some_and(|log| log.contains("lsn 2")), "the next start reads all of the log");
    }
    let Scene { directory, volume, log } = scene;
    drop(log);
    fs::write(&oldest, whole).unwrap();
    scrub_notes::forget_log(directory.path()).unwrap();
    assert_eq!(scrub_notes::load(directory.path()), None);
    Scene { log: DiskLog::open(options).unwrap(), directory, volume }.assert_opens("made anew");
}
