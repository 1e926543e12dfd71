//! Who can give back what a node has lost: archives, the members that hold copies, and the source that a mirror follows.
//!
//! Invariants:
//! - What a giver hands out continues the history that it was asked about, verified on the chain.
//! - Who they are is read from what the node still has: the index, or the log if there is no index.

mod archive;
mod mirror;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use futures::future::BoxFuture;
use murphy_fs::{FjallIndex, FjallOptions, Index, MemberRow, MemberState, RowKey, SettingRow, Table};
use murphy_log::{DiskLog, Epoch, Frame, Log, NodeId, Position};
use murphy_mirror::Identity;

use crate::{
    config::NodeConfig,
    error::{CliError, failed},
    settings::{ARCHIVES, SharedArchive},
};
pub(crate) use archive::ArchiveGiver;
pub(crate) use mirror::{Member, MirrorGiver, dialer};

/// Somebody who may hold entries that this node has lost.
pub(crate) trait Giver: Send + Sync {
    /// What messages call it.
    fn name(&self) -> String;

    /// The next frames that it holds behind `after`, of whatever epochs, a bounded number; none if it holds nothing there.
    fn frames(&self, after: Position) -> BoxFuture<'_, Result<Vec<Frame>, NotGiven>>;

    /// Appends to `log`, which nobody leads yet, what it holds beyond it of the epoch `own`; durable when it returns. Fails if that epoch has
    /// ended there.
    fn give_back(&self, log: Arc<DiskLog>, own: Epoch) -> BoxFuture<'_, Result<(), CliError>>;
}

/// Why frames are not handed out.
pub(crate) struct NotGiven {
    pub(crate) error: CliError,
    /// It was not reached: there is no use in asking again soon, which takes long.
    pub(crate) is_silent: bool,
}

impl From<CliError> for NotGiven {
    fn from(error: CliError) -> NotGiven {
        NotGiven { error, is_silent: false }
    }
}

/// Everybody who may have what the node in `directory` has lost, archives first. Without a log only the index is asked who they are.
pub(crate) fn givers_of(
    directory: &Path,
    config: &NodeConfig,
    index: &Path,
    log: Option<&DiskLog>,
) -> Result<Vec<Box<dyn Giver>>, CliError> {
    let identity = Arc::new(Identity::load_or_create(directory).map_err(failed)?);
    let known = match Known::of_index(index) {
        Some(known) => known,
        None => log.map(Known::of_log).transpose()?.unwrap_or_default(),
    };
    let mut givers: Vec<Box<dyn Giver>> = Vec::new();
    for shared in known.archives()? {
        givers.push(Box::new(ArchiveGiver::new(config, shared, identity.node())));
    }
    let source = config.source.as_ref().map(Member::of_source);
    let followed = source.as_ref().map(|source| source.node);
    if let Some(member) = source {
        givers.push(Box::new(MirrorGiver::new(config, member, dialer(&identity))));
    }
    for (node, row) in known.members {
        if node != identity.node()
            && Some(node) != followed
            && row.role.holds_copy()
            && let Some(member) = Member::of_row(node, row)
        {
            givers.push(Box::new(MirrorGiver::new(config, member, dialer(&identity))));
        }
    }
    Ok(givers)
}

/// What the rows of a volume say of its copies.
#[derive(Default)]
struct Known {
    archives: Option<bytes::Bytes>,
    members: BTreeMap<NodeId, MemberRow>,
}

impl Known {
    /// `None` if there is no index that can be read.
    fn of_index(path: &Path) -> Option<Known> {
        if !path.is_dir() {
            return None;
        }
        let snapshot = FjallIndex::open(path, FjallOptions::default()).ok()?.snapshot();
        let mut known =
            Known { archives: snapshot.get(&RowKey::setting(ARCHIVES)).ok()?, ..Known::default() };
        let (first, end) = (Table::Member.number(), Table::Member.number() + 1);
        for row in snapshot.scan(RowKey::from_parts(first, &[])..RowKey::from_parts(end, &[])) {
            let (key, value) = row.ok()?;
            known.note_member(key.key(), Some(&value));
        }
        Some(known)
    }

    /// The newest rows in the log.
    fn of_log(log: &DiskLog) -> Result<Known, CliError> {
        let (archives, mut known) = (RowKey::setting(ARCHIVES), Known::default());
        for frame in log.read(log.first()).map_err(failed)? {
            for entry in &frame.map_err(failed)? {
                for change in entry.map_err(failed)?.changes {
                    if (change.table, &change.key[..]) == (archives.table(), archives.key()) {
                        known.archives = change.value;
                    } else if change.table == Table::Member.number() {
                        known.note_member(&change.key, change.value.as_ref());
                    }
                }
            }
        }
        Ok(known)
    }

    fn note_member(&mut self, key: &[u8], row: Option<&bytes::Bytes>) {
        let Ok(node) = key.try_into().map(NodeId::from_bytes) else { return };
        match row.map(|row| MemberRow::decode(row)) {
            Some(Ok(row)) if matches!(row.state, MemberState::Joined { .. }) => {
                self.members.insert(node, row);
            }
            Some(Ok(_)) | None => {
                self.members.remove(&node);
            }
            // Whoever it is cannot be reached.
            Some(Err(error)) => tracing::warn!(%node, %error, "a member cannot be read"),
        }
    }

    fn archives(&self) -> Result<Vec<SharedArchive>, CliError> {
        let Some(row) = &self.archives else { return Ok(Vec::new()) };
        let text = SettingRow::decode(row).map_err(failed)?.text;
        serde_json::from_slice(&text)
            .map_err(|error| CliError::new(format!("the shared setting archives: {error}")))
    }
}
