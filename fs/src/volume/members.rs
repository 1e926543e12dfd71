//! The members of a volume, as its log says.
//!
//! Invariants:
//! - Members are rows: a change of them is an entry, and durable only as entries are.

use murphy_log::{LogTime, NodeId};

use super::Volume;
use crate::{Answer, MemberRow, RowKey, Table, ViewError, decide::ChangeMembers};

impl Volume {
    /// The row at this key: a member's, or an invitation's.
    pub fn member(&self, node: NodeId) -> Result<Option<MemberRow>, ViewError> {
        self.shared.sequencer.newest(&RowKey::member(node), |row| MemberRow::decode(row))
    }

    /// Every row of the members' table, invitations included, by key.
    pub fn members(&self) -> Result<Vec<(NodeId, MemberRow)>, ViewError> {
        let first = RowKey::from_parts(Table::Member.number(), &[]);
        let end = RowKey::from_parts(Table::Member.number() + 1, &[]);
        let mut members = Vec::new();
        for row in self.view().rows(first..end) {
            let (key, value) = row?;
            let row = MemberRow::decode(&value);
            let row = row.map_err(|reason| ViewError::Row { key: key.clone(), reason })?;
            let node = key.key().try_into().map(NodeId::from_bytes);
            let node = node.map_err(|_| ViewError::Row { key, reason: crate::RowError::Field("key") })?;
            members.push((node, row));
        }
        Ok(members)
    }

    /// Changes members in one entry, given the row at `node` and the time of the entry: `change` says what to write, where `None` removes a
    /// row, or refuses. It may be called several times. Not durable when it returns; see [`Volume::durable_here`].
    pub fn change_members<E, F>(&self, node: NodeId, change: F) -> Answer<Result<(), E>>
    where
        E: Send + 'static,
        F: Fn(Option<&MemberRow>, LogTime) -> Result<Vec<(NodeId, Option<MemberRow>)>, E> + Send + 'static,
    {
        self.change_members_given([node], move |[row], time| change(row, time))
    }

    /// The same, given the rows at `nodes`, all of them as they are when the entry is decided.
    pub fn change_members_given<E, F, const N: usize>(
        &self,
        nodes: [NodeId; N],
        change: F,
    ) -> Answer<Result<(), E>>
    where
        E: Send + 'static,
        F: Fn([Option<&MemberRow>; N], LogTime) -> Result<Vec<(NodeId, Option<MemberRow>)>, E>
            + Send
            + 'static,
    {
        self.record(ChangeMembers { keys: nodes, change })
    }
}
