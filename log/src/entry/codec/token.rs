//! The tokens: what values repeat of their entry, and the marks that it leaves when it is cut out.
//!
//! Invariants:
//! - A mark says exactly which bytes were cut and where; finding none, or not all, is never wrong.

use super::{Cursor, DecodeError, KEY_NUMBER_BYTES, MAX_MARKS, MAX_RUN, SEARCHED_BYTES};
use crate::{LogTime, Lsn};

/// What is cut out of the values of one entry.
pub(super) struct Tokens {
    lsn: u64,
    lsn_bytes: [u8; 8],
    time_bytes: [u8; 9],
}

impl Tokens {
    pub(super) fn of(lsn: Lsn, time: LogTime) -> Tokens {
        Tokens { lsn: lsn.get(), lsn_bytes: lsn.get().to_be_bytes(), time_bytes: time.row_bytes() }
    }

    pub(super) fn bytes(&self, what: Token) -> &[u8] {
        match what {
            Token::Lsn => &self.lsn_bytes,
            Token::Time => &self.time_bytes,
        }
    }

    /// How far `number` lies before the entry's LSN, if that is shorter to write.
    pub(super) fn distance(&self, number: u64) -> Option<u64> {
        self.lsn.checked_sub(number).filter(|distance| *distance < number)
    }

    /// The number at this distance before the entry's LSN.
    pub(super) fn at_distance(&self, distance: u64) -> Option<u64> {
        self.lsn.checked_sub(distance)
    }

    /// Finds the tokens in the beginning of `value`, from left to right, without overlap; says how many marks they take.
    pub(super) fn find(&self, value: &[u8], marks: &mut [Mark; MAX_MARKS]) -> usize {
        let value = &value[..value.len().min(SEARCHED_BYTES)];
        let time_start = be_u64(&self.time_bytes);
        let (mut count, mut offset) = (0, 0);
        while offset + KEY_NUMBER_BYTES <= value.len() {
            let window = be_u64(&value[offset..]);
            let what = if window == self.lsn {
                Token::Lsn
            } else if window == time_start && value.get(offset + 8) == Some(&self.time_bytes[8]) {
                Token::Time
            } else {
                offset += 1;
                continue;
            };
            let run = marks[..count].last_mut().filter(|mark| mark.extends_to(offset, what));
            match run {
                Some(mark) => mark.run += 1,
                None if count == MAX_MARKS => break,
                None => {
                    marks[count] = Mark { offset, what, run: 1 };
                    count += 1;
                }
            }
            offset += what.length();
        }
        count
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Token {
    #[default]
    Lsn,
    Time,
}

impl Token {
    fn length(self) -> usize {
        match self {
            Token::Lsn => 8,
            Token::Time => 9,
        }
    }
}

/// Where tokens were cut out of a value: up to [`MAX_RUN`] equal ones, one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mark {
    /// Where the first of them stands in the value.
    pub(super) offset: usize,
    what: Token,
    run: usize,
}

impl Mark {
    /// How many bytes it stands for.
    pub(super) fn length(&self) -> usize {
        self.run * self.what.length()
    }

    fn extends_to(&self, offset: usize, what: Token) -> bool {
        self.what == what && self.run < MAX_RUN && self.offset + self.length() == offset
    }

    /// The number that is stored for it, when the tokens before it end at `end`.
    pub(super) fn stored(&self, end: usize, more: bool) -> u64 {
        let bits = u64::from(more) << 3 | (self.run as u64 - 1) << 1 | u64::from(self.what == Token::Time);
        ((self.offset - end) as u64) << 4 | bits
    }
}

/// A mark as it is read back.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoredMark {
    /// How many bytes of the value stand between the tokens before it and its own.
    pub(super) gap: usize,
    pub(super) what: Token,
    pub(super) run: usize,
    /// Whether another mark follows.
    more: bool,
}

impl StoredMark {
    /// Reads a mark; a gap is at most as long as the beginning of a value in which tokens are looked for.
    fn read(cursor: &mut Cursor<'_>) -> Result<StoredMark, DecodeError> {
        let number = cursor.count(SEARCHED_BYTES << 4 | 15, "a mark beyond its value")?;
        let what = if number & 1 == 0 { Token::Lsn } else { Token::Time };
        Ok(StoredMark { gap: number >> 4, what, run: (number >> 1 & 3) + 1, more: number & 8 != 0 })
    }

    /// How many bytes it stands for.
    pub(super) fn length(&self) -> usize {
        self.run * self.what.length()
    }
}

/// The marks of a value, one after the other; they have been read before, so nothing is wrong with them.
#[derive(Clone, Debug)]
pub(super) struct Marks<'a> {
    stored: Cursor<'a>,
}

impl<'a> Marks<'a> {
    /// Reads the marks of a value of which `left` bytes are left.
    pub(super) fn read(cursor: &mut Cursor<'a>, mut left: usize) -> Result<Marks<'a>, DecodeError> {
        let (start, mut count, mut more) = (cursor.clone(), 0, true);
        while more {
            let mark = StoredMark::read(cursor)?;
            left = left.checked_sub(mark.gap).ok_or_else(|| cursor.malformed("a mark beyond its value"))?;
            count += 1;
            if count > MAX_MARKS {
                return Err(cursor.malformed("more marks than the limit"));
            }
            more = mark.more;
        }
        Ok(Marks { stored: start.up_to(cursor) })
    }

    /// No marks.
    pub(super) fn none(cursor: &Cursor<'a>) -> Marks<'a> {
        Marks { stored: cursor.up_to(cursor) }
    }

    /// How many bytes they stand for.
    pub(super) fn cut(&self) -> usize {
        self.clone().map(|mark| mark.length()).sum()
    }
}

impl Iterator for Marks<'_> {
    type Item = StoredMark;

    fn next(&mut self) -> Option<StoredMark> {
        if self.stored.is_empty() { None } else { StoredMark::read(&mut self.stored).ok() }
    }
}

/// The first eight bytes as a number.
pub(super) fn be_u64(bytes: &[u8]) -> u64 {
    let mut number = [0; KEY_NUMBER_BYTES];
    number.copy_from_slice(&bytes[..KEY_NUMBER_BYTES]);
    u64::from_be_bytes(number)
}
