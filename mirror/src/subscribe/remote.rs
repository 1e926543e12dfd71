//! Subscribing to a source over the network.
//!
//! Invariants:
//! - The first frame is believed to belong to the volume; every later one must continue it. A reconnect goes on after the last frame
//!   and is checked by the source.

use std::time::Duration;

use murphy_log::{BranchId, Frame, FrameError, Lsn, Position, VolumeKeys};

use crate::{
    dial::{Dialer, ExchangeError},
    identity::PublicKey,
    message::{Ack, Hello, Message, Refused, Resume, Verdict},
    session::{Connection, MessageReader, MessageWriter, SessionError, next_frames},
};

/// A subscription to a source: frames, one after the other.
pub struct Observer {
    keys: VolumeKeys,
    connection: Connection,
    control: MessageReader,
    writer: MessageWriter,
    frames: Option<MessageReader>,
    position: Option<Position>,
    ready: std::collections::VecDeque<Frame>,
}

impl Observer {
    /// Connects, and begins with the frame that holds `from`, or after `after`, the last frame of an earlier subscription.
    pub async fn connect(
        dialer: &Dialer,
        addresses: &[String],
        source_key: PublicKey,
        (keys, branch): (VolumeKeys, BranchId),
        from: Lsn,
        after: Option<Position>,
    ) -> Result<Observer, ObserveError> {
        let (connection, _) = dialer.dial(addresses, source_key).await?;
        let (mut control, mut writer) = connection.open_both().await?;
        let hello = Hello {
            volume: keys.volume(),
            branch,
            node: dialer.identity.node(),
            resume: after.map_or(Resume::From(from), Resume::After),
            data_lsn: Lsn::new(0),
            promised: None,
        };
        writer.send(&Message::Hello(hello)).await?;
        let answer =
            tokio::time::timeout(SILENCE, control.expect()).await.map_err(|_| ObserveError::Silent)??;
        match answer {
            Message::Welcome(welcome) if welcome.verdict == Verdict::Tail => {}
            Message::Welcome(_) => return Err(ObserveError::Diverged),
            Message::Refused(refused) => return Err(ObserveError::Refused(refused)),
            other => return Err(ObserveError::Protocol(format!("a {} message is no welcome", other.name()))),
        }
        let ready = std::collections::VecDeque::new();
        Ok(Observer { keys, connection, control, writer, frames: None, position: after, ready })
    }

    /// The next frame; waits for one. After an error connect again, after [`Observer::position`].
    pub async fn next(&mut self) -> Result<Frame, ObserveError> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Ok(frame);
            }
            let message = tokio::select! {
                message = self.control.next() => message?,
                message = next_frames(&self.connection, &mut self.frames) => message?,
                () = tokio::time::sleep(SILENCE) => return Err(ObserveError::Silent),
            };
            match message {
                None => return Err(ObserveError::Ended),
                Some(Message::Frames(frames)) => self.take(frames.run).await?,
                Some(Message::Heartbeat(_)) => {}
                Some(Message::Refused(refused)) => return Err(ObserveError::Refused(refused)),
                Some(other) => {
                    return Err(ObserveError::Protocol(format!("a {} message", other.name())));
                }
            }
        }
    }

    /// The end of the last frame that arrived; to go on after it.
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    async fn take(&mut self, run: Vec<murphy_log::UnverifiedFrame>) -> Result<(), ObserveError> {
        for frame in run {
            let header = frame.header();
            let (epoch, lsn, hash) = (header.epoch, header.first.previous(), header.hash_before);
            let previous = self.position.unwrap_or(Position { epoch, lsn, hash });
            let frame = frame.verify(&self.keys, &previous)?;
            self.position = Some(frame.position());
            self.ready.push_back(frame);
        }
        if let Some(position) = self.position {
            self.writer.send(&Message::Ack(Ack { position, data_lsn: Lsn::new(0) })).await?;
        }
        Ok(())
    }
}

/// Why a subscription has ended.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ObserveError {
    /// The source was not reached.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// The source refuses.
    #[error("the source refuses: {0}")]
    Refused(Refused),
    /// The last frame of the earlier subscription is not in the source's history any more.
    #[error("the source's history is another one since the last frame")]
    Diverged,
    /// A frame was damaged or does not continue the one before.
    #[error("refused what the source sent: {0}")]
    Frame(#[from] FrameError),
    /// The source sent something else than it may.
    #[error("the source breaks the protocol: {0}")]
    Protocol(String),
    /// The source has closed the connection.
    #[error("the source has closed the connection")]
    Ended,
    /// Nothing was heard for a while.
    #[error("the source is silent")]
    Silent,
}

impl From<SessionError> for ObserveError {
    fn from(error: SessionError) -> ObserveError {
        ObserveError::Exchange(error.into())
    }
}

const SILENCE: Duration = Duration::from_secs(10);
