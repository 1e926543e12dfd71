//! Asking a node where it stands, and borrowing from it what it holds: frames that were lost here, packs that are nowhere else.
//!
//! Invariants:
//! - A borrowed frame is handed out only after its checksum, its linkage to the frame before and the chain over its entries have been
//!   verified, from the position on that the borrower gave.
//! - At most one message of frames is in memory at a time.
//! - Asking changes nothing at the lender.

use std::{sync::Arc, time::Duration};

use murphy_log::{Epoch, Frame, FrameError, Lsn, Position, VolumeKeys, WaitError};

use crate::{
    dial::{Dialer, ExchangeError, RemotePacks},
    history::Point,
    identity::PublicKey,
    message::{Ask, LendRequest, Message, Stands},
    replica::{Replica, ReplicaError},
    session::{Connection, MessageReader, MessageWriter},
};

/// A node that has said where it stands, and lends. Dropping it ends the connection, and with it `packs`.
#[derive(Debug)]
pub struct Lender {
    /// Where it stands.
    pub stands: Stands,
    /// Fetches packs from its store.
    pub packs: RemotePacks,
    connection: Connection,
    /// Its end would be the end of lending.
    _control: (MessageReader, MessageWriter),
}

impl Dialer {
    /// Asks the node with this key where it stands; for a member, or for the source that the node follows.
    pub async fn lender(
        &self,
        addresses: &[String],
        key: PublicKey,
        ask: Ask,
    ) -> Result<Lender, ExchangeError> {
        let (connection, _) = self.dial(addresses, key).await?;
        let exchange = async {
            let (mut reader, mut writer) = connection.open_both().await?;
            writer.send(&Message::Ask(ask)).await?;
            let answer = reader.expect().await?;
            Ok::<_, ExchangeError>((answer, (reader, writer)))
        };
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, exchange).await;
        let (answer, control) = answer.map_err(|_| ExchangeError::NoAnswer)??;
        match answer {
            Message::Stands(stands) => {
                let packs = RemotePacks::over(connection.clone());
                Ok(Lender { stands, packs, connection, _control: control })
            }
            Message::Refused(refused) => Err(ExchangeError::Refused(refused)),
            other => Err(ExchangeError::Protocol(format!("a {} message is no answer to that", other.name()))),
        }
    }
}

impl Lender {
    /// Begins to borrow the frames behind `after`, up to the last one that ends at `to` or before. Nothing is lent if `after` is not in the
    /// lender's history, or if the epoch of the question has ended there.
    pub async fn frames(
        &self,
        keys: &VolumeKeys,
        after: Position,
        to: Lsn,
    ) -> Result<Borrowing, ExchangeError> {
        let (reader, mut writer) = self.connection.open_both().await?;
        let request = LendRequest { after: Point { lsn: after.lsn, hash: after.hash }, to };
        writer.send(&Message::LendRequest(request)).await?;
        Ok(Borrowing { reader, _writer: writer, keys: keys.clone(), position: after, to })
    }

    /// Appends to `replica` the frames that this node holds behind it, up to `to`; durable there when it returns. What came before an error
    /// stays. `told` is the epoch that both have promised: what is lent is the history before it.
    pub async fn give_frames(
        &self,
        replica: &Arc<dyn Replica>,
        told: Epoch,
        to: Position,
    ) -> Result<(), GiveError> {
        let own = replica.state().ok_or(GiveError::Empty)?.position;
        let mut lent = self.frames(replica.keys(), own, to.lsn).await.map_err(BorrowError::from)?;
        loop {
            let frames = lent.next().await?;
            if frames.is_empty() {
                break;
            }
            let replica = Arc::clone(replica);
            let append = move || frames.into_iter().try_for_each(|frame| replica.append(frame, Some(told)));
            let appended = murphy_log::spawn_blocking(append).await;
            appended.map_err(|error| GiveError::Panicked(error.to_string()))??;
        }
        let reached = lent.position();
        if reached != to {
            return Err(GiveError::Short { reached, wanted: to });
        }
        let durable = replica.durable().ok_or(GiveError::Empty)?;
        let ended = |error: WaitError| ReplicaError::Ended(error.to_string());
        durable.wait_for(to.lsn).await.map_err(ended)?;
        Ok(())
    }
}

/// Frames that are being borrowed.
#[derive(Debug)]
pub struct Borrowing {
    reader: MessageReader,
    _writer: MessageWriter,
    keys: VolumeKeys,
    position: Position,
    to: Lsn,
}

impl Borrowing {
    /// The next frames, of whatever epochs, a bounded number; none when the lender has no more to give.
    pub async fn next(&mut self) -> Result<Vec<Frame>, BorrowError> {
        let message = tokio::time::timeout(ANSWER_TIMEOUT, self.reader.next()).await;
        let message = message.map_err(|_| ExchangeError::NoAnswer)?.map_err(ExchangeError::from)?;
        let frames = match message {
            None => return Ok(Vec::new()),
            Some(Message::Frames(frames)) => frames,
            Some(Message::Refused(refused)) => return Err(ExchangeError::Refused(refused).into()),
            Some(other) => {
                let what = format!("a {} message where frames should be", other.name());
                return Err(ExchangeError::Protocol(what).into());
            }
        };
        let mut verified = Vec::with_capacity(frames.run.len());
        for frame in frames.run {
            let frame = frame.verify(&self.keys, &self.position)?;
            if frame.last() > self.to {
                let what = format!("lsn {} where nothing beyond {} was asked for", frame.last(), self.to);
                return Err(ExchangeError::Protocol(what).into());
            }
            self.position = frame.position();
            verified.push(frame);
        }
        Ok(verified)
    }

    /// The end of what has been handed out.
    pub fn position(&self) -> Position {
        self.position
    }
}

/// Why frames were not borrowed. What was handed out before is good.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BorrowError {
    /// The lender refuses, or is not heard of any more.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// A frame is damaged or does not continue what came before.
    #[error("refused what the lender sent: {0}")]
    Frame(#[from] FrameError),
}

/// Why a replica did not get everything that was wanted. What it got is good.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GiveError {
    /// Frames were not borrowed.
    #[error(transparent)]
    Borrow(#[from] BorrowError),
    /// The replica did not take them.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The replica has no end that frames could come behind.
    #[error("this mirror holds nothing")]
    Empty,
    /// The lender has no more.
    #[error("what it lends ends at {reached} instead of {wanted}")]
    Short {
        /// Where it ends.
        reached: Position,
        /// What was asked for.
        wanted: Position,
    },
    /// A task ended unexpectedly.
    #[error("a task has failed: {0}")]
    Panicked(String),
}

/// A lender must say something within this time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
