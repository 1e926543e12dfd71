//! Messages over the streams of a QUIC connection.
//!
//! Invariants:
//! - Reading the next message can be cancelled and taken up again: what has arrived stays in the reader.
//! - No more than one message and one chunk are buffered per reader.
//! - Nobody waits for ever for a peer to take what it is sent, or to allow a stream.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use quinn::VarInt;

use crate::{
    identity::PublicKey,
    message::{HEADER_BYTES, Message, MessageError, MessageHeader},
};

/// A connection to a node that has proven its key. Cheap to clone; the connection ends when it is closed or with its last clone.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    connection: quinn::Connection,
    /// The endpoint of a connection that was dialled lives as long as the connection.
    _endpoint: Option<Arc<quinn::Endpoint>>,
    peer: PublicKey,
    /// How long the peer may take nothing.
    patience: Duration,
}

impl Connection {
    pub(crate) fn new(
        connection: quinn::Connection,
        endpoint: Option<quinn::Endpoint>,
        peer: PublicKey,
        patience: Duration,
    ) -> Connection {
        Connection { connection, _endpoint: endpoint.map(Arc::new), peer, patience }
    }

    /// The key that the other end has proven.
    pub(crate) fn peer(&self) -> PublicKey {
        self.peer
    }

    /// Where the other end is, as seen from here.
    pub(crate) fn remote_ip(&self) -> IpAddr {
        self.connection.remote_address().ip()
    }

    /// Opens a stream in both directions; the peer sees it with the first message.
    pub(crate) async fn open_both(&self) -> Result<(MessageReader, MessageWriter), SessionError> {
        let opened = within(self.patience, "allows no stream", self.connection.open_bi()).await?;
        let (send, receive) = opened.map_err(|error| lost(&error))?;
        Ok((MessageReader::new(receive), self.writer(send)))
    }

    /// The next stream in both directions that the peer opens. Cancel safe.
    pub(crate) async fn accept_both(&self) -> Result<(MessageReader, MessageWriter), SessionError> {
        let (send, receive) = self.connection.accept_bi().await.map_err(|error| lost(&error))?;
        Ok((MessageReader::new(receive), self.writer(send)))
    }

    /// Opens a stream to the peer.
    pub(crate) async fn open_one(&self) -> Result<MessageWriter, SessionError> {
        let opened = within(self.patience, "allows no stream", self.connection.open_uni()).await?;
        opened.map(|stream| self.writer(stream)).map_err(|error| lost(&error))
    }

    /// The next stream that the peer opens to us. Cancel safe.
    pub(crate) async fn accept_one(&self) -> Result<MessageReader, SessionError> {
        self.connection.accept_uni().await.map(MessageReader::new).map_err(|error| lost(&error))
    }

    /// Closes; what was written and not yet delivered may be lost.
    pub(crate) fn close(&self, reason: &str) {
        self.connection.close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Waits until the connection is gone, and says why it is.
    pub(crate) async fn closed(&self) -> String {
        self.connection.closed().await.to_string()
    }

    fn writer(&self, stream: quinn::SendStream) -> MessageWriter {
        MessageWriter { stream, patience: self.patience }
    }
}

/// The next message from the one stream of frames, which is accepted first if that has not happened. Cancel safe.
pub(crate) async fn next_frames(
    connection: &Connection,
    frames: &mut Option<MessageReader>,
) -> Result<Option<Message>, SessionError> {
    let stream = match frames {
        Some(stream) => stream,
        None => frames.insert(connection.accept_one().await?),
    };
    stream.next().await
}

/// Reads messages from one stream.
#[derive(Debug)]
pub(crate) struct MessageReader {
    stream: quinn::RecvStream,
    buffer: BytesMut,
}

impl MessageReader {
    fn new(stream: quinn::RecvStream) -> MessageReader {
        MessageReader { stream, buffer: BytesMut::new() }
    }

