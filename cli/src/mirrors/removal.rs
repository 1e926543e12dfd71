//! Taking a member out of the volume: who is a member, and the order of the steps when one is removed.
//!
//! ```text
//!   1. fsync waits for the others only         an acknowledgement of W others is one of W of all: whoever takes over meanwhile finds it
//!   2. W others have everything so far          bytes included: whatever only the member was counted for is elsewhere too
//!   3. the entry that removes it                from here on nobody who has it asks the member, and the member is refused
//!   4. W others have that entry                 the member cannot take over any more, also if it does not know
//! ```
//!
//! Invariants:
//! - The set that acknowledges loses a member before the log does: at no time does an acknowledgement rest on a member that a successor would
//!   not ask.
//! - What only the member may have acknowledged is given up by an order that says so, and not otherwise.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use murphy_fs::{Acknowledger, MemberRow, MemberState};
use murphy_log::{Lsn, NodeId};
use murphy_mirror::{MemberBook, MirrorAcknowledger};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Mirroring,
    leading::{read_set, write_set},
    lock,
};
use crate::{
    error::{CliError, failed},
    settings::Ack,
};

/// A member, as `murphy member list` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct MemberStatus {
    pub(crate) node: String,
    pub(crate) name: String,
    pub(crate) role: String,
    /// Whether it was a member once, and is none any more.
    pub(crate) removed: bool,
    /// Where it listens, as far as it has said.
    pub(crate) addresses: Vec<String>,
    /// It is the node that was asked.
    pub(crate) own: bool,
}

/// How far a mirror is, as its source knows.
pub(crate) struct HolderStatus {
    pub(crate) node: String,
    pub(crate) metadata_lsn: u64,
    pub(crate) data_lsn: u64,
    pub(crate) connected: bool,
}

impl MemberStatus {
    /// The member for people.
    pub(crate) fn text(&self) -> String {
        let state = if self.removed { "removed".to_owned() } else { self.role.clone() };
        let own = if self.own { ", this node" } else { "" };
        let listens = match self.addresses.is_empty() {
            true => String::new(),
            false => format!(" at {}", self.addresses.join(", ")),
        };
        format!("{} ({}): {state}{own}{listens}", self.node, self.name)
    }
}

impl Mirroring {
    /// Every member of the volume, as this node's log says.
    pub(crate) fn list_members(&self) -> Vec<MemberStatus> {
        let (own, source) = (self.identity.node(), self.source());
        let members = self.book.members().into_iter();
        members
            .map(|(node, row)| MemberStatus {
                node: node.to_string(),
                name: row.name,
                role: if source == Some(node) { SOURCE.to_owned() } else { row.role.to_string() },
                removed: matches!(row.state, MemberState::Revoked { .. }),
                addresses: row.addresses,
                own: node == own,
            })
            .collect()
    }

    /// How far each mirror is, as far as is known here.
    pub(crate) fn show_holders(&self) -> Vec<HolderStatus> {
        let status = self.services.board.status(self.clock.monotonic());
        let shown = self.mirrors().into_iter().map(|node| {
            let seen = status.iter().find(|mirror| mirror.node == node);
            HolderStatus {
                node: node.to_string(),
                metadata_lsn: seen.map_or(0, |mirror| mirror.metadata_lsn.get()),
                data_lsn: seen.map_or(0, |mirror| mirror.data_lsn.get()),
                connected: seen.is_some_and(|mirror| mirror.connected),
            }
        });
        shown.collect()
    }

    /// Who leads the volume, as far as this node knows: itself, or whom it follows. Its row says what it would be if it came back after it was
    /// replaced.
    fn source(&self) -> Option<NodeId> {
        let config = self.config().clone();
        match (&config.fenced, &config.source) {
            (Some(_), _) => None,
            (None, Some(source)) => Some(source.key.node()),
            (None, None) => Some(self.identity.node()),
        }
    }

    /// Removes members, one after the other, if all of them can be; each that is out is told. With `assume_lost` nobody waits for what only they
    /// have acknowledged, and fsync may be left with too few to wait for.
    pub(crate) fn remove_members(
        &self,
        nodes: &[String],
        assume_lost: bool,
        removed: &mut dyn FnMut(Value),
    ) -> Result<(), CliError> {
        let members: BTreeMap<NodeId, MemberRow> =
            nodes.iter().map(|node| self.removable(node)).collect::<Result<_, CliError>>()?;
        for (node, row) in members {
            removed(self.remove_member(node, &row, assume_lost)?);
        }
        Ok(())
    }

    /// Refuses ids that are not those of members that can be removed.
    pub(crate) fn check_removable(&self, nodes: &[String]) -> Result<(), CliError> {
        nodes.iter().try_for_each(|node| self.removable(node).map(drop))
    }

    fn remove_member(&self, node: NodeId, row: &MemberRow, assume_lost: bool) -> Result<Value, CliError> {
        let removing = self.remove(node, row, assume_lost);
        let (lsn, waits) = self.runtime.block_on(removing)?;
        let others = self.mirrors();
        let status = self.services.board.status(self.clock.monotonic());
        let known = |other: &&NodeId| {
            status.iter().any(|mirror| mirror.node == **other && mirror.metadata_lsn >= lsn)
        };
        let (told, untold): (Vec<&NodeId>, Vec<&NodeId>) = others.iter().partition(known);
        let text = |nodes: Vec<&NodeId>| nodes.iter().map(ToString::to_string).collect::<Vec<_>>();
        Ok(json!({
            "removed": node.to_string(),
            "lsn": lsn.get(),
            "known_to": text(told),
            "not_known_to": text(untold),
            "waits": waits,
        }))
    }

