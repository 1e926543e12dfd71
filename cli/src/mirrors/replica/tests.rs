//! What a mirror's node on disk promises, and to whom.

use murphy_fs::{Index, MemoryIndex, SnapshotOrigin, write_snapshot};
use murphy_log::{Appender, Digest, DiskOptions, Entry, EpochId, LogTime, Usage, VolumeId};
use tokio::runtime::Runtime;

use super::*;

fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
}

fn open(directory: &Path, config: &NodeConfig) -> DiskReplica {
    let runtime = Runtime::new().unwrap();
    DiskReplica::open(directory, config, runtime.handle()).unwrap()
}

/// A node's directory whose log holds an entry of each of these epochs.
struct Scene {
    directory: tempfile::TempDir,
    config: NodeConfig,
    end: State,
}

impl Scene {
    fn new(epochs: &[u32]) -> Scene {
        let directory = tempfile::tempdir().unwrap();
        let (volume, branch) = (VolumeId::from_bytes([1; 16]), BranchId::from_bytes([2; 16]));
        let config = NodeConfig::new(volume, branch, "v".to_owned(), "file:///x".parse().unwrap());
        config.write(directory.path()).unwrap();
        let mut end = State::origin(epoch(epochs[0]));
        let log =
            DiskLog::create(DiskOptions::new(log_directory(directory.path()), volume, branch), end).unwrap();
        for number in epochs {
            let frame = frame(epoch(*number), end);
            append_copy(&log, frame.clone()).unwrap();
            end = log.durable().wait_blocking(frame.last(), DURABLE_MAX).unwrap();
        }
        Scene { directory, config, end }
    }

    fn open(&self) -> DiskReplica {
        open(self.directory.path(), &self.config)
    }
}

/// A frame of one entry that continues `from` in `epoch`.
fn frame(epoch: Epoch, from: State) -> Frame {
    let mut appender = Appender::new(VolumeKeys::derive(VolumeId::from_bytes([1; 16])), epoch, from);
    let entry = Entry::tick(from.position.lsn.next(), LogTime::from_nanos(from.position.lsn.get()));
    appender.push(&entry, Digest(0), Usage::default()).unwrap();
    appender.close(LogTime::from_nanos(5), from.position.lsn).unwrap()
}

/// The fear: a mirror that was joined by hand to the successor has promised nothing. Whoever begins an older epoch, or another one of the
/// same number, gets its promise, and counts it among those through which the other source cannot acknowledge any more.
#[test]
fn a_node_promises_nothing_older_than_what_it_holds() {
    let scene = Scene::new(&[1, 3]);
    for older in [epoch(1), epoch(2), Epoch { number: 3, ..epoch(9) }] {
        let replica = scene.open();
        assert_eq!(replica.promise(older), Err(ReplicaError::Promised { promised: epoch(3) }), "{older}");
        assert_eq!(replica.promised(), None, "a refused promise changes nothing");
        drop(replica);
        assert_eq!(scene.open().promised(), None, "nor does it on the disk");
    }
    for good in [epoch(3), epoch(4)] {
        assert_eq!(scene.open().promise(good), Ok(Some(scene.end)));
        assert_eq!(scene.open().promised(), Some(good), "it is remembered");
    }
    let replica = scene.open();
    assert_eq!(
        replica.promise(epoch(3)),
        Err(ReplicaError::Promised { promised: epoch(4) }),
        "the later one"
    );
}

/// The fear: after a promise, or after a restart that follows it, the old source still gets entries into this node and counts it.
#[test]
fn a_node_takes_nothing_older_than_its_promise_but_from_who_knows_of_it() {
    let scene = Scene::new(&[1]);
    scene.open().promise(epoch(3)).unwrap();
    let replica = scene.open();
    let old = frame(epoch(1), scene.end);
    let refused = Err(ReplicaError::Promised { promised: epoch(3) });
    assert_eq!(replica.append(old.clone(), None), refused);
    assert_eq!(replica.append(old.clone(), Some(epoch(2))), refused, "of another promise");
    assert_eq!(replica.state(), Some(scene.end), "nothing was queued");
    replica.append(old.clone(), Some(epoch(3))).unwrap();
    let next = State { position: old.position(), ..scene.end };
    replica.append(frame(epoch(3), next), None).unwrap();
    let held = replica.promise(epoch(3)).unwrap().unwrap().position;
    assert_eq!((held.epoch, held.lsn), (epoch(3), scene.end.position.lsn.advanced(2)));
}

