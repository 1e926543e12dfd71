//! Members: who may follow the volume, and who has been invited to.

use bytes::Bytes;
use murphy_log::{LogTime, NodeId};

use super::{Draft, EntryKind, Operation, Refusal};
use crate::{MemberRow, RowKey};

/// Changes members after looking at one of them, in one step: of several that redeem one invitation exactly one succeeds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChangeMembers<F> {
    /// The row that the change depends on.
    pub(crate) key: NodeId,
    /// Says what to write, given that row and the time of the entry.
    pub(crate) change: F,
}

/// The rows to write; `None` removes one.
pub(crate) type MemberWrites = Vec<(NodeId, Option<MemberRow>)>;

impl<F, E> Operation for ChangeMembers<F>
where
    F: Fn(Option<&MemberRow>, LogTime) -> Result<MemberWrites, E>,
{
    type Reply = Result<(), E>;
    const KIND: EntryKind = EntryKind::Member;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Result<(), E>, Refusal> {
        let row = draft.decoded(&RowKey::member(self.key), |row| MemberRow::decode(row))?;
        let writes = match (self.change)(row.as_ref(), draft.time()) {
            Ok(writes) => writes,
            Err(error) => return Ok(Err(error)),
        };
        for (node, row) in writes {
            if let Some(row) = &row {
                draft.mention(Bytes::copy_from_slice(row.name.as_bytes()));
            }
            draft.put(RowKey::member(node), row.map(|row| row.encode()))?;
        }
        Ok(Ok(()))
    }
}
