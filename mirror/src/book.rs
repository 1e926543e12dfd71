//! Who belongs to a volume: members, invitations, and how one becomes the other.
//!
//! Invariants:
//! - An invitation becomes a member in one durable step, once: the row of the invitation is replaced in the same entry that writes the
//!   member's.
//! - One who was removed is not admitted again: it comes back with a new key, in a new directory.
//! - A member is looked up by the key that its connection has proven; a row whose key differs belongs to somebody else.

use std::collections::BTreeMap;

use futures::future::BoxFuture;
use murphy_fs::{MemberRole, MemberRow, MemberState};
use murphy_log::{LogTime, NodeId};
use parking_lot::Mutex;

use crate::{identity::PublicKey, message::Refusal, token::SecretHash};

/// The members of a volume, as its log says.
pub trait MemberBook: Send + Sync {
    /// The row at this key: a member's, or an invitation's under [`SecretHash::row_id`].
    fn row(&self, node: NodeId) -> Option<MemberRow>;

    /// Every row that is not an invitation.
    fn members(&self) -> Vec<(NodeId, MemberRow)>;

    /// Makes the invitation of `admission` a member, if [`redeem`] says that it may; durable when it returns. Of several calls with one
    /// secret exactly one succeeds.
    fn admit(&self, admission: Admission) -> BoxFuture<'_, Result<MemberRole, AdmitError>>;

    /// Records where a member listens; durable when it returns.
    fn announce(&self, node: NodeId, addresses: Vec<String>) -> BoxFuture<'_, Result<(), AdmitError>>;
}

/// Somebody who has proven a secret and a key.
#[derive(Clone, Debug)]
pub struct Admission {
    /// The hash of the secret.
    pub secret: SecretHash,
    /// The key of the connection.
    pub key: PublicKey,
    /// What people call the node.
    pub name: String,
    /// Where it listens.
    pub addresses: Vec<String>,
}

/// Decides whether an invitation can be redeemed now, given the row at [`SecretHash::row_id`] and the row at the node of the admission's key:
/// the rows to write for it, in one entry. A member that joins again stays reachable where it was if it brings no addresses.
///
/// To be called in the critical section that appends the entry, with what both rows are there.
pub fn redeem(
    row: Option<&MemberRow>,
    known: Option<&MemberRow>,
    admission: &Admission,
    now: LogTime,
) -> Result<[(NodeId, MemberRow); 2], AdmitError> {
    let row = row.ok_or(AdmitError::Unknown)?;
    match &row.state {
        MemberState::Invited { secret_hash, expires } => {
            if SecretHash::from_bytes(*secret_hash) != admission.secret {
                return Err(AdmitError::Unknown);
            }
            if now > *expires {
                return Err(AdmitError::Expired);
            }
        }
        MemberState::Redeemed { secret_hash } => {
            let same = SecretHash::from_bytes(*secret_hash) == admission.secret;
            return Err(if same { AdmitError::Used } else { AdmitError::Unknown });
        }
        MemberState::Joined { .. } | MemberState::Revoked { .. } => return Err(AdmitError::Unknown),
    }
    if known.is_some_and(|known| matches!(known.state, MemberState::Revoked { .. })) {
        return Err(AdmitError::Revoked);
    }
    let state = MemberState::Joined { public_key: *admission.key.as_bytes() };
    let before = known.filter(|known| known.state == state).map_or(&[][..], |known| &known.addresses);
    let addresses = if admission.addresses.is_empty() { before } else { &admission.addresses };
    let used = MemberRow {
        role: row.role,
        state: MemberState::Redeemed { secret_hash: *admission.secret.as_bytes() },
        name: row.name.clone(),
        addresses: Vec::new(),
    };
    let member =
        MemberRow { role: row.role, state, name: admission.name.clone(), addresses: addresses.to_vec() };
    Ok([(admission.secret.row_id(), used), (admission.key.node(), member)])
}

/// What a node with this key may do, given the row at its id.
pub fn authorize(row: Option<&MemberRow>, key: PublicKey) -> Result<MemberRole, Refusal> {
    match row.map(|row| (&row.state, row.role)) {
        Some((MemberState::Joined { public_key }, role)) if public_key == key.as_bytes() => Ok(role),
        Some((MemberState::Revoked { public_key }, _)) if public_key == key.as_bytes() => {
            Err(Refusal::Revoked)
        }
        _ => Err(Refusal::UnknownMember),
    }
}

