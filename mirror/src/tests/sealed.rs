//! What a mirror says after a promise, over real QUIC on the loopback interface.

use std::sync::Arc;

use murphy_fs::MemberRole;
use murphy_log::{Epoch, Frame, Log, Lsn, NodeId, State};
use parking_lot::Mutex;

use super::{
    BRANCH, ReplicaLayer, base_state, epoch, extend, keys, log_of, ms,
    quic::{Node, admit, dialer, follow, follow_with},
    test_frames, until,
};
use crate::{Durability, MemoryBook, MemoryReplica, Replica, ReplicaError, check_append, check_promise};

/// How far the source knows the mirror to be: entries, and bytes.
fn known(source: &Node, mirror: NodeId) -> (Lsn, Lsn) {
    let status = source.services.board.status(ms(0));
    let found = status.iter().find(|status| status.node == mirror);
    found.map_or((Lsn::new(0), Lsn::new(0)), |found| (found.metadata_lsn, found.data_lsn))
}

/// The fear: whoever takes over was told that this mirror lacks bytes, goes on without them, and the old source acknowledges them meanwhile.
/// One thread, and nothing is waited for between the promise and the bytes: the mirror hears of both at once.
#[tokio::test]
async fn bytes_that_come_after_a_promise_are_not_acknowledged_to_the_old_source() {
    let source = Node::start(Arc::default(), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 10, 3)));
    source.lead(&log, 1000);
    let (dialer, tail) = (dialer(), log.tail().position.lsn);
    admit(&source.book, dialer.identity.public_key(), MemberRole::Mirror);
    let replica = Arc::new(MemoryReplica::new(keys(), Some(base_state()), Durability::Immediate));
    let node = Arc::new(Quiet { replica: Arc::clone(&replica), promised: Mutex::default() });
    let key = source.identity.public_key();
    let mirror = follow_with(dialer, replica, node.clone(), source.address, key);
    until("the mirror", || {
        mirror.handle.status.borrow().connected && known(&source, mirror.node) == (tail, Lsn::new(0))
    })
    .await;
    // Whatever else it has to hear of comes first.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    node.promise(epoch(2)).unwrap();
    mirror.replica.set_data(tail);
    // With this frame the mirror leaves; its next first word ends the source.
    extend(&log, &test_frames(log.tail(), 1, 1, 2));
    until("the source to be told", || source.services.board.fenced_by() == Some(epoch(2))).await;
    assert_eq!(known(&source, mirror.node), (tail, Lsn::new(0)));
    mirror.stop().await;
    source.stop().await;
}

/// The same for a mirror that made the promise while its source was away: the first word to the source that comes back says so.
#[tokio::test]
async fn a_promise_that_was_made_while_the_source_was_away_is_the_first_thing_that_it_hears() {
    let book: Arc<MemoryBook> = Arc::default();
    let source = Node::start(Arc::clone(&book), None).await;
    let log = Arc::new(log_of(base_state(), &test_frames(base_state(), 1, 10, 3)));
    source.lead(&log, 1000);
    let (mirror, tail) = (follow(&source, Some(base_state())), log.tail().position.lsn);
    until("the mirror", || known(&source, mirror.node).0 == tail).await;
    let (identity, address) = (source.identity.clone(), source.address);
    source.stop().await;
    until("the mirror to notice", || !mirror.handle.status.borrow().connected).await;
    mirror.replica.promise(epoch(2)).unwrap();
    mirror.replica.set_data(tail);
    let source = Node::start_as(identity, book, None, BRANCH, address).await;
    source.lead(&log, 1000);
    until("the source to be told", || source.services.board.fenced_by() == Some(epoch(2))).await;
    assert_eq!(known(&source, mirror.node), (Lsn::new(0), Lsn::new(0)), "nothing was acknowledged to it");
    mirror.stop().await;
    source.stop().await;
}

/// A node whose promise changes nothing that is looked at anyway: its log had nothing to sync.
struct Quiet {
    replica: Arc<MemoryReplica>,
    promised: Mutex<Option<Epoch>>,
}

impl ReplicaLayer for Quiet {
    fn below(&self) -> &MemoryReplica {
        &self.replica
    }

    fn on_append(&self, frame: Frame, told: Option<Epoch>) -> Result<(), ReplicaError> {
        check_append(self.promised(), frame.epoch(), told)?;
        self.replica.append(frame, told)
    }

    fn on_promised(&self) -> Option<Epoch> {
        *self.promised.lock()
    }

    fn on_promise(&self, epoch: Epoch) -> Result<Option<State>, ReplicaError> {
        *self.promised.lock() = Some(epoch);
        Ok(self.state())
    }
}

/// One rule for every node, wherever it keeps its promise.
#[test]
fn a_promise_keeps_older_epochs_out_and_is_not_taken_back() {
    let promised = |epoch| Err(ReplicaError::Promised { promised: epoch });
    let mut twin = epoch(2);
    twin.id = epoch(9).id;
    assert_eq!(check_append(None, epoch(1), None), Ok(()));
    assert_eq!(check_append(Some(epoch(2)), epoch(1), None), promised(epoch(2)));
    assert_eq!(check_append(Some(epoch(2)), twin, None), promised(epoch(2)));
    assert_eq!(check_append(Some(epoch(2)), epoch(1), Some(epoch(2))), Ok(()), "its source knows of it");
    assert_eq!(check_append(Some(epoch(2)), epoch(1), Some(epoch(1))), promised(epoch(2)));
    for later in [epoch(2), epoch(3)] {
        assert_eq!(check_promise(Some(epoch(2)), Some(epoch(1)), later), Ok(()));
        assert_eq!(check_promise(None, Some(epoch(2)), later), Ok(()));
    }
    for (made, held) in [(Some(epoch(2)), Some(epoch(1))), (None, Some(epoch(2)))] {
        for earlier in [epoch(1), twin] {
            assert_eq!(check_promise(made, held, earlier), promised(epoch(2)));
        }
    }
}
