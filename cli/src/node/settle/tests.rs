//! A mirror's directory whose log is put aside, and whose process dies between any two steps of it.

use murphy_log::{
    Appender, BranchId, Digest, Entry, Epoch, EpochId, Frame, Log, LogTime, NodeId, Scrub, Usage, VolumeId,
    VolumeKeys, append_copy,
};

use super::*;
use crate::{
    archive_notes::known_durable,
    mirror_notes::{self, MirrorNote},
};

/// A mirror's directory: a log with a base, an index, and what vouches for the log.
struct Scene {
    folder: tempfile::TempDir,
    config: NodeConfig,
    frames: Vec<Frame>,
}

impl Scene {
    fn new() -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path();
        let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
        let config = NodeConfig {
            role: Role::Mirror,
            ..NodeConfig::new(volume, branch, "v".to_owned(), "file:///x".parse().unwrap())
        };
        config.write(directory).unwrap();
        let origin = State::origin(Epoch { number: 1, id: EpochId::from_bytes([3; 16]) });
        let log =
            DiskLog::create(DiskOptions::new(log_directory(directory), volume, branch), origin).unwrap();
        let mut appender = Appender::new(VolumeKeys::derive(volume), origin.position.epoch, origin);
        let frames = (2..30).map(|lsn| {
            let entry = Entry::tick(Lsn::new(lsn), LogTime::from_nanos(lsn));
            appender.push(&entry, Digest(0), Usage::default()).unwrap();
            appender.close(LogTime::from_nanos(5), Lsn::ROOT).unwrap()
        });
        let frames: Vec<Frame> = frames.collect();
        frames.iter().for_each(|frame| append_copy(&log, frame.clone()).unwrap());
        let tail = log.durable().wait_blocking(Lsn::new(29), std::time::Duration::from_secs(60)).unwrap();
        fs::create_dir_all(base_file(directory).parent().unwrap()).unwrap();
        fs::write(base_file(directory), "base").unwrap();
        fs::create_dir(index_directory(directory)).unwrap();
        let note = MirrorNote { node: NodeId::from_bytes([5; 16]), position: tail.position };
        mirror_notes::save(directory, &note).unwrap();
        Scene { folder, config, frames }
    }

    fn directory(&self) -> &Path {
        self.folder.path()
    }

    /// Whether the log of the node in `directory` holds so many of the frames, and nothing else.
    fn is_held_in(&self, directory: &Path, count: usize) -> bool {
        let mut options = DiskOptions::new(log_directory(directory), self.config.volume, self.config.branch);
        options.scrub = Scrub::Everything;
        let log = DiskLog::open(options).unwrap();
        let held: Vec<Frame> = log.read(log.first()).unwrap().map(Result::unwrap).collect();
        let same = |(held, frame): (&Frame, &Frame)| held.bytes() == frame.bytes();
        held.len() == count && held.iter().zip(&self.frames).all(same)
    }

    fn tail(&self) -> Position {
        self.frames[27].position()
    }

    fn order(&self, instead: Instead) -> KeptBranch {
        let directory = self.directory();
        let log = DiskOptions::new(log_directory(directory), self.config.volume, self.config.branch);
        let log = DiskLog::open(log).unwrap();
        match instead {
            Instead::Beginning => {
                let end = self.frames[11].position();
                let ancestor = Point { lsn: end.lsn, hash: end.hash };
                order_beginning(directory, &log, (ancestor, self.tail()), Lsn::new(20)).unwrap()
            }
            Instead::Snapshot => {
                let state = State { position: self.tail(), ..State::origin(self.tail().epoch) };
                order_snapshot(directory, &self.config, state, self.tail()).unwrap()
            }
        }
    }

    fn snapshot_is_ready(&self) {
        fs::write(seed_file(self.directory(), SEED_READY), "snapshot").unwrap();
    }

    fn assert_settled(&self, instead: Instead, kept: &KeptBranch, what: &str) {
        let (directory, place) = (self.directory(), self.directory().join(&kept.place));
        assert!(!has_begun(directory) && !directory.join(SET_ASIDE).exists(), "{what}");
        let (left, base, cursor) = match instead {
            Instead::Beginning => {
                let end = self.frames[11].position();
                (12, "base", Some(Point { lsn: end.lsn, hash: end.hash }))
            }
            Instead::Snapshot => (0, "snapshot", None),
        };
        assert!(self.is_held_in(directory, left), "{what}");
        assert!(self.is_held_in(&place, 28), "{what}: the branch");
        assert_eq!(fs::read_to_string(base_file(directory)).unwrap(), base, "{what}");
        assert_eq!(fs::read_to_string(base_file(&place)).unwrap(), "base", "{what}");
        assert!(!index_directory(directory).exists(), "{what}");
        assert_eq!(known_durable(directory), Ok(None), "{what}: it vouches for what is gone");
        assert_eq!(data_cursor(directory).load().unwrap(), cursor, "{what}");
        assert_eq!(&NodeConfig::read(directory).unwrap().branches, std::slice::from_ref(kept), "{what}");
        let config = NodeConfig::read(&place).unwrap();
        assert!(
            config.removed && config.source.is_none() && config.branches.is_empty(),
            "{what}: {config:?}"
        );
    }
}