/// Why an invitation was not redeemed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AdmitError {
    /// There is none with this secret.
    #[error("no such invitation: none has this secret")]
    Unknown,
    /// It is too old.
    #[error("the invitation has expired")]
    Expired,
    /// Somebody has used it.
    #[error("the invitation was used: find out by whom if it was not you")]
    Used,
    /// The node was removed.
    #[error("the node was removed from the volume: join in a new directory; the invitation is still good")]
    Revoked,
    /// The member could not be recorded.
    #[error("the member could not be recorded: {0}")]
    Storage(String),
}

impl AdmitError {
    /// What the node is told.
    pub fn refusal(&self) -> Refusal {
        match self {
            AdmitError::Unknown => Refusal::BadInvitation,
            AdmitError::Expired => Refusal::ExpiredInvitation,
            AdmitError::Used => Refusal::UsedInvitation,
            AdmitError::Revoked => Refusal::Revoked,
            AdmitError::Storage(_) => Refusal::Storage,
        }
    }
}

/// A member book in memory, for tests, simulations and measurements.
#[derive(Debug, Default)]
pub struct MemoryBook {
    rows: Mutex<BTreeMap<NodeId, MemberRow>>,
    now: Mutex<LogTime>,
}

impl MemoryBook {
    /// Writes a row.
    pub fn put(&self, node: NodeId, row: MemberRow) {
        self.rows.lock().insert(node, row);
    }

    /// Opens an invitation.
    pub fn invite(&self, secret: SecretHash, role: MemberRole, expires: LogTime) {
        let state = MemberState::Invited { secret_hash: *secret.as_bytes(), expires };
        let row = MemberRow { role, state, name: String::new(), addresses: Vec::new() };
        self.put(secret.row_id(), row);
    }

    /// Sets the time that invitations are compared with.
    pub fn set_time(&self, now: LogTime) {
        *self.now.lock() = now;
    }
}

impl MemberBook for MemoryBook {
    fn row(&self, node: NodeId) -> Option<MemberRow> {
        self.rows.lock().get(&node).cloned()
    }

    fn members(&self) -> Vec<(NodeId, MemberRow)> {
        let member =
            |row: &MemberRow| matches!(row.state, MemberState::Joined { .. } | MemberState::Revoked { .. });
        let rows = self.rows.lock();
        rows.iter().filter(|(_, row)| member(row)).map(|(node, row)| (*node, row.clone())).collect()
    }

