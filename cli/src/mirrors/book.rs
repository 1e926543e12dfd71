//! The member book above a volume: its rows are entries, so that a promoted mirror admits and refuses as the source did.
//!
//! Invariants:
//! - An invitation and an admission are durable before anybody is told of them.

use futures::future::BoxFuture;
use murphy_fs::{Errno, MemberRole, MemberRow, MemberState, Volume};
use murphy_log::NodeId;
use murphy_mirror::{Admission, AdmitError, MemberBook, SecretHash, redeem};
use tokio::sync::watch;

use crate::error::CliError;

/// The members of a volume.
pub(super) struct VolumeBook {
    volume: Volume,
    /// Counts the changes made here.
    changes: watch::Sender<u64>,
}

impl VolumeBook {
    pub(super) fn new(volume: Volume) -> VolumeBook {
        VolumeBook { volume, changes: watch::Sender::new(0) }
    }

    /// Follows changes; the value means nothing.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Lets whoever follows changes look again.
    pub(super) fn touch(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// The nodes that have joined as holders of a copy, and where they listen.
    pub(super) fn holders(&self) -> Vec<(NodeId, MemberRow)> {
        let joined = |row: &MemberRow| matches!(row.state, MemberState::Joined { .. });
        self.members().into_iter().filter(|(_, row)| joined(row) && row.role.holds_copy()).collect()
    }

    /// Opens an invitation; durable when it returns.
    pub(super) async fn invite(
        &self,
        secret: SecretHash,
        role: MemberRole,
        valid: std::time::Duration,
    ) -> Result<murphy_log::LogTime, CliError> {
        let expires = std::sync::Arc::new(std::sync::Mutex::new(None));
        let chosen = std::sync::Arc::clone(&expires);
        let change = move |_: Option<&MemberRow>, now: murphy_log::LogTime| {
            let expires = now.after(valid);
            *chosen.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(expires);
            let state = MemberState::Invited { secret_hash: *secret.as_bytes(), expires };
            let row = MemberRow { role, state, name: String::new(), addresses: Vec::new() };
            Ok::<_, std::convert::Infallible>(vec![(secret.row_id(), Some(row))])
        };
        let recorded = async {
            let done = self.volume.change_members(secret.row_id(), change).wait().await?;
            let Ok(()) = done;
            self.volume.durable_here().await
        };
        recorded
            .await
            .map_err(|errno: Errno| CliError::new(format!("the invitation cannot be recorded: {errno:?}")))?;
        let expires = *expires.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        expires.ok_or_else(|| CliError::new("the invitation was not recorded"))
    }

    /// Writes a row, if it is not as it should be; durable when it returns.
    pub(super) async fn record(&self, node: NodeId, row: MemberRow) -> Result<(), AdmitError> {
        let change = move |[found]: [Option<&MemberRow>; 1], _| {
            let same = found == Some(&row);
            Ok::<_, AdmitError>(if same { Vec::new() } else { vec![(node, Some(row.clone()))] })
        };
        self.change([node], change).await
    }

    /// Makes a member one that was removed; durable when it returns.
    pub(super) async fn revoke(&self, node: NodeId) -> Result<(), CliError> {
        let change = move |[found]: [Option<&MemberRow>; 1], _| match found {
            Some(row @ MemberRow { state: MemberState::Joined { public_key }, .. }) => {
                let state = MemberState::Revoked { public_key: *public_key };
                Ok(vec![(node, Some(MemberRow { state, addresses: Vec::new(), ..row.clone() }))])
            }
            _ => Err(AdmitError::Unknown),
        };
        self.change([node], change).await.map_err(|error| match error {
            AdmitError::Unknown => CliError::new(format!("{node} is no member any more")),
            error => CliError::new(format!("{node} is not removed: {error}")),
        })
    }

    async fn change<F, const N: usize>(&self, nodes: [NodeId; N], change: F) -> Result<(), AdmitError>
    where
        F: Fn(
                [Option<&MemberRow>; N],
                murphy_log::LogTime,
            ) -> Result<Vec<(NodeId, Option<MemberRow>)>, AdmitError>
            + Send
            + 'static,
    {
        let storage = |errno: Errno| {
            AdmitError::Storage(match errno {
                Errno::EROFS => "this node is a mirror: join at the source".to_owned(),
                errno => format!("{errno:?}"),
            })
        };
        self.volume.change_members_given(nodes, change).wait().await.map_err(storage)??;
        self.volume.durable_here().await.map_err(storage)?;
        self.touch();
        Ok(())
    }
}

impl MemberBook for VolumeBook {
    fn row(&self, node: NodeId) -> Option<MemberRow> {
        self.volume.member(node).unwrap_or_else(|error| {
            tracing::error!(%error, "a member cannot be read; it is treated as none");
            None
        })
    }

    fn members(&self) -> Vec<(NodeId, MemberRow)> {
        let rows = self.volume.members().unwrap_or_else(|error| {
            tracing::error!(%error, "the members cannot be read");
            Vec::new()
        });
        let member =
            |row: &MemberRow| matches!(row.state, MemberState::Joined { .. } | MemberState::Revoked { .. });
        rows.into_iter().filter(|(_, row)| member(row)).collect()
    }

    fn admit(&self, admission: Admission) -> BoxFuture<'_, Result<MemberRole, AdmitError>> {
        Box::pin(async move {
            let (secret, key) = (admission.secret, admission.key.node());
            let change = move |[row, known]: [Option<&MemberRow>; 2], now| {
                let written = redeem(row, known, &admission, now)?;
                Ok(written.into_iter().map(|(node, row)| (node, Some(row))).collect())
            };
            self.change([secret.row_id(), key], change).await?;
            Ok(self.row(key).ok_or(AdmitError::Unknown)?.role)
        })
    }

    fn announce(&self, node: NodeId, addresses: Vec<String>) -> BoxFuture<'_, Result<(), AdmitError>> {
        Box::pin(async move {
            let change = move |[row]: [Option<&MemberRow>; 1], _| {
                let row = row.ok_or(AdmitError::Unknown)?;
                if row.addresses == addresses {
                    return Ok(Vec::new());
                }
                Ok(vec![(node, Some(MemberRow { addresses: addresses.clone(), ..row.clone() }))])
            };
            self.change([node], change).await
        })
    }
}
