//! Members: who may follow the volume, and who has been invited to.

use bytes::Bytes;
use murphy_log::{LogTime, NodeId};

use super::{Draft, EntryKind, Operation, Refusal};
use crate::{MemberRow, RowKey};

/// Changes members after looking at `N` of them, in one step: of several that redeem one invitation exactly one succeeds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChangeMembers<F, const N: usize> {
    /// The rows that the change depends on.
    pub(crate) keys: [NodeId; N],
    /// Says what to write, given those rows and the time of the entry.
    pub(crate) change: F,
}

/// The rows to write; `None` removes one.
pub(crate) type MemberWrites = Vec<(NodeId, Option<MemberRow>)>;

impl<F, E, const N: usize> Operation for ChangeMembers<F, N>
where
    F: Fn([Option<&MemberRow>; N], LogTime) -> Result<MemberWrites, E>,
{
    type Reply = Result<(), E>;
    const KIND: EntryKind = EntryKind::Member;

    fn decide(&self, draft: &mut Draft<'_>) -> Result<Result<(), E>, Refusal> {
        let mut rows = [const { None }; N];
        for (row, key) in rows.iter_mut().zip(self.keys) {
            *row = draft.decoded(&RowKey::member(key), |row| MemberRow::decode(row))?;
        }
        let writes = match (self.change)(rows.each_ref().map(Option::as_ref), draft.time()) {
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