    /// The member with this id, if it is one that can be removed.
    fn removable(&self, node: &str) -> Result<(NodeId, MemberRow), CliError> {
        let see = "murphy member list shows every member with its id";
        let id: NodeId = node
            .parse()
            .map_err(|_| CliError::usage(format!("{node:?} is not the id of a member")).hint(see))?;
        if id == self.identity.node() {
            return Err(CliError::new(format!("{id} is this node, which leads the volume"))
                .hint("stop it and promote a mirror; there it can be removed"));
        }
        match self.book.members().into_iter().find(|(member, _)| *member == id) {
            None => Err(CliError::new(format!("{id} is not a member of this volume")).hint(see)),
            Some((_, MemberRow { state: MemberState::Revoked { .. }, .. })) => {
                Err(CliError::new(format!("{id} was removed already")).hint(see))
            }
            Some(found) => Ok(found),
        }
    }

    /// The steps; says at which entry it is removed, and what fsync waits for from then on if that cannot be had.
    async fn remove(
        &self,
        node: NodeId,
        row: &MemberRow,
        assume_lost: bool,
    ) -> Result<(Lsn, Option<String>), CliError> {
        let _turn = self.set_turn.lock().await;
        let wanted = match self.waited_for()? {
            Ack::Mirrors(wanted) if row.role.holds_copy() => Some(wanted as usize),
            Ack::Mirrors(_) | Ack::Local | Ack::Archive => None,
        };
        let old = read_set(&self.directory)?.unwrap_or_default();
        let kept: BTreeSet<NodeId> = old.iter().copied().filter(|member| *member != node).collect();
        let acknowledger = lock(&self.acknowledger).clone();
        if let (Some(wanted), Some(acknowledger)) = (wanted, &acknowledger) {
            acknowledger.set(self.needed(wanted, &kept), kept.clone());
        }
        if let Some(wanted) = wanted
            && !assume_lost
            && let Err(error) = self.hand_over(node, (wanted, &old, &kept), acknowledger.as_ref()).await
        {
            if let Some(acknowledger) = &acknowledger {
                acknowledger.set(self.needed(wanted, &old), old);
            }
            return Err(error);
        }
        self.book.revoke(node).await?;
        self.services.members_changed();
        if wanted.is_some() {
            write_set(&self.directory, &kept)?;
        }
        let refused = |errno| CliError::new(format!("the log does not go on: {errno:?}"));
        let lsn = self.volume.durable_here().await.map_err(refused)?;
        let told = tokio::time::timeout(TOLD_MAX, self.told(lsn));
        if self.unless_overtaken(async { told.await.map_err(failed) }).await.is_err() {
            tracing::warn!(%lsn, "not every mirror that is connected has heard of the removal yet");
        }
        let left = self.mirrors().len();
        let too_few = wanted.filter(|wanted| left < *wanted);
        Ok((lsn, too_few.map(|wanted| format!("mirror={wanted}, and {left} mirrors are left"))))
    }

    /// The mirrors that do not have the entry `lsn` after those that are connected have had time for it, as far as is known.
    pub(crate) async fn untold(&self, lsn: Lsn) -> Vec<String> {
        // Whoever is missing then is named.
        let _in_time = tokio::time::timeout(TOLD_MAX, self.told(lsn)).await;
        self.unheard(lsn)
    }

    /// Returns when every mirror that is connected has the entry.
    async fn told(&self, lsn: Lsn) {
        let mut changes = self.services.board.changes();
        loop {
            changes.borrow_and_update();
            let status = self.services.board.status(self.clock.monotonic());
            let lags = status.iter().any(|mirror| mirror.connected && mirror.metadata_lsn < lsn);
            if !lags || changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Returns when what the member may have acknowledged is at the others too.
    async fn hand_over(
        &self,
        node: NodeId,
        (wanted, old, kept): (usize, &BTreeSet<NodeId>, &BTreeSet<NodeId>),
        acknowledger: Option<&Arc<MirrorAcknowledger>>,
    ) -> Result<(), CliError> {
        let give_up = "if it is gone for good, --assume-lost gives up what only it may have acknowledged";
        let left = self.mirrors().into_iter().filter(|member| *member != node).count();
        if left < wanted {
            return Err(CliError::new(format!(
                "fsync waits for {wanted} mirrors, and without {node} there are {left}: every fsync would fail"
            ))
            .hint("let another mirror join first; --assume-lost removes it all the same"));
        }
        // One that never counted has acknowledged nothing. While fewer than W count it may know too few of the others to ask any of them when
        // it takes over: it is given up, or has to hear of them first.
        if !old.contains(&node) && old.len() >= wanted {
            return Ok(());
        }
        if kept.len() < wanted {
            return Err(CliError::new(format!(
                "{} mirrors acknowledge, and fsync waits for {wanted}: the others do not count before each that has joined, {node} too, has heard of them",
                old.len()
            ))
            .hint(give_up));
        }
        let Some(acknowledger) = acknowledger else {
            return Err(CliError::new(
                "nobody serves this node, so nobody can say what the other mirrors hold",
            )
            .hint(format!("serve it with --listen; {give_up}")));
        };
        let refused = |errno| CliError::new(format!("the log does not go on: {errno:?}"));
        let lsn = self.volume.durable_here().await.map_err(refused)?;
        let held = async { acknowledger.acknowledged(lsn, REMOVE_MAX).await.map_err(failed) };
        self.unless_overtaken(held).await.map_err(|error| error.hint(give_up))
    }
}

/// The role of the node that leads, to people.
const SOURCE: &str = "source";
/// So long the members that are left get to have what the one that is removed has.
const REMOVE_MAX: Duration = Duration::from_secs(20);
/// So long mirrors get to have the entry before the answer says that they do not.
const TOLD_MAX: Duration = Duration::from_secs(5);
