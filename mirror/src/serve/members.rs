//! What members ask for once: to become one, to be known where they listen, and to have a promise.
//!
//! Invariants:
//! - What a member book says counts wherever the own log reaches. One whom it does not know is taken for a member by the word of the source
//!   only, and only by a mirror that does not hear its source: what it has not heard yet it might hear in a moment.
//! - Nobody is admitted who has promised an epoch that ends this source's: such a one is refused, and ends nothing.
//! - A promise is durable before it is answered, and before anybody is followed for whom it was made. It is answered by a mirror that is one
//!   still: one that takes over stops being one before it looks for the last time whether it has promised anybody else.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use murphy_fs::{MemberRole, MemberState};
use murphy_log::Epoch;

use super::{Leader, MirrorPart, Part, Services};
use crate::{
    book::{Admission, authorize},
    history::is_older,
    identity::PublicKey,
    message::{Admitted, Announce, Message, Redeem, Refusal, Refused, Seal, Sealed},
    session::Connection,
    vouch::{Proof, ProofError, Trust, Vouched},
};

pub(super) async fn admit(services: &Services, connection: &Connection, redeem: Redeem) -> Message {
    let key = connection.peer();
    if let (Part::Source(source), Some(promised)) = (services.part(), redeem.promised)
        && is_older(source.epoch, promised)
    {
        // As a member it would end this source with its first word. Nobody is in danger as long as it is none.
        tracing::warn!(node = %key.node(), %promised, "one who has promised a later epoch was not admitted");
        let detail = format!("you have promised epoch {promised}, this source leads epoch {}", source.epoch);
        return Message::Refused(Refused { reason: Refusal::Fenced, detail });
    }
    let secret = redeem.secret.hash(&services.keys);
    let admission = Admission { secret, key, name: redeem.name, addresses: redeem.addresses };
    match services.book.admit(admission).await {
        Ok(role) => {
            tracing::info!(node = %key.node(), %role, "a new member has joined");
            admitted(services, key, role)
        }
        Err(error) => {
            tracing::warn!(node = %key.node(), %error, "an invitation was refused");
            Message::Refused(Refused { reason: error.refusal(), detail: error.to_string() })
        }
    }
}

pub(super) async fn announced(
    services: &Services,
    connection: &Connection,
    role: MemberRole,
    announce: Announce,
) -> Message {
    let key = connection.peer();
    let node = key.node();
    let addresses = reachable(announce.addresses, connection.remote_ip());
    match services.book.announce(node, addresses).await {
        Ok(()) => {
            if role.holds_copy() {
                services.board.set_domains(node, announce.domains);
            }
            admitted(services, key, role)
        }
        Err(error) => {
            tracing::warn!(%node, %error, "the addresses of a member were not recorded");
            Message::Refused(Refused { reason: error.refusal(), detail: error.to_string() })
        }
    }
}

fn admitted(services: &Services, key: PublicKey, role: MemberRole) -> Message {
    let (volume, branch) = (services.keys.volume(), services.branch);
    Message::Admitted(Admitted { volume, branch, role, proof: vouched(services, key, role) })
}

/// What the member with this key shows to those who do not know it yet. Its row is durable.
fn vouched(services: &Services, member: PublicKey, role: MemberRole) -> Proof {
    let (Part::Source(source), Some(identity)) = (services.part(), &services.identity) else {
        return Proof::default();
    };
    if !role.holds_copy() {
        return Proof::default();
    }
    let lsn = source.log.durable().state().position.lsn;
    let (volume, branch, epoch) = (services.keys.volume(), services.branch, source.epoch);
    services.proof().vouch(identity, &Vouched { volume, branch, epoch, lsn, member, role })
}

/// What one may do whom the book does not know, as far as the proof in its `seal` shows it.
pub(super) async fn proven(services: &Services, key: PublicKey, seal: &Seal) -> Result<MemberRole, Refused> {
    let refused = |reason, detail: String| Refused { reason, detail };
    let unknown = |why: &dyn std::fmt::Display| {
        let (node, volume) = (key.node(), services.keys.volume());
        refused(Refusal::UnknownMember, format!("node {node} is not a member of volume {volume}: {why}"))
    };
    if seal.proof.is_empty() {
        return Err(unknown(&ProofError::Empty));
    }
    let Part::Mirror(mut mirror) = services.part() else { return Err(unknown(&"this node is not a mirror")) };
    let silent = mirror.status.wait_for(|status| !status.connected);
    if tokio::time::timeout(SILENT_MAX, silent).await.is_err() {
        return Err(unknown(&"this mirror hears its source, which has not named it"));
    }
    let held = mirror.replica.state().ok_or_else(|| unknown(&"this mirror holds nothing yet"))?;
    // The last words of the source may be about it.
    match authorize(services.book.row(key.node()).as_ref(), key) {
        Ok(role) => return Ok(role),
        Err(Refusal::UnknownMember) => {}
        Err(reason) => return Err(refused(reason, format!("node {} was removed", key.node()))),
    }
    let place = (services.keys.volume(), services.branch);
    let role = seal.proof.role(key, place, &held.position, |by| trust(services, by));
    let role = role.map_err(|error| unknown(&error))?;
    tracing::warn!(node = %key.node(), %role, "a member that is not in this log yet was vouched for by the source");
    Ok(role)
}