/// The fear: a node that holds nothing yet promises nothing either, and nobody can ever take over.
#[test]
fn a_node_that_holds_nothing_promises_too() {
    let directory = tempfile::tempdir().unwrap();
    let scene = Scene::new(&[1]);
    let open = || open(directory.path(), &scene.config);
    scene.config.write(directory.path()).unwrap();
    assert_eq!(open().promise(epoch(2)), Ok(None));
    assert_eq!(open().promise(epoch(1)), Err(ReplicaError::Promised { promised: epoch(2) }));
}

/// A snapshot of an empty tree at `state`.
fn snapshot(state: State, branch: BranchId) -> Vec<u8> {
    let index = MemoryIndex::new();
    index.ingest(&mut std::iter::empty(), &state).unwrap();
    let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
    let (mut bytes, origin) = (Vec::new(), SnapshotOrigin { branch, created: LogTime::default() });
    write_snapshot(&*index.snapshot(), &keys, origin, &mut bytes, &|_| {}).unwrap();
    bytes
}

/// The fear: a mirror whose history has parted gives all of it up, or goes on acknowledging what it has put aside.
#[test]
fn a_node_goes_back_to_the_common_ancestor_and_keeps_the_rest() {
    for in_use in [false, true] {
        let scene = Scene::new(&[1, 1, 1]);
        let replica = scene.open();
        let frames: Vec<Frame> =
            replica.history().unwrap().read(Lsn::FIRST).unwrap().map(Result::unwrap).collect();
        let ancestor = Point { lsn: frames[0].last(), hash: frames[0].position().hash };
        let early = replica.set_aside(ancestor, frames[1].position());
        assert!(matches!(early, Err(ReplicaError::Storage(_))), "it goes on behind that");
        replica.promise(epoch(2)).unwrap();
        let log = if in_use { replica.use_log() } else { None };
        replica.set_aside(ancestor, scene.end.position).unwrap();
        assert_eq!(replica.restart().borrow().is_some(), in_use);
        assert_eq!(replica.state(), (!in_use).then(|| frames[0].state()));
        drop((replica, log));
        let replica = scene.open();
        assert_eq!(replica.state(), Some(frames[0].state()));
        assert_eq!(replica.promised(), Some(epoch(2)), "what it has promised it keeps");
        let old = Err(ReplicaError::Promised { promised: epoch(2) });
        assert_eq!(replica.append(frames[1].clone(), None), old);
        replica.append(frame(epoch(2), frames[0].state()), None).unwrap();
        let config = NodeConfig::read(scene.directory.path()).unwrap();
        let [kept] = &config.branches[..] else { panic!("{:?}", config.branches) };
        assert_eq!((kept.after_lsn, kept.last_lsn), (2, 4));
        let kept = open_log(&scene.directory.path().join(&kept.place), &config).unwrap();
        assert_eq!(kept.tail(), scene.end);
    }
}

/// The fear: while a snapshot arrives, or because it does not, a mirror holds nothing that a second disaster would leave.
#[test]
fn what_a_node_holds_stays_until_a_snapshot_can_take_its_place() {
    for in_use in [false, true] {
        let scene = Scene::new(&[1, 1]);
        let replica = scene.open();
        let log = if in_use { replica.use_log() } else { None };
        let position = Position { lsn: Lsn::new(90), epoch: epoch(2), ..scene.end.position };
        let state = State { position, digest: Digest(0), usage: Usage::default() };
        let bytes = snapshot(state, scene.config.branch);
        let seed = |cut: usize| {
            let mut seed = replica.begin_seed(state).unwrap();
            seed.write_at(0, &bytes[..bytes.len() - cut]).unwrap();
            seed
        };
        for refused in [seed(1).finish(bytes.len() as u64), seed(1).finish(bytes.len() as u64 - 1)] {
            assert!(matches!(refused, Err(ReplicaError::BadSnapshot(_))), "{refused:?}");
            assert_eq!(replica.state(), Some(scene.end));
        }
        drop(seed(0));
        // A process that was killed right before the snapshot counted.
        order_snapshot(scene.directory.path(), &scene.config, state, scene.end.position).unwrap();
        assert_eq!(replica.state(), Some(scene.end));
        assert_eq!(replica.promise(epoch(1)), Ok(Some(scene.end)), "a holder like any other");
        let finished = seed(0).finish(bytes.len() as u64);
        assert_eq!(finished.is_ok(), !in_use, "{finished:?}");
        assert_eq!(replica.state(), (!in_use).then_some(state));
        drop((replica, log));
        assert_eq!(scene.open().state(), Some(state));
        let config = NodeConfig::read(scene.directory.path()).unwrap();
        let [kept] = &config.branches[..] else { panic!("{:?}", config.branches) };
        let kept = open_log(&scene.directory.path().join(&kept.place), &config).unwrap();
        assert_eq!(kept.tail(), scene.end);
    }
}

