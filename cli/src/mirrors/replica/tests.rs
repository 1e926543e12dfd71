//! What a mirror's node on disk promises, and to whom.

use murphy_log::{Appender, Digest, DiskOptions, Entry, EpochId, LogTime, Usage, VolumeId};

use super::*;

fn epoch(number: u32) -> Epoch {
    Epoch { number, id: EpochId::from_bytes([number as u8; 16]) }
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
        DiskReplica::open(self.directory.path(), &self.config).unwrap()
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
    let open = || DiskReplica::open(directory.path(), &scene.config).unwrap();
    scene.config.write(directory.path()).unwrap();
    assert_eq!(open().promise(epoch(2)), Ok(None));
    assert_eq!(open().promise(epoch(1)), Err(ReplicaError::Promised { promised: epoch(2) }));
}
