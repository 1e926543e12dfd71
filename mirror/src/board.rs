//! The source's board of its mirrors: how far each is, for `status` and for those who wait for acknowledgements.
//!
//! Invariants:
//! - Only what a mirror acknowledged, or proved at its last connection, counts: entries durable in its log, bytes in its store.
//! - Of several connections of one mirror only the newest may say how far it is. That it holds more than the source counts from any.

use std::{collections::BTreeMap, time::Duration};

use murphy_log::{Epoch, Lsn, NodeId, Position};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{
    history::Point,
    message::Ack,
    status::{LagMeter, MirrorStatus, millis},
};

/// How far every mirror is.
#[derive(Debug)]
pub struct MirrorBoard {
    shared: Mutex<Shared>,
    /// Counts the changes that somebody may wait for.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Shared {
    mirrors: BTreeMap<NodeId, Mirror>,
    connections: u64,
    durable: Lsn,
    fenced: Option<Epoch>,
    /// After which point the history of the successor goes on, as it says.
    successor_base: Option<Point>,
    /// The furthest position that a mirror has acknowledged or proved, and which.
    furthest: Option<(NodeId, Position)>,
    /// What a mirror holds of this source's epoch and the source has lost.
    lost: Option<(NodeId, Position)>,
}

#[derive(Debug, Default)]
struct Mirror {
    connection: Option<u64>,
    /// The number of its newest connection, whether or not it still stands.
    newest: u64,
    metadata_lsn: Lsn,
    data_lsn: Lsn,
    lag: LagMeter,
    domains: Vec<String>,
    /// Why it does not follow, as it said when it was told who leads.
    refuses: Option<String>,
}

/// One connection of one mirror, as the board knows it. Dropping it marks the mirror as gone.
#[derive(Debug)]
pub struct BoardEntry<'a> {
    board: &'a MirrorBoard,
    node: NodeId,
    connection: u64,
}

impl Default for MirrorBoard {
    fn default() -> MirrorBoard {
        MirrorBoard { shared: Mutex::default(), changes: watch::Sender::new(0) }
    }
}

impl MirrorBoard {
    /// Notes a connection of the mirror `node`.
    pub fn connected(&self, now: Duration, node: NodeId) -> BoardEntry<'_> {
        let mut shared = self.shared.lock();
        shared.connections += 1;
        let (connection, durable) = (shared.connections, shared.durable);
        let mirror = shared.mirrors.entry(node).or_default();
        (mirror.connection, mirror.newest) = (Some(connection), connection);
        mirror.refuses = None;
        mirror.lag.heard(now, durable);
        BoardEntry { board: self, node, connection }
    }

    /// Lists a member, also if it has not connected yet.
    pub fn list_member(&self, now: Duration, node: NodeId) {
        let mut shared = self.shared.lock();
        let durable = shared.durable;
        shared.mirrors.entry(node).or_default().lag.heard(now, durable);
        drop(shared);
        self.changed();
    }

    /// Takes one off that is no member any more; its connections say nothing from then on.
    pub fn unlist_member(&self, node: NodeId) {
        self.shared.lock().mirrors.remove(&node);
        self.changed();
    }

    /// Notes what the copy of a mirror dies with, as the mirror says.
    pub fn set_domains(&self, node: NodeId, domains: Vec<String>) {
        self.shared.lock().mirrors.entry(node).or_default().domains = domains;
    }

    /// Notes that a listed member refuses to follow, and why. Says whether that is new.
    pub fn refused(&self, node: NodeId, why: String) -> bool {
        let mut shared = self.shared.lock();
        let Some(mirror) = shared.mirrors.get_mut(&node).filter(|mirror| mirror.connection.is_none()) else {
            return false;
        };
        mirror.refuses.replace(why.clone()).as_ref() != Some(&why)
    }

    /// Notes what is durable at the source.
    pub fn durable(&self, now: Duration, lsn: Lsn) {
        let mut shared = self.shared.lock();
        shared.durable = shared.durable.max(lsn);
        shared.mirrors.values_mut().for_each(|mirror| mirror.lag.heard(now, lsn));
    }

    /// Notes that a mirror has promised a later epoch: this source has been replaced.
    pub fn fenced(&self, by: Epoch) {
        self.shared.lock().fenced = Some(by);
        self.changed();
    }

    /// Notes where the history of a successor leaves this one's, as the successor says.
    pub fn note_successor_base(&self, base: Point) {
        self.shared.lock().successor_base = Some(base);
    }

    /// Where the history of the successor leaves this one's, if it has said so.
    pub fn successor_base(&self) -> Option<Point> {
        self.shared.lock().successor_base
    }

    /// The epoch that replaced this source, if a mirror has said so.
    pub fn fenced_by(&self) -> Option<Epoch> {
        self.shared.lock().fenced
    }

    /// The furthest position that a mirror is known to hold durably, and which mirror.
    pub fn furthest(&self) -> Option<(NodeId, Position)> {
        self.shared.lock().furthest
    }

    /// Notes that `node` holds more of this source's epoch than the source: up to `position`.
    pub fn note_lost(&self, node: NodeId, position: Position) {
        self.shared.lock().lost = Some((node, position));
        self.changed();
    }

    /// Who holds what this source has lost, and up to where, if somebody has said so.
    pub fn lost(&self) -> Option<(NodeId, Position)> {
        self.shared.lock().lost
    }

    /// Every mirror that was ever connected or listed, by node.
    pub fn status(&self, now: Duration) -> Vec<MirrorStatus> {
        let status = |(node, mirror): (&NodeId, &Mirror)| MirrorStatus {
            node: *node,
            metadata_lsn: mirror.metadata_lsn,
            data_lsn: mirror.data_lsn,
            lag_ms: millis(mirror.lag.lag(now)),
            connected: mirror.connection.is_some(),
            domains: mirror.domains.clone(),
            refuses: mirror.refuses.clone(),
        };
        self.shared.lock().mirrors.iter().map(status).collect()
    }

    /// Follows changes of the board; the value means nothing.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Lets everybody who waits look again.
    pub(crate) fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl BoardEntry<'_> {
    /// Notes what the mirror proved or acknowledged.
    pub fn acknowledged(&self, ack: Ack) {
        let mut shared = self.board.shared.lock();
        if shared.furthest.is_none_or(|(_, known)| known.lsn < ack.position.lsn) {
            shared.furthest = Some((self.node, ack.position));
        }
        drop(shared);
        self.set(ack.position.lsn, ack.data_lsn);
    }

    /// Notes that the mirror holds more of this source's epoch than the source.
    pub fn lost(&self, position: Position) {
        self.board.note_lost(self.node, position);
        self.holds_nothing();
    }

    /// Notes that the mirror is seeded, or that its position could not be found in this history: it holds nothing that counts.
    pub fn holds_nothing(&self) {
        self.set(Lsn::new(0), Lsn::new(0));
    }

    fn set(&self, metadata_lsn: Lsn, data_lsn: Lsn) {
        let mut shared = self.board.shared.lock();
        let Some(mirror) = shared.mirrors.get_mut(&self.node) else { return };
        if mirror.newest != self.connection {
            return;
        }
        (mirror.metadata_lsn, mirror.data_lsn) = (metadata_lsn, data_lsn);
        mirror.lag.restart(metadata_lsn);
        drop(shared);
        self.board.changed();
    }
}

