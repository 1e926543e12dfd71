//! A place in stored bytes, and the numbers that are read there.
//!
//! Invariants:
//! - It never goes beyond its bytes; every error names the LSN and the offset.

use super::DecodeError;
use crate::{
    Lsn,
    entry::{ForwardedRequest, Requester},
};

/// A place in stored bytes.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    pub(super) offset: usize,
    /// Where `bytes` begin in the frame's body; for messages.
    base: usize,
    pub(super) lsn: Lsn,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8], base: usize, lsn: Lsn) -> Cursor<'a> {
        Cursor { bytes, offset: 0, base, lsn }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.offset == self.bytes.len()
    }

    pub(super) fn malformed(&self, what: &'static str) -> DecodeError {
        DecodeError::Malformed { lsn: self.lsn, offset: self.base + self.offset, what }
    }

    /// The same place, with nothing behind the place of `end`, which is a later one in the same bytes.
    pub(super) fn up_to(&self, end: &Cursor<'a>) -> Cursor<'a> {
        Cursor { bytes: &self.bytes[..end.offset], ..self.clone() }
    }

    /// What was read between `start`, an earlier place in the same bytes, and here.
    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.offset]
    }

    /// What is left.
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.offset..]
    }

    pub(super) fn byte(&mut self) -> Result<u8, DecodeError> {
        let byte =
            self.bytes.get(self.offset).copied().ok_or_else(|| self.malformed("the end, too early"))?;
        self.offset += 1;
        Ok(byte)
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let rest = &self.bytes[self.offset..];
        let taken = rest.get(..length).ok_or_else(|| self.malformed("the end, too early"))?;
        self.offset += length;
        Ok(taken)
    }

    pub(super) fn varint(&mut self) -> Result<u64, DecodeError> {
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            number |= bits << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(self.malformed("a number beyond 64 bits"))
    }

    /// A number that must not be above `limit`.
    pub(super) fn count(&mut self, limit: usize, what: &'static str) -> Result<usize, DecodeError> {
        let number = self.varint()?;
        usize::try_from(number).ok().filter(|number| *number <= limit).ok_or_else(|| self.malformed(what))
    }

    fn small(&mut self) -> Result<u32, DecodeError> {
        let number = self.varint()?;
        u32::try_from(number).map_err(|_| self.malformed("a number beyond 32 bits"))
    }

    pub(super) fn requester(&mut self) -> Result<Requester, DecodeError> {
        Ok(Requester { uid: self.small()?, gid: self.small()?, pid: self.small()? })
    }

    pub(super) fn request(&mut self) -> Result<ForwardedRequest, DecodeError> {
        let mut session = [0; 8];
        session.copy_from_slice(self.take(8)?);
        Ok(ForwardedRequest { session: u64::from_le_bytes(session), sequence: self.varint()? })
    }
}