    /// The next message; `None` at the end of the stream. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Message>, SessionError> {
        loop {
            if let Some(message) = take(&mut self.buffer)? {
                return Ok(Some(message));
            }
            match self.stream.read_chunk(CHUNK_BYTES, true).await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                Ok(None) if self.buffer.is_empty() => return Ok(None),
                Ok(None) => return Err(SessionError::Lost("the stream ends inside a message".to_owned())),
                Err(error) => return Err(lost(&error)),
            }
        }
    }

    /// The next message, which must come.
    pub(crate) async fn expect(&mut self) -> Result<Message, SessionError> {
        let ended = || SessionError::Lost("the stream has ended".to_owned());
        self.next().await?.ok_or_else(ended)
    }

    /// Exactly `count` bytes that follow the last message. Not cancel safe.
    pub(crate) async fn raw(&mut self, count: usize) -> Result<Bytes, SessionError> {
        while self.buffer.len() < count {
            match self.stream.read_chunk(CHUNK_BYTES, true).await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                Ok(None) => return Err(SessionError::Lost("the stream ends too early".to_owned())),
                Err(error) => return Err(lost(&error)),
            }
        }
        Ok(self.buffer.split_to(count).freeze())
    }
}

/// Takes the first message out of what has arrived, if it is whole.
fn take(buffer: &mut BytesMut) -> Result<Option<Message>, MessageError> {
    let Some(header) = buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let header = MessageHeader::parse(header)?;
    let length = HEADER_BYTES + header.body_len;
    if buffer.len() < length {
        return Ok(None);
    }
    let body = buffer.split_to(length).freeze().slice(HEADER_BYTES..);
    header.decode(&body).map(Some)
}

/// Writes messages to one stream. Dropped, it ends the stream.
#[derive(Debug)]
pub(crate) struct MessageWriter {
    stream: quinn::SendStream,
    patience: Duration,
}

impl MessageWriter {
    /// Hands a message to the network; fails if the peer has not made room for it in time. Not cancel safe: a message that was cut off ends
    /// the stream's use.
    pub(crate) async fn send(&mut self, message: &Message) -> Result<(), SessionError> {
        self.send_raw(message.encode().into(), self.patience).await
    }

    /// Hands bytes to the network that follow the last message; the peer has `at_most` so long to make room for them.
    pub(crate) async fn send_raw(&mut self, bytes: Bytes, at_most: Duration) -> Result<(), SessionError> {
        let written = within(at_most, "takes nothing", self.stream.write_chunk(bytes)).await?;
        written.map_err(|error| lost(&error))
    }

    /// Ends the stream and waits until the peer has everything, `at_most` so long.
    pub(crate) async fn finish(mut self, at_most: Duration) -> Result<(), SessionError> {
        self.stream.finish().map_err(|error| lost(&error))?;
        let stopped = within(at_most, "takes nothing", self.stream.stopped()).await?;
        stopped.map(drop).map_err(|error| lost(&error))
    }
}

/// Waits for what the peer has to allow; `what` it does not do if it is late.
async fn within<T>(
    limit: Duration,
    what: &'static str,
    wait: impl Future<Output = T>,
) -> Result<T, SessionError> {
    tokio::time::timeout(limit, wait).await.map_err(|_| SessionError::Stuck { what, limit })
}

/// Why no message came, or none could be sent.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The connection or the stream is gone.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The peer is there, and takes nothing.
    #[error("the peer {what} for {limit:?}")]
    Stuck {
        /// What it does instead.
        what: &'static str,
        /// For how long it was waited for.
        limit: Duration,
    },
    /// What came is no message.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// What a stream says is that its connection is lost; why the peer has closed it is what lies below.
fn lost(error: &dyn std::error::Error) -> SessionError {
    let reasons = std::iter::successors(Some(error), |error| error.source());
    SessionError::Lost(reasons.map(ToString::to_string).collect::<Vec<_>>().join(": "))
}

const CHUNK_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{MAX_PACK_BYTES, PackReply};

    /// The fear: a peer that only says that much will come makes a node set as much memory aside, on every stream that it may open.
    #[test]
    fn a_message_takes_no_more_memory_than_what_has_come_of_it() {
        let whole = Message::PackReply(PackReply::Found(Bytes::from(vec![7; MAX_PACK_BYTES]))).encode();
        let mut buffer = BytesMut::from(&whole[..HEADER_BYTES + 1]);
        assert!(take(&mut buffer).unwrap().is_none());
        assert!(buffer.capacity() < CHUNK_BYTES, "{} bytes for 9", buffer.capacity());
        for chunk in whole[HEADER_BYTES + 1..].chunks(CHUNK_BYTES) {
            buffer.extend_from_slice(chunk);
        }
        assert!(matches!(take(&mut buffer), Ok(Some(Message::PackReply(PackReply::Found(_))))));
        assert!(buffer.is_empty());
    }
}
