//! For tests: a look at a node's directory after each durable step of an order, and mirrors that say what they are told to.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use murphy_fs::{MemberRole, MemberRow, MemberState};
use murphy_log::{Log, Lsn, NodeId, Position};
use murphy_mirror::{Ack, MirrorBoard};

use super::{Mirroring, leading::read_set, lock};
use crate::settings;

type Look = Box<dyn FnMut() + Send>;

/// By the directories of the nodes.
static LOOKS: Mutex<BTreeMap<PathBuf, Look>> = Mutex::new(BTreeMap::new());

/// Looks after each durable step that the node in `directory` takes from now on, before it goes on.
pub(crate) fn look(directory: &Path, look: impl FnMut() + Send + 'static) {
    LOOKS.lock().unwrap().insert(directory.to_owned(), Box::new(look));
}

/// Looks no more.
pub(crate) fn look_away(directory: &Path) {
    LOOKS.lock().unwrap().remove(directory);
}

/// A durable step has been taken.
pub(super) fn done(directory: &Path) {
    if let Some(look) = LOOKS.lock().unwrap().get_mut(directory) {
        look();
    }
}

impl Mirroring {
    pub(crate) fn board(&self) -> &Arc<MirrorBoard> {
        &self.services.board
    }

    /// Makes `node` a member that holds a copy.
    pub(crate) fn admit(&self, node: NodeId) {
        let row = MemberRow {
            role: MemberRole::Mirror,
            state: MemberState::Joined { public_key: [7; 32] },
            name: String::new(),
            addresses: Vec::new(),
        };
        self.runtime.block_on(self.book.record(node, row)).unwrap();
    }

    /// The mirror has acknowledged everything that is durable here.
    pub(crate) fn has_everything(&self, node: NodeId) {
        self.has_up_to(node, self.log.durable().state().position.lsn);
    }

    /// The mirror has acknowledged what is durable here up to `lsn`.
    pub(crate) fn has_up_to(&self, node: NodeId, lsn: Lsn) {
        let position = Position { lsn, ..self.log.durable().state().position };
        let entry = self.services.board.connected(Duration::ZERO, node);
        entry.acknowledged(Ack { position, data_lsn: lsn });
    }

    /// Whether the set that acknowledges is being changed.
    pub(crate) fn is_turn_taken(&self) -> bool {
        self.set_turn.try_lock().is_err()
    }

    /// The last entry that every one of them has.
    pub(crate) fn held_by_all(&self) -> Lsn {
        let status = self.services.board.status(Duration::ZERO);
        status.iter().map(|mirror| mirror.metadata_lsn).min().unwrap_or_default()
    }

    /// How many an fsync asks of whom, if it waits for mirrors.
    pub(crate) fn counts(&self) -> Option<(usize, BTreeSet<NodeId>)> {
        let settings::Ack::Mirrors(wanted) = self.waited_for().unwrap() else { return None };
        let set = read_set(&self.directory).unwrap().unwrap_or_default();
        assert!(lock(&self.acknowledger).is_some(), "an fsync waits for mirrors");
        Some((self.needed(wanted as usize, &set), set))
    }
}
