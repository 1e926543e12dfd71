//! Reaching another node, and the short exchanges with one: joining, sealing, fetching packs.
//!
//! Invariants:
//! - A node is reached only by the key that is expected of it, at whichever of its addresses answers first in their order.
//! - No exchange counts as done before the other side has answered: a TLS client can be refused after its handshake.

use std::{net::SocketAddr, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use murphy_fs::PackName;
use murphy_log::Epoch;
use parking_lot::RwLock;

use crate::{
    endpoint::{self, NetworkOptions, Sockets},
    identity::{Identity, PublicKey},
    message::{Admitted, Announce, Message, PackReply, PackRequest, Redeem, Refused, Seal, Sealed},
    session::{Connection, SessionError},
    token::Token,
};

/// Reaches other nodes as one node.
#[derive(Clone, Debug)]
pub struct Dialer {
    /// Who dials.
    pub identity: Arc<Identity>,
    /// Where sockets come from.
    pub sockets: Arc<dyn Sockets>,
    /// How to behave on the network.
    pub options: NetworkOptions,
}

impl Dialer {
    /// Redeems the invitation of `token`: afterwards this node is a member.
    ///
    /// `name` is what people will call the node, `addresses` where it listens.
    pub async fn join(
        &self,
        token: &Token,
        name: String,
        addresses: Vec<String>,
    ) -> Result<Admitted, ExchangeError> {
        self.join_again(token, name, addresses, None).await
    }

    /// The same for one that was a mirror before. A source that leads an older epoch than the one that is `promised` refuses: the first word
    /// of that mirror would end it.
    pub async fn join_again(
        &self,
        token: &Token,
        name: String,
        addresses: Vec<String>,
        promised: Option<Epoch>,
    ) -> Result<Admitted, ExchangeError> {
        let redeem = Message::Redeem(Redeem { secret: token.secret.clone(), name, addresses, promised });
        match self.ask(&token.addresses, token.source_key, &redeem).await? {
            Message::Admitted(admitted) if admitted.volume == token.volume => Ok(admitted),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks the mirror with this key to promise an epoch.
    pub async fn seal(
        &self,
        addresses: &[String],
        key: PublicKey,
        seal: Seal,
    ) -> Result<Sealed, ExchangeError> {
        let epoch = seal.epoch;
        match self.ask(addresses, key, &Message::Seal(seal)).await? {
            Message::Sealed(sealed) if sealed.epoch == epoch => Ok(sealed),
            other => Err(unexpected(&other)),
        }
    }

    /// Tells the source with this key where this node listens, and what its copy dies with.
    pub async fn announce(
        &self,
        source: &[String],
        key: PublicKey,
        addresses: Vec<String>,
        domains: Vec<String>,
    ) -> Result<Admitted, ExchangeError> {
        match self.ask(source, key, &Message::Announce(Announce { addresses, domains })).await? {
            Message::Admitted(admitted) => Ok(admitted),
            other => Err(unexpected(&other)),
        }
    }

    /// Connects to the first address that answers with the expected key, and says which.
    pub(crate) async fn dial(
        &self,
        addresses: &[String],
        key: PublicKey,
    ) -> Result<(Connection, String), ExchangeError> {
        let mut failures = Vec::new();
        for address in addresses {
            match self.dial_name(address, key).await {
                Ok(connection) => return Ok((connection, address.clone())),
                Err(error) => failures.push(format!("{address}: {error}")),
            }
        }
        Err(ExchangeError::Unreachable(failures.join("; ")))
    }

    async fn dial_name(&self, address: &str, key: PublicKey) -> Result<Connection, String> {
        let resolving = tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(address)).await;
        let resolved = resolving.map_err(|_| "the name is not resolved in time".to_owned())?;
        let resolved: Vec<SocketAddr> = resolved.map_err(|error| error.to_string())?.collect();
        let mut last = "the name has no address".to_owned();
        for address in resolved.into_iter().take(MAX_RESOLVED) {
            match endpoint::dial(&self.identity, &*self.sockets, address, key, &self.options).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// One question, one answer, on a connection of its own.
    pub(crate) async fn ask(
        &self,
        addresses: &[String],
        key: PublicKey,
        question: &Message,
    ) -> Result<Message, ExchangeError> {
        let (connection, _) = self.dial(addresses, key).await?;
        let exchange = async {
            let (mut reader, mut writer) = connection.open_both().await?;
            writer.send(question).await?;
            reader.expect().await
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, exchange).await;
        connection.close("done");
        match answer.map_err(|_| ExchangeError::NoAnswer)?? {
            Message::Refused(refused) => Err(ExchangeError::Refused(refused)),
            answer => Ok(answer),
        }
    }
}

/// Fetches packs from another node over a connection to it: the one that a mirror follows on, or that of a
/// [`Lender`](crate::Lender).
#[derive(Clone, Debug, Default)]
pub struct RemotePacks {
    connection: Arc<RwLock<Option<Connection>>>,
}

impl RemotePacks {
    /// The bytes `range` of a pack's object; an empty range means all of it.
    pub async fn read(&self, pack: PackName, range: Range<u64>) -> Result<Bytes, PackFetchError> {
        let connection = self.connection.read().clone().ok_or(PackFetchError::NotConnected)?;
        let length = range.end.saturating_sub(range.start);
        let too_long = |_| PackFetchError::Failed(format!("a range of {length} bytes is beyond the limit"));
        let request = PackRequest { pack, offset: range.start, length: length.try_into().map_err(too_long)? };
        let exchange = async {
            let (mut reader, mut writer) = connection.open_both().await?;
            writer.send(&Message::PackRequest(request)).await?;
            reader.expect().await
        };
        let late = |_| PackFetchError::Failed("the source does not answer".to_owned());
        let answer = tokio::time::timeout(PACK_TIMEOUT, exchange).await.map_err(late)?;
        match answer.map_err(|error| PackFetchError::Failed(error.to_string()))? {
            Message::PackReply(PackReply::Found(bytes)) if length == 0 || bytes.len() as u64 == length => {
                Ok(bytes)
            }
            Message::PackReply(PackReply::Found(bytes)) => {
                Err(PackFetchError::Failed(format!("{} bytes where {length} were asked for", bytes.len())))
            }
            Message::PackReply(PackReply::Missing) => Err(PackFetchError::Missing(pack)),
            Message::PackReply(PackReply::Failed(why)) => Err(PackFetchError::Failed(why)),
            other => Err(PackFetchError::Failed(format!("a {} message is no answer", other.name()))),
        }
    }

    /// Packs over a connection that stands.
    pub(crate) fn over(connection: Connection) -> RemotePacks {
        RemotePacks { connection: Arc::new(RwLock::new(Some(connection))) }
    }

    pub(crate) fn set(&self, connection: Option<Connection>) {
        *self.connection.write() = connection;
    }
}

/// Why a pack did not come from the source.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PackFetchError {
    /// The source is not connected.
    #[error("the source is not connected")]
    NotConnected,
    /// The source's store does not hold it.
    #[error("the source has no pack {0}")]
    Missing(PackName),
    /// The source or its store did not answer.
    #[error("the source cannot send the pack: {0}")]
    Failed(String),
}

/// Why another node did not do what it was asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExchangeError {
    /// No address answered with the expected key.
    #[error("cannot reach the node: {0}")]
    Unreachable(String),
    /// It did not answer in time.
    #[error("the node does not answer")]
    NoAnswer,
    /// It will not.
    #[error("refused: {0}")]
    Refused(Refused),
    /// It answered something else.
    #[error("the node breaks the protocol: {0}")]
    Protocol(String),
}

impl From<SessionError> for ExchangeError {
    fn from(error: SessionError) -> ExchangeError {
        match error {
            SessionError::Lost(why) => ExchangeError::Unreachable(why),
            SessionError::Stuck { .. } => ExchangeError::NoAnswer,
            SessionError::Message(error) => ExchangeError::Protocol(error.to_string()),
        }
    }
}

fn unexpected(message: &Message) -> ExchangeError {
    ExchangeError::Protocol(format!("a {} message is no answer to that", message.name()))
}

const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const PACK_TIMEOUT: Duration = Duration::from_secs(30);
/// A name server that does not answer is not waited for longer.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Of the addresses of one name so many are tried.
const MAX_RESOLVED: usize = 4;
