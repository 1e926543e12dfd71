//! The mark before every frame of a segment file, and the secret of a log by which it is known.
//!
//! Invariants:
//! - A mark is written in one write with the frame behind it, only after everything up to the LSN in it has been synced.
//! - So a mark proves that everything up to that LSN was durable, wherever it stands, and that what stands behind it was written as a frame.
//! - It belongs to one place of one segment of one log. Users choose bytes that get into frames; without the secret none of them are a mark.

use std::{fmt, io};

use crate::Lsn;

/// What a log knows and its users do not: its marks are made of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LogSecret([u8; LOG_SECRET_BYTES]);

impl LogSecret {
    /// One that nobody knows.
    pub fn random() -> io::Result<LogSecret> {
        let mut bytes = [0; LOG_SECRET_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| {
            io::Error::other(format!("the operating system gives no random bytes: {error}"))
        })?;
        Ok(LogSecret(bytes))
    }

    /// The secret with these bytes.
    pub const fn from_bytes(bytes: [u8; LOG_SECRET_BYTES]) -> LogSecret {
        LogSecret(bytes)
    }

    /// The bytes of the secret.
    pub const fn as_bytes(&self) -> &[u8; LOG_SECRET_BYTES] {
        &self.0
    }
}

impl fmt::Debug for LogSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogSecret(..)")
    }
}

/// Makes the marks of one segment, and knows them.
#[derive(Clone)]
pub(crate) struct Marks {
    key: [u8; 32],
}

impl Marks {
    /// Those of the segment that begins with `first`.
    pub(crate) fn new(secret: &LogSecret, first: Lsn) -> Marks {
        let mut material = [0; LOG_SECRET_BYTES + 8];
        material[..LOG_SECRET_BYTES].copy_from_slice(&secret.0);
        material[LOG_SECRET_BYTES..].copy_from_slice(&first.get().to_le_bytes());
        Marks { key: blake3::derive_key(PURPOSE_MARK, &material) }
    }

    /// The mark at byte `place`: everything up to `durable` has been synced.
    pub(crate) fn encode(&self, place: u64, durable: Lsn) -> [u8; MARK_BYTES] {
        let mut bytes = [0; MARK_BYTES];
        bytes[..4].copy_from_slice(&MARK_MAGIC);
        bytes[8..TAG_AT].copy_from_slice(&durable.get().to_le_bytes());
        let mut tagged = [0; TAG_AT + 8];
        tagged[..TAG_AT].copy_from_slice(&bytes[..TAG_AT]);
        tagged[TAG_AT..].copy_from_slice(&place.to_le_bytes());
        let tag = blake3::keyed_hash(&self.key, &tagged);
        bytes[TAG_AT..].copy_from_slice(&tag.as_bytes()[..MARK_BYTES - TAG_AT]);
        bytes
    }

    /// What the mark at byte `place` proves to have been durable; `None` if `bytes` do not begin with an undamaged mark of that place.
    pub(crate) fn parse(&self, place: u64, bytes: &[u8]) -> Option<Lsn> {
        let bytes = bytes.get(..MARK_BYTES)?;
        if bytes[..4] != MARK_MAGIC {
            return None;
        }
        let mut durable = [0; 8];
        durable.copy_from_slice(&bytes[8..TAG_AT]);
        let durable = Lsn::new(u64::from_le_bytes(durable));
        (self.encode(place, durable) == bytes && durable < Lsn::MAX).then_some(durable)
    }
}

impl fmt::Debug for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Marks(..)")
    }
}

/// The first bytes of every mark.
pub(crate) const MARK_MAGIC: [u8; 4] = *b"MsyX";
/// The length of a mark.
pub(crate) const MARK_BYTES: usize = 32;
/// The length of the secret of a log, in bytes.
pub const LOG_SECRET_BYTES: usize = 32;
const TAG_AT: usize = 16;
const PURPOSE_MARK: &str = "murphy 2026 segment mark v0";

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: a mark that somebody has seen elsewhere is a proof where he puts it.
    #[test]
    fn a_mark_is_worth_nothing_in_another_place_segment_or_log() {
        let (secret, first, place) = (LogSecret::from_bytes([3; 32]), Lsn::new(70), 4096);
        let marks = Marks::new(&secret, first);
        let mark = marks.encode(place, Lsn::new(99));
        assert_eq!(marks.parse(place, &mark), Some(Lsn::new(99)));
        assert_eq!(marks.parse(place, &mark[..MARK_BYTES - 1]), None);
        assert_eq!(marks.parse(place + 1, &mark), None);
        assert_eq!(Marks::new(&secret, first.next()).parse(place, &mark), None);
        let mut other = *secret.as_bytes();
        other[31] ^= 1;
        assert_eq!(Marks::new(&LogSecret::from_bytes(other), first).parse(place, &mark), None);
        for bit in 0..MARK_BYTES * 8 {
            let mut damaged = mark;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(marks.parse(place, &damaged), None, "bit {bit}");
        }
    }

    #[test]
    fn two_logs_have_two_secrets_and_show_neither() {
        let (one, other) = (LogSecret::random().unwrap(), LogSecret::random().unwrap());
        assert_ne!(one, other);
        assert_eq!(format!("{one:?} {:?}", Marks::new(&one, Lsn::FIRST)), "LogSecret(..) Marks(..)");
    }
}
