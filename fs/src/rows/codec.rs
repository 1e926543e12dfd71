//! Writing and reading the bytes of a row.

use bytes::{Buf, Bytes};

use crate::Timespec;

/// A value that is not a row of its table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RowError {
    /// The value ends early, after so many bytes.
    #[error("row is cut short at byte {0}")]
    Short(usize),
    /// The layout is of a version that this program does not know.
    #[error("row has the unknown version {0} at byte 0")]
    Version(u8),
    /// A field holds what it cannot hold.
    #[error("row has an impossible value in the field {0}")]
    Field(&'static str),
    /// Bytes follow the last field.
    #[error("row has {count} bytes too many from byte {at} on")]
    Trailing {
        /// Where the row should end.
        at: usize,
        /// How many there are.
        count: usize,
    },
}

/// Collects the bytes of one value. Nearly all are short, and become one allocation that is shared from the start.
pub(super) struct RowWriter {
    short: ShortRow,
    /// Everything, once it is too long for `short`.
    long: Vec<u8>,
}

struct ShortRow {
    bytes: [u8; SHORT_ROW],
    length: u8,
}

impl AsRef<[u8]> for ShortRow {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl RowWriter {
    pub(super) fn new(version: u8) -> RowWriter {
        let mut short = ShortRow { bytes: [0; SHORT_ROW], length: 1 };
        short.bytes[0] = version;
        RowWriter { short, long: Vec::new() }
    }

    pub(super) fn byte(&mut self, byte: u8) -> &mut RowWriter {
        self.bytes(&[byte])
    }

    pub(super) fn varint(&mut self, mut number: u64) -> &mut RowWriter {
        let (mut bytes, mut length) = ([0; VARINT_MAX], 0);
        while number >= 0x80 {
            bytes[length] = number as u8 | 0x80;
            number >>= 7;
            length += 1;
        }
        bytes[length] = number as u8;
        self.bytes(&bytes[..=length])
    }

    /// Eight bytes, for a number that may be the entry's own LSN.
    pub(super) fn fixed(&mut self, number: u64) -> &mut RowWriter {
        self.bytes(&number.to_be_bytes())
    }

    pub(super) fn time(&mut self, time: Timespec) -> &mut RowWriter {
        self.bytes(&time.row_bytes())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut RowWriter {
        let start = usize::from(self.short.length);
        match self.short.bytes.get_mut(start..start + bytes.len()) {
            Some(place) if self.long.is_empty() => {
                place.copy_from_slice(bytes);
                self.short.length += bytes.len() as u8;
            }
            _ => {
                if self.long.is_empty() {
                    self.long.extend_from_slice(self.short.as_ref());
                }
                self.long.extend_from_slice(bytes);
            }
        }
        self
    }

    pub(super) fn finish(&mut self) -> Bytes {
        if self.long.is_empty() {
            let ShortRow { bytes, length } = self.short;
            return Bytes::from_owner(ShortRow { bytes, length });
        }
        std::mem::take(&mut self.long).into()
    }
}

/// Takes a value apart.
pub(super) struct RowReader<'a> {
    rest: &'a [u8],
    /// The length of the whole value.
    length: usize,
}

impl<'a> RowReader<'a> {
    /// Checks that the layout's version is `version`.
    pub(super) fn new(value: &'a [u8], version: u8) -> Result<RowReader<'a>, RowError> {
        match value.split_first() {
            None => Err(RowError::Short(0)),
            Some((found, rest)) if *found == version => Ok(RowReader { rest, length: value.len() }),
            Some((found, _)) => Err(RowError::Version(*found)),
        }
    }

    pub(super) fn byte(&mut self) -> Result<u8, RowError> {
        let (byte, rest) = self.rest.split_first().ok_or(RowError::Short(self.length))?;
        self.rest = rest;
        Ok(*byte)
    }

    pub(super) fn varint(&mut self) -> Result<u64, RowError> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 || (byte == 0 && shift > 0) {
                return Err(RowError::Field("varint"));
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(RowError::Field("varint"))
    }

    pub(super) fn varint32(&mut self, field: &'static str) -> Result<u32, RowError> {
        u32::try_from(self.varint()?).map_err(|_| RowError::Field(field))
    }

    pub(super) fn fixed(&mut self) -> Result<u64, RowError> {
        let mut bytes = self.take(8)?;
        Ok(bytes.get_u64())
    }

    pub(super) fn time(&mut self) -> Result<Timespec, RowError> {
        Timespec::from_row_bytes(self.take(TIME_BYTES)?).ok_or(RowError::Field("time"))
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], RowError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(RowError::Short(self.length))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], RowError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(RowError::Short(self.length))?;
        self.rest = rest;
        Ok(*taken)
    }