fn trust(services: &Services, key: PublicKey) -> Trust {
    match services.book.row(key.node()).map(|row| (row.state, row.role)) {
        Some((MemberState::Revoked { public_key }, _)) if public_key == *key.as_bytes() => Trust::Revoked,
        Some((MemberState::Joined { public_key }, role))
            if public_key == *key.as_bytes() && role.holds_copy() =>
        {
            Trust::Known
        }
        _ if services.is_upstream(key) => Trust::Known,
        _ => Trust::Unknown,
    }
}

/// Makes the promise that a member asks for, and follows it if it leads.
pub(super) async fn promise(
    services: &Services,
    connection: &Connection,
    role: MemberRole,
    seal: Seal,
) -> Message {
    let refused = |reason, detail: String| Message::Refused(Refused { reason, detail });
    // The source that this mirror follows holds no copy in the book; it may say where it leads now.
    if !role.holds_copy() && !services.is_upstream(connection.peer()) {
        return refused(Refusal::Role, "only a mirror may take over".to_owned());
    }
    if seal.volume != services.keys.volume() {
        return refused(Refusal::ForeignVolume, format!("this is volume {}", services.keys.volume()));
    }
    if seal.branch != services.branch {
        return refused(Refusal::ForeignBranch, format!("this is branch {}", services.branch));
    }
    let Part::Mirror(mirror) = services.part() else {
        return refused(Refusal::Protocol, "this node is not a mirror".to_owned());
    };
    let (replica, epoch) = (Arc::clone(&mirror.replica), seal.epoch);
    let promised = murphy_log::spawn_blocking(move || replica.promise(epoch)).await;
    match promised {
        // It may have looked at its promises before this one was made, and begin an epoch of its own: then this one counts for nobody.
        Ok(Ok(_)) if !matches!(services.part(), Part::Mirror(_)) => {
            refused(Refusal::Protocol, "this node is about to take over itself".to_owned())
        }
        Ok(Ok(state)) => {
            tracing::warn!(%epoch, "promised: older epochs are refused from now on");
            let leads = reachable(seal.leads, connection.remote_ip());
            follow(&mirror, connection.peer(), epoch, leads);
            let data_lsn = *mirror.replica.data().borrow();
            let heard_lsn = *mirror.heard.borrow();
            Message::Sealed(Sealed { epoch, state, data_lsn, heard_lsn })
        }
        Ok(Err(error)) => refused(Refusal::Fenced, error.to_string()),
        Err(panic) => refused(Refusal::Storage, panic.to_string()),
    }
}

/// Lets whoever looks after the mirror know whom to follow from now on.
fn follow(mirror: &MirrorPart, key: PublicKey, epoch: Epoch, addresses: Vec<String>) {
    if !addresses.is_empty() {
        mirror.leader.send_replace(Some(Leader { epoch, key, addresses }));
    }
}

/// Addresses by which others reach a node that is seen at `seen`: one that listens on every address of its machine is reached at that one.
fn reachable(addresses: Vec<String>, seen: IpAddr) -> Vec<String> {
    let seen = |address: String| match address.parse::<SocketAddr>() {
        Ok(every) if every.ip().is_unspecified() => {
            SocketAddr::new(seen.to_canonical(), every.port()).to_string()
        }
        Ok(_) | Err(_) => address,
    };
    addresses.into_iter().map(seen).collect()
}

/// A source that was lost is noticed after a moment; so long is waited for that before a proof is refused.
const SILENT_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    /// Most people listen on every address; a mirror that nobody can ask is sealed by nobody.
    #[test]
    fn one_that_listens_everywhere_is_reached_where_it_is_seen() {
        let listens = ["0.0.0.0:7", "[::]:8", "10.0.0.1:9", "mirror.example:10"].map(str::to_owned);
        let seen = |ip: &str| reachable(listens.to_vec(), ip.parse().unwrap());
        assert_eq!(seen("192.0.2.1"), ["192.0.2.1:7", "192.0.2.1:8", "10.0.0.1:9", "mirror.example:10"]);
        assert_eq!(seen("::ffff:192.0.2.1")[0], "192.0.2.1:7");
        assert_eq!(seen("2001:db8::1")[1], "[2001:db8::1]:8");
    }
}
