//! A member that gives back what a node has lost.
//!
//! Invariants:
//! - Only entries of the node's own epoch are taken for its end, and only from a member that knows of no later epoch.

use std::{sync::Arc, time::Duration};

use futures::future::BoxFuture;
use murphy_fs::{MemberRow, MemberState};
use murphy_log::{DiskLog, Epoch, Frame, Log, NodeId, Position, VolumeKeys, append_copy};
use murphy_mirror::{Ask, Dialer, ExchangeError, Identity, Lender, NetworkOptions, PublicKey, UdpSockets};

use super::{Giver, NotGiven};
use crate::{
    config::{NodeConfig, Upstream},
    error::{CliError, failed},
};

/// A member that may be asked.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) node: NodeId,
    name: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) key: PublicKey,
}

impl Member {
    /// The member with this row; `None` if it has not joined, or has left.
    pub(crate) fn of_row(node: NodeId, row: MemberRow) -> Option<Member> {
        let MemberState::Joined { public_key } = row.state else { return None };
        let key = PublicKey::from_bytes(public_key);
        Some(Member { node, name: row.name, addresses: row.addresses, key })
    }

    /// The source that a mirror follows, as its file names it.
    pub(crate) fn of_source(source: &Upstream) -> Member {
        let Upstream { addresses, key } = source.clone();
        Member { node: key.node(), name: "the source".to_owned(), addresses, key }
    }

    /// Whether anybody knows where it listens.
    pub(crate) fn listens(&self) -> bool {
        !self.addresses.is_empty()
    }
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "member {}", self.node)?;
        if !self.name.is_empty() {
            write!(f, " ({})", self.name)?;
        }
        if self.listens() { write!(f, " at {}", self.addresses.join(", ")) } else { Ok(()) }
    }
}

/// A member, and how this node reaches it.
#[derive(Clone)]
pub(crate) struct MirrorGiver {
    pub(crate) member: Member,
    config: NodeConfig,
    dialer: Dialer,
}

impl MirrorGiver {
    /// The member as a node with this file reaches it.
    pub(crate) fn new(config: &NodeConfig, member: Member, dialer: Dialer) -> MirrorGiver {
        MirrorGiver { member, config: config.clone(), dialer }
    }

    /// Asks where it stands, on behalf of `epoch`.
    pub(crate) async fn ask(&self, epoch: Option<Epoch>) -> Result<Lender, ExchangeError> {
        if !self.member.listens() {
            let unknown = "nobody knows where it listens: serve it with --listen".to_owned();
            return Err(ExchangeError::Unreachable(unknown));
        }
        let ask = Ask { volume: self.config.volume, branch: self.config.branch, epoch };
        self.dialer.lender(&self.member.addresses, self.member.key, ask).await
    }

    fn said(&self, error: impl std::fmt::Display) -> CliError {
        CliError::new(format!("{}: {error}", self.member))
    }

    async fn give(&self, log: Arc<DiskLog>, own: Epoch) -> Result<(), CliError> {
        let lender = self.ask(Some(own)).await.map_err(|error| self.said(error))?;
        if let Some(later) = lender.stands.ends(own) {
            return Err(self.said(format!("epoch {} has taken over", later.number)));
        }
        let (end, keys) = (log.tail().position, VolumeKeys::derive(self.config.volume));
        let held = lender.stands.state.map(|state| state.position).filter(|held| held.lsn > end.lsn);
        let Some(held) = held else { return Ok(()) };
        let lent = lender.frames(&keys, end, held.lsn).await;
        let mut lent = lent.map_err(|error| self.said(error))?;
        loop {
            let frames = lent.next().await.map_err(|error| self.said(error))?;
            if frames.is_empty() {
                break;
            }
            if let Some(frame) = frames.iter().find(|frame| frame.epoch() != own) {
                return Err(self.said(format!("lsn {} is of epoch {}", frame.first(), frame.epoch().number)));
            }
            let log = Arc::clone(&log);
            // An epoch of its own is claimed with the first one.
            let append = move || frames.into_iter().try_for_each(|frame| append_copy(&*log, frame));
            murphy_log::aside(append).await.map_err(failed)?;
        }
        log.durable().wait_for(log.tail().position.lsn).await.map(drop).map_err(failed)
    }
}

impl Giver for MirrorGiver {
    fn name(&self) -> String {
        self.member.to_string()
    }

    fn frames(&self, after: Position) -> BoxFuture<'_, Result<Vec<Frame>, NotGiven>> {
        Box::pin(async move {
            // Where the log cannot be opened nobody knows its epoch: whoever leads it afterwards is asked again.
            let lender = self.ask(None).await.map_err(|error| {
                let is_silent = matches!(error, ExchangeError::Unreachable(_) | ExchangeError::NoAnswer);
                NotGiven { is_silent, error: self.said(error) }
            })?;
            let Some(state) = lender.stands.state else { return Ok(Vec::new()) };
            let keys = VolumeKeys::derive(self.config.volume);
            let lent = lender.frames(&keys, after, state.position.lsn).await;
            let mut lent = lent.map_err(|error| self.said(error))?;
            let (mut all, mut bytes) = (Vec::new(), 0);
            while bytes < GIVEN_BYTES {
                let frames = lent.next().await.map_err(|error| self.said(error))?;
                if frames.is_empty() {
                    break;
                }
                bytes += frames.iter().map(|frame| frame.bytes().len()).sum::<usize>();
                all.extend(frames);
            }
            Ok(all)
        })
    }

    fn give_back(&self, log: Arc<DiskLog>, own: Epoch) -> BoxFuture<'_, Result<(), CliError>> {
        Box::pin(async move {
            let late = |_| Err(self.said("it does not answer in time"));
            tokio::time::timeout(ANSWER_MAX, self.give(log, own)).await.unwrap_or_else(late)
        })
    }
}

/// Reaches other nodes as the node with this identity.
pub(crate) fn dialer(identity: &Arc<Identity>) -> Dialer {
    Dialer {
        identity: Arc::clone(identity),
        sockets: Arc::new(UdpSockets),
        options: NetworkOptions::default(),
    }
}

/// A member gets so long to give back what was lost.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// So much is handed out at a time, about, in bytes.
const GIVEN_BYTES: usize = 16 << 20;