    fn admit(&self, admission: Admission) -> BoxFuture<'_, Result<MemberRole, AdmitError>> {
        Box::pin(async move {
            let mut rows = self.rows.lock();
            let now = *self.now.lock();
            let [row, known] = [admission.secret.row_id(), admission.key.node()].map(|id| rows.get(&id));
            let written = redeem(row, known, &admission, now)?;
            let role = written[1].1.role;
            rows.extend(written);
            Ok(role)
        })
    }

    fn announce(&self, node: NodeId, addresses: Vec<String>) -> BoxFuture<'_, Result<(), AdmitError>> {
        Box::pin(async move {
            let mut rows = self.rows.lock();
            rows.get_mut(&node).ok_or(AdmitError::Unknown)?.addresses = addresses;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use murphy_log::{VolumeId, VolumeKeys};

    use super::*;
    use crate::token::Secret;

    fn admission(secret: u8, key: u8) -> Admission {
        let keys = VolumeKeys::derive(VolumeId::from_bytes([1; 16]));
        Admission {
            secret: Secret::from_bytes([secret; 32]).hash(&keys),
            key: PublicKey::from_bytes([key; 32]),
            name: "n".to_owned(),
            addresses: Vec::new(),
        }
    }

    async fn admit(book: &MemoryBook, secret: u8, key: u8) -> Result<MemberRole, AdmitError> {
        book.admit(admission(secret, key)).await
    }

    #[tokio::test]
    async fn an_invitation_works_once_and_in_time() {
        let book = MemoryBook::default();
        let expires = LogTime::from_nanos(1000);
        book.invite(admission(1, 0).secret, MemberRole::Writer, expires);
        book.invite(admission(2, 0).secret, MemberRole::Mirror, expires);
        book.set_time(expires);
        assert_eq!(admit(&book, 9, 1).await, Err(AdmitError::Unknown));
        assert_eq!(admit(&book, 1, 1).await, Ok(MemberRole::Writer));
        assert_eq!(admit(&book, 1, 2).await, Err(AdmitError::Used));
        book.set_time(LogTime::from_nanos(1001));
        assert_eq!(admit(&book, 2, 2).await, Err(AdmitError::Expired));
        let members = book.members();
        assert_eq!(members.len(), 1);
        let key = PublicKey::from_bytes([1; 32]);
        assert_eq!(members[0].0, key.node());
        assert_eq!(authorize(Some(&members[0].1), key), Ok(MemberRole::Writer));
        let other = PublicKey::from_bytes([2; 32]);
        assert_eq!(authorize(Some(&members[0].1), other), Err(Refusal::UnknownMember));
        assert_eq!(authorize(book.row(other.node()).as_ref(), other), Err(Refusal::UnknownMember));
    }

    #[test]
    fn a_revoked_member_is_told_so() {
        let key = PublicKey::from_bytes([1; 32]);
        let state = MemberState::Revoked { public_key: *key.as_bytes() };
        let row = MemberRow { role: MemberRole::Mirror, state, name: String::new(), addresses: Vec::new() };
        assert_eq!(authorize(Some(&row), key), Err(Refusal::Revoked));
    }

    /// The fear: one that was removed, and holds another history or has promised another epoch, is a member again by any invitation.
    #[tokio::test]
    async fn one_that_was_removed_is_not_admitted_and_uses_no_invitation_up() {
        let (book, key) = (MemoryBook::default(), PublicKey::from_bytes([1; 32]));
        book.invite(admission(1, 0).secret, MemberRole::Mirror, LogTime::from_nanos(1000));
        let state = MemberState::Revoked { public_key: *key.as_bytes() };
        let row = MemberRow { role: MemberRole::Mirror, state, name: "m".to_owned(), addresses: Vec::new() };
        book.put(key.node(), row.clone());
        assert_eq!(admit(&book, 1, 1).await, Err(AdmitError::Revoked));
        assert_eq!(AdmitError::Revoked.refusal(), Refusal::Revoked);
        assert_eq!(book.row(key.node()), Some(row), "it stays removed");
        assert_eq!(admit(&book, 1, 2).await, Ok(MemberRole::Mirror), "the invitation is still good");
    }

    /// The fear: a mirror joins again and is not served yet, and nobody knows any more where to ask it for its promise.
    #[tokio::test]
    async fn a_member_that_joins_again_is_found_where_it_was() {
        let book = MemoryBook::default();
        let (key, other) = (PublicKey::from_bytes([1; 32]), [2; 32]);
        let listens = |host: &str| vec![format!("{host}:7")];
        let joins = async |secret: u8, addresses| {
            book.invite(admission(secret, 0).secret, MemberRole::Mirror, LogTime::from_nanos(1000));
            book.admit(Admission { addresses, ..admission(secret, 1) }).await.unwrap();
            book.row(key.node()).unwrap().addresses
        };
        assert_eq!(joins(1, listens("one")).await, listens("one"));
        assert_eq!(joins(2, Vec::new()).await, listens("one"));
        assert_eq!(joins(3, listens("two")).await, listens("two"));
        let state = MemberState::Joined { public_key: other };
        book.put(key.node(), MemberRow { state, ..book.row(key.node()).unwrap() });
        assert_eq!(joins(4, Vec::new()).await, Vec::<String>::new(), "those were somebody else's");
    }

    /// The row at the hash of a secret may be anything by now; only an open invitation with that very secret lets somebody in.
    #[test]
    fn a_row_that_is_no_invitation_with_this_secret_admits_nobody() {
        let wanted = admission(1, 1);
        let row =
            |state| MemberRow { role: MemberRole::Mirror, state, name: String::new(), addresses: vec![] };
        let (other, expires) = (*admission(2, 1).secret.as_bytes(), LogTime::from_nanos(1000));
        for state in [
            MemberState::Invited { secret_hash: other, expires },
            MemberState::Redeemed { secret_hash: other },
            MemberState::Joined { public_key: [1; 32] },
            MemberState::Revoked { public_key: [1; 32] },
        ] {
            let redeemed = redeem(Some(&row(state)), None, &wanted, LogTime::from_nanos(1));
            assert_eq!(redeemed, Err(AdmitError::Unknown), "{state:?}");
        }
        assert_eq!(AdmitError::Storage("full".to_owned()).refusal(), Refusal::Storage);
    }
}