    /// What is left, for a last field without a length.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    pub(super) fn finish(self) -> Result<(), RowError> {
        let count = self.rest.len();
        if count == 0 { Ok(()) } else { Err(RowError::Trailing { at: self.length - count, count }) }
    }
}

impl Timespec {
    /// The nine bytes of a time in a row: five of seconds + 2^39, four of nanoseconds, big-endian, so that they also sort.
    /// The same form as `murphy_log::LogTime::row_bytes`.
    pub(crate) fn row_bytes(self) -> [u8; TIME_BYTES] {
        let time = self.clamped();
        let seconds = (time.seconds + SECONDS_BIAS).cast_unsigned().to_be_bytes();
        let mut bytes = [0; TIME_BYTES];
        bytes[..5].copy_from_slice(&seconds[3..]);
        bytes[5..].copy_from_slice(&time.nanos.to_be_bytes());
        bytes
    }

    pub(crate) fn from_row_bytes(bytes: &[u8]) -> Option<Timespec> {
        let mut bytes = bytes;
        if bytes.len() != TIME_BYTES {
            return None;
        }
        let seconds = bytes.get_uint(5).cast_signed() - SECONDS_BIAS;
        let nanos = bytes.get_u32();
        (nanos < 1_000_000_000).then_some(Timespec { seconds, nanos })
    }
}

const TIME_BYTES: usize = 9;
const SECONDS_BIAS: i64 = 1 << 39;
/// A longer row is not built in place; those of inodes are below.
const SHORT_ROW: usize = 79;
/// The longest varint of 64 bits.
const VARINT_MAX: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_varint_has_one_form_only() {
        for bytes in [&[0, 0x80, 0x00][..], &[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02]]
        {
            let mut reader = RowReader::new(bytes, 0).unwrap();
            assert_eq!(reader.varint(), Err(RowError::Field("varint")));
        }
        for number in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), u64::MAX] {
            let bytes = RowWriter::new(0).varint(number).finish();
            let mut reader = RowReader::new(&bytes, 0).unwrap();
            assert_eq!(reader.varint(), Ok(number));
            assert_eq!(reader.finish(), Ok(()));
        }
    }

    /// The fear: a row that outgrows the place it is built in loses what it began with.
    #[test]
    fn rows_of_every_length_hold_what_was_written() {
        for length in 0..3 * SHORT_ROW {
            let (first, rest) = (vec![1; length / 3], vec![2; length - length / 3]);
            let row = RowWriter::new(7).bytes(&first).bytes(&rest).byte(3).finish();
            assert_eq!(row, [&[7][..], &first, &rest, &[3]].concat(), "{length}");
        }
    }

    #[test]
    fn times_before_1970_and_far_ahead_survive() {
        for time in [
            Timespec::MIN,
            Timespec::MAX,
            Timespec { seconds: -1, nanos: 999_999_999 },
            Timespec::default(),
            Timespec { seconds: 32_503_680_000, nanos: 1 },
        ] {
            assert_eq!(Timespec::from_row_bytes(&time.row_bytes()), Some(time));
        }
        let beyond = Timespec { seconds: i64::MAX, nanos: 0 };
        assert_eq!(Timespec::from_row_bytes(&beyond.row_bytes()), Some(Timespec::MAX));
    }
}
