//! `--ack mirror=W`: an fsync waits until W mirrors have the entries and the bytes.
//!
//! Invariants:
//! - A mirror counts for an fsync only when its data position has reached the LSN, which is never above its metadata position.
//! - Only members of the acknowledging set count, whoever else is connected.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use murphy_fs::{AcknowledgeError, Acknowledgement, Acknowledger};
use murphy_log::{Lsn, NodeId};
use parking_lot::RwLock;

use crate::{MirrorStatus, board::MirrorBoard};

/// Waits for mirrors.
#[derive(Debug)]
pub struct MirrorAcknowledger {
    board: Arc<MirrorBoard>,
    set: RwLock<AckSet>,
    /// Whether one that lacks bytes counts.
    entries_suffice: bool,
}

#[derive(Clone, Debug)]
struct AckSet {
    wanted: usize,
    members: BTreeSet<NodeId>,
}

impl MirrorAcknowledger {
    /// Waits for `wanted` of `members`.
    pub fn new(board: Arc<MirrorBoard>, wanted: usize, members: BTreeSet<NodeId>) -> MirrorAcknowledger {
        MirrorAcknowledger { board, set: RwLock::new(AckSet { wanted, members }), entries_suffice: false }
    }

    /// Waits until `wanted` of `members` know what the entries up to an LSN say, whatever they lack of the bytes. Nothing is acknowledged by that.
    pub fn of_entries(
        board: Arc<MirrorBoard>,
        wanted: usize,
        members: BTreeSet<NodeId>,
    ) -> MirrorAcknowledger {
        MirrorAcknowledger { entries_suffice: true, ..MirrorAcknowledger::new(board, wanted, members) }
    }

    /// Changes the set, once the entry that changes it has been acknowledged under the old one.
    pub fn set(&self, wanted: usize, members: BTreeSet<NodeId>) {
        *self.set.write() = AckSet { wanted, members };
        // Those who wait may have enough by now, and no mirror may have anything to say for a while.
        self.board.changed();
    }

    async fn wait(&self, lsn: Lsn) -> Result<(), AcknowledgeError> {
        let mut changes = self.board.changes();
        loop {
            // Marked as seen before looking, so that no change in between is missed.
            changes.borrow_and_update();
            if let Some(epoch) = self.board.fenced_by() {
                return Err(AcknowledgeError::Fenced(format!("a mirror has promised epoch {epoch}")));
            }
            if let Some((node, position)) = self.board.lost() {
                let held = format!("mirror {node} holds lsn {}, this source does not", position.lsn);
                return Err(AcknowledgeError::Lost(held));
            }
            if self.held(lsn).0 >= self.set.read().wanted {
                return Ok(());
            }
            if changes.changed().await.is_err() {
                return Err(self.too_few(lsn));
            }
        }
    }

    /// How many have `lsn`, and the others.
    fn held(&self, lsn: Lsn) -> (usize, Vec<String>) {
        let set = self.set.read().clone();
        let status = self.board.status(Duration::ZERO);
        let mut missing = Vec::new();
        for node in &set.members {
            let mirror = status.iter().find(|mirror| mirror.node == *node);
            let has_bytes = |mirror: &MirrorStatus| self.entries_suffice || mirror.data_lsn >= lsn;
            if !mirror.is_some_and(|mirror| mirror.metadata_lsn >= lsn && has_bytes(mirror)) {
                missing.push(describe(*node, mirror));
            }
        }
        (set.members.len() - missing.len(), missing)
    }

    fn too_few(&self, lsn: Lsn) -> AcknowledgeError {
        let (held, missing) = self.held(lsn);
        let wanted = self.set.read().wanted;
        let missing = if missing.is_empty() { "no further member".to_owned() } else { missing.join(", ") };
        AcknowledgeError::TooFew { lsn, held, wanted, missing }
    }
}

fn describe(node: NodeId, mirror: Option<&MirrorStatus>) -> String {
    match mirror {
        None => format!("{node} was never connected"),
        Some(MirrorStatus { refuses: Some(why), .. }) => format!("{node} does not follow ({why})"),
        Some(MirrorStatus { connected: false, .. }) => format!("{node} is not connected"),
        Some(mirror) => {
            format!("{node} has entries up to {} and bytes up to {}", mirror.metadata_lsn, mirror.data_lsn)
        }
    }
}