/// The fear: a process that is killed while a log is put aside leaves a mirror that holds neither that log nor what takes its place.
#[test]
fn a_process_that_is_killed_between_any_two_steps_is_gone_on_with() {
    for instead in [Instead::Beginning, Instead::Snapshot] {
        for done in 0..=STEPS.len() {
            let scene = Scene::new();
            let kept = scene.order(instead);
            if instead == Instead::Snapshot {
                scene.snapshot_is_ready();
            }
            assert!(has_begun(scene.directory()));
            let order = order(scene.directory()).unwrap().unwrap();
            STEPS[..done].iter().for_each(|step| step(scene.directory(), &order).unwrap());
            settle(scene.directory(), &scene.config).unwrap();
            scene.assert_settled(instead, &kept, &format!("after {done} steps"));
            settle(scene.directory(), &scene.config).unwrap();
            scene.assert_settled(instead, &kept, "once more");
        }
    }
}

/// The fear: a mirror gives up what it holds for a snapshot that never came.
#[test]
fn without_its_snapshot_an_order_counts_for_nothing() {
    let scene = Scene::new();
    let kept = scene.order(Instead::Snapshot);
    assert!(!has_begun(scene.directory()));
    settle(scene.directory(), &scene.config).unwrap();
    assert!(scene.is_held_in(scene.directory(), 28));
    assert_eq!(NodeConfig::read(scene.directory()).unwrap().branches, []);
    assert!(!scene.directory().join(kept.place).exists());
    assert_eq!(known_durable(scene.directory()), Ok(Some(scene.tail())));
}

/// The fear: two histories that end at the same entry of the same epoch, and the second one cannot be put aside.
#[test]
fn two_branches_that_end_alike_have_places_of_their_own() {
    let scene = Scene::new();
    let first = scene.order(Instead::Beginning);
    settle(scene.directory(), &scene.config).unwrap();
    let second = kept_branch(scene.directory(), None, scene.tail());
    assert_ne!(first.place, second.place);
}

/// The fear: an order is lost or damaged, and the log of a mirror is put aside, or not, without anybody knowing.
#[test]
fn a_damaged_order_is_refused() {
    let scene = Scene::new();
    scene.order(Instead::Beginning);
    let path = scene.directory().join(SET_ASIDE);
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(has_begun(scene.directory()));
    let refused = settle(scene.directory(), &scene.config).unwrap_err().to_string();
    assert!(refused.contains(SET_ASIDE), "{refused}");
    assert!(scene.is_held_in(scene.directory(), 28));
}