impl Drop for BoardEntry<'_> {
    fn drop(&mut self) {
        let mut shared = self.board.shared.lock();
        if let Some(mirror) = shared.mirrors.get_mut(&self.node)
            && mirror.connection == Some(self.connection)
        {
            mirror.connection = None;
        }
        drop(shared);
        self.board.changed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{base_state, ms};

    fn ack(lsn: u64, data: u64) -> Ack {
        let mut position = base_state().position;
        position.lsn = Lsn::new(lsn);
        Ack { position, data_lsn: Lsn::new(data) }
    }

    /// A mirror's old connection may end long after its new one began.
    #[test]
    fn an_old_connection_says_nothing_any_more() {
        let (board, node) = (MirrorBoard::default(), NodeId::from_bytes([1; 16]));
        let old = board.connected(ms(0), node);
        old.acknowledged(ack(50, 40));
        let new = board.connected(ms(1), node);
        new.acknowledged(ack(30, 30));
        old.acknowledged(ack(60, 60));
        drop(old);
        let status = &board.status(ms(2))[0];
        assert!(status.connected);
        assert_eq!((status.metadata_lsn, status.data_lsn), (Lsn::new(30), Lsn::new(30)));
        drop(new);
        assert!(!board.status(ms(2))[0].connected);
    }

    /// The note of what a mirror is known to hold is made of this.
    #[test]
    fn the_furthest_position_that_a_mirror_has_proved_stays_known_when_the_mirror_is_gone() {
        let (board, nodes) = (MirrorBoard::default(), [1, 2].map(|byte| NodeId::from_bytes([byte; 16])));
        assert_eq!((board.furthest(), board.lost()), (None, None));
        let entries = nodes.map(|node| board.connected(ms(0), node));
        entries[0].acknowledged(ack(50, 40));
        entries[1].acknowledged(ack(30, 30));
        entries[0].holds_nothing();
        drop(entries);
        assert_eq!(board.furthest(), Some((nodes[0], ack(50, 40).position)));
    }

    #[test]
    fn the_lag_of_a_mirror_that_is_gone_grows_only_if_something_happened() {
        let (board, node) = (MirrorBoard::default(), NodeId::from_bytes([1; 16]));
        board.durable(ms(0), Lsn::new(5));
        let entry = board.connected(ms(0), node);
        entry.acknowledged(ack(5, 5));
        drop(entry);
        assert_eq!(board.status(ms(5000))[0].lag_ms, 0);
        board.durable(ms(6000), Lsn::new(6));
        assert_eq!(board.status(ms(9000))[0].lag_ms, 3000);
    }

    /// The fear: a mirror that never came after its source was started again is missing from what people look at.
    #[test]
    fn a_member_that_never_connected_is_listed_and_falls_behind() {
        let (board, node) = (MirrorBoard::default(), NodeId::from_bytes([1; 16]));
        board.durable(ms(0), Lsn::new(5));
        let mut changes = board.changes();
        board.list_member(ms(1000), node);
        assert!(changes.has_changed().unwrap(), "whoever waits looks again");
        changes.mark_unchanged();
        let status = &board.status(ms(4000))[0];
        assert_eq!((status.node, status.connected, status.lag_ms), (node, false, 3000));
        // Listing it again makes nothing younger, and what it proves counts.
        board.list_member(ms(4000), node);
        assert_eq!(board.status(ms(5000))[0].lag_ms, 4000);
        board.connected(ms(5000), node).acknowledged(ack(5, 5));
        assert_eq!(board.status(ms(6000))[0].lag_ms, 0);
    }
}