impl Acknowledger for MirrorAcknowledger {
    fn acknowledged(&self, lsn: Lsn, deadline: Duration) -> Acknowledgement<'_> {
        Box::pin(async move {
            match tokio::time::timeout(deadline, self.wait(lsn)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(self.too_few(lsn)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        message::Ack,
        tests::{base_state, epoch, ms},
    };

    fn ack(lsn: u64, data: u64) -> Ack {
        let mut position = base_state().position;
        position.lsn = Lsn::new(lsn);
        Ack { position, data_lsn: Lsn::new(data) }
    }

    fn nodes(count: u8) -> Vec<NodeId> {
        (1..=count).map(|byte| NodeId::from_bytes([byte; 16])).collect()
    }

    #[tokio::test]
    async fn entries_without_their_bytes_do_not_count() {
        let (board, nodes) = (Arc::new(MirrorBoard::default()), nodes(3));
        let members = nodes[..2].iter().copied().collect();
        let acknowledger = MirrorAcknowledger::new(Arc::clone(&board), 1, members);
        let (first, stranger) = (board.connected(ms(0), nodes[0]), board.connected(ms(0), nodes[2]));
        stranger.acknowledged(ack(10, 10));
        first.acknowledged(ack(10, 9));
        let refused = acknowledger.acknowledged(Lsn::new(10), ms(50)).await.unwrap_err();
        let text = refused.to_string();
        assert!(text.starts_with("0 of 1 copies acknowledged lsn 10"), "{text}");
        assert!(text.contains("bytes up to 9") && text.contains("never connected"), "{text}");
        first.acknowledged(ack(10, 10));
        assert_eq!(acknowledger.acknowledged(Lsn::new(10), ms(50)).await, Ok(()));
    }

    /// The fear: whoever joins holds up every fsync until its copy is whole, although it need only know who else belongs to the volume.
    #[tokio::test]
    async fn who_has_the_entries_knows_what_they_say() {
        let (board, nodes) = (Arc::new(MirrorBoard::default()), nodes(2));
        let members: BTreeSet<NodeId> = nodes.iter().copied().collect();
        let informed = MirrorAcknowledger::of_entries(Arc::clone(&board), 2, members);
        let entries: Vec<_> = nodes.iter().map(|node| board.connected(ms(0), *node)).collect();
        entries[0].acknowledged(ack(10, 10));
        entries[1].acknowledged(ack(9, 0));
        assert!(informed.acknowledged(Lsn::new(10), ms(20)).await.is_err());
        entries[1].acknowledged(ack(10, 0));
        assert_eq!(informed.acknowledged(Lsn::new(10), ms(20)).await, Ok(()));
        entries[1].holds_nothing();
        assert!(informed.acknowledged(Lsn::new(1), ms(20)).await.is_err());
    }

    #[tokio::test]
    async fn a_waiter_is_woken_by_the_acknowledgement_that_completes_it() {
        let (board, nodes) = (Arc::new(MirrorBoard::default()), nodes(2));
        let acknowledger =
            Arc::new(MirrorAcknowledger::new(Arc::clone(&board), 2, nodes.iter().copied().collect()));
        let entries: Vec<_> = nodes.iter().map(|node| board.connected(ms(0), *node)).collect();
        let waiter = {
            let acknowledger = Arc::clone(&acknowledger);
            tokio::spawn(async move { acknowledger.acknowledged(Lsn::new(7), ms(10_000)).await })
        };
        tokio::task::yield_now().await;
        entries[0].acknowledged(ack(8, 8));
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        entries[1].acknowledged(ack(7, 7));
        assert_eq!(waiter.await.unwrap(), Ok(()));
    }

    /// The fear: fewer are asked for, all of them have it, and who waits hears of it with the next thing that a mirror says.
    #[tokio::test]
    async fn a_waiter_is_woken_by_the_change_of_the_set_that_completes_it() {
        let (board, nodes) = (Arc::new(MirrorBoard::default()), nodes(2));
        let members: BTreeSet<NodeId> = nodes.iter().copied().collect();
        let acknowledger = Arc::new(MirrorAcknowledger::new(Arc::clone(&board), 2, members.clone()));
        board.connected(ms(0), nodes[0]).acknowledged(ack(7, 7));
        let waiter = {
            let acknowledger = Arc::clone(&acknowledger);
            tokio::spawn(async move { acknowledger.acknowledged(Lsn::new(7), ms(10_000)).await })
        };
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        acknowledger.set(1, members);
        assert_eq!(waiter.await.unwrap(), Ok(()));
    }

    #[tokio::test]
    async fn a_promise_to_another_source_ends_all_waiting() {
        let board = Arc::new(MirrorBoard::default());
        let acknowledger = MirrorAcknowledger::new(Arc::clone(&board), 1, nodes(1).into_iter().collect());
        board.fenced(epoch(9));
        let refused = acknowledger.acknowledged(Lsn::new(7), ms(10_000)).await;
        assert!(matches!(refused, Err(AcknowledgeError::Fenced(_))));
    }

    /// Who is not a member any more must not count, and who is away is said to be.
    #[tokio::test]
    async fn a_changed_set_counts_its_own_members_only() {
        let (board, nodes) = (Arc::new(MirrorBoard::default()), nodes(2));
        let acknowledger = MirrorAcknowledger::new(Arc::clone(&board), 1, [nodes[0]].into());
        board.connected(ms(0), nodes[0]).acknowledged(ack(10, 10));
        acknowledger.acknowledged(Lsn::new(10), ms(50)).await.unwrap();
        drop(board.connected(ms(0), nodes[1]));
        acknowledger.set(1, [nodes[1]].into());
        let refused = acknowledger.acknowledged(Lsn::new(10), ms(50)).await.unwrap_err().to_string();
        assert!(refused.contains(&format!("{} is not connected", nodes[1])), "{refused}");
        assert!(!refused.contains(&nodes[0].to_string()), "{refused}");
    }
}