/// The fear: a snapshot of the source before is verified while the mirror takes over, and puts aside the log in which it leads; or the other way
/// round: a log is claimed whose replacement is complete.
#[test]
fn a_snapshot_that_is_complete_while_its_mirror_takes_over_replaces_nothing() {
    let scene = Scene::new(&[1, 1]);
    let replica = scene.open();
    let log = replica.use_log();
    let position = Position { lsn: Lsn::new(90), epoch: epoch(2), ..scene.end.position };
    let state = State { position, digest: Digest(0), usage: Usage::default() };
    let bytes = snapshot(state, scene.config.branch);
    let seed = || {
        let mut seed = replica.begin_seed(state).unwrap();
        seed.write_at(0, &bytes).unwrap();
        seed
    };
    let arrived = seed();
    replica.close().unwrap();
    let takes_over = |refused: ReplicaError| refused.to_string().contains("takes over");
    assert!(takes_over(arrived.finish(bytes.len() as u64).unwrap_err()));
    assert!(replica.begin_seed(state).err().is_some_and(takes_over));
    let first = replica.history().unwrap().read(Lsn::FIRST).unwrap().next().unwrap().unwrap();
    let ancestor = Point { lsn: first.last(), hash: first.position().hash };
    assert!(takes_over(replica.set_aside(ancestor, scene.end.position).unwrap_err()));
    assert!(replica.restart().borrow().is_none());
    assert_eq!(replica.promise(epoch(3)), Ok(Some(scene.end)));
    assert_eq!(replica.state(), Some(scene.end));
    drop((replica, log));
    let replica = scene.open();
    assert_eq!(replica.state(), Some(scene.end), "also for a process that was killed before it led");
    let log = replica.use_log();
    replica.close().unwrap();
    replica.reopen();
    let mut arrived = replica.begin_seed(state).unwrap();
    arrived.write_at(0, &bytes).unwrap();
    assert!(arrived.finish(bytes.len() as u64).is_err(), "it begins anew with that");
    assert!(replica.close().is_err(), "what it holds is about to be replaced");
    drop((replica, log));
    assert_eq!(scene.open().state(), Some(state));
}

/// The fear: a snapshot whose connection is gone is verified while the mirror follows again, and then replaces what has been acknowledged since; or
/// it is put in place of half of another one that arrives meanwhile.
#[test]
fn a_snapshot_that_was_given_up_replaces_nothing_that_came_since() {
    for in_use in [false, true] {
        let scene = Scene::new(&[1, 1]);
        let replica = scene.open();
        let log = if in_use { replica.use_log() } else { None };
        let seed_of = |lsn| {
            let position = Position { lsn: Lsn::new(lsn), epoch: epoch(2), ..scene.end.position };
            let state = State { position, digest: Digest(0), usage: Usage::default() };
            let bytes = snapshot(state, scene.config.branch);
            let mut seed = replica.begin_seed(state).unwrap();
            seed.write_at(0, &bytes).unwrap();
            (seed, bytes.len() as u64, state)
        };
        let (old, old_bytes, _) = seed_of(90);
        replica.reopen();
        let given_up = |refused: ReplicaError| refused.to_string().contains("given up");
        assert!(given_up(old.finish(old_bytes).unwrap_err()), "it follows somebody else");
        let (old, old_bytes, _) = seed_of(90);
        let next = frame(epoch(3), scene.end);
        replica.append(next.clone(), None).unwrap();
        assert!(given_up(old.finish(old_bytes).unwrap_err()), "it holds more since");
        let (old, old_bytes, _) = seed_of(90);
        let (new, new_bytes, newest) = seed_of(120);
        let files = fs::read_dir(scene.directory.path().join("base")).unwrap().count();
        assert_eq!(files, 1, "what is given up takes no room");
        assert!(given_up(old.finish(old_bytes).unwrap_err()), "another one arrives");
        assert!(replica.restart().borrow().is_none());
        assert_eq!(replica.promise(epoch(3)).unwrap().unwrap().position, next.position());
        assert_eq!(new.finish(new_bytes).is_ok(), !in_use);
        let behind = frame(epoch(3), next.state());
        assert!(replica.append(behind, None).is_err(), "nothing is added to what was replaced");
        drop((replica, log));
        assert_eq!(scene.open().state(), Some(newest));
    }
}
