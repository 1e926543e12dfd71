//! Asking another node whether it leads a later epoch, and where its history and one's own part: what a source that comes back does first.
//!
//! Invariants:
//! - Only what the node with the expected key says counts, and it changes nothing there.

use std::{sync::Arc, time::Duration};

use murphy_log::{BranchId, Epoch, Log, Lsn, NodeId, Position, State, VolumeKeys};

use crate::{
    dial::{Dialer, ExchangeError},
    history::{AncestorSearch, Point, SearchStep, is_older, look_up},
    identity::PublicKey,
    message::{Hello, Message, Refusal, Resume, Verdict, Welcome},
    session::{MessageReader, MessageWriter},
};

/// What another source's history is to one's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Comparison {
    /// The source.
    pub node: NodeId,
    /// The epoch that it leads.
    pub epoch: Epoch,
    /// What is durable there.
    pub state: State,
    /// The last common point; the end of the own log if all of it is part of that history, `None` if the logs do not reach back to one.
    pub common: Option<Point>,
}

/// Asks the node with this key; `None` if it leads no epoch later than that of `log`. Fails if it is not reached.
pub async fn compare(
    dialer: &Dialer,
    addresses: &[String],
    key: PublicKey,
    (keys, branch): (&VolumeKeys, BranchId),
    log: &Arc<dyn Log>,
) -> Result<Option<Comparison>, ExchangeError> {
    let own = log.durable().state().position;
    let (connection, _) = dialer.dial(addresses, key).await?;
    let exchange = async {
        let (mut reader, mut writer) = connection.open_both().await?;
        let hello = Hello {
            volume: keys.volume(),
            branch,
            node: dialer.identity.node(),
            resume: Resume::After(own),
            data_lsn: Lsn::new(0),
            promised: None,
        };
        writer.send(&Message::Hello(hello)).await?;
        let welcome = match reader.expect().await? {
            Message::Welcome(welcome) => welcome,
            // A mirror, or one that does not know this node, leads nothing that concerns it.
            Message::Refused(refused)
                if matches!(refused.reason, Refusal::Protocol | Refusal::UnknownMember) =>
            {
                return Ok(None);
            }
            Message::Refused(refused) => return Err(ExchangeError::Refused(refused)),
            other => return Err(ExchangeError::Protocol(format!("a {} message", other.name()))),
        };
        if !is_older(own.epoch, welcome.epoch) {
            return Ok(None);
        }
        let common = match welcome.verdict {
            Verdict::Tail => Some(Point { lsn: own.lsn, hash: own.hash }),
            Verdict::Seed(_) => None,
            Verdict::Diverged => search(&mut reader, &mut writer, log, own.lsn).await?,
        };
        let Welcome { node, epoch, state, .. } = welcome;
        Ok(Some(Comparison { node, epoch, state, common }))
    };
    let outcome = tokio::time::timeout(LONGEST, exchange).await.map_err(|_| ExchangeError::NoAnswer);
    connection.close("done");
    outcome?
}

impl Dialer {
    /// Tells the source with this key that `epoch`, which goes on after `base`, has been promised, which ends its own if that is older. Succeeds when it has heard it.
    pub async fn tell_fenced(
        &self,
        addresses: &[String],
        key: PublicKey,
        (keys, branch): (&VolumeKeys, BranchId),
        epoch: Epoch,
        base: Option<Point>,
    ) -> Result<(), ExchangeError> {
        let hello = Hello {
            volume: keys.volume(),
            branch,
            node: self.identity.node(),
            resume: base.map_or(Resume::Fresh, |base| {
                Resume::After(Position { epoch, lsn: base.lsn, hash: base.hash })
            }),
            data_lsn: Lsn::new(0),
            promised: Some(epoch),
        };
        match self.ask(addresses, key, &Message::Hello(hello)).await {
            Err(ExchangeError::Refused(refused)) if refused.reason == Refusal::Fenced => Ok(()),
            Err(error) => Err(error),
            Ok(answer) => Err(ExchangeError::Protocol(format!("a {} message", answer.name()))),
        }
    }
}

async fn search(
    reader: &mut MessageReader,
    writer: &mut MessageWriter,
    log: &Arc<dyn Log>,
    differs: Lsn,
) -> Result<Option<Point>, ExchangeError> {
    let mut search = AncestorSearch::new(differs);
    let mut step = search.start();
    loop {
        step = match step {
            SearchStep::Own(lsn) => {
                let log = Arc::clone(log);
                let found = murphy_log::spawn_blocking(move || look_up(&*log, lsn)).await;
                let found = found.map_err(|error| ExchangeError::Protocol(error.to_string()))?;
                search.own(found.map_err(|error| ExchangeError::Protocol(error.to_string()))?)
            }
            SearchStep::Other(lsn) => {
                writer.send(&Message::Probe { lsn }).await?;
                let (lsn, found) = loop {
                    match reader.expect().await? {
                        Message::Probed { lsn, found } => break (lsn, found),
                        Message::Heartbeat(_) => {}
                        other => return Err(ExchangeError::Protocol(format!("a {} message", other.name()))),
                    }
                };
                let unasked = || ExchangeError::Protocol(format!("an answer about lsn {lsn}"));
                search.other(lsn, found).ok_or_else(unasked)?
            }
            SearchStep::Found(point) => return Ok(point),
        };
    }
}

const LONGEST: Duration = Duration::from_secs(10);
