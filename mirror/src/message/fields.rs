//! Writing and reading the fields of a message.
//!
//! Invariants:
//! - A reader never reads past the body, and every error knows where it was.

use bytes::Bytes;
use murphy_fs::MemberRole;
use murphy_log::{ChainHash, Digest, Epoch, EpochId, Lsn, Position, State, Usage};

use super::{MessageError, MessageFault};
use crate::history::Point;

/// Collects the body of a message.
pub(super) struct FieldWriter<'a>(pub(super) &'a mut Vec<u8>);

impl FieldWriter<'_> {
    pub(super) fn byte(&mut self, byte: u8) -> &mut Self {
        self.0.push(byte);
        self
    }

    pub(super) fn u32(&mut self, number: u32) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(super) fn u64(&mut self, number: u64) -> &mut Self {
        self.bytes(&number.to_le_bytes())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Text behind its length; what is beyond the limit is cut off at a character.
    pub(super) fn text(&mut self, text: &str, limit: usize) -> &mut Self {
        let text = &text[..text.floor_char_boundary(limit)];
        let length = u16::try_from(text.len()).expect("limits of texts fit 16 bits");
        self.bytes(&length.to_le_bytes()).bytes(text.as_bytes())
    }

    pub(super) fn lsn(&mut self, lsn: Lsn) -> &mut Self {
        self.u64(lsn.get())
    }

    pub(super) fn epoch(&mut self, epoch: Epoch) -> &mut Self {
        self.u32(epoch.number).bytes(epoch.id.as_bytes())
    }

    pub(super) fn position(&mut self, position: &Position) -> &mut Self {
        self.epoch(position.epoch).lsn(position.lsn).bytes(position.hash.as_bytes())
    }

    pub(super) fn point(&mut self, point: &Point) -> &mut Self {
        self.lsn(point.lsn).bytes(point.hash.as_bytes())
    }

    pub(super) fn state(&mut self, state: &State) -> &mut Self {
        self.position(&state.position).bytes(&state.digest.0.to_le_bytes());
        self.u64(state.usage.inodes).u64(state.usage.bytes)
    }

    /// A byte that says whether there is one, and the value.
    pub(super) fn optional<T>(
        &mut self,
        value: Option<T>,
        write: impl FnOnce(&mut Self, T) -> &mut Self,
    ) -> &mut Self {
        match value {
            None => self.byte(0),
            Some(value) => write(self.byte(1), value),
        }
    }
}

/// Takes the body of a message apart.
pub(super) struct FieldReader<'a> {
    message: &'static str,
    body: &'a Bytes,
    at: usize,
}

impl<'a> FieldReader<'a> {
    pub(super) fn new(message: &'static str, body: &'a Bytes) -> FieldReader<'a> {
        FieldReader { message, body, at: 0 }
    }

    pub(super) fn error(&self, what: impl Into<MessageFault>) -> MessageError {
        MessageError { message: self.message, offset: self.at, what: what.into() }
    }

    /// How many bytes are left.
    pub(super) fn left(&self) -> usize {
        self.body.len() - self.at
    }

    pub(super) fn take(&mut self, count: usize) -> Result<Bytes, MessageError> {
        if count > self.left() {
            return Err(self.error(MessageFault::Short));
        }
        let taken = self.body.slice(self.at..self.at + count);
        self.at += count;
        Ok(taken)
    }

    /// What is left, without taking it.
    pub(super) fn peek(&self) -> Bytes {
        self.body.slice(self.at..)
    }

    pub(super) fn rest(&mut self) -> Bytes {
        let rest = self.body.slice(self.at..);
        self.at = self.body.len();
        rest
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let Some(bytes) = self.body[self.at..].first_chunk::<N>() else {
            return Err(self.error(MessageFault::Short));
        };
        self.at += N;
        Ok(*bytes)
    }

    pub(super) fn byte(&mut self) -> Result<u8, MessageError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u32(&mut self) -> Result<u32, MessageError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, MessageError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A field with a condition; the error points at its beginning.
    pub(super) fn checked<T>(
        &mut self,
        field: &'static str,
        read: impl FnOnce(&mut Self) -> Result<T, MessageError>,
        good: impl FnOnce(&T) -> bool,
    ) -> Result<T, MessageError> {
        let at = self.at;
        let value = read(self)?;
        if good(&value) {
            return Ok(value);
        }
        Err(MessageError { message: self.message, offset: at, what: MessageFault::Field(field) })
    }

    pub(super) fn text(&mut self, field: &'static str, limit: usize) -> Result<String, MessageError> {
        let length =
            self.checked(field, |r| r.array().map(u16::from_le_bytes), |l| usize::from(*l) <= limit)?;
        let at = self.at;
        let bytes = self.take(usize::from(length))?;
        String::from_utf8(bytes.to_vec()).map_err(|_| MessageError {
            message: self.message,
            offset: at,
            what: MessageFault::Field(field),
        })
    }

    /// An LSN below the limit under which LSNs can be added to.
    pub(super) fn lsn(&mut self) -> Result<Lsn, MessageError> {
        self.checked("lsn", |r| r.u64(), |number| *number <= LSN_LIMIT).map(Lsn::new)
    }

    pub(super) fn role(&mut self) -> Result<MemberRole, MessageError> {
        let role = self.checked("role", FieldReader::byte, |code| MemberRole::from_code(*code).is_some())?;
        MemberRole::from_code(role).ok_or_else(|| self.error(MessageFault::Field("role")))
    }

    pub(super) fn epoch(&mut self) -> Result<Epoch, MessageError> {
        Ok(Epoch { number: self.u32()?, id: EpochId::from_bytes(self.array()?) })
    }

    pub(super) fn position(&mut self) -> Result<Position, MessageError> {
        Ok(Position { epoch: self.epoch()?, lsn: self.lsn()?, hash: self.hash()? })
    }

    pub(super) fn hash(&mut self) -> Result<ChainHash, MessageError> {
        self.array().map(ChainHash::from_bytes)
    }

    pub(super) fn point(&mut self) -> Result<Point, MessageError> {
        Ok(Point { lsn: self.lsn()?, hash: self.hash()? })
    }

    pub(super) fn state(&mut self) -> Result<State, MessageError> {
        let position = self.position()?;
        let digest = Digest(u128::from_le_bytes(self.array()?));
        let usage = Usage { inodes: self.u64()?, bytes: self.u64()? };
        Ok(State { position, digest, usage })
    }

    pub(super) fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, MessageError>,
    ) -> Result<Option<T>, MessageError> {
        match self.checked("presence", |r| r.byte(), |tag| *tag <= 1)? {
            0 => Ok(None),
            _ => read(self).map(Some),
        }
    }

    pub(super) fn finish(self) -> Result<(), MessageError> {
        match self.left() {
            0 => Ok(()),
            trailing => Err(self.error(MessageFault::Trailing(trailing))),
        }
    }
}

const LSN_LIMIT: u64 = 1 << 62;
