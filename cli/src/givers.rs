//! Who can give back what a node has lost: archives, the members that hold copies, and the source that a mirror follows.
//!
//! Invariants:
//! - What a giver hands out continues the history that it was asked about, verified on the chain.
//! - Who they are is read from what the node still has: the index, or, if that says nothing, the base and all of the log that is whole.

mod archive;
mod mirror;

use std::{
    collections::BTreeMap,
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::future::BoxFuture;
use murphy_fs::{
    FjallIndex, FjallOptions, Index, MemberRow, MemberState, RowKey, SettingRow, SnapshotReader, Table,
};
use murphy_log::{DiskLog, DiskOptions, Epoch, Frame, Lsn, NodeId, Position};
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

/// Where a node has what says who may give back what it has lost.
pub(crate) struct Ground {
    pub(crate) index: PathBuf,
    pub(crate) base: PathBuf,
    pub(crate) log: DiskOptions,
}

/// Everybody who may have what the node in `directory` has lost, archives first.
pub(crate) fn givers_of(
    directory: &Path,
    config: &NodeConfig,
    ground: &Ground,
) -> Result<Vec<Box<dyn Giver>>, CliError> {
    let identity = Arc::new(Identity::load_or_create(directory).map_err(failed)?);
    let known = Known::of(ground);
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
    /// What the index says, or else the base; and what came into the log since, as far as it is whole.
    fn of(ground: &Ground) -> Known {
        let (mut known, after) = Known::of_index(&ground.index).unwrap_or_else(|| {
            let mut known = Known::default();
            known.note_base(&ground.base);
            (known, Lsn::default())
        });
        known.note_log(&ground.log, after);
        known
    }

    /// And up to which entry that is. `None` if there is no index that can be read, or nothing in it.
    fn of_index(path: &Path) -> Option<(Known, Lsn)> {
        if !path.is_dir() {
            return None;
        }
        let snapshot = FjallIndex::open(path, FjallOptions::default()).ok()?.snapshot();
        let state = snapshot.state()?;
        let mut known =
            Known { archives: snapshot.get(&RowKey::setting(ARCHIVES)).ok()?, ..Known::default() };
        let (first, end) = (Table::Member.number(), Table::Member.number() + 1);
        for row in snapshot.scan(RowKey::from_parts(first, &[])..RowKey::from_parts(end, &[])) {
            let (key, value) = row.ok()?;
            known.note_member(key.key(), Some(&value));
        }
        Some((known, state.position.lsn))
    }

    /// The rows in the log behind `after`, as far as they are whole.
    fn note_log(&mut self, log: &DiskOptions, after: Lsn) {
        let salvaged = DiskLog::salvage(log, &mut |frame| {
            for entry in &frame {
                match entry {
                    Ok(entry) if entry.lsn <= after => {}
                    Ok(entry) => entry.changes.iter().for_each(|change| {
                        self.note((change.table, &change.key), change.value.as_ref());
                    }),
                    Err(error) => tracing::warn!(%error, "who may have what is lost is not read there"),
                }
            }
        });
        if let Err(error) = salvaged {
            tracing::warn!(%error, "the log does not say who may have what is lost");
        }
    }

    fn note_base(&mut self, path: &Path) {
        let Ok(file) = File::open(path) else { return };
        let read = SnapshotReader::open(BufReader::new(file)).and_then(|reader| {
            let note = &mut |rows: Vec<(RowKey, bytes::Bytes)>| {
                rows.iter().for_each(|(key, value)| self.note((key.table(), key.key()), Some(value)));
                Ok(())
            };
            reader.read(note, &|_| {})
        });
        if let Err(error) = read {
            tracing::warn!(%error, "the base does not say everything about who may have what is lost");
        }
    }

    fn note(&mut self, (table, key): (u8, &[u8]), value: Option<&bytes::Bytes>) {
        let archives = RowKey::setting(ARCHIVES);
        if (table, key) == (archives.table(), archives.key()) {
            self.archives = value.cloned();
        } else if table == Table::Member.number() {
            self.note_member(key, value);
        }
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
